"""Who may use the API of an inference worker, how often, and over what kind of connection."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

Scope = Literal["read", "write", "admin"]
"""`read`: answers and figures. `write`: events, forgetting a user. `admin`: those, and everything else."""

SCOPES: Final[tuple[Scope, ...]] = ("read", "write", "admin")
_ENTRY: Final = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<scopes>[a-z+]+):(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEntry:
    """A token as settings hold it: who has it, what it allows, and its sha256 (32 bytes), never itself."""

    name: str
    scopes: frozenset[Scope]
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> TokenEntry:
        """From `NAME:SCOPE[+SCOPE]:SHA256`; a ValueError does not repeat the text, which may be a token by mistake."""
        found = _ENTRY.fullmatch(text)
        if found is None:
            raise ValueError(
                "access.tokens: an entry is not NAME:SCOPE[+SCOPE]:SHA256 (64 hex digits): `headrace token new` "
                "prints one"
            )
        scopes = found["scopes"].split("+")
        if unknown := sorted(set(scopes) - set(SCOPES)):
            raise ValueError(
                f"access.tokens: {found['name']} has the scope {unknown[0]!r}; known are {', '.join(SCOPES)}"
            )
        return cls(
            name=found["name"],
            scopes=frozenset(scope for scope in SCOPES if scope in scopes),
            digest=bytes.fromhex(found["digest"]),
        )

    def __str__(self) -> str:
        return f"{self.name}:{'+'.join(scope for scope in SCOPES if scope in self.scopes)}:{self.digest.hex()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessConfig:
    """Who may use the API of an inference worker (`headrace serve`)."""

    tokens: tuple[str, ...] = ()
    """Bearer tokens as `NAME:SCOPE[+SCOPE]:SHA256`, which `headrace token new` prints; scopes are read, write, admin.
    Without any, everything is open, and a worker refuses to listen on an address that other machines reach."""
    allow_without_tokens: bool = False
    """Listen without tokens on any address: for a network in which everybody may read and write. Admin routes then
    answer to callers on this machine alone."""
    monitoring_scope: Literal["open", "read", "admin"] = "read"
    """What /metrics, /status and /version need once there are tokens; `open`: nothing. /livez and /readyz are always
    open: load balancers have no token."""
    rate_per_s: float = 0.0
    """Requests per second that one token (without tokens: one address) may send over time; beyond it 429 with
    Retry-After. 0: no limit of one caller's own, because `serving.queue_max` already bounds what a worker takes on."""
    rate_burst: int = 100
    """Requests that a caller who was quiet may send at once."""
    rate_callers_max: int = 10_000
    """Callers whose rates are remembered; beyond it the one not seen for the longest starts anew."""
    tls_certfile: str = ""
    """Certificate chain (PEM); with it, the worker speaks HTTPS only. Restart workers when it is renewed."""
    tls_keyfile: str = ""
    """Private key (PEM, not encrypted) of the certificate."""

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"access.tokens: the name {twice[0]!r} is there twice; logs could not tell them apart")
        if not 0 <= self.rate_per_s < float("inf"):
            raise ValueError(f"access.rate_per_s = {self.rate_per_s}: must be at least 0 (0: no limit)")
        for name in ("rate_burst", "rate_callers_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"access.{name} = {getattr(self, name)}: must be at least 1")
        if bool(self.tls_certfile) != bool(self.tls_keyfile):
            missing = "tls_keyfile" if self.tls_certfile else "tls_certfile"
            raise ValueError(f"access.{missing} is empty: TLS needs the certificate and its key")

    def entries(self) -> list[TokenEntry]:
        """The tokens; raises ValueError."""
        return [TokenEntry.parse(text) for text in self.tokens]
