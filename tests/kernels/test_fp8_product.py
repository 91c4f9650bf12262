"""Products of 8-bit floats are those of the rounded factors, and close to those of the factors themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.fp8_product import CAPABILITY, LARGEST, fp8_product, rounded
from kernels.hstu_input import hstu_input
from kernels.hstu_output import hstu_output

SHAPES = [(1, 16, 16), (37, 64, 256), (130, 256, 64), (300, 48, 80)]
CLOSE = 0.08
"""Of the worst row, relative to its norm: four bits of each factor are kept (e4m3), 3.6 % is usual."""
HAS_FP8_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY


def factors(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x with a row that is a thousand times as large as others, and a weight."""
    generator = torch.Generator().manual_seed(sum(shape))
    num, width, columns = shape
    x_LD = torch.randn(num, width, generator=generator)
    x_LD[0] *= 1_000
    return x_LD.to(dtype), (0.05 * torch.randn(width, columns, generator=generator)).to(dtype)


def distance(got: Tensor, want: Tensor) -> float:
    """Of each row, relative to its norm; the largest."""
    return float(((got - want).detach().double().norm(dim=1) / want.detach().double().norm(dim=1)).max())


def test_a_rounded_row_has_its_largest_magnitude_and_rows_of_zeros_stay() -> None:
    x_LD = torch.tensor([[1e-5, -4e-5, 2e-5], [0.0, 0.0, 0.0], [3e4, 1.0, -7e4]])
    x_8, scale = rounded(x_LD)
    assert scale.shape == (3, 1)
    torch.testing.assert_close((x_8.float() * scale)[[0, 2]].amax(1), x_LD[[0, 2]].amax(1), rtol=0.07, atol=0)
    assert float(x_8.float().abs().max()) == LARGEST
    assert not x_8.float()[1].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_the_rounded_factors(shape: tuple[int, int, int]) -> None:
    x_LD, weight_DE = factors(shape)
    x_8, scale = rounded(x_LD)
    columns_8, column_scale = rounded(weight_DE.T)
    emulated = (x_8.float() * scale) @ (columns_8.float() * column_scale).T
    torch.testing.assert_close(fp8_product(x_LD, weight_DE), emulated, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_and_both_gradients_are_close_to_those_of_the_factors(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x_LD, weight_DE = (one.requires_grad_() for one in factors(shape, dtype))
    got, want = fp8_product(x_LD, weight_DE), x_LD @ weight_DE
    assert got.dtype == dtype
    assert distance(got, want) < CLOSE
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got_grads = torch.autograd.grad(got, [x_LD, weight_DE], upstream)
    want_grads = torch.autograd.grad(want, [x_LD, weight_DE], upstream)
    assert distance(got_grads[0], want_grads[0]) < CLOSE
    torch.testing.assert_close(got_grads[1], want_grads[1])  # not rounded


def test_nothing_times_a_weight_is_nothing_and_has_gradients_of_zero() -> None:
    x_LD, weight_DE = torch.zeros(0, 16, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    product = fp8_product(x_LD, weight_DE)
    assert product.shape == (0, 32)
    grads = torch.autograd.grad(product.sum(), [x_LD, weight_DE])
    assert grads[0].shape == (0, 16)
    assert not grads[1].any()


def test_both_halves_of_a_layer_take_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x_LD, weight_DE = torch.randn(40, 32, generator=generator), 0.1 * torch.randn(32, 128, generator=generator)
    want, got = (hstu_input(x_LD, weight_DE, split_sizes=[32] * 4, product=one) for one in ("plain", "fp8"))
    for name in ("u_LG", "v_LG", "q_LA", "k_LA"):
        error = (getattr(got, name) - getattr(want, name)).norm() / getattr(want, name).norm()
        assert 1e-4 < error < CLOSE, name
    attended_LG, u_LG = torch.randn(40, 32, generator=generator), torch.randn(40, 32, generator=generator)
    want_LD, got_LD = (
        hstu_output(attended_LG, u_LG, x_LD, weight_DE[:, :32], product=one) - x_LD for one in ("plain", "fp8")
    )
    assert 1e-4 < (got_LD - want_LD).norm() / want_LD.norm() < CLOSE


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FP8_GPU, reason="needs a GPU that multiplies 8-bit floats")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gpu_makes_the_product_that_the_cpu_makes(shape: tuple[int, int, int]) -> None:
    x_LD, weight_DE = (one.requires_grad_() for one in factors(shape, torch.bfloat16))
    on_gpu = [one.detach().cuda().requires_grad_() for one in (x_LD, weight_DE)]
    want, got = fp8_product(x_LD, weight_DE), fp8_product(*on_gpu)
    assert distance(got.cpu(), want) < 0.01
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(got, on_gpu, upstream.cuda())
    for one, other in zip(grads, torch.autograd.grad(want, [x_LD, weight_DE], upstream), strict=True):
        assert (one.cpu() - other).norm() < 0.02 * other.norm()
