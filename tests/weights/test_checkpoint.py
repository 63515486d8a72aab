"""Checkpoints: what comes back, what is kept, and what a kill, a full disk or a bad sector leave behind."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dino_jax.errors import UserError
from dino_jax.weights.checkpoint import Checkpointer, abstract, resolve, restore, restore_config, steps
from tests.gcs_stand_in import serve

CONFIG = json.dumps({"seed": 3, "model": {"name": "vit_tiny"}})


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_items(seed: int = 0) -> dict:
    """Every kind of leaf that a training state has; NaN, infinity, -0.0 and subnormals among the values."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((16, 24)).astype(np.float32)
    kernel[0, :4] = np.nan, np.inf, -0.0, 1e-42
    params = {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(kernel[1], jnp.bfloat16)}}
    rest = {
        "opt_state": (None, [Moments(jnp.int32(seed), jax.tree.map(jnp.copy, params))], ()),
        "center": jnp.arange(8.0),
        "salt": jnp.uint32(4_000_000_000),
        "flag": jnp.array([True, False]),
    }
    student = {"params": params, "batch_stats": {}}
    return {"student": student, "teacher": jax.tree.map(lambda x: x + 1, student), "rest": rest}


def like(items, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), items)


def same(a, b) -> bool:
    """Equal to the last bit, in structure too."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    equal = all(np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in pairs)
    return equal and jax.tree.structure(a) == jax.tree.structure(b)


def here() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def saved(tmp_path):
    """A folder with steps 10 and 20."""
    with Checkpointer(tmp_path / "checkpoints", keep=5) as checkpointer:
        checkpointer.save(10, make_items(10), CONFIG)
        checkpointer.save(20, make_items(20), CONFIG)
    return tmp_path / "checkpoints"


def test_round_trip_is_exact(saved):
    for step in (10, 20):
        items = make_items(step)
        assert same(restore(saved, step, like(items, here())), items)
    assert json.loads(restore_config(saved, 10)) == json.loads(CONFIG)


def test_any_layout_to_any_other(tmp_path):
    devices = np.array(jax.devices())
    layouts = [
        NamedSharding(Mesh(devices, "d"), PartitionSpec("d")),
        NamedSharding(Mesh(devices[:4].reshape(2, 2), ("a", "b")), PartitionSpec("b", "a")),
        here(),
    ]
    x = jax.random.normal(jax.random.key(0), (16, 24))
    checkpointer = Checkpointer(tmp_path, keep=9)
    for step, layout in enumerate(layouts):
        checkpointer.save(step, {"rest": {"x": jax.device_put(x, layout)}}, CONFIG)
    for step in range(len(layouts)):
        for layout in layouts:
            restored = checkpointer.restore(
                step, {"rest": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)}}
            )
            assert restored["rest"]["x"].sharding == layout
            assert same(restored["rest"]["x"], x)
    checkpointer.close()


def test_an_evaluation_reads_the_teacher_alone_and_needs_no_config(saved):
    for name in ("student", "rest"):
        for path in (saved / "20" / name).rglob("*"):
            if path.is_file():
                path.write_bytes(b"not read")
    directory, step = resolve(saved / "20")
    shapes = abstract(directory, step, "teacher")
    assert shapes["params"]["head"]["bias"].dtype == jnp.bfloat16
    teacher = restore(directory, step, {"teacher": shapes})["teacher"]
    assert isinstance(teacher["params"]["head"]["kernel"], np.ndarray)
    assert same(teacher, jax.tree.map(np.asarray, make_items(20)["teacher"]))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_keeps_the_latest_and_the_multiples(tmp_path, asynchronous):
    with Checkpointer(tmp_path, keep=2, keep_every_steps=40, asynchronous=asynchronous) as checkpointer:
        for step in range(10, 111, 10):
            assert checkpointer.save(step, {"rest": {"x": jnp.arange(4)}}, CONFIG)
        assert checkpointer.latest_step() == 110
        assert not checkpointer.save(110, {"rest": {"x": jnp.arange(5)}}, CONFIG)  # exists already
    assert steps(tmp_path) == [40, 80, 100, 110]


def test_resolve(saved, tmp_path):
    assert resolve(tmp_path) == (saved, 20)
    assert resolve(saved) == (saved, 20)
    assert resolve(saved / "10") == (saved, 10)
    (tmp_path / "empty").mkdir()
    for path, what in [("nowhere", "no such checkpoint"), ("empty", "no complete checkpoint")]:
        with pytest.raises(UserError, match=f"{path}: .*{what}"):
            resolve(tmp_path / path)
    for step in (10, 20):
        (saved / str(step) / "teacher" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="only damaged checkpoints"):
        resolve(tmp_path)


def test_what_does_not_fit_is_named(saved):
    def ask(change) -> str:
        wanted = like(make_items(20)["student"])
        change(wanted["params"]["head"])
        with pytest.raises(UserError) as error:
            restore(saved, 20, {"student": wanted})
        assert str(saved / "20" / "student") in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "lacks params/head/g" in ask(lambda head: head.update(g=head["bias"]))
    assert "also has params/head/bias" in ask(lambda head: head.pop("bias"))
    float32 = jax.ShapeDtypeStruct((24,), jnp.float32)
    assert "params/head/bias is bfloat16[24], not float32[24]" in ask(lambda head: head.update(bias=float32))
    turned = jax.ShapeDtypeStruct((24, 16), jnp.float32)
    assert "kernel is float32[16, 24], not float32[24, 16]" in ask(lambda head: head.update(kernel=turned))
    with pytest.raises(UserError, match=r"no 'optimizer' in this checkpoint; it has .*student, teacher"):
        abstract(saved, 20, "optimizer")
    with pytest.raises(UserError, match="no such checkpoint; complete steps here: 10, 20"):
        restore_config(saved, 15)


def test_double_precision_says_so(tmp_path, x64):
    x = jnp.linspace(0, 1, 7, dtype=jnp.float64)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"rest": {"x": x}}, CONFIG)
    wanted = {"rest": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here())}}
    assert same(restore(tmp_path, 1, wanted)["rest"]["x"], x)
    with jax.enable_x64(False):
        assert Checkpointer(tmp_path).latest_step() == 1  # not mistaken for damage
        with pytest.raises(UserError, match="double precision; set JAX_ENABLE_X64=1"):
            restore(tmp_path, 1, wanted)


def largest(folder):
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut_short(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


DAMAGE = {
    "data cut short": cut_short,
    "a bit flipped": flip_a_bit,
    "data gone": lambda folder: largest(folder).unlink(),
    "manifest gone": lambda folder: (folder / "rest" / "manifest.ocdbt").unlink(),
    "manifest garbled": lambda folder: (folder / "teacher" / "manifest.ocdbt").write_bytes(b"garbage"),
    "metadata empty": lambda folder: (folder / "student" / "_METADATA").write_text(""),
    "config gone": lambda folder: (folder / "config" / "metadata").unlink(),
    "checksums gone": lambda folder: (folder / "checksums" / "metadata").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_step_is_reported_passed_over_and_kept(saved, caplog, damage):
    damage(saved / "20")
    before = {path: path.read_bytes() for path in (saved / "20").rglob("*") if path.is_file()}
    with Checkpointer(saved, keep=1) as checkpointer:
        assert checkpointer.latest_step() == 10
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert str(saved / "20") in message and "using step 10 instead" in message and "\n" not in message
        assert same(checkpointer.restore(10, like(make_items(), here())), make_items(10))
        assert checkpointer.save(20, make_items(21), CONFIG)
        assert checkpointer.latest_step() == 20
        assert same(checkpointer.restore(20, like(make_items(), here())), make_items(21))
    aside = {saved / "20" / path.relative_to(saved / "20.damaged"): path for path in (saved / "20.damaged").rglob("*")}
    assert before == {path: moved.read_bytes() for path, moved in aside.items() if moved.is_file()}


def test_damage_below_does_not_matter_and_is_not_counted(saved, caplog):
    cut_short(saved / "20")
    with Checkpointer(saved, keep=1) as checkpointer:
        assert checkpointer.latest_step() == 10
        checkpointer.save(15, make_items(15), CONFIG)  # keep=1: 10 goes, damaged 20 stays
        checkpointer.wait()
        assert steps(saved) == [15, 20]
        assert checkpointer.latest_step() == 15


def test_restoring_damaged_data_is_an_error(saved):
    flip_a_bit(saved / "20")
    with pytest.raises(UserError, match=rf"{saved}/20/.*; steps here: 10, 20$"):
        restore(saved, 20, like(make_items(), here()))


def test_the_state_may_be_donated_once_save_returns(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    tree = {f"x{i}": jax.random.normal(jax.random.key(i), (300_000,)) for i in range(8)}
    with Checkpointer(tmp_path) as checkpointer:
        for step in range(3):
            expected = jax.tree.map(np.array, tree)
            checkpointer.save(step, {"rest": tree}, CONFIG)
            for _ in range(5):
                tree = advance(tree)
            jax.block_until_ready(tree)
            checkpointer.wait()
            assert same(restore(tmp_path, step, {"rest": abstract(tmp_path, step, "rest")})["rest"], expected)


def test_nothing_there(tmp_path, caplog):
    assert Checkpointer(tmp_path / "none").latest_step() is None
    assert steps(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    assert not caplog.records


def random_items(count: int, seed: int = 0) -> dict:
    """Numbers that do not compress."""
    return {"rest": {"x": jax.random.normal(jax.random.key(seed), (count,))}}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, asynchronous, capfd, caplog):
    checkpointer = Checkpointer(tmp_path, keep=1, asynchronous=asynchronous)
    checkpointer.save(1, random_items(100), CONFIG)
    checkpointer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # maximum file size: writes fail midway
    try:
        with pytest.raises(UserError, match=rf"^{tmp_path}: cannot write a checkpoint: File too large; make room"):
            _ = checkpointer.save(2, random_items(1_000_000), CONFIG), checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()  # asyncio reports a task's unretrieved error when it is collected
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    assert checkpointer.latest_step() == 1
    assert same(checkpointer.restore(1, like(random_items(100), here())), random_items(100))
    assert checkpointer.save(2, random_items(200), CONFIG)  # with room again, the same step works
    assert checkpointer.latest_step() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    checkpointer.close()


def test_no_hook_is_left_behind_by_importing_and_saving(tmp_path):
    code = """
        import importlib, logging, pkgutil, sys

        def hooks():
            known = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
            return {logger.name: list(logger.filters) for logger in known if logger.filters}

        before = sys.unraisablehook
        import absl.logging, orbax.checkpoint, jax
        others = hooks()
        import dino_jax
        for module in pkgutil.walk_packages(dino_jax.__path__, "dino_jax."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        assert sys.unraisablehook is before and hooks() == others, hooks()
        with dino_jax.weights.checkpoint.Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, {"rest": {"x": jax.numpy.ones(3)}}, "{}")
            assert sys.unraisablehook is not before
            assert checkpointer.latest_step() == 1
        assert sys.unraisablehook is before and hooks() == others, hooks()
        print("passed")
    """
    child = run_child(code, tmp_path)
    assert child.stdout == "passed\n", child.stderr[-3000:]


def test_late_answers_after_an_error_are_no_tracebacks(tmp_path):
    code = """
        import gc, pathlib, sys, time
        import jax
        from dino_jax.errors import UserError
        from dino_jax.weights import checkpoint

        items = {"rest": {f"x{i}": jax.random.normal(jax.random.key(i), (100_000,)) for i in range(30)}}
        with checkpoint.Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, items, "{}")
        for path in pathlib.Path(sys.argv[1], "1", "rest").rglob("d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        for _ in range(3):
            try:
                checkpoint.restore(sys.argv[1], 1, {"rest": checkpoint.abstract(sys.argv[1], 1, "rest")})
            except UserError as error:
                print(error)
            gc.collect()
            time.sleep(0.5)
    """
    child = run_child(code, tmp_path)
    assert child.stdout.count("cannot be read") == 3
    assert child.stderr == ""


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=rf"{tmp_path}/file/checkpoints: cannot write a checkpoint: .*; make it writable"
    ):
        Checkpointer(tmp_path / "file" / "checkpoints").save(1, random_items(3), CONFIG)


def run_child(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=240, check=False
    )


KILLED = """
    import os, signal, sys
    import jax
    from dino_jax.weights.checkpoint import Checkpointer

    directory, moment = sys.argv[1], int(sys.argv[2])
    calls = 0

    def hook(event, arguments):
        global calls
        if event in ("open", "os.mkdir", "os.rename", "os.scandir") and directory in str(arguments[0]):
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpointer = Checkpointer(directory, keep=3)
    items = {name: {"x": jax.random.normal(jax.random.key(0), (50_000,))} for name in ("rest", "teacher")}
    checkpointer.save(1, items, "{}")
    checkpointer.wait()
    sys.addaudithook(hook)
    checkpointer.save(2, items, "{}")
    checkpointer.close()
"""


@pytest.mark.parametrize(  # the call to the file system at which the child dies; a save of two items makes some 40
    "moment", [18, *(pytest.param(n, marks=pytest.mark.extra) for n in (1, 2, 5, 9, 13, 16, 22, 25, 29, 33, 35, 37))]
)
def test_killed_in_the_middle_of_a_save(tmp_path, moment, caplog):
    child = run_child(KILLED, tmp_path, moment)
    assert child.returncode == -signal.SIGKILL, child.stderr
    items = {name: random_items(50_000)["rest"] for name in ("rest", "teacher")}
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        assert checkpointer.latest_step() == 1
        warnings = [record.getMessage() for record in caplog.records]
        expected = f"{tmp_path}/2: half-written; using step 1 instead"
        assert warnings == ([expected] if moment > 1 else [])  # at 1 there is no folder yet
        assert same(checkpointer.restore(1, like(items, here())), items)
        assert checkpointer.save(2, items, CONFIG)
        assert checkpointer.latest_step() == 2
        assert same(checkpointer.restore(2, like(items, here())), items)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.extra
@pytest.mark.parametrize("seconds", [0.0, 0.03, 0.1, 0.3])
def test_killed_at_any_time(tmp_path, seconds):
    code = KILLED.replace("sys.addaudithook(hook)", 'print("saving", flush=True)').replace("50_000", "5_000_000")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout.readline() == b"saving\n"
        time.sleep(seconds)
        child.kill()
    items = {"teacher": random_items(5_000_000)["rest"]}
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        latest = checkpointer.latest_step()
        assert latest in (1, 2)
        assert same(checkpointer.restore(latest, like(items, here())), items)
        assert checkpointer.save(2, items, CONFIG) == (latest == 1)
        assert checkpointer.latest_step() == 2


IN_A_BUCKET = """
    import sys
    import jax, jax.numpy as jnp
    from etils import epath
    from dino_jax.weights.checkpoint import Checkpointer, abstract, resolve, restore, restore_config, steps

    folder = epath.Path("gs://bucket/run/checkpoints")
    items = lambda n: {"teacher": {"x": jnp.arange(8.0) * n, "y": jnp.bfloat16(n)}, "rest": {"n": jnp.int32(n)}}
    checkpointer = Checkpointer(folder, keep=2)
    assert checkpointer.latest_step() is None
    for step in (1, 2, 3):
        assert checkpointer.save(step, items(step), '{"seed": 1}')
    checkpointer.close()
    assert steps(folder) == [2, 3] and resolve("gs://bucket/run") == (folder, 3), list(folder.iterdir())
    assert restore_config(folder, 3) == '{"seed": 1}'
    wanted = {"teacher": abstract(folder, 3, "teacher")}
    assert restore(folder, 3, wanted)["teacher"]["x"].tolist() == (jnp.arange(8.0) * 3).tolist()
    (folder / "3" / "rest" / "manifest.ocdbt").write_text("garbage")   # damaged
    (folder / "4" / "rest").mkdir(parents=True)
    (folder / "4" / "rest" / "x").write_text("half-written")           # no commit_success.txt
    assert checkpointer.latest_step() == 2
    assert checkpointer.save(3, items(5), "{}") and checkpointer.save(4, items(6), "{}")
    assert checkpointer.latest_step() == 4 and (folder / "3.damaged").exists()
    checkpointer.close()
    assert restore(folder, 4, wanted)["teacher"]["x"].tolist() == (jnp.arange(8.0) * 6).tolist()
    print("passed")
"""


@pytest.mark.extra
def test_in_a_bucket():
    with serve() as (store, environment):
        child = run_child(IN_A_BUCKET, **environment)
    assert child.stdout == "passed\n", child.stderr[-3000:]
    assert "using step 2 instead" in child.stderr
    assert "bucket/run/checkpoints/4/teacher/_METADATA" in store.objects


TWO_PROCESSES = """
    import faulthandler, sys
    faulthandler.dump_traceback_later(60, exit=True)
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from dino_jax.weights.checkpoint import Checkpointer, steps

    directory, port, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    assert jax.device_count() == 4
    mesh = Mesh(np.array(jax.devices()), "d")
    rows, everywhere = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    numbers = np.random.default_rng(0).standard_normal((8, 5), np.float32)
    make = lambda layout: jax.make_array_from_callback((8, 5), layout, lambda index: numbers[index])
    items = {"teacher": {"x": make(rows)}, "rest": {"x": make(everywhere)}}
    checkpointer = Checkpointer(directory, keep=3)
    checkpointer.save(1, items, "{}")
    checkpointer.save(2, items, "{}")
    checkpointer.wait()
    jax.experimental.multihost_utils.sync_global_devices("saved")
    if rank == 0:
        path = checkpointer.directory / "2" / "teacher" / "_METADATA"
        path.write_text("garbage")
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    assert checkpointer.latest_step() == 1
    wanted = {"teacher": {"x": jax.ShapeDtypeStruct((8, 5), np.float32, sharding=everywhere)}}
    x = checkpointer.restore(1, wanted)["teacher"]["x"]
    assert x.sharding == everywhere and np.array_equal(x.addressable_data(0), numbers)
    assert checkpointer.save(2, items, "{}")
    assert checkpointer.latest_step() == 2
    checkpointer.close()
    print("passed")
"""


@pytest.mark.extra
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        runs = [pool.submit(run_child, TWO_PROCESSES, tmp_path, port, rank, XLA_FLAGS=flags) for rank in (0, 1)]
    for run in runs:
        assert run.result().stdout.endswith("passed\n"), run.result().stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "2.damaged"]
