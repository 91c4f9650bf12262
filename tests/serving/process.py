"""A worker as a process of its own, for tests that signal it: `python -m tests.serving.process FOLDER BROKER`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from feature_store.config import FeatureStoreConfig
from feature_store.store import FeatureStore
from serving.config import ServingConfig
from serving.daemon import run_worker
from serving.worker import ServingParts
from stream.clock import WallClock
from stream.events import EventRules
from stream.kafka import KafkaConfig, KafkaLog
from tests.serving.building import HOT, MODEL, NAME


def main(folder: str, bootstrap_servers: str) -> int:
    """Serve what a test has put into `folder`, on a free port that the log names."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    return run_worker(
        ServingParts(
            config=ServingConfig(port=0, snapshot_poll_ms=20),
            model_config=MODEL,
            model_name=NAME,
            snapshot_root=Path(folder) / "snapshots",
            log=KafkaLog(KafkaConfig(bootstrap_servers=bootstrap_servers)),
            store=FeatureStore(FeatureStoreConfig(url=f"sqlite:///{Path(folder) / 'store.db'}")),
            hot_config=HOT,
            rules=EventRules(),
            clock=WallClock(),
            replica="process",
        )
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
