"""Operators of ours cost a process neither torch's compiler nor its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.operators import operator


@operator("double_for_tests")
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


double.register_autograd(lambda _ctx, grad: grad * 2, setup_context=lambda ctx, inputs, output: None)


def test_an_operator_is_differentiable_and_compiles_as_one_node() -> None:
    x = torch.arange(3.0, requires_grad=True)
    compiled = torch.compile(lambda y: double(y) + 1, fullgraph=True, backend="aot_eager")
    torch.autograd.backward(compiled(x).sum())
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
    torch.library.opcheck(double.overload, (x,))


@pytest.mark.parametrize("call", ["hstu_attention", "softmax_loss"])
def test_calling_one_does_not_import_torchs_compiler(call: str) -> None:
    program = {
        "hstu_attention": (
            "from kernels.hstu_attention import hstu_attention;"
            "x = torch.ones(3, 1, 4, requires_grad=True);"
            "hstu_attention(x, x, x, torch.tensor([0, 3]), max_len=3).sum().backward()"
        ),
        "softmax_loss": (
            "from kernels.softmax_loss import full_softmax_loss;"
            "u = torch.ones(3, 4, requires_grad=True);"
            "full_softmax_loss(u, torch.ones(5, 4), torch.tensor([0, 1, 2]), scale=1.0).loss.backward()"
        ),
    }[call]
    code = f"import sys, torch; {program}; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
