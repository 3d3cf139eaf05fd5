"""What the classifier takes from the training data before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Trainer

from ..networks.layers import FeatureMoments
from ..networks.nets import ClassifierTraining

__all__ = ["ClassifierInitialization"]


class ClassifierInitialization:
    """Fits the whitening, scales the soft prompts, notes which findings are trained and with which text encoder.

    Goes to the trainer after the handler that loads the encoder. One pass over the training cases is made without
    gradients; every rank sees its share, and all get the same statistics.

    Args:
        training: the module that is trained.
        loader: batches of training cases.
        trained_findings: (L,), which findings have both positives and negatives in training.
        max_cases: cases that are enough for the statistics, on all ranks together; None takes all.
    """

    def __init__(
        self,
        training: ClassifierTraining,
        loader: Iterable[Any],
        trained_findings: Sequence[bool],
        max_cases: int | None = None,
    ) -> None:
        self.training = training
        self.loader = loader
        self.trained_findings = list(trained_findings)
        self.max_cases = max_cases

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> None:
        """Look at the training cases."""
        classifier = self.training.network.classifier
        classifier.set_text_encoder(self.training.text_encoder)
        classifier.scale_soft_prompts(self.training.text_encoder)
        classifier.trained_findings.copy_(torch.tensor(self.trained_findings))
        whitening = classifier.whitening
        moments = FeatureMoments(*whitening.mean.shape)
        self.training.eval()
        for batch in self.loader:
            inputs, _, arguments, keywords = trainer.prepare_batch(batch, trainer.state.device, non_blocking=True)
            keywords = {name: value for name, value in keywords.items() if name != "labels"}
            moments.add(self.training.features(inputs, *arguments, **keywords)[:, : classifier.num_tokens])
            if self.max_cases is not None and moments.count * idist.get_world_size() >= self.max_cases:
                break
        for total in (moments.count, moments.sum, moments.outer):
            total.copy_(torch.as_tensor(idist.all_reduce(total.to(idist.device()))))
        whitening.fit(moments)
        trainer.logger.info(f"Whitening of the features fitted on {int(moments.count)} training cases.")
