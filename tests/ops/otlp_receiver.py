"""A collector that receives OTLP over gRPC and over HTTP, decoded with the official protobuf package, and keeps it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

Value = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class ReceivedSpan:
    """A span as it arrived."""

    name: str
    kind: int
    """OTLP: 1 internal, 2 server, 3 client, 4 producer, 5 consumer."""
    trace_id: str
    span_id: str
    parent_id: str
    links: tuple[tuple[str, str], ...]
    """(trace id, span id)."""
    attributes: dict[str, Value]
    resource: dict[str, Value]


@dataclass(frozen=True, kw_only=True)
class ReceivedPoint:
    """One data point of an instrument."""

    name: str
    unit: str
    kind: str
    """`sum`, `gauge` or `histogram`."""
    attributes: dict[str, Value]
    resource: dict[str, Value]
    value: float
    """Of a histogram, its count."""
    exemplars: tuple[tuple[float, str, str], ...]
    """(value, trace id, span id)."""


class OtlpReceiver:
    """Listens on two ports of the loopback address for as long as its block runs."""

    def __init__(self) -> None:
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self._grpc = grpc.server(ThreadPoolExecutor(4, thread_name_prefix="otlp"))
        add_TraceServiceServicer_to_server(_Traces(self), self._grpc)  # type: ignore[no-untyped-call]
        add_MetricsServiceServicer_to_server(_Metrics(self), self._grpc)  # type: ignore[no-untyped-call]
        self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))

    def environment(self, protocol: str) -> dict[str, str]:
        """The standard variables that make a process send here."""
        port = self._grpc_port if protocol == "grpc" else self._http.server_address[1]
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        }

    def spans(self) -> list[ReceivedSpan]:
        """Every span so far."""
        return [
            ReceivedSpan(
                name=span.name,
                kind=span.kind,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                attributes=_values(span.attributes),
                resource=_values(of_resource.resource.attributes),
            )
            for request in list(self.traces)
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    def points(self, name: str | None = None) -> list[ReceivedPoint]:
        """Every data point so far (of one instrument), in the order in which they came."""
        return [point for request in list(self.metrics) for point in _points(request) if name in {None, point.name}]

    def __enter__(self) -> Self:
        self._grpc.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._grpc.stop(0).wait()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Traces(TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:  # noqa: N802 - the service's
        self._receiver.traces.append(request)
        return ExportTraceServiceResponse()


class _Metrics(MetricsServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: ExportMetricsServiceRequest, context: Any) -> ExportMetricsServiceResponse:  # noqa: N802 - the service's
        self._receiver.metrics.append(request)
        return ExportMetricsServiceResponse()


def _handler(receiver: OtlpReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                receiver.traces.append(ExportTraceServiceRequest.FromString(body))
            else:
                assert self.path == "/v1/metrics", self.path
                receiver.metrics.append(ExportMetricsServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name
            pass

    return Handler


_POINTS: Final = ("sum", "gauge", "histogram")


def _points(request: ExportMetricsServiceRequest) -> Iterator[ReceivedPoint]:
    for of_resource in request.resource_metrics:
        resource = _values(of_resource.resource.attributes)
        for metric in (metric for of_scope in of_resource.scope_metrics for metric in of_scope.metrics):
            kind = metric.WhichOneof("data")
            assert kind in _POINTS, kind
            for point in getattr(metric, kind).data_points:
                yield ReceivedPoint(
                    name=metric.name,
                    unit=metric.unit,
                    kind=kind,
                    attributes=_values(point.attributes),
                    resource=resource,
                    value=point.count if kind == "histogram" else point.as_int or point.as_double,
                    exemplars=tuple(
                        (one.as_double or one.as_int, one.trace_id.hex(), one.span_id.hex()) for one in point.exemplars
                    ),
                )


def _values(attributes: Any) -> dict[str, Value]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
