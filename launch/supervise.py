"""Starts the processes of one run, watches them, and ends them all when one dies; `launch/multihost.sh` calls it.

    supervise.py (--local N | --hosts A,B,...) [--port P] [--patience S] [--dry-run] -- COMMAND ...

COMMAND runs once for each process, in this directory, with the variables that `dino_jax/parallel/distributed.py`
describes and those of this environment that concern JAX. Lines of output begin with `[PROCESS]`. SIGTERM and Ctrl-C
are passed on to all. When a process dies, the others have `--patience` seconds (10) to report and end; then they are
killed. The last line names the dead process and the cause; the exit status is its own, or 128 + its signal's number.

Each process is the child of a keeper (this file with `--keep`) on its machine, which takes orders on its standard
input. So signals pass through ssh, and no process outlives its launcher. Needs only Python itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

GRACE = 30.0  # seconds from SIGTERM to SIGKILL where the launcher is gone
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=10")
CARRIED = re.compile(r"(DINO|GRAIN|HF|JAX|LIBTPU|NCCL|TPU|XLA)_|(GOOGLE_APPLICATION_CREDENTIALS|PYTHONPATH)$")
ERROR = re.compile(r"dino-jax: error: (?:process (\d+) \(\S+\):? )?(.*)")
UNHEALTHY = "stopped sending heartbeats"  # the runtime's words; the next line is the number of a process
STARTED, ENDED = "keeper: started", "keeper: ended"  # the keeper's own words: the process, its status
# They may come after the start of a line of the command, which writes to the same pipe.
KEEPER = re.compile(rf"(.*?)(?:({STARTED}|{ENDED}) (-?\d+))?", re.DOTALL)


class Event(NamedTuple):
    """A line of a process, or (None) its end."""

    rank: int
    line: str | None
    status: int = 0  # of the end; negative: a signal


class Process:
    """One process of the run, through its keeper, here or over ssh."""

    def __init__(self, rank: int, host: str | None, keeper: list[str]):
        self.rank, self.host = rank, host or socket.gethostname()
        self.command = [*SSH, host, shlex.join(keeper)] if host else keeper
        self.started = False
        self.status: int | None = None  # None: it runs
        self.error = ""  # the error that it, or process 0 about it, reported
        self.last = ""  # line

    def start(self, events: queue.Queue[Event]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # In a session of its own: Ctrl-C at the terminal comes to the launcher alone.
        self.keeper: Any = subprocess.Popen(self.command, start_new_session=True, **pipes)  # type: ignore[call-overload]
        reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        reader.start()
        threading.Thread(target=self._wait, args=(events, reader), daemon=True).start()

    def tell(self, name: str) -> None:
        """Passes a signal on."""
        with contextlib.suppress(OSError):
            self.keeper.stdin.write(name.encode() + b"\n")
            self.keeper.stdin.flush()

    def _read(self, events: queue.Queue[Event]) -> None:
        for raw in self.keeper.stdout:
            events.put(Event(self.rank, raw.decode(errors="replace").rstrip("\n")))

    def _wait(self, events: queue.Queue[Event], reader: threading.Thread) -> None:
        status = self.keeper.wait()
        reader.join(1)  # a killed keeper's child may hold the pipe for a moment
        events.put(Event(self.rank, None, status))

    def fate(self) -> str:
        """What happened to it, in words."""
        name = f"process {self.rank} on {self.host}"
        if not self.started:
            return f"{name} could not be started: {self.last or f'status {self.status}'}"
        if self.status is None:
            return f"{name} does not answer: it is stuck, or cut off from process 0"
        if self.status < 0 and not (self.error and self.status == -signal.SIGABRT):
            return f"{name} was killed by {signal.Signals(-self.status).name}"
        return f"{name} failed: {self.error or f'status {self.status}; {self.last}'}"


class Launch:
    """The processes of a run, from the start of the first to the end of the last."""

    def __init__(self, processes: list[Process], patience: float):
        self.processes, self.patience = processes, patience
        self.events: queue.Queue[Event] = queue.Queue()
        self.dead: list[Process] = []  # with a status that is not 0, in the order of their deaths
        self.accused: Process | None = None  # whom process 0 or the runtime blames
        self._name_follows = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)
        for process in self.processes:
            process.start(self.events)
        while self.running() and not self.dead:
            self.hear(None)
        if not self.dead:
            return 0
        deadline = time.monotonic() + self.patience
        while self.running() and self.hear(deadline - time.monotonic()):
            pass
        culprit = self.culprit()
        words, status = culprit.fate(), culprit.status or 1  # before it is killed, if it still runs
        for process in self.running():
            process.tell("KILL")
        deadline = time.monotonic() + self.patience
        while self.running() and self.hear(deadline - time.monotonic()):
            pass
        left = [f"process {process.rank} on {process.host}" for process in self.running() if process.started]
        others = f"{' and '.join(left)} may still run" if left else f"all {len(self.processes)} are ended"
        say(f"multihost: {words}; {others}, and the same command resumes")
        return status if status > 0 else 128 - status

    def running(self) -> list[Process]:
        return [process for process in self.processes if process.status is None]

    def culprit(self) -> Process:
        """The process that died first, not as a consequence of another's death."""
        killed = [p for p in self.dead if p.status not in (None, -signal.SIGABRT) and (p.status or 0) < 0]
        return next(iter(killed), self.accused or self.dead[0])

    def hear(self, seconds: float | None) -> bool:
        """Handles one event; returns whether one came within these seconds."""
        try:
            event = self.events.get(timeout=1e6 if seconds is None else max(seconds, 0))
        except queue.Empty:
            return False
        process = self.processes[event.rank]
        if event.line is None:
            if process.status is None:  # otherwise its keeper said so before
                self._end(process, event.status)
            return True
        said, keeper_word, number = KEEPER.fullmatch(event.line).groups()  # type: ignore[union-attr]
        if said or not keeper_word:
            say(f"[{event.rank}] {said}")
            self._understand(process, said)
        if keeper_word == STARTED:
            process.started = True
            say(f"multihost: process {event.rank} is {number} on {process.host}")
        elif keeper_word == ENDED:
            self._end(process, int(number))
        return True

    def _end(self, process: Process, status: int) -> None:
        process.status = status
        if status:
            self.dead.append(process)

    def _understand(self, process: Process, line: str) -> None:
        process.last = line.strip() or process.last
        if found := ERROR.search(line):
            blamed = self.processes[int(found[1])] if found[1] and int(found[1]) < len(self.processes) else process
            blamed.error = found[2]
            self.accused = blamed
        elif self._name_follows and line.strip().isdigit() and int(line) < len(self.processes):
            self.accused = self.processes[int(line)]
        self._name_follows = UNHEALTHY in line

    def _pass_on(self, number: int, frame: Any) -> None:
        for process in self.processes:
            process.tell(signal.Signals(number).name.removeprefix("SIG"))


def say(line: str) -> None:
    """Writes a line in one piece: `print` may write its end separately, after output of others to the same pipe."""
    os.write(1, line.encode() + b"\n")


def keep(arguments: argparse.Namespace) -> int:
    """The keeper: runs the command, sends it the signals it is told, and ends it when its input closes."""
    os.chdir(arguments.directory)
    environment = os.environ | dict(setting.split("=", 1) for setting in arguments.set)
    parent = os.getpid()

    def in_child() -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux only
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        say(f"{STARTED} {os.getpid()}")  # before anything that the command says

    child = subprocess.Popen(
        arguments.command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=in_child
    )

    def send(name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            number = signal.Signals[f"SIG{name}"]
            (os.killpg if number == signal.SIGKILL else os.kill)(child.pid, number)

    def listen() -> None:
        while heard := os.read(0, 4096):
            for name in heard.decode().split():
                send(name)
        send("TERM")
        time.sleep(GRACE)
        send("KILL")

    threading.Thread(target=listen, daemon=True).start()
    status = child.wait()
    say(f"{ENDED} {status}")
    return status if status >= 0 else 128 - status


def processes_of(arguments: argparse.Namespace) -> list[Process]:
    """The processes that the command line asks for."""
    hosts = arguments.hosts.split(",") if arguments.hosts else [None] * arguments.local
    coordinator = f"{hosts[0].rpartition('@')[2] if hosts[0] else '127.0.0.1'}:{arguments.port or free_port()}"
    carried = {name: value for name, value in os.environ.items() if arguments.hosts and CARRIED.match(name)}
    processes = []
    for rank, host in enumerate(hosts):
        variables = carried | {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(len(hosts))}
        variables |= {"JAX_PROCESS_ID": str(rank), "PYTHONUNBUFFERED": "1"}
        if not host:
            variables["JAX_LOCAL_DEVICE_IDS"] = str(rank)  # of GPUs, if there are any: one each
        settings = [word for name, value in variables.items() for word in ("--set", f"{name}={value}")]
        keeper = [sys.executable, os.path.abspath(__file__), "--keep", "--directory", os.getcwd(), *settings]
        processes.append(Process(rank, host, [*keeper, "--", *arguments.command]))
    return processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="multihost.sh", usage="%(prog)s (--local N | --hosts A,B,...) VERB ...")
    parser.add_argument("--local", type=int)
    parser.add_argument("--hosts")
    parser.add_argument("--port", type=int)
    parser.add_argument("--patience", type=float, default=10.0)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--directory")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    if arguments.keep:
        return keep(arguments)
    if (arguments.hosts is None) == (arguments.local is None) or (arguments.local is not None and arguments.local < 1):
        parser.error("give --local N, with N at least 1, or --hosts A,B,...")
    processes = processes_of(arguments)
    if arguments.dry_run:
        print("\n".join(shlex.join(process.command) for process in processes))
        return 0
    return Launch(processes, arguments.patience).run()


if __name__ == "__main__":
    sys.exit(main())
