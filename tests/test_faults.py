"""train.py when things go wrong: signals and deaths at bad moments, full disks, shards that change, numbers that do."""

import errno
import hashlib
import itertools
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
import yaml
from test_train import (
    BASE,
    KEPT,
    READS,
    SECTIONS,
    B,
    N,
    T,
    assert_close_run,
    assert_same_run,
    equal,
    metrics,
    parts,
    refused,
    series,
    shard_tokens,
    validation_loss,
    weights,
    windows,
)

import prepare_data
import run_info
from models import MODEL_CLASSES

lab = test_train.lab  # the fixture
ROOT = test_train.ROOT
# several micro-batches, a long validation and samples: places to be interrupted at
LONG = "val_max_steps=100", "micro_batch_size=1", "sample_every=12"
SOON = 6  # seconds, on a busy machine: far less than what the faults below would make a run wait if it waited


@pytest.fixture(scope="module")
def base(lab):
    return lab.train("base", *LONG)


@pytest.fixture(scope="module")
def base2(lab):
    return lab.train("base 2", *LONG, ranks=2)


def on_call(place: str, act) -> None:
    """From now on, act(number of the call, *arguments) goes before each call of the function at `place`."""
    owner, name = place.rsplit(".", 1)
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        act(next(calls), *args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def state_of(folder: Path) -> dict:
    return torch.load(folder / "resume.pt", weights_only=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -----------------------------------------------------------------------------
# checkpoints


def by_hand(lab, folder: Path, step: int) -> dict:
    """The final weights of a plain loop that starts from model_step_{step} and optim_step_{step}."""
    cls = MODEL_CLASSES["LlamaSimpleMLP"]
    model = cls(cls.config_class(**BASE["model"]))
    model.load_state_dict(weights(folder, step))
    optimizer = model.configure_optimizers(BASE["weight_decay"], 1.0, (0.9, 0.95), "cpu")
    optimizer.load_state_dict(torch.load(folder / "checkpoints" / f"optim_step_{step}.pt", weights_only=True))
    data, rates = shard_tokens(lab, "train"), series(folder, "lr")
    for s in range(step + 1, N + 1):
        order = prepare_data.window_order(np.arange((s - 1) * B, s * B), len(data) // (T + 1), 0)
        for row in windows(data, order)[:, None]:
            (model(row[:, :-1], row[:, 1:], return_logits=False)[1] / B).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), BASE["grad_clip"])
        for group in optimizer.param_groups:
            group["lr"] = rates[s]
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("ranks, zero", [(1, 0), (2, 1)])
def test_kept_checkpoints_continue_training_with_their_optimizer(lab, base, ranks, zero):
    options = "intermediate_checkpoints=false", "checkpoint_steps=[3,5,24]", "checkpoint_every=7", "keep_optimizer=true"
    folder = lab.train(f"kept {ranks} {zero}", *LONG, *options, f"zero_stage={zero}", ranks=ranks)
    steps = [0, 3, 5, 7, 14, 21, N]
    names = {f"{kind}_step_{s}.pt" for s in steps for kind in ("model", "optim")}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == names
    assert equal(weights(folder, 0), weights(base, 0))
    if ranks == 1:  # two sum in another order
        assert metrics(folder) == metrics(base)
        assert equal(weights(folder), weights(base))
    for step in (0, 21):
        final = by_hand(lab, folder, step)
        assert final.keys() == weights(folder).keys()
        for name, value in weights(folder).items():
            if ranks == 1:
                assert torch.equal(final[name], value), (step, name)
            else:
                torch.testing.assert_close(final[name], value, rtol=0, atol=1e-4)


def test_checkpoints_without_the_optimizer_are_weights_alone(lab, base):
    folder = lab.train("no optimizer", *LONG, "checkpoint_steps=[5,4,5]", "checkpoint_every=10")
    wanted = {*KEPT, 5, 10, 20}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {f"model_step_{s}.pt" for s in wanted}
    assert all(equal(weights(folder, s), weights(base, s)) for s in KEPT)


@pytest.mark.parametrize(
    "override, says",
    [
        ("checkpoint_steps=[3,25]", r"checkpoint_steps .*25.* 24"),
        ("checkpoint_steps=[-1]", r"checkpoint_steps .*-1"),
        ("checkpoint_steps=[1.5]", r"checkpoint_steps.*1\.5"),
        ("checkpoint_steps=[true]", r"checkpoint_steps"),
        ("checkpoint_steps=3", r"checkpoint_steps .*3"),
        ("checkpoint_every=-1", r"checkpoint_every .*at least 0"),
        ("keep_optimizer=1", r"keep_optimizer .*true or false"),
    ],
)
def test_checkpoints_that_cannot_be(lab, tmp_path, override, says):
    assert re.search(says, refused(lab, tmp_path, override))


def slow_saves():
    on_call("torch.save", lambda n, *_: time.sleep(1.5 if n == 15 else 0.05))


def test_a_run_does_not_end_before_all_is_on_disk(lab, base):
    folder = lab.train("slow disk", *LONG, traps={0: (slow_saves,)})
    # the processes are gone: whatever is there now is all there will ever be
    assert_same_run(folder, base)
    assert state_of(folder)["step"] == N
    assert equal(state_of(folder)["model"], weights(folder))


def save_that_waits_for_training(note: Path):
    reads = itertools.count(1)
    far = threading.Event()
    on_call(READS, lambda n, *_: far.set() if next(reads) > 15 else None)

    def act(n, *_):
        if n == 1:  # the checkpoint after update 4
            note.write_text(str(far.wait(15)))

    on_call("torch.save", act)


def test_training_goes_on_while_a_checkpoint_is_written(lab, base):
    """And the checkpoint is of its own step, although the weights moved on before it was written."""
    options = "intermediate_checkpoints=false", "checkpoint_steps=[4]", "resume_every=0", "val_loss_every=0"
    note = lab.root / "went on"
    trap = {0: (save_that_waits_for_training, note)}
    folder = lab.train("beside", *options, "micro_batch_size=1", "keep_optimizer=true", traps=trap)
    assert note.read_text() == "True"
    assert equal(weights(folder, 4), weights(base, 4))
    assert equal(by_hand(lab, folder, 4), weights(base))


def zeroed(path: Path):
    """4 KB in the middle become zeros; the length stays."""
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2 - 2048)
        f.write(bytes(4096))


def stopped_copy(base: Path, folder: Path) -> Path:
    """A copy of a run that could be continued from its last state, although there is nothing left to do."""
    shutil.copytree(base, folder)
    (folder / "status").write_text("interrupted\n")
    return folder


def bare(path: Path):
    torch.save(torch.load(path, weights_only=True)["model"], path)


def listed(path: Path):
    torch.save([1, 2], path)


@pytest.mark.parametrize("damage", [zeroed, bare, listed])
def test_what_is_no_state_counts_as_damaged(lab, base, damage):
    folder = stopped_copy(base, lab.root / f"no state {damage.__name__}")
    damage(folder / "resume.pt")
    result = lab.run(*LONG, f"run_dir={folder}")
    assert (result.code, result.err.count("\n")) == (0, 1), result.err
    assert "resume.pt is damaged" in result.err
    assert f"continuing after update {N - 3}" in result.out
    assert_same_run(folder, base)


def unread(names: dict[str, Exception]) -> None:
    """From now on, files of these names cannot be loaded."""

    def refuse(_, path):
        if Path(path).name in names:
            raise names[Path(path).name]

    on_call("models.load_file", refuse)


def test_a_state_out_of_reach_is_not_damaged(lab, base):
    """To go on without it would lose what is there."""
    folder = stopped_copy(base, lab.root / "out of reach")
    before = contents(folder)
    stale = OSError(errno.ESTALE, "Stale file handle", str(folder / "resume.pt"))
    result = lab.run(*LONG, f"run_dir={folder}", traps={0: (unread, {"resume.pt": stale})})
    assert result.code == 1 and re.fullmatch("train: .*Stale file handle.*resume.pt.* goes on\n", result.err), (
        result.err
    )
    assert contents(folder) == before


def test_ranks_with_different_states_are_refused(lab, base2):
    folder = stopped_copy(base2, lab.root / "two states")
    before = contents(folder)
    trap = unread, {"resume.pt": ValueError("another view of the file system")}
    result = lab.run(*LONG, f"run_dir={folder}", ranks=2, traps={1: trap})
    states = rf"the ranks read states of {folder} after updates \[{N}, {N - 3}\]: they must see the same files"
    assert result.code == 1 and re.fullmatch(f"train: {states}\n", result.err), result.err
    assert contents(folder) == before


def test_keys_newer_than_a_run_have_their_defaults(lab, base):
    folder = stopped_copy(base, lab.root / "older")
    config = yaml.safe_load((folder / "final_config.yaml").read_text())
    del config["optimizer"], config["train_dataset_config"]["revision"]
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    assert_same_run(lab.train(folder.name, *LONG), base)
    (folder / "status").write_text("interrupted\n")
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config | {"keys of other times": 1}))
    result = lab.run(*LONG, f"run_dir={folder}")
    assert result.code == 1 and "keys of other times 1 there, None here" in result.err


def test_a_state_that_was_not_renamed_yet_is_used(lab, base):
    """As a kill between the two renames of a save leaves it."""
    folder = stopped_copy(base, lab.root / "between renames")
    (folder / "resume.pt").rename(folder / "resume.new.pt")
    result = lab.run(*LONG, f"run_dir={folder}")
    assert (result.code, result.err) == (0, "")
    assert f"continuing after update {N}" in result.out
    assert_same_run(folder, base)


def test_weights_whose_bytes_changed_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    zeroed(tmp_path / "run" / "checkpoints" / f"model_step_{N}.pt")
    with pytest.raises(prepare_data.UserError, match=rf"model_step_{N}\.pt: .*checksum"):
        run_info.PretrainRunInfo.from_path(tmp_path / "run").load_model()


@pytest.mark.parametrize(
    "override, says",
    [
        (f"model.rotary_base={10**40}", r"model.rotary_base .*2147483648"),
        (f"model.vocab_size={10**20}", r"model.vocab_size .*2147483648"),
        (f"model.n_intermediate={2**63 - 1}", r"model.n_intermediate .*2147483648"),
        (r'run_dir="a\0b"', r"run_dir .*NUL.*'a\\x00b'"),
        (r'train_dataset_config.name="a\0b"', r"train_dataset_config.name .*NUL"),
    ],
)
def test_values_that_cannot_be(lab, tmp_path, override, says):
    assert re.search(says, refused(lab, tmp_path, override))


def ascii_console():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")  # as with PYTHONIOENCODING=ascii


def test_samples_on_a_console_that_knows_ascii_alone(lab, base):
    folder = lab.train("ascii", *LONG, traps={0: (ascii_console,)})
    assert_same_run(folder, base)
    assert "\u00e9" in (folder / "main.log").read_text(encoding="utf-8")


# -----------------------------------------------------------------------------
# provenance


def scripts_in(folder: Path):
    """Run the train.py of `folder`, not this repository's."""
    test_train.ROOT = folder


def git(folder: Path, *args) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *args]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, encoding="utf-8").stdout


def environment_of(lab, name: str, scripts: Path, **options) -> dict:
    short = "num_iterations=2", "val_loss_every=0"
    env = {"GIT_CEILING_DIRECTORIES": str(scripts.parent)} | options.pop("env", {})
    traps = dict.fromkeys((0, 1), (scripts_in, scripts))
    folder = lab.train(name, *short, traps=traps, env=env, **options)
    return json.loads((folder / "environment.json").read_text())


@pytest.fixture
def scripts(tmp_path):
    """A copy of the scripts, outside of any repository."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def repository(scripts):
    if not shutil.which("git"):
        pytest.skip("no git")
    # a user's settings are not the test's, nor the run's
    git(scripts, "init", "-q")
    (scripts / "notes.txt").write_bytes("caf\u00e9\n".encode("latin-1"))
    git(scripts, "add", ".")
    git(scripts, "commit", "-q", "-m", "x")
    return scripts


def test_environment(lab, repository):
    about = environment_of(lab, "environment", repository, ranks=2)
    assert about["git_commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert about["git_dirty"] is False
    assert not (lab.root / "environment" / "git.diff").exists()
    assert (about["ranks"], about["device"]) == (2, "cpu")
    assert (about["torch"], about["numpy"]) == (torch.__version__, np.__version__)
    assert sys.version.startswith(about["python"])
    assert about["command"][1:3] == [str(lab.config), "num_iterations=2"]
    dataset = lab.root / "data" / "dataset.json"
    assert list(about["dataset_sha256"].values()) == [hashlib.sha256(dataset.read_bytes()).hexdigest()]
    assert about["before"] == {}


@pytest.mark.parametrize(
    "name, change, setting",
    [
        ("models.py", b"# changed\n", None),
        ("models.py", "# changed: 数\n".encode(), None),
        ("models.py", b"# changed\n", ("color.ui", "always")),  # for people, not for git apply
        ("notes.txt", "th\u00e9\n".encode("latin-1"), None),  # not UTF-8
    ],
    ids=["ascii", "utf-8", "colours", "latin-1"],
)
def test_uncommitted_changes_are_saved(lab, repository, tmp_path, request, name, change, setting):
    if setting:
        git(repository, "config", *setting)
    with open(repository / name, "ab") as f:
        f.write(change)
    changed = (repository / name).read_bytes()
    run = f"dirty {request.node.callspec.id}"
    assert environment_of(lab, run, repository)["git_dirty"] is True
    # the commit and git.diff are the code that ran, unless it was not text
    diff = lab.root / run / "git.diff"
    assert name in diff.read_text(errors="replace")
    if name != "notes.txt":
        git(repository, "checkout", "-q", ".")
        git(repository, "apply", str(diff))
        assert (repository / name).read_bytes() == changed


def test_a_continued_run_keeps_the_diff_of_its_start(lab, repository):
    folder, diffs = lab.root / "diffs", []
    for change in ("first", "second", "second"):
        with open(repository / "models.py", "a") as f:
            f.write(f"# {change} change\n" if len(diffs) < 2 else "")
        about = environment_of(lab, "diffs", repository)
        diffs.append((folder / about["git_diff"]).read_text())
        (folder / "status").write_text("interrupted\n")
    assert "first change" in diffs[0]
    assert "second change" in diffs[1]
    assert diffs[2] == diffs[1]
    assert (folder / "git.diff").read_text() == diffs[0]
    assert len(list(folder.glob("*.diff"))) == 2


@pytest.mark.parametrize("what", ["no repository", "no commit", "no git"])
def test_without_git_the_commit_is_null(lab, scripts, tmp_path, what):
    if what == "no commit":
        if not shutil.which("git"):
            pytest.skip("no git")
        git(scripts, "init", "-q")
    about = environment_of(lab, what, scripts, env={"PATH": str(tmp_path)} if what == "no git" else {})
    assert (about["git_commit"], about["git_dirty"]) == (None, None)
    assert not (lab.root / what / "git.diff").exists()


def test_a_continued_run_keeps_its_earlier_starts(lab):
    folder, starts = lab.root / "starts", []
    for reads in (8, 8, None):
        trap = {0: (READS, reads, [signal.SIGTERM])} if reads else None
        assert lab.run(f"run_dir={folder}", traps=trap).code == (75 if reads else 0)
        starts.append(json.loads((folder / "environment.json").read_text()))
    assert starts[0]["before"] == {}
    assert starts[1]["before"] == starts[0]
    assert starts[2]["before"] == starts[1]


# -----------------------------------------------------------------------------
# data


@pytest.fixture(scope="module")
def shards(lab):
    """The data in many shards, so that ranks and updates read different ones: overrides that name it."""
    config = {**lab.base, **{s: lab.base[s] | {"path": str(lab.root / "many")} for s in SECTIONS[1:]}}
    prepare_data.prepare(prepare_data.dataset_configs(config), 300, workers=1, shard_tokens=1000)
    assert len(list((lab.root / "many").glob("train_*.bin"))) > 10
    return lab.root / "many"


def paths(folder: Path) -> list[str]:
    return [f"{s}.path={folder}" for s in SECTIONS[1:]]


def rewritten(path: Path):
    with open(path, "r+b") as f:
        f.seek(1024)
        f.write(b"\x01\x00" * 50)


def replaced(path: Path):
    shutil.copy(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)


CHANGES = {
    "rewritten": rewritten,
    "replaced": replaced,
    "truncated": lambda path: os.truncate(path, 1100),
    "gone": Path.unlink,
}


def changing(file: Path, change: str, nth: int):
    """Change the shard before the nth read of its split."""
    calls = itertools.count(1)

    def act(_, data, *__):
        if data.files[0].name[:3] == file.name[:3] and next(calls) == nth:
            CHANGES[change](file)

    on_call(READS, act)


def shard_of_rank(folder: Path, rank: int, ranks: int) -> tuple[int, str]:
    """(update, shard) such that the rank reads the shard for that update, and no other rank until long after it."""
    data = prepare_data.Shards(folder, "train", "")
    per_rank = B // ranks
    order = prepare_data.window_order(np.arange(N * B), data.n_tokens // (T + 1), 0)
    names = np.array([data.files[data.locate(int(w) * (T + 1))[0]].name for w in order]).reshape(N, ranks, per_rank)
    for s in range(5, N - 5):
        others = np.delete(names[s - 1 : s + 3], rank, axis=1)
        if (name := names[s - 1, rank, 0]) not in others:
            return s, str(name)
    raise AssertionError("no such update")


@pytest.mark.parametrize(
    "change, split, ranks, rank",
    [
        *((change, "train", 1, 0) for change in CHANGES),
        ("gone", "val", 1, 0),
        ("gone", "train", 2, 0),
        ("gone", "train", 2, 1),
    ],
)
def test_a_shard_that_changes_under_a_run_is_named(lab, shards, change, split, ranks, rank):
    name = f"{change} {split} {ranks} {rank}"
    data = lab.root / f"data {name}"
    shutil.copytree(shards, data)
    update, shard = shard_of_rank(data, rank, ranks) if split == "train" else (3, "val_000000.bin")
    traps = {rank: (changing, data / shard, change, update)}
    started = lab.start(*paths(data), f"run_dir={lab.root / name}", ranks=ranks, traps=traps)
    results = lab.finish(started, seconds=20)
    assert all(r.code not in (0, 75) for r in results)
    assert all(r.err.count("\n") <= 1 for r in results), results
    assert "Traceback" not in "".join(r.out + r.err for r in results)
    assert shard in "".join(r.err for r in results), results


@pytest.mark.parametrize("shard", [0, 1])
def test_each_shard_that_a_window_lies_in_is_looked_at(lab, shards, tmp_path, shard):
    shutil.copytree(shards, tmp_path / "data")
    data = prepare_data.Shards(tmp_path / "data", "train", "")
    across = int(data.starts[1]) // (T + 1)
    assert across * (T + 1) < data.starts[1] < (across + 1) * (T + 1)
    data.files[shard].unlink()
    with pytest.raises(prepare_data.UserError, match=data.files[shard].name):
        data.windows(np.array([across]), T + 1)


@pytest.mark.parametrize("change", CHANGES)
def test_one_of_many_shards_that_changes_is_soon_named(tmp_path, change):
    """One that was cut short at once: to read it would be a bus error."""
    header = np.zeros(256, "<i4")
    header[:3] = prepare_data.MAGIC, prepare_data.VERSION, 100
    for i in range(600):
        (tmp_path / f"train_{i:06d}.bin").write_bytes(header.tobytes() + bytes(200))
    data = prepare_data.Shards(tmp_path, "train", "")
    data.windows(np.arange(1200), 50)
    CHANGES[change](tmp_path / "train_000321.bin")
    with pytest.raises(prepare_data.UserError, match=r"train_000321\.bin"):
        for _ in range(1 if change == "truncated" else 3):
            data.windows(np.arange(1200), 50)


def prepared(lab, folder: Path, corpus: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    config = {**lab.base, **{s: lab.base[s] | {"path": str(folder), "name": str(corpus)} for s in SECTIONS[1:]}}
    prepare_data.prepare(prepare_data.dataset_configs(config), 300, workers=1, shard_tokens=10_000)


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_prepared_anew_is_not_continued_with(lab, base, split):
    """The other split stays as it is, in a folder of its own."""
    data, folder, again = (lab.root / f"{name} {split}" for name in ("anew", "began", "again"))
    prepared(lab, data, lab.root / "corpus.jsonl")
    options = [f"{s}.hf_tokenizer_path={lab.root / 'data' / 'tokenizer.json'}" for s in SECTIONS[1:]]
    options += [f"{s}.train_tokenizer_vocab_size=null" for s in SECTIONS[1:]]
    options += [*LONG, f"{split}_dataset_config.path={data}"]
    assert lab.run(*options, f"run_dir={folder}", traps={0: (READS, 100, [signal.SIGTERM])}).code == 75
    # the same bytes again are the same data
    prepared(lab, data, lab.root / "corpus.jsonl")
    shutil.copytree(folder, again)
    assert_same_run(lab.train(again.name, *options), base)
    # other text is not
    other = lab.root / f"other {split}.jsonl"
    other.write_text("".join(json.dumps({"text": d[::-1]}) + "\n" for d in lab.documents))
    prepared(lab, data, other)
    before = contents(folder)
    result = lab.run(*options, f"run_dir={folder}")
    assert result.code not in (0, 75), result.out
    assert re.fullmatch(r"train: .+\n", result.err), result.err
    assert data.name in result.err
    assert contents(folder) == before


def test_foreign_shards_of_another_length_are_not_continued_with(lab):
    """They have no dataset.json to tell them apart."""
    data, folder = lab.root / "foreign", lab.root / "foreign run"
    tokenizer = lab.root / "data" / "tokenizer.json"
    options = [f"{s}.{k}" for s in SECTIONS[1:] for k in (f"path={data}", f"hf_tokenizer_path={tokenizer}")]
    options += [f"{s}.train_tokenizer_vocab_size=null" for s in SECTIONS[1:]]
    data.mkdir()
    for split in ("train", "val"):
        shutil.copy(lab.root / "data" / f"{split}_000000.bin", data / f"x_{split}_0.bin")
    assert lab.run(*options, f"run_dir={folder}", traps={0: (READS, 12, [signal.SIGTERM])}).code == 75
    shutil.copy(data / "x_val_0.bin", data / "x_train_0.bin")
    result = lab.run(*options, f"run_dir={folder}")
    assert result.code not in (0, 75), result.out
    assert re.fullmatch(r"train: .*train.*another run_dir\n", result.err), result.err


@pytest.mark.parametrize("split, ranks", [("train", 1), ("val", 1), ("train", 2)])
def test_foreign_shards_with_ids_outside_the_vocabulary(lab, split, ranks):
    """The id lies where rank 1 of 2 alone meets it, and not in the first update."""
    name = f"foreign ids {split} {ranks}"
    data = lab.root / f"{name} data"
    prepared(lab, data, lab.root / "corpus.jsonl")
    shutil.move(data / "tokenizer.json", tokenizer := lab.root / f"{name}.json")
    (data / "dataset.json").unlink()
    tokens = np.memmap(sorted(data.glob(f"{split}*.bin"))[0], "<u2", "r+", offset=1024)
    order = prepare_data.window_order(np.arange(N * B), len(shard_tokens(lab, "train")) // (T + 1), 0)
    place = order[next(p for p in range(2 * B + B // 2, N * B, B) if order[p] * (T + 1) + T < len(tokens))]
    tokens[(place if split == "train" else 0) * (T + 1) + 5] = 300
    tokens.flush()
    options = [f"{s}.{k}" for s in SECTIONS[1:] for k in (f"path={data}", f"hf_tokenizer_path={tokenizer}")]
    options += [f"{s}.train_tokenizer_vocab_size=null" for s in SECTIONS[1:]]
    results = lab.finish(lab.start(*options, f"run_dir={lab.root / name}", ranks=ranks))
    assert all(r.code not in (0, 75) for r in results), results
    said = "".join(r.err for r in results)
    assert "Traceback" not in said
    assert re.search(rf"^train: the {split} shards in .+ hold id 300, .* 300 ids: .+$", said, re.M), said


def test_data_of_two_tokenizers_is_refused(lab, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "other")
    about = json.loads((shards / "dataset.json").read_text())
    about["tokenizer"]["sha256"] = "0" * 64
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(about))
    options = [f"{s}.hf_tokenizer_path={shards / 'tokenizer.json'}" for s in SECTIONS[1:]]
    options += [f"{s}.train_tokenizer_vocab_size=null" for s in SECTIONS[1:]]
    said = refused(lab, tmp_path, *options, *paths(shards)[:1], f"val_dataset_config.path={tmp_path / 'other'}")
    assert str(shards) in said
    assert str(tmp_path / "other") in said


# -----------------------------------------------------------------------------
# which data an update saw


def recording(folder: Path, rank: int):
    """Keep each batch of training data that this rank reads."""
    original, calls = prepare_data.Shards.windows, itertools.count(1)

    def windows(self, ids, length):
        out = original(self, ids, length)
        if self.files[0].name.startswith("train"):
            np.save(folder / f"{next(calls)} {rank}.npy", out)
        return out

    prepare_data.Shards.windows = windows


@pytest.mark.parametrize(
    "ranks, options",
    [
        (1, ["batch_size=4"]),
        (1, ["batch_size=64", "seed=2", "train_dataset_config.seed=3"]),
        (1, ["batch_size=64", "train_dataset_config.shuffle_each_epoch=false"]),
        (2, ["batch_size=64", "seed=1", "micro_batch_size=8"]),
    ],
)
def test_data_of_update_is_what_training_read(lab, shards, tmp_path, ranks, options):
    """Over several shards, and with 64 in a batch in three epochs."""
    traps = {rank: (recording, tmp_path, rank) for rank in range(ranks)}
    name = f"data of update {ranks} {' '.join(options)}"
    folder = lab.train(name, *paths(shards), "val_loss_every=0", *options, ranks=ranks, traps=traps)
    losses, seen_shards = series(folder, "train_loss"), set()
    for update in range(1, N + 1):
        seen = run_info.data_of_update(run_info.PretrainRunInfo.from_path(folder), update)
        read = np.concatenate([np.load(tmp_path / f"{update} {rank}.npy") for rank in range(ranks)])
        assert np.array_equal(seen["tokens"], read), update
        seen_shards |= set(seen["shard"])
        for shard, offset, row in zip(seen["shard"], seen["offset"], read, strict=True):
            there = np.fromfile(shards / shard, "<u2", offset=1024)[offset:][: T + 1]
            assert np.array_equal(there, row[: len(there)])
        if update - 1 in KEPT:  # and it is what the losses were computed from
            model = run_info.PretrainRunInfo.from_path(folder, update - 1).load_model()
            x = torch.from_numpy(seen["tokens"].astype(np.int64))
            with torch.no_grad():
                assert model(x[:, :-1], x[:, 1:])[1].item() == pytest.approx(losses[update], abs=1e-6)
    assert len(seen_shards) > 10
    if "batch_size=64" in options:
        assert seen["position"][-1] > 2 * len(shard_tokens(lab, "train")) // (T + 1)


# -----------------------------------------------------------------------------
# signals at bad moments


def disturbing(place, nth, slow, number, victim: Path, note: Path, split=None):
    """From the nth call of `place` on, calls are slow; the nth sends `number` to the process whose id `victim` holds.

    With nth = 0 the rank only writes its own process id, and is slow all along. `split` counts reads of that split.
    """
    calls = itertools.count(1)

    def act(_, *args):
        if split and not args[0].files[0].name.startswith(split):
            return
        n = next(calls)
        if n == nth:
            note.write_text(str(time.monotonic()))
            os.kill(int(victim.read_text()), number)
        if n >= nth:
            time.sleep(slow)

    on_call(place, act)


def with_pid(path: Path, hook=None, *args):
    path.write_text(str(os.getpid()))
    torch.compile = lambda model, **_: model  # takes a minute, and is not what is tested
    if hook:
        hook(*args)


def disturbed(lab, name, place, nth, *options, ranks=1, actor=0, victim=0, number=signal.SIGTERM, slow=0.5, split=None):
    """(results of all ranks, seconds from the signal to the end) of a run in which `actor` disturbs `victim`."""
    pids, note = [lab.root / f"{name} pid {rank}" for rank in range(ranks)], lab.root / f"{name} note"
    traps = {rank: (with_pid, pids[rank]) for rank in range(ranks)}
    traps[actor] += (disturbing, place, nth, slow, number, pids[victim], note, split)
    results = lab.finish(lab.start(*LONG, *options, f"run_dir={lab.root / name}", ranks=ranks, traps=traps), 60)
    assert note.exists(), results
    return results, time.monotonic() - float(note.read_text())


GENERATE = "models.LlamaSimpleMLP.generate"
PLACES = {
    "first validation": (READS, "val", 0, 3),
    "validation": (READS, "val", 1, 3),
    "last validation": (READS, "val", 4, 3),  # when all updates are done
    "sample": (GENERATE, None, 0, 18),  # of step 12: the first has 16 calls at most
    "checkpoint": ("torch.save", None, 0, 5),
    "state": ("torch.save", None, 0, 6),
}


def n_val_batches(lab, ranks: int) -> int:
    return -(-(len(shard_tokens(lab, "val")) // (T + 1)) // ranks)


@pytest.mark.parametrize(
    "place, ranks, victim",
    [(p, 1, 0) for p in PLACES] + [("validation", 2, 1), ("sample", 2, 0), ("sample", 2, 1), ("checkpoint", 2, 1)],
)
def test_a_signal_at_a_bad_moment(lab, base, base2, place, ranks, victim):
    """What would take long is cut short, the state is saved, and the same command ends as if nothing had happened."""
    function, split, before, nth = PLACES[place]
    nth += before * n_val_batches(lab, ranks)
    actor = victim if split else 0  # rank 0 samples and saves
    name = f"{place} {ranks} {victim}"
    results, seconds = disturbed(lab, name, function, nth, ranks=ranks, actor=actor, victim=victim, split=split)
    folder = lab.root / name
    assert [r.code for r in results] == [75] * ranks, results
    assert "Traceback" not in "".join(r.out + r.err for r in results)
    assert (folder / "status").read_text() == "interrupted\n"
    assert parts(folder) == []
    first = place.startswith("first")
    done = 0 if first else state_of(folder)["step"]
    assert (folder / "resume.pt").exists() == (not first)
    assert max((m["step"] for m in metrics(folder)), default=0) == done
    assert f"after update {done}:" in results[0].out.splitlines()[-1]
    assert seconds < SOON
    assert_same_run(lab.train(name, *LONG, ranks=ranks), (base, base2)[ranks - 1])


@pytest.mark.parametrize(
    "place, ranks, victim, begun",
    [
        ("torch.compile", 1, 0, False),
        ("torch.compile", 1, 0, True),
        ("torch.compile", 2, 0, False),
        ("torch.compile", 2, 1, True),
        ("models.LlamaSimpleMLP.configure_optimizers", 2, 1, False),
    ],
)
def test_a_signal_before_the_first_update(lab, base, base2, place, ranks, victim, begun):
    name = f"before {place} {ranks} {victim} {begun}"
    folder = lab.root / name
    if begun:  # by an earlier process, whose state is kept
        trap = {0: (READS, 20 * ranks, [signal.SIGKILL])}
        results = lab.finish(lab.start(*LONG, f"run_dir={folder}", ranks=ranks, traps=trap))
        assert results[0].code == -signal.SIGKILL
    options = {"ranks": ranks, "actor": victim, "victim": victim, "slow": 30}
    results, seconds = disturbed(lab, name, place, 1, "compile=true", **options)
    assert seconds < SOON
    assert results[victim].code == 75, results
    assert all(r.code != 0 for r in results), results
    assert "Traceback" not in "".join(r.out + r.err for r in results)
    assert re.search(r"is kept|the same command goes on", "".join(r.err for r in results)), results
    if victim == 0 and place == "torch.compile":  # the folder is there already, and rank 0 keeps its status
        assert (folder / "status").read_text() == "interrupted\n"
    assert not (folder / "status").exists() or (folder / "status").read_text() != "finished\n"
    assert_same_run(lab.train(name, *LONG, ranks=ranks), (base, base2)[ranks - 1])


@pytest.mark.parametrize(
    "place, nth, split, victim",
    [
        (READS, 9, "train", 1),
        (READS, 40, "val", 0),
        ("torch.nn.utils.clip_grad_norm_", 9, None, 1),
        ("torch.distributed.barrier", 1, None, 0),
    ],
)
def test_a_rank_that_dies_ends_the_run(lab, place, nth, split, victim):
    """Not after a timeout of minutes, and in one line."""
    name = f"dead {victim} {place} {split}"
    options = {"ranks": 2, "actor": victim, "victim": victim, "number": signal.SIGKILL, "split": split}
    results, seconds = disturbed(lab, name, place, nth, **options)
    assert seconds < 2 * SOON
    assert results[victim].code == -signal.SIGKILL
    other = results[1 - victim]
    assert other.code > 0, other
    assert re.fullmatch(r"train: rank \d lost another rank: .+\n", other.err), other.err


def told_of_its_end(note: Path) -> None:
    class DDP(torch.nn.parallel.DistributedDataParallel):
        def __del__(self):
            note.touch()

    torch.nn.parallel.DistributedDataParallel = DDP


@pytest.mark.parametrize("options, code", [((), 0), (("learning_rate=1e30",), 1)], ids=["finished", "not finite"])
def test_ranks_end_without_destroying_their_process_group(lab, options, code):
    """Its destructor waits, with Python's lock held, for a thread that may be waiting for that lock."""
    note = lab.root / f"destroyed {code}"
    started = lab.start(*options, "grad_clip=null", ranks=2, traps=dict.fromkeys((0, 1), (told_of_its_end, note)))
    assert [r.code for r in lab.finish(started)] == [code] * 2
    assert not note.exists()


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_twenty_kills_at_random_moments(lab):
    """Of one run, each progressing a little: nothing of them is left in what it computed."""
    rng, total, kills = random.Random(3), 600, 20
    options = f"num_iterations={total}", "checkpoint_every=50", "resume_every=3", "val_loss_every=40"
    whole, folder = lab.train("not killed", *options), lab.root / "killed"
    for _ in range(kills):
        lines = folder / "metrics.jsonl"
        goal = n_lines(lines) + rng.randint(-5, 20)  # a few die before they compute anything
        ((process, output),) = started = lab.start(*options, f"run_dir={folder}")
        deadline = time.monotonic() + 20
        while (n_lines(lines) < goal or not Path(f"{output}.err").exists()) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        (result,) = lab.finish(started)
        assert result.code == -signal.SIGKILL, Path(f"{output}.err").read_text()
    assert 50 < state_of(folder)["step"] < total
    assert_same_run(lab.train("killed", *options), whole)
    assert [m["step"] for m in metrics(folder) if "train_loss" in m] == list(range(1, total + 1))


@pytest.mark.parametrize("lost", ["checkpoints", "resume.pt"])
def test_a_file_deleted_between_stop_and_continue(lab, base, lost):
    folder = lab.root / f"deleted {lost}"
    trap = {0: (disturbing, READS, 14, 0, signal.SIGTERM, lab.root / "deleted pid", lab.root / "note", "train")}
    trap[0] = (with_pid, lab.root / "deleted pid", *trap[0])
    assert lab.run(*LONG, f"run_dir={folder}", traps=trap).code == 75
    last = max(run_info.checkpoints_in(folder))
    gone = folder / "checkpoints" / f"model_step_{last}.pt" if lost == "checkpoints" else folder / lost
    gone.unlink()
    lab.train(folder.name, *LONG)
    if not gone.exists():
        gone.write_bytes((base / "checkpoints" / gone.name).read_bytes())  # nothing else is missing
    assert_same_run(folder, base)


# -----------------------------------------------------------------------------
# two processes in one folder


def stuck_in_update(update: int, note: Path):
    def act(n, *_):
        if n == update:
            time.sleep(0.5)  # what is being written is on disk then
            note.touch()
            time.sleep(60)

    on_call("torch.nn.utils.clip_grad_norm_", act)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_process_in_the_folder_of_a_running_one(lab, base, base2, ranks):
    """It is refused until the first is gone, however that ends; --check is not."""
    folder, note, options = lab.root / f"shared {ranks}", lab.root / f"note {ranks}", {"ranks": ranks}
    first = lab.start(*LONG, f"run_dir={folder}", traps={0: (stuck_in_update, 11, note)}, **options)
    deadline = time.monotonic() + 20
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    before = contents(folder)
    results = lab.finish(lab.start(*LONG, f"run_dir={folder}", **options))
    assert all(r.code not in (0, 75) for r in results), results
    assert re.fullmatch(r"train: another process is training in .+\n", results[0].err), results
    assert lab.run(lab.config, *LONG, f"run_dir={folder}", config="--check").code == 0
    assert contents(folder) == before
    for process, _ in first:
        process.kill()
    assert_same_run(lab.train(folder.name, *LONG, **options), (base, base2)[ranks - 1])


def slow_updates():
    on_call("torch.nn.utils.clip_grad_norm_", lambda *_: time.sleep(0.1))


def test_two_processes_that_start_in_a_new_folder(lab, base):
    """One is refused, and the other is none the worse for it."""
    folder = lab.root / "both"
    results = lab.finish([lab.start(*LONG, f"run_dir={folder}", traps={0: (slow_updates,)})[0] for _ in range(2)])
    assert sorted(r.code for r in results) == [0, 1], results
    assert "another process is training" in results[0].err + results[1].err
    assert_same_run(folder, base)


# -----------------------------------------------------------------------------
# a full disk


def full_once(place: str, nth: int):
    """The nth call of `place` that saves finds the disk full."""
    calls = itertools.count(1)

    def act(*_):
        if threading.current_thread() is not threading.main_thread() and next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    on_call(place, act)


@pytest.mark.parametrize(
    "place, nth, missing",
    [
        ("torch.save", 5, 4),  # model_step_4
        ("torch.save", 6, None),  # the state after update 6
        ("os.fsync", 11, None),
        ("os.replace", 7, None),
        ("os.replace", 9, None),  # the older state has just made room for it
    ],
)
def test_a_disk_that_is_full_once(lab, base, place, nth, missing):
    folder = lab.root / f"full {place} {nth}"
    result = lab.run(*LONG, f"run_dir={folder}", traps={0: (full_once, place, nth)})
    assert result.code == 0, result.err
    assert len(re.findall(r"^could not save .*No space left", result.out, re.M)) == 1
    assert "Traceback" not in result.out + result.err
    assert state_of(folder)["step"] == N
    if missing is not None:
        lost = folder / "checkpoints" / f"model_step_{missing}.pt"
        assert not lost.exists()
        shutil.copy(base / "checkpoints" / lost.name, lost)  # nothing else is missing
    assert_same_run(folder, base)


def no_room_in(path: Path, first: int, last: int):
    """A file that is written line by line finds its disk full from one update to another."""
    kept = {}

    def act(n, *_):
        if n == first:
            fd = next(int(f.name) for f in Path("/proc/self/fd").iterdir() if f.exists() and f.samefile(path))
            kept[fd] = os.dup(fd)
            os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
        for fd, original in kept.items() if n == last else ():
            os.dup2(original, fd)

    on_call("torch.nn.utils.clip_grad_norm_", act)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "main.log"])
def test_lines_that_find_the_disk_full_are_written_later(lab, base, name):
    folder = lab.root / f"full for lines of {name}"
    result = lab.run(*LONG, f"run_dir={folder}", traps={0: (no_room_in, folder / name, 10, 14)})
    assert result.code == 0, result.err
    assert re.fullmatch(rf"train: cannot write to .*{name} \(No space left .+\n", result.err), result.err
    # no state is ahead of the metrics
    assert re.findall(r"^could not save what update (\d+) ", result.out, re.M) == ["12"] * (name == "metrics.jsonl")
    assert_same_run(folder, base)
    assert (folder / "samples.jsonl").read_bytes() == (base / "samples.jsonl").read_bytes()
    assert (folder / "main.log").read_text() == result.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize("name, ranks", [("metrics.jsonl", 1), ("metrics.jsonl", 2), ("main.log", 1)])
def test_lines_that_are_never_written_end_the_run_with_a_code(lab, base, base2, name, ranks):
    folder, options = lab.root / f"full for {name} {ranks}", {"ranks": ranks}
    result = lab.run(*LONG, f"run_dir={folder}", traps={0: (no_room_in, folder / name, 10, 0)}, **options)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert re.search(r"\ntrain: .*No space left on device; .+ goes on\n", result.err), result.err
    assert (folder / "status").read_text() == "failed\n"
    assert state_of(folder)["step"] == (9 if name == "metrics.jsonl" else N)
    assert_same_run(lab.train(folder.name, *LONG, **options), (base, base2)[ranks - 1])


def test_a_console_that_nobody_reads_does_not_end_the_run(lab, base):
    """As with 2>&1 | head."""
    folder, (reader, console) = lab.root / "unread", os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "train.py", lab.config, *LONG, f"run_dir={folder}"]
    assert subprocess.run(command, stdout=console, stderr=console).returncode == 0
    assert_same_run(folder, base)


# -----------------------------------------------------------------------------
# ranks


def counting(note: Path):
    """Count the reductions of a model's gradients over the ranks."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel as DDP

    original, counts = DDP.__init__, itertools.count(1)

    def hook(group, bucket):
        if bucket.is_last():  # one backward can have several
            note.write_text(str(next(counts)))
        return allreduce_hook(group, bucket)

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.register_comm_hook(None, hook)

    DDP.__init__ = init


def test_gradients_are_reduced_once_an_update(lab, base, base2):
    notes = [lab.root / f"reductions {rank}" for rank in (0, 1)]
    traps = {rank: (counting, note) for rank, note in enumerate(notes)}
    folder = lab.train("counted", *LONG, "batch_size=8", "micro_batch_size=1", ranks=2, traps=traps)
    assert "4 x 1 sequences a rank and update" in (folder / "main.log").read_text()
    assert [int(note.read_text()) for note in notes] == [N, N]
    assert_close_run(folder, lab.train("uncounted", *LONG, "batch_size=8", "micro_batch_size=8"))


# -----------------------------------------------------------------------------
# weights to start from

SHAPE = {"block_size": T, "vocab_size": 300, "n_embd": 16, "n_head": 2, "n_layer": 1}


@pytest.mark.parametrize("kind", MODEL_CLASSES)
def test_every_model_starts_from_the_weights_of_another_run(lab, kind):
    shape = SHAPE if kind.startswith("GPT2") else BASE["model"]
    config = lab.write({**lab.base, "model": {**shape, "model_type": kind}, "num_iterations": 2})
    first = lab.train(f"first {kind}", config=config)
    # other micro-batches, and other initial weights to be overwritten
    options = "init_seed=7", "micro_batch_size=1"
    sources = [(first, 2), (first / "checkpoints" / "model_step_1.pt", 1)]
    for source, step in sources if kind == BASE["model"]["model_type"] else sources[:1]:
        folder = lab.train(f"from {kind} {step}", *options, f"from_pretrained={source}", config=config)
        assert equal(weights(folder, 0), weights(first, step))
        assert not equal(weights(folder, 2), weights(first, step))
        expected = series(first, "val_loss")
        if step in expected:
            assert series(folder, "val_loss")[0] == pytest.approx(expected[step], abs=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_inference_only_updates_nothing(lab, base, ranks):
    options = (
        "inference_only=true",
        f"from_pretrained={base}",
        "init_seed=7",
        "checkpoint_every=1",
        "keep_optimizer=true",
    )
    before = contents(base)
    folder = lab.train(f"inference {ranks}", *LONG, *options, ranks=ranks)
    (line,) = metrics(folder)
    assert line["step"] == 0
    assert line["val_loss"] == pytest.approx(series(base, "val_loss")[N], abs=1e-5)
    assert line["val_loss"] == pytest.approx(validation_loss(lab, weights(base), 1000), abs=1e-5)
    assert "sample:" in (folder / "main.log").read_text()
    assert list(folder.rglob("*.pt")) == []
    assert contents(base) == before
    assert "finished" in lab.run(*LONG, *options, f"run_dir={folder}", ranks=ranks).out


def dying_before(target: str):
    """SIGKILL just before a file gets the name `target`."""
    on_call("os.replace", lambda n, a, b: os.kill(os.getpid(), signal.SIGKILL) if Path(b).name == target else None)


@pytest.mark.parametrize("fault", ["killed at the first state", "killed later", "states damaged"])
def test_a_run_from_weights_is_continued_from_them(lab, base, fault):
    """An interruption before there is a state to continue from begins with those weights again, not with others."""
    options = f"from_pretrained={base}", "init_seed=7"
    whole = lab.root / "from weights"
    if not whole.exists():
        lab.train(whole.name, *LONG, *options)
    folder = lab.root / f"from weights, {fault}"
    trap = (dying_before, "resume.pt") if "first" in fault else (READS, 40, [signal.SIGKILL])
    assert lab.run(*LONG, *options, f"run_dir={folder}", traps={0: trap}).code == -signal.SIGKILL
    if "damaged" in fault:
        for name in ("resume.pt", "resume.previous.pt"):
            (folder / name).write_bytes(b"damaged")
    assert_same_run(lab.train(folder.name, *LONG, *options), whole)


# -----------------------------------------------------------------------------
# health


def not_finite(what: str, update: int, n_micro: int):
    """The loss or the gradients of an update are NaN, from its second micro-batch on."""
    cls = MODEL_CLASSES["LlamaSimpleMLP"]
    original, calls = cls.forward, itertools.count()

    def forward(self, *args, **kwargs):
        logits, loss = original(self, *args, **kwargs)
        if torch.is_grad_enabled() and next(calls) == (update - 1) * n_micro + 1:
            if what == "loss":
                loss = loss * float("nan")
            else:
                loss.register_hook(lambda g: g * float("inf"))
        return logits, loss

    cls.forward = forward


@pytest.mark.parametrize(  # update 12 is followed by a save
    "what, ranks, rank, update",
    [("loss", 1, 0, 10), ("gradient", 1, 0, 12), ("loss", 2, 1, 12), ("gradient", 2, 0, 10)],
)
def test_what_is_not_finite_is_named_and_nothing_lost(lab, base, base2, what, ranks, rank, update):
    name = f"nan {what} {ranks} {rank} {update}"
    folder, expected = lab.root / name, (base, base2)[ranks - 1]
    traps = {rank: (not_finite, what, update, B // ranks)}
    results = lab.finish(lab.start(*LONG, f"run_dir={folder}", ranks=ranks, traps=traps))
    assert all(r.code not in (0, 75) for r in results)
    assert re.fullmatch(rf"train: update {update} has loss .+\n", results[0].err), results
    assert re.search(rf"python run_info.py .* --data {update}\b", results[0].err)
    assert "Traceback" not in "".join(r.out + r.err for r in results)
    # nothing of it was saved: the update is repeated, and this time with sound numbers
    assert state_of(folder)["step"] == 9
    assert max(m["step"] for m in metrics(folder)) == update - 1
    assert_same_run(lab.train(name, *LONG, ranks=ranks), expected)


def broken(base: Path, folder: Path) -> Path:
    """A copy of a run, one of whose last weights is NaN."""
    shutil.copytree(base, folder)
    state = weights(folder)
    state["lm_head.weight"][5, 3] = float("nan")
    torch.save(state, folder / "checkpoints" / f"model_step_{N}.pt")
    return folder


def slow_states():
    on_call("torch.save", lambda n, state, *_: time.sleep(1) if "scaler" in state else None)


def test_what_is_being_written_when_ranks_fail_reaches_the_disk(lab):
    folder = lab.root / "failed while saving"
    options = "learning_rate=1e30", "grad_clip=null", "resume_every=1", "val_loss_every=0", f"run_dir={folder}"
    results = lab.finish(lab.start(*options, ranks=2, traps={0: (slow_states,)}))
    assert [r.code for r in results] == [1, 1], results
    assert re.fullmatch(r"train: update 2 has loss .+\n", results[0].err), results
    assert state_of(folder)["step"] == 1
    assert parts(folder) == []


@pytest.mark.parametrize("kept", ["true", "false"])
def test_weights_that_are_not_finite(lab, base, tmp_path, monkeypatch, capsys, kept):
    """The message's command shows the data, whether or not the run has saved anything yet."""
    source, folder = broken(base, tmp_path / "broken"), lab.root / f"from nan {kept}"
    result = lab.run(f"from_pretrained={source}", f"intermediate_checkpoints={kept}", f"run_dir={folder}")
    assert result.code not in (0, 75)
    assert re.fullmatch(r"train: update 1 has loss nan .+\n", result.err), result.err
    assert list(folder.glob("resume*")) == []
    (run, update) = re.search(r"python run_info.py (.+) --data (\d+)", result.err).groups()
    monkeypatch.setattr(sys, "argv", ["run_info.py", run, "--data", update])
    run_info.main()
    data = shard_tokens(lab, "train")
    first = int(prepare_data.window_order(np.arange(1), len(data) // (T + 1), 0)[0])
    assert f"window {first}, " in capsys.readouterr().out
