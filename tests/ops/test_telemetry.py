"""Telemetry: silent unless the standard variables ask for it, always on /metrics, never in the way."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ops.errors import SettingsError
from ops.telemetry import Exports, build
from ops.telemetry_config import TelemetryConfig


class _Collector(ThreadingHTTPServer):
    """An OTLP/HTTP collector that keeps which paths were posted to, and the bytes."""

    def __init__(self) -> None:
        received: dict[str, bytes] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received[self.path] = received.get(self.path, b"") + body
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.received = received


@pytest.fixture
def collector() -> Iterator[_Collector]:
    server = _Collector()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


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


def test_spans_and_metrics_reach_the_collector_when_the_process_stops(
    collector: _Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
    telemetry = build(TelemetryConfig(), daemon="trainer", mode="live")
    assert telemetry.tracer_provider is not None
    with telemetry.tracer_provider.get_tracer("test").start_as_current_span("headrace.step"):
        telemetry.meter_provider.get_meter("test").create_counter("headrace.steps").add(1)
    assert telemetry.shutdown()
    assert b"headrace.step" in collector.received["/v1/traces"]
    assert b"headrace-trainer" in collector.received["/v1/traces"]
    assert b"headrace.steps" in collector.received["/v1/metrics"]


def test_a_collector_that_never_answers_neither_slows_spans_nor_holds_the_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        )
        config = TelemetryConfig(queue_max=100, shutdown_timeout_ms=200, export_timeout_ms=500)
        telemetry = build(config, daemon="serving", mode="live")
        assert telemetry.tracer_provider is not None
        tracer = telemetry.tracer_provider.get_tracer("test")
        start_s = time.monotonic()
        for _ in range(1_000):
            tracer.start_span("headrace.request").end()
        assert time.monotonic() - start_s < 2.0
        start_s = time.monotonic()
        assert not telemetry.shutdown()
        assert time.monotonic() - start_s < 1.0
        assert telemetry.shutdown(), "a second shutdown has nothing left to do"


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
