"""One complaint of a library is logged once per interval; everything else always."""

from __future__ import annotations

import logging

from ops.log_limits import RepetitionFilter


def record(name: str, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 1, message, arguments, None)


def test_a_message_passes_once_per_interval_and_says_how_often_it_was_held_back() -> None:
    now_s = [100.0]
    limits = RepetitionFilter("aiokafka", interval_s=10, clock_s=lambda: now_s[0])
    assert limits.filter(record("aiokafka.client", "cannot reach %d", 1))
    for node in range(2, 5):
        assert not limits.filter(record("aiokafka.client", "cannot reach %d", node))
    assert limits.filter(record("aiokafka.client", "something else"))
    assert limits.filter(record("aiokafka.consumer", "cannot reach %d", 1)), "another logger is another message"
    now_s[0] += 10
    again = record("aiokafka.client", "cannot reach %d", 5)
    assert limits.filter(again)
    assert again.getMessage() == "cannot reach 5 [3 more like this in 10 s]"
    now_s[0] += 10
    later = record("aiokafka.client", "cannot reach %d", 6)
    assert limits.filter(later)
    assert later.getMessage() == "cannot reach 6"


def test_our_own_messages_always_pass() -> None:
    limits = RepetitionFilter("aiokafka", clock_s=lambda: 0.0)
    assert all(limits.filter(record("stream.ingest", "trying again")) for _ in range(3))
    assert all(limits.filter(record("aiokafkaesque", "trying again")) for _ in range(3))


def test_what_is_remembered_is_bounded() -> None:
    limits = RepetitionFilter("aiokafka", clock_s=lambda: 0.0)
    assert all(limits.filter(record("aiokafka", f"message {number}")) for number in range(5_000))
    assert len(limits._passed) <= 1_000
