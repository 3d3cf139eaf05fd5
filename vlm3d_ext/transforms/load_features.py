"""From a case of the manifest to the features that the encoder bundle's inference has extracted."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable, Transform

from ..checkpoint_files import file_sha256
from ..data.feature_store import FeatureStore, FeatureStoreError

__all__ = ["LoadFeaturesd"]


class LoadFeaturesd(Randomizable, Transform):
    """Reads a case's features in place of its volume.

    Input: a case of `LabelledCases.cases`. Output, a new dictionary: ``volume_id``, ``features`` (1 + R, C) float32,
    the global feature and then the regions, ``labels`` (L,) float32 with NaN for unknown, ``use_anatomical_mask`` ()
    bool.

    With features extracted both with and without anatomical masks, each draw takes one of the two, unless the case
    itself says which (`with_and_without_mask`): as if the encoder were run on the fly.

    Args:
        features_dir: folder of features; with masks, if there is a second.
        features_without_mask_dir: folder of features extracted with ``--use_anatomical_mask False``; None takes
            `features_dir` always.
        encoder_ckpt: the encoder that they must be of.
        fingerprint: of the manifest that they must be of.
        probability: of the features with masks, where both are there and the case has a mask.
        in_memory: keep what was read; one folder of 22,000 full-size volumes is 1.4 GB.

    Raises:
        FeatureStoreError: if a folder holds no features, those of another encoder or of other data, if of two folders
            the first was not extracted with masks or the second not without, or, when a case is loaded, none of it.
    """

    def __init__(
        self,
        features_dir: str | os.PathLike,
        encoder_ckpt: str | os.PathLike,
        fingerprint: str,
        features_without_mask_dir: str | os.PathLike | None = None,
        probability: float = 0.5,
        in_memory: bool = True,
    ) -> None:
        guided = FeatureStore(features_dir)
        unguided = guided if features_without_mask_dir is None else FeatureStore(features_without_mask_dir)
        self.stores = {True: guided, False: unguided}
        self.probability = probability
        self.in_memory = in_memory
        self._known: dict[tuple[Path, str], np.ndarray] = {}
        for store in {id(store): store for store in self.stores.values()}.values():
            _check_origin(store, encoder_ckpt, fingerprint)
        if unguided is not guided:
            _check_ways(guided, unguided)

    def __call__(self, case: Mapping[Hashable, Any]) -> dict[str, Any]:
        """Return the loaded case."""
        wanted = case.get("use_anatomical_mask", self.R.random_sample() < self.probability)
        use = bool(wanted) and bool(case["has_anatomical_mask"])
        return {
            "volume_id": case["volume_id"],
            "features": torch.from_numpy(self._read(use, case["volume_id"])),
            "labels": torch.tensor(case["labels"], dtype=torch.float32),
            "use_anatomical_mask": torch.tensor(use),
        }

    def _read(self, use_mask: bool, volume_id: str) -> np.ndarray:
        key = (self.stores[use_mask].folder, volume_id)
        if key in self._known:
            return self._known[key]
        arrays = self.stores[use_mask].read(volume_id)
        features = np.concatenate([arrays["global_features"][None], arrays["region_features"]])
        if self.in_memory:
            self._known[key] = features
        return features


def _check_ways(guided: FeatureStore, unguided: FeatureStore) -> None:
    for store, expected, option in ((guided, True, "features_dir"), (unguided, False, "features_without_mask_dir")):
        found = store.origin.get("use_anatomical_mask")
        if found is not expected:
            raise FeatureStoreError(
                f"{store.folder}: the features there were extracted with use_anatomical_mask {found}, expected "
                f"{expected}; point --{option} at others, or extract them again with --use_anatomical_mask {expected}."
            )


def _check_origin(store: FeatureStore, encoder_ckpt: str | os.PathLike, fingerprint: str) -> None:
    if not Path(encoder_ckpt).is_file():
        raise FileNotFoundError(
            f"checkpoint {encoder_ckpt} does not exist; train the encoder bundle, or point to another file with "
            "--encoder_ckpt PATH."
        )
    expected = {"encoder_sha256": file_sha256(encoder_ckpt), "fingerprint": fingerprint}
    what = {"encoder_sha256": f"another encoder than {encoder_ckpt}", "fingerprint": "other data than this manifest"}
    for key, value in expected.items():
        if store.origin.get(key) != value:
            raise FeatureStoreError(
                f"{store.folder}: the features there are of {what[key]} ({key} {str(store.origin.get(key))[:12]}, "
                f"expected {value[:12]}); extract them again with the encoder bundle's inference.json."
            )
