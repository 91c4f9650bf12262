"""The worker that bench_serving measures: `python -m benchmarks.serving_process FOLDER BROKER`; says each pause."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.store import FeatureStore
from model.config import ModelConfig
from serving.config import ServingConfig
from serving.daemon import run_worker
from serving.parts import ServingParts
from stream.clock import WallClock
from stream.events import EventRules
from stream.kafka import KafkaConfig, KafkaLog

HISTORY_LEN = 200
MODEL = ModelConfig(max_len=HISTORY_LEN)
MODEL_NAME = "bench"


def main(folder: str, bootstrap_servers: str) -> int:
    """Serve what the benchmark has put into `folder`, on a free port that the log names."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("serving.swap").setLevel(logging.DEBUG)
    store = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{Path(folder) / 'store.db'}"))
    return run_worker(
        ServingParts(
            config=ServingConfig(port=0, snapshot_poll_ms=20),
            model_config=MODEL,
            model_name=MODEL_NAME,
            snapshot_root=Path(folder) / "snapshots",
            log=KafkaLog(KafkaConfig(bootstrap_servers=bootstrap_servers)),
            store=store,
            hot_config=HotHistoriesConfig(max_len=HISTORY_LEN),
            rules=EventRules(),
            clock=WallClock(),
            # The time of a request stands still, so that answers of one version can be compared.
            mode="replay",
            replica="bench",
        )
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
