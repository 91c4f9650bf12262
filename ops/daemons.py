"""Composes each daemon from the settings: what it is made of, its probes, its way to stop. No logic of its own."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.errors import StoreUnavailableError
from feature_store.store import FeatureStore
from ops import telemetry
from ops.config import HeadraceConfig
from ops.errors import SettingsError
from ops.probes import Probes, ProbeServer, Readiness
from ops.settings import Settings
from ops.telemetry_config import TelemetryConfig
from stream.clock import WallClock
from stream.kafka import KafkaConfig, KafkaLog

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.upstream_config import UpstreamModelConfig
    from stream.label_rules import Awaited

logger = logging.getLogger(__name__)

_STORE_RETRY_FIRST_S: Final = 0.2
_STORE_RETRY_MAX_S: Final = 5.0
_OBJECTS_BETWEEN_COLLECTIONS: Final = 200_000


def ingest(settings: Settings) -> int:
    """Run the ingest worker until it is told to stop; returns the exit code."""
    from stream.app import IngestService, StreamParts, build_app, run_worker
    from stream.events import EventRules
    from stream.ingest import IngestConfig
    from stream.label_rules import LabelConfig

    config = settings.get(HeadraceConfig)
    signals = telemetry.start(settings.get(TelemetryConfig), daemon="ingest", mode=config.mode)
    report = _Report()
    with report.served(config.probe_host, config.ingest_port, signals), _open_store(settings, report) as store:
        parts = StreamParts(
            kafka=_current_log(settings, store),
            rules=settings.get(EventRules),
            ingest=settings.get(IngestConfig),
            store=store,
            clock=WallClock(),
            data_dir=config.data_dir / "faust",
            mode=config.mode,
            labels=settings.get(LabelConfig),
            awaited=_awaited(settings),
        )
        service = IngestService(parts)
        _collect_rarely()
        report.of(service.ready, service.status)
        return run_worker(build_app(parts, service), service, log_level=config.log_level)


def _awaited(settings: Settings) -> Awaited:
    from model.ranking_settings import RankingSettings
    from ops.awaited_labels import awaited_by
    from stream.events import EventRules

    with _refusing():
        return awaited_by(settings.get(RankingSettings), settings.get(EventRules).actions)


def train(settings: Settings) -> int:
    """Run the trainer until it is told to stop; returns the exit code."""
    from kernels.host_memory import keep_freed_memory
    from model.config import LossConfig, OptimizerConfig
    from model.ranking_settings import RankingSettings
    from online_trainer.config import ItemsConfig, TrainerConfig
    from online_trainer.daemon import TrainerDaemon
    from online_trainer.drift_config import DriftConfig
    from online_trainer.parts import TrainerParts
    from online_trainer.upstream_settings import UpstreamDaemonConfig
    from ops.snapshot_store import snapshot_storage
    from stream.events import EventRules

    config, model_config = settings.get(HeadraceConfig), _model_config(settings)
    keep_freed_memory()
    signals = telemetry.start(settings.get(TelemetryConfig), daemon="trainer", mode=config.mode)
    report = _Report()
    with report.served(config.probe_host, config.trainer_port, signals), _open_store(settings, report) as store:
        with _refusing():
            daemon = TrainerDaemon(
                TrainerParts(
                    config=settings.get(TrainerConfig),
                    items_config=settings.get(ItemsConfig),
                    model_config=model_config,
                    ranking=settings.get(RankingSettings),
                    loss_config=settings.get(LossConfig),
                    optimizer_config=settings.get(OptimizerConfig),
                    drift_config=settings.get(DriftConfig),
                    actions=settings.get(EventRules).actions,
                    model_name=config.model,
                    log=KafkaLog(_current_log(settings, store)),
                    store=store,
                    hot_config=settings.get(HotHistoriesConfig),
                    snapshot_root=snapshot_storage(settings),
                    checkpoint_root=config.data_dir / "checkpoints" / config.model,
                    quarantine_root=config.quarantine_dir,
                    metrics_root=config.data_dir / "metrics" / config.model,
                    clock=WallClock(),
                    mode=config.mode,
                    reads_vectors=settings.get(UpstreamDaemonConfig).is_on,
                )
            )
        report.of(daemon.ready, daemon.status)
        asyncio.run(_until_told_to_stop(daemon.run))
    return 0


def upstream(settings: Settings) -> int:
    """Run the upstream daemon until it is told to stop; returns the exit code."""
    from feature_store.config import UserVectorsConfig
    from kernels.host_memory import keep_freed_memory
    from model.ranking_settings import RankingSettings
    from online_trainer.config import ItemsConfig
    from online_trainer.upstream_daemon import UpstreamDaemon
    from online_trainer.upstream_parts import UpstreamParts
    from online_trainer.upstream_settings import UpstreamDaemonConfig
    from ops.snapshot_store import snapshot_storage
    from stream.events import EventRules

    config = settings.get(HeadraceConfig)
    keep_freed_memory()
    model_config = _upstream_model_config(settings)
    signals = telemetry.start(settings.get(TelemetryConfig), daemon="upstream", mode=config.mode)
    report = _Report()
    with report.served(config.probe_host, config.upstream_port, signals), _open_store(settings, report) as store:
        with _refusing():
            daemon = UpstreamDaemon(
                UpstreamParts(
                    config=settings.get(UpstreamDaemonConfig),
                    model_config=model_config,
                    model_name=config.model,
                    log=KafkaLog(_current_log(settings, store)),
                    store=store,
                    snapshot_root=snapshot_storage(settings),
                    checkpoint_root=config.data_dir / "checkpoints" / f"{config.model}-upstream",
                    clock=WallClock(),
                    mode=config.mode,
                    actions=settings.get(EventRules).actions,
                    vectors=settings.get(UserVectorsConfig),
                    ranking=settings.get(RankingSettings),
                    items=settings.get(ItemsConfig),
                )
            )
        report.of(daemon.ready, daemon.status)
        asyncio.run(_until_told_to_stop(daemon.run))
    return 0


def _upstream_model_config(settings: Settings) -> UpstreamModelConfig:
    from model.ranking_model import upstream_model_config
    from model.ranking_settings import RankingSettings
    from model.upstream_config import UpstreamConfig
    from stream.events import EventRules

    with _refusing():
        return upstream_model_config(
            settings.get(UpstreamConfig), settings.get(RankingSettings), settings.get(EventRules).actions
        )


def _model_config(settings: Settings) -> ModelConfig:
    """Of the model with its ranking head, if it has one. SettingsError for what it could not learn or answer with."""
    from model.config import ModelConfig
    from model.llatte_config import LlatteSettings
    from model.ranking_model import with_ranking_head
    from model.ranking_settings import RankingSettings
    from model.upstream_config import UpstreamConfig
    from stream.events import EventRules

    model, hot = settings.get(ModelConfig), settings.get(HotHistoriesConfig)
    if model.max_len >= hot.max_len:
        raise SettingsError(
            f"model.max_len = {model.max_len} and hot.max_len = {hot.max_len}: a step reads one interaction more than "
            f"the model; set hot.max_len to at least {model.max_len + 1}"
        )
    with _refusing():
        return with_ranking_head(
            model,
            settings.get(RankingSettings),
            settings.get(EventRules).actions,
            settings.get(LlatteSettings),
            upstream_width=settings.get(UpstreamConfig).width,
        )


def serve(settings: Settings, port: int) -> int:
    """Run one inference worker until it is told to stop; returns the exit code.

    It starts without broker, database and weights, and says on /readyz what it waits for.
    """
    from feature_store.config import UserVectorsConfig
    from model.ranking_settings import RankingSettings
    from model.storage import LocalStorage
    from online_trainer.upstream_settings import UpstreamDaemonConfig
    from ops.snapshot_store import snapshot_storage
    from serving.access_config import AccessConfig
    from serving.config import ServingConfig
    from serving.daemon import run_worker
    from serving.guard_config import GuardConfig
    from serving.parts import ServingParts
    from stream.events import EventRules

    config = settings.get(HeadraceConfig)
    signals = telemetry.start(settings.get(TelemetryConfig), daemon="serving", mode=config.mode)
    snapshots = snapshot_storage(settings)
    store = FeatureStore(settings.get(FeatureStoreConfig))
    parts = ServingParts(
        config=replace(settings.get(ServingConfig), port=port),
        model_config=_model_config(settings),
        ranking=settings.get(RankingSettings),
        model_name=config.model,
        snapshot_root=snapshots,
        guards=settings.get(GuardConfig),
        access=settings.get(AccessConfig),
        snapshot_cache=None if isinstance(snapshots, LocalStorage) else config.data_dir / "snapshot-cache",
        log=KafkaLog(settings.get(KafkaConfig)),
        store=store,
        hot_config=settings.get(HotHistoriesConfig),
        rules=settings.get(EventRules),
        vectors=settings.get(UserVectorsConfig),
        reads_vectors=settings.get(UpstreamDaemonConfig).is_on,
        clock=WallClock(),
        mode=config.mode,
        replica=f"{socket.gethostname()}:{port}",
        metrics_text=signals.metrics_text,
    )
    try:
        return run_worker(parts)
    finally:
        store.close()
        signals.shutdown()


@contextmanager
def _refusing() -> Iterator[None]:
    """Settings that do not go together, or ask for what is not installed, are one sentence and not tried again."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _current_log(settings: Settings, store: FeatureStore) -> KafkaConfig:
    """The broker's settings, under the name that the log's positions have now."""
    kafka = settings.get(KafkaConfig)
    return replace(kafka, log_id=store.current_log_id(kafka.log_id))


def _collect_rarely() -> None:
    """Let the cycle collector run once in many records, not once in 700 objects.

    A poll makes a hundred thousand objects that live until its commit and are in no cycle; looking at them again and
    again took a third of ingest's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 20, 20)


async def _until_told_to_stop(run: Callable[[asyncio.Event], Any]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await run(stopping)


class _Report:
    """What the probes answer: at first what the start waits for, then what the daemon says of itself."""

    def __init__(self) -> None:
        self.waiting_for = "starting"
        self._ready: Callable[[], tuple[bool, str]] = lambda: (False, self.waiting_for)
        self._status: Callable[[], Mapping[str, Any]] = dict

    def of(self, ready: Callable[[], tuple[bool, str]], status: Callable[[], Mapping[str, Any]]) -> None:
        """From now on the daemon answers."""
        self._ready, self._status = ready, status

    def _readiness(self) -> Readiness:
        return Readiness(*self._ready())

    def _current_status(self) -> Mapping[str, Any]:
        return self._status()

    @contextmanager
    def served(self, host: str, port: int, signals: telemetry.Telemetry) -> Iterator[None]:
        """Answer the probes for as long as the block runs, and end telemetry with it."""
        probes = Probes(
            is_alive=lambda: True,
            readiness=self._readiness,
            metrics=signals.metrics_text,
            status=self._current_status,
        )
        try:
            with ProbeServer(probes, host=host, port=port):
                yield
        finally:
            signals.shutdown()


@contextmanager
def _open_store(settings: Settings, report: _Report) -> Iterator[FeatureStore]:
    """The feature store, once it answers. Raises SchemaRevisionError."""
    store, delay_s = FeatureStore(settings.get(FeatureStoreConfig)), _STORE_RETRY_FIRST_S
    try:
        while True:
            try:
                store.require_current_schema()
                break
            except StoreUnavailableError as error:
                report.waiting_for = str(error)
                logger.warning("%s; trying again in %.1f s", error, delay_s)
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, _STORE_RETRY_MAX_S)
        yield store
    finally:
        store.close()
