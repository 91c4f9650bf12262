"""Checkpoints exist whole or not at all, and say so when they are damaged."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from online_trainer.checkpoint import Checkpoint, read_newest_checkpoint, write_checkpoint
from online_trainer.errors import CheckpointError, CheckpointMismatchError


def checkpoint_of(step: int) -> Checkpoint:
    return Checkpoint(step, "hash", {"weights": torch.full((4,), float(step))}, {"position": step * 10})


def write(root: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        write_checkpoint(root, checkpoint_of(step), keep=keep)


def read(root: Path) -> Checkpoint:
    checkpoint = read_newest_checkpoint(root, config_hash="hash")
    assert checkpoint is not None
    return checkpoint


def test_the_newest_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    newest = read(tmp_path)
    assert (newest.step, newest.state) == (2, {"position": 20})
    torch.testing.assert_close(newest.tensors["weights"], torch.full((4,), 2.0))


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert read_newest_checkpoint(tmp_path / "missing", config_hash="hash") is None


def test_old_ones_are_deleted(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0000000003", "c0000000004"]


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove tensors", "remove state", "garble state", "list for state"]
)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2)
    tensors, state = (tmp_path / "c0000000002" / name for name in ("tensors.safetensors", "state.json"))
    content = bytearray(tensors.read_bytes())
    match damage:
        case "flip":
            content[-1] ^= 1
            tensors.write_bytes(content)
        case "truncate":
            tensors.write_bytes(content[:-3])
        case "remove tensors":
            tensors.unlink()
        case "remove state":
            state.unlink()
        case "garble state":
            state.write_text("{")
        case "list for state":
            state.write_text("[]")
    assert read(tmp_path).step == 1
    assert "c0000000002" in caplog.text
    # It takes no whole one's place among those that are kept, and can be looked at.
    write(tmp_path, 2, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c0000000001", "c0000000002", "damaged-c0000000002"]
    assert read(tmp_path).step == 2


def test_when_all_are_damaged_it_refuses_to_start_over_silently(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "c0000000001" / "state.json").unlink()
    for _start in range(2):
        with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
            read_newest_checkpoint(tmp_path, config_hash="hash")


def test_an_unfinished_one_is_not_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "unfinished-c0000000002").mkdir()
    assert read(tmp_path).step == 1


def test_another_configuration_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CheckpointMismatchError, match="another \\[model\\] configuration"):
        read_newest_checkpoint(tmp_path, config_hash="other")


def test_an_unwritable_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write_checkpoint(tmp_path / "file", checkpoint_of(1), keep=1)


def test_a_full_disk_is_reported_and_does_not_stay_full(tmp_path: Path) -> None:
    write(tmp_path, 1)
    large = Checkpoint(2, "hash", {"weights": torch.zeros(10_000)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, hard))
    try:
        with pytest.raises(CheckpointError, match="c0000000002 could not be written"):
            write_checkpoint(tmp_path, large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["c0000000001"]
