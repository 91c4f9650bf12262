"""What the fault tests share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet_clients() -> Iterator[None]:
    """The test's own Kafka clients live through the faults too; what they say of it would bury the daemons' logs."""
    clients = logging.getLogger("aiokafka")
    before = clients.level
    clients.setLevel(logging.CRITICAL)
    yield
    clients.setLevel(before)
