"""Selective recomputation: what the halves of a layer would keep for their backward pass is computed again there.

Of a layer only its input and what attention returned stay; normed input, u, q, k, v and the gated norm are left out
(ULTRA-HSTU, arXiv 2602.16986). Attention, the dearest part, is not repeated (``model.recomputed_layer`` puts a layer
together). ``torch.utils.checkpoint`` can do the same
with a policy, but its first call imports torch's compiler (2.5 s and 160 MB here), and each call costs a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _NothingMoreIsNeededError(Exception):
    """Ends a repetition early; never leaves this module."""


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """In place of a tensor that was to be saved; ``again`` gives it."""

    again: Callable[[], Tensor]


class RepeatedPart:
    """A differentiable function that keeps nothing for its backward pass but runs again for it.

    run: gives the same operations each time. kept: what exists anyway (inputs, weights) and is saved as ever.
    before: a part some of whose outputs are inputs of this one; they are left out, too.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        *,
        kept: Iterable[Tensor],
        before: RepeatedPart | None = None,
    ) -> None:
        self._run = run
        self._kept = {_storage(one) for one in kept}
        self._before = before
        self._inputs: Callable[[], Sequence[Tensor]] = tuple
        self._left_out: set[int] = set()
        self._output_at: dict[int, tuple[int, int]] = {}
        self._needs_outputs = False
        self._found: dict[int, Tensor] = {}
        self._outputs: Sequence[Tensor] = ()

    def __call__(self, *inputs: Tensor, again: Callable[[], Sequence[Tensor]] | None = None) -> Sequence[Tensor]:
        """What ``run`` returns. again: gives the inputs of a repetition; None: the same tensors are held for it."""
        held = [] if again else [one.detach().requires_grad_(one.requires_grad) for one in inputs]
        self._inputs = again or (lambda: held)
        num_saved = 0

        def pack(tensor: Tensor) -> Tensor | _LeftOut:
            nonlocal num_saved
            number, num_saved = num_saved, num_saved + 1
            if tensor.numel() == 0 or _storage(tensor) in self._kept:
                return tensor
            if self._before is not None and self._before.has_output(tensor):
                return self._before.left_out(tensor)
            self._left_out.add(number)
            return _LeftOut(lambda: self._saved(number))

        with saved_tensors_hooks(pack, _unpack):
            outputs = self._run(*inputs)
        self._output_at = {
            _storage(one): (i, int(one.storage_offset())) for i, one in enumerate(outputs) if one.numel()
        }
        return outputs

    def has_output(self, tensor: Tensor) -> bool:
        """Whether this is an output or a view of one; asked while they live."""
        return tensor.numel() > 0 and _storage(tensor) in self._output_at

    def left_out(self, tensor: Tensor) -> _LeftOut:
        """In place of an output or a view of one."""
        self._needs_outputs = True
        index, start = self._output_at[_storage(tensor)]
        shape, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset() - start

        def again() -> Tensor:
            whole = self.output(index)
            return whole.as_strided(shape, stride, whole.storage_offset() + offset)

        return _LeftOut(again)

    def output(self, index: int) -> Tensor:
        """An output, computed again; it belongs to no graph."""
        self._needs_outputs = True
        if not self._outputs:
            self._repeat()
        return self._outputs[index]

    def _saved(self, number: int) -> Tensor:
        if number not in self._found:
            self._repeat()
        found = self._found.pop(number)
        if not self._found:  # the last that the backward pass of this part needs, and what follows it has run before
            self._outputs = ()
        return found

    def _repeat(self) -> None:
        num_saved, last = 0, max(self._left_out, default=-1)

        def pack(tensor: Tensor) -> None:
            nonlocal num_saved
            if num_saved in self._left_out:
                self._found[num_saved] = tensor.detach()
            num_saved += 1
            if num_saved > last and not self._needs_outputs:
                raise _NothingMoreIsNeededError

        with torch.enable_grad(), saved_tensors_hooks(pack, _unpack), suppress(_NothingMoreIsNeededError):
            self._outputs = [one.detach() for one in self._run(*self._inputs())]


def leaving_out_outputs(*parts: RepeatedPart) -> saved_tensors_hooks:
    """A context in which operations that save an output of these parts do not keep it either."""

    def pack(tensor: Tensor) -> Tensor | _LeftOut:
        part = next((one for one in parts if one.has_output(tensor)), None)
        return tensor if part is None else part.left_out(tensor)

    return saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Tensor | _LeftOut) -> Tensor:
    return packed.again() if isinstance(packed, _LeftOut) else packed


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
