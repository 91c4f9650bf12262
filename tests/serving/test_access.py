"""Who may use the API, and how often."""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from serving.access import Access, RateLimiter, new_token, tls_context
from serving.access_config import AccessConfig, Scope, TokenEntry
from serving.config import ServingConfig
from serving.daemon import run_worker
from serving.errors import ListenRefusedError, UnauthenticatedError
from stream.clock import ManualClock
from tests.serving.building import NOW_MS, Town
from tests.serving.process import process, until_ready

EVENT = {"event_id": "e-1", "user_id": "anna", "item_id": 4, "action": "view", "event_time": NOW_MS}


class SteppedClock(ManualClock):
    """Time that passes only when told to."""

    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


def token_of(*scopes: Scope, name: str = "shop") -> tuple[str, str]:
    """A token, and its entry in the settings."""
    token, entry = new_token(name, frozenset(scopes))
    return token, str(entry)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "recommend", "events", "status"),
    [("read", 200, 403, 200), ("write", 403, 202, 403), ("admin", 200, 202, 200)],
)
async def test_a_token_allows_what_its_scope_says(
    town: Town, scope: Scope, recommend: int, events: int, status: int
) -> None:
    token, entry = token_of(scope)
    async with town.worker(version=1, access=AccessConfig(tokens=(entry,))) as served:
        client = served.client
        answers = [
            await client.post("/v1/recommend", json={"user_id": 7}, headers=bearer(token)),
            await client.post("/v1/rank", json={"user_id": 7, "candidates": [1]}, headers=bearer(token)),
            await client.post("/v1/events", json=EVENT, headers=bearer(token)),
            await client.delete("/v1/users/7", headers=bearer(token)),
            *[await client.get(path, headers=bearer(token)) for path in ("/status", "/metrics", "/version")],
        ]
    assert [one.status_code for one in answers] == [recommend, recommend, events, events, status, status, status]
    refused = [one for one in answers if one.status_code == 403]
    assert {one.json()["error"]["code"] for one in refused} <= {"forbidden"}


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic c2hvcDpzZWNyZXQ=", "Bearer hr_somebody-elses", "bearer \xe9"]
)
async def test_without_a_token_that_is_known_nothing_is_answered_but_the_probes(town: Town, header: str | None) -> None:
    _, entry = token_of("admin")
    headers = httpx.Headers({} if header is None else {"authorization": header}, encoding="latin-1")
    async with town.worker(version=1, access=AccessConfig(tokens=(entry,))) as served:
        client = served.client
        for method, path in (
            ("POST", "/v1/recommend"),
            ("POST", "/v1/rank"),
            ("POST", "/v1/events"),
            ("DELETE", "/v1/users/7"),
            ("GET", "/status"),
            ("GET", "/metrics"),
            ("GET", "/version"),
        ):
            response = await client.request(method, path, headers=headers)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "unauthenticated"
            assert response.json()["request_id"]
        assert served.worker.intake.num_accepted == 0
        assert [(await client.get(path)).status_code for path in ("/livez", "/readyz")] == [200, 200]


async def test_figures_are_open_where_settings_say_so(town: Town) -> None:
    _, entry = token_of("read")
    async with town.worker(version=1, access=AccessConfig(tokens=(entry,), monitoring_scope="open")) as served:
        assert (await served.client.get("/metrics")).status_code == 200
        assert (await served.client.post("/v1/recommend", json={"user_id": 7})).status_code == 401


def test_every_one_of_several_tokens_is_found_and_no_other() -> None:
    tokens = [token_of("read", name=f"shop-{n}") for n in range(5)]
    access = Access(AccessConfig(tokens=tuple(entry for _, entry in tokens)), SteppedClock(0))
    assert [access.admit(f"Bearer {token}", "h", "read").name for token, _ in tokens] == [f"shop-{n}" for n in range(5)]
    for wrong in (tokens[0][0][:-1], tokens[0][0] + "x", tokens[0][1], tokens[0][1].split(":")[-1]):
        with pytest.raises(UnauthenticatedError):
            access.admit(f"Bearer {wrong}", "h", "read")


def test_tokens_differ_and_their_entries_do_not_reveal_them() -> None:
    (one, entry), (other, _) = token_of("read", "write"), token_of("read", "write")
    assert one != other
    assert len(one) >= 40
    assert one.removeprefix("hr_") not in entry
    assert str(TokenEntry.parse(entry)) == entry
    assert entry.startswith("shop:read+write:")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": ("hr_the-token-itself",)}, "NAME:SCOPE"),
        ({"tokens": ("shop:read+root:" + 64 * "0",)}, "scope 'root'"),
        ({"tokens": ("shop:read:" + 64 * "0", "shop:write:" + 64 * "1")}, "'shop' is there twice"),
        ({"rate_per_s": -1.0}, "access.rate_per_s = -1.0"),
        ({"rate_per_s": float("nan")}, "access.rate_per_s = nan"),
        ({"rate_burst": 0}, "access.rate_burst = 0"),
        ({"tls_certfile": "/cert.pem"}, "access.tls_keyfile is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        AccessConfig(**settings)
    assert "hr_the-token-itself" not in str(refused.value)


# --- where a worker listens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", ""])
async def test_a_worker_without_tokens_refuses_to_listen_where_others_reach_it(town: Town, host: str) -> None:
    parts = replace(town.build()._parts, config=ServingConfig(host=host, port=0))
    with pytest.raises(ListenRefusedError, match=r"access\.tokens is empty.*headrace token new.*allow_without_tokens"):
        await asyncio.to_thread(run_worker, parts)


async def test_callers_from_elsewhere_are_no_admins_of_an_open_worker(town: Town) -> None:
    access = Access(AccessConfig(allow_without_tokens=True), town.clock)
    assert "admin" not in access.admit(None, "192.0.2.7", "write").scopes
    assert "admin" in access.admit(None, "127.0.0.1", "admin").scopes
    assert "admin" in access.admit(None, "::1", "admin").scopes


def test_a_certificate_that_is_no_use_is_one_clear_sentence(tmp_path: Path) -> None:
    authority = trustme.CA()
    one, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    one.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    other.private_key_pem.write_to_path(tmp_path / "key.pem")
    for certificate, key in (("cert.pem", "key.pem"), ("missing.pem", "key.pem"), ("key.pem", "key.pem")):
        config = AccessConfig(tls_certfile=str(tmp_path / certificate), tls_keyfile=str(tmp_path / key))
        with pytest.raises(ListenRefusedError, match=r"access\.tls_certfile = .*access\.tls_keyfile = "):
            tls_context(config)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_a_caller_gets_its_burst_then_its_rate() -> None:
    clock = SteppedClock(0)
    limiter = RateLimiter(AccessConfig(rate_per_s=2, rate_burst=3), clock)
    assert [limiter.take("a") for _ in range(3)] == [0, 0, 0]
    assert limiter.take("a") == pytest.approx(0.5)
    assert limiter.take("a") == pytest.approx(0.5), "a refused request costs nothing"
    assert limiter.take("b") == 0, "callers do not share"
    clock.now_s = 0.5
    assert limiter.take("a") == 0
    assert limiter.take("a") > 0
    clock.now_s = 1_000
    assert [limiter.take("a") == 0 for _ in range(4)] == [True, True, True, False]


def test_over_a_long_time_no_more_than_the_rate_passes() -> None:
    clock = SteppedClock(0)
    limiter = RateLimiter(AccessConfig(rate_per_s=30, rate_burst=10), clock)
    admitted = 0
    for n in range(10_000):
        clock.now_s = n / 100
        admitted += limiter.take("a") == 0
    assert admitted == pytest.approx(30 * 100 + 10, abs=2)


def test_the_table_of_callers_is_bounded_and_forgets_who_was_quiet_the_longest() -> None:
    limiter = RateLimiter(AccessConfig(rate_per_s=1, rate_burst=1, rate_callers_max=3), SteppedClock(0))
    for caller in "abcd":
        assert limiter.take(caller) == 0
    assert len(limiter._full_at_s) == 3
    assert limiter.take("d") > 0
    assert limiter.take("a") == 0


async def test_a_caller_that_asks_too_often_gets_429_and_is_told_when_to_come_back(town: Town) -> None:
    token, entry = token_of("read")
    access = AccessConfig(tokens=(entry,), rate_per_s=0.1, rate_burst=2)
    async with town.worker(version=1, access=access) as served:
        asked = [
            await served.client.post("/v1/recommend", json={"user_id": 7}, headers=bearer(token)) for _ in range(3)
        ]
        assert [one.status_code for one in asked] == [200, 200, 429]
        assert asked[2].json()["error"]["code"] == "rate_limited"
        assert 1 <= int(asked[2].headers["retry-after"]) <= 10
        # Guessing tokens is limited by address, and costs nobody else's allowance. Figures and probes are not limited.
        guesses = [await served.client.post("/v1/recommend", headers=bearer(f"hr_{n}")) for n in range(3)]
        assert [one.status_code for one in guesses] == [401, 401, 429]
        for path in ("/status", "/readyz"):
            assert (await served.client.get(path, headers=bearer(token))).status_code == 200


# --- TLS -------------------------------------------------------------------------------------------------------------


async def test_with_a_certificate_the_worker_speaks_https_only(town: Town, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    for n, part in enumerate(issued.cert_chain_pems):
        part.write_to_path(tmp_path / "cert.pem", append=n > 0)
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    files = {"tls_certfile": str(tmp_path / "cert.pem"), "tls_keyfile": str(tmp_path / "key.pem")}
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with process(tmp_path, "127.0.0.1:9", access=files) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        for newest in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            trusting.maximum_version = newest
            async with httpx.AsyncClient(verify=trusting, base_url=url) as client:
                await until_ready(client)
                assert (await client.post("/v1/recommend", json={"user_id": 7})).json()["snapshot_version"] == 1
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError, match="certificate"):
                await client.get(f"{url}/livez")
            with pytest.raises(httpx.HTTPError):
                await client.get(f"{url.replace('https', 'http')}/livez")
