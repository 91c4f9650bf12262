"""Fixtures and settings that every room's tests share."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

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
