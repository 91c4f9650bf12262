"""`headrace trainer inspect`: what was set aside, for a person and a program."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from feature_store.interactions import Interactions
from online_trainer.quarantine import SetAside, write_set_aside
from tests.ops.command_line import Headrace, assert_refused

START_MS = 1_700_000_000_000


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """One batch with a spike and one whose loss was no number."""
    events = Interactions(
        user_id=np.array([4, 4, 5]),
        item_id=np.array([70, 71, 70]),
        event_time_ms=START_MS + np.arange(3),
        action=np.ones(3, np.uint32),
        value=np.array([np.nan, 8.0, 9.5], np.float32),
        event_key=np.arange(3).astype(np.uint64),
        seq=np.zeros(3, np.uint32),
        arrival_ms=np.full(3, START_MS),
    )
    for step, reason, loss in ((12, "spike", 9.25), (40, "loss", None)):
        why = SetAside(step=step, reason=reason, loss=loss, typical_loss=6.5, num_interactions=3, watermark_ms=START_MS)
        write_set_aside(tmp_path / "quarantine" / "default", why, events, keep=5)
    return tmp_path


def test_the_list_says_which_steps_and_why(headrace: Headrace, data_dir: Path) -> None:
    ran = headrace("trainer", "inspect", HEADRACE_HEADRACE__DATA_DIR=str(data_dir))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "step 12  2023-11-14T22:13:20.000Z  3 interactions  loss far above what is typical: 9.250, typically 6.500",
        "step 40  2023-11-14T22:13:20.000Z  3 interactions  loss is no finite number, typically 6.500",
    ]
    ran = headrace("trainer", "inspect", "--json", HEADRACE_HEADRACE__DATA_DIR=str(data_dir))
    assert [(one["step"], one["reason"], one["loss"]) for one in json.loads(ran.stdout)] == [
        (12, "spike", 9.25),
        (40, "loss", None),
    ]


def test_a_step_shows_its_interactions(headrace: Headrace, data_dir: Path) -> None:
    ran = headrace("trainer", "inspect", "12", HEADRACE_HEADRACE__DATA_DIR=str(data_dir))
    lines = ran.stdout.splitlines()
    assert lines[1:3] == [
        "user_id: 2 different, most often 4 (2x), 5 (1x)",
        "item_id: 2 different, most often 70 (2x), 71 (1x)",
    ]
    assert lines[5].split() == ["2023-11-14T22:13:20.001Z", "4", "71", "1", "8"]
    ran = headrace("trainer", "inspect", "12", "--json", HEADRACE_HEADRACE__DATA_DIR=str(data_dir))
    found = json.loads(ran.stdout)
    assert found["typical_loss"] == 6.5
    assert [one["value"] for one in found["interactions"]] == [None, 8.0, 9.5]


def test_nothing_set_aside_and_an_unknown_step_are_said(headrace: Headrace, data_dir: Path, tmp_path: Path) -> None:
    ran = headrace("trainer", "inspect", HEADRACE_HEADRACE__DATA_DIR=str(tmp_path / "none"))
    assert ran.stdout == "no batch was set aside\n"
    for arguments, step in ((("13",), 13), (("12", "--ranking"), 12)):
        ran = headrace("trainer", "inspect", *arguments, HEADRACE_HEADRACE__DATA_DIR=str(data_dir))
        assert_refused(ran, f"no batch of step {step} is kept")
