"""Softmax losses equal the formula, forward and in every gradient, whichever implementation forms them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.implementations import KernelName
from kernels.softmax_loss import (
    LogitSummary,
    SoftmaxLoss,
    form_catalogue_softmax,
    full_softmax_loss,
    sampled_softmax_loss,
)

IMPLEMENTATIONS = ["cpu", "triton"]
DTYPES = {"cpu": [torch.float64, torch.float32, torch.bfloat16], "triton": [torch.float32, torch.float16]}
if torch.cuda.is_available():  # interpreted, matrix products of bfloat16 are wrong
    DTYPES["triton"].append(torch.bfloat16)
ATOL = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = [(kernel, dtype) for kernel in IMPLEMENTATIONS for dtype in DTYPES[kernel]]
WIDTH = 6

SHAPES = {
    "plain": (13, 11, 5),
    "one position": (1, 11, 3),
    "one negative": (7, 5, 1),
    "no negatives": (4, 5, 0),
    "one item": (3, 1, 4),
    "more negatives than items": (9, 3, 20),
    "several tiles of each": (19, 35, 18),
}
"""Positions, items, negatives: most rows hold duplicates, and some the target."""


def device_of(kernel: KernelName) -> str:
    return "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Leaves and constants of one loss; negatives None: the full softmax."""

    leaves: dict[str, Tensor]
    targets: Tensor
    negatives: Tensor | None
    weights: Tensor | None = None
    log_q: Tensor | None = None
    log_q_target: Tensor | None = None

    def run(self, kernel: KernelName) -> SoftmaxLoss:
        u, item, scale, offset = (self.leaves.get(name) for name in ("u", "item", "scale", "offset"))
        assert u is not None
        assert item is not None
        assert scale is not None
        if self.negatives is None:
            return full_softmax_loss(
                u, item, self.targets, scale=scale, offset_V=offset, weights_P=self.weights, kernel=kernel
            )
        return sampled_softmax_loss(
            u,
            item,
            self.targets,
            self.negatives,
            scale=scale,
            offset_V=offset,
            weights_P=self.weights,
            log_q_C=self.log_q,
            log_q_target_P=self.log_q_target,
            kernel=kernel,
        )

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        leaves = {
            # scale and offset are parameters: they stay float32 (float64) whatever the dtype of u and item
            name: x.detach()
            .to(device, dtype if name in {"u", "item"} or dtype == torch.float64 else torch.float32)
            .requires_grad_()
            for name, x in self.leaves.items()
        }
        return replace(
            self,
            leaves=leaves,
            targets=self.targets.to(device),
            negatives=moved(self.negatives),
            weights=moved(self.weights),
            log_q=moved(self.log_q),
            log_q_target=moved(self.log_q_target),
        )


def make_inputs(
    shape: tuple[int, int, int], mode: str = "own", *, with_offset: bool = True, dtype: torch.dtype = torch.float64
) -> Inputs:
    """Float64 inputs whose values ``dtype`` represents exactly, so that only the arithmetic differs."""
    num_positions, num_items, num_negatives = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(torch.float64)

    def rows(*size: int) -> Tensor:
        return torch.randint(num_items, size, generator=generator)

    leaves = {"u": normal(num_positions, WIDTH), "item": normal(num_items, WIDTH), "scale": torch.tensor(1.25).double()}
    if with_offset:
        leaves["offset"] = normal(num_items)
    inputs = Inputs(
        leaves={name: x.requires_grad_() for name, x in leaves.items()},
        targets=rows(num_positions),
        negatives={"own": lambda: rows(num_positions, num_negatives), "shared": lambda: rows(num_negatives)}.get(
            mode, lambda: None
        )(),
        weights=torch.rand(num_positions, generator=generator).double() if with_offset else None,
    )
    if mode == "shared" and with_offset:
        return replace(inputs, log_q=normal(num_negatives), log_q_target=normal(num_positions))
    return inputs


def formula(inputs: Inputs) -> Tensor:
    """loss_P of the docstring, one position at a time."""
    logits_PV = inputs.leaves["scale"] * inputs.leaves["u"] @ inputs.leaves["item"].T
    if "offset" in inputs.leaves:
        logits_PV = logits_PV + inputs.leaves["offset"]
    losses = []
    for p, target in enumerate(inputs.targets.tolist()):
        if inputs.negatives is None:
            losses.append(functional.cross_entropy(logits_PV[p], inputs.targets[p]))
            continue
        target_logit = logits_PV[p, target]
        if inputs.log_q_target is not None:
            target_logit = target_logit - inputs.log_q_target[p]
        total = target_logit.exp()
        negatives = inputs.negatives if inputs.negatives.dim() == 1 else inputs.negatives[p]
        for c, negative in enumerate(negatives.tolist()):
            if negative != target:
                correction = 0 if inputs.log_q is None else inputs.log_q[c]
                total = total + (logits_PV[p, negative] - correction).exp()
        losses.append(total.log() - target_logit)
    return torch.stack(losses)


def assert_same(got: SoftmaxLoss, got_leaves: dict[str, Tensor], inputs: Inputs, atol: float) -> None:
    want_P = formula(inputs)
    weights = torch.full_like(want_P, 1 / want_P.shape[0]) if inputs.weights is None else inputs.weights
    want = (weights * want_P).sum()
    torch.testing.assert_close(got.loss_P.cpu().double(), want_P.detach(), atol=atol, rtol=atol, msg="loss_P")
    torch.testing.assert_close(got.loss.detach().cpu().double(), want.detach(), atol=atol, rtol=atol, msg="loss")
    got_grads = torch.autograd.grad(got.loss * 3, list(got_leaves.values()))
    want_grads = torch.autograd.grad(want * 3, list(inputs.leaves.values()), allow_unused=True, materialize_grads=True)
    for name, got_grad, want_grad in zip(inputs.leaves, got_grads, want_grads, strict=True):
        assert got_grad.dtype == got_leaves[name].dtype, name
        assert torch.allclose(got_grad.cpu().double(), want_grad, atol=3 * atol, rtol=atol), f"gradient of {name}"


@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_reference_and_its_gradients_equal_the_formula(
    shape: tuple[int, int, int], mode: str, *, with_offset: bool
) -> None:
    inputs = make_inputs(shape, mode, with_offset=with_offset)
    assert_same(inputs.run("reference"), inputs.leaves, inputs, ATOL[torch.float64])


@pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "no offset"])
@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("kernel", "dtype"), CASES)
def test_every_implementation_and_its_gradients_equal_the_formula(
    kernel: KernelName, dtype: torch.dtype, shape: tuple[int, int, int], mode: str, *, with_offset: bool
) -> None:
    inputs = make_inputs(shape, mode, with_offset=with_offset, dtype=dtype)
    given = inputs.to(device_of(kernel), dtype)
    assert_same(given.run(kernel), given.leaves, inputs, ATOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["own", "shared"])
def test_chunks_of_positions_change_nothing(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs((13, 11, 5), mode, dtype=dtype)
    given = inputs.to("cpu", dtype)
    for entries in (1, 18, 6 * 13):
        monkeypatch.setattr("kernels.softmax_loss.cpu.ENTRIES_PER_CHUNK", entries)
        assert_same(given.run("cpu"), given.leaves, inputs, ATOL[dtype])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_the_softmax_over_a_catalogue_has_the_loss_logits_and_gradients_of_the_whole(
    chunk: int, *, weighted: bool
) -> None:
    inputs = make_inputs((13, 11, 0), "full")
    weights = torch.arange(1, 14, dtype=torch.float64) if weighted else torch.full((13,), 1 / 13, dtype=torch.float64)
    leaves = inputs.leaves
    seen: list[tuple[slice, Tensor]] = []
    formed = form_catalogue_softmax(
        leaves["u"],
        leaves["item"],
        inputs.targets,
        scale=leaves["scale"],
        offset_V=leaves["offset"],
        weights_P=weights if weighted else None,
        positions_per_chunk=chunk,
        on_logits=lambda part, logits: seen.append((part, logits.clone())),
    )
    logits = leaves["scale"] * leaves["u"] @ leaves["item"].T + leaves["offset"]
    want = (weights * functional.cross_entropy(logits, inputs.targets, reduction="none")).sum()
    torch.testing.assert_close(formed.loss, want.detach())
    torch.testing.assert_close(torch.cat([shown for _, shown in seen]), logits.detach())
    assert [i for part, _ in seen for i in range(13)[part]] == list(range(13))
    some = torch.unique(torch.cat([inputs.targets, torch.tensor([2, 9])]))
    got = {"u": formed.u_PD, "item": formed.item_gradient(some), "scale": formed.scale, "offset": formed.offset_V}
    for name, want_grad in zip(leaves, torch.autograd.grad(want, list(leaves.values())), strict=True):
        want_part = want_grad[some] if name == "item" else want_grad
        assert torch.allclose(got[name], want_part, atol=1e-12), f"gradient of {name}"


def test_what_is_kept_of_logits_is_what_they_were() -> None:
    inputs = make_inputs((13, 11, 0), "full")
    leaves = {name: leaf.detach() for name, leaf in inputs.leaves.items()}
    logits = leaves["scale"] * leaves["u"] @ leaves["item"].T + leaves["offset"]
    want = LogitSummary.of(logits, inputs.targets)
    got = form_catalogue_softmax(
        leaves["u"],
        leaves["item"],
        inputs.targets,
        scale=leaves["scale"],
        offset_V=leaves["offset"],
        positions_per_chunk=5,
    ).summary
    torch.testing.assert_close(got.log_sum_P, want.log_sum_P)
    torch.testing.assert_close(got.target_P, want.target_P)
    torch.testing.assert_close(got.top_P, logits.amax(1))
    torch.testing.assert_close(got.loss_P, functional.cross_entropy(logits, inputs.targets, reduction="none"))


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("kernel", ["reference", *IMPLEMENTATIONS])
def test_no_positions_give_a_loss_and_gradients_of_zero(kernel: KernelName, mode: str) -> None:
    inputs = make_inputs((0, 5, 3), mode).to(device_of(kernel), torch.float32)
    got = inputs.run(kernel)
    assert got.loss_P.shape == (0,)
    assert float(got.loss.detach()) == 0.0
    grads = torch.autograd.grad(got.loss, list(inputs.leaves.values()), allow_unused=True, materialize_grads=True)
    for name, grad in zip(inputs.leaves, grads, strict=True):
        assert not bool(grad.any()), f"gradient of {name}"


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_huge_logits_give_finite_gradients_and_on_the_cpu_no_denormal_ones(kernel: KernelName, mode: str) -> None:
    inputs = make_inputs((5, 4, 3), mode, with_offset=False).to(device_of(kernel), torch.float32)
    leaves = {**inputs.leaves, "scale": torch.tensor(1e4, device=device_of(kernel), requires_grad=True)}
    got = replace(inputs, leaves=leaves).run(kernel)
    grads = torch.autograd.grad(got.loss, list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert bool(grad.isfinite().all()), f"gradient of {name}"
        denormal = (grad != 0) & (grad.abs() < torch.finfo(torch.float32).tiny)
        assert kernel != "cpu" or not bool(denormal.any()), f"gradient of {name}"


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("kernel", ["reference", *IMPLEMENTATIONS])
def test_an_item_that_is_not_a_number_shows_in_the_loss(kernel: KernelName, mode: str) -> None:
    inputs = make_inputs((2, 30, 20), mode).to(device_of(kernel), torch.float32)
    candidates = torch.arange(30) if inputs.negatives is None else inputs.negatives.flatten()
    broken = next(row for row in candidates.tolist() if row not in inputs.targets.tolist())
    inputs.leaves["item"].data[broken] = torch.nan
    assert bool(inputs.run(kernel).loss.isnan())


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_nothing_around_the_inputs_is_read(kernel: KernelName, mode: str) -> None:
    inputs = make_inputs((7, 11, 5), mode, dtype=torch.float32)
    given = inputs.to(device_of(kernel), torch.float32)
    halo = {}
    for name in ("u", "item"):
        x = given.leaves[name].detach()
        padded = torch.full((x.shape[0] + 6, x.shape[1]), torch.nan, device=x.device)
        padded[3:-3] = x
        halo[name] = padded[3:-3].requires_grad_()
    given = replace(given, leaves={**given.leaves, **halo})
    assert_same(given.run(kernel), given.leaves, inputs, ATOL[torch.float32])


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_rows_of_a_transposed_table_are_found(kernel: KernelName, mode: str) -> None:
    inputs = make_inputs((7, 11, 5), mode, dtype=torch.float32)
    given = inputs.to(device_of(kernel), torch.float32)
    turned = {name: given.leaves[name].detach().T.contiguous().T.requires_grad_() for name in ("u", "item")}
    given = replace(given, leaves={**given.leaves, **turned})
    assert_same(given.run(kernel), given.leaves, inputs, ATOL[torch.float32])


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_two_runs_give_the_same_bits(kernel: KernelName, mode: str) -> None:
    inputs = make_inputs((13, 11, 20), mode).to(device_of(kernel), torch.float32)
    first, second = (torch.autograd.grad(inputs.run(kernel).loss, list(inputs.leaves.values())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
def test_without_gradients_the_loss_is_the_same(mode: str) -> None:
    inputs = make_inputs((7, 11, 5), mode)
    want = inputs.run("cpu")
    with torch.no_grad():
        got = inputs.run("cpu")
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.loss_P, want.loss_P)
    assert not got.loss.requires_grad


def test_a_scale_may_be_a_plain_number() -> None:
    inputs = make_inputs((7, 11, 5))
    assert inputs.negatives is not None
    u, item = inputs.leaves["u"], inputs.leaves["item"]
    for kernel in ("reference", "cpu"):
        got = sampled_softmax_loss(u, item, inputs.targets, inputs.negatives, scale=20.0, kernel=kernel)
        scale = torch.tensor(20.0, dtype=torch.float64)
        want = sampled_softmax_loss(u, item, inputs.targets, inputs.negatives, scale=scale, kernel=kernel)
        assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
@pytest.mark.parametrize("kernel", IMPLEMENTATIONS)
def test_the_operator_keeps_the_contract_of_custom_operators(kernel: KernelName, mode: str) -> None:
    inputs = make_inputs((7, 11, 5), mode).to(device_of(kernel), torch.float32)
    x = inputs.leaves
    arguments = (x["u"], x["item"], inputs.targets, inputs.negatives, x["scale"], x["offset"], inputs.weights)
    constants = (inputs.log_q, inputs.log_q_target)
    # The losses of the positions and the gradients are outputs without a derivative: only the loss has one.
    torch.library.opcheck(torch.ops.headrace.softmax_loss.default, (*arguments, *constants, True, kernel))


@pytest.mark.parametrize("mode", ["own", "shared", "full"])
def test_it_compiles_into_one_graph(mode: str) -> None:
    inputs = make_inputs((7, 11, 5), mode)

    def doubled_loss() -> Tensor:
        return inputs.run("auto").loss * 2

    compiled: Callable[[], Tensor] = torch.compile(doubled_loss, fullgraph=True, backend="aot_eager")
    leaves = list(inputs.leaves.values())
    got, want = (torch.autograd.grad(f(), leaves) for f in (compiled, doubled_loss))
    for name, a, b in zip(inputs.leaves, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=f"gradient of {name}")


def test_it_exports() -> None:
    inputs = make_inputs((7, 11, 5), "shared")

    class Loss(torch.nn.Module):
        def forward(self, u: Tensor, item: Tensor) -> Tensor:
            assert inputs.negatives is not None
            return sampled_softmax_loss(u, item, inputs.targets, inputs.negatives, scale=20.0).loss

    arguments = (inputs.leaves["u"].detach(), inputs.leaves["item"].detach())
    program = torch.export.export(Loss(), arguments)
    assert torch.equal(program.module()(*arguments), Loss()(*arguments))


def test_float64_is_refused_by_triton() -> None:
    with pytest.raises(ValueError, match="u_PD and item_VD are float64"):
        make_inputs((7, 11, 5)).to(device_of("triton"), torch.float64).run("triton")


def test_rows_outside_the_catalogue_are_refused_on_the_cpu() -> None:
    inputs = make_inputs((7, 11, 5))
    assert inputs.negatives is not None
    inputs.negatives[3, 2] = 11
    with pytest.raises(ValueError, match="item_VD has 11 rows"):
        inputs.run("cpu")


WRONG = {
    "u_PD must be float": {"u": torch.zeros(7)},
    "item_VD must be": {"item": torch.zeros(11, WIDTH + 1)},
    "item_VD must be torch.float32": {"item": torch.zeros(11, WIDTH).double()},
    "item_VD is on meta": {"item": torch.zeros(11, WIDTH, device="meta")},
    "target_rows_P must be int64": {"target": torch.zeros(7, dtype=torch.int32)},
    "negative_rows must be int64.P, C. or": {"negatives": torch.zeros(7, 5, 1, dtype=torch.int64)},
    "negative_rows must be int64.7, 5.": {"negatives": torch.zeros(6, 5, dtype=torch.int64)},
    "scale must be": {"scale": torch.zeros(1)},
    "offset_V must be": {"offset_V": torch.zeros(10)},
    "weights_P must be": {"weights_P": torch.zeros(7, dtype=torch.int64)},
    "belong to shared negatives": {"log_q_C": torch.zeros(5)},
    "log_q_C must be": {"log_q_C": torch.zeros(4), "negatives": torch.zeros(5, dtype=torch.int64)},
    "log_q_target_P must be": {"log_q_target_P": torch.zeros(4), "negatives": torch.zeros(5, dtype=torch.int64)},
}


@pytest.mark.parametrize(("message", "wrong"), WRONG.items(), ids=WRONG.keys())
def test_wrong_arguments_are_named(message: str, wrong: dict[str, Tensor]) -> None:
    x = {
        "u": torch.zeros(7, WIDTH),
        "item": torch.zeros(11, WIDTH),
        "target": torch.zeros(7, dtype=torch.int64),
        "negatives": torch.zeros(7, 5, dtype=torch.int64),
        "scale": torch.tensor(1.0),
        **wrong,
    }
    u, item, target, negatives = (x.pop(name) for name in ("u", "item", "target", "negatives"))
    with pytest.raises(ValueError, match=message):
        sampled_softmax_loss(u, item, target, negatives, **x)  # type: ignore[arg-type]
    if not any(name in message for name in ("negative", "log_q")):
        with pytest.raises(ValueError, match=message):
            full_softmax_loss(u, item, target, **x)  # type: ignore[arg-type]
