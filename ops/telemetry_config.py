"""Settings of telemetry, apart from the SDK so that reading them does not load it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """What is measured and traced. Where it is sent is the standard OTEL_* variables' business."""

    trace_share: float = 1.0
    """Share of traces that are recorded (0 to 1) when a collector is configured; lower it at high event rates."""

    metric_export_interval_ms: int = 10_000
    """How often metrics go to the collector (ms). Prometheus reads /metrics at its own pace."""

    queue_max: int = 8_192
    """Finished spans kept for the exporter; further ones are dropped, so that a slow collector never slows the path."""

    export_timeout_ms: int = 2_000
    """A collector that does not answer within this time (ms) loses that batch."""

    shutdown_timeout_ms: int = 2_000
    """Time (ms) a stopping process spends on sending what is left."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.trace_share <= 1.0:
            raise ValueError(f"telemetry.trace_share = {self.trace_share}: must lie between 0 and 1")
        for name in ("metric_export_interval_ms", "queue_max", "export_timeout_ms", "shutdown_timeout_ms"):
            if getattr(self, name) < 1:
                raise ValueError(f"telemetry.{name} = {getattr(self, name)}: must be at least 1")
