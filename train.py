"""Pretrain one of models.py's models on the shards that prepare_data.py wrote.

    python train.py configs/quickstart.yaml [key=value ...]
    torchrun --nproc_per_node=4 train.py configs/x.yaml [key=value ...]
    python train.py --help                   every key with its type, bounds, default and meaning
    python train.py --check configs/x.yaml   check all that needs no GPU and write nothing; print the run folder, or,
                                             for a new run, the folder that will hold it, with a / at the end

The same config gives the same weights: the order of the data depends neither on the number of ranks nor on
micro_batch_size. With run_dir=DIR the same command resumes an interrupted run.

Throughout, c is the run's Config, p this Process among its ranks, and s the number of updates done.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, Union

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
    TextEncoder,
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
from run_info import SAMPLE_TOKENS, in_short, out_dir, plot_losses, pretrained_model, read_json, read_metrics

# -----------------------------------------------------------------------------
# config

MUON_LEARNING_RATE = 0.005  # the best of 0.002, 0.003, 0.005 and 0.008: docs/PERFORMANCE.md
AnyModelConfig = Union[tuple(model.config_class for model in MODEL_CLASSES.values())]  # noqa: UP007, it is computed
Count = Annotated[int, Field(ge=0, le=2**31)]
Positive = Annotated[int, Field(ge=1, le=2**31)]
Seed = Annotated[int, Field(ge=0, le=2**62)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Folder = Annotated[str, AfterValidator(os.path.expanduser)]


class Config(Section):
    """A run's YAML. Keys that SPD's pretraining YAML has, too, mean the same there."""

    # the run
    model: AnyModelConfig = Field(discriminator="model_type", description="model_type and the fields of its config")
    train_dataset_config: DatasetConfig = Field(description="the data to train on")
    val_dataset_config: DatasetConfig = Field(description="the data to validate on")
    batch_size: Positive = Field(description="sequences in the global batch, over ranks and micro-batches")
    num_iterations: Positive = Field(description="optimizer updates")
    seed: Seed = Field(0, description="seed of the order of the training data")
    init_seed: Seed = Field(42, description="seed of the initial weights")
    from_pretrained: str | None = Field(None, description="start from the weights of a run, W&B run or hub model")
    branch_from: Folder | None = Field(
        None, description="start from the state of this run: weights, optimizer, data order"
    )
    branch_step: Count | None = Field(None, description="the update after which the branch starts")
    inference_only: bool = Field(False, description="validate and sample, update nothing")

    # the optimizer
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for matrices in blocks, AdamW beside")
    learning_rate: Rate = Field(description="the peak, reached at update warmup_iters")
    muon_learning_rate: Rate | None = Field(None, description="the peak with muon; null: 0.005")
    warmup_iters: Count = Field(description="updates of linear warm-up; a cosine follows")
    learning_rate_decay_frac: Fraction = Field(description="the last update's rate as a fraction of the peak")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's")
    weight_decay: float = Field(ge=0, le=1e6, description="on tensors of two dimensions and more")
    grad_clip: float | None = Field(gt=0, description="largest gradient norm; null: no clipping")
    zero_stage: Literal[0, 1] = Field(0, description="1 shards AdamW's state over the ranks")

    # precision and speed
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        description="precision of matrix products; float16 needs CUDA"
    )
    micro_batch_size: Positive | None = Field(None, description="sequences per rank and forward; null: all")
    device: str | None = Field(
        None, pattern=r"^(cpu|mps|cuda(:\d{1,4})?)$", description="cpu, cuda, cuda:1 or mps; null: the best"
    )
    compile: bool = Field(True, description="torch.compile the model")
    tensorcores: bool = Field(True, description="TF32 for float32 products on CUDA")

    # evaluation and output
    val_loss_every: Count = Field(description="updates between validations; 0: none")
    val_max_steps: Positive = Field(description="most batches of batch_size windows in a validation")
    sample_every: Count = Field(description="updates between samples of text; 0: none")
    sample_seed: Seed = Field(0, description="seed of the sampled text")
    train_log_every: Positive = Field(100, description="updates between lines on the console")
    intermediate_checkpoints: bool = Field(description="keep weights at 0, 1, 2, 4 ... 512, 1000, 2000 ...")
    checkpoint_steps: list[Count] | None = Field(None, description="also keep weights at these updates")
    checkpoint_every: Count = Field(0, description="also keep weights every N updates; 0: no")
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
        if self.zero_stage and muon:
            raise ValueError("zero_stage must be 0 with optimizer muon: only AdamW's state can be sharded")
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
    for split, section in dataset_configs(raw).items():
        raw[f"{split}_dataset_config"] = section
    return validated(Config, raw)


def config_dict(c) -> dict:
    """The config as plain values with every default; without run_dir, so that running it again makes a new run."""
    return c.model_dump(mode="json") | {"run_dir": None}


def state_config(c) -> dict:
    """The part of the config that a saved state depends on."""
    return c.model_dump(mode="json", exclude=FREE_KEYS)


def check_same_run(there: dict, c, what: str) -> None:
    """Raise UserError, naming the keys, if `there`, the config of `what`, is not that of the run `c`."""
    # Validated first, so that keys that are newer than the run have their defaults.
    there = state_config(validated(Config, there, f"{what}: "))
    if differ := differences(there, state_config(c)):
        raise UserError(f"{what} belongs to a run of another config: {'; '.join(differ)}; choose another run_dir")


BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def in_words(schema: dict) -> str:
    """A JSON schema of one key as text, such as "integer >= 1 or null"."""
    if "anyOf" in schema:
        return " or ".join(map(in_words, schema["anyOf"]))
    bounds = [f"{sign} {schema[bound]}" for bound, sign in BOUNDS.items() if bound in schema]
    return " ".join([str(schema.get("enum") or schema.get("type", "section")), *bounds])


def print_help() -> None:
    """Print every key with its type, bounds, default and meaning."""
    print(__doc__)
    schema = Config.model_json_schema()
    for title, section in ({"the config": schema} | schema["$defs"]).items():
        print(f"keys of {title}:")
        for name, about in section["properties"].items():
            default = f"default {json.dumps(about['default'])}" if "default" in about else "required"
            print(f"  {name} ({in_words(about)}, {default}): {about.get('description', '')}")


# -----------------------------------------------------------------------------
# schedule


def learning_rate_at(s: int, c) -> float:
    """The learning rate of update s = 1, 2, ..., num_iterations."""
    peak = c.learning_rate if c.optimizer == "adamw" else c.muon_learning_rate or MUON_LEARNING_RATE
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


class Ranks(Section):
    """What torchrun and slurm_submit.sh say in the environment."""

    RANK: Count = 0
    LOCAL_RANK: Count = 0
    WORLD_SIZE: Positive = 1


class Process(NamedTuple):
    """One of `world` processes that train together."""

    rank: int
    world: int
    micro: int  # sequences in one forward
    device: torch.device


def this_process(c, check: bool) -> Process:
    """Rank and device of this process; with `check`, none. Raises UserError for impossible ones."""
    found = validated(Ranks, {name: os.environ[name] for name in Ranks.model_fields if name in os.environ})
    rank, world = found.RANK, found.WORLD_SIZE
    if rank >= world:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {world}: ranks go from 0 to WORLD_SIZE - 1")
    if c.batch_size % (world * (c.micro_batch_size or 1)):
        raise UserError(
            f"batch_size {c.batch_size} is not divisible by ranks x micro_batch_size ({world} x {c.micro_batch_size})"
        )
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    # A login node need not have a GPU.
    device = torch.device("meta" if check else c.device or best)
    if device.index is not None and world > 1:
        raise UserError(f"device {device} for {world} ranks: leave out the number, each rank takes its own GPU")
    if device == torch.device("cuda"):
        device = torch.device("cuda", found.LOCAL_RANK)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # what torch raises for a device that does not exist
        raise UserError(f"device {device} does not work here: set device=cpu or fewer ranks ({in_short(e)})") from e
    if c.dtype == "float16" and device.type not in ("cuda", "meta"):
        raise UserError(f"dtype float16 needs CUDA (device is {device}): use bfloat16 or float32")
    return Process(rank, world, c.micro_batch_size or c.batch_size // world, device)


class Interrupt:
    """Whether SIGTERM, SIGUSR1 or SIGINT has asked the run to save and stop."""

    def __init__(self):
        self.received_at = math.inf  # seconds, of the first signal
        # Windows has no SIGUSR1.
        for number in {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)}:
            signal.signal(number, self.receive)

    def receive(self, number, _frame) -> None:
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


def end_process(code: int) -> NoReturn:
    """End this process as sys.exit does; one of several ranks ends without the interpreter's clean-up.

    That clean-up hung once in thirty runs: DDP's destructor holds the GIL and joins a thread that waits for the GIL.
    """
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)
    sys.exit(code)


# -----------------------------------------------------------------------------
# the run folder


def new_folder(parent: Path) -> Path:
    """Make the folder of a new run, named by the time."""
    while True:
        folder = parent / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run started in this second
            time.sleep(0.1)


def record_start(folder: Path, p, data: list[Shards], config_path: str) -> None:
    """Keep the scripts as they run and the config in code/, and what else a start depends on in environment.json."""
    here, code = Path(__file__).resolve().parent, folder.resolve() / "code"
    if here != code:  # slurm_submit.sh has copied them already
        code.mkdir(exist_ok=True)
        for path in (*here.glob("*.py"), *here.glob("*.sh"), Path(config_path)):
            shutil.copy(path, code / path.name)
        # The shell fails quietly where there is no git, and then there is no commit.
        git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
        write_text(code / "git_commit", git.stdout)
    start = {
        "started": datetime.now().isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": (code / "git_commit").read_text().strip() or None,
        "python": sys.version,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(p.device) if p.device.type == "cuda" else p.device.type,
        "ranks": p.world,
        "dataset_sha256": dict(shards.fingerprint() for shards in data),
    }
    path = folder / "environment.json"
    write_text(path, json.dumps([*read_json(path, []), start], indent=1) + "\n")


def keep_lines(path: Path, n: int) -> None:
    """Cut a file to its first n lines: a resumed run writes the others again."""
    if path.exists():
        write_text(path, "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:n]))


# -----------------------------------------------------------------------------
# log: what a run says


class Log:
    """Writes to the console and main.log for people, to metrics.jsonl, samples.jsonl and W&B for programs.

    Losses stay on the device, so that an update does not wait for them, until flush(), which comes before anything
    else is written or saved. Every rank has a Log, so every rank raises if a loss is not finite; only rank 0 writes.
    """

    def __init__(self, folder: Path, c, p, lines: dict[str, int], peak: float):
        self.folder, self.c = folder, c
        self.lines = lines  # file -> lines in it
        self.peak = peak  # tokens/s if the device did nothing but matrix products, at its highest rate
        self.pending = []  # (update, when it began, learning rate, loss and gradient norm) since the last flush
        self.rate = None  # tokens/s of the last flush; none for the first update, which compiles
        self.wandb = None  # W&B's run
        self.files = {}  # on rank 0
        for name in ("main.log", *lines) if p.rank == 0 else ():
            # Line-buffered: every complete line is in the file, however the process ends.
            self.files[name] = open(folder / name, "a", buffering=1, encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Write the error that ended the run, whatever it was, to main.log, and set status to failed."""
        if error is not None and self.files:
            traceback.print_exception(error, file=self.files["main.log"])
            write_text(self.folder / "status", "failed\n")

    def start_wandb(self) -> None:
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
        for name in ("final_config.yaml", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
            self.upload(self.folder / name)

    def upload(self, path: Path) -> None:
        """Send a file to the root of the W&B run, where SPD looks for it."""
        if self.wandb:
            self.wandb.save(path, base_path=path.parent, policy="now")

    def say(self, text: str) -> None:
        """Print a line to the console and to main.log."""
        if self.files:
            print(text, flush=True)
            print(text, file=self.files["main.log"])

    def write(self, name: str, line: dict) -> None:
        """Append a JSON line to a file of the run folder, and log it to W&B."""
        if self.files:
            print(json.dumps(line), file=self.files[name])
            self.lines[name] += 1
        if self.wandb:
            import wandb

            if "text" in line:
                line = {"step": line["step"], "generation_tables": wandb.Table(list(line), [list(line.values())])}
            self.wandb.log(line)

    def update(self, s: int, began: float, lr: float, loss, norm) -> None:
        """Note update s; loss and norm are scalars on the device, the same on every rank."""
        self.pending.append((s, began, lr, torch.stack((loss, norm))))

    def flush(self) -> None:
        """Write the lines of the updates since the last flush. Raises UserError if one is not finite."""
        if not self.pending:
            return
        values = torch.stack([v for *_, v in self.pending]).tolist()  # waits for the device
        per_update = self.c.batch_size * self.c.model.block_size
        rate = len(values) * per_update / (time.monotonic() - self.pending[0][1])
        for (s, _, lr, _), (loss, norm) in zip(self.pending, values, strict=True):
            # float16's scaler skips an update whose norm overflows; any other makes the weights NaN
            skipped = self.c.dtype == "float16" and not math.isfinite(norm)
            if not math.isfinite(loss if skipped else loss + norm):
                raise UserError(
                    f"update {s} has loss {loss} and gradient norm {norm}: no state after it was saved; "
                    f"python run_info.py {self.folder} --data {s} shows its data; a lower learning rate may help"
                )
            line = {
                "step": s,
                "train_loss": loss,
                "lr": lr,
                "grad_norm": None if skipped else norm,
                "tokens": s * per_update,
            }
            if self.rate:
                line |= {"tokens_per_s": rate, "mfu": rate / self.peak}
            self.write("metrics.jsonl", line)
        self.pending, self.rate = [], rate

    def metrics(self, s: int, values: dict) -> None:
        """Record {name: number} at step s in metrics.jsonl and on W&B. May be called anywhere in the loop."""
        self.flush()
        self.write("metrics.jsonl", {"step": s} | values)

    def finish(self, code: int) -> None:
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


def open_data(c, config_path: str) -> tuple[TrainingStream, TrainingStream, list[str]]:
    """(training windows, validation windows, notes for the log). Raises UserError if they do not fit the config."""
    streams, notes = [], []
    for split, section in (("train", c.train_dataset_config), ("val", c.val_dataset_config)):
        data = Shards(section.folder(), split, f"python prepare_data.py {config_path}")
        streams.append(TrainingStream(data, section, c.seed))
        if data.info:  # shards of other projects have no dataset.json
            there, here = data.info["source"][split], asked(section)
            if differ := differences({k: there.get(k) for k in here}, here):
                notes.append(f"note: {data.folder} was prepared from another config: {'; '.join(differ)}")
    tokenizers = {stream.data.info["tokenizer"]["sha256"] for stream in streams if stream.data.info}
    if len(tokenizers) > 1:
        raise UserError("the train and val shards have different tokenizers: prepare both with one")
    return *streams, notes


def tokenizer_of(c, data: Shards) -> TextEncoder:
    """The tokenizer of the training data: the one beside the shards, or the one that the config names."""
    name = str(data.folder / "tokenizer.json") if data.info else c.train_dataset_config.hf_tokenizer_path
    if not name:
        raise UserError(
            f"{data.folder} has no dataset.json: set train_dataset_config.hf_tokenizer_path to its tokenizer"
        )
    encoder = load_encoder(name)
    if data.info and encoder.eos_token_id != data.info["tokenizer"]["eos_token_id"]:
        raise UserError(f"{name} has another EOS than the shards: restore the tokenizer_config.json beside it")
    if encoder.vocab_size > c.model.vocab_size:
        raise UserError(f"model.vocab_size is {c.model.vocab_size}, but {name} has {encoder.vocab_size} ids")
    return encoder


def to_tensor(windows: np.ndarray, c, p) -> torch.Tensor:
    """Windows (B, T + 1) uint16 -> int64 in host memory, pinned for CUDA."""
    if windows.max() >= c.model.vocab_size:  # shards of other projects do not record their tokenizer
        raise UserError(
            f"the shards hold id {windows.max()}, outside the model's vocabulary: set hf_tokenizer_path to the "
            "tokenizer that made them, and model.vocab_size to its size"
        )
    ids = torch.from_numpy(windows.astype(np.int64))
    return ids.pin_memory() if p.device.type == "cuda" else ids


def batches(stream: TrainingStream, c, p, s: int):
    """Yield this rank's windows (batch_size / world, T + 1) of updates s, s + 1, ..., each read one update ahead."""
    mine = np.arange(c.batch_size).reshape(p.world, -1)[p.rank]  # (batch_size / world,)

    def read(s: int):
        return to_tensor(stream.read((s - 1) * c.batch_size + mine), c, p)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, s)
        for later in itertools.count(s + 1):
            batch = ahead.result()
            ahead = reader.submit(read, later)
            yield batch


# -----------------------------------------------------------------------------
# optimizers


class Float32ForBfloat16(TorchFunctionMode):
    """Within it x.bfloat16() is x.float().

    Muon orthogonalizes in bfloat16, which takes a CPU without units for it 17 times as long as float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.Tensor.float if func is torch.Tensor.bfloat16 else func)(*args, **(kwargs or {}))


def make_optimizers(model, c, device: torch.device) -> list:
    """[AdamW], or [AdamW, Muon for the matrices inside blocks]."""
    # Not the embeddings, which AdamW trains better.
    matrices = [w for w in model.h.parameters() if c.optimizer == "muon" and w.dim() == 2]
    others = [w for w in model.parameters() if w not in set(matrices)]
    optimizers = [adamw(others, c.weight_decay, c.learning_rate, c.betas, device.type, c.zero_stage)]
    if matrices:
        # Its updates are scaled to the size of AdamW's, so that one learning rate fits both.
        muon = torch.optim.Muon(matrices, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def apply_update(optimizers: list, scaler, model, lr: float, c):
    """Clip the gradients, step the optimizers and clear the gradients; the norm before clipping, on the device."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
    with Float32ForBfloat16() if norm.device.type == "cpu" else contextlib.nullcontext():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
    model.zero_grad()
    scaler.update()
    return norm.detach()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of the device's products of large square matrices: MFU is a fraction of it."""
    # Large enough to reach the peak, small enough to take no time.
    n, times = 8192 if device.type == "cuda" else 512, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
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


def save(log: Log, s: int, p, model, optimizers: list, scaler, data: list[str], resumable: bool) -> None:
    """Write model_step_s.pt and, to make it a state that a run resumes from, optim_step_s.pt.

    All ranks call this; rank 0 writes. States that no longer have a use are deleted.
    """
    log.flush()  # raises if the last updates were not finite
    if resumable and log.c.zero_stage == 1 and p.world > 1:
        optimizers[0].consolidate_state_dict(to=0)
    if p.rank > 0:
        return
    weights, optim = pair(log.folder, s)
    optim.unlink(missing_ok=True)  # a file of this name is left over from a corrupted state
    tensors = model.state_dict(keep_vars=True)
    copies = {t: t.detach().cpu() for t in tensors.values()}  # tied tensors stay one, and are written once
    with whole_file(weights) as f:
        torch.save({name: copies[t] for name, t in tensors.items()}, f)
    if is_checkpoint(s, log.c):
        log.upload(weights)
    if not resumable:
        return
    # A saved state must not be ahead of metrics and samples.
    for file in log.files.values():
        os.fsync(file.fileno())
    about = {
        "step": s,
        "config": state_config(log.c),
        "data": data,
        "lines": log.lines,
        "weights_sha256": sha256_file(weights),
    }
    state = {
        "about": json.dumps(about),  # as JSON: pickle writes a string that the optimizers' states share differently
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict(),
    }
    with whole_file(optim) as f:
        torch.save(state, f)
    delete_states(log.folder, log.c, saved_steps(log.folder)[:-2])


def delete_states(folder: Path, c, steps: list[int]) -> None:
    """Delete the files of these states that are not to be kept."""
    for s in steps:
        weights, optim = pair(folder, s)
        kept = is_checkpoint(s, c)
        # The weights go first: saved_steps finds what a kill has left of a pair by its optimizer's state.
        if not kept:
            weights.unlink(missing_ok=True)
        if not (kept and c.keep_optimizer):
            optim.unlink(missing_ok=True)


def load_pair(folder: Path, s: int) -> dict | None:
    """The state after s updates, its weights under "model"; None if a file is missing or cut short."""
    weights, optim = pair(folder, s)
    for file in (weights, optim):
        if not file.exists():
            return None
        with open(file, "rb") as f:
            if not zipfile.is_zipfile(f):
                return None
    state = load_file(optim)
    about = json.loads(state["about"])
    if about["step"] != s or about["weights_sha256"] != sha256_file(weights):
        raise UserError(f"{weights} is not the file that {optim} was saved with: restore it, or delete {optim}")
    return state | about | {"model": load_file(weights)}


NEW = {"step": 0, "lines": {"metrics.jsonl": 0, "samples.jsonl": 0}}  # what a run without a saved state begins with
# The differences that a branch may not have, as differences() writes them.
BRANCH_SHARES = (
    "model.",
    "batch_size ",
    "seed ",
    "optimizer ",
    "train_dataset_config.n_ctx ",
    "train_dataset_config.seed ",
    "train_dataset_config.shuffle_each_epoch ",
)


def load_state(c, folder: Path | None, data: list[str]) -> dict:
    """The newest whole state in `folder`, or that of branch_from, or NEW. Raises UserError if it is another run's."""
    # If this run was interrupted, its own state is newer than the one it branched from.
    for s in reversed(saved_steps(folder) if folder else []):
        if state := load_pair(folder, s):
            check_same_run(state["config"], c, str(pair(folder, s)[1]))
            if state["data"] != data:
                raise UserError(f"the data were prepared again since {folder} began with them: choose another run_dir")
            return state
        print(f"the state of {folder} after update {s} is corrupted: trying an earlier one", file=sys.stderr)
    if c.branch_from is None:
        return NEW
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
    return state | {"lines": NEW["lines"]}


def restore(state: dict, model, optimizers: list, scaler) -> None:
    """Put a loaded state into model, optimizers and scaler; weight decay and betas stay those of the config."""
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        # The base class's method: that of ZeroRedundancyOptimizer would gather the state from all ranks.
        groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
        optimizer.load_state_dict(saved | {"param_groups": groups})
    scaler.load_state_dict(state["scaler"])


def load_pretrained(model, path: str) -> str:
    """Copy the weights that from_pretrained finds at `path` into `model`; their source. Raises UserError."""
    found, source = pretrained_model(type(model), path)
    # Comparing shapes is not enough: rotary_base, for example, changes the outputs but no shape.
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
def validate(model, stream: TrainingStream, c, p, autocast, interrupt: Interrupt) -> float | None:
    """Mean loss in nats per token over the validation windows of all ranks; None if a signal came.

    The windows are the same every time: spread evenly over the split, dealt to the ranks in turn.
    """
    n = min(stream.n_windows, c.val_max_steps * c.batch_size)
    windows = (np.arange(n) * stream.n_windows // n + (c.val_dataset_config.seed or 0)) % stream.n_windows
    total = torch.zeros((), device=p.device)  # the sum of the windows' mean losses
    for i in range(0, n, p.micro * p.world):
        if interrupt.agreed():
            return None
        mine = windows[i + p.rank : i + p.micro * p.world : p.world]  # (micro,), fewer or none at the end
        if len(mine):
            # A last batch that is not full is filled up, so that nothing is compiled again, but -1 does not count.
            ids = to_tensor(stream.data.windows(np.resize(mine, p.micro), stream.n_ctx), c, p).to(p.device)
            y = ids[:, 1:].clone()
            y[len(mine) :] = -1
            with autocast:
                _, loss = model(ids[:, :-1], y, return_logits=False)
            total += len(mine) * loss
    if p.world > 1:
        dist.all_reduce(total)
    return (total / n).item()


def sample(model, encoder: TextEncoder, seed: int, autocast) -> str:
    """Text after EOS, drawn by `seed` alone."""
    torch.manual_seed(seed)  # each update seeds it anew
    eos = encoder.eos_token_id
    idx = torch.tensor([eos], device=model.lm_head.weight.device)
    with autocast:
        ids = model.generate(idx, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, SAMPLE_TOP_K, eos)
    return text_tokenizer(encoder.json).decode([i for i in ids.tolist() if i != eos])


@torch.no_grad()
def check_value(model, stream: TrainingStream, c, p) -> dict:
    """One window of ids and the float32 loss on it, by which a reader can tell whether it loaded this very model."""
    ids = to_tensor(stream.data.windows([0], stream.n_ctx), c, p).to(p.device)
    _, loss = model(ids[:, :-1], ids[:, 1:])
    return {"ids": ids[0].tolist(), "loss": loss.item()}


# -----------------------------------------------------------------------------
# the run


def main(config_path: str, overrides: list[str], check: bool = False) -> int:
    """Train; the exit code. Raises UserError, before anything is written, for what the user can fix."""

    # ---- set-up: everything that can be wrong is found before anything is written
    c = load_config(config_path, overrides)
    p = this_process(c, check)
    folder = Path(c.run_dir) if c.run_dir else None
    parent = Path(c.output_dir or out_dir() / "target_models")  # of a new run
    if folder and (folder / "final_config.yaml").exists():
        check_same_run(read_config(folder / "final_config.yaml"), c, c.run_dir)
        if not check and (folder / "status").read_text() == "finished\n":
            if p.rank == 0:
                delete_states(folder, c, saved_steps(folder))  # the process may have been killed before it did this
                print(f"{folder} holds this run, finished: nothing to do")
            return 0
    train_windows, val_windows, notes = open_data(c, config_path)
    encoder = tokenizer_of(c, train_windows.data)
    data_sha256 = [windows.data.fingerprint()[1] for windows in (train_windows, val_windows)]
    if c.wandb_project:
        import wandb  # noqa: F401, fail now if wandb is missing
    model = MODEL_CLASSES[c.model.model_type](c.model, init_seed=c.init_seed)
    source, state = f"seed {c.init_seed}", load_state(c, folder, data_sha256)
    start, resumed = state["step"], state is not NEW
    if c.from_pretrained and not resumed:
        source = load_pretrained(model, c.from_pretrained)
    if check:
        for note in notes:
            print(note, file=sys.stderr)
        print(folder or f"{parent}/")
        return 0

    # ---- the ranks meet; the folder says what runs
    if p.rank == 0:
        folder = folder or new_folder(parent)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = hold(folder, "training in")  # noqa: F841, held until this process ends
    if p.device.type == "cuda":
        torch.cuda.set_device(p.device)
        torch.set_float32_matmul_precision("high" if c.tensorcores else "highest")
    if p.world > 1:
        backend = "cpu:gloo,cuda:nccl" if p.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        first = [folder, start]  # rank 0's
        dist.broadcast_object_list(first)
        folder = first[0]
        if start != first[1]:
            raise UserError(f"ranks 0 and {p.rank} see states of {folder} after updates {first[1]} and {start}")
    model.to(p.device)
    optimizers = make_optimizers(model, c, p.device)
    scaler = torch.amp.GradScaler(p.device.type, enabled=c.dtype == "float16")
    if resumed:
        restore(state, model, optimizers, scaler)
    if p.rank == 0:
        record_start(folder, p, (train_windows.data, val_windows.data), config_path)
        texts = {
            "status": "running\n",
            "final_config.yaml": yaml.safe_dump(config_dict(c), sort_keys=False),
            "model_config.yaml": yaml.safe_dump(asdict(c.model), sort_keys=False),
            "tokenizer.json": encoder.json.decode(),
            "tokenizer_config.json": tokenizer_config(encoder.eos_token, False),
        }
        for name, text in texts.items():
            write_text(folder / name, text)
        for name, n in state["lines"].items():
            keep_lines(folder / name, n)

    # ---- numbers of the loop
    dtype = getattr(torch, c.dtype)
    autocast = torch.autocast(p.device.type, dtype, enabled=c.dtype != "float32")
    peak = p.world * matrix_rate(p.device, dtype) / model.flops_per_token()
    updates, per_update = 0 if c.inference_only else c.num_iterations, c.batch_size * c.model.block_size
    n_micro = c.batch_size // (p.world * p.micro)  # forwards of a rank in an update
    n_bytes = val_windows.data.info.get("splits", {}).get("val", {}).get("bytes")  # of text, if that is known

    with Log(folder, c, p, dict(state["lines"]), peak) as log:
        n_params = sum(w.numel() for w in model.parameters())
        epochs = updates * c.batch_size / train_windows.n_windows
        log.say(f"model: {c.model.model_type}, {n_params:,} parameters, from {source}, on {p.world} x {p.device.type}")
        log.say(f"plan: {updates:,} updates of {per_update:,} tokens, {epochs:.2f} epochs, after update {start}")
        for line in (f"writes: {folder}", *notes):
            log.say(line)
        if c.wandb_project and p.rank == 0:
            log.start_wandb()
        compiled = model
        if c.compile:
            torch._dynamo.config.suppress_errors = True  # without a C++ compiler, say, the model runs eagerly
            compiled = torch.compile(model, dynamic=False)
            log.say("torch.compile: the first update compiles, which can take a minute")
        # What a micro-batch goes through; validation goes without DDP's hooks.
        trained = DDP(compiled, gradient_as_bucket_view=True) if p.world > 1 else compiled

        # ---- the loop: at its top, s updates are done
        s, saved, val_loss = start, start if resumed else None, None
        batch = batches(train_windows, c, p, s + 1)
        interrupt = Interrupt()
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
                val_loss = validate(compiled, val_windows, c, p, autocast, interrupt)
                if val_loss is None:
                    continue  # a signal came: the top saves and ends
                line = {"val_loss": val_loss}
                if n_bytes:  # losses of different tokenizers can be compared in bits per byte of text
                    line["bits_per_byte"] = val_loss / math.log(2) * val_windows.data.n_tokens / n_bytes
                log.metrics(s, line)
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
            torch.manual_seed(int(np.random.SeedSequence((c.seed, s, p.rank)).generate_state(1, np.uint64)[0]))
            loss = torch.zeros((), device=p.device)
            for i, part in enumerate(next(batch).split(p.micro), 1):
                ids = part.to(p.device, non_blocking=True)  # (micro, T + 1)
                # DDP sums gradients over the ranks once an update, with the last micro-batch.
                if p.world > 1:
                    trained.require_backward_grad_sync = i == n_micro
                with autocast:
                    _, part_loss = trained(ids[:, :-1], ids[:, 1:], return_logits=False)
                scaler.scale(part_loss / n_micro).backward()
                loss += part_loss.detach() / (n_micro * p.world)
            if p.world > 1:
                dist.all_reduce(loss)
            # The losses stay on the device: log.flush() looks at them, and raises if one is not finite.
            lr = learning_rate_at(s, c)
            norm = apply_update(optimizers, scaler, model, lr, c)
            log.update(s, began, lr, loss, norm)
            if s == start + 1 or due(s, c.train_log_every, updates):
                log.flush()
                seconds = per_update / log.rate  # an update
                log.say(
                    f"step {s}/{updates} | loss {loss:.4f} | norm {norm:.3f} | lr {lr:.2e} | {1000 * seconds:.1f} ms | "
                    f"{log.rate:,.0f} tokens/s | ETA {timedelta(seconds=int(seconds * (updates - s)))}"
                )

        # ---- the end
        code = INTERRUPTED if stopping else 0
        if p.rank == 0:
            end = f"done: {folder}"
            if stopping:
                end = f"interrupted after update {s}: the same command with run_dir={folder} resumes the run"
            else:
                value = {"step": s, "val_loss": val_loss} | check_value(model, val_windows, c, p)
                write_text(folder / "check.json", json.dumps(value) + "\n")
            log.say(end)
            log.finish(code)
            if not stopping:
                delete_states(folder, c, saved_steps(folder))
    if p.world > 1:
        dist.barrier()  # the launcher may end the others when the first rank exits: rank 0 writes before that
    return code


if __name__ == "__main__":
    check = sys.argv[1:2] == ["--check"]
    args = sys.argv[1 + check :]
    if not args or args[0] in ("-h", "--help"):
        print_help()
        sys.exit(0 if args else 2)
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # all ranks of a node find the same mistake: one reports it
    warnings.formatwarning = lambda message, *_: f"train: {message}\n"
    if not speaks:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a sample may hold what the console's encoding cannot
    code = 1
    try:
        code = main(args[0], args[1:], check)
    except (UserError, OSError) as e:
        if speaks or dist.is_initialized():
            print(f"train: {e}", file=sys.stderr)
    except BaseException:  # with several ranks, none may wait for the others in the interpreter's clean-up
        traceback.print_exc()
    end_process(code)
