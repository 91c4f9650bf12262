"""Which encoder a configuration asks for."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.gru import GRU
from model.hstu import HSTU
from model.sasrec import SASRec

Encoder = HSTU | SASRec | GRU


def build_encoder(config: ModelConfig, generator: torch.Generator) -> Encoder:
    """The encoder of ``config.kind``; its weights depend on the configuration and the generator's state only."""
    if config.kind == "gru":
        return GRU(config, generator)
    return SASRec(config, generator) if config.kind == "sasrec" else HSTU(config, generator)
