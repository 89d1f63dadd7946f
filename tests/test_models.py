"""What models.py promises: SPD's recorded numbers, shapes, generation, the loss in pieces, loading."""

import copy
import importlib
import json
import math
import subprocess
import sys
import warnings
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SHARED
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import models

GPT2S = ["GPT2", "GPT2Simple"]
LLAMAS = ["Llama", "LlamaSimple", "LlamaSimpleMLP"]
ALL = GPT2S + LLAMAS
V, BLOCK, C, NH, HS, NLAYER = 61, 16, 32, 4, 8, 2
pytestmark = pytest.mark.usefixtures("one_thread")
five = pytest.mark.parametrize("name", ALL)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def make_config(name, **changes):
    shape = {"block_size": BLOCK, "vocab_size": V, "n_layer": NLAYER, "n_head": NH, "n_embd": C}
    if name in LLAMAS:
        shape |= {"n_ctx": BLOCK, "rotary_dim": HS, "n_intermediate": 40, "n_key_value_heads": 2}
    return models.MODEL_CLASSES[name].config_class(**shape | changes)


def make(name, **changes):
    """A tiny model none of whose parameters is 0 or 1, so that one left out or mixed up shows."""
    model = models.MODEL_CLASSES[name](make_config(name, **changes))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            norm = p.dim() == 1 and key.endswith("weight")
            p.copy_(norm + 0.2 * torch.randn(p.shape, generator=rng))
    return model


def tokens(T=BLOCK, B=2):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))


def batch(ignored=5, B=3):
    """Inputs and targets as slices, the first `ignored` targets -1."""
    both = tokens(BLOCK + 1, B)
    x, y = both[:, :-1], both[:, 1:].clone()
    y.view(-1)[:ignored] = -1
    return x, y


@torch.no_grad()
def logits_of(model, idx):
    return model(idx)[0]


def gradients(model, x, y, call=None, **options):
    """(the loss, the gradient of each parameter that got one)"""
    model.zero_grad()
    loss = (model if call is None else call)(x, y, **options)[1]
    loss.backward()
    return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


# -----------------------------------------------------------------------------
# what is computed; test_convert.py compares all five with transformers' classes


def test_golden():
    """What SPD's own classes computed: initial weights, logits, gradients, ten updates."""
    script = SHARED / "check_golden.py"
    if not script.exists():
        pytest.skip("../shared/check_golden.py, which holds SPD's recorded numbers, is missing")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "5 of 5 agree" in done.stdout, done.stdout + done.stderr


@five
def test_flash_attention_is_the_softmax(name):
    flash, softmax = (gradients(make(name, flash_attention=flash), *batch()) for flash in (True, False))
    close(flash, softmax)
    # Every parameter is in use. But a key bias adds the same to all scores of a row, unless RoPE rotates it.
    silent = {f"h.{i}.attn.k_proj.bias" for i in range(NLAYER)} if name == "GPT2Simple" else set()
    assert {key for key, g in flash[1].items() if g.abs().max() < 1e-4} == silent


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_computes_in_float32(dtype):
    norm = models.RMSNorm(C, eps=1e-6).to(dtype)
    norm.weight.data.fill_(1.3)
    x = (300 * torch.randn(5, C, generator=torch.Generator().manual_seed(0))).to(dtype)  # float16 ends at 65504
    whole = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(norm(x).detach(), whole.to(dtype) * norm.weight.detach(), rtol=torch.finfo(dtype).eps / 4)


# -----------------------------------------------------------------------------
# names, configs, initial weights


@five
def test_config_fields_and_defaults_are_spds(name):
    want = {"model_type": name, "block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    want |= {"flash_attention": True}
    if name in LLAMAS:
        want |= {"n_intermediate": 3072 if name == "LlamaSimpleMLP" else 2048, "mlp_bias": False, "attn_bias": False}
        want |= {"rotary_adjacent_pairs": False, "rotary_dim": 64, "rotary_base": 10000, "n_ctx": 1024}
        want |= {"n_key_value_heads": 3, "use_grouped_query_attention": True, "rms_norm_eps": 1e-6}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the defaults go together
        config = models.MODEL_CLASSES[name].config_class()
    assert asdict(config) == want and list(models.MODEL_CLASSES) == ALL


@five
def test_initial_weights_depend_on_init_seed_alone(name):
    states = []
    for global_seed, kwargs in ((1, {}), (2, {"init_seed": 42}), (1, {"init_seed": 43})):
        torch.manual_seed(global_seed)
        states.append(models.MODEL_CLASSES[name](make_config(name), **kwargs).state_dict())
    a, b, other = states
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], other[key]) for key in a if a[key].dim() == 2)


IMPOSSIBLE = [
    (ALL, {"n_embd": 30}, "n_head"),
    (ALL, {"n_layer": 0}, "n_layer"),
    (ALL, {"n_head": 4.0}, "n_head"),
    (ALL, {"vocab_size": True}, "vocab_size"),
    (ALL, {"model_type": "GPT5"}, "model_type"),
    (LLAMAS, {"n_key_value_heads": 3}, "n_key_value_heads"),
    (LLAMAS, {"n_ctx": 32}, "block_size"),
    (LLAMAS, {"n_embd": 12}, "even"),
    (LLAMAS, {"rms_norm_eps": 0.0}, "rms_norm_eps"),
]


@pytest.mark.parametrize("names,fields,word", IMPOSSIBLE, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_impossible_shapes(names, fields, word):
    for name in names:
        with pytest.raises(ValueError, match=word):
            make_config(name, **fields)
    with pytest.warns(UserWarning, match="rotary_dim"):  # not impossible, but without effect
        make_config("Llama", rotary_dim=64)


@five
def test_the_class_decides_what_is_built(name):
    """Whatever the class of the config: a plain object, or that of a module that was reloaded since."""
    config, want = make_config(name), logits_of(models.MODEL_CLASSES[name](make_config(name)), tokens())
    plain = models.MODEL_CLASSES[name](SimpleNamespace(**asdict(config)))
    spec = importlib.util.spec_from_file_location("reloaded", ROOT / "models.py")
    sys.modules["reloaded"] = reloaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reloaded)
    for model in (plain, reloaded.MODEL_CLASSES[name](config)):
        assert torch.equal(logits_of(model, tokens()), want)


@five
def test_meta_device_and_bfloat16(name):
    """A model that is built without memory computes the same after loading; the RoPE tables stay float32."""
    model, want = make(name), logits_of(make(name), tokens())
    for assign in (False, True):
        with torch.device("meta"):
            empty = models.MODEL_CLASSES[name](make_config(name))
        assert empty(tokens().to("meta"), tokens().to("meta"), return_logits=False)[1].is_meta
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(logits_of(empty, tokens()), want)
        assert empty.lm_head.weight is empty.wte.weight
    rounded = make(name)
    rounded.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()})
    back = copy.deepcopy(model).bfloat16().float()
    assert torch.equal(logits_of(back, tokens()), logits_of(rounded, tokens()))
    logits, loss = model.bfloat16()(*batch())
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32) and model.lm_head.weight is model.wte.weight


# -----------------------------------------------------------------------------
# forward and generate


@five
def test_mistakes_when_called(name):
    model, idx, optimizers = make(name), tokens(BLOCK + 4), make(name).configure_optimizers
    mistakes = [(partial(model, idx), "block_size"), (partial(model.generate, tokens(0), 1), "empty")]
    mistakes += [(partial(optimizers, 0.1, 1e-3, (0.9, 0.95), "cpu", stage), "zero_stage") for stage in (2, 3)]
    for field, value in (("temperature", -0.5), ("temperature", math.nan), ("top_k", 0)):
        mistakes.append((partial(model.generate, idx, 1, **{field: value}), field))
    for bad in (V, -1):
        wrong = idx.clone()
        wrong[1, 1] = bad
        mistakes += [(partial(model, wrong[:, :BLOCK]), f"{bad} "), (partial(model.generate, wrong, 1), f"{bad} ")]
    for call, word in mistakes:
        with pytest.raises(ValueError, match=word):
            call()


@five
def test_loss_is_the_mean_over_targets_that_are_not_minus_one(name):
    model, (x, y) = make(name), batch(ignored=BLOCK + 3)
    logits, loss = model(x, y)
    picked = [-logits[b, t].log_softmax(-1)[y[b, t]] for b in range(3) for t in range(BLOCK) if y[b, t] != -1]
    assert len(picked) == 2 * BLOCK - 3 and logits.shape == (3, BLOCK, V)
    close(loss, torch.stack(picked).mean())
    assert model(x)[1] is None and model(x, y, return_logits=False)[0] is None
    assert model(tokens(B=0))[0].shape == (0, BLOCK, V)


@pytest.mark.parametrize("T", [3, BLOCK, BLOCK + 4], ids=["short", "full", "cropped"])
@five
def test_greedy_generation(name, T):
    model, want = make(name), tokens(T)
    for _ in range(8):
        want = torch.cat([want, logits_of(model, want[:, -BLOCK:])[:, -1].argmax(-1)[:, None]], dim=1)
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-38}):
        assert torch.equal(model.generate(tokens(T), 8, **options), want)
    assert torch.equal(model.generate(tokens(T)[1], 8, temperature=0.0), want[1])  # 1-D in, 1-D out
    assert torch.equal(model.generate(tokens(T), 0), tokens(T))


@pytest.mark.parametrize("temperature,top_k", [(0.5, None), (2.0, None), (1.0, 3), (1.0, 1000)])
def test_samples_have_the_models_distribution(temperature, top_k):
    model, idx, n = make("LlamaSimpleMLP"), tokens(4, B=1), 5000
    logits = logits_of(model, idx)[0, -1] / temperature
    if top_k == 3:
        logits[logits < logits.topk(3).values[-1]] = -math.inf
    want = logits.softmax(-1)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(idx.expand(n, -1), 1, temperature=temperature, top_k=top_k))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    got = torch.bincount(drawn[0][:, -1], minlength=V) / n
    assert ((got - want).abs() <= 5 * (want * (1 - want) / n).sqrt() + 3 / n).all()
    assert (got[want == 0] == 0).all()


def test_generation_ends_where_every_row_has_ended():
    model = make("LlamaSimpleMLP")  # made to count: the next token is the last one plus 1
    model.register_forward_hook(lambda m, args, out: (F.one_hot((args[0] + 1) % V, V).float(), None))
    idx = torch.tensor([[9, 3], [9, 5], [7, 1]])
    want = [[9, 3, 4, 5, 6, 7, 7, 7], [9, 5, 6, 7, 7, 7, 7, 7], [7, 1, 2, 3, 4, 5, 6, 7]]
    assert model.generate(idx, 20, temperature=0.0, eos_token_id=7).tolist() == want  # a 7 in the prompt ends nothing
    assert model.generate(idx[1], 20, temperature=0.0, eos_token_id=7).tolist() == [9, 5, 6, 7]


# -----------------------------------------------------------------------------
# the loss in pieces


class Largest(TorchDispatchMode):
    """The most elements that a tensor made within it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])  # CUDA pads the vocabulary
@pytest.mark.parametrize("ignored,change", [(0, ""), (5, ""), (47, ""), (0, "fork"), (0, "lm_head"), (0, "trunk")])
@five
def test_loss_and_gradients_are_those_of_all_logits(name, ignored, change, device, monkeypatch):
    """Also where lm_head or all the rest is frozen, and in a fork that changes the loss, which is in one place."""
    model = make(name).to(device)
    x, y = (z.to(device) for z in batch(ignored))
    if change in ("lm_head", "trunk"):
        model.requires_grad_(change == "lm_head")
        model.lm_head.requires_grad_(change != "lm_head")
    if change == "fork":
        loss = models.summed_loss
        monkeypatch.setattr(models, "summed_loss", lambda logits, y: loss(logits, y) + logits.logsumexp(-1).sum())
    plain, pieces = (gradients(model, x, y, return_logits=keep) for keep in (True, False))
    torch.testing.assert_close(pieces, plain, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(x, y.int(), return_logits=False)[1], plain[0])


@pytest.mark.parametrize("grad", [True, False])
def test_logits_of_all_positions_never_exist(grad):
    model, (x, y) = make("LlamaSimpleMLP", vocab_size=4000), batch(B=16)
    everything = y.numel() * 4000
    for keep in (True, False):
        with torch.set_grad_enabled(grad), Largest() as seen:
            loss = model(x, y, return_logits=keep)[1]
            if grad:
                loss.backward()
        assert seen.elements == everything if keep else seen.elements <= everything // 4, keep


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype):
    """float16 with a loss scaled as GradScaler does: gradients of the logits do not vanish."""
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    _, want = gradients(model, x, y, return_logits=False)

    def scaled(x, y, **options):
        with torch.autocast("cpu", dtype):
            return None, model(x, y, **options)[1] * 2.0**10

    for keep in (True, False):
        _, got = gradients(model, x, y, scaled, return_logits=keep)
        for key, g in got.items():
            assert (g / 2**10 - want[key]).norm() < 0.05 * want[key].norm(), (key, keep)


def test_gradients_do_not_vanish_in_float16():
    """Those of a mean over many rows are below float16's smallest number."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = 3 * torch.randn(2048, C, generator=rng), torch.randn(V, C, generator=rng).requires_grad_()
    targets, got = (hidden @ weight.T).argmax(-1), []  # every target is likely
    for enabled in (True, False):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            loss = models.LossInPieces.apply(hidden, weight, targets, True) / len(hidden)
        got += torch.autograd.grad(loss, weight)
    assert (got[0] - got[1]).norm() < 0.01 * got[1].norm()


def test_differentiated_twice_only_with_logits():
    """With the loss in pieces second derivatives and torch.func fail, and nothing is silently left out."""
    model, (x, y) = make("LlamaSimpleMLP", flash_attention=False), batch()

    def twice(**options):
        (grad,) = torch.autograd.grad(model(x, y, **options)[1], model.wte.weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), model.ln_f.weight)[0]

    def functional(params, **options):
        return torch.func.functional_call(model, params, (x, y), options)[1]

    params = dict(model.named_parameters())
    assert twice().abs().sum() > 0
    close(torch.func.grad(functional)(params), gradients(model, x, y)[1])
    for fails in (twice, lambda **options: torch.func.grad(partial(functional, **options))(params)):
        with pytest.raises(RuntimeError, match=r"differentiated once|functorch"):
            fails(return_logits=False)


@pytest.mark.parametrize("head", ["bias", "sequence", "weight_norm"])
def test_a_changed_unembedding_takes_effect(head):
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    if head == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(model.lm_head)
        model.lm_head.parametrizations.weight.original0.data.mul_(2)
    else:
        linear = torch.nn.Linear(C, V)
        model.lm_head = linear if head == "bias" else torch.nn.Sequential(linear)
    close(model(x, y, return_logits=False)[1], model(x, y)[1])
    assert abs(model(x, y)[1] - make("LlamaSimpleMLP")(x, y)[1]) > 1e-2


def test_compiled_whole_and_once():
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    want = gradients(model, x, y, return_logits=False)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, backend=lambda g, _: graphs.append(g) or g, fullgraph=True, dynamic=False)
    for _ in range(3):
        close(gradients(model, x, y, compiled, return_logits=False), want)
        with torch.no_grad():
            close(compiled(x, y, return_logits=False)[1], want[0])
    assert len(graphs) == 2  # one to train, one to validate


# -----------------------------------------------------------------------------
# optimizer, FLOPs, loading


@pytest.mark.parametrize("zero_stage", [0, 1])  # without a process group there is nobody to share with
@five
def test_optimizer(name, zero_stage):
    model = make(name, **({"attn_bias": True} if name in LLAMAS else {}))
    model.h[0].requires_grad_(False)
    opt = model.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu", zero_stage)
    assert type(opt) is torch.optim.AdamW
    assert all(g["lr"] == 3e-4 and tuple(g["betas"]) == (0.8, 0.9) and g["fused"] for g in opt.param_groups)
    decay = {id(p): g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in opt.param_groups) == len(decay)  # nothing twice, not even the tied weight
    assert decay == {id(p): 0.1 if p.dim() >= 2 else 0.0 for p in model.parameters() if p.requires_grad}
    for device in ("cuda", "cuda:0", "xpu"):  # fused by the type of the device
        opt = model.configure_optimizers(0.1, 3e-4, (0.8, 0.9), device)
        assert opt.param_groups[0]["fused"] is device.startswith("cuda")


@five
def test_flops_are_those_that_are_counted(name):
    model = make(name)
    with FlopCounterMode(display=False) as counted:
        model(*batch())[1].backward()
    attention = 12 * NLAYER * C * BLOCK  # the counter knows that half of the scores are masked
    ours, plain = model.flops_per_token(), counted.get_total_flops() / (3 * BLOCK)
    assert ours - attention <= plain <= 1.1 * ours


@pytest.mark.parametrize("file", ["model_step_7.pt", "checkpoints/model_step_7.pt", "model_step_7.safetensors"])
def test_a_loaded_model_is_compared_with_check_json(tmp_path, file):
    model, path, (x, y) = make("LlamaSimpleMLP"), tmp_path / file, batch(ignored=0, B=1)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".pt":  # as SPD's older ones are: with a wrapper's prefix, and a buffer
        buffer = {"h.0.attn.rotary_cos": torch.zeros(1)}
        torch.save({f"_orig_mod.{k}": v for k, v in model.state_dict().items()} | buffer, path)
    else:  # param-decomp's: the tied weight once
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file({k: v.data for k, v in model.named_parameters()}, path)
    info = SimpleNamespace(checkpoint_path=path, model_config_dict=asdict(model.config))
    good = {"step": 7, "ids": [*x[0].tolist(), y[0, -1].item()], "loss": model(x, y)[1].item()}
    for check in (None, good, {"loss": 9.0, "step": 8}):  # a check of another step says nothing
        if check:
            (tmp_path / "check.json").write_text(json.dumps(check))
        loaded = models.LlamaSimpleMLP.from_run_info(info)
        assert not loaded.training and torch.equal(logits_of(loaded, x), logits_of(model, x))
    for wrong, eps in ((1.01, 1e-6), (1.0, 0.5)):  # other weights; the same weights in another model
        (tmp_path / "check.json").write_text(json.dumps(good | {"loss": wrong * good["loss"]}))
        info.model_config_dict["rms_norm_eps"] = eps
        with pytest.raises(ValueError, match="not the one that was trained"):
            models.LlamaSimpleMLP.from_run_info(info)
