"""The input half of an HSTU layer in Triton equals the reference, forward and in every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.errors import KernelUnavailableError
from kernels.hstu_input import HSTUInput, hstu_input
from kernels.hstu_input.ops import _backward, _forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest error, in units of the largest element of what is compared (of 1, if that is larger)."""

HALF_DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
"""Interpreted, tl.dot on bfloat16 is wrong."""

SHAPES = {  # L, D, widths of u, v, q, k
    "nothing a power of two": (37, 20, [7, 9, 5, 6]),
    "wider than one tile": (5, 130, [8, 8, 8, 8]),
    "one position": (1, 50, [50, 50, 50, 50]),
    "no position": (0, 20, [7, 9, 5, 6]),
    "whole tiles": (64, 32, [16, 16, 16, 16]),
    "more rows than one program sums": (131, 3, [1, 2, 1, 1]),
}

NAMES = ["u", "v", "q", "k", "grad of x", "grad of weight", "grad of bias", "grad of norm weight", "grad of norm bias"]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """In this mode torch.empty returns NaN, so an element no kernel writes shows."""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(mode=False)


def in_nan(tensor: Tensor) -> Tensor:
    """The same tensor inside a larger one that is NaN everywhere else; not contiguous if it has two dimensions."""
    halo = tensor.new_full([size + 4 for size in tensor.shape], float("nan"))
    inner = halo[tuple(slice(2, 2 + size) for size in tensor.shape)]
    return inner.copy_(tensor)


def make_tensors(shape: tuple[int, int, list[int]], dtype: torch.dtype, *, seed: int = 0) -> dict[str, Tensor]:
    num_positions, width, widths = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "x_LD": (num_positions, width),
        "weight_DE": (width, sum(widths)),
        "bias_E": (sum(widths),),
        "norm_weight_D": (width,),
        "norm_bias_D": (width,),
    }
    return {
        name: (torch.randn(*size, generator=generator) * 0.5).to(DEVICE, dtype).requires_grad_()
        for name, size in sizes.items()
    }


def parts(out: HSTUInput) -> list[Tensor]:
    return [out.u_LG, out.v_LG, out.q_LA, out.k_LA]


def outputs_and_gradients(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """u, v, q, k and the gradients of every tensor, for a fixed upstream gradient."""
    out = parts(hstu_input(**tensors, **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(part.shape, generator=generator).to(part) for part in out]
    return [*out, *torch.autograd.grad(out, list(tensors.values()), upstream)]


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float, names: list[str] = NAMES) -> None:
    for name, got_one, want_one in zip(names, got, want, strict=True):
        if want_one.numel():
            error = (got_one.double() - want_one.double()).abs().max() / want_one.abs().max().clamp(min=1)
            assert error <= tolerance, f"{name} is off by {error:.2e}"  # a NaN fails too
        assert got_one.shape == want_one.shape, name


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("activate", ["uvqk", "u"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_every_gradient_equal_the_reference(
    shape: tuple[int, int, list[int]], activate: str, *, recompute: bool
) -> None:
    tensors = make_tensors(shape, torch.float32)
    options = {"split_sizes": shape[2], "activate": activate}
    want = outputs_and_gradients(double(tensors), **options, kernel="reference")
    got = outputs_and_gradients(tensors, **options, recompute=recompute, kernel="triton")
    assert_equal(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["nothing a power of two", "wider than one tile"])
def test_half_precision_loses_no_more_than_its_rounding(shape: str, dtype: torch.dtype, *, recompute: bool) -> None:
    tensors = make_tensors(SHAPES[shape], dtype)
    options = {"split_sizes": SHAPES[shape][2]}
    want = outputs_and_gradients(double(tensors), **options, kernel="reference")
    got = outputs_and_gradients(tensors, **options, recompute=recompute, kernel="triton")
    assert_equal(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
@pytest.mark.parametrize("given", [[], ["bias_E"], ["norm_weight_D", "norm_bias_D"]], ids=["bare", "bias", "norm"])
def test_parameters_that_are_not_given_change_nothing_else(given: list[str], *, recompute: bool) -> None:
    shape = SHAPES["nothing a power of two"]
    tensors = make_tensors(shape, torch.float32)
    tensors = {name: tensor for name, tensor in tensors.items() if name in ("x_LD", "weight_DE", *given)}
    want = outputs_and_gradients(double(tensors), split_sizes=shape[2], kernel="reference")
    got = outputs_and_gradients(tensors, split_sizes=shape[2], recompute=recompute, kernel="triton")
    assert_equal(got, want, TOLERANCE[torch.float32], [*NAMES[:6], *given])


@pytest.mark.parametrize("shape", ["nothing a power of two", "wider than one tile"])
def test_nothing_outside_a_tensor_is_read(shape: str) -> None:
    tensors = make_tensors(SHAPES[shape], torch.float32)
    surrounded = {name: in_nan(tensor.detach()).requires_grad_() for name, tensor in tensors.items()}
    for name in ("x_LD", "norm_weight_D", "norm_bias_D"):  # these are copied unless they are contiguous
        rows = tensors[name].detach()
        halo = rows.new_full((rows.shape[0] + 4, *rows.shape[1:]), float("nan"))
        surrounded[name] = halo[2:-2].copy_(rows).requires_grad_()
    options = {"split_sizes": SHAPES[shape][2], "kernel": "triton"}
    want = outputs_and_gradients(tensors, **options)
    for name, got_one, want_one in zip(NAMES, outputs_and_gradients(surrounded, **options), want, strict=True):
        torch.testing.assert_close(got_one, want_one, msg=name)


def test_a_transposed_weight_and_a_strided_x_are_read_where_they_are() -> None:
    shape = SHAPES["nothing a power of two"]
    tensors = make_tensors(shape, torch.float32)
    strided = dict(tensors)
    strided["weight_DE"] = tensors["weight_DE"].detach().t().contiguous().t().requires_grad_()
    strided["x_LD"] = in_nan(tensors["x_LD"].detach()).requires_grad_()
    options = {"split_sizes": shape[2], "kernel": "triton"}
    assert_equal(outputs_and_gradients(strided, **options), outputs_and_gradients(tensors, **options), 1e-6)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_a_loss_of_one_part_leaves_the_others_out(kernel: Any) -> None:
    shape = SHAPES["nothing a power of two"]
    tensors, doubles = make_tensors(shape, torch.float32), double(make_tensors(shape, torch.float32))
    got = hstu_input(**tensors, split_sizes=shape[2], kernel=kernel).q_LA.sum()  # type: ignore[arg-type]
    want = hstu_input(**doubles, split_sizes=shape[2], kernel="reference").q_LA.sum()  # type: ignore[arg-type]
    got_grads = list(torch.autograd.grad(got, list(tensors.values())))
    assert_equal(got_grads, list(torch.autograd.grad(want, list(doubles.values()))), 1e-5, NAMES[4:])


def test_rows_far_from_zero_keep_their_variance() -> None:
    shape = SHAPES["nothing a power of two"]
    tensors = make_tensors(shape, torch.float32)
    tensors["x_LD"] = (tensors["x_LD"].detach() + 1000).requires_grad_()
    options = {"split_sizes": shape[2]}
    want = outputs_and_gradients(double(tensors), **options, kernel="reference")
    assert_equal(outputs_and_gradients(tensors, **options, kernel="triton"), want, 1e-3)


def test_a_constant_row_is_normed_to_zero_in_half_precision_too() -> None:
    x_LD = torch.full((3, 20), 1000.0, dtype=torch.float16, device=DEVICE)
    bias_E = torch.ones(8, dtype=torch.float16, device=DEVICE)
    out = hstu_input(
        x_LD, torch.ones_like(x_LD[0]).repeat(8, 1).t(), bias_E=bias_E, split_sizes=[2] * 4, kernel="triton"
    )
    for name, part in zip(NAMES, parts(out), strict=False):
        assert torch.equal(part, torch.nn.functional.silu(torch.ones_like(part))), name


def test_two_runs_give_the_same_bits() -> None:
    shape = SHAPES["more rows than one program sums"]
    first, second = (
        outputs_and_gradients(make_tensors(shape, torch.float32), split_sizes=shape[2], kernel="triton")
        for _ in range(2)
    )
    for name, one, other in zip(NAMES, first, second, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("recompute", "per_position"), [(True, 20 + 2), (False, 20 + 2 + 20 + 27)])
def test_what_is_kept_for_the_backward_pass_is_what_was_promised(*, recompute: bool, per_position: int) -> None:
    tensors = make_tensors((37, 20, [7, 9, 5, 6]), torch.float32)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() if tensor.shape[:1] == (37,) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hstu_input(**tensors, split_sizes=[7, 9, 5, 6], recompute=recompute, kernel="triton")  # type: ignore[arg-type]
    assert sum(kept.values()) == 37 * per_position


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_gradients_of_the_reference_equal_finite_differences(*, affine: bool) -> None:
    tensors = double(make_tensors((3, 4, [2, 1, 2, 1]), torch.float32))
    if not affine:
        tensors = {name: tensors[name] for name in ("x_LD", "weight_DE")}

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(tensors, values, strict=True))
        return tuple(parts(hstu_input(**named, split_sizes=[2, 1, 2, 1], kernel="reference")))  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_the_operators_pass_torchs_own_checks(*, recompute: bool) -> None:
    torch.use_deterministic_algorithms(mode=False)  # the checks compare uninitialised memory, which must not be NaN
    widths = [3, 2, 2, 1]
    tensors = make_tensors((5, 6, widths), torch.float32)
    given = [*tensors.values()] if recompute else [tensors["x_LD"], tensors["weight_DE"], None, None, None]
    torch.library.opcheck(_forward.overload, (*given, 1e-6, widths, 8, recompute))
    plain = [None if tensor is None else tensor.detach() for tensor in given]
    out = _forward(*plain, 1e-6, widths, 8, recompute)
    grads = [torch.ones_like(part) for part in out[:4]]
    torch.library.opcheck(_backward.overload, (grads, *plain, list(out[4:]), 8, recompute))


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_a_compiled_function_gives_the_same(kernel: Any) -> None:
    shape = SHAPES["nothing a power of two"]
    tensors = make_tensors(shape, torch.float32)

    def total(x_LD: Tensor, weight_DE: Tensor) -> Tensor:
        out = hstu_input(x_LD, weight_DE, split_sizes=shape[2], kernel=kernel)
        return sum((part.sin().sum() for part in parts(out)), start=out.u_LG.sum())

    arguments = (tensors["x_LD"], tensors["weight_DE"])
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    want, got = total(*arguments), compiled(*arguments)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, arguments), torch.autograd.grad(want, arguments))


def test_an_exported_program_takes_any_number_of_positions() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x_LD: Tensor, weight_DE: Tensor) -> tuple[Tensor, ...]:
            return tuple(parts(hstu_input(x_LD, weight_DE, split_sizes=[3, 2, 2, 1], kernel="triton")))

    x_LD, weight_DE = torch.randn(5, 6, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    exported = torch.export.export(
        Layer(), (x_LD, weight_DE), dynamic_shapes=({0: torch.export.Dim("L", max=99)}, None)
    )
    longer_LD = torch.randn(11, 6, device=DEVICE)
    torch.testing.assert_close(exported.module()(longer_LD, weight_DE), Layer()(longer_LD, weight_DE))


BAD = {
    r"x_LD must be float\[L, D\]": {"x_LD": torch.zeros(3)},
    r"x_LD must be float\[L, D\], got torch.int64": {"x_LD": torch.zeros(3, 4, dtype=torch.int64)},
    r"weight_DE is \[5, 8\]; x_LD of width 4 needs \[4, E\]": {"weight_DE": torch.zeros(5, 8)},
    r"bias_E is \[7\]; it must be \[8\]": {"bias_E": torch.zeros(7)},
    r"go together": {"norm_weight_D": torch.zeros(4)},
    r"norm_bias_D is \[3\]; it must be \[4\]": {"norm_weight_D": torch.zeros(4), "norm_bias_D": torch.zeros(3)},
    r"weight_DE is torch.float64": {"weight_DE": torch.zeros(4, 8, dtype=torch.float64)},
    r"bias_E is torch.float16": {"bias_E": torch.zeros(8, dtype=torch.float16)},
    r"split_sizes is \[2, 2, 2\]": {"split_sizes": [2, 2, 2]},
    r"split_sizes is \[0, 4, 2, 2\]": {"split_sizes": [0, 4, 2, 2]},
    r"sum to the 8 columns": {"split_sizes": [2, 2, 2, 3]},
    r"eps is 0.0; it must be positive": {"eps": 0.0},
    r"activate is 'v'; it must be one of uvqk, u": {"activate": "v"},
    r"kernel is 'fast'": {"kernel": "fast"},
}


@pytest.mark.parametrize(("message", "changed"), BAD.items(), ids=BAD.keys())
def test_a_wrong_argument_is_named(message: str, changed: dict[str, Any]) -> None:
    arguments = {"x_LD": torch.zeros(3, 4), "weight_DE": torch.zeros(4, 8), "split_sizes": [2, 2, 2, 2], **changed}
    with pytest.raises(ValueError, match=message):
        hstu_input(**arguments)


def test_triton_refuses_double_precision() -> None:
    x_LD = torch.zeros(3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"x_LD is torch.float64"):
        hstu_input(x_LD, x_LD.new_zeros(4, 8), split_sizes=[2, 2, 2, 2], kernel="triton")


def test_there_is_no_path_of_its_own_for_the_cpu() -> None:
    with pytest.raises(KernelUnavailableError, match="no CPU path"):
        hstu_input(torch.zeros(3, 4), torch.zeros(4, 8), split_sizes=[2, 2, 2, 2], kernel="cpu")
