"""Inference's product of the localizer: lesions on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
from ignite.engine import Engine, Events

from ..data.localization_store import LocalizationStore
from ..data.prepared_case import prepared_image_path, read_prepared_case
from ..engines.localization_case import ScanGrids, read_grids
from ..engines.localization_montage import DISEASE_COLOURS, MontageRow, draw_montage
from ..text.disease_set import DiseaseSet
from .localization_evaluation import HasThresholds
from .task_predictions import lesion_probabilities

__all__ = ["LesionMaskWriter"]


class LesionMaskWriter:
    """Brings each batch's probabilities onto the scans' own grids and writes masks and lesions as soon as they are
    there.

    Args:
        store: where to.
        disease_set: the order of the mask channels.
        network: whose ``thresholds`` are read when a batch arrives, and so after its checkpoint was loaded.
        montages: whether to draw a picture of each scan, on the prepared case beside its geometry.
    """

    def __init__(
        self, store: LocalizationStore, disease_set: DiseaseSet, network: HasThresholds, montages: bool = False
    ) -> None:
        self.store = store
        self.disease_set = disease_set
        self.network = network
        self.montages = montages

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose network returns ``probabilities`` (B, diseases, D, H, W) on the prepared grid,
        or what `VLM3DMultiTask` does, without decollation; its batches hold "volume_id" and "geometry", the paths of
        the sidecars."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the lesions of the batch.

        Raises:
            PreparedCaseError: for a case that is one of several windows of its scan.
        """
        state: Any = engine.state
        probabilities = lesion_probabilities(state.output["pred"], self.disease_set.keys).float().cpu().numpy()
        thresholds = dict(zip(self.disease_set.keys, self.network.thresholds.tolist(), strict=True))
        for row, (volume_id, geometry) in enumerate(
            zip(state.batch["volume_id"], state.batch["geometry"], strict=True)
        ):
            grids = read_grids(geometry)
            restored = {
                disease: grids.restore(values, thresholds[disease], presence)
                for disease, values, presence in zip(
                    self.disease_set.keys, probabilities[row], self.network.presence_thresholds.tolist(), strict=True
                )
            }
            montage = self._montage(volume_id, geometry, grids, restored, thresholds) if self.montages else None
            self.store.write(volume_id, restored, thresholds, grids.source, montage)

    def _montage(
        self,
        volume_id: str,
        geometry: str,
        grids: ScanGrids,
        probabilities: dict[str, np.ndarray],
        thresholds: dict[str, float],
    ) -> bytes:
        rows = []
        for channel, disease in enumerate(self.disease_set.diseases):
            values = probabilities[disease.key]
            colour = DISEASE_COLOURS[channel % len(DISEASE_COLOURS)]
            caption = f"probability up to {values.max():.2f}"
            rows.append(MontageRow(disease.key, disease.name, colour, caption, values >= thresholds[disease.key]))
        image = read_prepared_case(prepared_image_path(geometry)).imgs
        return draw_montage(volume_id, image, grids.prepared, rows, grids.source)
