"""The shipped data set is complete and is what its README says."""

from __future__ import annotations

import polars as pl

from backtest.datasets import movietweetings, movietweetings_titles


def test_movietweetings_has_the_rows_users_and_items_that_its_readme_states() -> None:
    frame = pl.read_parquet(movietweetings().interactions)
    assert frame.height == 141_695
    assert frame["user_id"].n_unique() == 21_081
    assert frame["item_id"].n_unique() == 12_611
    assert frame["timestamp"].min() == 1_362_062_307
    assert frame["timestamp"].max() == 1_383_696_025


def test_every_rated_movie_has_a_title() -> None:
    titles = movietweetings_titles()
    rated = pl.read_parquet(movietweetings().interactions)["item_id"].unique().to_list()
    assert len(titles) == 22_438
    assert not [item_id for item_id in rated if item_id not in titles]
    assert titles[10].title == "La sortie des usines Lumière (1895)"
    assert titles[10].genres == ("Documentary", "Short")


def test_a_movie_without_genres_has_none_rather_than_an_empty_one() -> None:
    assert all("" not in title.genres for title in movietweetings_titles().values())


def test_the_columns_named_exist_in_the_file() -> None:
    data = movietweetings()
    columns = set(pl.read_parquet_schema(data.interactions))
    assert {data.columns.user, data.columns.item, data.columns.time, data.columns.value} <= columns
