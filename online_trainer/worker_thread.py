"""A thread beside an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

_Result = TypeVar("_Result")


class WorkerThread:
    """Does one thing after the other, each in the context of who asked: what is measured there belongs to its span."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, call: Callable[[], _Result]) -> _Result:
        """What `call` returns or raises, once everything asked before is done."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, copy_context().run, call)

    def end(self) -> None:
        """Finish what was asked; blocking."""
        self._executor.shutdown(wait=True)
