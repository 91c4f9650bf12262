"""`headrace freshness`: the command. It reads options and prints."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.command_line import ConfigOption, settings_of
from ops.errors import OpsError
from ops.settings import Settings

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from rich.console import Console

    from ops.freshness_sources import FreshnessSources


def freshness(
    url: Annotated[
        list[str] | None,
        typer.Option(help="Another daemon to ask, such as http://host:9101; may be given several times."),
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with a token, for workers that ask for one.")] = None,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks of the live table.")] = 2.0,
    config: ConfigOption = None,
    *,
    once: Annotated[bool, typer.Option("--once", help="Look once, on a terminal as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once, machine-readable.")] = False,
) -> None:
    """Show how old events are at each hop, live on a terminal; exit 1 if nobody could be asked."""
    from rich.console import Console

    console, settings = Console(), settings_of(config)
    if console.is_terminal and not once and not as_json:
        with suppress(KeyboardInterrupt):
            asyncio.run(_with_sources(settings, url or [], token_file, lambda sources: _watch(sources, console, every)))
        return
    is_empty = asyncio.run(
        _with_sources(settings, url or [], token_file, lambda sources: _once(sources, console, as_json=as_json))
    )
    raise typer.Exit(1 if is_empty else 0)


async def _with_sources(
    settings: Settings, urls: list[str], token_file: Path | None, work: "Callable[[FreshnessSources], Awaitable[bool]]"
) -> bool:
    import httpx

    from feature_store.config import FeatureStoreConfig
    from feature_store.store import FeatureStore
    from online_trainer.config import TrainerConfig
    from online_trainer.upstream_settings import UpstreamDaemonConfig
    from ops.config import HeadraceConfig
    from ops.freshness_sources import FreshnessSources, SourceParts, reachable_host
    from ops.snapshot_store import snapshot_storage
    from serving.access_config import AccessConfig
    from stream.clock import WallClock
    from stream.kafka import KafkaConfig, KafkaLog

    own, certificate = settings.get(HeadraceConfig), settings.get(AccessConfig).tls_certfile
    ports = [own.ingest_port, own.trainer_port]
    if settings.get(UpstreamDaemonConfig).is_on:
        ports.append(own.upstream_port)
    probes = [f"http://{reachable_host(own.probe_host)}:{port}" for port in ports]
    store = FeatureStore(settings.get(FeatureStoreConfig))
    try:
        async with httpx.AsyncClient(headers=_authorization(token_file), verify=_verify(certificate)) as client:
            parts = SourceParts(
                store=store,
                log=KafkaLog(settings.get(KafkaConfig)),
                snapshots=snapshot_storage(settings),
                model=own.model,
                clock=WallClock(),
                client=client,
                urls=[*probes, *urls],
                replica_timeout_ms=round(settings.get(TrainerConfig).replica_timeout_s * 1000),
                is_tls=bool(certificate),
            )
            return await work(FreshnessSources(parts))
    finally:
        store.close()


async def _once(sources: "FreshnessSources", console: "Console", *, as_json: bool) -> bool:
    """Whether nobody could say anything."""
    from ops.freshness_report import report_of
    from ops.freshness_table import rendered

    report = report_of(await sources.look())
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        console.print(rendered(report, width=console.width))
    return report.is_empty


async def _watch(sources: "FreshnessSources", console: "Console", every_s: float) -> bool:
    """Until Ctrl-C."""
    from rich.live import Live

    from ops.freshness_report import report_of
    from ops.freshness_table import rendered

    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            live.update(rendered(report_of(await sources.look()), width=console.width), refresh=True)
            await asyncio.sleep(every_s)


def _authorization(token_file: Path | None) -> dict[str, str]:
    if token_file is None:
        return {}
    try:
        return {"authorization": f"Bearer {token_file.read_text(encoding='utf-8').strip()}"}
    except (OSError, UnicodeDecodeError) as error:
        raise OpsError(f"--token-file {token_file} cannot be read: {error}") from error


def _verify(certificate: str) -> "ssl.SSLContext | bool":
    """Trust the workers' own certificate, too, where the settings name one."""
    import ssl

    if not certificate:
        return True
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(cafile=certificate)
    except OSError as error:
        raise OpsError(f"access.tls_certfile {certificate} cannot be read: {error}") from error
    return context
