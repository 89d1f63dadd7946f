"""The contract with SPD: its own steps on a model trained here, from the class that it resolves to the hooks it sets.

What needs no run is in test_models.py: copies, pickles, bfloat16, the meta device, functional_call.
"""

import fnmatch
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, bpe_json, environment, run
from test_hf import SHAPE, random_model, write_run
from torch import nn
from transformers import AutoTokenizer

from models import MODEL_CLASSES, LlamaSimpleMLP, LlamaSimpleMLPConfig

five = pytest.mark.parametrize("name", MODEL_CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = {"GPT2": "h_torch", "Llama": "transformer.h"}  # the others': h
APART = [f"attn.{x}_proj" for x in "qkvo"]
SWIGLU = [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
MATRICES = {
    "GPT2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "GPT2Simple": [*APART, "mlp.c_fc", "mlp.down_proj"],
    "Llama": ["attn.q_attn", "attn.kv_attn", "attn.c_proj", *SWIGLU],
    "LlamaSimple": [*APART, *SWIGLU],
    "LlamaSimpleMLP": [*APART, "mlp.c_fc", "mlp.down_proj"],
}


# -----------------------------------------------------------------------------
# from the run to the target model

MODEL = {"model_type": "LlamaSimpleMLP", "block_size": 8, "vocab_size": 600, "n_layer": 1, "n_head": 2, "n_embd": 8}
MODEL |= {"n_intermediate": 16, "mlp_bias": False, "attn_bias": False, "rotary_adjacent_pairs": False, "rotary_dim": 4}
MODEL |= {"rotary_base": 10000, "n_ctx": 8, "n_key_value_heads": 1, "use_grouped_query_attention": True}
MODEL |= {
    "flash_attention": True,
    "rms_norm_eps": 1e-6,
}  # with these, all the fields of SPD's config, which forbids others

SPD = """
import importlib, sys
from collections.abc import Sequence

import torch, yaml

config = yaml.safe_load(open("spd.yaml"))
module, _, name = config["pretrained_model_class"].rpartition(".")
model_class = getattr(importlib.import_module(module), name)
target = model_class.from_pretrained(config["pretrained_model_name"])
target.eval()
target.requires_grad_(False)
assert not [p for p in target.parameters() if p.requires_grad]
out = target(torch.arange(8)[None])
assert isinstance(out, Sequence)
torch.save(out[int(config["pretrained_model_output_attr"].split("_")[1])], "logits.pt")
"""


def test_a_model_trained_here_is_what_spd_takes_apart(tmp_path):
    """train.py, then SPD's way to the target model, from another folder, with the keys that SPD's config has for it."""
    for split in ("train", "val"):
        tokens = np.random.default_rng(0).integers(0, 600, 500).astype("<u2")
        header = np.array([20240520, 1, len(tokens)] + [0] * 253, "<i4")
        (tmp_path / f"{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())
    (tmp_path / "bpe.json").write_text(bpe_json())
    config = dict.fromkeys(("warmup_iters", "weight_decay", "val_loss_every", "sample_every"), 0) | {"dtype": "float32"}
    config |= {"learning_rate": 1e-2, "learning_rate_decay_frac": 0.1, "grad_clip": None, "batch_size": 2}
    config |= {"num_iterations": 3, "val_max_steps": 1, "intermediate_checkpoints": True, "compile": False}
    section = {"name": "x", "n_ctx": 9, "path": str(tmp_path), "hf_tokenizer_path": str(tmp_path / "bpe.json")}
    config |= {"model": MODEL, "train_dataset_config": section, "val_dataset_config": section, "device": "cpu"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = run("train.py", tmp_path / "c.yaml", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "model_config.yaml").read_text()) == MODEL

    keys = {"pretrained_model_class": "models.LlamaSimpleMLP", "pretrained_model_output_attr": "idx_0"}
    (tmp_path / "spd.yaml").write_text(yaml.safe_dump(keys | {"pretrained_model_name": str(tmp_path / "run")}))
    env, command = environment({"PYTHONPATH": str(ROOT)}), [sys.executable, "-c", SPD]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

    # its tokenizer as SPD's loader wants it: with an EOS to put between documents
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run", eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    first, eos, second = (tokenizer.encode(text) for text in ("one", tokenizer.eos_token, "two"))
    assert eos == [1] and tokenizer.encode(tokenizer.eos_token.join(["one", "two"])) == first + eos + second

    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(**MODEL))
    model.load_state_dict(torch.load(tmp_path / "run" / "checkpoints" / "model_step_3.pt"))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(torch.arange(8)[None])[0])


# -----------------------------------------------------------------------------
# the target model taken apart


@pytest.fixture
def target(tmp_path):
    """A function that loads a run's model as SPD does."""

    def load(name):
        folder = write_run(tmp_path / "run", random_model(name), "")
        model = MODEL_CLASSES[name].from_pretrained(str(folder)).eval().requires_grad_(False)
        assert not [n for n, p in model.named_parameters() if p.requires_grad]
        return model

    return load


def idx():
    return torch.randint(SHAPE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(2))


def paths(model, name) -> list[str]:
    """The modules that patterns such as h.*.mlp.c_fc select, one pattern for every kind of matrix."""
    names = [n for n, _ in model.named_modules()]
    patterns = [f"{BLOCKS.get(name, 'h')}.*.{matrix}" for matrix in MATRICES[name]]
    return [found for pattern in patterns for found in names if fnmatch.fnmatch(found, pattern)]


@five
def test_patterns_find_every_matrix(target, name):
    model = target(name)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert set(paths(model, name)) == linears
    assert len(linears) == SHAPE["n_layer"] * len(MATRICES[name])
    for path in linears:
        module = model.get_submodule(path)
        assert type(module) is nn.Linear
        assert module.weight is dict(model.named_parameters())[f"{path}.weight"]


@five
def test_hooks_see_and_replace_what_a_matrix_puts_out(target, name):
    """SPD's forward hooks get one positional tensor; what they return takes the output's place."""
    model = target(name)
    base = model(idx())
    assert isinstance(base, Sequence)
    for path in paths(model, name):
        module, seen = model.get_submodule(path), []
        handle = module.register_forward_hook(lambda *call, seen=seen: seen.append(call[1:]), with_kwargs=True)
        assert torch.equal(model(idx())[0], base[0])
        handle.remove()
        [((x,), kwargs, output)] = seen  # it ran once
        assert kwargs == {} and x.shape[:2] == (2, 12)
        torch.testing.assert_close(nn.functional.linear(x, module.weight, module.bias), output)
        handle = module.register_forward_hook(lambda m, args, kwargs, out: out + 1, with_kwargs=True)
        assert not torch.allclose(model(idx())[0], base[0]), path
        handle.remove()
        assert torch.equal(model(idx())[0], base[0])


@five
def test_a_module_that_is_put_in_place_of_another_runs(target, name):
    model = target(name)
    base = model(idx())[0]
    for path in paths(model, name):
        parent, _, child = path.rpartition(".")
        old = model.get_submodule(path)
        setattr(model.get_submodule(parent), child, nn.Linear(old.in_features, old.out_features))
        assert not torch.allclose(model(idx())[0], base), path
        setattr(model.get_submodule(parent), child, old)
        assert torch.equal(model(idx())[0], base)


@five
def test_components_learn_through_a_frozen_model(target, name):
    """V·U in place of a weight, under autocast as in SPD: the gradient reaches them, and nothing else."""
    model = target(name)
    module = model.get_submodule(paths(model, name)[0])
    V, U = nn.Parameter(torch.randn(module.in_features, 3)), nn.Parameter(torch.randn(3, module.out_features))
    module.register_forward_hook(lambda m, args, out: args[0] @ V @ U)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx())[0].float().log_softmax(-1)[..., 0].mean()
    loss.backward()
    assert V.grad.abs().sum() > 0 and U.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


# -----------------------------------------------------------------------------
# attention patterns, as SPD's losses on them compute them


def patterns(attn, q, k):
    """q, k (B, T, C), as the projections put them out -> (B, nh, T, T)."""
    T, nh = q.shape[1], SHAPE["n_head"]
    q, k = (z.view(len(z), T, nh, -1).transpose(1, 2) for z in (q, k))
    if hasattr(attn, "apply_rotary_pos_emb"):
        position_ids = torch.arange(T)[None]
        q, k = attn.apply_rotary_pos_emb(q, k, attn.rotary_cos[position_ids], attn.rotary_sin[position_ids])
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


@pytest.mark.parametrize("adjacent", [False, True], ids=["halves", "adjacent"])
@pytest.mark.parametrize("name", ["GPT2", "GPT2Simple", "LlamaSimple", "LlamaSimpleMLP"])
def test_patterns_of_queries_and_keys_are_the_models_own(name, adjacent):
    llama = {"rotary_adjacent_pairs": adjacent, "n_key_value_heads": SHAPE["n_head"]} if "Llama" in name else {}
    model, seen = random_model(name, flash_attention=False, **llama).requires_grad_(False), {}
    attn = model.h[1].attn
    for n, module in attn.named_children():
        module.register_forward_hook(lambda m, args, out, n=n: seen.update({n: out}))
    model(idx())
    q, k = seen["c_attn"].chunk(3, dim=-1)[:2] if name == "GPT2" else (seen["q_proj"], seen["k_proj"])
    torch.testing.assert_close(patterns(attn, q, k), seen["softmax"])
    if "Llama" in name:
        assert attn.rotary_cos.shape == attn.rotary_sin.shape == (SHAPE["block_size"], attn.head_dim)


@pytest.mark.parametrize("adjacent", [False, True], ids=["halves", "adjacent"])
@pytest.mark.parametrize("name", ["LlamaSimple", "LlamaSimpleMLP"])
def test_names_by_which_scripts_walk_through_a_model(name, adjacent):
    """As many of SPD's do: block by block, with patterns of their own, to the model's logits."""
    model = random_model(name, rotary_adjacent_pairs=adjacent).requires_grad_(False)
    x, (B, T) = model.wte(idx()), idx().shape
    for block in model._h:
        attn, normed = block.attn, block.rms_1(x)
        q = attn.q_proj(normed).view(B, T, attn.n_head, attn.head_dim).transpose(1, 2)
        k, v = (
            project(normed).view(B, T, attn.n_key_value_heads, attn.head_dim).transpose(1, 2)
            for project in (attn.k_proj, attn.v_proj)
        )
        position = torch.arange(T)[None]
        q, k = attn.apply_rotary_pos_emb(q, k, attn.rotary_cos[position], attn.rotary_sin[position])
        k, v = (z.repeat_interleave(attn.repeat_kv_heads, dim=1) for z in (k, v))
        scores = (q @ k.mT / attn.head_dim**0.5).masked_fill(attn.bias[:, :, :T, :T] == 0, float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, attn.n_embd)
        x = x + attn.o_proj(y)
        x = x + block.mlp(block.rms_2(x))
        assert attn.rotary_adjacent_pairs == adjacent
    torch.testing.assert_close(model.lm_head(model.ln_f(x)), model(idx())[0])
