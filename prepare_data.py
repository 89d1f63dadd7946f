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
import contextlib
import dataclasses
import difflib
import functools
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
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
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
    """YAML as a config needs it: no duplicate keys, dates as text, and 1e5 and 3e-4 as numbers."""

    def construct_mapping(self, node, deep=False):
        # YAML's own loader silently takes the last of two equal keys.
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"it has the key {key} twice in one section")
        return super().construct_mapping(node, deep)


# `run_dir: 2026-01-01` names a folder.
ConfigLoader.add_constructor("tag:yaml.org,2002:timestamp", ConfigLoader.construct_yaml_str)
# YAML 1.1 requires a point and a sign in a number, and so reads 3e-4 as text.
ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), "-+0123456789"
)


def load_yaml(text: str):
    """The value of a YAML text. Raises what the library raises, or ValueError."""
    # A few aliases are convenient; many of them, nested, expand to more than any memory holds.
    if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) > 20:
        raise ValueError("it has more than 20 aliases")
    return yaml.load(text, ConfigLoader)


def read_config(path, overrides=()) -> dict:
    """The YAML mapping at `path` with overrides ["key.key=value", ...] applied. UserError if it cannot be read."""
    with blame(f"cannot read {path} as a YAML config"):
        config = load_yaml(local(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UserError(f"the config {path} must hold a mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{shown(override)} is not an override: write key=value, such as model.n_layer=4")
        # The value is YAML as in the file: 3, null, [1, 2] and true mean the same in both.
        with blame(f"cannot read the value of {shown(override)} as YAML"):
            config = replaced(config, key, load_yaml(value))
    return two_sections(config) if "data" in config else config


def replaced(section, key: str, value):
    """`section` with `value` at `key`, such as "model.n_layer"; sections that are missing are created."""
    first, dot, rest = key.partition(".")
    section = section if isinstance(section, dict) else {}
    return section | {first: replaced(section.get(first), rest, value) if dot else value}


def local(name) -> Path:
    """A path as the user wrote it, with ~ expanded."""
    return Path(os.path.expanduser(name))


def shown(value) -> str:
    """A value for a message, in about 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        text = "a number of too many digits"
    return text if len(text) <= 64 else f"{text[:60]}..."


def in_short(error: Exception) -> str:
    """Another library's error in one line: its messages may have many."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


@contextlib.contextmanager
def blame(what: str):
    """Turn an error of a library, which may raise errors of any kind, into a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what} ({in_short(e)})") from e


def flat(value, prefix: str = "") -> dict:
    """{"a": {"b": [1, 2]}} -> {"a.b.0": 1, "a.b.1": 2}; `prefix` is put before each key."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    out = {}
    for name, inner in value.items():
        out |= flat(inner, f"{prefix}{name}.")
    return out


def differences(there: dict, here: dict, ignored=(), begin="") -> list[str]:
    """["a.b 1 there, 2 here", ...]: the keys in which two mappings, with or without sections, do not agree.

    Only keys that begin with `begin`, or with one of several such texts, are compared; those in `ignored` are not.
    """
    there = flat(there)
    here = flat(here)
    # A key that one side lacks counts as null there.
    keys = [k for k in there | here if k.startswith(begin) and k not in ignored and there.get(k) != here.get(k)]
    return [f"{k} {shown(there.get(k))} there, {shown(here.get(k))} here" for k in keys]


def check_same(there: dict, here: dict, complaint: str, ignored=(), begin=""):
    """UserError, which begins with `complaint` and names the keys, if two mappings do not agree."""
    if differ := differences(there, here, ignored, begin):
        raise UserError(f"{complaint}: {'; '.join(differ)}")


# -----------------------------------------------------------------------------
# checking a config


class Section(pydantic.BaseModel):
    """A section of the YAML. Its fields are the keys; unknown keys, infinities and NaN are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
        None, min_length=1, description="gpt2, a hub id, a tokenizer.json or its folder; val takes train's"
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
            return local(self.path)
        # Two tokenizers get two folders, also where both files are called tokenizer.json.
        tokenizer = self.hf_tokenizer_path or f"bpe{self.train_tokenizer_vocab_size}"
        parts = [self.name, self.config_name, tokenizer]
        return Path("data") / re.sub(r"[^\w.-]+", "-", "-".join(filter(None, parts))).strip("-.")


def validated(cls, values, where: str = ""):
    """An instance of `cls`, a Section or a dataclass, made of the mapping `values`.

    Raises UserError, one sentence, if a key is unknown, missing, of another type or out of bounds. `where` is put
    before the key in the message, such as "model.".
    """
    # The dataclasses of models.py, which do not import pydantic, get the rules of a Section here. A Section has them.
    cls.__pydantic_config__ = Section.model_config
    adapter = pydantic.TypeAdapter(cls)
    try:
        result = adapter.validate_python(values)
    except pydantic.ValidationError as e:
        # The last error, since unknown keys come last: one of them is often a missing key, misspelled.
        raise UserError(where + sentence(cls, e.errors()[-1])) from e
    # pydantic accepts true as the number 1, "yes" as true, integers of any size, and text that neither file names nor
    # JSON can hold: with NUL bytes or lone surrogates.
    given = flat(values)
    for key, value in flat(adapter.dump_python(result)).items():
        typed = given.get(key, value)
        is_huge = isinstance(value, int) and abs(value) >= 2**63
        is_odd = isinstance(value, str) and re.search("[\0\ud800-\udfff]", value)
        if is_huge or is_odd or isinstance(typed, bool) != isinstance(value, bool):
            raise UserError(f"{where}{key} cannot be {shown(typed)}")
    return result


def sentence(cls, error: dict) -> str:
    """A pydantic error about a `cls` in one sentence that begins with the key."""
    name = ".".join(f"{part}"[:60] for part in error["loc"])
    keys = getattr(cls, "model_fields", None) or cls.__dataclass_fields__
    # pydantic's names for an unknown key, in models and in dataclasses.
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(name, keys, n=1, cutoff=0)
        return f"{name} is an unknown key; the nearest valid key is {near[0]}"
    # The description tells what the user has to decide on.
    if error["type"] == "missing":
        return f"{name} is missing: {getattr(keys.get(name), 'description', 'it has no default')}"
    if error["type"] == "value_error":
        return f"{name} {error['ctx']['error']}".strip()
    return f"{name}: {error['msg']}, not {shown(error['input'])}"


SECTIONS = "train_dataset_config", "val_dataset_config"


def dataset_configs(raw: dict) -> dict:
    """{"train": ..., "val": ...} from a config; val takes train's tokenizer, and its path if the names agree."""
    # train.py refuses every unknown key; here the other keys of a run's config are not known.
    for key in raw.keys() - SECTIONS:
        if near := difflib.get_close_matches(f"{key}", SECTIONS, cutoff=0.8):
            raise UserError(f"{key} is an unknown key; the nearest valid key is {near[0]}")
    train, val = (validated(DatasetConfig, raw.get(name, {}), f"{name}.") for name in SECTIONS)
    keys = {"hf_tokenizer_path", "train_tokenizer_vocab_size"}
    taken = train.model_dump(include=keys, exclude_none=True)
    if len(taken) != 1:
        raise UserError("train_dataset_config must set one of hf_tokenizer_path and train_tokenizer_vocab_size")
    if val.model_dump(include=keys, exclude_none=True) not in ({}, taken):
        raise UserError("val_dataset_config must leave out the tokenizer, or have train's")
    if val.path is None and val.name == train.name:
        taken["path"] = train.path
    val = val.model_copy(update=taken)
    # It is trained on text, and kept beside its shards.
    if train.train_tokenizer_vocab_size and (train.is_tokenized or val.folder() != train.folder()):
        raise UserError("train_tokenizer_vocab_size needs the same path for train and val, and is_tokenized false")
    return {"train": train, "val": val}


# param-decomp has one section `data` in place of our two, with these names for keys that it shares with them. Where
# there are data_files, dataset_name is only their format.
PARAM_DECOMP_KEYS = {
    "dataset_name": "name",
    "data_files": "name",
    "tokenizer_name": "hf_tokenizer_path",
    "max_seq_len": "n_ctx",
}


def two_sections(config: dict) -> dict:
    """A config with param-decomp's section `data` as one with the two sections that it means."""
    data = config.pop("data")
    if not isinstance(data, dict) or config.keys() & SECTIONS:
        raise UserError(
            "data must be param-decomp's section, without train_dataset_config or val_dataset_config beside it"
        )
    data.pop("buffer_size", None)  # it shuffles within a buffer, where every order here is a permutation
    # Keys without a name of ours stay, and are refused with the section that they end up in.
    for theirs, ours in PARAM_DECOMP_KEYS.items():
        if (value := data.pop(theirs, None)) is not None:
            data[ours] = value
    train = {"split": data.pop("train_split", "train")}
    val = {"split": data.pop("eval_split", "val")}
    return config | {"train_dataset_config": data | train, "val_dataset_config": data | val}


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
            # Without this, a power failure could leave the new name with half of the content. If the failure undoes
            # the rename, the older file is still there, and whole.
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str):
    """Write a small file, whole or not at all."""
    with whole_file(path) as f:
        f.write(text.encode())


def write_json(path: Path, value):
    """Write a small JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, default):
    """The value in a JSON file; `default` if there is no such file."""
    return json.loads(path.read_bytes()) if path.exists() else default


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hold(folder: Path, doing: str, wait: bool = False):
    """Hold `folder`, made if needed, for this process until the `with` block of the result, or the process, ends.

    If another process holds it, raises UserError, or waits if `wait`. Where the file system has no locks, the result
    holds nothing. The lock file is never deleted: otherwise two processes could each lock a file of this name.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    # A lock of the operating system: it ends with the process, even if that is killed.
    lock = filelock.FileLock(folder / ".lock")
    busy = f"another process is {doing} {folder}"
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout as e:
        if not wait:
            raise UserError(f"{busy}: wait until it ends, or choose another folder") from e
        # Say what this process waits for.
        print(f"{busy}: waiting for it", file=sys.stderr)
        return lock.acquire()
    except (OSError, NotImplementedError):
        # Lustre without its flock option, FUSE and NFS without a lock service: nothing can be held there.
        return contextlib.nullcontext()


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
    encode_batch: Callable  # list of texts -> list of id sequences, without any special token
    decode_batch: Callable  # list of lists of ids -> list of texts


def load_encoder(name: str) -> TextEncoder:
    """The tokenizer `gpt2`, at a hub id, in a tokenizer.json, or in a folder with one. UserError if there is none."""
    if name == "gpt2":
        return gpt2_encoder()
    path = tokenizer_file(name)
    # What is on disk comes first, so that no network is needed.
    if path.suffix != ".json":
        from huggingface_hub import snapshot_download

        with blame(
            f"the hub has no tokenizer {name}, or no network: set hf_tokenizer_path to a tokenizer.json on disk"
        ):
            path = tokenizer_file(snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer_config.json"]))
    # transformers saves this file beside tokenizer.json; it names the EOS where there are several candidates.
    beside = path.with_name("tokenizer_config.json")
    with blame(f"cannot read {beside}"):
        eos = read_json(beside, {}).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
    return json_encoder(name, path.read_bytes(), [eos] if eos else EOS_NAMES)


def tokenizer_file(name: str) -> Path:
    """Where the tokenizer `name` is, if it is on disk."""
    path = local(name)
    return path / "tokenizer.json" if path.is_dir() else path


def json_encoder(name: str, data: bytes, eos_names=EOS_NAMES) -> TextEncoder:
    """A tokenizer from the bytes of its tokenizer.json; the first of `eos_names` that it knows ends a document."""
    with blame(f"{name} is not a tokenizer.json that the tokenizers library can read"):
        tok = text_tokenizer(data)
        vocab = tok.get_vocab()
    # text_tokenizer may have renamed it.
    known = [token for eos in eos_names for token in (eos, HIDDEN + eos) if token in vocab]
    if not known:
        raise UserError(f"the tokenizer {name} has no end-of-sequence token: looked for {', '.join(eos_names)}")
    vocab_size = max(vocab.values()) + 1
    if vocab_size > 65536:
        raise UserError(f"the tokenizer {name} has {vocab_size} ids, but a shard's uint16 holds 65536")

    def encode_batch(texts):
        return [e.ids for e in tok.encode_batch_fast(texts, add_special_tokens=False)]

    eos = known[0]
    return TextEncoder(name, data, vocab_size, vocab[eos], eos.removeprefix(HIDDEN), encode_batch, tok.decode_batch)


# Of a tokenizer.json: documents are encoded whole, and EOS is added here and not by the tokenizer.
TEXT_ONLY = {"truncation": None, "padding": None, "post_processor": None}


def text_tokenizer(data: bytes):
    """The tokenizers.Tokenizer of a tokenizer.json, for text as a model is trained on it.

    Nothing is cut, padded or added, and no special token is read out of text: '[EOS]' in a document is text. It
    decodes every id; pass skip_special_tokens=False to see the special ones.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are ours, a batch of documents each
    from tokenizers import Tokenizer

    spec = json.loads(data.decode()) | TEXT_ONLY
    model = spec["model"]
    model.pop("dropout", None)  # it would leave out merges at random
    if "merges" not in model or model.get("ignore_merges"):
        spec = hide_special_words(spec)
    tok = Tokenizer.from_str(json.dumps(spec))
    # Added tokens that are special are matched before the model sees the text, unless this is set.
    tok.encode_special_tokens = True
    return tok


def hide_special_words(spec: dict) -> dict:
    """Rename special tokens for a model that looks words up: '</s>' would be one of its words.

    (A BPE with merges cannot produce such words.) The decoder removes the added part of the name again.
    """
    text = json.dumps(spec)
    for token in spec["added_tokens"]:
        if token["special"]:
            # Also in the model's vocabulary, and as its unk_token.
            text = text.replace(json.dumps(token["content"]), json.dumps(HIDDEN + token["content"]))
    spec = json.loads(text)
    spaces = {"type": "WordPiece", "prefix": HIDDEN, "cleanup": False}  # decodes as a tokenizer without a decoder does
    replace = {"type": "Replace", "pattern": {"String": HIDDEN}, "content": ""}
    spec["decoder"] = {"type": "Sequence", "decoders": [replace, spec["decoder"] or spaces]}
    return spec


def gpt2_encoder(data: bytes = b"") -> TextEncoder:
    """tiktoken's gpt2: the ids of the hub's gpt2, several times faster. data: its tokenizer.json, if known."""
    import tiktoken
    from tiktoken.load import read_file_cached
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    files = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    with blame(
        "tiktoken cannot download its gpt2 files: set TIKTOKEN_CACHE_DIR, or hf_tokenizer_path to a file on disk"
    ):
        enc = tiktoken.get_encoding("gpt2")  # which checks the files and keeps them
        if not data:
            # The hub's tokenizer.json of gpt2 is made of these same two files.
            vocab = json.loads(read_file_cached(f"{files}encoder.json"))
            merges = read_file_cached(f"{files}vocab.bpe").decode().splitlines()[1:]
            tok = Tokenizer(models.BPE(vocab, [tuple(line.split()) for line in merges]))
            tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tok.decoder = decoders.ByteLevel()
            tok.add_special_tokens(["<|endoftext|>"])
            data = tok.to_str().encode()

    def encode_batch(texts):
        return [enc.encode_to_numpy(t, disallowed_special=()) for t in texts]

    return TextEncoder("gpt2", data, enc.n_vocab, enc.eot_token, "<|endoftext|>", encode_batch, enc.decode_batch)


def train_bpe(source) -> bytes:
    """The tokenizer.json of a byte-level BPE trained on the rows of a split."""
    from tokenizers import ByteLevelBPETokenizer

    c = source.section
    size = c.train_tokenizer_vocab_size
    print(f"training a byte-level BPE of {size} tokens", file=sys.stderr)
    # All 256 bytes will be in the vocabulary, so that it can spell any text.
    tok = ByteLevelBPETokenizer()
    tok.post_processor = None  # it would only trim offsets
    tok.add_special_tokens(["<|endoftext|>"])  # so that no merge is learned from it where it stands in text
    texts = (parse_rows(c, source.kind, 0, rows) for rows, _ in batches(source))
    tok.train_from_iterator(texts, size, min_frequency=0, show_progress=False, special_tokens=["<|endoftext|>"])
    return tok.to_str().encode()


def tokenizer_config(eos_token: str, **more) -> str:
    """The text of a tokenizer_config.json, with which transformers loads the tokenizer.json beside it.

    more: its further keys. With split_special_tokens=True special tokens in text are split, as in training. Without it
    they are recognized, for SPD and param-decomp, which join documents with the EOS as text.
    """
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token, "pad_token": eos_token}
    return json.dumps(settings | more) + "\n"


# -----------------------------------------------------------------------------
# reading shards

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


def read_record(folder: Path) -> dict:
    """What `folder`/dataset.json holds, {} if there is none. UserError if it, or the tokenizer, is damaged."""
    path = folder / "dataset.json"
    if not path.exists():
        return {}
    with blame(f"{path} is damaged: delete {folder} and prepare it again"):
        record = json.loads(path.read_text())
        # The tokenizer is written before the first shard.
        if record["finished"] or record["splits"]:
            check_files(folder, [{"file": "tokenizer.json"} | record["tokenizer"]])
        return record


def shard_length(path: Path) -> int:
    """The number of tokens in a shard. UserError if it is not a whole one."""
    wanted = [MAGIC, VERSION, (path.stat().st_size - HEADER_BYTES) / 2]
    header = np.fromfile(path, "<i4", 3).tolist()
    if header != wanted:
        raise UserError(
            f"{path} is not a whole shard: its first three int32 are {header}, not {wanted}. Prepare it again, or, if "
            "it is nanoGPT's bare uint16, put those three and 253 zeros in front"
        )
    return header[2]


class Shards:
    """The tokens of one split as one stream, memory-mapped. Window w is tokens [w * length, (w + 1) * length)."""

    def __init__(self, folder: Path, split: str, config):
        """`config` is the path of the YAML that prepares the shards, for the error that they are not there."""
        self.folder = folder
        self.split = split
        self.info = read_record(folder)
        self.entries = self.info.get("splits", {}).get(split, {}).get("shards", [])  # of dataset.json
        self.files = [folder / entry["file"] for entry in self.entries]
        if not self.info:
            # llm.c's or modded-nanogpt's: the split is a word of the name, so not retrieval_train_0.bin for val.
            named = re.compile(rf"([^.].*[^a-z])?{split}(idation)?([^a-z].*)?\.bin")
            self.files = sorted(p for p in folder.glob("*.bin") if named.fullmatch(p.name))
        # An unfinished preparation has no shards to train on yet.
        if not self.files or not self.info.get("finished", True):
            raise UserError(f"no finished {split} shards in {folder}: run python prepare_data.py {config}")
        # The token of the stream at which each shard starts.
        self.starts = np.cumsum([0, *map(shard_length, self.files)], dtype=np.int64)
        self.n_tokens = int(self.starts[-1])
        # A memory map keeps its file open, and a process may open only some hundreds: the cache holds 128 maps.
        self.shard = functools.lru_cache(self.map_shard)

    def map_shard(self, i: int) -> np.ndarray:
        """The tokens of shard i, (n,) uint16, memory-mapped."""
        return np.memmap(self.files[i], "<u2", "r", offset=HEADER_BYTES).view(np.ndarray)

    def fingerprint(self) -> tuple[str, str]:
        """(name, sha256) of what identifies these data: dataset.json, or the names and lengths of foreign shards."""
        path = self.folder / "dataset.json"
        if self.info:
            return str(path), sha256_file(path)
        return f"{self.folder}/*{self.split}*.bin", digest([[p.name for p in self.files], self.starts.tolist()])

    def locate(self, tokens):
        """(shards, offsets in tokens) of the stream's tokens number `tokens`, an int or an array of them."""
        shards = np.searchsorted(self.starts, tokens, side="right") - 1
        return shards, tokens - self.starts[shards]

    def windows(self, ids, length: int) -> np.ndarray:
        """Windows `ids` (n,) of `length` tokens each -> (n, length) uint16. One may lie in several shards."""
        starts = np.asarray(ids, np.int64) * length
        out = np.empty((len(starts), length), np.uint16)
        for rest, at in zip(out, starts):
            while len(rest):
                shard, offset = self.locate(at)
                part = self.shard(shard)[offset : offset + len(rest)]
                # A copy: as a part of the map it would keep the file open.
                rest[: len(part)] = part
                rest = rest[len(part) :]
                at += len(part)
        return out


def check_files(folder: Path, entries: list[dict]):
    """UserError if a file in a prepared folder is missing, or not the one that its entry in dataset.json describes."""
    for entry in entries:
        path = folder / entry["file"]
        if not path.exists() or sha256_file(path) != entry["sha256"]:
            raise UserError(f"{path} is missing or has changed: restore it, or delete {folder} and prepare it again")


# -----------------------------------------------------------------------------
# order: which window stands at position p of the endless training stream


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64s so that each bit of the result depends on each bit of x (splitmix64's finaliser)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def permuted(x: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where the permutation of range(n) number `key` (64 bits) sends each of x; computed, without a table of n.

    Swap-or-not (Hoang, Morris, Rogaway 2012): each round pairs every element with its mirror image about a keyed
    point, and a keyed coin, the same for both, swaps the two or not. So every round is a permutation, of any n, and
    after some 6 log2(n) of them it looks like a random one.
    """
    x = x.astype(np.uint64)  # an unsigned array stays one when it meets Python's integers
    rounds = 6 * max(8, n.bit_length())
    keys = mix(key + np.arange(1, 2 * rounds + 1, dtype=np.uint64) * 0x9E3779B97F4A7C15)
    for pivot, coin in zip(keys[:rounds] % n, keys[rounds:]):
        mirror = (pivot - x + n) % n  # + n: an unsigned number is never negative
        swap = mix(np.maximum(x, mirror) ^ coin) & 1
        x = np.where(swap, mirror, x)
    return x


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
        out[epochs == epoch] = permuted(within[epochs == epoch], int(n_windows), key)
    return out


class TrainingStream:
    """The endless stream of training windows: the one place where the window of a position is computed.

    data: the shards. section: train_dataset_config. seed: the run's, to which the section's is added.
    """

    def __init__(self, data: Shards, section: DatasetConfig, seed: int):
        self.data = data
        self.n_ctx = section.n_ctx
        self.shuffle_each_epoch = section.shuffle_each_epoch
        self.seed = seed + (section.seed or 0)
        self.n_windows = data.n_tokens // self.n_ctx
        if self.n_windows == 0:
            raise UserError(
                f"the {data.split} data in {data.folder} hold fewer tokens than a window of n_ctx {self.n_ctx}: "
                "prepare more text, or set a smaller n_ctx"
            )

    def positions(self, update: int, batch_size: int) -> np.ndarray:
        """The positions (batch_size,) in the stream that update 1, 2, ... reads."""
        return np.arange((update - 1) * batch_size, update * batch_size)

    def window(self, positions) -> np.ndarray:
        """The windows at `positions` (n,) of the stream -> (n,) int64."""
        return window_order(positions, self.n_windows, self.seed, self.shuffle_each_epoch)

    def read(self, positions) -> np.ndarray:
        """The tokens of the windows at `positions` (n,) of the stream -> (n, n_ctx) uint16."""
        return self.data.windows(self.window(positions), self.n_ctx)


# -----------------------------------------------------------------------------
# sources: rows in a fixed order

SEPARATOR = b"<|endoftext|>"
SEPARATORS = "in a .txt, documents are separated by lines that hold only <|endoftext|>"
START = (0, 0, 0)  # the place before the first row


@dataclasses.dataclass
class Source:
    """The rows of one split of a dataset, in a fixed order that can be resumed at any place.

    A part is a file, or a stream of `datasets`. A place is (rows read, part, number of the last row in it).
    """

    section: DatasetConfig
    kind: str  # of READERS
    parts: list  # files, or streams
    files: tuple = ()  # what `datasets` found: the hub's addresses hold the commit
    wanted: range = range(sys.maxsize)  # the rows of the split that are asked for

    def rows(self, place=START):
        """Yield (place, (name of the part, number, raw)) of each row of the split after `place`."""
        read, first, last = place
        for i, part in enumerate(self.parts[first:], first):
            name = f"{self.section.name}, part {i}" if self.kind == "stream" else str(part)
            with blame(f"cannot read {name}"), opened(part) as f:
                for number, raw in READERS[self.kind](f, self.section.column_name):
                    if (i, number) <= (first, last):
                        continue
                    if read == self.wanted.stop:
                        return
                    read += 1
                    if read > self.wanted.start:
                        yield (read, i, number), (name, number, raw)


def json_lines(f, column: str):
    """Yield (line, its bytes) of each line that is not blank. The workers look the column up."""
    for line, raw in enumerate(f, 1):
        if not raw.isspace():
            yield line, raw


def text_documents(f, column: str):
    """Yield (line, text) of each document between lines that hold <|endoftext|> alone.

    The line break before such a line, or before the end, belongs to the file and not to the document.
    """
    parts = []
    for line, raw in enumerate(itertools.chain(f, [b""]), 1):  # b"": the end
        if raw and raw.strip() != SEPARATOR:
            parts.append(raw)
        elif raw or parts:
            yield line - len(parts), b"".join(parts).removesuffix(b"\n").removesuffix(b"\r")
            parts = []


def whole_text(f, column: str):
    """Yield a file as one document."""
    yield 1, f.read()


def parquet_rows(f, column: str):
    """Yield (row, value) of a column of a parquet file."""
    from pyarrow.parquet import ParquetFile

    # Buffered, and in small batches: a row group, which `datasets` reads as a whole, may be larger than memory.
    parquet = ParquetFile(f, buffer_size=1 << 20)
    columns = [column] if column in parquet.schema_arrow.names else None
    return enumerate(column_values(parquet.iter_batches(256, columns=columns), column), 1)


def stream_rows(stream, column: str):
    """Yield (row, value) of a column of what `datasets` streams."""
    # Arrow's tables: to make Python objects of all columns here would take longer than to encode one in the workers.
    return enumerate(column_values(stream.with_format("arrow").iter(256), column), 1)


def column_values(tables, column: str):
    """Yield the values of a column of Arrow's tables or record batches."""
    for table in tables:
        if column not in table.schema.names:
            raise ValueError(f"it has no column {column} (column_name), but {', '.join(table.schema.names)}")
        # Lists of ids become arrays: to send Python's integers to a worker takes longer than to encode text.
        yield from table.column(column).to_numpy(zero_copy_only=False)


READERS = {  # of a part that is opened
    ".jsonl": json_lines,
    ".txt": text_documents,
    ".py": whole_text,
    ".parquet": parquet_rows,
    "stream": stream_rows,
}


def open_zst(f):
    """A decompressed file, for reading bytes."""
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(f, compression="zstd"))


COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": open_zst}


def kind_of(file) -> str:
    """The suffix that says how a file is read, in lower case and without the suffix of a compression."""
    path = Path(f"{file}".lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def opened(part):
    """A part as READERS take it, for `with`: a stream, or a file on disk or on the hub, opened for reading bytes.

    A file is decompressed by its suffix, and stands after a byte order mark.
    """
    import fsspec

    if not isinstance(part, (str, Path)):
        return contextlib.nullcontext(part)
    # The name of a file on disk may have characters that mean something in a URL.
    f = open(part, "rb") if os.path.exists(part) else fsspec.open(part).open()
    f = COMPRESSED.get(Path(part).suffix.lower(), io.BufferedReader)(f)
    if f.peek(3).startswith(b"\xef\xbb\xbf"):
        f.read(3)
    return f


def open_tables(c: DatasetConfig, split: str, files: list[Path]) -> Source:
    """What `datasets` finds under the name of `c`, a hub id, a folder or `files`. Raises what it raises."""
    from unittest import mock

    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as builders

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error, it also raises
    datasets.config.TORCH_AVAILABLE = False  # it would import torch, which has no use here
    name = c.name
    data_files = None
    folder = local(c.name).absolute()
    # A folder is named by its whole path: `datasets` would take the name parquet for a file format.
    if folder.is_dir():
        name = str(folder)
    elif files:
        name = str(files[0].parent)
        data_files = [glob.escape(str(file)) for file in files]
    elif name in builders:
        raise UserError(f"{name} is not a dataset but a file format of `datasets`: name the files themselves")
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, dict):
            saved = {"train": saved, f"{saved.split}": saved}
        return Source(c, "stream", [saved[split].to_iterable_dataset()])
    resolve = datasets.data_files.resolve_pattern

    def resolve_in(pattern, base_path, **options):
        return resolve(pattern, glob.escape(base_path), **options)

    # `datasets` makes the folder's name a part of a pattern, in which brackets would match other names.
    with mock.patch.object(datasets.data_files, "resolve_pattern", resolve_in):
        builder = datasets.load_dataset_builder(name, c.config_name, data_files=data_files, revision=c.revision)
    splits = builder.config.data_files or {}
    found = tuple(splits.get(split, ()))
    kinds = {kind_of(file) for file in found}
    # `datasets` takes the files of the most common kind, and ignores the others without a word.
    unused = {str(file) for file in files if kind_of(file) in READERS}.difference(*splits.values())
    if unused:
        print(f"note: {len(unused)} files are in no split, such as {min(unused)}")
    # These are read here: `datasets` would need more time and memory, and take every line of a .txt for a document.
    if len(kinds) == 1 and kinds <= READERS.keys():
        return Source(c, kinds.pop(), list(found), found)
    if kinds and builder.name == "text":
        raise UserError(
            f"{c.name}: found files of the kinds {sorted(kinds)}; wanted is .txt, or .txt.gz, .xz, .bz2 or .zst"
        )
    stream = builder.as_streaming_dataset(split)
    n = stream.num_shards
    return Source(c, "stream", [stream.shard(n, i) for i in range(n)], found)


def files_named(c: DatasetConfig) -> list[Path]:
    """The files on disk that `c` names: one, a glob's, those in a folder, the standard library's; [] for a hub id."""
    if c.name == "python-stdlib":
        return stdlib_files()
    path = local(c.name).absolute()
    # A path that exists is no pattern, whatever characters its name has.
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    shards = c.folder().absolute()  # they may lie within the source
    return sorted(p for p in found if p.is_file() and shards not in p.parents and not p.name.startswith("."))


def open_source(c: DatasetConfig) -> Source:
    """The rows that `c` asks for. UserError if there is no such source or split."""
    # Hugging Face's syntax of slices, with a percentage up to 100.
    bound = r"(-?\d{1,18}|-?(?:100|\d\d?)%|)"
    match = re.fullmatch(rf"([\w.-]+?)(?:\[{bound}:{bound}\])?", c.split)
    if not match:
        raise UserError(f"cannot read split {shown(c.split)}: write train, train[:95%] (up to 100%) or train[-100:]")
    split, *bounds = match.groups(default="")
    files = files_named(c)
    kinds = {kind_of(file) for file in files or [c.name]}
    # `datasets` finds the files and splits of a folder or hub id, and reads what is not read here.
    if local(c.name).is_dir() or kinds.isdisjoint(READERS):
        with blame(f"cannot read {c.name} (split {split}, config_name {c.config_name})"):
            source = open_tables(c, split, files)
    elif not files or len(kinds) > 1 or split != "train":
        raise UserError(
            f"{c.name}: found {len(files)} files, of the kinds {sorted(kinds)}; it takes files of one kind, and the "
            f"split train or a slice of it, not {c.split}"
        )
    else:
        source = Source(c, kinds.pop(), files)
    total = sys.maxsize
    if re.search("[%-]", "".join(bounds)):
        # A percentage, or a distance from the end. The rows are counted: what a dataset's card says may be untrue.
        total = sum(1 for _ in source.rows())
    source.wanted = row_range(bounds, total)
    return source


def row_range(bounds: list[str], total: int) -> range:
    """The rows between bounds such as "5%" or "", rounded and clipped as Hugging Face's."""
    rows = []
    for bound in bounds:
        number = int(bound.rstrip("%")) if bound else None
        rows.append(round(number * total / 100) if "%" in bound else number)
    return range(total)[slice(*rows)]


def stdlib_files() -> list[Path]:
    """The interpreter's own library, tests left out, in an order that makes the end as fair a sample as the start."""
    root = Path(os.__file__).parent
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = [path.relative_to(root) for path in root.rglob("*.py") if path.stat().st_size]
    kept = [name.as_posix() for name in names if left_out.isdisjoint(name.parts)]
    # Sorted by hash: an order that looks random, but is the same on every machine with this Python.
    return [root / name for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest())]


# -----------------------------------------------------------------------------
# encoding: rows -> tokens, in processes of their own


def parse_row(c: DatasetConfig, kind: str, vocab_size: int, raw):
    """A row's text, or its ids (n,) if `is_tokenized`. ValueError, in words, if it has none. Null is an empty row."""
    value = raw.decode() if isinstance(raw, bytes) else raw
    if kind == ".jsonl":
        value = json.loads(value)
        if not isinstance(value, dict) or c.column_name not in value:
            raise ValueError(f"no column {c.column_name} (column_name) in {shown(value)}")
        value = value[c.column_name]
    if value is None:
        return ""
    if not c.is_tokenized:
        if not isinstance(value, str):
            raise ValueError(f"column {c.column_name} must hold text, not {shown(value)}")
        value.encode()  # raises if there is a lone surrogate
        return value
    ids = np.asarray(value)
    is_in_range = not ids.size or (ids.dtype.kind in "iu" and 0 <= ids.min() <= ids.max() < vocab_size)
    if ids.ndim != 1 or not is_in_range:
        raise ValueError(f"column {c.column_name} must hold lists of ids below {vocab_size}, not {shown(value)}")
    return ids


def parse_rows(c: DatasetConfig, kind: str, vocab_size: int, rows):
    """Yield the text, or ids, of each (name, number, raw). UserError, which says where, for a row that has none."""
    for name, number, raw in rows:
        try:
            yield parse_row(c, kind, vocab_size, raw)
        # ValueError: also broken JSON and broken UTF-8. RecursionError: JSON nested too deep. OverflowError: huge ids.
        except (ValueError, OverflowError, RecursionError) as e:
            raise UserError(f"{name}:{number}: {e}") from e


ENCODER: TextEncoder | None = None  # in a worker: its own, made by begin_work


def begin_work(name: str, data: bytes, eos_token: str):
    """In a new worker: make its encoder, and end when the parent is gone, even if it was killed."""
    global ENCODER
    # A worker that waits for work would otherwise wait forever once its parent is killed.
    threading.Thread(target=end_with_parent, daemon=True).start()
    ENCODER = gpt2_encoder(data) if name == "gpt2" else json_encoder(name, data, [eos_token])


def end_with_parent():
    """End this worker at once when its parent does: nobody reads what it makes."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_rows(c: DatasetConfig, kind: str, rows):
    """A worker's task: rows -> tokens (n,) uint16, and how many tokens, documents and bytes of text they are."""
    eos = ENCODER.eos_token_id
    # Null and empty rows are counted, and leave no tokens.
    parsed = [row for row in parse_rows(c, kind, ENCODER.vocab_size, rows) if len(row)]
    if c.is_tokenized:
        # Rows of ids are kept as they are.
        parts = parsed
        texts = ENCODER.decode_batch([row[row != eos].tolist() for row in parsed])
    else:
        texts = parsed
        # A tokenizer may fail on text for which it has no token.
        with blame(f"{ENCODER.name} cannot encode {rows[0][:2]}, or a row after it"):
            ids = ENCODER.encode_batch(texts)
        parts = [part for document in ids for part in (document, [eos])]
    tokens = np.concatenate([[], *parts], dtype="<u2", casting="unsafe")
    return tokens, {
        "tokens": len(tokens),
        "documents": len(parsed),
        "empty_documents": len(rows) - len(parsed),
        "bytes": sum(len(text.encode()) for text in texts),
    }


def batches(source: Source, place=START):
    """Yield ([(name, number, raw), ...], place after them) of the rows of a split after `place`.

    A batch ends by its rows alone, so that shards do not depend on the number of workers.
    """
    rows = []
    size = 0
    for after, row in source.rows(place):
        rows.append(row)
        size += len(row[2]) if hasattr(row[2], "__len__") else 1
        if size >= 1 << 19 or len(rows) >= 1024:
            yield rows, after
            rows = []
            size = 0
    if rows:
        yield rows, after


def start_workers(workers: int, encoder: TextEncoder) -> ProcessPoolExecutor:
    """A pool of processes for encode_rows. They ignore Ctrl-C, which a terminal sends to them, too."""
    # Spawned, on every platform: a fork would copy threads and locks of this process.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, begin_work, (encoder.name, encoder.json, encoder.eos_token))
    # A new process inherits which signals are ignored, and each of these tasks starts one process.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(workers):
        pool.submit(int)
    signal.signal(signal.SIGINT, before)
    return pool


def write_shards(folder: Path, split: str, source: Source, pool, workers: int, shard_tokens: int, record: dict):
    """Encode what `record` does not list yet of a split into shards, and write dataset.json after each of them.

    A shard ends with the batch that brings it to `shard_tokens` or more: no document lies in two.
    """
    from tqdm import tqdm

    # dataset.json lists a split from its first finished shard on.
    about = record["splits"].setdefault(split, {"shards": []})
    shards = about["shards"]
    read = batches(source, shards[-1]["place"] if shards else START)
    # A batch is read and submitted when its task is taken from this generator.
    tasks = ((after, pool.submit(encode_rows, source.section, source.kind, rows)) for rows, after in read)
    under_way = deque(itertools.islice(tasks, 2 * workers))
    with tqdm(desc=split, unit=" tokens", unit_scale=True, mininterval=5) as bar:
        while under_way:
            path = folder / f"{split}_{len(shards):06d}.bin"
            counts = Counter()
            with whole_file(path) as f:
                f.write(bytes(HEADER_BYTES))
                while under_way and counts["tokens"] < shard_tokens:
                    # Results come in the order of the batches, not in that in which workers finish.
                    place, future = under_way.popleft()
                    under_way.extend(itertools.islice(tasks, 1))
                    tokens, added = future.result()
                    f.write(tokens)
                    counts.update(added)
                    bar.update(len(tokens))
                # The number of tokens is known only now.
                f.seek(0)
                f.write(np.array([MAGIC, VERSION, counts["tokens"]], "<i4"))
            shards.append({"file": path.name, **counts, "place": place, "sha256": sha256_file(path)})
            write_json(folder / "dataset.json", record)
    for key in "tokens", "documents", "empty_documents", "bytes":
        about[key] = sum(entry[key] for entry in shards)
    print(f"{folder}: {split} has {about['tokens']:,} tokens of {about['documents']:,} documents")


# -----------------------------------------------------------------------------
# preparation


def asked(c: DatasetConfig) -> dict:
    """What a config says of the source and the tokenizer, as dataset.json's ["source"][split] has it."""
    about = c.model_dump(include={"name", "split", "column_name", "is_tokenized", "revision", "config_name"})
    return about | {"tokenizer": c.hf_tokenizer_path or f"trained, {c.train_tokenizer_vocab_size}"}


def identity(c: DatasetConfig, shard_tokens: int) -> dict:
    """What the bytes of a split depend on, as far as it can be told without reading the source."""
    about = asked(c) | {"shard_tokens": shard_tokens}
    if files := files_named(c):
        about["names_and_sizes"] = digest([[p.name, p.stat().st_size] for p in files])
    # A file's content may change under the same name.
    name = c.hf_tokenizer_path
    if name and tokenizer_file(name).is_file():
        about["tokenizer_sha256"] = sha256_file(tokenizer_file(name))
    return about


def digest(value) -> str:
    """The sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def found_in(folder: Path, here: dict) -> dict:
    """What was prepared in `folder` by configs with the identities `here`, or {} if no shard is finished.

    UserError if it holds other data.
    """
    record = read_record(folder)
    foreign = [*folder.glob("*.bin"), *folder.glob("tokenizer*.json")]
    if foreign and not record:
        raise UserError(f"{foreign[0]} was not written by a preparation: choose another path")
    # No shard is finished: nothing is lost by starting again, with the source and config of now.
    if not record.get("splits"):
        return {}
    # Keys that only the record has are not compared: the source of a finished folder may be gone.
    there = record["source"]
    wanted = {split: there.get(split, {}) | about for split, about in here.items()}
    check_same(there, wanted, f"{folder} was prepared with another config (choose another path, or delete this one)")
    if record["finished"]:
        print(f"{folder} is already prepared")
    else:
        for about in record["splits"].values():
            check_files(folder, about["shards"])
    return record


def first_look(source: Source, vocab_size: int):
    """Check the first batch: a wrong column or kind of row is wrong from the start, and is found before the work."""
    c = source.section
    rows = next(batches(source), [[]])[0]
    parsed = list(parse_rows(c, source.kind, vocab_size, rows))
    if not any(map(len, parsed)) and len(rows) < 1024:
        raise UserError(f"{c.name} holds no text in split {c.split}; {SEPARATORS}")
    inline = "\n".join(parsed).count(SEPARATOR.decode()) if source.kind == ".txt" else 0
    if inline:
        print(f"note: {c.name} has <|endoftext|> {inline:,} times within a line; {SEPARATORS}")


def open_all(folder: Path, configs: dict[str, DatasetConfig], shard_tokens: int) -> tuple | None:
    """Open and check what `folder` is prepared from, and write nothing. None if it is prepared already.

    Returns (folder, identity of each split, source of each split, encoder): the first arguments of prepare().
    """
    here = {split: identity(c, shard_tokens) for split, c in configs.items()}
    if found_in(folder, here).get("finished"):
        return None
    sources = {split: open_source(c) for split, c in configs.items()}
    *_, c = configs.values()  # all have the same tokenizer
    encoder = load_encoder(c.hf_tokenizer_path) if c.hf_tokenizer_path else None
    for source in sources.values():
        first_look(source, encoder.vocab_size if encoder else 0)
    return folder, here, sources, encoder


def prepare(folder: Path, here: dict, sources: dict, encoder, workers: int, shard_tokens: int):
    """Write the tokenizer and the shards of the splits in `sources`, or resume an interrupted preparation.

    dataset.json is written again after each shard. A kill leaves at most one shard that dataset.json does not list yet;
    that shard is written again. here: the identity of each split. encoder: None if one is to be trained.
    """
    lock = hold(folder, "preparing", wait=True)  # noqa: F841, released at the end of this function
    record = found_in(folder, here)  # again: another process may have been at work until now
    if record.get("finished"):
        return
    if not encoder:
        # Trained now, or by the preparation that was interrupted.
        data = (folder / "tokenizer.json").read_bytes() if record else train_bpe(sources["train"])
        encoder = json_encoder("trained here", data)
    tokenizer = {
        "name": encoder.name,
        "sha256": hashlib.sha256(encoder.json).hexdigest(),
        "vocab_size": encoder.vocab_size,
        "eos_token_id": encoder.eos_token_id,
    }
    # Shards must not mix two versions of a source, which may have the same size.
    versions = [(s.files, [p.stat().st_mtime_ns for p in files_named(s.section)]) for s in sources.values()]
    at_start = {"tokenizer": tokenizer, "modified": digest(versions)}
    record = record or {"source": here, **at_start, "splits": {}, "finished": False}
    check_same(record, record | at_start, f"the source or the tokenizer changed since the start (delete {folder})")
    write_json(folder / "dataset.json", record)  # before all other files: it marks the folder as prepared here
    write_text(folder / "tokenizer.json", encoder.json.decode())
    write_text(folder / "tokenizer_config.json", tokenizer_config(encoder.eos_token, split_special_tokens=True))
    with start_workers(workers, encoder) as pool:
        for split, source in sources.items():
            write_shards(folder, split, source, pool, workers, shard_tokens, record)
    del record["modified"]  # from now on the source may change
    write_json(folder / "dataset.json", record | {"finished": True})


# -----------------------------------------------------------------------------
# other views of the shards


def peek(data: Shards, n_ctx: int, n: int):
    """Print the first n windows of a split as a model reads them: the text of their ids."""
    tok = text_tokenizer((data.folder / "tokenizer.json").read_bytes())
    windows = data.windows(range(min(n, data.n_tokens // n_ctx)), n_ctx)
    for i, ids in enumerate(windows.tolist()):
        print(f"--- {data.split} window {i}\n{tok.decode(ids, skip_special_tokens=False)}")


def export_parquet(store: Path, data: Shards, n_ctx: int, documents: bool):
    """Write a split as a data store of param-decomp: the folder `store` with a data.parquet and a meta.json.

    The rows of input_ids are the tokens of the split, end to end, n_ctx - 1 in each: as many as the model reads. With
    `documents` there are n_ctx in each, and document_ids beside them, as param-decomp's pretraining takes them.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter
    from tqdm import trange

    width = n_ctx if documents else n_ctx - 1
    tokenizer = data.info["tokenizer"]
    # AutoTokenizer takes a hub id, or a folder.
    name = tokenizer["name"]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(".json") or local(name).exists():
        name = str(data.folder.absolute())
    about = {"seq_len": width, "tokenizer_name": name}
    names = ["input_ids"]
    if documents:
        names.append("document_ids")
        about |= {"format_version": 2, "preprocessing_name": "pretrain"}
    store.mkdir(parents=True, exist_ok=True)
    # Without its meta.json the folder is no store, whatever an interruption leaves in it.
    (store / "meta.json").unlink(missing_ok=True)
    schema = pa.schema({name: pa.list_(pa.int32(), width) for name in names})
    n = data.n_tokens // width
    with whole_file(store / "data.parquet") as f, ParquetWriter(f, schema) as writer:
        for first in trange(0, n, 8192, desc=data.split, unit=" row groups"):
            ids = data.windows(range(first, min(first + 8192, n)), width)  # (rows, width)
            # EOS belongs to the document that it ends.
            ends = ids == tokenizer["eos_token_id"]
            values = ids, ends.cumsum(axis=1) - ends
            lists = [pa.FixedSizeListArray.from_arrays(x.astype(np.int32).ravel(), width) for x in values]
            writer.write_table(pa.Table.from_arrays(lists[: len(names)], schema=schema))
    write_json(store / "meta.json", about)
    print(f"wrote {store}: {n:,} rows of {width} tokens")


# -----------------------------------------------------------------------------
# the command line


def available_cpus() -> int:
    """How many cores this process may use: its share of the machine, such as one that taskset or SLURM gave it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count(text: str) -> int:
    """A number on the command line, below 2**30: a header counts to 2**31, and a shard may exceed its size."""
    if int(text) in range(1, 2**30):
        return int(text)
    raise ValueError


def main():
    parser = argparse.ArgumentParser(description="Text or tokens in, shards out.")
    parser.add_argument("config", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train_dataset_config.name=my.txt")
    parser.add_argument("--workers", type=count, default=available_cpus(), help="processes (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=count, default=100_000_000, help="tokens in a shard (default: 100M)")
    parser.add_argument("--verify", action="store_true", help="read again what was prepared, and name what is wrong")
    parser.add_argument("--peek", type=count, metavar="N", help="print the first N windows of each split, decoded")
    parser.add_argument("--parquet", type=local, metavar="DIR", help="write what was prepared as param-decomp's data")
    parser.add_argument("--documents", action="store_true", help="with --parquet: for pretraining there")
    args = parser.parse_intermixed_args()
    if args.documents and not args.parquet:
        parser.error("--documents goes with --parquet")
    sys.stdout.reconfigure(errors="backslashreplace")  # as sys.stderr: an ASCII console shows other letters as escapes
    # train and val share a folder, unless their config says otherwise.
    folders = {}
    data = {}
    try:
        configs = dataset_configs(read_config(args.config, args.overrides))
        for split, c in configs.items():
            folders.setdefault(c.folder(), {})[split] = c
            if args.verify or args.peek or args.parquet:
                data[split] = Shards(c.folder(), split, args.config)
                if not data[split].info:  # nothing says what encoded the shards
                    raise UserError(f"{c.folder()} has no dataset.json: it was not prepared here")
            if args.peek or args.parquet:
                TrainingStream(data[split], c, seed=0)  # raises if there is not even one window
        for split, shards in data.items():
            if args.verify:
                # UserError names the first shard that differs from dataset.json.
                check_files(shards.folder, shards.entries)
                print(f"{shards.folder}: {split} is sound, {shards.n_tokens:,} tokens")
            if args.peek:
                peek(shards, configs[split].n_ctx, args.peek)
            if args.parquet:
                export_parquet(args.parquet.absolute() / split, shards, configs[split].n_ctx, args.documents)
        if data:
            return
        # What is wrong with any source or tokenizer is found before anything is written.
        jobs = [open_all(folder, sections, args.shard_tokens) for folder, sections in folders.items()]
        for job in filter(None, jobs):
            prepare(*job, args.workers, args.shard_tokens)
    # A user's mistake or a fault of the machine: what is on disk is whole, and the same command resumes.
    except (UserError, OSError, ImportError) as e:
        sys.exit(f"prepare_data: {e}")


def interrupted(signum, frame):
    """End at once on Ctrl-C: files are whole, or hidden ones that the next start overwrites, and the workers end."""
    os.write(2, b"\nprepare_data: interrupted; the same command goes on after the last finished shard\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    main()
