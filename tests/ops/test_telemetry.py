"""Telemetry: silent unless the standard variables ask for it, always on /metrics, never in the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from opentelemetry.trace import Link, SpanKind, format_span_id

from ops.errors import SettingsError
from ops.telemetry import Exports, build
from ops.telemetry_config import TelemetryConfig
from tests.ops.otlp_receiver import OtlpReceiver


@pytest.mark.parametrize(
    ("environment", "traces", "metrics"),
    [
        ({}, False, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318"}, True, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_METRICS_EXPORTER": "none"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_METRICS_EXPORTER": "prometheus"}, True, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False, False),
    ],
)
def test_the_standard_variables_alone_turn_export_on(environment: dict[str, str], traces: bool, metrics: bool) -> None:
    exports = Exports.of(environment)
    assert (exports.traces, exports.metrics) == (traces, metrics)


@pytest.mark.parametrize(
    "environment", [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}]
)
def test_what_we_cannot_do_is_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(environment))):
        Exports.of(environment)


def test_metrics_are_readable_without_any_exporter() -> None:
    telemetry = build(TelemetryConfig(), daemon="ingest", mode="replay", environment={})
    assert telemetry.tracer_provider is None
    ages = telemetry.meter_provider.get_meter("test").create_histogram("headrace.some.age", unit="ms")
    ages.record(1_500.0, {"headrace.hop": "F1"})
    text = telemetry.metrics_text().decode()
    assert telemetry.shutdown()
    assert 'headrace_mode="replay"' in text
    assert 'service_name="headrace-ingest"' in text
    below, above = (
        next(line for line in text.splitlines() if line.startswith("headrace_some_age") and f'le="{le}"' in line)
        for le in ("1000.0", "2000.0")
    )
    assert below.endswith(" 0.0")
    assert above.endswith(" 1.0")


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_links_instruments_and_exemplars_reach_the_collector(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OtlpReceiver() as receiver:
        for name, value in receiver.environment(protocol).items():
            monkeypatch.setenv(name, value)
        telemetry = build(TelemetryConfig(), daemon="trainer", mode="replay")
        assert telemetry.tracer_provider is not None
        meter = telemetry.meter_provider.get_meter("test")
        durations = meter.create_histogram("headrace.some.duration", unit="s")
        tracer = telemetry.tracer_provider.get_tracer("test")
        with tracer.start_as_current_span("earlier") as earlier:
            pass
        with tracer.start_as_current_span(
            "headrace.step", kind=SpanKind.CONSUMER, links=[Link(earlier.get_span_context())], attributes={"n": 3}
        ) as step:
            durations.record(0.25)
        durations.record(0.5)
        meter.create_counter("headrace.steps", unit="{step}").add(1, {"kind": "x"})
        assert telemetry.shutdown()
        spans = {span.name: span for span in receiver.spans()}
        points = {point.name: point for point in receiver.points()}
    found, context = spans["headrace.step"], step.get_span_context()
    assert (found.kind, found.span_id, found.attributes) == (5, format_span_id(context.span_id), {"n": 3})
    assert found.links == ((spans["earlier"].trace_id, spans["earlier"].span_id),)
    named = {"service.name": "headrace-trainer", "headrace.mode": "replay", "telemetry.sdk.language": "python"}
    assert named.items() <= found.resource.items()
    assert str(found.resource["service.instance.id"]).endswith(f":{os.getpid()}")
    assert found.resource["service.version"] != "unknown"
    assert points["headrace.steps"].resource == found.resource
    assert (points["headrace.steps"].unit, points["headrace.steps"].attributes) == ("{step}", {"kind": "x"})
    histogram = points["headrace.some.duration"]
    assert (histogram.kind, histogram.unit, histogram.value) == ("histogram", "s", 2)
    # What was measured outside a span leads nowhere, and is no exemplar.
    assert histogram.exemplars == ((0.25, found.trace_id, found.span_id),)


@contextmanager
def _silent_collector() -> Iterator[int]:
    """Takes connections and never says a word; its port."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        yield silent.getsockname()[1]


@contextmanager
def _absent_collector() -> Iterator[int]:
    """A port that refuses connections."""
    yield 9


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("collector", [_silent_collector, _absent_collector])
def test_a_collector_that_hangs_or_is_dead_neither_blocks_nor_fills_memory(
    collector: Callable[[], AbstractContextManager[int]], protocol: str
) -> None:
    with collector() as port:
        environment = os.environ | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        }
        ran = subprocess.run(
            [sys.executable, "-m", "tests.ops.telemetry_under_load"],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr
    measured = json.loads(ran.stdout.splitlines()[-1])
    # A span and a measurement take tens of microseconds of CPU; waiting for a collector once would take five seconds.
    assert measured["slowest_ms"] < 2_000
    assert measured["cpu_us_each"] < 1_000
    # 8,192 spans of about 2 kB fill the queue; the 24,000 that came after it would have taken 48 MiB.
    assert measured["filled_mib"] < 64, measured
    assert measured["grown_mib"] < 20, measured
    assert measured["shutdown_s"] < 2.0


def test_a_process_without_telemetry_variables_says_nothing() -> None:
    code = (
        "from opentelemetry import metrics, trace\n"
        "from ops.telemetry import start\n"
        "from ops.telemetry_config import TelemetryConfig\n"
        "telemetry = start(TelemetryConfig(), daemon='ingest', mode='live', environment={})\n"
        "metrics.get_meter('x').create_counter('headrace.x').add(1)\n"
        "with trace.get_tracer('x').start_as_current_span('y') as span:\n"
        "    assert not span.is_recording()\n"
        "assert b'headrace_x_total' in telemetry.metrics_text()\n"
        "telemetry.shutdown()\n"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
