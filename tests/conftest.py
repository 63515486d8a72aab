"""Shared setup: eight fake CPU devices, the reference tensors, double precision on request."""

from __future__ import annotations

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # set it to cuda for the few GPU tests
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # halves the compile time, most of a run
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

from tests import reference_files, type_checks

type_checks.install()


@pytest.fixture
def reference():
    """`reference(name)`: the path of a file in the repository's copy; fails if it is missing."""
    return reference_files.own


@pytest.fixture
def load_reference(reference):
    """`load_reference(name)`: the arrays of a reference `.npz` as a dict."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(reference(name)) as data:
            return {key: data[key] for key in data.files}

    return load


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
