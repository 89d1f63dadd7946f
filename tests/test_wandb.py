"""Runs on Weights & Biases, read with the real client from a server of our own that can be as bad as a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run, tree
from test_run_info import STEPS, assert_holds, make_run  # noqa: F401 - fixtures
from wandb_server import RemoteRun, Server

from prepare_data import UserError
from run_info import PretrainRunInfo, RunNotFound, wandb_run

pytest.importorskip("wandb")
RUN = "ent/proj/abcd1234"
SMALL = {"final_config.yaml", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"}
FIND = "import sys; from run_info import PretrainRunInfo as Info; print(Info.from_path(sys.argv[1]).checkpoint_path)"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The server, and an environment in which wandb's client asks it and knows of no other login."""
    import wandb

    server, home = Server(), str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        homes = {"HOME": home, "NETRC": f"{home}/none", "WANDB_DIR": home, "NO_PROXY": "127.0.0.1"}
        for name, value in (server.environment | homes).items():
            patch.setenv(name, value)
        wandb.teardown()  # settings of tests before
        yield server
        wandb.teardown()
    server.stop()


@pytest.fixture
def server(service, tmp_path, monkeypatch):
    service.reset()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out"))
    return service


@pytest.fixture
def put(server, make_run, tmp_path):  # noqa: F811
    """A function that puts a run on the server: a model of its own at each step."""

    def put(path=RUN, state="finished", steps=STEPS):
        folder = make_run(folder=f"made{len(os.listdir(tmp_path))}", checkpoints=".", drop=["metrics.jsonl"])
        others = {f"model_step_{step}.pt" for step in STEPS if step not in steps}
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name not in others}
        # of old files no md5 is listed; addresses in a bucket are signed, and refuse a login
        url = f"http://localhost:{server.port}/bucket/{path}/model_step_10.pt"
        says = {"model_step_10.pt": {"url": url}, "tokenizer.json": {"md5": None}}
        server.runs[path] = RemoteRun({"output.log": b"noise"} | files, state, says)
        return server.runs[path]

    return put


@pytest.fixture
def copy(tmp_path) -> Path:
    return tmp_path / "out" / "pretrain_cache" / "proj-abcd1234"


def assert_whole(folder: Path, run: RemoteRun, *names):
    """All that lies in the folder is what W&B has, but for the listing and the lock; and these names are there."""
    found = {path.name for path in folder.iterdir()} - {"wandb.json", ".lock"}
    assert all((folder / name).read_bytes() == run.files[name] for name in found) and found >= set(names)


NO_RUNS = """abcd1234 proj/abcd1234 ent/proj/abcd123 ent/proj/abcd12345 ent/proj/ABCD1234 ent/proj/ss-abcd1234
../proj/abcd1234 ~/proj/abcd1234 /ent/proj/abcd1234 ent/../abcd1234 ent/proj/x/abcd1234 ent//abcd1234
ent\\x/proj/abcd1234 ent/pr%2Foj/abcd1234 https://wandb.ai/ent/proj/abcd1234 https://evil.ai/ent/proj/runs/abcd1234
https://wandb.ai.evil/ent/proj/runs/abcd1234 https://wandb.ai/ent/../runs/abcd1234 ent/proj/abcd1234.pt"""
HOSTILE = """../../model_step_99.pt checkpoints/../../../model_step_98.pt /tmp/model_step_97.pt .. ..\\model_step_96.pt
checkpoints/checkpoints/model_step_95.pt ../final_config.yaml checkpoints//model_step_94.pt model_step_٣.pt"""


def test_every_form_is_the_same_run(put, server, copy, tmp_path):
    put()
    forms = [RUN, Path(RUN), f" wandb:{RUN}\n", "ent/proj/runs/abcd1234"]
    forms += [f"https://wandb.ai/ent/proj/runs/abcd1234{end}" for end in ("?nw=m", "/files/model_step_2.pt#top")]
    (tmp_path / RUN).mkdir(parents=True)  # wandb's client makes such empty folders
    assert {PretrainRunInfo.from_path(form).checkpoint_path for form in forms} == {copy / "model_step_10.pt"}
    assert server.downloads() == sorted([*SMALL, "model_step_10.pt"])
    assert wandb_run("my-team_1/a.b-c/s-d2ec3bfe") == ("my-team_1", "a.b-c", "s-d2ec3bfe")
    put(path="other/proj/abcd1234")
    with pytest.raises(UserError, match="another run"):
        PretrainRunInfo.from_path("other/proj/abcd1234")


def test_what_is_no_run(server):
    for path in (*NO_RUNS.split(), "ent/my proj/abcd1234", "ent/proj/abcd\n1234", "e" * 129 + "/p/abcd1234"):
        with pytest.raises(RunNotFound, match="entity/project/runid"):
            PretrainRunInfo.from_path(path)
    assert server.asked == []
    with pytest.raises(RunNotFound, match=RUN):
        PretrainRunInfo.from_path(RUN)  # which is well written, but not there


def test_only_what_is_needed_comes_and_once(put, server, copy):
    """Nothing for a screen, one checkpoint for a model; a finished run needs no network after that."""
    put()
    done = run("run_info.py", RUN)
    assert done.returncode == 0 and "checkpoints: [0, 2, 10]" in done.stdout
    assert server.downloads() == sorted(SMALL)
    for step in (2, None, 2):
        assert_holds(PretrainRunInfo.from_path(RUN, step).load_model(), "LlamaSimpleMLP", step or 10)
    assert server.downloads() == sorted([*SMALL, "model_step_2.pt", "model_step_10.pt"])
    server.stop()
    assert PretrainRunInfo.from_path(RUN).checkpoint_path == copy / "model_step_10.pt"
    with pytest.raises(RunNotFound, match="0, 2, 10"):
        PretrainRunInfo.from_path(RUN, step=3)


def test_a_run_that_goes_on(put, server, copy, capsys, monkeypatch):
    """W&B is asked again; without it the newest copy is used, and said to be."""
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    put(state="running", steps=[0, 2])
    assert PretrainRunInfo.from_path(RUN).checkpoint_path == copy / "model_step_2.pt"
    server.stop()
    capsys.readouterr()
    assert PretrainRunInfo.from_path(RUN, step=2).checkpoint_path == copy / "model_step_2.pt"
    assert capsys.readouterr().err == ""
    assert PretrainRunInfo.from_path(RUN).checkpoint_path == copy / "model_step_2.pt"
    assert f"step 2 is the last in {copy}" in capsys.readouterr().err
    with pytest.raises(RunNotFound, match="step_10"):
        PretrainRunInfo.from_path(RUN, step=10)
    server.start()
    put(state="finished")
    assert PretrainRunInfo.from_path(RUN).checkpoint_path == copy / "model_step_10.pt"


@pytest.mark.parametrize("damage", [Path.unlink, lambda p: os.truncate(p, 7), lambda p: p.write_bytes(b"x" * 99)])
@pytest.mark.parametrize("name", ["model_step_10.pt", "model_config.yaml"])
def test_a_damaged_copy_is_replaced(put, server, copy, damage, name):
    remote = put()
    PretrainRunInfo.from_path(RUN)
    damage(copy / name)
    (copy / "wandb.json").unlink()  # as SPD leaves its copies in the same folder, without a listing
    server.asked.clear()
    PretrainRunInfo.from_path(RUN)
    assert server.downloads() == [name]
    assert_whole(copy, remote, name)


def test_four_processes_download_once(put, server, copy):
    put()
    command, env = [sys.executable, "-c", FIND, RUN], os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate(timeout=100)[0] for process in processes} == {f"{copy / 'model_step_10.pt'}\n"}
    assert server.downloads() == sorted([*SMALL, "model_step_10.pt"])


def test_names_that_are_not_known_never_become_paths(put, server, copy, tmp_path):
    remote = put()
    remote.files |= dict.fromkeys([*HOSTILE.split(), "", "model_step_94.pt\n", f"model_step_{'9' * 5000}.pt"], b"evil")
    remote.files["checkpoints/model_step_16.pt"] = remote.files["model_step_10.pt"]  # which is known
    before = tree(tmp_path)
    assert PretrainRunInfo.from_path(RUN).checkpoint_path == copy / "model_step_16.pt"
    new = {tmp_path / name for name in tree(tmp_path) if name not in before}
    assert new == {copy / name for name in [*SMALL, "model_step_16.pt", "wandb.json"]}


TROUBLE = {  # faults of the checkpoint or of questions, what its listing says, environment, a word of the sentence
    "cut": ({"model_step_10.pt": ["cut"]}, {}, {}, ""),
    "status 500": ({"model_step_10.pt": [500]}, {}, {}, "500"),
    "a body without end": ({"model_step_10.pt": ["endless"]}, {}, {}, "size"),
    "another md5": ({}, {"md5": "OYUz1IER6fZksfZMsQxLYw=="}, {}, "md5"),
    "a wrong key": ({}, {}, {"WANDB_API_KEY": "a" * 40}, "logged in"),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_trouble_is_one_sentence(put, server, copy, what):
    remote = put()
    server.faults, says, env, word = TROUBLE[what]
    remote.says = {"model_step_10.pt": says}
    done = run("run_info.py", RUN, "--sample", "", env={"WANDB_HTTP_TIMEOUT": "1"} | env)
    error = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    assert error.startswith("run_info: ") and word in error
    assert_whole(copy, remote)
    assert server.endless < 2**26  # what it could send before the client left, buffers included
    server.faults, remote.says = {}, {}
    assert_holds(PretrainRunInfo.from_path(RUN).load_model(), "LlamaSimpleMLP", 10)
