"""prepare_data.py as a user runs it: what is in the folder afterwards, what survives a kill, what is refused."""

import bz2
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    NASTY,
    ROOT,
    SHARED,
    bpe_json,
    config,
    environment,
    jsonl,
    read_bin,
    reference,
    run,
    stories,
    stream,
    tree,
    wordpiece_json,
    words_json,
    write_files,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_data as pd

# The same examples on every run: a red test is a change of the code.
few = settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(NASTY)

TINY = wordpiece_json()
BPE = bpe_json()
DOCS = stories(60)
T = "train_dataset_config"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Nothing may wait for a network: what `datasets` reads when it is imported, and where tiktoken finds its gpt2."""
    cached = {
        "gpt2-vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "gpt2-encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    folder = tmp_path_factory.mktemp("tiktoken")
    for name, digest in cached.items():
        if (SHARED / "tokenizers" / name).exists():
            shutil.copy(SHARED / "tokenizers" / name, folder / digest)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment() | {"TIKTOKEN_CACHE_DIR": str(folder)}).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a tiny tokenizer, a corpus and a config of both."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"tiny.json": TINY, "docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    return tmp_path


def prepare(*args, **options):
    """Prepare config.yaml in a process of its own, which has to work."""
    done = run("prepare_data.py", "config.yaml", *args, **options)
    assert done.returncode == 0, done.stderr
    return done


def prepare_here(*args) -> None:
    """The same within this process, for tests that prepare often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", "config.yaml", "--workers", "1", *map(str, args)])
        pd.main()


def refused(args, *fragments) -> None:
    """It ends with code 1 and one sentence that names what is wrong."""
    with pytest.raises(SystemExit) as ended:
        prepare_here(*args)
    sentence = ended.value.code
    assert sentence.startswith("prepare_data: ") and "\n" not in sentence
    assert [fragment for fragment in fragments if fragment not in sentence] == [], sentence


def encoded(docs, tokenizer_json: str = TINY) -> list[list[int]]:
    """What the documents should become: each one's ids and EOS, empty ones left out."""
    encode, eos = reference(tokenizer_json)
    return [[*encode(doc), eos] for doc in docs if doc]


def check_split(folder: Path, split: str, documents: list, shard_tokens: int = 10**8, empty: int = 0) -> None:
    """A split is exactly `documents`, each a list of ids with its EOS and whole in one shard; dataset.json is true."""
    record = json.loads((folder / "dataset.json").read_text())
    about = record["splits"][split]
    names = [f"{split}_{i:06d}.bin" for i in range(len(about["shards"]))]
    assert record["finished"] and stream(folder, split) == [i for ids in documents for i in ids]
    assert [p.name for p in sorted(folder.glob(f"{split}_*.bin"))] == names == [s["file"] for s in about["shards"]]
    ends = {0, *np.cumsum([len(ids) for ids in documents]).tolist()}
    first = 0
    for name, shard in zip(names, about["shards"], strict=True):
        header, tokens = read_bin(folder / name)
        last = first + len(tokens)
        assert header == (20240520, 1, len(tokens), *[0] * 253)
        assert last in ends and (len(tokens) >= shard_tokens or name == names[-1])
        assert shard["tokens"] == len(tokens) and shard["documents"] == sum(first < e <= last for e in ends)
        assert shard["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        first = last
    assert (about["tokens"], about["documents"], about["empty_documents"]) == (first, len(documents), empty)


# -----------------------------------------------------------------------------
# the shard and its tokens

LENT = [SHARED / "tokenizers/simplestories-tokenizer.json", SHARED / "tokenizers/neox-20B_tokenizer.json", "gpt2"]
# Of every byte of a folder, as it was when this was written; None is a tokenizer trained here.
GOLDEN = {"tiny.json": "d247d7a58441", "bpe.json": "d3288bd7329b", None: "20c3c36cdae1"}


@pytest.mark.parametrize("path", [*GOLDEN, *map(str, LENT)])
def test_same_bytes(here, path):
    """The ids are those of a tokenizer that knows no special token; the bytes do not depend on the workers."""
    if path not in GOLDEN and not (SHARED / "tokenizers").exists():
        pytest.skip("../shared/tokenizers is not there")
    keys = {"hf_tokenizer_path": path, "train_tokenizer_vocab_size": None if path else 700}
    big = " ".join(stories(6500, seed=1))[:1_000_000]
    docs = [*DOCS, *NASTY, *stories(3000, seed=2), big, "after the big one", *NASTY[::-1], ""]
    files = {"docs.jsonl": jsonl(docs), "bpe.json": BPE, "config.yaml": config(keys, {"split": "train[-5%:]"})}
    write_files(here, files)
    prepare("--shard-tokens", 100_000, "--workers", 3)
    written = Path("out/tokenizer.json").read_text()
    if str(path).endswith(".json"):
        assert written == Path(path).read_text()
    check_split(here / "out", "train", encoded(docs, written), 100_000, empty=docs.count(""))
    # The tokenizer beside the shards is of use as it is: its EOS is a special token when one is asked for.
    tok = pytest.importorskip("tokenizers").Tokenizer.from_file("out/tokenizer.json")
    about = json.loads(Path("out/dataset.json").read_text())["tokenizer"]
    assert tok.encode(tok.id_to_token(about["eos_token_id"])).ids[0] == about["eos_token_id"]
    assert about["vocab_size"] == tok.get_vocab_size()
    assert about["sha256"] == hashlib.sha256(written.encode()).hexdigest()
    if path in GOLDEN:
        prepare_here("--shard-tokens", 100_000, f"{T}.path=alone")
        assert tree(here / "alone") == tree(here / "out")
        assert hashlib.sha256(json.dumps(tree(here / "out")).encode()).hexdigest()[:12] == GOLDEN[path]


@pytest.fixture(scope="module")
def encoders():
    """[(our encoder, what it should make of a text)]: tokenizers that know no special token, and tiktoken."""
    found = [(pd.json_encoder("tiny", json.encode()), reference(json)[0]) for json in (TINY, BPE)]
    if (SHARED / "tokenizers/gpt2-vocab.bpe").exists():
        gpt2 = pytest.importorskip("tiktoken").get_encoding("gpt2")
        found.append((pd.load_encoder("gpt2"), gpt2.encode_ordinary))
    return found


@settings(few, max_examples=100)
@given(docs=st.lists(texts | st.text(" \t\n'<|>adelnostx1", max_size=200), max_size=8))
def test_encoder(encoders, docs):
    for encoder, encode in encoders:
        ids = [list(found) for found in encoder.encode_batch(docs)]
        assert ids == [encode(doc) for doc in docs]
        if "gpt2" in encoder.name:
            assert encoder.decode_batch(ids) == docs


def special_tokenizers() -> list[dict]:
    """Tokenizers whose models would take the name of their EOS for a word of text."""
    words = json.loads(words_json(["the", "end"])) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    pieces = [["[UNK]", 0.0], ["[EOS]", 0.0], *([c, -5.0] for c in "▁thend[]EOS")]
    unigram = words | {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    }
    vocab = words["model"]["vocab"] | {c: 4 + i for i, c in enumerate("thend[]EOS")}
    whole = words | {"model": {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}}
    return [words, unigram, whole]


@pytest.mark.parametrize("spec", special_tokenizers())
def test_special_names_are_text(here, spec):
    """As many EOS as documents, whatever the text says, and each id is decoded to its name."""
    write_files(here, {"tiny.json": json.dumps(spec), "docs.jsonl": jsonl(["the end", "the [EOS] end", "[EOS]"])})
    prepare_here()
    assert stream(here / "out", "train").count(1) == 3
    assert pd.text_tokenizer(json.dumps(spec).encode()).decode([1], skip_special_tokens=False) == "[EOS]"


@pytest.mark.parametrize("eos", ["<|padding|>", {"content": "<|padding|>"}])
def test_eos_of_tokenizer_config(here, eos):
    """A folder as transformers saves it says which of the special tokens is the EOS; it is recorded and passed on."""
    write_files(here, {"tok/tokenizer.json": BPE, "tok/tokenizer_config.json": json.dumps({"eos_token": eos})})
    write_files(here, {"config.yaml": config({"hf_tokenizer_path": "tok"})})
    prepare_here()
    encode, _ = reference(BPE)
    check_split(here / "out", "train", [[*encode(doc), 0] for doc in DOCS])
    assert json.loads(Path("out/dataset.json").read_text())["tokenizer"]["eos_token_id"] == 0
    transformers = pytest.importorskip("transformers")
    tok = transformers.AutoTokenizer.from_pretrained("out")
    assert (tok.eos_token, tok.eos_token_id, tok.pad_token_id) == ("<|padding|>", 0, 0)
    assert tok("a<|endoftext|>b", add_special_tokens=False).input_ids == encode("a<|endoftext|>b")


def test_peek(here, capsys):
    """The first windows as the model will read them: special tokens shown, text that looks like one as its text."""
    docs = ["one <|endoftext|> and [EOS] 🙂", "two\r\nlines", "", "three"]
    n_ctx = sum(map(len, encoded(docs[:3], BPE)))
    sections = config({"hf_tokenizer_path": "bpe.json", "n_ctx": n_ctx}, {"split": "train[-4:]", "n_ctx": n_ctx})
    write_files(here, {"bpe.json": BPE, "docs.jsonl": jsonl(docs[:3] + docs), "config.yaml": sections})
    prepare()
    window = f"{docs[0]}<|endoftext|>{docs[1]}<|endoftext|>\n"
    shown = [f"--- {split} window {i}\n{window}" for split, i in (("train", 0), ("train", 1), ("val", 0))]
    for n, expected in (99, shown), (1, [shown[0], shown[2]]):
        prepare_here("--peek", n)
        assert capsys.readouterr().out == "".join(expected)
    assert "\\U0001f642" in prepare("--peek", "1", env={"PYTHONIOENCODING": "ascii"}).stdout


@pytest.mark.parametrize("options, width", [([], 8), (["--documents"], 9)])
def test_param_decomps_stores(here, options, width):
    """Each holds its split end to end; in a row, the number of the document rises by one after each EOS."""
    pq = pytest.importorskip("pyarrow.parquet")
    write_files(here, {"docs.jsonl": jsonl(stories(900)), "config.yaml": config({}, {"split": "train[-99:]"})})
    prepare_here()
    prepare_here("--parquet", "stores", *options)
    meta = {"seq_len": width, "tokenizer_name": str(here / "out")}
    meta |= {"format_version": 2, "preprocessing_name": "pretrain"} if options else {}
    for split, store in (("train", here / "stores/train"), ("val", here / "stores/val")):
        assert json.loads((store / "meta.json").read_text()) == meta
        table = pq.read_table(store / "data.parquet").to_pydict()
        rows, tokens = table.pop("input_ids"), stream(here / "out", split)
        assert {len(row) for row in rows} == {width} and len(rows) == len(tokens) // width
        assert [i for row in rows for i in row] == tokens[: len(rows) * width]
        numbers = {"document_ids": [[row[:i].count(1) for i in range(width)] for row in rows]}
        assert table == (numbers if options else {})
    assert pq.ParquetFile("stores/train/data.parquet").metadata.row_group(0).num_rows == 8192


# -----------------------------------------------------------------------------
# interruptions


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A preparation of a second or so: (folder, command, what it makes when nobody disturbs it)."""
    here = tmp_path_factory.mktemp("slow")
    rng = random.Random(8)
    docs = [rng.choice(["", doc, doc]) for doc in stories(20_000, seed=4, words=20)]
    write_files(here, {"docs.jsonl": jsonl(docs), "tiny.json": TINY, "config.yaml": config({})})
    command = ["--shard-tokens", "60_000", "--workers", "2"]
    prepare(*command, cwd=here)
    check_split(here / "out", "train", encoded(docs), 60_000, empty=docs.count(""))
    return here, command, tree(here / "out")


def interrupted(slow, signum: int, shards: int, pauses: list, stop: bool = False):
    """Prepare into `cut` and send the signal, after each pause, once so many new shards are there: (code, workers)."""
    here, command, _ = slow
    command = [sys.executable, str(ROOT / "prepare_data.py"), "config.yaml", *command, f"{T}.path=cut"]
    errors = (here / "errors").open("w")
    shards += len(list(here.glob("cut/*.bin")))
    started = subprocess.Popen(command, cwd=here, env=environment(), stderr=errors, start_new_session=True)
    until = time.monotonic() + 60
    while len(list(here.glob("cut/*.bin"))) < shards and started.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    workers = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    workers = [int(w) for w in workers if b"resource_tracker" not in Path(f"/proc/{w}/cmdline").read_bytes()]
    if stop:
        os.kill(workers[0], signal.SIGSTOP)
    for pause in pauses:
        time.sleep(pause)
        if started.poll() is None:
            (os.killpg if signum == signal.SIGINT else os.kill)(started.pid, signum)
    return started.wait(timeout=60), workers


def resumed(slow, name: str) -> None:
    """The same command again ends as if nothing had happened, and leaves finished shards alone."""
    here, command, whole = slow
    before = {p: p.stat().st_mtime_ns for p in sorted(here.glob(f"{name}/*.bin"))[:-1]}  # the last may not be listed
    prepare(*command, f"{T}.path={name}", cwd=here)
    assert tree(here / name) == whole
    assert before == {p: p.stat().st_mtime_ns for p in before}, "a shard was made twice"


def test_interruptions(slow):
    """Again and again. Its workers end, too, and one that is stopped does not keep the folder locked."""
    for pauses in [0], [0, 0.01], [0, 0.1]:
        code, _ = interrupted(slow, signal.SIGINT, 1, pauses)
        stderr = (slow[0] / "errors").read_text()
        assert code == 130 and "Traceback" not in stderr, stderr
    for shards, pause in (0, 0.2), (1, 0), (1, 0.011), (1, 0.004), (2, 0):
        code, workers = interrupted(slow, signal.SIGKILL, shards, [pause], stop=shards == 2)
        assert code == -signal.SIGKILL, "it had ended before it was killed: the corpus is too small"
    try:
        resumed(slow, "cut")
        assert len(workers) == 2 and not os.path.exists(f"/proc/{workers[1]}/exe")
    finally:
        os.kill(workers[0], signal.SIGKILL)


def rewrite(path: str, old: bytes, new: bytes) -> None:
    """Replace the last occurrence of `old` in a file by `new`, of the same length."""
    before, after = Path(path).read_bytes().rsplit(old, 1)
    Path(path).write_bytes(before + new + after)


# What happens to a folder, and words of the sentence that refuses it. Both when it goes on and when it is verified:
FIRST = "out/train_000000.bin"
DAMAGED = {
    "a flipped bit": (lambda: rewrite(FIRST, b"\3", b"\4"), "train_000000.bin changed"),
    "cut short": (lambda: os.truncate(FIRST, 1100), "train_000000.bin"),
    "bare tokens": (lambda: Path(FIRST).write_bytes(bytes(9999)), "train_000000.bin"),
    "gone": (lambda: os.unlink(FIRST), FIRST),
    "another tokenizer": (lambda: rewrite("out/tokenizer.json", b"lines", b"linez"), "out/tokenizer.json"),
    "no tokenizer": (lambda: os.unlink("out/tokenizer.json"), "out/tokenizer.json restore"),
    "a damaged record": (lambda: os.truncate("out/dataset.json", 100), "damaged"),
    "no config": (lambda: os.unlink("config.yaml"), "config.yaml"),
    "another record": (lambda: Path("out/dataset.json").write_text("[]"), "dataset.json"),
}
# when it goes on
CHANGED = {
    "a word of the source": (lambda: rewrite("docs.jsonl", b"e", b"a"), "changed delete"),
    "the tokenizer": (lambda: rewrite("tiny.json", b"lines", b"linez"), "tokenizer_sha256"),
    "its EOS": (lambda: Path("tokenizer_config.json").write_text('{"eos_token": "[UNK]"}'), "eos_token_id"),
    "the config": (lambda: rewrite("config.yaml", b"train[:3]", b"train[:4]"), "another val.split"),
}
# when it is verified
VERIFIED = {
    "the other split's last": (lambda: rewrite("out/val_000000.bin", b"\3", b"\4"), "val_000000.bin"),
    "nothing there": (lambda: shutil.rmtree("out"), "python prepare_data.py config.yaml"),
}


def refused_if(changed: dict, *args) -> None:
    """Each change by itself, to a copy of the working directory, is refused, and nothing is written."""
    for what, (change, words) in (DAMAGED | changed).items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(shutil.copytree(".", f"{os.getcwd()}: {what}"))
            change()
            before = tree(Path())
            refused(args, *words.split())
            assert tree(Path()) == before, what


def test_what_changed_meanwhile_is_refused(here):
    """A bad row after finished shards interrupts this one; the row is named."""
    write_files(here, {"docs.jsonl": jsonl([*stories(3000), 3, "the end"]), "config.yaml": GOOD})
    refused(["--shard-tokens", 1], ":3001:", "text")
    assert not json.loads(Path("out/dataset.json").read_text())["finished"]
    refused_if(CHANGED, "--shard-tokens", 1)


def test_verify(here, capsys):
    write_files(here, {"docs.jsonl": jsonl([*DOCS, ""])})
    prepare_here()
    prepare_here("--verify")
    assert capsys.readouterr().out.count("is sound") == 2
    refused_if(VERIFIED, "--verify")


def test_a_full_disk(slow):
    """A write that fails ends it with the disk's error, and the same command goes on when there is room."""
    resource = pytest.importorskip("resource")
    here, command, _ = slow
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (30_000, 30_000))  # less than one shard
    done = run("prepare_data.py", "config.yaml", *command, f"{T}.path=full", cwd=here, preexec_fn=limit)
    assert done.returncode == 1 and "too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(here.glob("full/*.bin")) and not list(here.glob("full/.*.part"))
    resumed(slow, "full")


def test_a_finished_folder_is_left_alone(here, capsys):
    """Also when its source is gone; another config, or a changed source, is refused by name."""
    write_files(here, {"more.jsonl": jsonl(DOCS[1:]), "bpe.json": BPE})
    prepare_here()
    before = {p: p.stat().st_mtime_ns for p in Path("out").iterdir()}
    refused(["val_dataset_config.split=train[:2]"], "out", "val.split")
    refused([f"{T}.hf_tokenizer_path=bpe.json"], "out", "train.tokenizer")
    refused([f"{T}.name=more.jsonl", "val_dataset_config.path=out"], "out", "more.jsonl")
    refused(["--shard-tokens=999"], "out", "shard_tokens")
    write_files(here, {"docs.jsonl": jsonl([*DOCS, "one more"])})
    refused([], "train.names_and_sizes")
    Path("docs.jsonl").unlink()
    prepare_here()
    assert "already prepared" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in Path("out").iterdir()}


# A Python whose file system has no locks: sitecustomize runs before the script.
NO_LOCKS = """
import errno, fcntl
def refuse(*args):
    raise OSError(errno.{name}, "not supported")
fcntl.flock = refuse
"""


@pytest.mark.parametrize("name", ["", "EINVAL", "ENOSYS"])
def test_several_at_once(here, name):
    """One works, the others wait for it or find it prepared: all end well. Without locks, one goes on."""
    write_files(here, {"lib/sitecustomize.py": NO_LOCKS.format(name=name) if name else ""})
    command = [sys.executable, str(ROOT / "prepare_data.py"), "config.yaml"]
    env = environment({"PYTHONPATH": str(here / "lib")})
    started = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(1 if name else 3)]
    for process in started:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    check_split(here / "out", "train", encoded(DOCS))


def test_workers_are_the_cores_of_this_process():
    for share in os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}:
        done = run("prepare_data.py", "--help", preexec_fn=functools.partial(os.sched_setaffinity, 0, share))
        assert f"(default: {len(share)})" in " ".join(done.stdout.split())


# -----------------------------------------------------------------------------
# sources

WORDS = [f"document {i}\n\twith <|endoftext|> inside, ünicode 🙂" for i in range(40)]
DOS = [doc.replace("\n", "\r\n") for doc in WORDS]


def separated(docs, newline: str = "\n", after: str = "") -> bytes:
    """A .txt with the documents between separator lines."""
    return ("\n<|endoftext|>\n".join(docs) + after).replace("\n", newline).encode()


def zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor().compress(data[:999]) + zstandard.ZstdCompressor().compress(data[999:])


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").writestr("a.txt", data)
    return file.getvalue()


def parquet(rows, column: str = "text", **options) -> bytes:
    """A table with this column and one of numbers; the test is skipped where nothing reads it."""
    pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    sink = pytest.importorskip("pyarrow").BufferOutputStream()
    pq.write_table(pytest.importorskip("pyarrow").table({"id": list(range(len(rows))), column: rows}), sink, **options)
    return sink.getvalue().to_pybytes()


README = "---\nconfigs: [{config_name: d, data_files: [{split: train, path: p1.*}, {split: test, path: p2.*}]}]\n---\n"
UNTRUE = {"b/README.md": "---\ndataset_info: {splits: [{name: train, num_examples: 1000, num_bytes: 1}]}\n---\n"}
TWO = "---\nconfigs: [{config_name: one, data_files: x.csv}, {config_name: two, data_files: y.csv}]\n---\n"
TWO_CONFIGS = {"b/x.csv": "text\na\n", "b/y.csv": "text\nb\nc\n", "b/README.md": TWO}


def layout(words: str, others: str, write=parquet) -> dict:
    """A folder in the hub's layout whose README.md says which file is which split, and another one beside it."""
    readme = str(Path(words).with_name("README.md"))
    return {words: write(WORDS), others: write(["no"]), readme: README, "c/x.parquet": parquet(["no"])}


def saved() -> dict:
    """A DatasetDict saved to disk."""
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": WORDS})}).save_to_disk("b")
    return {}


def halves(pattern: str, write) -> dict:
    return {pattern.format("a2"): write(WORDS[:9]), pattern.format("b10"): write(WORDS[9:])}


PILE = jsonl(WORDS).replace(b'"id": 30,', b'"id": {"n": 30},')  # its columns change their types

# what is read: (files, or what makes them; value of `name`; other keys; documents; empty documents)
SOURCES = {
    "txt ends with a separator": ({"a.txt": separated(WORDS, after="\n<|endoftext|>\n")}, "a.txt", {}, WORDS, 0),
    "txt with two together": ({"a.txt": separated(["a", "", "b", "", "", "c"])}, "a.txt", {}, ["a", "b", "c"], 3),
    "txt with marks": ({"a.txt": separated(["\ufeffa", "\ufeffb"])}, "a.txt", {}, ["a", "\ufeffb"], 0),
    "txt with spaces around": ({"a.txt": b"a\n <|endoftext|> \nb\n\n"}, "a.txt", {}, ["a", "b\n"], 0),
    "txt with CRLF and a BOM": ({"a.txt": b"\xef\xbb\xbf" + separated(WORDS, "\r\n", "\n")}, "a.txt", {}, DOS, 0),
    "jsonl blank lines": ({"a.jsonl": b"\n" + jsonl(WORDS).replace(b"\n", b"\r\n \n")}, "a.jsonl", {}, WORDS, 0),
    "jsonl with a BOM": ({"a.jsonl": b"\xef\xbb\xbf" + jsonl(WORDS).rstrip(b"\n")}, "a.jsonl", {}, WORDS, 0),
    "jsonl with nulls": ({"a.jsonl": jsonl([None, *WORDS, None])}, "a.jsonl", {}, WORDS, 2),
    "GZ": ({"a.TXT.GZ": gzip.compress(separated(WORDS))}, "a.TXT.GZ", {}, WORDS, 0),
    "xz": ({"a.txt.xz": lzma.compress(separated(WORDS))}, "a.txt.xz", {}, WORDS, 0),
    "bz2": ({"a.jsonl.bz2": bz2.compress(jsonl(WORDS))}, "a.jsonl.bz2", {}, WORDS, 0),
    "zst": (lambda: {"a.txt.zst": zst(separated(WORDS))}, "a.txt.zst", {}, WORDS, 0),
    "zst of the Pile": (lambda: {"a.jsonl.zst": zst(PILE)}, "a.jsonl.zst", {}, WORDS, 0),
    "glob": (halves("b/x{}.jsonl", jsonl) | {"b/y.csv": "no"}, "b/x*", {}, WORDS, 0),
    "brackets": ({"f[v1]?/a.jsonl": jsonl(WORDS)}, "f[v1]?/a.jsonl", {}, WORDS, 0),
    "brackets, csv": ({"f[v1]?/a.csv": "text\na\n", "fv/a.csv": "text\nb\n"}, "f[v1]?/a.csv", {}, ["a"], 0),
    "brackets, folder": ({"f[v1]/x.jsonl": jsonl(WORDS), "fv/x.jsonl": "no"}, "f[v1]", {}, WORDS, 0),
    "brackets, splits": (lambda: layout("[1]?*/p2.parquet", "[1]?*/p1.parquet"), "[1]?*", {"split": "test"}, WORDS, 0),
    "brackets, hub": (lambda: {"[v]/data/train-00000-of-00001.parquet": parquet(WORDS)}, "[v]", {}, WORDS, 0),
    "home": ({"a.jsonl": jsonl(WORDS)}, "~/a.jsonl", {}, WORDS, 0),
    "csv, whose null is none": ({"a.csv": "text\nnull\nb\nb\n"}, "a.csv", {}, ["b", "b"], 1),
    "parquet": (lambda: {"a.parquet": parquet([None, *WORDS], row_group_size=7)}, "a.parquet", {}, WORDS, 1),
    "glob of parquet": (lambda: halves("s/{}/x[1].parquet", parquet), "s/**/*.parquet", {}, WORDS, 0),
    "folder of txt": ({"b/x.txt.gz": separated(WORDS)}, "b", {}, WORDS, 0),
    "folder of jsonl": (lambda: layout("b/p1.jsonl", "b/p2.jsonl", jsonl), "b", {}, WORDS, 0),
    "folder named parquet": (lambda: layout("parquet/p1.parquet", "parquet/p2.parquet"), "parquet", {}, WORDS, 0),
    "another split": (lambda: layout("b/p2.parquet", "b/p1.parquet"), "b", {"split": "test"}, WORDS, 0),
    "an untrue card": (lambda: {"b/x.parquet": parquet(WORDS)} | UNTRUE, "b", {"split": "train[:90%]"}, WORDS[:36], 0),
    "and its end": (lambda: {"b/x.parquet": parquet(WORDS)} | UNTRUE, "b", {"split": "train[-4:]"}, WORDS[36:], 0),
    "one of several configs": (TWO_CONFIGS, "b", {"config_name": "two"}, ["b", "c"], 0),
    "save_to_disk": (saved, "b", {"split": "train"}, WORDS, 0),
    "its arrow file": (saved, "b/train/*.arrow", {}, WORDS, 0),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources(here, monkeypatch, kind):
    files, name, keys, docs, empty = SOURCES[kind]
    monkeypatch.setenv("HOME", str(here))
    write_files(here, {"tiny.json": words_json(docs)} | (files() if callable(files) else files))
    write_files(here, {"config.yaml": config({"name": name} | keys, keys)})
    before = tree(here)
    prepare_here()
    check_split(here / "out", "train", [[list(dict.fromkeys(docs)).index(d) + 2, 1] for d in docs], empty=empty)
    assert before.items() <= tree(here).items(), "the source changed"


def test_separators_within_lines_are_noted(here, capsys):
    write_files(here, {"a.txt": "one<|endoftext|>\ntwo <|endoftext|>\nthree"})
    prepare_here(f"{T}.name=a.txt", "val_dataset_config.path=v")
    assert "2 times" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_token_rows(here, name):
    """Rows of ids stay as they are: none is cut, none gets an EOS, null is an empty row."""
    ids = [list(range(2, 2 + n)) for n in (9, 1, 30, 9, 4, 17)]
    rows = [*ids[:3], None, *ids[3:]]
    write_files(here, {name: jsonl(rows, "input_ids") if name == "a.jsonl" else parquet(rows, "input_ids")})
    keys = {"name": name, "column_name": "input_ids", "is_tokenized": True}
    write_files(here, {"config.yaml": config(keys, keys | {"split": "train[1:3]"})})
    prepare_here()
    check_split(here / "out", "train", ids, empty=1)
    check_split(here / "out", "val", ids[1:3])


def test_python_stdlib(here):
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [p for p in Path(os.__file__).parent.rglob("*.py") if not left_out & set(p.parts)]
    docs = [text for text in (p.read_bytes().decode() for p in files) if text]
    keys = {"name": "python-stdlib", "split": "train[:95%]"}
    write_files(here, {"tiny.json": words_json(docs), "config.yaml": config(keys, {"split": "train[95%:]"})})
    prepare_here()
    words = list(dict.fromkeys(docs))
    train, val = [[words[i - 2] for i in stream(here / "out", split)[::2]] for split in ("train", "val")]
    assert len(train) == round(0.95 * len(docs)) > 300 and sorted(train + val) == sorted(docs)
    assert train != sorted(train)


@pytest.mark.parametrize("name", ["long.jsonl", "long.txt.gz", "long.parquet", "long.csv", "p/*.jsonl"])
def test_reading_goes_on_from_any_place(here, name):
    """A place, written down as JSON, leads another process to the same row; also when rows were read before."""
    docs = [f"row {i}" for i in range(700)]
    write_files(here, {"long.jsonl": b"\n" + jsonl(docs), "long.txt.gz": separated(docs, "\r\n")})
    write_files(here, {"p/1.jsonl": jsonl(docs[:50]), "p/2.jsonl": "", "p/3.jsonl": jsonl(docs[50:])})
    write_files(here, {"long.parquet": parquet(docs, row_group_size=90), "long.csv": "\n".join(["text", *docs])})
    section = pd.DatasetConfig(name=name, n_ctx=9)
    source = pd.open_source(section)
    next(source.rows())
    rows = list(source.rows())
    assert [pd.parse_row(section, source.kind, 0, raw) for _, (_, _, raw) in rows] == docs
    for row in 0, 1, 49, 50, 255, 256, 300, 512, 699:
        place = tuple(json.loads(json.dumps(rows[row][0])))
        assert list(pd.open_source(section).rows(place)) == rows[row + 1 :]


bounds = st.just("") | st.integers(-120, 120).map(str) | st.integers(-10_000, 10_000).map(str)
percents = st.integers(-100, 100).map("{}%".format)


@given(n=st.integers(0, 100_000), bound=st.tuples(bounds, bounds) | st.tuples(percents | st.just(""), percents))
@settings(few, max_examples=200)
def test_slices_are_those_of_hugging_face(n, bound):
    datasets = pytest.importorskip("datasets")
    (expected,) = datasets.ReadInstruction.from_spec(f"train[{bound[0]}:{bound[1]}]").to_absolute({"train": n})
    assert pd.row_range(bound, n) == range(n)[expected.from_ : expected.to]


# -----------------------------------------------------------------------------
# the order of windows, and the reader


@given(n=st.integers(1, 500) | st.integers(6 * 10**9, 6 * 10**9 + 9), seed=st.integers(0, 2**40), data=st.data())
@settings(few, max_examples=40)
def test_order(n, seed, data):
    """Each epoch has every window once, in another order; the window of a position depends on seed and position."""
    size = min(n, 1000)
    whole = np.stack([pd.window_order(e * n + np.arange(size), n, seed) for e in range(3)])
    if n == size:
        assert np.array_equal(np.sort(whole), np.tile(np.arange(n), (3, 1)))
    else:
        assert not np.array_equal(whole[0], whole[1])
    assert all(len(np.unique(epoch)) == size for epoch in whole) and whole.min() >= 0 and whole.max() < n
    picked = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    assert np.array_equal(pd.window_order(2 * n + picked, n, seed), whole[2, picked])
    assert np.array_equal(pd.window_order(2 * n + picked, n, seed, shuffle_each_epoch=False), whole[0, picked])


def test_order_is_what_it_was():
    """To the bit: its statistics (each order as likely as another) were tested once, for these very numbers."""
    orders = [pd.window_order(np.arange(3 * n), n, n % 5) for n in (1, 7, 1000, 65_537)]
    orders.append(pd.window_order(np.arange(1000) * 29_989, 6_000_000_011, 1))
    assert hashlib.sha256(np.concatenate(orders).tobytes()).hexdigest()[:16] == "82bcbc07dd64d20d"


def shard(tokens) -> bytes:
    header = np.array([20240520, 1, len(tokens), *[0] * 253], "<i4")
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


@pytest.fixture
def few_open_files():
    """A process that may open 300 files."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("sizes", [[50], [7, 7, 7, 7, 3], [1, 30, 1, 1, 17], [20, 0, 20, 10], [2] * 2000])
def test_windows_across_shards(here, sizes, few_open_files):
    """Foreign shards: found by the split's name, read end to end, in the stream's order, however many they are."""
    tokens = np.random.default_rng(0).integers(0, 65536, sum(sizes)).astype(np.uint16)
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    write_files(here, {f"foreign/a_train_{i:06d}.bin": shard(part) for i, part in enumerate(parts)})
    others = "a_val_000001", "validation_2", "retrieval_01", "._a_train_01", "strain"
    write_files(here, {f"foreign/{name}.bin": shard([1, 2]) for name in others})
    assert [p.name for p in pd.Shards(here / "foreign", "val", "").files] == ["a_val_000001.bin", "validation_2.bin"]
    shards = pd.Shards(here / "foreign", "train", "")
    assert shards.n_tokens == len(tokens) and len(shards.fingerprint()[1]) == 64
    for length in 2, 4, 9, len(tokens):
        n = len(tokens) // length
        order = pd.TrainingStream(shards, pd.DatasetConfig(name="x", n_ctx=length, seed=2), 5)
        positions = np.random.default_rng(1).permutation(3 * n)
        expected = tokens[: n * length].reshape(n, length)[pd.window_order(positions, n, 7)]
        read = order.read(positions)
        assert read.dtype == np.uint16 and np.array_equal(read, expected) and order.n_windows == n
    with pytest.raises(pd.UserError, match="n_ctx 5001"):
        pd.TrainingStream(shards, pd.DatasetConfig(name="x", n_ctx=5001), 0)


# -----------------------------------------------------------------------------
# the config, and a user's mistakes: one sentence that names them, and nothing written

# What a key becomes, as it is typed behind the = of an override; "refused" where it is.
TYPED = {
    "n_ctx": {"1e3": 1000, "1_000": 1000, "2.0": 2, "'9'": 9, "true": "refused", "1.5": "refused", "1e30": "refused"},
    "seed": {"9007199254740993": 2**53 + 1, "'9007199254740993'": 2**53 + 1, "null": None, "-1": "refused"},
    "name": {"2026-01-01": "2026-01-01", "'007'": "007", "12": "refused", "no": "refused"},
    "revision": {"'0x10'": "0x10", "'a\\0b'": "a\\0b", '"a\\0b"': "refused", '"\\ud800"': "refused"},
    "is_tokenized": {"yes": True, "1": "refused", "'true'": "refused"},
}


@pytest.mark.parametrize("key, typed", [(key, typed) for key, values in TYPED.items() for typed in values])
def test_typed(here, key, typed):
    raw = pd.read_config("config.yaml", [f"{T}.{key}={typed}"])
    expected = TYPED[key][typed]
    if expected == "refused":
        with pytest.raises(pd.UserError, match=rf"{T}\.{key}"):
            pd.dataset_configs(raw)
    else:
        found = getattr(pd.dataset_configs(raw)["train"], key)
        assert found == expected and type(found) is type(expected)


def test_overrides_and_differences(here):
    raw = pd.read_config("config.yaml", ["a=x", "b.c=[1, 2]", "b.e.f=3e-4", "g=null", "h=k=v", "i="])
    expected = {"a": "x", "b": {"c": [1, 2], "e": {"f": 3e-4}}, "g": None, "h": "k=v", "i": None}
    assert raw == config({}) | expected
    differ = pd.differences({"a": {"b": 1, "c": 10**9999}, "d": 2}, {"a": {"b": 1, "c": 2}, "d": 3}, ["d"])
    assert len(differ) == 1 and differ[0].startswith("a.c ") and len(differ[0]) < 99


def test_folders(here, monkeypatch):
    """val takes train's tokenizer and path; the default folder is named from the config alone; ~ is the home."""
    monkeypatch.setenv("HOME", str(here))

    def folders(train, val=None):
        return [str(c.folder()) for c in pd.dataset_configs(config({"path": None} | train, val)).values()]

    before = folders({"name": "docs.jsonl", "hf_tokenizer_path": "tok1/tokenizer.json"})
    assert before[0] == before[1] != folders({"hf_tokenizer_path": "tok2/tokenizer.json"})[0]
    Path("docs.jsonl").unlink()
    assert before == folders({"name": "docs.jsonl", "hf_tokenizer_path": "tok1/tokenizer.json"})
    stdlib = {"name": "python-stdlib", "hf_tokenizer_path": None, "train_tokenizer_vocab_size": 4096}
    assert folders(stdlib) == ["data/python-stdlib-bpe4096"] * 2
    assert folders({"path": "~/x"}, {"name": "other.txt"}) == [str(here / "x"), "data/other.txt-tiny.json"]


def test_param_decomps_one_section(here):
    data = {"dataset_name": "parquet", "data_files": "x/*.parquet", "tokenizer_name": "gpt2", "max_seq_len": 513}
    data |= {"train_split": "train", "eval_split": "test", "is_tokenized": True, "buffer_size": 1000}
    write_files(here, {"c.yaml": {"data": data, "seed": 3}})
    raw = pd.read_config("c.yaml")
    train, val = pd.dataset_configs(raw).values()
    assert raw["seed"] == 3 and "data" not in raw
    assert (train.name, train.hf_tokenizer_path, train.n_ctx, train.is_tokenized) == ("x/*.parquet", "gpt2", 513, True)
    assert (train.split, val.split, val.name) == ("train", "test", train.name)


GOOD = config({}, {"name": "docs.jsonl", "path": "out", "split": "train[:3]"})
LINES = jsonl(DOCS).split(b"\n")
BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]\n" for i in range(9))


def line(text: bytes, at: int = 5) -> dict:
    """The corpus with another line there, counted from 1."""
    return {"docs.jsonl": b"\n".join([*LINES[: at - 1], text, *LINES[at:]])}


def keys(**changed) -> dict:
    """The good config with other keys in its train section; None leaves a key out."""
    section = {k: v for k, v in (GOOD[T] | changed).items() if v is not None}
    return {"config.yaml": GOOD | {T: section}}


def ids(*rows) -> dict:
    return {"docs.jsonl": jsonl(rows, "ids")} | keys(is_tokenized=True, column_name="ids")


# what is wrong: (files beside the good ones; arguments; words of the sentence)
BAD = {
    "not YAML": ({"config.yaml": "a: [1,\nb: }"}, "", "YAML"),
    "a key twice": ({"config.yaml": "a: {b: 1, c: 2, b: 3}\n"}, "", "b twice"),
    "an alias bomb": ({"config.yaml": BOMB}, "", "aliases"),
    "unknown key": (keys(n_ctx=None), f"{T}.nctx=9", f"{T}.nctx nearest n_ctx"),
    "missing key": (keys(n_ctx=None), "", f"{T}.n_ctx tokens"),
    "misspelt override": ({}, "train_dataset_confg.split=train[:1]", f"train_dataset_confg {T}"),
    "both forms": ({}, "data.x=1", "data"),
    "split syntax": ({}, f"{T}.split=train[5", "train[5"),
    "no such split": ({}, f"{T}.split=validation", "validation docs.jsonl"),
    "empty slice": ({}, f"{T}.split=train[5:5]", "train[5:5]"),
    "slice of one document": ({"a.txt": "all"}, f"{T}.name=a.txt {T}.split=train[5:]", "<|endoftext|>"),
    "broken JSON": (line(b'{"text": "a"'), "", ":5: delimiter"),
    "nested too deep": (line(b"[" * 100_000), "", ":5: recursion"),
    "missing column": ({}, f"{T}.column_name=story", "docs.jsonl:1: story id text"),
    "broken UTF-8": (line(b'{"text": "\xff"}'), "", ":5: utf-8"),
    "lone surrogate": (line(b'{"text": "a\\ud83d"}'), "", ":5: surrogates"),
    "only empty documents": ({"docs.jsonl": jsonl(["", None])}, "", "docs.jsonl"),
    "a cut gzip": ({"a.txt.GZ": gzip.compress(b"text" * 99)[:-9]}, f"{T}.name=a.txt.GZ", "a.txt.GZ end"),
    "zip": (lambda: {"a.txt.zip": zipped(b"a\n<|endoftext|>\nb")}, f"{T}.name=a.txt.zip", "a.txt.zip .xz"),
    "no file": ({}, f"{T}.name=nowhere.jsonl", "nowhere.jsonl"),
    "a glob of nothing": ({}, f"{T}.name=x*.txt", "x*.txt"),
    "two kinds": ({"s/a.txt": "a", "s/b.jsonl": "b"}, f"{T}.name=s/*", ".jsonl .txt"),
    "another split of a saved one": (saved, f"{T}.name=b/train {T}.split=validation", "b/train validation"),
    "a second folder's source": ({}, "val_dataset_config.path=b val_dataset_config.name=gone.jsonl", "gone.jsonl"),
    "a builder's name": ({"b/x.jsonl": jsonl(DOCS)}, f"{T}.name=json", "json format"),
    "several configs": (TWO_CONFIGS, f"{T}.name=b", "config_name one two"),
    "column of a table": ({"x.csv": "a,b\n1,2"}, f"{T}.name=x.csv", "x.csv text a, b"),
    "no such hub id": ({}, f"{T}.name=nobody/nothing", "nobody/nothing"),
    "ids beyond the vocabulary": (ids([1, 2], [3, 70_000]), "", ":2: 70000"),
    "ids that are fractions": (ids([0.5]), "", ":1: ids"),
    "no tokenizer": ({}, f"{T}.hf_tokenizer_path=gone.json", "gone.json"),
    "broken tokenizer": ({"tiny.json": TINY[:-20]}, "", "tiny.json"),
    "tokenizer without EOS": ({"tiny.json": words_json(["a"], eos=None)}, "", "tiny.json end-of-sequence [EOS]"),
    "vocabulary too large": ({"tiny.json": words_json([f"w{i}" for i in range(70_000)])}, "", "70002 65536"),
    "two tokenizers": ({}, f"{T}.train_tokenizer_vocab_size=300", "train_tokenizer_vocab_size hf_tokenizer_path"),
    "no tokenizer key": (keys(hf_tokenizer_path=None), "", "hf_tokenizer_path"),
    "val's own tokenizer": ({}, "val_dataset_config.hf_tokenizer_path=x.json", "val_dataset_config tokenizer"),
    "BPE of ids": (keys(hf_tokenizer_path=None, train_tokenizer_vocab_size=300, is_tokenized=True), "", "is_tokenized"),
    "no such hub tokenizer": ({}, f"{T}.hf_tokenizer_path=nobody/nothing", "nobody/nothing network tokenizer.json"),
    "no gpt2": ({}, f"{T}.hf_tokenizer_path=gpt2", "TIKTOKEN_CACHE_DIR"),
    "shards of another's": ({"out/x.bin": "not ours"}, "", "out/x.bin another path"),
    "path is a file": ({"taken": ""}, f"{T}.path=taken val_dataset_config.path=taken", "taken"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes(here, kind, monkeypatch, tmp_path_factory):
    files, args, words = BAD[kind]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("empty")))
    write_files(here, {"config.yaml": GOOD} | (files() if callable(files) else files))
    before = tree(here), sorted(here.rglob("*"))
    refused(args.split(), *words.split())
    assert (tree(here), sorted(here.rglob("*"))) == before, "it wrote something"
