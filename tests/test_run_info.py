"""run_info.py: finding a run on disk and loading its weights, tokenizer and data, new runs and old ones."""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import NASTY, bpe_json, environment, wordpiece_json, words_json

import prepare_data
import train
from models import MODEL_CLASSES
from run_info import PretrainRunInfo, data_of_update, short, text_plot

ROOT = Path(__file__).resolve().parent.parent
STEPS = 0, 2, 10  # in an order that is not the alphabet's
SHAPE = {"block_size": 16, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 16}
LLAMA = {"n_ctx": 16, "n_intermediate": 24, "n_key_value_heads": 1, "rotary_dim": 8}
five = pytest.mark.parametrize("name", MODEL_CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(name, seed=0):
    cls = MODEL_CLASSES[name]
    return cls(cls.config_class(**SHAPE | ({} if name.startswith("GPT2") else LLAMA)), init_seed=seed)


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer.json of a small BPE."""
    return prepare_data.train_bpe(iter(["one two three, " * 20, "four five six"]), 270)


@pytest.fixture
def make_run(tmp_path, tokenizer):
    """A function that lays out a run: a model of its own at each step."""

    def make(name="LlamaSimpleMLP", folder="run", checkpoints="checkpoints", change=dict, drop=()):
        folder = tmp_path / folder
        (folder / checkpoints).mkdir(parents=True)
        shape = dataclasses.asdict(make_model(name).config)
        (folder / "model_config.yaml").write_text(yaml.safe_dump({k: v for k, v in shape.items() if k not in drop}))
        config = {"seed": 0, "model": shape, "train_dataset_config": {"hf_tokenizer_path": "some/tokenizer"}}
        (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
        (folder / "tokenizer.json").write_bytes(tokenizer)
        for step in STEPS:
            state = change(make_model(name, seed=step).state_dict())
            torch.save(state, folder / checkpoints / f"model_step_{step}.pt")
        return folder

    return make


def assert_holds(model, name, step):
    """The model is the one of that step: in its weights and in what it computes."""
    expected = make_model(name, seed=step)
    assert type(model) is type(expected)
    assert model.config == expected.config
    a, b = model.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    idx = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(idx)[0], expected(idx)[0])


# -----------------------------------------------------------------------------
# finding


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "path, step, found",
    [("", None, 10), ("", 0, 0), ("", 2, 2), ("model_step_2.pt", None, 2), ("model_step_2.pt", 0, 0)],
)
def test_from_path(make_run, kind, path, step, found):
    folder = make_run()
    info = PretrainRunInfo.from_path(kind(folder / "checkpoints" / path if path else folder), step=step)
    assert info.checkpoint_path == folder / "checkpoints" / f"model_step_{found}.pt"
    assert info.config_dict == yaml.safe_load((folder / "final_config.yaml").read_text())
    assert info.model_config_dict == yaml.safe_load((folder / "model_config.yaml").read_text())
    assert info.tokenizer_path == folder / "tokenizer.json"
    assert info.hf_tokenizer_path == "some/tokenizer"
    assert info.checkpoints == {s: folder / "checkpoints" / f"model_step_{s}.pt" for s in STEPS}
    assert list(info.checkpoints) == list(STEPS)
    assert_holds(info.load_model(), "LlamaSimpleMLP", found)


def test_relative_paths_and_homes(make_run, monkeypatch):
    folder = make_run()
    monkeypatch.chdir(folder / "checkpoints")
    assert_holds(PretrainRunInfo.from_path("model_step_2.pt").load_model(), "LlamaSimpleMLP", 2)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert list(PretrainRunInfo.from_path("~/run").checkpoints) == list(STEPS)


def test_a_run_as_wandb_lays_it_out(make_run):
    """Checkpoints beside the configs, no folder between."""
    folder = make_run(checkpoints=".")
    info = PretrainRunInfo.from_path(folder)
    assert list(info.checkpoints) == list(STEPS)
    assert_holds(info.load_model(), "LlamaSimpleMLP", 10)
    assert_holds(PretrainRunInfo.from_path(folder / "model_step_0.pt").load_model(), "LlamaSimpleMLP", 0)
    (folder / "checkpoints").mkdir()
    assert PretrainRunInfo.from_path(folder).checkpoint_path == folder / "model_step_10.pt"


def test_folders_called_checkpoints(make_run):
    """A run's own leads to the run; a run may be called so itself."""
    folder = make_run(folder="checkpoints")
    for path in (folder, folder / "checkpoints", folder / "checkpoints" / "model_step_10.pt"):
        info = PretrainRunInfo.from_path(path)
        assert (info.folder, info.checkpoint_path) == (folder, folder / "checkpoints" / "model_step_10.pt")
    shutil.copy(info.checkpoint_path, folder)
    assert PretrainRunInfo.from_path(folder / "model_step_10.pt").folder == folder


def test_what_lies_beside_checkpoints_is_none(make_run):
    folder = make_run()
    for name in ("model_step_x.pt", ".model_step_11.pt.part", "optim_step_12.pt", "model_step_13.pt.bak"):
        (folder / "checkpoints" / name).touch()
    (folder / "checkpoints" / "model_step_99.pt").mkdir()
    info = PretrainRunInfo.from_path(folder)
    assert list(info.checkpoints) == list(STEPS)
    assert info.checkpoint_path.name == "model_step_10.pt"


def test_an_empty_spd_out_dir_is_none(make_run, tmp_path, monkeypatch):
    """As in the shell's ${SPD_OUT_DIR:-out}; for runs kept from W&B, and for new ones."""
    folder = make_run(folder="out/pretrain_cache/p-abcdefgh", checkpoints=".")
    files = {p.name: (p.stat().st_size, None) for p in folder.iterdir()}
    (folder / "wandb.json").write_text(json.dumps({"run": "e/p/abcdefgh", "state": "finished", "files": files}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_OUT_DIR", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert PretrainRunInfo.from_path("e/p/abcdefgh").checkpoint_path == folder / "model_step_10.pt"
    assert train.parent_of_runs(argparse.Namespace(output_dir=None)) == Path("out/target_models")


MISSING = {
    "no such path": (lambda f: shutil.rmtree(f), None, r"no run at .*run"),
    "no final_config": (lambda f: (f / "final_config.yaml").unlink(), None, r"final_config\.yaml"),
    "no model_config": (lambda f: (f / "model_config.yaml").unlink(), None, r"model_config\.yaml"),
    "no checkpoints": (lambda f: [p.unlink() for p in (f / "checkpoints").iterdir()], None, r"no .*model_step_N\.pt"),
    "no step at all": (lambda f: shutil.rmtree(f / "checkpoints"), 7, r"saved any yet$"),
    "no such step": (lambda f: None, 7, r"step 7.*\b0, 2, 10\b"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_not_there(make_run, what):
    spoil, step, says = MISSING[what]
    folder = make_run()
    spoil(folder)
    for weights in (True, False) if step else [True]:
        with pytest.raises(FileNotFoundError, match=says) as e:
            PretrainRunInfo.from_path(folder, step, weights)
        assert isinstance(e.value, prepare_data.UserError)


# -----------------------------------------------------------------------------
# loading


@five
def test_every_model_loads_in_every_way(make_run, name):
    folder = make_run(name)
    info = PretrainRunInfo.from_path(folder / "checkpoints" / "model_step_2.pt")
    cls = MODEL_CLASSES[info.model_config_dict["model_type"]]
    for model in (info.load_model(), cls.from_run_info(info)):
        assert_holds(model, name, 2)
    assert_holds(cls.from_pretrained(folder), name, 10)
    assert_holds(cls.from_pretrained(str(folder / "checkpoints" / "model_step_0.pt")), name, 0)


@five
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_old_checkpoints_carry_prefixes(make_run, name, prefix):
    folder = make_run(name, change=lambda state: {prefix + k: v for k, v in state.items()})
    assert_holds(PretrainRunInfo.from_path(folder).load_model(), name, 10)


@five
def test_old_checkpoints_carry_buffers(make_run, name):
    """SPD saved its causal masks and RoPE tables; both are computed here, and what was saved is not used."""

    def change(state):
        prefixes = {m[0] for k in state if (m := re.match(r".*\.attn\.", k))}
        junk = {"bias": torch.zeros(1, 1, 16, 16), "rotary_sin": torch.zeros(16, 8), "rotary_cos": torch.zeros(16, 8)}
        assert len(prefixes) == 2
        return state | {f"_orig_mod.{p}{k}": v for p in prefixes for k, v in junk.items()}

    assert_holds(PretrainRunInfo.from_path(make_run(name, change=change)).load_model(), name, 10)


@five
def test_old_model_configs_have_no_model_type(make_run, name):
    info = PretrainRunInfo.from_path(make_run(name, drop=["model_type"]))
    with pytest.raises(prepare_data.UserError, match="model_type"):
        info.load_model()
    assert_holds(MODEL_CLASSES[name].from_run_info(info), name, 10)


@pytest.mark.parametrize("change", [lambda s: s | {"h.7.extra": torch.zeros(1)}, lambda s: dict(list(s.items())[1:])])
def test_other_weights_do_not_load(make_run, change):
    with pytest.raises(Exception, match=r"h\.7\.extra|wte\.weight"):
        PretrainRunInfo.from_path(make_run(change=change)).load_model()


class Evil:
    """What a pickle can do to who loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_with_code_is_refused(make_run, tmp_path):
    folder = make_run(change=lambda state: state | {"x": Evil(tmp_path / "ran")})
    with pytest.raises(Exception):  # noqa: B017 - whatever says no
        PretrainRunInfo.from_path(folder).load_model()
    assert not (tmp_path / "ran").exists()


def test_tokenizer_of_the_run(make_run, tokenizer):
    tok = PretrainRunInfo.from_path(make_run()).load_tokenizer()
    assert json.loads(tok.to_str())["model"] == json.loads(tokenizer)["model"]
    assert tok.decode(tok.encode("one two, sechs").ids) == "one two, sechs"


def test_a_run_without_tokenizer_json_uses_the_one_named(make_run, tmp_path, tokenizer):
    folder = make_run()
    (folder / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (folder / "final_config.yaml").write_text(
        yaml.safe_dump({"train_dataset_config": {"hf_tokenizer_path": str(tmp_path / "elsewhere.json")}})
    )
    info = PretrainRunInfo.from_path(folder)
    assert info.tokenizer_path is None
    assert json.loads(info.load_tokenizer().to_str())["model"] == json.loads(tokenizer)["model"]


def unigram_json() -> str:
    """A Unigram that adds EOS when asked, and whose vocabulary has it as a word: it could be found in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = [("<unk>", 0.0), ("</s>", -1.0), *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz<>/[]|▁")]
    tok = Tokenizer(models.Unigram(words, 0, False))
    tok.add_special_tokens(["</s>"])
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tok.to_str()


SPELLED = {
    "BPE": bpe_json,
    "WordPiece": wordpiece_json,
    "WordLevel": lambda: words_json(NASTY),
    "Unigram": unigram_json,
}


@pytest.mark.parametrize("kind", SPELLED)
def test_text_gets_the_ids_of_training(make_run, tmp_path, kind):
    """The shards' ids, prepared by the script from text that tries to be special."""
    spelled = SPELLED[kind]()
    rows = [text for text in NASTY if text] + ["</s>", "one </s> two[EOS]"]
    section = {"name": str(tmp_path / "docs.jsonl"), "path": str(tmp_path / "data"), "n_ctx": 9}
    section["hf_tokenizer_path"] = str(tmp_path / "spelled.json")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    (tmp_path / "spelled.json").write_text(spelled)
    config = {"train_dataset_config": section, "val_dataset_config": {**section, "split": "train[-3:]"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, ROOT / "prepare_data.py", tmp_path / "c.yaml"]
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment())

    folder = make_run()
    respell(folder, vocab_size=700)
    shutil.copy(tmp_path / "data" / "tokenizer.json", folder)
    tok = PretrainRunInfo.from_path(folder).load_tokenizer()
    eos = json.loads((tmp_path / "data" / "dataset.json").read_text())["tokenizer"]["eos_token_id"]
    stream = np.fromfile(tmp_path / "data" / "train_000000.bin", "<u2", offset=1024).tolist()
    assert [i for text in rows for i in (*tok.encode(text).ids, eos)] == stream
    assert [e.ids for e in tok.encode_batch(rows)] == [tok.encode(text).ids for text in rows]
    assert tok.decode([eos], skip_special_tokens=False) in ("[EOS]", "<|endoftext|>", "</s>")
    if kind != "WordLevel":
        assert tok.decode(tok.encode("one two").ids) == "one two"


def test_a_tokenizer_with_ids_that_the_model_has_not_is_refused(make_run):
    folder = make_run()
    respell(folder, vocab_size=270)
    PretrainRunInfo.from_path(folder).load_tokenizer()
    respell(folder, vocab_size=269)
    with pytest.raises(prepare_data.UserError, match=r"270 ids.*vocab_size \(269\)"):
        PretrainRunInfo.from_path(folder).load_tokenizer()


def test_a_run_without_any_tokenizer_says_so(make_run):
    folder = make_run()
    (folder / "tokenizer.json").unlink()
    (folder / "final_config.yaml").write_text("train_dataset_config: {name: x}\n")
    info = PretrainRunInfo.from_path(folder)
    assert (info.tokenizer_path, info.hf_tokenizer_path) == (None, None)
    with pytest.raises(prepare_data.UserError, match=r"tokenizer\.json.*hf_tokenizer_path"):
        info.load_tokenizer()


# -----------------------------------------------------------------------------
# the data of an update

BATCH, N_CTX = 3, 17


@pytest.fixture
def run_with_data(make_run, tmp_path, tokenizer):
    """A run whose shards are at hand: 40 windows of 17 tokens over four shards, none of which ends with a window."""
    data = tmp_path / "data"
    data.mkdir()
    tokens = np.random.default_rng(0).integers(0, 270, 40 * N_CTX + 3).astype("<u2")
    for i, part in enumerate(np.split(tokens, [100, 250, 500])):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (data / f"train_{i:06d}.bin").write_bytes(header.tobytes() + part.tobytes())
    folder = make_run()
    section = {"name": "x", "n_ctx": N_CTX, "path": str(data), "seed": 2}
    section["hf_tokenizer_path"] = str(folder / "tokenizer.json")
    config = dict.fromkeys(("warmup_iters", "weight_decay", "val_loss_every", "sample_every"), 0)
    config |= {"dtype": "float32", "learning_rate": 1e-3, "learning_rate_decay_frac": 0.1, "grad_clip": None}
    config |= {"batch_size": BATCH, "num_iterations": 50, "val_max_steps": 1, "intermediate_checkpoints": True}
    config |= {"seed": 5, "model": dataclasses.asdict(make_model("LlamaSimpleMLP").config)}
    config |= {"train_dataset_config": section, "val_dataset_config": section}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    full = train.config_dict(train.load_config(tmp_path / "c.yaml"))
    (folder / "final_config.yaml").write_text(yaml.safe_dump(full))
    return folder, tokens


@pytest.mark.parametrize("update", [1, 2, 14, 50])
def test_what_an_update_saw(run_with_data, update):
    folder, tokens = run_with_data
    seen = data_of_update(PretrainRunInfo.from_path(folder), update)
    position = np.arange((update - 1) * BATCH, update * BATCH)  # update 14 reads the end of one epoch, the next's start
    window = prepare_data.window_order(position, 40, seed=7)
    assert np.array_equal(seen["position"], position)
    assert np.array_equal(seen["window"], window)
    assert np.array_equal(seen["tokens"], [tokens[w * N_CTX : (w + 1) * N_CTX] for w in window])
    starts = np.array([0, 100, 250, 500])
    for w, shard, offset in zip(window, seen["shard"], seen["offset"], strict=True):
        i = int(np.searchsorted(starts, w * N_CTX, side="right")) - 1
        assert (shard, offset) == (f"train_{i:06d}.bin", w * N_CTX - starts[i])


@pytest.mark.parametrize("update", [0, 51, -1])
def test_an_update_that_was_not(run_with_data, update):
    with pytest.raises(prepare_data.UserError, match=rf"{update}.*1 to 50"):
        data_of_update(PretrainRunInfo.from_path(run_with_data[0]), update)


def test_data_that_were_prepared_again(run_with_data, tmp_path):
    folder, _ = run_with_data
    info = PretrainRunInfo.from_path(folder)
    digest = prepare_data.Shards(tmp_path / "data", "train", "").fingerprint()[1]
    for digests, known in (({"data/dataset.json": digest}, True), ({"data/dataset.json": "0" * 64}, False), ({}, True)):
        (folder / "environment.json").write_text(json.dumps({"dataset_sha256": digests}))
        with contextlib.nullcontext() if known else pytest.raises(prepare_data.UserError, match="prepared again since"):
            data_of_update(info, 1)


def test_the_data_of_a_run_without_updates(run_with_data):
    info = PretrainRunInfo.from_path(run_with_data[0])
    info.config_dict["inference_only"] = True
    with pytest.raises(prepare_data.UserError, match="trained on nothing"):
        data_of_update(info, 1)


@pytest.mark.parametrize("key", ["seed", "num_iterations", "batch_size", "train_dataset_config"])
def test_a_run_whose_order_of_data_is_not_recorded(run_with_data, cli, key):
    """SPD's configs have no seed; and a file may hold anything. The run itself is shown."""
    folder, _ = run_with_data
    config = yaml.safe_load((folder / "final_config.yaml").read_text())
    for change in ({}, {key: None}, {key: [5]}, {key: 5} if key == "train_dataset_config" else {key: "x"}):
        rest = {k: v for k, v in config.items() if k != key}
        (folder / "final_config.yaml").write_text(yaml.safe_dump(rest | change))
        with pytest.raises(prepare_data.UserError, match=rf"final_config\.yaml .*\b{key}\b"):
            data_of_update(PretrainRunInfo.from_path(folder), 1)
        assert cli(folder)[1:] == ("", 0)


def test_data_on_the_command_line(run_with_data, cli):
    folder, _ = run_with_data
    out, err, code = cli(folder, "--data", "14")
    assert (code, err) == (0, "")
    info = PretrainRunInfo.from_path(folder)
    tok, seen = info.load_tokenizer(), data_of_update(info, 14)
    for shard, offset, ids in zip(seen["shard"], seen["offset"], seen["tokens"], strict=True):
        assert shard in out
        assert re.search(rf"\b{offset}\b", out)
        assert tok.decode(ids.tolist(), skip_special_tokens=False) in out


def test_output_that_is_not_read_to_its_end(run_with_data):
    """`run_info.py ... | head` is no error of ours."""
    command = [sys.executable, ROOT / "run_info.py", run_with_data[0], "--data", "14"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


# -----------------------------------------------------------------------------
# the command line


@pytest.fixture
def cli(monkeypatch, capsys):
    """A function that runs run_info.py with arguments: (stdout, stderr, exit code)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["run_info.py", *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "run_info.py"), run_name="__main__")
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # the interpreter would print it and exit with 1
            err, code = f"{err}{code}\n", 1
        return out, err, code or 0

    return run


def test_the_command_line_shows_a_run(make_run):
    folder = make_run()
    command = [sys.executable, ROOT / "run_info.py", folder, "--step", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    n_params = sum(p.numel() for p in make_model("LlamaSimpleMLP").parameters())
    for word in ("LlamaSimpleMLP", f"total {n_params:,}", "n_embd 16", "model_step_2.pt", "0, 2, 10", "270"):
        assert word in done.stdout


@pytest.fixture
def trained(make_run):
    """A run with all that train.py leaves behind."""
    folder = make_run()
    config = yaml.safe_load((folder / "final_config.yaml").read_text())
    config |= {"num_iterations": 40, "init_seed": 42, "seed": 5, "train_dataset_config": {"name": "tales", "seed": 3}}
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": s, "train_loss": 5 - s / 10, "lr": 1e-3, "tokens": 48 * s} for s in range(1, 31)]
    lines += [{"step": s, "val_loss": v} for s, v in ((0, 5.5), (10, 4.25), (20, 3.5), (30, 3.75))]
    lines = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda m: m["step"]))
    (folder / "metrics.jsonl").write_text(lines + '{"step": 31, "train_')  # a run that is writing it
    about = {"started": "2026-01-02T03:04:05", "command": ["train.py"], "git_commit": "0123456789abcdef" * 2}
    (folder / "environment.json").write_text(json.dumps(about | {"git_dirty": True, "device": "cpu", "ranks": 2}))
    (folder / "status").write_text("interrupted\n")
    return folder


def test_a_run_on_one_screen(trained, cli):
    out, err, code = cli(trained)
    assert (err, code) == ("", 0)
    lines = out.splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 80 for line in lines if str(trained) not in line)
    for words in (
        ["embedding 4,800", "attention 1,536", "MLP 1,536", "norms 80"],
        ["started", "2026-01-02T03:04:05"],
        ["from", "git_commit 0123456789ab", "git_dirty True"],
        ["device cpu", "ranks 2"],
        ["trained", "updates 30", "of 40", "tokens 1,440"],
        ["seeds", "init_seed 42", "seed 5", "dataset 3"],
        ["train_loss", "first 4.9000 at 1", "best 2.0000 at 30", "last 2.0000 at 30"],
        ["val_loss", "first 5.5000 at 0", "best 3.5000 at 20", "last 3.7500 at 30"],
    ):
        assert any(all(word in line for word in words) for line in lines), words
    for word in ("tales", "interrupted", "0, 2, 10"):
        assert word in out
    plot = [line for line in lines if re.match(r" *\d\.\d{3} \|", line)]
    assert plot[0].startswith("  5.500 |o") and plot[-1].startswith("  2.000 |") and plot[-1].endswith(".")


def test_the_same_for_programs(trained, cli):
    out, err, code = cli(trained, "--json", "--step", "2")
    assert (err, code) == ("", 0)
    found = json.loads(out)
    assert found["parameters"] == {"embedding": 4800, "attention": 1536, "MLP": 1536, "norms": 80, "total": 7952}
    assert found["val_loss"]["best"] == {"step": 20, "loss": 3.5}
    assert found["trained"] == {"updates": 30, "of": 40, "tokens": 1440}
    assert (found["status"], found["dataset"], found["from"]["git_dirty"]) == ("interrupted", "tales", True)
    assert (found["checkpoints"], found["loaded"][-15:]) == ([0, 2, 10], "model_step_2.pt")
    shape = yaml.safe_load((trained / "model_config.yaml").read_text())
    assert {"model_type": found["model"]} | found["shape"] == shape
    two = cli(trained, trained / "checkpoints" / "model_step_0.pt", "--json")[0].splitlines()
    assert [json.loads(line)["loaded"][-15:] for line in two] == ["odel_step_10.pt", "model_step_0.pt"]


def test_old_and_unfinished_runs_are_shown(trained, cli):
    """Without metrics, and then without any checkpoint."""
    for name in ("metrics.jsonl", "environment.json", "status"):
        (trained / name).unlink()
    out, err, code = cli(trained)
    assert (err, code) == ("", 0)
    assert "updates 10, of 40" in out and "|" not in out
    shutil.rmtree(trained / "checkpoints")
    out, err, code = cli(trained)
    assert (err, code) == ("", 0)
    assert "none yet" in out and "total 7,952" in out
    assert json.loads(cli(trained, "--json")[0])["loaded"] is None
    out, err, code = cli(trained, "--sample", "one")
    assert code == 1 and re.fullmatch(r"run_info: .*not saved any.*\n", err)


@pytest.mark.parametrize("named", [None, "nowhere.json"])
def test_a_run_is_shown_without_its_tokenizer(trained, cli, named):
    (trained / "tokenizer.json").unlink()
    (trained / "final_config.yaml").write_text(yaml.safe_dump({"train_dataset_config": {"hf_tokenizer_path": named}}))
    out, err, code = cli(trained)
    assert (err, code) == ("", 0)
    assert re.search(r"^tokenizer +tokens unknown" + (", from nowhere.json$" if named else "$"), out, re.MULTILINE)
    assert "total 7,952" in out and "val_loss" in out
    assert json.loads(cli(trained, "--json")[0])["tokenizer"] == {"tokens": None, "from": named}


def test_a_diverged_run_is_shown(trained, cli, tmp_path):
    """JSON has no NaN: programs get null. Nor does any other line of a file stop what can be shown."""
    lines = '[5]\n5\n{"val_loss": 1.0}\n{"step": "x", "val_loss": 1.0}\n{"step": 1, "val_loss": null}\n'
    lines += '{"step": 1, "val_loss": 4.0}\n{"step": 2, "val_loss": Infinity}\n{"step": 3, "val_loss": NaN}\n'
    (trained / "environment.json").write_text("[]")
    (trained / "metrics.jsonl").write_text(lines)
    out, err, code = cli(trained)
    assert (err, code) == ("", 0)
    assert re.search(r"^val_loss +first 4.0000 at 1, best 4.0000 at 1, last nan at 3$", out, re.MULTILINE)
    assert out.count("o\n") == 0 and sum("|" in line and "o" in line for line in out.splitlines()) == 1
    found = json.loads(cli(trained, "--json")[0], parse_constant=pytest.fail)
    assert found["val_loss"] == {"first": {"loss": 4.0, "step": 1}, "best": {"loss": 4.0, "step": 1}} | {
        "last": {"loss": None, "step": 3}
    }
    if importlib.util.find_spec("matplotlib"):
        assert cli(trained, "--plot", tmp_path / "x.png")[1:] == ("", 0)
    (trained / "metrics.jsonl").write_text('{"step": 3, "val_loss": NaN}\n')
    out, err, code = cli(trained)
    assert (err, code) == ("", 0) and "best nan at 3" in out and "|" not in out


def test_samples(trained, cli):
    ask = "--sample", "one two", "--n", "3", "--temperature", "0"
    out, err, code = cli(trained, *ask)
    assert (err, code) == ("", 0)
    info = PretrainRunInfo.from_path(trained)
    tok, model = info.load_tokenizer(), info.load_model()
    ids = model.generate(torch.tensor(tok.encode("one two").ids), 128, temperature=0, eos_token_id=0)
    text = tok.decode(ids.tolist())
    assert text.startswith("one two") and out == "".join(f"--- sample {i}\n{text}\n" for i in (1, 2, 3))
    torch.manual_seed(0)
    drawn = cli(trained, "--sample", "", "--n", "2", "--temperature", "0.5", "--top-k", "40", "--step", "2", "--json")
    torch.manual_seed(0)
    ends = torch.tensor([[0], [0]])  # an empty prompt is the end of a document
    ids = make_model("LlamaSimpleMLP", 2).generate(ends, 128, temperature=0.5, top_k=40, eos_token_id=0)
    assert json.loads(drawn[0])["samples"] == tok.decode_batch(ids.tolist())


def test_losses_of_several_runs_in_one_picture(trained, make_run, tmp_path, cli):
    pytest.importorskip("matplotlib")
    other = make_run(folder="other")
    assert cli(trained, other, "--plot", tmp_path / "x.png")[1:] == (
        f"run_info: {other} has no metrics.jsonl with losses to draw\n",
        1,
    )
    (other / "metrics.jsonl").write_text('{"step": 1, "train_loss": 9.0}\n{"step": 2, "train_loss": 8.0}\n')
    pictures = []
    for runs in ([trained], [trained, other]):
        out, err, code = cli(*runs, "--plot", tmp_path / "x.png")
        assert (out, err, code) == (f"wrote {tmp_path / 'x.png'}\n", "", 0)
        pictures.append((tmp_path / "x.png").read_bytes())
    assert pictures[0][:8] == pictures[1][:8] == b"\x89PNG\r\n\x1a\n"
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "tkagg"])
def test_a_picture_needs_no_window(trained, tmp_path, backend):
    """Notebooks name their backend to the processes they start, where it need not be installed."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "run_info.py", trained, "--plot", tmp_path / "x.png"]
    env = environment({"MPLBACKEND": backend})
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "x.png").exists()


def test_what_a_flat_or_short_curve_looks_like():
    for points in ({"val_loss": [(0, 2.0)]}, {"train_loss": [(1, 2.0)]}, {"train_loss": [(1, 2.0), (1000, 2.0)]}):
        lines = text_plot(points, width=40, height=5)
        assert sum(line.count("o") + line.count(".") - (" |" in line) for line in lines) in (1, 40)
        assert all(len(line) <= 50 for line in lines)


@pytest.mark.parametrize(
    "steps, text",
    [
        ([], ""),
        ([7], "7"),
        ([0, 1, 2, 4, 8], "0, 1, 2, 4, 8"),
        ([0, 1, 2, 4, 8, 16], "0, 1, 2, 4, ..., 16"),
        (
            [0, 1, 2, 4, 8, 16, 32, *range(1000, 8001, 1000), 8100],
            "0, 1, 2, 4, ..., 32, 1000, 2000, 3000, ..., 8000, 8100",
        ),
    ],
)
def test_many_steps_in_few_words(steps, text):
    assert short(steps) == text


def test_what_run_info_imports():
    heavy = "wandb", "datasets", "transformers", "torch", "matplotlib", "tokenizers"
    code = f"import run_info, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


SPOILED = {
    "no such path": lambda f: shutil.rmtree(f),
    "no model_config": lambda f: (f / "model_config.yaml").unlink(),
    "model_config is no mapping": lambda f: (f / "model_config.yaml").write_text("- 1\n"),
    "model_config is no YAML": lambda f: (f / "model_config.yaml").write_text("a: [1\n"),
    "model_config without model_type": lambda f: (f / "model_config.yaml").write_text("n_embd: 16\n"),
    "model_config whose model_type is a list": lambda f: respell(f, model_type=[1]),
    "model_config of another shape": lambda f: respell(f, n_embd=32, rotary_dim=16),
    "model_config of an impossible shape": lambda f: respell(f, n_head=3),
    "model_config with an unknown key": lambda f: respell(f, n_layr=2),
    "checkpoint cut short": lambda f: os.truncate(f / "checkpoints" / "model_step_10.pt", 1000),
    "checkpoint empty": lambda f: os.truncate(f / "checkpoints" / "model_step_10.pt", 0),
    "checkpoint with code": lambda f: torch.save({"x": Evil(f / "ran")}, f / "checkpoints" / "model_step_10.pt"),
    "checkpoint of another kind": lambda f: torch.save([1], f / "checkpoints" / "model_step_10.pt"),
    "tokenizer cut short": lambda f: os.truncate(f / "tokenizer.json", 100),
}


def respell(folder, **changes):
    path = folder / "model_config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_wrong_is_one_line(make_run, cli, what):
    folder = make_run()
    SPOILED[what](folder)
    out, err, code = cli(folder)
    assert (out, code) == ("", 1)
    assert re.fullmatch(r"run_info: .+\n", err)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "args",
    [["--step", "7"], ["--data", "1"], ["--plot", "x.png"], ["--export-hf", "x"], ["--sample", "one", "--top-k", "0"]],
)
def test_what_was_not_done_is_one_line(make_run, cli, args):
    out, err, code = cli(make_run(), *args)  # a config without the keys of a dataset, as an old run may have
    assert (out, code) == ("", 1)
    assert re.fullmatch(r"run_info: .+\n", err)


@pytest.mark.parametrize(
    "args",
    [
        ["--plot", "p.png", "--export-hf", "hf0"],
        ["--plot", "p.png", "--data", "1"],
        ["--export-hf", "hf0", "--data", "0"],
        ["--sample", "", "--data", "1"],
        ["--data", "1", "--json"],
        ["--plot", "p.png", "--json"],
        ["--export-hf", "hf0", "--json"],
        ["--n", "2"],
        ["--temperature", "0", "--json"],
        ["--top-k", "3", "--data", "1"],
        ["--plot", "p.png", "--step", "2"],
        ["--data", "1", "--step", "2"],
    ],
)
def test_an_option_without_effect_is_refused(make_run, cli, monkeypatch, args):
    folder = make_run()
    monkeypatch.chdir(folder)
    out, err, code = cli(folder, *args)
    assert (out, code) == ("", 2) and re.search(rf"error: .*({args[-2]}|{args[-1]}|{args[0]})\b", err)
    assert not (folder / "p.png").exists() and not (folder / "hf0").exists()


def test_a_file_that_is_no_checkpoint_is_one_line(make_run, cli):
    out, err, code = cli(make_run() / "final_config.yaml")
    assert (out, code) == ("", 1)
    assert re.fullmatch(r"run_info: .+\n", err)
