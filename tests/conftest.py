"""Fixtures and settings that every room's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from ops.local_broker import LocalBroker, LocalBrokerConfig

# The same examples on every run: a failing run can be repeated from the commit alone. `HYPOTHESIS_PROFILE=explore`
# searches further, at random.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,  # wall-clock limits per example are noise on a shared machine; pytest-timeout bounds the test
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def broker() -> Iterator[LocalBroker]:
    """A real broker for the whole test process, on a free port.

    Topic names are fixed, so two tests that use the same topic see each other's records: such tests take
    `fresh_broker`.
    """
    with LocalBroker(LocalBrokerConfig(port=0)) as running:
        yield running


@pytest.fixture
def fresh_broker() -> Iterator[LocalBroker]:
    """A real, empty broker for one test, on a free port; up in 10 ms."""
    with LocalBroker(LocalBrokerConfig(port=0)) as running:
        yield running
