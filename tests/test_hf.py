"""Hugging Face, both ways: what is exported computes and reads what our model does, and so does what is loaded."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import NASTY, ROOT, bpe_json, environment, reference, run, tree, wordpiece_json, words_json
from lens import hooked

from models import GPT2, MODEL_CLASSES, GPT2Simple, Llama, LlamaSimple, LlamaSimpleMLP
from prepare_data import UserError
from run_info import PretrainRunInfo, export_hf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"block_size": 12, "vocab_size": 610, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"n_ctx": 12, "n_intermediate": 40, "n_key_value_heads": 2, "rotary_dim": 8}
BIASED = {"attn_bias": True, "mlp_bias": True}
KINDS = {
    "GPT2": {},
    "GPT2Simple": {"flash_attention": False},
    "Llama": {},
    "Llama one key head": {"n_key_value_heads": 1, "rotary_base": 500, "rms_norm_eps": 1e-2},
    "Llama adjacent": {"rotary_adjacent_pairs": True} | BIASED,
    "LlamaSimple": {"attn_bias": True, "rms_norm_eps": 1e-5},
    "LlamaSimple all key heads": {"n_key_value_heads": 4, "mlp_bias": True},
    "LlamaSimple adjacent": {"rotary_adjacent_pairs": True, "attn_bias": True},
}
LOADERS = {"gpt2": (GPT2, GPT2Simple), "llama": (Llama, LlamaSimple)}


def random_model(name: str, **options):
    """A model none of whose parameters has a value that a wrong copy could leave in place."""
    cls = MODEL_CLASSES[name.split()[0]]
    llama = {} if cls in LOADERS["gpt2"] else LLAMA
    model = cls(cls.config_class(**SHAPE | llama | KINDS.get(name, {}) | options))
    rng = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=rng)
    return model


def write_run(folder: Path, model, tokenizer: str) -> Path:
    """The run folder of a model, as train.py leaves it."""
    (folder / "checkpoints").mkdir(parents=True)
    shape = dataclasses.asdict(model.config)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(shape))
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"model": shape, "train_dataset_config": {}}))
    (folder / "tokenizer.json").write_text(tokenizer)
    torch.save(model.state_dict(), folder / "checkpoints" / "model_step_3.pt")
    return folder


@pytest.fixture(scope="module")
def bpe():
    return bpe_json()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, bpe):
    """A function: the folder of an exported model of a kind, and the model."""
    made = {}

    def export(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("hf")
            model = random_model(kind)
            export_hf(PretrainRunInfo.from_path(write_run(folder / "run", model, bpe)), folder / "exported")
            made[kind] = folder / "exported", model
        return made[kind]

    return export


def logits(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out[0] if isinstance(out, tuple) else out.logits


def tokens(rows=3, length=12):
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


# -----------------------------------------------------------------------------
# out


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_computes_the_same(exported, kind):
    folder, model = exported(kind)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(hf).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    ours = logits(model, tokens())
    assert ours.std() > 0.5  # not so small that any would do
    torch.testing.assert_close(logits(hf, tokens()), ours, atol=1e-5, rtol=1e-5)
    assert hf.num_parameters() == sum(p.numel() for p in model.parameters())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(folder))
    train_mode = logits(hf.train(), tokens())  # no dropout, which our models have not
    torch.testing.assert_close(train_mode, ours, atol=1e-5, rtol=1e-5)


def test_what_is_exported_says_what_ends_a_document(exported):
    for kind in ("GPT2", "Llama"):
        folder, _ = exported(kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        generation = transformers.GenerationConfig.from_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
        for end in (tokenizer, generation, config):
            assert (end.bos_token_id, end.eos_token_id) == (1, 1)
        assert tokenizer.model_max_length == SHAPE["block_size"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
@pytest.mark.parametrize("spelled", [bpe_json, wordpiece_json])
def test_an_exported_tokenizer_has_the_ids_of_training(tmp_path, kind, spelled):
    folder = write_run(tmp_path / "run", random_model(kind), spelled())
    export_hf(PretrainRunInfo.from_path(folder), tmp_path / "hf")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), PretrainRunInfo.from_path(folder)
    encode, eos = reference(spelled())
    for text in NASTY:
        ids = encode(text)
        assert theirs(text).input_ids == ids == ours.load_tokenizer().encode(text).ids
        for skip in (False, True):
            again = ours.load_tokenizer().decode([*ids, eos], skip_special_tokens=skip)
            assert theirs.decode([*ids, eos], skip_special_tokens=skip) == again
    assert theirs.eos_token_id == eos


def test_a_greedy_continuation_is_the_same(exported):
    for kind in ("GPT2Simple", "LlamaSimple adjacent"):
        folder, model = exported(kind)
        hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
        expected = model.generate(tokens(1, 4), 8, temperature=0)
        with torch.no_grad():
            assert torch.equal(hf.generate(tokens(1, 4), max_new_tokens=8, do_sample=False, eos_token_id=-1), expected)


REFUSED = {
    "LlamaSimpleMLP": ({}, "LlamaSimpleMLP.*MLP"),
    "Llama": ({"use_grouped_query_attention": False}, "use_grouped_query_attention"),
    "LlamaSimple": ({"use_grouped_query_attention": False}, "use_grouped_query_attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_hugging_face_cannot_say_is_refused(tmp_path, bpe, name):
    options, says = REFUSED[name]
    folder = write_run(tmp_path / "run", random_model(name, **options), bpe)
    with pytest.raises(UserError, match=says):
        export_hf(PretrainRunInfo.from_path(folder), tmp_path / "hf")
    assert os.listdir(tmp_path) == ["run"]


def test_a_tokenizer_that_hugging_face_would_read_otherwise_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", random_model("GPT2"), words_json(["a", "b"]))
    with pytest.raises(UserError, match=r"\[EOS\]"):
        export_hf(PretrainRunInfo.from_path(folder), tmp_path / "hf")
    assert os.listdir(tmp_path) == ["run"]


def test_an_export_is_whole_or_not_there(tmp_path, bpe, monkeypatch):
    info = PretrainRunInfo.from_path(write_run(tmp_path / "run", random_model("GPT2"), bpe))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for taken in ("taken", "file", "run"):
        with pytest.raises(UserError, match="there already"):
            export_hf(info, tmp_path / taken)
    with monkeypatch.context() as m:
        m.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", lambda *_: 1 / 0)  # after the weights
        with pytest.raises(ZeroDivisionError):
            export_hf(info, tmp_path / "new" / "deep")
    assert tree(tmp_path) == before
    assert not (tmp_path / "new" / "deep").exists()
    done = run("run_info.py", tmp_path / "run", "--export-hf", tmp_path / "empty")
    assert done.returncode == 0 and done.stdout.startswith(f"wrote {tmp_path / 'empty'}: ")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "empty")
    assert not list(tmp_path.glob(".*"))


# -----------------------------------------------------------------------------
# in


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_loads_a_folder_of_hugging_faces(exported, kind):
    folder, model = exported(kind)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for cls in LOADERS[hf.config.model_type]:
        loaded = cls.from_pretrained(folder if cls.__name__[-1] == "2" else str(folder))
        assert type(loaded) is cls
        torch.testing.assert_close(logits(loaded, tokens()), logits(hf, tokens()), atol=1e-5, rtol=1e-5)
        if cls is type(model) and not getattr(model.config, "rotary_adjacent_pairs", False):
            changed = dataclasses.replace(model.config, flash_attention=True)
            assert loaded.config == changed
            state = model.state_dict()
            assert all(torch.equal(p, state[name]) for name, p in loaded.state_dict().items())


def test_a_model_of_hugging_faces_own_making(tmp_path):
    """Shards, half precision, defaults left out: what a hub's repository looks like."""
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=20, tie_word_embeddings=True, rope_theta=5000.0,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    hf.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    for spelled in ("new", "old"):
        if spelled == "old":  # before transformers 5, and without what has a default
            said |= {"rope_theta": said.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
            del said["head_dim"]
            (tmp_path / "hf" / "config.json").write_text(json.dumps(said))
        model = Llama.from_pretrained(tmp_path / "hf")
        assert (model.config.rotary_base, model.config.n_key_value_heads) == (5000, 2)
        assert model.wte.weight.dtype == torch.float32
        idx = tokens() % 90
        torch.testing.assert_close(logits(model, idx), logits(hf.float(), idx), atol=1e-5, rtol=1e-5)


HUB = """
import sys, torch
from models import GPT2, GPT2Simple
from train import load_pretrained
model = GPT2.from_pretrained("gpt2")
assert torch.equal(model.wte.weight, GPT2Simple.from_pretrained("org/our-gpt2").wte.weight)
start = GPT2(model.config, init_seed=1)
load_pretrained(start, "gpt2")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
torch.save(model(torch.arange(30)[None])[0], sys.argv[1])
small = GPT2(type(model.config)(block_size=8, vocab_size=90, n_layer=2, n_head=2, n_embd=16))
try:
    load_pretrained(small, "gpt2")
except Exception as e:
    print(type(e).__name__, e)
try:
    GPT2.from_pretrained("out/missing")
except Exception as e:
    print(type(e).__name__, e)
"""


def test_ids_on_the_hub(tmp_path):
    """From a cache as the hub's client keeps it, offline; the file is laid out as the hub's gpt2: no prefix, masks."""
    config = transformers.GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    hf = transformers.GPT2LMHeadModel(config).eval()
    state = {k.removeprefix("transformer."): v for k, v in hf.state_dict().items() if k != "lm_head.weight"}
    state |= {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in range(2)}
    for repo in ("gpt2", "org--our-gpt2"):
        files = tmp_path / "hub" / f"models--{repo}" / "snapshots" / ("0" * 40)
        files.mkdir(parents=True)
        (files.parent.parent / "refs").mkdir()
        (files.parent.parent / "refs" / "main").write_text("0" * 40)
        hf.config.save_pretrained(files)
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, files / "model.safetensors", {"format": "pt"})
    env = environment({"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)})
    command = [sys.executable, "-c", HUB, tmp_path / "logits.pt"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(hf, torch.arange(30)[None]))
    mismatch, missing = done.stdout.splitlines()
    assert mismatch.startswith("UserError") and "wpe.weight (64, 32) there, (8, 16) here" in mismatch
    assert missing.startswith("UserError out/missing is no run, nor can Hugging Face load it: ")


CHANGES = {
    "GPT2": [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("n_inner", 100),
        ("tie_word_embeddings", False),
        ("model_type", "gpt_neo"),
        ("n_positions", 0),
    ],
    "Llama": [
        ("hidden_act", "gelu"),
        ("head_dim", 16),
        ("tie_word_embeddings", False),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.5}),
        ("sliding_window", 4),
        ("quantization_config", {"quant_method": "fp8"}),
        ("model_type", "mistral"),
    ],
}


@pytest.mark.parametrize("kind, field, value", [(k, *c) for k, changes in CHANGES.items() for c in changes])
def test_what_our_config_cannot_say_is_refused(exported, tmp_path, kind, field, value):
    shutil.copytree(exported(kind)[0], tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | {field: value}))
    named = {"n_positions": "block_size", "model_type": value}.get(field, field)
    if isinstance(value, dict) and value.get("rope_theta") == 10000.5:
        named = "rotary_base"
    with pytest.raises(UserError, match=rf"^\S+/hf.*\b{named}\b"):
        MODEL_CLASSES[kind].from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("change", ["missing", "beside", "untied", "cut short", "gone"])
def test_weights_that_are_not_all_there_are_refused(exported, tmp_path, change):
    from safetensors.torch import load_file, save_file

    shutil.copytree(exported("Llama")[0], tmp_path / "hf")
    path, says = tmp_path / "hf" / "model.safetensors", "extra"
    state = load_file(path)
    if change == "missing":
        del state["model.norm.weight"]
        says = r"model\.norm\.weight"
    elif change == "beside":
        state["model.layers.0.self_attn.extra.weight"] = torch.zeros(2)
    elif change == "untied":
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
        says = "lm_head"
    save_file(state, path, {"format": "pt"})
    if change == "cut short":
        os.truncate(path, path.stat().st_size // 2)
        says = "nor can Hugging Face load it"
    elif change == "gone":
        path.unlink()
        says = "nor can Hugging Face load it"
    with pytest.raises(UserError, match=says):
        Llama.from_pretrained(tmp_path / "hf")


def test_a_class_that_the_folder_does_not_fit(exported, tmp_path):
    gpt2, llama = exported("GPT2")[0], exported("Llama")[0]
    for cls, folder, says in [
        (Llama, gpt2, "gpt2.*Llama can only load a llama"),
        (GPT2, llama, "llama.*GPT2 can only load a gpt2"),
        (LlamaSimpleMLP, llama, "no class for LlamaSimpleMLP"),
        (LlamaSimpleMLP, "out/missing", "out/missing is no run"),
    ]:
        with pytest.raises(UserError, match=says):
            cls.from_pretrained(folder)
    (tmp_path / "neither").mkdir()
    with pytest.raises(FileNotFoundError, match="neither"):
        GPT2.from_pretrained(tmp_path / "neither")
    for missing in (tmp_path / "run" / "model_step_3.pt", "checkpoints/model_step_3.pt"):
        with pytest.raises(FileNotFoundError, match="no run at"):
            GPT2.from_pretrained(missing)


# -----------------------------------------------------------------------------
# TransformerLens


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_hooked_transformer_computes_the_same(exported, kind):
    lens = pytest.importorskip(
        "transformer_lens.HookedTransformer", reason="needs pip install 'transformer-lens<4'", exc_type=ImportError
    )
    folder, model = exported(kind)
    ours, idx = copy.deepcopy(model), tokens()
    theirs = hooked(folder)
    assert type(theirs) is lens.HookedTransformer
    with torch.no_grad():
        computed, cache = theirs.run_with_cache(idx)
        torch.testing.assert_close(computed, logits(ours, idx), atol=1e-4, rtol=1e-4)
        for i in range(SHAPE["n_layer"]):
            pattern = cache[f"blocks.{i}.attn.hook_pattern"]
            torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        # in float32 two orders of the same sums differ by 2e-5, as far as each is from the exact value
        torch.testing.assert_close(theirs.double()(idx), logits(ours.double(), idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_transformer_lens_computes_the_same(exported, kind):
    bridge = pytest.importorskip(
        "transformer_lens.model_bridge", reason="needs pip install 'transformer-lens>=3.9'", exc_type=ImportError
    )
    folder, model = exported(kind)
    hooked, idx = bridge.TransformerBridge.boot_transformers(str(folder), device="cpu"), tokens()
    with torch.no_grad():
        theirs, cache = hooked.run_with_cache(idx)
        torch.testing.assert_close(theirs, logits(model, idx), atol=1e-4, rtol=1e-4)
        last = model.ln_f(cache[f"blocks.{SHAPE['n_layer'] - 1}.hook_resid_post"])
        torch.testing.assert_close(model.lm_head(last), logits(model, idx), atol=1e-4, rtol=1e-4)
    assert hooked.to_tokens("a<|endoftext|>b").tolist()[0][0] == hooked.tokenizer.bos_token_id == 1
