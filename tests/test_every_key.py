"""Every configuration key, changed alone, changes the program, the draws, the figures or the files that it is for.

A key without an entry in `SWEEP` fails. Nothing is compiled: programs are compared as jaxprs, and runs take steps that
compute nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from dino_jax.config import KEYS, ConfigDict, flat_keys
from dino_jax.data import pipeline
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.models.network import Outputs
from dino_jax.parallel import sharding
from dino_jax.render.renderer import make_renderer
from dino_jax.training import feed, loop, online, prefetch
from dino_jax.training import step as train_step
from dino_jax.training.data_record import claim_data
from dino_jax.training.metrics import read_metrics
from dino_jax.weights.checkpoint import steps
from tests.tiny import random_crops, tiny_config

SCENES = "scenes:train?size=12&image_size=40"


def base() -> ConfigDict:
    """Two steps an epoch, with every operation on."""
    config = tiny_config(depth=1, drop_path=0.2)
    config.epochs, config.batch_size, config.crops.local_count = 3, 4, 1
    config.data.train = "scenes:train?size=8&image_size=40"
    config.optim.warmup_epochs, config.teacher.warmup_temp_epochs, config.teacher.warmup_temp = 1, 2, 0.03
    config.objective.koleo.weight = 0.1
    config.crops.update({"blur_prob": (1.0, 1.0, 1.0), "solarize_prob": (1.0, 1.0, 1.0), "jitter_prob": 1.0})
    config.crops.gray_prob, config.run.mesh.data = 0.0, 1
    return config


def digest(*trees: Any) -> str:
    parts = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        array = np.asarray(leaf)
        parts.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
    return parts.hexdigest()


def program(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """The train step, with its shapes and constants."""
    recipe = train_step.make_recipe(config, 2)
    state = jax.eval_shape(lambda: train_step.init_state(recipe, jax.random.key(0)))
    inputs = train_step.abstract_inputs(recipe)
    closed = jax.make_jaxpr(lambda state, inputs: train_step.train_step(recipe, state, inputs))(state, inputs)
    return str(closed.jaxpr), digest(closed.consts)


def forward(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """The network on all crops, with its shapes."""
    network = train_step.make_recipe(config, 2).network
    crops = [jax.ShapeDtypeStruct(x.shape, config.model.dtype) for x in random_crops(config)]
    variables = jax.eval_shape(network.init, jax.random.key(0), crops)
    run = lambda *inputs: network.apply(*inputs, train=True, mutable=["batch_stats"])  # noqa: E731
    return str(jax.make_jaxpr(run)(variables, crops))


def update(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """What follows the network in a step, and the schedules at each step."""
    recipe, step = train_step.make_recipe(config, 2), jnp.int32(0)
    params = {"backbone": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "head": {"last_layer": {"v": jnp.ones((4, 3))}}}
    outputs = Outputs(jnp.ones((3, 3, 2)), jnp.ones((3, 3, config.head.out_dim)))

    def objectives(outputs):
        for term in recipe.objectives:
            aims, statistics = term.targets(term.init(), jax.tree.map(lambda x: x[:, :2], outputs), step)
            yield term.weight, term.loss(outputs, aims, step), term.update(term.init(), statistics)

    programs = (
        lambda: recipe.optimizer.update(params, recipe.optimizer.init(params), params, step=step),
        lambda: recipe.ema.update(params, recipe.ema.init(params), step=step),
        lambda: list(objectives(outputs)),
    )
    values = [np.asarray(schedule(jnp.arange(8))).tolist() for schedule in recipe.schedules]
    return [str(jax.make_jaxpr(run)()) for run in programs], values


def init(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """The program that draws the first weights."""
    recipe = train_step.make_recipe(config, 2)
    return str(jax.make_jaxpr(lambda: train_step.init_state(recipe, jax.random.key(0)))())


def draws(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """A batch of the second epoch, as the host sends it."""
    source = open_source(config.data.train)
    batches = pipeline.make_dataset(source, config, position=3 * config.batch_size)
    with contextlib.closing(batches):
        return digest({key: value for key, value in next(batches).items() if key != "bad"})


def pixels(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """Normalization on the device."""
    shapes = [(1, 2, *config.crops.global_size, 3), (1, 1, *config.crops.local_size, 3)]
    batch = dict(zip(("globals", "locals"), (np.full(shape, 77, np.uint8) for shape in shapes), strict=True))
    here = sharding.batch_sharding(sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1]))
    return digest(make_renderer(config, here)(jax.device_put(batch, here)))


def bad_images(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """A folder with one damaged image of eight: goes on, or says which key forbids it."""
    for i in range(8):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"damaged")
    try:
        batches = pipeline.make_dataset(open_source(str(tmp_path)), config)
        with contextlib.closing(batches):
            return len(list(itertools.islice(batches, 2)))
    except UserError as error:
        return "more than data.max_bad_share" in str(error)


def grown(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """A run whose data set has changed since it began."""
    for size, step in ((8, 0), (9, 1)):
        source = open_source(f"scenes:train?size={size}&image_size=40")
        try:
            claim_data(epath.Path(tmp_path), config, {"data.train": source}, step)
        except UserError:
            return "refused"
    return "accepted"


def reading(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """How the host reads, and how far ahead."""
    seen = []
    patch.setattr(pipeline, "Batches", lambda chunks, *how: iter([seen.append(how)]))
    patch.setattr(prefetch, "in_thread", lambda produce, ahead, limit, end: seen.append((ahead, limit)))
    pipeline.make_dataset(open_source(config.data.train), config)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
    prefetch.device_batches(config, open_source(config.data.train), mesh, position=0, salt=0)
    return seen


def placement(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """Where each array of the state and of a batch lies on eight devices."""
    mesh = sharding.make_mesh(config.run.mesh)
    places = train_step.shardings(train_step.make_recipe(config, 2), mesh)
    return jax.tree.leaves(places), sharding.batch_sharding(mesh)


def attention(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """Fused attention does not exist on a CPU."""
    try:
        return str(train_step.make_recipe(config, 2).network)
    except UserError as error:
        return str(error)


def evaluations(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """When a run evaluates, what it asks for, and its figures."""
    rng, seen = np.random.default_rng(0), []

    def features(model, source, spec, view):
        seen.append((spec, len(source), sorted(view.items())))
        return rng.normal(size=(40, 4)), rng.integers(5, size=40)

    patch.setattr(online, "source_features", features)
    patch.setattr(online, "frozen_teacher", lambda *_: None)
    patch.setattr(online.voc, "evaluate", lambda model, data, view: seen.append((data, view.size)) or {"60": 1.0})
    found = online.Evaluations(config, train_step.make_recipe(config, 2), 2)
    due = [step for step in range(1, 13) if found.due(step)]
    return due, [found.run(step, None) for step in due], seen


def run(config: ConfigDict, tmp_path: Any, patch: Any) -> Any:
    """A run whose steps compute nothing: its files, what it prints, and whom it calls."""
    seen: list[Any] = []
    losing = config.seed == 13  # stands for a run that diverges
    names = ("loss", "kl", "teacher_entropy", "marginal_entropy", "grad_norm")
    network = {"params": {"w": jnp.ones(3)}, "batch_stats": {}}
    numbers = dict.fromkeys(("step", "salt", "bad_steps"), jnp.int32(0))
    rest = {"objectives": {}, "opt_state": {}, **numbers}
    start = train_step.from_items({"student": network, "teacher": network, "rest": rest})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), start)

    def step(state, crops):
        state = state.replace(step=state.step + 1, bad_steps=(state.bad_steps + 1) * losing)
        return state, {**dict.fromkeys(names, jnp.float32(1)), "bad_steps": state.bad_steps}

    def recorded(name, result):
        return lambda *args, **options: seen.append((name, *map(str, args[1:]), sorted(options.items()))) or result

    class Trace:
        running, folder = False, "profile"

        def __init__(self, *_): ...
        def start(self):
            self.running = seen.append("trace") is None

        def stop(self, save=True):
            seen.append(("traced", save))
            self.running = False

    checkpointer = loop.Checkpointer
    patch.setattr(loop, "jit_init_state", lambda *_: start)
    patch.setattr(loop, "abstract_state", lambda *_: shapes)
    patch.setattr(loop, "jit_train_step", lambda *_: step)
    patch.setattr(feed, "device_batches", lambda *_, **__: (prefetch.Ready([], []) for _ in itertools.count()))
    patch.setattr(loop, "start_from", lambda state, config: seen.append(config.init_from) or (state, []))
    patch.setattr(feed.distributed, "bounded", recorded("bounded", contextlib.nullcontext()))
    patch.setattr(loop, "Trace", Trace)
    patch.setattr(loop, "Checkpointer", lambda *a, **o: seen.append(o["asynchronous"]) or checkpointer(*a, **o))
    patch.setattr(loop, "Progress", lambda *_, active, **__: seen.append(active) or _Silent())
    patch.setitem(sys.modules, "wandb", None)
    try:
        final = loop.train(config, tmp_path / "run")
        end: Any = int(final.step)
    except UserError as error:
        end = str(error)
    wanted = "non-finite" if losing else "wandb is not installed" if config.run.wandb else config.run.stop_after or 6
    assert end == wanted if isinstance(wanted, int) else wanted in end
    lines = [record["step"] for record in read_metrics(tmp_path / "run")]
    boards = bool(list((tmp_path / "run").rglob("*tfevents*")))
    return end, seen, lines, steps(tmp_path / "run" / "checkpoints"), boards


class _Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Entry(NamedTuple):
    observe: Any
    value: Any
    context: dict[str, Any] = {}  # keys without which this one has no effect


DEVICE = {"data.render": "device", "data.canvas": 64}
RESNET = {"model.name": "resnet18", "model.embed_dim": None, "model.depth": None, "model.heads": None}
KNN = {"eval.knn_every": 2, "eval.knn_train": SCENES, "eval.knn_test": SCENES, "eval.knn_k": 9}
VOC = {"eval.voc_every": 2, "eval.voc_data": SCENES, "eval.voc_size": 32}
LOSING = {"seed": 13}
IBOT = {"model.masking": True, "objective.ibot.weight": 1.0, "objective.ibot.group": 2}
OWN_HEAD = IBOT | {"objective.ibot.shared_head": False}

SWEEP = {
    "seed": Entry(draws, 1),
    "epochs": Entry(update, 4),
    "batch_size": Entry(update, 6),
    "init_from": Entry(run, "weights.pth"),
    "model.name": Entry(forward, "xcit_small_12"),
    "model.patch_size": Entry(forward, 4),
    "model.in_chans": Entry(forward, 1, {"data.mean": (0.5,), "data.std": (0.5,)}),
    "model.embed_dim": Entry(forward, 16),
    "model.depth": Entry(forward, 2),
    "model.heads": Entry(forward, 4),
    "model.init_std": Entry(init, 0.05),
    "model.registers": Entry(forward, 2),
    **{f"model.{key}": Entry(forward, value) for key, value in {
        "ffn": "swiglu", "ffn_dim": 48, "layer_scale": 0.1, "positions": "rope", "qkv_bias": "qv", "norm_eps": 1e-5,
    }.items()},
    "model.masking": Entry(init, True),
    "model.small_stem": Entry(forward, True, RESNET),
    "model.drop_path": Entry(program, 0.3, {"model.depth": 2}),
    "model.dtype": Entry(forward, "bfloat16"),
    "model.precision": Entry(forward, "highest"),
    **{f"head.{key}": Entry(forward, value) for key, value in {
        "out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "layers": 2, "use_bn": True, "norm_last_layer": False,
    }.items()},
    **{f"crops.{key}": Entry(draws, value) for key, value in {
        "global_size": (24, 24), "local_size": (8, 8), "local_count": 2, "global_scale": (0.9, 1.0),
        "local_scale": (0.3, 0.4), "ratio": (1.0, 1.0), "flip_prob": 0.0, "jitter_prob": 0.0, "brightness": 0.0,
        "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "gray_prob": 1.0, "blur_prob": (1.0, 0.0, 1.0),
        "blur_radius": (1.9, 2.0), "solarize_prob": (0.0, 1.0, 1.0), "solarize_threshold": 40,
    }.items()},
    "data.train": Entry(draws, "scenes:val?size=8&image_size=40"),
    "data.mean": Entry(pixels, (0.1, 0.1, 0.1)),
    "data.std": Entry(pixels, (0.1, 0.1, 0.1)),
    "data.render": Entry(draws, "device", {"data.canvas": 64}),
    "data.canvas": Entry(draws, 32, DEVICE),
    "data.max_bad_share": Entry(bad_images, 0.5),
    "optim.name": Entry(update, "lars"),
    **{f"optim.{key}": Entry(update, value) for key, value in {
        "lr": 0.1, "min_lr": 1e-4, "warmup_epochs": 2, "weight_decay": 0.1, "weight_decay_end": 0.1, "clip_grad": 1.0,
        "freeze_last_layer": 2, "b1": 0.8, "b2": 0.9, "eps": 1e-6, "lr_scaling": "sqrt", "layer_decay": 0.5,
        "patch_embed_lr": 0.5, "clip_by": "module", "freeze_by": "lr",
    }.items()},
    "optim.momentum": Entry(update, 0.8, {"optim.name": "sgd"}),
    **{f"teacher.{key}": Entry(update, value) for key, value in {
        "momentum": 0.9, "momentum_end": 0.999, "temp": 0.07, "warmup_temp": 0.02, "warmup_temp_epochs": 3,
        "warmup_temp_by": "step",
    }.items()},
    "objective.dino.weight": Entry(update, 0.5),
    "objective.dino.student_temp": Entry(update, 0.2),
    "objective.dino.centering": Entry(update, "sinkhorn"),
    "objective.dino.center_momentum": Entry(update, 0.8),
    "objective.koleo.weight": Entry(update, 0.2),
    **{f"objective.ibot.{key}": Entry(program, value, IBOT) for key, value in {
        "weight": 0.5, "student_temp": 0.2, "temp": 0.07, "warmup_temp": 0.02, "centering": "sinkhorn",
        "center_momentum": 0.8, "center_over": "all", "shared_head": False,
    }.items()},
    **{f"objective.ibot.{key}": Entry(program, value, OWN_HEAD) for key, value in {
        "out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "layers": 2,
    }.items()},
    **{f"objective.ibot.{key}": Entry(draws, value, IBOT) for key, value in {
        "mask_prob": 0.25, "mask_ratio": (0.4, 0.5), "mask_shape": "random", "mask_spread": False, "group": 1,
        "start_epoch": 2,
    }.items()},
    "eval.knn_every": Entry(evaluations, 1, KNN),
    "eval.knn_train": Entry(evaluations, "scenes:val?size=12&image_size=40", KNN),
    "eval.knn_test": Entry(evaluations, "scenes:val?size=12&image_size=40", KNN),
    "eval.knn_k": Entry(evaluations, 3, KNN),
    "eval.knn_temperature": Entry(evaluations, 5.0, KNN),
    "eval.resize": Entry(evaluations, 40, KNN),
    "eval.crop": Entry(evaluations, 32, KNN),
    "eval.batch_size": Entry(evaluations, 5, KNN),
    "eval.voc_every": Entry(evaluations, 1, VOC),
    "eval.voc_data": Entry(evaluations, "scenes:val?size=12&image_size=40", VOC),
    "eval.voc_size": Entry(evaluations, 40, VOC),
    "run.mesh.data": Entry(placement, 4),
    "run.mesh.fsdp": Entry(placement, 2),
    "run.mesh.model": Entry(placement, 2),
    "run.accum_steps": Entry(program, 2, {"model.depth": 2}),
    "run.remat": Entry(forward, "blocks"),
    "run.attention": Entry(attention, "fused"),
    "run.accept_new_data": Entry(grown, True),
    "run.workers": Entry(reading, 2),
    "run.threads": Entry(reading, 3),
    "run.prefetch": Entry(reading, 3),
    "run.log_every": Entry(run, 2),
    "run.checkpoint_every": Entry(run, 0.5),
    "run.keep": Entry(run, 1),
    "run.keep_every": Entry(run, 1),
    "run.async_checkpoint": Entry(run, True),
    "run.stall_timeout": Entry(run, 1.0),
    "run.profile_steps": Entry(run, (1, 3)),
    "run.tensorboard": Entry(run, True),
    "run.wandb": Entry(run, "project"),
    "run.progress": Entry(run, True),
    "run.max_bad_steps": Entry(run, 2, LOSING),
    "run.max_rewinds": Entry(run, 1, LOSING),
    "run.stop_after": Entry(run, 3),
}  # fmt: skip


def place(config: ConfigDict, key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


@pytest.fixture(scope="module")
def before():
    """Observations of unchanged configurations, each made once."""
    return {}


def test_every_key_has_an_entry():
    assert [key for key, _ in flat_keys(KEYS)] == sorted(SWEEP, key=[key for key, _ in flat_keys(KEYS)].index)


@pytest.mark.parametrize("key", SWEEP)
def test_a_key_changed_alone_matters(key, before, tmp_path, monkeypatch):
    entry = SWEEP[key]
    config = base()
    for name, value in entry.context.items():
        place(config, name, value)

    def observe(folder):
        (tmp_path / folder).mkdir()
        with monkeypatch.context() as patch:
            return entry.observe(config, tmp_path / folder, patch)

    kind = entry.observe, repr(entry.context)
    known = {observer for observer, _ in before}
    if kind not in before:
        before[kind] = observe("before")
    if entry.observe not in known:  # or else any two observations would differ
        assert observe("again") == before[kind]
    place(config, key, entry.value)
    assert observe("changed") != before[kind]


def test_two_seeds_differ_in_all_that_a_seed_decides_and_one_agrees():
    """First weights, order of the examples, crops of each example, drop-path factors; the salt leaves the order."""
    config = base()
    config.model.depth, config.batch_size = 2, 8
    config.data.update({"render": "device", "canvas": 64})
    mesh = sharding.make_mesh(config.run.mesh)

    def decided(seed, salt=0):
        config.seed = seed
        recipe = train_step.make_recipe(config, 1)
        with contextlib.closing(pipeline.make_dataset(open_source(config.data.train), config, salt=salt)) as batches:
            batch = next(batches)
        ranked = np.argsort(batch["index"])
        weights = train_step.jit_init_state(recipe, mesh).student["params"]
        drawn = [x for x in jax.tree.leaves(weights) if x.std() > 0]  # the others start at 0 or 1
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), salt), 5)
        crops = {name: values[ranked] for name, values in batch["params"]._asdict().items() if values.std() > 0}
        return {
            **{f"weight {i}": np.asarray(x) for i, x in enumerate(drawn)},
            **{f"crops {name}": values for name, values in crops.items()},
            "order": batch["index"],
            "drop path": np.asarray(train_step.draw_drop_path(recipe, key, 8)),
        }

    one, again, other, salted = decided(1), decided(1), decided(2), decided(1, salt=1)
    assert one.keys() == other.keys() and {"crops box", "crops flip", "crops factors", "crops order"} < one.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
        assert not np.array_equal(other[name], value), name
        if not name.startswith("weight") and name != "order":
            assert not np.array_equal(salted[name], value), name
    np.testing.assert_array_equal(salted["order"], one["order"])


def test_the_seed_reaches_drop_path_in_the_step(tmp_path, monkeypatch):
    config = base()
    config.model.depth = 2
    first = program(config, tmp_path, monkeypatch)
    config.seed = 1
    assert program(config, tmp_path, monkeypatch) != first
