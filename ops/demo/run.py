"""`headrace demo`: the whole loop on a real stream, from an empty folder to a changed recommendation, checked.

The order of `_Demo.tell` is the demo: start everything, replay half a year of real ratings, wait until all of it is
learned and served, let one user like a few films, compare everything with the recorded file, write the report.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
from rich.console import Console

from backtest.errors import BacktestError
from backtest.replay import RecordedStream, read_recorded
from feature_store import schema
from feature_store.config import FeatureStoreConfig
from feature_store.errors import FeatureStoreError
from feature_store.store import FeatureStore
from online_trainer.config import TrainerConfig
from ops.demo.change import ChangeReport
from ops.demo.checks import Check, truth_of
from ops.demo.plan import HOST, DemoError, DemoOptions, Plan, prepare, sole_use
from ops.demo.report import summary, write_curves, write_summary
from ops.demo.steps import (
    EVENT_ID_PREFIX,
    Running,
    change_a_user,
    compare,
    publish_titles,
    replay_stream,
    until_learned,
    until_ready,
)
from ops.demo.view import View
from ops.demo.watch import BackgroundLoad, Watcher
from ops.demo.words import print_addresses, print_change, print_checks, print_results
from ops.errors import OpsError
from ops.local_broker import LocalBroker, LocalBrokerConfig
from ops.supervisor import Supervisor, SupervisorConfig
from serving.errors import ClientError
from stream.errors import StreamError
from stream.kafka import KafkaConfig, KafkaLog

_STOP_TIMEOUT_S: Final = 8.0
_REQUEST_TIMEOUT_S: Final = 10.0
_WIDTH_OF_FILES: Final = 120
_Result = TypeVar("_Result")


def run(
    *,
    keep_running: bool = False,
    minutes: float | None = None,
    data_dir: Path | None = None,
    json_out: Path | None = None,
    num_events: int | None = None,
    has_upstream: bool = False,
) -> int:
    """Run the demo; returns the exit status: 0 done, 1 failed, 130 stopped by Ctrl-C. Says everything itself."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    defaults = DemoOptions()
    try:
        options = DemoOptions(
            keep_running=keep_running,
            minutes=defaults.minutes if minutes is None else minutes,
            data_dir=data_dir or defaults.data_dir,
            json_out=json_out,
            num_events=num_events,
            has_upstream=has_upstream,
        )
        with sole_use(options):
            return asyncio.run(_until_interrupted(options, console))
    except (OpsError, BacktestError, StreamError, FeatureStoreError) as error:
        return _failed(console, str(error))
    except (httpx.HTTPError, ClientError) as error:
        return _failed(console, f"an inference worker did not answer: {error!r}; see {options.log_dir}")
    except OSError as error:
        return _failed(console, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        return _stopped(console)


async def _until_interrupted(options: DemoOptions, console: Console) -> int:
    demo = _Demo(options, console)
    telling = asyncio.create_task(demo.tell())

    def on_signal() -> None:
        # Only the first one counts: a second must not break into the orderly stop.
        if not demo.interrupted.is_set():
            demo.interrupted.set()
            if not demo.is_kept_running:
                telling.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        return await telling
    except asyncio.CancelledError:
        return _stopped(console)


def _failed(console: Console, sentence: str) -> int:
    console.print(f"headrace demo failed: {sentence}", style="bold red", highlight=False, markup=False, soft_wrap=True)
    return 1


def _stopped(console: Console) -> int:
    console.print("headrace demo: stopped, nothing is left running", highlight=False)
    return 130


class _Demo:
    """One run."""

    def __init__(self, options: DemoOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._helpers: list[asyncio.Task[None]] = []
        self._started_s = time.monotonic()
        self._durations_s: dict[str, float] = {}
        self.interrupted = asyncio.Event()
        self.is_kept_running = False

    async def tell(self) -> int:
        """The whole story; returns the exit status."""
        plan = await asyncio.to_thread(prepare, self._options)
        _log_to(self._options.log_dir / "demo.log")
        recorded = await asyncio.to_thread(
            read_recorded, plan.dataset.interactions, plan.dataset.columns, limit=self._options.num_events
        )
        truth = await asyncio.to_thread(truth_of, recorded, EVENT_ID_PREFIX)
        self._console.print(_opening(plan, recorded), highlight=False, soft_wrap=True)
        view = View(self._console, num_events=len(recorded), span=_span(recorded))
        async with self._processes(plan, recorded, view) as running:
            with view:
                self._helpers.append(asyncio.create_task(running.watcher.run(running.client, view.show)))
                await self._phase("start", until_ready(running))
                num_titles = await self._phase("titles", publish_titles(running))
                self._ask_in_background(running)
                await self._phase("replay", replay_stream(running))
                await self._phase("catch_up", until_learned(running, truth.num_interactions))
                change = await self._phase("change", change_a_user(running, truth.num_interactions))
                truth = truth.plus(change.event_keys)
                checks = await self._phase("checks", compare(running, truth, num_titles))
                view.say("done: everything is learned, the list has changed, nothing was lost")
            return await self._finish(running, change, checks)

    @asynccontextmanager
    async def _processes(self, plan: Plan, recorded: RecordedStream, view: View) -> AsyncIterator[Running]:
        """Broker, database and daemons, up for the length of the block."""
        options, store_config = plan.options, plan.settings.get(FeatureStoreConfig)
        broker = LocalBroker(
            LocalBrokerConfig(host=HOST, port=plan.ports.broker, log_path=options.log_dir / "broker.log")
        )
        supervisor = Supervisor(
            plan.children, SupervisorConfig(log_dir=options.log_dir, stop_timeout_s=_STOP_TIMEOUT_S)
        )
        store = FeatureStore(store_config)
        watcher = Watcher(plan, store, supervisor, broker)
        watcher.window = plan.settings.get(TrainerConfig).metrics_window
        watcher.load = BackgroundLoad(
            requests_per_s=options.requests_per_s, user_ids=recorded.user_id, num_sent=lambda: watcher.num_sent
        )
        try:
            await asyncio.to_thread(broker.start)
            await asyncio.to_thread(schema.migrate, store_config.url)
            await KafkaLog(plan.settings.get(KafkaConfig)).create_topics()
            supervisor.start()
            async with httpx.AsyncClient(timeout=_REQUEST_TIMEOUT_S) as client:
                yield Running(
                    plan=plan,
                    recorded=recorded,
                    watcher=watcher,
                    store=store,
                    client=client,
                    supervisor=supervisor,
                    say=view.say,
                )
        finally:
            self._console.print("stopping all processes", style="bright_black", highlight=False)
            for helper in self._helpers:
                helper.cancel()
            await asyncio.gather(*self._helpers, return_exceptions=True)
            await asyncio.to_thread(supervisor.stop)
            await asyncio.to_thread(broker.stop)
            store.close()

    def _ask_in_background(self, running: Running) -> None:
        load = running.watcher.load
        assert load is not None, "the load was made with the watcher"

        async def ask(url: str, seed: int) -> None:
            # A client of its own: its requests never wait for the connections of status pages.
            async with httpx.AsyncClient(timeout=_REQUEST_TIMEOUT_S) as client:
                await load.run(client, url, seed)

        urls = running.plan.ports.serving_urls()
        self._helpers += [asyncio.create_task(ask(url, seed)) for seed, url in enumerate(urls)]

    async def _phase(self, name: str, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Await one step and note how long it took; raise what made a helper (watching, requests) end before it."""
        began_s = time.monotonic()
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, *self._helpers}, return_when=asyncio.FIRST_COMPLETED)
            for helper in self._helpers:
                if helper.done():
                    helper.result()
            return await task
        finally:
            task.cancel()
            self._durations_s[name] = round(time.monotonic() - began_s, 2)

    async def _finish(self, running: Running, change: ChangeReport, checks: list[Check]) -> int:
        """Report in words and files; with `keep_running`, wait for Ctrl-C."""
        options, console, watcher, plan = self._options, self._console, running.watcher, running.plan
        print_change(console, change, plan.titles)
        print_checks(console, checks)
        print_results(console, watcher.newest)
        title = f"headrace demo: {watcher.num_sent:,} events in {self._durations_s['replay']:.0f} s"
        # A copy: the watcher goes on while a thread draws.
        await asyncio.to_thread(write_curves, options.curves_path, list(watcher.samples), title=title)
        self._durations_s["total"] = round(time.monotonic() - self._started_s, 2)
        paths = [options.summary_path, *([options.json_out] if options.json_out else [])]
        facts = await asyncio.to_thread(summary, plan, watcher, change, checks)
        await asyncio.to_thread(write_summary, paths, facts | {"durations_s": self._durations_s})
        console.print(
            f"  {self._durations_s['total']:.0f} s in all. Figures: {paths[-1]}   curves: {options.curves_path}",
            highlight=False,
            soft_wrap=True,
        )
        if options.keep_running:
            print_addresses(console, plan.ports, options, change.user_id)
            self.is_kept_running = True
            await self._phase("kept_running", self._until_interrupted())
        failed = [check.name for check in checks if not check.is_ok]
        if failed:
            words = "; ".join(failed)
            raise DemoError(f"these checks failed: {words}; see {options.summary_path} and {options.log_dir}")
        return 0

    async def _until_interrupted(self) -> None:
        await self.interrupted.wait()


def _log_to(path: Path) -> None:
    """Warnings of this process belong into a file: on the terminal they would tear the view."""
    logging.basicConfig(
        filename=path,
        level=logging.INFO,
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _span(recorded: RecordedStream) -> str:
    first, last = (datetime.fromtimestamp(int(recorded.event_time_ms[at]) / 1000, UTC) for at in (0, -1))
    return f"{len(recorded):,} movie ratings, {first:%b} to {last:%b %Y}"


def _opening(plan: Plan, recorded: RecordedStream) -> str:
    return (
        f"headrace demo: {_span(recorded)} (MovieTweetings), in about {plan.options.minutes:g} minutes\n"
        f"  workers at {' and '.join(plan.ports.serving_urls())}; everything is written to {plan.options.data_dir}"
    )
