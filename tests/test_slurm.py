"""slurm_submit.sh on a real SLURM: two nodes on this machine, from Debian's packages slurm-wlm and munge.

Each node has a network and a host name of its own, claims 4 GPUs, and sees the jobs' processes as clusters do.
"""

import contextlib
import fcntl
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
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment
from test_faults import git
from test_train import Lab, metrics, weights

PROGRAMS = ["sbatch", "slurmctld", "slurmd", "munged", "ip", "unshare", "setpriv"]
N = 60
CONFIG = {"num_iterations": N, "val_loss_every": 25, "resume_every": 10}
FREEZER = Path("/sys/fs/cgroup/freezer")  # without it SLURM follows parents and children, and signals every child
PROCTRACK = os.environ.get("PROCTRACK") or ("cgroup" if os.access(FREEZER / "release_agent", os.W_OK) else "linuxproc")

SLURM_CONF = """
ClusterName={name}
SlurmctldHost=localhost({net}.1)
SlurmctldPort={port}
SlurmUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
AuthInfo=socket={root}/munge.socket,cred_expire=5
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={name}1 NodeAddr={net}.11 Port={port1} CPUs=64 RealMemory=500000 Gres=gpu:4
NodeName={name}2 NodeAddr={net}.12 Port={port2} CPUs=64 RealMemory=500000 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

# a node's own host name, hosts and, if it is told an address, network; then slurmd in place of this shell
NODE = """
hostname $1 && mount --bind $2/hosts /etc/hosts || exit
if [ $3 ]; then
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
    ip link set lo up && ip addr add $3/24 dev eth0 && ip link set eth0 up || exit
fi
exec slurmd -D -N $1
"""


class Cluster:
    """A SLURM in one folder. It ends what it started, and nothing else."""

    def __init__(self, name: str, own_networks: bool):
        self.root = root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.name, self.daemons = name, []
        self.bridge = f"{name}bridge" if own_networks else None
        net, port = ("10.79.0", 26817) if own_networks else ("127.0.0", 27817)
        self.nodes = {f"{name}{i}": f"{net}.{10 + i}" for i in (1, 2)}
        self.env = environment() | {
            "SLURM_CONF": f"{root}/slurm.conf",
            "SBATCH_CPUS_PER_GPU": "1",
            "SBATCH_EXPORT": "NONE",
        }
        self.env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
        root.chmod(0o755)  # munge wants every folder above its socket open to all
        for name in ("state", *self.nodes):
            (root / name).mkdir()
        conf = {"root": root, "name": self.name, "net": net, "port": port, "port1": port + 1, "port2": port + 2}
        (root / "slurm.conf").write_text(SLURM_CONF.format(**conf, proctrack=PROCTRACK))
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-3]\n")
        for i in range(4):  # a GPU is any character device
            os.mknod(root / f"gpu{i}", 0o666 | 0o020000, os.makedev(1, 3))
        lines = [f"{address} {node}\n" for node, address in self.nodes.items()]
        (root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        (root / "munge.key").touch(0o600)
        (root / "munge.key").write_bytes(os.urandom(128))

    def start(self):
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        if self.bridge:
            if Path("/sys/class/net", self.bridge).exists():  # of tests that were killed
                self.ip("link del", self.bridge)
            self.ip("link add", self.bridge, "type bridge")
            self.ip("addr add 10.79.0.1/24 dev", self.bridge)
            self.ip("link set", self.bridge, "up")
        self.daemon("munged", "--foreground", *(f"--{k}={self.root}/munge.{v}" for k, v in files.items()))
        until(lambda: (self.root / "munge.socket").exists(), 10, "munged", self.log)
        self.daemon("slurmctld", "-D")
        for i, (node, address) in enumerate(self.nodes.items()):
            unshare = ["unshare", "--uts", "--mount", *(["--net"] if self.bridge else [])]
            process = self.daemon(*unshare, "sh", "-c", NODE, "sh", node, self.root, address if self.bridge else "")
            if self.bridge:
                until(lambda p=process: namespace(p.pid) != namespace("self"), 10, "unshare", self.log)
                self.ip(f"link add {self.name}v{i} type veth peer name eth0 netns {process.pid}")
                self.ip(f"link set {self.name}v{i} master {self.bridge} up")
        idle = "sinfo", "-h", "-N", "-p", "main", "-t", "idle"
        until(lambda: self(*idle).count("\n") == 2, 30, "idle nodes", self.log)

    def stop(self):
        """End the jobs, the daemons, last started first, and what is left of the jobs."""
        with contextlib.suppress(subprocess.CalledProcessError, AssertionError):
            self("scancel", "-u", "root")
            until(lambda: not self("squeue", "-h"), 10, "an empty queue", self.log)
        for process in reversed(self.daemons):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid, env in processes():  # jobs outlive slurmd
            if f"SLURM_CONF={self.root}/slurm.conf" in env:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.bridge:
            self.ip("link del", self.bridge)
        shutil.rmtree(self.root, ignore_errors=True)
        for group in FREEZER.glob(f"slurm_{self.name}?"):  # slurmd leaves them behind, empty
            for folder in [*sorted(group.rglob("*/"), reverse=True), group]:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def daemon(self, *command) -> subprocess.Popen:
        with open(self.root / "daemons.log", "a") as log:
            command = ["setpriv", "--pdeathsig", "TERM", *map(str, command)]  # it ends if the tests are killed
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.daemons.append(process)
        return process

    def ip(self, *words):
        subprocess.run(["ip", *" ".join(map(str, words)).split()], check=True, env=self.env)

    def log(self) -> str:
        return (self.root / "daemons.log").read_text()[-3000:]

    def __call__(self, *command, cwd=None) -> str:
        """The output of a command that works."""
        command = list(map(str, command))
        return subprocess.run(command, env=self.env, cwd=cwd, check=True, capture_output=True, text=True).stdout


def namespace(pid) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def processes():
    """(pid, environment as ["NAME=value", ...]) of every process on this machine."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            yield int(entry.parent.name), entry.read_bytes().decode(errors="replace").split("\0")


def until(true, seconds, what, log=lambda: ""):
    """The first true value of `true`, asked again and again."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"no {what} in {seconds} s\n{log()}"
        time.sleep(0.05)
    return value


class Job:
    def __init__(self, cluster: Cluster, id: str, log: Path, run: Path | None):
        self.cluster, self.id, self.log_file, self.run = cluster, id, log, run

    def __call__(self, *command):
        self.cluster(*command, self.id)

    def log(self) -> str:
        text = self.log_file.read_text() if self.log_file.exists() else "no log"
        return f"{text}\n{self.cluster('scontrol', 'show', 'job', self.id)}\n{self.cluster.log()}"

    def about(self, field: str) -> str:
        return re.search(rf"\b{field}=(\S*)", self.cluster("scontrol", "show", "job", self.id))[1]

    def ends(self, seconds=90) -> str:
        """The state in which it leaves the queue."""
        until(lambda: not self.cluster("squeue", "-h", "-j", self.id), seconds, f"end of job {self.id}", self.log)
        return self.about("JobState")

    def completes(self, expected: Path, starts: int):
        """It ends COMPLETED, after so many starts in one log, with the numbers of a run that was never stopped."""
        assert self.ends() == "COMPLETED", self.log()
        assert self.about("Restarts") == str(starts - 1)
        assert re.findall(r"start (\d+):", self.log_file.read_text()) == list(map(str, range(1, starts + 1)))
        assert_same(self.run, expected)

    def trains(self):
        """Wait for an update that this start has logged."""
        start = int(self.about("Restarts")) + 1
        seen = re.compile(rf"start {start}:.*\nstep [1-9]\d*/{N} \| loss", re.S)
        until(lambda: self.log_file.exists() and seen.search(self.log_file.read_text()), 60, "update", self.log)

    def process(self, program: str, node: int) -> int:
        """The process id of the step's first `program`, torchrun or rank, on a node, as soon as there is one."""

        def found():
            ours = {f"SLURM_JOB_ID={self.id}", f"SLURMD_NODENAME={self.cluster.name}{node}", "SLURM_STEP_ID=0"}
            for pid, env in processes():
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_text()
                    of_rank = any(variable.startswith("TORCHELASTIC_RUN_ID=") for variable in env)
                    is_it = of_rank if program == "rank" else "/torchrun\0" in command
                    if is_it and "train.py" in command and ours <= set(env):
                        return pid

        return until(found, 60, f"{program} on node {node}", self.log)


def assert_same(run: Path, expected: Path):
    def numbers(folder):
        return [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in metrics(folder)]

    assert (run / "status").read_text() == "finished\n"
    assert numbers(run) == numbers(expected)
    state, reference = weights(run, N), weights(expected, N)
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[k], reference[k]) for k in reference)


@contextlib.contextmanager
def running(name: str, own_networks: bool):
    cluster = Cluster(name, own_networks)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster():
    if missing := [p for p in PROGRAMS if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]:
        pytest.skip(f"no {', '.join(missing)}: needs Debian's slurm-wlm, munge and iproute2")
    namespaces = ["unshare", "--net", "--uts", "--mount", "true"]
    if os.geteuid() != 0 or subprocess.run(namespaces, capture_output=True).returncode != 0:
        pytest.skip("to start a SLURM needs root, and leave to make namespaces")
    with open(Path(tempfile.gettempdir(), "slurm-tests.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # its networks and ports are those of all who test on this machine
        with running("node", own_networks=True) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("slurm lab"))  # the space is part of the test
    lab.config = lab.write(lab.base | CONFIG)
    return lab


@pytest.fixture
def repo(tmp_path):
    """A copy of the scripts in a folder whose name has a space, without git; slow enough to be interrupted."""
    folder = tmp_path / "my repo"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "slurm_submit.sh"]:
        shutil.copy(path, folder)
    update = "        s += 1\n"
    code = (folder / "train.py").read_text()
    assert code.count(update) == 1
    (folder / "train.py").write_text(code.replace(update, f"{update}        time.sleep(0.05)\n"))
    return folder


def submitted(cluster, repo, *args) -> Job:
    out = cluster(repo / "slurm_submit.sh", *args, cwd=repo)
    id, log, run = (line.split(" ", 1)[1] for line in out.splitlines())
    return Job(cluster, id, Path(log), Path(run))


@pytest.fixture
def submit(cluster, repo, lab):
    return lambda *args: submitted(cluster, repo, lab.config, *args)


def preempt(cluster):
    """Run a job that takes both nodes from the others."""
    id = cluster("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o/dev/null", "--wrap=true").strip()
    until(lambda: not cluster("squeue", "-h", "-j", id), 60, "urgent job", cluster.log)


def alone(lab, folder: Path, ranks: int, *overrides):
    """A run that nothing stops."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, ROOT / "train.py", lab.config, f"run_dir={folder}", *overrides]
    subprocess.run(command, env=environment({"OMP_NUM_THREADS": "1"}), check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def expected(lab):
    """{ranks: the folder of a run that nothing stopped}"""
    folders = {ranks: lab.root / f"expected {ranks}" for ranks in (1, 2)}
    for ranks, folder in folders.items():
        alone(lab, folder, ranks)
    return folders


def test_one_node(submit, repo, expected):
    """Two processes, one for each GPU; the run knows the code that it ran."""
    (repo / "old.py").touch()
    git(repo, "init", "-q")
    git(repo, "add", ".")
    git(repo, "commit", "-q", "-m", "x")
    changed = (repo / "models.py").read_text() + "# changed\n"
    (repo / "models.py").write_text(changed)
    (repo / "new.py").touch()
    (repo / "old.py").unlink()
    job = submit("--n_gpus", 2)
    job.completes(expected[2], starts=1)
    about = json.loads((job.run / "environment.json").read_text())
    assert (about["ranks"], about["git_commit"]) == (2, git(repo, "rev-parse", "HEAD").strip())
    assert "+# changed" in (job.run / "git.diff").read_text()
    code = job.log_file.parent / "code"
    assert "/code/" not in git(repo, "status", "--porcelain", "-uall")  # or else the next copy would have this one
    scripts = {"models.py", "new.py", "prepare_data.py", "run_info.py", "train.py", "slurm_submit.sh"}
    assert {p.name for p in code.iterdir() if p.is_file()} == scripts
    assert (code / "models.py").read_text() == changed
    assert not any(p.stat().st_mode & 0o222 for p in code.iterdir() if p.is_file())


def test_two_nodes(submit, expected):
    job = submit("--nodes=2")
    job.completes(expected[2], starts=1)


def test_two_jobs_on_shared_nodes(repo, lab, expected, cluster):
    """Their rendezvous have ports of their own, also where all nodes are one machine with one network."""
    with running("host", own_networks=False) as shared:
        jobs = [submitted(shared, repo, lab.config, "--nodes", 2) for _ in range(2)]
        for job in jobs:
            job.completes(expected[2], starts=1)


def test_a_crash_on_one_node_fails_the_job_at_once(submit, expected):
    """n1 waits for n2 at the rendezvous, for minutes if it is let. Requeued by hand the job goes on."""
    job = submit("--nodes=2")
    os.kill(job.process("torchrun", node=2), signal.SIGKILL)
    assert job.ends() == "FAILED", job.log()
    assert job.about("Restarts") == "0"
    job("scontrol", "requeue")
    job.trains()
    os.kill(job.process("rank", node=2), signal.SIGKILL)
    assert job.ends() == "FAILED", job.log()
    job("scontrol", "requeue")
    job.completes(expected[2], starts=3)


def test_scancel_saves_the_state(submit, expected):
    job = submit()
    job.trains()
    job("scancel")
    assert job.ends() == "CANCELLED", job.log()
    assert (job.run / "status").read_text() == "interrupted\n", job.log()
    again = submit(f"run_dir={job.run}")
    assert again.run == job.run
    again.completes(expected[1], starts=1)


def test_before_the_time_limit_and_at_scontrol_requeue_the_job_goes_on(submit, repo, expected):
    """Twice, and with the code and the config that were submitted."""
    job = submit("--nodes=2", "--time=1:00:00")
    for path in repo.glob("*.py"):
        path.write_text("raise SystemExit('the working tree changed')")
    job.trains()
    job("scancel", "--signal=USR1", "--batch")
    until(lambda: job.about("Restarts") == "1", 60, "requeue", job.log)
    assert (job.run / "status").read_text() == "interrupted\n", job.log()
    job.trains()
    job("scontrol", "requeue")
    job.completes(expected[2], starts=3)


def test_preemption_with_grace_time(submit, cluster, expected):
    job = submit()
    job.trains()
    preempt(cluster)
    job.completes(expected[1], starts=2)


def test_signals_during_imports(submit, cluster, expected):
    """When torchrun or train.py has no handler yet, at a time limit and at a preemption."""
    job = submit()
    job.process("torchrun", node=1)
    job("scancel", "--signal=USR1", "--batch")
    until(lambda: job.about("Restarts") == "1", 60, "requeue", job.log)
    job.process("rank", node=1)
    preempt(cluster)
    job.completes(expected[1], starts=3)


def test_an_array_element_is_requeued_alone(submit, cluster, repo, lab):
    """Also the last one, which has the array's own number."""
    array = submit("--array-seeds", "3-4", "init_seed=%a")
    log = str(array.log_file)
    jobs = [
        Job(cluster, f"{array.id}_{seed}", Path(log.replace("%a", str(seed))), Path(f"{array.run}-seed{seed}"))
        for seed in (3, 4)
    ]
    jobs[1].trains()
    jobs[1]("scancel", "--signal=USR1", "--batch")
    for job, starts in zip(jobs, (1, 2), strict=True):
        assert job.ends() == "COMPLETED", job.log()
        folder = lab.root / f"expected {job.id}"
        alone(lab, folder, 1, f"seed={job.id[-1]}", f"init_seed={job.id[-1]}")
        job.completes(folder, starts)


def test_sbatch_itself(cluster, repo, lab, expected):
    """From another folder, with little of the environment in the job; a requeue finds the first start's snapshot.

    What is told to the steps by hand is a reason to requeue, too, if they saved.
    """
    export = "--export=PATH,SLURM_CONF"
    id = cluster("sbatch", "--parsable", export, repo / "slurm_submit.sh", lab.config, cwd=repo.parent).strip()
    job = Job(cluster, id, repo.parent / f"slurm-{id}.out", None)
    job.trains()
    (repo / "train.py").write_text("raise SystemExit('the working tree changed')")
    job("scancel", "--signal=TERM")
    assert job.ends() == "COMPLETED", job.log()
    job.run = Path(re.search(r"start 1: (.*)", job.log())[1])
    assert job.run.parent == repo.parent / "out" / "target_models"
    job.completes(expected[1], starts=2)


def test_a_config_that_is_not_there(cluster, repo):
    """The log says so, also where there is no folder `out` yet."""
    id = cluster("sbatch", "--parsable", "--export=ALL", repo / "slurm_submit.sh", "no.yaml", cwd=repo).strip()
    job = Job(cluster, id, repo / f"slurm-{id}.out", None)
    assert job.ends() == "FAILED", job.log()
    assert job.log_file.read_text() == "train: cannot read the config no.yaml: No such file or directory\n"


def test_what_sbatch_refuses_leaves_nothing(cluster, repo, lab):
    result = script(repo, "--partition", "nowhere", lab.config, env=cluster.env)
    assert (result.returncode, result.stdout) == (1, "")
    assert "invalid partition" in result.stderr
    assert list((repo / "out" / "slurm").iterdir()) == []


# -----------------------------------------------------------------------------
# without a SLURM


def script(repo, *args, env=None):
    """slurm_submit.sh, run by hand in `repo`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(repo / "slurm_submit.sh"), *map(str, args)]
    env = env or environment({"PATH": path, "OMP_NUM_THREADS": "1"})
    return subprocess.run(command, env=env, cwd=repo, capture_output=True, text=True, timeout=120)


def test_dry_run_prints_the_command_and_the_script(repo, lab):
    options = "--n_gpus", "2", "--nodes=2", "--time", "1:00:00", "--job_name", "a b", "--array-seeds", "0-4%2"
    override = "train_dataset_config.split=train[:'90%']"
    result = script(repo, "--dry-run", *options, "--partition=p", lab.config, override, "init_seed=%a")
    assert result.returncode == 0, result.stderr
    line, rest = result.stdout.split("\n", 1)
    assert rest == (ROOT / "slurm_submit.sh").read_text()
    program, *command = shlex.split(line)
    folder = Path(command[-4]).parent.parent
    assert program == "sbatch"
    assert command[-4:] == [f"{folder}/code/slurm_submit.sh", f"{folder}/config.yaml", override, "init_seed=%a"]
    gpus = ["--gpus-per-node=2", "--nodes=2", "--time=1:00:00", "--job-name=a b", "--array=0-4%2", "--partition=p"]
    assert command[:-4] == ["--parsable", "--export=ALL", f"--output={folder}/%A_%a.log", *gpus]
    assert not (repo / "out").exists()


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "slurm_submit: name a config"),
        (["no.yaml"], "train: cannot read the config no.yaml: No such file"),
        (["CONFIG", "model.n_lyer=3"], "nearest valid key is model.n_layer"),
        (["--nodes=2", "--n_gpus=3", "CONFIG"], "batch_size 4 is not divisible by ranks x micro_batch_size (6 x"),
        (["CONFIG", "--gpus", "3"], "slurm_submit: there is no option --gpus"),
        (["CONFIG", "--nodes"], "slurm_submit: --nodes needs a value"),
        (["--n_gpus", "four", "CONFIG"], "slurm_submit: --n_gpus and --nodes take numbers, not four and 1"),
        (["--array-seeds=0-4", "CONFIG", "seed=1"], "slurm_submit: --array-seeds sets the seed"),
        (["--local", "--nodes=2", "CONFIG"], "slurm_submit: --local is one run"),
    ],
)
def test_mistakes_end_before_anything_is_submitted(repo, lab, args, says):
    result = script(repo, *(lab.config if a == "CONFIG" else a for a in args))
    assert result.returncode in (1, 2)
    assert result.stdout == ""
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert not (repo / "out").exists()


def test_local(repo, lab, expected):
    result = script(repo, "--local", "--n_gpus=2", lab.config, "run_dir=here")
    assert result.returncode == 0, result.stderr
    assert_same(repo / "here", expected[2])


def test_help(repo):
    result = script(repo, "--help")
    assert result.returncode == 0
    assert all(o in result.stdout for o in ("--n_gpus", "--array-seeds", "--local", "--dry-run", "sbatch"))


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck")
    subprocess.run(["shellcheck", ROOT / "slurm_submit.sh"], check=True)
