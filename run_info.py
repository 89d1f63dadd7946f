"""Find a trained run and load it.

    from run_info import PretrainRunInfo
    run_info = PretrainRunInfo.from_path("out/target_models/2026-01-01_00-00-00", step=1000)
    model, tokenizer = run_info.load_model(), run_info.load_tokenizer()

A path is a run folder, one of its checkpoints or a run on Weights & Biases, entity/project/runid, whose files are
downloaded once. `python run_info.py PATH` shows what is there, and more: see --help.
"""

import argparse
import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prepare_data import (
    DatasetConfig,
    Shards,
    UserError,
    build,
    find_eos,
    load_encoder,
    read_config,
    sync_folder,
    text_tokenizers,
    whole_file,
    window_order,
    write_text,
)


@dataclass
class PretrainRunInfo:
    """A trained run, at one checkpoint; SPD's class of the same name has the fields that follow `folder`."""

    folder: Path
    checkpoint_path: Path | None  # None only if from_path was told that no weights will do
    config_dict: dict[str, Any]  # final_config.yaml
    model_config_dict: dict[str, Any]  # model_config.yaml
    tokenizer_path: Path | None  # the run's own tokenizer.json
    hf_tokenizer_path: str | None  # what the config calls the tokenizer

    @classmethod
    def from_path(cls, path: str | Path, step: int | None = None, weights: bool = True) -> "PretrainRunInfo":
        """The run at `path` after `step` updates (default: that file, or the last).

        `path` is a run folder, its checkpoints/, a checkpoint file or, if none is there, a W&B run (WANDB_FORMS), which
        is read from its copy on disk once that holds all it needs. With weights=False, a run that has saved none yet
        will do. Raises UserError, a FileNotFoundError too if there is no such run or checkpoint.
        """
        here = os.path.isfile(path) or (os.path.isdir(path) and os.listdir(path))  # wandb makes empty folders so named
        on_wandb = None if here else wandb_run(str(path))
        path = Path(os.path.expanduser(path)).absolute()
        if on_wandb:
            folder, checkpoint = fetch(*on_wandb, step, weights)
        elif os.path.exists(path):
            folder, checkpoint = (path.parent, path) if path.is_file() else (path, None)
            if folder.name == "checkpoints" and not (folder / "final_config.yaml").exists():
                folder = folder.parent
        else:
            raise RunNotFound(
                f"no run at {path}: name a run folder, a checkpoint (checkpoints/model_step_N.pt) or a run on W&B "
                f"({WANDB_FORMS}; a runid is 8 of a-z and 0-9, with or without one more and a dash before)"
            )
        configs = []
        for name in CONFIGS:
            if not (folder / name).exists():
                raise RunNotFound(f"{folder} is not a run folder: it has no {name}")
            configs.append(read_config(folder / name))
        if configs[0].get("enable_ln_ablation") and weights:
            raise UserError(f"{folder}: the run took its norms out (enable_ln_ablation); the models here all have them")
        found = checkpoints_in(folder)
        if not on_wandb and (step is not None or (checkpoint is None and (found or weights))):
            checkpoint = at_step(found, step, str(folder))
        tokenizer = folder / "tokenizer.json"
        return cls(
            folder=folder,
            checkpoint_path=checkpoint,
            config_dict=configs[0],
            model_config_dict=configs[1],
            tokenizer_path=tokenizer if tokenizer.exists() else None,
            hf_tokenizer_path=mapping(configs[0].get("train_dataset_config")).get("hf_tokenizer_path"),
        )

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Updates done -> file, for every checkpoint on disk, in order."""
        return checkpoints_in(self.folder)

    @property
    def model_class(self):
        """The class of models.py that the config names. Raises UserError if it names none."""
        from models import MODEL_CLASSES

        name = self.model_config_dict.get("model_type")
        if name not in list(MODEL_CLASSES):  # whatever the file holds, a list too
            raise UserError(
                f"{self.folder} does not say which model it holds (model_type: {name}): load it with the class, "
                "such as models.LlamaSimpleMLP.from_run_info(run_info)"
            )
        return MODEL_CLASSES[name]

    def load_model(self, cls=None):
        """The model with this checkpoint's weights, on the CPU; `cls` is its class, for a run that does not say."""
        cls = cls or self.model_class
        try:
            return cls.from_run_info(self)
        except Exception as e:  # a damaged file fails in many ways
            reason = " ".join(str(e).split())[:500]
            raise UserError(f"cannot load {self.checkpoint_path}: {type(e).__name__}: {reason}") from e

    def load_tokenizer(self):
        """A tokenizers.Tokenizer with the ids of training: the run's tokenizer.json, or else hf_tokenizer_path.

        It reads text as prepare_data does: nothing is cut, padded or added, and no special token is read out of text.
        Raises UserError if there is none, or one with ids outside the model's vocabulary.
        """
        if not (self.tokenizer_path or self.hf_tokenizer_path):
            raise UserError(f"{self.folder} has no tokenizer.json and its config names no hf_tokenizer_path")
        try:
            path = self.tokenizer_path
            data = path.read_bytes() if path else load_encoder(self.hf_tokenizer_path).json
            tok, reader = text_tokenizers(data)
            if reader is not tok:
                tok.encode, tok.encode_batch = reader.encode, reader.encode_batch
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"{self.tokenizer_path} is damaged: {e}") from e
        size, most = max(tok.get_vocab().values()) + 1, self.model_config_dict.get("vocab_size")
        if isinstance(most, int) and size > most:
            raise UserError(f"the tokenizer of {self.folder} has {size} ids, more than the model's vocab_size ({most})")
        return tok

    @property
    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl; none for a run without it."""
        return read_metrics(self.folder / "metrics.jsonl")


def data_of_update(info: PretrainRunInfo, update: int) -> dict[str, Any]:
    """What update number `update` (1, 2, ...) saw, read from the shards alone, in the order of the stream.

    position, window (B,): place in the training stream and number of the window; shard (B,): the file in which the
    window begins; offset (B,): its first token there; tokens (B, n_ctx) uint16. Raises UserError without the shards.
    """
    c, path = info.config_dict, info.folder / "final_config.yaml"
    kinds = {"seed": int, "num_iterations": int, "batch_size": int, "train_dataset_config": dict}
    if wrong := [k for k, kind in kinds.items() if not isinstance(c.get(k), kind)]:
        raise UserError(f"{path} has no usable {', '.join(wrong)}: only train.py's runs tell the order of their data")
    section = build(DatasetConfig, c["train_dataset_config"], "train_dataset_config.")
    if c.get("inference_only"):
        raise UserError(f"{info.folder} was trained on nothing: its config says inference_only")
    if not 1 <= update <= c["num_iterations"]:
        raise UserError(f"update {update} is not one of this run's: they go from 1 to {c['num_iterations']}")
    data = Shards(section.folder(), "train", f"python prepare_data.py {path}")
    trained_on = mapping(read_object(info.folder / "environment.json").get("dataset_sha256"))
    if trained_on and data.fingerprint()[1] not in trained_on.values():
        raise UserError(f"{data.folder} is not what this run was trained on: it was prepared again since")
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


def mapping(value) -> dict:
    """The value if it is a mapping, or else an empty one: a file may hold anything."""
    return value if isinstance(value, dict) else {}


class RunNotFound(UserError, FileNotFoundError):
    """There is no run, or no such checkpoint, at the path given."""


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Updates done -> checkpoint file, in order."""
    for place in (folder / "checkpoints", folder):
        if found := checkpoint_names(p.name for p in place.glob("model_step_*.pt") if p.is_file()):
            break
    return {step: place / name for step, name in found.items()}


def checkpoint_names(names) -> dict[int, str]:
    """Updates done -> name, for each name that is a checkpoint's, in order."""
    matches = (re.fullmatch(r"model_step_([0-9]{1,18})\.pt", name) for name in names)
    return dict(sorted((int(m[1]), m[0]) for m in matches if m))


def at_step(checkpoints: dict, step: int | None, run: str):
    """The checkpoint after `step` updates, or the last one. Raises RunNotFound if the run has none."""
    if not checkpoints:
        raise RunNotFound(f"{run} has no model_step_N.pt: the run has not saved any yet")
    if step is not None and step not in checkpoints:
        raise RunNotFound(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, checkpoints))}")
    return checkpoints[max(checkpoints) if step is None else step]


# -----------------------------------------------------------------------------
# Weights & Biases: a run's files come to ${SPD_OUT_DIR:-out}/pretrain_cache/<project>-<runid>/, where SPD puts them too

WANDB_FORMS = (
    "entity/project/runid, entity/project/runs/runid, wandb: before either, https://wandb.ai/entity/project/runs/runid"
)
CONFIGS = "final_config.yaml", "model_config.yaml"
LISTING = "wandb.json"  # beside a run's files: which run, its state, and what it holds at W&B
TRIES = 3  # of a download


def wandb_run(path: str) -> tuple[str, ...] | None:
    """(entity, project, run id) of what is written like a run on W&B, or None."""
    own_host = os.environ.get("WANDB_BASE_URL", "").partition("//")[2].partition("/")[0]
    hosts = "|".join(map(re.escape, filter(None, ("wandb.ai", own_host))))
    name, run_id = r"([^\s\0/\\#?%:.~][^\s\0/\\#?%:]{0,127})", r"((?:[a-z0-9]-)?[a-z0-9]{8})"
    path = path.strip().removeprefix("wandb:")
    found = re.fullmatch(rf"{name}/{name}/(?:runs/)?{run_id}/?", path)
    found = found or re.fullmatch(rf"https?:/+(?:{hosts})/{name}/{name}/runs/{run_id}(?:[/?#].*)?", path)
    return found and found.groups()


def fetch(entity: str, project: str, run_id: str, step: int | None, weights: bool) -> tuple[Path, Path | None]:
    """(folder, checkpoint) of a run on W&B, downloaded where they are not there yet.

    A run that W&B calls finished is listed once; any other may have gone on since, so W&B is asked again, unless `step`
    names weights that are here. Processes that ask at the same time wait for the first. Raises UserError.
    """
    name = f"{entity}/{project}/{run_id}"
    folder = Path(os.environ.get("SPD_OUT_DIR") or "out").absolute() / "pretrain_cache" / f"{project}-{run_id}"

    def cached() -> list[str] | None:
        """The files wanted, if all are here and W&B would not name others."""
        if not (listing := read_object(folder / LISTING)):
            return None
        if listing["run"] != name:
            raise UserError(f"{folder} holds another run, {listing['run']}: move it away to read {name}")
        final = listing["state"] == "finished" or not weights or step in checkpoint_names(listing["files"])
        files = final and wanted_files(listing, step, weights)
        return files if files and all(is_whole(folder / f, *listing["files"][f]) for f in files) else None

    try:
        if (files := cached()) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                files = cached() or download(name, folder, step, weights)
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"cannot keep W&B's run {name} in {folder}: {e}") from e
    return folder, folder / files[-1] if weights else None


def read_object(path: Path) -> dict:
    """The JSON object in a file; empty if there is none."""
    try:
        return mapping(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def wanted_files(listing: dict, step: int | None, weights: bool) -> list[str]:
    """The files of a listed run at `step`, the checkpoint last. Raises RunNotFound if it has no such."""
    name, files = f"W&B's run {listing['run']} ({listing['state']})", listing["files"]
    for config in CONFIGS:
        if config not in files:
            raise RunNotFound(f"{name} has no {config}: train.py and SPD's pretraining save one")
    wanted = [*CONFIGS, *files.keys() & {"tokenizer.json"}]
    return [*wanted, at_step(checkpoint_names(files), step, name)] if weights else wanted


def is_whole(path: Path, size: int, md5: str | None) -> bool:
    """Whether the file is there with the size and the md5 (base64) that W&B lists; of old files it lists none."""
    if not path.is_file() or (size and path.stat().st_size != size):
        return False
    with open(path, "rb") as f:
        return not md5 or base64.b64encode(hashlib.file_digest(f, "md5").digest()).decode() == md5


def download(name: str, folder: Path, step: int | None, weights: bool) -> list[str]:
    """Bring the files wanted of a run on W&B to `folder`, and then its listing; their names."""
    try:
        import requests  # wandb needs it too
        import wandb

        base = wandb.setup().settings.base_url
        patience = int(os.environ.get("WANDB_HTTP_TIMEOUT", 20))  # seconds that W&B may be silent
    except ImportError as e:
        raise UserError(f"there is no {name} here, and to look for it on W&B takes: pip install wandb ({e})") from e
    except Exception as e:  # settings of the environment that wandb refuses
        raise UserError(f"wandb, to read {name}, does not start: {' '.join(str(e).split())[:300]}") from e
    here = ", ".join(map(str, checkpoints_in(folder)))
    otherwise = f"; {folder} holds step {here}: name that folder to do without W&B" if here else ""
    try:
        requests.head(base, timeout=patience)  # says at once what wandb's client would wait for and not say
    except requests.RequestException as e:
        raise UserError(f"cannot reach W&B at {base} to read {name} ({type(e).__name__}){otherwise}") from e
    try:
        api = wandb.Api(timeout=patience)
        run = api.run(name)
        state, remote = run.state, {}  # in this order: what a finished run lists is all of it
        for file in run.files(per_page=500):
            known = file.name.removeprefix("checkpoints/")
            # only names known here become paths, so none leads out of the folder
            if known in (*CONFIGS, "tokenizer.json") or checkpoint_names([known]):
                remote[known] = file if known == file.name else remote.get(known, file)
        listing = {"run": name, "state": state, "files": {k: (f.size, f.md5) for k, f in remote.items()}}
    except Exception as e:  # wandb's own classes for these change with its versions
        reason = " ".join(str(e).split())[:300]
        if re.search(r"could not find|not found|error 404", reason, re.IGNORECASE):
            raise RunNotFound(f"W&B at {base} has no run {name} that this login may see, nor is it a path here") from e
        if re.search(r"api key|error 40[13]|invalid credentials|log(ged)? ?in", reason, re.IGNORECASE):
            raise UserError(f"W&B at {base} wants a login to read {name}: run `wandb login` ({reason})") from e
        raise UserError(f"W&B at {base} does not answer about {name} ({reason}){otherwise}") from e

    wanted = wanted_files(listing, step, weights)
    missing = [known for known in wanted if not is_whole(folder / known, *listing["files"][known])]
    if missing:
        print(f"downloading {', '.join(missing)} of W&B's run {name} to {folder}", file=sys.stderr, flush=True)
    for known in missing:
        url = remote[known].url  # W&B's own, which wants the login, or a bucket's, which must not get it
        login = ("api", api.api_key) if str(url).startswith(base.rstrip("/") + "/") else None
        for attempt in range(1, TRIES + 1):
            try:
                with requests.get(url, auth=login, stream=True, timeout=patience) as answer:
                    receive(answer, folder / known, *listing["files"][known])
                break
            except requests.RequestException as e:  # a connection cut, a server in trouble
                if attempt == TRIES:
                    reason = str(e) if type(e) is requests.RequestException else type(e).__name__
                    raise UserError(
                        f"cannot download {known} of W&B's run {name} ({reason}, {TRIES} times): try again; the files "
                        f"that did come are kept in {folder}"
                    ) from e
                time.sleep(attempt)
    write_text(folder / LISTING, json.dumps(listing, indent=1) + "\n")
    return wanted


def receive(answer, path: Path, size: int, md5: str | None) -> None:
    """Write the body of a requests.Response to `path`, if it is what W&B lists, or raise a RequestException."""
    from requests import RequestException

    if not answer.ok:
        raise RequestException(f"HTTP status {answer.status_code}")
    with whole_file(path) as f:
        for block in answer.iter_content(2**20):
            f.write(block)
        f.flush()
        if not is_whole(Path(f.name), size, md5):
            raise RequestException("it has not the size and md5 that W&B lists")


# -----------------------------------------------------------------------------
# Hugging Face: both GPT-2s are its gpt2, Llama and LlamaSimple its llama

HF_NAMES = {  # our field -> Hugging Face's; its gpt2 knows them under these names too
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_intermediate": "intermediate_size",
    "n_key_value_heads": "num_key_value_heads",
    "attn_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "rms_norm_eps": "rms_norm_eps",
}


def hf_fields(c) -> dict[str, Any]:
    """What Hugging Face's config says of a model of our config `c`. Raises UserError if it has no such model."""
    fields = {theirs: getattr(c, ours) for ours, theirs in HF_NAMES.items() if hasattr(c, ours)}
    if c.model_type.startswith("GPT2"):
        fields |= {"model_type": "gpt2", "n_inner": 4 * c.n_embd, "activation_function": "gelu_new"}
        fields |= {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        return fields | {"add_cross_attention": False, "tie_word_embeddings": True}
    if c.model_type == "LlamaSimpleMLP":
        raise UserError("Hugging Face has no class for LlamaSimpleMLP: its Llama's MLP is SwiGLU, of three matrices")
    if not c.use_grouped_query_attention:
        raise UserError("Hugging Face's Llama has no merged c_attn, which use_grouped_query_attention: false makes")
    rope = {"rope_type": "default", "rope_theta": c.rotary_base}
    fields |= {"model_type": "llama", "head_dim": c.n_embd // c.n_head, "rope_parameters": rope}
    return fields | {"hidden_act": "silu", "tie_word_embeddings": True}


def matching(model, hf):
    """(tensor of our `model`, tensor of Hugging Face's `hf`), all pairs that hold the same numbers.

    Each pair is two views of one shape, so that copying one into the other converts the model, either way.
    """
    gpt2, body, half = hasattr(model, "wpe"), hf.base_model, model.config.n_embd // model.config.n_head // 2
    modules = [(model.wte, hf.get_input_embeddings()), (model.ln_f, body.ln_f if gpt2 else body.norm)]
    modules += [(model.wpe, body.wpe)] if gpt2 else []
    for a, b in zip(model.h, body.h if gpt2 else body.layers, strict=True):
        if gpt2:
            modules += [(a.ln_1, b.ln_1), (a.ln_2, b.ln_2)]
        else:
            modules += [(a.rms_1, b.input_layernorm), (a.rms_2, b.post_attention_layernorm)]
        modules += zip(*([m for m in mlp.children() if hasattr(m, "weight")] for mlp in (a.mlp, b.mlp)), strict=True)
        for name in ("weight", "bias"):
            views = q_k_v_o(a.attn, name), q_k_v_o(b.attn if gpt2 else b.self_attn, name)
            for i, (x, y) in enumerate(zip(*views, strict=True)):
                if i < 2 and getattr(model.config, "rotary_adjacent_pairs", False):  # theirs pairs i with i + half
                    x, y = x.unflatten(0, (-1, half, 2)), y.unflatten(0, (-1, 2, half)).transpose(1, 2)
                yield x, y
    for a, b in modules:
        yield from ((tensor(a, n), tensor(b, n)) for n in ("weight", "bias") if tensor(a, n) is not None)


def q_k_v_o(attn, name: str) -> list:
    """The weights or biases of an attention's four projections, as views, whichever of them share a module."""
    parts = {"c_attn": 3, "q_attn": 1, "kv_attn": 2, "q_proj": 1, "k_proj": 1, "v_proj": 1, "c_proj": 1, "o_proj": 1}
    found = [(tensor(getattr(attn, module), name), n) for module, n in parts.items() if hasattr(attn, module)]
    return [view for x, n in found if x is not None for view in x.chunk(n)]


def tensor(module, name: str):
    """A module's weight or bias, or None; the weight of a Conv1D, which Hugging Face's GPT-2 is made of, transposed."""
    x = getattr(module, name, None)
    return x.t() if type(module).__name__ == "Conv1D" else x


def from_hugging_face(cls, name: str):
    """A model of our class `cls` with the weights of Hugging Face's model `name`, a folder or a hub id.

    Raises UserError if it cannot be loaded, or is not exactly what `cls` computes.
    """
    import torch

    try:
        kind = hf_fields(cls.config_class())["model_type"]
    except UserError as e:
        raise UserError(f"{name} is no run, and {e}") from e
    try:
        import transformers

        given = transformers.AutoConfig.from_pretrained(name)
        if given.model_type != kind:
            raise UserError(f"{name} is Hugging Face's {given.model_type}, but {cls.__name__} can only load a {kind}")
        known = cls.config_class.__dataclass_fields__
        fields = {ours: getattr(given, theirs) for ours, theirs in HF_NAMES.items() if ours in known}
        if kind == "gpt2":
            given.n_inner = given.n_inner or 4 * given.n_embd
        else:
            fields |= {"n_ctx": fields["block_size"], "rotary_dim": fields["n_embd"] // fields["n_head"]}
            fields["rotary_base"] = given.rope_parameters["rope_theta"]
        c = build(cls.config_class, fields, f"{name}: ")
        for field, value in (hf_fields(c) | {"sliding_window": None, "quantization_config": None}).items():
            if getattr(given, field, value) != value:
                raise UserError(f"{name} has {field} {getattr(given, field)}; a {cls.__name__} can only have {value}")
        hf, report = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
        wrong = [f"{what} {k}" for what in ("missing", "unexpected") for k in sorted(report[f"{what}_keys"])]
        if wrong:
            raise UserError(f"the weights of {name} are not a {kind}'s: {', '.join(wrong[:8])}")
        if hf.get_output_embeddings().weight is not hf.get_input_embeddings().weight:
            raise UserError(f"{name} has an lm_head of its own; a {cls.__name__}'s is tied to the embedding")
    except UserError:
        raise
    except Exception as e:  # a hub, a network and a damaged file fail in many ways
        reason = " ".join(str(e).split())[:500]
        raise UserError(f"{name} is no run, nor can Hugging Face load it: {type(e).__name__}: {reason}") from e
    model = cls(c)
    with torch.no_grad():
        for ours, theirs in matching(model, hf):
            ours.copy_(theirs)
    return model


def pretrained_model(cls, path):
    """(model of the class `cls`, where it was): a run's, as PretrainRunInfo.from_path finds it, or Hugging Face's.

    Hugging Face's are folders with a config.json and no final_config.yaml, and names of one or two parts (gpt2,
    org/name) where there is no such file or folder.
    """
    local, name = Path(path).expanduser(), str(path)
    is_name = not local.exists() and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith(".pt")
    if is_name or ((local / "config.json").exists() and not (local / "final_config.yaml").exists()):
        return from_hugging_face(cls, name if is_name else str(local)), path
    info = PretrainRunInfo.from_path(path)
    return info.load_model(cls), info.checkpoint_path


def hf_tokenizer(info: PretrainRunInfo):
    """The run's tokenizer in Hugging Face's class, with the ids of training. Raises UserError if that cannot be."""
    from transformers import PreTrainedTokenizerFast

    tok = info.load_tokenizer()
    eos = tok.id_to_token(find_eos(tok, f"of {info.folder}"))
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=eos,  # what stands before a document
        eos_token=eos,
        split_special_tokens=True,  # '<|endoftext|>' in a text is text
        clean_up_tokenization_spaces=False,
        model_max_length=info.model_config_dict.get("block_size"),
    )
    for token in tok.get_added_tokens_decoder().values():
        if hf(token.content).input_ids != tok.encode(token.content).ids:
            raise UserError(f"Hugging Face would read {token.content!r} in a text as a special token; training did not")
    return hf


def export_hf(info: PretrainRunInfo, folder: Path) -> None:
    """Write model and tokenizer to `folder` as Hugging Face's Auto classes load them, whole or not at all.

    Raises UserError if Hugging Face has no such model, or if there is something in `folder`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = folder.expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder, or an empty one")
    model, tokenizer = info.load_model(), hf_tokenizer(info)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop") if hasattr(model, "wpe") else (), 0.0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_fields(model.config), **ends, **no_dropout))
    with torch.no_grad():
        for ours, theirs in matching(model, hf):
            theirs.copy_(ours)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        hf.save_pretrained(part)
        tokenizer.save_pretrained(part)
        for path in (*part.iterdir(), part):
            sync_folder(path)
        os.replace(part, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


# -----------------------------------------------------------------------------
# a run on one screen


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that have a step, which one cut short has not; none if there is no such file."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(mapping(json.loads(text)))
    return [m for m in lines if type(m.get("step")) is int]


def curves(metrics: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """{"train_loss": [(update, nats), ...], "val_loss": ...} of what was recorded."""
    names = "train_loss", "val_loss"
    return {n: p for n in names if (p := [(m["step"], m[n]) for m in metrics if isinstance(m.get(n), int | float)])}


def plot_losses(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw the losses of {label: metrics} over updates. Raises ImportError without matplotlib."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its child processes get, may not be installed
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    styles = {"train_loss": {"lw": 0.8, "alpha": 0.7}, "val_loss": {"marker": "o", "ms": 3}}
    for i, (label, metrics) in enumerate(runs.items()):
        for j, (name, points) in enumerate(curves(metrics).items()):
            text, color = f"{label} {name} (last: {points[-1][1]:.3f})".strip(), f"C{i if len(runs) > 1 else j}"
            ax.plot(*zip(*points, strict=True), label=text, color=color, **styles[name])
    ax.set(xlabel="update", ylabel="cross-entropy (nats per token)")
    ax.legend()
    ax.grid(alpha=0.3)
    with whole_file(path) as f:
        fig.savefig(f, format="png", dpi=120)


def text_plot(points: dict[str, list[tuple[int, float]]], width: int = 68, height: int = 10) -> list[str]:
    """Losses over updates as lines of text, train_loss as '.' and val_loss as 'o'; the updates' axis is logarithmic."""
    points = {n: finite for n, line in points.items() if (finite := [p for p in line if math.isfinite(p[1])])}
    if not points:
        return []
    last = max(step for line in points.values() for step, _ in line)
    losses = [loss for line in points.values() for _, loss in line]
    high, span = max(losses), max(losses) - min(losses) or 1.0
    grid = [[" "] * width for _ in range(height)]

    def column(step: int) -> int:
        return round((width - 1) * math.log(max(step, 1)) / math.log(max(last, 2)))

    for name, line in points.items():
        by_column = {}
        for step, loss in line:
            by_column.setdefault(column(step), []).append(loss)
        x = sorted(by_column)
        y = [sum(by_column[i]) / len(by_column[i]) for i in x]
        for i in range(x[0], x[-1] + 1) if name == "train_loss" else x:  # a line, or points
            grid[round((height - 1) * (high - np.interp(i, x, y)) / span)][i] = "." if name == "train_loss" else "o"
    lines = [f"{high - span * i / (height - 1):7.3f} |{''.join(row)}" for i, row in enumerate(grid)]
    ticks = "  update "
    for step in (str(10**i) for i in range(len(str(last)))):
        ticks = ticks.ljust(9 + min(column(int(step)), width - len(step))) + step
    return [*lines, " " * 8 + "+" + "-" * width, ticks]


def short(steps: list[int]) -> str:
    """[0, 1, 2, 4, 8, 16, 100] -> "0, 1, 2, 4, ..., 16, 100": five or more that double, or are evenly spaced."""
    out = []
    while steps:
        doubled = [b == 2 * a for a, b in itertools.pairwise(steps)]
        even = [b - a == steps[1] - steps[0] for a, b in itertools.pairwise(steps)]
        n = 1 + max(([*same, False]).index(False) for same in (doubled, even))
        n = n if n > 4 else 1
        out += [*steps[:3], "...", steps[n - 1]] if n > 1 else steps[:1]
        steps = steps[n:]
    return ", ".join(map(str, out))


def facts(info: PretrainRunInfo) -> dict[str, Any]:
    """What the run's folder says of it, as plain values; null is what it does not say."""
    import torch

    if info.checkpoint_path:
        model = info.load_model()
    else:
        with torch.device("meta"):
            model = info.model_class(build(info.model_class.config_class, info.model_config_dict, "model."))
    kinds = {"embedding": r"\bw[tp]e\.|lm_head", "attention": r"\.attn\.", "MLP": r"\.mlp\.", "norms": ""}
    parameters = dict.fromkeys(("total", *kinds), 0)
    for name, p in model.named_parameters():  # a tied weight once
        for kind in next(k for k, pattern in kinds.items() if re.search(pattern, name)), "total":
            parameters[kind] += p.numel()
    c, data = info.config_dict, mapping(info.config_dict.get("train_dataset_config"))
    status, about = info.folder / "status", read_object(info.folder / "environment.json")
    on_wandb = checkpoint_names(read_object(info.folder / LISTING).get("files", ()))  # here or not
    steps = sorted(info.checkpoints.keys() | on_wandb)
    losses, tokens = {}, None
    with contextlib.suppress(() if info.tokenizer_path else UserError):  # a tokenizer elsewhere may be out of reach
        tokens = info.load_tokenizer().get_vocab_size()
    for name, points in curves(info.metrics).items():
        best = min(points, key=lambda p: (math.isnan(p[1]), p[1]))
        at = {"first": points[0], "best": best, "last": points[-1]}
        losses[name] = {k: {"loss": loss, "step": step} for k, (step, loss) in at.items()}
    return {
        "model": type(model).__name__,
        "parameters": parameters,
        "shape": {k: v for k, v in info.model_config_dict.items() if k != "model_type"},
        "run": str(info.folder),
        "status": status.read_text().strip() if status.exists() else None,
        "started": about.get("started"),
        "from": {k: about.get(k) for k in ("git_commit", "git_dirty", "device", "ranks")},
        "trained": {
            "updates": max([m["step"] for m in info.metrics] + steps, default=0),
            "of": c.get("num_iterations"),
            "tokens": max((m["tokens"] for m in info.metrics if "tokens" in m), default=None),
        },
        "dataset": data.get("name"),
        "seeds": {"init_seed": c.get("init_seed"), "seed": c.get("seed"), "dataset": data.get("seed")},
        "pretrained": c.get("from_pretrained"),
        "tokenizer": {"tokens": tokens, "from": str(info.tokenizer_path or "") or info.hf_tokenizer_path},
        "checkpoints": steps,
        "loaded": info.checkpoint_path and str(info.checkpoint_path),
    } | losses


def view(info: PretrainRunInfo) -> str:
    """The run's facts and its learning curve on one screen, for a person."""

    def text(value) -> str:
        if isinstance(value, dict) and "loss" in value:
            return f"{value['loss']:.4f} at {value['step']}"
        if isinstance(value, dict):
            return ", ".join(f"{k} {text(v)}" for k, v in value.items() if v is not None or k == "tokens")
        if isinstance(value, list):
            return short(value) or "none yet"
        return f"{value:,}" if type(value) is int else "unknown" if value is None else str(value)

    wrap = textwrap.TextWrapper(80, subsequent_indent=" " * 14, break_long_words=False, break_on_hyphens=False)
    lines = [wrap.fill(f"{k:<13} {t}") for k, v in facts(info).items() if v is not None and (t := text(v))]
    plot = text_plot(curves(info.metrics))
    return "\n".join([*lines, "", *plot] if plot else lines)


def sample(info: PretrainRunInfo, prompt: str, n: int, temperature: float, top_k: int | None) -> list[str]:
    """n texts that begin with `prompt`, each as long as a document, or SAMPLE_TOKENS longer than the prompt."""
    import torch

    tok = info.load_tokenizer()
    eos = find_eos(tok, f"of {info.folder}")
    idx = torch.tensor([tok.encode(prompt).ids or [eos]] * n)
    return tok.decode_batch(info.load_model().generate(idx, SAMPLE_TOKENS, temperature, top_k, eos).tolist())


# -----------------------------------------------------------------------------
# the command line

SAMPLE_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description="Show trained runs.")
    parser.add_argument("run", nargs="+", help="a run folder, a checkpoint or a W&B path")
    parser.add_argument("--step", type=int, help="the checkpoint after so many updates (default: the last)")
    parser.add_argument("--json", action="store_true", help="the same for programs: one JSON object a line")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sample", metavar="PROMPT", help="print what the model writes after this text")
    parser.add_argument("--n", type=int, default=1, help="so many samples (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the samples; 0: greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest tokens (default: all)")
    instead.add_argument("--data", type=int, metavar="N", help="print what update N was trained on")
    instead.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses of the runs into one picture")
    instead.add_argument("--export-hf", type=Path, metavar="DIR", help="write model and tokenizer for transformers")
    args = parser.parse_args()
    no_weights, sampling = args.plot or args.data is not None, (args.n, args.temperature, args.top_k)
    for refused, words in (
        (args.n < 1, "--n must be at least 1"),
        (args.export_hf and len(args.run) > 1, "--export-hf takes one run"),
        (args.json and (no_weights or args.export_hf), "--json does not go with --data, --plot and --export-hf"),
        (args.step is not None and no_weights, "--step does not go with --data and --plot"),
        (args.sample is None and sampling != (1, 0.8, None), "--n, --temperature and --top-k go with --sample"),
    ):
        if refused:
            parser.error(words)
    try:
        weights = args.sample is not None or args.export_hf is not None
        infos = [PretrainRunInfo.from_path(path, args.step, weights) for path in args.run]
        if args.plot:
            for info in infos:
                if not curves(info.metrics):
                    raise UserError(f"{info.folder} has no metrics.jsonl with losses to draw")
            labels = args.run if len(infos) > 1 else [""]
            plot_losses({label: info.metrics for label, info in zip(labels, infos, strict=True)}, args.plot)
            print(f"wrote {args.plot}")
        elif args.export_hf:
            export_hf(infos[0], args.export_hf)
            print(f"wrote {args.export_hf}: AutoModelForCausalLM.from_pretrained({str(args.export_hf)!r}) loads it")
        elif args.data is not None:
            for info in infos:
                tok, seen = info.load_tokenizer(), data_of_update(info, args.data)
                for position, window, shard, offset, tokens in zip(*seen.values(), strict=True):
                    text = tok.decode(tokens.tolist(), skip_special_tokens=False)
                    print(f"--- position {position}: window {window}, {shard} from token {offset}\n{text}")
        else:
            for info in infos:
                samples = None if args.sample is None else sample(info, args.sample, *sampling)
                if args.json:
                    text = json.dumps(facts(info) | {"samples": samples})
                    print(json.dumps(json.loads(text, parse_constant=lambda _: None)))  # NaN is not JSON
                elif samples is None:
                    print(view(info))
                else:
                    print("\n".join(f"--- sample {i + 1}\n{text}" for i, text in enumerate(samples)))
    except ImportError as e:
        sys.exit(f"run_info: {e}: pip install {e.name}")
    except (UserError, OSError, ValueError) as e:
        sys.exit(f"run_info: {e}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may stop reading
    main()
