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
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from prepare_data import (
    DatasetConfig,
    Shards,
    TextEncoder,
    TrainingStream,
    UserError,
    blame,
    differences,
    hold,
    in_short,
    load_encoder,
    local,
    read_config,
    read_json,
    text_tokenizer,
    validated,
    whole_file,
    write_json,
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
    config_dict: dict  # final_config.yaml; empty for param-decomp's cache entries, which have none
    model_config_dict: dict  # model_config.yaml
    tokenizer_path: Path | None  # the run's own tokenizer.json
    hf_tokenizer_path: str | None  # the tokenizer that the config names

    @classmethod
    def from_path(cls, path: str | Path, step: int | None = None, weights: bool = True) -> "PretrainRunInfo":
        """The run at `path` after `step` updates (default: the file that `path` names, or the last checkpoint).

        `path` is a run folder, its checkpoints/ folder, a checkpoint file, or a run on W&B (WANDB_FORMS). An entry of
        param-decomp's pretrain_cache/ is a run folder, too. With weights=False a run without checkpoints is accepted.
        Raises UserError; RunNotFound, which is also a FileNotFoundError, if there is no such run or checkpoint.
        """
        weights = weights or step is not None
        place = local(path).absolute()
        on_wandb = wandb_run(str(path))
        # A folder with files wins over W&B. (wandb's client creates empty ones that are named like the run.)
        if on_wandb and not any(place.glob("*")):
            place = fetch(on_wandb, step, weights)
        # A checkpoint is in its run folder's checkpoints/ folder; in W&B's copies it is in the run folder itself.
        for folder in place, *place.parents[:2]:
            if os.path.exists(place) and (folder / "model_config.yaml").exists():
                break
        else:
            raise RunNotFound(f"no run at {place}: name a folder with a model_config.yaml or a W&B run ({WANDB_FORMS})")
        found = checkpoints_in(folder)
        checkpoint = None
        if place.is_file() and step is None:
            checkpoint = place
        elif found or weights:
            checkpoint = at_step(found, step)

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
        with blame(f"cannot load {self.checkpoint_path}"):
            return cls.from_run_info(self)

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


def last_start(folder: Path) -> dict:
    """What environment.json says of a run's last start: time, command, versions, device, data; empty if unknown."""
    return read_json(folder / "environment.json", [{}])[-1]


def checkpoint_names(names, kind: str = "model") -> dict[int, str]:
    """Updates done -> name, for each name that is a checkpoint's, in order. A .pt wins over a .safetensors.

    kind: "model", or "optim" for the optimizers' states.
    """
    found = {}
    # In this order the .pt comes last of two names with the same step.
    for name in sorted(names, reverse=True):
        if match := re.fullmatch(rf"{kind}_step_([0-9]{{1,18}})\.(pt|safetensors)", name):
            found[int(match[1])] = name
    return dict(sorted(found.items()))


def checkpoints_in(folder: Path, kind: str = "model") -> dict[int, Path]:
    """Updates done -> file, in order. W&B's copies have no checkpoints/: the files are in the folder."""
    files = *folder.glob("*_step_*"), *folder.glob("checkpoints/*_step_*")
    paths = {path.name: path for path in files}
    return {step: paths[name] for step, name in checkpoint_names(paths, kind).items()}


def at_step(checkpoints: dict, step: int | None):
    """The checkpoint after `step` updates, or the last one. Raises RunNotFound if it is not among `checkpoints`."""
    wanted = max(checkpoints, default="N") if step is None else step
    if wanted not in checkpoints:
        raise RunNotFound(f"the run has no model_step_{wanted}.pt: it has the steps {list(checkpoints)}")
    return checkpoints[wanted]


def pretrained_model(cls, path):
    """The model of the class `cls` at `path`: a run, as PretrainRunInfo.from_path finds it, or Hugging Face's.

    Hugging Face's models are folders with a config.json, and names of one or two parts (gpt2, org/name) where there is
    no such file or folder. Raises UserError.
    """
    place = local(path)
    is_name = not place.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(path))
    if is_name or (place / "config.json").exists():
        from convert import from_hugging_face

        return from_hugging_face(cls, str(place))
    return PretrainRunInfo.from_path(path).load_model(cls)


def data_of_update(info: PretrainRunInfo, update: int) -> dict:
    """What update number `update` (1, 2, ...) was trained on, read from the shards, in the order of the stream.

    position, window (B,): place in the training stream, and number of the window; shard (B,): the file in which the
    window begins; offset (B,): its first token there; tokens (B, n_ctx) uint16. Raises UserError without the shards.
    """
    c = info.config_dict
    # SPD's runs have no seed, and so no order that could be computed again.
    updates = 0 if c.get("seed") is None or c.get("inference_only") else c["num_iterations"]
    if not 1 <= update <= updates:
        raise UserError(
            f"no update {update}: this run has updates 1 to {updates} (none without a seed, or if inference_only)"
        )
    section = validated(DatasetConfig, c["train_dataset_config"], "train_dataset_config.")
    data = Shards(section.folder(), "train", info.folder / "final_config.yaml")
    # The shards must be those of the last start. (A copy from W&B does not record them, and is not checked.)
    trained_on = last_start(info.folder).get("dataset_sha256")
    if trained_on and data.fingerprint()[1] not in trained_on.values():
        raise UserError(f"{data.folder} is not what this run was trained on: it was prepared again since")

    # Where training computes the window of a position, too.
    stream = TrainingStream(data, section, c["seed"])
    position = stream.positions(update, c["batch_size"])  # (B,)
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
LISTING = "wandb.json"  # beside the files: which run it is, its state, and the sizes of what W&B has of it
SMALL_FILES = ("final_config.yaml", "model_config.yaml", "tokenizer.json", "tokenizer_config.json", "check.json")


def out_dir() -> Path:
    """The folder for runs and for copies of runs: SPD's environment variable, its successor's, or out/."""
    name = os.environ.get("SPD_OUT_DIR") or os.environ.get("PARAM_DECOMP_OUT_DIR") or "out"
    return local(name).absolute()


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


def fetch(run: tuple, step: int | None, weights: bool) -> Path:
    """The folder of a run on W&B, with the files wanted; those that are not there yet are downloaded.

    run: (entity, project, run id). No network is needed for a run that had finished when it was listed, nor for a step
    whose weights are here. Without a network the copy is used as it is, and a line on stderr says so. Raises UserError.
    """
    name = "/".join(run)
    folder = out_dir() / "pretrain_cache" / "-".join(run[1:])
    listing = read_json(folder / LISTING, {"run": name, "state": None, "files": {}})
    if listing["run"] != name:
        raise UserError(f"{folder} holds another run, {listing['run']}: move it away")
    # A run that is not finished may have newer checkpoints by now; one that is named does not change.
    is_final = listing["state"] == "finished" or step in checkpoint_names(listing["files"])
    if is_final and not missing_files(folder, listing, step, weights):
        return folder

    # Several processes of one job may ask at once: those that waited find all files downloaded.
    with hold(folder, "downloading to", wait=True):
        try:
            import wandb

            api = wandb.Api()
            # The state comes with the run, before the files: those of a finished run do not change any more.
            found = api.run(name)
            files = {file.name.removeprefix("checkpoints/"): file for file in found.files()}
        except Exception as e:  # no network, no login, no such run: the client's classes change with its versions
            reason = f"cannot read {name} from W&B ({in_short(e)})"
            copies = checkpoints_in(folder)
            if not copies:
                raise RunNotFound(reason) from e
            print(f"{reason}: step {max(copies)} is the last in {folder}", file=sys.stderr)
            return folder
        listing = {"run": name, "state": found.state, "files": {known: file.size for known, file in files.items()}}
        for known in missing_files(folder, listing, step, weights):
            print(f"downloading {known} to {folder}", file=sys.stderr)
            receive(files[known], api, folder / known)
        # The listing is written last: it stands for files that are here.
        write_json(folder / LISTING, listing)
    return folder


def missing_files(folder: Path, listing: dict, step: int | None, weights: bool) -> list[str]:
    """The files of a listed run that are wanted and not here. Raises RunNotFound if it has no such checkpoint."""
    sizes = listing["files"]
    # Only names that are known here become paths, so that no name on W&B can point outside the folder.
    wanted = [name for name in SMALL_FILES if name in sizes]
    if weights:
        wanted.append(at_step(checkpoint_names(sizes), step))
    # A download here is whole or absent. One that SPD, which uses the same folder, did not finish differs in size.
    here = {path.name: path.stat().st_size for path in folder.glob("*")}
    return [name for name in wanted if here.get(name) != sizes[name]]


def receive(file, api, path: Path):
    """Download one of W&B's files, whole or not at all. Raises UserError if it is not what W&B lists.

    The listed size bounds what is written. (The client's own `file.download` writes all that a server sends: 400 MB of
    a file of 3 MB, when it was tried.) An error of the network ends the program: the same command goes on.
    """
    import requests  # wandb requires it

    # W&B's own URLs need the login. A bucket's are signed already and must not receive it.
    login = ("api", api.api_key) if file.url.startswith(api.settings["base_url"]) else None
    md5 = hashlib.md5()
    with requests.get(file.url, auth=login, stream=True, timeout=30) as answer, whole_file(path) as f:
        answer.raise_for_status()
        for block in answer.iter_content(2**20):
            f.write(block)
            md5.update(block)
            if f.tell() > file.size:
                break
        # W&B lists no md5 for old files.
        if f.tell() != file.size or file.md5 not in (None, base64.b64encode(md5.digest()).decode()):
            raise UserError(f"the download of {path.name} differs from W&B's listed size or md5: try again")


# -----------------------------------------------------------------------------
# losses


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; empty if there is no such file."""
    text = path.read_text() if path.exists() else ""
    # A line that is being written while it is read has no end yet, and is left out.
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def plot_losses(runs: dict[str, list[dict]], path: Path):
    """Draw the losses of {label: metrics} over updates, as PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    for label, metrics in runs.items():
        for name, said, style in (("train_loss", "training, smoothed", "-"), ("val_loss", "validation", ".-")):
            points = np.transpose([(line["step"], line[name]) for line in metrics if name in line])  # (2, n)
            if not points.size:
                continue
            # One update's loss is that of one batch, and noisy: it is drawn in grey behind its running mean.
            width = 1 + len(points[0]) // 50 if name == "train_loss" else 1
            steps, losses = [np.convolve(row, np.ones(width) / width, "valid") for row in points]
            ax.plot(*points, "silver", lw=0.6, zorder=1)
            ax.plot(steps, losses, style, label=f"{label} {said}: {losses[-1]:.3f} at the end")
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
    lines = [line for line in metrics if name in line]
    if not lines:
        return None
    best = min(lines, key=lambda line: line[name])
    chosen = {"first": lines[0], "best": best, "last": lines[-1]}
    return {which: {"loss": round(line[name], 4), "step": line["step"]} for which, line in chosen.items()}


def facts(info: PretrainRunInfo) -> dict:
    """What the run's folder says about it, as plain values; None: unknown.

    With a checkpoint the model is loaded, and so compared with check.json.
    """
    import torch

    if info.checkpoint_path:
        model = info.load_model()
    else:
        with torch.device("meta"):  # a shape without memory
            model = info.model_class(validated(info.model_class.config_class, info.model_config_dict, "model."))
    config = info.config_dict
    train = config.get("train_dataset_config", {})
    val = config.get("val_dataset_config", {})
    # param-decomp's torch version reads both sections as one, and refuses a run where they differ in more than this.
    unlike = differences(train, val, ignored=("split", "path", "seed", "revision", "config_name"))
    status = info.folder / "status"
    picture = info.folder / "loss.png"
    # W&B may have checkpoints that are not here.
    listed = read_json(info.folder / LISTING, {"files": ()})["files"]
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": info.model_config_dict,
        "run": str(info.folder),
        "status": status.read_text().strip() if status.exists() else None,
        "last_start": last_start(info.folder),
        "config": {key: value for key, value in config.items() if isinstance(value, (int, float, str))},
        "data": train,
        "checkpoints": sorted(info.checkpoints.keys() | checkpoint_names(listed)),
        "loaded": info.checkpoint_path and str(info.checkpoint_path),
        "train_loss": summary(info.metrics, "train_loss"),
        "val_loss": summary(info.metrics, "val_loss"),
        "picture": str(picture) if picture.exists() else None,
        "param_decomp": f"its torch version refuses it, {unlike}" if unlike else "its torch version takes it",
    }


def sample(info: PretrainRunInfo, args: argparse.Namespace) -> list[str]:
    """Texts that begin with the prompt; each ends with its document, or after SAMPLE_TOKENS more tokens."""
    import torch

    tok = info.load_tokenizer()
    eos = info.eos_token_id
    args.sample.encode()  # raises ValueError for bytes that are no text
    ids = tok.encode(args.sample).ids or [eos]  # EOS is what stands before a document
    idx = torch.tensor([ids] * args.n)  # (n, T)
    out = info.load_model().generate(idx, SAMPLE_TOKENS, args.temperature, args.top_k, eos)
    # Some tokenizers decode EOS to its name. (In a prompt the name is plain text, and has other ids.)
    return [tok.decode([i for i in row if i != eos]) for row in out.tolist()]


# -----------------------------------------------------------------------------
# the command line


def show(info: PretrainRunInfo, args: argparse.Namespace):
    """Print what was asked of one run."""
    if args.data is not None:
        tok = info.load_tokenizer()
        seen = data_of_update(info, args.data)
        for position, window, shard, offset, tokens in zip(*seen.values()):
            print(f"--- position {position}: window {window}, {shard} from token {offset}")
            print(tok.decode(tokens.tolist(), skip_special_tokens=False))
    elif args.sample is not None:
        for i, text in enumerate(sample(info, args), 1):
            print(f"--- sample {i}\n{text}")
    elif args.json:
        print(json.dumps(facts(info)))
    else:
        print(yaml.safe_dump(facts(info), sort_keys=False, default_flow_style=None, allow_unicode=True, width=120))


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII console shows what it cannot print as escapes
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
    instead.add_argument("--plot", type=local, metavar="FILE.png", help="draw the losses of the runs into one picture")
    args = parser.parse_args()
    if args.sample is None and (args.n, args.temperature, args.top_k) != (1, 0.8, None):
        parser.error("--n, --temperature and --top-k go with --sample")
    try:
        infos = [PretrainRunInfo.from_path(path, args.step, args.sample is not None) for path in args.run]
        if args.plot:
            runs = {str(info.folder): info.metrics for info in infos}
            if not all(runs.values()):
                raise UserError("there is nothing to draw: a run has no metrics.jsonl")
            plot_losses(runs, args.plot)
            print(f"wrote {args.plot}")
            return
        for info in infos:
            show(info, args)
    except (UserError, OSError, ImportError, ValueError) as e:  # ValueError: what generate says of its arguments
        sys.exit(f"run_info: {e}")


if __name__ == "__main__":
    main()
