"""run_info.py: finding a run on disk, loading its weights, tokenizer and data, showing it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import NASTY, ROOT, bpe_json, read_bin, reference, run, tree, wordpiece_json, write_files

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
        config |= {"train_dataset_config": section, "val_dataset_config": section | {"split": "test", "seed": 3}}
        lines = [{"step": s, "train_loss": 5 - s / 10, "lr": 1e-3, "tokens": 48 * s} for s in range(1, 31)]
        lines += [{"step": s, "val_loss": v} for s, v in ((0, 5.5), (10, 4.25), (20, 3.5), (30, 3.75))]
        files = {"model_config.yaml": {k: v for k, v in shape.items() if k not in drop}, "final_config.yaml": config}
        files |= {"tokenizer.json": BPE, "tokenizer_config.json": tokenizer_config("<|endoftext|>")}
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
        try:
            code = run_info.main() or 0
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return (out, f"{err}{code}\n", 1) if isinstance(code, str) else (out, err, code)

    return call


@pytest.mark.parametrize("layout", ["checkpoints", "."])  # ours, and W&B's
@pytest.mark.parametrize("path, step, found", [("", None, 10), ("", 0, 0), ("", 2, 2), ("model_step_2.pt", None, 2)])
def test_from_path(make_run, layout, path, step, found):
    folder = make_run(checkpoints=layout)
    for junk in ("model_step_x.pt", ".model_step_11.pt.part", "optim_step_12.pt", "model_step_13.pt.bak"):
        (folder / layout / junk).touch()
    info = PretrainRunInfo.from_path(str(folder / layout / path if path else folder), step=step)
    configs = [yaml.safe_load((folder / f"{kind}_config.yaml").read_text()) for kind in ("final", "model")]
    tokenizers = folder / "tokenizer.json", str(folder.parent / "elsewhere.json")
    assert info == PretrainRunInfo(folder, folder / layout / f"model_step_{found}.pt", *configs, *tokenizers)
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


@five
def test_every_model_loads_in_every_way(make_run, name):
    folder, cls = make_run(name), MODEL_CLASSES[name]
    assert_holds(PretrainRunInfo.from_path(folder / "checkpoints" / "model_step_2.pt").load_model(), name, 2)
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
    folder, ids = make_run(), torch.arange(N_CTX)
    loss = make_model("LlamaSimpleMLP", 10)(ids[None, :-1], ids[None, 1:])[1].item()
    for step, off in ((10, 0), (2, 0.1), (10, 0.1)):
        check = {"step": step, "val_loss": 3.0, "ids": ids.tolist(), "loss": loss + off}
        (folder / "check.json").write_text(json.dumps(check))
        _, err, code = cli(folder)
        assert (code == 1) is ("trained" in err) is (step == 10 and off > 0)


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
    write_files(folder, {"tokenizer.json": spelled(), "tokenizer_config.json": tokenizer_config(end)})
    info = PretrainRunInfo.from_path(folder)
    assert [info.load_tokenizer().encode(text).ids for text in NASTY] == [encode(text) for text in NASTY]
    assert info.eos_token_id == eos
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": info.load_tokenizer().id_to_token(9)}))
    assert info.eos_token_id == 9


@pytest.fixture
def run_with_data(make_run, tmp_path):
    """(A run whose shards are at hand, their tokens): 40 windows over four shards, none of which ends with one."""
    tokens = np.random.default_rng(0).integers(0, 600, 40 * N_CTX + 3).astype("<u2")
    for i, part in enumerate(np.split(tokens, [100, 250, 500])):
        header = np.array([20240520, 1, len(part), *[0] * 253], "<i4")
        write_files(tmp_path / "data", {f"train_{i:06d}.bin": header.tobytes() + part.tobytes()})
    return make_run(), tokens


@pytest.mark.parametrize("update", [1, 2, 14, UPDATES])
def test_what_an_update_saw(run_with_data, cli, update):
    folder, tokens = run_with_data
    seen = data_of_update(PretrainRunInfo.from_path(folder), update)
    position = np.arange((update - 1) * BATCH, update * BATCH)  # update 14 reads the end of one epoch, the next's start
    window = window_order(position, 40, seed=5 + 2)
    assert np.array_equal(seen["position"], position) and np.array_equal(seen["window"], window)
    assert np.array_equal(seen["tokens"], [tokens[w * N_CTX : (w + 1) * N_CTX] for w in window])
    for shard, offset, window_tokens in zip(seen["shard"], seen["offset"], seen["tokens"], strict=True):
        assert read_bin(folder.parent / "data" / shard)[1][offset] == window_tokens[0]
    tok, out = PretrainRunInfo.from_path(folder).load_tokenizer(), cli(folder, "--data", update)[0]
    assert all(tok.decode(ids.tolist(), skip_special_tokens=False) in out for ids in seen["tokens"])


def test_a_run_on_one_screen_and_for_programs(make_run, cli):
    folder = make_run()
    cli(folder, make_run(folder="other"), "--plot", folder / "loss.png")
    total = sum(p.numel() for p in make_model("LlamaSimpleMLP").parameters())
    said = yaml.safe_load(cli(folder, "--step", "2")[0])
    assert (said["model"], said["parameters"], said["status"]) == ("LlamaSimpleMLP", total, "interrupted")
    assert Path(said["loaded"]).name == "model_step_2.pt" and said["picture"] == str(folder / "loss.png")
    losses = {"first": {"loss": 5.5, "step": 0}, "best": {"loss": 3.5, "step": 20}, "last": {"loss": 3.75, "step": 30}}
    assert said["val_loss"] == losses and said["train_loss"]["last"] == {"loss": 2.0, "step": 30}
    found = json.loads(cli(folder, "--json")[0])
    assert found["parameters"] == total and found["val_loss"] == losses
    assert (found["checkpoints"], Path(found["loaded"]).name) == ([0, 2, 10], "model_step_10.pt")
    respell(folder / "final_config.yaml", val_dataset_config={"split": "test"})  # param-decomp wants more keys equal
    assert "takes" in found["param_decomp"] != json.loads(cli(folder, "--json")[0])["param_decomp"]
    for name in ("environment.json", "status", "tokenizer.json", "final_config.yaml", "loss.png", "metrics.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints")
    assert yaml.safe_load(cli(folder)[0])["checkpoints"] == []


def test_samples(make_run, cli):
    folder = make_run()
    info = PretrainRunInfo.from_path(folder)
    tok, eos = info.load_tokenizer(), info.eos_token_id
    for prompt in ("one two <|endoftext|>", ""):  # text, even where it looks like the end of a document
        ids = torch.tensor(tok.encode(prompt).ids or [eos])
        ids = info.load_model().generate(ids, run_info.SAMPLE_TOKENS, temperature=0, eos_token_id=eos)
        text = tok.decode([i for i in ids.tolist() if i != eos])
        done = cli(folder, "--sample", prompt, "--n", "2", "--temperature", "0")
        assert done == (f"--- sample 1\n{text}\n--- sample 2\n{text}\n", "", 0) and text.startswith(prompt)


def test_consoles(run_with_data):
    folder, _ = run_with_data
    for args in (["--data", "14"], ["--sample", "déjà 🙂"], ["--plot", folder / "déjà.png"]):
        done = run("run_info.py", folder, *args, env={"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://nonsense"})
        assert (done.returncode, done.stderr) == (0, "") and "\\" in done.stdout
    assert (folder / "déjà.png").read_bytes()[:4] == b"\x89PNG"


LAST, SHARD = "checkpoints/model_step_10.pt", "../data/train_000000.bin"
MISTAKES = {  # what happens to which file, arguments, a word of the sentence
    "no model_config": ("model_config.yaml", Path.unlink, [], "model_config.yaml"),
    "cut short": (LAST, lambda p: os.truncate(p, 1000), [], "model_step_10.pt"),
    "no checkpoints": ("checkpoints", shutil.rmtree, ["--sample", ""], "model_step_N"),
    "norms taken out": ("final_config.yaml", lambda p: respell(p, enable_ln_ablation=True), ["--sample", ""], "norms"),
    "nothing to draw": ("metrics.jsonl", Path.unlink, ["--plot", "x.png"], "metrics.jsonl"),
    "SPD's runs have no seed": ("final_config.yaml", lambda p: respell(p, seed=None), ["--data", "1"], "seed"),
    "never trained": ("final_config.yaml", lambda p: respell(p, inference_only=True), ["--data", "1"], "inference"),
    "prepared again": (SHARD, Path.unlink, ["--data", "1"], "prepared again"),
    "no shards": ("../data", shutil.rmtree, ["--data", "1"], "prepare_data.py"),
    "no such update": (".", str, ["--data", "51"], "1 to 50"),
    "no such path": (".", shutil.rmtree, [], "no run at"),
    "no such step": (".", str, ["--step", "7"], "0, 2, 10"),
    "n without sample": (".", str, ["--n", "2"], "--sample"),
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
