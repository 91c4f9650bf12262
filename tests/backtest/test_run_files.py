"""A run's folder: what the engine writes is what reports read, and interrupted parts come again."""

from __future__ import annotations

from pathlib import Path

import pytest

from backtest.errors import RunFolderError
from backtest.run_files import ArmCosts, ArmInfo, RunFolder, RunManifest, RunWriter, write_manifest
from model.ranking import MISS_RANK


def _manifest(num_parts: int) -> RunManifest:
    return RunManifest(
        name="small",
        is_complete=True,
        created_at="2026-01-01T00:00:00Z",
        config={"seed": 1},
        lineage={},
        seed=1,
        arms=[ArmInfo(name="online", kind="online", title="Online", publish_every_ms=0)],
        costs={"online": ArmCosts(cpu_s=1.5)},
        num_parts=num_parts,
    )


def _add(writer: RunWriter, events: list[int]) -> None:
    count = len(events)
    writer.add_queries(
        event=events, event_time_ms=events, user_id=[1] * count, item_id=[2] * count, item_kind=[2] * count,
        user_kind=[0] * count,
    )  # fmt: skip
    writer.add_ranks(
        "online", event=events, rank=[MISS_RANK] * count, num_candidates=[9] * count, version=[-1] * count,
        weights_age_ms=[None] * count, history_age_ms=[5] * count,
    )  # fmt: skip


def test_what_was_written_is_read_in_the_order_of_the_events(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    _add(writer, [3, 1])
    assert writer.end_part() == 1
    _add(writer, [7])
    write_manifest(tmp_path, _manifest(writer.end_part()))
    run = RunFolder.open(tmp_path)
    assert run.manifest == _manifest(2)
    assert run.queries().collect()["event"].to_list() == [1, 3, 7]
    ranks = run.ranks("online").collect()
    assert ranks["event"].to_list() == [1, 3, 7]
    assert ranks["rank"].to_list() == [MISS_RANK] * 3
    assert ranks["weights_age_ms"].to_list() == [None] * 3
    assert run.lists("online").collect().is_empty()


def test_parts_after_the_last_checkpoint_are_written_again(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    _add(writer, [1])
    writer.end_part()
    _add(writer, [2])
    writer.end_part()
    again = RunWriter(tmp_path, num_parts=1)
    _add(again, [3])
    write_manifest(tmp_path, _manifest(again.end_part()))
    assert RunFolder.open(tmp_path).queries().collect()["event"].to_list() == [1, 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no run"),
        ("{", "cannot be read"),
        ('{"schema": 99}', "schema 99"),
        ("[]", "no account"),
        ('{"schema": 1}', "no account"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=said):
        RunFolder.open(tmp_path)
