"""Joint training: one pass of the encoder, and the losses of all tasks that a case has an answer for.

Shape letters: B batch; K crops of a scan; F findings; L diseases; R regions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...losses.pretraining_losses import region_share_loss
from ..blocks.prompted_text_encoder import PromptedTextEncoder
from .classifier_training import ClassifierTraining
from .localization_training import LocalizationTraining
from .multitask import VLM3DMultiTask, classifier_features
from .report_generator import ReportTraining
from .three_d_vision_encoder import TokenFeatures, VisionFeatures

__all__ = ["WEIGHTINGS", "MultiTaskTraining"]

WEIGHTINGS = ("fixed", "uncertainty")
_TASKS = ("classification", "masks", "report")


class MultiTaskTraining(nn.Module):
    """Trains `VLM3DMultiTask` on whatever each case has: labels, lesion masks, a report, an anatomical mask.

    Each loss is a mean over *all* cases of the batch, in which a case without an answer counts as zero. So a batch's
    gradient is the mean of its cases' own, each case contributes exactly the losses it has, and equal shares of a batch
    on several ranks average to what one rank computes. A task without any answer in the batch still has a gradient, of
    zeros: distributed training waits for that of every weight.

    The anatomical structure is a fourth, small task (`region_share`): without it, the moving trunk would drift away
    from the layer that says where the regions are when there is no mask.

    Args:
        network: what the checkpoint will hold.
        text_encoder: frozen; its weights are in no state dict.
        classification_loss: of logits (B, F) and labels (B, F).
        mask_loss: of logits (B, L, ...) and targets of 1, 0 and 255 (unknown).
        train_encoder: whether the encoder learns, but for its mask token, which only pre-training uses.
        train_adapters: whether the language model's adapters learn.
        weighting: "fixed", or "uncertainty" for weights that are learnt: each task's loss L becomes
            exp(-s) · L + s with its own s, which begins at 0, that is, with the fixed weights
            (`vlm3d_ext.losses.WeightedLossSum` applies it). In a batch s counts by the share of cases that have the
            task.

    Source: learnt weights, Kendall, Gal and Cipolla, "Multi-task learning using uncertainty", CVPR 2018, equation 7, of
    which this is twice, with s the logarithm of the variance.

    Raises:
        ValueError: for another weighting.
    """

    def __init__(
        self,
        network: VLM3DMultiTask,
        text_encoder: PromptedTextEncoder,
        classification_loss: Callable[[Tensor, Tensor], Tensor],
        mask_loss: nn.Module,
        train_encoder: bool = True,
        train_adapters: bool = True,
        weighting: str = "fixed",
    ) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}.")
        self.network = network
        self.train_encoder = train_encoder
        self.classifier_training = ClassifierTraining(
            network.classification, text_encoder, classification_loss, train_encoder
        )
        self.localization_training = LocalizationTraining(network.localization, mask_loss, train_encoder)
        self.report_training = ReportTraining(network.report_generation, train_adapters)
        network.encoder.requires_grad_(train_encoder)
        network.encoder.mask_token.requires_grad_(False)
        denoising = network.localization.denoising_transformer
        denoising.reconstruction.requires_grad_(denoising.max_noise > 0)
        self.log_variances = nn.ParameterDict(
            {task: nn.Parameter(torch.zeros(())) for task in _TASKS} if weighting == "uncertainty" else {}
        )

    def train(self, mode: bool = True) -> MultiTaskTraining:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if not self.train_encoder:
            self.network.encoder.eval()
        return self

    def forward(
        self,
        image: Tensor,
        labels: Tensor,
        target: Tensor,
        anatomical_mask: Tensor,
        has_anatomical_mask: Tensor,
        use_anatomical_mask: Tensor,
        spacing_mm: Tensor,
        prompt: Sequence[str],
        report: Sequence[str],
        valid_size: Tensor | None = None,
        crop_start: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the losses and what metrics need.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1].
            labels: (B, F) of 1, 0 or NaN.
            target: (B, K, L, ...) of crops, or (B, L, d, h, w) without crops; uint8, 255 is unknown.
            anatomical_mask: (B, d, h, w) integers 0 to R; all zero where there is none.
            has_anatomical_mask: (B,) bool.
            use_anatomical_mask: (B,) bool, whether the mask guides the region features, in training.
            spacing_mm: (B, 3) [z, y, x].
            prompt: B prompts.
            report: B reports, "" where there is none.
            valid_size: (B, 3), or None.
            crop_start: (B, K, 3) first voxel of each crop; None draws whole scans.

        Returns:
            - ``losses``: ``classification``, ``masks``, ``denoising``, ``report``, ``region_share``, scalars.
            - ``classification``: ``logits`` and ``labels``, each (B, F); in evaluation mode (B, 2, F + L), without and
              with the anatomical mask, the second unknown where there is none; the last L columns are the diseases'
              evidence (`VLM3DMultiTask.lesion_evidence`), whose labels are unknown.
            - ``localization``: ``probabilities`` and ``target``.
            - with learnt weights ``log_variances`` and ``available``: of each task its s, and the share of cases that
              have it.
        """
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            tokens = self.network.encoder.encode_tokens(image, spacing_mm, valid_size)
            features = self.network.encoder.gather_regions(tokens, image, anatomical_mask, use_anatomical_mask)
        if self.training:
            classified = self.classifier_training.classify(classifier_features(features), labels)
        else:
            features, classified = self._classify_both_ways(tokens, image, labels, anatomical_mask, has_anatomical_mask)
        drawn = self.localization_training.compare(
            *self.network.draw(tokens, image, valid_size, crop_start, self._crop_size(target, crop_start)),
            target,
            crop_start,
        )
        assert features.mask_histograms is not None
        losses = {
            **classified["losses"],
            **drawn["losses"],
            "report": self._report_loss(tokens, features, image, prompt, report),
            "region_share": region_share_loss(
                features.bin_region_logits, features.mask_histograms, has_anatomical_mask, features.token_mask
            ),
        }
        output = {
            "losses": losses,
            "classification": self._with_evidence(classified, drawn["logits"]),
            "localization": {name: drawn[name] for name in ("probabilities", "target")},
        }
        if self.log_variances:
            output |= {
                "log_variances": dict(self.log_variances),
                "available": self._available(labels, target, report),
            }
        return output

    def _with_evidence(self, classified: dict[str, Any], drawn: Tensor) -> dict[str, Tensor]:
        """Return logits and labels, in evaluation mode with the lesions' evidence, which is the same both ways."""
        logits, labels = classified["logits"], classified["labels"]
        if self.training:
            return {"logits": logits, "labels": labels}
        evidence = self.network.lesion_evidence(drawn)[:, None].expand(-1, logits.shape[1], -1)
        unknown = torch.full_like(evidence, torch.nan)
        return {"logits": torch.cat([logits, evidence], -1), "labels": torch.cat([labels, unknown], -1)}

    @staticmethod
    def _crop_size(target: Tensor, crop_start: Tensor | None) -> Sequence[int] | None:
        return target.shape[3:] if crop_start is not None else None

    def _classify_both_ways(
        self,
        tokens: TokenFeatures,
        image: Tensor,
        labels: Tensor,
        anatomical_mask: Tensor,
        has_anatomical_mask: Tensor,
    ) -> tuple[VisionFeatures, dict[str, Any]]:
        """Return the features without the mask, and what the classifier makes of both ways."""
        ways = []
        for guided in (False, True):
            use = torch.full_like(has_anatomical_mask, guided)
            ways.append(self.network.encoder.gather_regions(tokens, image, anatomical_mask, use))
        unknown = torch.full_like(labels, torch.nan)
        both_labels = [labels, torch.where(has_anatomical_mask[:, None], labels, unknown)]
        classified = [
            self.classifier_training.classify(classifier_features(way), way_labels)
            for way, way_labels in zip(ways, both_labels, strict=True)
        ]
        return ways[0], {
            "logits": torch.stack([one["logits"] for one in classified], dim=1),
            "labels": torch.stack(both_labels, dim=1),
            "losses": {
                name: torch.stack([one["losses"][name] for one in classified]).mean()
                for name in classified[0]["losses"]
            },
        }

    def _report_loss(
        self,
        tokens: TokenFeatures,
        features: VisionFeatures,
        image: Tensor,
        prompt: Sequence[str],
        report: Sequence[str],
    ) -> Tensor:
        """Return the mean over all cases of the loss of those with a report."""
        rows = [row for row, text in enumerate(report) if text]
        share = len(rows) / len(report)
        # the first case stands in where none has a report, with the weight 0: every rank runs the language model
        rows = rows or [0]
        local, mask = self.network.pooled_local_features(tokens, image)
        result = self.report_training(
            local[rows],
            features.global_features[rows],
            features.region_features[rows],
            [prompt[row] for row in rows],
            [report[row] for row in rows],
            mask[rows] if mask is not None else None,
        )
        return share * result["losses"]["report"]

    @staticmethod
    def _available(labels: Tensor, target: Tensor, report: Sequence[str]) -> dict[str, float]:
        known_masks = (target != 255).flatten(1).any(1)
        return {
            "classification": float((~labels.isnan()).any(1).float().mean()),
            "masks": float(known_masks.float().mean()),
            "report": sum(bool(text) for text in report) / len(report),
        }
