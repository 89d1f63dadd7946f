"""train.py as its users meet it: what a run computes and leaves behind, interruptions, mistakes, forks."""

import copy
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

import numpy as np
import pytest
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
MODEL = {
    "model_type": "LlamaSimpleMLP",
    "block_size": T,
    "n_ctx": T,
    "vocab_size": 300,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "n_intermediate": 32,
    "n_key_value_heads": 1,
    "rotary_dim": 8,
}
BASE = {
    "dtype": "float32",
    "batch_size": B,
    "num_iterations": N,
    "warmup_iters": 5,
    "learning_rate": 3e-3,
    "learning_rate_decay_frac": 0.1,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
    "val_loss_every": 7,
    "val_max_steps": 2,
    "sample_every": 12,
    "train_log_every": 5,
    "resume_every": 3,
    "intermediate_checkpoints": True,
    "compile": False,
    "device": "cpu",
    "model": MODEL,
    "train_dataset_config": {"split": "train[:90%]", "train_tokenizer_vocab_size": 300, "n_ctx": T + 1},
    "val_dataset_config": {"split": "train[90%:]", "n_ctx": T + 1},
}
SECTIONS = "train_dataset_config", "val_dataset_config"


# -----------------------------------------------------------------------------
# the laboratory: one corpus, and train.py run on it as a program


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


def in_child(argv, cwd, env, output, trap):
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
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Lab:
    """A folder with a corpus, its shards, and configs of runs on them."""

    def __init__(self, root: Path):
        self.root, self.count = root, itertools.count()
        rng = random.Random(0)
        words = ["".join(rng.choice("abcdéfghij") for _ in range(rng.randint(2, 6))) for _ in range(40)]
        self.documents = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(120)]
        (root / "corpus.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in self.documents))
        self.base = copy.deepcopy(BASE)
        for section in SECTIONS:
            self.base[section] |= {"name": str(root / "corpus.jsonl"), "path": str(root / "data")}
        self.config = self.write(self.base)
        prepared = run("prepare_data.py", self.config, "--workers", 1)
        assert prepared.returncode == 0, prepared.stderr
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["train", "matplotlib.figure", "tokenizers", "pytest", "hypothesis"])

    def write(self, config) -> Path:
        """A new file with `config`, a mapping or the text itself."""
        path = self.root / f"config{next(self.count)}.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return path

    def start(self, *overrides, config=None, env=None, ranks=1, traps=None):
        """Start train.py, on several ranks without torchrun's help: (processes, where their output goes)."""
        started = []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            world = {k: str(v) for k, v in world.items()} | {"MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}
            output = self.root / f"output{next(self.count)}"
            args = [str(config or self.config), *overrides], self.root, world | (env or {}), output
            process = self.processes.Process(target=in_child, args=(*args, (traps or {}).get(rank)), daemon=True)
            process.start()
            started.append((process, output))
        return started

    def finish(self, started, seconds=90) -> list[Result]:
        """Wait for all ranks."""
        results, deadline = [], time.monotonic() + seconds
        for process, output in started:
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                pytest.fail(f"still running after {seconds} s: {Path(f'{output}.err').read_text()}")
            out, err = (Path(f"{output}{s}").read_text(errors="replace") for s in (".out", ".err"))
            results.append(Result(process.exitcode, out, err))
        return results

    def run(self, *overrides, **options) -> Result:
        """Run train.py to its end on one rank, or as rank 0 of several."""
        return self.finish(self.start(*overrides, **options))[0]

    def train(self, name, *overrides, **options) -> Path:
        """The folder of a finished run."""
        result = self.run(*overrides, f"run_dir={self.root / name}", **options)
        assert result.code == 0, result.err
        return self.root / name

    @functools.cache  # noqa: B019, one lab a module
    def undisturbed(self, *overrides, ranks=1) -> Path:
        """The folder of a run of these overrides that nothing interrupted."""
        return self.train(f"undisturbed{next(self.count)}", *overrides, ranks=ranks)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", str(ROOT))  # for the imports before the fork
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


# -----------------------------------------------------------------------------
# what a run leaves behind


def test_run_folder(lab):
    """As a user runs it, under torchrun."""
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
    for name in ("train.py", "models.py", "slurm_submit.sh"):
        assert (folder / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    assert (folder / "code" / lab.config.name).read_bytes() == lab.config.read_bytes()
    (start,) = json.loads((folder / "environment.json").read_text())
    digest = prepare_data.sha256_file(lab.root / "data" / "dataset.json")
    assert (start["ranks"], set(start["dataset_sha256"].values())) == (2, {digest})
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {f"model_step_{s}.pt" for s in KEPT}
    logged = [int(s) for s in re.findall(rf"step (\d+)/{N} \| loss", done.stdout)]
    assert logged == [1, 5, 10, 15, 20, 24]  # the first, every train_log_every, the last
    assert [json.loads(line)["step"] for line in (folder / "samples.jsonl").open()] == [0, 12, 24]
    assert_close_run(folder, lab.undisturbed())


def test_configs_in_the_run_folder_are_complete(lab, base):
    final, model = (yaml.safe_load((base / f"{name}_config.yaml").read_text()) for name in ("final", "model"))
    assert list(final) == list(train.Config.model_fields)
    for section in SECTIONS:
        assert list(final[section]) == list(prepare_data.DatasetConfig.model_fields)
    cls = MODEL_CLASSES["LlamaSimpleMLP"].config_class
    assert list(model) == [f.name for f in dataclasses.fields(cls)]  # SPD's model_config.yaml forbids others
    assert model == final["model"] == dataclasses.asdict(cls(**MODEL))
    assert_same_run(lab.train("again", config=base / "final_config.yaml"), base)


def test_check_json_tells_the_model(base):
    value = json.loads((base / "check.json").read_text())
    model = MODEL_CLASSES["LlamaSimpleMLP"](MODEL_CLASSES["LlamaSimpleMLP"].config_class(**MODEL))
    model.load_state_dict(weights(base), strict=True)
    ids = torch.tensor([value["ids"]])
    assert model(ids[:, :-1], ids[:, 1:])[1].item() == pytest.approx(value["loss"], rel=1e-6)
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


def shard_tokens(lab, split: str) -> np.ndarray:
    files = sorted((lab.root / "data").glob(f"{split}_*.bin"))
    return np.concatenate([np.fromfile(f, "<u2", offset=1024) for f in files]).astype(np.int64)


def windows(tokens: np.ndarray, ids) -> torch.Tensor:  # (len(ids), T + 1)
    return torch.from_numpy(np.stack([tokens[w * (T + 1) : (w + 1) * (T + 1)] for w in ids]))


def reference_lr(s, peak, warmup, updates, frac):
    if s <= warmup:
        return peak * s / warmup
    return peak * frac + (peak - peak * frac) * (1 + math.cos(math.pi * (s - warmup) / (updates - warmup))) / 2


def reference(lab, rates, batch_size=B, seed=0, shuffle_each_epoch=True, betas=(0.9, 0.95)):
    """(losses, gradient norms, final weights) of training as the design describes it, at these learning rates."""
    cls = MODEL_CLASSES["LlamaSimpleMLP"]
    model = cls(cls.config_class(**MODEL))
    optimizer = model.configure_optimizers(BASE["weight_decay"], rates[0], betas, "cpu", 0)
    data = shard_tokens(lab, "train")
    losses, norms = [], []
    for s, rate in enumerate(rates, 1):
        positions = np.arange((s - 1) * batch_size, s * batch_size)
        batch = windows(data, prepare_data.window_order(positions, len(data) // (T + 1), seed, shuffle_each_epoch))
        loss = model(batch[:, :-1], batch[:, 1:], return_logits=False)[1]
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), BASE["grad_clip"]).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, model.state_dict()


def validation_loss(lab, state, max_windows=B * BASE["val_max_steps"]) -> float:
    """The loss of weights on windows spread evenly over the validation split."""
    cls = MODEL_CLASSES["LlamaSimpleMLP"]
    model = cls(cls.config_class(**MODEL))
    model.load_state_dict(state)
    data = shard_tokens(lab, "val")
    found = len(data) // (T + 1)
    n = min(found, max_windows)
    batch = windows(data, [i * found // n for i in range(n)])
    with torch.no_grad():
        return model(batch[:, :-1], batch[:, 1:])[1].item()


@pytest.mark.parametrize(
    "overrides, options",
    [
        ((), {}),
        # two and three quarter epochs, whose ends lie within a batch
        (("batch_size=64", "train_dataset_config.seed=3", "seed=2"), {"batch_size": 64, "seed": 5}),
        (
            ("batch_size=64", "train_dataset_config.shuffle_each_epoch=false"),
            {"batch_size": 64, "shuffle_each_epoch": False},
        ),
        (("betas=[0.8, 0.99]",), {"betas": (0.8, 0.99)}),
    ],
)
def test_losses_and_weights_are_those_of_a_plain_loop(lab, overrides, options):
    folder = lab.undisturbed(*overrides)
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


def test_validation_is_of_the_weights_saved_at_its_step(lab, base):
    losses = series(base, "val_loss")
    assert list(losses) == [0, 7, 14, 21, N]  # at the start, every val_loss_every, at the end
    for step in (0, N):
        assert losses[step] == pytest.approx(validation_loss(lab, weights(base, step)), abs=1e-5)
    n_bytes = sum(len(d.encode()) for d in lab.documents[108:])  # train[90%:] of 120
    nats = {s: v * len(shard_tokens(lab, "val")) for s, v in losses.items()}
    expected = {s: v / math.log(2) / n_bytes for s, v in nats.items()}
    assert series(base, "bits_per_byte") == pytest.approx(expected, rel=1e-9)
    whole = lab.train("whole", "val_max_steps=1000", "num_iterations=1", "micro_batch_size=2", ranks=2)
    assert series(whole, "val_loss")[0] == pytest.approx(validation_loss(lab, weights(base, 0), 10**6), abs=1e-5)


@pytest.mark.parametrize("warmup, updates", [(0, 10), (1, 10), (9, 10), (10, 10), (15, 10), (0, 1), (1, 1)])
def test_learning_rate(lab, warmup, updates):
    c = train.load_config(lab.config, [f"warmup_iters={warmup}", f"num_iterations={updates}", "learning_rate=3e-4"])
    rates = [train.learning_rate_at(s, c) for s in range(1, updates + 1)]
    assert rates == pytest.approx([reference_lr(s, 3e-4, warmup, updates, 0.1) for s in range(1, updates + 1)])


def test_golden_losses(base):
    """A refactoring proves itself by leaving them unchanged; other versions of torch may sum in another order."""
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())["losses"]
    assert list(series(base, "train_loss").values()) == pytest.approx(golden, rel=1e-5)


# -----------------------------------------------------------------------------
# one table: ranks x micro-batches x interruptions x precision

KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
UPDATE, SAVE, FSYNC, RENAME = "torch.nn.utils.clip_grad_norm_", "torch.save", "os.fsync", "os.replace"
VALIDATE, SAMPLE = "numpy.resize", "torch.multinomial"  # which only these call
KEEP = "keep_optimizer=true"

SCENARIOS = [
    # overrides, ranks, (place, call, signal) of each interruption, rank that it meets
    ((), 1, [(UPDATE, 8, TERM)], 0),
    ((), 1, [(UPDATE, 8, INT)], 0),
    ((), 1, [(UPDATE, 1, USR1), (UPDATE, 3, USR1), (UPDATE, 20, USR1)], 0),
    ((), 1, [(VALIDATE, 1, TERM), (VALIDATE, 2, TERM), (VALIDATE, 5, TERM)], 0),  # of steps 0, 7 and 24
    ((), 1, [(SAMPLE, 130, TERM), (SAMPLE, 20, KILL)], 0),
    ((), 1, [(SAVE, n, KILL) for n in (1, 3, 5, 4)], 0),
    ((), 1, [(RENAME, n, KILL) for n in (9, 12, 14, 13, 15)], 0),
    ((), 1, [(FSYNC, n, KILL) for n in (20, 30, 41, 33)], 0),
    ((KEEP,), 1, [(SAVE, n, KILL) for n in (2, 5, 6)] + [(UPDATE, 5, TERM)], 0),
    (("optimizer=muon",), 1, [(UPDATE, 8, TERM), (UPDATE, 5, KILL)], 0),
    (("optimizer=muon", KEEP), 1, [(SAVE, 8, KILL), (UPDATE, 5, TERM)], 0),
    (("dtype=bfloat16", "model.flash_attention=false"), 1, [(UPDATE, 8, TERM), (UPDATE, 9, KILL)], 0),
    (("micro_batch_size=1",), 1, [(UPDATE, 8, TERM), (UPDATE, 9, KILL)], 0),
    ((), 2, [(UPDATE, 8, TERM)], 0),
    ((), 2, [(UPDATE, 8, USR1), (UPDATE, 5, KILL)], 1),
    (("micro_batch_size=1", "optimizer=muon"), 2, [(VALIDATE, 3, TERM), (SAVE, 3, KILL)], 0),
    (("zero_stage=1", KEEP), 2, [(UPDATE, 8, TERM), (UPDATE, 9, KILL)], 1),
    (
        ("model={model_type: GPT2, block_size: 32, vocab_size: 300, n_embd: 16, n_head: 2, n_layer: 1}",),
        1,
        [(UPDATE, 8, KILL)],
        0,
    ),
]


@pytest.mark.parametrize("overrides, ranks, interruptions, rank", SCENARIOS)
def test_interruptions_leave_no_trace(lab, overrides, ranks, interruptions, rank):
    """The same command, again and again, ends as if nothing had happened."""
    expected = lab.undisturbed(*overrides, ranks=ranks)
    if not any(o.startswith(("optimizer", "dtype", "model")) for o in overrides):
        assert_close_run(expected, lab.undisturbed())
    name = f"interrupted{next(lab.count)}"
    for i, trap in enumerate(interruptions):
        options = {"ranks": ranks, "traps": {rank: trap}}
        results = lab.finish(lab.start(*overrides, f"run_dir={lab.root / name}", **options))
        if i > 0 and results[0].code == 0:
            break  # less was left to do than the trap waits for
        if trap[2] == KILL:
            assert results[rank].code == -KILL, results
            assert all(r.code != 0 for r in results)
        else:
            assert [r.code for r in results] == [75] * ranks, results
            assert (lab.root / name / "status").read_text() == "interrupted\n"
            assert "Traceback" not in "".join(r.err for r in results)
    assert_same_run(lab.train(name, *overrides, ranks=ranks), expected)


def test_killed_at_random_moments(lab):
    rng = random.Random(os.environ.get("KILL_SEED", "0"))
    overrides = "num_iterations=300", "resume_every=3", "val_loss_every=40", "checkpoint_every=50", KEEP
    expected, folder = lab.undisturbed(*overrides), lab.root / "killed"
    for _ in range(int(os.environ.get("KILLS", "8"))):
        ((process, _),) = started = lab.start(*overrides, f"run_dir={folder}")
        path, before = folder / "main.log", time.monotonic()
        length = path.stat().st_size if path.exists() else 0
        while time.monotonic() - before < 20 and not (path.exists() and path.stat().st_size > length):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        lab.finish(started)
    assert_same_run(lab.train("killed", *overrides), expected)
    assert [m["step"] for m in metrics(folder) if "train_loss" in m] == list(range(1, 301))


def test_compiled_run_resumes_to_the_bit(lab):
    """Slow: twice compiled. Also what several ranks make of a state of one."""
    expected, folder = lab.undisturbed("compile=true"), lab.root / "compiled"
    trap = {0: (UPDATE, 8, TERM)}
    assert lab.run("compile=true", f"run_dir={folder}", traps=trap).code == 75
    other = shutil.copytree(folder, lab.root / "compiled, then eager on two ranks")
    assert_same_run(lab.train("compiled", "compile=true"), expected)
    assert_close_run(lab.train(other.name, "micro_batch_size=1", ranks=2), expected)


def test_second_ctrl_c_ends_at_once(lab, base):
    folder = lab.root / "impatient"
    ((process, _),) = started = lab.start("val_max_steps=1000", "val_loss_every=1", f"run_dir={folder}", *LONG)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and metrics(folder))
    os.kill(process.pid, INT)
    os.kill(process.pid, INT)  # as the terminal and torchrun do for one Ctrl-C
    (result,) = lab.finish(started)
    assert (result.code, "Traceback" in result.err) == (75, False)


LONG = "num_iterations=100000", "resume_every=0", "intermediate_checkpoints=false"


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_in_one_folder(lab):
    folder = lab.root / "shared"
    started = lab.start(*LONG, f"run_dir={folder}")
    wait_for(lambda: (folder / "metrics.jsonl").exists() and metrics(folder))
    result = lab.run(*LONG, f"run_dir={folder}")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "another process" in result.err
    os.kill(started[0][0].pid, TERM)
    assert lab.finish(started)[0].code == 75


def test_finished_run_is_left_alone(lab, base):
    before = tree(base)
    result = lab.run(f"run_dir={base}")
    assert (result.code, result.out.count("\n"), result.err) == (0, 1, "")
    assert "finished" in result.out
    assert tree(base) == before


def interrupted(lab, name, *overrides, update=14) -> Path:
    """The folder of a run that a signal stopped."""
    result = lab.run(*overrides, f"run_dir={lab.root / name}", traps={0: (UPDATE, update, TERM)})
    assert result.code == 75, result.err
    return lab.root / name


def states(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("optim_step_*.pt"), key=lambda p: int(re.search(r"\d+", p.name)[0]))


@pytest.mark.parametrize("kind", ["optim", "model"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_corrupted_states_are_passed_over(lab, base, kind, all_of_them):
    folder = interrupted(lab, f"corrupted {kind} {all_of_them}")
    assert len(states(folder)) == 2
    for path in states(folder)[0 if all_of_them else 1 :]:
        path = path.with_name(path.name.replace("optim", kind))
        os.truncate(path, path.stat().st_size // 2)
    result = lab.run(f"run_dir={folder}")
    assert (result.code, "corrupted" in result.err) == (0, True)
    assert_same_run(folder, base)


def test_many_starts_are_a_flat_list(lab, base):
    folder = interrupted(lab, "starts", update=3)
    starts = json.loads((folder / "environment.json").read_text()) * 2000
    (folder / "environment.json").write_text(json.dumps(starts))
    assert_same_run(lab.train("starts"), base)
    assert len(json.loads((folder / "environment.json").read_text())) == 2001


def test_states_of_other_runs_are_refused(lab, base):
    """The pair itself says of which run it is, also where final_config.yaml is gone."""
    folder = interrupted(lab, "mine")
    other = interrupted(lab, "other", "model.n_layer=2", "num_iterations=75", update=40)
    for path in (other / "checkpoints").iterdir():
        shutil.copy(path, folder / "checkpoints")
    mine = interrupted(lab, "mine too")
    (mine / "final_config.yaml").unlink()
    swapped = interrupted(lab, "swapped")
    shutil.copy(other / "checkpoints" / "model_step_8.pt", states(swapped)[-1].parent / "model_step_14.pt")
    for run_dir, overrides, words in (
        (folder, (), ("model.n_layer", "num_iterations")),
        (mine, ("optimizer=muon",), ("optimizer",)),
        (mine, ("learning_rate=1e-3", "model.n_layer=2"), ("learning_rate", "model.n_layer")),
        (swapped, (), ("model_step_14.pt",)),
    ):
        before = tree(run_dir)
        result = lab.run(f"run_dir={run_dir}", *overrides)
        assert (result.code, result.err.count("\n")) == (1, 1), result.err
        assert all(word in result.err for word in words), result.err
        assert tree(run_dir) == before


def test_what_a_resumed_run_may_change(lab, base):
    folder = interrupted(lab, "free")
    before = tree(folder)
    result = lab.run(f"run_dir={folder}", "learning_rate=1e-3", "train_log_every=2")
    assert (result.code, result.err.count("\n"), "train_log_every" in result.err) == (1, 1, False)
    assert re.search(r"learning_rate 0.003 there, 0.001 here", result.err)
    assert tree(folder) == before
    assert_close_run(lab.train("free", "train_log_every=2", "micro_batch_size=2", "resume_every=5"), base)


@pytest.mark.parametrize("change", [[], ["num_iterations=40", "weight_decay=0.2", "betas=[0.8,0.9]", "warmup_iters=2"]])
def test_branch(lab, base, change):
    """A branch with the same config goes on as its run did; another one takes its own schedule from there on."""
    trunk = lab.undisturbed(KEEP)
    branch = lab.undisturbed(f"branch_from={trunk}", "branch_step=8", *change)
    if change:
        assert sorted(series(branch, "train_loss")) == list(range(9, 41))
        assert series(branch, "train_loss")[9] == series(trunk, "train_loss")[9]
        assert series(branch, "train_loss")[11] != series(trunk, "train_loss")[11]
        assert series(branch, "lr")[20] == pytest.approx(reference_lr(20, 3e-3, 2, 40, 0.1))
    else:
        assert [m for m in metrics(trunk) if m["step"] > 8] == [m for m in metrics(branch) if m["step"] > 8]
        assert equal(weights(branch), weights(trunk))
    name = f"branch {len(change)}"
    options = f"branch_from={trunk}", "branch_step=8", *change
    for update in (2, 5):
        interrupted(lab, name, *options, update=update)
    assert_same_run(lab.train(name, *options), branch)


def test_inference_only_updates_nothing(lab, base):
    start = base / "checkpoints" / "model_step_8.pt"
    folder = lab.train("inference", "inference_only=true", f"from_pretrained={start}", "sample_every=0")
    (line,) = metrics(folder)
    assert line["val_loss"] == pytest.approx(validation_loss(lab, weights(base, 8)), abs=1e-5)
    assert (line["step"], list((folder / "checkpoints").iterdir())) == (0, [])


def test_full_disk_ends_the_run_and_the_same_command_resumes_it(lab, base):
    """A small tmpfs that a file fills, at many sizes; then the file goes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = lab.root / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        for free in (20, 60, 110, 160, 230):  # KB
            filler = disk / "filler"
            with open(filler, "wb", buffering=0) as f:
                while f.tell() < 2**22 and shutil.disk_usage(disk).free > free * 1000:
                    f.write(bytes(4096))
            result = lab.run(f"run_dir={disk / 'run'}")
            assert (result.code, "No space" in result.err) == (1, True), (free, result)
            filler.unlink()
        assert lab.run(f"run_dir={disk / 'run'}").code == 0
        assert_same_run(disk / "run", base)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_not_finite_never_reaches_the_disk(lab, ranks):
    folder = lab.root / f"diverged {ranks}"
    options = "learning_rate=1e6", "grad_clip=null", "warmup_iters=0", "resume_every=1", "num_iterations=200"
    result = lab.run(*options, f"run_dir={folder}", ranks=ranks)
    assert (result.code, "is not finite" in result.err or "loss" in result.err) == (1, True), result
    assert (folder / "status").read_text() == "failed\n"
    assert "run_info.py" in (folder / "main.log").read_text()
    for path in (folder / "checkpoints").glob("model_*.pt"):
        for tensor in torch.load(path, weights_only=True).values():
            assert tensor.isfinite().all(), path


# -----------------------------------------------------------------------------
# W&B


@pytest.fixture
def wandb_server(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    server = Server()
    homes = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    for name, value in (server.environment | homes).items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


def logged(history: list[dict]) -> list[dict]:
    """The rows of metrics among W&B's history, without W&B's own columns."""
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]
    return [row for row in rows if "generation_tables" not in row]


def test_wandb_has_what_the_folder_has(lab, base, wandb_server, tmp_path):
    """Written to a server, interrupted and resumed in the same run there; and what another run starts from."""
    env, folder = dict(os.environ), lab.root / "on wandb"
    options = "wandb_project=test", f"run_dir={folder}"
    assert lab.run(*options, env=env, traps={0: (UPDATE, 14, TERM)}).code == 75
    path = f"me/test/{(folder / 'wandb_run_id').read_text()}"
    assert wandb_server.runs[path].state == "preempted"
    assert lab.run(*options, env=env).code == 0
    remote = wandb_server.runs[path]
    assert (remote.state, list(wandb_server.runs)) == ("finished", [path])
    assert logged(remote.history) == [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    names = "final_config.yaml", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"
    for file in [folder / n for n in names] + [folder / "checkpoints" / f"model_step_{s}.pt" for s in KEPT]:
        assert remote.files[file.name] == file.read_bytes()
    assert metrics(folder) == metrics(base)
    tuned = lab.train("tuned", f"from_pretrained={path}", "num_iterations=1", env=env | {"SPD_OUT_DIR": str(tmp_path)})
    assert equal(weights(tuned, 0), weights(folder))


def test_wandb_out_of_reach_is_logged_offline(lab, base, wandb_server):
    wandb_server.stop()
    env = os.environ | {"WANDB_INIT_TIMEOUT": "2"}
    result = lab.run("wandb_project=test", f"run_dir={lab.root / 'no server'}", env=env)
    assert (result.code, result.out.count("offline")) == (0, 1), result.err
    assert list((lab.root / "no server" / "wandb").glob("offline-run-*/*.wandb"))
    assert metrics(lab.root / "no server") == metrics(base)


# -----------------------------------------------------------------------------
# a fork stays right: the scripts changed as a researcher would


@pytest.fixture
def fork(lab, tmp_path):
    """A copy of the scripts in which change(file, old, new) edits a line and run(...) runs train.py."""

    class Fork:
        def __init__(self):
            for path in ROOT.glob("*.py"):
                shutil.copy(path, tmp_path)

        def change(self, file, old, new):
            text = (tmp_path / file).read_text()
            assert text.count(old) == 1, (file, old)
            (tmp_path / file).write_text(text.replace(old, new))

        def run(self, name, *overrides):
            args = [tmp_path / "train.py", lab.config, f"run_dir={tmp_path / name}", *overrides]
            done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120)
            return tmp_path / name, done

    return Fork()


NEXT_UPDATE = "            # ---- update s + 1\n"


def stop_once(fork, s):
    """Have the process send itself a signal before update s + 1, where the run was not begun before."""
    start = f"            if s == {s} and start == 0: os.kill(os.getpid(), signal.SIGTERM)\n"
    fork.change("train.py", NEXT_UPDATE, start + NEXT_UPDATE)


def test_fork_with_a_metric_of_its_own(fork):
    own = "            if s % 5 == 2: log.metrics(s, {'mine': s * 1.5})\n"
    fork.change("train.py", NEXT_UPDATE, own + NEXT_UPDATE)
    stop_once(fork, 12)
    folder, done = fork.run("mine")
    assert done.returncode == 75, done.stderr
    folder, done = fork.run("mine")
    assert done.returncode == 0, done.stderr
    assert series(folder, "mine") == {s: s * 1.5 for s in range(2, N, 5)}
    assert [m["step"] for m in metrics(folder) if "mine" in m] == list(range(2, N, 5))
    assert [m["step"] for m in metrics(folder) if "train_loss" in m] == list(range(1, N + 1))


def test_fork_with_dropout(fork):
    fork.change("models.py", "self.gelu(self.c_fc(x))", "F.dropout(self.gelu(self.c_fc(x)), 0.2, self.training)")
    expected, done = fork.run("whole")
    assert done.returncode == 0, done.stderr
    stop_once(fork, 12)
    assert fork.run("stopped")[1].returncode == 75
    folder, done = fork.run("stopped")
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, expected)  # code/ is not compared: it is another


def test_fork_that_raises(fork):
    fork.change("train.py", NEXT_UPDATE, "            {}['mine' if s == 9 else s] if s == 9 else None\n" + NEXT_UPDATE)
    folder, done = fork.run("raises")
    assert (done.returncode, "KeyError: 'mine'" in done.stderr) == (1, True)
    assert (folder / "status").read_text() == "failed\n"
    assert "KeyError: 'mine'" in (folder / "main.log").read_text()


# -----------------------------------------------------------------------------
# one table of mistakes: one sentence, no traceback, nothing written

LIMIT = "9" * 5000
MISTAKES = [
    (["learning_rat=1"], "learning_rate"),
    (["model.n_hed=2"], "n_head"),
    (["train_dataset_config.pth=x"], "path"),
    (["batch_size=0"], "batch_size"),
    (["batch_size=true"], "batch_size"),
    (["compile=3"], "compile"),
    (["num_iterations=1.5"], "num_iterations"),
    (["learning_rate=.nan"], "learning_rate"),
    (["learning_rate=-1"], "learning_rate"),
    (["learning_rate=1e300"], "learning_rate"),
    (["optimizer=muon", "muon_learning_rate=1e300"], "muon_learning_rate"),
    (["muon_learning_rate=0.01"], "muon_learning_rate"),
    (["optimizer=muon", "zero_stage=1"], "zero_stage"),
    (["optimizer=sgd"], "adamw"),
    ([f"num_iterations={LIMIT}"], "num_iterations"),
    ([f"warmup_iters={'4' * 400}"], "warmup_iters"),
    ([f"seed=0x{'f' * 5000}"], "seed"),
    (["seed=[1]"], "seed"),
    (["dtype=float64"], "float32"),
    (["dtype=float16"], "float16"),
    (["zero_stage=2"], "zero_stage"),
    (["betas=[0.9]"], "betas"),
    (["betas=[0.9, 1.5]"], "betas"),
    (["device=tpu"], "device"),
    (["device=cuda:77"], "cuda:77"),
    (["micro_batch_size=3"], "micro_batch_size"),
    (["checkpoint_steps=[25]"], "checkpoint_steps"),
    (["checkpoint_steps=[-1]"], "checkpoint_steps"),
    (["model.n_head=3"], "n_head"),
    (["model.n_layer=true"], "n_layer"),
    (["model.model_type=Bert"], "LlamaSimpleMLP"),
    (["model=null"], "model"),
    (["model.block_size=16"], "block_size"),
    (["train_dataset_config.n_ctx=32"], "n_ctx"),
    (["model.vocab_size=299"], "vocab_size"),
    (["train_dataset_config.path=nowhere", "val_dataset_config.path=nowhere"], "prepare_data.py"),
    (["train_dataset_config=null"], "train_dataset_config"),
    (["from_pretrained=nowhere/at/all.pt"], "nowhere"),
    (["branch_step=3"], "branch_from"),
    (["branch_from=nowhere", "branch_step=3"], "nowhere"),
    (["run_dir=a\0b"], "run_dir"),
    (["--compile"], "--compile"),
    (["compile"], "key=value"),
    (["wandb_project=[]"], "wandb_project"),
]


@pytest.mark.parametrize("overrides, word", MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes(lab, tmp_path, overrides, word):
    new = [] if any("run_dir" in o for o in overrides) else [f"output_dir={tmp_path / 'runs'}"]
    result = lab.run(*new, *overrides)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1), result
    assert result.err.startswith("train: ") and word in result.err and len(result.err) < 600, result.err
    assert list(tmp_path.iterdir()) == []


YAMLS = {
    "duplicate key": (lambda text: text + "learning_rate: 1\n", "learning_rate"),
    "alias bomb": (lambda text: text + "a: &a [1]\nb: &b [" + "*a," * 99 + "]\nc: [" + "*b," * 99 + "]\n", "alias"),
    "both forms": (lambda text: text + "data: {dataset_name: x}\n", "data"),
    "not a mapping": (lambda text: "- 1\n", "mapping"),
    "not YAML": (lambda text: "a: [", "YAML"),
    "surrogate": (lambda text: text + 'wandb_project: "\\ud800"\n', "wandb_project"),
    "missing": (lambda text: text.replace("batch_size: 4\n", ""), "batch_size"),
}


@pytest.mark.parametrize("what", YAMLS)
def test_mistakes_in_the_file(lab, tmp_path, what):
    change, word = YAMLS[what]
    result = lab.run(f"output_dir={tmp_path / 'runs'}", config=lab.write(change(lab.config.read_text())))
    assert (result.code, result.err.count("\n"), word in result.err) == (1, 1, True), result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "env",
    [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"RANK": "3"}, {"RANK": "-1"}, {"WORLD_SIZE": "3", "RANK": "0"}],
    ids=str,
)
def test_impossible_ranks(lab, tmp_path, env):
    result = lab.run(f"output_dir={tmp_path / 'runs'}", env=env)
    assert (result.code, result.err.count("\n")) == (1, 1), result.err
    assert list(tmp_path.iterdir()) == []


DATA = {
    "a shard is cut short": (lambda d: os.truncate(next(d.glob("train_*.bin")), 1500), "train_0000"),
    "a shard is gone": (lambda d: next(d.glob("val_*.bin")).unlink(), "val_0000"),
    "another tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
    "no dataset.json": (lambda d: (d / "dataset.json").unlink(), "hf_tokenizer_path"),
    "empty": (lambda d: [p.unlink() for p in d.iterdir()], "prepare_data.py"),
}


@pytest.mark.parametrize("what", DATA)
def test_damaged_data(lab, tmp_path, what):
    change, word = DATA[what]
    shutil.copytree(lab.root / "data", tmp_path / "data")
    change(tmp_path / "data")
    paths = [f"{section}.path={tmp_path / 'data'}" for section in SECTIONS]
    result = lab.run(f"output_dir={tmp_path / 'runs'}", *paths)
    assert (result.code, result.err.count("\n"), word in result.err) == (1, 1, True), result.err
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_data_prepared_again_and_foreign_ids(lab, base, tmp_path):
    data, folder = tmp_path / "data", lab.root / "old data"
    shutil.copytree(lab.root / "data", data)
    paths = [f"{section}.path={data}" for section in SECTIONS]
    interrupted(lab, folder.name, *paths)
    with open(data / "dataset.json", "a") as f:
        f.write("\n")
    result = lab.run(f"run_dir={folder}", *paths)
    assert (result.code, "prepared again" in result.err) == (1, True)
    note = lab.run(*paths, "train_dataset_config.split=train[:50%]", f"output_dir={tmp_path}", "num_iterations=1")
    assert (note.code, "another config" in note.out) == (0, True)
    (data / "dataset.json").unlink()
    shard = next(data.glob("train_*.bin"))
    raw = np.fromfile(shard, "<u2")
    raw[-100:] = 60000
    raw.tofile(shard)
    tokenizer = [f"{s}.hf_tokenizer_path={data / 'tokenizer.json'}" for s in SECTIONS]
    other = ["train_dataset_config.train_tokenizer_vocab_size=null", f"output_dir={tmp_path}", "batch_size=64"]
    result = lab.run(*paths, *tokenizer, *other)
    assert (result.code, "60000" in result.err) == (1, True), result.err


def test_exact_numbers_and_paths(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    c = train.load_config(lab.config, ["seed='9007199254740993'", "learning_rate=3e-4", "num_iterations=1e3"])
    assert (c.seed, c.learning_rate, c.num_iterations) == (9007199254740993, 3e-4, 1000)
    c = train.load_config(lab.config, ["run_dir=2026-01-01", "weight_decay='1e-1'", "batch_size=4.0"])
    assert (c.run_dir, c.weight_decay, c.batch_size) == ("2026-01-01", 0.1, 4)
    assert lab.run("num_iterations=1", "output_dir=~/runs", env={"HOME": str(tmp_path)}).code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_check_writes_nothing(lab, base, tmp_path):
    before = tree(lab.root)
    for args, says in ((["num_iterations=5"], f"{tmp_path}/out/target_models/\n"), ([f"run_dir={base}"], f"{base}\n")):
        done = run("train.py", "--check", lab.config, *args, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, says), done.stderr
    done = run("train.py", "--check", lab.config, "batch_size=3", cwd=tmp_path, env={"WORLD_SIZE": "2"})
    assert (done.returncode, "batch_size" in done.stderr) == (1, True)
    assert (list(tmp_path.iterdir()), {k: v for k, v in tree(lab.root).items() if k in before}) == ([], before)


def test_help_names_every_key(lab):
    done = run("train.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    classes = [train.Config, prepare_data.DatasetConfig]
    keys = [name for cls in classes for name in cls.model_fields]
    keys += [f.name for model in MODEL_CLASSES.values() for f in dataclasses.fields(model.config_class)]
    assert set(keys) | set(MODEL_CLASSES) <= set(re.findall(r"\w+", done.stdout))


def test_samples_on_a_console_that_knows_ascii_alone(lab):
    result = lab.run("num_iterations=1", f"run_dir={lab.root / 'ascii'}", env={"PYTHONIOENCODING": "ascii"})
    assert result.code == 0, result.err


# what a person could have typed, and what no person would
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 0, 2**31, 2**63]),
    st.floats(),
    st.text(max_size=6),
    st.dates(),
    st.sampled_from(["3e-4", "1e999", "gpt2", "float32", "LlamaSimpleMLP", "train[:5%]"]),
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=2),
    max_leaves=4,
)
key_names = st.sampled_from([*train.Config.model_fields, *prepare_data.DatasetConfig.model_fields, *MODEL])
dotted = st.builds(lambda *p: ".".join(p), st.sampled_from(["model", *SECTIONS, "batch_size", "x"]), key_names)
overrides = st.lists(
    st.text(max_size=8)
    | st.builds("{}={}".format, dotted | key_names, scalars)
    | st.builds("{}={}".format, dotted | key_names, st.text(alphabet="!&*[]{}:,\"'-~@|>%#0x_a. ", max_size=8)),
    max_size=3,
)
edits = st.lists(
    st.tuples(st.sampled_from([None, "model", *SECTIONS]), key_names | scalars, junk, st.booleans()), max_size=3
)


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(edits, overrides, st.text(alphabet="!&*[]{}:,\"'-~@|>%#?a1. \n", max_size=12))
@example([], ["seed=!!timestamp x"], "")
@example([], ["seed=" + "[" * 1500], "")
@example([], ["model.x=&a {b: *a}"], "")
def test_no_config_is_a_stack_trace(lab, edits, overrides, tail):
    config = copy.deepcopy(lab.base)
    for section, name, value, delete in edits:
        target = config.get(section, config) if section else config
        if isinstance(target, dict):
            if delete:
                target.pop(name, None)
            else:
                target[name] = value
    path = lab.root / "fuzz.yaml"
    path.write_text(yaml.safe_dump(config) + tail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert isinstance(train.load_config(path, overrides), train.Config)
        except prepare_data.UserError as e:
            assert str(e) and len(str(e)) < 2000
