"""launch/tpu_vm.sh, gke.sh and what they send along, with stand-ins for gcloud, kubectl and docker."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="the launch scripts need bash")

TOOLS = """
bash cat chmod cp cut date dirname env grep gzip head ls mkdir mktemp mv nohup rm sed setsid sleep sort
tail tar touch tr uniq cksum df du awk find tee uname
"""
# Records its command line, and gives the first answer left that fits: [substring, standard output, error, status].
STAND_IN = """\
#!{python} -IS
import fcntl, json, os, shutil, sys
line = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
with open("{folder}/replies.json", "r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    replies = json.load(file)
    with open("{folder}/calls", "a") as calls:
        print(line, file=calls)
    number = next((i for i, reply in enumerate(replies) if reply[0] in line), None)
    _, out, err, status = [line, "", "", 0] if number is None else replies.pop(number)
    file.seek(0)
    file.truncate()
    json.dump(replies, file)
if sys.argv[1:2] in (["build"], ["apply"]):
    shutil.copyfileobj(sys.stdin.buffer, open("{folder}/" + sys.argv[1], "wb"))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""
NO_QUOTA = """\
ERROR: (gcloud.compute.tpus.queued-resources.create) {
  "code": 8,
  "message": "Quota limit 'TPUV5sLitepodServingPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0."
}
"""
NO_CAPACITY = """\
ERROR: (gcloud.compute.tpus.tpu-vm.create) { "code": 8, "message": "There is no more capacity in the zone" }
"""
NOT_FOUND = "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/dino' was not found\n"
UNREACHABLE = (
    "SSH: Attempting to connect to worker 0...\nSSH: Attempting to connect to worker 1...\n"
    + "Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].\n"
    + "SSH: Attempting to connect to worker 1...\n"
    + "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].\n"
)
RUNNING = "run: running\nlog: step 10\n"
FINISHED = "run: exit 0\nlog: done: 500 steps\n"


class Cloud:
    """A copy of the checkout's scripts, and a PATH of stand-ins."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.checkout, bin_ = folder, folder / "checkout", folder / "bin"
        shutil.copytree(ROOT / "launch", self.checkout / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("configs", "dino_jax"):
            (self.checkout / name).mkdir()
            (self.checkout / name / "__init__.py").write_text("")
        for name in ("README.md", "LICENSE", "pyproject.toml", "constraints.txt"):
            (self.checkout / name).write_text("")
        bin_.mkdir()
        for tool in TOOLS.split():
            if place := shutil.which(tool):
                (bin_ / tool).symlink_to(place)
        for name in ("gcloud", "kubectl", "docker"):
            (bin_ / name).write_text(STAND_IN.format(python=sys.executable, folder=folder))
            (bin_ / name).chmod(0o755)
        self.bin = bin_
        self.environment = {"PATH": str(bin_), "HOME": str(folder), "POLL": "0", "BACKOFF": "0", "MAX_RESTARTS": "3"}
        self.environment |= {"PROJECT": "p", "ZONE": "us-west4-a", "TOPOLOGY": "v5e:4x4", "WORKDIR": "gs://b/run"}
        self.environment |= {"CLUSTER": "c", "LOCATION": "us-west4", "REPOSITORY": "registry.example/p/r"}
        self.replies: list[list] = []

    def reply(self, part: str, out: str = "", err: str = "", status: int | None = None) -> None:
        """The answer to the next command line with `part` in it; an error fails it unless `status` says otherwise."""
        self.replies.append([part, out, err, (1 if err else 0) if status is None else status])

    def states(self, *answers: str) -> None:
        """Answers of `queued-resources describe` in order; "" for there is none. ACTIVE has a READY node."""
        for answer in answers:
            self.reply("queued-resources describe", answer, "" if answer else NOT_FOUND)
            if answer == "ACTIVE":
                self.reply("tpu-vm describe", "READY")

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        (self.folder / "replies.json").write_text(json.dumps(self.replies))
        command = [BASH, str(self.checkout / "launch" / script), *arguments]
        merged = {name: value for name, value in (self.environment | environment).items() if value}
        return subprocess.run(command, env=merged, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def works(self, script: str, *arguments: str, **environment: str) -> str:
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return done.stdout

    def complaint(self, script: str, *arguments: str, **environment: str) -> str:
        """The one line on stderr of a run that must fail."""
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{script}: error: ")
        return line

    def calls(self, part: str = "") -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if part in line] if path.exists() else []


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Cloud:
    return Cloud(tmp_path)


# --- tpu_vm.sh: a machine


def test_a_queued_slice_comes_and_is_waited_for(cloud):
    cloud.states("", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    said = cloud.works("tpu_vm.sh", "create", SPOT="1")
    assert "dino is ready; it costs money until" in said
    (create,) = cloud.calls(" create ")
    assert create == (
        "gcloud compute tpus queued-resources create dino --node-id=dino --project=p --zone=us-west4-a "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"TOPOLOGY": "v6e:2x4"}, "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e"),
        ({"TOPOLOGY": "v5p:2x2x4"}, "--accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5"),
        ({"TOPOLOGY": "v4:2x2x2"}, "--type=v4 --topology=2x2x2 --runtime-version=tpu-ubuntu2204-base"),
        ({"TYPE": "v3-8", "TOPOLOGY": ""}, "--accelerator-type=v3-8 --runtime-version=tpu-ubuntu2204-base"),
        ({"VERSION": "mine", "CREATE_FLAGS": "--network=n --internal-ips"}, "mine --network=n --internal-ips"),
        (
            {"QUEUED": "0"},
            "tpus tpu-vm create dino --project=p --zone=us-west4-a --accelerator-type=v5litepod-16 --version=",
        ),
    ],
)
def test_what_is_asked_for(cloud, settings, expected):
    (line,) = [
        line for line in cloud.works("tpu_vm.sh", "--dry-run", "create", **settings).splitlines() if " create " in line
    ]
    assert expected in line


def test_a_machine_that_is_there_is_not_asked_for_again(cloud):
    cloud.states("ACTIVE")
    cloud.works("tpu_vm.sh", "create")
    assert not cloud.calls(" create ")


def test_no_quota_is_one_line_with_the_fix_and_no_second_try(cloud):
    cloud.states("")
    cloud.reply("queued-resources create", err=NO_QUOTA)
    line = cloud.complaint("tpu_vm.sh", "create")
    assert "no quota for v5e:4x4 in us-west4-a: ask for it" in line
    assert "TPUV5sLitepodServingPerProjectPerZoneForTPUAPI" in line
    assert len(cloud.calls(" create ")) == 1


def test_preempted_while_it_was_made(cloud):
    cloud.states("", "PROVISIONING", "SUSPENDED", "", "ACTIVE")
    said = cloud.works("tpu_vm.sh", "create")
    assert "try 1 of 3" in said
    (delete,) = cloud.calls(" delete ")
    assert delete.endswith("delete dino --project=p --zone=us-west4-a --force --quiet")
    assert len(cloud.calls(" create ")) == 2


def test_trying_again_has_an_end(cloud):
    cloud.states(*["FAILED"] * 9)
    line = cloud.complaint("tpu_vm.sh", "create")
    assert "preempted, or failed, before it was ready; that was the last of 4 tries" in line
    assert "MAX_RESTARTS" in line


def test_no_capacity_is_tried_again(cloud):
    for _ in range(2):
        cloud.reply("tpu-vm describe", err=NOT_FOUND)
    cloud.reply("tpu-vm create", err=NO_CAPACITY)
    cloud.reply("tpu-vm describe", "READY")
    said = cloud.works("tpu_vm.sh", "create", QUEUED="0")
    assert "us-west4-a has no free v5e:4x4 now" in said


def test_a_machine_that_never_comes(cloud):
    cloud.states(*["WAITING_FOR_RESOURCES"] * 3)
    assert "did not come in 0 h" in cloud.complaint("tpu_vm.sh", "create", WAIT_HOURS="0")


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("ERROR: You do not currently have an active account selected.", "gcloud auth login"),
        ("ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.get' denied on 'projects/p'", "ask its owner for the role"),
        (
            "ERROR: Cloud TPU API has not been used in project p before or it is disabled.",
            "gcloud services enable tpu.",
        ),
        ("ERROR: unrecognized arguments: --node-id", "gcloud components update"),
        ("ERROR: gcloud crashed (ConnectionError): Failed to establish a new connection", "check the network"),
        ("ERROR: something that nobody foresaw\n", "something that nobody foresaw"),
    ],
)
def test_refusals_are_one_line_with_the_fix(cloud, error, fix):
    cloud.reply("describe", err=error)
    assert fix in cloud.complaint("tpu_vm.sh", "create")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PROJECT": ""}, "PROJECT is not set: the Google Cloud project that pays"),
        ({"ZONE": ""}, "ZONE is not set: where the TPUs are"),
        ({"TOPOLOGY": ""}, "neither TOPOLOGY nor TYPE is set"),
        ({"TOPOLOGY": "v9:2x2"}, "TOPOLOGY=v9:2x2: generation:shape is needed"),
        ({"TOPOLOGY": "v5e:4by4"}, "TOPOLOGY=v5e:4by4"),
        ({"TOPOLOGY": "tpu7x:2x2x1", "API": "tpu"}, "the Cloud TPU API has no tpu7x"),
        ({"API": "compute"}, "API=compute needs a TOPOLOGY of v5p, v6e or tpu7x, not v5e"),
        ({"API": "aws"}, "API=aws: tpu or compute"),
        ({"TOPOLOGY": "v6e:1x1", "API": "compute"}, "is 1 chip(s), and a ct6e-standard-4t has 4: give another MACHINE"),
        ({"WORKDIR": ""}, "WORKDIR is not set"),
        ({"WORKDIR": "runs/x"}, "WORKDIR=runs/x: a gs:// path is needed"),
    ],
)
def test_missing_and_wrong_settings_stop_before_anything_is_called(cloud, settings, message):
    assert message in cloud.complaint("tpu_vm.sh", "train", "--config=c.py", **settings)
    assert not cloud.calls()


def test_wrong_verbs_and_arguments(cloud):
    assert "there is no verb traim" in cloud.complaint("tpu_vm.sh", "traim")
    assert "delete takes no arguments, not dino" in cloud.complaint("tpu_vm.sh", "delete", "dino")
    assert "logs takes --follow, not --tail" in cloud.complaint("tpu_vm.sh", "logs", "--tail")
    assert "in one word" in cloud.complaint("tpu_vm.sh", "train", "--workdir", "gs://b")
    assert "launch/tpu_vm.sh [--dry-run] VERB" in cloud.works("tpu_vm.sh", "--help")
    assert cloud.run("tpu_vm.sh").returncode == 2
    assert not cloud.calls()


def test_without_gcloud(cloud):
    (cloud.bin / "gcloud").unlink()
    assert "gcloud is not installed: see https://cloud.google.com/sdk" in cloud.complaint("tpu_vm.sh", "create")


@pytest.mark.parametrize("topology", ["v5e:4x4", "tpu7x:2x2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("verb", ["create", "setup", "train", "logs", "status", "stop", "delete"])
def test_a_dry_run_shows_commands_and_calls_nothing(cloud, verb, topology):
    said = cloud.works("tpu_vm.sh", "--dry-run", verb, TOPOLOGY=topology)
    assert not cloud.calls()
    assert all(line.startswith(("gcloud compute ", "env COPYFILE_DISABLE=1 tar ")) for line in said.splitlines())
    assert said


def test_shown_commands_are_the_ones_that_are_called(cloud):
    shown = cloud.works("tpu_vm.sh", "--dry-run", "delete")
    cloud.works("tpu_vm.sh", "delete")
    assert shown.splitlines() == cloud.calls()


# --- tpu_vm.sh: a run


def test_train_from_nothing_to_the_end(cloud):
    cloud.states("", "ACTIVE", "ACTIVE", "ACTIVE")
    cloud.reply("tpu_worker.sh status", RUNNING * 4)
    cloud.reply("tpu_worker.sh status", FINISHED * 4)
    said = cloud.works("tpu_vm.sh", "train", "--config=configs/vit_s16.py", "--config.optim.lr=1e-3")
    assert "finished: done: 500 steps" in said
    assert "dino still costs money: launch/tpu_vm.sh delete" in said
    steps = [line for line in cloud.calls() if " describe " not in line]
    assert " create dino " in steps[0]
    assert " scp " in steps[1] and "--worker=all" in steps[1]
    assert "tpu_worker.sh setup" in steps[2]
    assert steps[3].endswith(
        "tpu_worker.sh start --config=configs/vit_s16.py --config.optim.lr=1e-3 --workdir=gs://b/run"
    )
    assert not cloud.calls(" delete ")


def test_arguments_arrive_as_they_were_given(cloud):
    cloud.states("ACTIVE", "ACTIVE")
    cloud.reply("status", FINISHED)
    cloud.works("tpu_vm.sh", "train", "--config.data.train=list:my files/it's.txt", "--workdir=gs://b/other")
    (start,) = cloud.calls("tpu_worker.sh start")
    shell = start.split("tpu_worker.sh start")[1]
    words = subprocess.run([BASH, "-c", f"printf '%s\\n' {shell}"], capture_output=True, text=True).stdout.splitlines()
    assert words == ["--config.data.train=list:my files/it's.txt", "--workdir=gs://b/other"]


def test_a_preempted_run_goes_on_on_another_machine(cloud):
    cloud.states("ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE")
    cloud.reply("tpu_worker.sh status", RUNNING)
    cloud.reply("tpu_worker.sh status", FINISHED)
    said = cloud.works("tpu_vm.sh", "train", SPOT="1")
    assert "dino was preempted; try 1 of 3" in said
    for part, times in (
        ("queued-resources delete", 1),
        (" create ", 1),
        ("setup", 2),
        (" scp ", 2),
        ("worker.sh start", 2),
    ):
        assert len(cloud.calls(part)) >= times, part
    first, second = cloud.calls("tpu_worker.sh start")
    assert first == second  # the same command resumes


def test_a_node_that_is_preempted_behind_a_request_that_was_met(cloud):
    cloud.states("ACTIVE")
    cloud.reply("queued-resources describe", "ACTIVE")
    cloud.reply("tpu-vm describe", "PREEMPTED")
    cloud.states("SUSPENDED", "", "ACTIVE", "ACTIVE")
    cloud.reply("tpu_worker.sh status", FINISHED)
    assert "was preempted; try 1 of 3" in cloud.works("tpu_vm.sh", "train")


def test_preempted_during_setup(cloud):
    cloud.states("ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE")
    cloud.reply("tpu_worker.sh setup", err="[/usr/bin/ssh] exited with return code [255].")
    cloud.reply("tpu_worker.sh status", FINISHED)
    assert "was preempted while it was set up" in cloud.works("tpu_vm.sh", "train")


def test_a_crash_starts_again_on_the_same_machine(cloud):
    cloud.states(*["ACTIVE"] * 4)
    cloud.reply("tpu_worker.sh status", RUNNING + "run: exit 1\nlog: another process died: rank 1\n")
    cloud.reply("tpu_worker.sh status", "run: interrupted\nlog: stopped by SIGTERM at step 7\n" + FINISHED)
    cloud.reply("tpu_worker.sh status", FINISHED)
    said = cloud.works("tpu_vm.sh", "train")
    assert "the run ended early: another process died: rank 1; try 1 of 3" in said
    assert "the run ended early: stopped by SIGTERM at step 7; try 2 of 3" in said
    assert len(cloud.calls("tpu_worker.sh start")) == 3
    assert len(cloud.calls("tpu_worker.sh setup")) == 1


def test_a_crash_that_comes_back_ends_it(cloud):
    cloud.states(*["ACTIVE"] * 9)
    for _ in range(5):
        cloud.reply("tpu_worker.sh status", "run: exit 1\nlog: out of memory\n")
    assert "the run ended early: out of memory; that was the last of 4 tries" in cloud.complaint("tpu_vm.sh", "train")


def test_refused_input_is_not_tried_again(cloud):
    cloud.states(*["ACTIVE"] * 2)
    error = "dino-jax: error: --config=c.py: there is no such file"
    cloud.reply("tpu_worker.sh status", f"run: exit 1\nlog: a peer left\nrun: exit 2\nlog: {error}\n")
    assert f"the run refused its input: {error}" in cloud.complaint("tpu_vm.sh", "train", "--config=c.py")
    assert len(cloud.calls("tpu_worker.sh start")) == 1


def test_a_run_that_was_stopped_stays_stopped(cloud):
    cloud.states(*["ACTIVE"] * 2)
    cloud.reply("tpu_worker.sh status", "run: stopped\nlog: stopped by SIGTERM at step 3 of 9\n")
    assert "stopped: stopped by SIGTERM at step 3 of 9" in cloud.works("tpu_vm.sh", "train")


def test_an_unreachable_worker_is_named(cloud):
    cloud.states("ACTIVE")
    cloud.reply("tpu_worker.sh setup", err=UNREACHABLE, status=255)
    line = cloud.complaint("tpu_vm.sh", "setup")
    assert "worker 1 of dino: setup failed" in line
    assert "return code [255]" in line


def test_a_worker_where_setup_fails_is_named(cloud):
    cloud.states("ACTIVE")
    failure = "tpu_worker.sh: error: the disk of /home/me/dino-venv is full: free some space\n"
    cloud.reply("setup", err=failure + "##### Command execution on worker 3 failed with exit status 1. Continuing.\n")
    line = cloud.complaint("tpu_vm.sh", "setup")
    assert "worker 3 of dino: setup failed" in line


def test_a_worker_that_stays_silent_gets_the_machine_replaced(cloud):
    cloud.states(*["ACTIVE"] * 4, "", "ACTIVE", "ACTIVE")
    for _ in range(3):
        cloud.reply("tpu_worker.sh status", err=UNREACHABLE, status=255)
    cloud.reply("tpu_worker.sh status", FINISHED)
    said = cloud.works("tpu_vm.sh", "train")
    assert "worker 1 of dino: looking at the run failed" in said
    assert len(cloud.calls(" delete ")) == 1


def test_a_moment_without_answer_is_let_pass(cloud):
    cloud.states("ACTIVE")
    cloud.reply("queued-resources describe", err="ERROR: 503 The service is currently unavailable.")
    cloud.states("ACTIVE", "ACTIVE")
    cloud.reply("tpu_worker.sh status", RUNNING)
    cloud.reply("tpu_worker.sh status", FINISHED)
    assert "finished" in cloud.works("tpu_vm.sh", "train")
    assert not cloud.calls(" delete ")


def test_the_ssh_agent_lacks_the_key(cloud):
    cloud.states("ACTIVE")
    cloud.reply(" scp ", err='ERROR: SSH Key is not present in the SSH agent. Please run "ssh-add /k" to add it.')
    assert "ssh-add ~/.ssh/google_compute_engine" in cloud.complaint("tpu_vm.sh", "setup")


def test_verbs_on_a_machine_that_is_not_there(cloud):
    for verb in ("setup", "logs", "stop"):
        cloud.states("")
        assert "dino is not ready but none: launch/tpu_vm.sh create" in cloud.complaint("tpu_vm.sh", verb)
    cloud.states("")
    assert "dino: none" in cloud.works("tpu_vm.sh", "status")
    cloud.reply("delete", err=NOT_FOUND)
    assert "deleted" in cloud.works("tpu_vm.sh", "delete")


def test_status_logs_and_stop(cloud):
    cloud.states(*["ACTIVE"] * 3)
    cloud.reply("tpu_worker.sh status", RUNNING * 2)
    assert cloud.works("tpu_vm.sh", "status").count("run: running") == 2
    cloud.reply("tail -n 200 -F", "step 1\nstep 2\n")
    cloud.replies = cloud.replies[-1:]
    cloud.states("ACTIVE")
    assert cloud.works("tpu_vm.sh", "logs", "--follow", WORKER="2").endswith("step 1\nstep 2\n")
    assert "--worker=2" in cloud.calls("tail")[0]
    cloud.replies = []
    cloud.states("ACTIVE")
    assert "dino still costs" in cloud.works("tpu_vm.sh", "stop")
    assert cloud.calls("tpu_worker.sh stop")


def test_a_failed_delete_says_that_it_costs(cloud):
    cloud.reply("delete", err="ERROR: 500 internal error")
    assert "it may still cost" in cloud.complaint("tpu_vm.sh", "delete")


# --- tpu_vm.sh: Compute Engine


def test_a_compute_engine_slice(cloud):
    seven = {"TOPOLOGY": "tpu7x:2x2x2", "SPOT": "1"}
    listed = "dino-a1 RUNNING\ndino-b2 {}\n"
    cloud.reply("list-instances", err="ERROR: The resource 'instanceGroupManagers/dino' was not found")
    cloud.reply("list-instances", listed.format("STAGING"))
    for _ in range(3):
        cloud.reply("list-instances", listed.format("RUNNING"))
    cloud.reply("workload-policy", err="ERROR: The resource 'resourcePolicies/dino' already exists")
    for _ in range(2):
        cloud.reply("tpu_worker.sh status", FINISHED)
    cloud.works("tpu_vm.sh", "train", **seven)
    assert cloud.calls(
        "workload-policy dino --project=p --region=us-west4 --type=HIGH_THROUGHPUT --accelerator-topology=2x2x2"
    )
    (template,) = cloud.calls("instance-templates create")
    assert "--machine-type=tpu7x-standard-4t --image-family=ubuntu-accel-2404-amd64-tpu-tpu7x" in template
    assert "--maintenance-policy=TERMINATE" in template
    assert "--provisioning-model=SPOT" in template
    (group,) = cloud.calls("instance-groups managed create")
    assert "--size=2 --template=dino" in group
    assert "--workload-policy=projects/p/regions/us-west4/resourcePolicies/dino" in group
    for worker in ("dino-a1", "dino-b2"):
        assert [line for line in cloud.calls("tpu_worker.sh start") if f" {worker} " in line]
    assert not cloud.calls("tpus")


def test_a_compute_engine_slice_with_an_unreachable_worker(cloud):
    cloud.reply("list-instances", "".join(f"dino-{i} RUNNING\n" for i in range(16)))
    cloud.reply(
        "ssh dino-11", err="ERROR: (gcloud.compute.ssh) [/usr/bin/ssh] exited with return code [255].", status=255
    )
    line = cloud.complaint("tpu_vm.sh", "setup", TOPOLOGY="tpu7x:4x4x4")
    assert "worker dino-11 of dino: setup failed" in line
    assert len(cloud.calls(" scp ")) == 16


def test_one_compute_engine_machine_preempted(cloud):
    cloud.reply("instances describe", "dino TERMINATED\n")
    cloud.reply("instances describe", err="ERROR: The resource 'instances/dino' was not found")
    cloud.reply("instances describe", "dino RUNNING\n")
    said = cloud.works("tpu_vm.sh", "create", TOPOLOGY="v6e:2x2", API="compute")
    assert "try 1 of 3" in said
    (create,) = cloud.calls("instances create")
    assert "--machine-type=ct6e-standard-4t --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e" in create


# --- tpu_worker.sh, which runs on the machine

RUN = """\
#!{bash}
trap 'echo; echo "stopped by SIGTERM at step 3: saved"; exit 0' TERM
echo "got $*"
echo "platforms $JAX_PLATFORMS"
while [[ -e {folder}/busy ]]; do sleep 0.05; done
exit {status}
"""


class Worker:
    """A machine with an environment whose dino-jax is a stand-in."""

    def __init__(self, cloud: Cloud):
        self.cloud, self.venv = cloud, cloud.folder / "venv"
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "python").symlink_to(sys.executable)
        cloud.environment |= {"DINO_VENV": str(self.venv), "STOP_SECONDS": "5"}
        self.busy = cloud.folder / "busy"

    def start(self, status: int, *arguments: str) -> None:
        run = self.venv / "bin" / "dino-jax"
        run.write_text(RUN.format(bash=BASH, folder=self.cloud.folder, status=status))
        run.chmod(0o755)
        self.cloud.works("tpu_worker.sh", "start", *arguments)

    def status(self) -> str:
        return self.cloud.works("tpu_worker.sh", "status")

    def until(self, part: str) -> str:
        for _ in range(100):
            if part in (said := self.status()):
                return said
            time.sleep(0.05)
        raise AssertionError(said)


@pytest.fixture
def worker(cloud):
    worker = Worker(cloud)
    yield worker
    worker.busy.unlink(missing_ok=True)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_run_on_the_machine_and_its_exit_status(worker, status):
    assert worker.status() == "run: none\nlog: \n"
    worker.busy.touch()
    worker.start(status, "--config=a b.py")
    assert worker.until("log: platforms").startswith("run: running\nlog: platforms tpu,cpu")
    worker.busy.unlink()
    assert f"run: exit {status}" in worker.until("run: exit")
    assert "got train --config=a b.py" in (worker.cloud.folder / "dino-run" / "log").read_text()


def test_stop_lets_the_run_save(worker):
    worker.busy.touch()
    worker.start(0)
    worker.until("log: platforms")
    assert worker.cloud.works("tpu_worker.sh", "stop") == "run: stopped\nlog: stopped by SIGTERM at step 3: saved\n"


def test_a_signal_from_elsewhere_is_an_interruption_and_a_kill_is_a_crash(worker):
    pid = worker.cloud.folder / "dino-run" / "pid"
    worker.busy.touch()
    worker.start(0)
    worker.until("log: platforms")
    os.killpg(int(pid.read_text()), signal.SIGTERM)
    worker.until("run: interrupted")
    worker.start(0)
    worker.until("log: platforms")
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    assert "run: exit unknown, killed" in worker.until("run: exit")


def test_start_ends_the_run_before(worker):
    worker.busy.touch()
    worker.start(0)
    worker.until("log: platforms")
    first = (worker.cloud.folder / "dino-run" / "pid").read_text()
    worker.start(0)
    worker.until("run: running")
    assert first != (worker.cloud.folder / "dino-run" / "pid").read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(int(first), 0)
    worker.cloud.works("tpu_worker.sh", "stop")


PYTHON = """\
#!{bash}
echo "$0 $*" >>{folder}/pythons
case "$*" in
  *sys.version_info*) echo {version} ;;
  *"uv python find"*) echo {folder}/python3.12 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "version = {version}" >"$3/pyvenv.cfg" ;;
  *"pip install --user"*) exit {uv} ;;
esac
"""


def python(cloud: Cloud, name: str, version: str, uv: int = 0) -> None:
    path = cloud.bin / name
    path.write_text(PYTHON.format(bash=BASH, folder=cloud.folder, version=version, uv=uv))
    path.chmod(0o755)


def test_an_old_image_gets_a_python_from_uv(cloud):
    cloud.environment["DINO_VENV"] = str(cloud.folder / "venv")
    python(cloud, "python3", "3.10.12")
    python(cloud, "../python3.12", "3.12.4")  # not on PATH
    said = cloud.works("tpu_worker.sh", "setup")
    assert "fetching 3.12" in said
    assert "making an environment with Python 3.12.4" in said
    calls = (cloud.folder / "pythons").read_text()
    assert "uv python install --quiet 3.12" in calls
    assert f"pip install --disable-pip-version-check --progress-bar off --no-compile -e {cloud.checkout}[tpu]" in calls
    assert cloud.works("tpu_worker.sh", "setup") == ""  # once is enough


def test_an_old_image_without_uv_and_apt(cloud):
    cloud.environment["DINO_VENV"] = str(cloud.folder / "venv")
    python(cloud, "python3", "3.10.12", uv=1)
    line = cloud.complaint("tpu_worker.sh", "setup")
    assert "neither uv nor apt has a Python 3.11" in line


def test_an_old_image_with_apt(cloud):
    cloud.environment["DINO_VENV"] = str(cloud.folder / "venv")
    python(cloud, "python3", "3.10.12", uv=1)
    python(cloud, "later", "3.11.9")
    (cloud.bin / "sudo").write_text(
        f'#!{BASH}\n[[ "$*" != *python3.11* ]] || mv {cloud.bin}/later {cloud.bin}/python3.11\n'
    )
    (cloud.bin / "sudo").chmod(0o755)
    assert "making an environment with Python 3.11.9" in cloud.works("tpu_worker.sh", "setup")


# --- gke.sh


def manifest_of(text: str) -> dict:
    return yaml.safe_load(text[text.index("apiVersion") :])


def test_gke_from_the_code_to_the_run(cloud):
    cloud.reply("node-pools describe", err="ERROR: code=404, message=Not found: nodePools/dino.")
    said = cloud.works(
        "gke.sh", "create", "--config=configs/vit_s16.py", '--config.run.wandb=a "b" \\ & ${NAME}', SPOT="1"
    )
    assert "launch/gke.sh delete" in said
    calls = cloud.calls()
    assert calls[0] == "gcloud container clusters get-credentials c --project=p --location=us-west4"
    (build,) = cloud.calls("docker build")
    image = build.split(" -t ")[1].split()[0]
    assert image.startswith("registry.example/p/r/dino-jax:")
    assert cloud.calls(f"docker push {image}")
    (pool,) = cloud.calls("node-pools create")
    assert (
        "--machine-type=ct5lp-hightpu-4t --num-nodes=4 --scopes=cloud-platform --node-locations=us-west4-a --spot"
        in pool
    )
    assert "--tpu-topology=4x4" in pool
    spec = manifest_of((cloud.folder / "apply").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"], spec["failurePolicy"]["maxRestarts"]) == (4, 4, 3)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["image"] == image
    assert container["args"][:2] == ["train", "--config=configs/vit_s16.py"]
    assert container["args"][-1] == "--workdir=gs://b/run"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_the_image_is_built_from_what_is_packed(cloud):
    cloud.works("gke.sh", "create", "--config=configs/vit_s16.py")
    with tarfile.open(cloud.folder / "build") as archive:
        names = {name.split("/")[0] for name in archive.getnames()}
        assert "launch/Dockerfile" in archive.getnames()
    copied = [
        line for line in (ROOT / "launch" / "Dockerfile").read_text().splitlines() if line.startswith("COPY README")
    ]
    assert set(copied[0].split()[1:-1]) <= names
    assert {"dino_jax", "configs", "launch"} <= names


def test_gke_node_pools_of_tpu7x_take_a_placement_policy(cloud):
    said = cloud.works("gke.sh", "--dry-run", "create", "--config=c.py", TOPOLOGY="tpu7x:2x2x2")
    assert "gcloud compute resource-policies create workload-policy dino" in said
    assert "--placement-policy=dino" in said
    assert "--tpu-topology" not in said
    assert manifest_of(said)["metadata"]["name"] == "dino"
    assert not cloud.calls()


def test_gke_with_image_and_pool_that_are_there(cloud):
    cloud.works("gke.sh", "create", "--config=c.py", IMAGE="mine:1", BUILD="0", POOL="0")
    assert not cloud.calls("docker")
    assert not cloud.calls("node-pools")
    assert "mine:1" in (cloud.folder / "apply").read_text()


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (
            "docker build",
            "ERROR: failed to solve: pip install did not complete",
            "the image could not be built: ERROR: failed",
        ),
        ("docker build", "ERROR: Cannot connect to the Docker daemon at unix:///x", "docker is not running: start it"),
        (
            "docker push",
            "denied: Permission 'artifactregistry' denied",
            "gcloud auth configure-docker registry.example",
        ),
        (
            "get crd",
            'Error from server (NotFound): customresourcedefinitions "jobsets" not found',
            "has no JobSet: kubectl apply",
        ),
        ("get crd", "Unable to connect to the server: net/http: timeout", "Unable to connect to the server"),
        (
            "clusters get-credentials",
            "ERROR: ResponseError: code=404, message=Not found: clusters/c",
            "Not found: clusters/c",
        ),
        ("node-pools create", "ERROR: Insufficient quota to satisfy the request: TPU_V5E", "no quota for v5e:4x4"),
        ("apply", 'error: unable to recognize "STDIN": no matches for kind "JobSet"', "no matches for kind"),
    ],
)
def test_gke_failures_are_one_line_with_the_fix(cloud, part, error, message):
    cloud.reply(part, err=error + "\n")
    cloud.reply("node-pools describe", err="NotFound")
    assert message in cloud.complaint("gke.sh", "create", "--config=c.py")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PROJECT": ""}, "PROJECT is not set"),
        ({"CLUSTER": ""}, "CLUSTER is not set"),
        ({"LOCATION": ""}, "LOCATION is not set"),
        ({"NAME": "My_Run"}, "NAME=My_Run: lower-case letters"),
    ],
)
def test_gke_missing_settings_stop_before_anything_is_called(cloud, settings, message):
    assert message in cloud.complaint("gke.sh", "create", "--config=c.py", **settings)
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"WORKDIR": ""}, "WORKDIR is not set"),
        ({"WORKDIR": "/tmp/x"}, "a gs:// path is needed"),
        ({"TOPOLOGY": ""}, "TOPOLOGY is not set"),
        ({"REPOSITORY": ""}, "REPOSITORY is not set"),
        ({"ZONE": ""}, "ZONE is not set, and LOCATION=us-west4 is a region"),
    ],
)
def test_gke_missing_settings_stop_before_anything_costs(cloud, settings, message):
    assert message in cloud.complaint("gke.sh", "create", "--config=c.py", **settings)
    assert not cloud.calls("create") + cloud.calls("apply")


def test_gke_logs_status_and_delete(cloud):
    cloud.reply("kubectl logs", "step 1\n")
    assert "step 1" in cloud.works("gke.sh", "logs", "--follow", WORKER="3")
    (logs,) = cloud.calls("kubectl logs")
    assert "jobset.sigs.k8s.io/jobset-name=dino,batch.kubernetes.io/job-completion-index=3 --tail=200 -f" in logs
    cloud.replies = [["get jobset", "", "Error from server (NotFound)", 1]]
    assert "there is no run dino in cluster c" in cloud.complaint("gke.sh", "status")
    cloud.replies = [["node-pools delete", "", "ERROR: 500 internal", 1]]
    assert "may still cost" in cloud.complaint("gke.sh", "delete")
    cloud.replies = [["node-pools delete", "", "ERROR: code=404, message=Not found", 1]]
    assert "deleted" in cloud.works("gke.sh", "delete")


@pytest.mark.parametrize("verb", ["create", "logs", "status", "delete"])
def test_a_dry_run_of_gke_calls_nothing(cloud, verb):
    assert "gcloud container clusters get-credentials" in cloud.works("gke.sh", "--dry-run", verb)
    assert not cloud.calls()


# --- keep.py, the first process of a container and of a run on a machine


@pytest.mark.parametrize(("status", "told", "expected"), [(0, False, 0), (2, False, 2), (0, True, 143), (1, True, 1)])
def test_a_run_that_is_done_differs_from_one_that_was_stopped(tmp_path, status, told, expected):
    run, busy, started, file = (tmp_path / name for name in ("run", "busy", "started", "status"))
    loop = f"touch {started}\nwhile [[ -e {busy} ]]; do sleep 0.05; done\nexit {status}\n"
    run.write_text(f"#!{BASH}\ntrap 'exit {status}' TERM\n{loop}")
    run.chmod(0o755)
    busy.touch()
    command = [sys.executable, str(ROOT / "launch" / "keep.py"), f"--status={file}", str(run)]
    process = subprocess.Popen(command)
    while not started.exists() and process.poll() is None:
        time.sleep(0.02)
    if told:
        process.terminate()
    else:
        busy.unlink()
    assert process.wait(20) == expected
    assert file.read_text() == f"{expected}\n"


def test_a_run_that_is_killed_or_not_there(tmp_path):
    keep = [sys.executable, str(ROOT / "launch" / "keep.py")]
    assert subprocess.run([*keep, BASH, "-c", "kill -KILL $$"]).returncode == 137
    done = subprocess.run([*keep, str(tmp_path / "absent")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (127, f"keep.py: {tmp_path / 'absent'}: No such file or directory\n")
