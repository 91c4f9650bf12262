"""A worker of bench_upstream_serving: `python -m benchmarks.ranking_process FOLDER BROKER with|without`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Final

from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.store import FeatureStore
from model.config import ModelConfig
from model.ranking_model import with_ranking_head
from model.ranking_settings import RankingSettings
from model.upstream_config import UpstreamConfig
from serving.config import ServingConfig
from serving.daemon import run_worker
from serving.parts import ServingParts
from stream.clock import WallClock
from stream.events import EventRules
from stream.kafka import KafkaConfig, KafkaLog

HISTORY_LEN: Final = 200
MODEL_NAME: Final = "bench"
RANKING: Final = RankingSettings(tasks=("click",), kind="llatte", min_labels=0)
UPSTREAM: Final = UpstreamConfig()
RULES: Final = EventRules()
MODEL: Final = with_ranking_head(
    ModelConfig(max_len=HISTORY_LEN), RANKING, RULES.actions, upstream_width=UPSTREAM.width
)


def main(folder: str, bootstrap_servers: str, upstream: str) -> int:
    """Serve what the benchmark has put into `folder`, on a free port that the log names."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    store = FeatureStore(FeatureStoreConfig(url=f"sqlite:///{Path(folder) / 'store.db'}"))
    return run_worker(
        ServingParts(
            config=ServingConfig(port=0),
            model_config=MODEL,
            model_name=MODEL_NAME,
            snapshot_root=Path(folder) / "snapshots",
            log=KafkaLog(KafkaConfig(bootstrap_servers=bootstrap_servers)),
            store=store,
            hot_config=HotHistoriesConfig(max_len=HISTORY_LEN + 1),
            rules=RULES,
            clock=WallClock(),
            ranking=RANKING,
            reads_vectors=upstream == "with",
            replica=upstream,
        )
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
