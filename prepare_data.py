"""Text or tokens in, shards out: python prepare_data.py configs/quickstart.yaml [key=value ...]

Reads train_dataset_config and val_dataset_config of a run's YAML and writes, into their `path`,
    {train,val}_000000.bin ...  256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens
    tokenizer.json              the tokenizer in Hugging Face's format, and a tokenizer_config.json for transformers
    dataset.json                source and config, and each shard's tokens, documents and sha256
Documents are encoded one by one, no special token is read out of text, and EOS follows each document. The bytes depend
on the source and the config alone. An interrupted preparation is resumed by the same command.
"""

import argparse
import bz2
import codecs
import contextlib
import copy
import dataclasses
import difflib
import errno
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import reprlib
import signal
import sys
import sysconfig
import threading
import typing
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pydantic
import yaml
from pydantic import Field


class UserError(Exception):
    """Something the user can fix. The message says what was found, what was wanted and what to do."""


# -----------------------------------------------------------------------------
# reading a YAML


class ConfigLoader(yaml.SafeLoader):
    """YAML as a config needs it: no duplicate keys, few aliases, and numbers that are still known as they were typed.

    A number becomes a number only if it is spelled as YAML's own writer spells it. Any other spelling (007, 1_000,
    1.10, 12:30, a date) stays text, and the type of the key decides: `name: 007` is the name 007.
    """

    MAX_ALIASES = 20  # a few aliases are convenient; many of them, nested, expand to more than any memory holds
    aliases = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > self.MAX_ALIASES:
                raise yaml.YAMLError(f"it has more than {self.MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        # YAML's own loader takes the last of two equal keys without a word.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"it has the key {shown(key)} twice in one section")
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        # No key takes a number of so many digits, and Python refuses to print one of more than 4,300.
        if len(node.value) > 40:
            return node.value
        construct = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        number = construct(node)
        return number if yaml.safe_dump(number).split("\n")[0] == node.value else node.value


ConfigLoader.add_constructor("tag:yaml.org,2002:int", ConfigLoader.construct_number)
ConfigLoader.add_constructor("tag:yaml.org,2002:float", ConfigLoader.construct_number)
ConfigLoader.add_constructor("tag:yaml.org,2002:timestamp", ConfigLoader.construct_yaml_str)


def load_yaml(text: str, what: str):
    """The value of a YAML text. UserError, which begins with `what`, if it is not YAML."""
    try:
        return yaml.load(text, ConfigLoader)
    # YAML raises errors of its own, ValueError for broken numbers and TypeError for keys that cannot be hashed.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{what} is not YAML that can be read: {reason[:300]}") from e


def read_config(path, overrides=()) -> dict:
    """The YAML mapping at `path` with overrides ["key.key=value", ...] applied. UserError if it cannot be read."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"the config {path} is not YAML: {e}") from e
    config = load_yaml(text, f"the config {path}")
    if not isinstance(config, dict):
        raise UserError(f"the config {path} must hold a mapping of keys to values, not {type(config).__name__}")
    for override in overrides:
        # The value is YAML as in the file: 3, null, [1, 2] and true mean the same in both.
        name, equals, value = override.partition("=")
        if not equals or not name or name.startswith("-"):
            raise UserError(f"{shown(override)} is not an override: write key=value, such as model.n_layer=4")
        # A section that is not there is made, so that a misspelled one is found when the config is checked.
        *sections, last = name.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"{shown(override)}: {part} is a value, not a section with keys of its own")
        section[last] = load_yaml(value, f"the value of {shown(override)}")
    return two_sections(config) if "data" in config else config


class ShortRepr(reprlib.Repr):
    """repr() for messages: cut while it is made, so that no value is too large for it."""

    def repr_int(self, x, level):
        return super().repr_int(x, level) if x.bit_length() < 256 else f"an integer of {x.bit_length()} bits"


SHORT = ShortRepr()
# Two levels show what a section or a list is without printing all that is in it.
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60
SHORT.maxlevel = 2


def shown(value) -> str:
    """A value for a message, in about 60 characters."""
    text = SHORT.repr(value)
    return text if len(text) <= 64 else f"{text[:60]}..."


def flat(d: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out = {}
    for k, v in d.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def differences(there: dict, here: dict, ignored=()) -> list[str]:
    """["a.b 1 there, 2 here", ...]: the keys in which two mappings, with or without sections, do not agree."""
    there = flat(there)
    here = flat(here)
    # A key that one side lacks counts as null there.
    keys = [k for k in there | here if there.get(k) != here.get(k) and k not in ignored]
    return [f"{k} {shown(there.get(k))} there, {shown(here.get(k))} here" for k in keys]


# -----------------------------------------------------------------------------
# checking a config


class Section(pydantic.BaseModel):
    """A section of the YAML. Its fields are the keys; unknown keys, infinities and NaN are refused."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), coerce_numbers_to_str=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def check_text(cls, value, info):
        """Refuse text that no file name and no JSON can hold, and read 1e5 as the integer that it is."""
        if not isinstance(value, str):
            return value
        # File systems refuse these, and UTF-8 cannot encode lone surrogates.
        if re.search("[\0\ud800-\udfff]", value):
            raise ValueError(f"must be text without NUL bytes and lone surrogates, not {shown(value)}")
        # pydantic reads text as a number, but not this spelling of an integer.
        kind = cls.model_fields[info.field_name].annotation
        is_integer = int in (kind, *typing.get_args(kind))
        return int(float(value)) if is_integer and re.fullmatch(r"\d+e\d\d?", value) else value


class DatasetConfig(Section):
    """One split of text: the keys of train_dataset_config and val_dataset_config."""

    name: str = Field(
        min_length=1,
        description="a .txt or .jsonl (also .gz, .xz, .bz2, .zst), a glob of them, python-stdlib, or what `datasets` "
        "reads: a hub id, a folder, parquet",
    )
    split: str = Field("train", description="which rows: train, validation, or a slice: train[:95%], train[-100:]")
    column_name: str = Field("text", description="the column that holds the text, or the token ids")
    is_tokenized: bool = Field(False, description="rows are token ids already: kept whole, no EOS is added")
    hf_tokenizer_path: str | None = Field(
        None, description="gpt2, a hub id, a tokenizer.json or its folder; val takes train's"
    )
    train_tokenizer_vocab_size: int | None = Field(
        None, ge=257, le=65536, description="instead: train a byte-level BPE of this size on the train split"
    )
    streaming: bool = Field(False, description="accepted, as in SPD's files: preparation always streams")
    seed: int | None = Field(
        None, ge=0, le=2**62, description="train: added to the top-level seed; val: rotates which windows are used"
    )
    n_ctx: int = Field(ge=2, le=2**31, description="tokens in a window: the model's n_ctx + 1")
    shuffle_each_epoch: bool = Field(True, description="another order each epoch; false repeats the first")
    path: str | None = Field(
        None, description="folder of the shards; null: data/<name>-<tokenizer>; val takes train's if the names agree"
    )
    revision: str | None = Field(None, description="the hub dataset's branch, tag or commit")
    config_name: str | None = Field(None, description="which config of a dataset that has several")

    def folder(self) -> Path:
        """Where the shards are. It depends on the config alone, not on what exists."""
        if self.path:
            return Path(self.path).expanduser()
        # Two tokenizers get two folders, also where both files are called tokenizer.json.
        tokenizer = self.hf_tokenizer_path or f"bpe{self.train_tokenizer_vocab_size}"
        parts = [self.name, self.config_name, tokenizer]
        return Path("data") / re.sub(r"[^\w.-]+", "-", "-".join(filter(None, parts))).strip("-.")


def validated(cls, values, where: str = ""):
    """An instance of `cls`, a Section or a dataclass, made of the mapping `values`.

    Raises UserError, one sentence, if a key is unknown, missing, of another type or out of bounds. `where` is put
    before the key in the message, such as "model.".
    """
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'the config'} must be a section of keys, not {shown(values)}")
    # The dataclasses of models.py get the Section's rules here, since they do not import pydantic.
    config = None if issubclass(cls, Section) else Section.model_config
    try:
        if config:
            cls.__pydantic_config__ = config
        result = pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as e:
        # Unknown keys first: one of them is often the missing key, misspelled.
        first = min(e.errors(include_url=False), key=lambda error: error["type"] not in UNKNOWN_KEY)
        raise UserError(sentence(cls, values, first, where)) from e
    check_exact(values, result, where)
    return result


UNKNOWN_KEY = "extra_forbidden", "unexpected_keyword_argument"  # pydantic's names for it, in models and dataclasses


def sentence(cls, values: dict, error: dict, where: str) -> str:
    """A pydantic error in one sentence, with the full name of the key."""
    # pydantic's location leads through sections and unions to the key.
    keys = {}  # of the section in which the error lies
    name = where
    for part in error["loc"]:
        fields = getattr(cls, "model_fields", None) or getattr(cls, "__dataclass_fields__", {})
        keys = fields or keys
        if part in fields:
            cls = getattr(fields[part], "annotation", None)
        elif any(map(dataclasses.is_dataclass, typing.get_args(cls))):  # the tag of a union, which is no key
            cls = next(c for c in typing.get_args(cls) if c.__dataclass_fields__["model_type"].default == part)
            continue
        name += f"{shown(part).strip(QUOTES)}."
    name = name.rstrip(".")
    if error["type"] in UNKNOWN_KEY:
        section, _, bad = name.rpartition(".")
        near = difflib.get_close_matches(bad, keys, n=1, cutoff=0)[0]
        return f"unknown key {name}; the nearest valid key is {section}{'.' * bool(section)}{near}"
    # The description tells what the user has to decide on.
    if error["type"] == "missing":
        return f"missing key {name}: {getattr(keys.get(error['loc'][-1]), 'description', 'it has no default')}"
    if error["type"].startswith("union_tag"):
        return f"{name}.model_type must be one of {error['ctx'].get('expected_tags', 'the models')}"
    if error["type"] == "value_error":
        return f"{name} {error['ctx']['error']}".strip()
    return f"{name} {error['msg'].replace('Input should', 'must', 1)}, not {shown(error['input'])}"


QUOTES = "'\""


def check_exact(value, result, name: str) -> None:
    """Refuse what pydantic converts too kindly: true as a number, 1 or "yes" as true, and integers without limit."""
    # Python's True is an int, so pydantic takes it for 1.
    if isinstance(value, bool) != isinstance(result, bool):
        wanted = "be true or false" if isinstance(result, bool) else "not be true or false"
        raise UserError(f"{name.rstrip('.')} must {wanted}: it is {shown(value)}")
    if isinstance(result, int) and abs(result) >= 2**63:
        raise UserError(f"{name.rstrip('.')} must be below 2**63, not {shown(value)}")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_exact(inner, getattr(result, key, inner), f"{name}{key}.")
    elif isinstance(value, (list, tuple)):
        for inner, converted in zip(value, result, strict=True):
            check_exact(inner, converted, name)


SECTIONS = {"train": "train_dataset_config", "val": "val_dataset_config"}


def dataset_configs(raw: dict) -> dict[str, DatasetConfig]:
    """{"train": ..., "val": ...} from a config; val takes train's tokenizer, and its path if the names agree."""
    # train.py refuses every unknown key; here the other keys of a run's config are not known.
    for found in raw:
        near = difflib.get_close_matches(str(found), SECTIONS.values(), n=1, cutoff=0.8)
        if near and found not in SECTIONS.values():
            raise UserError(f"unknown key {shown(found)}; the nearest valid key is {near[0]}")
    for split, name in SECTIONS.items():
        if name not in raw:
            raise UserError(f"missing key {name}: the {split} data")
    train, val = (validated(DatasetConfig, raw[name], f"{name}.") for name in SECTIONS.values())
    tokenizer = train.model_dump(include={"hf_tokenizer_path", "train_tokenizer_vocab_size"})
    if not val.hf_tokenizer_path and not val.train_tokenizer_vocab_size:
        val = val.model_copy(update=tokenizer)
    if val.path is None and val.name == train.name:
        val = val.model_copy(update={"path": train.path})
    differ = differences(tokenizer, val.model_dump(include=set(tokenizer)))
    if differ:
        raise UserError(f"train and val must have the same tokenizer: train is there and val here in {differ[0]}")
    # The tokenizer is given or trained: both keys, or none, would leave open which.
    if bool(train.hf_tokenizer_path) == bool(train.train_tokenizer_vocab_size):
        raise UserError("train_dataset_config must set one of hf_tokenizer_path and train_tokenizer_vocab_size")
    # A tokenizer is trained on text.
    if train.train_tokenizer_vocab_size and train.is_tokenized:
        raise UserError("train_tokenizer_vocab_size needs text, but is_tokenized is true: set hf_tokenizer_path")
    if train.train_tokenizer_vocab_size and val.folder() != train.folder():
        raise UserError("the trained tokenizer is kept beside its shards: give train and val the same path")
    return {"train": train, "val": val}


# param-decomp has one section `data` in place of our two, with these names for the keys that it shares with them
PARAM_DECOMP_KEYS = {"dataset_name": "name", "tokenizer_name": "hf_tokenizer_path", "max_seq_len": "n_ctx"}


def two_sections(config: dict) -> dict:
    """A config with param-decomp's section `data` as one with the two sections that it means."""
    both = [name for name in SECTIONS.values() if name in config]
    data = config["data"]
    if both or not isinstance(data, dict):
        raise UserError(f"data must be param-decomp's section, and stand without {' and '.join(SECTIONS.values())}")
    # Keys without a name of ours stay, and are refused with the section that they end up in.
    common = {PARAM_DECOMP_KEYS.get(key, key): value for key, value in data.items()}
    common.pop("buffer_size", None)  # it shuffles within a buffer, where every order here is a permutation
    # There a format is the name of the dataset, and data_files says which files.
    files = common.pop("data_files", None)
    if files is not None:
        if common.get("name") not in ("parquet", "json"):
            raise UserError("data.data_files needs data.dataset_name parquet or json: leave it out for a hub id")
        common["name"] = files
    splits = {"train": common.pop("train_split", "train"), "val": common.pop("eval_split", "val")}
    out = {key: value for key, value in config.items() if key != "data"}
    for split, section in SECTIONS.items():
        out[section] = common | {"split": splits[split]}
    return out


# -----------------------------------------------------------------------------
# files that appear whole or not at all, and folders held by one process


@contextlib.contextmanager
def whole_file(path: Path):
    """A file opened for writing bytes beside `path`, synced and renamed to `path` at the end, removed on an error."""
    # In the same folder: a rename is atomic only within a file system.
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        # Synced before it is renamed: else a power failure could leave the name with half of the content.
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames within the folder `path` survive a power failure, where the file system can."""
    if os.name == "nt":
        return  # Windows does not open folders
    # The name itself is content of the folder.
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    with whole_file(path) as f:
        f.write(text.encode())


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hold(folder: Path, doing: str, wait: bool = False):
    """Hold `folder` for this process until the returned lock is released or the process ends.

    Returns None where the file system has no locks: nothing but a lock that another process holds is one. Then it
    raises UserError, or waits if `wait`. The lock file stays: two processes could hold it if it were deleted.
    """
    import filelock

    # A lock of the operating system: it ends with the process, even if that is killed.
    lock = filelock.FileLock(folder / ".lock")
    busy = f"another process is {doing} {folder}"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as e:
        if not wait:
            raise UserError(f"{busy}: wait for its end, or choose another folder") from e
        # Whoever waits should know for what.
        print(f"{busy}: waiting for it", file=sys.stderr)
        lock.acquire()
    except (OSError, NotImplementedError) as e:
        # Lustre without its flock option, FUSE and NFS without a lock service say one of these.
        no_locks = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS
        if isinstance(e, OSError) and e.errno not in no_locks:
            raise
        return None
    return lock


def allow_open_files(wanted: int) -> None:
    """Raise this process's limit of open files: a memory map keeps its file open. UserError if it may not."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    # Any process may raise its own soft limit up to the hard one.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or wanted <= soft:
        return
    if wanted > hard:
        raise UserError(
            f"the shards need {wanted} open files, but the hard limit is {hard}: raise it (ulimit -Hn {wanted}, or "
            "nofile in /etc/security/limits.conf), or prepare the data again with larger --shard-tokens"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# -----------------------------------------------------------------------------
# tokenizers: text -> ids

EOS_NAMES = "<|endoftext|>", "[EOS]", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>"
HIDDEN = "\U0010ffff"  # a noncharacter, put before the names of special tokens that text must not match


@dataclasses.dataclass
class TextEncoder:
    """A tokenizer that is ready to encode documents."""

    name: str
    json: bytes  # its tokenizer.json
    vocab_size: int  # the greatest id + 1
    eos_token_id: int
    eos_token: str
    encode_batch: typing.Callable  # list of texts -> list of id sequences, without any special token
    decode_batch: typing.Callable  # list of id sequences -> list of texts, special tokens left out

    def __post_init__(self):
        if self.vocab_size > 65536:
            raise UserError(f"the tokenizer {self.name} has {self.vocab_size} ids, but a shard's uint16 holds 65536")


def load_encoder(name: str) -> TextEncoder:
    """The tokenizer `gpt2`, at a hub id, in a tokenizer.json, or in a folder with one. UserError if there is none."""
    if name == "gpt2":
        return gpt2_encoder()
    # What is on disk comes first, so that no network is needed.
    local = tokenizer_file(name)
    if local.suffix == ".json":
        try:
            data = local.read_bytes()
        except OSError as e:
            raise UserError(f"cannot read the tokenizer {local}: {e.strerror}") from e
        # transformers saves this file beside tokenizer.json; it names the EOS where there are several candidates.
        beside = local.with_name("tokenizer_config.json")
        return json_encoder(name, data, beside.read_bytes() if beside.exists() else b"{}")
    from huggingface_hub import errors, hf_hub_download

    try:
        data = Path(hf_hub_download(name, "tokenizer.json")).read_bytes()
        try:
            settings = Path(hf_hub_download(name, "tokenizer_config.json")).read_bytes()
        except errors.LocalEntryNotFoundError:
            raise  # There may be one, with an EOS of its own, but the network is down.
        except errors.EntryNotFoundError:
            settings = b"{}"
    # The hub's client raises errors of its own, of requests and of the standard library alike.
    except Exception as e:
        raise UserError(
            f"cannot read the tokenizer {name} on the Hugging Face hub ({type(e).__name__}): check its name and the "
            "network; without one, set hf_tokenizer_path to a tokenizer.json on disk"
        ) from e
    return json_encoder(name, data, settings)


def tokenizer_file(name: str) -> Path:
    """Where the tokenizer `name` is, if it is on disk."""
    path = Path(name).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def json_encoder(name: str, data: bytes, settings: bytes = b"{}") -> TextEncoder:
    """A tokenizer from the bytes of its tokenizer.json and of its tokenizer_config.json, which may name the EOS."""
    from tokenizers import Tokenizer

    try:
        tok = text_tokenizer(data)
        # As it is, for decoding rows of ids without their special tokens.
        with_special = Tokenizer.from_buffer(data)
        settings = json.loads(settings)
        vocab_size = max(tok.get_vocab().values()) + 1
    # The Rust library raises bare Exceptions, and the JSON may be of any shape.
    except Exception as e:
        raise UserError(f"{name} is not a tokenizer.json that the tokenizers library can read: {e}") from e
    eos = eos_of(tok, settings, name)

    def encode_batch(texts):
        return [e.ids for e in tok.encode_batch_fast(texts, add_special_tokens=False)]

    return TextEncoder(
        name, data, vocab_size, eos, with_special.id_to_token(eos), encode_batch, with_special.decode_batch
    )


def eos_of(tokenizer, settings: dict | None, name: str) -> int:
    """The id that ends a document: the eos_token of `settings` (a tokenizer_config.json), or the first of EOS_NAMES."""
    given = settings.get("eos_token") if isinstance(settings, dict) else None
    if isinstance(given, dict):
        given = given.get("content")
    names = [given] if isinstance(given, str) else EOS_NAMES
    for known in names:
        # text_tokenizer may have renamed it.
        for spelled in known, HIDDEN + known:
            if tokenizer.token_to_id(spelled) is not None:
                return tokenizer.token_to_id(spelled)
    raise UserError(f"the tokenizer {name} has no end-of-sequence token: looked for {', '.join(names)}")


def text_tokenizer(data: bytes):
    """The tokenizers.Tokenizer of a tokenizer.json, for text as a model is trained on it.

    Nothing is cut, padded or added, and no special token is read out of text: '[EOS]' in a document is text. It
    decodes every id; pass skip_special_tokens=False to see the special ones.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are ours, a batch of documents each
    from tokenizers import Tokenizer

    # Documents are encoded whole, and EOS is added here and not by the tokenizer.
    spec = json.loads(data) | {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None  # it would leave out merges at random
    if "merges" not in spec["model"] or spec["model"].get("ignore_merges"):
        hide_special_words(spec)
    tok = Tokenizer.from_str(json.dumps(spec))
    # Added tokens that are special are matched before the model sees the text, unless this is set.
    tok.encode_special_tokens = True
    return tok


def hide_special_words(spec: dict) -> None:
    """Rename special tokens in the vocabulary of a model that looks words up: '</s>' would be one of its words.

    (A BPE that merges cannot reach them.) The decoder takes the new part of the name off again.
    """
    model = spec["model"]
    special = {t["content"] for t in spec["added_tokens"] if t["special"]}
    is_mapping = isinstance(model["vocab"], dict)  # Unigram has a list of [piece, score]
    words = model["vocab"].items() if is_mapping else model["vocab"]
    found = special & {word for word, _ in words}
    renamed = [[HIDDEN * (word in found) + word, value] for word, value in words]
    model["vocab"] = dict(renamed) if is_mapping else renamed
    if model.get("unk_token") in found:
        model["unk_token"] = HIDDEN + model["unk_token"]
    # Their ids are those of the vocabulary now, so that the other added tokens keep theirs.
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in found]
    spaces = {"type": "WordPiece", "prefix": HIDDEN, "cleanup": False}  # what no decoder at all would do
    replace = {"type": "Replace", "pattern": {"String": HIDDEN}, "content": ""}
    spec["decoder"] = {"type": "Sequence", "decoders": [replace, spec.get("decoder") or spaces]}


def gpt2_encoder(data: bytes = b"") -> TextEncoder:
    """tiktoken's gpt2: the ids of the hub's gpt2, several times faster. data: its tokenizer.json, if it is made."""
    import tiktoken
    from tiktoken.load import read_file_cached
    from tokenizers import models

    files = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    try:
        enc = tiktoken.get_encoding("gpt2")  # which checks the files and keeps them
        if not data:
            vocab = json.loads(read_file_cached(f"{files}encoder.json"))
            merges = read_file_cached(f"{files}vocab.bpe").decode().splitlines()[1:]
            # The hub's tokenizer.json of gpt2 is made of these same two files.
            pairs = [tuple(line.split()) for line in merges]
            data = byte_level_bpe(models.BPE(vocab, pairs)).to_str().encode()
    # Its download fails with the errors of requests, and a damaged cache with ValueError.
    except Exception as e:
        raise UserError(
            f"tiktoken cannot get its gpt2 files ({type(e).__name__}), which it downloads once: without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds them, or hf_tokenizer_path to a tokenizer.json"
        ) from e

    def encode_batch(texts):
        return [enc.encode_to_numpy(t, disallowed_special=()) for t in texts]

    def decode_batch(rows):
        return [enc.decode([i for i in ids if i != enc.eot_token]) for ids in rows]

    return TextEncoder("gpt2", data, enc.n_vocab, enc.eot_token, "<|endoftext|>", encode_batch, decode_batch)


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
    # All 256 bytes are in the vocabulary, so that it can spell any text; sorted, so that ids do not vary.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    return tok.to_str().encode()


def tokenizer_config(eos_token: str, for_transformers: bool) -> str:
    """The text of a tokenizer_config.json, with which transformers loads the tokenizer.json beside it.

    for_transformers: special tokens in text are split, as in training. SPD and param-decomp, which write the EOS as
    text between documents, need them read.
    """
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token, "pad_token": eos_token}
    if for_transformers:
        settings["split_special_tokens"] = True
    return json.dumps(settings) + "\n"


# -----------------------------------------------------------------------------
# reading shards

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


def read_record(folder: Path) -> dict:
    """What `folder`/dataset.json holds, {} if there is none. UserError if it is damaged."""
    path = folder / "dataset.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): delete {folder} and prepare it again") from e
    # A file of this name that something else wrote.
    if not isinstance(record, dict) or not {"source", "tokenizer", "splits", "finished"} <= record.keys():
        raise UserError(f"{path} is not a dataset.json of this program: delete {folder} and prepare it again")
    return record


def map_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, (n,) uint16, memory-mapped. UserError if it is not a whole shard."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 3)
    except OSError as e:
        raise UserError(f"cannot read the shard {path}: {e.strerror}") from e
    if size < HEADER_BYTES or header[0] != MAGIC or header[1] != VERSION:
        raise UserError(
            f"{path} is not a shard: it should begin with the int32 {MAGIC} and {VERSION}. Prepare it again; "
            "if it is nanoGPT's, bare uint16, put 256 int32 before it: these two, the token count, zeros"
        )
    wanted = HEADER_BYTES + 2 * int(header[2])
    if size != wanted:
        raise UserError(
            f"the shard {path} is damaged: with {header[2]} tokens, as its header says, it would have {wanted} "
            f"bytes, not {size}; delete its folder and prepare it again"
        )
    # The header is mapped, too: a shard without tokens could not be mapped without it.
    return np.memmap(path, "<u2", "r").view(np.ndarray)[HEADER_BYTES // 2 :]


class Shards:
    """The tokens of one split as one stream, memory-mapped. Window w is tokens [w * length, (w + 1) * length)."""

    def __init__(self, folder: Path, split: str, prepare: str):
        """`prepare` is the command that writes the shards, for the error that they are not there."""
        self.folder = folder
        self.split = split
        self.info = read_record(folder)
        again = f"delete {folder} and run {prepare}"
        # An unfinished preparation has no shards to train on yet.
        if self.info:
            entries = self.info["splits"].get(split, {}).get("shards", []) if self.info["finished"] else []
            self.files = [folder / entry["file"] for entry in entries]
        else:  # llm.c's or modded-nanogpt's: the split is a word of the name, so not retrieval_train_0.bin for val
            named = re.compile(rf"([^.].*[^a-z])?{split}(idation)?([^a-z].*)?\.bin")
            self.files = sorted(p for p in folder.glob("*.bin") if named.fullmatch(p.name))
        if not self.files:
            raise UserError(f"no finished {split} shards in {folder}: run {prepare}")
        for path in self.files:
            if not path.exists():
                raise UserError(f"the shard {path} is gone: {again}")
        if self.info:
            check_tokenizer(folder, self.info, again)
        allow_open_files(2 * len(self.files) + 256)  # 2: the validation shards may be as many
        # Opening checks each file's header and size, so that no read is beyond its end.
        self.maps = [map_shard(path) for path in self.files]
        self.starts = np.cumsum([0, *map(len, self.maps)])  # the stream's token at which each shard starts
        self.n_tokens = int(self.starts[-1])

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
        parts = []
        left = stop - start
        while left > 0:
            parts.append(self.maps[shard][at : at + left])
            left -= len(parts[-1])
            shard += 1
            at = 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def windows(self, ids, length: int) -> np.ndarray:
        """Windows `ids` (n,) of `length` tokens each -> (n, length) uint16."""
        starts = np.asarray(ids, np.int64) * length
        # (n,) the shards and offsets at which the windows begin, and the shards in which they end
        first, offset = self.locate(starts)
        last, _ = self.locate(starts + length - 1)
        out = np.empty((len(starts), length), np.uint16)
        places = zip(starts.tolist(), first.tolist(), last.tolist(), offset.tolist(), strict=True)
        for row, (start, shard, end, at) in enumerate(places):
            out[row] = self.maps[shard][at : at + length] if shard == end else self.tokens(start, start + length)
        return out


def check_tokenizer(folder: Path, record: dict, remedy: str) -> None:
    """UserError if the tokenizer.json in a prepared folder is not the one that encoded its shards."""
    path = folder / "tokenizer.json"
    if not path.exists() or sha256_file(path) != record["tokenizer"]["sha256"]:
        raise UserError(f"{path} is not the tokenizer that encoded the shards: {remedy}")


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
    # (n,) each
    epochs, within = np.divmod(np.asarray(positions, np.int64), n_windows)
    out = np.empty_like(within)
    for epoch in np.unique(epochs):
        # Without shuffle_each_epoch, every epoch has the first one's key.
        name = f"{seed} {epoch if shuffle_each_epoch else 0}"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        out[epochs == epoch] = permuted(within[epochs == epoch], n_windows, key)
    return out


class TrainingStream:
    """The endless stream of training windows: the one place where the window of a position is computed.

    data: the shards. section: train_dataset_config. seed: the run's, to which the section's is added.
    """

    def __init__(self, data: Shards, section: DatasetConfig, seed: int):
        self.data = data
        self.n_ctx = section.n_ctx
        self.seed = seed + (section.seed or 0)
        self.shuffle_each_epoch = section.shuffle_each_epoch
        self.n_windows = data.n_tokens // self.n_ctx
        if self.n_windows == 0:
            raise UserError(
                f"the {data.split} data in {data.folder} have {data.n_tokens} tokens, fewer than one window of n_ctx "
                f"{self.n_ctx}: prepare more text, or set a smaller n_ctx"
            )

    def window(self, positions) -> np.ndarray:
        """The windows at `positions` (n,) of the stream -> (n,) int64."""
        return window_order(positions, self.n_windows, self.seed, self.shuffle_each_epoch)

    def read(self, positions) -> np.ndarray:
        """The tokens of the windows at `positions` (n,) of the stream -> (n, n_ctx) uint16."""
        return self.data.windows(self.window(positions), self.n_ctx)


# -----------------------------------------------------------------------------
# sources: rows in a fixed order. rows(place) yields (place after the row, where the row is, row) from a place on, also
# from one that was written as JSON in between


class TextFiles:
    """Rows of local files, in the order given: one a line of .jsonl, one a document of .txt, one a file of .py.

    A place is [file, rows read of it].
    """

    def __init__(self, files: list[Path], column: str):
        self.files = files
        self.column = column
        self.kind = kind_of(files[0])
        self.inline_separators = 0  # lines of a .txt that end with <|endoftext|> after other text

    def rows(self, place=None):
        """Yield (place, where, raw bytes) from `place` on, or from the start."""
        # Reading may begin several times: to count rows, to look at the first ones, and to encode.
        first, skipped = place or (0, 0)
        self.inline_separators = 0
        for i, path in enumerate(self.files[first:], first):
            for at, (line, raw) in enumerate(self.file_rows(path), 1):
                if at > skipped:
                    yield [i, at], f"{path}, line {line}", raw
            skipped = 0

    def file_rows(self, path: Path):
        """Yield (line, raw bytes) of each row of a file."""
        read = {".jsonl": json_lines, ".txt": self.text_documents, ".py": whole_text}[self.kind]
        line = 1
        try:
            with open_bytes(path) as f:
                if f.peek(3)[:3] == codecs.BOM_UTF8:
                    f.read(3)
                for line, raw in read(f):
                    yield line, raw
        # What the decompressors raise when a file is damaged or cut short.
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as e:
            raise UserError(f"cannot read {path} after line {line}: {getattr(e, 'strerror', None) or e}") from e

    def text_documents(self, f):
        """Yield (line, text) of each document between lines that hold <|endoftext|> alone.

        The line break before such a line, or before the end, belongs to the file and not to the document.
        """
        start = 1
        parts = []
        for line, raw in enumerate(f, 1):
            if raw.strip() == b"<|endoftext|>":
                yield start, b"".join(parts).removesuffix(b"\n").removesuffix(b"\r")
                start = line + 1
                parts = []
            else:
                self.inline_separators += raw.rstrip().endswith(b"<|endoftext|>")
                parts.append(raw)
        if parts:
            yield start, b"".join(parts).removesuffix(b"\n").removesuffix(b"\r")


COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": None}


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in lower case, that of the compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def open_bytes(path: Path):
    """A file opened for reading bytes, decompressed by its suffix."""
    suffix = path.suffix.lower()
    if suffix != ".zst":
        return COMPRESSED.get(suffix, open)(path, "rb")
    try:
        import pyarrow
    except ImportError as e:
        raise UserError(f"{path} is decompressed by pyarrow: pip install datasets") from e
    # Not through `datasets`, which fails on the Pile's files: it wants one type for every column.
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 16)


def json_lines(f):
    """Yield (line, its bytes) of each line of `f` that is not blank."""
    for line, raw in enumerate(f, 1):
        if raw.strip():
            yield line, raw


def whole_text(f):
    """Yield the whole of `f` as one document."""
    yield 1, f.read()


class Tables:
    """Rows of one column of what `datasets` streams. A place is [state before a batch, rows read of it, row number]."""

    kind = "value"

    def __init__(self, name: str, column: str, stream, files: list[str]):
        self.name = name
        self.column = column
        self.files = files
        columns = stream.column_names or list(next(iter(stream), {column: None}))
        if column not in columns:
            raise UserError(f"{name} has no column {column} (column_name); found {', '.join(columns)}")
        # Arrow tables: to make Python objects of all rows here would take longer than to encode them in the workers.
        self.stream = stream.select_columns([column]).with_format("arrow")

    def rows(self, place=None):
        """Yield (place, where, value) from `place` on, or from the start."""
        state, skipped, number = place or (None, 0, 0)
        # Every call reads on its own, from its own place.
        stream = copy.copy(self.stream)
        if state:
            stream.load_state_dict(state)
        batches = stream.iter(batch_size=256)
        while True:
            with blame_datasets(f"cannot read {self.name} after row {number}"):
                table = next(batches, None)
            if table is None:
                return
            for at, value in enumerate(arrow_values(table)[skipped:], skipped + 1):
                yield [state, at, number + 1], f"{self.name}, row {number}", value
                number += 1
            skipped = 0
            state = copy.deepcopy(stream.state_dict())  # datasets changes its own as it reads


def arrow_values(table) -> list:
    """The values of an Arrow table of one column: lists of numbers as numpy arrays, all else as Python has it."""
    values = []
    for chunk in table.column(0).chunks:
        if not hasattr(chunk, "offsets"):
            values += chunk.to_pylist()
            continue
        # No list of Python ints is made of ids, which would take twenty times the memory.
        numbers = chunk.values.to_numpy(zero_copy_only=False)
        bounds = chunk.offsets.to_numpy()
        values += [numbers[start:stop] for start, stop in itertools.pairwise(bounds)]
    return values


@contextlib.contextmanager
def blame_datasets(what: str):
    """Turn an error of `datasets`, of the hub or of Arrow, which raise whatever they like, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{what}: {type(e).__name__}: {reason[:400]}") from e


def open_tables(c: DatasetConfig, base: str, files: list[Path]) -> Tables:
    """The split `base` of what `datasets` finds under the name of `c`, which is that of `files` if there are any."""
    try:
        import datasets
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as builders
    except ImportError as e:
        raise UserError(f"{c.name} is read through the datasets library: pip install datasets") from e
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs, in its words, what it also raises
    path = Path(c.name).expanduser().absolute()
    # A path on disk is that path: `datasets` would take a folder called parquet for a file format.
    name = str(path) if path.exists() else c.name
    if name in builders:
        raise UserError(f"{name} is not a dataset but a file format of `datasets`: name the files themselves")
    # `datasets` reads every file name as a pattern.
    escaped = [glob.escape(str(file)) for file in files] or None
    with blame_datasets(f"cannot read {c.name} (split {c.split}, config_name {c.config_name})"):
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(path))
            splits = saved if isinstance(saved, dict) else {"train": saved}
        else:
            name = str(files[0].parent) if files else name
            builder = datasets.load_dataset_builder(name, c.config_name, data_files=escaped, revision=c.revision)
            splits = builder.config.data_files or {base: []}
        if base not in splits:
            raise UserError(f"{c.name} has no split {base}; found {', '.join(map(str, splits))}")
        if not isinstance(splits[base], list):
            return Tables(c.name, c.column_name, splits[base].to_iterable_dataset(), [])
        kind = type(builder).__module__.rpartition(".")[2]
        if kind == "text" and path.exists():
            raise UserError(
                f"{c.name}: `datasets` makes a document of every line of a .txt: name the files, as in *.txt"
            )
        if kind == "parquet":
            # Read this column alone, in small record batches: by default it is all columns and whole row groups.
            builder.config.columns = [c.column_name]
            builder.config.batch_size = 256
        return Tables(c.name, c.column_name, builder.as_streaming_dataset(base), list(splits[base]))


def files_named(c: DatasetConfig) -> list[Path]:
    """The files on disk that `c` names: one, a glob's, those in a folder, the standard library's. None for a hub id."""
    if c.name == "python-stdlib":
        return stdlib_files()
    path = Path(c.name).expanduser().absolute()
    # A path that exists is no pattern.
    if path.is_file():
        return [path]  # whatever characters its name has
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    shards = c.folder().absolute()  # they may lie within the source
    return sorted(p for p in found if p.is_file() and shards not in p.parents and not p.name.startswith("."))


def open_source(c: DatasetConfig):
    """The source that `c` names, and which of its rows: (source, first row, row after the last or None)."""
    base, bounds = parse_split(c.split)
    path = Path(c.name).expanduser()
    files = [] if path.is_dir() else files_named(c)
    # Text is read here, line by line; everything else, folders too, by `datasets`.
    kinds = {kind_of(p) for p in files or [path]}
    if path.is_dir() or not kinds & {".txt", ".jsonl", ".py"}:
        if re.search(r"\.(txt|jsonl)\.\w+$", c.name.lower()):
            raise UserError(
                f"{c.name}: this compression is not read here: decompress it, or use .gz, .xz, .bz2 or .zst"
            )
        source = open_tables(c, base, files)
    elif not files:
        raise UserError(f"no file matches {c.name}")
    elif len(kinds) > 1:
        raise UserError(f"{c.name} names files of several kinds, {', '.join(sorted(kinds))}: name those of one kind")
    elif base != "train":
        raise UserError(f"split {c.split}: {c.name} has one split, train; choose rows with a slice, train[95%:]")
    else:
        source = TextFiles(files, c.column_name)
    total = None
    if any("%" in b or "-" in b for b in bounds):
        # A percentage, or a distance from the end. The rows are counted: what a dataset's card says may be untrue.
        total = sum(1 for _ in source.rows())
    start, stop = row_range(bounds, total)
    if stop is not None and stop <= start:
        raise UserError(f"split {c.split} of {c.name} holds no rows")
    return source, start, stop


def parse_split(spec: str) -> tuple[str, list[str]]:
    """'train[:95%]' -> ('train', ['', '95%']): the base and two bounds. If one is a percentage, both are."""
    compact = re.sub(r"\s|(?<=\d)_(?=\d)", "", spec)
    match = re.fullmatch(r"([\w.-]+?)(?:\[(-?\d{1,18}%?)?:(-?\d{1,18}%?)?\])?", compact)
    # Hugging Face's syntax, with a percentage up to 100.
    if not match or re.search(r"(\d{4,}|[2-9]\d\d|1[1-9]\d|10[1-9])%", compact):
        raise UserError(f"cannot read split {shown(spec)}: write train, train[:95%] (up to 100%) or train[-100:]")
    return match[1], [match[2] or "", match[3] or ""]


def row_range(bounds: list[str], total: int | None):
    """(first row, row after the last or None) of two bounds, rounded and clipped to `total` as Hugging Face does."""
    numbers = [int(b.rstrip("%")) if b else None for b in bounds]
    if total is None:
        return numbers[0] or 0, numbers[1]
    if "%" in bounds[0] + bounds[1]:
        numbers = [n if n is None else round(n * total / 100) for n in numbers]
    return slice(*numbers).indices(total)[:2]


def stdlib_files() -> list[Path]:
    """The interpreter's own library, tests left out, in an order that makes the end as fair a sample as the start."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    # By the hash of its name a file's place is random, but the same on every machine with this Python.
    names = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if p.stat().st_size]
    names = [n for n in names if not left_out & set(n.split("/"))]
    if not names:
        raise UserError(f"python-stdlib: this interpreter has no library in source form at {root}")
    return [root / n for n in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())]


# -----------------------------------------------------------------------------
# encoding: rows -> tokens, in processes of their own


def parse_row(kind: str, column: str, is_tokenized: bool, raw):
    """A row's text, or its ids (n,) if `is_tokenized`. ValueError, in words, if it has none. Null is an empty row."""
    value = raw.decode() if isinstance(raw, bytes) else raw
    if kind == ".jsonl":
        value = json.loads(value)
        if not isinstance(value, dict) or column not in value:
            have = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"no column {column} (column_name); found {have}")
        value = value[column]
    # Tables and JSON have null for a text that is not there.
    if value is None:
        value = [] if is_tokenized else ""
    if not is_tokenized:
        if not isinstance(value, str):
            raise ValueError(f"column {column} holds {type(value).__name__}, not text")
        value.encode()  # raises if there is a lone surrogate
        return value
    ids = np.array(value)
    if ids.shape == (0,):  # numpy makes an empty list one of floats
        ids = ids.astype(np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"column {column} holds no list of token ids (is_tokenized)")
    return ids


def parse_rows(kind: str, column: str, is_tokenized: bool, vocab_size: int, rows) -> list:
    """[(where, raw), ...] -> texts, or ids. UserError, which says where, for the first row that has none."""
    parsed = []
    for where, raw in rows:
        try:
            value = parse_row(kind, column, is_tokenized, raw)
            if is_tokenized and len(value) and not 0 <= value.min() <= value.max() < vocab_size:
                raise ValueError(
                    f"ids from {value.min()} to {value.max()}, but the vocabulary ends at {vocab_size - 1}"
                )
        # ValueError: also broken JSON and broken UTF-8. RecursionError: JSON nested too deep. OverflowError: huge ids.
        except (ValueError, OverflowError, RecursionError) as e:
            raise UserError(f"{where}: {e}") from e
        parsed.append(value)
    return parsed


ENCODER: TextEncoder | None = None  # in a worker: its own, made by begin_work


def begin_work(name: str, data: bytes, eos_token: str) -> None:
    """In a new worker: make its encoder, and end when the parent is gone, even if it was killed."""
    global ENCODER
    # A worker that waits for work would otherwise wait forever once its parent is killed.
    threading.Thread(target=end_with_parent, daemon=True).start()
    settings = json.dumps({"eos_token": eos_token}).encode()
    ENCODER = gpt2_encoder(data) if name == "gpt2" else json_encoder(name, data, settings)


def end_with_parent() -> None:
    """End this worker at once when its parent does: nobody reads what it makes."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_rows(kind: str, column: str, is_tokenized: bool, rows):
    """A worker's task: [(where, raw), ...] -> tokens (n,) uint16; documents, empty rows and bytes of text."""
    parsed = parse_rows(kind, column, is_tokenized, ENCODER.vocab_size, rows)
    texts = ENCODER.decode_batch(parsed) if is_tokenized else parsed
    try:
        ids = parsed if is_tokenized else ENCODER.encode_batch(texts)
    # A bare Exception of the Rust library, such as from a tokenizer without a token for what it does not know.
    except Exception as e:
        raise UserError(f"{rows[0][0]}, or a row after it: the tokenizer {ENCODER.name} cannot encode it: {e}") from e
    lengths = [len(document) for document in ids]
    if not is_tokenized:  # EOS follows each document that is not empty
        lengths = [length + bool(text) for length, text in zip(lengths, texts, strict=True)]
    # Filled with EOS, of which those at the ends of documents remain.
    tokens = np.full(sum(lengths), ENCODER.eos_token_id, np.uint16)
    start = 0
    for document, length in zip(ids, lengths, strict=True):
        tokens[start : start + len(document)] = document
        start += length
    n_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    return tokens, len(lengths) - lengths.count(0), lengths.count(0), n_bytes


def batches(source, start: int, stop: int | None, place=None, read: int = 0):
    """Yield ([(where, raw), ...], place after them, rows read) of rows [start, stop), after `read` rows at `place`.

    A batch ends by its rows alone, so that shards do not depend on the number of workers.
    """
    rows = []
    size = 0
    for after, where, raw in source.rows(place):
        if stop is not None and read >= stop:
            break
        read += 1
        place = after
        if read > start:
            rows.append((where, raw))
            size += len(raw) if hasattr(raw, "__len__") else 1
        if size >= 1 << 19 or len(rows) >= 1024:
            yield rows, place, read
            rows = []
            size = 0
    if rows:
        yield rows, place, read


def encoded(pool, workers: int, source, is_tokenized: bool, todo):
    """Yield (place, rows read, what encode_rows makes) of each batch, in order; few are under way at a time."""
    # Results come in the order of the batches, not in that in which workers finish.
    under_way = deque()
    for rows, place, read in todo:
        future = submit(pool, encode_rows, source.kind, source.column, is_tokenized, rows)
        under_way.append((place, read, future))
        if len(under_way) > 2 * workers:
            place, read, future = under_way.popleft()
            yield place, read, future.result()
    for place, read, future in under_way:
        yield place, read, future.result()


def submit(pool, *task):
    """pool.submit, which may start a worker. One that starts with SIGINT blocked leaves Ctrl-C to its parent."""
    if not hasattr(signal, "pthread_sigmask"):
        return pool.submit(*task)
    # A new process inherits the mask; a Ctrl-C that comes now is delivered after the unblocking.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(*task)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def write_shards(folder: Path, split: str, results, shard_tokens: int, about: dict, save) -> None:
    """Write encoded batches into shards; save() is called when `about` has a new one.

    A shard ends with the batch that brings it to `shard_tokens` or more: no document lies in two.
    """
    from tqdm import tqdm

    shards = about["shards"]
    before = sum(entry["tokens"] for entry in shards)
    bar = tqdm(
        desc=split, unit=" tokens", unit_scale=True, initial=before, mininterval=1 if sys.stderr.isatty() else 30
    )
    with bar:
        for result in results:
            path = folder / f"{split}_{len(shards):06d}.bin"
            counts = np.zeros(4, np.int64)
            with whole_file(path) as f:
                f.write(bytes(HEADER_BYTES))
                while result is not None:
                    place, read, (tokens, *others) = result
                    f.write(tokens.astype("<u2", copy=False).data)
                    counts += [len(tokens), *others]
                    bar.update(len(tokens))
                    result = next(results, None) if counts[0] < shard_tokens else None
                # Only now the number of tokens is known.
                header = np.zeros(256, "<i4")
                header[:3] = MAGIC, VERSION, counts[0]
                f.seek(0)
                f.write(header.data)
            entry = dict(zip(COUNTS, counts.tolist(), strict=True))
            shards.append({"file": path.name, **entry, "sha256": sha256_file(path)})
            about |= {"place": place, "read": read}
            save()


# -----------------------------------------------------------------------------
# preparation

COUNTS = "tokens", "documents", "empty_documents", "bytes"


def asked(c: DatasetConfig) -> dict:
    """What a config says of the source and the tokenizer, as dataset.json's ["source"][split] has it."""
    about = c.model_dump(include={"name", "split", "column_name", "is_tokenized", "revision", "config_name"})
    return about | {"tokenizer": c.hf_tokenizer_path or f"trained, {c.train_tokenizer_vocab_size}"}


def identity(c: DatasetConfig, shard_tokens: int) -> dict:
    """What the bytes of a split depend on, as far as it can be told without reading the source."""
    about = asked(c) | {"shard_tokens": shard_tokens}
    files = files_named(c)
    if files:
        about["names_and_sizes"] = digest([[p.name, p.stat().st_size] for p in files])
    # A file's content may change under the same name.
    if c.hf_tokenizer_path and tokenizer_file(c.hf_tokenizer_path).is_file():
        about["tokenizer_sha256"] = sha256_file(tokenizer_file(c.hf_tokenizer_path))
    return about


def digest(value) -> str:
    """The sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def found_in(folder: Path, configs: dict[str, DatasetConfig], shard_tokens: int) -> dict:
    """What was prepared of `configs` in `folder`, or {} if no shard is finished. UserError if it holds other data."""
    record = read_record(folder)
    entries = [entry for about in record.get("splits", {}).values() for entry in about["shards"]]
    if not record:
        for path in (*folder.glob("*.bin"), *folder.glob("tokenizer*.json")):
            raise UserError(f"{path} was not written by a preparation: choose another path")
    # Nothing is lost by beginning anew, with whatever source and config there are now.
    if not entries:
        return {}
    # What is gone by now, such as the source of a finished folder, is not compared.
    here = {split: identity(c, shard_tokens) for split, c in configs.items()}
    there = {split: {k: about.get(k) for k in here.get(split, about)} for split, about in record["source"].items()}
    differ = differences(there, here)
    if differ:
        raise UserError(
            f"{folder} was prepared from another config: {'; '.join(differ)}; choose another path or delete {folder}"
        )
    again = f"delete {folder} and prepare it again"
    check_tokenizer(folder, record, again)
    for entry in entries:
        path = folder / entry["file"]
        whole = path.exists() and path.stat().st_size == HEADER_BYTES + 2 * entry["tokens"]
        if not whole or (not record["finished"] and sha256_file(path) != entry["sha256"]):
            raise UserError(f"the shard {path} is gone or has changed since it was written: {again}")
    return record


def prepare(sections: dict[str, DatasetConfig], model_vocab_size: int | None, workers: int, shard_tokens: int) -> None:
    """Write the shards of all sections, each into its folder; what is there already is left alone."""
    # train and val share a folder, unless their config says otherwise.
    folders = {}
    for split, c in sections.items():
        folders.setdefault(c.folder(), {})[split] = c
    found = {folder: found_in(folder, configs, shard_tokens) for folder, configs in folders.items()}
    for folder, record in found.items():
        if record.get("finished"):
            print(f"{folder} is already prepared")
            del folders[folder]
    if not folders:
        return
    # All that can be wrong with the first rows and the tokenizer is found before anything is written.
    opened = {split: open_source(c) for configs in folders.values() for split, c in configs.items()}
    c = sections["train"]
    encoder = load_encoder(c.hf_tokenizer_path) if c.hf_tokenizer_path else None
    vocab_size = encoder.vocab_size if encoder else c.train_tokenizer_vocab_size
    if model_vocab_size is not None and model_vocab_size < vocab_size:
        raise UserError(f"model.vocab_size {model_vocab_size} is smaller than the tokenizer's: set it to {vocab_size}")
    # The first batch of each split is looked at: a wrong column or kind of row is wrong from the start.
    for split, (source, start, stop) in opened.items():
        rows, _, _ = next(batches(source, start, stop), ([], None, 0))
        parsed = parse_rows(source.kind, source.column, sections[split].is_tokenized, vocab_size, rows)
        if not any(map(len, parsed)) and len(rows) < 1024:
            hint = "; in a .txt, lines that hold <|endoftext|> alone stand between documents" * (source.kind == ".txt")
            raise UserError(f"{sections[split].name} holds no text in split {sections[split].split}{hint}")
    if encoder is None:
        encoder = trained_encoder(c, *opened["train"], found[c.folder()])
    # Spawned workers, on every platform: a fork would copy threads and locks of this process.
    spawn = multiprocessing.get_context("spawn")
    parts = encoder.name, encoder.json, encoder.eos_token
    pool = ProcessPoolExecutor(workers, spawn, initializer=begin_work, initargs=parts)
    try:
        for folder, configs in folders.items():
            prepare_folder(folder, configs, opened, encoder, pool, workers, shard_tokens)
    except KeyboardInterrupt:
        # A second Ctrl-C while the workers end would leave the pool's threads waiting for each other.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def trained_encoder(c: DatasetConfig, source, start: int, stop: int | None, found: dict) -> TextEncoder:
    """The byte-level BPE trained on the rows of the train split, or the one that an interrupted preparation trained."""
    if found:
        return json_encoder("trained here", (c.folder() / "tokenizer.json").read_bytes())
    print(f"training a byte-level BPE of {c.train_tokenizer_vocab_size} tokens", file=sys.stderr)
    parsed = (parse_rows(source.kind, source.column, False, 0, rows) for rows, _, _ in batches(source, start, stop))
    return json_encoder("trained here", train_bpe(parsed, c.train_tokenizer_vocab_size))


def prepare_folder(folder: Path, configs, opened, encoder, pool, workers: int, shard_tokens: int) -> None:
    """Write the tokenizer and the shards of the splits in `configs`, or go on where an interrupted preparation was.

    dataset.json is written again after each shard. A kill leaves at most a shard that it does not list yet, and which
    is written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder, "preparing", wait=True)
    record = found_in(folder, configs, shard_tokens)  # again: another process may have been at work until now
    if record.get("finished"):
        print(f"{folder} is already prepared")
        return
    tokenizer = {"name": encoder.name, "sha256": hashlib.sha256(encoder.json).hexdigest()}
    tokenizer |= {"vocab_size": encoder.vocab_size, "eos_token_id": encoder.eos_token_id}
    modified = {}
    for split, c in configs.items():
        # A source written to in between would be mixed of two versions: its size alone may not tell.
        times = [p.stat().st_mtime_ns for p in files_named(c)]
        # The hub's addresses hold the commit.
        modified[split] = digest([times, [str(f) for f in opened[split][0].files if "://" in str(f)]])
    if not record:
        record = {"source": {split: identity(c, shard_tokens) for split, c in configs.items()}, "tokenizer": tokenizer}
        record |= {
            "splits": {split: {"shards": [], "place": None, "read": 0} for split in configs},
            "modified": modified,
            "finished": False,
        }
    differ = differences(record["tokenizer"], tokenizer)
    if differ or modified != record["modified"]:
        what = "; ".join(differ) or "its files were written to"
        raise UserError(f"the source or the tokenizer changed since {folder} was begun: {what}; delete {folder}")

    def save():
        write_text(folder / "dataset.json", json.dumps(record, indent=1) + "\n")

    save()  # first of all: it tells that the rest of the folder is ours
    with whole_file(folder / "tokenizer.json") as f:
        f.write(encoder.json)
    write_text(folder / "tokenizer_config.json", tokenizer_config(encoder.eos_token, for_transformers=True))
    for split, c in configs.items():
        source, start, stop = opened[split]
        about = record["splits"][split]
        todo = batches(source, start, stop, about["place"], about["read"])
        results = encoded(pool, workers, source, c.is_tokenized, todo)
        write_shards(folder, split, results, shard_tokens, about, save)
        for key in COUNTS:
            about[key] = sum(entry[key] for entry in about["shards"])
        print(f"{folder}: {split} has {about['tokens']:,} tokens of {about['documents']:,} documents")
        if getattr(source, "inline_separators", 0):
            print(
                f"note: {source.inline_separators:,} lines of {c.name} end with <|endoftext|> after other text. They "
                "are text: only a line that holds it alone stands between two documents"
            )
    # The source may change from now on. How often the preparation was interrupted leaves no trace.
    for about in record["splits"].values():
        del about["place"], about["read"]
    del record["modified"]
    record["finished"] = True
    save()
    if lock:
        lock.release()


# -----------------------------------------------------------------------------
# looking at what was prepared


def verify(folder: Path, prepare: str) -> None:
    """Read again all that dataset.json vouches for; UserError names the first file that is not what it was."""
    info = read_record(folder)
    if not info:
        raise UserError(f"{folder} is not prepared: run {prepare}")
    for split, about in info["splits"].items():
        data = Shards(folder, split, prepare)
        for path, entry in zip(data.files, about["shards"], strict=True):
            if sha256_file(path) != entry["sha256"]:
                raise UserError(f"the shard {path} has changed since it was written: delete {folder} and run {prepare}")
        print(f"{folder}: {split} is sound, {data.n_tokens:,} tokens in {len(data.files)} shards")


def peek(folder: Path, split: str, n: int, prepare: str) -> None:
    """Print the first n documents of a split as a model sees them: the text of their ids."""
    data = Shards(folder, split, prepare)
    if not data.info:
        raise UserError(f"{folder} has no dataset.json, which says where documents end: run {prepare}")
    tok = text_tokenizer((folder / "tokenizer.json").read_bytes())
    # The first documents are in the first tokens; the rest of a large split is not read.
    tokens = data.tokens(0, min(data.n_tokens, 1 << 24))
    ends = np.flatnonzero(tokens == data.info["tokenizer"]["eos_token_id"])[:n] + 1
    documents = np.split(tokens[: ends[-1]] if len(ends) else tokens, ends[:-1])
    for i, ids in enumerate(documents, 1):
        print(f"--- {split} document {i}: {len(ids)} ids\n{tok.decode(ids.tolist(), skip_special_tokens=False)}")


def available_cpus() -> int:
    """How many cores this process may use: its share of the machine, such as one that taskset or SLURM gave it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ModelVocabulary(Section):
    """The one key of the section `model` that concerns the data."""

    model_config = pydantic.ConfigDict(extra="ignore")
    vocab_size: int | None = Field(None, ge=1, description="the number of ids")


def main() -> None:
    parser = argparse.ArgumentParser(description="Text or tokens in, shards out.")
    parser.add_argument("config", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train_dataset_config.name=my.txt")
    parser.add_argument(
        "--workers", type=int, default=available_cpus(), help="processes to encode (default: all cores)"
    )
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in a shard (default: 100M)")
    parser.add_argument("--verify", action="store_true", help="read again what was prepared, and name what is wrong")
    parser.add_argument("--peek", type=int, metavar="N", help="print the first N documents of each split, decoded")
    args = parser.parse_intermixed_args()
    # An ASCII console shows other letters as backslash escapes.
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="backslashreplace")
    try:
        run(args)
    except UserError as e:
        sys.exit(f"prepare_data: {e}")
    except OSError as e:
        what = f"{e.filename or 'the disk'}: {e.strerror}"
        sys.exit(f"prepare_data: {what}; once that is mended, the same command goes on")
    except KeyboardInterrupt:
        print("\nprepare_data: interrupted; the same command goes on after the last finished shard", file=sys.stderr)
        sys.exit(130)


def run(args) -> None:
    """Do what the command line says."""
    if min(args.workers, args.shard_tokens, 1 if args.peek is None else args.peek) < 1:
        raise UserError("--workers, --shard-tokens and --peek must be at least 1")
    if args.shard_tokens >= 2**30:
        raise UserError(
            f"--shard-tokens {args.shard_tokens}: at most {2**30 - 1}, since a shard's header counts to 2**31"
        )
    config = read_config(args.config, args.overrides)
    sections = dataset_configs(config)
    command = f"python prepare_data.py {args.config}"
    if args.verify:
        for folder in dict.fromkeys(c.folder() for c in sections.values()):
            verify(folder, command)
    elif args.peek:
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may stop reading
        for split, c in sections.items():
            peek(c.folder(), split, args.peek, command)
    else:
        model = validated(ModelVocabulary, config.get("model") or {}, "model.")
        prepare(sections, model.vocab_size, args.workers, args.shard_tokens)


if __name__ == "__main__":
    main()
