"""Item embeddings in fewer bits: as near as the bits allow, the same in deltas and anchors, refused where they mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import ModelConfig, RowPrecision
from model.errors import SnapshotCorruptError, SnapshotError, SnapshotFormatError, SnapshotParentError
from model.manifest import Manifest, SnapshotKind
from model.recommender import Recommender
from model.row_precision import as_published, bytes_of_row, rounded_rows
from model.snapshot import chain, load_snapshot, read_manifest, snapshot_folder
from model.swap import apply_snapshot, merge_deltas, undo_snapshot
from tests.model.study import Study
from tests.model.test_snapshot import DAMAGE, assert_same, everything, loaded, publish, told

ROUNDED: tuple[RowPrecision, ...] = ("int8", "int4")
LEVELS = {"int8": 127, "int4": 7}


def rows(num: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, width, generator=generator) * torch.rand(num, 1, generator=generator).exp()


# Rounding


@pytest.mark.parametrize("width", [1, 2, 7, 64])
@pytest.mark.parametrize("precision", ROUNDED)
def test_a_number_is_off_by_half_a_step_of_its_row_or_cut_off_where_that_loses_less(
    precision: RowPrecision, width: int
) -> None:
    weight = rows(200, width)
    rounded = rounded_rows(weight, precision)
    error = (rounded.weight() - weight).abs()
    is_within = weight.abs() <= rounded.scale[:, None] * (LEVELS[precision] + 0.5)
    assert bool((error <= rounded.scale[:, None] * 0.5001)[is_within].all())
    if precision == "int8":
        assert bool(is_within.all())
        return
    full_scale = weight.abs().amax(1, keepdim=True) / 7
    uncut = (weight / full_scale).round() * full_scale - weight
    assert bool((error.square().sum(1) <= uncut.square().sum(1) * 1.0001).all())
    if width == 64:
        assert float(error.square().sum() / uncut.square().sum()) < 0.9, "cutting off gains nothing: why do it"


@pytest.mark.parametrize("precision", ROUNDED)
def test_zeros_stay_zeros_and_a_row_does_not_depend_on_its_company(precision: RowPrecision) -> None:
    weight = rows(20, 9)
    weight[3] = 0.0
    weight[4] = 1e-42
    published = as_published(weight, precision)
    assert torch.equal(published[3], torch.zeros(9))
    assert bool(published.isfinite().all())
    for row in range(20):
        assert torch.equal(as_published(weight[row : row + 1], precision)[0], published[row])
    assert as_published(torch.empty(0, 9), precision).shape == (0, 9)


def test_four_bits_come_two_to_a_byte_and_go_through_every_level() -> None:
    weight = torch.arange(-7.0, 8.0)[None]
    rounded = rounded_rows(weight, "int4")
    assert rounded.codes.dtype == torch.uint8
    assert rounded.codes.shape == (1, 8)
    assert torch.equal(rounded.weight(), weight)
    assert [bytes_of_row(15, one) for one in ("float32", "int8", "int4")] == [60, 19, 12]


# Snapshots


@pytest.fixture(params=ROUNDED)
def precision(request: pytest.FixtureRequest) -> RowPrecision:
    precision: RowPrecision = request.param
    return precision


@pytest.fixture
def root(tmp_path: Path, precision: RowPrecision, small_config: ModelConfig) -> Path:
    """Anchor, delta, delta, and an anchor with the same content as the last delta."""
    study = Study(small_config)
    kinds: tuple[SnapshotKind, ...] = ("anchor", "delta", "delta")
    for version, kind in enumerate(kinds, start=1):
        study.learn(2)
        publish(tmp_path, study.recommender, version, kind, row_precision=precision)
    publish(tmp_path, study.recommender, 4, "anchor", row_precision=precision)
    return tmp_path


def test_deltas_in_place_a_fresh_load_and_an_anchor_of_the_same_weights_are_equal(
    root: Path, small_config: ModelConfig, precision: RowPrecision
) -> None:
    in_place = loaded(root, small_config, 1)
    for version in (2, 3):
        apply_snapshot(in_place, load_snapshot(root, "hstu", version))
    assert_same(everything(in_place), everything(loaded(root, small_config, 3)))
    anchor = Recommender(small_config)
    apply_snapshot(anchor, load_snapshot(root, "hstu", 4))
    assert_same(everything(in_place), everything(anchor))
    assert read_manifest(root, "hstu", 2).row_precision == precision


def test_workers_have_the_trainers_rows_rounded_and_all_else_as_it_is(
    tmp_path: Path, small_config: ModelConfig, precision: RowPrecision
) -> None:
    study = Study(small_config)
    study.learn(3)
    publish(tmp_path, study.recommender, 1, "anchor", row_precision=precision)
    found, want = everything(loaded(tmp_path, small_config, 1)), everything(study.recommender)
    weights = [one.pop("weight") for one in (found, want)]
    assert_same(found, want)
    assert torch.equal(weights[0], as_published(weights[1], precision))
    assert not torch.equal(*weights)


def test_undo_goes_back_to_a_version_of_another_precision(
    root: Path, small_config: ModelConfig, precision: RowPrecision
) -> None:
    study = Study(small_config)
    study.learn(9)
    publish(root, study.recommender, 5, "anchor")
    recommender = loaded(root, small_config, 3)
    before = everything(recommender)
    undo_snapshot(recommender, apply_snapshot(recommender, load_snapshot(root, "hstu", 5)))
    assert_same(everything(recommender), before)
    assert recommender.snapshot_row_precision == precision


@pytest.mark.parametrize("damage", DAMAGE.keys())
def test_a_damaged_snapshot_is_refused_and_changes_nothing(root: Path, small_config: ModelConfig, damage: str) -> None:
    name, harm, error, says = DAMAGE[damage]
    recommender = loaded(root, small_config, 1)
    before = everything(recommender)
    harm(root / snapshot_folder("hstu", 2) / name)
    with pytest.raises(error, match=says):
        apply_snapshot(recommender, load_snapshot(root, "hstu", 2))
    assert_same(everything(recommender), before)


def test_rows_that_are_not_what_the_manifest_says_are_refused(root: Path, precision: RowPrecision) -> None:
    for other in {"float32", "int8", "int4"} - {precision}:
        told(root, 1, row_precision=other)
        with pytest.raises(SnapshotCorruptError, match="must hold exactly"):
            load_snapshot(root, "hstu", 1)


@pytest.mark.parametrize("width", [torch.tensor([3]), torch.tensor([8, 8]), torch.tensor(8)])
def test_codes_of_another_width_are_refused(root: Path, precision: RowPrecision, width: torch.Tensor) -> None:
    rows_of = load_snapshot(root, "hstu", 1).rows
    tensors = rows_of.tensors(precision) | {"weight_width": width}
    with pytest.raises(SnapshotCorruptError, match="codes"):
        type(rows_of).of_tensors(tensors, precision)


def test_a_manifest_without_the_field_is_of_float32_and_one_of_a_precision_unknown_here_is_refused(
    tmp_path: Path, study: Study
) -> None:
    manifest = publish(tmp_path, study.recommender, 1, "anchor")
    content = manifest.encode().replace(b' "row_precision": "float32",\n', b"")
    assert content != manifest.encode()
    assert Manifest.decode(content).row_precision == "float32"
    with pytest.raises(SnapshotFormatError, match="row_precision is 'fp8'"):
        Manifest.decode(manifest.encode().replace(b'"row_precision": "float32"', b'"row_precision": "fp8"'))


def mixed(root: Path, small_config: ModelConfig) -> None:
    """A delta of float32 rows on the anchor of rounded ones."""
    study = Study(small_config)
    study.learn(2)
    study.recommender.items.clear_dirty()
    study.learn(1)
    publish(root, study.recommender, 5, "delta")


def test_a_delta_of_another_precision_than_what_it_builds_on_is_refused(root: Path, small_config: ModelConfig) -> None:
    mixed(root, small_config)
    refused: list[Any] = [
        lambda: chain(root, "hstu", have=None, want=5),
        lambda: apply_snapshot(loaded(root, small_config, 4), load_snapshot(root, "hstu", 5)),
        lambda: merge_deltas([load_snapshot(root, "hstu", version) for version in (3, 5)]),
    ]
    told(root, 5, parent=3)
    with pytest.raises(SnapshotParentError, match="a change of precision needs an anchor"):
        refused[2]()
    told(root, 5, parent=4)
    for attempt in refused[:2]:
        with pytest.raises(SnapshotError, match="a change of precision needs an anchor"):
            attempt()


def test_bytes_are_what_is_promised(tmp_path: Path) -> None:
    config, sizes = ModelConfig(), {}
    recommender = Recommender(config)
    recommender.items.admit(torch.arange(2_000).numpy())
    for version, one in enumerate(("float32", *ROUNDED), start=1):
        manifest = publish(tmp_path, recommender, version, "anchor", row_precision=one)
        sizes[one] = manifest.files["rows.safetensors"].size
    # Headers take some bytes, other ones where there are codes.
    assert (sizes["float32"] - sizes["int8"]) / 2_000 == pytest.approx(256 - 68, abs=0.2)
    assert (sizes["int8"] - sizes["int4"]) / 2_000 == pytest.approx(68 - 36, abs=0.2)
