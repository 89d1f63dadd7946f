"""What makes it fast changes nothing else: the loss in pieces, and Muon."""

import copy
import json
import math
import pickle

import pytest
import torch
import yaml
from helpers import ROOT, run, stories, words_json
from test_models import ALL, BLOCK, C, V, close, make, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import models
import train

five = pytest.mark.parametrize("name", ALL)


def batch(ignored=5, B=3):
    """Inputs and targets as slices, the first `ignored` targets -1."""
    both = tokens(BLOCK + 1, B=B)
    x, y = both[:, :-1], both[:, 1:].clone()
    y.view(-1)[:ignored] = -1
    return x, y


def loss_and_gradients(model, x, y, call=None, **options):
    model.zero_grad()
    loss = (model if call is None else call)(x, y, **options)[1]
    loss.backward()
    return loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


class Largest(TorchDispatchMode):
    """The most elements that a tensor made within it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        self.elements = max([self.elements, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


# -----------------------------------------------------------------------------
# attention over blocks of queries


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 31, 32])
def test_attention_in_blocks_is_exact(T):
    rng = torch.Generator().manual_seed(T)
    q, k, v, g = torch.randn(4, 2, 3, T, 8, generator=rng, dtype=torch.float64).unbind()
    results = []
    for blocks in (0, 1, 4):
        inputs = [z.clone().requires_grad_() for z in (q, k, v)]
        if blocks:
            y = models.explicit_attention(*inputs, torch.nn.Softmax(dim=-1), blocks)
        else:
            y = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, g)])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("units", [True, False])
@five
def test_bfloat16_units_choose_the_blocks(name, units, monkeypatch):
    """Compiled, under autocast, on a CPU that has them, and nowhere else."""
    monkeypatch.setattr(models, "BF16_CPU", units)
    torch._dynamo.reset()
    calls = []

    def backend(graph, _):
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    model, (x, y) = make(name), batch()
    plain = loss_and_gradients(model, x, y)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = loss_and_gradients(model, x, y, compiled)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert calls.count(sdpa) == (0 if units else len(model.h))
    torch.testing.assert_close(loss, plain[0], atol=1e-2, rtol=1e-2)
    for key, grad in grads.items():
        assert (grad - plain[1][key]).norm() < 0.05 * plain[1][key].norm() + 1e-3, key
    calls.clear()
    compiled(x)  # float32 keeps to SDPA
    assert calls.count(sdpa) == len(model.h)


# -----------------------------------------------------------------------------
# the loss in pieces


@pytest.mark.parametrize("ignored", [0, 5, 3 * BLOCK - 1, 3 * BLOCK])
@five
def test_loss_and_gradients_are_the_plain_ones(name, ignored):
    model, (x, y) = make(name), batch(ignored)
    plain, pieces = (loss_and_gradients(model, x, y, return_logits=keep) for keep in (True, False))
    torch.testing.assert_close(pieces, plain, rtol=1e-5, atol=1e-6, equal_nan=True)  # none left: nan, as always
    with torch.no_grad():
        torch.testing.assert_close(model(x, y, return_logits=False)[1], plain[0], equal_nan=True)


@pytest.mark.parametrize("grad", [True, False])
def test_logits_of_all_positions_are_never_there(grad):
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
    _, want = loss_and_gradients(model, x, y, return_logits=False)

    def scaled(x, y, **options):
        with torch.autocast("cpu", dtype):
            loss = model(x, y, **options)[1]
        assert loss.dtype == torch.float32
        return None, loss * 2.0**10

    for keep in (True, False):
        _, got = loss_and_gradients(model, x, y, scaled, return_logits=keep)
        for key, g in got.items():
            assert (g / 2**10 - want[key]).norm() < 0.05 * want[key].norm(), (key, keep)


def test_gradients_of_unlikely_tokens_do_not_vanish_in_float16():
    """A mean over many rows makes them smaller than float16's smallest number."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, C, generator=rng) * 3, torch.randn(V, C, generator=rng)
    weight.requires_grad_()
    targets = torch.zeros(512, dtype=torch.int64)
    hidden[:, 0], weight.data[0, 0] = 20.0, 20.0  # every target is all but certain
    with torch.autocast("cpu", torch.float16):
        models.LossInPieces.apply(hidden, weight, targets).backward()
    got, weight.grad = weight.grad.clone(), None
    models.LossInPieces.apply(hidden, weight, targets).backward()
    assert got.isfinite().all() and got.dtype == torch.float32 and weight.grad.isfinite().all()


@pytest.mark.parametrize("frozen", ["lm_head", "trunk"])
def test_frozen_parts(frozen):
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    model.requires_grad_(frozen == "lm_head")
    model.lm_head.requires_grad_(frozen != "lm_head")
    plain, pieces = (loss_and_gradients(model, x, y, return_logits=keep) for keep in (True, False))
    torch.testing.assert_close(pieces, plain, rtol=1e-5, atol=1e-6)
    assert ("wte.weight" in pieces[1]) == (frozen == "trunk") and pieces[1]


def test_twice_and_copies():
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    _, once = loss_and_gradients(model, x, y, return_logits=False)
    losses = [model(x, y, return_logits=False)[1] for _ in range(2)]
    model.zero_grad()
    losses[0].backward(retain_graph=True)
    losses[0].backward()
    losses[1].backward()
    close({k: p.grad for k, p in model.named_parameters()}, {k: 3 * g for k, g in once.items()})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(loss_and_gradients(twin, x, y, return_logits=False)[1], once)


def test_second_derivatives():
    model, (x, y) = make("LlamaSimpleMLP", flash_attention=False), batch(5)

    def penalty(keep):
        gradients = torch.autograd.grad(model(x, y, return_logits=keep)[1], list(model.parameters()), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in gradients), list(model.parameters()))

    torch.testing.assert_close(penalty(False), penalty(True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["per sample", "jvp", "jacrev", "jvp of grad", "jacrev of jacrev"])
def test_function_transforms(transform):
    model, (x, y) = make("LlamaSimpleMLP", flash_attention=False), batch(5)
    weights = {k: p.detach() for k, p in model.named_parameters()}
    norm = {"ln_f.weight": weights["ln_f.weight"]}

    def transformed(keep):
        def loss(w, x, y):
            return torch.func.functional_call(model, weights | w, (x, y), {"return_logits": keep})[1]

        if transform == "per sample":
            one = torch.func.grad(lambda w, a, b: loss(w, a[None], b[None]))
            return torch.func.vmap(one, (None, 0, 0))(weights, *batch(0))
        if transform == "jvp":
            return torch.func.jvp(lambda w: loss(w, x, y), (weights,), (weights,))
        if transform == "jvp of grad":  # a Hessian times a vector
            return torch.func.jvp(torch.func.grad(lambda w: loss(w, x, y)), (weights,), (weights,))
        jacobian = torch.func.jacrev(lambda w: loss(w, x, y))
        return (jacobian if transform == "jacrev" else torch.func.jacrev(jacobian))(norm)

    torch.testing.assert_close(transformed(False), transformed(True), rtol=1e-4, atol=1e-5)


@five
def test_float64_is_float64_to_the_end(name):
    model, (x, y) = make(name).double(), batch(5)
    for keep in (True, False):
        loss = model(x, y, return_logits=keep)[1]
        want = torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten(), ignore_index=-1)
        torch.testing.assert_close(loss, want, rtol=1e-14, atol=0)
    plain, pieces = (loss_and_gradients(model, x, y, return_logits=keep)[1] for keep in (True, False))
    torch.testing.assert_close(pieces, plain, rtol=1e-6, atol=1e-7)  # RMSNorm is float32 within


@five
def test_a_step_on_the_meta_device(name):
    with torch.device("meta"):
        model = models.MODEL_CLASSES[name](make(name).config)
        x = torch.zeros(3, BLOCK, dtype=torch.int64)
    for keep in (True, False):
        loss = model(x, x, return_logits=keep)[1]
        loss.backward()
        assert loss.is_meta and loss.shape == () and all(p.grad.is_meta for p in model.parameters())


def test_targets_of_32_bits():
    model, (x, y) = make("LlamaSimpleMLP"), batch(5)
    for keep in (True, False):
        assert torch.equal(model(x, y.int(), return_logits=keep)[1], model(x, y, return_logits=keep)[1])


def test_whoever_changes_the_unembedding_is_heard():
    model, (x, y), seen = make("LlamaSimpleMLP"), batch(), []
    want = model(x, y, return_logits=False)[1]
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(model.lm_head, f"register_{register}")(lambda *_, r=register: seen.append(r))
        model(x, y, return_logits=False)[1].backward()
        handle.remove()
        assert seen.pop() == register and not seen
    handle = model.lm_head.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    close(model(x, y, return_logits=False)[1], torch.tensor(math.log(V)))
    handle.remove()
    close(model(x, y, return_logits=False)[1], want)
    forward, model.lm_head.forward = model.lm_head.forward, torch.zeros_like(model.lm_head.weight.T).__rmatmul__
    close(model(x, y, return_logits=False)[1], torch.tensor(math.log(V)))
    model.lm_head.forward = forward
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    close(model(x, y, return_logits=False)[1], want)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(C, V))  # no weight of its own
    close(model(x, y, return_logits=False)[1], model(x, y)[1])


def test_a_padded_vocabulary_computes_the_same(monkeypatch):
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    want = loss_and_gradients(model, x, y, return_logits=False)
    monkeypatch.setitem(models.VOCAB_MULTIPLE, "cpu", 64)
    with Largest() as seen:
        got = loss_and_gradients(model, x, y, return_logits=False)
    close(got, want)
    assert seen.elements >= 12 * 64  # a piece of the 48 rows, 64 wide


@pytest.mark.parametrize("bad", [V, -2])
def test_targets_that_do_not_exist(bad):
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    y[0, 7] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        model(x, y, return_logits=False)


def test_compiled_whole_and_once():
    model, (x, y) = make("LlamaSimpleMLP"), batch()
    want = loss_and_gradients(model, x, y, return_logits=False)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(3):
        close(loss_and_gradients(model, x, y, compiled, return_logits=False), want)
        with torch.no_grad():
            close(compiled(x, y, return_logits=False)[1], want[0])
    assert len(graphs) == 2  # one to train, one to validate


# -----------------------------------------------------------------------------
# Muon


def muon_of(model):
    return model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", muon=True)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@five
def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest(name):
    model = make(name)
    optimizer = muon_of(model)
    ours = {id(p) for g in optimizer.muon.param_groups for p in g["params"]}
    assert ours == {id(p) for p in model.h.parameters() if p.dim() == 2}
    rest = {id(p) for g in optimizer.adamw.param_groups for p in g["params"]}
    assert rest == {id(p) for p in model.parameters()} - ours
    before, (x, y) = copy.deepcopy(model.state_dict()), batch()
    loss_and_gradients(model, x, y, return_logits=False)
    model.h[1].attn.get_parameter(next(k for k, _ in model.h[1].attn.named_parameters())).grad.fill_(math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in model.state_dict().items())
    with pytest.raises(ValueError, match="zero_stage to 0"):
        model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", 1, muon=True)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a config and its shards."""
    folder = tmp_path_factory.mktemp("muon")
    documents = stories(120)
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (folder / "tiny.json").write_text(words_json(documents[:50]))
    model = {"model_type": "LlamaSimpleMLP", "block_size": 8, "n_ctx": 8, "vocab_size": 64, "n_layer": 2, "n_head": 2}
    model |= {"n_embd": 16, "n_intermediate": 32, "n_key_value_heads": 1, "rotary_dim": 8}
    section = {"name": "docs.jsonl", "hf_tokenizer_path": "tiny.json", "n_ctx": 9, "path": "data"}
    config = {"model": model, "train_dataset_config": section | {"split": "train[:80%]"}}
    config |= {"val_dataset_config": section | {"split": "train[80%:]"}, "batch_size": 4, "num_iterations": 12}
    config |= {"warmup_iters": 2, "learning_rate": 1e-3, "learning_rate_decay_frac": 0.1, "weight_decay": 0.1}
    config |= {"grad_clip": 1.0, "val_loss_every": 4, "val_max_steps": 2, "sample_every": 0, "compile": False}
    config |= {"intermediate_checkpoints": True, "dtype": "float32", "device": "cpu", "optimizer": "muon"}
    (folder / "x.yaml").write_text(yaml.safe_dump(config))
    assert run("prepare_data.py", "x.yaml", cwd=folder).returncode == 0
    return folder


def train_it(lab, name, *overrides):
    done = run("train.py", "x.yaml", f"run_dir={name}", *overrides, cwd=lab)
    assert done.returncode == 0, done.stderr
    return lab / name


def last_weights(folder):
    return torch.load(folder / "checkpoints" / "model_step_12.pt", weights_only=True)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_learns_and_resumes_to_the_bit(lab):
    whole = train_it(lab, "whole", "resume_every=5")
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [m["val_loss"] for m in metrics if "val_loss" in m]
    assert losses[-1] < losses[0] - 0.05
    assert max(m["lr"] for m in metrics if "lr" in m) == 0.005  # not the learning_rate, which is AdamW's
    want = last_weights(whole)
    (whole / "resume.previous.pt").replace(whole / "resume.pt")  # as if it had been killed after update 10
    (whole / "checkpoints" / "model_step_12.pt").unlink()
    (whole / "status").write_text("running\n")
    assert torch.load(whole / "resume.pt", weights_only=True)["step"] == 10
    got = last_weights(train_it(lab, "whole", "resume_every=5"))
    assert all(torch.equal(want[k], got[k]) for k in want)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_an_update_of_muon_is_as_large_as_adamws():
    """Which one learning rate for both takes for granted."""
    for name in ("GPT2", "LlamaSimple"):
        model, (x, y) = make(name), batch()
        optimizer = model.configure_optimizers(0.0, 1e-3, (0.9, 0.95), "cpu", muon=True)
        before = copy.deepcopy(model.h)
        loss_and_gradients(model, x, y, return_logits=False)
        optimizer.step()
        for (k, p), old in zip(model.h.named_parameters(), before.parameters(), strict=True):
            if p.dim() == 2:  # the root of the mean square of AdamW's updates is 0.2 to 0.4 of the rate
                assert 0.1e-3 < (p - old).pow(2).mean().sqrt() < 0.4e-3, k


def test_muons_rate_has_the_schedule_of_adamws():
    c = train.load_config(ROOT / "configs" / "quickstart.yaml", ["optimizer=muon", "muon_learning_rate=0.02"])
    adamw = train.load_config(ROOT / "configs" / "quickstart.yaml", ["learning_rate=0.02"])
    for s in (1, c.warmup_iters, c.warmup_iters + 1, c.num_iterations):
        assert train.learning_rate_at(s, c) == train.learning_rate_at(s, adamw)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["zero_stage=1"], "optimizer muon keeps its state whole: zero_stage must be 0"),
        (["optimizer=adamw", "muon_learning_rate=0.01"], "optimizer is not muon: leave it out"),
        (["muon_learning_rate=0"], "muon_learning_rate"),
        (["optimizer=sgd"], "optimizer"),
    ],
    ids=str,
)
def test_what_muon_is_not(overrides, says):
    with pytest.raises(train.UserError, match=says):
        train.load_config(ROOT / "configs" / "quickstart.yaml", ["optimizer=muon", *overrides])


# -----------------------------------------------------------------------------
# MFU


def test_mfu_is_of_the_flops_that_are_counted(lab):
    folder = train_it(lab, "mfu", "optimizer=adamw")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [m for m in lines if "train_loss" in m]
    fastest = max(updates, key=lambda m: m["mfu"])
    assert 0 < fastest["mfu"] < 1
    for m in updates:  # a fraction of one rate, measured once
        assert m["mfu"] == pytest.approx(fastest["mfu"] * m["tokens_per_s"] / fastest["tokens_per_s"], abs=2e-4)
    model = make("LlamaSimpleMLP")  # wte is looked up, not multiplied by
    with FlopCounterMode(display=False) as counted:
        loss = model(*batch())[1]
        loss.backward()
    attention = 12 * 2 * C * BLOCK  # two layers
    plain = counted.get_total_flops() / (3 * BLOCK)
    assert model.flops_per_token() - attention <= plain <= model.flops_per_token() * 1.1
