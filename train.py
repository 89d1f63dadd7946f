"""Pretrain one of models.py's models on the shards that prepare_data.py wrote.

    python train.py configs/quickstart.yaml [key=value ...]
    torchrun --nproc_per_node=4 train.py configs/x.yaml [key=value ...]
    python train.py --help                   every key with its type and default
    python train.py --check configs/x.yaml   find what is wrong without a GPU, write nothing; print the run's folder, or
                                             the folder that a new run's would be in, with a / at its end

Same config, same weights: the order of the data does not depend on the number of ranks, on micro_batch_size or on
interruptions, and with run_dir=DIR the same command continues a run that was stopped.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel as DDP

from models import MODEL_CLASSES, load_file
from prepare_data import (
    BadShard,
    DatasetConfig,
    Shards,
    UserError,
    asked,
    build,
    dataset_configs,
    differences,
    key,
    load_encoder,
    read_config,
    whole_file,
    window_order,
    write_text,
)
from run_info import SAMPLE_TOKENS, plot_losses, pretrained_model, read_metrics

# -----------------------------------------------------------------------------
# config


@dataclasses.dataclass
class Config:
    """A run's YAML. The sections model, train_dataset_config and val_dataset_config have classes of their own."""

    model: object = key("model_type and the fields of models.<model_type>Config")
    train_dataset_config: DatasetConfig = key("the data to train on")
    val_dataset_config: DatasetConfig = key("the data to validate on")
    batch_size: int = key("sequences in the global batch, over all ranks and micro-batches", low=1, high=2**24)
    num_iterations: int = key("optimizer updates", low=1, high=2**31)
    learning_rate: float = key("the peak, reached at update warmup_iters; muon has its own", above=0)
    warmup_iters: int = key("updates of linear warm-up; a cosine follows, to num_iterations", low=0)
    learning_rate_decay_frac: float = key("the last update's learning rate as a fraction of the peak", low=0, high=1)
    weight_decay: float = key("the optimizer's, on tensors of two dimensions and more", low=0)
    grad_clip: float | None = key("greatest gradient norm; null: no clipping", above=0)
    val_loss_every: int = key("updates between validations; 0: none", low=0)
    val_max_steps: int = key("most batches of batch_size windows in a validation", low=1)
    sample_every: int = key("updates between samples of text; 0: none", low=0)
    intermediate_checkpoints: bool = key("keep weights at 0, 1, 2, 4 ... 512, 1000, 2000 ...; false: the last only")
    checkpoint_steps: list[int] | None = key("keep weights at these updates too", None)
    checkpoint_every: int = key("keep weights at 0 and every so many updates too; 0: do not", 0, low=0)
    keep_optimizer: bool = key("beside model_step_N.pt, keep the optimizer's state: optim_step_N.pt", False)
    dtype: Literal["float32", "bfloat16", "float16"] = key("precision of the matrix products; float16 on CUDA only")
    optimizer: Literal["adamw", "muon"] = key("muon: Muon for the matrices inside blocks, AdamW for the rest", "adamw")
    muon_learning_rate: float | None = key("the peak, if the optimizer is muon; null: 0.005", None, above=0)
    train_log_every: int = key("updates between lines on the console", 100, low=1)
    micro_batch_size: int | None = key("sequences per rank and forward; null: batch_size / ranks", None, low=1)
    init_seed: int = key("of the initial weights", 42, low=0, high=2**62)
    seed: int = key("of the order of the training data", 0, low=0, high=2**62)
    sample_seed: int = key("of the sampled text", 0, low=0, high=2**62)
    device: str | None = key("cpu, cuda, cuda:1, mps; null: the best there is", None)
    compile: bool = key("torch.compile the model, where that works", True)
    tensorcores: bool = key("TF32 for float32 products on CUDA", True)
    zero_stage: Literal[0, 1, 2, 3] = key("1 shards the optimizer's state over the ranks; 2 and 3 are refused", 0)
    from_pretrained: str | None = key("start from the weights of this run, checkpoint, W&B path or hub model", None)
    inference_only: bool = key("validate and sample, update nothing", False)
    output_dir: str | None = key("runs go into folders of this one; null: ${SPD_OUT_DIR:-out}/target_models", None)
    run_dir: str | None = key("the run's own folder; one that holds a stopped run of this config is continued", None)
    resume_every: int = key("updates between saves of the state to continue from; 0: only at the end", 1000, low=0)
    wandb_project: str | None = key("log to this W&B project; null: do not", None)


# what a continued run may change: none of it changes what is computed, save for the order of sums
FREE_KEYS = {
    "train_log_every",
    "micro_batch_size",
    "device",
    "compile",
    "output_dir",
    "run_dir",
    "resume_every",
    "wandb_project",
}


def load_config(path, overrides=()) -> Config:
    """The checked config of the YAML at `path` with key=value overrides. Raises UserError and writes nothing."""
    raw = read_config(path, overrides)
    datasets = dataset_configs(raw)
    model = raw.get("model")
    kind = model.get("model_type") if isinstance(model, dict) else model
    if not isinstance(kind, str) or kind not in MODEL_CLASSES:
        raise UserError(f"model.model_type must be one of {', '.join(MODEL_CLASSES)}, not {kind!r}")
    shape = build(MODEL_CLASSES[kind].config_class, model, "model.")
    config = build(Config, {**raw, "model": shape, **{f"{s}_dataset_config": c for s, c in datasets.items()}})
    for split, c in datasets.items():
        if c.n_ctx != shape.block_size + 1:
            raise UserError(
                f"{split}_dataset_config.n_ctx is {c.n_ctx}, but must be {shape.block_size + 1}, the model's + 1: a "
                "window is split into the input [:-1] and the target [1:]"
            )
    beyond = [s for s in config.checkpoint_steps or () if not 0 <= s <= config.num_iterations]
    if beyond:
        raise UserError(f"checkpoint_steps has {beyond[0]}, but the run goes from 0 to {config.num_iterations}")
    if config.zero_stage > 1:
        raise UserError(f"zero_stage {config.zero_stage} is not supported: use 0, or 1 to shard the optimizer's state")
    if config.optimizer != "muon" and config.muon_learning_rate:
        raise UserError(f"muon_learning_rate is {config.muon_learning_rate}, but optimizer is not muon: leave it out")
    if config.optimizer == "muon" and config.zero_stage:
        raise UserError("optimizer muon keeps its state whole: zero_stage must be 0, or the optimizer adamw")
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer muon needs torch 2.9 or later, and this is {torch.__version__}: use adamw")
    return config


def print_help() -> None:
    """Every key with its type, default and meaning, from the dataclasses above."""
    print(__doc__)
    for title, cls in (("", Config), ("train_dataset_config, val_dataset_config", DatasetConfig)):
        print(f"keys{' of ' + title if title else ''}:")
        for f in dataclasses.fields(cls):
            kind = " | ".join(map(str, get_args(f.type))) if get_origin(f.type) is Literal else f.type
            kind = getattr(kind, "__name__", str(kind))
            default = "required" if f.default is dataclasses.MISSING else f"default {json.dumps(f.default)}"
            print(f"  {f.name} ({kind}, {default}): {f.metadata['help']}")
    for name, cls in MODEL_CLASSES.items():
        fields = ", ".join(f"{f.name}={json.dumps(f.default)}" for f in dataclasses.fields(cls.config_class)[1:])
        print(f"keys of model, model_type {name}: {fields}")


# -----------------------------------------------------------------------------
# small pure helpers


MUON_LEARNING_RATE = 0.005  # of 0.002, 0.003, 0.005 and 0.008 the one with the least loss: README, Muon


def learning_rate_at(s: int, c: Config) -> float:
    """The learning rate of update s = 1 ... num_iterations."""
    peak = c.learning_rate if c.optimizer == "adamw" else c.muon_learning_rate or MUON_LEARNING_RATE
    if s <= c.warmup_iters:
        return peak * s / c.warmup_iters
    least = peak * c.learning_rate_decay_frac
    progress = (s - c.warmup_iters) / (c.num_iterations - c.warmup_iters)
    return least + (peak - least) * (1 + math.cos(math.pi * progress)) / 2


def is_checkpoint(s: int, c: Config) -> bool:
    """Whether the weights after s updates are kept."""
    early = s < 1000 and s & (s - 1) == 0  # 0, 1, 2, 4 ... 512
    asked = s in (c.checkpoint_steps or ()) or (c.checkpoint_every and s % c.checkpoint_every == 0)
    return bool(s == c.num_iterations or asked or (c.intermediate_checkpoints and (early or s % 1000 == 0)))


def due(s: int, every: int, last: int) -> bool:
    """Whether what happens every `every` updates (0: never), at the start and at the end, happens after update s."""
    return every > 0 and (s % every == 0 or s == last)


def choose_device(wanted: str | None, local_rank: int) -> torch.device:
    """The device of this rank. Raises UserError if it is not there."""
    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device must be cpu, cuda, cuda:N or mps, not {wanted!r}")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(f"device {wanted} for several ranks: leave out the number, each rank takes its own GPU")
        if not 0 <= index < torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(
                f"device cuda:{index} is not there: this machine shows {found} GPUs; set device=cpu or fewer ranks"
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there: set device=cpu")
    return device


def config_dict(c: Config) -> dict:
    """The config as plain values, every default spelled out; without run_dir, so that to run it again is a new run."""
    return {**dataclasses.asdict(c), "run_dir": None}


def parent_of_runs(c: Config) -> Path:
    """The folder in which runs without a run_dir get theirs."""
    return Path(c.output_dir or Path(os.environ.get("SPD_OUT_DIR") or "out") / "target_models")


def check_folder(c: Config) -> None:
    """Raise UserError if run_dir holds another run."""
    path = Path(c.run_dir) / "final_config.yaml"
    if not path.exists():
        return
    try:
        there = config_dict(load_config(path))  # keys that are newer than the run have their defaults
    except UserError:
        there = read_config(path)
    if differ := differences(there, config_dict(c), FREE_KEYS):
        raise UserError(f"{c.run_dir} holds a run of another config: {'; '.join(differ)}; choose another run_dir")


def choose_folder(c: Config) -> Path:
    """The run's folder: run_dir, or else a new one named by the time."""
    if not c.run_dir:
        parent = parent_of_runs(c)
        name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        tries = (parent / (name + (f"-{i}" if i else "")) for i in range(1000))
        parent.mkdir(parents=True, exist_ok=True)
        for folder in tries:
            with contextlib.suppress(FileExistsError):
                folder.mkdir()  # two runs started in the same second do not share it
                return folder
    folder = Path(c.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def hold(folder: Path) -> bool:
    """Keep others from training in `folder` until this process is gone; whether it can. UserError if one does."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # open to the end
    except BlockingIOError as e:
        raise UserError(f"another process is training in {folder}: wait for its end, or choose another run_dir") from e
    except OSError:
        return False  # no folder yet, or a file system without locks
    return True


def load_state(folder: Path) -> dict | None:
    """The state to continue from: the last one, or the one before it if that is damaged, or None."""
    damaged = False
    for name in ("resume.new.pt", "resume.pt", "resume.previous.pt"):  # new: a kill came before a save's renames
        if (folder / name).exists():
            try:
                state = load_file(folder / name)
                state["step"], state["model"], state["optimizer"], state["scaler"]  # or else it is no state
                return state
            except Exception as e:
                out_of_reach = isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EIO, errno.ESTALE)
                if out_of_reach or isinstance(e, MemoryError):
                    raise  # the state itself may be whole
                print(f"{folder / name} is damaged ({type(e).__name__}); trying the state before it", file=sys.stderr)
                damaged = True
    if damaged:
        print(f"{folder} holds no whole state: the run begins again", file=sys.stderr)
    return None


def not_running(status: Path, instead: str) -> None:
    """Write `instead` into a status that still says running, if the disk lets us."""
    with contextlib.suppress(OSError):
        if status.read_text() == "running\n":
            write_text(status, instead)


def keep_metrics(path: Path, done: int) -> list[dict]:
    """The lines of metrics.jsonl that a run continued after update `done` will not write again; the others go."""
    lines = read_metrics(path)
    # what is evaluated after update `done` is evaluated again, in case the run ended before that
    lines = [m for m in lines if m["step"] < done or (m["step"] == done and "train_loss" in m)] if done else []
    write_text(path, "".join(json.dumps(m) + "\n" for m in lines))
    return lines


def data_tokenizer(c: Config, data: Shards) -> tuple[bytes, int, int]:
    """The training data's (tokenizer.json, vocabulary size, EOS id); the config names it if the data does not."""
    if "tokenizer" in data.info:
        about = data.info["tokenizer"]
        if not (data.folder / "tokenizer.json").exists():
            raise UserError(f"{data.folder / 'tokenizer.json'} is gone: delete its folder and prepare it again")
        return (data.folder / "tokenizer.json").read_bytes(), about["vocab_size"], about["eos_token_id"]
    if not c.train_dataset_config.hf_tokenizer_path:
        raise UserError(
            f"{data.folder} has no dataset.json: name its tokenizer in train_dataset_config.hf_tokenizer_path"
        )
    encoder = load_encoder(c.train_dataset_config.hf_tokenizer_path)
    return encoder.json, encoder.vocab_size, encoder.eos_token_id


def load_pretrained(model, path: str):
    """Copy the weights that from_pretrained finds at `path` into `model`; where they were. Raises UserError."""
    found, source = pretrained_model(type(model), path)
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (found, model)]
    # rotary_base, say, changes the outputs but no shape; what these change has a shape, or nothing
    free = {"block_size", "n_ctx", "n_key_value_heads", "rotary_dim", "flash_attention"}
    configs = [dataclasses.asdict(m.config) for m in (found, model)]
    if differ := differences(*shapes) or differences(*configs, free):
        raise UserError(f"the weights of {path} do not fit the model of this config: {'; '.join(differ[:8])}")
    model.load_state_dict(found.state_dict())
    return source


def sample_table(samples: list[dict]):
    """The samples so far as a W&B table."""
    import wandb

    return wandb.Table(columns=["step", "generated text"], data=[[m["step"], m["text"]] for m in samples])


def wandb_tracker(c: Config, folder: Path, log):
    """A function that hands the W&B run to an action. W&B never stops training: after a failure it does nothing."""
    run, failed = None, False

    def track(action) -> None:
        nonlocal failed
        if not failed:
            try:
                action(run)
            except Exception as e:
                failed = True
                log(f"W&B failed ({type(e).__name__}: {' '.join(str(e).split())}); training goes on without it")

    def start(_) -> None:
        nonlocal run
        import wandb

        about = {"project": c.wandb_project, "dir": folder, "config": config_dict(c)}
        run = wandb.init(id=id_file.read_text(), resume="allow", **about)

    id_file = folder / "wandb_run_id"  # a continued run goes on in the same W&B run
    if not id_file.exists():
        write_text(id_file, "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8)))
    track(start)
    return track


def host_copy(x, copies: dict):
    """`x` (tensors within dicts, lists, tuples) copied to host memory; what shared memory goes on sharing it."""
    if isinstance(x, torch.Tensor):
        if x.data_ptr() not in copies:
            copies[x.data_ptr()] = x.detach().to("cpu", copy=True)
        return copies[x.data_ptr()]
    if isinstance(x, dict):
        return {k: host_copy(v, copies) for k, v in x.items()}
    return type(x)(host_copy(v, copies) for v in x) if isinstance(x, (list, tuple)) else x


def open_lines(path: Path):
    """A text file for `put`, which appends lines."""
    return open(path, "a", 2**24, encoding="utf-8")  # 8 KB, the default, would soon be full


def put(line: str, file) -> None:
    """Write a line. What a full disk or a closed pipe does not take stays in the file's buffer until the next line."""
    try:
        print(line, file=file, flush=True)
    except OSError as e:
        warnings.warn(f"cannot write to {file.name} ({e.strerror}): training goes on", stacklevel=1)  # once a file


def environment(data: list[Shards], world: int, device: torch.device) -> tuple[dict, bytes]:
    """What a run depends on besides its config, and the uncommitted changes to the code as a diff."""

    def git(*args) -> bytes | None:
        try:
            return subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None  # no git, or no repository: a copied folder will do

    if (snapshot := Path(__file__).parent.parent / "git_commit").exists():  # slurm_submit.sh's copy of the code
        commit, diff = snapshot.read_bytes() or None, snapshot.with_name("git.diff").read_bytes()
    else:
        plain = "--no-color", "--no-ext-diff", "--binary", "--src-prefix=a/", "--dst-prefix=b/"
        commit, diff = git("rev-parse", "HEAD"), git("diff", *plain, "HEAD") or b""
    about = {"started": datetime.now().isoformat(timespec="seconds"), "command": sys.argv, "ranks": world}
    about |= {"git_commit": commit and commit.decode().strip(), "git_dirty": None if commit is None else bool(diff)}
    about |= {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about["cpu_threads"] = torch.get_num_threads()
    about["dataset_sha256"] = dict(d.fingerprint() for d in data)
    return about, diff


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of the device's products of large square matrices: what MFU is a fraction of."""
    n, times = 8192 if device.type == "cuda" else 512, []
    a = torch.randn(n, n, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


# -----------------------------------------------------------------------------
# the run

SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 40
# seconds that W&B may keep a run waiting, unless the environment says otherwise; its own: 90, and at the end any time
WANDB_LIMITS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "300", "WANDB_FINISH_TIMEOUT_RAISES": "true"}
INTERRUPTED = 75  # exit code: stopped by a signal, state saved, the same command goes on (EX_TEMPFAIL)


def main(config_path: str, overrides: list[str], check: bool = False) -> NoReturn:
    rank, local_rank, world = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )

    # ---- a signal ends the update in hand, then the run; before the first update it ends the run at once
    signals = []  # the times at which one came
    looping, folder = False, None

    def on_signal(number, _) -> None:
        # one Ctrl-C reaches a rank twice, from the terminal and from torchrun: only a later one is the second
        again = number == signal.SIGINT and len(signals) > 0 and time.monotonic() - signals[0] > 1
        signals.append(time.monotonic())
        if again or not looping:
            if rank == 0:
                print("train: stopped by a signal; what was saved before is kept", file=sys.stderr, flush=True)
                if folder:
                    not_running(folder / "status", "interrupted\n")
            os._exit(INTERRUPTED)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)

    def stopping() -> bool:
        """Whether a signal has reached any rank. All ranks ask at the same places, and so agree."""
        if world == 1:
            return len(signals) > 0
        flag = torch.tensor(len(signals))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def failed_anywhere(failure: str) -> str:
        """What failed on this rank or another; empty if nothing did. All ranks ask at the same places."""
        failures = [failure] * world
        if dist.is_initialized():
            dist.all_gather_object(failures, failure)
        return max(failures)

    # ---- set-up: everything that can be wrong is found before anything is written
    c = load_config(config_path, overrides)
    if c.run_dir:
        check_folder(c)
        status = Path(c.run_dir) / "status"
        if not check and status.exists() and status.read_text() == "finished\n":
            if rank == 0:
                print(f"{c.run_dir} holds this run, finished: nothing to do")
            leave(0)
    wants_gpu = (c.device or "cuda").startswith("cuda")  # where a check is made there may be none
    device = torch.device("cuda") if check and wants_gpu else choose_device(c.device, local_rank)
    if c.dtype == "float16" and device.type != "cuda":
        raise UserError(f"dtype float16 needs CUDA (device is {device.type}): use bfloat16 or float32")
    if c.batch_size % world or (c.micro_batch_size and c.batch_size % (world * c.micro_batch_size)):
        raise UserError(
            f"batch_size {c.batch_size} is not divisible by ranks x micro_batch_size ({world} x {c.micro_batch_size})"
        )
    per_rank = c.batch_size // world  # sequences of one rank in one update
    micro = c.micro_batch_size or per_rank  # sequences in one forward
    n_micro = per_rank // micro
    T = c.model.block_size
    prepare = f"python prepare_data.py {config_path}"
    train_data = Shards(c.train_dataset_config.folder(), "train", prepare)
    val_data = Shards(c.val_dataset_config.folder(), "val", prepare)
    n_windows, n_val_windows = train_data.n_tokens // (T + 1), val_data.n_tokens // (T + 1)
    notes = []
    for data, section, n in (
        (train_data, c.train_dataset_config, n_windows),
        (val_data, c.val_dataset_config, n_val_windows),
    ):
        if n == 0:
            raise UserError(
                f"the {data.split} shards hold {data.n_tokens} tokens, fewer than one window of n_ctx ({T + 1})"
            )
        here, there = asked(section), data.info.get("source", {}).get(data.split)  # foreign shards do not tell
        if there and (differ := differences({k: there.get(k) for k in here}, here)):
            notes.append(f"note: {data.folder} was prepared from another config: {'; '.join(differ)}")
    made_with = [d.info["tokenizer"]["sha256"] for d in (train_data, val_data) if "tokenizer" in d.info]
    if len({*made_with}) > 1:
        raise UserError(f"{train_data.folder} and {val_data.folder} have different tokenizers: prepare both with one")
    tokenizer_json, vocab_size, eos = data_tokenizer(c, train_data)
    if vocab_size > c.model.vocab_size:
        raise UserError(f"model.vocab_size is {c.model.vocab_size}, but the data's tokenizer has {vocab_size} ids")

    # ---- model and optimizer, from the run's state if it is continued
    if world > 1 and not check:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    if device.type == "cuda" and not check:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if c.tensorcores else "highest")
    for name, seconds in WANDB_LIMITS.items():
        os.environ.setdefault(name, seconds)  # before wandb reads it, be it for from_pretrained
    model_class = MODEL_CLASSES[c.model.model_type]
    raw_model = model_class(c.model, init_seed=c.init_seed)
    held = bool(c.run_dir) and rank == 0 and not check and hold(Path(c.run_dir))
    state = load_state(Path(c.run_dir)) if c.run_dir else None
    start = c.from_pretrained or f"seed {c.init_seed}"
    if c.from_pretrained and not state:
        failure = ""
        try:
            start = load_pretrained(raw_model, c.from_pretrained)  # of ranks that want it from W&B, one downloads it
        except UserError as e:
            failure = str(e)
        if failure := failed_anywhere(failure):  # the first to fail would end the others before rank 0 says why
            raise UserError(failure)
    if check:
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
        print(Path(c.run_dir) if c.run_dir else f"{parent_of_runs(c)}/")
        leave(0)
    chosen = [choose_folder(c) if rank == 0 else None]
    if rank == 0 and not held:
        hold(chosen[0])
    if world > 1:
        dist.broadcast_object_list(chosen)
    folder = chosen[0]
    about, diff = environment([train_data, val_data], world, device)
    before = json.loads((folder / "environment.json").read_text()) if (folder / "environment.json").exists() else {}
    for path, digest in before.get("dataset_sha256", {}).items():
        if state and about["dataset_sha256"].get(path) != digest:
            raise UserError(f"{path} is not the one that {folder} began with: choose another run_dir")
    done = state["step"] if state else 0
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, done)
        if len({*found}) > 1:
            raise UserError(f"the ranks read states of {folder} after updates {found}: they must see the same files")
    if state:
        raw_model.load_state_dict(state["model"])
    raw_model.to(device)
    settings = c.weight_decay, c.learning_rate, (0.9, 0.95), device.type, c.zero_stage
    optimizer = raw_model.configure_optimizers(*settings, muon=c.optimizer == "muon")
    scaler = torch.amp.GradScaler(device.type, enabled=c.dtype == "float16")
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    autocast = contextlib.nullcontext()
    if c.dtype != "float32":
        autocast = torch.autocast(device.type, getattr(torch, c.dtype))

    # ---- what this run will do
    if rank == 0:
        (folder / "checkpoints").mkdir(exist_ok=True)
        write_text(folder / "status", "running\n")
        before_leaving.append(lambda: not_running(folder / "status", "failed\n"))
        write_text(folder / "final_config.yaml", yaml.safe_dump(config_dict(c), sort_keys=False))
        write_text(folder / "model_config.yaml", yaml.safe_dump(dataclasses.asdict(c.model), sort_keys=False))
        write_text(folder / "tokenizer.json", tokenizer_json.decode())
        diff_path = folder / "git.diff"
        while diff and diff_path.exists() and diff_path.read_bytes() != diff:  # an earlier start's is kept
            diff_path = diff_path.with_name(f"{diff_path.stem}+.diff")
        if diff:
            with whole_file(diff_path) as f:
                f.write(diff)
        about |= {"git_diff": diff_path.name if diff else None, "before": before}
        write_text(folder / "environment.json", json.dumps(about, indent=1) + "\n")
        metrics = keep_metrics(folder / "metrics.jsonl", done)
        metrics_file, log_file = open_lines(folder / "metrics.jsonl"), open_lines(folder / "main.log")
        files = [metrics_file, log_file]
        error_logs.append(log_file)

    def log(text: str) -> None:
        if rank == 0:
            put(text, sys.stdout)
            put(text, log_file)

    peak = world * matrix_rate(device, getattr(torch, c.dtype)) / raw_model.flops_per_token()  # tokens a second

    updates = 0 if c.inference_only else c.num_iterations
    tokens, epochs = updates * c.batch_size * T, updates * c.batch_size / n_windows
    n_params = sum(p.numel() for p in raw_model.parameters())
    log(f"model: {c.model.model_type}, {n_params:,} parameters, from {start}")
    log(f"data: {train_data.n_tokens:,} tokens, {n_windows:,} windows of {T + 1}; for validation {n_val_windows:,}")
    for note in notes:
        log(note)
    log(f"plan: {updates:,} updates of {c.batch_size * T:,} tokens: {tokens:,} tokens, {epochs:.2f} epochs")
    log(f"on: {world} x {device.type}, {c.dtype}, {n_micro} x {micro} sequences a rank and update")
    log(f"writes: {folder}" + (f", continuing after update {done}" if state else ""))
    track = wandb_tracker(c, folder, log) if rank == 0 and c.wandb_project else None
    if track:
        for name in ("final_config.yaml", "model_config.yaml", "tokenizer.json"):
            track(lambda run, name=name: run.save(folder / name, base_path=folder, policy="now"))

    # ---- compile, now rather than at update 1, so that the wait is announced and a failure is not the end
    model = raw_model
    if c.compile:
        log("torch.compile: compiling, which can take a minute ...")
        began, failure = time.monotonic(), ""
        try:
            model = torch.compile(raw_model, dynamic=False)
            x, y = (torch.zeros(micro, T, dtype=torch.int64, device=device) for _ in range(2))
            for training in (True, False):
                with autocast, torch.set_grad_enabled(training):
                    _, loss = model(x, y, return_logits=False)
                if training:
                    loss.backward()
            optimizer.zero_grad(set_to_none=True)
        except Exception as e:
            failure = (str(e).strip().splitlines() or [type(e).__name__])[0]
        if failure := failed_anywhere(failure):  # all ranks or none: compiled and eager arithmetic differ
            log(f"torch.compile does not work here ({failure}): training goes on without it, slower")
            model = raw_model
        else:
            log(f"torch.compile: done in {time.monotonic() - began:.0f} s")
    forward = model  # without DDP's hooks, for validation
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers' new name is not in torch before 2.13
            # views: 1.04 of the rate on 2 CPU ranks; static_graph and buckets of 1 MB gained under 3 %: left out
            model = DDP(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

    # ---- data: positions of the stream -> windows -> this rank's sequences, read one update ahead
    seed, shuffle_each_epoch = c.seed + (c.train_dataset_config.seed or 0), c.train_dataset_config.shuffle_each_epoch
    reader = ThreadPoolExecutor(1)

    def tensors(data: Shards, ids):  # the windows `ids` (n,) -> x, y (n, T) int64
        windows = data.windows(ids, T + 1)
        if (most := windows.max()) >= c.model.vocab_size:  # foreign shards say nothing of their tokenizer
            raise BadShard(
                f"the {data.split} shards in {data.folder} hold id {most}, outside the model's {c.model.vocab_size} "
                "ids: set hf_tokenizer_path to the tokenizer that made them, and model.vocab_size to its size"
            )
        x, y = (torch.from_numpy(z.astype(np.int64)) for z in (windows[:, :-1], windows[:, 1:]))
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    def read_update(s: int):
        first = (s - 1) * c.batch_size + rank * per_rank
        positions = np.arange(first, first + per_rank)
        return tensors(train_data, window_order(positions, n_windows, seed, shuffle_each_epoch))

    # validation: the same windows every time, spread evenly over the split, dealt to the ranks in turn
    n_val = min(n_val_windows, c.val_max_steps * c.batch_size)
    val_ids = (np.arange(n_val) * n_val_windows // n_val + (c.val_dataset_config.seed or 0)) % n_val_windows
    split = val_data.info.get("splits", {}).get("val", {})
    bytes_per_token = split["bytes"] / split["tokens"] if split.get("bytes") else None

    @torch.no_grad()
    def validate() -> float | None:
        """Mean loss in nats per token over the validation windows of all ranks; None if a signal came."""
        losses, counts = [torch.zeros((), device=device)], [0]  # mean loss of each batch, its windows
        for i in range(0, n_val, micro * world):
            if stopping():
                return None
            ids = val_ids[i + rank : i + micro * world : world]
            if len(ids):
                x, y = (z.to(device, non_blocking=True) for z in tensors(val_data, np.resize(ids, micro)))
                y[len(ids) :] = -1  # a last batch that is not full keeps its shape, so that nothing is compiled again
                with autocast:
                    _, loss = forward(x, y, return_logits=False)
                losses.append(loss)
                counts.append(len(ids))
        counts = torch.tensor(counts, dtype=torch.float64)
        total = torch.stack(((torch.stack(losses).cpu() * counts).sum(), counts.sum()))
        if world > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def sample(s: int) -> str | None:
        """Text after EOS, drawn by sample_seed and s alone; None on ranks > 0, and if a signal came to any."""
        ids = torch.tensor([eos], device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast:
            torch.manual_seed(c.sample_seed + s)
            for _ in range(0, SAMPLE_TOKENS, 8):
                if stopping():
                    return None
                if rank == 0 and not (len(ids) > 1 and ids[-1] == eos):
                    ids = raw_model.generate(ids, 8, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, eos)
        return tokenizer.decode(ids.tolist()[1:], skip_special_tokens=True) if rank == 0 else None

    if rank == 0:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        if c.sample_every:
            samples = keep_metrics(folder / "samples.jsonl", done)
            files.append(samples_file := open_lines(folder / "samples.jsonl"))

    # ---- metrics: losses stay on the device until they are logged
    pending = []  # (update, learning rate, loss, gradient norm) since the last flush
    seconds, timed = 0.0, 0  # of those updates, without evaluation and saving

    # W&B takes no more for a step once a later one has come, or a run's end: a row goes to it when the next begins
    row = {k: v for m in metrics if m["step"] == done for k, v in m.items()} if rank == 0 and done else {}

    def log_row(run, line: dict) -> None:
        nonlocal row
        if row and row["step"] != line.get("step"):
            run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            row = {}
        row |= line

    def record(line: dict) -> None:
        metrics.append(line)
        put(json.dumps(line), metrics_file)
        if track:
            track(lambda run: log_row(run, line))

    def flush() -> None:
        nonlocal seconds, timed
        if not pending:
            return
        values = torch.stack([torch.stack((loss, norm)) for _, _, loss, norm in pending])
        if world > 1:
            dist.all_reduce(values)  # the norm is of the reduced gradients, the same on every rank
            values /= world
        rate = timed * c.batch_size * T / seconds if seconds else 0.0
        for (s, lr, _, _), (loss, norm) in zip(pending, values.tolist(), strict=True):
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise UserError(
                    f"update {s} has loss {loss} and gradient norm {norm}: the weights were left as they were before; "
                    f"python run_info.py {folder} --data {s} shows its data; a lower learning_rate may help"
                )
            if rank == 0:
                line = {"step": s, "train_loss": loss, "lr": lr, "grad_norm": norm, "tokens": s * c.batch_size * T}
                record(line | {"tokens_per_s": round(rate, 1), "mfu": round(rate / peak, 4)})
        pending.clear()
        seconds, timed = 0.0, 0

    # ---- saving: a copy is taken here, a thread writes it
    writer, writing = ThreadPoolExecutor(1), []

    def write(s: int, weights: dict, optimizer_state: dict | None, scaler_state: dict | None) -> None:
        path = folder / "checkpoints" / f"model_step_{s}.pt"
        if is_checkpoint(s, c):
            with whole_file(path) as f:
                torch.save(weights, f)
            if track:
                track(lambda run: run.save(path, base_path=path.parent, policy="now"))
            if c.keep_optimizer:
                with whole_file(path.with_name(f"optim_step_{s}.pt")) as f:
                    torch.save(optimizer_state, f)
        if scaler_state is not None:
            metrics_file.buffer.flush()  # the state is never ahead of the metrics
            os.fsync(metrics_file.fileno())
            state = {"step": s, "seen_tokens": s * c.batch_size * T, "model": weights}
            state |= {"optimizer": optimizer_state, "scaler": scaler_state}
            new = folder / "resume.new.pt"
            with whole_file(new) as f:
                torch.save(state, f)
            if (folder / "resume.pt").exists():
                os.replace(folder / "resume.pt", folder / "resume.previous.pt")
            os.replace(new, folder / "resume.pt")

    def settle() -> bool:
        """Wait for what is being written; whether all of it is on disk."""
        try:
            while writing:
                s, written = writing.pop()
                written.result()
            return True
        except (OSError, RuntimeError) as e:  # torch.save has RuntimeErrors for a full disk
            reason = (str(e).strip().splitlines() or [""])[0]
            log(f"could not save what update {s} left ({reason}): training goes on, and the next save may succeed")
            return False

    before_leaving.append(settle)

    def save(s: int, resumable: bool) -> None:
        """Save weights if they are to be kept, and all that a continued run needs."""
        flush()
        with_optimizer = resumable or (c.keep_optimizer and is_checkpoint(s, c))
        if with_optimizer and c.zero_stage == 1 and world > 1:
            optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            settle()
            weights = host_copy(raw_model.state_dict(), {})
            optimizer_state = host_copy(optimizer.state_dict(), {}) if with_optimizer else None
            scaler_state = scaler.state_dict() if resumable else None
            writing.append((s, writer.submit(write, s, weights, optimizer_state, scaler_state)))

    # ---- the loop: s updates are done at its top
    start_time = time.monotonic()
    not_finite = torch.zeros((), device=device)
    batch = reader.submit(read_update, done + 1) if updates else None
    s, saved = done, done if state else None
    looping = True
    while True:
        # save first: an evaluation that fails loses nothing
        resumable = s > 0 and (due(s, c.resume_every, updates) or s == updates)
        if s != saved and not c.inference_only and (is_checkpoint(s, c) or resumable):
            save(s, resumable)
            saved = s if resumable else saved
        if due(s, c.val_loss_every, updates):
            flush()
            val_loss = validate()
            if rank == 0 and val_loss is not None:
                line = {"step": s, "val_loss": val_loss}
                if bytes_per_token:
                    line["bits_per_byte"] = val_loss / math.log(2) / bytes_per_token
                record(line)
                bpb = f" | {line['bits_per_byte']:.4f} bits per byte" if bytes_per_token else ""
                log(f"step {s}/{updates} | val loss {val_loss:.4f}{bpb}")
        if due(s, c.sample_every, updates):
            flush()  # W&B takes steps in order only
        if due(s, c.sample_every, updates) and (text := sample(s)) is not None:
            log(f"step {s}/{updates} | sample:\n{text}\n")
            samples.append({"step": s, "text": text})
            put(json.dumps(samples[-1]), samples_file)
            if track:
                track(lambda run, s=s: log_row(run, {"step": s, "generation_tables": sample_table(samples)}))
        stop = stopping()
        if stop and s not in (0, saved):
            save(s, True)
        if stop or s == updates:
            break

        # update s + 1
        t0 = time.monotonic()
        s += 1
        x, y = batch.result()
        batch = reader.submit(read_update, s + 1)
        lr = learning_rate_at(s, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for i in range(n_micro):
            part = slice(i * micro, (i + 1) * micro)
            x_part, y_part = (z[part].to(device, non_blocking=True) for z in (x, y))
            # gradients are summed over the ranks once an update, with the last micro-batch
            with contextlib.nullcontext() if world == 1 or i == n_micro - 1 else model.no_sync():
                with autocast:
                    _, part_loss = model(x_part, y_part, return_logits=False)
                scaler.scale(part_loss / n_micro).backward()
            loss += part_loss.detach() / n_micro
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), c.grad_clip or math.inf)
        if not scaler.is_enabled():
            # AdamW's fused kernel leaves the weights alone from the first update that is not finite, and flush() ends
            # the run: no wait for the device to look at the norm each time
            not_finite = torch.maximum(not_finite, (~(norm + loss).isfinite()).float())
            getattr(optimizer, "optim", optimizer).found_inf = not_finite
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pending.append((s, lr, loss, norm.detach()))
        logged = s == done + 1 or s % c.train_log_every == 0 or s == updates
        if logged and device.type == "cuda":
            torch.cuda.synchronize()
        seconds, timed = seconds + time.monotonic() - t0, timed + 1
        if logged:
            ms, rate = 1000 * seconds / timed, timed * c.batch_size * T / seconds
            flush()
            if rank == 0:
                left = timedelta(seconds=int((time.monotonic() - start_time) / (s - done) * (updates - s)))
                m = metrics[-1]
                log(
                    f"step {s}/{updates} | loss {m['train_loss']:.4f} | norm {m['grad_norm']:.3f} | lr {lr:.2e} | "
                    f"{ms:.1f} ms | {rate:,.0f} tokens/s | ETA {left}"
                )

    # ---- the end: everything is on disk before the run says so
    on_disk = settle() if rank == 0 else True
    code = INTERRUPTED if stop and on_disk else int(not on_disk)
    if rank == 0:
        for file in files:
            file.flush()
        try:
            if metrics:
                plot_losses({"": metrics}, folder / "loss.png")
        except ImportError:
            log("no loss.png: pip install matplotlib")
        if on_disk and stop:
            write_text(folder / "status", "interrupted\n")
            log(f"stopped by a signal after update {s}: the same command with run_dir={folder} goes on")
        elif on_disk:
            write_text(folder / "status", "finished\n")
            log(f"done: {folder}")
    if world > 1:
        dist.barrier()  # no rank leaves before rank 0 has written: the first to go may end the others
    if track:
        ends = (  # the last row of a run that is to go on comes from there
            lambda run: run.mark_preempting() if code else log_row(run, {}),
            lambda run: run.finish(exit_code=code),
        )
        ending = threading.Thread(target=lambda: [track(end) for end in ends], daemon=True)
        ending.start()
        limit = float(os.environ["WANDB_FINISH_TIMEOUT"])
        ending.join(limit + 5 if limit else None)  # W&B does not always keep to its limit
        if ending.is_alive():
            log(f"W&B failed (no answer for {limit:.0f} s); the run ends without it")
            os._exit(code)  # the interpreter would wait for it again
    leave(code)


before_leaving = []  # what a run that fails has still to do
error_logs = []  # where the reason is written, besides stderr


def leave(status: int | str) -> NoReturn:
    """End this process, as sys.exit does; of several ranks, without taking Python and the process group down.

    That may hang, and did once in thirty runs: DDP's destructor holds Python's lock and joins a thread that wants it.
    """
    for act in before_leaving:
        act()
    if isinstance(status, str):
        for stream in (sys.stderr, *error_logs):
            with contextlib.suppress(OSError):
                print(status, file=stream, flush=True)
        status = 1
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # nobody reads it, and Python would end with a code of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if not dist.is_initialized():
        sys.exit(status)
    os._exit(status)


if __name__ == "__main__":
    check = sys.argv[1:2] == ["--check"]
    args = sys.argv[1 + check :]
    if not args or args[0] in ("-h", "--help"):
        print_help()
        sys.exit(0 if args else 2)
    rank0 = os.environ.get("RANK", "0") == "0"  # every rank finds the same thing wrong: one says so
    warnings.formatwarning = lambda message, *_: f"train: {message}\n"
    if not rank0:
        warnings.simplefilter("ignore")
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # a sample may hold what the console's encoding has not
    try:
        main(args[0], args[1:], check)
    except (UserError, OSError) as e:
        # a rank may be the only one to read a shard
        again = "; once that is mended, the same command goes on" if isinstance(e, OSError) else ""
        leave(f"train: {e}{again}" if rank0 or isinstance(e, BadShard) else 1)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e):
            leave("train: out of memory: set a smaller micro_batch_size, which changes no result")
        if dist.is_initialized() and "peer" in str(e):  # gloo's word for a rank that is gone
            leave(f"train: rank {os.environ['RANK']} lost another rank: the run ends; the same command goes on")
        raise
