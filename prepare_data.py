"""Text or tokens in, shards out: python prepare_data.py configs/quickstart.yaml [key=value ...]

Reads train_dataset_config and val_dataset_config of a run's YAML and writes, into their `path`,
    {train,val}_000000.bin ...  256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens
    tokenizer.json              the tokenizer in Hugging Face's format, whatever encoded the text
    dataset.json                where the tokens come from, and each shard's tokens, documents and sha256
Documents are encoded one by one, no special token is read out of text, and EOS follows each. The bytes depend on the
source and the config alone. This file owns the shard: its header, its writer, its reader and the order of windows.
"""

import argparse
import codecs
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import glob
import gzip
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import re
import resource
import signal
import sys
import sysconfig
import threading
import time
import types
import typing
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import yaml

# -----------------------------------------------------------------------------
# configs: a YAML, overrides from the command line, checks


class UserError(Exception):
    """Something the user can mend. The message says what was found, what was wanted, what to do."""


class BadShard(UserError):
    """A shard is no longer the file that was opened, or holds what the model cannot read."""


class BadRow(UserError):
    """A row of the source cannot be encoded: what was made of the source so far is of no use."""


def key(help: str, default=dataclasses.MISSING, low=-math.inf, high=math.inf, above=-math.inf):
    """A config key with its explanation and, for numbers, bounds: low <= value <= high and value > above."""
    metadata = {"help": help, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


@dataclasses.dataclass
class DatasetConfig:
    """One split of text: the keys of train_dataset_config and val_dataset_config."""

    name: str = key("dataset: a hub id, a local file, folder or glob, or python-stdlib")
    split: str = key("which rows: train, validation ..., or a slice such as train[:95%], train[-100:]", "train")
    column_name: str = key("column that holds the text, or the token ids", "text")
    is_tokenized: bool = key("rows are token ids already: kept whole, no EOS added", False)
    hf_tokenizer_path: str | None = key("gpt2, a hub id, or a tokenizer.json; val takes train's", None)
    train_tokenizer_vocab_size: int | None = key(
        "instead: train a byte-level BPE of this size", None, low=257, high=65536
    )
    streaming: bool = key("accepted, as in SPD's files: preparation always streams", False)
    seed: int | None = key(
        "train: added to the top-level seed; val: rotates which windows are used", None, low=0, high=2**62
    )
    n_ctx: int = key("tokens in a window: the model's n_ctx + 1", low=2)
    shuffle_each_epoch: bool = key("another order each epoch; false repeats the first", True)
    path: str | None = key(
        "folder of the shards (default: data/<name>-<tokenizer>; val takes train's if the names are equal)", None
    )
    revision: str | None = key("the hub dataset's branch, tag or commit", None)

    def folder(self) -> Path:
        """Where the shards are."""
        if self.path:
            return Path(self.path)
        tokenizer = self.hf_tokenizer_path or f"bpe{self.train_tokenizer_vocab_size}"
        short = [Path(n).stem if os.path.exists(n) else n for n in (self.name, tokenizer)]
        return Path("data") / re.sub(r"[^\w.-]+", "-", "-".join(short)).strip("-")


def read_config(path, overrides=()) -> dict:
    """The YAML mapping at `path` with overrides ["key.key=value", ...] applied; UserError if it cannot be read."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror}") from e
    except Exception as e:  # not YAML's own errors alone: not UTF-8, a date that no calendar has, nesting without end
        raise UserError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not {type(config).__name__}")
    for override in overrides:
        name, eq, value = override.partition("=")
        if not eq or not name or name.startswith("-"):
            raise UserError(f"{override!r} is not an override: write key=value, such as model.n_layer=4")
        *sections, last = name.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"{override!r}: {part} is a value, not a section with keys of its own")
        try:
            section[last] = yaml.safe_load(value)
        except Exception as e:
            raise UserError(f"{override!r}: the value is not YAML; quote it") from e
    return config


def convert(value, kind, name: str):
    """`value` as the type `kind`; UserError, naming the key, if it is of another. Numbers may be strings (3e-4)."""
    if typing.get_origin(kind) is typing.Literal:
        if any(value == o and type(value) is type(o) for o in typing.get_args(kind)):
            return value
        raise UserError(f"{name} must be one of {', '.join(map(str, typing.get_args(kind)))}, not {value!r}")
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str in kinds and "\0" in str(value):
        raise UserError(f"{name} must be text without NUL bytes, not {value!r}")
    if type(value) in kinds and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    if str in kinds and isinstance(value, datetime.date):
        return str(value)  # YAML reads run_dir=2026-01-01 as a date
    if type(value) in (int, float, str):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)  # YAML 1.1 reads 3e-4 as a string
            if float in kinds and math.isfinite(number):
                return number
            if int in kinds and number.is_integer():
                return int(number)
    if list[int] in kinds and isinstance(value, list) and all(type(v) is int for v in value):
        return value
    words = {
        list[int]: "a list of whole numbers",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    raise UserError(f"{name} must be {' or '.join(words[k] for k in kinds)}, not {value!r}")


def build(cls, values, where: str = ""):
    """The dataclass `cls` from the mapping `values`, checked: unknown, missing, mistyped and impossible keys."""
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.')} must be a section of keys, not {values!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
            raise UserError(f"unknown key {where}{name}; the nearest valid key is {where}{near}")
    out = {}
    for name, f in known.items():
        if name not in values:
            if f.default is dataclasses.MISSING:
                raise UserError(f"missing key {where}{name}: {f.metadata['help']}")
            continue
        if dataclasses.is_dataclass(f.type) or f.type is object:
            out[name] = values[name]  # a section that is built already
            continue
        out[name] = value = convert(values[name], f.type, where + name)
        if f.metadata and type(value) in (int, float):
            low, high, above = (f.metadata[k] for k in ("low", "high", "above"))
            if not low <= value <= high or value <= above:
                bounds = [("at least", low), ("above", above), ("at most", high)]
                bounds = " and ".join(f"{word} {bound}" for word, bound in bounds if math.isfinite(bound))
                raise UserError(f"{where}{name} must be {bounds}, not {value!r}")
    try:
        return cls(**out)
    except ValueError as e:  # a model's config says what is wrong with its shape
        raise UserError(f"{where}{e}") from e


def flat(d: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out = {}
    for k, v in d.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return out


def differences(there: dict, here: dict, ignored=()) -> list[str]:
    """["a.b 1 there, 2 here", ...] of what two mappings, with sections or without, do not agree in."""
    there, here = flat(there), flat(here)
    keys = [k for k in there | here if there.get(k) != here.get(k) and k not in ignored]
    return [f"{k} {there.get(k)!r} there, {here.get(k)!r} here" for k in keys]


def dataset_configs(config: dict) -> dict[str, DatasetConfig]:
    """{"train": ..., "val": ...} from a config; val takes train's tokenizer, and path if the names are the same."""
    sections, names = {}, ("train_dataset_config", "val_dataset_config")
    for found in map(str, config):
        if found not in names and (near := difflib.get_close_matches(found, names, n=1, cutoff=0.8)):
            raise UserError(f"unknown key {found}; the nearest valid key is {near[0]}")
    for split, name in zip(("train", "val"), names, strict=True):
        if name not in config:
            raise UserError(f"missing key {name}: the {split} data")
        sections[split] = build(DatasetConfig, config[name], f"{name}.")
        if not sections[split].name:
            raise UserError(f"{name}.name is empty: name a dataset, a file or python-stdlib")
    train, val = sections["train"], sections["val"]
    tokenizer_keys = "hf_tokenizer_path", "train_tokenizer_vocab_size"
    if not any(getattr(val, k) for k in tokenizer_keys):
        for k in tokenizer_keys:
            setattr(val, k, getattr(train, k))
    for k in tokenizer_keys:
        if getattr(train, k) != getattr(val, k):
            raise UserError(f"{k} is {getattr(train, k)} for train but {getattr(val, k)} for val: give both the same")
    if bool(train.hf_tokenizer_path) == bool(train.train_tokenizer_vocab_size):
        raise UserError("train_dataset_config must set one of hf_tokenizer_path and train_tokenizer_vocab_size")
    if train.train_tokenizer_vocab_size and train.is_tokenized:
        raise UserError("train_tokenizer_vocab_size needs text, but is_tokenized is true: set hf_tokenizer_path")
    if val.path is None and val.name == train.name:
        val.path = train.path
    if train.train_tokenizer_vocab_size and val.folder() != train.folder():
        raise UserError("a tokenizer trained here lies beside its shards: give train and val the same path")
    return sections


# -----------------------------------------------------------------------------
# files that appear whole or not at all


@contextlib.contextmanager
def whole_file(path: Path):
    """A file opened for writing bytes beside `path`, synced and renamed to `path` at the end, removed on an error."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames within the folder `path` survive a power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    with whole_file(path) as f:
        f.write(text.encode())


def read_record(path: Path) -> dict:
    """What dataset.json, or the record of a preparation under way, holds. UserError if it is damaged."""
    try:
        record = json.loads(path.read_text())
        parts = [e for about in record["splits"].values() for e in about["shards"]]
        numbers, names = [e["tokens"] + e["documents"] for e in parts], [e["file"] + e["sha256"] for e in parts]
        if "tokenizer" in record or path.name == "dataset.json":
            about = record["tokenizer"]
            numbers, names = [*numbers, about["vocab_size"], about["eos_token_id"]], [*names, about["sha256"]]
        sum(numbers), "".join(names), [dict(about) for about in record["source"].values()]
        return record
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{path} is damaged ({reason}): delete its folder and prepare it again") from e


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# -----------------------------------------------------------------------------
# tokenizers: text -> ids

EOS_NAMES = "<|endoftext|>", "[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"


@dataclasses.dataclass
class TextEncoder:
    """A tokenizer that is ready to encode documents."""

    name: str
    json: bytes  # its tokenizer.json
    vocab_size: int  # the greatest id + 1
    eos_token_id: int
    encode_batch: typing.Callable  # list of texts -> list of id sequences, without any special token
    decode_batch: typing.Callable  # list of id sequences -> list of texts, special tokens left out

    def __post_init__(self):
        if self.vocab_size > 65536:
            raise UserError(f"the tokenizer {self.name} has {self.vocab_size} ids, but a shard's uint16 holds 65536")


def load_encoder(name: str) -> TextEncoder:
    """The tokenizer `gpt2`, at a hub id, in a tokenizer.json, or in a folder with one. UserError if there is none."""
    if name == "gpt2":
        return gpt2_encoder()
    local, settings = tokenizer_file(name), {}
    try:
        if local.suffix == ".json":
            data = local.read_bytes()
            if local.with_name("tokenizer_config.json").exists():
                settings = json.loads(local.with_name("tokenizer_config.json").read_bytes())
        else:
            from huggingface_hub import hf_hub_download

            data = Path(hf_hub_download(name, "tokenizer.json")).read_bytes()
            with contextlib.suppress(Exception):  # a hub tokenizer need not have one
                settings = json.loads(Path(hf_hub_download(name, "tokenizer_config.json")).read_bytes())
    except Exception as e:
        where = local if local.suffix == ".json" else f"{name} on the Hugging Face hub"
        raise UserError(
            f"cannot read the tokenizer {where} ({type(e).__name__}): check its name and, for a hub id, the network; "
            "without one, set hf_tokenizer_path to a tokenizer.json on disk"
        ) from e
    return json_encoder(name, data, settings.get("eos_token") if isinstance(settings, dict) else None)


def tokenizer_file(name: str) -> Path:
    """Where the tokenizer `name` is, if it is on disk."""
    return Path(name) / "tokenizer.json" if os.path.isdir(name) else Path(name)


def json_encoder(name: str, data: bytes, eos=None) -> TextEncoder:
    """A tokenizer from the bytes of its tokenizer.json; `eos` is tokenizer_config.json's eos_token, if there is one."""
    try:
        tok, reader = text_tokenizers(data)
        vocab_size = max(tok.get_vocab().values()) + 1
    except Exception as e:
        raise UserError(f"{name} is not a tokenizer.json that the tokenizers library can read: {e}") from e

    def encode_batch(texts):
        return [e.ids for e in reader.encode_batch_fast(texts, add_special_tokens=False)]

    return TextEncoder(name, data, vocab_size, find_eos(tok, name, eos), encode_batch, tok.decode_batch)


def find_eos(tok, name: str, eos=None) -> int:
    """The id that ends a document: that of `eos`, if it is given, or of the first of EOS_NAMES that `tok` knows."""
    names = [eos.get("content") if isinstance(eos, dict) else eos] if eos else EOS_NAMES
    found = [i for n in names if isinstance(n, str) and (i := tok.token_to_id(n)) is not None]
    if not found:
        raise UserError(f"the tokenizer {name} has no end-of-sequence token: looked for {', '.join(map(str, names))}")
    return found[0]


def text_tokenizers(data: bytes):
    """Two tokenizers.Tokenizer of a tokenizer.json: one that decodes, and one, the same for a BPE, that encodes.

    Nothing is cut, padded or added, and no special token is read out of text.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are ours, a batch of documents each
    from tokenizers import Tokenizer

    parsed = json.loads(data) | {"truncation": None, "padding": None, "post_processor": None}
    parsed["model"] |= {"dropout": None} if "dropout" in parsed["model"] else {}  # of a BPE's merges, at random
    decoder = encoder = Tokenizer.from_str(json.dumps(parsed))
    if "merges" not in parsed["model"] or parsed["model"].get("ignore_merges"):
        encoder = Tokenizer.from_str(json.dumps(without_special_words(parsed)))
    for tok in (decoder, encoder):
        tok.encode_special_tokens = True  # '[EOS]' in a document is text
    return decoder, encoder


def without_special_words(tok: dict) -> dict:
    """A tokenizer.json whose model cannot find a special token in text, as all but a BPE that merges can: '</s>' is a
    word of their vocabulary. Such words get a name that no text has."""
    model, special = tok["model"], {t["content"] for t in tok["added_tokens"] if t["special"]}

    def hidden(word):
        return f"\U0010ffff{word}" if word in special else word

    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden(word): i for word, i in model["vocab"].items()}
        if model.get("unk_token"):
            model["unk_token"] = hidden(model["unk_token"])
    else:
        model["vocab"] = [[hidden(word), score] for word, score in model["vocab"]]
    tok["added_tokens"] = [t for t in tok["added_tokens"] if not t["special"]]
    return tok


def gpt2_encoder() -> TextEncoder:
    """tiktoken's gpt2: the ids of the hub's gpt2, several times faster."""
    import tiktoken
    from tiktoken.load import read_file_cached
    from tokenizers import models

    files = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    try:
        enc = tiktoken.get_encoding("gpt2")  # which checks the files, and keeps them
        vocab, merges = (read_file_cached(f"{files}{name}") for name in ("encoder.json", "vocab.bpe"))
    except Exception as e:
        raise UserError(
            f"tiktoken cannot get its gpt2 files ({type(e).__name__}), which it downloads once: without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds them, or hf_tokenizer_path to a tokenizer.json"
        ) from e

    def encode_batch(texts):
        return [enc.encode_to_numpy(t, disallowed_special=()) for t in texts]

    def decode_batch(rows):
        return [enc.decode([i for i in ids if i != enc.eot_token]) for ids in rows]

    pairs = [tuple(line.split()) for line in merges.decode().splitlines()[1:]]
    data = byte_level_bpe(models.BPE(json.loads(vocab), pairs)).to_str().encode()
    return TextEncoder("gpt2", data, enc.n_vocab, enc.eot_token, encode_batch, decode_batch)


def byte_level_bpe(model):
    """A tokenizers.Tokenizer around `model` (a tokenizers BPE) that splits text and spells bytes as GPT-2 does."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tok = Tokenizer(model)
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|endoftext|>"])
    return tok


def train_bpe(texts, vocab_size: int) -> bytes:
    """The tokenizer.json of a byte-level BPE trained on an iterator of texts."""
    from tokenizers import models, pre_tokenizers, trainers

    tok = byte_level_bpe(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    return tok.to_str().encode()


# -----------------------------------------------------------------------------
# sources: rows in a fixed order, each with the place from which reading can go on


class Files:
    """Rows of local files, in the order given: one a line of .jsonl, one a document of .txt, one a file of .py.

    A place is (file, byte offset, line), the start of a row.
    """

    def __init__(self, files: list[Path], column: str):
        self.files, self.column = files, column
        self.kinds = [kind_of(path) for path in files]
        for path in files:
            try:
                with self.open(path) as f:
                    f.read(1)
            except (OSError, EOFError, zlib.error) as e:
                raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e
        if not any(path.stat().st_size for path in files):
            raise UserError(f"{files[0]} is empty: it must hold at least one document")

    @staticmethod
    def open(path: Path):
        return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")

    def rows(self, place=None):
        """Yield (place, raw bytes) from `place` on, or from the start."""
        first, offset, line = place or (0, 0, 1)
        for i, path in enumerate(self.files[first:], first):
            read = {".jsonl": json_lines, ".txt": text_documents, ".py": whole_text}[self.kinds[i]]
            try:
                with self.open(path) as f:
                    if offset == 0 and f.read(3) == codecs.BOM_UTF8:
                        offset = 3
                    f.seek(offset)
                    for at, number, raw in read(f, offset, line):
                        line = number
                        yield (i, at, line), raw
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                raise BadRow(f"{path} is cut short or damaged after line {line}: {e}") from e
            offset, line = 0, 1

    def where(self, place) -> str:
        return f"{self.files[place[0]]}, line {place[2]}"

    def parse(self, place, raw: bytes):
        """A row's value; ValueError, in words, if there is none."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            lines = raw.count(b"\n", 0, e.start)
            raise ValueError(f"invalid UTF-8 (byte {raw[e.start]:#04x}{f', {lines} lines on' * (lines > 0)})") from e
        if self.kinds[place[0]] != ".jsonl":
            return text
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"broken JSON ({e})") from e
        if not isinstance(row, dict) or self.column not in row:
            have = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"no column {self.column} (column_name); found {have}")
        return row[self.column]


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, .gz aside."""
    return Path(path.name.removesuffix(".gz")).suffix


def json_lines(f, offset: int, line: int):
    """Yield (offset, line number, line) of each line of `f` that is not blank."""
    for raw in f:
        if raw.strip():
            yield offset, line, raw
        offset, line = offset + len(raw), line + 1


def text_documents(f, offset: int, line: int):
    """Yield (offset, line number, text) of each document between lines that hold <|endoftext|> alone.

    The line break before such a line, or before the end, belongs to the file and not to the document.
    """
    start, first, parts = offset, line, []
    for raw in f:
        offset, line = offset + len(raw), line + 1
        if raw.strip() != b"<|endoftext|>":
            parts.append(raw)
            continue
        yield start, first, b"".join(parts).removesuffix(b"\n").removesuffix(b"\r")
        start, first, parts = offset, line, []
    if parts:
        yield start, first, b"".join(parts).removesuffix(b"\n").removesuffix(b"\r")


def whole_text(f, offset: int, line: int):
    """Yield the whole of `f` as one document."""
    yield offset, line, f.read()


class Hub:
    """Rows of whatever `datasets` reads, streamed: a hub id, a folder laid out like a hub repository, parquet, zst.

    A place is [state of the stream after the batch of rows before, the row within its batch, the row's number].
    """

    def __init__(self, name: str, split: str, column: str, revision: str | None):
        try:
            import datasets
        except ImportError as e:
            raise UserError(f"{name} is read through the datasets library: pip install datasets zstandard") from e
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs, in its words, what it also raises
        self.name, self.column = name, column
        path, files = name, None
        if found := [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True) * glob.has_magic(name)):
            files = [glob.escape(os.path.abspath(f)) for f in found if os.path.isfile(f)]
            path = os.path.dirname(files[0])
        with self.blamed(f"cannot read {name} (split {split})"):
            self.stream = datasets.load_dataset(path, data_files=files, split=split, streaming=True, revision=revision)
            columns = self.stream.column_names or list(next(iter(self.stream), {column: None}))
        if column not in columns:
            raise UserError(f"{name} has no column {column} (column_name); found {', '.join(columns)}")
        splits = self.stream.info.splits or {}
        self.known_rows = splits[split].num_examples if split in splits else None

    @contextlib.contextmanager
    def blamed(self, what: str):
        """Turn whatever `datasets` raises into one sentence."""
        try:
            yield
        except UserError:
            raise
        except Exception as e:
            reason = (str(e).strip().splitlines() or [""])[0]
            raise UserError(f"{what}: {type(e).__name__}: {reason}") from e

    def rows(self, place=None):
        """Yield (place, value) from `place` on, or from the start."""
        state, skip, number = place or (None, 0, 0)
        number -= skip
        stream = self.stream.select_columns([self.column])  # a stream of its own, with a state of its own
        if state:
            stream.load_state_dict(state)
        batches = stream.iter(batch_size=256)
        while True:
            with self.blamed(f"cannot read {self.name} after row {number}"):
                batch = next(batches, {self.column: []})[self.column]
            if not batch:
                return
            for i in range(skip, len(batch)):
                yield [state, i, number + i], batch[i]
            skip, number = 0, number + len(batch)
            state = json.loads(json.dumps(stream.state_dict()))  # a copy: datasets changes its own as it reads

    def where(self, place) -> str:
        return f"{self.name}, row {place[2]}"

    def parse(self, place, value):
        return value


def local_files(c: DatasetConfig) -> list[Path] | None:
    """The files that are read here, sorted by name; None if `datasets` reads what `c` names."""
    if c.name == "python-stdlib":
        return stdlib_files()
    path = Path(c.name)
    if path.is_dir():
        files = files_below(path, c.folder())
    elif glob.has_magic(c.name) and not path.exists():
        files = [p for p in map(Path, glob.glob(c.name, recursive=True)) if p.is_file() and is_data(p, c.folder())]
        if not files and kind_of(path) in (".txt", ".jsonl"):
            raise UserError(f"no file matches {c.name}")
    else:
        files = [path]
    if any(p.name.endswith(".txt.zst") for p in files):
        raise UserError(f"{c.name}: .zst is read row by row, as .jsonl.zst; pack text as .txt.gz instead")
    others = [p for p in files if kind_of(p) not in (".txt", ".jsonl")]
    if not files or len(others) == len(files):
        return None
    if others:
        raise UserError(f"{c.name} holds {others[0].name} beside .txt or .jsonl: name one kind, such as {path}/*.jsonl")
    splits = [p for p in files if path.is_dir() and HELD_OUT.search(p.relative_to(path).as_posix())]
    if splits and all(kind_of(p) == ".jsonl" for p in files):
        return None  # a hub repository with splits: datasets knows which file is which
    if splits:
        raise UserError(f"{c.name} holds {splits[0].name}, of another split: name the files of one with a glob")
    return sorted(files)


HELD_OUT = re.compile(r"(^|[-._ 0-9/])(valid|validation|val|dev|test|testing|eval|evaluation)([-._ 0-9/]|$)")


def files_below(root: Path, shards: Path) -> list[Path]:
    """The files with data in a folder and in those below it; UserError if one cannot be looked into."""

    def stop(e: OSError):
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from e

    files = []
    for folder, below, names in os.walk(root, onerror=stop, followlinks=True):
        below[:] = [b for b in below if not b.startswith(".")]
        files += [path for n in names if is_data(path := Path(folder) / n, shards)]
    for path in files:
        if not path.exists():
            raise UserError(f"{path} is a link to what is not there: mend or delete it")
    return files


def is_data(path: Path, shards: Path) -> bool:
    """Whether a file is part of a corpus: no README.md, LICENSE or hidden file, nor what was prepared from it."""
    written = path.suffix == ".bin" or path.name in ("dataset.json", "tokenizer.json")
    prepared = written and path.parent.absolute() == shards.absolute()
    return not (path.name.startswith(".") or path.suffix in ("", ".md") or prepared)


def open_source(c: DatasetConfig):
    """The source that `c` names, and which of its rows: (source, first row, row after the last or None)."""
    base, slices = parse_split(c.split)
    files = local_files(c)
    if files and base != "train":
        raise UserError(f"split {c.split}: {c.name} has one split, train; choose rows with a slice, train[95%:]")
    source = Files(files, c.column_name) if files else Hub(c.name, base, c.column_name, c.revision)
    total = None
    if any(b and (b[1] or b[0] < 0) for b in slices):  # a percentage, or a distance from the end
        total = getattr(source, "known_rows", None) or sum(1 for _ in source.rows())
    start, stop = (absolute(b, total) for b in slices)
    if stop is not None and stop <= (start or 0):
        raise UserError(f"split {c.split} of {c.name} holds no rows")
    return source, start or 0, stop


def parse_split(spec: str):
    """'train[:95%]' -> ('train', (None, (95, True))): the base, and two bounds, each None or (number, is %)."""
    match = re.fullmatch(r"([\w.-]+?)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", re.sub(r"\s|(?<=\d)_(?=\d)", "", spec))
    if not match:
        raise UserError(f"cannot read split {spec!r}: write train, train[:95%], train[-100:] or train[1000:2000]")
    percent = any(b and b.endswith("%") for b in match.groups()[1:])  # train[10:50%] is from 10 % to 50 %
    bounds = tuple((int(b.rstrip("%")), percent) if b else None for b in match.groups()[1:])
    if any(b and b[1] and abs(b[0]) > 100 for b in bounds):
        raise UserError(f"split {spec!r} goes beyond 100%")
    return match[1], bounds


def absolute(bound, total: int | None):
    """A bound of a slice as a row number, rounded and clipped to `total` as Hugging Face does; None stays None."""
    if bound is None or total is None:
        return bound and bound[0]
    number = round(bound[0] * total / 100) if bound[1] else bound[0]
    return min(max(number + total if number < 0 else number, 0), total)


def stdlib_files() -> list[Path]:
    """The interpreter's own library, tests left out, in an order that makes the end as fair a sample as the start."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if p.stat().st_size]
    names = [n for n in names if not left_out & set(n.split("/"))]
    if not names:
        raise UserError(f"python-stdlib: this interpreter has no library in source form at {root}")
    return [root / n for n in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())]


# -----------------------------------------------------------------------------
# shards: one header, one writer, one reader

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


class ShardWriter:
    """Writes the tokens of one split into shards of `shard_tokens`; a shard is visible once it is whole."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, shards: list[dict]):
        self.folder, self.split, self.shard_tokens, self.shards = folder, split, shard_tokens, shards
        self.part = folder / f".{split}.part"
        self.file, self.tokens, self.documents = None, 0, 0  # the shard at hand

    def room(self) -> int:
        """How many tokens the shard at hand can still take."""
        return self.shard_tokens - self.tokens

    def write(self, tokens: np.ndarray, documents: int) -> None:
        """Append uint16 tokens (at most `room`), within which `documents` documents end."""
        if len(tokens) == 0:
            return
        if self.file is None:
            self.file = open(self.part, "wb")
            self.file.write(bytes(HEADER_BYTES))
        self.file.write(tokens.astype("<u2", copy=False).data)
        self.tokens += len(tokens)
        self.documents += documents

    def finish_shard(self) -> None:
        """Give the shard at hand its header and its name, and list it."""
        if self.file is None:
            return
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, VERSION, self.tokens
        self.file.seek(0)
        self.file.write(header.data)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        name = f"{self.split}_{len(self.shards):06d}.bin"
        entry = {"file": name, "tokens": self.tokens, "documents": self.documents, "sha256": sha256_file(self.part)}
        os.replace(self.part, self.folder / name)
        sync_folder(self.folder)
        self.shards.append(entry)
        self.file, self.tokens, self.documents = None, 0, 0


def map_shard(path: Path):
    """The shard `path`: (file, tokens (n,) uint16), open and memory-mapped. UserError if it is not a whole shard."""
    try:
        f = open(path, "rb", buffering=0)
        header = np.frombuffer(f.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
        size, wanted = os.fstat(f.fileno()).st_size, HEADER_BYTES + 2 * int(header[2])
        if header[0] != MAGIC or header[1] != VERSION:
            raise UserError(
                f"{path} is not a shard: it should begin with the int32 {MAGIC} and {VERSION}. Prepare it again; "
                "if it is nanoGPT's, bare uint16, put 256 int32 in front: these two, the token count, zeros"
            )
        if size != wanted:
            raise UserError(
                f"the shard {path} is damaged: with {header[2]} tokens, as its header says, it would have "
                f"{wanted} bytes, not {size}; delete its folder and prepare it again"
            )
        mapped = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as e:
        raise UserError(f"cannot read the shard {path}: {e.strerror}") from e
    mapped.madvise(mmap.MADV_RANDOM)  # windows lie anywhere: to read ahead would read 128 KB for each 1 KB
    return f, np.frombuffer(memoryview(mapped)[HEADER_BYTES:], "<u2")


class Shards:
    """The tokens of one split as one stream, memory-mapped. Window w is tokens [w * length, (w + 1) * length)."""

    def __init__(self, folder: Path, split: str, prepare: str):
        """`prepare` is the command that writes the shards, for the error that they are not there."""
        self.folder, self.split, self.info = folder, split, {}
        if (folder / "dataset.json").exists():
            self.info = read_record(folder / "dataset.json")
            entries = self.info["splits"].get(split, {}).get("shards", [])
            self.files = [folder / e["file"] for e in entries]
        else:  # llm.c's or modded-nanogpt's, unless a preparation is under way
            named = re.compile(
                rf"([^.].*[^a-z])?{split}(idation)?([^a-z].*)?\.bin"
            )  # not retrieval_train_0.bin for val
            found = [p for p in folder.glob("*.bin") if named.fullmatch(p.name)]
            self.files = [] if (folder / PROGRESS).exists() else sorted(found)
        if not self.files:
            raise UserError(f"no finished {split} shards in {folder}: run {prepare}")
        for f in self.files:
            if not f.exists():
                raise UserError(f"the shard {f} is gone: delete {folder} and run {prepare}")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * len(self.files) + 256  # a memory map keeps its file open, and so do we
        if wanted > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
        self.open_files, self.maps = zip(*map(map_shard, self.files), strict=True)
        self.fds = [f.fileno() for f in self.open_files]
        self.starts = np.cumsum([0, *map(len, self.maps)])  # the stream's token at which each shard starts
        self.n_tokens = int(self.starts[-1])
        self.opened, self.turn = [os.fstat(fd) for fd in self.fds], 0

    def fingerprint(self) -> tuple[str, str]:
        """(What tells these data from others, its sha256): dataset.json, or foreign shards' names and lengths."""
        if self.info:
            return str(self.folder / "dataset.json"), sha256_file(self.folder / "dataset.json")
        listing = json.dumps([[f.name, len(tokens)] for f, tokens in zip(self.files, self.maps, strict=True)])
        return f"{self.folder}/*{self.split}*.bin", hashlib.sha256(listing.encode()).hexdigest()

    def locate(self, tokens):
        """(shards, offsets in tokens) of the stream's tokens number `tokens`, an int or an array of them."""
        shards = np.searchsorted(self.starts, tokens, side="right") - 1
        return shards, tokens - self.starts[shards]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, uint16; they may lie in several shards."""
        shard, at = map(int, self.locate(start))
        parts, left = [], stop - start
        while left > 0:
            parts.append(self.maps[shard][at : at + left])
            left -= len(parts[-1])
            shard, at = shard + 1, 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def unchanged(self, shard: int, thoroughly: bool) -> bool:
        """Whether a shard has the size that it was opened with, without which its map is a bus error; thoroughly: and
        has neither been written to nor deleted nor replaced."""
        try:
            if not thoroughly:
                return os.lseek(self.fds[shard], 0, os.SEEK_END) == self.opened[shard].st_size
            now, then = os.fstat(self.fds[shard]), self.opened[shard]
        except OSError:
            return False
        return bool(now.st_nlink) and (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)

    def windows(self, ids, length: int) -> np.ndarray:
        """Windows `ids` (n,) of `length` tokens each -> (n, length) uint16. BadShard if a file is another one."""
        starts = np.asarray(ids, np.int64) * length
        first, offset = self.locate(starts)
        last, _ = self.locate(starts + length - 1)
        touched = [*{*first.tolist(), *last.tolist()}]
        stride = 1 + len(touched) // 256  # of many shards, some are asked for more than their size, others each time:
        self.turn += 1  # from 3,000 shards a batch takes 0.9 of the time
        for i, shard in enumerate(touched):
            if not self.unchanged(shard, (i + self.turn) % stride == 0):
                raise BadShard(f"the shard {self.files[shard]} changed or vanished while in use: prepare it again")
        out = np.empty((len(starts), length), np.uint16)
        places = zip(starts.tolist(), first.tolist(), last.tolist(), offset.tolist(), strict=True)
        for row, (start, shard, end, at) in enumerate(places):
            out[row] = self.maps[shard][at : at + length] if shard == end else self.tokens(start, start + length)
        return out


# -----------------------------------------------------------------------------
# order: which window stands at position p of the endless training stream


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64s so that each bit of the result depends on each bit of x (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(x: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where the permutation of range(n) number `key` (64 bits) sends each of x; computed, without a table of n.

    Swap-or-not (Hoang, Morris, Rogaway 2012): each round pairs every element with its mirror image about a keyed
    point, and a keyed coin, the same for both, swaps the two or not. So every round is a permutation, of any n, and
    after some 6 log2(n) of them it looks like a random one.
    """
    x, n = x.astype(np.uint64), np.uint64(n)
    rounds = 6 * max(8, int(n).bit_length())
    keys = mix(np.uint64(key) + np.arange(1, 2 * rounds + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    for pivot, coin in zip(keys[:rounds] % n, keys[rounds:], strict=True):
        mirror = pivot - x
        mirror = np.minimum(mirror, mirror + n)  # pivot - x modulo n: below 0, an unsigned number is huge
        swap = mix(np.maximum(x, mirror) ^ coin) & np.uint64(1)
        x = np.where(swap, mirror, x)
    return x.astype(np.int64)


def window_order(positions, n_windows: int, seed: int, shuffle_each_epoch: bool = True) -> np.ndarray:
    """The windows at `positions` (n,) of the training stream -> (n,) int64; a function of seed and position alone.

    Epoch e is positions [e * n_windows, (e + 1) * n_windows): every window once, in an order of its own.
    """
    epochs, within = np.divmod(np.asarray(positions, np.int64), n_windows)
    out = np.empty_like(within)
    for epoch in np.unique(epochs):
        name = f"{seed} {epoch if shuffle_each_epoch else 0}"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        out[epochs == epoch] = permuted(within[epochs == epoch], n_windows, key)
    return out


# -----------------------------------------------------------------------------
# encoding: rows -> tokens, in processes of their own: threads of one, although the tokenizers let go of Python's lock,
# took a fifth longer on two cores


def read_rows(source, start: int, stop: int | None, place=None, row: int = 0):
    """Yield (row number, place, raw) of rows [start, stop), reading from `place`, which is that of row `row`."""
    for number, (here, raw) in enumerate(source.rows(place), row):
        if stop is not None and number >= stop:
            return
        if number >= start:
            yield number, here, raw


def parse_row(source, place, raw, vocab_size: int | None):
    """A row's text or, if its ids have to lie below a vocab_size, its ids (n,). BadRow, naming the row, for neither."""
    try:
        value = source.parse(place, raw)
        if vocab_size is None:
            if not isinstance(value, str):
                raise ValueError(f"column {source.column} holds {type(value).__name__}, not text")
            if not value.isascii():
                value.encode()
            return value
        ids = np.array(value if isinstance(value, list) and value else [], dtype=None if value else np.int64)
        if not isinstance(value, list) or ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"column {source.column} holds no list of token ids (is_tokenized)")
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, but the vocabulary ends at {vocab_size - 1}")
        return ids
    except UnicodeEncodeError as e:
        raise BadRow(f"{source.where(place)}: a lone surrogate ({value[e.start]!a}) is not text; mend the row") from e
    except (ValueError, OverflowError) as e:
        raise BadRow(f"{source.where(place)}: {e}") from e


def encode_rows(source, encoder: TextEncoder, is_tokenized: bool, batch):
    """[(row, place, raw), ...] -> all tokens, uint16; tokens of each row (n,), 0 if empty; bytes of its text (n,)."""
    if is_tokenized:
        ids = [parse_row(source, place, raw, encoder.vocab_size) for _, place, raw in batch]
        eos, texts = 0, encoder.decode_batch(ids)
    else:
        texts = [parse_row(source, place, raw, None) for _, place, raw in batch]
        try:
            ids = encoder.encode_batch(texts)
        except Exception as e:  # such as a tokenizer that has no token for what it does not know
            where = f"{source.where(batch[0][1])}, or one of the {len(batch) - 1} rows after it"
            raise BadRow(f"{where}: the tokenizer {encoder.name} cannot encode it: {e}") from e
        eos = np.array([len(t) > 0 for t in texts], np.int64)
    lengths = np.array([len(i) for i in ids], np.int64) + eos
    tokens = np.full(lengths.sum(), encoder.eos_token_id, np.uint16)
    for start, document in zip(np.cumsum(lengths) - lengths, ids, strict=True):
        tokens[start : start + len(document)] = document
    return tokens, lengths, np.array([len(t if t.isascii() else t.encode()) for t in texts])


def grouped(rows, max_size: int = 1 << 19, max_rows: int = 1024):
    """Lists of rows: a list is worth a worker's while, and a long document stands almost alone."""
    group, size = [], 0
    for item in rows:
        group.append(item)
        size += len(item[2]) if isinstance(item[2], (bytes, str, list)) else 0
        if size >= max_size or len(group) >= max_rows:
            yield group
            group, size = [], 0
    if group:
        yield group


work = {}  # in a worker: the tasks that it was forked with, encode_rows with all but a batch, by split


@contextlib.contextmanager
def worker_pool(workers: int, tasks: dict, lock):
    """An Executor whose workers do(split, batch), `split` one of `tasks`; a single one is a thread of this process.

    Workers are forked, so that the tasks bring along what they need. UserError if one is killed.
    """
    if workers == 1:
        work.update(tasks)
        pool = ThreadPoolExecutor(1)
    else:
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(workers, fork, initializer=begin_work, initargs=(tasks, lock))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 25)  # the threads that feed the workers wait less for this one: 0.96 of the time
    try:
        yield pool
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one, while the workers end, would leave them waiting
        raise
    except BrokenProcessPool as e:
        raise UserError(
            "a worker was killed, perhaps for want of memory; the same command goes on after the last finished shard, "
            "and fewer --workers need less"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)
        sys.setswitchinterval(interval)


def begin_work(tasks: dict, lock) -> None:
    """In a worker that was just forked: leave Ctrl-C and the folder's lock to the parent, and die when it dies."""
    work.update(tasks)
    lock.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def do(split: str, batch):
    """A worker's task."""
    return work[split](batch)


def ordered_map(pool, split: str, batches, workers: int):
    """Yield (batch, what is made of it) in order; few are under way, so that no queue grows."""
    pending = deque()
    for batch in batches:
        pending.append((batch, pool.submit(do, split, batch)))
        if len(pending) > 2 * workers:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()


def progress_line(split: str, tokens_before: int):
    """A function (documents, tokens, last=False) that shows both and the rate on stderr, twice a second at most."""
    began = shown = time.monotonic()
    tty = sys.stderr.isatty()

    def show(documents: int, tokens: int, last: bool = False):
        nonlocal shown
        now = time.monotonic()
        if last or now - shown > (0.5 if tty else 10):
            rate = (tokens - tokens_before) / max(now - began, 1e-9)
            text = f"{split}: {documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s"
            print(f"\r{text}\x1b[K" if tty else text, end="\n" if last or not tty else "", file=sys.stderr, flush=True)
            shown = now

    return show


def encode_split(folder: Path, split: str, opened, encode, shard_tokens: int, done: dict, save) -> None:
    """Write the shards of one split from where `done` says that an earlier preparation stopped; save() keeps `done`.

    encode(batches of rows) yields, in order, (batch, what encode_rows makes of it).
    """
    source, start, stop = opened
    writer = ShardWriter(folder, split, shard_tokens, done["shards"])
    show = progress_line(split, done["tokens"])
    rows = read_rows(source, start, stop, done["place"], done["row"])
    again = done["skip"]  # so many tokens of the first document are in the last finished shard, maybe all of them
    for batch, (tokens, lengths, n_bytes) in encode(grouped(rows)):
        ends = np.cumsum(lengths)
        at, counted = again, int(0 < again == lengths[0])
        again = 0
        while True:
            end = min(len(tokens), at + writer.room())
            full = end - at == writer.room()
            if full:  # the shard ends within document d, or with it
                d = int(np.searchsorted(ends, end - 1, side="right"))
                upto = d + int(ends[d] == end)
            else:
                upto = len(batch)
            documents = int(np.count_nonzero(lengths[counted:upto]))
            writer.write(tokens[at:end], documents)
            done["tokens"] += end - at
            done["documents"] += documents
            done["empty_documents"] += upto - counted - documents
            done["bytes"] += int(n_bytes[counted:upto].sum())
            at, counted = end, upto
            if not full:
                break
            writer.finish_shard()
            done.update(row=batch[d][0], place=batch[d][1], skip=int(end - ends[d] + lengths[d]))
            save()
        show(done["documents"], done["tokens"])
    if not done["tokens"]:
        raise BadRow(f"{source.where(batch[-1][1])}: this row and all before it in the {split} split are empty")
    writer.finish_shard()
    done["finished"] = True
    save()
    show(done["documents"], done["tokens"], last=True)


# -----------------------------------------------------------------------------
# preparation

PROGRESS = ".progress.json"


def asked(c: DatasetConfig) -> dict:
    """What a config says of the source and the tokenizer."""
    about = {k: getattr(c, k) for k in ("name", "split", "column_name", "is_tokenized", "revision")}
    return about | {"tokenizer": c.hf_tokenizer_path or f"trained, {c.train_tokenizer_vocab_size}"}


def identity(c: DatasetConfig, shard_tokens: int) -> dict:
    """What the bytes of a split depend on, told without reading the source."""
    about = asked(c)
    if c.hf_tokenizer_path and tokenizer_file(c.hf_tokenizer_path).is_file():
        about["tokenizer_sha256"] = sha256_file(tokenizer_file(c.hf_tokenizer_path))
    files = local_files(c) or [Path(p) for p in glob.glob(c.name, recursive=True)]
    files = [f for p in files for f in (sorted(files_below(p, c.folder())) if p.is_dir() else [p])]
    if files:
        listing = json.dumps([[p.name, p.stat().st_size] for p in files])
        about |= {"files": len(files), "names_and_sizes": hashlib.sha256(listing.encode()).hexdigest()}
    return about | {"shard_tokens": shard_tokens}


def plan(folder: Path, configs: dict[str, DatasetConfig], shard_tokens: int) -> dict | None:
    """What is to do in `folder`: None if it is finished, else its progress record. UserError if it holds other data."""
    record = {split: identity(c, shard_tokens) for split, c in configs.items()}
    path = next((folder / name for name in ("dataset.json", PROGRESS) if (folder / name).exists()), None)
    if path is None:
        given = tokenizer_file(next(iter(configs.values())).hf_tokenizer_path or "")
        for found in (*folder.glob("*.bin"), *folder.glob("tokenizer.json")):
            if found.absolute() != given.absolute():
                raise UserError(f"{found} was not written by a preparation: choose another path")
        fresh = dict.fromkeys(("tokens", "documents", "empty_documents", "bytes", "row", "skip"), 0)
        return {"source": record, "splits": {s: fresh | {"place": None, "shards": []} for s in configs}}
    there = read_record(path)
    if differ := differences(there["source"], record):
        raise UserError(
            f"{folder} was prepared from another config: {'; '.join(differ)}; choose another path or delete it"
        )
    for entry in (entry for about in there["splits"].values() for entry in about["shards"]):
        shard = folder / entry["file"]
        if not shard.exists() or shard.stat().st_size != HEADER_BYTES + 2 * entry["tokens"]:
            raise UserError(f"the shard {shard} is gone or cut short: delete {folder} and prepare it again")
    return there if path.name == PROGRESS else None


def prepare(sections: dict[str, DatasetConfig], model_vocab_size: int | None, workers: int, shard_tokens: int) -> None:
    """Write the shards of all sections, each into its folder; what is there already is left alone."""
    folders = {}
    for split, c in sections.items():
        folders.setdefault(c.folder(), {})[split] = c
    plans = {folder: plan(folder, configs, shard_tokens) for folder, configs in folders.items()}
    for folder in [f for f in folders if plans[f] is None]:
        print(f"{folder} is already prepared")
        for name in (PROGRESS, ".lock"):  # left by a process that ended between its last two steps
            (folder / name).unlink(missing_ok=True)
        del folders[folder]
    if not folders:
        return
    # all that can be wrong is found before anything is written
    c = sections["train"]
    encoder = load_encoder(c.hf_tokenizer_path) if c.hf_tokenizer_path else None
    vocab_size = encoder.vocab_size if encoder else c.train_tokenizer_vocab_size
    if model_vocab_size is not None and model_vocab_size < vocab_size:
        raise UserError(f"model.vocab_size {model_vocab_size} is smaller than the tokenizer's: set it to {vocab_size}")
    opened = {split: open_source(c) for configs in folders.values() for split, c in configs.items()}
    for split, (source, start, stop) in opened.items():
        first = next(read_rows(source, start, stop), None)
        if first is None:
            hint = "; in a .txt, lines that hold <|endoftext|> alone stand between documents"
            name, rows = sections[split].name, sections[split].split
            raise UserError(f"{name} holds no rows in split {rows}" + hint * (".txt" in name))
        parse_row(source, first[1], first[2], vocab_size if sections[split].is_tokenized else None)
    for folder, configs in folders.items():
        prepare_folder(folder, configs, opened, encoder, workers, shard_tokens)


def prepare_folder(folder: Path, configs, opened, encoder, workers: int, shard_tokens: int) -> None:
    """Write tokenizer.json, the shards of the splits in `configs`, and last of all dataset.json."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(f"another process is preparing {folder}: wait for it, or choose another path") from e
        progress = plan(folder, configs, shard_tokens)  # again: another process may have been at work meanwhile
        if progress is None:
            print(f"{folder} is already prepared")
            return

        def save() -> None:
            write_text(folder / PROGRESS, json.dumps(progress))

        try:
            save()
            if encoder is None and "tokenizer" in progress:
                encoder = json_encoder("trained here", (folder / "tokenizer.json").read_bytes())
            encoder = encoder or trained_encoder(configs["train"], opened["train"])
            about = {"name": encoder.name, "sha256": hashlib.sha256(encoder.json).hexdigest()}
            about |= {"vocab_size": encoder.vocab_size, "eos_token_id": encoder.eos_token_id}
            if differ := differences(progress.get("tokenizer", about), about):
                raise UserError(f"{folder} was begun with another tokenizer: {'; '.join(differ)}; delete it")
            if "tokenizer" not in progress:
                with whole_file(folder / "tokenizer.json") as f:
                    f.write(encoder.json)
                progress["tokenizer"] = about
                save()
            tasks = {
                split: functools.partial(encode_rows, opened[split][0], encoder, c.is_tokenized)
                for split, c in configs.items()
            }
            with worker_pool(workers, tasks, lock) as pool:
                for split, done in progress["splits"].items():
                    if not done.get("finished"):
                        encode = functools.partial(ordered_map, pool, split, workers=workers)
                        encode_split(folder, split, opened[split], encode, shard_tokens, done, save)
        except BadRow:  # the source has to change, and what is here would not fit it then
            given = tokenizer_file(configs.popitem()[1].hf_tokenizer_path or "")
            for path in [*folder.glob("*.bin"), *folder.glob(".*.part"), *folder.glob("tokenizer.json")]:
                if path.absolute() != given.absolute():
                    path.unlink()
            for path in (folder / PROGRESS, folder / ".lock"):
                path.unlink(missing_ok=True)
            for path in new:
                path.rmdir()
            raise
        except BaseException:  # a full disk needs the room; the same command makes this part again
            for path in folder.glob(".*.part"):
                path.unlink()
            raise
        keep = "tokens", "documents", "empty_documents", "bytes", "shards"
        splits = {split: {k: done[k] for k in keep} for split, done in progress["splits"].items()}
        dataset = {"source": progress["source"], "splits": splits, "tokenizer": progress["tokenizer"]}
        write_text(folder / "dataset.json", json.dumps(dataset, indent=1) + "\n")
        (folder / PROGRESS).unlink()
        (folder / ".lock").unlink()
    for split, about in splits.items():
        print(f"{folder}: {split} has {about['tokens']:,} tokens of {about['documents']:,} documents")


def verify(folder: Path, prepare: str) -> None:
    """Read again all that dataset.json vouches for; UserError names the first thing that is wrong."""
    if not (folder / "dataset.json").exists():
        raise UserError(f"{folder} is not prepared: run {prepare}")
    info = read_record(folder / "dataset.json")
    again = f"delete {folder} and run {prepare}"
    if sha256_file(folder / "tokenizer.json") != info["tokenizer"]["sha256"]:
        raise UserError(f"{folder / 'tokenizer.json'} is not the one that encoded the shards: {again}")
    vocab_size, eos = info["tokenizer"]["vocab_size"], info["tokenizer"]["eos_token_id"]
    for split, about in info["splits"].items():
        data = Shards(folder, split, prepare)
        for path, tokens, entry in zip(data.files, data.maps, about["shards"], strict=True):
            if len(tokens) != entry["tokens"] or sha256_file(path) != entry["sha256"]:
                raise UserError(f"the shard {path} has changed since it was written: {again}")
            if tokens.max() >= vocab_size:
                raise UserError(
                    f"the shard {path} holds id {tokens.max()}, outside the vocabulary of {vocab_size}: {again}"
                )
            ends = int(np.count_nonzero(tokens == eos))
            if ends != entry["documents"] and not info["source"][split]["is_tokenized"]:
                raise UserError(f"the shard {path} has {ends} EOS for {entry['documents']} documents: {again}")
        for name in ("tokens", "documents"):
            if about[name] != sum(entry[name] for entry in about["shards"]):
                raise UserError(f"dataset.json counts {about[name]} {name} in {split}, its shards hold others: {again}")
        print(f"{folder}: {split} is sound, {about['tokens']:,} tokens in {len(data.files)} shards")


def peek(folder: Path, split: str, n: int, prepare: str) -> None:
    """Print the first n documents of a split as a model sees them: the text of their ids."""
    import tokenizers

    data = Shards(folder, split, prepare)
    if not data.info:
        raise UserError(f"{folder} has no dataset.json, which says where documents end: run {prepare}")
    try:
        tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as e:
        raise UserError(f"cannot read {folder / 'tokenizer.json'} ({e}): delete {folder} and run {prepare}") from e
    tokens = data.tokens(0, min(data.n_tokens, 1 << 24))
    ends = np.flatnonzero(tokens == data.info["tokenizer"]["eos_token_id"])[:n] + 1
    for i, ids in enumerate(np.split(tokens[: ends[-1]] if len(ends) else tokens, ends[:-1]), 1):
        print(f"--- {split} document {i}: {len(ids)} ids\n{tok.decode(ids.tolist(), skip_special_tokens=False)}")


def trained_encoder(c: DatasetConfig, opened) -> TextEncoder:
    """A byte-level BPE trained on the rows of the train split."""
    source, start, stop = opened
    print(f"training a byte-level BPE of {c.train_tokenizer_vocab_size} tokens", file=sys.stderr)
    texts = (parse_row(source, place, raw, None) for _, place, raw in read_rows(source, start, stop))
    return json_encoder("trained here", train_bpe(texts, c.train_tokenizer_vocab_size))


def main() -> None:
    parser = argparse.ArgumentParser(description="Text or tokens in, shards out.")
    parser.add_argument("config", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train_dataset_config.name=my.txt")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes to encode (default: all cores)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in a shard (default: 100M)")
    parser.add_argument("--verify", action="store_true", help="read again what was prepared, and name what is wrong")
    parser.add_argument("--peek", type=int, metavar="N", help="print the first N documents of each split, decoded")
    args = parser.parse_intermixed_args()
    try:
        if min(args.workers, args.shard_tokens, 1 if args.peek is None else args.peek) < 1:
            raise UserError("--workers, --shard-tokens and --peek must be at least 1")
        if args.shard_tokens >= 2**31:
            raise UserError(f"--shard-tokens {args.shard_tokens}: a shard's header counts to {2**31 - 1}")
        config = read_config(args.config, args.overrides)
        model = config.get("model")
        vocab_size = model.get("vocab_size") if isinstance(model, dict) else None
        vocab_size = convert(vocab_size, int | None, "model.vocab_size")
        sections, command = dataset_configs(config), f"python prepare_data.py {args.config}"
        if args.verify:
            for folder in dict.fromkeys(c.folder() for c in sections.values()):
                verify(folder, command)
        elif args.peek:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may stop reading
            for split, c in sections.items():
                peek(c.folder(), split, args.peek, command)
        else:
            prepare(sections, vocab_size, args.workers, args.shard_tokens)
    except UserError as e:
        sys.exit(f"prepare_data: {e}")
    except OSError as e:
        sys.exit(
            f"prepare_data: {e.filename or 'the disk'}: {e.strerror}; once that is mended, the same command goes on"
        )
    except KeyboardInterrupt:
        print("\nprepare_data: interrupted; the same command goes on after the last finished shard", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
