"""One event through real processes: followed by `headrace trace`, by span links at a collector, and in the table."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from ops.local_broker import LocalBroker
from stream.events import Event, encode_event
from stream.kafka import KafkaLog
from stream.log import acknowledged
from tests.faults.installation import Daemon, Installation
from tests.feature_store.databases import migrated_database
from tests.ops.command_line import Headrace
from tests.ops.otlp_receiver import OtlpReceiver, ReceivedSpan

pytestmark = pytest.mark.timeout(600)

PRODUCER = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
"""Trace id and span id that the traced event's producer has put into its header."""
NUM_EVENTS = 40
MODEL = {"EMBEDDING_DIM": "16", "NUM_HEADS": "1", "ATTENTION_DIM": "8", "HIDDEN_DIM": "8", "MAX_LEN": "16"}


@pytest.fixture
def installation(tmp_path: Path, fresh_broker: LocalBroker) -> Iterator[Installation]:
    settings = {
        "HEADRACE_HOT__MAX_LEN": "32",
        "HEADRACE_TRAINER__PUBLISH_INTERVAL_MS": "200",
        "HEADRACE_TELEMETRY__METRIC_EXPORT_INTERVAL_MS": "1000",
        **{f"HEADRACE_MODEL__{name}": value for name, value in MODEL.items()},
    }
    with (
        migrated_database("sqlite", tmp_path) as url,
        Installation(tmp_path, fresh_broker.bootstrap_servers, url, settings=settings) as made,
    ):
        yield made


def send_events(installation: Installation) -> None:
    """Of 10 users; only the last event carries a trace."""

    async def produce() -> None:
        log, now_ms = KafkaLog(installation.kafka), time.time_ns() // 1_000_000
        await log.create_topics()
        writer = log.writer()
        await writer.start()
        sends = []
        for number in range(NUM_EVENTS):
            event = Event(
                event_id=f"e{number}",
                user_id=number % 10,
                item_id=number % 7,
                action="view",
                event_time=now_ms + number,
            )
            header = ("traceparent", f"00-{PRODUCER[0]}-{PRODUCER[1]}-01".encode())
            headers = (header,) if number == NUM_EVENTS - 1 else ()
            sends.append(await writer.send(log.topics.interactions, encode_event(event), headers=headers))
        await acknowledged(sends)
        await writer.stop()

    asyncio.run(produce())


def wait_until_everything_is_served(installation: Installation, worker: Daemon) -> None:
    def is_served() -> bool:
        return (worker.status().get("snapshot") or {}).get("learned_interactions") == NUM_EVENTS

    installation.wait(is_served, "serving everything")


def ask(worker: Daemon, user_id: int) -> dict[str, Any]:
    connection = HTTPConnection("127.0.0.1", worker.port, timeout=30)
    try:
        connection.request("POST", "/v1/recommend", json.dumps({"user_id": user_id, "k": 3, "exclude_seen": False}))
        answer = connection.getresponse()
        body: dict[str, Any] = json.loads(answer.read())
    finally:
        connection.close()
    assert answer.status == 200, body
    return body


def test_one_event_is_followed_from_its_producer_to_the_first_answer_of_each_replica(
    installation: Installation, headrace: Headrace
) -> None:
    with OtlpReceiver() as receiver:
        over_grpc, over_http = (receiver.environment(protocol) for protocol in ("grpc", "http/protobuf"))
        ingest = installation.start("ingest", **over_grpc)
        trainer = installation.start("train", **over_http)
        workers = [installation.start("serve", **over) for over in (over_grpc, over_http)]
        send_events(installation)

        for worker in workers:
            wait_until_everything_is_served(installation, worker)
            assert ask(worker, 9)["fallback"] is False
        settings = {name: value for name, value in installation.environment.items() if name.startswith("HEADRACE_")}
        settings |= {
            "HEADRACE_HEADRACE__INGEST_PORT": str(ingest.port),
            "HEADRACE_HEADRACE__TRAINER_PORT": str(trainer.port),
        }
        event_id = f"e{NUM_EVENTS - 1}"
        # First answers are noted behind the answers.
        installation.wait(
            lambda: headrace("trace", event_id, **settings).returncode == 0, "each replica's first answer being noted"
        )
        traced = json.loads(headrace("trace", event_id, "--user", "9", "--json", **settings).stdout)
        freshness = json.loads(headrace("freshness", "--json", **settings).stdout)
        for daemon in (*workers, trainer, ingest):
            daemon.stop()
        spans = receiver.spans()
        check_the_path(traced, workers)
        check_the_table(freshness)
        check_the_links(spans, traced)
        check_the_conventions(receiver, spans)


def check_the_path(traced: dict[str, Any], workers: Sequence[Daemon]) -> None:
    (path,) = traced["paths"]
    hops = path["hops"]
    assert [hop["name"] for hop in hops[:4]] == ["appended", "stored", "learned", "published"]
    assert [hop["name"] for hop in hops[4:]] == ["swapped", "answered"] * 2
    assert {hop["replica"].rpartition(":")[2] for hop in hops[4:]} == {str(worker.port) for worker in workers}
    assert all(hop["state"] == "reached" for hop in hops)
    assert hops[0]["trace_id"] == PRODUCER[0]
    for of_replica in (hops[4:6], hops[6:8]):
        times = [hop["at_ms"] for hop in [*hops[:4], *of_replica]]
        assert times == sorted(times), "one machine, one clock"
    assert all(hop["append_age_ms"] == hop["at_ms"] - hops[0]["at_ms"] for hop in hops)
    assert traced["notes"] == []


def check_the_table(freshness: dict[str, Any]) -> None:
    assert freshness["problems"] == {}
    assert [(hop["hop"], hop["num_events"], hop["coverage"]) for hop in freshness["hops"]] == [
        (hop, NUM_EVENTS, 1.0) for hop in ("F1", "F2", "F3", "F4")
    ]
    assert [one["is_running"] for one in freshness["replicas"]] == [True, True]
    medians = [hop["append"]["p50_ms"] for hop in freshness["hops"]]
    assert medians == sorted(medians), "each hop comes after the one before"
    slowest_ms = max(one["append"]["p50_ms"] for one in freshness["replicas"])
    assert medians[-1] == pytest.approx(slowest_ms, rel=0.1)


def check_the_links(spans: Sequence[ReceivedSpan], traced: dict[str, Any]) -> None:
    """From the producer's header to an answer, by links alone."""
    at = PRODUCER
    walked = []
    for name in ("headrace.ingest.commit", "headrace.trainer.step", "headrace.snapshot.publish"):
        linked = [span for span in spans if span.name == name and at in span.links]
        assert linked, f"no {name} links to {at}"
        walked.append(linked[0])
        at = (linked[0].trace_id, linked[0].span_id)
    for name in ("headrace.serving.swap", "headrace.serving.request"):
        linked = [span for span in spans if span.name == name and at in span.links]
        assert len({span.resource["service.instance.id"] for span in linked}) == 2, f"{name} of both workers"
    told = {hop["name"]: hop["trace_id"] for hop in traced["paths"][0]["hops"]}
    assert (told["stored"], told["published"]) == (walked[0].trace_id, walked[2].trace_id)


def check_the_conventions(receiver: OtlpReceiver, spans: Sequence[ReceivedSpan]) -> None:
    commit = next(span for span in spans if span.name == "headrace.ingest.commit")
    assert commit.kind == 5
    assert {
        "messaging.system": "kafka",
        "messaging.operation.type": "process",
        "messaging.destination.name": "interactions",
    }.items() <= commit.attributes.items()
    write = next(span for span in spans if span.name == "headrace.store.write" and span.parent_id == commit.span_id)
    assert (write.kind, write.attributes) == (3, {"db.system.name": "sqlite", "db.operation.name": "write"})
    request = next(span for span in spans if span.name == "headrace.serving.request")
    assert request.kind == 2
    assert {
        "http.request.method": "POST",
        "http.route": "/v1/recommend",
        "http.response.status_code": 200,
        "url.scheme": "http",
    }.items() <= request.attributes.items()
    ids = {(span.trace_id, span.span_id) for span in spans}
    for name, services in {
        "messaging.process.duration": {"headrace-ingest"},
        "headrace.trainer.step.duration": {"headrace-trainer"},
        "headrace.snapshot.publish.duration": {"headrace-trainer"},
        "http.server.request.duration": {"headrace-serving"},
        "headrace.serving.swap.pause": {"headrace-serving"},
        "headrace.freshness.oldest": {"headrace-ingest", "headrace-trainer", "headrace-serving"},
    }.items():
        points = receiver.points(name)
        assert {point.unit for point in points} == {"s"}, name
        exemplars = {one[1:]: point for point in points for one in point.exemplars}
        assert {point.resource["service.name"] for point in exemplars.values()} == services, name
        assert exemplars.keys() <= ids, f"exemplars of {name} lead to spans that nobody sent"
    assert {point.attributes["headrace.hop"] for point in receiver.points("headrace.freshness.oldest")} == {
        "F1",
        "F2",
        "F3",
        "F4",
    }
    consumed = {
        (str(point.resource["service.name"]), str(point.attributes["messaging.destination.name"])): point.value
        for point in receiver.points("messaging.client.consumed.messages")
    }
    assert consumed["headrace-ingest", "interactions"] == NUM_EVENTS
    assert consumed["headrace-trainer", "history-updates"] >= 1
    systems = {point.attributes["db.system.name"] for point in receiver.points("db.client.operation.duration")}
    assert systems == {"sqlite"}
