"""Find a trained run and load it.

    from run_info import PretrainRunInfo
    run_info = PretrainRunInfo.from_path("out/target_models/2026-01-01_00-00-00", step=1000)
    model, tokenizer = run_info.load_model(), run_info.load_tokenizer()

A path is a run folder or one of its checkpoints. `python run_info.py PATH` shows what is there.
"""

import argparse
import json
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prepare_data import (
    DatasetConfig,
    Shards,
    UserError,
    build,
    load_encoder,
    read_config,
    window_order,
    without_special_words,
)


@dataclass
class PretrainRunInfo:
    """A trained run, at one checkpoint; SPD's class of the same name has these fields."""

    folder: Path
    checkpoint_path: Path | None  # None only if from_path was told that no weights will do
    config_dict: dict[str, Any]  # final_config.yaml
    model_config_dict: dict[str, Any]  # model_config.yaml
    tokenizer_path: Path | None  # the run's own tokenizer.json
    hf_tokenizer_path: str | None  # what the config calls the tokenizer

    @classmethod
    def from_path(cls, path: str | Path, step: int | None = None, weights: bool = True) -> "PretrainRunInfo":
        """The run at `path`, a run folder or a checkpoint file, after `step` updates (default: that file, or the last).

        With weights=False, a run that has saved none yet will do. Raises UserError, a FileNotFoundError too, if there
        is no such run or checkpoint.
        """
        path = Path(path).expanduser().absolute()
        if path.is_file():
            folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
            checkpoint = path
        elif path.is_dir():
            folder, checkpoint = path, None
        else:
            raise RunNotFound(f"no run at {path}: name a run folder or a checkpoint (checkpoints/model_step_N.pt)")
        configs = []
        for name in ("final_config.yaml", "model_config.yaml"):
            if not (folder / name).exists():
                raise RunNotFound(f"{folder} is not a run folder: it has no {name}")
            configs.append(read_config(folder / name))
        if step is not None or checkpoint is None:
            found = checkpoints_in(folder)
            if not found and weights:
                raise RunNotFound(f"{folder} has no checkpoints/model_step_N.pt: the run has not saved any yet")
            if step is not None and step not in found:
                raise RunNotFound(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
            if found:
                checkpoint = found[max(found) if step is None else step]
        section = configs[0].get("train_dataset_config")
        tokenizer = folder / "tokenizer.json"
        return cls(
            folder=folder,
            checkpoint_path=checkpoint,
            config_dict=configs[0],
            model_config_dict=configs[1],
            tokenizer_path=tokenizer if tokenizer.exists() else None,
            hf_tokenizer_path=section.get("hf_tokenizer_path") if isinstance(section, dict) else None,
        )

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Updates done -> file, for every checkpoint on disk, in order."""
        return checkpoints_in(self.folder)

    def load_model(self, cls=None):
        """The model with this checkpoint's weights, on the CPU; `cls` is its class, for a run that does not say."""
        from models import MODEL_CLASSES

        name = self.model_config_dict.get("model_type")
        if cls is None and name not in MODEL_CLASSES:
            raise UserError(
                f"{self.folder} does not say which model it holds (model_type: {name}): load it with the class, "
                "such as models.LlamaSimpleMLP.from_run_info(run_info)"
            )
        try:
            return (cls or MODEL_CLASSES[name]).from_run_info(self)
        except Exception as e:  # a damaged file fails in many ways
            reason = " ".join(str(e).split())[:500]
            raise UserError(f"cannot load {self.checkpoint_path}: {type(e).__name__}: {reason}") from e

    def load_tokenizer(self):
        """A tokenizers.Tokenizer with the ids of training: the run's tokenizer.json, or else hf_tokenizer_path.

        It reads text as prepare_data does: nothing is cut, padded or added, and no special token is read out of text.
        Raises UserError if there is none, or one with ids outside the model's vocabulary.
        """
        from tokenizers import Tokenizer

        if not (self.tokenizer_path or self.hf_tokenizer_path):
            raise UserError(f"{self.folder} has no tokenizer.json and its config names no hf_tokenizer_path")
        try:
            path = self.tokenizer_path
            data = path.read_bytes() if path else load_encoder(self.hf_tokenizer_path).json
            data = json.dumps(json.loads(data) | {"truncation": None, "padding": None, "post_processor": None})
            tok = Tokenizer.from_str(data)
            tok.encode_special_tokens = True
            if words := without_special_words(data.encode()):
                reader = Tokenizer.from_str(words)
                tok.encode, tok.encode_batch = reader.encode, reader.encode_batch
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"{self.tokenizer_path} is damaged: {e}") from e
        size, most = max(tok.get_vocab().values()) + 1, self.model_config_dict.get("vocab_size")
        if isinstance(most, int) and size > most:
            raise UserError(f"the tokenizer of {self.folder} has {size} ids, more than the model's vocab_size ({most})")
        return tok


def data_of_update(info: PretrainRunInfo, update: int) -> dict[str, Any]:
    """What update number `update` (1, 2, ...) saw, read from the shards alone, in the order of the stream.

    position, window (B,): place in the training stream and number of the window; shard (B,): the file in which the
    window begins; offset (B,): its first token there; tokens (B, n_ctx) uint16. Raises UserError without the shards.
    """
    c, section = (
        info.config_dict,
        build(DatasetConfig, info.config_dict["train_dataset_config"], "train_dataset_config."),
    )
    if not 1 <= update <= c["num_iterations"]:
        raise UserError(f"update {update} is not one of this run's: they go from 1 to {c['num_iterations']}")
    data = Shards(section.folder(), "train", f"python prepare_data.py {info.folder / 'final_config.yaml'}")
    position = np.arange((update - 1) * c["batch_size"], update * c["batch_size"])
    seed = c["seed"] + (section.seed or 0)
    window = window_order(position, data.n_tokens // section.n_ctx, seed, section.shuffle_each_epoch)
    shard, offset = data.locate(window * section.n_ctx)
    return {
        "position": position,
        "window": window,
        "shard": np.array([data.files[i].name for i in shard]),
        "offset": offset,
        "tokens": data.windows(window, section.n_ctx),
    }


class RunNotFound(UserError, FileNotFoundError):
    """There is no run, or no such checkpoint, at the path given."""


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Updates done -> checkpoint file, in order."""
    places = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = {
        int(m[1]): p for p in places.glob("model_step_*.pt") if (m := re.fullmatch(r"model_step_(\d+)\.pt", p.name))
    }
    return dict(sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a trained run.")
    parser.add_argument("run", help="a run folder or a checkpoint")
    parser.add_argument("--step", type=int, help="the checkpoint after so many updates (default: the last)")
    parser.add_argument("--data", type=int, metavar="N", help="print what update N was trained on")
    args = parser.parse_args()
    try:
        info = PretrainRunInfo.from_path(args.run, args.step, weights=args.data is None)
        if args.data is not None:
            tok, seen = info.load_tokenizer(), data_of_update(info, args.data)
            for position, window, shard, offset, tokens in zip(*seen.values(), strict=True):
                text = tok.decode(tokens.tolist(), skip_special_tokens=False)
                print(f"--- position {position}: window {window}, {shard} from token {offset}\n{text}")
            return
        model, tokenizer = info.load_model(), info.load_tokenizer()
    except UserError as e:
        sys.exit(f"run_info: {e}")
    shape = ", ".join(f"{k} {v}" for k, v in info.model_config_dict.items() if k != "model_type")
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters ({shape})")
    print(f"loaded:      {info.checkpoint_path}")
    print(f"checkpoints: {', '.join(map(str, info.checkpoints))}")
    print(f"tokenizer:   {tokenizer.get_vocab_size()} tokens, {info.tokenizer_path or info.hf_tokenizer_path}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may stop reading
    main()
