"""Texts of the same words have similar vectors, in any script; what an item's producer says of it comes first."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from online_trainer.config import ItemsConfig
from online_trainer.item_content import content_vector
from online_trainer.item_feed import ItemFeed
from online_trainer.text_content import NGRAMS_DIM, hashed_ngrams, item_text, text_encoder
from stream.clock import WallClock
from stream.memory_log import MemoryLog
from stream.messages import ItemMessage, encode_message

PLACES = [59, 92, 129, 131, 174, 201, 217, 229, 238, 248]
"""Of "Heat (1995)"."""


def cosine(one: str, other: str) -> float:
    left, right = hashed_ngrams(one), hashed_ngrams(other)
    assert left is not None
    assert right is not None
    return float(left @ right)


def test_texts_with_common_words_are_closer_than_others() -> None:
    assert cosine("Toy Story 2 (1999)", "toy story, the first") > 0.4
    assert cosine("Toy Story 2 (1999)", "Heat (1995)") < 0.25
    assert cosine("running", "runner") > cosine("running", "bicycle") + 0.2
    assert cosine("Преступление и наказание", "преступления") > 0.4
    assert cosine("東京物語", "東京") > 0.2


def test_a_vector_is_a_function_of_the_text() -> None:
    found, again, shouted = (hashed_ngrams(text) for text in ("Heat (1995)", "Heat (1995)", "HEAT, 1995!"))
    assert found is not None
    assert found.dtype == np.float32
    assert len(found) == NGRAMS_DIM
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(found, shouted)
    # Bound to its value: what is in checkpoints must not come to mean something else.
    assert np.flatnonzero(found).tolist() == PLACES


@pytest.mark.parametrize("text", ["", "  ", "!?", "—"])
def test_a_text_without_words_says_nothing(text: str) -> None:
    assert hashed_ngrams(text) is None


def test_long_texts_are_cut() -> None:
    assert len(item_text("t", "x" * 10_000)) == 2_000


def test_a_text_says_less_than_categories_and_nothing_beside_an_embedding() -> None:
    text, embedding = hashed_ngrams("Toy Story"), np.array([1, -1, 2], np.float32)
    alone, genre, both = (content_vector(None, *of) for of in (((), text), (("comedy",), None), (("comedy",), text)))
    assert alone is not None
    assert genre is not None
    assert both is not None
    assert both @ genre > both @ alone + 0.3
    np.testing.assert_array_equal(content_vector(embedding, (), text), content_vector(embedding, ()))


async def test_the_trainer_reads_titles_and_texts_of_items_that_come_without_an_embedding() -> None:
    log = MemoryLog(WallClock())
    await log.create_topics()
    items = [
        ItemMessage(item_id=1, title="Toy Story", categories=["comedy"]),
        ItemMessage(item_id=2, title="Toy Story", embedding=[1.0, -1.0]),
        ItemMessage(item_id=3),
    ]
    writer = log.writer()
    await writer.start()
    for item in items:
        await writer.send(log.topics.items, value=encode_message(item), key=str(item.item_id).encode())
    feed = ItemFeed(log, WallClock())
    await feed.start()
    await feed.begin({})
    one, two, three = feed.due(2**62)
    np.testing.assert_array_equal(one.content, content_vector(None, ["comedy"], hashed_ngrams("Toy Story")))
    np.testing.assert_array_equal(two.content, content_vector(np.array([1, -1], np.float32), []))
    assert three.content is None
    await feed.stop()


def test_the_encoder_is_the_one_of_the_setting() -> None:
    assert text_encoder("ngrams") is hashed_ngrams
    assert text_encoder("none")("Heat") is None
    with pytest.raises(ValueError, match="items.text_encoder = 'bert': must be ngrams or wordllama or none"):
        ItemsConfig(text_encoder="bert")  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ValueError, match=r"wordllama, which is not installed: pip install 'headrace\[text\]'"):
        text_encoder("wordllama")


def test_wordllama_knows_what_words_mean_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wordllama")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encode = text_encoder("wordllama")

    def of(text: str) -> Any:
        found = encode(text)
        assert found is not None
        return found / np.linalg.norm(found)

    assert of("a movie about war") @ of("film on soldiers in battle") > of("a movie about war") @ of("bread recipes")
    assert encode("") is None
