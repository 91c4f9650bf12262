from __future__ import annotations

import socket
from pathlib import Path

import pytest

from feature_store.config import FeatureStoreConfig
from model.ranking_settings import RankingSettings
from online_trainer.upstream_settings import UpstreamDaemonConfig
from ops.config import HeadraceConfig
from ops.demo.plan import HOST, DemoError, DemoOptions, choose_ports, prepare, sole_use
from ops.settings import FILE_VARIABLE, load
from serving.config import ServingConfig
from stream.kafka import KafkaConfig


def test_ports_are_all_different_and_a_taken_one_is_replaced() -> None:
    with socket.create_server((HOST, 0)):
        pass
    try:
        holder = socket.create_server((HOST, 8080))
    except OSError:
        holder = None  # somebody else holds it, which serves as well
    try:
        ports = choose_ports()
    finally:
        if holder is not None:
            holder.close()
    used = [*ports.serving, ports.broker, ports.ingest, ports.trainer]
    assert len(set(used)) == 5
    assert 8080 not in used


def test_a_run_gets_an_empty_directory_settings_of_its_own_and_keeps_the_last_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_LOG__BOOTSTRAP_SERVERS", "kafka.somebody.example:9092")
    options = DemoOptions(data_dir=tmp_path / "demo", free_bytes_min=1)
    with sole_use(options):
        options.run_dir.mkdir()
        (options.run_dir / "old").touch()
        options.summary_path.write_text("{}")
        plan = prepare(options)
    assert [path.name for path in options.run_dir.iterdir()] == ["headrace.toml"]
    assert options.summary_path.with_name("summary.previous.json").read_text() == "{}"
    assert plan.settings.get(HeadraceConfig).mode == "replay"
    assert plan.settings.get(KafkaConfig).bootstrap_servers == f"127.0.0.1:{plan.ports.broker}"
    for child in plan.children:
        seen = load(Path(child.environment[FILE_VARIABLE]), environment=child.environment)
        assert seen.get(FeatureStoreConfig).url == plan.settings.get(FeatureStoreConfig).url
        assert seen.get(KafkaConfig).log_id == plan.settings.get(KafkaConfig).log_id
    assert [child.command[-1] for child in plan.children[2:]] == [str(port) for port in plan.ports.serving]
    assert plan.settings.get(ServingConfig).num_threads == 1


def test_with_upstream_its_daemon_runs_and_everybody_knows_of_it(tmp_path: Path) -> None:
    options = DemoOptions(data_dir=tmp_path / "demo", free_bytes_min=1, has_upstream=True)
    with sole_use(options):
        plan = prepare(options)
    assert [child.name for child in plan.children[:3]] == ["ingest", "trainer", "upstream"]
    for child in plan.children:
        seen = load(Path(child.environment[FILE_VARIABLE]), environment=child.environment)
        assert seen.get(UpstreamDaemonConfig).is_on
        assert (seen.get(RankingSettings).kind, seen.get(RankingSettings).tasks) == ("llatte", ("value>=8",))
        assert seen.get(HeadraceConfig).upstream_port == plan.ports.upstream


def test_every_run_has_a_log_of_its_own(tmp_path: Path) -> None:
    options = DemoOptions(data_dir=tmp_path / "demo", free_bytes_min=1)
    with sole_use(options):
        ids = {prepare(options).settings.get(KafkaConfig).log_id for _ in range(2)}
    assert len(ids) == 2


def test_too_little_disk_is_said_before_anything_is_touched(tmp_path: Path) -> None:
    options = DemoOptions(data_dir=tmp_path / "demo", free_bytes_min=1 << 60)
    with sole_use(options), pytest.raises(DemoError, match=r"GB free and the demo needs .* --data-dir"):
        prepare(options)


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    options = DemoOptions(data_dir=tmp_path / "demo")
    with sole_use(options), pytest.raises(DemoError, match="another demo runs in"), sole_use(options):
        pass
    with sole_use(options):
        pass


def test_a_folder_with_other_peoples_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DemoError, match="files that are not the demo's"), sole_use(DemoOptions(data_dir=tmp_path)):
        pass
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("minutes", [0.0, 0.5, 601.0, float("nan")])
def test_a_length_that_cannot_work_is_refused(minutes: float) -> None:
    with pytest.raises(DemoError, match="--minutes"):
        DemoOptions(minutes=minutes)
