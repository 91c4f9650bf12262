"""What running a command came to, and what a refusal looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


class Headrace(Protocol):
    def __call__(self, *arguments: str, **environment: str) -> Ran: ...


def assert_refused(ran: Ran, *words: str) -> None:
    assert ran.returncode == 2, ran
    (sentence,) = ran.stderr.strip().splitlines()
    assert sentence.startswith("headrace: ")
    assert not [word for word in words if word not in sentence], sentence
