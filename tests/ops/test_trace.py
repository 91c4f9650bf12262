"""One event can be followed from its producer's header to the first answer, span by span."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def test_an_event_is_linked_from_its_producer_to_the_first_answer(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.loop_in_one_process", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    spans: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    (producer,) = [span for span in spans if span["name"] == "producer"]
    (received,) = [
        span for span in spans if span["name"] == "headrace.serving.request" and span["trace"] == producer["trace"]
    ]
    # The producer's context travels in the record's header; from there, batches link to what they contain.
    path = [received]
    for name in (
        "headrace.ingest.commit",
        "headrace.trainer.step",
        "headrace.snapshot.publish",
        "headrace.serving.swap",
    ):
        linked = [span for span in spans if span["name"] == name and path[-1]["id"] in span["links"]]
        assert linked, f"no {name} links to {path[-1]['name']}"
        path.append(linked[0])
    published, answers = path[-2], [span for span in spans if span["name"] == "headrace.serving.request"]
    assert any(published["id"] in answer["links"] for answer in answers), "no answer links to what was published"
