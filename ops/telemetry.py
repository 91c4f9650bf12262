"""The only place that touches the OpenTelemetry SDK: providers, exporters, and their orderly end.

Rooms call the OpenTelemetry API; without this module those calls do nothing. Where telemetry goes is decided by the
standard `OTEL_*` variables alone: an OTLP endpoint (`OTEL_EXPORTER_OTLP_ENDPOINT`, or one per signal) or
`OTEL_TRACES_EXPORTER=otlp` / `OTEL_METRICS_EXPORTER=otlp` turns export on. Without them nothing leaves the process and
nothing is logged; `/metrics` (Prometheus) is there always.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from opentelemetry import metrics, trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from ops.errors import SettingsError
from ops.telemetry_config import TelemetryConfig

METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# The SDK's default buckets suit neither: freshness runs from milliseconds to days, phases from 0.1 ms to a minute.
_BUCKETS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 3e4, 6e4, 3e5, 9e5, 3.6e6, 2.16e7, 8.64e7)
_BUCKETS_S: Final = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


@dataclass(frozen=True, slots=True)
class Exports:
    """Which signals leave the process over OTLP."""

    traces: bool
    metrics: bool
    traces_protocol: str
    metrics_protocol: str

    @staticmethod
    def of(environment: Mapping[str, str]) -> Exports:
        """Read the standard variables. Raises SettingsError for an exporter or a protocol we do not have."""
        is_disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
        return Exports(
            traces=not is_disabled and _wants_otlp("TRACES", environment),
            metrics=not is_disabled and _wants_otlp("METRICS", environment),
            traces_protocol=_protocol("TRACES", environment),
            metrics_protocol=_protocol("METRICS", environment),
        )


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The providers of one process."""

    meter_provider: MeterProvider
    tracer_provider: TracerProvider | None
    """None when traces go nowhere: the API then costs next to nothing."""

    _registry: CollectorRegistry
    _config: TelemetryConfig
    _is_over: threading.Event = field(default_factory=threading.Event)

    def metrics_text(self) -> bytes:
        """All metrics in the Prometheus text format (`METRICS_CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def shutdown(self) -> bool:
        """Send what is left, for at most `shutdown_timeout_ms`; whether that was enough. Once only."""
        if self._is_over.is_set():
            return True
        self._is_over.set()
        # Exporters retry an absent collector for longer than a stopping process may take, and take no deadline:
        # a daemon thread can be left behind.
        last = threading.Thread(target=self._shutdown_providers, name="telemetry-shutdown", daemon=True)
        last.start()
        last.join(self._config.shutdown_timeout_ms / 1000)
        return not last.is_alive()

    def _shutdown_providers(self) -> None:
        if self.tracer_provider is not None:
            self.tracer_provider.shutdown()
        self.meter_provider.shutdown(self._config.shutdown_timeout_ms)


def start(
    config: TelemetryConfig, *, daemon: str, mode: str, environment: Mapping[str, str] | None = None
) -> Telemetry:
    """Build this process's telemetry and make it the one that the OpenTelemetry API uses; once per process."""
    telemetry = build(config, daemon=daemon, mode=mode, environment=environment)
    metrics.set_meter_provider(telemetry.meter_provider)
    if telemetry.tracer_provider is not None:
        trace.set_tracer_provider(telemetry.tracer_provider)
    return telemetry


def build(
    config: TelemetryConfig, *, daemon: str, mode: str, environment: Mapping[str, str] | None = None
) -> Telemetry:
    """Build the providers without installing them. `daemon`: ingest, trainer or serving. `mode`: live or replay."""
    environment = os.environ if environment is None else environment
    exports = Exports.of(environment)
    resource = _resource(daemon, mode, environment)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    readers: list[MetricReader] = [PrometheusMetricReader(registry=registry)]
    if exports.metrics:
        exporter = _metric_exporter(exports.metrics_protocol, config)
        readers.append(
            PeriodicExportingMetricReader(
                exporter,
                export_interval_millis=config.metric_export_interval_ms,
                export_timeout_millis=config.export_timeout_ms,
            )
        )
    return Telemetry(
        MeterProvider(readers, resource, shutdown_on_exit=False, views=_views()),
        _tracer_provider(config, exports, resource, environment) if exports.traces else None,
        registry,
        config,
    )


def _resource(daemon: str, mode: str, environment: Mapping[str, str]) -> Resource:
    try:
        headrace_version = version("headrace")
    except PackageNotFoundError:
        headrace_version = "unknown"
    return Resource.create(
        {
            "service.name": environment.get("OTEL_SERVICE_NAME") or f"headrace-{daemon}",
            "service.version": headrace_version,
            "service.instance.id": f"{platform.node()}:{os.getpid()}",
            "headrace.mode": mode,
        }
    )


def _tracer_provider(
    config: TelemetryConfig, exports: Exports, resource: Resource, environment: Mapping[str, str]
) -> TracerProvider:
    # A sampler chosen by the standard variable wins over ours.
    sampler: Sampler | None = None
    if "OTEL_TRACES_SAMPLER" not in environment:
        sampler = ParentBased(TraceIdRatioBased(config.trace_share))
    provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
    exporter = _span_exporter(exports.traces_protocol, config)
    # Spans wait in a bounded queue and are sent by a thread; a full queue drops, it never blocks the caller.
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=config.queue_max,
            schedule_delay_millis=1_000,
            max_export_batch_size=min(512, config.queue_max),
        )
    )
    return provider


def _span_exporter(protocol: str, config: TelemetryConfig) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - 0.3 s

        return OTLPSpanExporter(timeout=config.export_timeout_ms / 1000)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http  # noqa: PLC0415 - only if used

    return over_http.OTLPSpanExporter(timeout=config.export_timeout_ms / 1000)


def _metric_exporter(protocol: str, config: TelemetryConfig) -> MetricExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter  # noqa: PLC0415 - 0.3 s

        return OTLPMetricExporter(timeout=config.export_timeout_ms / 1000)
    from opentelemetry.exporter.otlp.proto.http import metric_exporter as over_http  # noqa: PLC0415 - only if used

    return over_http.OTLPMetricExporter(timeout=config.export_timeout_ms / 1000)


def _views() -> list[View]:
    return [
        View(
            instrument_type=Histogram,
            instrument_unit=unit,
            aggregation=ExplicitBucketHistogramAggregation(buckets),
        )
        for unit, buckets in (("ms", _BUCKETS_MS), ("s", _BUCKETS_S))
    ]


def _wants_otlp(signal: str, environment: Mapping[str, str]) -> bool:
    variable = f"OTEL_{signal}_EXPORTER"
    named = {name.strip().lower() for name in environment.get(variable, "").split(",") if name.strip()}
    # /metrics is always there, so asking for it is fine and changes nothing.
    unknown = named - {"otlp", "none"} - ({"prometheus"} if signal == "METRICS" else set())
    if unknown:
        raise SettingsError(f"{variable} = {', '.join(sorted(unknown))}: use otlp or none")
    if named:
        return "otlp" in named
    return any(
        environment.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    )


def _protocol(signal: str, environment: Mapping[str, str]) -> str:
    variable = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    if not environment.get(variable):
        variable = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = environment.get(variable) or "http/protobuf"
    if protocol not in {"grpc", "http/protobuf"}:
        raise SettingsError(f"{variable} = {protocol}: use grpc or http/protobuf")
    return protocol
