"""Batch memory is reused only when nothing references it."""

from __future__ import annotations

import gc
import pickle

import jax
import numpy as np

from dino_jax.data.memory import BatchMemory

LAYOUT = {"canvas": (64, 64, 3), "other": (5,)}


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_the_chunks_of_a_batch_share_its_memory():
    memory = BatchMemory(LAYOUT, rows=10, parts=3, together=True)
    chunks = [memory.chunk(batch, part) for part in (2, 0, 1) for batch in (0, 1)]
    for number, chunk in enumerate(chunks):
        for array in chunk.values():
            array[:] = number
    for batch in (0, 1):
        whole = memory.whole(batch, [])
        assert {name: array.shape for name, array in whole.items()} == {"canvas": (10, 64, 64, 3), "other": (10, 5)}
        for array in whole.values():
            levels = array.reshape(10, -1)
            assert (levels == levels[:, :1]).all()
            np.testing.assert_array_equal(levels[:, 0], np.repeat([2, 4, 0], [3, 3, 4]) + batch)


def test_chunks_from_elsewhere_are_copied_together():
    memory = BatchMemory(LAYOUT, rows=7, parts=2, together=False)
    assert pickle.loads(pickle.dumps(memory)).chunk(0, 1)["canvas"].shape == (4, 64, 64, 3)
    chunks = [memory.chunk(0, part) for part in (0, 1)]
    for level, chunk in enumerate(chunks):
        chunk["canvas"][:], chunk["other"][:] = level, level + 5
    whole = memory.whole(0, chunks)
    np.testing.assert_array_equal(whole["canvas"][:, 9, 9, 1], [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(whole["other"][:, 2], [5, 5, 5, 6, 6, 6, 6])


def test_memory_is_used_again_only_when_no_view_is_left():
    memory = BatchMemory(LAYOUT, rows=4, parts=1, together=True)
    first = memory.chunk(0, 0)["canvas"]
    place, view = address(first), first[1:3, 5]
    del first
    memory.whole(0, [])
    gc.collect()
    assert address(memory.chunk(1, 0)["canvas"]) != place
    del view
    gc.collect()
    assert address(memory.chunk(2, 0)["canvas"]) == place


def test_arrays_on_devices_keep_what_they_hold():
    """A CPU device may alias the memory instead of copying it."""
    memory = BatchMemory(LAYOUT, rows=4, parts=1, together=True)
    sent = []
    for batch in range(6):
        memory.chunk(batch, 0)["canvas"][:] = batch
        sent.append(jax.device_put(memory.whole(batch, [])["canvas"]))
    gc.collect()
    assert [int(array.min()) for array in sent] == [int(array.max()) for array in sent] == list(range(6))
