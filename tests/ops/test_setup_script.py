"""`.ci/setup`: what a newcomer's machine may lack is one sentence; nothing is installed in these tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the files that set-up reads, and stand-ins for programs in `bin`."""
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name)
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / "bin").mkdir()
    return tmp_path


def _program(clone: Path, name: str, script: str) -> str:
    path = clone / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def _make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))
    }
    environment["PATH"] = f"{clone / 'bin'}:{environment['PATH']}"
    return subprocess.run(["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True, timeout=60)


def _sentence(ran: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of ours; make adds a line of its own."""
    assert ran.returncode != 0
    (sentence,) = [line for line in ran.stderr.splitlines() if line.startswith("headrace setup:")]
    assert "Traceback" not in ran.stderr
    return sentence


def test_make_alone_explains_itself(clone: Path) -> None:
    ran = _make(clone)
    assert ran.returncode == 0
    for target in ("setup", "demo", "test", "test-long", "check", "fix", "gpu", "docs", "clean"):
        assert f"  make {target} " in ran.stdout


def test_a_missing_python_is_named(clone: Path) -> None:
    assert "'python9' was not found" in _sentence(_make(clone, "setup", "PYTHON=python9"))


def test_an_old_python_is_named_with_its_version(clone: Path) -> None:
    old = _program(clone, "oldpython", 'case "$2" in *version_info*3,*) exit 1;; *print*) echo 3.9;; esac')
    sentence = _sentence(_make(clone, "setup", f"PYTHON={old}"))
    assert "is Python 3.9, headrace needs 3.11 or newer" in sentence


def test_a_full_disk_is_noticed_before_anything_is_written(clone: Path) -> None:
    _program(clone, "df", "echo Filesystem; echo /dev/disk 100000000 90000000 5000000 95% /")
    sentence = _sentence(_make(clone, "setup", f"PYTHON={sys.executable}"))
    assert "only 4882 MB are free on this disk, the installation needs 6 GB" in sentence
    assert not (clone / ".venv").exists()


def _fake_python(clone: Path, pip: str) -> str:
    """A Python whose `-m venv` makes an environment in which `-m pip` runs the given script."""
    script = f"""
case "$*" in
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip"*) {pip} ;;
  *print*) echo 3.11 ;;
esac"""
    return _program(clone, "fakepython", script)


def test_a_failing_pip_is_quoted_and_the_next_run_tries_again(clone: Path) -> None:
    _program(clone, "df", "echo Filesystem; echo /dev/disk 100000000 0 99000000 5% /")
    python = _fake_python(clone, "echo 'ERROR: No matching distribution found for torch==2.13.0'; exit 1")
    ran = _make(clone, "setup", f"PYTHON={python}")
    assert "pip could not install the dependencies" in _sentence(ran)
    assert "ERROR: No matching distribution found for torch" in ran.stderr
    assert not list((clone / ".venv").glob(".installed-*"))
    (clone / ".venv" / "bin" / "python").write_text(
        (clone / "bin" / "fakepython").read_text().replace("exit 1", "exit 0")
    )
    assert _make(clone, "setup", f"PYTHON={python}").returncode == 0
    assert list((clone / ".venv").glob(".installed-*"))


def test_a_second_setup_has_nothing_to_do_until_the_pins_change(clone: Path) -> None:
    _program(clone, "df", "echo Filesystem; echo /dev/disk 100000000 0 99000000 5% /")
    python = _fake_python(clone, "echo installed >> .venv/installs")
    for _ in range(2):
        assert _make(clone, "setup", f"PYTHON={python}").returncode == 0
    (clone / "constraints.txt").touch()
    assert _make(clone, "setup", f"PYTHON={python}").returncode == 0
    log = clone / ".venv" / "setup.log"
    installs = clone / ".venv" / "installs"
    assert installs.read_text().split() == ["installed"]
    with (clone / "constraints.txt").open("a") as constraints:
        constraints.write("idna==3.20\n")
    ran = _make(clone, "setup", f"PYTHON={python}")
    assert installs.read_text().split() == ["installed", "installed"], (ran.stdout, log.read_text())
    assert len(list((clone / ".venv").glob(".installed-*"))) == 1


def test_ci_runs_both_parts_and_fails_when_either_fails(clone: Path) -> None:
    _program(clone, "make", 'echo "make $*" >> made; [ "$1" = check ]')
    environment = {**os.environ, "PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", ".ci/run"], cwd=clone, env=environment, capture_output=True, timeout=30)
    assert (clone / "made").read_text() == "make test\nmake check\n"
    assert ran.returncode == 1
