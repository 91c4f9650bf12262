"""Functions registered as torch operators, so that autograd, torch.compile and export treat each as one node.

``torch.library.custom_op`` would do, but its first call imports torch's compiler: seconds of start-up and some 140 MiB
in every process, most of which never compile anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NAMESPACE = "headrace"


class Operator:
    """``torch.ops.headrace.<name>``, made by ``operator``. ``overload`` is what ``torch.library.opcheck`` takes."""

    def __init__(self, name: str, function: Callable[..., Any], mutates_args: Sequence[str]) -> None:
        self.qualified_name = f"{NAMESPACE}::{name}"
        self.__doc__ = function.__doc__
        torch.library.define(self.qualified_name, torch.library.infer_schema(function, mutates_args=mutates_args))
        torch.library.impl(self.qualified_name, "default", function)
        if mutates_args:
            self.register_fake(lambda *_arguments: None)  # what changes its arguments returns nothing
        self.overload: Any = getattr(torch.ops.headrace, name).default

    def __call__(self, *arguments: Any) -> Any:
        """Run it on these tensors and constants."""
        return self.overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the outputs, without data; usable as a decorator."""
        torch.library.register_fake(self.qualified_name, function)
        return function

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """As ``torch.library.register_autograd``."""
        torch.library.register_autograd(self.qualified_name, backward, setup_context=setup_context)


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function as ``headrace::<name>``; its annotations are the schema."""
    return lambda function: Operator(name, function, mutates_args)
