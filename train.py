"""Pretrain one of models.py's models on the shards that prepare_data.py wrote.

    python train.py configs/quickstart.yaml [key=value ...]
    torchrun --nproc_per_node=4 train.py configs/x.yaml [key=value ...]
    python train.py --help                   every key with its type, bounds, default and meaning
    python train.py --check configs/x.yaml   check all that needs no GPU and write nothing; print the run folder, or,
                                             for a new run, the folder that will hold it, with a / at the end

The same config gives the same weights: the order of the data depends neither on the number of ranks nor on
micro_batch_size. With run_dir=DIR the same command resumes an interrupted run.
"""

import contextlib
import inspect
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Union

import numpy as np
import torch
import torch.distributed as dist
import yaml
from pydantic import AfterValidator, Field, model_validator
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.overrides import TorchFunctionMode

from models import MODEL_CLASSES, adamw, load_file
from prepare_data import (
    DatasetConfig,
    Section,
    Shards,
    TrainingStream,
    UserError,
    asked,
    dataset_configs,
    differences,
    hold,
    load_encoder,
    read_config,
    sha256_file,
    text_tokenizer,
    tokenizer_config,
    validated,
    whole_file,
    write_text,
)
from run_info import SAMPLE_TOKENS, out_dir, plot_losses, pretrained_model, read_metrics

# -----------------------------------------------------------------------------
# config

MUON_LEARNING_RATE = 0.005  # the best of 0.002, 0.003, 0.005 and 0.008: docs/PERFORMANCE.md
AnyModelConfig = Union[tuple(model.config_class for model in MODEL_CLASSES.values())]  # noqa: UP007, it is computed
Count = Annotated[int, Field(ge=0, le=2**31)]
Positive = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=0, le=2**62)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Folder = Annotated[str, AfterValidator(os.path.expanduser)]


class Config(Section):
    """A run's YAML. Keys that SPD's pretraining YAML has, too, mean the same there."""

    # the run
    model: AnyModelConfig = Field(discriminator="model_type", description="model_type and the fields of its config")
    train_dataset_config: DatasetConfig = Field(description="the data to train on")
    val_dataset_config: DatasetConfig = Field(description="the data to validate on")
    batch_size: Positive = Field(description="sequences in the global batch, over ranks and micro-batches")
    num_iterations: Positive = Field(description="optimizer updates")
    seed: Seed = Field(0, description="of the order of the training data")
    init_seed: Seed = Field(42, description="of the initial weights")
    from_pretrained: str | None = Field(None, description="start from the weights of a run, W&B run or hub model")
    branch_from: Folder | None = Field(
        None, description="start from the state of this run: weights, optimizer, data order"
    )
    branch_step: Count | None = Field(None, description="... as it was after so many updates")
    inference_only: bool = Field(False, description="validate and sample, update nothing")

    # the optimizer
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for matrices in blocks, AdamW beside")
    learning_rate: Rate = Field(description="the peak, reached at update warmup_iters")
    muon_learning_rate: Rate | None = Field(None, description="the peak with muon; null: 0.005")
    warmup_iters: Count = Field(description="updates of linear warm-up; a cosine follows")
    learning_rate_decay_frac: Fraction = Field(description="the last update's rate as a fraction of the peak")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's")
    weight_decay: float = Field(ge=0, le=1e6, description="on tensors of two dimensions and more")
    grad_clip: float | None = Field(gt=0, description="largest gradient norm; null: no clipping")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="1 shards the optimizer's state; 2 and 3 are refused")

    # precision and speed
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="of matrix products; float16 needs CUDA")
    micro_batch_size: Positive | None = Field(None, description="sequences per rank and forward; null: all")
    device: str | None = Field(None, pattern=r"^(cpu|mps|cuda(:\d{1,4})?)$", description="null: the best there is")
    compile: bool = Field(True, description="torch.compile the model")
    tensorcores: bool = Field(True, description="TF32 for float32 products on CUDA")

    # evaluation and output
    val_loss_every: Count = Field(description="updates between validations; 0: none")
    val_max_steps: Positive = Field(description="most batches of batch_size windows in a validation")
    sample_every: Count = Field(description="updates between samples of text; 0: none")
    sample_seed: Seed = Field(0, description="of the sampled text")
    train_log_every: Positive = Field(100, description="updates between lines on the console")
    intermediate_checkpoints: bool = Field(description="keep weights at 0, 1, 2, 4 ... 512, 1000, 2000 ...")
    checkpoint_steps: list[Count] | None = Field(None, description="keep weights at these updates, too")
    checkpoint_every: Count = Field(0, description="keep weights every so many updates, too; 0: do not")
    keep_optimizer: bool = Field(False, description="keep optim_step_N.pt beside every kept model_step_N.pt")
    resume_every: Count = Field(1000, description="updates between saved states; 0: only on a signal")
    output_dir: Folder | None = Field(None, description="holds new runs; null: ${SPD_OUT_DIR:-out}/target_models")
    run_dir: Folder | None = Field(None, description="the run's folder; an interrupted run in it is resumed")
    wandb_project: str | None = Field(None, description="log to this W&B project; null: do not")

    @model_validator(mode="after")
    def keys_fit_together(self):
        muon, n_ctx = self.optimizer == "muon", self.model.block_size + 1
        if self.train_dataset_config.n_ctx != n_ctx or self.val_dataset_config.n_ctx != n_ctx:
            raise ValueError(f"n_ctx of both datasets must be {n_ctx}, the model's + 1: a window is input and target")
        if max(self.checkpoint_steps or [0]) > self.num_iterations:
            raise ValueError(f"checkpoint_steps goes beyond num_iterations ({self.num_iterations})")
        if self.zero_stage > (0 if muon else 1):
            raise ValueError(
                "zero_stage must be 0, or 1 to shard AdamW's state: Muon's cannot be, nor other stages be had"
            )
        if self.muon_learning_rate and not muon:
            raise ValueError("muon_learning_rate has no effect with optimizer adamw: leave it out")
        if muon and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer muon needs torch 2.9 or later, and this is {torch.__version__}")
        if (self.branch_from is None) != (self.branch_step is None) or (self.branch_from and self.from_pretrained):
            raise ValueError("branch_from goes together with branch_step, and without from_pretrained")
        if (self.branch_step or 0) >= self.num_iterations:
            raise ValueError(f"num_iterations must be above branch_step ({self.branch_step})")
        return self


# A resumed run may change these: they do not change what is computed, save for the order of sums.
FREE_KEYS = {"train_log_every", "micro_batch_size", "device", "compile", "output_dir", "run_dir", "resume_every"}
FREE_KEYS |= {"wandb_project"}


def load_config(path, overrides=()) -> Config:
    """The checked config of the YAML at `path` with key=value overrides. Raises UserError and writes nothing."""
    raw = read_config(path, overrides)
    sections = {f"{split}_dataset_config": section for split, section in dataset_configs(raw).items()}
    return validated(Config, raw | sections)


def config_dict(c: Config) -> dict:
    """The config as plain values with every default; without run_dir, so that running it again makes a new run."""
    return c.model_dump(mode="json") | {"run_dir": None}


def state_config(c: Config) -> dict:
    """The part of the config that a saved state depends on."""
    return {k: v for k, v in config_dict(c).items() if k not in FREE_KEYS}


def check_same_run(there: dict, c: Config, what: str) -> None:
    """Raise UserError, naming the keys, if `there`, the config of `what`, is not that of the run `c`."""
    # Validated first, so that keys that are newer than the run have their defaults.
    there = state_config(validated(Config, there, f"{what}: "))
    if differ := differences(there, state_config(c)):
        raise UserError(f"{what} belongs to a run of another config: {'; '.join(differ)}; choose another run_dir")


def print_help() -> None:
    """Print every key with its type, bounds, default and meaning."""
    print(__doc__)
    for title, section in (("keys", Config), ("keys of train_dataset_config and val_dataset_config", DatasetConfig)):
        print(f"{title}:")
        for name, field in section.model_fields.items():
            kind = getattr(field.annotation, "__name__", str(field.annotation)) if name != "model" else "section"
            about = [kind.replace("typing.", ""), *map(str, field.metadata)]
            about.append("required" if field.is_required() else f"default {field.default!r}")
            print(f"  {name} ({', '.join(about)}): {field.description}")
    for name, model in MODEL_CLASSES.items():
        print(f"keys of model with model_type {name}: {inspect.signature(model.config_class)}")


# -----------------------------------------------------------------------------
# schedule


def learning_rate_at(s: int, c: Config) -> float:
    """The learning rate of update s = 1, 2, ..., num_iterations."""
    peak = c.learning_rate if c.optimizer == "adamw" else c.muon_learning_rate or MUON_LEARNING_RATE
    # linear warm-up
    if s <= c.warmup_iters:
        return peak * s / c.warmup_iters
    # cosine from the peak at warmup_iters to `least` at num_iterations
    least = peak * c.learning_rate_decay_frac
    progress = (s - c.warmup_iters) / (c.num_iterations - c.warmup_iters)
    return least + (peak - least) * (1 + math.cos(math.pi * progress)) / 2


def is_checkpoint(s: int, c: Config) -> bool:
    """Whether the weights after s updates are kept."""
    early = s < 1000 and s & (s - 1) == 0  # 0, 1, 2, 4 ... 512
    asked_for = s in (c.checkpoint_steps or ()) or (c.checkpoint_every > 0 and s % c.checkpoint_every == 0)
    return s == c.num_iterations or asked_for or (c.intermediate_checkpoints and (early or s % 1000 == 0))


def due(s: int, every: int, last: int) -> bool:
    """Whether what happens every `every` updates (0: never), at the start and at the end, happens after update s."""
    return every > 0 and (s % every == 0 or s == last)


# -----------------------------------------------------------------------------
# the process: its rank, its device, the signals it gets, how it ends

INTERRUPTED = 75  # exit code (EX_TEMPFAIL): the state is saved, and the same command resumes the run


class Ranks(Section):
    """What torchrun and slurm_submit.sh say in the environment."""

    RANK: Count = 0
    LOCAL_RANK: Count = 0
    WORLD_SIZE: Positive = 1


@dataclass(frozen=True)
class Process:
    """One of `world` processes that train together."""

    rank: int
    world: int
    micro: int  # sequences in one forward
    device: torch.device


def this_process(c: Config, check: bool) -> Process:
    """Rank and device of this process; with `check`, none. Raises UserError for ranks and devices that cannot be."""
    found = validated(Ranks, {name: os.environ[name] for name in Ranks.model_fields if name in os.environ})
    rank, world, local = found.RANK, found.WORLD_SIZE, found.LOCAL_RANK
    if rank >= world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world}: ranks go from 0 to WORLD_SIZE - 1")
    if c.batch_size % (world * (c.micro_batch_size or 1)):
        raise UserError(
            f"batch_size {c.batch_size} is not divisible by ranks x micro_batch_size ({world} x {c.micro_batch_size})"
        )
    micro = c.micro_batch_size or c.batch_size // world
    if check:  # a login node need not have a GPU
        return Process(rank, world, micro, torch.device("meta"))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(c.device or best)
    if device.index is not None and world > 1:
        raise UserError(f"device {device} for {world} ranks: leave out the number, each rank takes its own GPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # what torch raises for a device that does not exist
        raise UserError(
            f"device {device} does not work here: set device=cpu or fewer ranks ({e})".split("\n")[0]
        ) from e
    if c.dtype == "float16" and device.type != "cuda":
        raise UserError(f"dtype float16 needs CUDA (device is {device}): use bfloat16 or float32")
    return Process(rank, world, micro, device)


class Interrupt:
    """Whether SIGTERM, SIGUSR1 or SIGINT has asked the run to save and stop."""

    def __init__(self, world: int):
        self.world = world
        self.received_at = None  # seconds, of the first signal
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.receive)

    def receive(self, number, _frame) -> None:
        now = time.monotonic()
        # One Ctrl-C may arrive twice, from the terminal and from torchrun; only a later one is the user's second.
        if number == signal.SIGINT and self.received_at is not None and now - self.received_at > 1:
            raise KeyboardInterrupt
        self.received_at = self.received_at or now

    def agreed(self) -> bool:
        """Whether a signal has reached any rank. All ranks call this at the same places, so they agree."""
        if self.world == 1:
            return self.received_at is not None
        flag = torch.tensor(int(self.received_at is not None))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def end_process(code: int) -> NoReturn:
    """End this process as sys.exit does; one of several ranks ends without the interpreter's clean-up.

    That clean-up hung once in thirty runs: DDP's destructor holds Python's lock and joins a thread that wants it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


# -----------------------------------------------------------------------------
# the run folder


def parent_of_runs(c: Config) -> Path:
    """The folder in which new runs get theirs."""
    return Path(c.output_dir or out_dir() / "target_models")


def make_folder(c: Config) -> Path:
    """The run's folder: run_dir, or else a new one named by the time."""
    if c.run_dir:
        Path(c.run_dir).mkdir(parents=True, exist_ok=True)
        return Path(c.run_dir)
    while True:
        folder = parent_of_runs(c) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run started in this second
            time.sleep(0.1)


def copy_code(folder: Path, config_path: str) -> None:
    """Keep the scripts as they run, the config and the git commit in code/, unless they run from there already."""
    here, code = Path(__file__).resolve().parent, folder.resolve() / "code"
    if here == code:
        return
    code.mkdir(exist_ok=True)
    for path in (*here.glob("*.py"), *here.glob("*.sh"), Path(config_path)):
        shutil.copy(path, code / path.name)
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout
    write_text(code / "git_commit", commit)


def record_start(folder: Path, p: Process, data: list[Shards]) -> None:
    """Append an entry to environment.json: what this start of the run depends on besides its config."""
    path = folder / "environment.json"
    entry = {
        "started": datetime.now().isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": (folder / "code" / "git_commit").read_text().strip() or None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(p.device) if p.device.type == "cuda" else p.device.type,
        "ranks": p.world,
        "dataset_sha256": dict(shards.fingerprint() for shards in data),
    }
    starts = json.loads(path.read_text()) if path.exists() else []
    write_text(path, json.dumps([*starts, entry], indent=1) + "\n")


def keep_lines(path: Path, n: int) -> None:
    """Cut a file to its first n lines: a resumed run writes the others again."""
    if path.exists():
        write_text(path, "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:n]))


# -----------------------------------------------------------------------------
# log: what a run says

NO_LINES = {"metrics.jsonl": 0, "samples.jsonl": 0}  # of a new run


class Log:
    """Writes to the console and main.log for people, to metrics.jsonl, samples.jsonl and W&B for programs.

    Losses stay on the device, so that an update does not wait for them, until flush(), which comes before anything
    else is written or saved. Every rank has a Log, and finds a loss that is not finite; only rank 0's writes.
    """

    def __init__(self, folder: Path, c: Config, p: Process, lines: dict[str, int], peak: float):
        self.folder, self.c, self.writes = folder, c, p.rank == 0
        self.lines = lines  # file -> lines in it
        self.peak = peak  # tokens/s if matrix products took all the time, at their largest rate
        self.pending = []  # (update, learning rate, loss and gradient norm) since the last flush
        self.rate = None  # tokens/s of the last flush; none for the first update, which compiles
        self.began = None  # when the first of the pending updates began
        self.wandb = None  # W&B's run
        if self.writes:
            # Line-buffered: what was said is on disk, up to the line, however the run ends.
            self.main_log = open(folder / "main.log", "a", buffering=1, encoding="utf-8")
            self.files = {name: open(folder / name, "a", buffering=1, encoding="utf-8") for name in lines}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Say in main.log and status what ended the run, whatever it was."""
        if error is not None and self.writes:
            with contextlib.suppress(OSError):  # a full disk may be what ended it
                lines = [f"{error}\n"] if isinstance(error, UserError) else traceback.format_exception(error)
                self.main_log.writelines(lines)
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                write_text(self.folder / "status", f"{status}\n")

    def start_wandb(self) -> None:
        """Log to W&B, too; a resumed run goes on in the same W&B run."""
        import wandb

        id_file = self.folder / "wandb_run_id"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        about = {"project": self.c.wandb_project, "dir": self.folder, "id": id_file.read_text(), "resume": "allow"}
        about["config"] = config_dict(self.c)
        try:
            self.wandb = wandb.init(**about)
        except Exception as e:  # no network, no login, a server in trouble: wandb's exceptions vary
            self.say(f"W&B does not start ({' '.join(str(e).split())}): logging offline, for `wandb sync` later")
            wandb.teardown()  # or else the id counts as in use
            self.wandb = wandb.init(**about, mode="offline")
        self.wandb.define_metric("step")
        self.wandb.define_metric("*", step_metric="step")  # its own step would have to grow from row to row
        for name in ("final_config.yaml", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
            self.upload(self.folder / name)

    def upload(self, path: Path) -> None:
        """Send a file to the root of the W&B run, where SPD looks for it."""
        if self.wandb:
            self.wandb.save(path, base_path=path.parent, policy="now")

    def say(self, text: str) -> None:
        """A line for people."""
        if self.writes:
            print(text, flush=True)
            print(text, file=self.main_log)

    def write(self, name: str, line: dict) -> None:
        """A line for programs."""
        if self.writes:
            print(json.dumps(line), file=self.files[name])
            self.lines[name] += 1
            if self.wandb and "text" in line:
                import wandb

                line = {"step": line["step"], "generation_tables": wandb.Table(list(line), [list(line.values())])}
            if self.wandb:
                self.wandb.log(line)

    def update_begins(self) -> None:
        if not self.pending:
            self.began = time.monotonic()

    def update_done(self, s: int, lr: float, loss, norm) -> None:
        """Note update s; loss and norm are scalars on the device, the same on every rank."""
        self.pending.append((s, lr, torch.stack((loss, norm))))

    def flush(self) -> None:
        """Write the lines of the updates since the last flush. Raises UserError if one is not finite."""
        if not self.pending:
            return
        values = torch.stack([v for _, _, v in self.pending]).tolist()  # waits for the device
        per_update = self.c.batch_size * self.c.model.block_size
        rate = len(values) * per_update / (time.monotonic() - self.began)
        for (s, lr, _), (loss, norm) in zip(self.pending, values, strict=True):
            # float16's scaler skips an update whose norm overflows; any other would spoil the weights
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.c.dtype == "float16"):
                raise UserError(
                    f"update {s} has loss {loss} and gradient norm {norm}: no state after it was saved; "
                    f"python run_info.py {self.folder} --data {s} shows its data; a lower learning rate may help"
                )
            norm = norm if math.isfinite(norm) else None
            line = {"step": s, "train_loss": loss, "lr": lr, "grad_norm": norm, "tokens": s * per_update}
            if self.rate:
                line |= {"tokens_per_s": rate, "mfu": rate / self.peak}
            self.write("metrics.jsonl", line)
        self.pending, self.rate, self.last = [], rate, line

    def metrics(self, s: int, values: dict) -> None:
        """Record {name: number} at step s in metrics.jsonl and on W&B. May be called anywhere in the loop."""
        self.flush()
        self.write("metrics.jsonl", {"step": s} | values)

    def sync(self) -> None:
        """Bring metrics and samples to the disk: a saved state must not be ahead of them."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def finish(self, status: str, code: int) -> None:
        """The run ends as `status`: draw loss.png, end W&B's run, write the status last."""
        try:
            plot_losses({"": read_metrics(self.folder / "metrics.jsonl")}, self.folder / "loss.png")
        except ImportError:
            self.say("no loss.png: pip install matplotlib")
        if self.wandb:
            if code == INTERRUPTED:
                self.wandb.mark_preempting()
            self.wandb.finish(exit_code=code)
        write_text(self.folder / "status", f"{status}\n")


# -----------------------------------------------------------------------------
# data: shards -> x, y


def open_data(c: Config, config_path: str) -> tuple[TrainingStream, Shards, list[str]]:
    """(training stream, validation shards, notes for the log). Raises UserError if they do not fit the config."""
    notes, tokenizers, data = [], set(), {}
    for split, section in (("train", c.train_dataset_config), ("val", c.val_dataset_config)):
        shards = data[split] = Shards(section.folder(), split, f"python prepare_data.py {config_path}")
        if shards.info:  # shards of other projects do not tell
            tokenizers.add(shards.info["tokenizer"]["sha256"])
            there, here = shards.info["source"][split], asked(section)
            if differ := differences({k: there.get(k) for k in here}, here):
                notes.append(f"note: {shards.folder} was prepared from another config: {'; '.join(differ)}")
    if len(tokenizers) > 1:
        raise UserError(f"{data['train'].folder} and {data['val'].folder} have different tokenizers: use one for both")
    TrainingStream(data["val"], c.val_dataset_config, c.seed)  # UserError if there is no window
    return TrainingStream(data["train"], c.train_dataset_config, c.seed), data["val"], notes


def tokenizer_of(c: Config, data: Shards) -> tuple[bytes, int]:
    """(tokenizer.json, id of EOS) of the training data; the config names it where the data do not."""
    if data.info:
        tokenizer_json, about = (data.folder / "tokenizer.json").read_bytes(), data.info["tokenizer"]
        vocab_size, eos = about["vocab_size"], about["eos_token_id"]
    elif c.train_dataset_config.hf_tokenizer_path:
        encoder = load_encoder(c.train_dataset_config.hf_tokenizer_path)
        tokenizer_json, vocab_size, eos = encoder.json, encoder.vocab_size, encoder.eos_token_id
    else:
        raise UserError(
            f"{data.folder} has no dataset.json: set train_dataset_config.hf_tokenizer_path to its tokenizer"
        )
    if vocab_size > c.model.vocab_size:
        raise UserError(f"model.vocab_size is {c.model.vocab_size}, but the data's tokenizer has {vocab_size} ids")
    return tokenizer_json, eos


def to_tensors(windows: np.ndarray, vocab_size: int, device: torch.device):
    """Windows (B, T + 1) uint16 -> x, y (B, T) int64 in host memory, pinned for CUDA."""
    if windows.max() >= vocab_size:  # shards of other projects say nothing of their tokenizer
        raise UserError(
            f"the shards hold id {windows.max()}, outside the model's {vocab_size} ids: set hf_tokenizer_path to the "
            "tokenizer that made them, and model.vocab_size to its size"
        )
    x, y = (torch.from_numpy(part.astype(np.int64)) for part in (windows[:, :-1], windows[:, 1:]))
    return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)


def batches(stream: TrainingStream, c: Config, p: Process, s: int):
    """Yield this rank's x, y (batch_size / world, T) of updates s, s + 1, ..., each read one update ahead."""
    per_rank = c.batch_size // p.world

    def read(s: int):
        first = (s - 1) * c.batch_size + p.rank * per_rank
        return to_tensors(stream.read(np.arange(first, first + per_rank)), c.model.vocab_size, p.device)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, s)
        while True:
            batch = ahead.result()
            s += 1
            ahead = reader.submit(read, s)
            yield batch


# -----------------------------------------------------------------------------
# optimizers


class Float32ForBfloat16(TorchFunctionMode):
    """Within it x.bfloat16() is x.float().

    Muon orthogonalizes in bfloat16, which takes a CPU without units for it 17 times as long as float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.Tensor.float if func is torch.Tensor.bfloat16 else func)(*args, **(kwargs or {}))


def make_optimizers(model, c: Config, device: torch.device) -> list:
    """[AdamW], or [Muon for the matrices inside blocks, AdamW for the rest]."""
    if c.optimizer == "adamw":
        return [model.configure_optimizers(c.weight_decay, c.learning_rate, c.betas, device.type, c.zero_stage)]
    matrices = [w for w in model.h.parameters() if w.dim() == 2]  # not the embeddings, which AdamW trains better
    inside = set(map(id, matrices))
    others = [w for w in model.parameters() if id(w) not in inside]
    # Its updates are scaled to the size of AdamW's, so that one learning rate fits both.
    muon = torch.optim.Muon(matrices, c.learning_rate, c.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(others, c.weight_decay, c.learning_rate, c.betas, device.type)]


def apply_update(optimizers: list, scaler, model, lr: float, c: Config):
    """Clip the gradients, step the optimizers and clear the gradients; the norm before clipping, on the device."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
    on_cpu = model.lm_head.weight.device.type == "cpu"
    with Float32ForBfloat16() if on_cpu else contextlib.nullcontext():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return norm.detach()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of the device's products of large square matrices: MFU is a fraction of it."""
    # Large enough to reach the peak, small enough to take no time.
    n, times = 8192 if device.type == "cuda" else 512, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


# -----------------------------------------------------------------------------
# the state: a pair of files, model_step_N.pt and optim_step_N.pt


def pair(folder: Path, s: int) -> tuple[Path, Path]:
    """Where the weights and the optimizer's state after s updates are."""
    return folder / "checkpoints" / f"model_step_{s}.pt", folder / "checkpoints" / f"optim_step_{s}.pt"


def saved_steps(folder: Path) -> list[int]:
    """The updates whose optimizer's state is on disk, in order."""
    # Only names with a number: a user may have put other files there.
    names = [path.stem.removeprefix("optim_step_") for path in (folder / "checkpoints").glob("optim_step_*.pt")]
    return sorted(int(name) for name in names if name.isdecimal())


def save(log: Log, s: int, p: Process, model, optimizers: list, scaler, data: list[str], resumable: bool) -> None:
    """Write model_step_s.pt and, to make it a state that a run resumes from, optim_step_s.pt.

    All ranks call this; rank 0 writes. States that no longer have a use are deleted.
    """
    log.flush()  # raises if the last updates were not finite
    if resumable and log.c.zero_stage == 1 and p.world > 1:
        optimizers[0].consolidate_state_dict(to=0)
    if p.rank > 0:
        return
    weights, optim = pair(log.folder, s)
    optim.unlink(missing_ok=True)  # if there is one, it was corrupted, and does not belong to these weights
    tensors, copies = model.state_dict(), {}
    for t in tensors.values():
        copies.setdefault(t.data_ptr(), t.cpu())  # tied tensors stay one, and are written once
    with whole_file(weights) as f:
        torch.save({name: copies[t.data_ptr()] for name, t in tensors.items()}, f)
    if is_checkpoint(s, log.c):
        log.upload(weights)
    if resumable:
        log.sync()
        about = {"step": s, "config": state_config(log.c), "data": data, "lines": log.lines}
        about["weights_sha256"] = sha256_file(weights)
        state = {"about": json.dumps(about), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        state["scaler"] = scaler.state_dict()
        with whole_file(optim) as f:
            torch.save(state, f)
        delete_states(log.folder, log.c, saved_steps(log.folder)[:-2])


def delete_states(folder: Path, c: Config, steps: list[int]) -> None:
    """Delete the files of these states that are not to be kept."""
    for s in steps:
        weights, state = pair(folder, s)
        if not (is_checkpoint(s, c) and c.keep_optimizer):
            state.unlink(missing_ok=True)
        if not is_checkpoint(s, c):
            weights.unlink(missing_ok=True)


def load_pair(folder: Path, s: int) -> dict | None:
    """The state after s updates, its weights under "model"; None if a file is missing or cut short."""
    weights, path = pair(folder, s)
    for file in (weights, path):
        if not file.exists():
            return None
        with open(file, "rb") as f:
            if not zipfile.is_zipfile(f):
                return None
    state = load_file(path)
    about = json.loads(state["about"])
    if about["step"] != s or about["weights_sha256"] != sha256_file(weights):
        raise UserError(f"{weights} is not the file that {path} was saved with: restore it, or delete {path}")
    return state | about | {"model": load_file(weights)}


BRANCH_SHARES = "model.", "batch_size ", "seed ", "optimizer ", "train_dataset_config.n_ctx "
BRANCH_SHARES += "train_dataset_config.seed ", "train_dataset_config.shuffle_each_epoch "


def load_state(c: Config, data: list[str]) -> dict | None:
    """The newest whole state in run_dir, or that of branch_from, or None. Raises UserError if it is another run's."""
    folder = Path(c.run_dir or ".")
    # An interrupted run goes before the branch that it began as.
    for s in reversed(saved_steps(folder) if c.run_dir else []):
        if state := load_pair(folder, s):
            check_same_run(state["config"], c, str(pair(folder, s)[1]))
            if state["data"] != data:
                raise UserError(f"the data were prepared again since {folder} began with them: choose another run_dir")
            return state
        print(f"the state of {folder} after update {s} is corrupted: trying an earlier one", file=sys.stderr)
    if c.branch_from is None:
        return None
    folder = Path(c.branch_from)
    state = load_pair(folder, c.branch_step)
    if state is None:
        raise UserError(
            f"branch_from {folder} has no whole optim_step_{c.branch_step}.pt with its model_step; it has those of "
            f"{saved_steps(folder)}: keep_optimizer: true keeps them when a run is finished"
        )
    differ = [d for d in differences(state["config"], state_config(c)) if d.startswith(BRANCH_SHARES)]
    if state["data"][0] != data[0]:
        differ.append("the training data")
    if differ:
        raise UserError(f"a branch must have the shapes and the order of data of {folder}: {'; '.join(differ)} differ")
    return state | {"lines": NO_LINES}


def restore(state: dict, model, optimizers: list, scaler) -> None:
    """Put a loaded state into model, optimizers and scaler; weight decay and betas stay those of the config."""
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        groups = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(own)
    scaler.load_state_dict(state["scaler"])


def load_pretrained(model, path: str) -> str:
    """Copy the weights that from_pretrained finds at `path` into `model`; their source. Raises UserError."""
    found, source = pretrained_model(type(model), path)
    # Not the shapes alone: rotary_base, say, changes the outputs but no shape.
    free = {"flash_attention", "rotary_dim"}
    if hasattr(found.config, "n_ctx"):
        free |= {"block_size", "n_ctx"}  # RoPE serves any length
    if differ := differences(asdict(found.config), asdict(model.config), free):
        raise UserError(f"the weights of {path} do not fit the model of this config: {'; '.join(differ)}")
    model.load_state_dict(found.state_dict())
    return str(source)


# -----------------------------------------------------------------------------
# evaluation

SAMPLE_TEMPERATURE, SAMPLE_TOP_K = 0.8, 40


@torch.no_grad()
def validate(model, data: Shards, c: Config, p: Process, autocast, interrupt: Interrupt) -> float | None:
    """Mean loss in nats per token over the validation windows of all ranks; None if a signal came.

    The windows are the same every time: spread evenly over the split, dealt to the ranks in turn.
    """
    n_ctx = c.model.block_size + 1
    found = data.n_tokens // n_ctx  # windows in the split
    n = min(found, c.val_max_steps * c.batch_size)
    ids = (np.arange(n) * found // n + (c.val_dataset_config.seed or 0)) % found
    total = torch.zeros(2, device=p.device)  # sum of the windows' mean losses, windows
    for i in range(0, n, p.micro * p.world):
        if interrupt.agreed():
            return None
        mine = ids[i + p.rank : i + p.micro * p.world : p.world]  # (micro,), fewer or none at the end
        if len(mine):
            # A last batch that is not full is filled up, so that nothing is compiled again, but -1 does not count.
            x, y = to_tensors(data.windows(np.resize(mine, p.micro), n_ctx), c.model.vocab_size, p.device)
            y[len(mine) :] = -1
            with autocast:
                _, loss = model(x.to(p.device), y.to(p.device), return_logits=False)
            total += len(mine) * torch.stack((loss, torch.ones_like(loss)))
    if p.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def sample(model, tokenizer, eos: int, seed: int, autocast) -> str:
    """Text after EOS, drawn by `seed` alone."""
    torch.manual_seed(seed)  # each update seeds it anew
    with autocast:
        idx = torch.tensor([eos], device=model.lm_head.weight.device)
        ids = model.generate(idx, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, eos)
    return tokenizer.decode([i for i in ids.tolist() if i != eos])


@torch.no_grad()
def check_value(model, data: Shards) -> dict:
    """One window of ids and the float32 loss on it, by which a reader can tell whether it loaded this very model."""
    ids = data.tokens(0, model.config.block_size + 1).astype(np.int64)
    window = torch.from_numpy(ids).to(model.lm_head.weight.device)[None]
    _, loss = model(window[:, :-1], window[:, 1:])
    return {"ids": ids.tolist(), "loss": loss.item()}


# -----------------------------------------------------------------------------
# the run


def main(config_path: str, overrides: list[str], check: bool = False) -> int:
    """Train; the exit code. Raises UserError, before anything is written, for what the user can mend."""

    # ---- set-up: everything that can be wrong is found before anything is written
    c = load_config(config_path, overrides)
    p = this_process(c, check)
    run_dir = Path(c.run_dir) if c.run_dir else None
    if run_dir and (run_dir / "final_config.yaml").exists():
        check_same_run(read_config(run_dir / "final_config.yaml"), c, c.run_dir)
        if not check and (run_dir / "status").read_text() == "finished\n":
            if p.rank == 0:
                delete_states(run_dir, c, saved_steps(run_dir))  # a kill may have come before that
                print(f"{run_dir} holds this run, finished: nothing to do")
            return 0
    stream, val_data, notes = open_data(c, config_path)
    tokenizer_json, eos = tokenizer_of(c, stream.data)
    tokenizer = text_tokenizer(tokenizer_json)
    data_sha256 = [shards.fingerprint()[1] for shards in (stream.data, val_data)]
    if c.wandb_project:
        import wandb  # noqa: F401, now rather than after the run has begun
    model = MODEL_CLASSES[c.model.model_type](c.model, init_seed=c.init_seed)
    source, state = f"seed {c.init_seed}", load_state(c, data_sha256)
    if c.from_pretrained and not state:
        source = load_pretrained(model, c.from_pretrained)
    if check:
        for note in notes:
            print(note, file=sys.stderr)
        print(run_dir or f"{parent_of_runs(c)}/")
        return 0

    # ---- the ranks meet; the folder says what runs
    start = state["step"] if state else 0
    agreed = [None, start]  # rank 0's folder and start, which the others compare with their own
    if p.rank == 0:
        agreed[0] = make_folder(c)
        lock = hold(agreed[0], "training in")  # noqa: F841, held until this process ends
    if p.device.type == "cuda":
        torch.cuda.set_device(p.device)
        torch.set_float32_matmul_precision("high" if c.tensorcores else "highest")
    if p.world > 1:
        backend = "cpu:gloo,cuda:nccl" if p.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        dist.broadcast_object_list(agreed)
    folder = agreed[0]
    if start != agreed[1]:
        raise UserError(f"ranks 0 and {p.rank} see states of {folder} after updates {agreed[1]} and {start}")
    model.to(p.device)
    optimizers = make_optimizers(model, c, p.device)
    scaler = torch.amp.GradScaler(p.device.type, enabled=c.dtype == "float16")
    lines = dict(state["lines"] if state else NO_LINES)
    if state:
        restore(state, model, optimizers, scaler)
    if p.rank == 0:
        (folder / "checkpoints").mkdir(exist_ok=True)
        copy_code(folder, config_path)
        record_start(folder, p, [stream.data, val_data])
        texts = {
            "status": "running\n",
            "final_config.yaml": yaml.safe_dump(config_dict(c), sort_keys=False),
            "model_config.yaml": yaml.safe_dump(asdict(c.model), sort_keys=False),
            "tokenizer.json": tokenizer_json.decode(),
            "tokenizer_config.json": tokenizer_config(tokenizer.id_to_token(eos), False),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        for name, n in lines.items():
            keep_lines(folder / name, n)

    # ---- numbers of the loop
    dtype = getattr(torch, c.dtype)
    autocast = torch.autocast(p.device.type, dtype, enabled=c.dtype != "float32")
    peak = p.world * matrix_rate(p.device, dtype) / model.flops_per_token()
    updates, per_update = 0 if c.inference_only else c.num_iterations, c.batch_size * c.model.block_size
    n_micro = c.batch_size // (p.world * p.micro)  # forwards of a rank in an update
    split = val_data.info["splits"]["val"] if val_data.info else {}
    bytes_per_token = split["bytes"] / split["tokens"] if split.get("bytes") else None

    with Log(folder, c, p, lines, peak) as log:
        n_params = sum(w.numel() for w in model.parameters())
        epochs = updates * c.batch_size / stream.n_windows
        log.say(f"model: {c.model.model_type}, {n_params:,} parameters, from {source}, on {p.world} x {p.device.type}")
        log.say(f"plan: {updates:,} updates of {per_update:,} tokens, {epochs:.2f} epochs, after update {start}")
        log.say("\n".join([f"writes: {folder}", *notes]))
        if c.wandb_project and p.rank == 0:
            log.start_wandb()
        compiled = model
        if c.compile:
            torch._dynamo.config.suppress_errors = True  # without a C++ compiler, say, the model runs eagerly
            compiled = torch.compile(model, dynamic=False)
            log.say("torch.compile: the first update compiles, which can take a minute")
        trained = compiled  # what a micro-batch goes through; validation goes without DDP's hooks
        if p.world > 1:
            ids = [p.device.index] if p.device.type == "cuda" else None
            trained = DDP(compiled, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

        # ---- the loop: at its top, s updates are done
        s, saved, val_loss = start, start if state else None, None
        batch = batches(stream, c, p, s + 1)
        began = time.monotonic()
        interrupt = Interrupt(p.world)
        while True:
            # The state is saved before anything is evaluated: a resumed run evaluates again, and writes it once.
            stopping = interrupt.agreed()
            kept = is_checkpoint(s, c)
            resumable = stopping or (s > 0 and due(s, c.resume_every, updates)) or (kept and c.keep_optimizer)
            if (kept or resumable) and s != saved and not c.inference_only:
                save(log, s, p, model, optimizers, scaler, data_sha256, resumable)
                saved = s if resumable else saved
            if stopping:
                break
            model.eval()
            if due(s, c.val_loss_every, updates):
                log.flush()
                val_loss = validate(compiled, val_data, c, p, autocast, interrupt)
                if val_loss is None:
                    continue  # a signal came: the top saves and ends
                line = {"val_loss": val_loss}
                if bytes_per_token:  # losses of different tokenizers can be compared in bits per byte of text
                    line["bits_per_byte"] = val_loss / math.log(2) / bytes_per_token
                log.metrics(s, line)
                log.say(f"step {s}/{updates} | val loss {val_loss:.4f}")
            if due(s, c.sample_every, updates):
                log.flush()
                if p.rank == 0:
                    text = sample(model, tokenizer, eos, c.sample_seed + s, autocast)
                    log.write("samples.jsonl", {"step": s, "text": text})
                    log.say(f"step {s}/{updates} | sample:\n{text}\n")
            if s == updates:
                break

            # ---- update s + 1
            model.train()
            log.update_begins()
            x, y = next(batch)
            s += 1
            # Anything random in a fork, such as dropout, is the same after an interruption.
            torch.manual_seed(int(np.random.SeedSequence((c.seed, s, p.rank)).generate_state(1, np.uint64)[0]))
            loss = torch.zeros((), device=p.device)
            for i in range(n_micro):
                part = slice(i * p.micro, (i + 1) * p.micro)
                x_part, y_part = (z[part].to(p.device, non_blocking=True) for z in (x, y))
                # DDP sums gradients over the ranks once an update, with the last micro-batch.
                if p.world > 1:
                    trained.require_backward_grad_sync = i == n_micro - 1
                with autocast:
                    _, part_loss = trained(x_part, y_part, return_logits=False)
                scaler.scale(part_loss / n_micro).backward()
                loss += part_loss.detach() / (n_micro * p.world)
            if p.world > 1:
                dist.all_reduce(loss)
            # The losses stay on the device: log.flush() looks at them, and raises if one is not finite.
            lr = learning_rate_at(s, c)
            norm = apply_update(optimizers, scaler, model, lr, c)
            log.update_done(s, lr, loss, norm)
            if s == start + 1 or s % c.train_log_every == 0 or s == updates:
                log.flush()
                left = timedelta(seconds=int((time.monotonic() - began) / (s - start) * (updates - s)))
                log.say(
                    f"step {s}/{updates} | loss {loss:.4f} | norm {norm:.3f} | lr {lr:.2e} | "
                    f"{1000 * per_update / log.rate:.1f} ms | {log.rate:,.0f} tokens/s | ETA {left}"
                )

        # ---- the end
        if p.rank == 0 and stopping:
            log.say(f"interrupted by a signal after update {s}: the same command with run_dir={folder} resumes the run")
            log.finish("interrupted", INTERRUPTED)
        elif p.rank == 0:
            value = {"step": s, "val_loss": val_loss} | check_value(model, val_data)
            write_text(folder / "check.json", json.dumps(value) + "\n")
            log.say(f"done: {folder}")
            log.finish("finished", 0)
            delete_states(folder, c, saved_steps(folder))
    if p.world > 1:
        dist.barrier()  # no rank leaves before rank 0 has written: the first to go may end the others
    return INTERRUPTED if stopping else 0


if __name__ == "__main__":
    check = sys.argv[1:2] == ["--check"]
    args = sys.argv[1 + check :]
    if not args or args[0] in ("-h", "--help"):
        print_help()
        sys.exit(0 if args else 2)
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # every rank of a node finds the same thing wrong: one says so
    warnings.formatwarning = lambda message, *_: f"train: {message}\n"
    if not speaks:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a sample may hold what the console's encoding cannot
    try:
        code = main(args[0], args[1:], check)
    except (UserError, OSError) as e:
        again = "; once that is mended, the same command resumes the run" if isinstance(e, OSError) else ""
        if speaks or dist.is_initialized():
            print(f"train: {e}{again}", file=sys.stderr)
        code = 1
    except BaseException as e:  # of several ranks, none may wait for the others in the interpreter's clean-up
        traceback.print_exc()
        code = 130 if isinstance(e, KeyboardInterrupt) else 1
    end_process(code)
