"""Find a trained run and load it.

    from run_info import PretrainRunInfo
    run_info = PretrainRunInfo.from_path("out/target_models/2026-01-01_00-00-00", step=1000)
    model, tokenizer = run_info.load_model(), run_info.load_tokenizer()

A path is a run folder or one of its checkpoints. `python run_info.py PATH` shows what is there.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prepare_data import UserError, load_encoder


@dataclass
class PretrainRunInfo:
    """A trained run, at one checkpoint; SPD's class of the same name has these fields."""

    checkpoint_path: Path
    config_dict: dict[str, Any]  # final_config.yaml
    model_config_dict: dict[str, Any]  # model_config.yaml
    tokenizer_path: Path | None  # the run's own tokenizer.json
    hf_tokenizer_path: str | None  # what the config calls the tokenizer

    @classmethod
    def from_path(cls, path: str | Path, step: int | None = None) -> "PretrainRunInfo":
        """The run at `path`, a run folder or a checkpoint file, after `step` updates (default: that file, or the last).

        Raises UserError, a FileNotFoundError too, if there is no such run or checkpoint.
        """
        path = Path(path).expanduser()
        if path.is_file():
            folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
            checkpoint = path
        elif path.is_dir():
            folder, checkpoint = path, None
        else:
            raise RunNotFound(f"no run at {path}: name a run folder or a checkpoint (checkpoints/model_step_N.pt)")
        configs = []
        for name in ("final_config.yaml", "model_config.yaml"):
            try:
                configs.append(yaml.safe_load((folder / name).read_text()))
            except FileNotFoundError as e:
                raise RunNotFound(f"{folder} is not a run folder: it has no {name}") from e
            except yaml.YAMLError as e:
                raise UserError(f"{folder / name} is damaged: {' '.join(str(e).split())}") from e
        if step is not None or checkpoint is None:
            found = checkpoints_in(folder)
            if not found:
                raise RunNotFound(f"{folder} has no checkpoints/model_step_N.pt: the run has not saved any yet")
            if step is not None and step not in found:
                raise RunNotFound(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
            checkpoint = found[max(found) if step is None else step]
        section = configs[0].get("train_dataset_config") if isinstance(configs[0], dict) else None
        tokenizer = folder / "tokenizer.json"
        return cls(
            checkpoint_path=checkpoint,
            config_dict=configs[0],
            model_config_dict=configs[1],
            tokenizer_path=tokenizer if tokenizer.exists() else None,
            hf_tokenizer_path=section.get("hf_tokenizer_path") if isinstance(section, dict) else None,
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        here = self.checkpoint_path.parent
        return here.parent if here.name == "checkpoints" else here

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Updates done -> file, for every checkpoint on disk, in order."""
        return checkpoints_in(self.folder)

    def load_model(self):
        """The model with this checkpoint's weights, on the CPU."""
        from models import MODEL_CLASSES

        name = self.model_config_dict.get("model_type")
        if name not in MODEL_CLASSES:
            raise UserError(
                f"{self.folder} does not say which model it holds (model_type: {name}): load it with the class, "
                "such as models.LlamaSimpleMLP.from_run_info(run_info)"
            )
        return MODEL_CLASSES[name].from_run_info(self)

    def load_tokenizer(self):
        """A tokenizers.Tokenizer with the ids of training: the run's tokenizer.json, or else hf_tokenizer_path."""
        from tokenizers import Tokenizer

        if self.tokenizer_path:
            return Tokenizer.from_file(str(self.tokenizer_path))
        if self.hf_tokenizer_path:
            return Tokenizer.from_str(load_encoder(self.hf_tokenizer_path).json.decode())
        raise UserError(f"{self.folder} has no tokenizer.json and its config names no hf_tokenizer_path")


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
    args = parser.parse_args()
    try:
        info = PretrainRunInfo.from_path(args.run, args.step)
        model, tokenizer = info.load_model(), info.load_tokenizer()
    except UserError as e:
        sys.exit(f"run_info: {e}")
    shape = ", ".join(f"{k} {v}" for k, v in info.model_config_dict.items() if k != "model_type")
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters ({shape})")
    print(f"loaded:      {info.checkpoint_path}")
    print(f"checkpoints: {', '.join(map(str, info.checkpoints))}")
    print(f"tokenizer:   {tokenizer.get_vocab_size()} tokens, {info.tokenizer_path or info.hf_tokenizer_path}")


if __name__ == "__main__":
    main()
