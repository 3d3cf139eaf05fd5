"""Inference's product of the encoder: features on disk."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events

from ..data.feature_store import FeatureStore

__all__ = ["FeatureWriter"]


class FeatureWriter:
    """Writes each batch's global and region features as soon as they are there.

    Args:
        store: where to.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose network returns `VisionFeatures`, without decollation."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._report)

    def __call__(self, engine: Engine) -> None:
        """Write the features of the batch."""
        state: Any = engine.state
        features, batch = state.output["pred"], state.batch
        for row, volume_id in enumerate(batch["volume_id"]):
            self.store.write(
                volume_id,
                features.global_features[row].float().cpu().numpy(),
                features.region_features[row].float().cpu().numpy(),
                batch["labels"][row].numpy(),
            )

    def _report(self, engine: Engine) -> None:
        num_files = sum(1 for _ in self.store.folder.glob("*.npz"))
        engine.logger.info(f"{num_files} volumes have their features in {self.store.folder}.")
