"""`dino-jax doctor`: checks a machine, or the place that launches one, before a run spends money.

    dino-jax doctor [--config=FILE|NAME --workdir=DIR --data=SPEC --devices=N --launch=tpu|gke|slurm|hosts]

Each check is one line: ok, warn (it may be slow or surprising) or missing (a run would fail), with the fix. It takes
seconds. Nothing is downloaded or installed; the network is used only for remote paths that were given.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from etils import epath
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.data.decode import BadImage, decode
from dino_jax.data.sources import open_source
from dino_jax.data.storage import absolute, is_remote, read_text
from dino_jax.errors import UserError, printable
from dino_jax.tools import machine
from dino_jax.tools.machine import Check, within

STORE_SECONDS, DATA_SECONDS, ACCOUNT_SECONDS = 45.0, 120.0, 60.0  # time limits: a workdir, a data set, gcloud
# Commands that each way of launching calls (launch/*.sh); below, the environment variables that they read.
COMMANDS = {
    "tpu": ("gcloud", "tar"),
    "gke": ("gcloud", "kubectl", "gke-gcloud-auth-plugin", "docker", "tar"),
    "slurm": ("sbatch", "srun"),
    "hosts": ("ssh",),
}
AWAY = ("tpu", "gke", "slurm")  # the run's machines are not the one that starts it
SETTINGS = {
    "tpu": ("PROJECT", "ZONE", "TOPOLOGY", "WORKDIR"),
    "gke": ("PROJECT", "CLUSTER", "LOCATION", "TOPOLOGY", "WORKDIR", "REPOSITORY"),
}
SOURCES = {
    "gcloud": "https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl",
    "gke-gcloud-auth-plugin": "gcloud components install gke-gcloud-auth-plugin",
    "docker": "https://docs.docker.com/engine/install, or give launch/gke.sh an IMAGE and BUILD=0",
    "sbatch": "run this on a login node of the cluster",
    "srun": "run this on a login node of the cluster",
}


def doctor(
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
    data: str | None = None,
    workdir: str | None = None,
    devices: int | None = None,
    launch: str | None = None,
) -> Iterator[Check]:
    """Yields every check that the arguments allow, as it is done.

    `devices`: how many the run will have, if not on this machine. `launch`: how it will be started from here; this
    machine then needs only the launch tools.
    """
    loaded, checks = _config(config, overrides)
    yield from checks
    yield machine.python()
    found = 0
    if launch not in AWAY:
        yield from machine.packages()
        for check in machine.devices(config_io.to_json(loaded) if loaded is not None else ""):
            found = int(check.found.split()[0]) if check.name == "devices" and check.state != "missing" else found
            yield check
        yield machine.memory()
        yield machine.files()
        yield machine.disk(workdir)
    if loaded is not None and (devices or found):
        yield _batch(loaded, devices or found)
    if workdir is not None:
        yield _workdir(workdir, loaded, launch)
    for name, spec in _sources(loaded, data):
        yield _data(name, spec, loaded, launch)
    if launch is not None:
        yield from _launch(launch)


def report(checks: Iterable[Check], write: Callable[[str], object] = print) -> list[str]:
    """Writes one line for each check, then one JSON object; returns the names of failed checks."""
    done = []
    for check in checks:
        fix = f"\n{'':18}-> {printable(check.fix)}" if check.fix else ""
        write(f"{check.state:8}{check.name:10}{printable(check.found)}{fix}")
        done.append(check)
    missing = [check.name for check in done if check.state == "missing"]
    write(json.dumps({"ok": not missing, "checks": {check.name: check.state for check in done}}))
    return missing


def _config(path: str | None, overrides: Sequence[str]) -> tuple[ConfigDict | None, list[Check]]:
    if path is None:
        if overrides:
            raise UserError(f"{overrides[0]}: an override needs a configuration: add --config=FILE")
        return None, []
    try:
        config = config_io.load(path, overrides)
    except UserError as error:
        return None, [Check("config", "missing", str(error), "fix the file or the key, then run this again")]
    return config, [Check("config", "ok", f"{path}: {config.model.name}, batch {config.batch_size}")]


def _batch(config: ConfigDict, devices: int) -> Check:
    """Checks that the mesh fits the devices and that the batch divides over them."""
    sizes: Mapping[str, int] = config.run.mesh.to_dict()
    fixed = math.prod(n for n in sizes.values() if n != -1)
    open_ = [axis for axis, n in sizes.items() if n == -1]
    if len(open_) > 1 or devices % fixed or (not open_ and fixed > devices):
        fix = f"--config.run.mesh.AXIS: their product must be {devices}; one of them may be -1"
        return Check("batch", "missing", f"run.mesh={dict(sizes)} does not fit {devices} device(s)", fix)
    shape = {axis: devices // fixed if n == -1 else n for axis, n in sizes.items()}
    ways = shape["data"] * shape["fsdp"] * config.run.accum_steps
    if config.batch_size % ways:
        nearest = max(ways, round(config.batch_size / ways) * ways)
        found = f"batch_size={config.batch_size} does not divide by {ways} (devices x run.accum_steps)"
        return Check("batch", "missing", found, f"--config.batch_size={nearest}, or another mesh")
    return Check("batch", "ok", f"{config.batch_size} images a step, {config.batch_size // ways} a device at a time")


def _workdir(workdir: str, config: ConfigDict | None, launch: str | None) -> Check:
    """Checks that the workdir is writable and holds no run of another configuration."""
    remote = is_remote(workdir)
    if launch in SETTINGS and not workdir.startswith("gs://"):
        fix = "give gs://bucket/folder: the machine's own disk goes with it"
        return Check("workdir", "missing", f"{workdir} does not outlive the machine", fix)
    fix = (
        "gcloud auth application-default login, and the right to write to the bucket"
        if remote
        else "chmod, or give another --workdir"
    )

    def write() -> Check:
        folder = epath.Path(workdir) if remote else epath.Path(machine.existing(pathlib.Path(workdir).expanduser()))
        path = folder / f".doctor-{uuid.uuid4().hex}"
        path.write_text("a test of write access by dino-jax doctor")
        path.unlink()
        saved = absolute(workdir) / "config.json"
        if config is None or not saved.exists():
            return Check("workdir", "ok", f"{workdir}: writable")
        if differences := config_io.differences(config_io.from_json(read_text(saved), str(saved)), config):
            other = f"{workdir} belongs to a run of another configuration: {machine.few(differences)}"
            return Check("workdir", "missing", other, "give another --workdir, or the same values to resume")
        return Check("workdir", "ok", f"{workdir}: writable; its run would resume")

    try:
        return within(STORE_SECONDS, write)
    except UserError as error:
        return Check("workdir", "missing", str(error), "or give another --workdir")
    except Exception as error:  # storage clients raise their own
        return Check("workdir", "missing", f"{workdir}: cannot be written: {machine.line(error)}", fix)


def _sources(config: ConfigDict | None, data: str | None) -> Iterator[tuple[str, str]]:
    """Yields the data sets that the run would read: (name of the check, source)."""
    if data is not None:
        yield "data", data
    elif config is not None:
        yield "data", config.data.train
    if config is not None and config.eval.knn_every:
        for key in ("knn_train", "knn_test"):
            yield key, config.eval[key] or ""


def _data(name: str, spec: str, config: ConfigDict | None, launch: str | None = None) -> Check:
    """Checks that a source opens, decodes, fills a batch, and is visible to the run's machines."""
    if not spec:
        return Check(name, "missing", f"eval.knn_every is set, eval.{name} is not", f"--config.eval.{name}=SOURCE")
    if launch in SETTINGS and "gs://" not in spec and not spec.startswith(("scenes:", "hf:")):
        fix = "copy it to a bucket and give gs://..., or for tfds ?data_dir=gs://..."
        return Check(name, "missing", f"{spec} is on this machine; the run's machines cannot read it", fix)

    def read() -> Check:
        source = open_source(spec)
        size = len(source)
        found = f"{spec}: {size} images"
        try:
            pixels = decode(source[0].image, config.model.in_chans if config is not None else 3)
        except BadImage as error:
            return Check(name, "missing", f"{found}; the first: {error}", "check the files and the folder")
        if config is not None and name == "data" and size < config.batch_size:
            fix = f"--config.batch_size={2 ** int(math.log2(size))}, or more images"
            return Check(name, "missing", f"{found}: less than one batch of {config.batch_size}", fix)
        found = f"{found}; the first: {' x '.join(map(str, pixels.shape))}"
        if left_out := getattr(source, "left_out", ""):
            return Check(name, "warn", f"{found}; left out: {left_out}", "to use them, convert them to JPEG or PNG")
        return Check(name, "ok", found)

    try:
        return within(DATA_SECONDS, read)
    except UserError as error:
        return Check(name, "missing", str(error), "see `dino-jax train --help` and the README for what a source can be")
    except TimeoutError as error:
        return Check(name, "warn", f"{spec}: {error}", "`dino-jax pack` makes shards that open at once")
    except Exception as error:
        return Check(name, "missing", f"{spec}: {machine.line(error)}", "see the message")


def _launch(launch: str) -> Iterator[Check]:
    """Checks that the commands of the launch scripts are installed and their variables are set."""
    for command in COMMANDS[launch]:
        if shutil.which(command) is not None:
            yield Check(command, "ok", str(shutil.which(command)))
        else:
            state = "warn" if command == "docker" else "missing"
            yield Check(command, state, "not on PATH", SOURCES.get(command, f"install {command}"))
    if "gcloud" in COMMANDS[launch] and shutil.which("gcloud") is not None:
        yield _account()
    names = [name for name in SETTINGS.get(launch, ()) if not os.environ.get(name)]
    if "TOPOLOGY" in names and os.environ.get("TYPE"):
        names.remove("TOPOLOGY")
    if launch in SETTINGS:
        found = f"not set: {', '.join(names)}" if names else f"{', '.join(SETTINGS[launch])} are set"
        script = {"tpu": "launch/tpu_vm.sh", "gke": "launch/gke.sh"}[launch]
        yield Check("settings", "warn" if names else "ok", found, f"{script} --help explains them" if names else "")


def _account() -> Check:
    """Checks that gcloud is logged in, from its files on this machine."""
    command = ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]
    try:
        account = subprocess.run(command, capture_output=True, text=True, timeout=ACCOUNT_SECONDS).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("account", "warn", f"gcloud does not answer: {machine.line(error)}", "try: gcloud auth list")
    if account:
        return Check("account", "ok", account)
    return Check("account", "missing", "gcloud is not logged in", "gcloud auth login")
