"""The routes for operators: snapshots, the candidate, shadowing. All need the scope admin."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final

from fastapi import FastAPI, Path, Query, Request, Response

from model.pinning import (
    offer_candidate,
    pin_snapshot,
    promote_candidate,
    roll_back,
    unpin_snapshot,
    withdraw_candidate,
)
from serving.messages import AdminAnswer, ShadowAnswer, SnapshotsAnswer
from serving.openapi import documented
from serving.responding import respond
from serving.snapshot_admin import Asked, Operation
from serving.worker import ServingWorker

Version = Annotated[int, Path(ge=1, le=99_999_999, description="As GET /admin/snapshots lists it.")]

Share = Annotated[float, Query(gt=0, le=1, allow_inf_nan=False, description="Of this worker's requests.")]

_ERRORS: Final = (404, 409, 503)
_DONE: Final = documented(AdminAnswer, scope="admin", errors=_ERRORS)


def add_admin(app: FastAPI, worker: ServingWorker) -> None:
    """Add the routes under /admin."""

    async def answer(request: Request, route: str, what: str, operation: Operation[Any]) -> Response:
        async def work(_body: bytes, request_id: str) -> AdminAnswer:
            asked = Asked(what=what, caller=request.state.caller, request_id=request_id)
            return AdminAnswer(request_id=request_id, version=await worker.admin.carry_out(operation, asked))

        return await respond(worker, request, route, work, scope="admin")

    @app.get("/admin/snapshots", **documented(SnapshotsAnswer, scope="admin", errors=_ERRORS))
    async def get_snapshots(request: Request) -> Response:
        """Every version and what is to be said of it."""

        async def work(_body: bytes, request_id: str) -> SnapshotsAnswer:
            return SnapshotsAnswer(request_id=request_id, snapshots=await worker.admin.listing())

        return await respond(worker, request, "/admin/snapshots", work, scope="admin")

    @app.post("/admin/snapshots/{version}/rollback", **_DONE)
    async def post_rollback(request: Request, version: Version) -> Response:
        """Send workers to a version until the trainer publishes the next one."""
        operation = partial(roll_back, version=version)
        return await answer(request, "/admin/snapshots/{version}/rollback", f"rollback to version {version}", operation)

    @app.post("/admin/snapshots/{version}/pin", **_DONE)
    async def post_pin(request: Request, version: Version) -> Response:
        """Send workers to a version, to stay there."""
        operation = partial(pin_snapshot, version=version)
        return await answer(request, "/admin/snapshots/{version}/pin", f"pin to version {version}", operation)

    @app.delete("/admin/pin", **_DONE)
    async def delete_pin(request: Request) -> Response:
        """Let workers follow the trainer again."""
        return await answer(request, "/admin/pin", "unpin", unpin_snapshot)

    @app.post("/admin/snapshots/{version}/candidate", **_DONE)
    async def post_candidate(request: Request, version: Version) -> Response:
        """Send canary workers to a version."""
        operation = partial(offer_candidate, version=version)
        what = f"version {version} as the candidate"
        return await answer(request, "/admin/snapshots/{version}/candidate", what, operation)

    @app.post("/admin/candidate/promote", **_DONE)
    async def post_promote(request: Request) -> Response:
        """Send all workers to the candidate."""
        return await answer(request, "/admin/candidate/promote", "promote the candidate", promote_candidate)

    @app.delete("/admin/candidate", **_DONE)
    async def delete_candidate(request: Request) -> Response:
        """Send canary workers to where the others are."""
        return await answer(request, "/admin/candidate", "withdraw the candidate", withdraw_candidate)

    _add_shadowing(app, worker)


def _add_shadowing(app: FastAPI, worker: ServingWorker) -> None:
    @app.post("/admin/snapshots/{version}/shadow", **_DONE)
    async def post_shadow(request: Request, version: Version, share: Share = 0.01) -> Response:
        """Have a version answer a share of this worker's requests again, aside, and compare."""

        async def work(_body: bytes, request_id: str) -> AdminAnswer:
            what = f"version {version} beside the one in service, share {share:g}"
            asked = Asked(what=what, caller=request.state.caller, request_id=request_id)
            await worker.admin.audited(worker.shadowing.start(version, share), asked)
            return AdminAnswer(request_id=request_id, version=version)

        return await respond(worker, request, "/admin/snapshots/{version}/shadow", work, scope="admin")

    @app.get("/admin/shadow", **documented(ShadowAnswer, scope="admin"))
    async def get_shadow(request: Request) -> Response:
        """How far the answers of the version beside the one in service are from those."""

        async def work(_body: bytes, request_id: str) -> ShadowAnswer:
            return ShadowAnswer(request_id=request_id, shadow=worker.shadowing.report())

        return await respond(worker, request, "/admin/shadow", work, scope="admin")

    @app.delete("/admin/shadow", **_DONE)
    async def delete_shadow(request: Request) -> Response:
        """Compare no more, and let go of the memory."""

        async def work(_body: bytes, request_id: str) -> AdminAnswer:
            asked = Asked(what="compare no more", caller=request.state.caller, request_id=request_id)
            return AdminAnswer(
                request_id=request_id, version=await worker.admin.audited(worker.shadowing.stop(), asked)
            )

        return await respond(worker, request, "/admin/shadow", work, scope="admin")
