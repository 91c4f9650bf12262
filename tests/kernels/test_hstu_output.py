"""The output half of an HSTU layer in Triton equals the reference, forward, in every gradient, and in its dropout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.errors import KernelUnavailableError
from kernels.hstu_output import dropout_multiplier, hstu_output
from kernels.hstu_output.dropout import BLOCK, DropoutKey
from kernels.hstu_output.ops import _backward, _forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest error, in units of the largest element of what is compared (of 1, if that is larger)."""

HALF_DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
"""Interpreted, tl.dot on bfloat16 is wrong."""

SHAPES = {  # L, G, D, groups of the norm
    "nothing a power of two": (37, 21, 18, 1),
    "three heads": (37, 21, 18, 3),
    "one position": (1, 50, 50, 1),
    "no position": (0, 20, 12, 1),
    "whole tiles": (64, 32, 32, 2),
    "more rows than one program sums": (131, 3, 2, 1),
}

Shape = tuple[int, int, int, int]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """In this mode torch.empty returns NaN, so an element no kernel writes shows."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(mode=False)


def make_tensors(shape: Shape, dtype: torch.dtype, *, concat: bool = False) -> dict[str, Tensor]:
    num_positions, width, width_out, _ = shape
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "attended_LG": (num_positions, width),
        "u_LG": (num_positions, width),
        "x_LD": (num_positions, width_out),
        "weight_WD": (3 * width if concat else width, width_out),
        "bias_D": (width_out,),
        "norm_weight_G": (width,),
        "norm_bias_G": (width,),
    }
    return {
        name: (torch.randn(*size, generator=generator) * 0.5).to(DEVICE, dtype).requires_grad_()
        for name, size in sizes.items()
    }


def output_and_gradients(tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and the gradient of every tensor, for a fixed upstream gradient."""
    out_LD = hstu_output(**tensors, **options)  # type: ignore[arg-type]
    upstream = torch.randn(out_LD.shape, generator=torch.Generator().manual_seed(7)).to(out_LD)
    grads = torch.autograd.grad(out_LD, list(tensors.values()), upstream)
    return {"output": out_LD, **{f"grad of {name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, want_one in want.items():
        assert got[name].shape == want_one.shape, name
        if want_one.numel():
            error = (got[name].double() - want_one.double()).abs().max() / want_one.abs().max().clamp(min=1)
            assert error <= tolerance, f"{name} is off by {error:.2e}"  # a NaN fails too


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def assert_triton_equals_reference(tensors: dict[str, Tensor], recompute: bool, **options: Any) -> None:
    want = output_and_gradients(double(tensors), **options, kernel="reference")
    got = output_and_gradients(tensors, **options, recompute=recompute, kernel="triton")
    assert_equal(got, want, TOLERANCE[tensors["x_LD"].dtype])


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("seed", [None, 5], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("concat", [False, True], ids=["gate", "concat"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_every_gradient_equal_the_reference(
    shape: Shape, seed: int | None, *, concat: bool, recompute: bool
) -> None:
    tensors = make_tensors(shape, torch.float32, concat=concat)
    options = {"num_groups": shape[3], "concat": concat, "dropout_p": 0.3, "seed": seed}
    assert_triton_equals_reference(tensors, recompute, **options)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("concat", [False, True], ids=["gate", "concat"])
def test_half_precision_loses_no_more_than_its_rounding(dtype: torch.dtype, *, concat: bool) -> None:
    tensors = make_tensors(SHAPES["three heads"], dtype, concat=concat)
    for recompute in (True, False):
        assert_triton_equals_reference(tensors, recompute, num_groups=3, concat=concat, dropout_p=0.3, seed=5)


@pytest.mark.parametrize("given", [[], ["bias_D"], ["norm_weight_G", "norm_bias_G"]], ids=["bare", "bias", "norm"])
def test_parameters_that_are_not_given_change_nothing_else(given: list[str]) -> None:
    tensors = make_tensors(SHAPES["three heads"], torch.float32)
    kept = {name: tensors[name] for name in ("attended_LG", "u_LG", "x_LD", "weight_WD", *given)}
    for recompute in (True, False):
        assert_triton_equals_reference(kept, recompute, num_groups=3)


@pytest.mark.parametrize("concat", [False, True], ids=["gate", "concat"])
def test_nothing_outside_a_tensor_is_read(*, concat: bool) -> None:
    tensors = make_tensors(SHAPES["three heads"], torch.float32, concat=concat)
    surrounded = {}
    for name, tensor in tensors.items():
        # Rows only, where a kernel would otherwise be given a contiguous copy; the weight is read through its strides.
        columns = 2 if name == "weight_WD" else 0
        sizes = [size + 4 if axis == 0 else size + 2 * columns for axis, size in enumerate(tensor.shape)]
        inner = tensor.new_full(sizes, float("nan"))[2:-2]
        inner = inner[:, 2:-2] if columns else inner
        surrounded[name] = inner.detach().copy_(tensor.detach()).requires_grad_()
    options = {"num_groups": 3, "concat": concat, "dropout_p": 0.3, "seed": 1, "kernel": "triton"}
    assert_equal(output_and_gradients(surrounded, **options), output_and_gradients(tensors, **options), 1e-6)


def test_a_transposed_weight_and_strided_inputs_are_read_as_they_are() -> None:
    tensors = make_tensors(SHAPES["nothing a power of two"], torch.float32)
    strided = {
        name: tensor.detach().t().contiguous().t().requires_grad_() if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    want = output_and_gradients(tensors, kernel="triton")
    assert_equal(output_and_gradients(strided, kernel="triton"), want, 1e-6)


def test_a_layer_may_be_recomputed_as_a_whole() -> None:
    tensors = make_tensors(SHAPES["three heads"], torch.float32)
    options: dict[str, Any] = {"num_groups": 3, "kernel": "triton"}
    want = output_and_gradients(tensors, **options)
    out_LD = checkpoint(lambda: hstu_output(**tensors, **options), use_reentrant=False)  # type: ignore[arg-type]
    upstream = torch.randn(out_LD.shape, generator=torch.Generator().manual_seed(7)).to(out_LD)
    grads = torch.autograd.grad(out_LD, list(tensors.values()), upstream)
    got = {"output": out_LD, **{f"grad of {name}": grad for name, grad in zip(tensors, grads, strict=True)}}
    assert_equal(got, want, 0.0)


def test_two_runs_give_the_same_bits() -> None:
    tensors = make_tensors(SHAPES["more rows than one program sums"], torch.float32)
    options = {"dropout_p": 0.2, "seed": 3, "kernel": "triton"}
    first, second = output_and_gradients(tensors, **options), output_and_gradients(tensors, **options)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("recompute", "per_position"), [(True, 21 + 21 + 2 * 3), (False, 21 + 21 + 2 * 3 + 63)])
def test_what_is_kept_for_the_backward_pass_is_what_was_promised(*, recompute: bool, per_position: int) -> None:
    tensors = make_tensors(SHAPES["three heads"], torch.float32, concat=True)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() if tensor.shape[:1] == (37,) else 0
        return tensor

    options = {"num_groups": 3, "concat": True, "dropout_p": 0.2, "seed": 3}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hstu_output(**tensors, **options, recompute=recompute, kernel="triton")  # type: ignore[arg-type]
    assert sum(kept.values()) == 37 * per_position


@pytest.mark.parametrize("concat", [False, True], ids=["gate", "concat"])
def test_gradients_of_the_reference_equal_finite_differences(*, concat: bool) -> None:
    tensors = double(make_tensors((3, 4, 2, 2), torch.float32, concat=concat))

    def run(*values: Tensor) -> Tensor:
        named = dict(zip(tensors, values, strict=True))
        options: dict[str, Any] = {"num_groups": 2, "concat": concat, "dropout_p": 0.3, "seed": 2}
        return hstu_output(**named, **options, kernel="reference")  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


# --- dropout


def hash_of(element: int, key: DropoutKey) -> int:
    """The hash of dropout.py in Python's own integers."""
    mixed = ((element // 2) * 0x9E3779B1 + key.first) % 2**32
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D + key.second) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) % 2**32
    mixed ^= mixed >> 16
    half = mixed >> 16 if element % 2 else mixed & 0xFFFF
    return half ^ 0x8000


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (0, 4), (1, 2 * BLOCK + 3)], ids=str)
def test_the_multiplier_of_every_element_follows_from_the_hash(shape: tuple[int, int]) -> None:
    key = DropoutKey.of(0.3, 2**63 - 1)
    got = dropout_multiplier(torch.empty(shape, dtype=torch.float64), 0.3, 2**63 - 1)
    want = [0.0 if hash_of(e, key) < key.threshold else key.scale for e in range(shape[0] * shape[1])]
    assert torch.equal(got, torch.tensor(want, dtype=torch.float64).view(shape))


def test_triton_agrees_on_elements_at_the_threshold_itself() -> None:
    shape, options = (600, 256, 1, 1), {"dropout_p": 0.5, "seed": 1}
    just_below = dropout_multiplier(torch.empty(shape[:2]), 0.5 + 2**-16, 1)
    at_threshold = (dropout_multiplier(torch.empty(shape[:2]), 0.5, 1) > 0) & (just_below == 0)
    assert bool(at_threshold.any()), "this seed has no element at the threshold; take another"
    tensors = make_tensors(shape, torch.float32)
    want = hstu_output(**tensors, **options, kernel="reference")  # type: ignore[arg-type]
    got = hstu_output(**tensors, **options, kernel="triton")  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dropout_p", [0.01, 0.2, 0.5, 0.99])
def test_the_dropped_share_is_the_one_asked_for(dropout_p: float) -> None:
    multiplier = dropout_multiplier(torch.empty(4000, 50), dropout_p, 11)
    deviation = (dropout_p * (1 - dropout_p) / multiplier.numel()) ** 0.5
    assert abs(float((multiplier == 0).double().mean()) - dropout_p) < 4 * deviation
    for axis in (0, 1):  # no row and no column is favoured
        share = (multiplier == 0).double().mean(axis)
        num_drawn = multiplier.numel() / share.numel()
        assert (
            float((share - dropout_p).abs().max())
            < 6 * (dropout_p * (1 - dropout_p) / num_drawn) ** 0.5 + 1 / num_drawn
        )


def test_masks_of_neighbours_in_seed_row_and_column_are_unrelated() -> None:
    masks = [(dropout_multiplier(torch.empty(2000, 50), 0.5, seed) == 0).double() for seed in (0, 1, 2, 2**32)]
    pairs = list(itertools.combinations(masks, 2))
    first = masks[0]
    pairs += [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first[:, ::2], first[:, 1::2])]
    for one, other in pairs:
        agreeing = float((one == other).double().mean())
        assert abs(agreeing - 0.5) < 5 * 0.5 / one.numel() ** 0.5


def test_the_rounding_of_the_probability_leaves_no_bias() -> None:
    key = DropoutKey.of(0.3, 0)
    assert abs(key.threshold / 2**16 - 0.3) < 2**-17
    assert key.scale * (1 - key.threshold / 2**16) == pytest.approx(1, abs=1e-15)
    assert DropoutKey.of(1 - 1e-9, 0).scale == 2**16


def test_no_seed_and_no_probability_both_mean_no_dropout() -> None:
    tensors = make_tensors(SHAPES["one position"], torch.float32)
    without = hstu_output(**tensors, kernel="triton")  # type: ignore[arg-type]
    for options in ({"dropout_p": 0.9}, {"seed": 4}):
        assert torch.equal(hstu_output(**tensors, **options, kernel="triton"), without)  # type: ignore[arg-type]


# --- what torch expects of an operator


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_the_operators_pass_torchs_own_checks(*, recompute: bool) -> None:
    torch.use_deterministic_algorithms(mode=False)  # the checks compare uninitialised memory, which must not be NaN
    tensors = make_tensors((5, 6, 4, 2), torch.float32, concat=recompute)
    given: list[Tensor | None] = [*tensors.values()] if recompute else [*list(tensors.values())[:4], None, None, None]
    options = (2, 1e-6, recompute, 0.3, 9, recompute)
    torch.library.opcheck(_forward.overload, (*given, *options))
    plain = [None if tensor is None else tensor.detach() for tensor in given]
    out_LD, *state = _forward(*plain, *options)
    attended, u, _, weight, bias, *norm = plain
    arguments = (torch.ones_like(out_LD), attended, u, weight, *norm, *state, bias is not None, *options[2:])
    torch.library.opcheck(_backward.overload, arguments)
    torch.library.opcheck(dropout_multiplier.overload, (torch.empty(3, 5), 0.3, 7))


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_a_compiled_function_takes_every_seed(kernel: Any) -> None:
    tensors = make_tensors(SHAPES["nothing a power of two"], torch.float32)

    def total(tensors: dict[str, Tensor], seed: int) -> Tensor:
        return hstu_output(**tensors, dropout_p=0.3, seed=seed, kernel=kernel).sin().sum()  # type: ignore[arg-type]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 2**62 + 11):
        want, got = total(tensors, seed), compiled(tensors, seed)
        torch.testing.assert_close(got, want)
        leaves = list(tensors.values())
        torch.testing.assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves))


def test_an_exported_program_takes_any_number_of_positions() -> None:
    class Layer(torch.nn.Module):
        def forward(self, attended_LG: Tensor, u_LG: Tensor, x_LD: Tensor, weight_WD: Tensor) -> Tensor:
            return hstu_output(attended_LG, u_LG, x_LD, weight_WD, kernel="triton")

    def arguments(num_positions: int) -> tuple[Tensor, ...]:
        return (*(torch.randn(num_positions, n, device=DEVICE) for n in (6, 6, 4)), torch.ones(6, 4, device=DEVICE))

    length = {0: torch.export.Dim("L", max=99)}
    exported = torch.export.export(Layer(), arguments(5), dynamic_shapes=(length, length, length, None))
    longer = arguments(11)
    torch.testing.assert_close(exported.module()(*longer), Layer()(*longer))


BAD = {
    r"attended_LG must be float\[L, G\]": {"attended_LG": torch.zeros(3)},
    r"attended_LG must be float\[L, G\], got torch.int64": {"attended_LG": torch.zeros(3, 4, dtype=torch.int64)},
    r"u_LG is \[3, 5\]; it must be \[3, 4\]": {"u_LG": torch.zeros(3, 5)},
    r"x_LD is \[2, 6\]; it must be \[3, D\]": {"x_LD": torch.zeros(2, 6)},
    r"with concat=False it must be \[4, 6\]": {"weight_WD": torch.zeros(12, 6)},
    r"with concat=True it must be \[12, 6\]": {"concat": True},
    r"bias_D is \[4\]; it must be \[6\]": {"bias_D": torch.zeros(4)},
    r"go together": {"norm_bias_G": torch.zeros(4)},
    r"norm_weight_G is \[2\]; it must be \[4\]": {"norm_weight_G": torch.zeros(2), "norm_bias_G": torch.zeros(4)},
    r"u_LG is torch.float64": {"u_LG": torch.zeros(3, 4, dtype=torch.float64)},
    r"weight_WD is torch.float16": {"weight_WD": torch.zeros(4, 6, dtype=torch.float16)},
    r"num_groups is 3; it must divide the width 4": {"num_groups": 3},
    r"num_groups is 0": {"num_groups": 0},
    r"eps is -1.0; it must be positive": {"eps": -1.0},
    r"dropout_p is 1.0; it must be at least 0 and below 1": {"dropout_p": 1.0},
    r"seed is -1; it must be in": {"seed": -1},
    r"seed is 9223372036854775808": {"seed": 2**63},
    r"kernel is 'fast'": {"kernel": "fast"},
}


@pytest.mark.parametrize(("message", "changed"), BAD.items(), ids=BAD.keys())
def test_a_wrong_argument_is_named(message: str, changed: dict[str, Any]) -> None:
    arguments = {
        "attended_LG": torch.zeros(3, 4),
        "u_LG": torch.zeros(3, 4),
        "x_LD": torch.zeros(3, 6),
        "weight_WD": torch.zeros(4, 6),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        hstu_output(**arguments)


def test_triton_refuses_double_precision() -> None:
    wide = torch.zeros(3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"x_LD is torch.float64"):
        hstu_output(wide, wide, wide, wide.new_zeros(4, 4), kernel="triton")


def test_there_is_no_path_of_its_own_for_the_cpu() -> None:
    with pytest.raises(KernelUnavailableError, match="no CPU path"):
        hstu_output(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4, 4), kernel="cpu")
