"""Snapshots: applied in place they equal a fresh load, undone they leave no trace, damaged they are refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig, RowPrecision
from model.disk import Disk
from model.errors import (
    SnapshotConfigError,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotExistsError,
    SnapshotFormatError,
    SnapshotHashError,
    SnapshotMissingError,
    SnapshotNotReadyError,
    SnapshotParentError,
    SnapshotTruncatedError,
    StateMismatchError,
)
from model.manifest import Lineage, Manifest, SnapshotKind
from model.recommender import Recommender
from model.retention import SnapshotRetention
from model.snapshot import (
    READY_NAME,
    chain,
    list_versions,
    load_snapshot,
    move_pointer,
    read_manifest,
    read_pointer,
    snapshot_folder,
    write_snapshot,
)
from model.storage import LocalStorage
from model.swap import apply_snapshot, carry_out, merge_deltas, plan_snapshot, take_rows, undo_snapshot
from tests.model.study import Study

Answer = Callable[[Recommender], torch.Tensor]


class DyingDisk(Disk):
    """A disk whose process is killed just before its n-th operation."""

    def __init__(self, *, operations: int) -> None:
        self.left = operations

    def _live(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1

    def make_dir(self, path: Path) -> None:
        self._live()
        super().make_dir(path)

    def write(self, path: Path, content: bytes) -> None:
        try:
            self._live()
        except KeyboardInterrupt:
            path.write_bytes(content[: len(content) // 2])
            raise
        super().write(path, content)

    def sync_dir(self, path: Path) -> None:
        self._live()
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._live()
        super().rename(source, target)

    def remove_dir(self, path: Path) -> None:
        try:
            self._live()
        except KeyboardInterrupt:
            # Folders are deleted file by file, in any order: the worst is that READY would be the last.
            for file in path.glob("*"):
                if file.name != READY_NAME:
                    file.unlink()
            raise
        super().remove_dir(path)

    def remove_file(self, path: Path) -> None:
        self._live()
        super().remove_file(path)


def publish(
    root: Path,
    recommender: Recommender,
    version: int,
    kind: SnapshotKind,
    *,
    disk: Disk | None = None,
    row_precision: RowPrecision = "float32",
) -> Manifest:
    manifest = Manifest(
        model="hstu",
        version=version,
        kind=kind,
        parent=version - 1 if kind == "delta" else None,
        config_hash=recommender.config.config_hash(),
        model_config=recommender.config.as_dict(),
        num_items=recommender.items.num_items,
        created_at_ms=1_700_000_000_000 + version,
        watermark_ms=recommender.items.trend_as_of_ms,
        row_precision=row_precision,
        lineage=Lineage(log_id="log", positions={0: 10 * version, 1: 7}, num_interactions=3, fingerprint=2**64 - 5),
    )
    storage = LocalStorage(root, disk)
    written = write_snapshot(storage, manifest, recommender.dense_state(), take_rows(recommender, kind))
    recommender.items.clear_dirty()
    return written


def prune(root: Path, disk: Disk | None = None) -> list[int]:
    return SnapshotRetention(LocalStorage(root, disk), "hstu", anchors_kept=1, replica_timeout_ms=1_000).prune(0)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig) -> tuple[Path, Study]:
    """Four versions: anchor, delta, delta, anchor; the third removes two items and brings one back."""
    root = tmp_path_factory.mktemp("published")
    study = Study(small_config)
    kinds: tuple[SnapshotKind, ...] = ("anchor", "delta", "delta", "anchor")
    for version, kind in enumerate(kinds, start=1):
        study.learn(2)
        if version == 3:
            study.recommender.items.remove(np.array([1_000_003 * 5, 1_000_003 * 3]))
            study.recommender.items.admit(np.array([1_000_003 * 3]))
        publish(root, study.recommender, version, kind)
    return root, study


@pytest.fixture
def root(tmp_path: Path, published: tuple[Path, Study]) -> Path:
    """A copy of the published versions, to damage."""
    shutil.copytree(published[0], tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def study(published: tuple[Path, Study]) -> Study:
    """The study that published them, as it was then."""
    return copy.deepcopy(published[1])


def loaded(root: Path, config: ModelConfig, want: int) -> Recommender:
    recommender = Recommender(config)
    for version in chain(root, "hstu", have=None, want=want):
        apply_snapshot(recommender, load_snapshot(root, "hstu", version))
    return recommender


def everything(recommender: Recommender) -> dict[str, torch.Tensor]:
    """All that snapshots carry: not when items were seen, which decides what the trainer retires."""
    state = recommender.dense_state() | recommender.items.state_dict()
    del state["seen_ms"]
    return state


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_an_anchor_and_its_deltas_applied_in_place_equal_the_model_that_wrote_them(
    tmp_path: Path, small_config: ModelConfig, answer: Answer
) -> None:
    study = Study(small_config)
    replica = Recommender(small_config)
    for version in range(1, 6):
        study.learn(2)
        publish(tmp_path, study.recommender, version, "anchor" if version == 1 else "delta")
        apply_snapshot(replica, load_snapshot(tmp_path, "hstu", version))
        assert torch.equal(answer(replica), answer(study.recommender))
    assert_same(everything(replica), everything(study.recommender))


def test_deltas_in_place_equal_a_fresh_load_of_the_same_version(
    root: Path, small_config: ModelConfig, answer: Answer
) -> None:
    swapped = loaded(root, small_config, 3)
    apply_snapshot(swapped, load_snapshot(root, "hstu", 4))
    fresh = loaded(root, small_config, 4)
    assert_same(everything(swapped), everything(fresh))
    assert torch.equal(answer(swapped), answer(fresh))


def test_undo_restores_the_exact_outputs_of_every_earlier_version(
    root: Path, small_config: ModelConfig, answer: Answer
) -> None:
    recommender = Recommender(small_config)
    trail = []
    for version in (1, 2, 3, 4):
        trail.append((version - 1, everything(recommender), answer(recommender)))
        undo = apply_snapshot(recommender, load_snapshot(root, "hstu", version))
        assert recommender.snapshot_version == version
        trail[-1] += (undo,)  # type: ignore[assignment]
    lookups = recommender.items.lookup(np.arange(40) * 1_000_003)
    for version, state, outputs, undo in reversed(trail):  # type: ignore[misc]
        undo_snapshot(recommender, undo)
        assert recommender.snapshot_version == (version or None)
        assert torch.equal(answer(recommender), outputs)
        assert_same(everything(recommender), state)
    for version in (1, 2, 3, 4):
        apply_snapshot(recommender, load_snapshot(root, "hstu", version))
    assert recommender.items.lookup(np.arange(40) * 1_000_003).tolist() == lookups.tolist()


def live_rows(recommender: Recommender) -> dict[str, torch.Tensor]:
    """Everything about the live items, in the table's order; removed ones leave no trace."""
    block = take_rows(recommender, "anchor")
    return block.tensors() | recommender.dense_state()


def test_merged_deltas_do_what_they_do_one_after_the_other(tmp_path: Path, small_config: ModelConfig) -> None:
    rng = np.random.default_rng(7)
    study = Study(small_config)
    study.learn(2)
    publish(tmp_path, study.recommender, 1, "anchor")
    items = study.recommender.items
    for version in range(2, 12):
        # Items go, come back in the same delta or a later one, and new ones go at once.
        items.remove(rng.choice(items.ids(), 4))
        rows = items.admit(rng.choice(40, 6, replace=False) * 1_000_003)
        items.observe(rows, np.full(len(rows), 1_700_000_000_000 + version))
        items.weight[torch.from_numpy(rows)] += version
        publish(tmp_path, study.recommender, version, "delta")
    for first, last in ((2, 3), (2, 11), (5, 9), (11, 11)):
        stepwise, at_once = loaded(tmp_path, small_config, last), loaded(tmp_path, small_config, first - 1)
        before = everything(at_once)
        merged = merge_deltas([load_snapshot(tmp_path, "hstu", version) for version in range(first, last + 1)])
        undo = apply_snapshot(at_once, merged)
        assert at_once.snapshot_version == last
        assert_same(live_rows(at_once), live_rows(stepwise))
        undo_snapshot(at_once, undo)
        assert at_once.snapshot_version == first - 1
        assert_same(everything(at_once), before)


def test_deltas_that_do_not_follow_each_other_are_not_merged(root: Path) -> None:
    second, third = (load_snapshot(root, "hstu", version) for version in (2, 3))
    with pytest.raises(SnapshotParentError, match="version 2 changes version 1, but version 3 comes before it"):
        merge_deltas([third, second])
    third.dense["log_scale"] = torch.zeros(2)
    with pytest.raises(StateMismatchError, match="version 3 carries other tensors"):
        merge_deltas([second, third])


def test_planning_changes_nothing_and_a_plan_fits_only_what_it_was_made_for(
    root: Path, small_config: ModelConfig
) -> None:
    recommender, other = loaded(root, small_config, 1), loaded(root, small_config, 1)
    before = everything(recommender)
    plan = plan_snapshot(recommender, load_snapshot(root, "hstu", 2))
    assert_same(everything(recommender), before)
    assert plan.fits(recommender)
    assert not plan.fits(other)
    carry_out(plan)
    assert not plan.fits(recommender)
    assert_same(everything(recommender), everything(loaded(root, small_config, 2)))


def test_undoing_out_of_order_is_refused(root: Path, small_config: ModelConfig) -> None:
    recommender = Recommender(small_config)
    first = apply_snapshot(recommender, load_snapshot(root, "hstu", 1))
    apply_snapshot(recommender, load_snapshot(root, "hstu", 2))
    with pytest.raises(SnapshotParentError, match="this undoes version 1"):
        undo_snapshot(recommender, first)


def test_the_manifest_comes_back_as_written(root: Path) -> None:
    manifest = read_manifest(root, "hstu", 2)
    assert manifest.lineage == Lineage(log_id="log", positions={0: 20, 1: 7}, num_interactions=3, fingerprint=2**64 - 5)
    assert Manifest.decode(manifest.encode()) == manifest
    pointer = read_pointer(root, "hstu")
    assert pointer is not None
    assert (pointer.version, pointer.kind, pointer.path) == (4, "anchor", "hstu/v00000004")


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def break_promise(path: Path) -> None:
    path.write_text("0" * 64)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], type[SnapshotError], str]] = {
    "truncated rows": ("rows.safetensors", truncate, SnapshotTruncatedError, "its manifest says"),
    "truncated dense": ("dense.safetensors", truncate, SnapshotTruncatedError, "its manifest says"),
    "flipped rows": ("rows.safetensors", flip_one_bit, SnapshotHashError, "another sha256"),
    "flipped dense": ("dense.safetensors", flip_one_bit, SnapshotHashError, "another sha256"),
    "flipped manifest": ("manifest.json", flip_one_bit, SnapshotHashError, "READY names"),
    "wrong promise": ("READY", break_promise, SnapshotHashError, "READY names"),
    "missing rows": ("rows.safetensors", Path.unlink, SnapshotMissingError, "rows.safetensors is missing"),
    "missing manifest": ("manifest.json", Path.unlink, SnapshotMissingError, "manifest.json is missing"),
    "not ready": ("READY", Path.unlink, SnapshotNotReadyError, "was not finished"),
}


@pytest.mark.parametrize("damage", DAMAGE.keys())
def test_a_damaged_snapshot_is_refused_and_changes_nothing(root: Path, small_config: ModelConfig, damage: str) -> None:
    name, harm, error, says = DAMAGE[damage]
    recommender = loaded(root, small_config, 1)
    before = everything(recommender)
    harm(root / snapshot_folder("hstu", 2) / name)
    with pytest.raises(error, match=says) as raised:
        apply_snapshot(recommender, load_snapshot(root, "hstu", 2))
    assert raised.type is error
    assert_same(everything(recommender), before)
    assert recommender.snapshot_version == 1


def test_a_version_that_was_never_written_is_missing(root: Path) -> None:
    with pytest.raises(SnapshotMissingError, match="there is no snapshot"):
        load_snapshot(root, "hstu", 9)


def test_a_delta_on_another_version_is_refused_and_changes_nothing(root: Path, small_config: ModelConfig) -> None:
    recommender = loaded(root, small_config, 1)
    before = everything(recommender)
    with pytest.raises(SnapshotParentError, match="changes version 2, but version 1 is loaded"):
        apply_snapshot(recommender, load_snapshot(root, "hstu", 3))
    assert_same(everything(recommender), before)


def test_a_snapshot_of_another_configuration_is_refused(root: Path, small_config: ModelConfig) -> None:
    recommender = Recommender(dataclasses.replace(small_config, max_len=13))
    before = everything(recommender)
    with pytest.raises(SnapshotConfigError, match="max_len 12 instead of 13"):
        apply_snapshot(recommender, load_snapshot(root, "hstu", 1))
    assert_same(everything(recommender), before)


def test_dense_tensors_of_another_shape_are_refused_before_any_change(root: Path, small_config: ModelConfig) -> None:
    recommender = loaded(root, small_config, 1)
    before = everything(recommender)
    snapshot = load_snapshot(root, "hstu", 2)
    snapshot.dense["log_scale"] = torch.zeros(2)
    with pytest.raises(Exception, match="log_scale"):
        apply_snapshot(recommender, snapshot)
    assert_same(everything(recommender), before)


def test_another_format_version_is_refused(root: Path) -> None:
    content = read_manifest(root, "hstu", 1).encode().replace(b'"format_version": 1', b'"format_version": 2')
    with pytest.raises(SnapshotFormatError, match="reads 1"):
        Manifest.decode(content)
    with pytest.raises(SnapshotFormatError, match="cannot be read"):
        Manifest.decode(b'{"format_version": 1}')


def test_a_manifest_that_belongs_elsewhere_is_refused(root: Path) -> None:
    moved = root / snapshot_folder("hstu", 7)
    (root / snapshot_folder("hstu", 2)).rename(moved)
    with pytest.raises(SnapshotCorruptError, match="holds version 2"):
        load_snapshot(root, "hstu", 7)


@pytest.mark.parametrize("operations", range(15))
def test_a_crash_at_any_operation_leaves_pointer_and_older_snapshots_intact(
    root: Path, study: Study, small_config: ModelConfig, operations: int
) -> None:
    before = everything(loaded(root, small_config, 4))
    study.learn(1)
    with pytest.raises(KeyboardInterrupt):
        publish(root, study.recommender, 5, "delta", disk=DyingDisk(operations=operations))
    pointer = read_pointer(root, "hstu")
    assert pointer is not None
    assert pointer.version == (5 if operations == 14 else 4)
    assert_same(everything(loaded(root, small_config, 4)), before)
    if 5 not in list_versions(root, "hstu"):
        publish(root, study.recommender, 5, "delta")
    recovered = loaded(root, small_config, 5)
    assert torch.equal(recovered.log_scale, study.recommender.log_scale)


def test_a_published_version_is_never_rewritten(root: Path, study: Study) -> None:
    with pytest.raises(SnapshotExistsError, match="take the next version"):
        publish(root, study.recommender, 4, "anchor")


def test_a_chain_takes_deltas_from_what_is_loaded_or_starts_at_an_anchor(root: Path) -> None:
    assert chain(root, "hstu", have=1, want=3) == [2, 3]
    assert chain(root, "hstu", have=2, want=2) == []
    assert chain(root, "hstu", have=None, want=3) == [1, 2, 3]
    assert chain(root, "hstu", have=3, want=4) == [4]
    assert chain(root, "hstu", have=4, want=3) == [1, 2, 3]


def test_a_broken_chain_is_refused(root: Path) -> None:
    (root / snapshot_folder("hstu", 2) / "READY").unlink()
    with pytest.raises(SnapshotParentError, match="needs version 2"):
        chain(root, "hstu", have=1, want=3)


def told(root: Path, version: int, **fields: object) -> Manifest:
    """A version's manifest, changed and declared anew."""
    folder = root / snapshot_folder("hstu", version)
    manifest = dataclasses.replace(read_manifest(root, "hstu", version), **fields)  # type: ignore[arg-type]
    (folder / "manifest.json").write_bytes(manifest.encode())
    (folder / "READY").write_text(hashlib.sha256(manifest.encode()).hexdigest())
    return manifest


def test_a_chain_goes_by_content_where_deltas_name_it(root: Path, small_config: ModelConfig) -> None:
    first = read_manifest(root, "hstu", 1)
    second = told(root, 2, parent_hash=first.content_hash())
    third = told(root, 3, parent_hash=second.content_hash())
    assert chain(root, "hstu", have=2, want=3, have_hash=second.content_hash()) == [3]
    # Not what is loaded, although it has the number: from the anchor.
    assert chain(root, "hstu", have=2, want=3, have_hash="0" * 64) == [1, 2, 3]
    recommender = loaded(root, small_config, 3)
    assert recommender.snapshot_hash == third.content_hash()
    told(root, 3, parent_hash=first.content_hash())
    with pytest.raises(SnapshotParentError, match="builds on another version 2 than the one that is there"):
        chain(root, "hstu", have=2, want=3, have_hash=second.content_hash())
    lying = load_snapshot(root, "hstu", 3)
    with pytest.raises(SnapshotParentError, match="builds on another version 2 than the one that is loaded"):
        apply_snapshot(loaded(root, small_config, 2), lying)
    with pytest.raises(SnapshotParentError, match="another version 2 comes before it"):
        merge_deltas([load_snapshot(root, "hstu", 2), lying])


def test_a_merged_delta_leads_to_the_last_and_a_way_back_to_what_was_before(
    root: Path, small_config: ModelConfig
) -> None:
    first = read_manifest(root, "hstu", 1)
    second = told(root, 2, parent_hash=first.content_hash())
    third = told(root, 3, parent_hash=second.content_hash())
    recommender = loaded(root, small_config, 1)
    undo = apply_snapshot(recommender, merge_deltas([load_snapshot(root, "hstu", v) for v in (2, 3)]))
    assert recommender.snapshot_hash == third.content_hash()
    undo_snapshot(recommender, undo)
    assert recommender.snapshot_hash == first.content_hash()


def test_the_pointer_can_go_back(root: Path) -> None:
    move_pointer(root, read_manifest(root, "hstu", 2))
    pointer = read_pointer(root, "hstu")
    assert pointer is not None
    assert pointer.version == 2


def test_pruning_keeps_the_newest_anchors_and_what_the_pointer_needs(root: Path) -> None:
    move_pointer(root, read_manifest(root, "hstu", 3))
    assert prune(root) == []
    move_pointer(root, read_manifest(root, "hstu", 4))
    assert prune(root) == [1, 2, 3]
    assert list_versions(root, "hstu") == [4]


def test_a_crash_while_pruning_leaves_only_whole_snapshots_and_is_cleaned_up(
    tmp_path: Path, published: tuple[Path, Study]
) -> None:
    # Three READY files and three folders go.
    for operations in range(6):
        root = tmp_path / str(operations)
        shutil.copytree(published[0], root)
        move_pointer(root, read_manifest(root, "hstu", 4))
        with pytest.raises(KeyboardInterrupt):
            prune(root, DyingDisk(operations=operations))
        for version in list_versions(root, "hstu"):
            load_snapshot(root, "hstu", version)
        prune(root)
        assert list_versions(root, "hstu") == [4]
        assert [path.name for path in (root / "hstu").glob("v*")] == ["v00000004"]


def test_there_is_no_pointer_before_the_first_snapshot(tmp_path: Path) -> None:
    assert read_pointer(tmp_path, "hstu") is None
    assert list_versions(tmp_path, "hstu") == []


def test_a_model_name_cannot_leave_the_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model is"):
        read_pointer(tmp_path, "../elsewhere")


def test_a_delta_carries_only_the_rows_that_changed(tmp_path: Path, make_study: Callable[[str], Study]) -> None:
    study = make_study("sampled")
    study.recommender.items.admit(np.arange(500) * 1_000_003)
    publish(tmp_path, study.recommender, 1, "anchor")
    study.learn(1)
    changed = set(study.recommender.items.dirty_rows().tolist())
    publish(tmp_path, study.recommender, 2, "delta")
    rows = load_snapshot(tmp_path, "hstu", 2).rows
    assert set(study.recommender.items.lookup(rows.ids.numpy()).tolist()) == changed
    assert 0 < len(changed) < 100
