"""Many spans in a process whose collector is of no use; prints what they cost. Run by test_telemetry.py."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from opentelemetry import metrics, trace

from ops import telemetry
from ops.telemetry_config import TelemetryConfig

NUM_SPANS = 12_000
"""In each round: half as many again as the queue holds."""
NUM_ROUNDS = 3


def rss_mib() -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def one_round() -> float:
    """The slowest of the round, in seconds."""
    tracer, slowest_s = trace.get_tracer("test"), 0.0
    durations = metrics.get_meter("test").create_histogram("headrace.test.duration", unit="s")
    for number in range(NUM_SPANS):
        began_s = time.thread_time()
        waited_s = time.monotonic()
        with tracer.start_as_current_span("headrace.test", attributes={"number": number, "text": "x" * 200}):
            durations.record(0.1)
        # Waiting, as opposed to work: the machine may be busy, and the exporter's thread works as well.
        waited_s = time.monotonic() - waited_s - (time.thread_time() - began_s)
        slowest_s = max(slowest_s, waited_s)
    return slowest_s


def main() -> None:
    config = TelemetryConfig(export_timeout_ms=5_000, metric_export_interval_ms=300, shutdown_timeout_ms=500)
    signals = telemetry.start(config, daemon="test", mode="live")
    before_mib, cpu_s = rss_mib(), time.process_time()
    slowest_s = one_round()
    filled_mib = rss_mib()
    slowest_s = max(slowest_s, *(one_round() for _ in range(NUM_ROUNDS - 1)))
    cpu_s, grown_mib = time.process_time() - cpu_s, rss_mib() - filled_mib
    began_s = time.monotonic()
    signals.shutdown()
    print(  # noqa: T201 - the result
        json.dumps(
            {
                "slowest_ms": slowest_s * 1000,
                "cpu_us_each": cpu_s / (NUM_ROUNDS * NUM_SPANS) * 1e6,
                "filled_mib": filled_mib - before_mib,
                "grown_mib": grown_mib,
                "shutdown_s": time.monotonic() - began_s,
            }
        )
    )


if __name__ == "__main__":
    main()
