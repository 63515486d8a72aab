"""The workflow files parse, cover the supported Pythons, and have no more permissions than they need."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]


@pytest.mark.parametrize(("workflow", "job"), [("ci", "checks"), ("release", "try")])
def test_every_supported_python_is_tried(workflow, job):
    pythons = jobs(workflow)[job]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={pythons[0]}"
    differing = re.findall(r'python_version [<>=]+ "([\d.]+)"', (ROOT / "constraints.txt").read_text())
    assert set(differing) <= set(pythons)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_rights_and_times_are_bounded(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert job.get("permissions", {}) in ({}, {"id-token": "write"})


def test_commit_hooks_are_the_checks_of_the_test_script():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = {pathlib.Path(hook["entry"].split()[0]).name for hook in local["hooks"]}
    script = (ROOT / "launch" / "test.sh").read_text()
    assert local["repo"] == "local"
    assert tools == {"ruff", "mypy", "lint-imports", "shellcheck"}
    assert all(tool in script for tool in tools)
