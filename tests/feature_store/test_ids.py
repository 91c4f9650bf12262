"""Ids are stored and shared between processes: their values may never change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.ids import event_key, event_keys, numeric_id, stable_id


def test_values_are_the_same_for_ever() -> None:
    assert stable_id("alice") == 3_969_249_489_322_831_999
    assert stable_id("") == 7_232_923_805_166_800_427
    assert event_key("e-1") == 723_901_250_856_693_383


@given(st.text())
def test_ids_fit_a_signed_column_and_are_not_negative(text: str) -> None:
    assert 0 <= stable_id(text) < 2**63
    assert 0 <= event_key(text) < 2**64


def test_an_id_and_an_event_key_of_one_text_are_unrelated() -> None:
    assert stable_id("x") != event_key("x") >> 1


def test_keys_of_a_batch_are_the_keys_of_its_events() -> None:
    keys = event_keys(["a", "b", "é"])
    assert keys.dtype == np.uint64
    assert keys.tolist() == [event_key("a"), event_key("b"), event_key("é")]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        (str(2**63 - 1), 2**63 - 1),
        (str(2**63), None),
        ("9" * 5_000, None),
        ("-1", None),
        ("", None),
        ("²", None),
        ("film/7", None),
    ],
)
def test_digits_name_a_number_that_a_column_holds(text: str, number: int | None) -> None:
    assert numeric_id(text) == number
