"""run_info.py: finding a run on disk, loading its weights, tokenizer and data, showing it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import NASTY, ROOT, bpe_json, environment, reference, run, tree, wordpiece_json, write_files

import run_info
from models import MODEL_CLASSES
from prepare_data import Shards, UserError, tokenizer_config, window_order
from run_info import PretrainRunInfo, data_of_update

STEPS = 0, 2, 10  # in an order that is not the alphabet's
SHAPE = {"block_size": 16, "vocab_size": 610, "n_layer": 2, "n_head": 2, "n_embd": 16}
LLAMA = {"n_ctx": 16, "n_intermediate": 24, "n_key_value_heads": 1, "rotary_dim": 8}
BATCH, N_CTX, UPDATES = 3, 17, 50
BPE = bpe_json()
five = pytest.mark.parametrize("name", MODEL_CLASSES)
pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(name, seed=0):
    shape = SHAPE if name.startswith("GPT2") else SHAPE | LLAMA
    return MODEL_CLASSES[name](MODEL_CLASSES[name].config_class(**shape), init_seed=seed).eval()


@pytest.fixture
def make_run(tmp_path):
    """A function that lays out a run: a model of its own at each step, and all that train.py leaves beside it."""

    def make(name="LlamaSimpleMLP", folder="run", checkpoints="checkpoints", change=dict, drop=()):
        folder = tmp_path / folder
        (folder / checkpoints).mkdir(parents=True)
        shape = dataclasses.asdict(make_model(name).config)
        section = {"name": "tales", "n_ctx": N_CTX, "path": str(tmp_path / "data"), "seed": 2}
        section["hf_tokenizer_path"] = str(tmp_path / "elsewhere.json")
        config = {"seed": 5, "init_seed": 42, "num_iterations": UPDATES, "batch_size": BATCH, "model": shape}
        config |= {"train_dataset_config": section, "val_dataset_config": section}
        lines = [{"step": s, "train_loss": 5 - s / 10, "lr": 1e-3, "tokens": 48 * s} for s in range(1, 31)]
        lines += [{"step": s, "val_loss": v} for s, v in ((0, 5.5), (10, 4.25), (20, 3.5), (30, 3.75))]
        files = {"model_config.yaml": {k: v for k, v in shape.items() if k not in drop}, "final_config.yaml": config}
        files |= {"tokenizer.json": BPE, "tokenizer_config.json": tokenizer_config("<|endoftext|>", False)}
        files |= {"environment.json": '[{"started": "2026-01-02"}, {"device": "cpu"}]', "status": "interrupted\n"}
        files["metrics.jsonl"] = "\n".join(map(json.dumps, lines)) + '\n{"step": 31, "train_'  # it is being written
        write_files(folder, {file: content for file, content in files.items() if file not in drop})
        for step in STEPS:
            state = change(make_model(name, seed=step).state_dict())
            torch.save(state, folder / checkpoints / f"model_step_{step}.pt")
        return folder

    return make


def assert_holds(model, name, step):
    """The model is the one of that step: in its weights and in what it computes."""
    expected, idx = make_model(name, seed=step), torch.arange(12).reshape(2, 6)
    assert type(model) is type(expected) and model.config == expected.config and not model.training
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert torch.equal(model(idx)[0], expected(idx)[0])


def respell(path, **changes):
    """Change keys of a YAML file."""
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


@pytest.fixture
def cli(monkeypatch, capsys):
    """A function that runs run_info.py with arguments, in this process: (stdout, stderr, exit code)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["run_info.py", *map(str, args)])
        code = None
        try:
            run_info.main()
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return (out, f"{err}{code}\n", 1) if isinstance(code, str) else (out, err, code or 0)

    return call


@pytest.mark.parametrize("layout", ["checkpoints", "."])  # ours, and W&B's
@pytest.mark.parametrize("path, step, found", [("", None, 10), ("", 0, 0), ("", 2, 2), ("model_step_2.pt", None, 2)])
def test_from_path(make_run, layout, path, step, found):
    folder = make_run(checkpoints=layout)
    for junk in ("model_step_x.pt", ".model_step_11.pt.part", "optim_step_12.pt", "model_step_13.pt.bak"):
        (folder / layout / junk).touch()
    (folder / layout / "model_step_99.pt").mkdir()
    info = PretrainRunInfo.from_path(str(folder / layout / path if path else folder), step=step)
    assert (info.folder, info.checkpoint_path) == (folder, folder / layout / f"model_step_{found}.pt")
    assert info.config_dict == yaml.safe_load((folder / "final_config.yaml").read_text())
    assert info.model_config_dict == yaml.safe_load((folder / "model_config.yaml").read_text())
    assert info.tokenizer_path == folder / "tokenizer.json"
    assert info.hf_tokenizer_path == str(folder.parent / "elsewhere.json")
    assert [*info.checkpoints.items()] == [(s, folder / layout / f"model_step_{s}.pt") for s in STEPS]
    assert_holds(info.load_model(), "LlamaSimpleMLP", found)


def test_paths_as_people_write_them(make_run, tmp_path, monkeypatch):
    """Relative, with ~, a run that is called checkpoints; and where runs are looked for."""
    folder = make_run(folder="checkpoints")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder / "checkpoints")
    for path in ("model_step_10.pt", "~/checkpoints", folder, folder / "checkpoints"):
        info = PretrainRunInfo.from_path(path)
        assert (info.folder, info.checkpoint_path) == (folder, folder / "checkpoints" / "model_step_10.pt")
    for spd, successor, found in (("", "", "out"), ("", "~/b", tmp_path / "b"), ("a", "b", "a")):
        monkeypatch.setenv("SPD_OUT_DIR", spd)
        monkeypatch.setenv("PARAM_DECOMP_OUT_DIR", successor)
        assert run_info.out_dir() == Path.cwd() / found
    assert issubclass(run_info.RunNotFound, FileNotFoundError) and issubclass(run_info.RunNotFound, UserError)


# -----------------------------------------------------------------------------
# loading


@five
def test_every_model_loads_in_every_way(make_run, name):
    folder, cls = make_run(name), MODEL_CLASSES[name]
    info = PretrainRunInfo.from_path(folder / "checkpoints" / "model_step_2.pt")
    assert_holds(info.load_model(), name, 2)
    assert_holds(cls.from_run_info(info), name, 2)
    assert_holds(cls.from_pretrained(folder), name, 10)
    assert_holds(cls.from_pretrained(str(folder / "checkpoints" / "model_step_0.pt")), name, 0)


@five
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_old_runs_load(make_run, name, prefix):
    """SPD's: wrappers' prefixes; saved masks and RoPE tables, which are not used; no model_type."""

    def change(state):
        blocks = {key.partition(".attn.")[0] for key in state if ".attn." in key}
        buffers = [f"{b}.attn.{name}" for b in blocks for name in ("bias", "rotary_sin", "rotary_cos")]
        return {prefix + key: x for key, x in (state | dict.fromkeys(buffers, torch.zeros(16, 8))).items()}

    info = PretrainRunInfo.from_path(make_run(name, change=change, drop=["model_type"]))
    assert_holds(info.load_model(MODEL_CLASSES[name]), name, 10)
    with pytest.raises(UserError, match="model_type"):
        info.load_model()


def test_a_model_that_is_not_the_one_trained_is_refused(make_run, cli):
    """check.json holds a window and the last weights' loss on it; other steps are not compared."""
    folder, ids = make_run(), torch.arange(N_CTX)[None]
    loss = make_model("LlamaSimpleMLP", 10)(ids[:, :-1], ids[:, 1:])[1].item()
    for off in (0, 0.1):
        check = {"step": 10, "val_loss": 3.0, "ids": ids[0].tolist(), "loss": loss + off}
        (folder / "check.json").write_text(json.dumps(check))
        assert_holds(PretrainRunInfo.from_path(folder, 2).load_model(), "LlamaSimpleMLP", 2)
        _, err, code = cli(folder)
        assert (code == 1) is ("trained" in err) is bool(off)


def test_a_run_of_param_decomps(make_run, tmp_path):
    """One section, data, and no tokenizer.json. Its cache entries are in test_convert.py."""
    folder = make_run(drop=["tokenizer.json", "tokenizer_config.json"])
    data = {"dataset_name": "tales", "tokenizer_name": str(tmp_path / "elsewhere.json"), "column_name": "story"}
    data |= {"max_seq_len": 17, "train_split": "train", "eval_split": "test", "is_tokenized": False, "streaming": True}
    write_files(tmp_path, {"elsewhere.json": BPE, "run/final_config.yaml": {"seed": 45, "data": data}})
    info, (encode, eos) = PretrainRunInfo.from_path(folder), reference(BPE)
    assert info.hf_tokenizer_path == data["tokenizer_name"] and info.tokenizer_path is None
    assert (info.load_tokenizer().encode("one two").ids, info.eos_token_id) == (encode("one two"), eos)
    assert_holds(info.load_model(), "LlamaSimpleMLP", 10)


@pytest.mark.parametrize("spelled, end", [(bpe_json, "<|endoftext|>"), (wordpiece_json, "[EOS]")])
def test_text_gets_the_ids_of_training(make_run, spelled, end):
    """And the EOS is the one recorded with the run: a tokenizer may have several tokens that could end a document."""
    folder, (encode, eos) = make_run(), reference(spelled())
    write_files(folder, {"tokenizer.json": spelled(), "tokenizer_config.json": tokenizer_config(end, False)})
    info = PretrainRunInfo.from_path(folder)
    assert [info.load_tokenizer().encode(text).ids for text in NASTY] == [encode(text) for text in NASTY]
    assert info.eos_token_id == eos
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": info.load_tokenizer().id_to_token(9)}))
    assert info.eos_token_id == 9
    respell(folder / "model_config.yaml", vocab_size=20)
    with pytest.raises(UserError, match="vocab_size"):
        PretrainRunInfo.from_path(folder).load_tokenizer()


@pytest.fixture
def run_with_data(make_run, tmp_path):
    """(A run whose shards are at hand, their tokens): 40 windows over four shards, none of which ends with one."""
    data = tmp_path / "data"
    data.mkdir()
    tokens = np.random.default_rng(0).integers(0, 600, 40 * N_CTX + 3).astype("<u2")
    for i, part in enumerate(np.split(tokens, [100, 250, 500])):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(part)
        (data / f"train_{i:06d}.bin").write_bytes(header.tobytes() + part.tobytes())
    return make_run(), tokens


@pytest.mark.parametrize("update", [1, 2, 14, UPDATES])
def test_what_an_update_saw(run_with_data, cli, update):
    folder, tokens = run_with_data
    seen = data_of_update(PretrainRunInfo.from_path(folder), update)
    position = np.arange((update - 1) * BATCH, update * BATCH)  # update 14 reads the end of one epoch, the next's start
    window = window_order(position, 40, seed=5 + 2)
    assert np.array_equal(seen["position"], position) and np.array_equal(seen["window"], window)
    assert np.array_equal(seen["tokens"], [tokens[w * N_CTX : (w + 1) * N_CTX] for w in window])
    starts = np.array([0, 100, 250, 500])
    shards = np.searchsorted(starts, window * N_CTX, side="right") - 1
    assert seen["shard"].tolist() == [f"train_{i:06d}.bin" for i in shards]
    assert np.array_equal(seen["offset"], window * N_CTX - starts[shards])

    out, err, code = cli(folder, "--data", update)
    assert (err, code) == ("", 0)
    tok = PretrainRunInfo.from_path(folder).load_tokenizer()
    assert all(tok.decode(ids.tolist(), skip_special_tokens=False) in out for ids in seen["tokens"])


# -----------------------------------------------------------------------------
# the command line


def test_a_run_on_one_screen_and_for_programs(make_run, cli):
    folder = make_run()
    assert cli(folder, make_run(folder="other"), "--plot", folder / "loss.png")[1:] == ("", 0)
    out, err, code = cli(folder, "--step", "2")
    assert (err, code) == ("", 0)
    total = sum(p.numel() for p in make_model("LlamaSimpleMLP").parameters())
    screen = ["model +LlamaSimpleMLP", rf"parameters +{total:,}", "loss.png", "status +interrupted", "model_step_2.pt"]
    screen += [r"train_loss .*4\.9000 at 1\b.*2\.0000 at 30", r"val_loss .*5\.5000 at 0\b.*3\.5000 at 20\b.*3\.75"]
    assert [line for line in screen if not re.search(line, out)] == []
    found = json.loads(cli(folder, "--json")[0])
    assert found["parameters"] == total > found["in_blocks"] > 0
    assert found["val_loss"]["best"] == {"step": 20, "loss": 3.5}
    assert (found["checkpoints"], Path(found["loaded"]).name) == ([0, 2, 10], "model_step_10.pt")
    # a run that diverged, without all that may be missing
    lines = '[5]\n{"val_loss": 1.0}\n{"step": "x", "val_loss": 1.0}\n{"step": 1, "val_loss": 4.0}\n'
    (folder / "metrics.jsonl").write_text(lines + '{"step": 3, "val_loss": NaN}\n')
    for name in ("environment.json", "status", "tokenizer.json", "final_config.yaml", "loss.png"):
        (folder / name).unlink()
    found = json.loads(cli(folder, "--json")[0], parse_constant=pytest.fail)
    assert found["val_loss"]["best"]["loss"] == 4.0 and found["val_loss"]["last"]["loss"] is None
    shutil.rmtree(folder / "checkpoints")
    out, err, code = cli(folder)
    assert (err, code) == ("", 0) and "none yet" in out and "last nan at 3" in out


def test_samples(make_run, cli):
    folder = make_run()
    info = PretrainRunInfo.from_path(folder)
    tok, eos = info.load_tokenizer(), info.eos_token_id
    for prompt in ("one two <|endoftext|>", ""):  # text, even where it looks like the end of a document
        idx = torch.tensor(tok.encode(prompt).ids or [eos])
        ids = info.load_model().generate(idx, run_info.SAMPLE_TOKENS, temperature=0, eos_token_id=eos)
        text = tok.decode([i for i in ids.tolist() if i != eos])
        out, err, code = cli(folder, "--sample", prompt, "--n", "2", "--temperature", "0")
        assert (out, err, code) == (f"--- sample 1\n{text}\n--- sample 2\n{text}\n", "", 0)
        assert text.startswith(prompt)


def test_consoles(run_with_data):
    """One that knows ASCII alone, a notebook's (its backend for plots is not installed), and `| head`."""
    folder, _ = run_with_data
    for args in (["--data", "14"], ["--sample", "déjà 🙂"], ["--plot", folder / "déjà.png"]):
        done = run("run_info.py", folder, *args, env={"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://nonsense"})
        assert (done.returncode, done.stderr) == (0, "") and "\\" in done.stdout
    assert (folder / "déjà.png").read_bytes()[:4] == b"\x89PNG"
    command = [sys.executable, ROOT / "run_info.py", folder, "--data", "14"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


LAST, SHARD = "checkpoints/model_step_10.pt", "../data/train_000000.bin"
MISTAKES = {  # what happens to which file, arguments, a word of the sentence
    "no model_config": ("model_config.yaml", Path.unlink, [], "model_config.yaml"),
    "no model_type": ("model_config.yaml", lambda p: p.write_text("n_embd: 16\n"), [], "model_type"),
    "an impossible shape": ("model_config.yaml", lambda p: respell(p, n_head=3), [], "n_head"),
    "an unknown key": ("model_config.yaml", lambda p: respell(p, n_layr=2), [], "n_layr"),
    "cut short": (LAST, lambda p: os.truncate(p, 1000), [], "model_step_10.pt"),
    "a pickle of what is no tensor": (LAST, lambda p: torch.save({"x": Path("x")}, p), [], "model_step_10.pt"),
    "other weights": (LAST, lambda p: torch.save({"h.7.x": torch.zeros(1)}, p), [], "wte.weight"),
    "no checkpoints": ("checkpoints", shutil.rmtree, ["--sample", ""], "model_step_N"),
    "norms taken out": ("final_config.yaml", lambda p: respell(p, enable_ln_ablation=True), ["--sample", ""], "norms"),
    "tokenizer cut short": ("tokenizer.json", lambda p: os.truncate(p, 100), ["--sample", "x"], "tokenizer.json"),
    "nothing to draw": ("metrics.jsonl", Path.unlink, ["--plot", "x.png"], "metrics.jsonl"),
    "SPD's runs have no seed": ("final_config.yaml", lambda p: respell(p, seed=None), ["--data", "1"], "seed"),
    "never trained": ("final_config.yaml", lambda p: respell(p, inference_only=True), ["--data", "1"], "inference"),
    "no section": ("final_config.yaml", lambda p: respell(p, train_dataset_config=1), ["--data", "1"], "section"),
    "prepared again": (SHARD, Path.unlink, ["--data", "1"], "prepared again"),
    "no shards": ("../data", shutil.rmtree, ["--data", "1"], "prepare_data.py"),
    "no such update": (".", str, ["--data", "51"], "1 to 50"),
    "no such path": (".", shutil.rmtree, [], "no run at"),
    "no such step": (".", str, ["--step", "7"], "0, 2, 10"),
    "top_k 0": (".", str, ["--sample", "one", "--top-k", "0"], "top_k"),
    "n without sample": (".", str, ["--n", "2"], "--sample"),
    "step of a picture": (".", str, ["--plot", "x.png", "--step", "2"], "--step"),
    "two things at once": (".", str, ["--data", "1", "--json"], "--json"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_sentence(run_with_data, monkeypatch, cli, what):
    (folder, _), (file, spoil, args, says) = run_with_data, MISTAKES[what]
    _, sha256 = Shards(folder.parent / "data", "train", "").fingerprint()
    starts = [{"dataset_sha256": {"data": "1" * 64}}, {"dataset_sha256": {"data": sha256}}]  # the last start counts
    (folder / "environment.json").write_text(json.dumps(starts))
    spoil(folder / file)
    monkeypatch.chdir(folder.parent)
    before = tree(folder.parent)
    out, err, code = cli(folder, *args)
    assert out == "" and says in err and "Traceback" not in err
    assert code == 2 or (code == 1 and err.count("\n") == 1)
    assert tree(folder.parent) == before


def test_what_run_info_imports():
    heavy = "wandb", "datasets", "transformers", "torch", "matplotlib", "tokenizers", "convert", "models"
    code = f"import run_info, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
