"""What models.py promises: SPD's recorded numbers, shapes, generation, the loss in pieces, loading."""

import copy
import importlib
import json
import math
import subprocess
import sys
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

LLAMAS = ["Llama", "LlamaSimple", "LlamaSimpleMLP"]
ALL = ["GPT2", "GPT2Simple", *LLAMAS]
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
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=rng)
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


def gradients(model, x, y, **options):
    """(the loss, the gradient of each parameter that got one)"""
    model.zero_grad()
    loss = model(x, y, **options)[1]
    loss.backward()
    return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


# -----------------------------------------------------------------------------
# what is computed; test_convert.py compares all five with transformers' classes


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/check_golden.py has SPD's recorded numbers")
def test_golden():
    """What SPD's own classes computed: initial weights, logits, gradients, ten updates."""
    done = subprocess.run([sys.executable, SHARED / "check_golden.py"], cwd=ROOT, capture_output=True, text=True)
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
# configs, initial weights, forward and generate


@five
@pytest.mark.filterwarnings("error")  # the defaults go together
def test_config_fields_and_defaults_are_spds(name):
    want = {"model_type": name, "block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    want |= {"flash_attention": True}
    if name in LLAMAS:
        want |= {"n_intermediate": 3072 if name == "LlamaSimpleMLP" else 2048, "mlp_bias": False, "attn_bias": False}
        want |= {"rotary_adjacent_pairs": False, "rotary_dim": 64, "rotary_base": 10000, "n_ctx": 1024}
        want |= {"n_key_value_heads": 3, "use_grouped_query_attention": True, "rms_norm_eps": 1e-6}
    assert asdict(models.MODEL_CLASSES[name].config_class()) == want and list(models.MODEL_CLASSES) == ALL


@five
def test_impossible_shapes(name):
    mistakes = [("n_embd", 30, "n_head"), ("n_layer", 0, "n_layer"), ("n_head", 4.0, "n_head")]
    mistakes += [("vocab_size", True, "vocab_size"), ("model_type", "GPT5", "model_type")]
    if name in LLAMAS:
        mistakes += [("n_key_value_heads", 3, "n_key_value_heads"), ("n_ctx", 32, "block_size")]
        mistakes += [("rms_norm_eps", 0.0, "rms_norm_eps"), ("n_embd", 12, "even")]
        with pytest.warns(UserWarning, match="rotary_dim"):  # not impossible, but without effect
            make_config(name, rotary_dim=64)
    for field, value, word in mistakes:
        with pytest.raises(ValueError, match=word):
            make_config(name, **{field: value})


@five
def test_the_class_and_init_seed_decide_what_is_built(name):
    """Whatever the global seed, and the class of the config: a plain object, or that of a reloaded module."""
    cls, config = models.MODEL_CLASSES[name], make_config(name)
    spec = importlib.util.spec_from_file_location("reloaded", ROOT / "models.py")
    sys.modules["reloaded"] = reloaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reloaded)
    model, other = cls(config), cls(config, init_seed=43).state_dict()
    assert not any(torch.equal(p, other[key]) for key, p in model.state_dict().items() if p.dim() == 2)
    torch.manual_seed(torch.initial_seed() + 1)
    for same in (cls(SimpleNamespace(**asdict(config)), init_seed=42), reloaded.MODEL_CLASSES[name](config)):
        torch.testing.assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert torch.equal(logits_of(same, tokens()), logits_of(model, tokens()))


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


@five
def test_mistakes_when_called(name):
    model, idx, optimizers = make(name), tokens(BLOCK + 4), make(name).configure_optimizers
    mistakes = [(partial(model, idx), "block_size"), (partial(model.generate, tokens(0), 1), "empty")]
    mistakes += [(partial(optimizers, 0.1, 1e-3, (0.9, 0.95), "cpu", 2), "zero_stage")]
    for options in ({"temperature": -0.5}, {"temperature": math.nan}, {"top_k": 0}):
        mistakes.append((partial(model.generate, idx, 1, **options), next(iter(options))))
    for bad, wrong in ((V, torch.tensor([[0, V]])), (-1, torch.tensor([[0, -1]]))):
        mistakes += [(partial(model, wrong), f"{bad} "), (partial(model.generate, wrong, 1), f"{bad} ")]
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
    logits, drawn = logits_of(model, idx)[0, -1] / temperature, []
    if top_k == 3:
        logits[logits < logits.topk(3).values[-1]] = -math.inf
    want = logits.softmax(-1)
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


@pytest.mark.parametrize("keep", [True, False])
def test_logits_of_all_positions_never_exist(keep):
    model, (x, y) = make("LlamaSimpleMLP", vocab_size=4000), batch(B=16)
    with Largest() as training:
        gradients(model, x, y, return_logits=keep)
    with torch.no_grad(), Largest() as validating:
        model(x, y, return_logits=keep)
    for seen in (training, validating):
        assert (seen.elements >= y.numel() * 4000) if keep else (seen.elements <= y.numel() * 4000 // 4)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype, keep):
    """With a loss scaled as GradScaler does: gradients of the logits do not vanish."""
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    _, want = gradients(model, x, y)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        _, loss = model(x, y, return_logits=keep)
    (loss * 2.0**10).backward()
    for key, p in model.named_parameters():
        assert (p.grad / 2**10 - want[key]).norm() < 0.05 * want[key].norm(), key


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


def test_the_loss_in_pieces_is_differentiated_once():
    """A second derivative, which needs all logits, fails instead of being wrong."""
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(model(x, y, return_logits=False)[1], model.wte.weight, create_graph=True)


@pytest.mark.parametrize("head", [torch.nn.Linear(C, V), torch.nn.Sequential(torch.nn.Linear(C, V)), None], ids=str)
def test_a_changed_unembedding_takes_effect(head):
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    model.lm_head = head or torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    if head is None:
        model.lm_head.parametrizations.weight.original0.data.mul_(2)
    close(model(x, y, return_logits=False)[1], model(x, y)[1])
    assert abs(model(x, y)[1] - make("LlamaSimpleMLP")(x, y)[1]) > 1e-2


def test_compiled_whole_and_once():
    model, (x, y), graphs = make("LlamaSimpleMLP"), batch(), []
    want = gradients(model, x, y, return_logits=False)
    model.compile(backend=lambda g, _: graphs.append(g) or g, fullgraph=True, dynamic=False)
    for _ in range(3):
        close(gradients(model, x, y, return_logits=False), want)
        with torch.no_grad():
            close(model(x, y, return_logits=False)[1], want[0])
    assert len(graphs) == 2  # one to train, one to validate


# -----------------------------------------------------------------------------
# optimizer, FLOPs, loading


@five
def test_optimizer(name):
    model = make(name, **({"attn_bias": True} if name in LLAMAS else {}))
    model.h[0].requires_grad_(False)
    opt = model.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu", zero_stage=1)  # there is nobody to share with
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


def test_a_loaded_model_is_compared_with_check_json(tmp_path):
    """Beside weights in safetensors, as param-decomp has them; for a run of ours see test_run_info.py."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    model, path, (x, y) = make("LlamaSimpleMLP"), tmp_path / "model_step_7.safetensors", batch(ignored=0, B=1)
    save_file({k: v.data for k, v in model.named_parameters()}, path)  # the tied weight once
    check = {"step": 7, "ids": [*x[0].tolist(), y[0, -1].item()], "loss": model(x, y)[1].item()}
    (tmp_path / "check.json").write_text(json.dumps(check))
    info = SimpleNamespace(checkpoint_path=path, model_config_dict=asdict(model.config))
    loaded = models.LlamaSimpleMLP.from_run_info(info)
    assert not loaded.training and torch.equal(logits_of(loaded, x), logits_of(model, x))
    info.model_config_dict["rms_norm_eps"] = 0.5  # the same weights in another model
    with pytest.raises(ValueError, match="not the one that was trained"):
        models.LlamaSimpleMLP.from_run_info(info)
