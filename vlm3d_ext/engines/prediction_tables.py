"""Tables of all predictions of a run."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.atomic_files import write_bytes
from ..data.challenge_classification import write_challenge_predictions
from ..data.prediction_store import PredictionStore
from ..data.result_store import ResultStoreError
from ..metrics import rescale_to_half
from ..text.label_set import load_label_set

__all__ = ["write_prediction_tables"]

logger = logging.getLogger(__name__)

_CHALLENGE_LABEL_SET = "ct_rate_18"


def write_prediction_tables(store: PredictionStore) -> None:
    """Write ``tables/probabilities.csv``, ``predictions.csv`` and ``challenge_classification.json`` of a store.

    The CSVs have CT-RATE's form, ``VolumeName`` and a column for each finding. The challenge decides at 0.5, so in its
    file each probability is rescaled for its threshold to lie at 0.5. It asks for the 18 findings of CT-RATE; where
    one was not scored, that file is not written, and it is said.

    Args:
        store: with the predictions of all volumes.

    Raises:
        ResultStoreError: if a volume's file is not readable, or has other findings than the first; nothing is written.
    """
    volume_ids = store.volume_ids()
    if not volume_ids:
        return
    rows = [store.read(volume_id) for volume_id in volume_ids]
    names = list(rows[0])
    for volume_id, row in zip(volume_ids, rows, strict=True):
        if list(row) != names:
            raise ResultStoreError(
                f"{store.path(volume_id)}: its findings are not those of {volume_ids[0]}; delete it and run again."
            )
    tables = store.folder / "tables"
    for table, column in (("probabilities", "probability"), ("predictions", "prediction")):
        values = [[row[name][column] for name in names] for row in rows]
        write_bytes(tables / f"{table}.csv", _as_csv(names, volume_ids, values))
    wanted = load_label_set(_CHALLENGE_LABEL_SET).names
    lacking = [name for name in wanted if name not in names]
    if lacking:
        logger.info("No challenge file: %s of %s not scored.", ", ".join(lacking), _CHALLENGE_LABEL_SET)
    else:
        probabilities = np.array([[row[name]["probability"] for name in wanted] for row in rows])
        thresholds = np.array([rows[0][name]["threshold"] for name in wanted])
        path = tables / "challenge_classification.json"
        write_challenge_predictions(path, volume_ids, wanted, rescale_to_half(probabilities, thresholds))
    logger.info("%d volumes have their findings in %s, tables in %s.", len(rows), store.folder, tables)


def _as_csv(names: Sequence[str], volume_ids: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["VolumeName", *names])
    writer.writerows([volume_id, *row] for volume_id, row in zip(volume_ids, rows, strict=True))
    return buffer.getvalue().encode()
