"""Tables of all lesions of a run."""

from __future__ import annotations

import csv
import io
import logging

from ..data.atomic_files import write_bytes
from ..data.challenge_localization import write_challenge_localization
from ..data.localization_store import LocalizationStore
from ..data.result_store import ResultStoreError
from ..text.disease_set import DiseaseSet

__all__ = ["write_localization_tables"]

logger = logging.getLogger(__name__)

_COLUMNS = (
    "volume_id",
    "disease",
    "lesion",
    "probability",
    "num_voxels",
    "volume_ml",
    *(f"centroid_{axis}_mm" for axis in "xyz"),
    *(f"{axis}min_mm" for axis in "xyz"),
    *(f"d{axis}_mm" for axis in "xyz"),
)


def write_localization_tables(store: LocalizationStore, disease_set: DiseaseSet) -> None:
    """Write ``tables/lesions.csv`` and ``tables/challenge_localization.json`` of a store.

    The CSV has one row for each predicted lesion, numbered within its scan and disease from the most probable on;
    positions are LPS mm. The challenge's file has every scan, also those without lesions, and counts positions from the
    scan's corner.

    Args:
        store: with the lesions of all volumes.
        disease_set: the diseases that each volume has.

    Raises:
        ResultStoreError: if a volume's file is not readable, or has other diseases; nothing is written.
    """
    volume_ids = store.volume_ids()
    if not volume_ids:
        return
    found = {volume_id: store.read(volume_id) for volume_id in volume_ids}
    for volume_id, diseases in found.items():
        if set(diseases) != set(disease_set.keys):
            raise ResultStoreError(
                f"{store.path(volume_id)}: its diseases are {sorted(diseases)}, expected {sorted(disease_set.keys)}; "
                "delete it and run again."
            )
    corners = {volume_id: store.read_volume_box(volume_id)[:3] for volume_id in volume_ids}
    lesions = {
        volume_id: {key: diseases[key]["lesions"] for key in disease_set.keys} for volume_id, diseases in found.items()
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    num_lesions = 0
    for volume_id, of_volume in lesions.items():
        for key, boxes in of_volume.items():
            for number, box in enumerate(boxes, start=1):
                size = (box["probability"], box["num_voxels"], box["volume_ml"])
                writer.writerow([volume_id, key, number, *size, *box["centroid_mm"], *box["bbox_mm"]])
                num_lesions += 1
    tables = store.folder / "tables"
    write_challenge_localization(tables / "challenge_localization.json", lesions, corners, disease_set)
    write_bytes(tables / "lesions.csv", buffer.getvalue().encode())
    logger.info("%d lesions of %d volumes: masks in %s, tables in %s.", num_lesions, len(found), store.folder, tables)
