"""train.py as its users meet it: what a run computes and leaves behind, interruptions, mistakes, forks."""

import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from helpers import ROOT, run, tree
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wandb_server import Server

import prepare_data
import train
from models import MODEL_CLASSES

N, B, T = 24, 4, 32  # updates, sequences in a batch, tokens in a sequence
KEPT = [0, 1, 2, 4, 8, 16, 24]  # checkpoints of a run of N updates
MODEL = {"model_type": "LlamaSimpleMLP", "block_size": T, "n_ctx": T, "vocab_size": 300, "n_layer": 1, "n_head": 2}
MODEL |= {"n_embd": 16, "n_intermediate": 32, "n_key_value_heads": 1, "rotary_dim": 8}
BASE = {"model": MODEL, "dtype": "float32", "batch_size": B, "num_iterations": N, "warmup_iters": 5, "grad_clip": 1.0}
BASE |= {"learning_rate": 3e-3, "learning_rate_decay_frac": 0.1, "weight_decay": 0.1, "val_loss_every": 7}
BASE |= {"val_max_steps": 2, "sample_every": 12, "train_log_every": 5, "resume_every": 3, "compile": False}
BASE |= {"intermediate_checkpoints": True, "device": "cpu"}
SECTIONS = "train_dataset_config", "val_dataset_config"


# -----------------------------------------------------------------------------
# the laboratory: one corpus, and train.py run on it as a program


def in_child(scripts, argv, cwd, env, output, trap):
    """`python train.py ARGV` in a process forked after the imports, which take longer than a whole run here.

    A trap (function, n, signal) sends the process the signal when it calls the function of a library for the nth time.
    """
    os.chdir(cwd)
    os.environ.update(env)
    for fd, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{output}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    if trap:
        place, nth, number = trap
        owner, name = place.rsplit(".", 1)
        owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
        original = getattr(owner, name)

        def trapped(*args, **kwargs):
            if next(calls) == nth:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(owner, name, trapped)
    if scripts != ROOT:  # a fork, with modules of its own
        sys.path.insert(0, str(scripts))
        for path in scripts.glob("*.py"):
            sys.modules.pop(path.stem, None)
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(scripts / "train.py"), run_name="__main__")


class Lab:
    """A folder with a corpus, its shards, and configs of runs on them."""

    def __init__(self, root: Path):
        self.root, self.count = root, itertools.count()
        rng = random.Random(0)
        words = ["".join(rng.choice("abcdéfghij") for _ in range(rng.randint(2, 6))) for _ in range(40)]
        self.documents = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(120)]
        (root / "corpus.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in self.documents))
        source = {"name": str(root / "corpus.jsonl"), "path": str(root / "data"), "n_ctx": T + 1}
        sections = (
            source | {"split": "train[:90%]", "train_tokenizer_vocab_size": 300},
            source | {"split": "train[90%:]"},
        )
        self.base = BASE | dict(zip(SECTIONS, sections, strict=True))
        self.config = self.write(yaml.safe_dump(self.base))
        prepared = run("prepare_data.py", self.config, "--workers", 1)
        assert prepared.returncode == 0, prepared.stderr
        self.processes = multiprocessing.get_context("forkserver")
        imports = "train", "torch._inductor.compile_fx", "torch.distributed.optim", "matplotlib.figure", "wandb"
        self.processes.set_forkserver_preload([*imports, "tokenizers", "pytest", "hypothesis"])

    def write(self, text: str) -> Path:
        """A new config file."""
        path = self.root / f"config{next(self.count)}.yaml"
        path.write_text(text)
        return path

    def start(self, *overrides, scripts=ROOT, config=None, env=None, ranks=1, traps=None):
        """Start train.py, on several ranks without torchrun's help: (processes, where their output goes)."""
        started = []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            world = {k: str(v) for k, v in world.items()} | {"MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}
            output = self.root / f"output{next(self.count)}"
            args = scripts, [str(config or self.config), *overrides], self.root, world | (env or {}), output
            process = self.processes.Process(target=in_child, args=(*args, (traps or {}).get(rank)), daemon=True)
            process.start()
            started.append((process, output))
        return started

    def finish(self, started, seconds=90) -> list[SimpleNamespace]:
        """Wait for all ranks: the exit code and output of each."""
        results, deadline = [], time.monotonic() + seconds
        for process, output in started:
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                pytest.fail(f"still running after {seconds} s: {Path(f'{output}.err').read_text()}")
            out, err = (Path(f"{output}{s}").read_text(errors="replace") for s in (".out", ".err"))
            results.append(SimpleNamespace(code=process.exitcode, out=out, err=err))
        return results

    def run(self, *overrides, **options) -> SimpleNamespace:
        """Run train.py to its end on one rank, or as rank 0 of several."""
        return self.finish(self.start(*overrides, **options))[0]

    def train(self, name, *overrides, code=0, **options) -> Path:
        """The folder of a run that ended with this exit code."""
        result = self.run(*overrides, f"run_dir={self.root / name}", **options)
        assert result.code == code, result.err
        return self.root / name

    def interrupted(self, name, *overrides, update=14, **options) -> Path:
        """The folder of a run that a signal stopped in this update, counted from its start."""
        return self.train(name, *overrides, code=75, traps={0: (UPDATE, update, TERM)}, **options)

    @functools.cache  # noqa: B019, one lab a module
    def undisturbed(self, *overrides, ranks=1) -> Path:
        """The folder of a run of these overrides that nothing interrupted."""
        return self.train(f"undisturbed{next(self.count)}", *overrides, ranks=ranks)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, one_thread):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        for name in ("SPD_OUT_DIR", "PARAM_DECOMP_OUT_DIR", "WANDB_MODE", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def base(lab):
    """The run that others are compared with."""
    return lab.undisturbed()


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, times aside."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in ("tokens_per_s", "mfu")} for m in lines]


def series(folder: Path, name: str) -> dict[int, float]:
    return {m["step"]: m[name] for m in metrics(folder) if name in m}


def weights(folder: Path, step: int = N) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"model_step_{step}.pt", weights_only=True)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(folder: Path, expected: Path):
    """All that was computed is the same, checkpoints byte by byte, and nothing tells of interruptions."""
    assert metrics(folder) == metrics(expected)
    assert (folder / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    assert (folder / "check.json").read_text() == (expected / "check.json").read_text()
    assert tree(folder / "checkpoints") == tree(expected / "checkpoints")
    assert (folder / "status").read_text() == "finished\n"
    assert {p.name for p in folder.iterdir()} == {p.name for p in expected.iterdir()}
    assert not [p for p in folder.rglob("*") if ".part" in p.name]


def assert_close_run(folder: Path, expected: Path):
    """The same numbers, but for the order of sums."""
    assert series(folder, "train_loss") == pytest.approx(series(expected, "train_loss"), rel=0, abs=1e-4)
    assert series(folder, "val_loss") == pytest.approx(series(expected, "val_loss"), rel=0, abs=1e-4)
    assert sorted(series(folder, "train_loss")) == list(range(1, N + 1))


def refused(result, *words):
    """It ended with one sentence that has these words."""
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1), result
    assert result.err.startswith("train: ") and len(result.err) < 600, result.err
    assert all(word in result.err for word in words), result.err


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -----------------------------------------------------------------------------
# what a run leaves behind


def test_run_folder(lab):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"SPD_OUT_DIR": str(lab.root / "spd")}
    command = [*torchrun, ROOT / "train.py", lab.config]
    done = subprocess.run(command, cwd=lab.root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder,) = (lab.root / "spd" / "target_models").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    names = "final_config.yaml model_config.yaml tokenizer.json tokenizer_config.json code main.log metrics.jsonl"
    names += " samples.jsonl loss.png check.json environment.json status checkpoints .lock"
    assert {p.name for p in folder.iterdir()} == set(names.split())
    assert (folder / "tokenizer.json").read_bytes() == (lab.root / "data" / "tokenizer.json").read_bytes()
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "main.log").read_text() == done.stdout
    for path in (ROOT / "train.py", ROOT / "models.py", ROOT / "slurm_submit.sh", lab.config):
        assert (folder / "code" / path.name).read_bytes() == path.read_bytes()
    (start,) = json.loads((folder / "environment.json").read_text())
    digest = prepare_data.sha256_file(lab.root / "data" / "dataset.json")
    assert (start["ranks"], set(start["dataset_sha256"].values())) == (2, {digest})
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {f"model_step_{s}.pt" for s in KEPT}
    logged = [int(s) for s in re.findall(rf"step (\d+)/{N} \| loss", done.stdout)]
    assert logged == [1, 5, 10, 15, 20, 24]  # the first, every train_log_every, the last
    assert [json.loads(line)["step"] for line in (folder / "samples.jsonl").open()] == [0, 12, 24]
    assert_close_run(folder, lab.undisturbed())


def test_configs_in_the_run_folder_are_complete_and_check_json_tells_the_model(lab, base):
    final, shape = (yaml.safe_load((base / f"{name}_config.yaml").read_text()) for name in ("final", "model"))
    assert list(final) == list(train.Config.model_fields)
    for section in SECTIONS:
        assert list(final[section]) == list(prepare_data.DatasetConfig.model_fields)
    config = MODEL_CLASSES["LlamaSimpleMLP"].config_class(**MODEL)
    assert list(shape) == [f.name for f in dataclasses.fields(config)]  # SPD's model_config.yaml forbids others
    assert shape == final["model"] == dataclasses.asdict(config)
    assert_same_run(lab.train("again", config=base / "final_config.yaml"), base)
    value, model = json.loads((base / "check.json").read_text()), make_model(weights(base))
    ids = torch.tensor([value["ids"]])
    assert model(ids[:, :-1], ids[:, 1:])[1].item() == pytest.approx(value["loss"], rel=1e-6)
    assert equal(type(model).from_pretrained(str(base)).state_dict(), model.state_dict())  # as SPD loads it
    assert (value["step"], value["val_loss"], ids.shape) == (N, series(base, "val_loss")[N], (1, T + 1))


def test_schedule_of_checkpoints(lab):
    early = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    for overrides, kept in (
        (["num_iterations=4321"], [*early, 1000, 2000, 3000, 4000, 4321]),
        (["num_iterations=5000", "intermediate_checkpoints=false"], [5000]),
        (["num_iterations=9", "intermediate_checkpoints=false", "checkpoint_steps=[3,5]"], [3, 5, 9]),
        (["num_iterations=9", "intermediate_checkpoints=false", "checkpoint_every=4"], [0, 4, 8, 9]),
    ):
        c = train.load_config(lab.config, overrides)
        assert [s for s in range(c.num_iterations + 1) if train.is_checkpoint(s, c)] == kept


# -----------------------------------------------------------------------------
# numbers, against a loop of a few lines


def make_model(state=None):
    """BASE's model, with the weights it starts from or with others."""
    model = MODEL_CLASSES["LlamaSimpleMLP"](MODEL_CLASSES["LlamaSimpleMLP"].config_class(**MODEL))
    if state:
        model.load_state_dict(state)
    return model


def shard_tokens(lab, split: str) -> np.ndarray:
    files = sorted((lab.root / "data").glob(f"{split}_*.bin"))
    return np.concatenate([np.fromfile(f, "<u2", offset=1024) for f in files]).astype(np.int64)


def windows(lab, split: str) -> torch.Tensor:  # (windows in the split, T + 1)
    tokens = torch.from_numpy(shard_tokens(lab, split))
    return tokens[: len(tokens) // (T + 1) * (T + 1)].view(-1, T + 1)


def reference_lr(s, peak, warmup, updates, frac):
    if s <= warmup:
        return peak * s / warmup
    return peak * frac + (peak - peak * frac) * (1 + math.cos(math.pi * (s - warmup) / (updates - warmup))) / 2


def reference(lab, rates, batch_size=B, seed=0, shuffle_each_epoch=True, betas=(0.9, 0.95)):
    """(losses, gradient norms, final weights) of training as the design describes it, at these learning rates."""
    model, data = make_model(), windows(lab, "train")
    optimizer = model.configure_optimizers(BASE["weight_decay"], rates[0], betas, "cpu", 0)
    losses, norms = [], []
    for s, rate in enumerate(rates, 1):
        positions = np.arange((s - 1) * batch_size, s * batch_size)
        batch = data[prepare_data.window_order(positions, len(data), seed, shuffle_each_epoch)]
        loss = model(batch[:, :-1], batch[:, 1:], return_logits=False)[1]
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), BASE["grad_clip"]).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, model.state_dict()


@torch.no_grad()
def validation_loss(lab, state, max_windows=B * BASE["val_max_steps"]) -> float:
    """The loss of weights on windows spread evenly over the validation split."""
    data = windows(lab, "val")
    n = min(len(data), max_windows)
    batch = data[[i * len(data) // n for i in range(n)]]
    return make_model(state)(batch[:, :-1], batch[:, 1:])[1].item()


PLAIN_LOOPS = {
    "": {},
    "batch_size=64 train_dataset_config.seed=3 seed=2": {"batch_size": 64, "seed": 5},
    "batch_size=64 train_dataset_config.shuffle_each_epoch=false": {"batch_size": 64, "shuffle_each_epoch": False},
    "betas=[0.8,0.99]": {"betas": (0.8, 0.99)},
}


@pytest.mark.parametrize("overrides", PLAIN_LOOPS)
def test_losses_and_weights_are_those_of_a_plain_loop(lab, overrides):
    folder, options = lab.undisturbed(*overrides.split()), PLAIN_LOOPS[overrides]
    lines = [m for m in metrics(folder) if "train_loss" in m]
    rates = [m["lr"] for m in lines]
    shape = BASE["learning_rate"], BASE["warmup_iters"], N, BASE["learning_rate_decay_frac"]
    assert rates == pytest.approx([reference_lr(s, *shape) for s in range(1, N + 1)], rel=1e-12)
    losses, norms, final = reference(lab, rates, **options)
    assert [m["step"] for m in lines] == list(range(1, N + 1))  # exactly num_iterations updates
    assert [m["train_loss"] for m in lines] == losses  # each computed before its update is applied
    assert [m["grad_norm"] for m in lines] == norms
    assert [m["tokens"] for m in lines] == [s * options.get("batch_size", B) * T for s in range(1, N + 1)]
    assert equal(weights(folder), final)


def test_golden_losses(base):
    """A refactoring proves itself by leaving them unchanged; other versions of torch may sum in another order."""
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())["losses"]
    assert list(series(base, "train_loss").values()) == pytest.approx(golden, rel=1e-5)


def test_validation_is_of_the_weights_saved_at_its_step(lab, base):
    losses = series(base, "val_loss")
    assert list(losses) == [0, 7, 14, 21, N]  # at the start, every val_loss_every, at the end
    for step in (0, N):
        assert losses[step] == pytest.approx(validation_loss(lab, weights(base, step)), abs=1e-5)
    whole = lab.train("whole", "val_max_steps=1000", "num_iterations=1", "micro_batch_size=2", ranks=2)
    assert series(whole, "val_loss")[0] == pytest.approx(validation_loss(lab, weights(base, 0), 10**6), abs=1e-5)
    start = f"from_pretrained={base / 'checkpoints' / 'model_step_8.pt'}"
    inference = lab.train("inference", "inference_only=true", "sample_every=0", start)
    (line,) = metrics(inference)
    assert line["val_loss"] == pytest.approx(validation_loss(lab, weights(base, 8)), abs=1e-5)
    assert (line["step"], list((inference / "checkpoints").iterdir())) == (0, [])


@pytest.mark.parametrize("warmup, updates", [(0, 10), (1, 10), (9, 10), (10, 10), (15, 10), (0, 1), (1, 1)])
def test_learning_rate(lab, warmup, updates):
    c = train.load_config(lab.config, [f"warmup_iters={warmup}", f"num_iterations={updates}", "learning_rate=3e-4"])
    rates = [train.learning_rate_at(s, c) for s in range(1, updates + 1)]
    assert rates == pytest.approx([reference_lr(s, 3e-4, warmup, updates, 0.1) for s in range(1, updates + 1)])


# -----------------------------------------------------------------------------
# one table: ranks x micro-batches x interruptions x precision

KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
UPDATE, SAVE, FSYNC, RENAME = "torch.nn.utils.clip_grad_norm_", "torch.save", "os.fsync", "os.replace"
VALIDATE, SAMPLE = "prepare_data:Shards.windows", "torch.multinomial"  # which only these call, and check.json
KEEP = "keep_optimizer=true"
MUON = "optimizer=muon"
GPT2 = {"model_type": "GPT2", "block_size": T, "vocab_size": 300, "n_embd": 16, "n_head": 2, "n_layer": 1}
GPT2 = "model=" + json.dumps(GPT2 | {"flash_attention": False}, separators=(",", ":"))

SCENARIOS = [
    # overrides, ranks, the rank that is interrupted, when it calls what for which time, signal
    ("", 1, 0, [(UPDATE, 1, USR1), (UPDATE, 3, INT), (UPDATE, 12, TERM)]),
    ("", 1, 0, [(VALIDATE, 1, TERM), (VALIDATE, 3, TERM), (SAMPLE, 20, KILL), (VALIDATE, 5, TERM)]),
    ("", 1, 0, [(SAVE, 1, KILL), (RENAME, 9, KILL), (FSYNC, 30, KILL), (SAVE, 4, KILL), (RENAME, 14, KILL)]),
    (KEEP, 1, 0, [(SAVE, 5, KILL), (RENAME, 12, KILL), (FSYNC, 33, KILL), (SAVE, 2, KILL), (UPDATE, 5, TERM)]),
    (f"{MUON} {KEEP}", 1, 0, [(UPDATE, 8, TERM), (SAVE, 6, KILL)]),
    (f"dtype=bfloat16 {GPT2}", 1, 0, [(UPDATE, 8, TERM), (UPDATE, 9, KILL)]),
    ("dtype=float16", 1, 0, [(UPDATE, 8, TERM)]),
    ("", 2, 1, [(UPDATE, 8, USR1), (UPDATE, 5, KILL)]),
    (f"micro_batch_size=1 zero_stage=1 {MUON}", 2, 0, [(VALIDATE, 3, TERM), (SAVE, 3, KILL)]),
    (f"micro_batch_size=1 zero_stage=1 {KEEP}", 2, 1, [(UPDATE, 8, TERM), (UPDATE, 9, KILL)]),
]


@pytest.mark.parametrize("overrides, ranks, rank, interruptions", SCENARIOS)
def test_interruptions_leave_no_trace(lab, overrides, ranks, rank, interruptions):
    expected, name = lab.undisturbed(*overrides.split(), ranks=ranks), f"interrupted{next(lab.count)}"
    if MUON not in overrides and "float16" not in overrides:
        assert_close_run(expected, lab.undisturbed())
    for trap in interruptions:
        started = lab.start(*overrides.split(), f"run_dir={lab.root / name}", ranks=ranks, traps={rank: trap})
        results = lab.finish(started)
        if trap[2] == KILL:
            assert results[rank].code == -KILL and all(r.code != 0 for r in results), results
        else:
            assert [r.code for r in results] == [75] * ranks, results
            assert (lab.root / name / "status").read_text() == "interrupted\n"
            assert "Traceback" not in "".join(r.err for r in results)
    assert_same_run(lab.train(name, *overrides.split(), ranks=ranks), expected)


def test_killed_at_random_moments(lab):
    rng, kills = random.Random(os.environ.get("KILL_SEED", "0")), int(os.environ.get("KILLS", "5"))
    overrides = f"num_iterations={80 * kills}", "val_loss_every=40", "checkpoint_every=50", KEEP
    expected, log = lab.undisturbed(*overrides), lab.root / "killed" / "main.log"
    for _ in range(kills):
        length = log.stat().st_size if log.exists() else 0
        ((process, _),) = started = lab.start(*overrides, f"run_dir={log.parent}")
        wait_for(lambda p=process, n=length: not p.is_alive() or (log.exists() and log.stat().st_size > n))
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        lab.finish(started)
    assert_same_run(lab.train("killed", *overrides), expected)


def test_compiled_run_resumes_to_the_bit(lab):
    """And several ranks that are not compiled resume what one was."""
    options = "compile=true", "val_loss_every=0"
    expected, folder = lab.undisturbed(*options), lab.interrupted("compiled", *options, update=8)
    other = shutil.copytree(folder, lab.root / "compiled, then eager on two ranks")
    assert_same_run(lab.train(folder.name, *options), expected)
    assert_close_run(lab.train(other.name, "val_loss_every=0", "micro_batch_size=1", ranks=2), expected)


def test_one_process_a_folder_and_an_end_at_the_second_ctrl_c(lab):
    folder = lab.root / "shared"
    options = "num_iterations=100000", "resume_every=0", "intermediate_checkpoints=false", f"run_dir={folder}"
    ((process, _),) = started = lab.start(*options)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and metrics(folder))
    refused(lab.run(*options), "another process")
    os.kill(process.pid, INT)
    os.kill(process.pid, INT)  # as the terminal and torchrun do for one Ctrl-C
    (result,) = lab.finish(started)
    assert (result.code, "Traceback" in result.err) == (75, False)


@pytest.mark.parametrize("kind, steps", [("optim", [14]), ("model", [12, 14])])
def test_corrupted_states_are_passed_over(lab, base, kind, steps):
    folder = lab.interrupted(f"damaged {kind}")
    for path in [folder / "checkpoints" / f"{kind}_step_{s}.pt" for s in steps]:
        os.truncate(path, path.stat().st_size // 2)
    result = lab.run(f"run_dir={folder}")
    assert (result.code, result.err.count("corrupted")) == (0, len(steps)), result.err
    assert_same_run(folder, base)


def test_states_of_other_runs_are_refused(lab, base):
    """The pair itself says of which run it is, also where final_config.yaml is gone."""
    mine, without, swapped = (lab.interrupted(name) for name in ("mine", "without config", "swapped"))
    other = lab.interrupted("other", "model.n_layer=2", "num_iterations=75", update=40)
    shutil.copytree(other / "checkpoints", mine / "checkpoints", dirs_exist_ok=True)
    (without / "final_config.yaml").unlink()
    shutil.copy(other / "checkpoints" / "model_step_8.pt", swapped / "checkpoints" / "model_step_14.pt")
    for folder, overrides, words in (
        (mine, "", ["model.n_layer", "num_iterations"]),
        (without, MUON, ["optimizer"]),
        (without, "learning_rate=1e-3 model.n_layer=2", ["learning_rate", "model.n_layer"]),
        (swapped, "", ["model_step_14.pt"]),
    ):
        before = tree(folder)
        refused(lab.run(f"run_dir={folder}", *overrides.split()), *words)
        assert tree(folder) == before


def test_what_a_resumed_run_may_change(lab, base):
    """And a run may be started often: environment.json is a flat list."""
    folder = lab.interrupted("free")
    starts = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(starts * 2000))
    before = tree(folder)
    result = lab.run(f"run_dir={folder}", "learning_rate=1e-3", "train_log_every=2")
    refused(result, "learning_rate 0.003 there, 0.001 here")
    assert "train_log_every" not in result.err and tree(folder) == before
    assert_close_run(lab.train("free", "train_log_every=2", "micro_batch_size=2", "resume_every=5"), base)
    assert len(json.loads((folder / "environment.json").read_text())) == 2001


def test_branch(lab):
    """A branch with the same config goes on as its run did; another one takes its own schedule from there on."""
    trunk = lab.undisturbed(KEEP)
    start = f"branch_from={trunk}", "branch_step=8"
    same = lab.undisturbed(*start)
    assert [m for m in metrics(trunk) if m["step"] > 8] == [m for m in metrics(same) if m["step"] > 8]
    assert equal(weights(same), weights(trunk))
    change = *start, "num_iterations=40", "weight_decay=0.2", "betas=[0.8,0.9]", "warmup_iters=2"
    branch = lab.undisturbed(*change)
    was, losses = series(trunk, "train_loss"), series(branch, "train_loss")
    assert (list(losses), losses[9], losses[11] == was[11]) == (list(range(9, 41)), was[9], False)
    assert series(branch, "lr")[20] == pytest.approx(reference_lr(20, 3e-3, 2, 40, 0.1))
    for update in (2, 5):
        lab.interrupted("branch", *change, update=update)
    assert_same_run(lab.train("branch", *change, config=lab.root / "branch/code" / lab.config.name), branch)
    assert equal(weights(branch, 8), weights(trunk, 8))
    lab.train("float16", *start, "dtype=float16")  # which has a scaler, unlike its trunk
    start += "inference_only=true", "model.flash_attention=false"
    assert list(series(lab.train("inference branch", *start), "val_loss")) == [8]


def test_full_disk_ends_the_run_and_the_same_command_resumes_it(lab, base):
    disk = lab.root / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        for free in (20, 60, 110, 160, 230):  # KB
            with open(disk / "filler", "wb", buffering=0) as f:
                while shutil.disk_usage(disk).free > free * 1000:
                    f.write(bytes(4096))
            result = lab.run(f"run_dir={disk / 'run'}")
            assert (result.code, "No space" in result.err) == (1, True), (free, result)
            (disk / "filler").unlink()
        assert_same_run(lab.train("disk/run"), base)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_not_finite_never_reaches_the_disk(lab, ranks):
    options = "learning_rate=1e6", "grad_clip=null", "warmup_iters=0", "resume_every=1", "num_iterations=200"
    folder = lab.train(f"diverged {ranks}", *options, ranks=ranks, code=1)
    assert (folder / "status").read_text() == "failed\n"
    assert "run_info.py" in (folder / "main.log").read_text()  # how to see the data of that update
    for path in (folder / "checkpoints").glob("model_*.pt"):
        assert all(w.isfinite().all() for w in torch.load(path, weights_only=True).values()), path
    lab.train(f"diverged at the end {ranks}", *options[:3], "dtype=float16", "num_iterations=1", ranks=ranks, code=1)


def test_a_float16_overflow_skips_adamw_and_muon(lab):
    c = train.load_config(lab.config, ["optimizer=muon", "dtype=float16", "grad_clip=null"])
    model = MODEL_CLASSES[c.model.model_type](c.model)
    optimizers, scaler = train.make_optimizers(model, c, torch.device("cpu")), torch.amp.GradScaler("cpu")
    before = {name: w.clone() for name, w in model.state_dict().items()}
    scaler.scale(model(torch.zeros(1, 9, dtype=int), torch.ones(1, 9, dtype=int))[1]).backward()
    model.h[0].mlp.down_proj.weight.grad[0, 0] = math.inf  # a matrix of Muon's
    assert not train.apply_update(optimizers, scaler, model, 0.1, c).isfinite()
    assert equal(model.state_dict(), before) and scaler.get_scale() < 65536


def test_wandb_has_what_the_folder_has(lab, base, tmp_path):
    """Over an interruption; another run starts from it; without a server a run logs offline."""
    pytest.importorskip("wandb")
    server, home = Server(), str(tmp_path)
    env = server.environment | {"HOME": home, "NETRC": f"{home}/none", "WANDB_DIR": home, "WANDB_SILENT": "true"}
    project = "wandb_project=test"
    folder = lab.interrupted("on wandb", project, env=env)
    path = f"me/test/{(folder / 'wandb_run_id').read_text()}"
    assert server.runs[path].state == "preempted"
    lab.train(folder.name, project, env=env)
    remote = server.runs[path]
    assert (remote.state, list(server.runs)) == ("finished", [path])
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in remote.history]
    for name, key in ("metrics.jsonl", "lr"), ("metrics.jsonl", "val_loss"), ("samples.jsonl", "text"):
        lines = map(json.loads, (folder / name).open())
        assert [row for row in rows if key in row] == [line for line in lines if key in line]
    names = "final_config.yaml", "model_config.yaml", "tokenizer.json", "tokenizer_config.json", "check.json"
    for file in [folder / n for n in names] + [folder / "checkpoints" / f"model_step_{s}.pt" for s in KEPT]:
        assert remote.files[file.name] == file.read_bytes()
    tuned = lab.train("tuned", f"from_pretrained={path}", "num_iterations=1", env=env | {"SPD_OUT_DIR": home})
    assert equal(weights(tuned, 0), weights(folder))
    # what param-decomp takes: one safetensors, the tied weight once; others take the .pt
    last = {name: w for name, w in weights(folder).items() if name != "lm_head.weight"}
    assert [name for name in remote.files if "safetensors" in name] == [f"model_step_{N}.safetensors"]
    assert equal(safetensors.torch.load(remote.files[f"model_step_{N}.safetensors"]), last)
    copies = {file.name for file in next((tmp_path / "pretrain_cache").iterdir()).iterdir()}
    assert copies == {*names, f"model_step_{N}.pt", "wandb.json", ".lock"}
    server.stop()
    scripts = fork(tmp_path, ("train.py", "from safetensors.torch import", "from no_such_module import"))
    offline = lab.train("no server", project, env=env | {"WANDB_INIT_TIMEOUT": "2"}, scripts=scripts)
    assert list((offline / "wandb").glob("offline-run-*/*.wandb"))
    assert (offline / "main.log").read_text().count("offline") == 1
    assert "no_such_module" in (offline / "main.log").read_text()  # and the run has not failed
    assert metrics(folder) == metrics(offline) == metrics(base)


# -----------------------------------------------------------------------------
# a fork stays right: the scripts changed as a researcher would

NEXT_UPDATE = "            # ---- update s + 1\n"


def fork(folder: Path, *edits) -> Path:
    """Copy the scripts to a folder and edit lines, (file, old, new), there."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for file, old, new in edits:
        text = (folder / file).read_text()
        assert text.count(old) == 1, (file, old)
        (folder / file).write_text(text.replace(old, new))
    return folder


def test_fork_with_dropout_and_a_metric_of_its_own(lab, tmp_path):
    dropout = "models.py", 'GELU(approximate="tanh")', 'GELU(approximate="tanh")\n        self.drop = nn.Dropout(0.2)'
    own = "            if s % 5 == 2: log.metrics(s, {'mine': s * 1.5, 'drawn': torch.rand(()).item()})\n"
    untied = "models.py", "        self.wte.weight = self.lm_head.weight\n        self.draw", "        self.draw"
    z_loss = "models.py", "return F.cross", "return torch.is_grad_enabled() * logits.logsumexp(-1).sum() + F.cross"
    scripts = fork(tmp_path, dropout, untied, z_loss, ("train.py", NEXT_UPDATE, own + NEXT_UPDATE))
    expected = lab.train("dropout", scripts=scripts)
    lab.interrupted("dropout interrupted", scripts=scripts)
    assert_same_run(lab.train("dropout interrupted", scripts=scripts), expected)
    assert series(expected, "mine") == {s: s * 1.5 for s in range(2, N, 5)}
    # Only training's loss has the additional term: whoever loads the model computes the loss in check.json.
    assert json.loads((expected / "check.json").read_text())["loss"] < min(series(expected, "train_loss").values()) - 1


def test_fork_that_counts_objects_and_raises(lab, tmp_path):
    """An update leaves nothing in memory. An error in a fork's own code is in main.log, too."""
    own = "            if s in (500, 1500): import gc; gc.collect(); log.say(f'{sys.getallocatedblocks()} objects')\n"
    own += "            if s == 1500: {}['mine']\n"
    scripts = fork(tmp_path, ("train.py", NEXT_UPDATE, own + NEXT_UPDATE))
    options = "intermediate_checkpoints=false", "sample_every=0", "val_loss_every=0", "resume_every=0", "batch_size=1"
    folder = lab.train("objects", *options, "num_iterations=2000", scripts=scripts, code=1)
    log = (folder / "main.log").read_text()
    before, after = map(int, re.findall(r"(\d+) objects", log))
    assert after < before + 1000  # less than one object an update
    assert "KeyError: 'mine'" in log and (folder / "status").read_text() == "failed\n"


# -----------------------------------------------------------------------------
# a user's mistakes, as typed before and after train.py CONFIG: one sentence, no traceback, nothing written

MISTAKES = {
    "learning_rat=1": "learning_rate",
    "model.n_hed=2": "n_head",
    "batch_size=true": "batch_size",
    "learning_rate=.nan": "learning_rate",
    "optimizer=muon muon_learning_rate=1e300": "muon_learning_rate",
    "muon_learning_rate=0.01": "muon_learning_rate",
    f"num_iterations={'9' * 5000}": "num_iterations",
    f"warmup_iters={'4' * 400}": "warmup_iters",
    f"seed=0x{'f' * 5000}": "seed",
    "betas=[0.9,1]": "betas",
    "RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 device=cuda": "device=cpu",  # there is none here
    "micro_batch_size=3": "micro_batch_size",
    "weight_decay=1e42": "weight_decay",
    "checkpoint_steps=[25]": "checkpoint_steps",
    "model.n_head=3": "n_head",
    "model.model_type=Bert": "LlamaSimpleMLP",
    "model=null": "model",
    "model.block_size=16": "block_size",
    "model.vocab_size=299": "vocab_size",
    "train_dataset_config.path=nowhere val_dataset_config.path=nowhere": "prepare_data.py",
    "from_pretrained=nowhere/at/all.pt": "nowhere",
    "branch_step=3": "branch_from",
    "branch_from=nowhere branch_step=3": "nowhere",
    "run_dir=a\0b": "run_dir",
    "--compile": "key=value",
    "WORLD_SIZE=abc": "WORLD_SIZE",
    "WORLD_SIZE=0": "WORLD_SIZE",
    "RANK=3": "RANK",
}
FILES = {
    "duplicate key": (lambda text: text + "learning_rate: 1\n", "learning_rate"),
    "not a mapping": (lambda text: "- 1\n", "mapping"),
    "missing": (lambda text: text.replace("batch_size: 4\n", ""), "batch_size"),
}
DATA = {
    "a shard is cut short": (lambda d: os.truncate(next(d.glob("train_*.bin")), 1500), "train_0000"),
    "a shard is gone": (lambda d: next(d.glob("val_*.bin")).unlink(), "val_0000"),
    "another tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "hf_tokenizer_path"),
    "empty": (lambda d: [p.unlink() for p in d.iterdir()], "prepare_data.py"),
}


@pytest.mark.parametrize("what", [*MISTAKES, *FILES, *DATA], ids=lambda what: what[:40])
def test_mistakes(lab, tmp_path, what):
    typed, config = [f"output_dir={tmp_path / 'runs'}"], lab.config
    if what in FILES:
        change, word = FILES[what]
        config = lab.write(change(lab.config.read_text()))
    elif what in DATA:
        change, word = DATA[what]
        change(shutil.copytree(lab.root / "data", tmp_path / "data"))
        typed += [f"{section}.path={tmp_path / 'data'}" for section in SECTIONS]
    else:
        word, typed = MISTAKES[what], typed + what.split()
    env = dict(part.split("=") for part in typed if part[0].isupper())
    overrides = [part for part in typed if not part[0].isupper()]
    before = tree(tmp_path)
    refused(lab.run(*overrides, config=config, env=env), word)
    assert tree(tmp_path) == before and not (tmp_path / "runs").exists()


def test_data_prepared_again_and_foreign_ids(lab, tmp_path):
    data = shutil.copytree(lab.root / "data", tmp_path / "data")
    paths = [f"{section}.path={data}" for section in SECTIONS]
    folder = lab.interrupted("old data", *paths)
    with open(data / "dataset.json", "a") as f:
        f.write("\n")
    refused(lab.run(f"run_dir={folder}", *paths), "data_sha256")
    note = lab.run(*paths, "train_dataset_config.split=train[:50%]", "num_iterations=1", f"output_dir={tmp_path}")
    assert (note.code, "another config" in note.err) == (0, True), note
    (data / "dataset.json").unlink()
    shard = next(data.glob("train_*.bin"))
    raw = np.fromfile(shard, "<u2")
    raw[-100:] = 60000
    raw.tofile(shard)
    paths += [f"{section}.hf_tokenizer_path={data / 'tokenizer.json'}" for section in SECTIONS]
    paths += ["train_dataset_config.train_tokenizer_vocab_size=null", f"output_dir={tmp_path}"]
    result = lab.run(*paths, "batch_size=64")
    assert (result.code, "60000" in result.err) == (1, True), result.err


def test_exact_numbers_paths_and_an_ascii_console(lab, tmp_path):
    c = train.load_config(lab.config, ["seed='9007199254740993'", "learning_rate=3e-4", "num_iterations=1e3"])
    assert (c.seed, c.learning_rate, c.num_iterations) == (9007199254740993, 3e-4, 1000)
    c = train.load_config(lab.config, ["run_dir=2026-01-01", "weight_decay='1e-1'", "batch_size=4.0"])
    assert (c.run_dir, c.weight_decay, c.batch_size) == ("2026-01-01", 0.1, 4)
    env = {"HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    shutil.copy(lab.config, tmp_path / "home.yaml")
    result = lab.run("num_iterations=1", "output_dir=~/runs", env=env, config="~/home.yaml")
    assert (result.code, len(list((tmp_path / "runs").iterdir()))) == (0, 1), result.err


def test_check_and_a_finished_run_write_nothing(lab, base):
    before, check = tree(base), functools.partial(lab.run, str(lab.config), config="--check")
    for override, says in ("num_iterations=5", f"{lab.root}/out/target_models/\n"), (f"run_dir={base}", f"{base}\n"):
        result = check(override)
        assert (result.code, result.out) == (0, says), result.err
    refused(check("batch_size=3", env={"WORLD_SIZE": "2"}), "batch_size")
    result = lab.run(f"run_dir={base}")
    assert (result.code, result.out.count("\n"), result.err, "finished" in result.out) == (0, 1, "", True)
    assert tree(base) == before and not (lab.root / "out").exists()


def test_help_names_every_key(lab):
    result = lab.run(config="--help")
    assert (result.code, result.err) == (0, "")
    keys = {*MODEL_CLASSES, *train.Config.model_fields, *prepare_data.DatasetConfig.model_fields}
    assert keys <= set(re.findall(r"\w+", result.out))


SCALARS = [None, True, 0, -1, 2**31, 10**400, math.nan, "3e-4", "1e999", "gpt2", "float32", "train[:5%]", "", "\0"]
scalars = st.sampled_from(SCALARS) | st.integers() | st.floats() | st.text(max_size=6) | st.dates()
texts = st.text(alphabet="!&*[]{}:,\"'-~@|>%#?0x_a1. \n", max_size=12)
junk = st.just(...) | scalars | st.lists(scalars, max_size=2) | st.dictionaries(scalars, scalars, max_size=2)
names = [*train.Config.model_fields, *prepare_data.DatasetConfig.model_fields, *MODEL, "x"]
keys = st.lists(st.sampled_from([*names, "model", *SECTIONS]), min_size=1, max_size=2).map(".".join)
edits = st.lists(
    st.tuples(st.sampled_from(["model", *SECTIONS, ""]), st.sampled_from(names) | scalars, junk), max_size=3
)


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(edits, st.lists(texts | st.builds("{}={}".format, keys, scalars | texts), max_size=3), texts)
@example([], ["seed=!!timestamp x"], "")
@example([], ["seed=" + "[" * 1500], "")
@example([], ["model.x=&a {b: *a}"], "")
def test_no_config_is_a_stack_trace(lab, edits, overrides, tail):
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in lab.base.items()}
    for section, name, value in edits:
        target = config.get(section, config)
        if isinstance(target, dict):
            target[name] = value
            if value is ...:
                del target[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            path = lab.write(yaml.safe_dump(config) + tail)
            assert isinstance(train.load_config(path, overrides), train.Config)
        except prepare_data.UserError as e:
            assert str(e) and len(str(e)) < 2000
