"""slurm_submit.sh on a real SLURM: three nodes on this machine, each with a host name, a network and GPUs of its own.

The scenarios run at the same time, and their runs end with the numbers and weights of runs without SLURM, to the bit.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from helpers import ROOT, SHARED, config, environment, jsonl, stories, wordpiece_json, write_files

START = SHARED / "slurm" / "start-slurm.sh"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
N = 40
MODEL = {"model_type": "GPT2Simple", "block_size": 8, "vocab_size": 200, "n_layer": 1, "n_head": 2, "n_embd": 16}
RUN = {"model": MODEL, "dtype": "float32", "batch_size": 4, "num_iterations": N, "warmup_iters": 5, "grad_clip": 1.0}
RUN |= {"learning_rate": 3e-3, "learning_rate_decay_frac": 0.1, "weight_decay": 0.1, "val_loss_every": 25, "seed": 4}
RUN |= {"val_max_steps": 2, "train_log_every": 1, "sample_every": 0, "resume_every": 10, "compile": False}
RUN |= {"intermediate_checkpoints": False, "device": "cpu"}

# Appended to models.py, so that a run takes long enough to be interrupted.
SLOW = "import time\nforward = GPT2Simple.forward\n"
SLOW += "GPT2Simple.forward = lambda *args, **options: time.sleep(0.1) or forward(*args, **options)\n"


def call(*command, env=None, cwd=None, code=0) -> str:
    """The output of a command that exits with `code`; if that is not 0, what it says to stderr."""
    env = env or environment({"PATH": PATH, "OMP_NUM_THREADS": "1"})
    result = subprocess.run(list(map(str, command)), env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def x(tmp_path_factory):
    """A config whose data are prepared. The space in its path is part of the test."""
    folder = tmp_path_factory.mktemp("slurm lab")
    source = {"name": f"{folder}/docs.jsonl", "path": f"{folder}/data", "n_ctx": 9}
    settings = config({"hf_tokenizer_path": f"{folder}/tiny.json"} | source, {"split": "train[-9:]"} | source, **RUN)
    write_files(folder, {"docs.jsonl": jsonl(stories(300)), "tiny.json": wordpiece_json(), "x.yaml": settings})
    call("python", ROOT / "prepare_data.py", folder / "x.yaml", "--workers", 1)
    return folder / "x.yaml"


def make_repo(folder: Path, train: str | None = None) -> Path:
    """A copy of the scripts with slow models and a site's default of CPUs. `train` is a statement for train.py."""
    folder.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "slurm_submit.sh"]:
        shutil.copy(path, folder)
    script = (ROOT / "slurm_submit.sh").read_text().replace("--cpus-per-task=4", "--cpus-per-task=1")
    write_files(folder, {"slurm_submit.sh": script, "models.py": (ROOT / "models.py").read_text() + SLOW})
    if train:
        (folder / "train.py").write_text(f"import os, sys\nprint('out/') if '--check' in sys.argv else {train}\n")
    return folder


# -----------------------------------------------------------------------------
# the cluster and its jobs


@pytest.fixture(scope="module")
def cluster():
    """The environment in which SLURM's commands find the cluster."""
    if not START.exists() or os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("a SLURM for tests needs ../shared/slurm/start-slurm.sh, Debian and root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge wants it open to all
    env = environment({"SLURM_LAB_DIR": str(folder), "NETNS": "1", "NODES": "3", "GPUS": "8"})
    env |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": PATH, "SBATCH_EXPORT": "NONE"}
    with FileLock(Path(tempfile.gettempdir(), "slurm-tests.lock")), open(folder / "start.log", "w") as log:
        try:
            started = subprocess.run([START, "start"], env=env, stdout=log, stderr=log)
            if not shutil.which("slurmctld", path=PATH):
                pytest.skip("SLURM could not be installed")
            assert started.returncode == 0, (folder / "start.log").read_text()
            # A partition of its own for the scenario in which jobs are preempted: no other job may be.
            call("scontrol", "update", "PartitionName=main", "Nodes=n[1-2]", env=env)
            third = "PartitionName=third", "Nodes=n3", "PriorityTier=1", "PreemptMode=REQUEUE", "GraceTime=20"
            call("scontrol", "create", *third, env=env)
            yield env
        finally:
            subprocess.run([START, "stop"], env=env, stdout=log, stderr=log)
            shutil.rmtree(folder, ignore_errors=True)


@dataclasses.dataclass
class Job:
    repo: Path  # has the log
    env: dict
    id: str
    folder: Path  # of the run

    def __call__(self, *command) -> str:
        """The output of a SLURM command about this job."""
        return call(*command, self.id, env=self.env)

    def about(self, field: str) -> str:
        return re.search(rf"\b{field}=(\S*)", self("scontrol", "show", "job"))[1]

    def log(self) -> str:
        return "".join(path.read_text() for path in self.repo.glob(f"slurm-{self.id}.out"))

    def until(self, true, what: str):
        """The first true value of `true`, asked again and again."""
        deadline = time.monotonic() + 150
        while not (value := true()):
            assert time.monotonic() < deadline, f"no {what}\n{self.log()}\n{self('scontrol', 'show', 'job')}"
            time.sleep(0.7)
        return value

    def trains(self, start: int = 1):
        """Wait until this start of the job has logged an update."""
        seen = re.compile(rf"start {start} .*\nstep [1-9]\d*/", re.DOTALL)
        self.until(lambda: seen.search(self.log()), "update")

    def process(self, node: int) -> int:
        """The process id of a node's rank, as soon as there is one: it is importing."""
        rank = re.compile(rf"(?m)^ *(\d+)(?=.* SLURM_JOB_ID={self.id}\b)(?=.* SLURMD_NODENAME=n{node}\b).* RANK=")
        found = self.until(lambda: rank.findall(call("ps", "axeww", "-o", "pid=,command=")), f"rank on node {node}")
        return int(found[-1])

    def ends(self, state: str, restarts: int = 0):
        """Wait for the end after so many restarts."""
        ends = "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"
        self.until(lambda: int(self.about("Restarts")) >= restarts and self.about("JobState") in ends, "end")
        assert (self.about("JobState"), self.about("Restarts")) == (state, str(restarts)), self.log()

    def completes(self, expected: Path, restarts: int = 0):
        self.ends("COMPLETED", restarts)
        assert (self.folder / "status").read_text() == "finished\n"
        texts = [(folder / "metrics.jsonl").read_text() for folder in (self.folder, expected)]
        numbers = [re.sub(r', "(tokens_per_s|mfu)": [^,}]+', "", text) for text in texts]
        assert numbers[0] == numbers[1]
        weights = f"checkpoints/model_step_{N}.pt"
        assert (self.folder / weights).read_bytes() == (expected / weights).read_bytes()


def submit(repo: Path, env: dict, *args) -> Job:
    text = call(repo / "slurm_submit.sh", *args, env=env, cwd=repo)
    id, folder = (re.search(p, text)[1] for p in (r"Submitted batch job (\d+)", r"run folder: (.*)"))
    return Job(repo, env, id, repo / folder)


def sbatch(repo: Path, env: dict, *args) -> Job:
    id = call("sbatch", "--export=ALL", *args, env=env, cwd=repo).split()[-1]
    return Job(repo, env, id, repo / "run")


# -----------------------------------------------------------------------------
# scenarios that run at the same time


def two_nodes(repo, x, env, expected):
    """The run knows the code that it ran."""
    commit = "git -c user.name=x -c user.email=x@example.org commit -qm x"
    call("bash", "-c", f"git init -q && git add . && {commit}", cwd=repo)
    job = submit(repo, env, "--nodes=2", x)
    job.completes(expected[2])
    assert {p.name for p in (job.folder / "code").iterdir()} >= {"x.yaml", "slurm_submit.sh"}
    start = json.loads((job.folder / "environment.json").read_text())[0]
    assert start["git_commit"] == call("git", "rev-parse", "HEAD", cwd=repo).strip()


def crash_on_one_node(repo, x, env, expected):
    """The job fails at once, whereas the other rank would wait for minutes: while it imports, and while it trains."""
    job = submit(repo, env, "--nodes=2", x)
    os.kill(job.process(node=2), signal.SIGKILL)
    job.ends("FAILED")
    job("scontrol", "requeue")
    job.trains(start=2)
    os.kill(job.process(node=2), signal.SIGKILL)
    job.ends("FAILED", restarts=1)


def requeue_and_scancel(repo, x, env, expected):
    """By hand, on two GPUs of one node. A cancelled job saves, and its run can be submitted again."""
    job = submit(repo, env, "--n_gpus", "2", x)
    (repo / "train.py").rename(repo / "train.txt")  # the job does not see it
    job.trains()
    job("scontrol", "requeue")
    job.trains(start=2)
    job("scancel")
    job.ends("CANCELLED", restarts=1)
    job.until(lambda: (job.folder / "status").read_text() == "interrupted\n", "saved state")
    (repo / "train.txt").rename(repo / "train.py")
    again = submit(repo, env, "--n_gpus=2", x, f"run_dir={job.folder}")
    assert again.folder == job.folder
    again.completes(expected[2])


def time_limit(repo, x, env, expected):
    """SLURM's own signal, without GPUs: with these options it comes 20 to 50 seconds after the start."""
    options = "--time=1", "--signal=USR1@10", "--gpus-per-node=0"
    job = sbatch(repo, env, *options, "slurm_submit.sh", x, "num_iterations=2000", "run_dir=run")
    job.trains(start=2)
    job("scancel")


def array(repo, x, env, expected):
    """From another folder, with little of the environment. The last element, which has the array's id, is requeued."""
    options = "--array=3-4", "--export=PATH,SLURM_CONF", f"--output={repo}/slurm-%A_%a.out"
    id = call("sbatch", *options, repo / "slurm_submit.sh", x, "seed=%a", env=env, cwd=repo.parent).split()[-1]
    runs = repo.parent / "out" / "target_models"
    third, fourth = (Job(repo, env, f"{id}_{i}", runs / f"job-{id}_{i}") for i in (3, 4))
    third.trains()
    fourth.trains()
    (repo / "train.py").unlink()  # the second start does not see it
    fourth("scancel", "--signal=TERM")
    third.ends("COMPLETED")
    assert "seed: 3\n" in (third.folder / "final_config.yaml").read_text()
    fourth.completes(expected[1], restarts=1)


def preemption_with_grace_time(repo, x, env, expected):
    """Of a job that trains, and of one that has no handlers yet."""
    early_repo = make_repo(repo.parent / "early", "os.path.exists('again') or os.execlp('sleep', 'python', '100')")
    early = sbatch(early_repo, env, "--partition=third", "--cpus-per-task=2", "slurm_submit.sh", x)
    job = sbatch(repo, env, "--partition=third", "slurm_submit.sh", x, "run_dir=run")
    assert "\0OMP_NUM_THREADS=2\0" in Path(f"/proc/{early.process(node=3)}/environ").read_text()
    job.trains()
    (early_repo / "again").touch()
    sbatch(repo, env, "--wait", "--partition=urgent", "--nodelist=n3", "--exclusive", "--wrap=true")
    early.ends("COMPLETED", restarts=1)
    job.completes(expected[1], restarts=1)


def signals_without_end(repo, x, env, expected):
    """A job that is stopped at each start, before it has handlers, is given up."""
    job = submit(make_repo(repo.parent / "stopped", "os.kill(os.getpid(), 10)"), env, x)
    job.until(lambda: job.about("JobState") == "FAILED", "end")
    assert 1 < int(job.about("Restarts")) < 10


def mistakes(repo, x, env, expected):
    """The log says what is wrong. What sbatch refuses leaves nothing."""
    for options, name, word in [((), "no.yaml", "no.yaml"), (["--gpus-per-node=2"], x, "--ntasks-per-node")]:
        job = sbatch(repo, env, *options, "slurm_submit.sh", name)
        job.ends("FAILED")
        assert word in job.log() and "Traceback" not in job.log()
    says = call(repo / "slurm_submit.sh", "--partition", "nowhere", x, env=env, cwd=repo, code=1)
    assert "invalid partition" in says and not list((repo / "out" / "target_models").iterdir())


SCENARIOS = [requeue_and_scancel, time_limit, preemption_with_grace_time, array, crash_on_one_node, two_nodes]
SCENARIOS += [signals_without_end, mistakes]


@pytest.fixture(scope="module")
def outcomes(cluster, x):
    """{scenario: the future of its end}, all of them ended."""
    expected = {ranks: x.parent / f"expected {ranks}" for ranks in (1, 2)}  # runs that nothing stops
    call("python", ROOT / "train.py", x, f"run_dir={expected[1]}")
    call(ROOT / "slurm_submit.sh", "--local", "--n_gpus=2", x, f"run_dir={expected[2]}")
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        repos = {scenario: make_repo(x.parent / scenario.__name__ / "my repo") for scenario in SCENARIOS}
        return {scenario: pool.submit(scenario, repo, x, cluster, expected) for scenario, repo in repos.items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(outcomes, scenario):
    outcomes[scenario].result()


# -----------------------------------------------------------------------------
# the command line


def test_dry_run(tmp_path, x):
    override = "train_dataset_config.split=train[:'90%']"
    options = "--n_gpus", "2", "--nodes=2", "--time", "1:00:00", "--job_name", "a b", "--partition=p"
    words = shlex.split(call(ROOT / "slurm_submit.sh", "--dry-run", *options, x, override, cwd=tmp_path))
    given = {"--gpus-per-node=2", "--ntasks-per-node=2", "--nodes=2", "--time=1:00:00", "--job-name=a b"}
    assert words[0] == "sbatch" and given | {"--partition=p"} <= set(words)
    folder = words[-1].removeprefix("run_dir=")
    assert words[-4:-1] == [f"{folder}/code/slurm_submit.sh", f"{folder}/code/x.yaml", override]
    assert not (tmp_path / "out").exists()


MISTAKES = [([], "config"), (["CONFIG", "model.n_lyer=3"], "n_layer"), (["CONFIG", "--gpus", "3"], "--gpus")]
MISTAKES += [(["--nodes=2", "--n_gpus=3", "CONFIG"], "divisible"), (["--n_gpus", "four", "CONFIG"], "four")]


@pytest.mark.parametrize("args, word", MISTAKES)
def test_mistakes_end_before_anything_is_submitted(tmp_path, x, args, word):
    says = call(ROOT / "slurm_submit.sh", *(x if a == "CONFIG" else a for a in args), cwd=tmp_path, code=1)
    assert word in says and says.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck():
    call("shellcheck", ROOT / "slurm_submit.sh")
