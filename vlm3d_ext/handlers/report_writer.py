"""Inference's product of the report generator: reports on disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events

from ..checkpoint_files import file_sha256
from ..data.report_store import ReportStore
from ..engines.report_tables import report_entry
from ..text.finding_extractor import FindingExtractor
from .task_predictions import written_reports

__all__ = ["ReportWriter"]


class ReportWriter:
    """Writes each batch's reports as soon as they are there, so that a run can be stopped at any moment.

    Args:
        stores: whether a case was shown another volume's evidence (``True``, the control) or its own (``False``) ->
            where its report goes; one store alone takes those of their own evidence.
        label_set: name, path or set of the findings that are read out of the texts.
        ckpt_path: the checkpoint that writes.
        metadata: what else is to be kept with each report.
    """

    def __init__(
        self,
        stores: Mapping[bool, ReportStore] | ReportStore,
        label_set: str,
        ckpt_path: str | os.PathLike,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.stores = {False: stores} if isinstance(stores, ReportStore) else dict(stores)
        self.extractor = FindingExtractor(label_set)
        self.ckpt_path = ckpt_path
        self.metadata = dict(metadata or {})

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose network returns `GeneratedTexts`, one for each case, or what `VLM3DMultiTask`
        does, without decollation."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the reports of the batch."""
        state: Any = engine.state
        written = written_reports(state.output["pred"], state.batch)
        generated = written.generated
        for row, (volume_id, evidence_of) in enumerate(zip(state.batch["volume_id"], written.evidence_of, strict=True)):
            metadata = {
                **self.metadata,
                "finished": bool(generated.finished[row]),
                "num_tokens": int(generated.mask[row].sum()),
                "prompt": written.prompts[row],
                "num_lesions_left_out": written.num_lesions_left_out[row],
                "evidence_of": evidence_of,
            }
            entry = report_entry(volume_id, generated.texts[row], self.extractor, file_sha256(self.ckpt_path), metadata)
            if evidence_of != volume_id:
                entry["report_id"] += f"-of-{evidence_of}"
            self.stores[evidence_of != volume_id].write(volume_id, entry)
