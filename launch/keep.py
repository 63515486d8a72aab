"""Runs a command, passes SIGTERM and SIGINT on to it, and tells a finished run from a stopped one by the exit status.

    python launch/keep.py [--status=FILE] COMMAND...

A run that is told to stop saves and ends with 0, which for a restarting service means finished. So a run that was told
to stop ends with 143 here, the status of a process that SIGTERM ended. FILE gets the exit status.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
from types import FrameType

TOLD_TO_STOP = 128 + signal.SIGTERM


def main(arguments: list[str]) -> int:
    file = None
    if arguments and arguments[0].startswith("--status="):
        file = pathlib.Path(arguments.pop(0).removeprefix("--status="))
    if not arguments:
        sys.exit(__doc__)
    status = keep(arguments)
    if file is not None:
        fresh = file.with_name(f"{file.name}.new")  # as storage.write_atomically, without the package
        fresh.write_text(f"{status}\n")
        fresh.replace(file)
    return status


def keep(command: list[str]) -> int:
    """The command's exit status; 128 + N where signal N ended it, 143 where it ended well after one."""
    told: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(f"keep.py: {command[0]}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        return 127
    if told:  # before the process was there
        process.send_signal(told[0])
    status = process.wait()
    return TOLD_TO_STOP if told and status == 0 else status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
