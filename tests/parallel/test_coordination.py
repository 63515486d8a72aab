"""The checks at the start among two processes, played by threads around one store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import jax
import pytest

from dino_jax.parallel import coordination as peers
from dino_jax.parallel.coordination import ProcessGroup, Verdict, code_facts


class Store:
    """What `ProcessGroup` asks of the client of JAX's coordination service."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self.values[key] = value

    def key_value_try_get(self, key: str) -> str | None:
        return self.values.get(key)

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        deadline = time.monotonic() + timeout_ms / 1000
        while key not in self.values:
            if time.monotonic() > deadline:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            time.sleep(0.01)
        return self.values[key]


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(peers, "LOOK", 0.01)
    logger = logging.getLogger("dino_jax")  # other processes than the first are quieter
    level, store = logger.level, Store()
    pair = [ProcessGroup(rank, 2, store, patience=2.0) for rank in (0, 1)]
    yield pair
    for peer in pair:
        peer.end()
    logger.setLevel(level)


def both(pair: list[ProcessGroup], check: Callable[[ProcessGroup], None]) -> list[str]:
    """What the check says to each; "": nothing."""
    said = ["", ""]

    def run(peer: ProcessGroup) -> None:
        try:
            check(peer)
        except Verdict as error:
            said[peer.rank] = str(error)

    threads = [threading.Thread(target=run, args=(peer,)) for peer in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_the_same_facts_and_code_pass(two):
    assert both(two, lambda peer: peer.check_same({"config.epochs": "3"})) == ["", ""]


def test_another_copy_of_the_code_is_named_by_its_file_on_every_process(two, monkeypatch):
    main = code_facts()
    copies = {0: main, 1: main | {"dino_jax/objectives/dino.py": "edited", "jax": "0.0.1"}}
    turn = threading.local()
    monkeypatch.setattr(peers, "code_facts", lambda: copies[turn.rank])

    def check(peer: ProcessGroup) -> None:
        turn.rank = peer.rank
        peer.check_same({})

    first, second = both(two, check)
    assert first == second
    assert (
        "process 1" in first
        and "dino_jax/objectives/dino.py: edited against " in first
        and "jax: 0.0.1 against " in first
    )


def test_a_device_that_fails_or_stays_silent_is_named_with_its_process(two, monkeypatch):
    monkeypatch.setattr(ProcessGroup, "_in_time", lambda peer, action: action(peer))
    monkeypatch.setattr(peers, "_each_answers", lambda peer: "" if peer.rank == 0 else "TPU_3 cannot add 1 and 1")
    monkeypatch.setattr(peers, "_all_answer", lambda peer: "")
    said = both(two, ProcessGroup.check_devices)
    assert said[0] == said[1] and said[0].startswith("process 1 (") and said[0].endswith("TPU_3 cannot add 1 and 1")


def test_silent_devices_are_a_complaint_within_the_patience(two):
    peer = two[0]
    peer.patience = 0.1
    assert "no answer of the devices within" in peer._in_time(lambda: time.sleep(1) or "")
    assert peer._in_time(lambda: 1 // 0) == "integer division or modulo by zero"


def test_a_process_that_does_not_come_is_named(two):
    two[0].patience = 0.2
    with pytest.raises(Verdict, match=r"process 1 \(.*\) did not say within 0 s what it is going to run"):
        two[0].check_same({})


def test_a_workdir_that_is_not_shared_is_named(two, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "_appears", lambda path: any(path.exists() or time.sleep(0.05) for _ in range(20)))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    assert both(two, lambda peer: peer.check_shared(tmp_path)) == ["", ""]
    assert sorted(tmp_path.iterdir()) == folders  # the mark is taken away
    first, second = both(two, lambda peer: peer.check_shared(folders[peer.rank]))
    assert first == second and "process 1" in first and "the workdir must be shared, or gs://" in first
