"""Following published snapshots: learn of one, read and verify it aside, swap between two micro-batches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from opentelemetry import trace

from model.config import ModelConfig
from model.errors import ModelError, SnapshotConfigError, SnapshotParentError
from model.file_cache import FileCache
from model.manifest import Manifest, SnapshotPointer
from model.snapshot import (
    Snapshot,
    chain,
    list_versions,
    load_snapshot,
    model_folder,
    read_candidate,
    read_manifest,
    read_pointer,
)
from model.storage import SnapshotRoot, open_storage
from serving.batcher import ModelThread
from serving.config import ServingConfig
from serving.errors import SnapshotRefusedError
from serving.instruments import ServingInstruments
from serving.lease import SnapshotLease
from serving.version_choice import VersionChoice
from serving.weights import PreparedSwap, ServedWeights, prepare_swap
from stream.clock import Clock
from stream.failpoints import fail_point
from stream.tracing import link_to

logger = logging.getLogger(__name__)
_tracer = trace.get_tracer("headrace.serving")

_UNUSABLE = (ModelError, SnapshotRefusedError, OSError)
"""What makes a snapshot unusable: its content, what it builds on, or its storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapDone:
    """One swap: where it led, and which versions became current with it."""

    newest: Manifest
    passed: tuple[Manifest, ...]
    """Manifests of every version after the one held before, up to the newest, as far as they are still on disk."""
    pause_s: float


class SnapshotReader:
    """Reads snapshots of one model and remembers which could not be used. Blocking: for a thread of its own."""

    def __init__(
        self,
        root: SnapshotRoot,
        model: str,
        config: ModelConfig,
        instruments: ServingInstruments,
        *,
        lease: SnapshotLease | None = None,
        cache: FileCache | None = None,
        channel: str = "current",
    ) -> None:
        model_folder(model)  # raises ValueError now for a name that cannot be a folder
        self._root, self._model, self._config = open_storage(root), model, config
        self._instruments, self._lease, self._cache = instruments, lease, cache
        self._channel = channel
        self.refused: dict[int, str] = {}
        self.num_reanchored = 0

    def pointer(self) -> SnapshotPointer | None:
        """The version to serve. Raises ModelError or OSError."""
        candidate = read_candidate(self._root, self._model) if self._channel == "candidate" else None
        return read_pointer(self._root, self._model) if candidate is None else candidate

    def prepare(self, *, have: Manifest | None, want: int) -> PreparedSwap | None:
        """Read what leads from `have` to `want`, or as far towards it as usable snapshots go; None: not a step."""
        have_version = None if have is None else have.version
        target: int | None = want
        while target is not None and target != have_version:
            loaded = self._load_chain(have, target)
            if isinstance(loaded, PreparedSwap):
                return loaded
            target = self._newest_between(have_version, loaded)
        return None

    def _load_chain(self, have: Manifest | None, target: int) -> PreparedSwap | int:
        """What is to be applied, or the version that cannot be used."""
        version = target
        try:
            versions = self._chain(have, target)
            if self._lease is not None and (have is None or len(versions) > 1):
                # This may take longer than the versions are kept without anybody who asks for them.
                self._lease.note_loading(target)
            snapshots: list[Snapshot] = []
            for version in versions:
                snapshot = load_snapshot(self._root, self._model, version, cache=self._cache)
                self._check(snapshot, snapshots[-1].manifest if snapshots else have)
                snapshots.append(snapshot)
            return prepare_swap(self._config, snapshots)
        except _UNUSABLE as error:
            self.refuse(version, error)
            return version

    def _chain(self, have: Manifest | None, target: int) -> list[int]:
        if have is None:
            return chain(self._root, self._model, have=None, want=target)
        versions = chain(self._root, self._model, have=have.version, want=target, have_hash=have.content_hash())
        if have.version in versions:
            self.num_reanchored += 1
            self._instruments.reanchored()
            logger.warning(
                "version %d builds on another version %d than the one that is loaded: starting over from anchor %d",
                target,
                have.version,
                versions[0],
            )
        return versions

    def _check(self, snapshot: Snapshot, parent: Manifest | None) -> None:
        manifest = snapshot.manifest
        # Once more what `chain` has seen to: what it read may have been replaced since.
        if manifest.kind == "delta" and (
            parent is None or not manifest.builds_on(parent.version, parent.content_hash())
        ):
            raise SnapshotParentError(
                f"version {manifest.version} changes another version {manifest.parent} than comes before it"
            )
        if manifest.config_hash != self._config.config_hash():
            raise SnapshotConfigError(
                f"version {manifest.version} was made by a model with other settings ([model], [ranking])"
            )
        rows = snapshot.rows
        tensors = [*snapshot.dense.values(), rows.weight, rows.bias, *([] if rows.content is None else [rows.content])]
        # A trend of -inf is that of an item nobody has interacted with.
        is_finite = not bool((rows.trend.isnan() | rows.trend.isposinf()).any())
        if not is_finite or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise SnapshotRefusedError(f"version {manifest.version} holds weights that are not finite")

    def refuse(self, version: int, error: Exception) -> None:
        """Count a version that cannot be used, and say so once."""
        if version not in self.refused:
            self._instruments.snapshot_refused(type(error).__name__)
            logger.error("snapshot %d is refused, what is loaded stays: %s", version, error)
        self.refused[version] = f"{type(error).__name__}: {error}"

    def _newest_between(self, have: int | None, below: int) -> int | None:
        """Going forward, what lies between; going back, whatever is older."""
        above = have if have is not None and have < below else 0
        return max((version for version in self._versions() if above < version < below), default=None)

    def _versions(self) -> list[int]:
        try:
            return list_versions(self._root, self._model)
        except (ModelError, OSError):
            return []

    def manifests_between(self, have: int, want: int) -> list[Manifest]:
        """Manifests of the versions after `have` up to `want` that can be read."""
        found = []
        # Many may be gone: an object store should not be asked for each.
        for version in self._versions():
            if have < version <= want:
                try:
                    found.append(read_manifest(self._root, self._model, version))
                except (ModelError, OSError):
                    logger.debug("version %d was passed over and cannot be read", version)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapHooks:
    """What else happens around a swap."""

    before: Callable[[PreparedSwap], None]
    """In the reading thread, before the model thread is asked to swap."""
    after: Callable[[SwapDone], None]
    """On the event loop, before any answer with the new weights is seen there."""
    answered_up_to: Callable[[int], int | None]
    """In the reading thread: the newest version before this one that this replica answered with in an earlier life."""


class HotSwapper:
    """Keeps the served weights at the published version."""

    def __init__(
        self,
        config: ServingConfig,
        reader: SnapshotReader,
        weights: ServedWeights,
        model_thread: ModelThread,
        *,
        clock: Clock,
        instruments: ServingInstruments,
        hooks: SwapHooks,
        choice: VersionChoice,
    ) -> None:
        self._config = config
        self._reader = reader
        self._weights = weights
        self._model_thread = model_thread
        self._clock = clock
        self._instruments = instruments
        self._hooks = hooks
        self._choice = choice
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._announced = asyncio.Event()
        self._pointer_problem: str | None = None
        self._failed_want: int | None = None
        self._retry_at_s = 0.0
        self._retry_delay_s = 0.0
        self.num_swaps = 0
        self.held: Manifest | None = None

    def announce(self) -> None:
        """A new snapshot was announced: look at once."""
        self._announced.set()

    async def run(self) -> None:
        """Follow the pointer until cancelled."""
        while True:
            await self.follow()
            try:
                await asyncio.wait_for(self._announced.wait(), self._config.snapshot_poll_ms / 1000)
            except TimeoutError:
                continue
            self._announced.clear()

    def close(self) -> None:
        """End the reading thread."""
        self._aside.shutdown(wait=True, cancel_futures=True)

    async def follow(self) -> bool:
        """One look at the pointer; swaps if it points elsewhere. True if the weights changed."""
        loop = asyncio.get_running_loop()
        held = self.held
        have = None if held is None else held.version
        want = await loop.run_in_executor(self._aside, lambda: self._wanted(have))
        if want is None or want == have or self._is_backing_off(want):
            return False
        was_waiting = self._choice.waits_s > 0
        prepared = await loop.run_in_executor(self._aside, lambda: self._reader.prepare(have=held, want=want))
        if have is not None and want > have and self._choice.waits_s > 0 and not was_waiting:
            # The guards have turned away what is held while this was read: newer versions wait now.
            self._announced.set()
            return False
        swapped = prepared is not None and await self._swap(prepared, have)
        self._note_outcome(want, reached=self.held is not None and self.held.version == want)
        return swapped

    def _wanted(self, have: int | None) -> int | None:
        """The version to serve, None when there is none or nothing is known of it."""
        try:
            pointer = self._reader.pointer()
            want = None if pointer is None else self._choice.choose(have=have, pointer=pointer.version)
        except (ModelError, OSError) as error:
            if str(error) != self._pointer_problem:
                logger.error("the snapshot pointer cannot be read, what is loaded stays: %s", error)  # noqa: TRY400
            self._pointer_problem = str(error)
            return None
        self._pointer_problem = None
        return want

    async def _swap(self, prepared: PreparedSwap, have: int | None) -> bool:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._aside, lambda: self._hooks.before(prepared))
        passed = await loop.run_in_executor(self._aside, lambda: self._passed(prepared, have))
        newest = prepared.newest
        with _tracer.start_as_current_span("headrace.serving.swap", links=link_to(newest.traceparent)) as span:
            try:
                ready = await loop.run_in_executor(self._aside, lambda: self._weights.ready(prepared))
                pause_s = await self._model_thread.run(lambda: self._apply(ready))
            except SnapshotRefusedError as error:
                self._reader.refuse(newest.version, error)
                return False
            span.set_attribute("headrace.snapshot.version", newest.version)
            span.set_attribute("headrace.snapshot.kind", newest.kind)
            span.set_attribute("headrace.swap.pause_ms", pause_s * 1000)
        self._hooks.after(SwapDone(newest=newest, passed=passed, pause_s=pause_s))
        fail_point("serving.swapped")
        first = self.held is None
        self.held = newest
        self.num_swaps += 1
        self._instruments.swapped(pause_s, newest.kind, span)
        logger.log(
            logging.INFO if first or newest.kind == "anchor" else logging.DEBUG,
            "serving version %d (%s, %d items), pause %.2f ms",
            newest.version,
            newest.kind,
            newest.num_items,
            pause_s * 1000,
        )
        return True

    def _apply(self, prepared: PreparedSwap) -> float:
        """In the model thread. Returns for how long it answered nothing."""
        # The event loop, if it waits for the interpreter, has its turn now: it would take it in the middle of the swap
        # once it has waited for 5 ms.
        time.sleep(0)
        started_s = self._clock.monotonic_s()
        self._weights.swap(prepared)
        return self._clock.monotonic_s() - started_s

    def _passed(self, prepared: PreparedSwap, have: int | None) -> tuple[Manifest, ...]:
        if prepared.base is None:
            return tuple(prepared.manifests)
        newest = prepared.newest
        since = self._hooks.answered_up_to(newest.version) if have is None else have
        return (newest,) if since is None else tuple(self._reader.manifests_between(since, newest.version))

    def _is_backing_off(self, want: int) -> bool:
        return want == self._failed_want and self._clock.monotonic_s() < self._retry_at_s

    def _note_outcome(self, want: int, *, reached: bool) -> None:
        if reached:
            self._failed_want = None
            return
        first_s = self._config.snapshot_poll_ms / 1000
        again = want == self._failed_want
        self._retry_delay_s = (
            min(2 * self._retry_delay_s, self._config.snapshot_retry_max_ms / 1000) if again else first_s
        )
        self._failed_want = want
        self._retry_at_s = self._clock.monotonic_s() + self._retry_delay_s

    def status(self) -> dict[str, object]:
        """JSON-ready: what is held, and what was refused."""
        held = self.held
        return {
            "version": None if held is None else held.version,
            "kind": None if held is None else held.kind,
            "parent": None if held is None else held.parent,
            "bytes": None if held is None else sum(entry.size for entry in held.files.values()),
            "items": None if held is None else held.num_items,
            "created_at_ms": None if held is None else held.created_at_ms,
            "watermark_ms": None if held is None else held.watermark_ms,
            "learned_interactions": None if held is None else held.lineage.num_interactions,
            "metrics": {} if held is None else held.metrics,
            "swaps": self.num_swaps,
            "refused": len(self._reader.refused),
            "reanchored": self._reader.num_reanchored,
            "last_refusal": next(reversed(self._reader.refused.values()), None),
            "pointer_problem": self._pointer_problem,
        }
