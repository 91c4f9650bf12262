"""`headrace snapshots`: what is there, whether it is whole, and workers that go where they are sent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from model.retention import ReplicaLease, write_lease
from model.snapshot import list_versions, read_manifest, read_pointer
from online_trainer.gate import HeldEpisode, write_held
from ops.cli import app
from ops.errors import OpsError
from ops.settings_template import template
from ops.snapshot_report import age_text, manifest_text, read_listing
from tests.serving.building import Publisher, ages, flip_last_byte

NAME = "hstu"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Versions 1 to 4: two anchors with a delta each."""
    root = tmp_path / "snapshots"
    publisher = Publisher(root)
    for version in range(1, 5):
        publisher.learn([*range(10)])
        metrics = {"model.window.ndcg_at_20": 0.1 * version, "popularity.window.ndcg_at_20": 0.05}
        publisher.publish("anchor" if version % 2 else "delta", metrics=metrics, event_age=ages(10, 2_000))
    return root


@pytest.fixture
def run(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in {
        "HEADRACE_HEADRACE__DATA_DIR": str(tmp_path),
        "HEADRACE_HEADRACE__MODEL": NAME,
        # Nobody listens there.
        "HEADRACE_LOG__BOOTSTRAP_SERVERS": "127.0.0.1:9",
        "HEADRACE_LOG__REQUEST_TIMEOUT_MS": "1000",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["snapshots", *arguments])

    return run


def pointed_at(root: Path) -> int:
    pointer = read_pointer(root, NAME)
    assert pointer is not None
    return pointer.version


def test_ls_prints_a_row_per_version_with_its_marks(root: Path, run: Any) -> None:
    write_lease(root, NAME, ReplicaLease(replica="host:8080", version=2, loading=4, at_ms=1))
    held = HeldEpisode(
        since_ms=0,
        last_ms=60_000,
        num_attempts=12,
        version=5,
        num_interactions=9,
        reason="baseline",
        sentence="windowed ndcg_at_20 is 0.0100, below 0.5 times popularity's 0.1000",
        evidence={"value": 0.01},
    )
    write_held(root, NAME, [held])
    lines = run("ls").stdout.splitlines()
    assert lines[0].split() == [
        *("version", "kind", "parent", "bytes", "age", "items", "interactions", "ndcg@20", "popular"),
    ]
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["1", "anchor", "-"],
        ["2", "delta", "1"],
        ["3", "anchor", "-"],
        ["4", "delta", "3"],
    ]
    assert lines[2].endswith("0.2000   0.0500  run by host:8080")
    assert lines[4].endswith("0.4000   0.0500  current; being loaded by host:8080")
    assert lines[5] == (
        "held back 1970-01-01T00:00:00.000Z to 1970-01-01T00:01:00.000Z, 12 times: windowed ndcg_at_20 is 0.0100, "
        "below 0.5 times popularity's 0.1000; not published since, version 5 is due"
    )
    listed = json.loads(run("ls", "--json").stdout)
    assert [one["version"] for one in listed["versions"]] == [1, 2, 3, 4]
    assert (listed["current"], listed["pinned"], listed["held"][0]["num_attempts"]) == (4, None, 12)


def test_ls_of_nothing_says_where_it_looked(tmp_path: Path) -> None:
    text = read_listing(tmp_path / "empty", NAME).to_text(now_ms=0)
    assert text == f"nothing is published in {tmp_path}/empty/hstu"


def test_show_prints_the_manifest(root: Path, run: Any) -> None:
    shown = run("show", "2").stdout
    assert "version" in shown
    assert "2, delta on version 1" in shown
    assert "2 newly inside, p50 10 ms, p99 2" in shown
    assert read_manifest(root, NAME, 2).files["rows.safetensors"].sha256 in shown
    assert json.loads(run("show", "2", "--json").stdout)["parent"] == 1
    missing = run("show", "9")
    assert isinstance(missing.exception, OpsError)
    assert "there is no snapshot" in str(missing.exception)


def test_show_says_how_many_labels_the_ranking_head_has_learned_from(root: Path) -> None:
    manifest = read_manifest(root, NAME, 2)
    assert "labels" not in manifest_text(manifest)
    learned = replace(manifest, lineage=replace(manifest.lineage, num_labels=12_345))
    assert "12,345 labels by the ranking head" in manifest_text(learned)


def test_verify_finds_what_is_damaged_and_what_builds_on_it(root: Path, run: Any) -> None:
    whole = run("verify")
    assert (whole.exit_code, whole.stdout.splitlines()[-1].endswith("bytes: nothing is wrong")) == (0, True)
    flip_last_byte(root / NAME / "v00000003" / "rows.safetensors")
    (root / NAME / "v00000001" / "READY").unlink()
    damaged = run("verify")
    assert damaged.exit_code == 1
    findings = damaged.stdout.splitlines()
    assert "another sha256" in findings[1]
    assert [line.split(":")[0] for line in findings[:2]] == ["version 2", "version 3"]
    assert run("verify", "2").exit_code == 1
    (root / NAME / "v00000004" / "manifest.json").write_text("{}")
    listed = run("ls").stdout
    assert "version 4 is damaged" in listed
    pointer = json.loads(run("verify", "--json").stdout)
    assert any(finding.startswith("pointer:") for finding in pointer["findings"])


def test_rollback_moves_the_pointer_and_says_what_comes_next(root: Path, run: Any) -> None:
    ran = run("rollback", "2")
    assert ran.exit_code == 0
    assert "workers go to version 2; what the trainer publishes next supersedes it" in ran.stdout
    assert "not announced, workers find it within serving.snapshot_poll_ms" in ran.stderr
    assert pointed_at(root) == 2
    assert list_versions(root, NAME) == [1, 2, 3, 4]


def test_pin_and_unpin(root: Path, run: Any) -> None:
    assert run("unpin").stdout == "nothing was pinned\n"
    assert "stay there until" in run("pin", "1").stdout
    assert pointed_at(root) == 1
    refused = run("rollback", "2")
    assert isinstance(refused.exception, OpsError)
    assert "pinned to version 1" in str(refused.exception)
    assert "current; pinned" in run("ls").stdout
    assert "workers go to version 4" in run("unpin").stdout
    assert pointed_at(root) == 4


def test_a_candidate_is_offered_promoted_and_withdrawn(root: Path, run: Any) -> None:
    assert run("withdraw").stdout == "there was no candidate\n"
    assert isinstance(run("promote").exception, OpsError)
    assert run("pin", "1").exit_code == 0
    assert "canary workers go to version 3" in run("candidate", "3").stdout
    assert pointed_at(root) == 1
    assert run("ls").stdout.splitlines()[3].endswith("candidate")
    assert json.loads(run("ls", "--json").stdout)["candidate"] == 3
    assert "all workers go to version 3" in run("promote").stdout
    assert pointed_at(root) == 3
    assert run("ls").stdout.splitlines()[3].endswith("current; pinned")
    assert run("candidate", "2").exit_code == 0
    assert run("withdraw").stdout == "version 2 is no candidate any more\n"
    assert isinstance(run("candidate", "9").exception, OpsError)


def test_going_to_a_damaged_version_is_refused(root: Path, run: Any) -> None:
    flip_last_byte(root / NAME / "v00000001" / "dense.safetensors")
    for command in ("rollback", "pin"):
        refused = run(command, "2")
        assert isinstance(refused.exception, OpsError)
        assert "another sha256" in str(refused.exception)
    assert pointed_at(root) == 4


def test_a_root_that_cannot_be_used_is_one_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_HEADRACE__SNAPSHOT_ROOT", "nonsense://bucket")
    refused = run("ls")
    assert isinstance(refused.exception, OpsError)
    assert str(refused.exception).startswith("headrace.snapshot_root = 'nonsense://bucket' cannot be used")


@pytest.mark.parametrize(
    ("age_ms", "text"),
    [(5, "5 ms"), (90_000, "90 s"), (600_000, "10 min"), (86_400_000, "24 h"), (864_000_000, "10 d"), (-50, "-50 ms")],
)
def test_ages_are_readable(age_ms: int, text: str) -> None:
    assert age_text(age_ms) == text


def test_the_settings_of_snapshots_are_in_the_template() -> None:
    assert 'snapshot_root = ""' in template()
