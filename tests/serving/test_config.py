"""Settings of a worker are checked when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from serving.config import ServingConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_max", 0),
        ("queue_max", 0),
        ("request_timeout_ms", 0),
        ("body_max_bytes", 0),
        ("k_max", 0),
        ("port", 70_000),
        ("drain_timeout_ms", 9_000),
        ("drain_timeout_ms", 7_900),
        ("drain_notice_ms", -1),
        ("body_timeout_ms", 0),
        ("keep_alive_s", 0),
        ("batch_wait_ms", -1.0),
        ("batch_wait_ms", 1_000.0),
        ("weights_behind_max_ms", -1),
        ("snapshot_retry_max_ms", 10),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"serving\.{setting} = {value}"):
        ServingConfig(**{setting: value})
