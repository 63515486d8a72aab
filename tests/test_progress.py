"""The progress bar on a terminal, in a log, after a rewind, and silent."""

from __future__ import annotations

import io
import os
import re
import select
import termios

import pytest
import tqdm.std

from dino_jax.progress import Progress, track


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


@pytest.fixture
def terminal():
    """A stream to a terminal of 100 columns, and what it has been sent."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (30, 100))

    def said() -> str:
        stream.flush()
        parts = []
        while select.select([ours], [], [], 0.1)[0]:
            parts.append(os.read(ours, 1 << 16))
        return b"".join(parts).decode().replace("\r\n", "\n")

    with os.fdopen(theirs, "w") as stream:
        yield stream, said
    os.close(ours)


def test_without_a_terminal_it_is_a_line_now_and_then_and_one_at_the_end(clock):
    stream = io.StringIO()
    with Progress(1000, 200, "train", stream=stream, interval=30) as progress:
        for step in range(201, 401):
            clock.now += 0.5  # 100 seconds
            progress.update(step, epoch=step / 100, loss=5.4321, device="cpu")
            if step == 300:
                progress.note("k-NN 41.2%")
    shown = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [re.search(r"\d+/1000|k-NN.*", line)[0] for line in shown] == [
        *("260/1000", "k-NN 41.2%", "320/1000", "380/1000", "400/1000")
    ]
    expected = r"^train \[=+>? *\] 320/1000  ETA 05:40,  2\.00 steps/s, epoch 3\.2, loss 5\.432, device cpu$"
    assert re.search(expected, shown[2])


def test_the_last_step_is_shown_once_and_at_once(clock):
    stream = io.StringIO()
    with Progress(10, description="train", stream=stream) as progress:
        progress.update(10)
        progress.note("done")
    first, second = stream.getvalue().splitlines()
    assert "[====================] 10/10" in first
    assert second == "done"


def test_on_a_terminal_it_is_one_line(clock, terminal):
    stream, said = terminal
    with Progress(10, description="train", stream=stream) as progress:
        for step in range(1, 11):
            clock.now += 1
            progress.update(step, text="long " * 50)
        progress.note("step 10: k-NN 41.2%")
    text = said()
    assert text.count("\n") == 2  # the note's and the last
    assert "ETA 00:09" in text
    assert "ETA 00:00" in text
    assert re.search(r"\rstep 10: k-NN 41\.2%\n\rtrain \[====================\] 10/10", text)
    assert all(len(part) <= 100 for part in re.split(r"[\r\n]", text))


def rewinding(clock, stream) -> None:
    with Progress(10_000, description="train", stream=stream, interval=0.1) as progress:
        for step in range(1, 31):
            clock.now += 1
            progress.update(step)
        progress.update(10)
        clock.now += 2
        progress.update(11)


def test_a_rewind_starts_the_rate_afresh(clock, terminal):
    stream, log = terminal[0], io.StringIO()
    rewinding(clock, log)
    rewinding(clock, stream)
    for text in (log.getvalue(), terminal[1]()):
        last = re.split(r"[\r\n]+", text.strip())[-1]
        assert re.search(r"11/10000  ETA 5:32:58,  0\.50 steps/s", last)


def test_it_can_be_silent():
    stream = io.StringIO()
    with Progress(10, stream=stream, active=False) as progress:
        progress.update(3)
        progress.note("unheard")
        progress.update(10)
    assert stream.getvalue() == ""


def test_bytes(clock):
    stream = io.StringIO()
    with Progress(80_000_000, 8_000_000, "file.pth", unit="B", stream=stream) as progress:
        clock.now += 60
        progress.update(20_000_000)
    assert "20.0M/80.0M  ETA 05:00, 200kB/s" in stream.getvalue()


def test_track_counts_what_was_dealt_with(capsys):
    assert list(track([1, 2, 3], "features")) == [1, 2, 3]
    assert "3/3" in capsys.readouterr().err
    assert list(track(iter([1, 2]), "features")) == [1, 2]  # of no known length
    assert "2/?" in capsys.readouterr().err
    assert list(track([1], "features", active=False)) == [1]
    assert capsys.readouterr().err == ""
