"""Find a trained run, load it and show it.

    from run_info import PretrainRunInfo
    run_info = PretrainRunInfo.from_path("out/target_models/2026-01-01_00-00-00", step=1000)
    model, tokenizer = run_info.load_model(), run_info.load_tokenizer()

A path is a run folder, one of its checkpoints, or a run on Weights & Biases (entity/project/runid), whose files are
downloaded once. `python run_info.py PATH` shows a run; see --help.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from prepare_data import (
    DatasetConfig,
    Shards,
    TextEncoder,
    TrainingStream,
    UserError,
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
        # A folder with files wins over W&B. (wandb's client creates empty ones that are named like the run.)
        if on_wandb and not any(local.glob("*")):
            local = fetch(*on_wandb, step, weights or step is not None)
        if not os.path.exists(local):
            raise RunNotFound(f"no run at {local}: name a run folder, a model_step_N.pt or a W&B run ({WANDB_FORMS})")

        # A checkpoint is in its run folder's checkpoints/ folder; in W&B's copies it is in the run folder itself.
        folders = [f for f in (local, *local.parents[:2]) if (f / "model_config.yaml").exists()]
        if not folders:
            raise RunNotFound(f"{local} is not in a run folder: there is no model_config.yaml")
        folder = folders[0]
        checkpoint = local if local.is_file() else None
        # A step that is named must be there; without one, the last is taken, if weights are wanted or there are any.
        found = checkpoints_in(folder)
        if step is not None or (checkpoint is None and (found or weights)):
            checkpoint = at_step(found, step, str(folder))

        # param-decomp's cache entries have no final_config.yaml, and all that is known of them is the shape.
        final = folder / "final_config.yaml"
        config = read_config(final) if final.exists() else {}
        if config.get("enable_ln_ablation"):
            raise UserError(f"{folder}: the run removed its norms (enable_ln_ablation); the models here all have them")
        tokenizer = folder / "tokenizer.json"
        return cls(
            folder=folder,
            checkpoint_path=checkpoint,
            config_dict=config,
            model_config_dict=read_config(folder / "model_config.yaml"),
            tokenizer_path=tokenizer if tokenizer.exists() else None,
            hf_tokenizer_path=config.get("train_dataset_config", {}).get("hf_tokenizer_path"),
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
        if name not in MODEL_CLASSES:
            raise UserError(f"{self.folder} has model_type {name}: name its class, as in load_model(GPT2)")
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
            raise UserError(f"cannot load {self.checkpoint_path}: {in_short(e)}") from e

    @property
    def encoder(self) -> TextEncoder:
        """The run's own tokenizer, or else the one that its config names. Raises UserError if there is none."""
        name = self.tokenizer_path or self.hf_tokenizer_path
        if not name:
            raise UserError(f"{self.folder} has no tokenizer.json and its config names no hf_tokenizer_path")
        return load_encoder(str(name))

    def load_tokenizer(self):
        """A tokenizers.Tokenizer with the ids of training.

        It encodes text as prepare_data does: nothing is cut, padded or added, and no special token is read out of text.
        Raises UserError if there is none.
        """
        return text_tokenizer(self.encoder.json)

    @property
    def eos_token_id(self) -> int:
        """The id that ends a document, as recorded with the run in tokenizer_config.json. Raises UserError."""
        return self.encoder.eos_token_id

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; empty for a run without it."""
        return read_metrics(self.folder / "metrics.jsonl")


def in_short(error: Exception) -> str:
    """Another library's error in one line: its messages may have many."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def read_json(path: Path, default):
    """The value in a JSON file; `default` if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else default


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
        files = [path.name for path in place.glob("model_step_*")]
        if found := checkpoint_names(files):
            return {step: place / name for step, name in found.items()}
    return {}


def at_step(checkpoints: dict, step: int | None, run: str):
    """The checkpoint after `step` updates, or the last one. Raises RunNotFound if the run has no such checkpoint."""
    wanted = max(checkpoints, default="N") if step is None else step
    if wanted not in checkpoints:
        raise RunNotFound(f"{run} has no model_step_{wanted}.pt: it has the steps {list(checkpoints)}")
    return checkpoints[wanted]


def pretrained_model(cls, path) -> tuple:
    """(model of the class `cls`, where it was found): a run, as PretrainRunInfo.from_path finds it, or Hugging Face's.

    Hugging Face's models are folders with a config.json, and names of one or two parts (gpt2, org/name) where there is
    no such file or folder. Raises UserError.
    """
    local = Path(path).expanduser()
    is_name = not local.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path))
    if is_name or (local / "config.json").exists():
        from convert import from_hugging_face

        return from_hugging_face(cls, str(local)), path
    info = PretrainRunInfo.from_path(path)
    return info.load_model(cls), info.checkpoint_path


def data_of_update(info: PretrainRunInfo, update: int) -> dict[str, Any]:
    """What update number `update` (1, 2, ...) was trained on, read from the shards, in the order of the stream.

    position, window (B,): place in the training stream, and number of the window; shard (B,): the file in which the
    window begins; offset (B,): its first token there; tokens (B, n_ctx) uint16. Raises UserError without the shards.
    """
    c = info.config_dict
    # SPD's runs have no seed.
    if c.get("seed") is None or c.get("inference_only"):
        raise UserError(f"{info.folder} has no seed, or says inference_only: it has no order of training data")
    section = validated(DatasetConfig, c["train_dataset_config"], "train_dataset_config.")
    if not 1 <= update <= c["num_iterations"]:
        raise UserError(f"update {update} is not one of this run's: they go from 1 to {c['num_iterations']}")

    # The shards must be those of the last start: environment.json has one entry a start.
    data = Shards(section.folder(), "train", f"python prepare_data.py {info.folder}/final_config.yaml")
    trained_on = read_json(info.folder / "environment.json", [{}])[-1].get("dataset_sha256")
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


def wandb_run(path: str) -> tuple | None:
    """(entity, project, run id), if `path` is written like a run on W&B, else None."""
    # No part can be "..", or hold a separator of any system: together they become the name of a folder.
    name, run_id = r"([^\s\0/\\#?%:.~][^\s\0/\\#?%:]{0,127})", r"((?:[a-z0-9]-)?[a-z0-9]{8})"
    short = rf"(?:wandb:)?{name}/{name}/(?:runs/)?{run_id}/?"
    # An address may go on: to a tab of the page, with a query. pathlib leaves one slash of two.
    address = rf"https?:/+wandb\.ai/{name}/{name}/runs/{run_id}(?:[/?#].*)?"
    path = path.strip()
    found = re.fullmatch(short, path) or re.fullmatch(address, path)
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
    # Several processes of one job may ask at once: those that waited find all files downloaded.
    lock = hold(folder, "downloading to", wait=True)
    try:
        download(name, folder, step, weights)
    finally:
        if lock:
            lock.release()
    return folder


def complete(folder: Path, name: str, step: int | None, weights: bool) -> bool:
    """Whether the files wanted of a run are all here, and W&B cannot have newer ones. Raises UserError."""
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
        wanted.append(at_step(checkpoint_names(files), step, listing["run"]))
    return [name for name in wanted if not is_whole(folder / name, *files[name])]


def is_whole(path: Path, size: int, md5: str | None) -> bool:
    """Whether the file is there with the size and the md5 (base64) that W&B lists; of old files it lists no md5."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "md5").digest()
    return md5 in (None, base64.b64encode(found).decode())


def download(name: str, folder: Path, step: int | None, weights: bool) -> None:
    """Bring the files wanted of a run on W&B to `folder`, and then its listing."""
    urls = {}
    try:
        import wandb

        api = wandb.Api()
        run = api.run(name)
        # The state comes first: the files of a run that is finished do not change any more.
        listing = {"run": name, "state": run.state, "files": {}}
        for file in run.files():
            known = file.name.removeprefix("checkpoints/")
            # Only names that are known here become paths, so that no name can point outside the folder.
            if known in SMALL_FILES or checkpoint_names([known]):
                listing["files"][known] = (file.size, file.md5)
                urls[known] = file.url
    except Exception as e:  # no network, no login, no such run: the client's classes for these change with its versions
        reason = f"cannot read {name} from W&B ({in_short(e)})"
        copies = checkpoints_in(folder)
        if not copies:
            raise RunNotFound(reason) from e
        print(f"{reason}: step {max(copies)} is the last in {folder}", file=sys.stderr)
        return

    for known in missing_files(folder, listing, step, weights):
        print(f"downloading {known} of W&B's run {name} to {folder}", file=sys.stderr)
        # W&B's own URLs need the login. A bucket's are signed already and must not receive it.
        is_own = urls[known].startswith(api.settings["base_url"])
        receive(urls[known], ("api", api.api_key) if is_own else None, folder / known, *listing["files"][known])
    # The listing is written last: it stands for files that are here.
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
            if f.tell() > size:
                break
        f.flush()
        if not is_whole(Path(f.name), size, md5):
            raise UserError(f"{path.name} did not come with the size and md5 that W&B lists: try again")


# -----------------------------------------------------------------------------
# losses


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; empty if there is no such file."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        # A line that is being written while it is read is not JSON yet, and is left out.
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def curve(metrics: list[dict], name: str) -> list[tuple]:
    """[(step, value), ...] of one metric, such as "val_loss"."""
    return [(line["step"], line[name]) for line in metrics if name in line]


def smoothed(values, width: int):
    """values (n,) -> the mean of each with its `width` neighbours, of which there are fewer at the ends (n,)."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def plot_losses(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw the losses of {label: metrics} over updates, as PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    for i, (label, metrics) in enumerate(runs.items()):
        if points := curve(metrics, "train_loss"):
            steps, losses = np.transpose(points)
            smooth = smoothed(losses, 1 + len(losses) // 50)
            # One update's loss is that of one batch, and noisy: it is drawn faintly behind its mean.
            ax.plot(steps, losses, f"C{2 * i}", lw=0.6, alpha=0.3)
            ax.plot(steps, smooth, f"C{2 * i}", label=f"{label} training, smoothed: {smooth[-1]:.3f} at the end")
        if points := curve(metrics, "val_loss"):
            steps, losses = np.transpose(points)
            ax.plot(steps, losses, f"C{2 * i + 1}.-", label=f"{label} validation: {losses[-1]:.3f} at the end")
    ax.set(xlabel="update", ylabel="cross-entropy (nats per token)")
    fig.legend(loc="outside upper center", fontsize="small")  # long names would hide the curves
    ax.grid(alpha=0.3)
    with whole_file(path) as f:
        fig.savefig(f, format="png", dpi=120)


# -----------------------------------------------------------------------------
# a run on one screen

SAMPLE_TOKENS = 128


def summary(metrics: list[dict], name: str) -> dict | None:
    """First, best and last value of a loss, each with its step; None if it was never recorded."""
    points = curve(metrics, name)
    if not points:
        return None
    best = min(points, key=lambda point: point[1])
    chosen = {"first": points[0], "best": best, "last": points[-1]}
    return {which: {"loss": round(loss, 4), "step": step} for which, (step, loss) in chosen.items()}


def facts(info: PretrainRunInfo) -> dict[str, Any]:
    """What the run's folder says about it, as plain values; None: unknown.

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
    listed = read_json(info.folder / LISTING, {"files": ()})["files"]
    steps = sorted(info.checkpoints.keys() | checkpoint_names(listed))
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "in_blocks": sum(p.numel() for p in model.h.parameters()),
        "shape": info.model_config_dict,
        "run": str(info.folder),
        "status": status.read_text().strip() if status.exists() else None,
        "started": starts[0].get("started"),
        "git_commit": starts[-1].get("git_commit"),
        "num_iterations": config.get("num_iterations"),
        "seed": config.get("seed"),
        "dataset": config.get("train_dataset_config", {}).get("name"),
        "tokenizer": str(info.tokenizer_path or info.hf_tokenizer_path),
        "checkpoints": steps,
        "loaded": info.checkpoint_path and str(info.checkpoint_path),
        "train_loss": summary(metrics, "train_loss"),
        "val_loss": summary(metrics, "val_loss"),
        "picture": str(picture) if picture.exists() else None,
    }


def sample(info: PretrainRunInfo, prompt: str, n: int, temperature: float, top_k: int | None) -> list[str]:
    """n texts that begin with `prompt`; each ends with its document, or after SAMPLE_TOKENS more tokens."""
    import torch

    tok, eos = info.load_tokenizer(), info.eos_token_id
    idx = torch.tensor([tok.encode(prompt).ids or [eos]] * n)  # EOS is what stands before a document
    out = info.load_model().generate(idx, SAMPLE_TOKENS, temperature, top_k, eos)  # (n, T)
    # Not every tokenizer leaves EOS out when it decodes. In a prompt it is text, and has other ids.
    return [tok.decode([i for i in row if i != eos]) for row in out.tolist()]


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
        print(json.dumps(facts(info)))
    else:
        print(yaml.safe_dump(facts(info), sort_keys=False, default_flow_style=None, allow_unicode=True))


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII console shows what it cannot print as escapes
    args = parse_arguments()
    try:
        infos = {path: PretrainRunInfo.from_path(path, args.step, args.sample is not None) for path in args.run}
        if args.plot:
            runs = {path: info.metrics for path, info in infos.items()}
            if not all(runs.values()):
                raise UserError("there is nothing to draw: a run has no metrics.jsonl")
            plot_losses(runs, args.plot)
            print(f"wrote {args.plot}")
            return
        for info in infos.values():
            show(info, args)
    except ImportError as e:
        sys.exit(f"run_info: {e}: pip install {e.name}")
    except (UserError, OSError, ValueError) as e:  # ValueError: what generate says of its arguments
        sys.exit(f"run_info: {e}")


if __name__ == "__main__":
    main()
