"""prepare_data.py as a user runs it: what lies in the folder afterwards, what survives a crash, what is refused."""

import fcntl
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    NASTY,
    ROOT,
    SHARED,
    bpe_json,
    check_split,
    config,
    environment,
    jsonl,
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

# the same examples on every run: a red test is a change of the code
few = settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(NASTY)

TINY = wordpiece_json()
DOCS = stories(60)


@pytest.fixture(scope="module", autouse=True)
def offline():
    """What `datasets` reads when it is imported: nothing here may wait for a network."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def bpe() -> str:
    return bpe_json()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the tiny tokenizer, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"tiny.json": TINY})
    return tmp_path


@pytest.fixture(scope="session")
def gpt2_env(tmp_path_factory) -> dict:
    """An environment in which tiktoken finds its gpt2 files without a network."""
    folder = tmp_path_factory.mktemp("tiktoken")
    cached = {
        "gpt2-vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "gpt2-encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    for name, digest in cached.items():
        (folder / digest).write_bytes(shared(f"tokenizers/{name}").read_bytes())
    return {"TIKTOKEN_CACHE_DIR": str(folder)}


def shared(name: str) -> Path:
    """A file beside the repo; the test is skipped where it is missing."""
    if not (SHARED / name).exists():
        pytest.skip(f"../shared/{name} is not there")
    return SHARED / name


def prepare(*args, **options):
    """Prepare config.yaml, which has to work."""
    done = run("prepare_data.py", "config.yaml", *args, **options)
    assert done.returncode == 0, done.stderr
    return done


def prepare_here(*args) -> None:
    """The same within this process, for tests that prepare often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", "config.yaml", *map(str, args)])
        pd.main()


def prepare_until(rename: int, *args) -> bool:
    """The same, but Ctrl-C comes when the nth file is about to get its name: whether it had ended by then."""
    replace, left = os.replace, rename

    def interrupted_replace(*paths):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        replace(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", interrupted_replace)
        try:
            prepare_here(*args)
        except SystemExit as e:
            assert e.code == 130
            return False
    return True


@pytest.fixture
def run_here(capfd):
    """Like run, but within this process, for the many cases in which it ends at once."""

    def main(script, *args) -> subprocess.CompletedProcess:
        capfd.readouterr()
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, args)])
            try:
                pd.main()
            except SystemExit as e:  # a text is what Python writes to stderr at the exit, with code 1
                code = e.code if isinstance(e.code, int) else 1
                print("" if isinstance(e.code, int) else e.code, file=sys.stderr)
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())

    return main


def refused(done, *fragments) -> str:
    """One sentence on stderr that names what is wrong, and a code that says so."""
    lines = done.stderr.strip("\n").split("\n")
    assert done.returncode > 0 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} is not in: {lines[0]}"
    return lines[0]


def encoded(docs, tokenizer_json: str = TINY) -> list[list[int]]:
    """What the documents should become: each one's ids and EOS, empty ones left out."""
    encode, eos = reference(tokenizer_json)
    return [[*encode(doc), eos] for doc in docs if doc]


def known(docs, folder: Path = Path("out"), split: str = "train") -> list:
    """The documents that a split holds, in a folder whose tokenizer is words_json(docs)."""
    tokens = stream(folder, split)
    assert set(tokens[1::2]) <= {1} and 0 not in tokens[::2]
    words = list(dict.fromkeys(docs))
    return [words[i - 2] for i in tokens[::2]]


# -----------------------------------------------------------------------------
# the shard, and its tokens


def test_format(here, bpe):
    write_files(
        here, {"docs.jsonl": jsonl(DOCS), "bpe.json": bpe, "config.yaml": config({"hf_tokenizer_path": "bpe.json"})}
    )
    done = prepare("--shard-tokens", 1000)
    assert "out" in done.stdout and "Traceback" not in done.stderr
    ids = encoded(DOCS, bpe)
    check_split(here / "out", "train", ids, 1000)
    check_split(here / "out", "val", ids[-3:], 1000)
    about = json.loads(Path("out/dataset.json").read_text())
    assert set(tree(here / "out")) == {"dataset.json", "tokenizer.json"} | {
        shard["file"] for split in about["splits"].values() for shard in split["shards"]
    }
    digest = tree(here / "out")["tokenizer.json"]
    assert about["tokenizer"] == {"name": "bpe.json", "sha256": digest, "vocab_size": 600, "eos_token_id": 1}
    assert about["source"]["train"]["name"] == "docs.jsonl" and about["source"]["train"]["split"] == "train"
    assert about["source"]["val"]["split"] == "train[-3:]"
    assert about["splits"]["train"]["bytes"] == sum(len(d.encode()) for d in DOCS)
    assert encoded(DOCS, Path("out/tokenizer.json").read_text()) == ids


TOKENIZERS = {
    "wordpiece": lambda: {"hf_tokenizer_path": "tiny.json"},
    "bpe": lambda: {"hf_tokenizer_path": "bpe.json"},
    "trained": lambda: {"hf_tokenizer_path": None, "train_tokenizer_vocab_size": 700},
    "simplestories": lambda: {"hf_tokenizer_path": str(shared("tokenizers/simplestories-tokenizer.json"))},
    "neox": lambda: {"hf_tokenizer_path": str(shared("tokenizers/neox-20B_tokenizer.json"))},
    "gpt2": lambda: {"hf_tokenizer_path": "gpt2"},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_exact(here, bpe, kind, request, monkeypatch):
    keys = TOKENIZERS[kind]()
    env = request.getfixturevalue("gpt2_env") if kind == "gpt2" else {}
    big = " ".join(stories(6500, seed=1))[:1_000_000]
    docs = [*DOCS, *NASTY, big, "after the big one", *NASTY[::-1], ""]
    if (SHARED / "corpora").exists():
        lines = (SHARED / "corpora/childrens_classics/stories.jsonl").read_text().split("\n")[:8]
        docs += [json.loads(line)["story"] for line in lines]
    assert len(big) == 1_000_000
    write_files(here, {"docs.jsonl": jsonl(docs), "bpe.json": bpe, "config.yaml": config(keys)})
    prepare("--shard-tokens", 100_000, env=env)
    written = Path("out/tokenizer.json").read_text()
    if kind == "gpt2":
        monkeypatch.setenv(*next(iter(env.items())))
        gpt2 = pytest.importorskip("tiktoken").get_encoding("gpt2")
        ids = [[*gpt2.encode_ordinary(doc), 50256] for doc in docs if doc]
        assert encoded([doc for doc in docs if doc != big], written) == [i for i in ids if len(i) < 100_000]
    else:
        if keys["hf_tokenizer_path"]:
            assert written == Path(keys["hf_tokenizer_path"]).read_text()
        ids = encoded(docs, written)
    check_split(here / "out", "train", ids, 100_000, empty=docs.count(""))
    # the tokenizer that lies there is of use as it is: its EOS is a special token when one is asked for
    from tokenizers import Tokenizer

    tok, about = (
        Tokenizer.from_file("out/tokenizer.json"),
        json.loads(Path("out/dataset.json").read_text())["tokenizer"],
    )
    assert tok.encode(tok.id_to_token(about["eos_token_id"])).ids[0] == about["eos_token_id"]
    assert about["vocab_size"] == tok.get_vocab_size()


@few
@given(docs=st.lists(texts, min_size=1, max_size=30), shard_tokens=st.integers(1, 60), workers=st.integers(1, 3))
def test_any_documents(tmp_path_factory, docs, shard_tokens, workers):
    """Whatever the documents are and wherever the shards end."""
    here = tmp_path_factory.mktemp("any")
    ids = encoded([*docs, "end"])
    shard_tokens = max(shard_tokens, sum(map(len, ids)) // 12)  # each shard costs a few syncs of the disk
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        files = {"docs.jsonl": jsonl([*docs, "end"]), "tiny.json": TINY}
        write_files(here, files | {"config.yaml": config({}, {"split": "train[-1:]"})})
        prepare_here("--shard-tokens", shard_tokens, "--workers", workers)
    check_split(here / "out", "train", ids, shard_tokens, empty=docs.count(""))
    check_split(here / "out", "val", ids[-1:], shard_tokens)


@given(docs=st.lists(texts, max_size=8))
@settings(few, max_examples=200)
def test_encoder(bpe, docs):
    for tokenizer_json in TINY, bpe:
        encoder = pd.json_encoder("tiny", tokenizer_json.encode())
        encode, eos = reference(tokenizer_json)
        assert [list(ids) for ids in encoder.encode_batch(docs)] == [encode(doc) for doc in docs]
        assert encoder.eos_token_id == eos


@pytest.fixture(scope="module")
def gpt2(gpt2_env):
    """tiktoken's gpt2, the encoder made of it, and the tokenizer.json that stands for it."""
    tiktoken, tokenizers = pytest.importorskip("tiktoken"), pytest.importorskip("tokenizers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", gpt2_env["TIKTOKEN_CACHE_DIR"])
        encoder = pd.load_encoder("gpt2")
        return tiktoken.get_encoding("gpt2"), encoder, tokenizers.Tokenizer.from_str(encoder.json.decode())


@given(text=texts | st.text(st.characters(max_codepoint=0x17F)) | st.text(" \t\n'<|>adelnostx1", max_size=200))
@settings(few, max_examples=500)
def test_gpt2_json(gpt2, text):
    enc, encoder, tok = gpt2
    tok.encode_special_tokens = True
    ids = enc.encode_ordinary(text)
    assert tok.encode(text, add_special_tokens=False).ids == ids
    assert [list(i) for i in encoder.encode_batch([text])] == [ids]
    assert tok.decode(ids) == text


def test_gpt2_json_nasty(gpt2):
    enc, _, tok = gpt2
    tok.encode_special_tokens = False
    assert tok.encode("<|endoftext|>").ids == [enc.eot_token] == [50256]
    assert tok.get_vocab_size() == enc.n_vocab
    tok.encode_special_tokens = True
    every_token = [enc.decode_single_token_bytes(i) for i in range(50256)]
    for text in [*NASTY, *(t.decode() for t in every_token[::7] if is_utf8(t))]:
        assert tok.encode(text, add_special_tokens=False).ids == enc.encode_ordinary(text)


def is_utf8(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("kind", ["words", "unigram", "without a type", "BPE that looks whole words up"])
def test_special_names_are_text(here, kind):
    """A tokenizer whose model would take its EOS's name for a word must not find it in text: EOS count = documents."""
    spec = json.loads(words_json(["the", "end"])) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    if kind == "unigram":  # such as T5's: a special token is a piece like any other, and the likeliest of all
        pieces = [["[UNK]", 0.0], ["[EOS]", 0.0], *([c, -5.0] for c in "▁thend[]EOS")]
        spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    if kind == "without a type":
        del spec["model"]["type"]
    if kind == "BPE that looks whole words up":
        spec["model"] = {"type": "BPE", "vocab": spec["model"]["vocab"], "merges": [], "ignore_merges": True}
        spec["model"]["vocab"] |= {c: 4 + i for i, c in enumerate("thend[]EOS")}
    docs = ["the end", "the [EOS] end", "[EOS]"]
    write_files(here, {"words.json": json.dumps(spec), "docs.jsonl": jsonl(docs)})
    write_files(here, {"config.yaml": config({"hf_tokenizer_path": "words.json"})})
    prepare_here()
    assert stream(here / "out", "train").count(1) == len(docs)


@pytest.mark.parametrize("eos", ["<|padding|>", {"content": "<|padding|>"}])
def test_eos_of_tokenizer_config(here, bpe, eos):
    """A folder as transformers saves it says which of the special tokens is the EOS."""
    write_files(here, {"tok/tokenizer.json": bpe, "tok/tokenizer_config.json": json.dumps({"eos_token": eos})})
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({"hf_tokenizer_path": "tok"})})
    prepare_here()
    encode, _ = reference(bpe)
    check_split(here / "out", "train", [[*encode(doc), 0] for doc in DOCS], 10**8)


# -----------------------------------------------------------------------------
# the same bytes


def test_same_bytes(here):
    """Workers, the folder and a second time change nothing; another shard size changes the cuts alone."""
    docs = [doc for i, doc in enumerate(stories(3000, seed=2)) for doc in [doc] + [""] * (i % 97 == 0)]
    write_files(here, {"docs.jsonl": jsonl(docs), "config.yaml": config({})})
    ids = encoded(docs)
    folders = {}
    for name, shard_tokens, workers in [("a", 20_000, 1), ("b", 20_000, 3), ("c", 10**8, 2), ("d", 7_001, 3)]:
        prepare(f"train_dataset_config.path={name}", "--shard-tokens", shard_tokens, "--workers", workers)
        check_split(here / name, "train", ids, shard_tokens, empty=docs.count(""))
        folders[name] = tree(here / name)
    assert folders["a"] == folders["b"]


@pytest.mark.parametrize("shard_tokens", [100, 1000])
def test_shards_are_full(here, shard_tokens):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    prepare("--shard-tokens", shard_tokens, "--workers", 3)
    check_split(here / "out", "train", encoded(DOCS), shard_tokens)


def test_trained_bpe_is_deterministic(here):
    """The same twice, from the training split alone, with any number of workers."""
    docs = stories(400, seed=3)
    trained = {"hf_tokenizer_path": None, "train_tokenizer_vocab_size": 500, "split": "train[:50%]"}
    write_files(here, {"docs.jsonl": jsonl(docs), "config.yaml": config(trained, {"split": "train[-5:]"})})
    write_files(here, {"half.jsonl": jsonl(docs[:200] + ["ÿ" * 99] * 200)})
    prepare("train_dataset_config.path=a", "--workers", 1)
    prepare("train_dataset_config.path=b", "--workers", 2)
    prepare("train_dataset_config.path=c", *(f"{s}_dataset_config.name=half.jsonl" for s in ("train", "val")))
    assert tree(here / "a") == tree(here / "b")
    assert tree(here / "a")["tokenizer.json"] == tree(here / "c")["tokenizer.json"]
    about = json.loads(Path("a/dataset.json").read_text())["tokenizer"]
    assert about["vocab_size"] == 500
    check_split(here / "a", "train", encoded(docs[:200], Path("a/tokenizer.json").read_text()), 10**8)


@pytest.mark.parametrize("own", [False, True], ids=["another's", "the config's"])
def test_a_tokenizer_that_was_there_before_stays(here, run_here, own):
    keys = {"hf_tokenizer_path": "out/tokenizer.json"} if own else {}
    write_files(here, {"out/tokenizer.json": TINY, "config.yaml": config(keys)})
    for line in (b"{", b""):
        write_files(here, {"docs.jsonl": jsonl(DOCS) + line})
        done, files = run_here("prepare_data.py", "config.yaml", "--shard-tokens", 100), tree(Path("out"))
        if not own:
            refused(done, "out/tokenizer.json", "choose another path")
        elif line:
            refused(done, "docs.jsonl, line 61")
        else:
            assert done.returncode == 0 and files.pop("dataset.json") and stream(Path("out"), "train")
            continue
        assert files == {"tokenizer.json": hashlib.sha256(TINY.encode()).hexdigest()}


# -----------------------------------------------------------------------------
# interruptions


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A preparation of a second or two: (folder, command, what it makes when nobody disturbs it)."""
    here = tmp_path_factory.mktemp("slow")
    rng = random.Random(8)
    docs = [rng.choice(["", doc, doc]) for doc in stories(6_000, seed=4)]
    write_files(here, {"docs.jsonl": jsonl(docs), "tiny.json": TINY, "config.yaml": config({})})
    command = ["config.yaml", "--shard-tokens", "20_000", "--workers", "2"]
    done = run("prepare_data.py", *command, cwd=here)
    assert done.returncode == 0, done.stderr
    check_split(here / "out", "train", encoded(docs), 20_000, empty=docs.count(""))
    return here, command, tree(here / "out")


def workers_of(pid: int) -> list[int]:
    """The processes that a preparation encodes with."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def interrupted(slow, name: str, signum: int, shards: int, delay: float = 0, whom=lambda pid: [pid]):
    """Start preparing into the folder `name` and send the signal once `shards` are there: (process, stderr).

    whom(pid) are the processes that get it; a negative one is a group.
    """
    here, command, _ = slow
    errors = here / f"{name}.err"
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "prepare_data.py"), *command, f"train_dataset_config.path={name}"],
        cwd=here,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=errors.open("w"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests begun with & ignore it
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while len(list(here.glob(f"{name}/*.bin"))) < shards and started.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(delay)
    for pid in whom(started.pid):
        os.kill(pid, signum)
    started.wait(timeout=60)
    return started, errors.read_text()


def resumed(slow, name: str) -> None:
    """The same command again ends as if nothing had been, and leaves finished shards alone."""
    here, command, whole = slow
    before = {p.name: p.stat().st_mtime_ns for p in sorted(here.glob(f"{name}/*.bin"))}
    done = run("prepare_data.py", *command, f"train_dataset_config.path={name}", cwd=here)
    assert done.returncode == 0, done.stderr
    assert tree(here / name) == whole
    for shard in list(before)[:-1]:  # the last one's name may have been newer than the record of it
        assert (here / name / shard).stat().st_mtime_ns == before[shard], f"{shard} was made twice"


@pytest.mark.parametrize("shards, delay", [(0, 0.25), (1, 0.0), (3, 0.011), (9, 0.004)])
def test_killed(slow, shards, delay):
    started, _ = interrupted(slow, f"killed{shards}", signal.SIGKILL, shards, delay)
    assert started.returncode == -signal.SIGKILL, "it had ended before it was killed: the corpus is too small"
    resumed(slow, f"killed{shards}")


def test_killed_again_and_again(slow):
    for shards in (2, 6, 11):
        started, _ = interrupted(slow, "again", signal.SIGKILL, shards)
        assert started.returncode == -signal.SIGKILL
    resumed(slow, "again")


def test_ctrl_c(slow):
    """A terminal sends it to the workers, too."""
    started, stderr = interrupted(slow, "ctrl_c", signal.SIGINT, 3, whom=lambda pid: [-pid])
    assert started.returncode > 0 and "Traceback" not in stderr
    assert len(stderr.split("\n")) <= 3 and len(stderr.strip().split("\n")) == 1, stderr
    resumed(slow, "ctrl_c")


@pytest.mark.parametrize("pause", [0.01, 0.1, 0.6])
def test_ctrl_c_twice(slow, pause):
    """A second one comes while the workers end."""

    def twice(pid):
        os.killpg(pid, signal.SIGINT)
        time.sleep(pause)
        return [-pid] if Path(f"/proc/{pid}/exe").exists() else []

    started, stderr = interrupted(slow, f"twice{pause}", signal.SIGINT, 3, whom=twice)
    assert started.returncode > 0 and "Traceback" not in stderr, stderr
    resumed(slow, f"twice{pause}")


def test_killed_worker(slow):
    """As by a kernel that is out of memory."""
    started, stderr = interrupted(slow, "worker", signal.SIGKILL, 3, whom=lambda pid: workers_of(pid)[:1])
    refused(subprocess.CompletedProcess([], started.returncode, "", stderr), "a worker was killed", "--workers")
    resumed(slow, "worker")


def test_workers_die_with_their_parent(slow):
    """At once, also those that wait for work, and none keeps the folder locked."""
    orphans = []
    interrupted(slow, "orphans", signal.SIGKILL, 3, whom=lambda pid: orphans.extend(workers_of(pid)) or [pid])
    assert len(orphans) == 2
    resumed(slow, "orphans")
    assert not [pid for pid in orphans if os.path.exists(f"/proc/{pid}/exe")]


def test_workers_hold_no_lock(slow):
    """A stopped worker cannot notice that its parent is gone, and the folder is free all the same."""
    stopped = []

    def stop_workers(pid):
        stopped.extend(workers_of(pid))
        for worker in stopped:
            os.kill(worker, signal.SIGSTOP)
        return [pid]

    try:
        interrupted(slow, "lock", signal.SIGKILL, 3, whom=stop_workers)
        resumed(slow, "lock")
    finally:
        for worker in stopped:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 1100)], ids=["gone", "cut"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_shard_lost_meanwhile_is_missed(here, run_here, finished, damage):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    assert prepare_until(10**9 if finished else 8, "--shard-tokens", 100) == finished
    damage("out/train_000000.bin")
    refused(run_here("prepare_data.py", "config.yaml", "--shard-tokens", 100), "out/train_000000.bin", "delete out")


@pytest.mark.parametrize("changed", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_changed_meanwhile_is_refused(here, run_here, bpe, changed):
    keys = {"hf_tokenizer_path": "tok"}
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config(keys), "tok/tokenizer.json": TINY})
    assert not prepare_until(8, "--shard-tokens", 100)
    write_files(here, {f"tok/{changed}": bpe if changed == "tokenizer.json" else '{"eos_token": "[UNK]"}'})
    refused(run_here("prepare_data.py", "config.yaml", "--shard-tokens", 100), "tokenizer", "another")


def test_resume_reads_on(slow):
    """What precedes the last finished shard is not read again: it may even be damaged by now."""
    here, _, _ = slow
    interrupted(slow, "reads_on", signal.SIGKILL, 6)
    docs, stat = here / "docs.jsonl", (here / "docs.jsonl").stat()
    lines = docs.read_bytes().split(b"\n")
    damaged = b"\n".join([*lines[:5], b"#" * len(lines[5]), *lines[6:]])
    try:
        docs.write_bytes(damaged)
        os.utime(docs, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        resumed(slow, "reads_on")
    finally:
        docs.write_bytes(b"\n".join(lines))
        os.utime(docs, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_full_disk(slow):
    """A write that fails is one sentence, and the same command goes on when there is room."""
    here, command, _ = slow

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # less than one shard

    command = [*command, "train_dataset_config.path=full"]
    refused(run("prepare_data.py", *command, cwd=here, preexec_fn=limit), "the same command")
    assert not list(here.glob("full/*.bin")) and not list(here.glob("full/.*.part"))
    resumed(slow, "full")


# one process prepares again and again, in children that die at the nth moment at which the disk changes; each time the
# next child must end with the bytes of an undisturbed one
DYING = """
import os, sys, prepare_data, tokenizers

def child(path, die_at):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    moments = 0
    def moment():
        nonlocal moments
        moments += 1
        if moments == die_at:
            os._exit(9)
    def dying(real):
        def call(*args, **kwargs):
            moment()
            real(*args, **kwargs)
        return call
    for name in "fsync", "replace", "unlink", "mkdir":
        setattr(os, name, dying(getattr(os, name)))
    sys.argv = ["prepare_data.py", *sys.argv[1:], f"train_dataset_config.path={path}", "--workers", "1"]
    code = 1
    try:
        prepare_data.main()
        code = 0
    finally:
        os._exit(code)

at = 0
while True:
    at += 1
    if (code := child(f"died{at}", at)) == 0:
        break
    assert code == 9, code
    if at % 3 == 0:
        assert child(f"died{at}", 7) in (0, 9)
    assert child(f"died{at}", None) == 0, f"after it had died at moment {at}"
print(at - 1)
"""


@pytest.mark.parametrize("trained", [False, True])
def test_death_at_every_moment(here, bpe, trained):
    """Documents end at shards' ends and empty ones stand around them: places and counts are easy to get wrong."""
    words = ["aa", "bb", "cc"]
    docs = ["", *words, "", "", *words, "a", "", "aaa", "", *words, "the " * 7, "", ""]
    keys = {"hf_tokenizer_path": None, "train_tokenizer_vocab_size": 270} if trained else {}
    write_files(here, {"docs.jsonl": jsonl(docs), "config.yaml": config(keys, {"split": "train[:6]"})})
    shard_tokens = 40 if trained else 9  # aa is a ##a [EOS]: three documents a shard
    if trained:
        docs *= 2
    write_files(here, {"docs.jsonl": jsonl(docs)})
    done = subprocess.run(
        [sys.executable, "-c", DYING, "config.yaml", "--shard-tokens", str(shard_tokens)],
        env=environment({"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    last = int(done.stdout.split()[-1])
    assert last > 20
    whole = tree(here / f"died{last + 1}")
    ids = encoded(docs, Path(f"died{last + 1}/tokenizer.json").read_text())
    check_split(here / f"died{last + 1}", "train", ids, shard_tokens, empty=docs.count(""))
    for at in range(1, last + 1):
        assert tree(here / f"died{at}") == whole, f"after it had died at moment {at}"


def test_every_rename_is_synced(here, monkeypatch):
    """A name appears only when what it names is on the disk, and is itself on the disk before anything relies on it."""
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    synced, events = {}, []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(fd):
        fsync(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        synced[path] = path.stat().st_size
        events.append(path)

    def watched_replace(source, target):
        source = Path(source).absolute()
        assert synced.get(source) == source.stat().st_size, f"{source} was renamed before it was synced"
        replace(source, target)
        events.append(f"rename {target}")

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to tell which file is synced")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    prepare_here("--shard-tokens", 1000)
    renames = [i for i, event in enumerate(events) if isinstance(event, str)]
    assert len(renames) > 5 and any("dataset.json" in events[i] for i in renames)
    assert all(events[i + 1] == (here / "out").resolve() for i in renames), "the folder was not synced after a rename"


def test_finished_is_left_alone(here):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    prepare("--shard-tokens", 1000)
    before = {p: p.stat().st_mtime_ns for p in [here / "out", *Path("out").iterdir()]}
    started = time.monotonic()
    assert "already prepared" in prepare("--shard-tokens", 1000, "--workers", 1).stdout
    assert time.monotonic() - started < 10
    assert {p: p.stat().st_mtime_ns for p in [here / "out", *Path("out").iterdir()]} == before


OTHERS = {
    "split": (["train_dataset_config.split=train[:50]"], ["train.split", "train[:50]"]),
    "val split": (["val_dataset_config.split=train[-4:]"], ["val.split", "train[-4:]"]),
    "column": (["train_dataset_config.column_name=id"], ["train.column_name", "text", "id"]),
    "tokenizer": (["train_dataset_config.hf_tokenizer_path=bpe.json"], ["train.tokenizer", "tiny.json", "bpe.json"]),
    "name": (["train_dataset_config.name=more.jsonl", "val_dataset_config.path=out"], ["train.name", "more.jsonl"]),
    "shard size": (["--shard-tokens=999"], ["shard_tokens", "1000", "999"]),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("finished", [True, False])
def test_another_config_is_refused(here, run_here, bpe, other, finished):
    args, fragments = OTHERS[other]
    write_files(here, {"docs.jsonl": jsonl(DOCS), "more.jsonl": jsonl(DOCS[1:]), "bpe.json": bpe})
    write_files(here, {"config.yaml": config({})})
    if finished:
        prepare_here("--shard-tokens", 1000)
    else:
        assert not prepare_until(6, "--shard-tokens", 1000) and not Path("out/dataset.json").exists()
    before = tree(here)
    refused(run_here("prepare_data.py", "config.yaml", "--shard-tokens", 1000, *args), "out", *fragments)
    assert tree(here) == before


def test_changed_source_is_refused(here):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    prepare()
    write_files(here, {"docs.jsonl": jsonl([*DOCS, "one more"])})
    before = tree(here)
    refused(run("prepare_data.py", "config.yaml"), "out", "train.")
    assert tree(here) == before


def test_foreign_shards_are_not_overwritten(here):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({}), "out/train_000000.bin": b"not ours"})
    before = tree(here)
    refused(run("prepare_data.py", "config.yaml"), "out", ".bin")
    assert tree(here) == before


def test_other_preparation_meanwhile(here, monkeypatch, run_here):
    """What is in the folder may have changed between the first look and the lock: rows take hours to count."""
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    load, before = pd.load_encoder, {}

    def slow_load(name):
        prepare("train_dataset_config.split=train[:7]", "--shard-tokens", 50)
        before.update(tree(here))
        return load(name)

    monkeypatch.setattr(pd, "load_encoder", slow_load)
    refused(run_here("prepare_data.py", "config.yaml"), "out", "train.split")
    assert tree(here) == before


def test_two_at_once(here):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({}), "out/.lock": b""})
    with open("out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(run("prepare_data.py", "config.yaml"), "out", "another")
        assert os.listdir("out") == [".lock"]
    prepare()
    check_split(here / "out", "train", encoded(DOCS), 10**8)


# -----------------------------------------------------------------------------
# sources

WORDS = [f"document {i}\n\twith <|endoftext|> inside, ünicode 🙂" for i in range(40)]


def separated(docs, newline: str = "\n", before: str = "", after: str = "") -> bytes:
    """A .txt with the documents between separator lines."""
    mark = f"{newline}<|endoftext|>{newline}"
    return (before + mark.join(d.replace("\n", newline) for d in docs) + after).encode()


DOS = [doc.replace("\n", "\r\n") for doc in WORDS]
# name: (files, value of `name`, other keys, documents, empty documents)
LOCAL = {
    "txt": ({"a.txt": separated(WORDS)}, "a.txt", {}, WORDS, 0),
    "txt that ends its last line": ({"a.txt": separated(WORDS, after="\n")}, "a.txt", {}, WORDS, 0),
    "txt that ends with a separator": ({"a.txt": separated(WORDS, after="\n<|endoftext|>\n")}, "a.txt", {}, WORDS, 0),
    "txt that ends within it": ({"a.txt": separated(WORDS, after="\n<|endoftext|>")}, "a.txt", {}, WORDS, 0),
    "txt that starts with one": ({"a.txt": separated(WORDS, before="<|endoftext|>\n")}, "a.txt", {}, WORDS, 1),
    "txt with two together": ({"a.txt": separated(["a", "", "b", "", "", "c"])}, "a.txt", {}, ["a", "b", "c"], 3),
    "txt with CRLF": ({"a.txt": separated(WORDS, "\r\n", after="\r\n")}, "a.txt", {}, DOS, 0),
    "txt with blank lines": ({"a.txt": separated(["\na\n\n", " b"])}, "a.txt", {}, ["\na\n\n", " b"], 0),
    "txt without separators": ({"a.txt": b"all of\n\nit\n"}, "a.txt", {}, ["all of\n\nit"], 0),
    "txt.gz": ({"a.txt.gz": separated(WORDS)}, "a.txt.gz", {}, WORDS, 0),
    "jsonl": ({"a.jsonl": jsonl(WORDS)}, "a.jsonl", {}, WORDS, 0),
    "jsonl column": ({"a.jsonl": jsonl(WORDS, "story")}, "a.jsonl", {"column_name": "story"}, WORDS, 0),
    "jsonl with CRLF": ({"a.jsonl": jsonl(WORDS).replace(b"\n", b"\r\n")}, "a.jsonl", {}, WORDS, 0),
    "jsonl without last newline": ({"a.jsonl": jsonl(WORDS).rstrip(b"\n")}, "a.jsonl", {}, WORDS, 0),
    "jsonl with blank lines": ({"a.jsonl": b"\n" + jsonl(WORDS).replace(b"\n", b"\n \n")}, "a.jsonl", {}, WORDS, 0),
    "jsonl.gz": ({"a.jsonl.gz": jsonl(WORDS)}, "a.jsonl.gz", {}, WORDS, 0),
    "txt with a byte order mark": ({"a.txt": b"\xef\xbb\xbf" + separated(WORDS)}, "a.txt", {}, WORDS, 0),
    "jsonl with a byte order mark": ({"a.jsonl": b"\xef\xbb\xbf" + jsonl(WORDS)}, "a.jsonl", {}, WORDS, 0),
    "folder with files about it": (
        {f"b/{name}": "not this" for name in ("README.md", "LICENSE", ".x.txt", ".git/x.txt", "c/.d/x.txt")}
        | {"b/medieval.txt": separated(WORDS[:9]), "b/z/latest.txt": separated(WORDS[9:])},
        "b",
        {},
        WORDS,
        0,
    ),
    "glob with files about it": ({"b/a.txt": separated(WORDS), "b/README.md": "not this"}, "b/*", {}, WORDS, 0),
    "glob": (
        {"b/x2.jsonl": jsonl(WORDS[20:]), "b/x10.jsonl": jsonl(WORDS[:20]), "b/y.jsonl": jsonl(["not this"])},
        "b/x*.jsonl",
        {},
        WORDS,
        0,
    ),
    "folder": (
        {"b/2.txt": separated(WORDS[20:]), "b/1.txt": separated(WORDS[:20], after="\n"), "b/README.md": b"# about"},
        "b",
        {},
        WORDS,
        0,
    ),
    "folder of gz": (
        {"b/2.jsonl.gz": jsonl(WORDS[20:]), "b/1.jsonl.gz": jsonl(WORDS[:20]), "b/.DS_Store": b"\0"},
        "b",
        {},
        WORDS,
        0,
    ),
}


@pytest.mark.parametrize("kind", LOCAL)
def test_local_sources(here, kind):
    files, name, keys, docs, empty = LOCAL[kind]
    write_files(here, {"words.json": words_json(docs)} | files)
    source = {"name": name, "hf_tokenizer_path": "words.json"} | keys
    write_files(here, {"config.yaml": config(source, keys | {"split": "train[-1:]"})})
    before = tree(here)
    prepare_here()
    assert known(docs) == docs and known(docs, split="val") == docs[-1:]
    check_split(here / "out", "train", [[i + 2, 1] for i in range(len(docs))], 10**8, empty=empty)
    assert before.items() <= tree(here).items(), "the source changed"


@given(
    lines=st.lists(st.sampled_from([b"<|endoftext|>", b" <|endoftext|> ", b"a<|endoftext|>", b"a", b"", b"b c", b" "])),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
)
@settings(few, max_examples=100)
def test_txt_separators(tmp_path_factory, lines, newline, last):
    """Where documents of a .txt begin and end, told from the lines."""
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    path.write_bytes(newline.join(lines) + newline * (last and bool(lines)))
    if not last and lines and not lines[-1]:
        del lines[-1]  # the newline before it ends the file's last line
    documents, at_hand = [], []
    for line in lines:
        if line.strip() == b"<|endoftext|>":
            documents.append(newline.join(at_hand))
            at_hand = []
        else:
            at_hand.append(line)
    documents.append(newline.join(at_hand))
    source = pd.DatasetConfig(name=str(path), n_ctx=9)
    try:
        opened, _, _ = pd.open_source(source)
        found = [raw for _, raw in opened.rows()]
    except pd.UserError:
        found = []
    assert [d for d in found if d] == [d for d in documents if d]


@pytest.mark.parametrize("path", ["b", "b/shards"])
def test_shards_within_the_folder_of_the_source(here, path):
    """They are not taken for a part of it."""
    keys = {"name": str(here / "b"), "path": path}
    write_files(here, {"b/docs.jsonl": jsonl(DOCS), "config.yaml": config(keys)})
    assert not prepare_until(8, "--shard-tokens", 100)
    prepare_here("--shard-tokens", 100)
    before = tree(here)
    prepare_here("--shard-tokens", 100)
    assert tree(here) == before
    assert stream(here / path, "train") == [*itertools.chain(*encoded(DOCS))]


def test_links_in_a_folder(here, run_here):
    write_files(here, {"far/a.jsonl": jsonl(DOCS), "config.yaml": config({"name": "b"})})
    (here / "b").mkdir()
    (here / "b" / "c").symlink_to(here / "far")
    prepare_here()
    assert stream(here / "out", "train") == [*itertools.chain(*encoded(DOCS))]
    shutil.rmtree("out")
    (here / "b" / "d.jsonl").symlink_to("nowhere")
    refused(run_here("prepare_data.py", "config.yaml"), "b/d.jsonl", "link")


def test_dropout_of_merges_is_left_out(here, bpe):
    """The bytes depend on source and config alone."""
    spec = json.loads(bpe)
    spec["model"]["dropout"] = 0.5
    write_files(here, {"d.json": json.dumps(spec), "bpe.json": bpe, "docs.jsonl": jsonl(DOCS)})
    for name in ("d", "bpe"):
        write_files(here, {"config.yaml": config({"hf_tokenizer_path": f"{name}.json", "path": name})})
        prepare_here()
    assert Path("d/train_000000.bin").read_bytes() == Path("bpe/train_000000.bin").read_bytes()


def stdlib() -> dict[str, str]:
    """{path: text} of the running interpreter's library without its tests, found by walking."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in ("test", "tests", "idle_test", "site-packages", "dist-packages")]
        for path in (Path(folder, f) for f in files if f.endswith(".py")):
            if path.stat().st_size and "__pycache__" not in path.parts:
                found[str(path.relative_to(root))] = path.read_bytes().decode()
    return found


def test_python_stdlib(here):
    files = stdlib()
    assert len(files) > 300
    docs = list(files.values())
    write_files(here, {"words.json": words_json(docs)})
    source = {"name": "python-stdlib", "hf_tokenizer_path": "words.json", "split": "train[:95%]"}
    write_files(here, {"config.yaml": config(source, {"split": "train[95%:]"})})
    prepare()
    train, val = known(docs), known(docs, split="val")
    assert len(train) == round(0.95 * len(docs)) and sorted(train + val) == sorted(docs)
    assert train != sorted(train), "files in the order of their names would make the end an unfair sample"


def parquet(path, rows, column: str = "text", **options) -> None:
    """A table with this column and one of numbers; the test is skipped where nothing reads it."""
    pytest.importorskip("datasets")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"id": list(range(len(rows))), column: rows})
    pq.write_table(table, path, **options)


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """A folder in which each kind of source that `datasets` reads holds WORDS, or ids."""
    zstandard = pytest.importorskip("zstandard")

    here = tmp_path_factory.mktemp("tables")
    (here / "repo/data").mkdir(parents=True)

    parquet(here / "repo/data/train-00000-of-00002.parquet", WORDS[:13], "story", row_group_size=5)
    parquet(here / "repo/data/train-00001-of-00002.parquet", WORDS[13:30], "story")
    parquet(here / "repo/data/test-00000-of-00001.parquet", WORDS[30:], "story")
    write_files(here, {"repo/README.md": "---\nlicense: mit\n---\n"})
    (here / "t").mkdir()
    parquet(here / "t/plain.parquet", WORDS)
    parquet(here / "here.parquet", WORDS)
    (here / "t/a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(WORDS)))
    parquet(here / "t/ids.parquet", IDS, "input_ids")
    write_files(here, {"t/ids.jsonl": jsonl(IDS, "input_ids"), "tiny.json": TINY, "words.json": words_json(WORDS)})
    return here


IDS = [list(range(2, 2 + n)) for n in (9, 1, 30, 9, 4, 17)]  # shorter and longer than a window; none holds the EOS
# name: (train section, val section, documents of train, documents of val)
STORY = {"name": "repo", "column_name": "story"}
TABLES = {
    "hub layout": (STORY, STORY | {"split": "test"}, WORDS[:30], WORDS[30:]),
    "hub layout, one split": (
        STORY | {"split": "train[:95%]"},
        STORY | {"split": "train[95%:]"},
        WORDS[:28],
        WORDS[28:30],
    ),
    "parquet": ({"name": "t/plain.parquet"}, {"split": "train[-3:]"}, WORDS, WORDS[-3:]),
    "parquet in the working directory": ({"name": "here.parquet"}, {"split": "train[-3:]"}, WORDS, WORDS[-3:]),
    "glob of parquet": ({"name": "t/pl*.parquet"}, {"split": "train[:1]"}, WORDS, WORDS[:1]),
    "zst": ({"name": "t/a.jsonl.zst"}, {"split": "train[5:9]"}, WORDS, WORDS[5:9]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(tables, monkeypatch, kind, tmp_path):
    train, val, train_docs, val_docs = TABLES[kind]
    monkeypatch.chdir(tables)
    keys = {"hf_tokenizer_path": "words.json", "path": str(tmp_path / "out")}
    write_files(tables, {"config.yaml": config(train | keys, val)})
    prepare_here()
    assert known(WORDS, tmp_path / "out") == train_docs and known(WORDS, tmp_path / "out", "val") == val_docs


@pytest.mark.parametrize("name", ["s/*/*.parquet", "s/**/*.parquet", "s/[ab]/x[[]1].parquet"])
def test_globs_of_tables(here, name):
    for folder, docs in (("a", WORDS[:9]), ("b", WORDS[9:])):
        (here / "s" / folder).mkdir(parents=True)
        parquet(here / "s" / folder / "x[1].parquet", docs)
    write_files(here, {"words.json": words_json(WORDS)})
    write_files(here, {"config.yaml": config({"name": name, "hf_tokenizer_path": "words.json"})})
    prepare_here()
    assert known(WORDS) == WORDS


def test_hub_layout(tables, monkeypatch, tmp_path):
    """From the shell; rows are read as a stream, not copied into a cache."""
    monkeypatch.chdir(tables)
    keys = {"hf_tokenizer_path": "words.json", "path": str(tmp_path / "out")}
    write_files(tables, {"config.yaml": config(STORY | keys, STORY | {"split": "test"})})
    prepare("--workers", 2, env={"HF_HOME": str(tmp_path / "hf")})
    assert known(WORDS, tmp_path / "out") == WORDS[:30] and known(WORDS, tmp_path / "out", "val") == WORDS[30:]
    assert not [p for p in (tmp_path / "hf").rglob("*") if p.suffix in (".arrow", ".parquet")]


@pytest.mark.parametrize("name", ["t/ids.parquet", "t/ids.jsonl"])
def test_token_rows(tables, monkeypatch, name, tmp_path):
    """Rows of ids stay as they are: none is cut, none gets an EOS."""
    monkeypatch.chdir(tables)
    keys = {"name": name, "column_name": "input_ids", "is_tokenized": True}
    train = keys | {"path": str(tmp_path / "out"), "hf_tokenizer_path": "tiny.json"}
    write_files(tables, {"config.yaml": config(train, keys | {"split": "train[2:4]"})})
    prepare_here("--shard-tokens", 20)
    check_split(tmp_path / "out", "train", IDS, 20)
    check_split(tmp_path / "out", "val", IDS[2:4], 20)


SLICES = [
    ("train[:95%]", slice(0, 38), "train[95%:]", slice(38, 40)),
    ("train[:33%]", slice(0, 13), "train[33%:]", slice(13, 40)),
    ("train[:-3]", slice(0, 37), "train[-3:]", slice(37, 40)),
    ("train[2:5]", slice(2, 5), "train[5:]", slice(5, 40)),
    ("train[:10_000]", slice(0, 40), "train[-10_000:1]", slice(0, 1)),
    ("train[-50%:]", slice(20, 40), "train[:1]", slice(0, 1)),
]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "t/plain.parquet"])
@pytest.mark.parametrize("first, rows, second, other_rows", SLICES)
def test_slices(tables, monkeypatch, tmp_path, name, first, rows, second, other_rows):
    write_files(tables, {"a.txt": separated(WORDS), "a.jsonl.gz": jsonl(WORDS)})
    monkeypatch.chdir(tables)
    source = {"name": name, "hf_tokenizer_path": "words.json", "path": str(tmp_path / "out"), "split": first}
    write_files(tables, {"config.yaml": config(source, {"split": second})})
    prepare_here()
    assert known(WORDS, tmp_path / "out") == WORDS[rows]
    assert known(WORDS, tmp_path / "out", "val") == WORDS[other_rows]


bounds = st.one_of(st.just(""), st.integers(-120, 120).map(str), st.integers(-10_000, 10_000).map("{:_}".format))
percents = st.integers(-100, 100).map("{}%".format)


@given(n=st.integers(0, 100_000), bound=st.tuples(bounds, bounds) | st.tuples(percents | st.just(""), percents))
@settings(few, max_examples=300)
def test_slices_are_those_of_hugging_face(n, bound):
    datasets = pytest.importorskip("datasets")
    spec = f"train[{bound[0]}:{bound[1]}]"
    (expected,) = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": n})
    base, slices = pd.parse_split(spec)
    start, stop = (pd.absolute(b, n) for b in slices)
    assert base == "train"
    assert range(n)[start or 0 : n if stop is None else stop] == range(n)[expected.from_ : expected.to]


@pytest.mark.parametrize("percent", range(0, 101, 5))
def test_percents_leave_nothing_out(percent):
    """train[:p%] and train[p%:] meet, whatever the number of rows."""
    for n in range(250):
        (_, first), (second, _) = (pd.parse_split(f"train[{s}]")[1] for s in (f":{percent}%", f"{percent}%:"))
        assert pd.absolute(first, n) == pd.absolute(second, n) == round(percent * n / 100)


def test_killed_while_it_read_a_table(tables, monkeypatch, tmp_path):
    """A stream of `datasets` goes on where it was, within a batch of its rows."""
    monkeypatch.chdir(tables)
    keys = STORY | {"hf_tokenizer_path": "words.json"}
    write_files(tables, {"config.yaml": config(keys, {"split": "test", "column_name": "story"})})
    whole, died = tmp_path / "whole", tmp_path / "died"
    prepare_here(f"train_dataset_config.path={whole}", "--shard-tokens", 3)
    runs = 1
    while not prepare_until(7, f"train_dataset_config.path={died}", "--shard-tokens", 3):
        runs += 1
        assert runs < 20, "it gets no further"
    assert runs > 2
    assert tree(died) == tree(whole)


PLACES = {
    "files": {"name": "p", "column_name": "text"},
    "gz": {"name": "long.txt.gz"},
    "table": {"name": "t/long.parquet"},
    "zst": {"name": "t/long.jsonl.zst"},
}


@pytest.mark.parametrize("kind", PLACES)
def test_reading_goes_on_from_any_place(tables, monkeypatch, kind):
    """A place, written down as JSON, leads another process to the same row; also when rows were read before."""
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.chdir(tables)
    docs = [f"row {i}" for i in range(700)]
    files = {"p/1.jsonl": jsonl(docs[:50]), "p/2.jsonl": jsonl([]), "p/3.jsonl": b"\n" + jsonl(docs[50:])}
    write_files(tables, files | {"long.txt.gz": separated(docs, "\r\n")})
    parquet("t/long.parquet", docs, row_group_size=90)
    Path("t/long.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(docs)))

    def opened():
        source, start, stop = pd.open_source(pd.DatasetConfig(**PLACES[kind], n_ctx=9))
        assert (start, stop) == (0, None)
        return source

    source = opened()
    next(source.rows())
    places = [json.dumps(place) for place, _ in source.rows()]
    assert len(places) == len(docs)
    for row in 0, 1, 49, 50, 255, 256, 300, 512, 699:
        fresh, place = opened(), json.loads(places[row])
        assert [fresh.parse(p, raw) for p, raw in fresh.rows(place)] == docs[row:]
        assert [json.dumps(p) for p, _ in fresh.rows(place)][:1] == [places[row]]


# -----------------------------------------------------------------------------
# folders and sections


def test_val_inherits(here):
    """Tokenizer and path are train's; by default the folder is named after the source and the tokenizer."""
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({"path": None})})
    prepare()
    assert [str(p) for p in Path("data").iterdir()] == ["data/docs-tiny"]
    check_split(here / "data/docs-tiny", "train", encoded(DOCS), 10**8)
    check_split(here / "data/docs-tiny", "val", encoded(DOCS[-3:]), 10**8)


@pytest.mark.parametrize(
    "name, tokenizer, folder",
    [
        ("SimpleStories/SimpleStories", {"hf_tokenizer_path": "gpt2"}, "data/SimpleStories-SimpleStories-gpt2"),
        ("python-stdlib", {"train_tokenizer_vocab_size": 4096}, "data/python-stdlib-bpe4096"),
        ("a/b*.txt", {"hf_tokenizer_path": "x/y z"}, "data/a-b-.txt-x-y-z"),
    ],
)
def test_default_path(here, name, tokenizer, folder):
    assert pd.DatasetConfig(name=name, n_ctx=9, **tokenizer).folder() == Path(folder)


def test_two_sources_in_one_folder(here):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "v/other.txt": separated(WORDS)})
    write_files(here, {"config.yaml": config({}, {"name": "v/other.txt", "path": "out"})})
    prepare("--shard-tokens", 500)
    check_split(here / "out", "train", encoded(DOCS), 500)
    check_split(here / "out", "val", encoded(WORDS), 500)


def test_two_folders(here):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "other.txt": separated(WORDS)})
    write_files(here, {"config.yaml": config({}, {"name": "other.txt", "path": "v"})})
    prepare()
    check_split(here / "out", "train", encoded(DOCS), 10**8)
    check_split(here / "v", "val", encoded(WORDS), 10**8)
    assert list(Path("out").glob("val*")) == list(Path("v").glob("train*")) == []
    assert Path("out/tokenizer.json").read_text() == Path("v/tokenizer.json").read_text() == TINY


# -----------------------------------------------------------------------------
# the order of windows, and the reader

SIZES = [*range(1, 201, 1), 257, 1000, 65_537]


def test_every_epoch_is_a_permutation():
    for n in SIZES:
        order = pd.window_order(np.arange(3 * n), n, seed=n % 5)
        assert order.shape == (3 * n,)
        for epoch in range(3):
            assert np.array_equal(np.sort(order[epoch * n : (epoch + 1) * n]), np.arange(n)), n


def test_order_of_a_huge_corpus():
    """Of 6e9 windows 200,000 positions go to different windows, spread over all of them."""
    n = 6_000_000_011
    for positions in 7 * n + np.arange(200_000), np.arange(200_000) * 29_989:
        order = pd.window_order(positions, n, seed=1)
        assert len(np.unique(order)) == len(order) and order.min() >= 0 and order.max() < n
        counts = np.histogram(order, bins=100, range=(0, n))[0]
        assert chi_square(counts) < quantile(99)


@given(n=st.integers(1, 500), seed=st.integers(0, 2**40), data=st.data())
@few
def test_order_is_a_function_of_the_position(n, seed, data):
    positions = np.array(data.draw(st.lists(st.integers(0, 4 * n), min_size=1, max_size=20)))
    whole = pd.window_order(np.arange(4 * n + 1), n, seed)
    assert np.array_equal(pd.window_order(positions, n, seed), whole[positions])
    assert [int(pd.window_order(np.array([p]), n, seed)[0]) for p in positions] == whole[positions].tolist()


def test_epochs_and_seeds_differ():
    def order(seed, **keys):
        return pd.window_order(np.arange(300), 100, seed, **keys).reshape(3, 100).tolist()

    assert len({tuple(o) for seed in range(20) for o in order(seed)}) == 60
    first, second, third = order(1, shuffle_each_epoch=False)
    assert first == second == third == order(1)[0]
    assert list(range(100)) not in order(0)


def chi_square(counts) -> float:
    expected = np.sum(counts) / np.size(counts)
    return float(np.sum((np.asarray(counts) - expected) ** 2) / expected)


def quantile(df: int) -> float:
    """What chi-square with df degrees of freedom exceeds once in a million (Wilson and Hilferty's approximation)."""
    return df * (1 - 2 / (9 * df) + 4.7534 * math.sqrt(2 / (9 * df))) ** 3


def many_orders(n: int, how: str, count: int = 1200) -> np.ndarray:
    """(count, n) orders: of many seeds, or of one seed's epochs."""
    if how == "epochs":
        return pd.window_order(np.arange(count * n), n, 3).reshape(count, n)
    return np.stack([pd.window_order(np.arange(n), n, seed) for seed in range(count)])


@pytest.mark.parametrize("how", ["seeds", "epochs"])
def test_order_is_uniform(how):
    n = 7
    orders = many_orders(n, how)
    table = np.stack([np.bincount(orders[:, i], minlength=n) for i in range(n)])
    assert chi_square(table) * (n - 1) / n < quantile((n - 1) ** 2)  # rows and columns have fixed sums
    apart = [a * n + b for a in range(n) for b in range(n) if a != b]
    for i in range(n - 1):
        pairs = np.bincount(orders[:, i] * n + orders[:, i + 1], minlength=n * n)
        assert pairs.sum() == pairs[apart].sum() and chi_square(pairs[apart]) < quantile(len(apart) - 1), i


def test_all_permutations_of_four():
    orders = many_orders(4, "seeds")
    _, counts = np.unique(orders @ 4 ** np.arange(4), return_counts=True)
    assert len(counts) == 24 and chi_square(counts) < quantile(23)


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.mark.parametrize("sizes", [[50], [7, 7, 7, 7, 3], [1, 30, 1, 1, 17], [20, 0, 20, 10]])
def test_windows_across_shards(here, sizes):
    tokens = np.random.default_rng(0).integers(0, 65536, sum(sizes)).astype(np.uint16)
    cuts = np.cumsum([0, *sizes])
    for i, size in enumerate(sizes):
        write_shard(here / f"out/train_{i:06d}.bin", tokens[cuts[i] : cuts[i] + size])
    shards = pd.Shards(here / "out", "train", "python prepare_data.py config.yaml")
    assert shards.n_tokens == len(tokens)
    for length in 1, 4, 9, len(tokens):
        n = len(tokens) // length
        ids = np.random.default_rng(1).permutation(n)
        windows = shards.windows(ids, length)
        assert windows.dtype == np.uint16
        assert np.array_equal(windows, tokens[: n * length].reshape(n, length)[ids])


def test_prepared_shards_are_read(here):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    prepare_here("--shard-tokens", 100)
    shards = pd.Shards(here / "out", "train", "")
    tokens = stream(here / "out", "train")
    n = len(tokens) // 9
    assert shards.windows(np.arange(n), 9).ravel().tolist() == tokens[: n * 9]


DAMAGED = {
    "gone": (lambda p: p.unlink(), ["train_000001.bin"]),
    "empty": (lambda p: p.write_bytes(b""), ["train_000001.bin", "20240520"]),
    "header cut": (lambda p: p.write_bytes(p.read_bytes()[:1000]), ["train_000001.bin"]),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-2]), ["train_000001.bin", "100", "1222"]),
    "odd byte": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), ["train_000001.bin", "1225"]),
    "magic": (lambda p: write_shard(p, range(100), magic=20240519), ["train_000001.bin", "20240520"]),
    "version": (lambda p: write_shard(p, range(100), version=2), ["train_000001.bin"]),
    "count": (lambda p: write_shard(p, range(100), count=101), ["train_000001.bin", "101", "1224"]),
    "negative count": (lambda p: write_shard(p, range(100), count=-1), ["train_000001.bin", "-1"]),
    "bare tokens": (lambda p: p.write_bytes(np.arange(5000, dtype="<u2").tobytes()), ["train_000001.bin", "header"]),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_shards(here, kind):
    damage, fragments = DAMAGED[kind]
    for i in range(3):
        write_shard(here / f"out/train_{i:06d}.bin", range(100))
    path = here / "out/train_000001.bin"
    assert len(pd.map_shard(path)[1]) == 100
    damage(path)
    if kind == "bare tokens":
        fragments = ["train_000001.bin", "nanoGPT"]
    with pytest.raises(pd.UserError) as error:
        pd.map_shard(path)
    for fragment in fragments:
        assert fragment in str(error.value)
    if kind != "gone":
        with pytest.raises(pd.UserError):
            pd.Shards(here / "out", "train", "")


@pytest.mark.parametrize(
    "place",
    ["", "source", "tokenizer", "splits", "splits.train.shards"]
    + [f"splits.train.shards.1.{k}" for k in ("file", "tokens", "documents", "sha256")]
    + [f"tokenizer.{k}" for k in ("sha256", "vocab_size", "eos_token_id")],
)
@pytest.mark.parametrize("value", [None, "left out"])
def test_a_damaged_record(here, run_here, place, value):
    write_files(here, {"docs.jsonl": jsonl(DOCS), "config.yaml": config({})})
    prepare_here("--shard-tokens", 100)
    path = here / "out" / "dataset.json"
    record = inner = {"": json.loads(path.read_text())}
    *steps, last = ["", *filter(None, place.split("."))]
    for step in steps:
        inner = inner[int(step) if step.isdigit() else step]
    if value is None:
        inner[last] = None
    else:
        del inner[last]
    path.write_text(json.dumps(record.get("", {})))
    for arguments in ([], ["--verify"], ["--peek", "1"]):
        done = run_here("prepare_data.py", "config.yaml", *arguments)
        assert done.returncode == 1 and "dataset.json is damaged" in done.stderr and len(done.stderr.splitlines()) == 1


def test_splits_of_foreign_shards_by_their_names(here):
    names = {
        "train": ["a_train_01.bin", "a_train_02.bin", "train.bin"],
        "val": ["a_val_000001.bin", "validation_2.bin"],
    }
    for name in (*names["train"], *names["val"], "retrieval_01.bin", "._a_train_01.bin", "strain.bin"):
        write_shard(here / name, [1, 2])
    for split, found in names.items():
        assert [f.name for f in pd.Shards(here, split, "").files] == found


def test_no_shards(here):
    with pytest.raises(pd.UserError, match=r"python prepare_data\.py x\.yaml"):
        pd.Shards(here / "out", "train", "python prepare_data.py x.yaml")


# -----------------------------------------------------------------------------
# --verify and --peek


def put_token(old: int, new: int) -> None:
    """Write `new` over the first `old` in the second shard, and its new sha256 into dataset.json."""
    path = Path("out/train_000001.bin")
    data = bytearray(path.read_bytes())
    tokens = np.frombuffer(data, "<u2", offset=1024)
    tokens[np.flatnonzero(tokens == old)[0]] = new
    path.write_bytes(data)
    about = json.loads(Path("out/dataset.json").read_text())
    about["splits"]["train"]["shards"][1]["sha256"] = hashlib.sha256(data).hexdigest()
    Path("out/dataset.json").write_text(json.dumps(about))


EOS = 1  # tiny.json's
VERIFIED = {
    "a flipped bit": (lambda: flip("out/train_000001.bin", 1100), ["train_000001.bin", "changed"]),
    "the last shard": (lambda: flip(max(glob.glob("out/train_*.bin")), 1024), ["train_", "changed"]),
    "the other split": (lambda: flip("out/val_000000.bin", -1), ["val_000000.bin", "changed"]),
    "its header": (lambda: flip("out/train_000001.bin", 0), ["train_000001.bin", "20240520"]),
    "cut short": (lambda: os.truncate("out/train_000001.bin", 1100), ["train_000001.bin", "1100"]),
    "gone": (lambda: os.unlink("out/train_000001.bin"), ["train_000001.bin", "gone"]),
    "an id that is none": (lambda: put_token(EOS, 65535), ["train_000001.bin", "65535"]),
    "an EOS less": (lambda: put_token(EOS, 5), ["train_000001.bin", "EOS"]),
    "another tokenizer": (lambda: flip("out/tokenizer.json", 50), ["tokenizer.json"]),
    "another sum": (lambda: count_more("tokens"), ["dataset.json", "tokens"]),
    "more documents": (lambda: count_more("documents"), ["dataset.json", "documents"]),
    "nothing there": (lambda: shutil.rmtree("out"), ["out", "python prepare_data.py config.yaml"]),
}


def count_more(what: str) -> None:
    """Let dataset.json say that the train split has one more."""
    about = json.loads(Path("out/dataset.json").read_text())
    about["splits"]["train"][what] += 1
    Path("out/dataset.json").write_text(json.dumps(about))


def flip(path, at: int) -> None:
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    Path(path).write_bytes(data)


@pytest.mark.parametrize("wrong", [None, *VERIFIED])
def test_verify(here, run_here, wrong):
    write_files(here, {"docs.jsonl": jsonl([*DOCS, ""]), "config.yaml": config({})})
    prepare_here("--shard-tokens", 100)
    if wrong is None:
        done = run_here("prepare_data.py", "config.yaml", "--verify")
        assert done.returncode == 0 and done.stdout.count("is sound") == 2, done
        return
    damage, fragments = VERIFIED[wrong]
    damage()
    before = tree(here)
    refused(run_here("prepare_data.py", "config.yaml", "--verify"), *fragments)
    assert tree(here) == before


def test_peek(here, bpe, run_here):
    """The first documents as the model will see them: special tokens shown, text that looks like one as its text."""
    docs = ["one <|endoftext|> and [EOS] 🙂", "two\r\nlines", "", "three"]
    keys = {"hf_tokenizer_path": "bpe.json"}
    write_files(
        here, {"bpe.json": bpe, "docs.jsonl": jsonl(docs), "config.yaml": config(keys, {"split": "train[-1:]"})}
    )
    prepare_here()
    ids = encoded([d for d in docs if d], bpe)
    from tokenizers import Tokenizer

    eos = Tokenizer.from_str(bpe).id_to_token(ids[0][-1])
    shown = [f"--- train document {i}: {len(ids[i - 1])} ids\n{docs[i - 1]}{eos}\n" for i in (1, 2)]
    shown += [f"--- val document 1: {len(ids[2])} ids\nthree{eos}\n"]
    assert run_here("prepare_data.py", "config.yaml", "--peek", 2).stdout == "".join(shown)
    again = run_here("prepare_data.py", "config.yaml", "--peek", 99).stdout
    assert again.count("--- train document") == 3 and again.count("--- val document") == 1
    os.unlink("out/tokenizer.json")
    refused(run_here("prepare_data.py", "config.yaml", "--peek", 2), "out/tokenizer.json", "python prepare_data.py")


# -----------------------------------------------------------------------------
# configs


@pytest.mark.parametrize(
    "value, kind, expected",
    [
        ("3e-4", float, 3e-4),  # a string in YAML 1.1
        (3, float, 3.0),
        ("1e6", int, 1_000_000),
        (2.0, int, 2),
        (None, float | None, None),
        ("train", str, "train"),
        (True, bool, True),
    ],
)
def test_convert(value, kind, expected):
    converted = pd.convert(value, kind, "key")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    "value, kind",
    [
        (True, int),
        (True, float),
        (1.5, int),
        ("x", float),
        (float("nan"), float),
        (float("inf"), float),
        ("inf", float),
        ("1e999", int),
        (1, bool),
        ("true", bool),
        (1, str),
        (None, int),
        ([1], int),
        ({}, str),
    ],
)
def test_convert_refuses(value, kind):
    with pytest.raises(pd.UserError, match=r"section\.key"):
        pd.convert(value, kind, "section.key")


def test_overrides(here):
    write_files(here, {"c.yaml": "a: 1\nb: {c: 2, d: 3}\n"})
    args = ["a=x", "b.c=[1, 2]", "b.e.f=3e-4", "g=null", "h=k=v", "i="]
    expected = {"a": "x", "b": {"c": [1, 2], "d": 3, "e": {"f": "3e-4"}}, "g": None, "h": "k=v", "i": None}
    assert pd.read_config("c.yaml", args) == expected


# -----------------------------------------------------------------------------
# bad input: one sentence that names it, and nothing written

T = "train_dataset_config"
GOOD = config({}, {"name": "docs.jsonl", "path": "out", "split": "train[:3]"})
LINES = jsonl(DOCS).split(b"\n")


def broken(line: bytes, at: int = 1) -> bytes:
    """The corpus with another line there, counted from 1."""
    return b"\n".join([*LINES[: at - 1], line, *LINES[at:]])


def without(*keys) -> dict:
    """The good config's train section without some keys."""
    return GOOD | {T: {k: v for k, v in GOOD[T].items() if k not in keys}}


# name: (files beside the good ones, or None for a good one that is not there; arguments; what the sentence names)
BAD = {
    # the config
    "no config": ({"config.yaml": None}, [], ["config.yaml"]),
    "config is a folder": ({"config.yaml": None, "config.yaml/x": ""}, [], ["config.yaml"]),
    "not YAML": ({"config.yaml": "a: [1,\nb: }"}, [], ["config.yaml", "YAML"]),
    "a tab": ({"config.yaml": "a:\n\tb: 1\n"}, [], ["config.yaml", "YAML"]),
    "a list": ({"config.yaml": "- 1\n- 2\n"}, [], ["config.yaml", "list"]),
    "an empty config": ({"config.yaml": ""}, [], ["config.yaml"]),
    "config not UTF-8": ({"config.yaml": b"a: \xff\n"}, [], ["config.yaml"]),
    "a date that is none": ({"config.yaml": "a: 2024-13-45\n"}, [], ["config.yaml"]),
    "unknown key": ({}, [f"{T}.colum_name=x"], ["colum_name", f"{T}.column_name"]),
    "missing key": ({"config.yaml": without("n_ctx")}, [], [f"{T}.n_ctx"]),
    "missing name": ({"config.yaml": without("name")}, [], [f"{T}.name"]),
    "missing section": ({"config.yaml": {T: GOOD[T]}}, [], ["val_dataset_config"]),
    "misspelt section of an override": ({}, ["train_dataset_confg.split=train[:1]"], ["train_dataset_confg", T]),
    "misspelt section": ({"config.yaml": {"train_dataset": GOOD[T]}}, [], [T, "train_dataset"]),
    "section is a value": ({}, [f"{T}=3"], [T]),
    "mistyped number": ({}, [f"{T}.n_ctx=many"], [f"{T}.n_ctx", "whole number", "many"]),
    "mistyped flag": ({}, [f"{T}.is_tokenized=2"], [f"{T}.is_tokenized", "2"]),
    "mistyped text": ({}, [f"{T}.name=[a, b]"], [f"{T}.name"]),
    "empty name": ({}, [f"{T}.name=''"], [f"{T}.name"]),
    "impossible number": ({}, [f"{T}.n_ctx=1"], [f"{T}.n_ctx", "at least 2"]),
    "override without =": ({}, [f"{T}.n_ctx"], [f"{T}.n_ctx", "="]),
    "override into a value": ({}, [f"{T}.name.x=1"], ["name"]),
    "override that is not YAML": ({}, [f"{T}.name=["], [f"{T}.name"]),
    "no workers": ({}, ["--workers", "0"], ["--workers"]),
    "no shards": ({}, ["--shard-tokens", "0"], ["--shard-tokens"]),
    "a shard beyond its header": ({}, ["--shard-tokens", "3000000000"], ["3000000000", "2147483647"]),
    "a peek at nothing": ({}, ["--peek", "0"], ["--peek"]),
    "a peek backwards": ({}, ["--peek", "-1"], ["--peek"]),
    # splits
    "split syntax": ({}, [f"{T}.split=train[5"], ["train[5"]),
    "split of fractions": ({}, [f"{T}.split=train[:0.5]"], ["train[:0.5]"]),
    "split beyond 100%": ({}, [f"{T}.split=train[:101%]"], ["101%", "100%"]),
    "no such split": ({}, [f"{T}.split=validation"], ["validation", "docs.jsonl"]),
    "empty slice": ({}, [f"{T}.split=train[5:5]"], ["train[5:5]", "docs.jsonl"]),
    "slice behind the end": ({}, [f"{T}.split=train[1000:]"], ["train[1000:]", "docs.jsonl"]),
    "slice of text in one piece": (
        {"a.txt": "all of it"},
        [f"{T}.name=a.txt", f"{T}.split=train[95%:]"],
        ["a.txt", "train[95%:]", "<|endoftext|>"],
    ),
    "slice of nothing": ({}, [f"{T}.split=train[:0%]"], ["train[:0%]", "docs.jsonl"]),
    # sources
    "broken JSON": ({"docs.jsonl": broken(b'{"text": "a"')}, [], ["docs.jsonl", "line 1", "JSON"]),
    "broken JSON later": ({"docs.jsonl": broken(b'{"text": "a"', 41)}, [], ["docs.jsonl", "line 41", "JSON"]),
    "no object": ({"docs.jsonl": broken(b'"text"')}, [], ["docs.jsonl", "line 1"]),
    "nested too deep": ({"docs.jsonl": broken(b"[" * 100_000)}, [], ["docs.jsonl", "line 1"]),
    "missing column": ({}, [f"{T}.column_name=story"], ["story", "id", "text", "docs.jsonl"]),
    "missing column later": ({"docs.jsonl": broken(b'{"a": 1, "b": "x"}', 7)}, [], ["line 7", "text", "a", "b"]),
    "column of numbers": ({}, [f"{T}.column_name=id"], ["docs.jsonl", "line 1", "id"]),
    "column of null": ({"docs.jsonl": broken(b'{"text": null}', 9)}, [], ["docs.jsonl", "line 9", "text"]),
    "column of lists": ({"docs.jsonl": broken(b'{"text": ["a"]}', 9)}, [], ["docs.jsonl", "line 9", "text"]),
    "invalid UTF-8": ({"docs.jsonl": broken(b'{"text": "\xff"}', 5)}, [], ["docs.jsonl", "line 5", "UTF-8"]),
    "txt not UTF-8": ({"a.txt": b"a\n<|endoftext|>\n\xe9\n"}, [f"{T}.name=a.txt"], ["a.txt, line 3: ", "UTF-8"]),
    "txt not UTF-8 further on": ({"a.txt": b"a\nb\n\xe9\n"}, [f"{T}.name=a.txt"], ["a.txt, line 1: ", "2 lines on"]),
    "lone surrogate": ({"docs.jsonl": broken(b'{"text": "a\\ud83d"}', 12)}, [], ["docs.jsonl", "line 12", "surrogate"]),
    "empty file": ({"docs.jsonl": b""}, [], ["docs.jsonl", "empty"]),
    "empty txt": ({"a.txt": b""}, [f"{T}.name=a.txt"], ["a.txt", "empty"]),
    "blank lines": ({"docs.jsonl": b"\n\n"}, [], ["docs.jsonl"]),
    "empty gz": ({"a.txt.gz": b""}, [f"{T}.name=a.txt.gz"], ["a.txt.gz"]),
    "only empty documents": ({"a.jsonl": jsonl(["", "", ""])}, [f"{T}.name=a.jsonl"], ["a.jsonl"]),
    "no gz": ({"a.jsonl.gz": None}, [f"{T}.name=a.jsonl.gz"], ["a.jsonl.gz"]),
    "no file": ({}, [f"{T}.name=nowhere.jsonl"], ["nowhere.jsonl"]),
    "no file in a folder": ({}, [f"{T}.name=no/where.txt"], ["no/where.txt"]),
    "a glob of nothing": ({}, [f"{T}.name=x*.txt"], ["x*.txt"]),
    "ids beyond the vocabulary": (
        {"a.jsonl": jsonl([[1, 2], [3, 70_000]], "ids")},
        [f"{T}.name=a.jsonl", f"{T}.column_name=ids", f"{T}.is_tokenized=true"],
        ["a.jsonl", "line 2", "70000"],
    ),
    "ids below zero": (
        {"a.jsonl": jsonl([[1, 2], [3, -1]], "ids")},
        [f"{T}.name=a.jsonl", f"{T}.column_name=ids", f"{T}.is_tokenized=true"],
        ["a.jsonl", "line 2", "-1"],
    ),
    "ids that are text": ({}, [f"{T}.is_tokenized=true"], ["docs.jsonl", "line 1", "text", "is_tokenized"]),
    "ids that are fractions": (
        {"a.jsonl": jsonl([[1, 2], [3, 0.5]], "ids")},
        [f"{T}.name=a.jsonl", f"{T}.column_name=ids", f"{T}.is_tokenized=true"],
        ["a.jsonl", "line 2"],
    ),
    "two kinds of file": (
        {"s/a.jsonl": jsonl(DOCS), "s/b.parquet": "x"},
        [f"{T}.name=s"],
        ["s holds b.parquet beside", "s/*.jsonl"],
    ),
    "text of two splits": ({"s/train.txt": "a", "s/test.txt": "b"}, [f"{T}.name=s"], ["s holds test.txt", "split"]),
    # tokenizers
    "a tokenizer without words": ({"tiny.json": words_json([]).replace('"[EOS]": 1', "")}, [], ["tiny.json"]),
    "no token for what is unknown": (
        {"tiny.json": words_json(["a"]).replace('"[UNK]": 0', '"?": 0'), "docs.jsonl": jsonl(["a", "zebra"])},
        [],
        ["docs.jsonl, line 1, or one of the 1 rows after it", "tiny.json"],
    ),
    "no tokenizer": ({"tiny.json": None}, [], ["tiny.json"]),
    "tokenizer is a folder": ({"t/x": ""}, [f"{T}.hf_tokenizer_path=t"], ["t"]),
    "broken tokenizer": ({"tiny.json": TINY[:-20]}, [], ["tiny.json"]),
    "tokenizer of another kind": ({"tiny.json": '{"model": {"type": "Magic"}}'}, [], ["tiny.json"]),
    "tokenizer not UTF-8": ({"tiny.json": b"\xff"}, [], ["tiny.json"]),
    "tokenizer without EOS": (
        {"tiny.json": words_json(["a"], eos=None)},
        [],
        ["tiny.json", "end-of-sequence", "[EOS]"],
    ),
    "vocabulary too large": (
        {"tiny.json": words_json([f"w{i}" for i in range(70_000)])},
        [],
        ["tiny.json", "70002", "65536"],
    ),
    "trained vocabulary too large": (
        {"config.yaml": without("hf_tokenizer_path")},
        [f"{T}.train_tokenizer_vocab_size=70000"],
        ["70000", "6553"],
    ),
    "model too small": ({}, ["model.vocab_size=50"], ["model.vocab_size", "50", "114"]),
    "model of text": ({}, ["model.vocab_size=big"], ["model.vocab_size", "big"]),
    "two tokenizers": (
        {},
        [f"{T}.train_tokenizer_vocab_size=300"],
        ["train_tokenizer_vocab_size", "hf_tokenizer_path"],
    ),
    "no tokenizer key": (
        {"config.yaml": without("hf_tokenizer_path")},
        [],
        ["train_tokenizer_vocab_size", "hf_tokenizer_path"],
    ),
    "val's own tokenizer": ({}, ["val_dataset_config.hf_tokenizer_path=x.json"], ["hf_tokenizer_path", "x.json"]),
    "folder of pictures": ({"b/x.png": "not text", "b/y.png": "nor this"}, [f"{T}.name=b"], ["b"]),
    "BPE of tokens": (
        {"config.yaml": without("hf_tokenizer_path")},
        [f"{T}.train_tokenizer_vocab_size=300", f"{T}.is_tokenized=true"],
        ["train_tokenizer_vocab_size", "is_tokenized"],
    ),
    "BPE smaller than its alphabet": (
        {"config.yaml": without("hf_tokenizer_path")},
        [f"{T}.train_tokenizer_vocab_size=200"],
        ["train_tokenizer_vocab_size", "257"],
    ),
}


def bad_input(here, files: dict, args, how=run, **options):
    """Run the good config with these files and arguments: what happened, if it left nothing."""
    good = {"docs.jsonl": jsonl(DOCS), "tiny.json": TINY, "config.yaml": GOOD}
    for name in good:
        (here / name).unlink(missing_ok=True)
    write_files(here, {k: v for k, v in (good | files).items() if v is not None})
    before = tree(here), sorted(here.rglob("*"))
    done = how("prepare_data.py", "config.yaml", *args, **options)
    assert (tree(here), sorted(here.rglob("*"))) == before, "it wrote something"
    return done


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(here, run_here, kind):
    files, args, fragments = BAD[kind]
    refused(bad_input(here, files, args, run_here), *fragments)


@pytest.mark.parametrize("kind", ["not YAML", "unknown key", "broken JSON later", "broken tokenizer", "no file"])
def test_bad_input_from_the_shell(here, kind):
    files, args, fragments = BAD[kind]
    refused(bad_input(here, files, args), *fragments)


@pytest.mark.parametrize("at", [2, 55])
def test_bad_row_after_shards(here, at):
    """Shards that were finished before the bad row are of no use when it is mended: none is left."""
    done = bad_input(here, {"docs.jsonl": broken(b'{"text": "\\udead"}', at)}, ["--shard-tokens", "100"])
    refused(done, "docs.jsonl", f"line {at}", "surrogate")
    write_files(here, {"docs.jsonl": jsonl(DOCS)})
    prepare_here("--shard-tokens", 100)
    check_split(here / "out", "train", encoded(DOCS), 100)


def test_bad_row_in_val(here, run_here):
    """The train split is finished by then."""
    files = {"v.jsonl": broken(b'{"text": 3}', 50)}
    args = ["val_dataset_config.name=v.jsonl", "val_dataset_config.split=train", "--shard-tokens", "100"]
    done = bad_input(here, files, args, run_here)
    assert done.returncode > 0 and "Traceback" not in done.stderr
    assert "v.jsonl, line 50" in done.stderr.strip().split("\n")[-1]


@pytest.mark.parametrize("at", [1, 50])
def test_bad_row_while_a_tokenizer_is_trained(here, run_here, at):
    files = {"docs.jsonl": broken(b'{"text": 3}', at), "config.yaml": without("hf_tokenizer_path")}
    done = bad_input(here, files, [f"{T}.train_tokenizer_vocab_size=300"], run_here)
    assert done.returncode > 0 and "Traceback" not in done.stderr
    assert f"docs.jsonl, line {at}" in done.stderr.strip().split("\n")[-1]


def gz_damage(how: str) -> bytes:
    data = bytearray(gzip.compress(jsonl(stories(3000)), mtime=0))
    if how == "cut":
        return bytes(data[: len(data) // 2])
    if how == "checksum":
        data[-8] ^= 255
    if how == "stream":
        data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    if how == "start":
        data[10:40] = b"\xff" * 30
    return bytes(data) + (b"garbage" if how == "tail" else b"")


@pytest.mark.parametrize("how", ["cut", "checksum", "stream", "start", "tail", "not gzip"])
def test_damaged_gz(here, run_here, how):
    data = b"not compressed at all" if how == "not gzip" else gz_damage(how)
    (here / "a.jsonl.gz").write_bytes(data)  # write_files would compress it
    refused(bad_input(here, {}, [f"{T}.name=a.jsonl.gz", "--shard-tokens", "20_000"], run_here), "a.jsonl.gz")


def test_directory_without_data(here, run_here):
    (here / "hollow").mkdir()
    refused(bad_input(here, {}, [f"{T}.name=hollow"], run_here), "hollow")


def test_no_write_permission(here):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (here / "locked").mkdir()
    (here / "locked").chmod(0o555)
    refused(bad_input(here, {}, [f"{T}.path=locked/out"]), "locked/out")


def test_unreadable_file(here):
    if os.geteuid() == 0:
        pytest.skip("root may read anything")
    write_files(here, {"secret.jsonl": jsonl(DOCS), "docs.jsonl": jsonl(DOCS), "config.yaml": GOOD})
    (here / "secret.jsonl").chmod(0)
    refused(run("prepare_data.py", "config.yaml", f"{T}.name=secret.jsonl"), "secret.jsonl")
    assert not Path("out").exists()


def test_path_is_a_file(here, run_here):
    refused(
        bad_input(here, {"taken": "a file"}, [f"{T}.path=taken", "val_dataset_config.path=taken"], run_here), "taken"
    )


NO_HUB = {
    "dataset": ([f"{T}.name=nobody/nothing"], ["nobody/nothing"]),
    "tokenizer": ([f"{T}.hf_tokenizer_path=nobody/nothing"], ["nobody/nothing", "network", "tokenizer.json"]),
    "gpt2": ([f"{T}.hf_tokenizer_path=gpt2"], ["gpt2", "network", "TIKTOKEN_CACHE_DIR"]),
}


@pytest.mark.parametrize("kind", NO_HUB)
def test_no_network(here, kind, tmp_path_factory):
    if kind == "dataset":
        pytest.importorskip("datasets")
    args, fragments = NO_HUB[kind]
    empty = str(tmp_path_factory.mktemp("empty"))
    env = {"HF_HOME": empty, "TIKTOKEN_CACHE_DIR": empty}
    refused(bad_input(here, {}, args, env=env), *fragments)


@pytest.mark.parametrize("name", ["nobody/nothing", "a.parquet", "a.jsonl.zst"])
def test_without_datasets(here, name, tmp_path_factory):
    fake = tmp_path_factory.mktemp("fake")
    (fake / "datasets.py").write_text("raise ImportError('no datasets here')\n")
    files = {} if "/" in name else {name: "anything"}
    refused(
        bad_input(here, files, [f"{T}.name={name}"], env={"PYTHONPATH": str(fake)}), name, "pip install", "datasets"
    )


BAD_TABLES = {
    "no such split": ([f"{T}.split=validation"], ["repo", "validation"]),
    "missing column": ([f"{T}.column_name=text"], ["repo", "text", "id", "story"]),
    "column of numbers": ([f"{T}.column_name=id"], ["repo", "id", "not text"]),
    "empty slice": ([f"{T}.split=train[30:]"], ["repo", "train[30:]"]),
    "no parquet": ([f"{T}.name=plain.txt.parquet"], ["plain.txt.parquet"]),
    "revision of nothing": ([f"{T}.name=nobody/nothing", f"{T}.revision=v1"], ["nobody/nothing"]),
}


@pytest.mark.parametrize("kind", BAD_TABLES)
def test_bad_tables(here, tables, run_here, kind):
    args, fragments = BAD_TABLES[kind]
    os.symlink(tables / "repo", here / "repo")
    write_files(here, {"plain.txt.parquet": "this is no parquet"})
    args = [f"{T}.name=repo", f"{T}.column_name=story", *args]
    # in a process of its own, where datasets' log, too, would be seen
    refused(bad_input(here, {}, args, *([run_here] if kind != "no parquet" else [])), *fragments)


def test_bad_row_in_a_table(here, run_here):
    """The row is named, and the shards that were finished before it are gone."""
    Path("t").mkdir()
    parquet("t/a.parquet", [*DOCS, None, *DOCS])
    refused(
        bad_input(here, {}, [f"{T}.name=t/a.parquet", "--shard-tokens", "100"], run_here), "a.parquet", "row 60", "text"
    )


def test_changed_table_is_refused(here, run_here):
    """A folder that was made of other files is not passed off as made of these."""
    write_files(here, {"config.yaml": config({"name": "t/a.parquet"})})
    Path("t").mkdir()
    parquet("t/a.parquet", DOCS)
    prepare_here()
    parquet("t/a.parquet", DOCS[:30])
    refused(run_here("prepare_data.py", "config.yaml"), "out", "another config", "train.")
