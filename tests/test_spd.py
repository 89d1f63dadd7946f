"""The contract with SPD: its steps with a model trained here, from the class that its config names to its hooks."""

import copy
import fnmatch
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, environment, write_files
from test_convert import random_model, tokens, write_run
from torch import nn
from transformers import AutoTokenizer

from models import MODEL_CLASSES

five = pytest.mark.parametrize("name", MODEL_CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")
IDX = tokens(2)  # (2, 12)
ATTENTION = [f"attn.{x}_proj" for x in "qkvo"]
SWIGLU = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
PATHS = {
    "GPT2": ("h_torch", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "GPT2Simple": ("h", [*ATTENTION, "mlp.c_fc", "mlp.down_proj"]),
    "Llama": ("transformer.h", ["attn.q_attn", "attn.kv_attn", "attn.c_proj", *SWIGLU]),
    "LlamaSimple": ("h", [*ATTENTION, *SWIGLU]),
    "LlamaSimpleMLP": ("h", [*ATTENTION, "mlp.c_fc", "mlp.down_proj"]),
}

# What SPD does with the keys that its config has for the target model.
SPD = """
import importlib, torch, yaml
config = yaml.safe_load(open("spd.yaml"))
module, _, name = config["pretrained_model_class"].rpartition(".")
target = getattr(importlib.import_module(module), name).from_pretrained(config["pretrained_model_name"])
out = target.eval().requires_grad_(False)(torch.arange(8)[None])
assert isinstance(out, (tuple, list))
torch.save(out[int(config["pretrained_model_output_attr"].split("_")[1])], "logits.pt")
"""


def test_a_run_is_what_spd_decomposes(tmp_path):
    model = random_model("LlamaSimpleMLP")
    folder = write_run(tmp_path / "run", model)
    keys = {"pretrained_model_class": "models.LlamaSimpleMLP", "pretrained_model_output_attr": "idx_0"}
    write_files(tmp_path, {"spd.yaml": keys | {"pretrained_model_name": str(folder)}})
    env, command = environment({"PYTHONPATH": str(ROOT)}), [sys.executable, "-c", SPD]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(8)[None])[0])
    # SPD's loader joins documents with the text of EOS, which must be read as one token.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, eos, second = (tokenizer.encode(text) for text in ("one", tokenizer.eos_token, "two"))
    assert eos == [1] and tokenizer.encode(tokenizer.eos_token.join(["one", "two"])) == first + eos + second


def paths(model, name) -> list[str]:
    """The modules that patterns such as h.*.mlp.c_fc select, one pattern for every kind of matrix."""
    names = [n for n, _ in model.named_modules()]
    blocks, matrices = PATHS[name]
    return [path for matrix in matrices for path in fnmatch.filter(names, f"{blocks}.*.{matrix}")]


@five
def test_hooks_and_replaced_modules_take_effect(name):
    """Patterns find every matrix. SPD's hooks get one positional tensor; what they return replaces the output."""
    model = random_model(name).requires_grad_(False)
    base = model(IDX)[0]
    assert {n for n, m in model.named_modules() if type(m) is nn.Linear} == {"lm_head", *paths(model, name)}
    for path in paths(model, name):
        module, seen = model.get_submodule(path), []
        handle = module.register_forward_hook(lambda *call, seen=seen: seen.append(call[1:]), with_kwargs=True)
        assert torch.equal(model(IDX)[0], base)
        handle.remove()
        [((x,), kwargs, output)] = seen  # it ran once
        assert kwargs == {} and x.shape[:2] == (2, 12)
        torch.testing.assert_close(nn.functional.linear(x, module.weight, module.bias), output)
        handle = module.register_forward_hook(lambda m, args, out: out + 1)
        assert not torch.allclose(model(IDX)[0], base), path
        handle.remove()
        model.set_submodule(path, nn.Linear(module.in_features, module.out_features))
        assert not torch.allclose(model(IDX)[0], base), path
        model.set_submodule(path, module)
        assert torch.equal(model(IDX)[0], base)
    model.h[1] = nn.Identity()
    assert not torch.allclose(model(IDX)[0], base)
    if name == "Llama":  # an alias: registered under it, the new module would be ignored
        with pytest.raises(AttributeError, match="alias"):
            model.ln_f = nn.Identity()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@five
def test_copies_are_whole_and_independent(name, clone):
    model = random_model(name).requires_grad_(False)
    base, twin = model(IDX)[0], clone(model)
    other = {key: p + 0.1 for key, p in model.named_parameters()}
    changed = torch.func.functional_call(model, other, (IDX,))[0]
    assert torch.equal(twin(IDX)[0], base) and not torch.allclose(changed, base)
    assert twin.lm_head.weight is twin.wte.weight and twin.config == model.config
    for p in twin.parameters():
        p += 0.1
    assert torch.equal(twin(IDX)[0], changed) and torch.equal(model(IDX)[0], base)


@five
def test_components_learn_through_a_frozen_model(name):
    """V·U in place of a weight, under autocast as in SPD: the gradient reaches them, and nothing else."""
    model = random_model(name).requires_grad_(False)
    module = model.get_submodule(paths(model, name)[0])
    V, U = nn.Parameter(torch.randn(module.in_features, 3)), nn.Parameter(torch.randn(3, module.out_features))
    module.register_forward_hook(lambda m, args, out: args[0] @ V @ U)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDX)[0].float().log_softmax(-1)[..., 0].mean()
    loss.backward()
    assert V.grad.any() and U.grad.any() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("adjacent", [False, True], ids=["halves", "adjacent"])
@five
def test_attention_patterns_and_the_names_that_scripts_read(name, adjacent):
    """Block by block, with attention patterns computed outside of the model, to its logits."""
    options = {"rotary_adjacent_pairs": adjacent} if "Llama" in name else {}
    model, seen = random_model(name, flash_attention=False, **options).requires_grad_(False), []
    for block in model._h:
        block.attn.softmax.register_forward_hook(lambda m, args, out: seen.append(out))
    logits = model(IDX)[0]
    x, (B, T) = model.embed(IDX), IDX.shape
    for block, pattern in zip(model._h, seen, strict=True):
        attn, normed = block.attn, (block.rms_1 if "Llama" in name else block.ln_1)(x)
        heads = (attn.n_head, attn.n_key_value_heads, attn.n_key_value_heads)
        parts = zip(attn.qkv(normed), heads, strict=True)
        q, k, v = (z.view(B, T, n, attn.head_dim).transpose(1, 2) for z, n in parts)
        if "Llama" in name:
            position = torch.arange(T)[None]
            q, k = attn.apply_rotary_pos_emb(q, k, attn.rotary_cos[position], attn.rotary_sin[position])
            assert attn.rotary_adjacent_pairs == adjacent
        k, v = (z.repeat_interleave(attn.repeat_kv_heads, dim=1) for z in (k, v))
        scores = (q @ k.mT / attn.head_dim**0.5).masked_fill(attn.bias[:, :, :T, :T] == 0, float("-inf"))
        torch.testing.assert_close(scores.softmax(-1), pattern)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, attn.n_embd)
        x = x + getattr(attn, "o_proj" if "Simple" in name else "c_proj")(y)
        x = x + block.mlp((block.rms_2 if "Llama" in name else block.ln_2)(x))
    torch.testing.assert_close(model.lm_head(model.ln_f(x)), logits)
    # A hook may also replace the pattern.
    model.h[0].attn.softmax.register_forward_hook(lambda m, args, out: torch.eye(T).expand_as(out))
    assert not torch.allclose(model(IDX)[0], logits)
