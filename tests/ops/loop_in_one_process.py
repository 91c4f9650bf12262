"""The whole loop in one process on a log in memory, with every span kept; prints them as JSON. Run by test_trace.py.

Arguments: a folder, and settings of the model that differ, as JSON.

A process of its own, because the tracer provider of a process can be set only once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import httpx
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from feature_store.config import FeatureStoreConfig, HotHistoriesConfig
from feature_store.schema import migrate
from feature_store.store import FeatureStore
from model.config import LossConfig, ModelConfig, OptimizerConfig
from online_trainer.config import ItemsConfig, TrainerConfig
from online_trainer.daemon import TrainerDaemon
from online_trainer.parts import TrainerParts
from serving.api import build_api
from serving.config import ServingConfig
from serving.parts import ServingParts
from serving.worker import ServingWorker
from stream.clock import WallClock
from stream.commit import Committer
from stream.events import EventDecoder, EventRules
from stream.memory_log import MemoryLog

MODEL = ModelConfig(
    embedding_dim=8,
    num_heads=1,
    attention_dim=4,
    hidden_dim=4,
    max_len=8,
    **({"num_layers": 1} | json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}")),
)
HOT = HotHistoriesConfig(max_len=16, budget_bytes=1 << 20)


async def run_loop(root: Path) -> None:
    url = f"sqlite:///{root}/store.db"
    migrate(url)
    store, log, clock = FeatureStore(FeatureStoreConfig(url=url)), MemoryLog(WallClock()), WallClock()
    await log.create_topics()
    worker = ServingWorker(
        ServingParts(
            config=ServingConfig(snapshot_poll_ms=20),
            model_config=MODEL,
            model_name="default",
            snapshot_root=root / "snapshots",
            log=log,
            store=store,
            hot_config=HOT,
            rules=EventRules(),
            clock=clock,
        )
    )
    trainer = TrainerDaemon(
        TrainerParts(
            config=TrainerConfig(batch_wait_ms=10, publish_interval_ms=10),
            items_config=ItemsConfig(),
            model_config=MODEL,
            loss_config=LossConfig(),
            optimizer_config=OptimizerConfig(),
            model_name="default",
            log=log,
            store=store,
            hot_config=HOT,
            snapshot_root=root / "snapshots",
            checkpoint_root=root / "checkpoints",
            quarantine_root=root / "quarantine",
            metrics_root=root / "metrics",
            clock=clock,
        )
    )
    committer = Committer(
        store=store,
        writer=log.writer(),
        topics=log.topics,
        log_id=log.log_id,
        decoder=EventDecoder(EventRules()),
        clock=clock,
    )
    stopping = asyncio.Event()
    await worker.start()
    training = asyncio.create_task(trainer.run(stopping))
    transport = httpx.ASGITransport(app=build_api(worker))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        producer = trace.get_tracer("producer")
        for item in (1, 2, 3):
            # Only the last event is traced: it must be found at the other end by itself.
            with producer.start_as_current_span("producer") if item == 3 else trace.use_span(trace.INVALID_SPAN):
                event = {"event_id": f"e{item}", "user_id": 7, "item_id": item, "action": "view"}
                headers: dict[str, str] = {}
                propagate.inject(headers)
                timed = event | {"event_time": clock.now_ms()}
                answer = await client.post("/v1/events", json=timed, headers=headers)
                assert answer.status_code == 202, answer.text
        records = log.records((log.topics.interactions, 0))
        await committer.commit(0, records)
        async with asyncio.timeout(30):
            while worker.status()["snapshot"]["learned_interactions"] != 3:  # type: ignore[index]  # noqa: ASYNC110 - watched from outside
                await asyncio.sleep(0.02)
        answer = await client.post("/v1/recommend", json={"user_id": 7, "k": 1, "exclude_seen": False})
        assert answer.json()["fallback"] is False, answer.text
    stopping.set()
    await training
    await worker.stop()
    committer.close()
    store.close()


def main() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    asyncio.run(run_loop(Path(sys.argv[1])))
    spans = [
        {
            "name": span.name,
            "id": f"{span.context.span_id:016x}",
            "trace": f"{span.context.trace_id:032x}",
            "links": [f"{link.context.span_id:016x}" for link in span.links],
        }
        for span in exporter.get_finished_spans()
    ]
    print(json.dumps(spans))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
