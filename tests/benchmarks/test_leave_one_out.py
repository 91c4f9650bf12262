"""The yardstick computes what the model computes, and a stopped run of the table goes on as if it had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from backtest.dirichlet import DirichletConfig, dirichlet_records
from benchmarks.bench_dirichlet import known_items
from benchmarks.leave_one_out import NextItemModel, Run, Sequences, TrainingPlan, read_ml1m, windows
from benchmarks.padded_hstu import padded_loss
from kernels.softmax_loss import sampled_softmax_loss
from model.config import ModelConfig

CPU = torch.device("cpu")


def config(**changes: Any) -> ModelConfig:
    sizes = {"embedding_dim": 8, "num_layers": 2, "num_heads": 2, "attention_dim": 4, "hidden_dim": 4, "max_len": 14}
    return ModelConfig(**{**sizes, "temperature": 0.05, "input_dropout": 0.2, "linear_dropout": 0.2, **changes})


def sequences(num_users: int = 9, num_items: int = 30) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (num_users,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(starts[-1])
    return Sequences(
        rows=torch.randint(num_items, (total,), generator=generator),
        times_s=torch.randint(10**5, (total,), generator=generator).cumsum(0),
        starts=starts,
        num_items=num_items,
        note="made up",
    )


@pytest.mark.parametrize("relative_bias", [True, False], ids=["bias", "no bias"])
def test_the_padded_yardstick_has_the_models_loss_and_gradients(*, relative_bias: bool) -> None:
    data = sequences()
    model = NextItemModel(config(relative_bias=relative_bias), data.num_items).double()
    batch = windows(data, torch.arange(9), window=10, held_out=1, device=CPU)
    negative_rows = torch.randint(30, (batch.rows_L.shape[0], 16), generator=torch.Generator().manual_seed(1))
    want = padded_loss(model, batch, negative_rows)
    got = sampled_softmax_loss(
        model(batch), model.unit_items(), batch.target_rows_L, negative_rows, scale=1 / model.config.temperature
    ).loss
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    parameters = dict(model.named_parameters())
    want_gradients = torch.autograd.grad(want, list(parameters.values()), retain_graph=True)
    got_gradients = torch.autograd.grad(got, list(parameters.values()))
    for name, a, b in zip(parameters, got_gradients, want_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-9), f"gradient of {name}"


def test_training_reads_all_but_the_last_item_and_the_test_asks_for_it() -> None:
    data = sequences(num_users=2)
    start, end = int(data.starts[1]), int(data.starts[2])
    user = torch.tensor([1])
    training = windows(data, user, window=100, held_out=1, device=CPU)
    assert torch.equal(training.rows_L, data.rows[start : end - 2])
    assert torch.equal(training.target_rows_L, data.rows[start + 1 : end - 1])
    test = windows(data, user, window=2, held_out=0, device=CPU)
    assert torch.equal(test.rows_L, data.rows[end - 3 : end - 1])
    assert test.target_rows_L[-1] == data.rows[end - 1]
    assert torch.equal(test.query_times_s_L, data.times_s[end - 2 : end])


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path) -> None:
    plan = TrainingPlan(window=10, epochs=3, batch_users=4, num_negatives=8)
    whole = Run(config=config(), plan=plan, data=sequences(), device=CPU)
    stopped = Run(config=config(), plan=plan, data=sequences(), device=CPU)
    for _ in range(3):
        whole.train_epoch()
    stopped.train_epoch()
    stopped.save(tmp_path)
    resumed = Run(config=config(), plan=plan, data=sequences(), device=CPU)
    resumed.load(tmp_path, curve=stopped.curve)
    resumed.train_epoch()
    resumed.train_epoch()
    assert [row["loss"] for row in resumed.curve] == [row["loss"] for row in whole.curve]
    for (name, a), b in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_table_is_made_from_the_original_files_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    lines = [f"{u}::{i}::{1 + i % 5}::{1000 + 60 * i + u}" for u in range(1, 8) for i in range(u, u + 9)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ratings.dat").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "benchmarks/table_ml1m.py", "--data", str(tmp_path / "data"), "--arms", "sasrec", "hstu"]
    command += ["--threads", "1"]
    command += ["--state", str(tmp_path / "state"), "--results", str(tmp_path / "ml-1m.json")]
    for epochs in ("1", "2"):
        done = subprocess.run(
            [*command, "--epochs", epochs], capture_output=True, text=True, check=False, env={"PYTHONPATH": "."}
        )
        assert done.returncode == 0, done.stderr
    assert "epoch 1:" not in done.stdout, "the first epoch was trained again"
    found = json.loads(done.stdout.splitlines()[-1])["arms"]
    assert found["hstu"]["epochs"] == 2
    assert found["sasrec"]["last"]["epoch"] == 2
    page = (tmp_path / "ml-1m.md").read_text()
    assert "| hstu, published (best epoch) | 101 | 0.3097 | 0.1720 |" in page
    assert "among all 15 items" in page


def test_the_reconstruction_keeps_items_whose_ratings_have_no_place(tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "user_id": [1, 1, 2, 2],
            "item_id": [10, 30, 20, 10],
            "timestamp": [5.0, 4.0, 7.0, 6.0],
            "timestamp_exact": [True, False, True, True],
            "seq_pos": [1, 0, -1, 0],
        }
    ).write_parquet(tmp_path / "interactions.parquet")
    data = read_ml1m(tmp_path)
    assert data.num_items == 3
    assert data.rows.tolist() == [2, 0, 0]
    assert data.starts.tolist() == [0, 2, 3]
    assert "75.0 %" in data.note


def test_the_dirichlet_stream_follows_its_vocabulary_and_is_repeatable() -> None:
    stream = DirichletConfig(num_records=200, num_items=1000, record_len=16)
    items = dirichlet_records(stream).items_RT
    assert items.shape == (200, 16)
    assert (items == dirichlet_records(stream).items_RT).all()
    for record in (0, 100, 199):
        assert items[record].max() < known_items(stream, record)
    per_record = [len(set(record % stream.num_categories)) for record in items]
    assert max(per_record) <= stream.categories_per_record
    assert min(per_record) >= 1
