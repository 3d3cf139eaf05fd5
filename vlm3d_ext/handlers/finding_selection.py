"""Choosing the findings that a trained classifier scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events

from ..networks.heads import MultiLabelClassifier
from ..text.label_set import Finding, LabelSet, load_label_set
from ..text.prompt_label_set import label_set_of_prompts

__all__ = ["FindingSelection"]


class FindingSelection:
    """Makes the classifier score the findings of another label set, and of prompts, when the engine starts.

    Goes after the handler that loads the classifier. The text encoder is loaded only for findings that are not of the
    classifier's own label set.

    Args:
        classifier: the trained classifier.
        label_set: whose findings to score, or its name or path.
        prompts: further findings, name -> a sentence that says it is present, or more (see
            `vlm3d_ext.text.prompt_label_set.label_set_of_prompts`).
        text_model: name or folder of the text encoder of the training.
        text_pooling: how the text encoder pools, as in training.

    Raises:
        ValueError: if a prompt is named like a finding of the label set or of the classifier, which would be scored in
            its place.
    """

    def __init__(
        self,
        classifier: MultiLabelClassifier,
        label_set: LabelSet | str,
        prompts: Mapping[str, Any] | None = None,
        text_model: str | None = None,
        text_pooling: str = "mean",
    ) -> None:
        self.classifier = classifier
        self.label_set = label_set if isinstance(label_set, LabelSet) else load_label_set(label_set)
        prompted = label_set_of_prompts(prompts).findings if prompts else ()
        for known in (self.label_set, classifier.label_set):
            taken = {*known.keys, *known.names}
            repeated = [finding.name for finding in prompted if finding.key in taken or finding.name in taken]
            if repeated:
                raise ValueError(
                    f"prompts: {', '.join(repeated)} is a finding of {known.name} already; give it another name."
                )
        self.findings: tuple[Finding, ...] = (*self.label_set.findings, *prompted)
        self.text_model = text_model
        self.text_pooling = text_pooling

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Choose, and say which findings are scored by their prompts alone."""
        classifier = self.classifier
        own = set(classifier.label_set.keys)
        text_encoder = None
        if self.text_model is not None and any(finding.key not in own for finding in self.findings):
            from ..networks.blocks.prompted_text_encoder import PromptedTextEncoder  # transformers, for prompts only

            text_encoder = PromptedTextEncoder(self.text_model, self.text_pooling)
            text_encoder.to(classifier.text_embeddings.device)
        classifier.score_findings(self.findings, text_encoder)
        pairs = zip(classifier.scored_findings, classifier.scored_is_trained, strict=True)
        untrained = [finding.name for finding, is_trained in pairs if not is_trained]
        if untrained:
            engine.logger.info(f"Scored by what they are called alone, never trained: {', '.join(untrained)}.")
