"""Lets requests in: whose token it is, what that allows, and whether the caller has asked too often."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
import secrets
import ssl
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from serving.access_config import SCOPES, AccessConfig, Scope, TokenEntry
from serving.errors import ForbiddenError, ListenRefusedError, RateLimitedError, UnauthenticatedError
from stream.clock import Clock

_TOKEN_BYTES: Final = 32
_ALL: Final = frozenset(SCOPES)
_ANONYMOUS: Final = "anonymous"


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who sends a request."""

    name: str
    """Of the token."""
    host: str
    """Address the connection comes from: of the proxy, if there is one."""
    scopes: frozenset[Scope]

    def __str__(self) -> str:
        return f"{self.name} at {self.host}"


class Access:
    """Authenticates, authorises and limits callers. For the event loop alone."""

    def __init__(self, config: AccessConfig, clock: Clock) -> None:
        self._config, self._entries = config, config.entries()
        self._limiter = RateLimiter(config, clock)

    def admit(self, authorization: str | None, host: str, scope: Scope) -> Caller:
        """The caller of a request that needs `scope`. Raises UnauthenticatedError, ForbiddenError, RateLimitedError."""
        try:
            caller = self._caller(authorization, host)
        except UnauthenticatedError:
            self._limit(f"address {host}")
            raise
        self._limit(f"token {caller.name}" if self._entries else f"address {host}")
        _require(caller, scope)
        return caller

    def admit_monitoring(self, authorization: str | None, host: str) -> None:
        """Let a caller read figures, however often. Raises UnauthenticatedError or ForbiddenError."""
        scope = self._config.monitoring_scope
        if scope != "open":
            _require(self._caller(authorization, host), scope)

    def _caller(self, authorization: str | None, host: str) -> Caller:
        if not self._entries:
            scopes = _ALL if is_loopback(host) else _ALL - {"admin"}
            return Caller(name=_ANONYMOUS, host=host, scopes=scopes)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError("a token is needed: send the header Authorization: Bearer TOKEN")
        digest = token_digest(token.strip())
        # Every entry is compared in full, so that the time it takes tells nothing about which one is near.
        found = [entry for entry in self._entries if hmac.compare_digest(entry.digest, digest)]
        if not found:
            raise UnauthenticatedError("this token is not known here")
        return Caller(name=found[0].name, host=host, scopes=found[0].scopes)

    def _limit(self, who: str) -> None:
        wait_s = self._limiter.take(who)
        if wait_s > 0:
            raise RateLimitedError(
                f"more than {self._config.rate_per_s:g} requests a second (access.rate_per_s) from {who}",
                retry_after_s=math.ceil(wait_s),
            )


def _require(caller: Caller, scope: Scope) -> None:
    if scope not in caller.scopes and "admin" not in caller.scopes:
        raise ForbiddenError(f"this needs the scope {scope}, which {caller.name} does not have")


class RateLimiter:
    """A token bucket for each caller, in a table of bounded size."""

    def __init__(self, config: AccessConfig, clock: Clock) -> None:
        self._per_s, self._burst, self._callers_max = config.rate_per_s, config.rate_burst, config.rate_callers_max
        self._clock = clock
        self._full_at_s: OrderedDict[str, float] = OrderedDict()
        """By caller, the one not seen for the longest first: when its bucket is full again."""

    def take(self, caller: str) -> float:
        """0 if the caller may send a request now, else the seconds until it may; a refused request costs nothing."""
        if not self._per_s:
            return 0.0
        now_s = self._clock.monotonic_s()
        full_at_s = max(now_s, self._full_at_s.get(caller, now_s)) + 1 / self._per_s
        wait_s = full_at_s - now_s - self._burst / self._per_s
        # The remainder of a sum of fractions is no reason to send anybody away.
        if wait_s > 1e-9:
            return wait_s
        self._full_at_s[caller] = full_at_s
        self._full_at_s.move_to_end(caller)
        if len(self._full_at_s) > self._callers_max:
            self._full_at_s.popitem(last=False)
        return 0.0


def new_token(name: str, scopes: frozenset[Scope]) -> tuple[str, TokenEntry]:
    """A new token of 256 random bits, and what settings hold of it."""
    token = f"hr_{secrets.token_urlsafe(_TOKEN_BYTES)}"
    return token, TokenEntry.parse(str(TokenEntry(name=name, scopes=scopes, digest=token_digest(token))))


def token_digest(token: str) -> bytes:
    """The sha256 of a token. No slow hash is needed: nobody guesses 256 random bits."""
    return hashlib.sha256(token.encode()).digest()


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_guarded(config: AccessConfig, host: str) -> None:
    """Refuse to listen where others reach us and nobody needs a token. Raises ListenRefusedError."""
    if not config.tokens and not config.allow_without_tokens and not is_loopback(host):
        raise ListenRefusedError(
            f"serving.host = {host} lets other machines in, and access.tokens is empty: add a token "
            "(`headrace token new`), or set access.allow_without_tokens = true if everybody there may read and write"
        )


def tls_context(config: AccessConfig) -> ssl.SSLContext | None:
    """The server's side of TLS, None without a certificate. Raises ListenRefusedError for files that are no use."""
    if not config.tls_certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An encrypted key must not make a daemon wait for a person at a terminal.
        context.load_cert_chain(config.tls_certfile, config.tls_keyfile, password=lambda: "")
    except OSError as error:
        raise ListenRefusedError(
            f"access.tls_certfile = {config.tls_certfile} with access.tls_keyfile = {config.tls_keyfile} cannot be "
            f"used ({error}): both are PEM files, the key belongs to the certificate and is not encrypted"
        ) from error
    return context
