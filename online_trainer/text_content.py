"""What an item's title and text say, as a vector: for items that come without an embedding of their own.

*ngrams*: words and the three-letter parts of them, hashed; a function of the text alone, in any script, and knows no
meaning: "film" and "movie" have nothing in common. *wordllama*: the mean of static token embeddings taken from Llama
models, which ship inside the pip package of that name (an optional extra; nothing is downloaded).

Shapes: F features of a text, W width of an encoder's vector.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from feature_store.ids import stable_id

TextEncoding = Literal["ngrams", "wordllama", "none"]
Float32s = NDArray[np.float32]

NGRAMS_DIM: Final = 256
_TEXT_CHARS_MAX: Final = 2_000
"""Longer texts are cut here: what an item is about stands at its beginning."""
_WORD: Final = re.compile(r"\w+")


class TextEncoder(Protocol):
    """From a text to float32[W]; None for one that says nothing."""

    def __call__(self, text: str) -> Float32s | None:
        """A function of the text alone."""
        ...


def text_encoder(kind: TextEncoding) -> TextEncoder:
    """The encoder of a setting. ValueError, naming the remedy, where its package is not installed."""
    if kind == "wordllama":
        return _word_llama()
    if kind == "ngrams":
        return hashed_ngrams
    return lambda _text: None


def item_text(title: str, text: str) -> str:
    """What is encoded of an item."""
    return f"{title} {text}".strip()[:_TEXT_CHARS_MAX]


def hashed_ngrams(text: str) -> Float32s | None:
    """float32[256] of unit length: words and the three-letter parts of them, by the roots of their numbers.

    Each feature adds to one of the places, up or down, as its hash says (Weinberger et al., ICML 2009).
    """
    counts: Counter[str] = Counter()
    for word in _WORD.findall(text.casefold()):
        counts[word] += 1
        edged = f"<{word}>"
        counts.update(edged[at : at + 3] for at in range(len(edged) - 2))
    if not counts:
        return None
    hash_F = np.array([stable_id(feature) for feature in counts], np.int64)
    sign_F = np.where(hash_F & 1, 1.0, -1.0) * np.sqrt(np.array(list(counts.values()), np.float64))
    vector = np.bincount((hash_F >> 1) % NGRAMS_DIM, weights=sign_F, minlength=NGRAMS_DIM)
    norm = np.linalg.norm(vector)
    return (vector / norm).astype(np.float32) if norm > 0 else None


def _word_llama() -> TextEncoder:
    try:
        import wordllama  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise ValueError(
            "items.text_encoder is wordllama, which is not installed: pip install 'headrace[text]', or set it to ngrams"
        ) from error
    # The package looks for its own files under names that it would download; here they are in it.
    inside = Path(wordllama.__file__).parent
    loaded = wordllama.WordLlama.load(cache_dir=inside, disable_download=True)

    def encode(text: str) -> Float32s | None:
        vector: Float32s = np.asarray(loaded.embed([text])[0], np.float32)
        return vector if vector.any() and np.isfinite(vector).all() else None

    return encode
