"""Which encoder a configuration asks for."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.gru import GRU
from model.hstu import HSTU
from model.mixture import TransducerMixture
from model.sasrec import SASRec
from model.token_hstu import TokenHSTU

Encoder = HSTU | TokenHSTU | TransducerMixture | SASRec | GRU


def build_encoder(config: ModelConfig, generator: torch.Generator) -> Encoder:
    """The encoder of ``config.kind``; its weights depend on the configuration and the generator's state only."""
    if config.kind == "gru":
        return GRU(config, generator)
    if config.kind == "sasrec":
        return SASRec(config, generator)
    if config.transducers:
        return TransducerMixture(config, generator)
    return TokenHSTU(config, generator) if config.plan().reads_actions else HSTU(config, generator)
