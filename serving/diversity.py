"""Choosing different items among the best: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).

Shapes: P items of the pool, K items chosen, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def diversified(scores_P: Tensor, unit_PD: Tensor, k: int, *, diversity: float) -> Tensor:
    """int64[K]: places in the pool of at most k items, in the order chosen.

    Each time the item is taken with the largest ``(1 - diversity) * relevance - diversity * likeness``. relevance: the
    score, scaled so that the pool's lie between 0 and 1. likeness: the largest cosine to an item chosen before. At
    equal values the first of the pool is taken: pass it best first. unit_PD: embeddings of unit length. diversity: 0 is
    the order of scores, 1 looks at differences alone (after the best item).
    """
    spread = scores_P.max() - scores_P.min()
    relevance_P = (scores_P - scores_P.min()) / spread.clamp(min=torch.finfo(scores_P.dtype).tiny)
    value_P = (1 - diversity) * relevance_P
    likeness_P = torch.full_like(scores_P, -1.0)
    chosen = [int(scores_P.argmax())]
    while len(chosen) < min(k, len(scores_P)):
        likeness_P = torch.maximum(likeness_P, unit_PD @ unit_PD[chosen[-1]])
        value_P[chosen[-1]] = -torch.inf
        chosen.append(int((value_P - diversity * likeness_P).argmax()))
    return torch.tensor(chosen)
