"""Snapshots wherever they are stored: published in full or not at all, verified when read, kept on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from model.config import ModelConfig
from model.errors import SnapshotError, SnapshotHashError, SnapshotMissingError, SnapshotTruncatedError
from model.file_cache import FileCache
from model.manifest import Manifest, SnapshotKind
from model.recommender import Recommender
from model.retention import SnapshotRetention
from model.snapshot import chain, list_versions, load_snapshot, read_manifest, read_pointer, write_snapshot
from model.storage import ObjectStorage, SnapshotStorage
from model.swap import apply_snapshot, take_rows
from tests.model.storages import KINDS, empty, flip_one_bit, lengthen, new_storage, remove, truncate
from tests.model.study import Study


def publish(root: SnapshotStorage, study: Study, version: int, kind: SnapshotKind) -> Manifest:
    recommender = study.recommender
    manifest = Manifest(
        model="hstu",
        version=version,
        kind=kind,
        parent=version - 1 if kind == "delta" else None,
        config_hash=recommender.config.config_hash(),
        model_config=recommender.config.as_dict(),
        num_items=recommender.items.num_items,
        created_at_ms=1_000 + version,
        watermark_ms=1_000,
    )
    written = write_snapshot(root, manifest, recommender.dense_state(), take_rows(recommender, kind))
    recommender.items.clear_dirty()
    return written


def loaded(root: SnapshotStorage, config: ModelConfig, want: int, cache: FileCache | None = None) -> Recommender:
    recommender = Recommender(config)
    for version in chain(root, "hstu", have=None, want=want):
        apply_snapshot(recommender, load_snapshot(root, "hstu", version, cache=cache))
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


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, tmp_path: Path, study: Study) -> SnapshotStorage:
    """An anchor and two deltas."""
    storage = new_storage(request.param, tmp_path / "root")
    for version in (1, 2, 3):
        study.learn()
        publish(storage, study, version, "anchor" if version == 1 else "delta")
    return storage


def test_what_is_loaded_is_what_was_published(storage: SnapshotStorage, study: Study) -> None:
    replica = loaded(storage, study.recommender.config, 3)
    replica.items.clear_dirty()
    assert_same(everything(replica), everything(study.recommender))
    pointer = read_pointer(storage, "hstu")
    assert pointer is not None
    assert pointer.version == 3
    assert list_versions(storage, "hstu") == [1, 2, 3]


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (truncate, SnapshotTruncatedError),
        (lengthen, SnapshotTruncatedError),
        (empty, SnapshotTruncatedError),
        (flip_one_bit, SnapshotHashError),
        (remove, SnapshotMissingError),
    ],
)
@pytest.mark.parametrize("name", ["dense.safetensors", "rows.safetensors"])
def test_a_damaged_file_is_refused(
    storage: SnapshotStorage, harm: Callable[[SnapshotStorage, str], None], error: type[SnapshotError], name: str
) -> None:
    harm(storage, f"hstu/v00000002/{name}")
    with pytest.raises(error):
        load_snapshot(storage, "hstu", 2)


@pytest.mark.parametrize("harm", [truncate, lengthen, empty, flip_one_bit, remove])
@pytest.mark.parametrize("name", ["manifest.json", "READY"])
def test_a_damaged_manifest_is_refused(
    storage: SnapshotStorage, harm: Callable[[SnapshotStorage, str], None], name: str
) -> None:
    harm(storage, f"hstu/v00000002/{name}")
    with pytest.raises((SnapshotHashError, SnapshotMissingError)):
        read_manifest(storage, "hstu", 2)
    with pytest.raises(SnapshotError):
        chain(storage, "hstu", have=None, want=3)


class DyingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """An object store whose client is killed before its n-th change."""

    cachable = False  # codespell:ignore cachable
    left = 1_000

    def _live(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._live()
        super().pipe_file(path, value, mode, **options)

    def rm_file(self, path: str) -> None:
        self._live()
        super().rm_file(path)


@pytest.mark.parametrize("operations", range(5))
def test_an_object_store_left_at_any_put_has_whole_snapshots_and_is_published_to_again(
    study: Study, operations: int
) -> None:
    file_system = DyingFileSystem()
    storage = ObjectStorage(file_system, f"/dying-{operations}")
    study.learn()
    publish(storage, study, 1, "anchor")
    before = everything(loaded(storage, study.recommender.config, 1))
    study.learn()
    file_system.left = operations
    with pytest.raises(KeyboardInterrupt):
        publish(storage, study, 2, "delta")
    file_system.left = 1_000
    pointer = read_pointer(storage, "hstu")
    assert pointer is not None
    assert pointer.version == 1
    assert_same(everything(loaded(storage, study.recommender.config, 1)), before)
    # dense, rows, manifest, READY, pointer
    assert list_versions(storage, "hstu") == ([1, 2] if operations == 4 else [1])
    if operations < 4:
        publish(storage, study, 2, "delta")
    replica = loaded(storage, study.recommender.config, 2)
    assert torch.equal(replica.log_scale, study.recommender.log_scale)


def test_an_object_store_left_while_pruning_lists_only_whole_snapshots_and_is_cleaned_up(study: Study) -> None:
    for operations in range(8):
        file_system = DyingFileSystem()
        storage = ObjectStorage(file_system, f"/pruned-{operations}")
        for version, kind in ((1, "anchor"), (2, "delta"), (3, "anchor")):
            study.learn()
            publish(storage, study, version, kind)  # type: ignore[arg-type]
        retention = SnapshotRetention(storage, "hstu", anchors_kept=1, replica_timeout_ms=1_000)
        file_system.left = operations
        with pytest.raises(KeyboardInterrupt):
            retention.prune(0)
        file_system.left = 1_000
        for version in list_versions(storage, "hstu"):
            load_snapshot(storage, "hstu", version)
        retention.prune(0)
        assert {name.split("/")[1] for name in storage.find("hstu")} == {"current.json", "v00000003"}


@pytest.fixture
def cache(tmp_path: Path) -> FileCache:
    return FileCache(tmp_path / "cache", bytes_max=1 << 20)


def cached(cache: FileCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def test_files_that_were_fetched_are_not_fetched_again(
    storage: SnapshotStorage, study: Study, cache: FileCache
) -> None:
    fresh = everything(loaded(storage, study.recommender.config, 3, cache))
    assert len(cached(cache)) == 6
    for name in storage.find("hstu"):
        if name.endswith(".safetensors"):
            storage.remove_file(name)
    assert_same(everything(loaded(storage, study.recommender.config, 3, cache)), fresh)


def test_a_damaged_copy_is_fetched_again(storage: SnapshotStorage, study: Study, cache: FileCache) -> None:
    fresh = everything(loaded(storage, study.recommender.config, 3, cache))
    for number, path in enumerate(cached(cache)):
        content = path.read_bytes()
        path.write_bytes(content[:-1] if number % 2 else content[:-1] + bytes([content[-1] ^ 1]))
    assert_same(everything(loaded(storage, study.recommender.config, 3, cache)), fresh)
    assert all(len(path.read_bytes()) > 0 for path in cached(cache))
    load_snapshot(storage, "hstu", 3, cache=cache)


def test_copies_take_no_more_room_than_they_may(storage: SnapshotStorage, study: Study, tmp_path: Path) -> None:
    sizes = [entry.size for version in (1, 2, 3) for entry in read_manifest(storage, "hstu", version).files.values()]
    small = FileCache(tmp_path / "cache", bytes_max=sum(sizes[-2:]))
    loaded(storage, study.recommender.config, 3, small)
    assert sum(path.stat().st_size for path in cached(small)) <= sum(sizes[-2:])
    assert {path.name for path in cached(small)} == {e.sha256 for e in read_manifest(storage, "hstu", 3).files.values()}
    nothing = FileCache(tmp_path / "none", bytes_max=1)
    loaded(storage, study.recommender.config, 3, nothing)
    assert not nothing.folder.exists()


def test_a_folder_that_takes_no_copies_is_complained_of_once(
    storage: SnapshotStorage, study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    loaded(storage, study.recommender.config, 3, FileCache(tmp_path / "file" / "cache", bytes_max=1 << 20))
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "snapshots are fetched again after a restart"
    ]
