"""Other people's locks: what keeps a writer waiting in either database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from feature_store.config import parse_url


@contextmanager
def writers_kept_waiting(url: str) -> Iterator[None]:
    """As long as the block runs no other connection can write histories; reading goes on."""
    if parse_url(url).get_backend_name() == "sqlite":
        lock = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=30)
        lock.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            lock.execute("ROLLBACK")
            lock.close()
    else:
        plain = parse_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(plain) as connection:
            connection.execute("LOCK TABLE history_chunk IN EXCLUSIVE MODE")
            yield
            connection.rollback()
