"""Arms are called by what tells them apart."""

from __future__ import annotations

from backtest.run_config import ArmConfig


def test_the_title_of_a_variant_begins_with_what_it_changes() -> None:
    assert ArmConfig(name="a", publish_every="1h").info().title == "Online, published every 1h"
    variant = ArmConfig(name="b", weights_lag="10m", settings={"model": {"kind": "sasrec"}})
    assert variant.info().title == "model.kind = sasrec, online, published every batch, weights 10m late"
    assert ArmConfig(name="c", title="Ours", settings={"model": {"kind": "gru"}}).info().title == "Ours"
