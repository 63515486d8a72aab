"""The repository's reference files are complete, each is used, and none can go missing unnoticed."""

from __future__ import annotations

import pathlib

import pytest

from tests import reference_files

TESTS = pathlib.Path(__file__).parent


def test_the_repositorys_copy_is_complete():
    held = {path.relative_to(reference_files.OWN).as_posix() for path in reference_files.OWN.rglob("*.*")}
    assert held - {"README.md"} == set(reference_files.FILES)


@pytest.mark.parametrize("name", reference_files.FILES)
def test_every_file_is_read_by_a_test(name):
    readers = [path for path in TESTS.rglob("test_*.py") if f'"{name}"' in path.read_text("utf-8")]
    assert readers, f"no test names {name}"


def test_an_absent_file_of_the_repositorys_copy_fails(monkeypatch, tmp_path):
    monkeypatch.delenv("DINO_REFERENCE", raising=False)
    for find in (reference_files.own, reference_files.chosen):
        assert find("loss.npz").is_file()
    monkeypatch.setattr(reference_files, "OWN", tmp_path)
    for find in (reference_files.own, reference_files.chosen):
        with pytest.raises(pytest.fail.Exception, match=r"loss\.npz is missing: restore it"):
            find("loss.npz")


def test_an_absent_file_among_other_tensors_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setenv("DINO_REFERENCE", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"loss\.npz is missing"):
        reference_files.chosen("loss.npz")
    (tmp_path / "loss.npz").touch()
    assert reference_files.chosen("loss.npz") == tmp_path / "loss.npz"
    monkeypatch.setenv("DINO_REFERENCE", str(tmp_path / "typo"))
    with pytest.raises(pytest.fail.Exception, match="typo is not a folder"):
        reference_files.chosen("loss.npz")
