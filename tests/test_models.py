"""The five models against Hugging Face's classes, straight formulae, SPD's recorded numbers, and their own promises."""

import copy
import math
import pickle
import subprocess
import sys
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import models

ROOT = Path(__file__).resolve().parent.parent
GPT2S = ["GPT2", "GPT2Simple"]
LLAMAS = ["Llama", "LlamaSimple", "LlamaSimpleMLP"]
ALL = GPT2S + LLAMAS
GELU_MLP = ["GPT2", "GPT2Simple", "LlamaSimpleMLP"]
V, BLOCK, C, NH, HS, NLAYER = 61, 16, 32, 4, 8, 2
FLASH = pytest.mark.parametrize("flash", [True, False], ids=["flash", "softmax"])
five = pytest.mark.parametrize("name", ALL)
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


def make_config(name, **changes):
    shape = {"block_size": BLOCK, "vocab_size": V, "n_layer": NLAYER, "n_head": NH, "n_embd": C}
    if name in LLAMAS:
        shape |= {"n_ctx": BLOCK, "rotary_dim": HS, "n_intermediate": 40, "n_key_value_heads": 2}
    return getattr(models, name + "Config")(**shape | changes)


def make(name, seed=0, **changes):
    """A tiny model none of whose parameters is 0 or 1, so that leaving one out, or mixing two up, shows."""
    model = models.MODEL_CLASSES[name](make_config(name, **changes))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 if p.dim() == 1 and key.endswith("weight") else 0.0  # norms
            p.copy_(centre + 0.2 * torch.randn(p.shape, generator=rng))
    return model


def tokens(T=BLOCK, B=2, seed=0):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, idx):
    return model(idx)[0]


def block_prefix(name):
    return {"GPT2": "h_torch.", "Llama": "transformer.h."}.get(name, "h.")


def linears(block):
    return [key for key, m in block.named_modules() if isinstance(m, torch.nn.Linear)]


# -----------------------------------------------------------------------------
# against Hugging Face


def split_qkv(state, prefix, kind):
    """q, k, v's rows under `prefix` of a state dict, whichever of the four spellings it has; [] if it has no `kind`."""

    def get(*names):
        return [state[f"{prefix}{n}.{kind}"] for n in names if f"{prefix}{n}.{kind}" in state]

    if merged := get("c_attn"):
        return list(merged[0].chunk(3))
    if get("q_attn"):
        return get("q_attn") + list(get("kv_attn")[0].chunk(2))
    return get("q_proj", "k_proj", "v_proj")


def rename(state, prefix, names, to):
    """The entries under prefix + a key of `names`, as `to` + its value."""
    return {
        f"{to}{theirs}.{kind}": state[f"{prefix}{ours}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{prefix}{ours}.{kind}" in state
    }


def hf_gpt2(model, name):
    """Hugging Face's GPT-2 with the weights of our `model`."""
    transformers = pytest.importorskip("transformers")
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=BLOCK, n_embd=C, n_layer=NLAYER, n_head=NH)
    )
    ours = model.state_dict()
    theirs = rename(ours, "", {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f"}, "transformer.")
    theirs["lm_head.weight"] = ours["lm_head.weight"]
    same = {"ln_1": "ln_1", "ln_2": "ln_2", "mlp.c_fc": "mlp.c_fc"}
    outs = {"attn.c_proj": "attn.c_proj", "attn.o_proj": "attn.c_proj"}
    outs |= {"mlp.c_proj": "mlp.c_proj", "mlp.down_proj": "mlp.c_proj"}
    for i in range(NLAYER):
        prefix, to = f"{block_prefix(name)}{i}.", f"transformer.h.{i}."
        theirs |= rename(ours, prefix, same | outs, to)
        for kind in ("weight", "bias"):
            theirs[f"{to}attn.c_attn.{kind}"] = torch.cat(split_qkv(ours, f"{prefix}attn.", kind))
    for key in theirs:  # Conv1D holds (in, out)
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            theirs[key] = theirs[key].T
    hf.load_state_dict(theirs, strict=True)
    return hf.eval()


def hf_llama(model, name, kind="Llama", row_order=None):
    """Hugging Face's Llama (or `kind`) with our weights; `row_order` reorders each head's rows of q and k."""
    transformers, c = pytest.importorskip("transformers"), model.config
    hf_config = getattr(transformers, kind + "Config")(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=c.n_intermediate,
        num_hidden_layers=NLAYER,
        num_attention_heads=NH,
        num_key_value_heads=c.n_key_value_heads,
        head_dim=HS,
        max_position_embeddings=BLOCK,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=float(c.rotary_base),
        attention_bias=c.attn_bias,
        mlp_bias=c.mlp_bias,
        tie_word_embeddings=True,
    )
    hf = getattr(transformers, kind + "ForCausalLM")(hf_config)
    ours, top = model.state_dict(), {"Llama": "transformer."}.get(name, "")
    theirs = rename(ours, top, {"wte": "embed_tokens", "rms_f": "norm", "ln_f": "norm"}, "model.")
    theirs["lm_head.weight"] = ours["lm_head.weight"]
    names = {"rms_1": "input_layernorm", "rms_2": "post_attention_layernorm"}
    names |= {f"mlp.{n}": f"mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
    names |= {"attn.c_proj": "self_attn.o_proj", "attn.o_proj": "self_attn.o_proj"}
    for i in range(NLAYER):
        prefix, to = f"{block_prefix(name)}{i}.", f"model.layers.{i}."
        theirs |= rename(ours, prefix, names, to)
        for which in ("weight", "bias"):
            for n, rows in zip("qkv", split_qkv(ours, f"{prefix}attn.", which), strict=False):
                if row_order is not None and n != "v":
                    rows = rows.unflatten(0, (-1, HS))[:, row_order].flatten(0, 1)
                theirs[f"{to}self_attn.{n}_proj.{which}"] = rows
    hf.load_state_dict(theirs, strict=True)
    return hf.eval()


@FLASH
@pytest.mark.parametrize("T", [1, 9, BLOCK])
@pytest.mark.parametrize("name", GPT2S)
def test_gpt2_is_hugging_faces(name, T, flash):
    model, idx = make(name, flash_attention=flash), tokens(T)
    close(logits_of(model, idx), hf_gpt2(model, name)(idx).logits.detach())


@FLASH
@pytest.mark.parametrize("eps,base", [(1e-5, 10000), (1e-6, 500)])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("nkv", [4, 2, 1])
@pytest.mark.parametrize("name", ["Llama", "LlamaSimple"])
def test_llama_is_hugging_faces(name, nkv, biases, eps, base, flash):
    fields = {"n_key_value_heads": nkv, "attn_bias": biases[0], "mlp_bias": biases[1], "flash_attention": flash}
    model, idx = make(name, rms_norm_eps=eps, rotary_base=base, **fields), tokens()
    close(logits_of(model, idx), hf_llama(model, name)(idx).logits.detach())


@pytest.mark.parametrize("name", ["Llama", "LlamaSimple"])
def test_llama_on_a_short_sequence_is_hugging_faces(name):
    model, idx = make(name), tokens(T=5)
    close(logits_of(model, idx), hf_llama(model, name)(idx).logits.detach())


@FLASH
@pytest.mark.parametrize("nkv,base", [(4, 10000), (2, 500), (1, 10000)])
@pytest.mark.parametrize("name", ["Llama", "LlamaSimple"])
def test_adjacent_pairs_are_heliums(name, nkv, base, flash):
    """Helium is a Llama that pairs adjacent dimensions (and never has a bias on its output projection)."""
    fields = {"n_key_value_heads": nkv, "rotary_base": base, "flash_attention": flash}
    model, idx = make(name, rotary_adjacent_pairs=True, mlp_bias=True, **fields), tokens()
    close(logits_of(model, idx), hf_llama(model, name, "Helium")(idx).logits.detach())


@pytest.mark.parametrize("name", ["Llama", "LlamaSimple"])
def test_adjacent_pairs_are_llamas_with_its_rows_permuted(name):
    model, idx = make(name, rotary_adjacent_pairs=True, attn_bias=True), tokens()
    evens_then_odds = [*range(0, HS, 2), *range(1, HS, 2)]
    close(logits_of(model, idx), hf_llama(model, name, row_order=evens_then_odds)(idx).logits.detach())
    unpermuted = hf_llama(model, name)(idx).logits.detach()
    assert (logits_of(model, idx) - unpermuted).abs().max() > 1e-2  # the flag does something


def test_rope_of_adjacent_pairs_is_gptjs():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x = torch.randn(2, BLOCK, NH, HS, generator=torch.Generator().manual_seed(0))  # (B, T, nh, hs), as GPT-J has it
    sin, cos = gptj.create_sinusoidal_positions(BLOCK, HS)[None].chunk(2, dim=-1)
    theirs = gptj.apply_rotary_pos_emb(x, sin, cos).transpose(1, 2)
    tables = (table[None] for table in models.rotary_tables(HS, BLOCK, 10000, adjacent_pairs=True))
    q, k = models.apply_rotary_pos_emb(x.transpose(1, 2), x[:, :, :1].transpose(1, 2), *tables, adjacent_pairs=True)
    close((q, k), (theirs, theirs[:, :1]))


# -----------------------------------------------------------------------------
# one model against another spelling of itself


@FLASH
@pytest.mark.parametrize("bias,nkv", [(False, 3), (True, 1)])
@pytest.mark.parametrize("name", LLAMAS)
def test_merged_projection_is_the_separate_ones(name, bias, nkv, flash):
    fields = {"attn_bias": bias, "flash_attention": flash}
    separate = make(name, n_key_value_heads=NH, **fields)
    # n_key_value_heads has no say in a merged projection, even one that could not be grouped
    merged = make(name, seed=1, n_key_value_heads=nkv, use_grouped_query_attention=False, **fields)
    state = separate.state_dict()
    for i in range(NLAYER):
        prefix = f"{block_prefix(name)}{i}.attn."
        for kind in ("weight", "bias")[: 1 + bias]:
            whole = torch.cat(split_qkv(state, prefix, kind))
            for part in ("q_attn", "kv_attn", "q_proj", "k_proj", "v_proj"):
                state.pop(f"{prefix}{part}.{kind}", None)
            state[f"{prefix}c_attn.{kind}"] = whole
    merged.load_state_dict(state, strict=True)
    assert linears(merged.h[0].attn) == ["c_attn", "c_proj" if name == "Llama" else "o_proj"]
    close(logits_of(merged, tokens()), logits_of(separate, tokens()))


@five
def test_flash_attention_is_the_softmax(name):
    logits, grads, batch = [], [], tokens(BLOCK + 1)
    for flash in (True, False):
        model = make(name, flash_attention=flash)
        out, loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        logits.append(out.detach())
        grads.append({key: p.grad for key, p in model.named_parameters()})
    close(*logits)
    close(*grads)
    # every parameter is in use; but a key bias adds the same to all scores of a row, unless RoPE turns it
    silent = {f"h.{i}.attn.k_proj.bias" for i in range(NLAYER)} if name == "GPT2Simple" else set()
    assert {key for key, g in grads[0].items() if g.abs().max() < 1e-4} == silent


def reference_llama_simple_mlp(state, c, idx):
    """logits (B, T, V) in float64 by the plain formulae, a position and a head at a time."""
    w = {key: value.double() for key, value in state.items()}

    def rms(x, key):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"{key}.weight"]

    def linear(x, key):
        return x @ w[f"{key}.weight"].T + w.get(f"{key}.bias", 0)

    def rope(x):  # (B, T, hs): a pair of dimensions is a complex number, a position turns it
        T, hs = x.shape[1:]
        pairs = [(2 * i, 2 * i + 1) if c.rotary_adjacent_pairs else (i, i + hs // 2) for i in range(hs // 2)]
        y = torch.empty_like(x)
        for i, (a, b) in enumerate(pairs):
            angle = torch.arange(T).double() * c.rotary_base ** (-2 * i / hs)
            z = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)
            y[..., a], y[..., b] = z.real, z.imag
        return y

    def head(q, k, v):  # (B, T, hs) each
        att = torch.exp(rope(q) @ rope(k).mT / math.sqrt(q.shape[-1])).tril()
        return att / att.sum(-1, keepdim=True) @ v

    x = w["wte.weight"][idx]
    for i in range(c.n_layer):
        b = f"h.{i}."
        h, hs = rms(x, b + "rms_1"), c.n_embd // c.n_head
        q, k, v = (linear(h, f"{b}attn.{n}_proj").split(hs, dim=-1) for n in "qkv")
        shared_by = c.n_head // c.n_key_value_heads
        y = [head(q[j], k[j // shared_by], v[j // shared_by]) for j in range(c.n_head)]
        x = x + linear(torch.cat(y, dim=-1), b + "attn.o_proj")
        h = linear(rms(x, b + "rms_2"), b + "mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, b + "mlp.down_proj")
    return rms(x, "ln_f") @ w["wte.weight"].T


@FLASH
@pytest.mark.parametrize("adjacent", [False, True], ids=["halves", "adjacent"])
@pytest.mark.parametrize(
    "fields",
    [
        {"n_key_value_heads": 4, "attn_bias": True, "rms_norm_eps": 1e-5},
        {"n_key_value_heads": 2, "mlp_bias": True, "rotary_base": 500},
        {"n_key_value_heads": 1, "attn_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2},
    ],
    ids=["4kv", "2kv", "1kv"],
)
def test_llama_simple_mlp_is_its_formulae(fields, adjacent, flash):
    model = make("LlamaSimpleMLP", rotary_adjacent_pairs=adjacent, flash_attention=flash, **fields)
    want = reference_llama_simple_mlp(model.state_dict(), model.config, tokens())
    close(logits_of(model, tokens()).double(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_computes_in_float32(dtype):
    norm = models.RMSNorm(C, eps=1e-6).to(dtype)
    norm.weight.data.fill_(1.3)
    x = (300 * torch.randn(5, C, generator=torch.Generator().manual_seed(0))).to(dtype)  # float16 ends at 65504
    whole = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(norm(x).detach(), whole.to(dtype) * norm.weight.detach(), rtol=torch.finfo(dtype).eps / 4)


def test_golden():
    """What SPD's own classes computed: initial weights, logits, gradients, ten updates."""
    script = ROOT.parent / "shared" / "check_golden.py"
    if not script.exists():
        pytest.skip("../shared/check_golden.py, which holds SPD's recorded numbers, is not beside this repository")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 of 5 agree" in done.stdout


# -----------------------------------------------------------------------------
# names, configs, initial weights


def expected_shapes(name, bias):
    """Every key of the state dict and its shape: SPD addresses modules by these names."""
    llama, c = name in LLAMAS, 4 * C if name in GPT2S else 40
    kv = 2 * HS if llama else C
    norm1, norm2 = ("rms_1", "rms_2") if llama else ("ln_1", "ln_2")
    attn = {
        "GPT2": {"c_attn": (3 * C, C), "c_proj": (C, C)},
        "Llama": {"q_attn": (C, C), "kv_attn": (2 * kv, C), "c_proj": (C, C)},
    }.get(name, {"q_proj": (C, C), "k_proj": (kv, C), "v_proj": (kv, C), "o_proj": (C, C)})
    mlp = {
        "GPT2": {"c_fc": (c, C), "c_proj": (C, c)},
        "GPT2Simple": {"c_fc": (c, C), "down_proj": (C, c)},
        "LlamaSimpleMLP": {"c_fc": (c, C), "down_proj": (C, c)},
    }.get(name, {"gate_proj": (c, C), "up_proj": (c, C), "down_proj": (C, c)})
    top, last = ("transformer.", "rms_f") if name == "Llama" else ("", "ln_f")
    shapes = {f"{top}wte.weight": (V, C), f"{top}{last}.weight": (C,), "lm_head.weight": (V, C)}
    if not llama:
        shapes |= {"wpe.weight": (BLOCK, C), "ln_f.bias": (C,)}
    for i in range(NLAYER):
        block = f"{block_prefix(name)}{i}."
        for norm in (norm1, norm2):
            shapes |= {f"{block}{norm}.{kind}": (C,) for kind in ("weight", "bias")[: 2 - llama]}
        for part, matrices in (("attn", attn), ("mlp", mlp)):
            for key, shape in matrices.items():
                shapes[f"{block}{part}.{key}.weight"] = shape
                if bias or not llama:
                    shapes[f"{block}{part}.{key}.bias"] = shape[:1]
    return shapes


@pytest.mark.parametrize("bias", [False, True])
@five
def test_parameter_names(name, bias):
    model = make(name, **({"attn_bias": bias, "mlp_bias": bias} if name in LLAMAS else {}))
    assert {key: tuple(p.shape) for key, p in model.state_dict().items()} == expected_shapes(name, bias)
    assert {key for key, _ in model.named_parameters()} == expected_shapes(name, bias).keys() - {"lm_head.weight"}
    assert model.lm_head.weight is model.wte.weight and model.lm_head.bias is None


@pytest.mark.parametrize("field,module", [("attn_bias", "attn"), ("mlp_bias", "mlp")])
@pytest.mark.parametrize("name", LLAMAS)
def test_each_bias_field_is_for_its_own_linears(name, field, module):
    block = make(name, **{field: True}).h[0]
    biased = {key for key in linears(block) if block.get_submodule(key).bias is not None}
    assert biased == {key for key in linears(block) if key.startswith(module)}


GPT2_DEFAULTS = {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
LLAMA_DEFAULTS = GPT2_DEFAULTS | {
    "n_intermediate": 2048,
    "mlp_bias": False,
    "attn_bias": False,
    "rotary_adjacent_pairs": False,
    "rotary_dim": 64,
    "rotary_base": 10000,
    "n_ctx": 1024,
    "n_key_value_heads": 3,
    "use_grouped_query_attention": True,
    "flash_attention": True,
    "rms_norm_eps": 1e-6,
}


@five
def test_config_fields_and_defaults_are_spds(name):
    want = {"model_type": name} | (LLAMA_DEFAULTS if name in LLAMAS else GPT2_DEFAULTS | {"flash_attention": True})
    if name == "LlamaSimpleMLP":
        want["n_intermediate"] = 3072
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the defaults go together
        config = getattr(models, name + "Config")()
    assert list(asdict(config).items()) == list(want.items())
    assert models.MODEL_CLASSES[name].config_class is type(config)
    assert list(models.MODEL_CLASSES) == ALL


@five
def test_initial_weights_hang_on_init_seed_alone(name):
    cls, config, states = models.MODEL_CLASSES[name], make_config(name), []
    for global_seed, kwargs in ((1, {}), (2, {"init_seed": 42}), (1, {"init_seed": 43})):
        torch.manual_seed(global_seed)
        states.append(cls(config, **kwargs).state_dict())
    a, b, other = states
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], other[key]) for key in a if a[key].dim() == 2)


@five
def test_initial_scales(name):
    n_layer, biases = 3, {"attn_bias": True, "mlp_bias": True, "rotary_dim": 32, "n_intermediate": 256}
    config = make_config(name, n_embd=128, n_layer=n_layer, **(biases if name in LLAMAS else {}))
    outs = ("attn.c_proj.weight", "attn.o_proj.weight")
    if name in GELU_MLP:
        outs += ("mlp.c_proj.weight", "mlp.down_proj.weight")
    for key, p in models.MODEL_CLASSES[name](config).named_parameters():
        if p.dim() == 1:
            assert (p == key.endswith("weight")).all(), key  # norms 1, biases 0
            continue
        want = 0.02 / math.sqrt(2 * n_layer) if key.endswith(outs) else 0.02
        assert p.std().item() == pytest.approx(want, rel=0.06 if p.numel() < 10_000 else 0.03), key
        assert abs(p.mean().item()) < 5 * want / math.sqrt(p.numel()), key


@five
def test_builds_on_the_meta_device(name):
    with torch.device("meta"):
        model = models.MODEL_CLASSES[name](make_config(name))
    assert all(p.is_meta for p in model.parameters())
    assert model(tokens(9).to("meta"))[0].shape == (2, 9, V)


# -----------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    "names,fields,message",
    [
        (ALL, {"n_embd": 30}, r"n_embd \(30\) must be divisible by n_head \(4\)"),
        (ALL, {"n_layer": 0}, "n_layer must be a whole number from 1 to 2147483648, not 0"),
        (ALL, {"n_head": 4.0}, "n_head must be a whole number from 1 to 2147483648, not 4.0"),
        (ALL, {"model_type": "GPT5"}, "model_type is 'GPT5'"),
        (LLAMAS, {"n_key_value_heads": 3}, r"n_head \(4\) must be divisible by n_key_value_heads \(3\)"),
        (LLAMAS, {"n_key_value_heads": 8}, r"n_head \(4\) must be divisible by n_key_value_heads \(8\)"),
        (LLAMAS, {"n_ctx": 32}, r"n_ctx \(32\) must equal block_size \(16\)"),
        (LLAMAS, {"n_embd": 12}, r"n_embd / n_head \(3\) must be even"),
        (LLAMAS, {"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0, not 0.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_impossible_shapes(names, fields, message):
    for name in names:
        with pytest.raises(ValueError, match=message):
            make_config(name, **fields)


@five
def test_one_kinds_fields_do_not_make_another(name):
    other = ALL[ALL.index(name) - 1]
    with pytest.raises(ValueError, match=f"model_type is '{other}', but these are the fields of a {name}$"):
        make_config(name, model_type=other)


@pytest.mark.parametrize("name", LLAMAS)
def test_rotary_dim_without_effect_warns(name):
    with pytest.warns(UserWarning, match="rotary_dim 64 has no effect.* 8 dimensions") as caught:
        config = make_config(name, rotary_dim=64)
    assert len(caught) == 1 and caught[0].filename == __file__  # points at who wrote the number
    same = make(name)
    odd = models.MODEL_CLASSES[name](config)
    odd.load_state_dict(same.state_dict())
    close(logits_of(odd, tokens()), logits_of(same, tokens()))


@five
def test_sequence_longer_than_block_size(name):
    with pytest.raises(ValueError, match=r"sequence of 17 tokens is longer than block_size \(16\)"):
        make(name)(tokens(BLOCK + 1))


@pytest.mark.parametrize("bad", [V, -1])
@five
def test_token_outside_the_vocabulary(name, bad):
    model, idx = make(name), tokens(BLOCK + 4)
    idx[1, 1] = bad
    message = f"token id {bad} is outside the vocabulary of {V}"
    with pytest.raises(ValueError, match=message):
        model(idx[:, :BLOCK])
    with pytest.raises(ValueError, match=message):
        model.generate(idx, 1)  # though this part of the context would be cropped


@pytest.mark.parametrize("zero_stage", [2, 3])
@five
def test_zero_stages_that_do_not_exist(name, zero_stage):
    with pytest.raises(ValueError, match=f"zero_stage {zero_stage} is not supported"):
        make(name).configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", zero_stage)


@pytest.mark.parametrize("fields", [{"temperature": -0.5}, {"temperature": math.nan}, {"top_k": 0}], ids=str)
def test_impossible_sampling(fields):
    value = next(iter(fields.values()))
    with pytest.raises(ValueError, match=rf"\({value}\)"):
        make("GPT2").generate(tokens(), 1, **fields)


# -----------------------------------------------------------------------------
# forward and generate


@five
def test_an_empty_batch_has_empty_logits(name):
    assert make(name)(tokens(B=0))[0].shape == (0, BLOCK, V)


@five
def test_loss_is_the_mean_over_targets_that_are_not_minus_one(name):
    model, batch = make(name), tokens(BLOCK + 1)
    x, y = batch[:, :-1], batch[:, 1:].clone()
    y[0, 3:] = y[1, 0] = -1
    logits, loss = model(x, y)
    picked = [-logits[b, t].log_softmax(-1)[y[b, t]] for b in range(2) for t in range(BLOCK) if y[b, t] != -1]
    assert len(picked) == 3 + BLOCK - 1 and logits.shape == (2, BLOCK, V)
    close(loss, torch.stack(picked).mean())
    assert model(x)[1] is None


@five
def test_loss_without_logits_and_slices(name):
    model, batch = make(name), tokens(BLOCK + 1)
    logits, loss = model(batch[:, :-1], batch[:, 1:])
    whole_logits, whole = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
    none, alone = model(batch[:, :-1], batch[:, 1:], return_logits=False)
    assert none is None
    close((logits, loss, alone), (whole_logits, whole, whole))


@five
def test_a_token_has_no_say_in_what_came_before(name):
    model, idx, t = make(name), tokens(), 7
    changed = idx.clone()
    changed[:, t] = (changed[:, t] + 1) % V
    a, b = logits_of(model, idx), logits_of(model, changed)
    close(a[:, :t], b[:, :t])
    assert ((a - b)[:, t:].abs().amax((0, 2)) > 1e-4).all()  # and in all that comes after


@torch.no_grad()
def greedy(model, idx, n):
    for _ in range(n):
        idx = torch.cat([idx, model(idx[:, -BLOCK:])[0][:, -1].argmax(-1)[:, None]], dim=1)
    return idx


@pytest.mark.parametrize("T", [3, BLOCK, BLOCK + 4], ids=["short", "full", "cropped"])
@five
def test_greedy_generation(name, T):
    model, idx = make(name), tokens(T)
    want = greedy(model, idx, 8)
    assert torch.equal(model.generate(idx, 8, temperature=0.0), want)
    assert torch.equal(model.generate(idx, 8, top_k=1), want)
    assert torch.equal(model.generate(idx, 8, temperature=1e-38), want)
    assert torch.equal(model.generate(idx[1], 8, temperature=0.0), want[1])  # 1-D in, 1-D out
    assert torch.equal(model.generate(idx, 0), idx)


@five
def test_sampling_follows_torchs_seed(name):
    model, draws = make(name), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(tokens(4), 10, temperature=0.8))
    assert draws[0].shape == (2, 14) and torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0][:, :4], tokens(4))


@pytest.mark.parametrize("temperature,top_k", [(0.5, None), (2.0, None), (1.0, 3), (1.0, 1000)])
def test_samples_have_the_models_distribution(temperature, top_k):
    model, idx, n = make("LlamaSimpleMLP"), tokens(4, B=1), 5000
    logits = logits_of(model, idx)[0, -1] / temperature
    if top_k == 3:
        kept = logits.topk(3).indices
        logits = torch.full_like(logits, -math.inf).scatter(0, kept, logits[kept])
    want = logits.softmax(-1)
    torch.manual_seed(0)
    drawn = model.generate(idx.expand(n, -1), 1, temperature=temperature, top_k=top_k)[:, -1]
    got = torch.bincount(drawn, minlength=V) / n
    assert ((got - want).abs() <= 5 * (want * (1 - want) / n).sqrt() + 3 / n).all()
    assert (got[want == 0] == 0).all()


@five
def test_generation_ends_where_every_row_has_ended(name):
    model = make(name)  # made to count: the next token is the last one plus 1
    model.register_forward_hook(lambda m, args, out: (F.one_hot((args[0] + 1) % V, V).float(), None))
    idx = torch.tensor([[9, 3], [9, 5], [7, 1]])
    got = model.generate(idx, 20, temperature=0.0, eos_token_id=7)
    want = [[9, 3, 4, 5, 6, 7, 7, 7], [9, 5, 6, 7, 7, 7, 7, 7], [7, 1, 2, 3, 4, 5, 6, 7]]
    assert got.tolist() == want  # an id 7 in the prompt ends nothing
    assert model.generate(idx[1], 20, temperature=0.0, eos_token_id=7).tolist() == [9, 5, 6, 7]
    assert model.generate(idx, 2, temperature=0.0, eos_token_id=7).tolist() == [row[:4] for row in want]


# -----------------------------------------------------------------------------
# taking a model apart


@pytest.mark.parametrize("part", ["attn", "mlp"])
@five
def test_a_forward_hook_may_replace_an_output(name, part):
    """That of attention and of the MLP's first linear, as one who ablates them would."""
    model, idx = make(name), tokens()
    before = logits_of(model, idx)
    block = model.h[1]
    target = block.attn if part == "attn" else block.mlp.get_submodule(linears(block.mlp)[0])
    handle = target.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    assert (logits_of(model, idx) - before).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(logits_of(model, idx), before)


@five
def test_replacing_a_block_takes_effect(name):
    model, other = make(name), make(name, seed=1)
    part = f"{block_prefix(name)}1."
    mixed = make(name)
    mixed.load_state_dict(model.state_dict() | {k: v for k, v in other.state_dict().items() if k.startswith(part)})
    before = logits_of(model, tokens())
    model.h[1] = other.h[1]
    assert (logits_of(model, tokens()) - before).abs().max() > 1e-3
    close(logits_of(model, tokens()), logits_of(mixed, tokens()))
    assert all(torch.equal(p, mixed.state_dict()[key]) for key, p in model.state_dict().items())


@five
def test_replacing_a_linear_takes_effect(name):
    """Every one of a block's, in attention and in the MLP; the old one is then out of use."""
    for key in linears(make(name).h[0]):
        model, idx = make(name), tokens()
        old = model.h[0].get_submodule(key)
        parent, _, child = key.rpartition(".")
        new = torch.nn.Linear(old.in_features, old.out_features)
        setattr(model.h[0].get_submodule(parent), child, new)
        got = logits_of(model, idx)
        assert (got - logits_of(make(name), idx)).abs().max() > 1e-3, key
        old.weight.data.fill_(math.nan)
        assert torch.equal(logits_of(model, idx), got), key
        new.weight.data.fill_(math.nan)
        assert logits_of(model, idx).isnan().any(), key


@five
def test_the_attention_pattern_can_be_seen_and_replaced(name):
    model, idx, seen = make(name, flash_attention=False), tokens(9), []
    before = logits_of(model, idx)
    handle = model.h[0].attn.softmax.register_forward_hook(lambda m, args, out: seen.append(out))
    logits_of(model, idx)
    handle.remove()
    (pattern,) = seen
    assert pattern.shape == (2, NH, 9, 9) and (pattern >= 0).all()
    close(pattern.sum(-1), torch.ones(2, NH, 9))
    assert (pattern.triu(1) == 0).all() and pattern[..., -1, :].std() > 1e-3  # causal, and not merely uniform
    model.h[0].attn.softmax.register_forward_hook(lambda m, args, out: torch.eye(out.shape[-1]).expand_as(out))
    assert (logits_of(model, idx) - before).abs().max() > 1e-3


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@five
def test_copies_are_whole_and_apart(name, clone):
    model, idx = make(name), tokens()
    before = logits_of(model, idx)
    twin = clone(model)
    assert torch.equal(logits_of(twin, idx), before)
    assert twin.lm_head.weight is twin.wte.weight and twin.config == model.config
    twin.h[0].attn.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    twin.wte.weight.data.mul_(2)
    assert (logits_of(twin, idx) - before).abs().max() > 1e-3
    assert torch.equal(logits_of(model, idx), before)


@FLASH
@five
def test_bfloat16(name, flash):
    model, batch = make(name, flash_attention=flash), tokens(BLOCK + 1)
    want = logits_of(model, batch[:, :-1])
    logits, loss = model.to(torch.bfloat16)(batch[:, :-1], batch[:, 1:])
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (logits.float() - want).abs().max() < 0.1 * want.abs().max()
    assert model.lm_head.weight is model.wte.weight


@five
def test_functional_call(name):
    model, other = make(name), make(name, seed=1)
    before = logits_of(model, tokens())
    got, _ = torch.func.functional_call(model, dict(other.named_parameters()), (tokens(),))
    close(got.detach(), logits_of(other, tokens()))
    assert torch.equal(logits_of(model, tokens()), before)


@five
def test_freezing(name):
    model, batch = make(name).requires_grad_(False), tokens(BLOCK + 1)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(batch[:, :-1], batch[:, 1:])[1].requires_grad
    model.h[1].requires_grad_(True)
    model(batch[:, :-1], batch[:, 1:])[1].backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    assert trained == {key for key, _ in model.named_parameters() if key.startswith(f"{block_prefix(name)}1.")}
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert sum(len(g["params"]) for g in groups) == len(trained)


# -----------------------------------------------------------------------------
# optimizer


@pytest.mark.parametrize("zero_stage", [0, 1])
@five
def test_optimizer(name, zero_stage):
    """zero_stage 1 without a process group has nobody to share with: plain AdamW."""
    model = make(name, **({"attn_bias": True} if name in LLAMAS else {}))
    opt = model.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu", zero_stage)
    assert type(opt) is torch.optim.AdamW
    assert all(g["lr"] == 3e-4 and tuple(g["betas"]) == (0.8, 0.9) and g["fused"] for g in opt.param_groups)
    decay = {id(p): g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in opt.param_groups) == len(decay)  # nothing twice, not even the tied weight
    assert decay == {id(p): 0.1 if p.dim() >= 2 else 0.0 for p in model.parameters()}


@pytest.mark.parametrize("device,fused", [("cuda:0", True), ("cuda", True), ("xpu", False)])
def test_optimizer_is_fused_by_the_type_of_device(device, fused):
    opt = make("LlamaSimpleMLP").configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    assert all(g["fused"] is fused for g in opt.param_groups)
