"""Find a trained run, load it and show it.

    from run_info import PretrainRunInfo
    run_info = PretrainRunInfo.from_path("out/target_models/2026-01-01_00-00-00", step=1000)
    model, tokenizer = run_info.load_model(), run_info.load_tokenizer()

A path is a run folder, one of its checkpoints, or a run on Weights & Biases (entity/project/runid), whose files are
downloaded once. `python run_info.py PATH` shows a run; see --help.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import signal
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from prepare_data import (
    DatasetConfig,
    Shards,
    TrainingStream,
    UserError,
    eos_of,
    hold,
    load_encoder,
    read_config,
    text_tokenizer,
    validated,
    whole_file,
    write_text,
)

# -----------------------------------------------------------------------------
# a run


class RunNotFound(UserError, FileNotFoundError):
    """There is no run, or no such checkpoint, at the path given."""


@dataclass
class PretrainRunInfo:
    """A trained run at one checkpoint. The fields after `folder` are those of SPD's class of the same name."""

    folder: Path
    checkpoint_path: Path | None  # None only if from_path was called with weights=False
    config_dict: dict[str, Any]  # final_config.yaml; empty for param-decomp's cache entries, which have none
    model_config_dict: dict[str, Any]  # model_config.yaml
    tokenizer_path: Path | None  # the run's own tokenizer.json
    hf_tokenizer_path: str | None  # the tokenizer that the config names

    @classmethod
    def from_path(cls, path: str | Path, step: int | None = None, weights: bool = True) -> "PretrainRunInfo":
        """The run at `path` after `step` updates (default: the file that `path` names, or the last checkpoint).

        `path` is a run folder, its checkpoints/ folder, a checkpoint file, or a run on W&B (WANDB_FORMS). An entry of
        param-decomp's pretrain_cache/ is a run folder, too. With weights=False a run without checkpoints is accepted.
        Raises UserError; RunNotFound, which is also a FileNotFoundError, if there is no such run or checkpoint.
        """
        local = Path(os.path.expanduser(path)).absolute()
        on_wandb = wandb_run(str(path))
        # What exists here wins over W&B. wandb's client creates empty folders that are named like the run.
        here = os.path.isfile(local) or (os.path.isdir(local) and any(local.iterdir()))
        if on_wandb and not here:
            local = fetch(*on_wandb, step, weights or step is not None)
        if not os.path.exists(local):
            raise RunNotFound(
                f"no run at {local}: name a run folder, a checkpoint (checkpoints/model_step_N.pt) or a run on W&B "
                f"({WANDB_FORMS}; a runid is 8 of a-z and 0-9, optionally after one more and a dash)"
            )

        # The run folder is the checkpoint's, or the one above checkpoints/; W&B's copies have no checkpoints/.
        checkpoint = local if local.is_file() else None
        folder = local.parent if checkpoint else local
        if folder.name == "checkpoints" and not (folder / "model_config.yaml").exists():
            folder = folder.parent
        if not (folder / "model_config.yaml").exists():
            raise RunNotFound(f"{folder} is not a run folder: it has no model_config.yaml")
        # A step that is named must be there; without one, the last is taken, if weights are wanted or there are any.
        found = checkpoints_in(folder)
        if step is not None or (checkpoint is None and (found or weights)):
            checkpoint = at_step(found, step, str(folder))

        # param-decomp's cache entries have no final_config.yaml, and all that is known of them is the shape.
        config = read_config(folder / "final_config.yaml") if (folder / "final_config.yaml").exists() else {}
        if config.get("enable_ln_ablation") and weights:
            raise UserError(f"{folder}: the run removed its norms (enable_ln_ablation); the models here all have them")
        tokenizer = folder / "tokenizer.json"
        section = config.get("train_dataset_config") or {}
        if not isinstance(section, dict):
            raise UserError(f"{folder}/final_config.yaml: train_dataset_config must be a section of keys")
        return cls(
            folder=folder,
            checkpoint_path=checkpoint,
            config_dict=config,
            model_config_dict=read_config(folder / "model_config.yaml"),
            tokenizer_path=tokenizer if tokenizer.exists() else None,
            hf_tokenizer_path=section.get("hf_tokenizer_path"),
        )

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Updates done -> file, for every checkpoint on disk, in order."""
        return checkpoints_in(self.folder)

    @property
    def model_class(self) -> type:
        """The class of models.py that model_config.yaml names. Raises UserError if it names none."""
        from models import MODEL_CLASSES

        name = self.model_config_dict.get("model_type")
        if not isinstance(name, str) or name not in MODEL_CLASSES:
            raise UserError(
                f"{self.folder} does not say which model it holds (model_type: {name}): load it with the class, "
                "for example models.LlamaSimpleMLP.from_run_info(run_info)"
            )
        return MODEL_CLASSES[name]

    def load_model(self, cls: type | None = None):
        """The model with this checkpoint's weights, on the CPU, in eval mode.

        `cls` is its class, for an old run whose model_config.yaml does not name it. Raises UserError for a checkpoint
        that cannot be loaded, or that does not reproduce the loss in the run's check.json.
        """
        cls = cls or self.model_class
        try:
            return cls.from_run_info(self)
        except Exception as e:  # torch.load and load_state_dict have no common class for files that are not right
            reason = " ".join(str(e).split())[:500]
            raise UserError(f"cannot load {self.checkpoint_path}: {type(e).__name__}: {reason}") from e

    @property
    def tokenizer_json(self) -> bytes:
        """The run's tokenizer.json, or else that of hf_tokenizer_path. Raises UserError if there is neither."""
        if self.tokenizer_path:
            return self.tokenizer_path.read_bytes()
        if self.hf_tokenizer_path:
            return load_encoder(self.hf_tokenizer_path).json
        raise UserError(f"{self.folder} has no tokenizer.json and its config names no hf_tokenizer_path")

    def load_tokenizer(self):
        """A tokenizers.Tokenizer with the ids of training.

        It encodes text as prepare_data does: nothing is cut, padded or added, and no special token is read out of text.
        Raises UserError if there is none, or if it has ids outside the model's vocabulary.
        """
        data = self.tokenizer_json
        try:
            tok = text_tokenizer(data)
        except Exception as e:  # the Rust library raises plain Exceptions for what is not a tokenizer
            raise UserError(f"{self.tokenizer_path} is damaged: {e}") from e
        # The model has no embedding for ids beyond its vocabulary; fewer ids than it has rows are fine.
        size = max(tok.get_vocab().values()) + 1
        limit = self.model_config_dict.get("vocab_size")
        if isinstance(limit, int) and size > limit:
            raise UserError(f"the tokenizer of {self.folder} has {size} ids, over the model's vocab_size ({limit})")
        return tok

    @property
    def eos_token_id(self) -> int:
        """The id that ends a document, as recorded with the run in tokenizer_config.json. Raises UserError."""
        if self.hf_tokenizer_path and not self.tokenizer_path:
            return load_encoder(self.hf_tokenizer_path).eos_token_id
        # A tokenizer may have several tokens that could end a document: the one used in training is recorded.
        settings = read_json(self.folder / "tokenizer_config.json", {})
        return eos_of(self.load_tokenizer(), settings, str(self.tokenizer_path))

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; empty for a run without it."""
        return read_metrics(self.folder / "metrics.jsonl")


def read_json(path: Path, default):
    """The value in a JSON file, if it is of the same type as `default`; else `default`, also if there is no file."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return default
    return value if isinstance(value, type(default)) else default


def checkpoint_names(names) -> dict[int, str]:
    """Updates done -> name, for each name that is a checkpoint's, in order. A .pt wins over a .safetensors."""
    found = {}
    # In this order the .pt comes last of two names with the same step.
    for name in sorted(names, reverse=True):
        if match := re.fullmatch(r"model_step_([0-9]{1,18})\.(pt|safetensors)", name):
            found[int(match[1])] = name
    return dict(sorted(found.items()))


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Updates done -> checkpoint file, in order: those in checkpoints/, else those in the folder itself."""
    for place in (folder / "checkpoints", folder):
        files = [path.name for path in place.glob("model_step_*") if path.is_file()]
        if found := checkpoint_names(files):
            return {step: place / name for step, name in found.items()}
    return {}


def at_step(checkpoints: dict, step: int | None, run: str):
    """The checkpoint after `step` updates, or the last one. Raises RunNotFound if the run has none."""
    if not checkpoints:
        raise RunNotFound(f"{run} has no model_step_N.pt: the run has not saved any yet")
    if step is not None and step not in checkpoints:
        raise RunNotFound(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, checkpoints))}")
    return checkpoints[max(checkpoints) if step is None else step]


def pretrained_model(cls, path) -> tuple[Any, Any]:
    """(model of the class `cls`, where it was found): a run, as PretrainRunInfo.from_path finds it, or Hugging Face's.

    Hugging Face's models are folders with a config.json and no model_config.yaml, and names of one or two parts (gpt2,
    org/name) where there is no such file or folder. Raises UserError.
    """
    local = Path(path).expanduser()
    name = str(path)
    is_name = not local.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith(".pt")
    if is_name or ((local / "config.json").exists() and not (local / "model_config.yaml").exists()):
        from convert import from_hugging_face

        return from_hugging_face(cls, name if is_name else str(local)), path
    info = PretrainRunInfo.from_path(path)
    return info.load_model(cls), info.checkpoint_path


def data_of_update(info: PretrainRunInfo, update: int) -> dict[str, Any]:
    """What update number `update` (1, 2, ...) was trained on, read from the shards, in the order of the stream.

    position, window (B,): place in the training stream, and number of the window; shard (B,): the file in which the
    window begins; offset (B,): its first token there; tokens (B, n_ctx) uint16. Raises UserError without the shards.
    """
    c, path = info.config_dict, info.folder / "final_config.yaml"
    for key in ("seed", "num_iterations", "batch_size", "train_dataset_config"):
        if c.get(key) is None:  # SPD's runs have no seed
            raise UserError(f"{path} has no {key}: only train.py's runs record the order of their data")
    section = validated(DatasetConfig, c["train_dataset_config"], "train_dataset_config.")
    if c.get("inference_only"):
        raise UserError(f"{info.folder} was not trained: its config says inference_only")
    if not 1 <= update <= c["num_iterations"]:
        raise UserError(f"update {update} is not one of this run's: they go from 1 to {c['num_iterations']}")

    # The shards must be those of the last start: environment.json has one entry a start.
    data = Shards(section.folder(), "train", f"python prepare_data.py {path}")
    starts = read_json(info.folder / "environment.json", [])
    trained_on = starts[-1].get("dataset_sha256") if starts else None
    if trained_on and data.fingerprint()[1] not in trained_on.values():
        raise UserError(f"{data.folder} is not what this run was trained on: it was prepared again since")

    # Where training computes the window of a position, too.
    stream = TrainingStream(data, section, c["seed"])
    position = np.arange((update - 1) * c["batch_size"], update * c["batch_size"])  # (B,)
    window = stream.window(position)
    shard, offset = data.locate(window * section.n_ctx)
    return {
        "position": position,
        "window": window,
        "shard": np.array([data.files[i].name for i in shard]),
        "offset": offset,
        "tokens": stream.read(position),
    }


# -----------------------------------------------------------------------------
# Weights & Biases: a run's files come to <out>/pretrain_cache/<project>-<runid>/, where SPD puts them, too

WANDB_FORMS = (
    "entity/project/runid, entity/project/runs/runid, wandb: before either, https://wandb.ai/entity/project/runs/runid"
)
LISTING = "wandb.json"  # beside the files: which run it is, its state, and the size and md5 of what W&B has of it
SMALL_FILES = ("final_config.yaml", "model_config.yaml", "tokenizer.json", "tokenizer_config.json", "check.json")


def out_dir() -> Path:
    """The folder for runs and for copies of runs: SPD's environment variable, its successor's, or out/."""
    name = os.environ.get("SPD_OUT_DIR") or os.environ.get("PARAM_DECOMP_OUT_DIR") or "out"
    return Path(name).expanduser().absolute()


def wandb_run(path: str) -> tuple[str, ...] | None:
    """(entity, project, run id), if `path` is written like a run on W&B, else None."""
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    hosts = "|".join(re.escape(host) for host in ("wandb.ai", own) if host)
    # No part can be "..", or hold a separator of any system: together they become the name of a folder.
    name, run_id = r"([^\s\0/\\#?%:.~][^\s\0/\\#?%:]{0,127})", r"((?:[a-z0-9]-)?[a-z0-9]{8})"
    # After the name of a host, which pathlib leaves one slash, more may follow: a tab of the page, a query.
    found = re.fullmatch(rf"(?:wandb:)?{name}/{name}/(?:runs/)?{run_id}/?", path.strip())
    found = found or re.fullmatch(rf"https?:/+(?:{hosts})/{name}/{name}/runs/{run_id}(?:[/?#].*)?", path.strip())
    return found.groups() if found else None


def fetch(entity: str, project: str, run_id: str, step: int | None, weights: bool) -> Path:
    """The folder of a run on W&B, with the files wanted; those that are not there yet are downloaded.

    No network is needed for a run that had finished when it was listed, nor for a step whose weights are here. Without
    a network the copy is used as it is, and a line on stderr says so. Raises UserError.
    """
    name = f"{entity}/{project}/{run_id}"
    folder = out_dir() / "pretrain_cache" / f"{project}-{run_id}"
    if complete(folder, name, step, weights):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder, "downloading to", wait=True)
    try:
        # Several processes of one job may ask at once: another one may have downloaded the files by now.
        if not complete(folder, name, step, weights):
            download(name, folder, step, weights)
    finally:
        if lock:
            lock.release()
    return folder


def complete(folder: Path, name: str, step: int | None, weights: bool) -> bool:
    """Whether the files wanted of a run are all here, and W&B could not name others. Raises UserError."""
    listing = read_json(folder / LISTING, {})
    if not listing:
        return False
    if listing["run"] != name:
        raise UserError(f"{folder} holds another run, {listing['run']}: move it away to read {name}")
    # A run that is not finished may have newer checkpoints by now; one that is named does not change.
    if weights and listing["state"] != "finished" and step not in checkpoint_names(listing["files"]):
        return False
    return not missing_files(folder, listing, step, weights)


def missing_files(folder: Path, listing: dict, step: int | None, weights: bool) -> list[str]:
    """The files of a listed run that are wanted and not here. Raises RunNotFound if it has no such checkpoint."""
    files = listing["files"]
    wanted = [name for name in SMALL_FILES if name in files]
    if weights:
        run = f"W&B's run {listing['run']} ({listing['state']})"
        wanted.append(at_step(checkpoint_names(files), step, run))
    return [name for name in wanted if not is_whole(folder / name, *files[name])]


def is_whole(path: Path, size: int, md5: str | None) -> bool:
    """Whether the file is there with the size and the md5 (base64) that W&B lists; of old files it lists no md5."""
    if not path.is_file() or (size and path.stat().st_size != size):
        return False
    with open(path, "rb") as f:
        return not md5 or base64.b64encode(hashlib.file_digest(f, "md5").digest()).decode() == md5


def download(name: str, folder: Path, step: int | None, weights: bool) -> None:
    """Bring the files wanted of a run on W&B to `folder`, and then its listing."""
    try:
        import wandb

        api = wandb.Api()
        run = api.run(name)
        # The state comes first: the files of a run that is finished do not change any more.
        state, remote = run.state, {}
        for file in run.files(per_page=500):
            known = file.name.removeprefix("checkpoints/")
            # Only names that are known here become paths, so that none leads out of the folder.
            if known in SMALL_FILES or checkpoint_names([known]):
                remote[known] = file
    except Exception as e:  # no network, no login, no such run: the client's classes for these change with its versions
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        copies = checkpoints_in(folder)
        if not copies:
            raise RunNotFound(f"cannot read {name} from W&B ({reason}), and no checkpoint of it is here") from e
        print(f"cannot ask W&B about {name} ({reason}): step {max(copies)} is the last in {folder}", file=sys.stderr)
        return

    files = {known: (file.size, file.md5) for known, file in remote.items()}
    listing = {"run": name, "state": state, "files": files}
    # The listing is written last: it stands for files that are here.
    base_url = api.settings["base_url"].rstrip("/") + "/"
    for known in missing_files(folder, listing, step, weights):
        print(f"downloading {known} of W&B's run {name} to {folder}", file=sys.stderr, flush=True)
        url = str(remote[known].url)
        # W&B's own addresses need the login. Those of a bucket are signed, and must not get it.
        login = ("api", api.api_key) if url.startswith(base_url) else None
        receive(url, login, folder / known, *files[known])
    write_text(folder / LISTING, json.dumps(listing, indent=1) + "\n")


def receive(url: str, login: tuple | None, path: Path, size: int, md5: str | None) -> None:
    """Download one file, whole or not at all. Raises UserError if it is not what W&B lists.

    The listed size bounds what is written. (The client's own `file.download` writes all that a server sends: 400 MB of
    a file of 3 MB, when it was tried.) An error of the network ends the program: the same command goes on.
    """
    import requests  # wandb requires it

    with requests.get(url, auth=login, stream=True, timeout=30) as answer, whole_file(path) as f:
        answer.raise_for_status()
        for block in answer.iter_content(2**20):
            f.write(block)
            if size and f.tell() > size:
                break
        f.flush()
        if not is_whole(Path(f.name), size, md5):
            raise UserError(f"{path.name} did not come with the size and md5 that W&B lists: try again")


# -----------------------------------------------------------------------------
# losses


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that have a step; empty if there is no such file.

    A line that is being written while it is read is not JSON yet, and is left out.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def curve(metrics: list[dict], name: str) -> list[tuple[int, float]]:
    """[(step, value), ...] of one metric, such as "val_loss"."""
    return [(line["step"], line[name]) for line in metrics if isinstance(line.get(name), int | float)]


def smoothed(values, width: int):
    """values (n,) -> the mean of each with its `width` neighbours (n,); the ends are repeated beyond themselves."""
    padded = np.pad(np.asarray(values, float), (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def plot_losses(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw the losses of {label: metrics} over updates, as PNG. Raises ImportError without matplotlib."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend, which child processes inherit, may not be installed
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    for i, (label, metrics) in enumerate(runs.items()):
        if points := curve(metrics, "train_loss"):
            steps, losses = zip(*points, strict=True)
            # One update's loss is that of one batch, and noisy: it is drawn faintly behind its mean.
            smooth = smoothed(losses, 1 + len(losses) // 50)
            ax.plot(steps, losses, color=f"C{2 * i}", lw=0.6, alpha=0.3)
            ax.plot(
                steps,
                smooth,
                color=f"C{2 * i}",
                lw=1.5,
                label=f"{label} training, smoothed: {smooth[-1]:.3f} at the end",
            )
        if points := curve(metrics, "val_loss"):
            steps, losses = zip(*points, strict=True)
            ax.plot(steps, losses, f"C{2 * i + 1}.-", lw=1, label=f"{label} validation: {losses[-1]:.3f} at the end")
    ax.set(xlabel="update", ylabel="cross-entropy (nats per token)")
    fig.legend(loc="outside upper center", fontsize="small")  # long names would hide the curves
    ax.grid(alpha=0.3)
    with whole_file(path) as f:
        fig.savefig(f, format="png", dpi=120)


# -----------------------------------------------------------------------------
# a run on one screen

SAMPLE_TOKENS = 128


def summary(metrics: list[dict], name: str) -> dict | None:
    """First, best and last value of a metric, each with its step; None if it was never recorded."""
    points = curve(metrics, name)
    if not points:
        return None
    # NaN is smaller than nothing and larger than nothing: it is the best only if there is no number.
    best = min(points, key=lambda point: (math.isnan(point[1]), point[1]))
    found = {}
    for which, (step, loss) in (("first", points[0]), ("best", best), ("last", points[-1])):
        found[which] = {"loss": loss, "step": step}
    return found


def facts(info: PretrainRunInfo) -> dict[str, Any]:
    """What the run's folder says about it, as plain values; None is what it does not say.

    With a checkpoint the model is loaded, and so compared with check.json.
    """
    import torch

    if info.checkpoint_path:
        model = info.load_model()
    else:
        with torch.device("meta"):  # a shape without memory
            model = info.model_class(validated(info.model_class.config_class, info.model_config_dict, "model."))
    config, metrics = info.config_dict, info.metrics
    starts = read_json(info.folder / "environment.json", [{}])
    status, picture = info.folder / "status", info.folder / "loss.png"
    # W&B may have checkpoints that are not here.
    listed = checkpoint_names(read_json(info.folder / LISTING, {}).get("files", ()))
    steps = sorted(info.checkpoints.keys() | listed)
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "in_blocks": sum(p.numel() for p in model.h.parameters()),
        "shape": {key: value for key, value in info.model_config_dict.items() if key != "model_type"},
        "run": str(info.folder),
        "status": status.read_text().strip() if status.exists() else None,
        "started": starts[0].get("started"),
        "git_commit": starts[-1].get("git_commit"),
        "updates": max([line["step"] for line in metrics] + steps, default=0),
        "num_iterations": config.get("num_iterations"),
        "tokens": max((line["tokens"] for line in metrics if "tokens" in line), default=None),
        "seed": config.get("seed"),
        "dataset": config.get("train_dataset_config", {}).get("name"),
        "tokenizer": str(info.tokenizer_path or info.hf_tokenizer_path or "unknown"),
        "checkpoints": steps,
        "loaded": str(info.checkpoint_path) if info.checkpoint_path else None,
        "train_loss": summary(metrics, "train_loss"),
        "val_loss": summary(metrics, "val_loss"),
        "picture": str(picture) if picture.exists() else None,
    }


def as_text(value) -> str:
    """One of the facts, for a person."""
    if isinstance(value, dict) and "loss" in value:
        return f"{value['loss']:.4f} at {value['step']}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(v)}" for key, v in value.items())
    if isinstance(value, list):  # the steps of the checkpoints
        return f"{len(value)}, of steps {value[0]} to {value[-1]}" if value else "none yet"
    return f"{value:,}" if type(value) is int else str(value)


def view(info: PretrainRunInfo) -> str:
    """The run's facts on one screen, for a person."""
    wrap = textwrap.TextWrapper(80, subsequent_indent=" " * 15, break_long_words=False, break_on_hyphens=False)
    # What the folder does not say is left out here, and null for programs.
    known = {key: value for key, value in facts(info).items() if value is not None}
    return "\n".join(wrap.fill(f"{key:<14} {as_text(value)}") for key, value in known.items())


def sample(info: PretrainRunInfo, prompt: str, n: int, temperature: float, top_k: int | None) -> list[str]:
    """n texts that begin with `prompt`; each ends with its document, or after SAMPLE_TOKENS more tokens."""
    import torch

    tok, eos = info.load_tokenizer(), info.eos_token_id
    ids = tok.encode(prompt).ids
    idx = torch.tensor([ids or [eos]] * n)  # EOS is what stands before a document
    out = info.load_model().generate(idx, SAMPLE_TOKENS, temperature, top_k, eos)  # (n, T)
    texts = []
    # Only what follows the prompt may hold EOS: in a prompt it is text.
    for row in out[:, idx.shape[1] :].tolist():
        # Not every tokenizer leaves EOS out when it decodes.
        length = row.index(eos) if eos in row else len(row)
        texts.append(tok.decode(ids + row[:length]))
    return texts


# -----------------------------------------------------------------------------
# the command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Show trained runs.")
    parser.add_argument("run", nargs="+", help="a run folder, a checkpoint or a W&B path")
    parser.add_argument("--step", type=int, help="the checkpoint after this many updates (default: the last)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--json", action="store_true", help="the same for programs: one JSON object a line")
    instead.add_argument("--sample", metavar="PROMPT", help="print how the model continues this text")
    parser.add_argument("--n", type=int, default=1, help="number of samples (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the samples; 0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: all)")
    instead.add_argument("--data", type=int, metavar="N", help="print what update N was trained on")
    instead.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses of the runs into one picture")
    args = parser.parse_args()
    if args.step is not None and (args.plot is not None or args.data is not None):
        parser.error("--step does not go with --data and --plot: both are of the whole run")
    if args.sample is None and (args.n, args.temperature, args.top_k) != (1, 0.8, None):
        parser.error("--n, --temperature and --top-k go with --sample")
    return args


def print_data(info: PretrainRunInfo, update: int) -> None:
    """Print the windows of one update, each as text below its place."""
    tok = info.load_tokenizer()
    for position, window, shard, offset, tokens in zip(*data_of_update(info, update).values(), strict=True):
        text = tok.decode(tokens.tolist(), skip_special_tokens=False)
        print(f"--- position {position}: window {window}, {shard} from token {offset}\n{text}")


def show(info: PretrainRunInfo, args: argparse.Namespace) -> None:
    """Print what was asked of one run."""
    if args.data is not None:
        print_data(info, args.data)
    elif args.sample is not None:
        for i, text in enumerate(sample(info, args.sample, args.n, args.temperature, args.top_k)):
            print(f"--- sample {i + 1}\n{text}")
    elif args.json:
        text = json.dumps(facts(info))
        print(json.dumps(json.loads(text, parse_constant=lambda _: None)))  # JSON has no NaN: it becomes null
    else:
        print(view(info))


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII console shows what it cannot print as escapes
    args = parse_arguments()
    try:
        infos = {path: PretrainRunInfo.from_path(path, args.step, args.sample is not None) for path in args.run}
        if args.plot:
            for info in infos.values():
                if not info.metrics:
                    raise UserError(f"{info.folder} has no metrics.jsonl with losses to draw")
            plot_losses({path if len(infos) > 1 else "": info.metrics for path, info in infos.items()}, args.plot)
            print(f"wrote {args.plot}")
            return
        for info in infos.values():
            show(info, args)
    except ImportError as e:
        sys.exit(f"run_info: {e}: pip install {e.name}")
    except (UserError, OSError, ValueError) as e:  # ValueError: what generate says of its arguments
        sys.exit(f"run_info: {e}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` may stop reading; Windows has no such signal
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
