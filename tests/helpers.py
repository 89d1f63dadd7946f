"""What the tests share: scripts run as a user runs them, tiny corpora and tokenizers, folders read byte by byte."""

import gzip
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# text that tokenizers, JSON and line readers trip over
NASTY = [
    "a<|endoftext|>b",
    "<|endoftext|>",
    "one\n<|endoftext|>\ntwo",
    "the [EOS] and the [UNK], [PAD] <|padding|> </s>",
    "[EOS]",
    "",
    "emoji 🙂 👩‍👩‍👧 🇫🇷 end",
    "cafe\u0301 n\u0303 Z\u0351\u036b\u0343 \u1100\u1161\u11a8",
    "nul \x00 and \x01\x1f",
    "dos\r\nlines\r\n\r\n",
    " ",
    "\n",
    "  \t leading, trailing   \n\n",
    "\u2028\u2029\u0085\u00a0\ufeff\u200b",
    "",
    "",
    "\U0010ffff \ufffd \ufdfd",
    "##ing it's we'LL '' `` 1234567890",
    "x" * 3000,
    "العربية עברית 中文字符 हिन्दी",
]


def run(script, *args, env=None, cwd=None, **options) -> subprocess.CompletedProcess:
    """Run a script of the repo's root as a user does."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(
        command, env=environment(env), cwd=cwd, capture_output=True, text=True, timeout=120, **options
    )


def environment(more=None) -> dict:
    """The environment for a script: nothing that waits for a network."""
    dead = "http://127.0.0.1:9"
    offline = {"HF_HUB_OFFLINE": "1", "HTTP_PROXY": dead, "HTTPS_PROXY": dead, "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | offline | (more or {})


def stories(n: int, seed: int = 0, words: int = 30) -> list[str]:
    """n short documents, the same for the same seed."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("aeioubcdlmnrst", k=rng.randint(1, 9))) for _ in range(500)]
    return [f"{i}: {' '.join(rng.choices(vocabulary, k=rng.randint(1, 2 * words)))}." for i in range(n)]


def jsonl(rows, column: str = "text") -> bytes:
    """One JSON object a line; every other one with its non-ASCII letters escaped."""
    lines = [json.dumps({"id": i, column: row}, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    return "".join(line + "\n" for line in lines).encode()


def write_files(folder: Path, files: dict) -> None:
    """{name: bytes, text, or a value to be written as YAML}; .gz names are compressed."""
    for name, content in files.items():
        if not isinstance(content, (bytes, str)):
            content = yaml.safe_dump(content)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def config(train: dict, val: dict | None = None, **top) -> dict:
    """A config with small windows; val is the train section's source and tokenizer with other rows unless given."""
    train = {"n_ctx": 9, "name": "docs.jsonl", "hf_tokenizer_path": "tiny.json", "path": "out"} | train
    val = {"n_ctx": 9, "name": train["name"]} | ({"split": "train[-3:]"} if val is None else val)
    sections = {"train_dataset_config": train, "val_dataset_config": val}
    return top | {s: {k: v for k, v in keys.items() if v is not None} for s, keys in sections.items()}


def tree(folder: Path) -> dict:
    """{relative path: sha256} of every file in a folder, but for the lock, which says nothing."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# -----------------------------------------------------------------------------
# tokenizers


def wordpiece_json() -> str:
    """A WordPiece that adds EOS when asked, as SimpleStories' does, and would cut and pad if it were let."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?[]<>|#'`-_"
    words = ["the", "and", "lines", "##ing", "##ed", "unk", "eos", "endoftext"]
    vocab = ["[UNK]", "[EOS]", *letters, *("##" + c for c in letters), *words]
    eos = {"id": 1, "content": "[EOS]", "special": True, "normalized": False}
    padding = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "[EOS]"}
    split = [{"type": "Whitespace"}, {"type": "Punctuation", "behavior": "Isolated"}]
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[EOS]", "type_id": 0}}]
    ends = {"type": "TemplateProcessing", "single": template}
    ends |= {"pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}]}
    ends |= {"special_tokens": {"[EOS]": {"id": "[EOS]", "ids": [1], "tokens": ["[EOS]"]}}}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": {word: i for i, word in enumerate(vocab)}}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0},
            "padding": padding,
            "added_tokens": [eos | {"single_word": False, "lstrip": False, "rstrip": False}],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
            "post_processor": ends,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": model,
        }
    )


def bpe_json() -> str:
    """A byte-level BPE of 600 tokens, trained here; its EOS is not the last id, and its 'é' is one merged token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|padding|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(stories(200, seed=5) + ["café déjà vu"] * 20, trainer)
    return tok.to_str()


def words_json(words, eos: str | None = "[EOS]") -> str:
    """A tokenizer for which a document that is one of `words` is one id, its place there + 2: no text is ever split."""
    names = ["[UNK]", eos or "[END]", *dict.fromkeys(words)]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            **dict.fromkeys(["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"]),
            "added_tokens": [{"id": 1, "content": eos} | special] if eos else [],
            "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(names)}, "unk_token": "[UNK]"},
        }
    )


def reference(tokenizer_json: str):
    """(encode, EOS): ids by a tokenizer that knows no special token at all, so that none can be read out of text."""
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer_json)
    names = [t for t in spec["added_tokens"] if t["special"] and t["content"] in ("[EOS]", "<|endoftext|>")]
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["special"]]
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    tok = Tokenizer.from_str(json.dumps(spec))
    return lambda text: tok.encode(text, add_special_tokens=False).ids, names[0]["id"]


# -----------------------------------------------------------------------------
# shards, read without the code under test


def read_bin(path: Path):
    """(the header's 256 integers, the tokens) of a shard."""
    data = path.read_bytes()
    return struct.unpack("<256i", data[:1024]), np.frombuffer(data[1024:], "<u2")


def stream(folder: Path, split: str) -> list[int]:
    """All tokens of a split."""
    return [int(t) for path in sorted(folder.glob(f"{split}_*.bin")) for t in read_bin(path)[1]]
