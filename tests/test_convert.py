"""convert.py: what is written for others computes and reads what our model does, and so does what is read back."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import NASTY, ROOT, bpe_json, environment, reference, run, tree, wordpiece_json, write_files
from safetensors.torch import load_file, save_file

import convert
import models
from convert import export_hf, export_param_decomp
from models import MODEL_CLASSES
from prepare_data import UserError, tokenizer_config
from run_info import PretrainRunInfo

transformers = pytest.importorskip("transformers", minversion="5")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SHAPE = {"block_size": 12, "vocab_size": 610, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"n_ctx": 12, "n_intermediate": 40, "n_key_value_heads": 2, "rotary_dim": 8}
ADJACENT = {"rotary_adjacent_pairs": True, "attn_bias": True, "mlp_bias": True}
MERGED = {"use_grouped_query_attention": False}
KINDS = {
    "GPT2": {},
    "GPT2Simple": {"flash_attention": False},
    "Llama": {"rotary_base": 500000},
    "Llama one key head": {"n_key_value_heads": 1, "rms_norm_eps": 1e-2},
    "Llama adjacent": ADJACENT,
    "Llama merged": MERGED | {"attn_bias": True},
    "LlamaSimple": {"n_key_value_heads": 4, "mlp_bias": True, "rms_norm_eps": 1e-5},
    "LlamaSimple adjacent merged": ADJACENT | MERGED,
    "LlamaSimpleMLP": {},
    "LlamaSimpleMLP adjacent": {"rotary_base": 500000} | ADJACENT,
    "LlamaSimpleMLP merged": {"flash_attention": False} | MERGED,
}
BPE = bpe_json()
AutoModel = transformers.AutoModelForCausalLM


def random_model(kind: str, **options):
    """A model none of whose parameters has a value that a wrong copy could leave in place."""
    cls = MODEL_CLASSES[kind.split()[0]]
    fields = SHAPE | ({} if kind.startswith("GPT2") else LLAMA) | KINDS.get(kind, {}) | options
    model = cls(cls.config_class(**fields)).eval()
    rng = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=rng)
    return model


def write_run(folder: Path, model, tokenizer: str = BPE, eos: str = "<|endoftext|>") -> Path:
    """The run folder of a model, as train.py leaves it."""
    shape, ids = dataclasses.asdict(model.config), tokens(1, 13)
    loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    check = {"step": 3, "val_loss": 2.5, "ids": ids[0].tolist(), "loss": loss}
    files = {"model_config.yaml": shape, "final_config.yaml": {"model": shape, "wandb_project": "tales"}}
    files |= {"tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config(eos)}
    write_files(folder, files | {"check.json": json.dumps(check), "checkpoints/model_step_3.pt": b""})
    torch.save(model.state_dict(), folder / "checkpoints" / "model_step_3.pt")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: (the folder of an exported model of a kind, the model)."""

    @functools.cache
    def export(kind):
        folder, model = tmp_path_factory.mktemp("hf"), random_model(kind)
        export_hf(PretrainRunInfo.from_path(write_run(folder / "run", model)), folder / "exported")
        return folder / "exported", model

    return export


@torch.no_grad()
def logits(model, idx):
    return model(idx)[0] if type(model).__name__ in MODEL_CLASSES else model(idx).logits


def tokens(rows=3, length=12):
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_computes_the_same_and_is_read_back(exported, kind):
    """Logits, also in training mode; greedy generation with its cache; sizes; what other readers look for."""
    folder, model = exported(kind)
    hf = AutoModel.from_pretrained(folder).eval()
    ours = logits(model, tokens())
    assert ours.std() > 0.5  # not so small that any would do
    assert_same(logits(hf, tokens()), ours)
    assert_same(logits(hf.train(), tokens()), ours)
    assert hf.num_parameters() == sum(p.numel() for p in model.parameters())
    theirs = hf.eval().generate(tokens(1, 4), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert torch.equal(theirs, model.generate(tokens(1, 4), 8, temperature=0))
    said, c = json.loads((folder / "config.json").read_text()), model.config  # for llama.cpp, and transformers 4
    assert said["n_ctx"] == 12 if kind.startswith("GPT2") else said["rope_theta"] == c.rotary_base
    for name in [name for name, kind_there in convert.HF_TYPES.items() if kind_there == hf.config.model_type]:
        loaded = MODEL_CLASSES[name].from_pretrained(str(folder))
        assert_same(logits(loaded, tokens()), ours)
        if type(loaded) is type(model) and "adjacent" not in kind and "merged" not in kind:
            assert loaded.config == dataclasses.replace(c, flash_attention=True)
            torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "spelled, eos, eos_id", [(BPE, "<|endoftext|>", 1), (BPE, "<|padding|>", 0), (wordpiece_json(), "[EOS]", 1)]
)
def test_the_tokenizer_has_the_ids_of_training(tmp_path, spelled, eos, eos_id):
    """And the EOS that the run recorded, also where its tokenizer has two that could be it."""
    ours = PretrainRunInfo.from_path(write_run(tmp_path / "run", random_model("LlamaSimpleMLP"), spelled, eos))
    export_hf(ours, tmp_path / "hf")
    theirs, (encode, _) = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), reference(spelled)
    for text in NASTY:
        ids = encode(text)
        assert theirs(text).input_ids == ids == ours.load_tokenizer().encode(text).ids
        assert theirs.decode(ids) == ours.load_tokenizer().decode(ids)
    for part in (transformers.GenerationConfig, transformers.AutoConfig, transformers.AutoTokenizer):
        end = part.from_pretrained(tmp_path / "hf")
        assert (end.bos_token_id, end.eos_token_id) == (eos_id, eos_id)
    assert (theirs.pad_token_id, theirs.model_max_length) == (eos_id, SHAPE["block_size"])
    # transformers 4 knows this class
    assert '"PreTrainedTokenizerFast"' in (tmp_path / "hf" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("kind", ["GPT2Simple", "Llama adjacent", "LlamaSimpleMLP"])
def test_a_pipeline_and_a_trainer_take_it(exported, tmp_path, kind):
    folder, model = exported(kind)
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    tok = PretrainRunInfo.from_path(folder.parent / "run").load_tokenizer()
    ids = torch.tensor(tok.encode("ab<|").ids)
    expected = model.generate(ids, 12 - len(ids), temperature=0, eos_token_id=1)
    out = pipe("ab<|", max_new_tokens=12 - len(ids), do_sample=False)
    assert out[0]["generated_text"] == tok.decode(expected.tolist())
    rows = [{"input_ids": row} for row in tokens(4).tolist()]
    collate = transformers.DataCollatorForLanguageModeling(pipe.tokenizer, mlm=False)
    labels = tokens(4)[:, 1:].masked_fill(tokens(4)[:, 1:] == 1, -1)  # the collator takes EOS, its padding, out
    assert_same(pipe.model(**collate(rows)).loss, model(tokens(4)[:, :-1], labels)[1])
    args = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    transformers.Trainer(pipe.model, args, train_dataset=rows, data_collator=collate).train()
    assert not torch.equal(pipe.model.lm_head.weight, AutoModel.from_pretrained(folder).lm_head.weight)


@pytest.mark.parametrize("kind", ["GPT2", "Llama one key head", "LlamaSimpleMLP", "LlamaSimpleMLP adjacent"])
def test_transformer_lens_computes_the_same_and_its_hooks_fire(exported, kind):
    from transformer_lens.model_bridge import TransformerBridge

    folder, model = exported(kind)
    hooked, idx = TransformerBridge.boot_transformers(str(folder), device="cpu"), tokens()
    assert_same(hooked(idx), model(idx)[0], 1e-4)
    zeroed = hooked.run_with_hooks(idx, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: 0 * x)])
    assert_same(zeroed, model.lm_head(model.ln_f(torch.zeros(3, 12, 32))), 1e-4)


class Fork(models.LlamaSimpleMLP):
    """A fork's model: with a parameter more, or with the same parameters and another function."""

    def __init__(self, config):
        super().__init__(config)
        if self.kind == "Extra":
            self.h[0].attn.q_norm = torch.nn.LayerNorm(8)
        if self.kind == "Scaled":
            self.ln_f.register_forward_hook(lambda module, args, out: 2 * out)


@pytest.mark.parametrize("kind, name, says", [("Extra", "", "q_norm"), ("Scaled", "", "differ"), ("", "X", "X")])
def test_a_fork_that_hugging_face_cannot_express_is_refused(tmp_path, monkeypatch, kind, name, says):
    fork = type(name or "LlamaSimpleMLP", (Fork,), {"kind": kind})
    monkeypatch.setitem(MODEL_CLASSES, "LlamaSimpleMLP", fork)
    info = PretrainRunInfo.from_path(write_run(tmp_path / "run", random_model("LlamaSimpleMLP")))
    with pytest.raises(UserError, match=says):
        export_hf(info, tmp_path / "hf")
    if kind == "Extra":
        with pytest.raises(UserError, match=says):
            export_param_decomp(info, tmp_path / "data", None)
    assert os.listdir(tmp_path) == ["run"]


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    info = PretrainRunInfo.from_path(write_run(tmp_path / "run", random_model("GPT2")))
    before = tree(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: 1 / 0)  # after all files are written
        with pytest.raises(ZeroDivisionError):
            export_hf(info, tmp_path / "new" / "deep")
    monkeypatch.chdir(tmp_path)
    for args, says in ((["run"], "exists"), (["x", "--step", "4"], "step_4"), (["x", "--as", "a/b"], "--param-decomp")):
        monkeypatch.setattr(sys, "argv", ["convert.py", "run", "--hf", *args])
        with pytest.raises(SystemExit) as e:
            convert.main()
        assert says in f"{e.value} {capsys.readouterr().err}"
    assert tree(tmp_path) == before and not (tmp_path / "new" / "deep").exists()
    assert run("convert.py", tmp_path / "run", "--hf", tmp_path / "x", "--step", "3").returncode == 0
    assert not models.GPT2.from_pretrained(tmp_path / "x").training and not list(tmp_path.glob(".*"))


CHANGES = [  # kind, field of config.json, value, the word that the sentence contains
    ("GPT2", "activation_function", "gelu", "activation_function"),
    ("GPT2", "tie_word_embeddings", False, "tie_word_embeddings"),
    ("Llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, "rope_parameters"),
    ("Llama", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.5}, "rotary_base"),
    ("Llama", "sliding_window", 4, "sliding_window"),
    ("LlamaSimpleMLP", "hidden_act", "relu2", "hidden_act"),
]


@pytest.mark.parametrize("kind, field, value, says", CHANGES)
def test_a_config_that_ours_cannot_say_is_refused(exported, tmp_path, kind, field, value, says):
    path = shutil.copytree(exported(kind)[0], tmp_path / "hf") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=rf"\bhf\b.*\b{says}\b"):
        MODEL_CLASSES[kind].from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.extra.weight", "lm_head.weight"])
def test_weights_that_are_not_all_there_are_refused(exported, tmp_path, name):
    path = shutil.copytree(exported("LlamaSimpleMLP")[0], tmp_path / "hf") / "model.safetensors"
    state = load_file(path)
    state = {k: x for k, x in state.items() if k != name} if name in state else state | {name: torch.ones(610, 32)}
    save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match=name):
        models.LlamaSimpleMLP.from_pretrained(tmp_path / "hf")


def test_ids_on_the_hub(tmp_path):
    """From a cache as the hub's client keeps it, offline; laid out as the hub's gpt2: no prefix, and masks."""
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2)
    hf = transformers.GPT2LMHeadModel(config).eval()
    state = {k.removeprefix("transformer."): v for k, v in hf.state_dict().items() if k != "lm_head.weight"}
    state |= {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in range(2)}
    files = tmp_path / "hub" / "models--org--mine" / "snapshots" / ("0" * 40)
    hf.config.save_pretrained(files)
    write_files(files.parent.parent, {"refs/main": "0" * 40})
    save_file(state, files / "model.safetensors", {"format": "pt"})
    code = "import models, torch\nfor name in ('org/mine', 'out/missing'):\n"
    code += "    torch.save(models.GPT2.from_pretrained(name)(torch.arange(30)[None])[0], 'logits')"
    env = environment({"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)})
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "UserError: out/missing is no run, nor can Hugging Face load it (" in done.stderr
    assert_same(torch.load(tmp_path / "logits"), logits(hf, torch.arange(30)[None]))


def test_param_decomp_gets_the_weights_and_the_shape(tmp_path):
    model = random_model("LlamaSimpleMLP", rotary_base=500, rotary_dim=4)
    folder, cache = write_run(tmp_path / "run", model), tmp_path / "root" / "pretrain_cache"
    entry = cache / "tales-0a1b2c3d"
    write_files(entry, {"model_step_1.safetensors": "stale"})
    done = run("convert.py", folder, "--param-decomp", tmp_path / "root", "--as", "tales/0a1b2c3d")
    said = yaml.safe_load(done.stdout.partition("\n")[2])["target"]["spec"]
    assert (said["kind"], said["run_path"].partition("/")[2]) == ("pretrained", "tales/0a1b2c3d")
    (path,) = entry.glob("*.safetensors")
    assert path.name == "model_step_3.safetensors" and path.stat().st_mode & 0o044 == 0o044
    expected = {key: x for key, x in model.state_dict().items() if key != "lm_head.weight"}
    torch.testing.assert_close(load_file(path), expected, rtol=0, atol=0)
    shape = yaml.safe_load((entry / "model_config.yaml").read_text())
    assert shape == dataclasses.asdict(model.config) | {"rotary_dim": 8}
    assert_same(logits(PretrainRunInfo.from_path(entry).load_model(), tokens()), logits(model, tokens()))
    assert json.loads((entry / "check.json").read_text()) == json.loads((folder / "check.json").read_text())
    for more in ({}, {"wandb_run_id": "abcd1234"}):
        write_files(folder, more)
        export_param_decomp(PretrainRunInfo.from_path(folder), tmp_path / "root", None)
    assert re.fullmatch(r"tales-0a1b2c3d tales-abcd1234 tales-t-[0-9a-f]{8}", " ".join(sorted(os.listdir(cache))))


UNLIKE = [("LlamaSimpleMLP", {key: True}, key) for key in ("attn_bias", "mlp_bias", "rotary_adjacent_pairs")]
UNLIKE += [("LlamaSimpleMLP", MERGED, "use_grouped_query_attention"), ("GPT2", {}, "GPT2"), ("Llama", {}, "Llama")]


@pytest.mark.parametrize("kind, options, says", [*UNLIKE, ("LlamaSimpleMLP", {}, "PROJECT/RUN_ID")])
def test_what_param_decomp_cannot_express_is_refused(tmp_path, kind, options, says):
    info = PretrainRunInfo.from_path(write_run(tmp_path / "run", random_model(kind, **options)))
    with pytest.raises(UserError, match=says):
        export_param_decomp(info, tmp_path / "root", "x/y")
    assert os.listdir(tmp_path) == ["run"]
