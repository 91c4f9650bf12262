"""What the store says about items reaches answers, whatever happens at the same time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from feature_store.errors import StoreUnavailableError
from feature_store.store import FeatureStore
from model.snapshot import load_snapshot
from serving.batcher import ModelThread
from serving.item_names import ItemNames, WithheldItems
from serving.store_watch import StoreWatch
from serving.weights import ServedWeights, prepare_swap
from tests.serving.building import MODEL, NAME, Town

Int64s = NDArray[np.int64]


async def test_an_item_that_a_swap_could_not_name_is_answered_once_its_name_is_there(town: Town) -> None:
    is_away = False

    def read_names(_ids: Int64s) -> Mapping[int, str]:
        if is_away:
            raise StoreUnavailableError("away")
        return {}

    names = ItemNames(read_names)
    withheld = WithheldItems(names)
    weights, thread = ServedWeights(MODEL, withheld), ModelThread()

    class Restarting(FeatureStore):
        """Comes back in the middle of a look; a swap falls into the time before."""

        def unavailable_items(self) -> Int64s:
            nonlocal is_away
            is_away = True
            prepared = prepare_swap(MODEL, [load_snapshot(town.root, NAME, 1)])
            names.resolve(prepared.item_ids())
            weights.swap(weights.ready(prepared))
            assert not np.isfinite(weights.recommendable().offset_V.numpy()).any()
            is_away = False
            return super().unavailable_items()

    store = Restarting(town.store.config)
    watch = StoreWatch(store, names, withheld, weights, thread)
    try:
        await watch.look()
        assert watch.problem is None
        assert np.isfinite(weights.recommendable().offset_V.numpy()).all()
    finally:
        thread.close()
        store.close()
