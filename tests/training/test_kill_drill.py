"""A short kill drill; `python -m tests.training.kill_drill --kills=50` is the long one."""

from __future__ import annotations

import os

import pytest

from tests.training.kill_drill import drill


@pytest.mark.extra
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="looks at /proc and /dev/shm")
def test_kills_lose_nothing_and_leave_nothing(tmp_path):
    assert drill(tmp_path, kills=3) == []
