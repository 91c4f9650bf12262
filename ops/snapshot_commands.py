"""`headrace snapshots`: the commands. They read options and print."""

# No `from __future__ import annotations`: typer reads the annotations of commands at run time.

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops.command_line import ConfigOption, say, settings_of
from ops.errors import OpsError

if TYPE_CHECKING:
    from model.manifest import Manifest
    from ops.settings import Settings

snapshots_app = typer.Typer(
    help="What is published, whether it is whole, and which version workers serve.", no_args_is_help=True
)

VersionArgument = Annotated[int, typer.Argument(metavar="VERSION", help="As `headrace snapshots ls` prints it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What the storage or a snapshot has to complain of is the person's to mend."""
    from model.errors import SnapshotError

    try:
        yield
    except (SnapshotError, OSError) as error:
        raise OpsError(str(error)) from error


@snapshots_app.command("ls")
def snapshots_ls(config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """List versions: kind, parent, size, age, interactions, metrics; what is served, pinned, run by whom, held back."""
    from ops.config import HeadraceConfig
    from ops.snapshot_report import read_listing
    from ops.snapshot_store import snapshot_storage
    from stream.clock import WallClock

    settings = settings_of(config)
    with _one_sentence():
        listing = read_listing(snapshot_storage(settings), settings.get(HeadraceConfig).model)
    print(listing.to_json() if as_json else listing.to_text(now_ms=WallClock().now_ms()))


@snapshots_app.command("show")
def snapshots_show(version: VersionArgument, config: ConfigOption = None, *, as_json: JsonOption = False) -> None:
    """Print the manifest of a version."""
    from model.snapshot import read_manifest
    from ops.config import HeadraceConfig
    from ops.snapshot_report import manifest_text
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        manifest = read_manifest(snapshot_storage(settings), settings.get(HeadraceConfig).model, version)
    print(manifest.encode().decode().rstrip() if as_json else manifest_text(manifest))


@snapshots_app.command("verify")
def snapshots_verify(
    version: Annotated[int | None, typer.Argument(metavar="[VERSION]", help="Only this one and its chain.")] = None,
    config: ConfigOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Read every byte: sizes, hashes, tensors, chains, the pointer and the pin; exit 1 if anything is wrong."""
    from ops.config import HeadraceConfig
    from ops.snapshot_report import verify_snapshots
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        checked = verify_snapshots(snapshot_storage(settings), settings.get(HeadraceConfig).model, version)
    print(json.dumps(checked.to_dict(), indent=1) if as_json else checked.to_text())
    raise typer.Exit(0 if checked.is_whole else 1)


@snapshots_app.command("rollback")
def snapshots_rollback(version: VersionArgument, config: ConfigOption = None) -> None:
    """Make workers serve VERSION until the trainer publishes the next one; `pin` makes them stay."""
    from model.pinning import roll_back
    from ops.config import HeadraceConfig
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        manifest = roll_back(snapshot_storage(settings), settings.get(HeadraceConfig).model, version)
    print(f"workers go to version {version}; what the trainer publishes next supersedes it, unless you pin it")
    _announce(settings, manifest)


@snapshots_app.command("pin")
def snapshots_pin(version: VersionArgument, config: ConfigOption = None) -> None:
    """Make workers serve VERSION and stay there; the trainer publishes on, and nobody follows until `unpin`."""
    from model.pinning import pin_snapshot
    from ops.config import HeadraceConfig
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        manifest = pin_snapshot(snapshot_storage(settings), settings.get(HeadraceConfig).model, version)
    print(f"workers go to version {version} and stay there until `headrace snapshots unpin`")
    _announce(settings, manifest)


@snapshots_app.command("unpin")
def snapshots_unpin(config: ConfigOption = None) -> None:
    """Make workers follow the trainer again, from the newest version on."""
    from model.pinning import unpin_snapshot
    from ops.config import HeadraceConfig
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        newest = unpin_snapshot(snapshot_storage(settings), settings.get(HeadraceConfig).model)
    if newest is None:
        print("nothing was pinned")
        return
    print(f"workers go to version {newest.version}, and follow what is published")
    _announce(settings, newest)


@snapshots_app.command("candidate")
def snapshots_candidate(version: VersionArgument, config: ConfigOption = None) -> None:
    """Make the workers with serving.channel = "candidate" serve VERSION, until it is promoted or withdrawn."""
    from model.pinning import offer_candidate
    from ops.config import HeadraceConfig
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        manifest = offer_candidate(snapshot_storage(settings), settings.get(HeadraceConfig).model, version)
    print(f"canary workers go to version {version} and stay there until it is promoted or withdrawn")
    _announce(settings, manifest)


@snapshots_app.command("shadow")
def snapshots_shadow(
    version: VersionArgument,
    worker: Annotated[str, typer.Option("--worker", help="URL of one inference worker.")] = "http://127.0.0.1:8080",
    share: Annotated[float, typer.Option(min=0.0001, max=1, help="Of its requests.")] = 0.05,
    seconds: Annotated[float, typer.Option(min=0, help="How long to compare.")] = 60.0,
    token_file: Annotated[Path | None, typer.Option(help="File with the token; else $HEADRACE_TOKEN.")] = None,
    ca_file: Annotated[str | None, typer.Option("--ca-file", help="Certificates (PEM) to verify it with.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Have VERSION answer a share of a worker's live requests again, aside, and print how far it is off.

    Its token needs the scope admin.
    """
    from ops.shadowing import ShadowRun, report_text, run_shadow
    from serving.calling import ClientConfig
    from serving.errors import ClientError

    try:
        token = os.environ.get("HEADRACE_TOKEN") if token_file is None else token_file.read_text().strip()
        client = ClientConfig(url=worker, token=token, ca_file=ca_file, timeout_ms=30_000)
        report = run_shadow(client, ShadowRun(version=version, share=share, seconds=seconds))
    except (ClientError, ValueError, OSError) as error:
        raise OpsError(f"{worker}: {error}") from error
    print(json.dumps(report, indent=1) if as_json else report_text(report))


@snapshots_app.command("promote")
def snapshots_promote(config: ConfigOption = None) -> None:
    """Make all workers serve the candidate; a pin moves there, without one the trainer's next version supersedes it."""
    from model.pinning import promote_candidate
    from ops.config import HeadraceConfig
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        manifest = promote_candidate(snapshot_storage(settings), settings.get(HeadraceConfig).model)
    print(f"all workers go to version {manifest.version}")
    _announce(settings, manifest)


@snapshots_app.command("withdraw")
def snapshots_withdraw(config: ConfigOption = None) -> None:
    """Make canary workers follow the others again."""
    from model.pinning import withdraw_candidate
    from ops.config import HeadraceConfig
    from ops.snapshot_store import snapshot_storage

    settings = settings_of(config)
    with _one_sentence():
        withdrawn = withdraw_candidate(snapshot_storage(settings), settings.get(HeadraceConfig).model)
    print("there was no candidate" if withdrawn is None else f"version {withdrawn} is no candidate any more")


def _announce(settings: "Settings", manifest: "Manifest") -> None:
    """Workers look at the pointer regularly; an announcement makes them look now."""
    from ops.sending import announce_snapshot
    from stream.errors import LogUnavailableError
    from stream.kafka import KafkaConfig, KafkaLog

    try:
        asyncio.run(announce_snapshot(KafkaLog(settings.get(KafkaConfig)), manifest))
    except LogUnavailableError as error:
        say(f"headrace: not announced, workers find it within serving.snapshot_poll_ms: {error}")
