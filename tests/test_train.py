"""train.py as its users meet it: folders, numbers, ranks, interruptions, seeds, precisions, mistakes, W&B."""

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from wandb_server import Server

import prepare_data
import train
from models import MODEL_CLASSES

ROOT = Path(__file__).resolve().parent.parent
N, B, T = 24, 4, 32  # updates, sequences in a batch, tokens in a sequence
KEPT = [0, 1, 2, 4, 8, 16, 24]  # checkpoints of a run of N updates
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
    "sample_every": 0,
    "train_log_every": 5,
    "resume_every": 3,
    "intermediate_checkpoints": True,
    "compile": False,
    "device": "cpu",
    "model": {
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
    },
    "train_dataset_config": {"split": "train[:90%]", "train_tokenizer_vocab_size": 300, "n_ctx": T + 1},
    "val_dataset_config": {"split": "train[90%:]", "n_ctx": T + 1},
}
SECTIONS = "model", "train_dataset_config", "val_dataset_config"
EAGER_FORK = ["train", "torch._dynamo", "matplotlib.pyplot", "tokenizers", "pytest", "hypothesis"]


# -----------------------------------------------------------------------------
# the laboratory: one corpus, and train.py run on it as a program


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


def in_child(argv, cwd, env, output, trap):
    """`python train.py ARGV` in a process forked after the imports, which take longer than a whole run here.

    A trap (function, n, signals) sends the process the signals when it calls the function for the nth time; a trap
    (callable, *arguments) is called first.
    """
    os.chdir(cwd)
    os.environ.update(env)
    for fd, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{output}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    if trap and callable(trap[0]):
        trap[0](*trap[1:])
    elif trap:
        place, nth, numbers = trap
        owner, name = place.rsplit(".", 1)
        owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
        original = getattr(owner, name)

        def trapped(*args, **kwargs):
            if next(calls) == nth:
                for i, number in enumerate(numbers):
                    time.sleep(1.2 if i else 0)
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
        for section in SECTIONS[1:]:
            self.base[section] |= {"name": str(root / "corpus.jsonl"), "path": str(root / "data")}
        self.config = self.write(self.base)
        sections = prepare_data.dataset_configs(self.base)
        prepare_data.prepare(sections, 300, workers=1, shard_tokens=10_000)  # several shards
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(EAGER_FORK)

    def write(self, config) -> Path:
        """A new file with `config`, a mapping or the text itself."""
        path = self.root / f"config{next(self.count)}.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return path

    def start(self, *overrides, config=None, cwd=None, env=None, ranks=1, traps=None):
        """Start train.py, on several ranks without torchrun's help: (processes, where their output goes)."""
        started = []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            world = {k: str(v) for k, v in world.items()} | {"MASTER_PORT": str(port)} if ranks > 1 else {}
            output = self.root / f"output{next(self.count)}"
            args = [str(config or self.config), *overrides], cwd or self.root, world | (env or {}), output
            process = self.processes.Process(target=in_child, args=(*args, (traps or {}).get(rank)), daemon=True)
            process.start()
            started.append((process, output))
        return started

    def finish(self, started, seconds=60) -> list[Result]:
        """Wait for all ranks."""
        results, deadline = [], time.monotonic() + seconds
        for process, _ in started:
            process.join(max(0, deadline - time.monotonic()))
        for process, output in started:
            if process.exitcode is None:
                process.kill()
                process.join()
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


@pytest.fixture(scope="module")
def lab(tmp_path_factory, one_thread):  # as the runs have, so that sums are in the same order
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", str(ROOT))  # for the imports before the fork
        for name in ("SPD_OUT_DIR", "WANDB_MODE", "WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield Lab(tmp_path_factory.mktemp("lab"))


def script(args, cwd, **env):
    """Run a Python program for real."""
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def base(lab):
    """The folder of the run that the others are compared with, and what its console showed."""
    done = script([ROOT / "train.py", lab.config, "sample_every=12"], lab.root, SPD_OUT_DIR=str(lab.root / "spd"))
    assert done.returncode == 0, done.stderr
    (folder,) = (lab.root / "spd" / "target_models").iterdir()
    return folder, done.stdout


@pytest.fixture(scope="module")
def base2(lab):
    """The same on two ranks under torchrun."""
    folder = lab.root / "two ranks"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = script([*torchrun, lab.config, f"run_dir={folder}"], lab.root)
    assert done.returncode == 0, done.stderr
    return folder


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


def parts(folder: Path) -> list[Path]:
    """What was left behind of files that appear whole or not at all."""
    return [p for p in folder.rglob("*") if ".part" in p.name or p.name.startswith(".")]


def assert_same_run(folder: Path, expected: Path):
    """All that was computed is the same to the bit, and nothing tells of interruptions."""
    assert metrics(folder) == metrics(expected)
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (folder, expected)]
    assert names[0] == names[1]
    for step in (int(re.search(r"\d+", n)[0]) for n in names[0]):
        assert equal(weights(folder, step), weights(expected, step)), step
    assert (folder / "status").read_text() == "finished\n"
    assert (folder / "loss.png").exists()
    assert parts(folder) == []


def assert_close_run(folder: Path, expected: Path):
    """The same numbers, but for the order of sums."""
    assert series(folder, "train_loss") == pytest.approx(series(expected, "train_loss"), rel=0, abs=1e-4)
    assert series(folder, "val_loss") == pytest.approx(series(expected, "val_loss"), rel=0, abs=1e-5)
    assert sorted(series(folder, "train_loss")) == list(range(1, N + 1))


# -----------------------------------------------------------------------------
# what a run leaves behind


def test_run_folder(lab, base):
    folder, console = base
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    names = "final_config.yaml model_config.yaml tokenizer.json main.log metrics.jsonl loss.png resume.pt checkpoints"
    assert set(names.split()) <= {p.name for p in folder.iterdir()}
    assert parts(folder) == []
    assert (folder / "tokenizer.json").read_bytes() == (lab.root / "data" / "tokenizer.json").read_bytes()
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "main.log").read_text() == console  # losses, samples, everything that people were told
    for word in ("6,640 parameters", f"{N} updates", f"{B * T} tokens", "epochs", "cpu", "float32", str(folder)):
        assert word in console
    logged = [int(s) for s in re.findall(rf"step (\d+)/{N} \| loss [\d.]+ .*lr .* ms .*tokens/s .*ETA", console)]
    assert logged == [1, 5, 10, 15, 20, 24]  # the first, every train_log_every, the last
    assert [int(s) for s in re.findall(r"step (\d+)/\d+ \| sample:", console)] == [0, 12, 24]


def test_configs_in_the_run_folder_are_complete(lab, base):
    final, model = (yaml.safe_load((base[0] / f"{name}_config.yaml").read_text()) for name in ("final", "model"))
    assert list(final) == [f.name for f in dataclasses.fields(train.Config)]
    for section in SECTIONS[1:]:
        assert list(final[section]) == [f.name for f in dataclasses.fields(prepare_data.DatasetConfig)]
    cls = MODEL_CLASSES["LlamaSimpleMLP"].config_class
    assert list(model) == [f.name for f in dataclasses.fields(cls)]  # SPD's model_config.yaml forbids others
    assert model == final["model"] == dataclasses.asdict(cls(**BASE["model"]))


def test_final_config_runs_again_to_the_same_numbers(lab, base):
    again = lab.train("again", config=base[0] / "final_config.yaml")
    assert_same_run(again, base[0])


def test_checkpoints_are_plain_state_dicts(base):
    folder = base[0]
    found = sorted(int(re.fullmatch(r"model_step_(\d+)\.pt", p.name)[1]) for p in (folder / "checkpoints").iterdir())
    assert found == KEPT
    for step in KEPT:
        model = MODEL_CLASSES["LlamaSimpleMLP"](MODEL_CLASSES["LlamaSimpleMLP"].config_class(**BASE["model"]))
        first = copy.deepcopy(model.state_dict())
        model.load_state_dict(weights(folder, step), strict=True)
        assert equal(first, model.state_dict()) == (step == 0)  # the initial model, of init_seed 42
    state = torch.load(folder / "resume.pt", weights_only=True)
    assert (state["step"], state["seen_tokens"]) == (N, N * B * T)


def test_without_intermediate_checkpoints_the_last_is_kept(lab, base):
    folder = lab.train("last only", "intermediate_checkpoints=false")
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"model_step_{N}.pt"]
    assert equal(weights(folder), weights(base[0]))


def test_schedule_of_checkpoints(lab):
    c = train.load_config(lab.config, ["num_iterations=4321"])
    early = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [s for s in range(4322) if train.is_checkpoint(s, c)] == [*early, 1000, 2000, 3000, 4000, 4321]
    c = train.load_config(lab.config, ["num_iterations=5000", "intermediate_checkpoints=false"])
    assert [s for s in range(5001) if train.is_checkpoint(s, c)] == [5000]


def test_runs_of_the_same_second_do_not_share_a_folder(lab, tmp_path):
    c = train.load_config(lab.config, [f"output_dir={tmp_path / 'runs'}"])
    folders = {train.choose_folder(c) for _ in range(5)}
    assert len(folders) == 5
    assert set((tmp_path / "runs").iterdir()) == folders


def test_inference_only_updates_nothing(lab, base):
    folder = lab.train(
        "inference", "inference_only=true", f"from_pretrained={base[0] / 'checkpoints' / 'model_step_8.pt'}"
    )
    (line,) = metrics(folder)
    assert line["step"] == 0
    assert line["val_loss"] == pytest.approx(validation_loss(lab, weights(base[0], 8)), abs=1e-6)
    assert list((folder / "checkpoints").iterdir()) == []


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


def reference(lab, rates, batch_size=B, init_seed=42, seed=0, shuffle_each_epoch=True):
    """(losses, gradient norms, final weights) of training as the design describes it, at these learning rates."""
    cls = MODEL_CLASSES["LlamaSimpleMLP"]
    model = cls(cls.config_class(**BASE["model"]), init_seed=init_seed)
    optimizer = model.configure_optimizers(BASE["weight_decay"], rates[0], (0.9, 0.95), "cpu")
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
    model = cls(cls.config_class(**BASE["model"]))
    model.load_state_dict(state)
    data = shard_tokens(lab, "val")
    there = len(data) // (T + 1)
    n = min(there, max_windows)
    batch = windows(data, [i * there // n for i in range(n)])
    with torch.no_grad():
        return model(batch[:, :-1], batch[:, 1:])[1].item()


def check_against_reference(lab, folder, **options):
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


def test_losses_and_weights_are_those_of_a_plain_loop(lab, base):
    check_against_reference(lab, base[0])


def test_epochs_go_on_without_losing_a_window(lab):
    batch = 64  # two and three quarter epochs, whose ends lie within a batch
    n_windows = len(shard_tokens(lab, "train")) // (T + 1)
    assert 2 * n_windows < N * batch < 3 * n_windows
    folder = lab.train("epochs", f"batch_size={batch}", "val_loss_every=0", "train_dataset_config.seed=3", "seed=2")
    check_against_reference(lab, folder, batch_size=batch, seed=5)
    assert series(folder, "val_loss") == {}
    options = f"batch_size={batch}", "val_loss_every=0", "train_dataset_config.shuffle_each_epoch=false"
    check_against_reference(lab, lab.train("same epochs", *options), batch_size=batch, shuffle_each_epoch=False)


def test_validation_is_of_the_weights_saved_at_its_step(lab, base):
    losses = series(base[0], "val_loss")
    assert list(losses) == [0, 7, 14, 21, N]  # at the start, every val_loss_every, at the end
    for step in (0, N):
        assert losses[step] == pytest.approx(validation_loss(lab, weights(base[0], step)), abs=1e-6)
    folder = lab.train("often", "val_loss_every=4", f"num_iterations={N}")
    for step in (4, 8, 16):
        assert series(folder, "val_loss")[step] == pytest.approx(validation_loss(lab, weights(folder, step)), abs=1e-6)
    order = [(m["step"], "val_loss" in m) for m in metrics(folder)]
    assert order == sorted(order)  # update s, then the validation after s updates


def test_bits_per_byte_counts_bytes_of_text(lab, base):
    n_bytes = sum(len(d.encode()) for d in lab.documents[108:])  # train[90%:] of 120
    nats = {s: v * len(shard_tokens(lab, "val")) for s, v in series(base[0], "val_loss").items()}
    expected = {s: v / math.log(2) / n_bytes for s, v in nats.items()}
    assert series(base[0], "bits_per_byte") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("warmup, updates", [(0, 10), (1, 10), (5, 10), (9, 10), (10, 10), (15, 10), (0, 1), (1, 1)])
def test_learning_rate(lab, warmup, updates):
    options = [f"warmup_iters={warmup}", f"num_iterations={updates}", "learning_rate=3e-4"]
    c = train.load_config(lab.config, [*options, "learning_rate_decay_frac=0.1"])
    rates = [train.learning_rate_at(s, c) for s in range(1, updates + 1)]
    assert rates == pytest.approx([reference_lr(s, 3e-4, warmup, updates, 0.1) for s in range(1, updates + 1)])
    if 0 < warmup <= updates:
        assert rates[warmup - 1] == max(rates) == 3e-4
    if warmup < updates:
        assert rates[-1] == 3e-4 * 0.1  # reached, exactly, by the last update
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


# -----------------------------------------------------------------------------
# ranks and micro-batches


def test_two_ranks_compute_the_same(base, base2):
    assert_close_run(base2, base[0])
    assert parts(base2) == []


@pytest.mark.parametrize("micro, ranks", [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_micro_batches_compute_the_same(lab, base, micro, ranks):
    assert_close_run(lab.train(f"micro {micro} {ranks}", f"micro_batch_size={micro}", ranks=ranks), base[0])


@pytest.mark.parametrize("n_windows, ranks", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_a_small_validation_split_is_used_whole(lab, n_windows, ranks):
    """Fewer windows than val_max_steps * batch_size, and even than ranks; the shard is a foreign one."""
    tokens = shard_tokens(lab, "val")[: n_windows * (T + 1) + 5]
    folder = lab.root / f"val {n_windows} {ranks}"
    folder.mkdir()
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (folder / "any_val_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    both = [f"{s}.{k}" for s in SECTIONS[1:] for k in ("train_tokenizer_vocab_size=null", "hf_tokenizer_path=")]
    overrides = [o + str(lab.root / "data" / "tokenizer.json") if o.endswith("path=") else o for o in both]
    overrides += [f"val_dataset_config.path={folder}", "num_iterations=2", "micro_batch_size=2"]
    run = lab.train(f"small {n_windows} {ranks}", *overrides, ranks=ranks)
    cls, batch = MODEL_CLASSES["LlamaSimpleMLP"], windows(tokens, range(n_windows))
    with torch.no_grad():
        expected = cls(cls.config_class(**BASE["model"]))(batch[:, :-1], batch[:, 1:])[1].item()
    assert series(run, "val_loss")[0] == pytest.approx(expected, abs=1e-5)
    assert "bits_per_byte" not in metrics(run)[0]  # nobody knows how much text these tokens were


def test_zero_stage_1_computes_the_same_and_resumes(lab, base2):
    whole = lab.train("zero", "zero_stage=1", ranks=2)
    assert_close_run(whole, base2)
    options = {"ranks": 2, "traps": {1: ("prepare_data.Shards.windows", 14, [signal.SIGUSR1])}}
    assert lab.run("zero_stage=1", f"run_dir={lab.root / 'zero again'}", **options).code == 75
    assert_same_run(lab.train("zero again", "zero_stage=1", ranks=2), whole)


# -----------------------------------------------------------------------------
# interruptions

READS = "prepare_data.Shards.windows"


def interrupted(lab, name, *overrides, reads=14, number=signal.SIGTERM, **options) -> Path:
    """The folder of a run that a signal stopped at a read of its data."""
    result = lab.run(*overrides, f"run_dir={lab.root / name}", traps={0: (READS, reads, [number])}, **options)
    assert result.code == 75, result.err
    return lab.root / name


def test_killed_again_and_again(lab, base):
    """SIGKILL at random calls of what writes and reads, and at random moments, then the same command."""
    rng, name, kills = random.Random(0), "killed 0", 0
    points = {"os.fsync": 25, "os.replace": 15, "torch.save": 6, READS: 14}
    while kills < 12:
        point = rng.choice([*points, None])
        trap = (point, rng.randint(1, points[point]), [signal.SIGKILL]) if point else None
        started = lab.start(f"run_dir={lab.root / name}", traps={0: trap})
        if not trap:
            time.sleep(rng.uniform(0.1, 0.4))
            started[0][0].kill()
        (result,) = lab.finish(started)
        assert "Traceback" not in result.err
        if result.code == 0:  # it outlived the trap
            assert_same_run(lab.root / name, base[0])
            name = f"killed {kills}"
        else:
            assert result.code == -signal.SIGKILL
            kills += 1
    assert_same_run(lab.train(name), base[0])


def test_killed_on_two_ranks(lab, base2):
    """Either rank dies: the other does not wait for it, and the same command goes on."""
    for dies, reads in ((0, 9), (1, 12)):
        trap = {dies: (READS, reads, [signal.SIGKILL])}
        results = lab.finish(lab.start(f"run_dir={lab.root / 'killed 2'}", ranks=2, traps=trap), seconds=30)
        assert all(r.code != 0 for r in results)
    assert_same_run(lab.train("killed 2", ranks=2), base2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_end_the_update_in_hand(lab, base, number):
    folder = interrupted(lab, f"signal {number}", number=number)
    assert (folder / "status").read_text() == "interrupted\n"
    done = torch.load(folder / "resume.pt", weights_only=True)["step"]
    assert 0 < done < N
    lines = metrics(folder)
    assert max(m["step"] for m in lines) == done  # what is done is on disk
    assert f"after update {done}" in (folder / "main.log").read_text().splitlines()[-1]
    result = lab.run(f"run_dir={folder}")
    assert (result.code, f"continuing after update {done}" in result.out) == (0, True)
    assert_same_run(folder, base[0])


def test_a_second_ctrl_c_ends_at_once(lab, base):
    folder = lab.root / "impatient"
    slow_update = "torch.nn.utils.clip_grad_norm_", 8, [signal.SIGINT, signal.SIGINT]  # the second 1.2 s later
    result = lab.run(f"run_dir={folder}", traps={0: slow_update})
    assert result.code != 0
    assert "Traceback" not in result.err
    assert (folder / "status").read_text() == "interrupted\n"
    assert_same_run(lab.train("impatient"), base[0])


def test_a_signal_on_one_rank_stops_both_and_one_rank_goes_on(lab, base, base2):
    folder, alone = lab.root / "stopped 2", lab.root / "stopped 2, on 1"
    results = lab.finish(lab.start(f"run_dir={folder}", ranks=2, traps={1: (READS, 9, [signal.SIGTERM])}))
    assert [r.code for r in results] == [75, 75], results
    assert (folder / "status").read_text() == "interrupted\n"
    shutil.copytree(folder, alone)
    assert_same_run(lab.train(folder.name, ranks=2), base2)
    assert_close_run(lab.train(alone.name), base[0])


def test_a_finished_run_is_recognised(lab, base):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in base[0].rglob("*") if p.is_file()}
    result = lab.run("sample_every=12", f"run_dir={base[0]}")
    assert (result.code, result.out.count("\n"), result.err) == (0, 1, "")
    assert "finished" in result.out
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in base[0].rglob("*") if p.is_file()} == before


def test_another_config_is_refused_naming_the_keys(lab, base):
    folder = interrupted(lab, "other config", reads=9)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    result = lab.run(f"run_dir={folder}", "learning_rate=1e-3", "model.n_layer=2", "init_seed=7", "train_log_every=2")
    assert (result.code, result.err.count("\n")) == (1, 1)
    for key in ("learning_rate", "model.n_layer", "init_seed"):
        assert re.search(rf"\b{re.escape(key)} .+? there, .+? here", result.err), result.err
    assert "train_log_every" not in result.err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    # what cannot change the result may change
    free = ["train_log_every=2", "micro_batch_size=2", "resume_every=5", f"output_dir={lab.root / 'x'}"]
    result = lab.run(f"run_dir={folder}", *free)
    assert (result.code, "continuing after update" in result.out) == (0, True), result.err
    assert_close_run(folder, base[0])


def damage(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_state_is_reported_and_the_one_before_it_used(lab, base):
    folder = interrupted(lab, "damaged")
    last, before = (torch.load(folder / f"resume{x}.pt", weights_only=True)["step"] for x in ("", ".previous"))
    assert before < last
    damage(folder / "resume.pt")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 99, "train_l')  # and a line was cut short
    result = lab.run(f"run_dir={folder}")
    assert result.code == 0
    assert "resume.pt is damaged" in result.err
    assert f"continuing after update {before}" in result.out
    assert_same_run(folder, base[0])


def test_no_state_left_begins_again(lab, base):
    folder = interrupted(lab, "damaged twice")
    damage(folder / "resume.pt")
    (folder / "resume.previous.pt").write_bytes(b"")
    result = lab.run(f"run_dir={folder}")
    assert (result.code, "continuing" in result.out) == (0, False)
    assert result.err.endswith("holds no whole state: the run begins again\n")
    assert_same_run(folder, base[0])


def test_a_damaged_state_does_not_displace_the_one_before_it(lab, base):
    """Killed while it saves for the first time after a damaged resume.pt, a run still has the state before that."""
    folder = interrupted(lab, "damaged, then killed")
    damage(folder / "resume.pt")
    before = torch.load(folder / "resume.previous.pt", weights_only=True)["step"]
    save = ("torch.save", 1 + sum(before < s <= before + 3 for s in KEPT), [signal.SIGKILL])  # checkpoints come first
    assert lab.run(f"run_dir={folder}", traps={0: save}).code == -signal.SIGKILL
    result = lab.run(f"run_dir={folder}")
    assert f"continuing after update {before}" in result.out, result.err
    assert_same_run(folder, base[0])


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_a_state_that_does_not_fit_on_the_disk_does_not_end_training(lab, base):
    folder = lab.root / "full"
    started = lab.start(f"run_dir={folder}")
    resource.prlimit(started[0][0].pid, resource.RLIMIT_FSIZE, (60_000, 60_000))  # resume.pt needs more, nothing else
    (result,) = lab.finish(started)
    assert result.code not in (0, 75)  # but the run does not pass for finished
    assert "Traceback" not in result.out + result.err, result.err
    assert "could not save" in result.out + result.err
    assert metrics(folder) == metrics(base[0])
    assert weights(folder, 16).keys() == weights(base[0], 16).keys()
    assert_same_run(lab.train("full"), base[0])


# -----------------------------------------------------------------------------
# seeds


@pytest.mark.parametrize("init_seed, seed", [(7, 0), (42, 5)])
def test_seeds_of_weights_and_order_are_apart(lab, base, init_seed, seed):
    folder = lab.train(f"seeds {init_seed} {seed}", f"init_seed={init_seed}", f"seed={seed}")
    check_against_reference(lab, folder, init_seed=init_seed, seed=seed)
    assert equal(weights(folder, 0), weights(base[0], 0)) == (init_seed == 42)
    assert metrics(folder) != metrics(base[0])


def test_sample_seed_changes_the_samples_alone(lab, base):
    folder = lab.train("samples", "sample_every=12", "sample_seed=1")
    samples = [re.findall(r"sample:\n(.*?)\n\n", (f / "main.log").read_text(), re.S) for f in (folder, base[0])]
    assert len(samples[0]) == len(samples[1]) == 3
    assert all(a != b for a, b in zip(*samples, strict=True))
    assert_same_run(folder, base[0])


# -----------------------------------------------------------------------------
# precision, compilation, health


def test_bfloat16_is_close_and_resumes_to_the_bit(lab, base):
    short = "dtype=bfloat16", "num_iterations=6", "batch_size=2", "val_max_steps=1"
    whole, exact = lab.train("bf16", *short), lab.train("f32", *short, "dtype=float32")
    for name, tolerance in (("train_loss", 0.02), ("val_loss", 0.02)):
        a, b = series(whole, name), series(exact, name)
        assert a == pytest.approx(b, rel=0, abs=tolerance)
        assert all(a[s] != b[s] for s in a)  # under autocast, in validation too
    assert all(v.dtype == torch.float32 for v in weights(whole, 6).values())
    assert_same_run(lab.train(interrupted(lab, "bf16 again", *short, reads=5).name, *short), whole)


def test_compiled_is_close_to_eager_and_resumes_to_the_bit(lab, base):
    folder = lab.root / "compiled"
    options = [lab.config, f"run_dir={folder}", "compile=true"]
    done = script([ROOT / "train.py", *options], lab.root, TORCH_LOGS="recompiles")
    assert done.returncode == 0, done.stderr
    assert re.search(r"torch.compile: done", done.stdout)
    assert_close_run(folder, base[0])
    # set-up compiles what training runs, rather than something that update 1 has to compile again
    reasons = re.findall(r"__recompiles\] +- (.*)", done.stderr)
    assert len(reasons) == 1 and "grad_mode" in reasons[0], reasons  # validation's graph, and nothing else
    again = interrupted(lab, "compiled again", "compile=true")
    assert_same_run(lab.train(again.name, "compile=true"), folder)


def counting_syncs(note: Path):
    """Write, at the end, how often a tensor was asked for its value: on a GPU each time is a wait for the device."""
    calls = dict.fromkeys(("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"), 0)

    def counted(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in calls:
        setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    exit_ = sys.exit
    sys.exit = lambda *args: (note.write_text(json.dumps(calls)), exit_(*args))


def test_the_device_is_not_waited_for_between_log_lines(lab):
    """As many values are asked for in 20 updates as in 100, where nothing but the first and the last is logged."""
    options = "train_log_every=1000", "val_loss_every=0", "resume_every=0", "intermediate_checkpoints=false"
    options += "grad_clip=1.0", "warmup_iters=0", "learning_rate=1e-3"
    seen = []
    for updates in (20, 100):
        note = lab.root / f"syncs {updates}"
        lab.train(f"{updates} updates", *options, f"num_iterations={updates}", traps={0: (counting_syncs, note)})
        seen.append(json.loads(note.read_text()))
    assert seen[0]["tolist"] == 2
    assert seen[1] == seen[0]


def test_without_a_compiler_training_goes_on_eager(lab, base, tmp_path):
    env = {"PATH": str(tmp_path), "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = lab.run("compile=true", f"run_dir={lab.root / 'no compiler'}", env=env)
    assert result.code == 0, result.err
    assert len(re.findall(r"^torch.compile does not work here \(.+\).*$", result.out, re.M)) == 1
    assert "Traceback" not in result.out + result.err
    assert_same_run(lab.root / "no compiler", base[0])


@pytest.mark.parametrize("ranks, saves", [(1, 1), (1, 0), (2, 1)])
def test_what_is_not_finite_ends_the_run_before_the_weights(lab, ranks, saves):
    """Seen at once where the state is saved each update, and only at the end where nothing asks for losses before."""
    folder = lab.root / f"not finite {ranks} {saves}"
    options = "learning_rate=1e30", "grad_clip=null", "warmup_iters=0", "val_loss_every=0", "train_log_every=100"
    options += f"resume_every={saves}", f"intermediate_checkpoints={'true' if saves else 'false'}", f"run_dir={folder}"
    result = lab.run(*options, ranks=ranks)
    assert result.code not in (0, 75)
    assert re.match(r"train: update 2 ", result.err.splitlines()[-1]), result.err
    assert (folder / "main.log").read_text().splitlines()[-1].startswith("train: update 2 ")
    assert (folder / "status").read_text() == "failed\n"
    assert "Traceback" not in result.err
    assert [m["step"] for m in metrics(folder)] == [1]
    assert (folder / "resume.pt").exists() == bool(saves)
    if saves:
        state = torch.load(folder / "resume.pt", weights_only=True)
        assert state["step"] == 1
        assert equal(state["model"], weights(folder, 1))
        assert all(v.isfinite().all() for v in state["model"].values())
        assert not (folder / "checkpoints" / "model_step_2.pt").exists()


def test_shards_of_another_config_are_said_to_be(lab):
    """They train all the same: their source may lie elsewhere by now."""
    options = "num_iterations=1", "val_dataset_config.split=train[95%:]", "train_dataset_config.column_name=story"
    folder = lab.root / "another config"
    result = lab.run(*options, f"run_dir={folder}")
    notes = [line for line in (folder / "main.log").read_text().splitlines() if line.startswith("note: ")]
    assert result.code == 0 and [line for line in result.out.splitlines() if line.startswith("note: ")] == notes
    assert (
        notes[0]
        == f"note: {lab.root / 'data'} was prepared from another config: column_name 'text' there, 'story' here"
    )
    assert notes[1].endswith("split 'train[90%:]' there, 'train[95%:]' here") and len(notes) == 2
    result = lab.run(lab.config, *options, config="--check")
    assert result.code == 0 and result.err.splitlines() == notes and result.out.count("\n") == 1


# -----------------------------------------------------------------------------
# mistakes


def refused(lab, cwd, *overrides, **options) -> str:
    """The one line that a run ends with which writes nothing."""
    before = {p: p.stat().st_mtime_ns for p in cwd.rglob("*")}
    result = lab.run(*overrides, cwd=cwd, **options)
    assert result.code not in (0, 75), result.out
    assert result.out == ""
    assert "Traceback" not in result.err, result.err
    assert re.fullmatch(r"train: .+\n", result.err), result.err
    assert {p: p.stat().st_mtime_ns for p in cwd.rglob("*")} == before
    return result.err


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "cannot read the config"),
        ("batch_size: [1", "not YAML"),
        ("batch_size: !!bool x", "not YAML"),
        ("batch_size: 4\x00", "not YAML"),
        ("- batch_size\n", "mapping"),
        ("batch_size", "mapping"),
        ("", "mapping"),
        ("batch_size: 4\n", "missing key"),
    ],
)
def test_what_is_no_config(lab, tmp_path, text, says):
    config = lab.write(text) if text is not None else "nowhere.yaml"
    assert says in refused(lab, tmp_path, config=config)


BAD = {
    # unknown: the nearest key is named
    "batch_sise=4": r"batch_sise.*nearest.* batch_size\b",
    "model.n_layr=4": r"model.n_layr.*nearest.* model.n_layer\b",
    "train_dataset_config.nctx=33": r"train_dataset_config.nctx.*nearest.* train_dataset_config.n_ctx\b",
    "model.model_type=GPT3": r"model_type.*LlamaSimpleMLP.*GPT3",
    # of another type
    "batch_size=four": r"batch_size .*whole number.*'four'",
    "batch_size=2.5": r"batch_size .*whole number.*2\.5",
    "batch_size=null": r"batch_size .*whole number.*None",
    "compile=maybe": r"compile .*true or false.*'maybe'",
    "learning_rate=fast": r"learning_rate .*number.*'fast'",
    "learning_rate=.nan": r"learning_rate .*finite",
    "learning_rate=.inf": r"learning_rate .*finite",
    "model.n_embd=wide": r"model.n_embd .*whole number.*'wide'",
    "model.flash_attention=1": r"model.flash_attention .*true or false",
    "train_dataset_config.n_ctx=[33]": r"train_dataset_config.n_ctx .*whole number",
    "model=5": r"model",
    "train_dataset_config=x": r"train_dataset_config .*section.*'x'",
    # impossible
    "batch_size=0": r"batch_size .*at least 1.*0",
    "num_iterations=0": r"num_iterations .*at least 1",
    "grad_clip=0": r"grad_clip .*above 0",
    "learning_rate=-1": r"learning_rate .*above 0.*-1",
    "learning_rate_decay_frac=1.5": r"learning_rate_decay_frac .*1\.5",
    "warmup_iters=-1": r"warmup_iters .*at least 0",
    "val_max_steps=0": r"val_max_steps .*at least 1",
    "dtype=float8": r"dtype .*float32.*bfloat16.*'float8'",
    "dtype=float16": r"float16 .*CUDA",
    "zero_stage=2": r"zero_stage 2",
    "zero_stage=true": r"zero_stage",
    "init_seed=18446744073709551616": r"init_seed",
    "sample_seed=18446744073709551616": r"sample_seed",
    "val_dataset_config.seed=9223372036854775808": r"val_dataset_config.seed",
    "model.n_head=3": r"n_embd .*16.*n_head .*3",
    "model.n_key_value_heads=3": r"n_key_value_heads",
    "model.n_ctx=16": r"n_ctx .*16.*block_size .*32",
    "model.n_layer=0": r"n_layer",
    "train_dataset_config.n_ctx=32": r"train_dataset_config.n_ctx is 32.*33",
    "val_dataset_config.n_ctx=34": r"val_dataset_config.n_ctx is 34.*33",
    "model.vocab_size=299": r"vocab_size .*299.*300",
    "micro_batch_size=3": r"batch_size 4 .*divisible.*3",
    "val_dataset_config.hf_tokenizer_path=gpt2": r"hf_tokenizer_path",
    # devices
    "device=cuda": r"cuda.*not there",
    "device=cuda:7": r"cuda:7.*not there",
    "device=cuda:200": r"device",
    "device=tpu": r"device .*'tpu'",
    "device=5": r"device .*5",
    # overrides
    "batch_size": r"'batch_size'.*key=value",
    "=4": r"key=value",
    "--batch_size=4": r"key=value",
    "batch_size.x=4": r"batch_size",
    "seed=[1": r"seed=\[1",
    "seed=!!bool x": r"seed",
    # where to begin and where to write
    "from_pretrained=nowhere": r"nowhere",
    "run_dir=a_file": r"a_file",
    "run_dir=strange": r"strange",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_values(lab, tmp_path, override):
    (tmp_path / "a_file").touch()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "final_config.yaml").write_text("- not\n- a run\n")
    assert re.search(BAD[override], refused(lab, tmp_path, override))


@pytest.mark.parametrize(
    "missing", ["learning_rate", "model", "train_dataset_config", "val_dataset_config.n_ctx", "model.model_type"]
)
def test_missing_keys(lab, tmp_path, missing):
    config = copy.deepcopy(lab.base)
    *sections, last = missing.split(".")
    del (config[sections[0]] if sections else config)[last]
    assert missing in refused(lab, tmp_path, config=lab.write(config))


def test_no_shards(lab, tmp_path):
    said = refused(lab, tmp_path, *[f"{s}.path=nowhere" for s in SECTIONS[1:]])
    assert re.search(r"nowhere.*python prepare_data.py .*config\d+\.yaml", said)


def test_ranks_that_do_not_divide_the_batch(lab, tmp_path):
    assert "divisible" in refused(lab, tmp_path, env={"RANK": "0", "WORLD_SIZE": "3"})


def test_fewer_tokens_than_a_window(lab, tmp_path):
    long = len(shard_tokens(lab, "val")) + 1
    long += long % 2
    overrides = [f"{s}.n_ctx={long + 1}" for s in SECTIONS[1:]] + [f"model.{k}={long}" for k in ("block_size", "n_ctx")]
    assert re.search(r"val shards .*fewer than one window", refused(lab, tmp_path, *overrides))


def flip(at):
    def action(folder):
        with open(folder / "train_000001.bin", "r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 4]))

    return action


DAMAGE = {
    "cut short": (lambda d: os.truncate(d / "train_000001.bin", 5000), r"train_000001.bin .*5000"),
    "cut in its header": (lambda d: os.truncate(d / "train_000001.bin", 100), r"train_000001.bin"),
    "longer": (lambda d: os.truncate(d / "train_000001.bin", 40_000), r"train_000001.bin .*40000"),
    "magic flipped": (flip(0), r"train_000001.bin .*20240520"),
    "version flipped": (flip(4), r"train_000001.bin"),
    "count flipped": (flip(8), r"train_000001.bin"),
    "gone": (lambda d: (d / "val_000000.bin").unlink(), r"val_000000.bin .*prepare_data.py"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"tokenizer.json"),
    "dataset.json cut short": (lambda d: os.truncate(d / "dataset.json", 100), r"dataset.json"),
    "empty": (lambda d: [p.unlink() for p in d.iterdir()], r"python prepare_data.py .*config\d+\.yaml"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_shards(lab, tmp_path, what):
    action, says = DAMAGE[what]
    shutil.copytree(lab.root / "data", tmp_path / "data")
    action(tmp_path / "data")
    overrides = [f"{s}.path={tmp_path / 'data'}" for s in SECTIONS[1:]]
    assert re.search(says, refused(lab, tmp_path, *overrides))


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["model.n_intermediate=64"], r"mlp.c_fc.weight \(32, 16\).*\(64, 16\)"),
        (["model.n_layer=2"], r"h\.1\."),
        (["model.n_head=4", "model.n_key_value_heads=2", "model.rotary_dim=4"], r"n_head 2 there, 4 here"),
        (["model.rotary_base=77"], r"rotary_base 10000 there, 77 here"),
        (["model.rms_norm_eps=1e-3"], r"rms_norm_eps 1e-06 there, 0.001 here"),
        (["model.rotary_adjacent_pairs=true"], r"rotary_adjacent_pairs False there, True here"),
        (["model.model_type=LlamaSimple"], r"LlamaSimple"),
        (["model={model_type: GPT2, block_size: 32, vocab_size: 300, n_embd: 16, n_head: 2, n_layer: 1}"], r"GPT2"),
    ],
)
def test_weights_of_another_model_are_refused(lab, base, tmp_path, overrides, says):
    assert re.search(says, refused(lab, tmp_path, *overrides, f"from_pretrained={base[0]}"))


def test_damaged_weights_are_refused(lab, base, tmp_path):
    for name in ("final_config.yaml", "model_config.yaml"):
        shutil.copy(base[0] / name, tmp_path)
    (tmp_path / "model_step_3.pt").write_bytes((base[0] / "checkpoints" / "model_step_8.pt").read_bytes()[:2000])
    assert "model_step_3.pt" in refused(lab, tmp_path, f"from_pretrained={tmp_path}")


def test_numbers_that_yaml_takes_for_text(lab):
    config = lab.config.read_text().replace("learning_rate: 0.003", "learning_rate: 3e-3")
    assert isinstance(yaml.safe_load(config)["learning_rate"], str)
    c = train.load_config(lab.write(config), ["num_iterations=100_000", "weight_decay=1e-1", "batch_size=4.0"])
    assert (c.learning_rate, c.num_iterations, c.weight_decay, c.batch_size) == (3e-3, 100_000, 0.1, 4)


def test_help_names_every_key(lab):
    done = lab.run(config="--help")
    assert (done.code, done.err) == (0, "")
    classes = [train.Config, prepare_data.DatasetConfig, *(c.config_class for c in MODEL_CLASSES.values())]
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert re.search(rf"\b{field.name}\b", done.out), field.name
    assert set(MODEL_CLASSES) <= set(re.findall(r"\w+", done.out))


# what a person could have typed, and what no person would
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 0, 2**31, 2**63]),
    st.floats(),
    st.text(max_size=6),
    st.dates(),
    st.binary(max_size=3),
    st.sampled_from(["3e-4", "1e999", "gpt2", "float32", "LlamaSimpleMLP", "train[:5%]"]),
)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=2),
    max_leaves=4,
)
key_names = st.sampled_from(
    [f.name for c in (train.Config, prepare_data.DatasetConfig) for f in dataclasses.fields(c)] + [*BASE["model"]]
)
dotted = st.builds(lambda *p: ".".join(p), st.sampled_from([*SECTIONS, "batch_size", "x"]), key_names) | key_names
overrides = st.lists(
    st.text(max_size=8)
    | st.builds("{}={}".format, dotted, scalars)
    | st.builds("{}={}".format, dotted, st.text(alphabet="!&*[]{}:,\"'-~@|>%#0x_a. ", max_size=8)),
    max_size=3,
)
edits = st.lists(st.tuples(st.sampled_from([None, *SECTIONS]), key_names | scalars, junk, st.booleans()), max_size=3)


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(edits, overrides, st.text(alphabet="!&*[]{}:,\"'-~@|>%#?a1. \n", max_size=12))
@example([], ["seed=!!timestamp x"], "")
@example([], ['seed=!!int ""'], "")
@example([], ["seed=" + "[" * 1500], "")
@example([], [], "seed: " + "[" * 1500)
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
    folder = lab.root / "fuzz"
    folder.mkdir(exist_ok=True)
    path = lab.root / "fuzz.yaml"
    path.write_text(yaml.safe_dump(config) + tail)
    here = os.getcwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert isinstance(train.load_config(path, overrides), train.Config)
            except prepare_data.UserError as e:
                assert str(e)
    finally:
        os.chdir(here)
    assert list(folder.iterdir()) == []


# -----------------------------------------------------------------------------
# W&B


def wandb_records(path: Path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        size, kind = struct.unpack_from("<HB", raw, at + 4)  # after the checksum; 1: whole, 2, 3, 4: its parts
        record, at = record + raw[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
LOGGED = {"train_loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "val_loss", "bits_per_byte"}


def values(items) -> dict:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def wandb_run(run: Path):
    """(run id, config, rows of history) of the folder of an offline run."""
    run_id, config, rows = None, {}, []
    for record in wandb_records(next(run.glob("*.wandb"))):
        if record.WhichOneof("record_type") == "history":
            rows.append(values(record.history.item))
        run_id = record.run.run_id or run_id
        config |= values(record.config.update) | values(record.run.config.update)
    return run_id, config, rows


def assert_logged(rows: list[dict], folder: Path):
    """W&B's history is metrics.jsonl: a row a step, in order, with nothing missing and nothing twice."""
    expected = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        expected.setdefault(line["step"], {}).update({k: v for k, v in line.items() if k != "step"})
    assert [row["_step"] for row in rows] == list(expected)
    assert [{k: v for k, v in row.items() if k in LOGGED} for row in rows] == list(expected.values())


def assert_samples(run: Path, folder: Path):
    """The newest table of samples holds all that the log tells, however often the run was interrupted."""
    newest = max(run.glob("media/table/*.table.json"), key=lambda p: int(p.name.split("_")[2]))
    data = json.loads(newest.read_text())["data"]
    logged = re.findall(r"step (\d+)/\d+ \| sample:\n(.*?)\n\n", (folder / "main.log").read_text(), re.S)
    assert data == [[int(step), text] for step, text in dict(logged).items()]
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert data == [[m["step"], m["text"]] for m in lines]


def assert_files(files: Path | dict, folder: Path):
    """SPD looks for these at the run's root."""
    wanted = [folder / f"{n}" for n in ("final_config.yaml", "model_config.yaml", "tokenizer.json")]
    for path in wanted + [folder / "checkpoints" / f"model_step_{s}.pt" for s in KEPT]:
        assert (files[path.name] if isinstance(files, dict) else (files / path.name).read_bytes()) == path.read_bytes()


def test_wandb_offline_has_everything(lab, base):
    pytest.importorskip("wandb")
    options = "wandb_project=test", "sample_every=3", "train_log_every=100", "resume_every=0"
    folder = lab.train("wandb", *options, env=OFFLINE)
    assert metrics(folder) == metrics(base[0])
    (run,) = (folder / "wandb").glob("offline-run-*")
    _, config, rows = wandb_run(run)
    assert_logged(rows, folder)
    assert_samples(run / "files", folder)
    assert_files(run / "files", folder)
    final = yaml.safe_load((folder / "final_config.yaml").read_text())
    assert {k: v for k, v in config.items() if k != "_wandb"} == final


def test_wandb_goes_on_in_the_same_run(lab, base):
    """Stopped in the update before a validation and a sample, whose row the run that goes on completes."""
    pytest.importorskip("wandb")
    options = "wandb_project=test", "sample_every=7", "resume_every=0", f"run_dir={lab.root / 'wandb continued'}"
    stop = {0: ("torch.nn.utils.clip_grad_norm_", 14, [signal.SIGTERM])}
    assert lab.run(*options, env=OFFLINE, traps=stop).code == 75
    assert lab.run(*options, env=OFFLINE).code == 0
    folder = lab.root / "wandb continued"
    assert_same_run(folder, base[0])
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    first, second = map(wandb_run, runs)
    assert first[0] == second[0] == (folder / "wandb_run_id").read_text()
    assert [row["_step"] for row in second[2]] == list(range(14, N + 1))
    assert_logged(first[2] + second[2], folder)
    assert_samples(runs[1] / "files", folder)


def test_wandb_online_and_back(lab, base, tmp_path):
    """Written to a server, stopped and continued there, then read from it, also as what another run starts from."""
    pytest.importorskip("wandb")
    server = Server()
    try:
        env = server.environment | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
        folder = lab.root / "wandb online"
        options = "wandb_project=test", "sample_every=7", "resume_every=0", f"run_dir={folder}"
        stop = {0: ("torch.nn.utils.clip_grad_norm_", 14, [signal.SIGTERM])}
        assert lab.run(*options, env=env, traps=stop).code == 75
        path = f"me/test/{(folder / 'wandb_run_id').read_text()}"
        remote = server.runs[path]
        assert remote.state == "preempted"
        result = lab.run(*options, env=env)
        assert (result.code, result.out.count("W&B failed")) == (0, 0)
        assert_same_run(folder, base[0])
        assert (remote.state, list(server.runs)) == ("finished", [path])
        assert_logged(remote.history, folder)
        assert_files(remote.files, folder)

        server.asked.clear()
        env |= {"SPD_OUT_DIR": str(tmp_path / "out")}
        result = lab.run(f"from_pretrained={path}", f"run_dir={lab.root / 'wandb tuned'}", env=env, ranks=2)
        assert result.code == 0, result.err
        assert equal(weights(lab.root / "wandb tuned", 0), weights(folder))
        assert "from " + str(tmp_path / "out" / "pretrain_cache") in result.out
        assert server.downloads().count(f"model_step_{N}.pt") == 1
        server.stop()
        results = lab.finish(
            lab.start("from_pretrained=me/test/zzzz9999", f"run_dir={tmp_path / 'x'}", env=env, ranks=2)
        )
        assert [r.code for r in results] == [1, 1]
        assert re.fullmatch(r"train: cannot reach W&B at .*\n", results[0].err)
        assert not (tmp_path / "x").exists()
    finally:
        server.stop()


def test_a_wandb_that_fails_does_not_end_the_run(lab, base, tmp_path):
    pytest.importorskip("wandb")
    env = {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
    result = lab.run("wandb_project=test", f"run_dir={lab.root / 'no wandb'}", env=env)
    assert result.code == 0, result.err
    assert len(re.findall(r"^W&B failed \(.+\).*training goes on", result.out, re.M)) == 1
    assert_same_run(lab.root / "no wandb", base[0])


@pytest.mark.parametrize("what, answers", [("graphql", 0), ("graphql", 6), ("stream", 0)])
def test_a_wandb_that_hangs_does_not_end_the_run(lab, base, tmp_path, what, answers):
    """Its server says nothing: at the start, from the first table of samples on, or when rows come."""
    pytest.importorskip("wandb")
    server = Server()
    try:
        server.faults = {what: [None] * answers + ["hang"] * 1000}
        env = server.environment | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
        env |= {"WANDB_INIT_TIMEOUT": "1", "WANDB_FINISH_TIMEOUT": "1", "WANDB_HTTP_TIMEOUT": "1"}
        folder = lab.root / f"wandb hangs {what} {answers}"
        result = lab.run("wandb_project=test", "sample_every=12", f"run_dir={folder}", env=env)
        assert result.code == 0, result.err
        assert len(re.findall(r"^W&B failed \(.+\); .*without it$", result.out, re.M)) == 1
        assert_same_run(folder, base[0])
    finally:
        server.stop()


def children(pid: int, name: str) -> list[int]:
    """The process ids of a process's children of that name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # gone meanwhile
            text = path.read_text()
            if text.startswith(f"Name:\t{name}\n") and f"\nPPid:\t{pid}\n" in text:
                found.append(int(path.parent.name))
    return found


def test_a_wandb_that_dies_does_not_end_the_run(lab, base, tmp_path):
    """Its process, which hands on what is logged, is killed once the run has begun there."""
    pytest.importorskip("wandb")
    server = Server()
    try:
        env = server.environment | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
        started = lab.start("wandb_project=test", f"run_dir={lab.root / 'wandb dies'}", env=env)
        while not server.runs:
            assert started[0][0].is_alive()
            time.sleep(0.01)
        (core,) = children(started[0][0].pid, "wandb-core")
        os.kill(core, signal.SIGKILL)
        (result,) = lab.finish(started)
        assert result.code == 0, result.err
        assert len(re.findall(r"^W&B failed \(.+\); .*without it$", result.out, re.M)) == 1
        assert_same_run(lab.root / "wandb dies", base[0])
    finally:
        server.stop()


def test_dataset_of_the_run_is_the_one_prepared(lab):
    """The shards that every number above was computed from are those that dataset.json describes."""
    about = json.loads((lab.root / "data" / "dataset.json").read_text())
    for split in ("train", "val"):
        for shard in about["splits"][split]["shards"]:
            data = (lab.root / "data" / shard["file"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
