"""Extracting evidence: what the report generator reads of a scan, once for all epochs and phases."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint_files import UpstreamCheckpoint, file_sha256
from ..data.evidence_store import EvidenceStore
from ..data.rank_share import share_of_rank
from ..data.seeded_dataset import SeededDataset
from ..data.threaded_loader import ThreadedDataLoader
from ..networks.nets.evidence_in_words import EvidenceInWords
from ..networks.nets.scan_evidence import Evidence, ScanEvidence
from ..text.lesion_locations import LesionLocationInjector
from ..transforms import network_image, prepared_case_transforms
from .first_rank import wait_for_ranks

__all__ = ["EvidenceExtraction"]

logger = logging.getLogger(__name__)


class EvidenceExtraction:
    """Runs `ScanEvidence` over cases and stores what it says; what is stored already is not computed again.

    Under torchrun each rank takes its share of the cases.

    Args:
        network: the three networks, whose weights are loaded when `run` finds something to do.
        checkpoints: "encoder", "classification" and, with a localizer, "localization" -> path; others are left alone.
        checks: name of a checkpoint -> its key -> object whose `load_state_dict` refuses what does not belong here.
        output_dir: where the store is or will be.
        fingerprint: of the data, from the manifest.
        injector: which words the lesions.
        use_anatomical_mask: whether masks guide the features, the findings and the places where there are masks. False
            is a scan as it comes.
        device: where to compute.
        batch_size: scans at a time; more than one needs scans of one size.
        num_workers: threads that load.
        amp: bfloat16 autocast.

    Raises:
        FileNotFoundError: if a checkpoint does not exist.
        ResultStoreError: if `output_dir` holds evidence of other checkpoints or data.
    """

    def __init__(
        self,
        network: ScanEvidence,
        checkpoints: Mapping[str, str | os.PathLike | None],
        output_dir: str | os.PathLike,
        fingerprint: str,
        injector: LesionLocationInjector | None = None,
        checks: Mapping[str, Mapping[str, Any]] | None = None,
        use_anatomical_mask: bool = False,
        device: torch.device | str = "cpu",
        batch_size: int = 1,
        num_workers: int = 0,
        amp: bool = False,
    ) -> None:
        self.network = network
        self.words = EvidenceInWords(
            network.classifier.classifier, network.localizer, injector or LesionLocationInjector()
        )
        self.use_anatomical_mask = use_anatomical_mask
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.amp = amp
        modules = {"encoder": network.encoder, "classification": network.classifier, "localization": network.localizer}
        self.weights = [
            UpstreamCheckpoint(
                checkpoints[name] or "",
                {"model": module},
                parameter_name=f"{name}_ckpt",
                command=f"python -m monai.bundle run --config_file bundles/{name}/configs/train.json",
                checks=(checks or {}).get(name),
            )
            for name, module in modules.items()
            if module is not None
        ]
        self.check_files()
        origin = {
            **{f"{name}_sha256": file_sha256(checkpoints[name] or "") for name, module in modules.items() if module},
            "fingerprint": fingerprint,
            "use_anatomical_mask": use_anatomical_mask,
            "pooling": network.pooling,
        }
        self.store = EvidenceStore(output_dir, origin)

    def check_files(self) -> None:
        """Refuse a missing checkpoint at once.

        Raises:
            FileNotFoundError: if there is one.
        """
        for weights in self.weights:
            weights.check_file()

    def run(self, cases: Sequence[Mapping[str, Any]], shared_out: bool = False) -> None:
        """Extract what is missing of the cases.

        Args:
            cases: of all ranks.
            shared_out: they are this rank's share already.
        """
        # shared out before asking what is missing: the other ranks are at work already
        share = cases if shared_out else share_of_rank(cases)
        pending = self.store.pending(share)
        if pending:
            logger.info("Evidence: %d of %d cases to extract, to %s.", len(pending), len(share), self.store.folder)
            for weights in self.weights:
                weights.load(logger)
            self.network.to(self.device)
            loader = ThreadedDataLoader(
                SeededDataset(pending, prepared_case_transforms(self.use_anatomical_mask)),
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                device=self.device,
                # a run must not depend on whether the evidence was there already: nothing is drawn from its generator
                generator=torch.Generator(),
            )
            with tqdm(total=len(pending), unit="case", desc="evidence", mininterval=2.0) as bar:
                for batch in loader:
                    self._extract(batch)
                    bar.update(len(batch["volume_id"]))
            self.network.cpu()  # the language model needs the memory
        wait_for_ranks()

    def _extract(self, batch: Mapping[str, Any]) -> None:
        further = (batch[name].to(self.device) for name in ("anatomical_mask", "spacing_mm", "use_anatomical_mask"))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            evidence: Evidence = self.network(network_image(batch, self.device), *further)
        for row, volume_id in enumerate(batch["volume_id"]):
            features = {
                name: getattr(evidence, name)[row].float().cpu().numpy()
                for name in ("global_features", "region_features", "local_features")
            }
            findings = self.words.findings(evidence.probabilities[row], evidence.predictions[row])
            lesions = self.words.lesions(evidence, row, batch["spacing_mm"][row].tolist())
            self.store.write(volume_id, features, findings, lesions)
