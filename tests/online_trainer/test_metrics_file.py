"""The metrics of a run survive crashes: no row lost that a checkpoint covers, none twice, readable at any moment."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from feature_store.store import FeatureStore
from model.disk import Disk
from online_trainer import metrics_file
from online_trainer.learner import OnlineLearner
from online_trainer.metrics_file import SCHEMA, MetricsFile, parts
from tests.online_trainer.conftest import RecordedStream, record_stream, walks


class DyingDisk(Disk):
    """A disk whose process is killed just before its n-th operation, or halfway through it if it is a write."""

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
        if self.left == 0:
            path.write_bytes(content[: len(content) // 2])
        self._live()
        super().write(path, content)

    def sync_dir(self, path: Path) -> None:
        self._live()
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._live()
        super().rename(source, target)

    def remove_file(self, path: Path) -> None:
        self._live()
        super().remove_file(path)


def add(file: MetricsFile, *steps: int) -> None:
    for step in steps:
        file.add(step=step, interactions=step * 10, watermark_ms=step, values={"a": step / 2, "b": -1.0})


def read(root: Path, run: str = "r0001") -> pl.DataFrame:
    return (
        pl.read_parquet(root / run / "*.parquet", schema=SCHEMA) if parts(root / run) else pl.DataFrame(schema=SCHEMA)
    )


def steps_of(root: Path, run: str = "r0001") -> list[int]:
    rows = read(root, run)
    assert not rows.select("step", "name").is_duplicated().any()
    return rows["step"].unique(maintain_order=True).to_list()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "VALUES_PER_PART", 6)


def test_rows_say_what_was_added(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, keep_parts=10)
    file.begin(0)
    add(file, 20, 40)
    assert steps_of(tmp_path) == []
    file.flush()
    assert read(tmp_path).rows() == [
        (20, 200, 20, "a", 10.0),
        (20, 200, 20, "b", -1.0),
        (40, 400, 40, "a", 20.0),
        (40, 400, 40, "b", -1.0),
    ]


@pytest.mark.usefixtures("small_parts")
def test_parts_grow_until_they_are_full_and_the_oldest_are_deleted(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, keep_parts=2)
    run = file.begin(0)
    for step in range(1, 10):
        add(file, step)
        file.flush()
        file.flush()
    assert [part.name for part in parts(run)] == ["p0000000004.parquet", "p0000000007.parquet"]
    assert steps_of(tmp_path) == [4, 5, 6, 7, 8, 9]


@pytest.mark.usefixtures("small_parts")
def test_rows_that_come_while_a_part_is_written_are_in_the_next_flush(tmp_path: Path) -> None:
    class SlowDisk(Disk):
        step = 3

        def write(self, path: Path, content: bytes) -> None:
            self.step += 1
            add(file, self.step)
            super().write(path, content)

    file = MetricsFile(tmp_path, keep_parts=100, disk=SlowDisk())
    file.begin(0)
    add(file, 1, 2, 3)
    for _ in range(5):
        file.flush()
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_without_new_rows_nothing_is_written(tmp_path: Path) -> None:
    disk = DyingDisk(operations=100)
    file = MetricsFile(tmp_path, keep_parts=10, disk=disk)
    file.begin(0)
    file.flush()
    assert disk.left == 100
    add(file, 1)
    file.flush()
    left = disk.left
    file.flush()
    assert disk.left == left < 100


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("resumed_after", range(1, 13))
def test_a_resumed_run_repeats_no_step_and_misses_none(tmp_path: Path, resumed_after: int) -> None:
    file = MetricsFile(tmp_path, keep_parts=100)
    file.begin(0)
    for step in range(1, 12):
        add(file, step)
        if step in {2, 3, 7, 11}:
            file.flush()
    again = MetricsFile(tmp_path, keep_parts=100)
    again.begin(resumed_after)
    assert steps_of(tmp_path) == list(range(1, min(resumed_after, 11) + 1))
    add(again, *range(resumed_after + 1, 16))
    again.flush()
    assert steps_of(tmp_path) == [step for step in range(1, 16) if step <= 11 or step > resumed_after]


def test_without_a_checkpoint_another_run_begins_and_the_earlier_one_stays(tmp_path: Path) -> None:
    for number in (1, 2):
        file = MetricsFile(tmp_path, keep_parts=10)
        # A start that writes nothing leaves nothing behind.
        assert file.begin(0) == MetricsFile(tmp_path, keep_parts=10).begin(0)
        add(file, number)
        file.flush()
    assert (steps_of(tmp_path, "r0001"), steps_of(tmp_path, "r0002")) == ([1], [2])
    assert MetricsFile(tmp_path, keep_parts=10).begin(1).name == "r0002"


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("operations", range(14))
def test_killed_at_any_operation_what_is_read_is_whole_and_the_rest_comes_again(
    tmp_path: Path, operations: int
) -> None:
    file = MetricsFile(tmp_path, keep_parts=100)
    file.begin(0)
    add(file, 1, 2)
    file.flush()
    dying = MetricsFile(tmp_path, keep_parts=100, disk=DyingDisk(operations=operations))

    def go_on() -> None:
        dying.begin(1)
        for step in range(2, 10):
            add(dying, step)
            dying.flush()
            assert steps_of(tmp_path) == list(range(1, step + 1))

    with pytest.raises(KeyboardInterrupt):
        go_on()
    found = steps_of(tmp_path)
    assert found == list(range(1, len(found) + 1))
    again = MetricsFile(tmp_path, keep_parts=100)
    again.begin(1)
    add(again, *range(2, 10))
    again.flush()
    assert steps_of(tmp_path) == list(range(1, 10))
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_disk_that_is_full_for_a_while_costs_no_row(tmp_path: Path) -> None:
    class FullDisk(Disk):
        is_full = True

        def write(self, path: Path, content: bytes) -> None:
            if self.is_full:
                raise OSError(28, "No space left on device")
            super().write(path, content)

    disk = FullDisk()
    file = MetricsFile(tmp_path, keep_parts=10, disk=disk)
    file.begin(0)
    add(file, 1)
    with pytest.raises(OSError, match="No space"):
        file.flush()
    add(file, 2)
    disk.is_full = False
    file.flush()
    assert steps_of(tmp_path) == [1, 2]


def test_while_nothing_can_be_written_memory_is_bounded_and_what_is_given_up_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics_file, "_VALUES_WAITING_MAX", 6)
    file = MetricsFile(tmp_path, keep_parts=10)
    file.begin(0)
    add(file, 1, 2, 3, 4, 5)
    file.flush()
    assert steps_of(tmp_path) == [3, 4, 5]
    assert "step 1" in caplog.text
    assert "step 2" in caplog.text


@pytest.mark.usefixtures("small_parts")
def test_a_damaged_part_is_set_aside_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path, keep_parts=10)
    run = file.begin(0)
    for step in range(1, 6):
        add(file, step)
        file.flush()
    parts(run)[-1].write_bytes(b"PAR1 no more PAR1")
    MetricsFile(tmp_path, keep_parts=10).begin(5)
    assert steps_of(tmp_path) == [1, 2, 3]
    assert "p0000000004.parquet" in caplog.text


def learn(stream: RecordedStream, learner: OnlineLearner, file: MetricsFile, *, up_to: int) -> None:
    batcher = stream.batcher(learner)
    while learner.ledger.num_steps < up_to and (batch := batcher.take()):
        learner.step(batch)
        file.add(
            step=learner.ledger.num_steps,
            interactions=learner.ledger.num_interactions,
            watermark_ms=learner.ledger.watermark_ms,
            values=learner.evaluation.detailed(),
        )


def test_after_a_crash_and_a_resume_the_rows_are_those_of_an_unbroken_run(store: FeatureStore, tmp_path: Path) -> None:
    stream = record_stream(store, walks(300))
    unbroken = MetricsFile(tmp_path / "unbroken", keep_parts=10)
    unbroken.begin(0)
    learn(stream, stream.learner(), unbroken, up_to=15)
    unbroken.flush()
    learner, file = stream.learner(), MetricsFile(tmp_path / "broken", keep_parts=10)
    file.begin(0)
    learn(stream, learner, file, up_to=6)
    file.flush()
    checkpoint = learner.capture_checkpoint()
    # Rows behind the checkpoint get to disk, others not: then the process is killed.
    learn(stream, learner, file, up_to=9)
    file.flush()
    learn(stream, learner, file, up_to=11)
    resumed, continued = stream.learner(), MetricsFile(tmp_path / "broken", keep_parts=10)
    resumed.load_checkpoint(checkpoint)
    continued.begin(resumed.ledger.num_steps)
    learn(stream, resumed, continued, up_to=15)
    continued.flush()
    rows = read(tmp_path / "unbroken")
    assert rows["step"].unique().to_list() == list(range(1, 16))
    assert read(tmp_path / "broken").equals(rows)
