"""The whole loop, from an event through training and a swap to an answer, with ULTRA-HSTU as the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ULTRA = {
    "kind": "ultra_hstu",
    "num_layers": 2,
    "local_attn_len": 1,
    "global_attn_len": 1,
    "truncated_len": 2,
    "truncated_hop": 1,
}


MIXTURE = {
    **ULTRA,
    "transducers": [
        {"name": "views", "actions": ["view"], "max_len": 4, "num_layers": 2, "mask": 2},
        {"name": "deeds", "actions": ["like", "purchase"], "max_len": 8, "num_layers": 1, "mask": 24},
    ],
}


@pytest.mark.parametrize("settings", [ULTRA, MIXTURE], ids=["one", "mixture"])
def test_events_are_learned_from_and_answered_with(tmp_path: Path, settings: dict[str, object]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.loop_in_one_process", str(tmp_path), json.dumps(settings)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "snapshots").rglob("manifest.json")]
    assert manifests
    for manifest in manifests:
        assert settings.items() <= manifest["model_config"].items()
