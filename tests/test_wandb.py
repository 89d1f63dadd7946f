"""Runs on Weights & Biases, read with the real client from a server of our own that can be as bad as a network."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, tree
from hypothesis import given
from hypothesis import strategies as st
from test_run_info import assert_holds, five, make_model, tokenizer  # noqa: F401 - a fixture
from wandb_server import RemoteRun, Server

import models
import run_info
from models import MODEL_CLASSES
from prepare_data import UserError
from run_info import PretrainRunInfo, RunNotFound, wandb_run

pytest.importorskip("wandb")
RUN = "ent/proj/abcd1234"
CONFIGS = ["final_config.yaml", "model_config.yaml"]
FIND = "import sys; from run_info import PretrainRunInfo as Info; print(Info.from_path(sys.argv[1]).checkpoint_path)"
STEPS = 0, 2, 10  # in an order that is not the alphabet's


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The server, and an environment in which wandb's client asks it and knows of no other login."""
    import wandb

    with pytest.MonkeyPatch.context() as patch:
        server = Server()
        home = tmp_path_factory.mktemp("home")
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            patch.delenv(name)
        for name, value in {
            **server.environment,
            "HOME": str(home),
            "NETRC": str(home / "none"),
            "WANDB_DIR": str(home),
        }.items():
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
def put(server, tmp_path, tokenizer):  # noqa: F811
    """A function that puts a run on the server: a model of its own at each step."""

    def put(name="LlamaSimpleMLP", path=RUN, steps=STEPS, state="finished", change=dict, drop=(), config=None):
        shape = vars(make_model(name).config)
        config = config or {"seed": 0, "train_dataset_config": {"hf_tokenizer_path": "some/tokenizer"}}
        files = {"wandb-summary.json": b"{}", "output.log": b"noise"}
        for step in steps:
            torch.save(change(make_model(name, seed=step).state_dict()), tmp_path / "weights")
            files[f"model_step_{step}.pt"] = (tmp_path / "weights").read_bytes()
            (tmp_path / "weights").unlink()
        files["model_config.yaml"] = yaml.safe_dump({k: v for k, v in shape.items() if k not in drop}).encode()
        files["final_config.yaml"] = yaml.safe_dump(config).encode()
        files["tokenizer.json"] = tokenizer
        server.runs[path] = RemoteRun({k: v for k, v in files.items() if k not in drop}, state)
        return server.runs[path]

    return put


def folder_of(tmp_path, path=RUN) -> Path:
    _, project, run_id = path.split("/")
    return tmp_path / "out" / "pretrain_cache" / f"{project}-{run_id}"


def assert_nothing_half(folder: Path, run: RemoteRun):
    """All that lies in the folder is what W&B has, but for the listing and the lock."""
    for path in folder.iterdir():
        if path.name not in ("wandb.json", ".lock"):
            assert path.read_bytes() == run.files[path.name]


# -----------------------------------------------------------------------------
# paths

FORMS = [
    RUN,
    "ent/proj/runs/abcd1234",
    f"wandb:{RUN}",
    "wandb:ent/proj/runs/abcd1234",
    "https://wandb.ai/ent/proj/runs/abcd1234",
    "https://wandb.ai/ent/proj/runs/abcd1234/",
    "https://wandb.ai/ent/proj/runs/abcd1234/files/model_step_2.pt",
    "https://wandb.ai/ent/proj/runs/abcd1234?nw=" + "x" * 400,
    "https://wandb.ai/ent/proj/runs/abcd1234/overview?nw=me#top",
    f"  {RUN}\n",
    " https://wandb.ai/ent/proj/runs/abcd1234 ",
]


def test_every_form_is_the_same_run(put, server, tmp_path):
    put()
    forms = [*FORMS, f"{server.environment['WANDB_BASE_URL']}/ent/proj/runs/abcd1234/workspace", Path(RUN)]
    found = {PretrainRunInfo.from_path(form).checkpoint_path for form in forms}
    assert found == {folder_of(tmp_path) / "model_step_10.pt"}
    assert server.downloads() == sorted([*CONFIGS, "tokenizer.json", "model_step_10.pt"])


def test_run_ids():
    assert wandb_run("my-team_1/a.b-c/s-d2ec3bfe") == ("my-team_1", "a.b-c", "s-d2ec3bfe")
    assert wandb_run("goodfire/spd/runs/152i5k4r") == ("goodfire", "spd", "152i5k4r")


NO_RUNS = [
    "abcd1234",
    "proj/abcd1234",
    "ent/proj/abcd123",
    "ent/proj/abcd12345",
    "ent/proj/ABCD1234",
    "ent/proj/ss-abcd1234",
    "ent/proj/-abcd1234",
    "../proj/abcd1234",
    "./proj/abcd1234",
    "~/proj/abcd1234",
    "/ent/proj/abcd1234",
    "ent/../abcd1234",
    "ent/proj/x/abcd1234",
    "ent//abcd1234",
    "ent\\x/proj/abcd1234",
    "ent/pr%2Foj/abcd1234",
    "https://wandb.ai/ent/proj/abcd1234",
    "https://evil.ai/ent/proj/runs/abcd1234",
    "https://wandb.ai.evil/ent/proj/runs/abcd1234",
    "https://wandb.ai/ent/proj/runs/abcd12345",
    "wandb:wandb:ent/proj/abcd1234",
    "https://wandb.ai/ent/../runs/abcd1234",
    "ent/proj/abcd1234.pt",
    "ent/proj/runs/runs/abcd1234",
    "ent/pr\0oj/abcd1234",
]


@pytest.mark.parametrize(
    "path", [*NO_RUNS, "", "ent/my proj/abcd1234", "ent/proj/abcd\n1234", "e" * 129 + "/p/abcd1234"]
)
def test_what_is_no_run_is_a_local_path(server, path):
    assert wandb_run(path) is None
    if path:
        with pytest.raises(RunNotFound) as e:
            PretrainRunInfo.from_path(path)
        for form in ("entity/project/runid", "entity/project/runs/runid", "wandb:", "https://wandb.ai/", "run folder"):
            assert form in str(e.value)
    assert server.asked == []


@given(st.text() | st.from_regex(r"(wandb:)?[\w./\\~-]+/[\w./\\-]+/(runs/)?[a-z0-9-]+", fullmatch=True))
def test_no_path_leads_out_of_the_cache(path):
    if found := wandb_run(path):
        _, project, run_id = found
        assert len(Path(f"cache/{project}-{run_id}").parts) == 2
        assert ".." not in found


def test_a_local_path_wins(put, server, tmp_path):
    run = put()
    here = tmp_path / RUN
    here.mkdir(parents=True)
    for name in [*CONFIGS, "model_step_2.pt"]:
        (here / name).write_bytes(run.files[name])
    assert PretrainRunInfo.from_path(RUN).checkpoint_path == here / "model_step_2.pt"
    assert server.asked == []


def test_an_empty_folder_is_no_run(put, tmp_path):
    """wandb's client makes one, entity/project/runid, wherever WANDB_DIR or else the temporary folder is."""
    put()
    (tmp_path / RUN).mkdir(parents=True)
    assert PretrainRunInfo.from_path(RUN).folder == folder_of(tmp_path)


# -----------------------------------------------------------------------------
# files


@pytest.mark.parametrize("step, found", [(None, 10), (0, 0), (2, 2)])
def test_only_what_is_needed_comes(put, server, tmp_path, step, found):
    run = put()
    info = PretrainRunInfo.from_path(RUN, step=step)
    folder, checkpoint = folder_of(tmp_path), f"model_step_{found}.pt"
    assert info.folder == folder
    assert info.checkpoint_path == folder / checkpoint
    assert info.tokenizer_path == folder / "tokenizer.json"
    assert info.hf_tokenizer_path == "some/tokenizer"
    assert list(info.checkpoints) == [found]
    assert_nothing_half(folder, run)
    wanted = {*CONFIGS, "tokenizer.json", checkpoint}
    assert {p.name for p in folder.iterdir()} == wanted | {"wandb.json", ".lock"}
    assert server.downloads() == sorted(wanted)
    assert_holds(info.load_model(), "LlamaSimpleMLP", found)


def test_another_step_brings_its_weights_alone(put, server):
    put()
    PretrainRunInfo.from_path(RUN, step=2)
    server.asked.clear()
    assert PretrainRunInfo.from_path(RUN).checkpoint_path.name == "model_step_10.pt"
    assert server.downloads() == ["model_step_10.pt"]


def test_without_weights_none_come(put, server):
    put()
    assert PretrainRunInfo.from_path(RUN, weights=False).checkpoint_path is None
    assert server.downloads() == sorted([*CONFIGS, "tokenizer.json"])


def test_a_finished_run_needs_no_network(put, server, tmp_path):
    """Nor the time that it takes to import what would ask."""
    put()
    PretrainRunInfo.from_path(RUN)
    server.stop()
    code = FIND + "; sys.exit(bool({'wandb', 'requests'} & sys.modules.keys()))"
    env = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_API_KEY": ""}
    done = subprocess.run([sys.executable, "-c", code, RUN], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{folder_of(tmp_path) / 'model_step_10.pt'}\n"
    with pytest.raises(RunNotFound, match=r"step 3; it has 0, 2, 10$"):
        PretrainRunInfo.from_path(RUN, step=3)


def test_a_run_that_goes_on_is_asked_for_again(put, server, tmp_path):
    put(state="running")
    assert PretrainRunInfo.from_path(RUN).checkpoint_path.name == "model_step_10.pt"
    put(state="crashed", steps=(*STEPS, 16))
    assert PretrainRunInfo.from_path(RUN).checkpoint_path.name == "model_step_16.pt"
    server.stop()
    with pytest.raises(UserError, match=r"cannot reach W&B.*step 10, 16") as e:  # the last here may not be the last
        PretrainRunInfo.from_path(RUN)
    assert str(folder_of(tmp_path)) in str(e.value)
    for path, step in ((RUN, 10), (RUN, 16), (folder_of(tmp_path), None)):
        assert PretrainRunInfo.from_path(path, step=step).checkpoint_path.name == f"model_step_{step or 16}.pt"
    server.start()
    put(state="finished", steps=(*STEPS, 16, 32))
    assert PretrainRunInfo.from_path(RUN).checkpoint_path.name == "model_step_32.pt"
    server.stop()
    assert PretrainRunInfo.from_path(RUN).checkpoint_path.name == "model_step_32.pt"


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: os.truncate(p, 7), lambda p: p.write_bytes(b"x" * 99)]
)
@pytest.mark.parametrize("name", ["model_step_10.pt", "model_config.yaml"])
def test_a_damaged_copy_is_replaced(put, server, tmp_path, damage, name):
    run = put()
    PretrainRunInfo.from_path(RUN)
    damage(folder_of(tmp_path) / name)
    server.asked.clear()
    PretrainRunInfo.from_path(RUN)
    assert server.downloads() == [name]
    assert_nothing_half(folder_of(tmp_path), run)


def test_files_that_spd_left_are_used(put, server, tmp_path):
    """SPD keeps its copies in the same folder, without a listing; one of them was cut short."""
    run = put()
    folder_of(tmp_path).mkdir(parents=True)
    for name in [*CONFIGS, "model_step_10.pt"]:
        (folder_of(tmp_path) / name).write_bytes(run.files[name][: -1 if name == "model_config.yaml" else None])
    PretrainRunInfo.from_path(RUN)
    assert server.downloads() == ["model_config.yaml", "tokenizer.json"]
    assert_nothing_half(folder_of(tmp_path), run)


def test_runs_of_two_entities_are_not_mixed_up(put):
    put()
    PretrainRunInfo.from_path(RUN)
    put(path="other/proj/abcd1234", steps=[3])
    with pytest.raises(UserError, match=r"holds another run, ent/proj/abcd1234"):
        PretrainRunInfo.from_path("other/proj/abcd1234")


def test_eight_processes_download_once(put, server, tmp_path):
    run = put()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FIND, RUN]
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    found = {process.communicate(timeout=100)[0] for process in processes}
    assert found == {f"{folder_of(tmp_path) / 'model_step_10.pt'}\n"}
    assert server.downloads() == sorted([*CONFIGS, "tokenizer.json", "model_step_10.pt"])
    assert server.asked.count("graphql") < 10  # as one process asks
    assert_nothing_half(folder_of(tmp_path), run)


HOSTILE = [
    "../../model_step_99.pt",
    "checkpoints/../../../model_step_98.pt",
    "/tmp/model_step_97.pt",
    "..\\..\\model_step_96.pt",
    "checkpoints/checkpoints/model_step_95.pt",
    "../final_config.yaml",
    "checkpoints//model_step_94.pt",
    "model_step_94.pt\n",
    "model_step_" + "9" * 5000 + ".pt",
    "model_step_٣.pt",
    "C:\\tokenizer.json",
    "..",
    "",
]


def test_hostile_names_stay_away(put, server, tmp_path):
    run = put()
    run.files |= dict.fromkeys(HOSTILE, b"evil")
    before = tree(tmp_path)
    info = PretrainRunInfo.from_path(RUN)
    assert info.checkpoint_path.name == "model_step_10.pt"
    assert_holds(info.load_model(), "LlamaSimpleMLP", 10)
    folder = str(folder_of(tmp_path).relative_to(tmp_path))
    new = {name for name in tree(tmp_path) if name not in before}
    assert new == {f"{folder}/{n}" for n in [*CONFIGS, "tokenizer.json", "model_step_10.pt", "wandb.json"]}
    assert not set(HOSTILE) & set(server.asked)


def test_checkpoints_in_a_folder(put, tmp_path):
    run = put(steps=[5])
    run.files["checkpoints/model_step_7.pt"] = run.files["model_step_5.pt"]
    assert PretrainRunInfo.from_path(RUN).checkpoint_path == folder_of(tmp_path) / "model_step_7.pt"


# -----------------------------------------------------------------------------
# what goes wrong


@pytest.mark.parametrize("faults", [["cut"], [500, "cut"], [503]])
def test_a_bad_moment_passes(put, server, tmp_path, faults):
    run = put()
    server.faults = {"model_step_10.pt": list(faults)}
    assert_holds(PretrainRunInfo.from_path(RUN).load_model(), "LlamaSimpleMLP", 10)
    assert server.downloads().count("model_step_10.pt") == len(faults) + 1
    assert_nothing_half(folder_of(tmp_path), run)


NEVER = {
    "cut": (["cut"] * 9, {}, r"ChunkedEncodingError|ConnectionError"),
    "500": ([500] * 9, {}, r"HTTP status 500"),
    "silent": (["hang"] * 9, {}, r"ConnectionError|ReadTimeout"),
    "wrong md5": ([], {"md5": "OYUz1IER6fZksfZMsQxLYw=="}, r"size and md5"),
    "wrong size": ([], {"sizeBytes": "7", "md5": None}, r"size and md5"),
}


@pytest.mark.parametrize("what", NEVER)
def test_a_file_that_never_comes_whole(put, server, tmp_path, monkeypatch, what):
    run = put()
    faults, says, reason = NEVER[what]
    server.faults, run.says = {"model_step_10.pt": faults}, {"model_step_10.pt": says}
    if what != "cut":
        monkeypatch.setattr(run_info, "TRIES", 1)  # to wait less
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with pytest.raises(UserError, match=rf"model_step_10\.pt of W&B's run {RUN}.*({reason})"):
        PretrainRunInfo.from_path(RUN)
    assert {p.name for p in folder_of(tmp_path).iterdir()} == {*CONFIGS, "tokenizer.json", ".lock"}
    assert_nothing_half(folder_of(tmp_path), run)
    server.faults, run.says = {}, {}
    server.asked.clear()
    assert_holds(PretrainRunInfo.from_path(RUN).load_model(), "LlamaSimpleMLP", 10)
    assert server.downloads() == ["model_step_10.pt"]


def test_a_file_without_md5(put, tmp_path):
    run = put()
    run.says = {"model_step_10.pt": {"md5": None, "sizeBytes": None}, "tokenizer.json": {"md5": None}}
    for _ in range(2):
        assert_holds(PretrainRunInfo.from_path(RUN).load_model(), "LlamaSimpleMLP", 10)


def test_the_login_goes_to_the_service_alone(put, server):
    """Its files may lie in a bucket, at a signed address that refuses a login."""
    run = put()
    for name in run.files:
        run.says[name] = {"url": f"http://localhost:{server.port}/bucket/{RUN}/{name}"}
    assert_holds(PretrainRunInfo.from_path(RUN).load_model(), "LlamaSimpleMLP", 10)


def test_a_killed_download_leaves_nothing_in_the_way(put, server, tmp_path):
    run = put()
    server.faults = {"model_step_10.pt": ["hang"]}
    command = [sys.executable, ROOT / "run_info.py", RUN, "--sample", ""]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=tmp_path)
    while "model_step_10.pt" not in server.asked:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert_holds(PretrainRunInfo.from_path(RUN).load_model(), "LlamaSimpleMLP", 10)
    assert_nothing_half(folder_of(tmp_path), run)


def ask(tmp_path, **env):
    """(exit code, stdout, lines on stderr that are not the client's own) of `run_info.py RUN` as a program."""
    command = [sys.executable, ROOT / "run_info.py", RUN]
    done = subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    words = [line for line in done.stderr.splitlines() if not line.startswith("wandb: ")]
    return done.returncode, done.stdout, words


NO_LOGIN = {
    "none": ({"WANDB_API_KEY": ""}, r"wants a login to read ent/proj/abcd1234: run `wandb login`"),
    "half a key": ({"WANDB_API_KEY": "123"}, r"wants a login .*40"),
    "a wrong key": ({"WANDB_API_KEY": "a" * 40}, r"wants a login .*not logged in"),
    "a setting that wandb refuses": ({"WANDB_BASE_URL": "nonsense"}, r"wandb.* does not start.*base_url"),
}


@pytest.mark.parametrize("what", NO_LOGIN)
def test_no_login_is_one_sentence(put, tmp_path, what):
    put()
    env, says = NO_LOGIN[what]
    code, out, words = ask(tmp_path, **env)
    assert (code, out, len(words)) == (1, "", 1)
    assert re.match(rf"run_info: .*{says}", words[0])


TROUBLE = {
    "no such run": (lambda s: s.runs.clear(), RunNotFound, r"W&B at http://127.0.0.1:\d+ has no run ent/proj/abcd1234"),
    "no network": (lambda s: s.stop(), UserError, r"cannot reach W&B at http://127.0.0.1:\d+"),
    "silence": (lambda s: s.faults.update(graphql=["hang"] * 9), UserError, r"does not answer about ent/proj/abcd1234"),
    "a server in trouble": (lambda s: s.faults.update(graphql=[500] * 99), UserError, r"does not answer about"),
    "no checkpoint": (lambda s: drop(s, "model_step"), RunNotFound, r"has no model_step_N\.pt"),
    "no config": (lambda s: drop(s, "final"), RunNotFound, r"has no final_config\.yaml"),
    "norms taken out": (lambda s: ablate(s), UserError, r"enable_ln_ablation"),
}


def drop(server, prefix):
    files = server.runs[RUN].files
    for name in [name for name in files if name.startswith(prefix)]:
        del files[name]


def ablate(server):
    server.runs[RUN].files["final_config.yaml"] = b"enable_ln_ablation: true\n"


@pytest.mark.parametrize("what", TROUBLE)
def test_trouble_is_one_sentence(put, server, monkeypatch, what):
    put()
    spoil, kind, says = TROUBLE[what]
    spoil(server)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with pytest.raises(UserError, match=says) as e:
        PretrainRunInfo.from_path(RUN)
    assert type(e.value) is kind
    assert "\n" not in str(e.value)


def test_the_command_line_shows_a_run(put, tmp_path):
    """And which checkpoints W&B has, without downloading one."""
    put()
    code, out, words = ask(tmp_path)
    assert code == 0
    assert len(words) == 1
    n_params = sum(p.numel() for p in make_model("LlamaSimpleMLP").parameters())
    for word in ("LlamaSimpleMLP", f"{n_params:,}", "checkpoints   0, 2, 10\n"):
        assert word in out
    assert not list(tmp_path.rglob("*.pt"))


# -----------------------------------------------------------------------------
# old runs


@five
def test_old_runs_load(put, server, tmp_path, name):
    """No model_type, torch.compile's and DDP's prefixes, saved buffers, no tokenizer.json."""

    def change(state):
        old = {f"module._orig_mod.{k}": v for k, v in state.items()}
        attention = next(k for k in state if ".attn." in k).split(".attn.")[0]
        buffers = "bias", "rotary_sin", "rotary_cos"
        return old | {f"module._orig_mod.{attention}.attn.{k}": torch.zeros(3, 4) for k in buffers}

    put(name, change=change, drop=("model_type", "tokenizer.json"))
    assert_holds(getattr(models, name).from_pretrained(f"wandb:{RUN}"), name, 10)
    info = PretrainRunInfo.from_path(RUN, step=2)
    assert_holds(info.load_model(MODEL_CLASSES[name]), name, 2)
    assert info.tokenizer_path is None
    with pytest.raises(UserError, match="model_type"):
        info.load_model()
