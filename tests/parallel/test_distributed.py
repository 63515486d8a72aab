"""Which process is which, and what the launchers do with processes that end in every way; no JAX process is started."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dino_jax.errors import UserError
from dino_jax.parallel.distributed import Place, check_alone, find_place, first_host
from dino_jax.parallel.sharding import MESH_AXES, batch_sharding, process_rows, to_devices

ROOT = pathlib.Path(__file__).parents[2]
SUPERVISE = ROOT / "launch" / "supervise.py"
SLURM = {
    "SLURM_JOB_ID": "71234",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def test_flags_win_over_variables_and_variables_over_slurm():
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert find_place(None, None, None, {}) is None
    assert find_place(None, None, None, SLURM | variables) == Place("a:1", 4, 3)
    assert find_place("b:2", 2, 0, SLURM | variables) == Place("b:2", 2, 0)
    assert find_place(None, None, None, variables | {"JAX_LOCAL_DEVICE_IDS": "2,3"}) == Place("a:1", 4, 3, [2, 3])
    assert find_place(None, 1, None, SLURM | variables).processes == 1


def test_a_jobs_index_is_the_number_of_a_process():
    variables = {"JAX_COORDINATOR_ADDRESS": "run-0-0.run:8476", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}
    assert find_place(None, None, None, variables) == Place("run-0-0.run:8476", 4, 2)
    assert find_place(None, None, None, {"JOB_COMPLETION_INDEX": "2"}) is None


def test_slurm_tasks():
    assert find_place(None, None, None, SLURM) == Place("gpu07:31234", 2, 1)
    several = SLURM | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    assert find_place(None, None, None, several) == Place("gpu07:31234", 16, 1, [5])
    bound = several | {"CUDA_VISIBLE_DEVICES": "5"}  # as --gpus-per-task does: the one it sees is its own
    assert find_place(None, None, None, bound).devices is None
    assert find_place(None, None, None, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}).processes == 1
    login = {name: value for name, value in SLURM.items() if name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST")}
    assert find_place(None, None, None, login) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("tpu", "tpu"),
        ("a1,b2", "a1"),
        ("n[003-005,9],login", "n003"),
        ("n[7,9]", "n7"),
        ("login,n[003-005]", "login"),
        ("r1n[2-3]", "r1n2"),
        ("r[1-2]n[03,07-08],x", "r1n03"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("flags", "variables", "named"),
    [
        (("a:1", None, None), {}, "--processes and --process"),
        ((None, 2, 0), {}, "--coordinator"),
        (("a:1", 2, 2), {}, "--process=2"),
        (("a", 2, 1), {}, "--coordinator=a"),
        (("a:1", None, 0), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
    ],
)
def test_half_a_place_is_an_error(flags, variables, named):
    with pytest.raises(UserError, match=named):
        find_place(*flags, variables)


def test_rows_find_their_devices_in_any_mesh():
    batch = {"x": np.arange(16 * 3).reshape(16, 3), "y": np.arange(16)}
    for order, shape in (([5, 0, 3, 7, 1, 6, 2, 4], (8, 1, 1)), ([7, 0, 6, 1, 5, 2, 4, 3], (2, 2, 2))):
        mesh = Mesh(np.array(jax.devices())[order].reshape(shape), MESH_AXES)
        rows = process_rows(16, mesh)
        assert rows.tolist() == list(range(16))
        placed = to_devices(batch, mesh, 16)
        for name, values in batch.items():
            assert placed[name].sharding == batch_sharding(mesh)
            np.testing.assert_array_equal(placed[name], values)
            for shard in placed[name].addressable_shards:
                np.testing.assert_array_equal(shard.data, values[shard.index])


def launch(number: int, script: str, *options: str) -> subprocess.Popen:
    """`script`, in which $JAX_PROCESS_ID differs, in so many processes."""
    command = [sys.executable, str(SUPERVISE), "--local", str(number), *options, "--", "bash", "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(number: int, script: str) -> tuple[int, list[str]]:
    process = launch(number, script, "--patience", "1.5")
    lines = process.communicate(timeout=60)[0].splitlines()
    return process.returncode, lines


def test_output_comes_behind_the_number_and_success_is_0():
    status, lines = outcome(3, 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"')
    assert status == 0
    address = lines[-1].split()[-1]
    said = [line for line in lines if not line.startswith("multihost: process")]
    assert sorted(said) == [f"[{i}] {i} of 3 at {address}" for i in range(3)]


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("[ $JAX_PROCESS_ID = 1 ] && kill -9 $$; sleep 60", 137, "was killed by SIGKILL"),
        # what a kill does to the others comes first to the launcher
        ("[ $JAX_PROCESS_ID = 1 ] && { sleep 0.5; kill -9 $$; }; echo boom; exit 1", 137, "was killed by SIGKILL"),
        (
            "[ $JAX_PROCESS_ID = 1 ] && { echo 'dino-jax: error: no such file'; exit 2; }; sleep 60",
            2,
            "failed: no such",
        ),
        ("[ $JAX_PROCESS_ID = 1 ] && { printf oh; exit 3; }; sleep 60", 3, "failed: status 3; oh"),
        # the runtime aborts the others where one is silent
        (
            "[ $JAX_PROCESS_ID = 1 ] && kill -STOP $$; echo 'tasks (stopped sending heartbeats):'; echo 1; kill -6 $$",
            1,
            "does not answer",
        ),
        # process 0 knows whose fault it is
        (
            "[ $JAX_PROCESS_ID = 0 ] && { echo 'dino-jax: error: process 1 (h) differs from process 0 (h)'; exit 2; }; "
            "[ $JAX_PROCESS_ID = 1 ] && sleep 0.2; exit 2",
            2,
            "failed: differs from process 0 (h)",
        ),
    ],
)
def test_the_dead_one_is_named_and_the_others_are_ended(script, status, words):
    start = time.monotonic()
    found, lines = outcome(3, script)
    assert found == status
    assert lines[-1].startswith("multihost: process 1 on ")
    assert words in lines[-1]
    assert time.monotonic() - start < 30


def ready(process: subprocess.Popen, number: int) -> list[int]:
    """The processes' numbers in the system, once so many lines said `ready`."""
    pids = {}
    while number:
        words = process.stdout.readline().split()
        if words[:2] == ["multihost:", "process"]:
            pids[int(words[2])] = int(words[4])
        number -= words[1:] == ["ready"]
    return [pids[rank] for rank in sorted(pids)]


def test_sigterm_reaches_all_and_a_clean_end_is_0():
    process = launch(2, "trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.1; done")
    ready(process, 2)
    process.send_signal(signal.SIGTERM)
    assert sorted(process.communicate(timeout=30)[0].splitlines()) == ["[0] saved", "[1] saved"]
    assert process.returncode == 0


@pytest.mark.parametrize("victim", ["launcher", "keeper"])
def test_no_process_outlives_its_launcher(victim):
    process = launch(2, "echo ready; exec sleep 60", "--patience", "1")
    pids = ready(process, 2)
    keeper = int(pathlib.Path(f"/proc/{pids[1]}/stat").read_text().split()[3])
    os.kill(process.pid if victim == "launcher" else keeper, signal.SIGKILL)
    rest = process.communicate(timeout=60)[0]
    deadline = time.monotonic() + 10
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)
    if victim == "keeper":
        assert process.returncode == 137
        assert "multihost: process 1 on" in rest.splitlines()[-1]


def test_a_host_that_cannot_be_reached_is_named(tmp_path):
    stand_in(
        tmp_path,
        "ssh",
        'case "$*" in *" b "*) echo "ssh: connect to host b: No route"; exit 255 ;; esac; eval "${@: -1}"',
    )
    command = [sys.executable, str(SUPERVISE), "--hosts", "u@a,b", "--port", "8476", "--patience", "1", "--"]
    command += ["bash", "-c", "echo $JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID $DINO_X; sleep 60"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DINO_X": "two words"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 255
    assert "[0] a:8476 0 two words" in done.stdout.splitlines()
    last = done.stdout.splitlines()[-1]
    assert last.startswith("multihost: process 1 on b could not be started: ssh: connect to host b: No route")


def stand_in(folder: pathlib.Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def venv(tmp_path):
    """An environment that common.sh takes for installed, with this Python."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("")
    stand_in(folder / "bin", "python", f'exec {sys.executable} "$@"')
    stamp = 'source launch/common.sh && fingerprint >"$venv/.dino-jax-base"'
    subprocess.run(["bash", "-c", stamp], cwd=ROOT, env=os.environ | {"DINO_VENV": str(folder)}, check=True)
    return folder


def multihost(venv: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "launch" / "multihost.sh"), *arguments]
    return subprocess.run(
        command, env=os.environ | {"DINO_VENV": str(venv)}, capture_output=True, text=True, timeout=60
    )


def test_dry_run_prints_every_command(venv):
    done = multihost(venv, "--hosts=a,b,c", "--dry-run", "train", "--config=c d.py", "--workdir=gs://x/y")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for rank, (host, line) in enumerate(zip("abc", lines, strict=True)):
        assert line.startswith("ssh -o BatchMode=yes")
        assert f" {host} " in line
        for words in (f"JAX_PROCESS_ID={rank}", "JAX_COORDINATOR_ADDRESS=a:8476", "JAX_NUM_PROCESSES=3", "gs://x/y"):
            assert words in line
    assert len(multihost(venv, "--local", "2", "--dry-run", "train").stdout.splitlines()) == 2


def test_a_dry_run_installs_nothing(tmp_path):
    done = multihost(tmp_path / "none", "--local", "2", "--dry-run", "train")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert f"{tmp_path / 'none'}/bin/python -m dino_jax train" in done.stdout
    assert not (tmp_path / "none").exists()


def test_a_verb_of_one_process_is_refused_by_several(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    check_alone("features")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    check_alone("features")
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    with pytest.raises(UserError, match="features runs in one process, here are 2"):
        check_alone("features")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--config=x"), "give --local N"),
        (("--local", "2"), "nothing to run"),
        (("--local",), "--local needs a value"),
        (("--locl", "2", "train"), "unknown option --locl"),
        (("--local", "0", "train"), "give --local N"),
        (("--local", "2", "features", "--images=x"), "several processes run train or eval, not features"),
    ],
)
def test_bad_calls_get_one_clear_line(venv, arguments, words):
    done = multihost(venv, *arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr.splitlines()[-1]


class Cluster:
    """A SLURM of stand-ins: srun runs its command once, scancel sends its signal to it."""

    def __init__(self, folder: pathlib.Path, venv: pathlib.Path):
        self.calls, self.venv, self.bin = folder / "calls", venv, folder / "bin"
        self.bin.mkdir()
        record = f'echo "${{0##*/}} $*" >>{self.calls}\n'
        stand_in(
            self.bin,
            "srun",
            record + f'while [[ "$1" == --* ]]; do shift; done; "$@" & echo $! >{folder}/task; wait $!',
        )
        stand_in(
            self.bin,
            "scancel",
            record + f'until [[ -s {folder}/task ]]; do sleep 0.05; done; kill -TERM "$(cat {folder}/task)"',
        )
        stand_in(self.bin, "scontrol", record)

    def submit(self, task: str, notice: signal.Signals | None = None) -> tuple[int, str, list[str]]:
        """Status, output and calls of a job whose task is a script; `notice` comes when it says `ready`."""
        stand_in(self.venv / "bin", "python", task)
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "DINO_VENV": str(self.venv)}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)}
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "slurm.sbatch"), "train", "--workdir=w"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = ""
        if notice is not None:
            said = process.stdout.readline()
            process.send_signal(notice)
        said += process.communicate(timeout=30)[0]
        return process.returncode, said, self.calls.read_text().splitlines()


@pytest.fixture
def cluster(tmp_path, venv):
    return Cluster(tmp_path, venv)


WAITS = "trap 'echo saved; exit 0' TERM; echo ready; for i in {1..200}; do sleep 0.05; done; exit 9"


def test_slurm_runs_to_the_end(cluster):
    status, said, calls = cluster.submit('echo "$*"')
    assert status == 0
    assert said == "-m dino_jax train --workdir=w\n"
    assert [call.split()[0] for call in calls] == ["srun"]
    assert "--kill-on-bad-exit=1" in calls[0]


def test_slurm_saves_and_requeues_before_the_time_is_up(cluster):
    status, said, calls = cluster.submit(WAITS, signal.SIGUSR1)
    assert status == 0, said
    assert said.splitlines()[:2] == ["ready", "saved"]
    assert calls[1:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_slurm_does_not_requeue_what_is_cancelled_or_fails(cluster):
    status, said, calls = cluster.submit(WAITS, signal.SIGTERM)
    assert (status, said) == (0, "ready\nsaved\n")
    assert calls[1:] == ["scancel --signal=TERM 7"]
    status, said, calls = cluster.submit("exit 3")
    assert status == 3
    assert "srun ended with status 3" in said
    assert calls[3:] == []


def test_slurm_script_says_what_it_lacks(venv):
    script = str(ROOT / "launch" / "slurm.sbatch")
    job = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/"}
    for environment, arguments, words in (
        ({"PATH": os.environ["PATH"]}, ["train"], "submit this with sbatch"),
        (job, [], "nothing to run"),
        (job, ["train"], "no environment at /"),
    ):
        done = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert words in done.stderr
    done = subprocess.run(["bash", script, "--dry-run", "train", "--config=c d.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("srun --label ")
    assert done.stdout.strip().endswith("-m dino_jax train --config=c\\ d.py")
