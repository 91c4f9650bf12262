"""Compiling Triton kernels on all cores before anything is timed.

An autotuned kernel is compiled once for each of its configurations, one after the other, in the process that calls it:
minutes for a whole benchmark. Here every process of a pool makes the same calls, compiles its share of what they need
into Triton's cache on disk and launches none of it; what the kernels should have written is never read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

Calls = Callable[[Sequence[str]], None]


def compile_ahead(calls: Calls, sections: Sequence[str], *, num_processes: int, seconds: float) -> list[str]:
    """Compile what ``calls(sections)`` needs; returns what went wrong, one line each. calls: a module's function.

    No compilation begins after ``seconds``.
    """
    told: list[str] = []
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        shares = [
            pool.submit(_compile_share, calls, sections, (share, num_processes), seconds)
            for share in range(num_processes)
        ]
        for share in shares:
            try:
                told += share.result()
            except Exception as error:  # noqa: BLE001 - what is missing is compiled where it is first called
                told.append(f"a process of the pool failed: {type(error).__name__}: {error}")
    return sorted(set(told))


def _compile_share(calls: Calls, sections: Sequence[str], share_of: tuple[int, int], seconds: float) -> list[str]:
    from triton.runtime.autotuner import Autotuner

    share, num_shares = share_of
    deadline = time.monotonic() + seconds
    seen: dict[tuple[Any, ...], int] = {}
    failed: list[str] = []

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        grid = kwargs.pop("grid")
        kwargs.pop("warmup", None)
        for config in self.configs:
            constants = tuple((name, value) for name, value in kwargs.items() if name.isupper())
            dtypes = tuple(str(x.dtype) for x in (*args, *kwargs.values()) if hasattr(x, "dtype"))
            number = seen.setdefault((self.base_fn.__name__, str(config), constants, dtypes), len(seen))
            if number % num_shares == share and time.monotonic() < deadline:
                try:
                    self.fn.warmup(*args, grid=grid, **kwargs, **config.all_kwargs())
                except Exception as error:  # noqa: BLE001 - the configuration is tried again, and told, when it is timed
                    failed.append(f"{self.base_fn.__name__} {config}: {type(error).__name__}")

    Autotuner.run = compile_only
    calls(sections)
    return failed
