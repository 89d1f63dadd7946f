"""Pretrain one of models.py's models on the shards that prepare_data.py wrote.

    python train.py configs/quickstart.yaml [key=value ...]
    torchrun --nproc_per_node=4 train.py configs/x.yaml [key=value ...]
    python train.py --help                   every key with its type, bounds, default and meaning
    python train.py --check configs/x.yaml   check all that needs no GPU and write nothing; print the run folder, or,
                                             for a new run, the folder that will hold it, with a / at the end

The same config gives the same weights: the order of the data depends neither on the number of ranks nor on
micro_batch_size. With run_dir=DIR the same command resumes an interrupted run.

Throughout, c is the run's Config, p this Process, one of its ranks, and s the number of updates done.
"""

import contextlib
import ctypes
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import timeit
import traceback
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Union
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch.nn.parallel import DistributedDataParallel as DDP

from models import MODEL_CLASSES, load_file, untied_weights
from prepare_data import (
    DatasetConfig,
    Section,
    Shards,
    TextEncoder,
    TrainingStream,
    UserError,
    asked,
    check_same,
    dataset_configs,
    differences,
    hold,
    in_short,
    load_encoder,
    local,
    read_config,
    read_json,
    sha256_file,
    tokenizer_config,
    validated,
    whole_file,
    write_json,
    write_text,
)
from run_info import (
    SAMPLE_TOKENS,
    SMALL_FILES,
    checkpoints_in,
    out_dir,
    plot_losses,
    read_metrics,
)

# -----------------------------------------------------------------------------
# config

MODEL_CONFIGS = tuple(model.config_class for model in MODEL_CLASSES.values())
AnyModelConfig = Union[MODEL_CONFIGS]  # noqa: UP007, it is computed
Beta = Annotated[float, Field(ge=0, lt=1)]


class Config(Section):
    """A run's YAML. Keys that SPD's pretraining YAML has, too, mean the same there."""

    # the run
    model: AnyModelConfig = Field(discriminator="model_type", description="model_type and the fields of its config")
    train_dataset_config: DatasetConfig = Field(description="the data to train on")
    val_dataset_config: DatasetConfig = Field(description="the data to validate on")
    batch_size: int = Field(ge=1, le=2**31, description="sequences in the global batch, over ranks and micro-batches")
    num_iterations: PositiveInt = Field(description="optimizer updates")
    seed: NonNegativeInt = Field(0, description="seed of the order of the training data")
    init_seed: NonNegativeInt = Field(42, description="seed of the initial weights")
    from_pretrained: str | None = Field(None, description="start from the weights of a run, W&B run or hub model")
    branch_from: str | None = Field(
        None, description="start from the state of this run: weights, optimizer, data order"
    )
    branch_step: NonNegativeInt | None = Field(None, description="the update after which the branch starts")
    inference_only: bool = Field(False, description="validate and sample, update nothing")

    # the optimizer
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for matrices in blocks, AdamW beside")
    learning_rate: float = Field(gt=0, le=1e6, description="the peak, reached at update warmup_iters")
    muon_learning_rate: float | None = Field(None, gt=0, le=1e6, description="the peak with muon; null: 0.005")
    warmup_iters: NonNegativeInt = Field(description="updates of linear warm-up; a cosine follows")
    learning_rate_decay_frac: float = Field(ge=0, le=1, description="the last update's rate as a fraction of the peak")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's, from 0 to below 1")
    weight_decay: float = Field(ge=0, le=1e6, description="on tensors of two dimensions and more")
    grad_clip: float | None = Field(gt=0, description="largest gradient norm; null: no clipping")
    zero_stage: Literal[0, 1] = Field(0, description="1 shards AdamW's state over the ranks")

    # precision and speed
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="precision of matrix products")
    micro_batch_size: PositiveInt | None = Field(None, description="sequences per rank and forward; null: all")
    device: str | None = Field(None, pattern=r"^(cpu|mps|cuda(:\d)?)$", description="cuda, mps, cpu; null: the best")
    compile: bool = Field(True, description="torch.compile the model")
    tensorcores: bool = Field(True, description="TF32 for float32 products on CUDA")

    # evaluation and output
    val_loss_every: NonNegativeInt = Field(description="updates between validations; 0: none")
    val_max_steps: PositiveInt = Field(description="most batches of batch_size windows in a validation")
    sample_every: NonNegativeInt = Field(description="updates between samples of text; 0: none")
    sample_seed: NonNegativeInt = Field(0, description="seed of the sampled text")
    train_log_every: PositiveInt = Field(100, description="updates between lines on the console")
    intermediate_checkpoints: bool = Field(description="keep weights at 0, 1, 2, 4 ... 512, 1000, 2000 ...")
    checkpoint_steps: list[NonNegativeInt] | None = Field(None, description="also keep weights at these updates")
    checkpoint_every: NonNegativeInt = Field(0, description="also keep weights every N updates; 0: no")
    keep_optimizer: bool = Field(False, description="keep optim_step_N.pt beside every kept model_step_N.pt")
    resume_every: NonNegativeInt = Field(1000, description="updates between saved states; 0: only on a signal")
    output_dir: str | None = Field(None, description="holds new runs; null: ${SPD_OUT_DIR:-out}/target_models")
    run_dir: str | None = Field(None, description="the run's folder; an interrupted run in it is resumed")
    wandb_project: str | None = Field(None, description="log to this W&B project; null: do not")

    @model_validator(mode="after")
    def keys_fit_together(self):
        muon = self.optimizer == "muon"
        has_branch = self.branch_from is not None
        n_ctx = {self.train_dataset_config.n_ctx, self.val_dataset_config.n_ctx}
        for is_wrong, sentence in (
            (n_ctx != {self.model.block_size + 1}, "n_ctx of both datasets must be the model's block_size + 1"),
            (max(self.checkpoint_steps or [0]) > self.num_iterations, "checkpoint_steps exceeds num_iterations"),
            (self.muon_learning_rate and not muon, "muon_learning_rate has no effect with adamw: leave it out"),
            (muon and not hasattr(torch.optim, "Muon"), "optimizer muon needs torch 2.9 or later"),
            (has_branch == (self.branch_step is None), "branch_from and branch_step must be set together"),
            (has_branch and self.from_pretrained, "branch_from and from_pretrained both set the weights: use one"),
            ((self.branch_step or 0) >= self.num_iterations, "branch_step must be below num_iterations"),
        ):
            if is_wrong:
                raise ValueError(sentence)
        return self


# A resumed run may change these: they do not change what is computed, apart from the order of sums.
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
    raw["train_dataset_config"], raw["val_dataset_config"] = dataset_configs(raw).values()
    # The class that model_type names knows the valid keys. If it names no class, validated(Config, ...) says so.
    model = raw.get("model")
    if isinstance(model, dict) and model.get("model_type") in [*MODEL_CLASSES]:
        raw["model"] = validated(MODEL_CLASSES[model["model_type"]].config_class, model, "model.")
    return validated(Config, raw)


def config_dict(c) -> dict:
    """The config as plain values with every default; without run_dir, so that running it again makes a new run."""
    return c.model_dump(mode="json") | {"run_dir": None}


# -----------------------------------------------------------------------------
# schedule


def learning_rate_at(s: int, c) -> float:
    """The learning rate of update s = 1, 2, ..., num_iterations."""
    # 0.005 was the best of 0.002, 0.003, 0.005 and 0.008: docs/PERFORMANCE.md
    peak = (c.muon_learning_rate or 0.005) if c.optimizer == "muon" else c.learning_rate
    # linear warm-up
    if s <= c.warmup_iters:
        return peak * s / c.warmup_iters
    # cosine from the peak at warmup_iters to `least` at num_iterations
    least = peak * c.learning_rate_decay_frac
    progress = (s - c.warmup_iters) / (c.num_iterations - c.warmup_iters)
    return least + (peak - least) * (1 + math.cos(math.pi * progress)) / 2


def is_checkpoint(s: int, c) -> bool:
    """Whether the weights after s updates are kept."""
    early = s < 1000 and s & (s - 1) == 0  # 0, 1, 2, 4 ... 512
    if c.intermediate_checkpoints and (early or s % 1000 == 0):
        return True
    return s in (c.checkpoint_steps or ()) or due(s, c.checkpoint_every, c.num_iterations) or s == c.num_iterations


def due(s: int, every: int, last: int) -> bool:
    """Whether what happens every `every` updates (0: never), at the start and at the end, happens after update s."""
    return every > 0 and (s % every == 0 or s == last)


# -----------------------------------------------------------------------------
# the process: its rank, its device, the signals it gets, how it ends

INTERRUPTED = 75  # exit code (EX_TEMPFAIL): the state is saved, and the same command resumes the run


class Ranks(Section, extra="ignore"):
    """What torchrun and slurm_submit.sh say in the environment."""

    RANK: NonNegativeInt = 0
    LOCAL_RANK: NonNegativeInt = 0
    WORLD_SIZE: PositiveInt = 1


class DeviceError(UserError):
    """This rank has no device. Other ranks may have theirs."""


class Process(NamedTuple):
    """One of `world` processes that train together."""

    rank: int
    world: int
    micro: int  # sequences in one forward
    device: torch.device


def this_process(c, check: bool) -> Process:
    """Rank and device of this process; with `check`, the meta device. Raises UserError for impossible ones."""
    ranks = validated(Ranks, dict(os.environ))
    world = ranks.WORLD_SIZE
    if ranks.RANK >= world:
        raise UserError(f"RANK is {ranks.RANK}, but must be below WORLD_SIZE ({world})")
    micro = c.micro_batch_size or max(1, c.batch_size // world)
    if c.batch_size % (world * micro):
        raise UserError(f"batch_size {c.batch_size} is not divisible by ranks x micro_batch_size ({world} x {micro})")
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    # --check needs no device: it also runs on a login node without a GPU.
    device = torch.device("meta" if check else c.device or best)
    if device == torch.device("cuda"):
        device = torch.device("cuda", ranks.LOCAL_RANK)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # what torch raises for a device that does not exist
        raise DeviceError(f"device {device} does not work here: set device=cpu or fewer ranks ({in_short(e)})") from e
    return Process(ranks.RANK, world, micro, device)


def keep_freed_memory():
    """Let glibc keep freed memory for the next update, which matters on a CPU.

    By default glibc returns large blocks to the system. Getting them again, page by page, took 7 % of the quick
    start's time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too


class Interrupt:
    """Whether SIGTERM, SIGUSR1 or SIGINT has asked the run to save and stop."""

    def __init__(self):
        self.received_at = math.inf  # seconds, of the first signal
        # Windows has no SIGUSR1.
        for number in {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)}:
            signal.signal(number, self.receive)

    def receive(self, number, _frame):
        now = time.monotonic()
        # One Ctrl-C may arrive twice, from the terminal and from torchrun. A second Ctrl-C is more than a second later.
        if number == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt
        self.received_at = min(now, self.received_at)

    def agreed(self) -> bool:
        """Whether a signal has reached any rank. All ranks call this at the same places, so they agree."""
        first = torch.tensor(self.received_at)
        if dist.is_initialized():
            dist.all_reduce(first, dist.ReduceOp.MIN)
        return bool(first.isfinite())


def end_process(code: int):
    """End this process as sys.exit does; one of several ranks ends without the interpreter's clean-up.

    That clean-up hung once in thirty runs: DDP's destructor holds the GIL and joins a thread that waits for the GIL.
    """
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


# -----------------------------------------------------------------------------
# the run folder


def new_folder(parent: Path) -> Path:
    """Make the folder of a new run, named by the time."""
    while True:
        folder = parent / time.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run started in this second
            time.sleep(0.1)


def record_start(folder: Path, c, p, encoder: TextEncoder, data: dict, config_path: str):
    """Write what a start depends on: the config, the tokenizer, the scripts as they run, and environment.json."""
    here = Path(__file__).resolve().parent
    code = folder.resolve() / "code"
    if here != code:  # slurm_submit.sh has copied them already
        code.mkdir(exist_ok=True)
        for path in (*here.glob("*.py"), *here.glob("*.sh"), local(config_path)):
            if path.resolve().parent != code:  # the config may be the copy
                shutil.copy(path, code)
        # The shell fails quietly where there is no git, and then there is no commit.
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
        write_text(code / "git_commit", git.stdout)
    start = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "command": sys.argv,
        "git_commit": (code / "git_commit").read_text().strip() or None,
        "python": sys.version,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(p.device) if p.device.type == "cuda" else p.device.type,
        "ranks": p.world,
        "dataset_sha256": data,
    }
    texts = {
        "status": "running\n",
        "final_config.yaml": yaml.safe_dump(config_dict(c), sort_keys=False),
        "model_config.yaml": yaml.safe_dump(asdict(c.model), sort_keys=False),
        "tokenizer.json": encoder.json.decode(),
        "tokenizer_config.json": tokenizer_config(encoder.eos_token),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    environment = folder / "environment.json"
    write_json(environment, [*read_json(environment, []), start])


# -----------------------------------------------------------------------------
# log: what a run says


class Log(contextlib.AbstractContextManager):
    """Writes to the console and main.log for people, to metrics.jsonl, samples.jsonl and W&B for programs.

    Losses stay on the device, so that an update does not wait for them, until flush(), which comes before anything
    else is written or saved. Every rank has a Log, so every rank raises if a loss is not finite; only rank 0 writes.
    """

    def __init__(self, folder: Path, c, p, lines: dict, peak_rate: float):
        self.folder = folder
        self.c = c
        self.lines = lines  # file -> lines in it
        self.peak_rate = peak_rate  # tokens/s if the device did nothing but matrix products, at its highest rate
        self.tokens = c.batch_size * c.model.block_size  # of an update
        self.pending = []  # (update, when it began, learning rate, loss and gradient norm) since the last flush
        self.update_seconds = None  # an update's duration, measured at each flush
        self.wandb = None  # W&B's run
        self.files = {}  # name -> open file, on rank 0
        for name in ("main.log", *lines) if p.rank == 0 else ():
            path = folder / name
            if name in lines and path.exists():
                # Only the lines that the state counts are kept: a resumed run writes the later ones again.
                write_text(path, "".join(path.read_text().splitlines(keepends=True)[: lines[name]]))
            # Line-buffered: every complete line is in the file, however the process ends.
            self.files[name] = open(path, "a", buffering=1, encoding="utf-8")

    def __exit__(self, kind, error, trace):
        """Write the error that ended the run, whatever it was, to main.log, and set status to failed."""
        if error is not None and self.files:
            traceback.print_exception(error, file=self.files["main.log"])
            write_text(self.folder / "status", "failed\n")

    def start_wandb(self):
        """Log to W&B, too; a resumed run goes on in the same W&B run."""
        import wandb

        id_file = self.folder / "wandb_run_id"
        if not id_file.exists():
            write_text(id_file, os.urandom(4).hex())
        options = {
            "project": self.c.wandb_project,
            "dir": self.folder,
            "id": id_file.read_text(),
            "resume": "allow",
            "config": config_dict(self.c),
        }
        try:
            self.wandb = wandb.init(**options)
        except Exception as e:  # no network, no login, a server in trouble: wandb's exceptions vary
            self.say(f"W&B does not start ({in_short(e)}): logging offline, for `wandb sync` later")
            wandb.teardown()  # or else the id counts as in use
            self.wandb = wandb.init(**options, mode="offline")
        self.wandb.define_metric("step")
        self.wandb.define_metric("*", step_metric="step")  # W&B's own step must not decrease
        for name in SMALL_FILES:
            self.upload(self.folder / name)

    def upload(self, path: Path):
        """Send a file, if it is there, to the root of the W&B run, where SPD looks for it."""
        if self.wandb and path.exists():
            self.wandb.save(path, base_path=path.parent, policy="now")

    def upload_safetensors(self, model, s: int):
        """Send a LlamaSimpleMLP's last weights to W&B as safetensors, which param-decomp needs to load the run."""
        if not self.wandb or self.c.model.model_type != "LlamaSimpleMLP":
            return
        try:
            from safetensors.torch import save_file

            path = Path(self.wandb.dir, f"model_step_{s}.safetensors")
            save_file(untied_weights(model), path)
            self.upload(path)
        except Exception as e:  # such as safetensors missing; the training is done, and must not count as failed
            self.say(f"no safetensors of the weights on W&B ({in_short(e)})")

    def say(self, text: str):
        """Print a line to the console and to main.log."""
        if self.files:
            print(text)
            print(text, file=self.files["main.log"])

    def write(self, name: str, line: dict):
        """Append a JSON line to a file of the run folder, and log it to W&B."""
        if self.files:
            print(json.dumps(line), file=self.files[name])
            self.lines[name] += 1
        if self.wandb:
            self.wandb.log(line)

    def flush(self):
        """Write the lines of the updates since the last flush. Raises UserError if one is not finite."""
        if not self.pending:
            return
        steps, begins, lrs, values = zip(*self.pending)
        values = torch.stack(values).tolist()  # waits for the device
        seconds = (time.monotonic() - begins[0]) / len(values)
        for s, lr, (loss, norm) in zip(steps, lrs, values):
            has_norm = math.isfinite(norm)  # with float16, apply_update skips an update whose norm overflows
            if not (math.isfinite(loss) and (has_norm or self.c.dtype == "float16")):
                raise UserError(
                    f"update {s} has loss {loss} and gradient norm {norm}, and nothing after it was saved: try a lower "
                    "learning rate, and look at the update's data with run_info.py --data"
                )
            line = {
                "step": s,
                "train_loss": loss,
                "lr": lr,
                "grad_norm": norm if has_norm else None,
                "tokens": s * self.tokens,
            }
            if self.update_seconds:  # the first update, which compiles, is not timed
                rate = self.tokens / seconds
                line |= {"tokens_per_s": rate, "mfu": rate / self.peak_rate}
            self.write("metrics.jsonl", line)
        self.pending = []
        self.update_seconds = seconds

    def metrics(self, s: int, values: dict):
        """Record {name: number} at step s in metrics.jsonl and on W&B. May be called anywhere in the loop."""
        self.flush()
        self.write("metrics.jsonl", {"step": s} | values)

    def finish(self, code: int):
        """The run ends with exit code 0 or INTERRUPTED: draw loss.png, end W&B's run, write the status last."""
        try:
            plot_losses({"": read_metrics(self.folder / "metrics.jsonl")}, self.folder / "loss.png")
        except ImportError:
            self.say("no loss.png: pip install matplotlib")
        if self.wandb:
            if code:
                self.wandb.mark_preempting()
            self.wandb.finish(exit_code=code)
        write_text(self.folder / "status", "interrupted\n" if code else "finished\n")


# -----------------------------------------------------------------------------
# data: shards -> x, y


def open_windows(split: str, section: DatasetConfig, seed: int, config_path: str) -> TrainingStream:
    """The windows of one split. `seed` is added to the section's own. Raises UserError if there are no windows."""
    data = Shards(section.folder(), split, config_path)
    if data.info:  # shards of other projects have no dataset.json
        there = data.info["source"][split]  # some of its keys, such as file sizes, are in no config
        if differ := differences(there, there | asked(section)):
            warnings.warn(f"{data.folder} was prepared from another config: {'; '.join(differ)}", stacklevel=2)
    return TrainingStream(data, section, seed)


def tokenizer_of(c, train: Shards, val: Shards) -> TextEncoder:
    """The tokenizer of the training data: the one beside the shards, or the one that the config names."""
    name = str(train.folder / "tokenizer.json") if train.info else c.train_dataset_config.hf_tokenizer_path
    if not name:
        raise UserError(f"{train.folder} has no dataset.json: set hf_tokenizer_path to the tokenizer of its shards")
    encoder = load_encoder(name)
    # Shards of other projects do not say which tokenizer made them.
    if len({shards.info["tokenizer"]["sha256"] for shards in (train, val) if shards.info}) > 1:
        raise UserError("the train and val data have different tokenizers: prepare both with one")
    if encoder.vocab_size > c.model.vocab_size:
        raise UserError(f"model.vocab_size must be at least {encoder.vocab_size}, the number of ids of {name}")
    return encoder


def to_tensor(windows: np.ndarray, c, p) -> torch.Tensor:
    """Windows (B, T + 1) uint16 -> int64 on this rank's device."""
    if windows.max() >= c.model.vocab_size:  # shards of other projects do not record their tokenizer
        raise UserError(
            f"the shards hold id {windows.max()}, which is not below model.vocab_size: set hf_tokenizer_path to the "
            "tokenizer that made them, and vocab_size to its size"
        )
    return torch.from_numpy(windows.astype(np.int64)).to(p.device)


def batches(stream: TrainingStream, c, p, s: int):
    """Yield this rank's windows (batch_size / world, T + 1) of updates s, s + 1, ..., each read one update ahead."""

    def read(s: int):
        # This runs in a thread. Draw random numbers in the loop instead, where they are seeded.
        mine = stream.positions(s, c.batch_size).reshape(p.world, -1)[p.rank]  # (batch_size / world,)
        return to_tensor(stream.read(mine), c, p)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, s)
        while True:
            batch = ahead.result()
            s += 1
            ahead = reader.submit(read, s)
            yield batch


# -----------------------------------------------------------------------------
# optimizers


def make_optimizers(model, c, device: torch.device) -> list:
    """[AdamW], or [AdamW, Muon for the matrices inside blocks]."""
    # Not the embeddings, which AdamW trains better.
    matrices = [w for w in model.h.parameters() if c.optimizer == "muon" and w.dim() == 2]
    adam = model.configure_optimizers(
        c.weight_decay, c.learning_rate, c.betas, device.type, c.zero_stage, without=set(matrices)
    )
    if not matrices:
        return [adam]
    # Its updates are scaled to the size of AdamW's, so that one learning rate fits both.
    return [adam, torch.optim.Muon(matrices, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw")]


def apply_update(optimizers: list, scaler, model, lr: float, c):
    """Clip the gradients, step the optimizers and clear the gradients; the norm before clipping, on the device."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
    # If float16 gradients overflow, no optimizer steps. (The scaler's own step would check each optimizer separately.)
    if scaler.is_enabled() and not norm.isfinite():
        optimizers = []
    # Muon orthogonalizes in bfloat16, which takes 17 times as long as float32 on a CPU without instructions for it.
    in_float32 = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float)
    with in_float32 if norm.device.type == "cpu" else contextlib.nullcontext():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    model.zero_grad()
    scaler.update()
    return norm


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of the device's products of large square matrices: MFU is a fraction of it."""
    # Large enough to reach the peak, small enough to take no time.
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    # .item() waits for the device.
    seconds = timeit.repeat("(a @ a)[0, 0].item()", globals={"a": a}, number=1, repeat=6)
    return 2 * n**3 / min(seconds)


# -----------------------------------------------------------------------------
# the state: a pair of files, model_step_N.pt and optim_step_N.pt


def pair(folder: Path, s: int) -> tuple[Path, Path]:
    """Where the weights and the optimizer's state after s updates are."""
    return folder / f"checkpoints/model_step_{s}.pt", folder / f"checkpoints/optim_step_{s}.pt"


def saved_steps(folder: Path) -> list[int]:
    """The updates whose optimizer's state is on disk, the newest first."""
    return list(reversed(checkpoints_in(folder, "optim")))


def save(log: Log, s: int, p, model, optimizers: list, scaler, identity: dict, with_optimizer: bool):
    """Write model_step_s.pt and, if `with_optimizer`, optim_step_s.pt: the state that a run is resumed from.

    All ranks call this; rank 0 writes. States that no longer have a use are deleted.
    """
    log.flush()  # raises if the last updates were not finite
    if with_optimizer and hasattr(optimizers[0], "consolidate_state_dict"):
        optimizers[0].consolidate_state_dict(to=0)  # ZeroRedundancyOptimizer's: rank 0 gathers the shards
    if p.rank > 0:
        return
    weights, optim = pair(log.folder, s)
    optim.unlink(missing_ok=True)  # one that is left from a corrupted pair does not belong to the new weights
    # On the CPU, so that machines without this device can read the file; by parameter, so that tied weights stay one.
    state_dict = model.state_dict(keep_vars=True)
    on_cpu = {w: w.detach().cpu() for w in state_dict.values()}
    with whole_file(weights) as f:
        torch.save({name: on_cpu[w] for name, w in state_dict.items()}, f)
    if is_checkpoint(s, log.c):
        log.upload(weights)
    if not with_optimizer:
        return
    # The lines that the state counts must be on disk before the state is.
    for file in log.files.values():
        os.fsync(file.fileno())
    about = {
        "step": s,
        "identity": identity,
        "lines": log.lines,
        "weights_sha256": sha256_file(weights),
    }
    state = {
        "about": json.dumps(about),  # a pickle's bytes would depend on which strings it shares with the others
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
    }
    with whole_file(optim) as f:
        torch.save(state, f)
    delete_states(log.folder, log.c, newest=2)


def delete_states(folder: Path, c, newest: int = 0):
    """Delete the files of all states that are not to be kept, except the `newest` states."""
    for s in saved_steps(folder)[newest:]:
        weights, optim = pair(folder, s)
        is_kept = is_checkpoint(s, c)
        # The weights go first: after a kill in between, saved_steps still finds the pair by the other file.
        if not is_kept:
            weights.unlink(missing_ok=True)
        if not (is_kept and c.keep_optimizer):
            optim.unlink(missing_ok=True)


def load_pair(folder: Path, s: int) -> dict | None:
    """The state after s updates, its weights under "model"; None if a file is missing or cut short."""
    weights, optim = pair(folder, s)
    for path in weights, optim:
        # A file that cannot be opened, unlike one that is cut short, ends the run: the fault may be temporary.
        try:
            zipfile.ZipFile(path).close()
        except (FileNotFoundError, zipfile.BadZipFile):
            return None
    state = load_file(optim)
    about = json.loads(state["about"])
    if about["step"] != s or about["weights_sha256"] != sha256_file(weights):
        raise UserError(f"{weights} is not the file that {optim} was saved with: restore it, or delete both")
    return state | about | {"model": load_file(weights)}


NEW = {"step": 0, "lines": {"metrics.jsonl": 0, "samples.jsonl": 0}}  # the state of a run that has saved none
# What a branch must have in common with its run: how the keys of its identity begin.
BRANCH_SHARES = (
    "data_sha256.0",  # of the training data
    "model.",
    "batch_size",
    "seed",
    "optimizer",
    "train_dataset_config.seed",
    "train_dataset_config.shuffle_each_epoch",
)


def load_state(c, folder: Path | None, identity: dict) -> dict:
    """The newest whole state in `folder`, or that of branch_from, or NEW. Raises UserError if it is another run's."""
    # If this run was interrupted, its own state is newer than the one it branched from.
    for s in saved_steps(folder) if folder else []:
        if state := load_pair(folder, s):
            check_same(
                state["identity"],
                identity,
                f"{folder}'s state after update {s} belongs to a run of another config (choose another run_dir)",
            )
            return state
        print(f"the state after update {s} is corrupted: trying an earlier one", file=sys.stderr)
    if c.branch_from is None:
        return NEW
    folder = local(c.branch_from)
    state = load_pair(folder, c.branch_step)
    if state is None:
        raise UserError(
            f"branch_from {folder} has no whole state after update {c.branch_step}, only after {saved_steps(folder)}: "
            "with keep_optimizer a finished run keeps the states of its checkpoints"
        )
    check_same(
        state["identity"],
        identity,
        "a branch must have branch_from's shapes and order of data",
        ignored={"model.flash_attention", "model.rotary_dim"},
        begin=BRANCH_SHARES,
    )
    return state | {"lines": NEW["lines"]}


def restore(state: dict, model, optimizers: list, scaler):
    """Put a loaded state into model, optimizers and scaler; weight decay and betas stay those of the config."""
    model.load_state_dict(state["model"])
    for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
        # The base class's method: that of ZeroRedundancyOptimizer would gather the state from all ranks.
        groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
        optimizer.load_state_dict(its_state | {"param_groups": groups})
    if state["scaler"]:  # empty if the state is of a run that needed no scaler: a branch may have another dtype
        scaler.load_state_dict(state["scaler"])


def load_pretrained(model, path: str):
    """Copy the weights that from_pretrained finds at `path` into `model`. Raises UserError."""
    found = model.from_pretrained(path)
    # Comparing shapes is not enough: rotary_base, for example, changes the outputs but no shape.
    free = {"flash_attention", "rotary_dim"}
    if hasattr(found.config, "n_ctx"):
        free |= {"block_size", "n_ctx"}  # RoPE serves any length
    check_same(
        asdict(found.config),
        asdict(model.config),
        f"the weights of {path} do not fit the model of this config",
        free,
    )
    model.load_state_dict(found.state_dict())


# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def validate(model, stream: TrainingStream, c, p, autocast, interrupt: Interrupt) -> float | None:
    """Mean loss in nats per token over the validation windows of all ranks; None if a signal came.

    The windows are the same every time: spread evenly over the split, dealt to the ranks in turn.
    """
    n = min(stream.n_windows, c.val_max_steps * c.batch_size)
    windows = (np.arange(n) * stream.n_windows // n + stream.seed) % stream.n_windows
    total = torch.zeros((), device=p.device)  # the sum of the windows' mean losses
    for i in range(0, n, p.micro * p.world):
        if interrupt.agreed():
            return None
        mine = windows[i + p.rank : i + p.micro * p.world : p.world]  # (micro,), fewer or none at the end
        if len(mine):
            ids = to_tensor(stream.data.windows(mine, stream.n_ctx), c, p)
            with autocast:
                _, loss = model(ids[:, :-1], ids[:, 1:], return_logits=False)
            total += len(mine) * loss
    if p.world > 1:
        dist.all_reduce(total)
    loss = (total / n).item()
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss}: try a lower learning rate")
    return loss


def sample(model, encoder: TextEncoder, seed: int, autocast) -> str:
    """Text after EOS, drawn by `seed` alone."""
    torch.manual_seed(seed)  # each update seeds it anew
    eos = encoder.eos_token_id
    idx = torch.tensor([eos], device=model.lm_head.weight.device)
    with autocast:
        ids = model.generate(idx, SAMPLE_TOKENS, temperature=0.8, top_k=40, eos_token_id=eos)
    return encoder.decode_batch([ids[1:].tolist()])[0]


# -----------------------------------------------------------------------------
# the run


def main(config_path: str, overrides, check: bool = False) -> int:
    """Train; the exit code. Raises UserError, before anything is written, for what the user can fix."""

    # ---- set-up: everything that can be wrong is found before anything is written
    c = load_config(config_path, overrides)
    p = this_process(c, check)
    folder = local(c.run_dir) if c.run_dir else None
    parent = local(c.output_dir or out_dir() / "target_models")  # of a new run
    if folder and (folder / "final_config.yaml").exists():
        check_same(
            read_config(folder / "final_config.yaml"),
            config_dict(c),
            f"{c.run_dir} holds a run of another config (choose another run_dir)",
            FREE_KEYS,
        )
        if not check and (folder / "status").read_text() == "finished\n":
            if p.rank == 0:
                delete_states(folder, c)  # the process may have been killed before it did this
                print(f"{folder} holds this run, finished: nothing to do")
            return 0
    train_windows = open_windows("train", c.train_dataset_config, c.seed, config_path)
    val_windows = open_windows("val", c.val_dataset_config, 0, config_path)
    encoder = tokenizer_of(c, train_windows.data, val_windows.data)
    data = dict([train_windows.data.fingerprint(), val_windows.data.fingerprint()])  # name -> sha256
    # What the run's states depend on.
    identity = c.model_dump(mode="json", exclude=FREE_KEYS) | {"data_sha256": list(data.values())}
    torch.manual_seed(c.init_seed)  # for parameters of a fork that draw_weights does not know
    model = MODEL_CLASSES[c.model.model_type](c.model, init_seed=c.init_seed)
    state = load_state(c, folder, identity)
    has_state = state is not NEW
    start = state["step"]
    if c.from_pretrained and not has_state:
        load_pretrained(model, c.from_pretrained)
    if check:
        print(folder or f"{parent}/")
        return 0

    # ---- the ranks meet; the folder says what runs
    keep_freed_memory()
    if p.rank == 0:
        folder = folder or new_folder(parent)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = hold(folder, "training in")  # noqa: F841, held until this process ends
    if p.device.type == "cuda":
        torch.cuda.set_device(p.device)
        torch.set_float32_matmul_precision("high" if c.tensorcores else "highest")
    if p.world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if p.device.type == "cuda" else "gloo")
        of_rank_0 = [folder, start]
        dist.broadcast_object_list(of_rank_0)
        folder, its_start = of_rank_0
        if start != its_start:
            raise UserError(f"the ranks see different states, after updates {start} and {its_start}")
    model.to(p.device)
    optimizers = make_optimizers(model, c, p.device)
    scaler = torch.amp.GradScaler(p.device.type, enabled=c.dtype == "float16")
    if has_state:
        restore(state, model, optimizers, scaler)
    if p.rank == 0:
        record_start(folder, c, p, encoder, data, config_path)

    # ---- numbers of the loop
    dtype = getattr(torch, c.dtype)
    autocast = torch.autocast(p.device.type, dtype, enabled=c.dtype != "float32")
    peak_rate = p.world * matrix_rate(p.device, dtype) / model.flops_per_token()
    updates = start if c.inference_only else c.num_iterations

    with Log(folder, c, p, dict(state["lines"]), peak_rate) as log:
        source = c.from_pretrained or f"seed {c.init_seed}"  # of the first weights
        n_params = sum(w.numel() for w in model.parameters())
        epochs = updates * c.batch_size / train_windows.n_windows
        log.say(
            f"{c.model.model_type}: {n_params:,} parameters from {source}, on {p.world} x {p.device.type}; "
            f"after update {start} of {updates}, {epochs:.2f} epochs; writes {folder}"
        )
        if c.wandb_project and p.rank == 0:
            log.start_wandb()
        compiled = model
        if c.compile:
            torch._dynamo.config.suppress_errors = True  # without a C++ compiler, say, the model runs eagerly
            compiled = torch.compile(model, dynamic=False)
            log.say("torch.compile: the first update compiles, which can take a minute")
        # Training goes through DDP, which averages the gradients of all ranks. Validation has none.
        trained = DDP(compiled, gradient_as_bucket_view=True) if p.world > 1 else compiled

        # ---- the loop: at its top, s updates are done
        s = start
        val_loss = None
        last_state = start if saved_steps(folder) else None  # the last update after which a state was saved here
        train_batches = batches(train_windows, c, p, s + 1)
        interrupt = Interrupt()
        while True:
            # The state is saved before the evaluation. A resumed run evaluates again, so each line is there once.
            stopping = interrupt.agreed()
            is_kept = is_checkpoint(s, c)
            with_optimizer = stopping or due(s, c.resume_every, updates) or (is_kept and c.keep_optimizer)
            if (is_kept or with_optimizer) and s != last_state and not c.inference_only:
                save(log, s, p, model, optimizers, scaler, identity, with_optimizer)
                if with_optimizer:
                    last_state = s
            if stopping:
                break
            model.eval()
            torch.manual_seed(hash((c.seed, s)))  # as below, for an evaluation that samples
            if due(s, c.val_loss_every, updates):
                log.flush()
                val_loss = validate(compiled, val_windows, c, p, autocast, interrupt)
                if val_loss is None:
                    continue  # a signal came: the top saves and ends
                log.metrics(s, {"val_loss": val_loss})
                log.say(f"step {s}/{updates} | val loss {val_loss:.4f}")
            if due(s, c.sample_every, updates):
                log.flush()
                if p.rank == 0:
                    text = sample(model, encoder, c.sample_seed + s, autocast)
                    log.write("samples.jsonl", {"step": s, "text": text})
                    log.say(f"step {s}/{updates} | sample:\n{text}\n")
            if s == updates:
                break

            # ---- update s + 1
            model.train()
            began = time.monotonic()
            s += 1
            # Anything random in a fork, such as dropout, is the same after an interruption.
            torch.manual_seed(hash((c.seed, s, p.rank)))  # the hash of integers is the same in every process
            loss = 0.0  # the mean over micro-batches and ranks
            micro_batches = next(train_batches).split(p.micro)  # (micro, T + 1) each
            n_micro = len(micro_batches)
            for ids in micro_batches:
                # DDP sums gradients over the ranks once an update, with the last micro-batch.
                if p.world > 1:
                    trained.require_backward_grad_sync = ids is micro_batches[-1]
                with autocast:
                    _, part_loss = trained(ids[:, :-1], ids[:, 1:], return_logits=False)
                scaler.scale(part_loss / n_micro).backward()
                loss += part_loss.detach() / (n_micro * p.world)
            if p.world > 1:
                dist.all_reduce(loss)
            lr = learning_rate_at(s, c)
            norm = apply_update(optimizers, scaler, model, lr, c)
            # The losses stay on the device until log.flush(), which raises if one is not finite.
            log.pending.append((s, began, lr, torch.stack((loss, norm))))
            if s == start + 1 or due(s, c.train_log_every, updates):
                log.flush()
                log.say(
                    f"step {s}/{updates} | loss {loss:.4f} | norm {norm:.3f} | lr {lr:.2e} | "
                    f"{1000 * log.update_seconds:.1f} ms | {log.tokens / log.update_seconds:,.0f} tokens/s | "
                    f"{log.update_seconds * (updates - s) / 3600:.2f} h left"
                )

        # ---- the end
        if p.rank == 0:
            if stopping:
                log.say(f"interrupted after update {s}: the same command with run_dir={folder} resumes the run")
                log.finish(INTERRUPTED)
            else:
                # One window of ids and the loss on it tell a reader whether the model it loads is the one trained here.
                ids = to_tensor(val_windows.data.windows([0], val_windows.n_ctx), c, p)  # (1, T + 1)
                with torch.no_grad():  # as its readers do: a fork's loss may have terms for training alone
                    _, loss = model(ids[:, :-1], ids[:, 1:])
                value = {"step": s, "val_loss": val_loss, "ids": ids[0].tolist(), "loss": loss.item()}
                write_json(folder / "check.json", value)
                log.upload(folder / "check.json")
                log.upload_safetensors(model, s)
                log.say(f"done: {folder}")
                log.finish(0)
                delete_states(folder, c)
    if p.world > 1:
        dist.barrier()  # the launcher may end the others when the first rank exits: rank 0 writes before that
    return INTERRUPTED if stopping else 0


if __name__ == "__main__":
    args = [arg for arg in sys.argv[1:] if arg != "--check"]
    check = "--check" in sys.argv
    if set(args) <= {"-h", "--help"}:  # no config is named
        print(__doc__)
        # The source tells every key with its type, bounds, default and meaning.
        for section in (Config, DatasetConfig, *MODEL_CONFIGS):
            print(inspect.getsource(section))
        sys.exit(0 if args else 2)  # without --help, a missing config is a mistake
    reports = os.environ.get("LOCAL_RANK", "0") == "0"  # all ranks of a node find the same mistake: one reports it
    warnings.formatwarning = lambda message, *_: f"train: {message}\n"
    if not reports:
        warnings.simplefilter("ignore")
    # A line is seen at once, however the process ends. A sample may hold what the console's encoding cannot.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    code = 1
    try:
        code = main(args[0], args[1:], check)
    except (UserError, OSError) as e:
        if reports or dist.is_initialized() or isinstance(e, DeviceError):
            print(f"train: {e}", file=sys.stderr)
    except BaseException:  # with several ranks, none may wait for the others in the interpreter's clean-up
        traceback.print_exc()
    end_process(code)
