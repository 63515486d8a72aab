"""launch/common.sh where something is missing, with stand-ins for python, pip and df: one line says what."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="the launch scripts need bash")

# Stands in for a Python: answers the questions that common.sh asks, and `-m venv DIR` copies it into DIR.
PYTHON = """\
#!{bash}
case "$*" in
  *sys.version_info*) echo {version} ;;
  *"import ensurepip, venv"*) exit {lacks_venv} ;;
  *"import pip"*) ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "version = {version}" >"$3/pyvenv.cfg" ;;
  *"-m pip install"*) echo "pip $*" >>"{calls}"; {pip} ;;
  *) echo "ran $*" ;;
esac
"""
INSTALLS = """\
echo "Downloading jaxlib-0.10.2-cp311-cp311-manylinux.whl (84.1 MB)"
echo "Downloading absl_py-2.5.1-py3-none-any.whl (140 kB)"
echo "Installing collected packages: absl-py, jaxlib"
"""
OFFLINE = """\
echo "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)': /simple/jax/"
echo "ERROR: No matching distribution found for jax>=0.10"
exit 1
"""
DISK_FULL_MEANWHILE = """\
echo "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
exit 1
"""
CONFLICT = """\
echo "ERROR: Cannot install flax==1 and jax==2 because these package versions have conflicting dependencies."
exit 1
"""
NO_CPU_TORCH = """\
case "$*" in
  *--no-deps*torch*) echo "ERROR: No matching distribution found for torch==2.13.0+cpu"; exit 1 ;;
esac
"""
TOOLS = (
    "awk",
    "cat",
    "cksum",
    "cp",
    "cut",
    "df",
    "dirname",
    "du",
    "find",
    "grep",
    "head",
    "mkdir",
    "sed",
    "tail",
    "tee",
    "uname",
)


class Machine:
    """A checkout with the launch scripts and a PATH that leads only to stand-ins and the few tools they use."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.checkout, self.bin, self.calls = folder / "checkout", folder / "bin", folder / "calls"
        self.environment: dict[str, str] = {"PATH": str(self.bin), "HOME": str(folder)}
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "pyproject.toml").write_text("")
        (self.checkout / "constraints.txt").write_text("torch==2.13.0\n")
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def write(self, name: str, text: str) -> pathlib.Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(
        self, name: str = "python3", *, version: str = "3.11.7", lacks_venv: int = 0, pip: str = INSTALLS
    ) -> pathlib.Path:
        text = PYTHON.format(bash=BASH, version=version, lacks_venv=lacks_venv, pip=pip, calls=self.calls)
        return self.write(name, text)

    def free(self, megabytes: int) -> None:
        lines = f"echo Filesystem 1024-blocks Used Available\necho /dev/x 9 9 {megabytes * 1024} 9% /\n"
        self.write("df", f"#!{BASH}\n{lines}")

    def run(self, script: str = "quickstart.sh", *arguments: str, cwd: pathlib.Path | None = None):
        command = [BASH, str(self.checkout / "launch" / script), *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=cwd or self.checkout, capture_output=True, text=True, timeout=60
        )

    def complaint(self, *command: str) -> str:
        """The one line on stderr of a run that must fail with status 1."""
        done = self.run(*command)
        assert done.returncode == 1, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        return line

    def installs(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    machine = Machine(tmp_path)
    machine.free(100_000)
    return machine


def test_a_fresh_machine_installs_once_and_tells_what_it_does(machine):
    machine.python()
    first = machine.run("quickstart.sh", "--fast", cwd=machine.bin)
    assert first.returncode == 0, first.stderr
    assert "ran -m dino_jax.tools.quickstart --fast" in first.stdout
    assert "Downloading jaxlib-0.10.2-cp311-cp311-manylinux.whl (84.1 MB)\n" in first.stdout
    assert "absl_py" not in first.stdout  # small ones are not worth a line
    assert "Installing collected packages\n" in first.stdout
    calls = machine.installs()
    again = machine.run()
    assert again.stdout.splitlines() == ["ran -m dino_jax.tools.quickstart"]
    assert machine.installs() == calls


def test_a_changed_pin_installs_again(machine):
    machine.python()
    machine.run()
    calls = machine.installs()
    (machine.checkout / "constraints.txt").write_text("torch==2.14.0\n")
    assert machine.run().returncode == 0
    assert machine.installs() > calls


def test_an_interrupted_installation_is_taken_up(machine):
    machine.python(pip=OFFLINE)
    machine.complaint()
    shutil.copy(machine.python(), machine.checkout / ".venv" / "bin" / "python")
    assert "ran -m dino_jax.tools.quickstart" in machine.run().stdout


def test_no_python(machine):
    missing = "Python 3.11 or newer is needed and python3 is not installed: install one or name it with PYTHON"
    assert machine.complaint() == f"quickstart.sh: error: {missing}"


def test_old_python(machine):
    machine.python(version="3.9.18")
    assert "Python 3.11 or newer is needed and python3 is 3.9.18" in machine.complaint("test.sh")


def test_an_old_python3_is_passed_over_for_a_newer_one(machine):
    machine.python(version="3.9.18")
    machine.python("python3.12", version="3.12.1")
    assert "making an environment with Python 3.12.1" in machine.run().stdout


def test_named_python_is_the_only_one_tried(machine):
    machine.python()
    machine.environment["PYTHON"] = str(machine.python("old", version="3.10.2"))
    assert "old is 3.10.2" in machine.complaint()
    machine.environment["PYTHON"] = "/nowhere/python"
    assert "/nowhere/python is not installed" in machine.complaint()


def test_no_venv_module(machine):
    machine.python(lacks_venv=1)
    assert machine.complaint().endswith(
        "Python 3.11.7 lacks the venv module: install it (Debian, Ubuntu: apt install python3.11-venv) or set PYTHON"
    )


def test_no_disk(machine):
    machine.python()
    machine.free(700)
    line = machine.complaint()
    assert "700 MB are free" in line
    assert "GB are needed" in line
    assert machine.installs() == 0


@pytest.mark.parametrize(
    ("pip", "expected"),
    [
        (OFFLINE, "pip cannot reach the package index"),
        (DISK_FULL_MEANWHILE, "the disk of"),
        (CONFLICT, "pip failed: ERROR: Cannot install flax==1 and jax==2"),
    ],
)
def test_pip_fails(machine, pip, expected):
    machine.python(pip=pip)
    line = machine.complaint()
    assert expected in line
    assert f"log: {machine.checkout}/.venv/install.log" in line


def test_unwritable_checkout(machine):
    machine.python()
    (machine.checkout / "file").write_text("")
    machine.environment["DINO_VENV"] = str(machine.checkout / "file" / "venv")  # holds for root as well
    assert "cannot write to" in machine.complaint()


def test_other_peoples_folders_are_left_alone(machine):
    machine.python()
    (machine.checkout / ".venv").mkdir()
    (machine.checkout / ".venv" / "thesis.tex").write_text("")
    assert "is not a Python environment" in machine.complaint()


def test_an_environment_of_another_python_is_named_not_replaced(machine):
    machine.python()
    machine.run()
    machine.environment["PYTHON"] = str(machine.python("python3.12", version="3.12.1"))
    assert "holds Python 3.11.7, PYTHON is 3.12.1" in machine.complaint()


def test_without_a_cpu_build_of_torch_the_peers_are_left_out_with_a_line(machine):
    machine.python(pip=NO_CPU_TORCH)
    done = machine.run("test.sh", "--all")
    assert "no torch 2.13.0" in done.stdout
    assert "[peers]" not in machine.calls.read_text()


def test_test_sh_names_every_check_that_failed_and_runs_them_all(machine):
    machine.python()
    machine.run("test.sh")
    venv = machine.checkout / ".venv" / "bin"
    failing = 'case "$*" in *ruff\\ check*|*pytest*) echo "ran $*"; exit 1 ;; *version_info*) echo 3.11.7 ;; esac'
    (venv / "python").write_text(f"#!{BASH}\n{failing}\n")
    (venv / "lint-imports").write_text(f"#!{BASH}\n")
    (venv / "lint-imports").chmod(0o755)
    done = machine.run("test.sh", "tests/test_losses.py", "-x")
    assert done.returncode == 1
    assert done.stderr == "test.sh: error: failed: ruff check, pytest\n"
    assert "ran -m pytest -n 2 --dist loadfile -m not extra tests/test_losses.py -x" in done.stdout
