"""Computing beside the host: nothing of the device meets anything of the host but through `send` and `bring`.

Without a device, a dispatch mode stands in for one: what was sent is marked, and marked and unmarked tensors must not
enter one operation. With one (`make gpu`), the steps themselves are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.batch import HistoryBatch, Targets
from model.compute import Compute
from model.config import LossConfig, ModelConfig, OptimizerConfig
from model.learning import SupervisedPass, supervised_pass
from model.optimizer import RecommenderOptimizer
from model.recommender import Recommender

LOSSES = [
    LossConfig(num_hard_negatives=4),
    *(LossConfig(kind="sampled", num_negatives=6, negatives=one) for one in ("uniform", "popularity", "in_batch")),
]
NUM_ITEMS = 20


class TwoPlaces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks storages as lying on the device. Tensors that are made from nothing (positions, zeros) go with either."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device: set[int] = set()
        self._either: set[int] = set()
        self._kept: list[Tensor] = []
        """So that no address is used again."""

    def mark(self, tensor: Tensor) -> None:
        self._device.add(_place(tensor))
        self._kept.append(tensor)

    def is_on_device(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs or {})) if isinstance(one, Tensor)]
        known = [one for one in tensors if _place(one) not in self._either and one.dim() > 0]
        places = {self.is_on_device(one) for one in known}
        assert len(places) < 2, f"{func} joins the device's {[tuple(t.shape) for t in known if self.is_on_device(t)]}"
        result = func(*args, **(kwargs or {}))
        marks = self._device if True in places else self._either if not known else None
        for one in (one for one in tree_leaves(result) if isinstance(one, Tensor)):
            if marks is not None and _place(one) not in self._device:
                marks.add(_place(one))
            self._kept.append(one)
        return result


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


class _Sent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mode: TwoPlaces) -> Tensor:
        ctx.mode = mode
        sent = tensor.clone()
        mode.mark(sent)
        return sent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert grads[0].dim() == 0 or ctx.mode.is_on_device(grads[0])
        return torch.from_numpy(grads[0].numpy().copy()), None


class WatchedCompute(Compute):
    """The host, watched as if part of it were a device."""

    mode: TwoPlaces

    def send(self, tensor: Tensor) -> Tensor:
        sent: Tensor = tensor if self.mode.is_on_device(tensor) else _Sent.apply(tensor, self.mode)  # type: ignore[no-untyped-call]
        return sent

    def bring(self, tensor: Tensor) -> Tensor:
        return torch.from_numpy(tensor.detach().numpy().copy())


def recommender_of(config: ModelConfig) -> Recommender:
    recommender = Recommender(config)
    recommender.items.admit(np.arange(NUM_ITEMS))
    recommender.items.observe(np.arange(NUM_ITEMS), 1_000 * np.arange(NUM_ITEMS))
    return recommender


def a_batch() -> tuple[HistoryBatch, Targets]:
    times = torch.tensor([10, 20, 30, 10, 40]) * 1_000
    batch = HistoryBatch(
        rows_L=torch.tensor([1, 2, -1, 4, 5]),
        timestamps_ms_L=times,
        query_times_ms_L=times + 5_000,
        offsets=torch.tensor([0, 3, 3, 5]),
    )
    weights = torch.tensor([1.0, 2.0, 1.0])
    return batch, Targets(positions_P=torch.tensor([1, 2, 4]), rows_P=torch.tensor([7, 4, 1]), weights_P=weights)


def a_pass(recommender: Recommender, loss: LossConfig, shown: list[Tensor] | None = None) -> SupervisedPass:
    batch, targets = a_batch()
    found = supervised_pass(
        recommender,
        batch,
        targets,
        loss,
        generator=torch.Generator().manual_seed(0),
        on_logits=None if shown is None else lambda _part, logits: shown.append(logits.detach().cpu().clone()),
    )
    found.backward()
    return found


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind} {loss.negatives}")
def test_a_step_keeps_host_and_device_apart(small_config: ModelConfig, loss: LossConfig, kind: Any) -> None:
    config = ModelConfig(**(small_config.as_dict() | {"kind": kind}))
    plain, watched = recommender_of(config), recommender_of(config)
    mode = TwoPlaces()
    compute = WatchedCompute(device=torch.device("cpu"))
    object.__setattr__(compute, "mode", mode)
    for parameter in watched.retrieval_parameters().values():
        mode.mark(parameter)
    watched.compute = compute
    want = a_pass(plain, loss)
    with mode:
        batch, targets = a_batch()
        got = supervised_pass(watched, batch, targets, loss, generator=torch.Generator().manual_seed(0))
        got.backward()
    torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(got.active.rows_R, want.active.rows_R)
    torch.testing.assert_close(got.active.weight_RD.grad, want.active.weight_RD.grad)
    torch.testing.assert_close(got.active.bias_R.grad, want.active.bias_R.grad)


def test_mixing_them_is_noticed() -> None:
    mode = TwoPlaces()
    here, there = torch.ones(3), torch.ones(3)
    mode.mark(there)
    with mode:
        there + torch.zeros(3)  # made from nothing
        with pytest.raises(AssertionError, match="joins the device's"):
            here + there


def test_settings_choose_the_device_and_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Compute.chosen("auto", "auto") == Compute(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"trainer\.device is cuda"):
        Compute.chosen("cuda", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Compute.chosen("auto", "auto") == Compute(device=torch.device("cuda"), is_bfloat16=True)
    assert Compute.chosen("cuda", "float32") == Compute(device=torch.device("cuda"))
    assert Compute.chosen("cpu", "auto") == Compute(device=torch.device("cpu"))


def test_products_of_8_bit_floats_need_a_device_that_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"trainer\.precision is fp8, .*the CPU.* set trainer\.precision to auto"):
        Compute.chosen("auto", "fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.0: it needs .* 8\.9 or above"):
        Compute.chosen("auto", "fp8")
    with pytest.raises(ValueError, match="the CPU"):
        Compute.chosen("cpu", "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert Compute.chosen("auto", "fp8") == Compute(device=torch.device("cuda"), is_bfloat16=True, product="fp8")


FP8 = Compute(device=torch.device("cpu"), is_bfloat16=True, product="fp8")
"""The CPU makes these products, too, if slowly."""
WIDE: dict[str, Any] = {"embedding_dim": 32, "num_heads": 2, "attention_dim": 8, "hidden_dim": 16}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"kind": "gru"}, r"model\.kind hstu and ultra_hstu, not for gru"),
        ({"embedding_dim": 40}, r"model\.embedding_dim is 40: it must be a multiple of 16"),
        ({"num_heads": 1}, r"model\.num_heads times model\.attention_dim is 8"),
    ],
)
def test_a_model_that_cannot_have_them_is_refused_by_the_setting(
    small_config: ModelConfig, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Recommender(replace(small_config, **{**WIDE, **changed})).use(FP8)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("options", [{}, {"kind": "ultra_hstu", "local_attn_len": 2, "global_attn_len": 1}], ids=str)
def test_a_step_with_products_of_8_bit_floats_is_close_to_one_in_bfloat16(
    small_config: ModelConfig, options: dict[str, Any], recompute: bool
) -> None:
    config = replace(small_config, **WIDE, **options, tokens="items", recompute=recompute)
    plain, rounded = recommender_of(config), recommender_of(config)
    plain.use(Compute(device=torch.device("cpu"), is_bfloat16=True))
    rounded.use(FP8)
    want, got = a_pass(plain, LOSSES[0]), a_pass(rounded, LOSSES[0])
    torch.testing.assert_close(got.loss, want.loss, rtol=0.02, atol=0.02)
    assert not torch.equal(got.loss, want.loss)
    for (name, parameter), other in zip(rounded.named_parameters(), plain.parameters(), strict=True):
        if name.endswith(("uvqk", "output_weight")):
            assert parameter.grad is not None
            assert other.grad is not None
            assert (parameter.grad - other.grad).norm() < 0.2 * other.grad.norm(), name


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind} {loss.negatives}")
def test_bfloat16_changes_little(small_config: ModelConfig, loss: LossConfig) -> None:
    plain, rounded = recommender_of(small_config), recommender_of(small_config)
    rounded.use(Compute(device=torch.device("cpu"), is_bfloat16=True))
    want, got = a_pass(plain, loss), a_pass(rounded, loss)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, want.loss, rtol=0.02, atol=0.02)
    assert not torch.equal(got.loss, want.loss)
    for name, parameter in rounded.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind} {loss.negatives}")
@pytest.mark.parametrize("is_bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_steps_on_a_device_are_those_of_the_host(
    small_config: ModelConfig, loss: LossConfig, is_bfloat16: bool
) -> None:
    host, device = recommender_of(small_config), recommender_of(small_config)
    device.use(Compute(device=torch.device("cuda"), is_bfloat16=is_bfloat16))
    optimizers = [RecommenderOptimizer(one, OptimizerConfig(max_gradient_norm=10.0)) for one in (host, device)]
    tolerance: dict[str, Any] = {"rtol": 0.1, "atol": 0.05} if is_bfloat16 else {"rtol": 1e-3, "atol": 1e-4}
    for _step in range(3):
        shown: tuple[list[Tensor], list[Tensor]] = ([], [])
        found = [a_pass(one, loss, logits) for one, logits in zip((host, device), shown, strict=True)]
        torch.testing.assert_close(found[1].loss.cpu(), found[0].loss, **tolerance)
        torch.testing.assert_close(torch.cat(shown[1]), torch.cat(shown[0]), **tolerance)
        for optimizer, one in zip(optimizers, found, strict=True):
            optimizer.step(one.active)
    dense = host.dense_state()
    for name, tensor in device.dense_state().items():
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, dense[name], **tolerance)
    torch.testing.assert_close(device.items.weight[:NUM_ITEMS], host.items.weight[:NUM_ITEMS], **tolerance)
    # What a checkpoint holds lies on the host and continues on the device.
    restarted = RecommenderOptimizer(device, OptimizerConfig())
    restarted.load_state_dict(optimizers[1].state_dict())
    assert all(tensor.device.type == "cpu" for tensor in restarted.state_dict().values())
