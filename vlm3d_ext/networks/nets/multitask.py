"""One encoder and three heads: what is found, where it lies, and what the report says.

Shape letters: B batch; d, h, w voxels; D, H, W tokens; N tokens, N' those pooled in-plane; V channels; F findings;
L diseases; T report tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...text.lesion_locations import LesionLocationInjector
from ...text.report_prompt import PromptTokenCounter, ReportPrompt
from .evidence_in_words import EvidenceInWords
from .image_prefix_language_model import GeneratedTexts
from .report_generator import ReportGenerator
from .scan_evidence import Evidence, ScanEvidence, pool_in_plane, predicted_regions
from .three_d_vision_encoder import TokenFeatures, VisionFeatures

__all__ = ["FindingsAndLesions", "VLM3DMultiTask"]

_SHARED = ("classification.encoder.", "localization.encoder.")


class VLM3DMultiTask(nn.Module):
    """`ThreeDVisionEncoder`, run once, with the classifier, the localizer and the report generator behind it.

    Its parts are named after the bundles that they come from: `encoder`, `classification`, `localization`,
    `report_generation`. The first three share one encoder, whose weights stand in the state dict once; those of the
    base language model stand nowhere in it.

    Findings that are drawn too, by the same name, are judged by both heads: after calibration on validation data
    (`vlm3d_ext.handlers.MultiTaskCalibrator`) such a finding's logit is a · z + w · e + b of the classifier's logit z
    and the lesion's evidence e, the largest logit of the disease anywhere in the scan. Before it, and for all other
    findings, the classifier's own stands.

    The report's prompt names what this very network finds and draws, as the prompts that the report generator was
    aligned with name what the three upstream networks did.

    Args:
        vision: networks of equal encoders; they are copied, and the copies share one encoder.
        report_generation: projector and language model.
        prompt: name or path of the report prompt's template.

    Attributes:
        is_fused: (F,) bool, whether a finding is judged by both heads.
        fusion: (F, 3), a, w and b of each.
        drawn_findings: index of a finding -> index of the disease of the same name.
    """

    is_fused: Tensor
    fusion: Tensor
    _evidence_columns: Tensor

    def __init__(
        self, vision: ScanEvidence, report_generation: ReportGenerator, prompt: str = "chest_ct_report"
    ) -> None:
        super().__init__()
        if vision.localizer is None:
            raise ValueError("the joint network draws lesions, but vision has no localizer; give it one.")
        vision = copy.deepcopy(vision).requires_grad_(True)
        self.encoder = vision.encoder
        self.classification = vision.classifier
        assert vision.localizer is not None
        self.localization = vision.localizer
        self.classification.encoder = self.localization.encoder = self.encoder
        self.report_generation = report_generation
        self.pooling = vision.pooling
        self.prompt = ReportPrompt(prompt)
        self.words = EvidenceInWords(
            self.classification.classifier, self.localization, LesionLocationInjector(self.localization.disease_set)
        )
        findings = self.classification.classifier.label_set.names
        diseases = self.localization.disease_set.names
        self.drawn_findings = {
            finding: diseases.index(name) for finding, name in enumerate(findings) if name in diseases
        }
        self.register_buffer("is_fused", torch.zeros(len(findings), dtype=torch.bool))
        self.register_buffer("fusion", torch.zeros(len(findings), 3))
        # which disease's evidence stands beside each finding; any where there is none
        columns = [self.drawn_findings.get(finding, 0) for finding in range(len(findings))]
        self.register_buffer("_evidence_columns", torch.tensor(columns), persistent=False)
        self.register_state_dict_post_hook(_name_the_encoder_once)
        self.register_load_state_dict_pre_hook(_name_the_encoder_everywhere)

    def forward(
        self,
        image: Tensor,
        anatomical_mask: Tensor | None = None,
        spacing_mm: Tensor | None = None,
        use_anatomical_mask: Tensor | None = None,
        valid_size: Tensor | None = None,
        has_anatomical_mask: Tensor | None = None,
        report: Sequence[str] | None = None,
        generate: bool = True,
    ) -> dict[str, dict[str, Any]]:
        """Do everything for scans.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1].
            anatomical_mask: (B, d, h, w) integers 0 to R, or None.
            spacing_mm: (B, 3) [z, y, x]; None assumes the encoder's `reference_spacing_mm`.
            use_anatomical_mask: (B,) bool; None uses every mask given.
            valid_size: (B, 3) voxels of each volume before it was padded to the batch's size, or None.
            has_anatomical_mask: (B,) bool; where given, scans are also classified with the masks that there are,
                whatever `use_anatomical_mask` says.
            report: B reports, of which ``loss`` and ``logits`` are wanted.
            generate: whether to write reports.

        Returns:
            - ``classification``: ``logits``, ``probabilities``, ``predictions``, each (B, F).
            - ``guided_classification``: the same with masks, where `has_anatomical_mask` is given.
            - ``localization``: disease key -> (B, d, h, w) probabilities.
            - ``generation``: ``prompt``, B texts, and ``num_lesions_left_out`` of them; with `generate`
              ``generated_text``, B texts, and ``generated``, the `GeneratedTexts`; with `report` ``loss``, the mean
              over cases of the mean cross-entropy of a token in nats, and ``logits`` (B, T, vocabulary).
            - ``vision_features``: ``global`` (B, V), ``local`` (B, N, V), ``region`` (B, R, V).
            - ``evidence``: ``findings`` and ``lesions`` of each scan as `EvidenceInWords` has them, and ``regions``
              (B, d, h, w), uint8.
        """
        tokens = self.encoder.encode_tokens(image, spacing_mm, valid_size)
        features = self.encoder.gather_regions(tokens, image, anatomical_mask, use_anatomical_mask)
        drawn = self.draw(tokens, image, valid_size)[0].float()
        classification = self.classify(features, drawn)
        probabilities = drawn.sigmoid()
        regions = predicted_regions(features.bin_region_logits, image, self.encoder.patch_size)
        if anatomical_mask is not None:
            used = anatomical_mask.to(torch.uint8)
            use = use_anatomical_mask
            regions = used if use is None else torch.where(use.view(-1, 1, 1, 1), used, regions)
        evidence = Evidence(
            features.global_features,
            features.region_features,
            features.local_features,
            classification["probabilities"],
            classification["predictions"].bool(),
            probabilities,
            regions,
        )
        spacing = self.encoder.reference_spacing_mm.expand(len(image), 3) if spacing_mm is None else spacing_mm
        named = self._in_words(evidence, spacing.tolist())
        guided = {}
        if has_anatomical_mask is not None:
            with_masks = self.encoder.gather_regions(tokens, image, anatomical_mask, has_anatomical_mask)
            guided = {"guided_classification": self.classify(with_masks, drawn)}
        return {
            "classification": classification,
            **guided,
            "localization": dict(zip(self.localization.disease_set.keys, probabilities.unbind(1), strict=True)),
            "generation": self._write(image, tokens, features, named, report, generate),
            "vision_features": {
                "global": features.global_features,
                "local": features.local_features,
                "region": features.region_features,
            },
            "evidence": {**named, "regions": regions},
        }

    def classify(self, features: VisionFeatures, drawn: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``logits``, ``probabilities`` and ``predictions``, each (B, F).

        Args:
            features: of the encoder.
            drawn: logits (B, L, d, h, w) of the localizer, for findings that are judged by both; None leaves all to the
                classifier.
        """
        classifier = self.classification.classifier
        output = classifier(classifier_features(features))
        if drawn is None:
            return output
        evidence = self.lesion_evidence(drawn)[:, self._evidence_columns]
        fused = self.fusion[:, 0] * output["logits"] + self.fusion[:, 1] * evidence + self.fusion[:, 2]
        probabilities = torch.where(self.is_fused, fused.sigmoid(), output["probabilities"])
        return {
            "logits": torch.where(self.is_fused, fused, output["logits"]),
            "probabilities": probabilities,
            "predictions": (probabilities >= classifier.scored_thresholds).long(),
        }

    @staticmethod
    def lesion_evidence(drawn: Tensor) -> Tensor:
        """Return the largest logit of each disease in each scan, (B, L), of logits (B, L, d, h, w)."""
        return drawn.float().flatten(2).max(-1).values

    def fuse(self, finding: int, classifier: float, lesion: float, offset: float) -> None:
        """Judge a finding by both heads from now on, with these weights."""
        self.fusion[finding] = torch.tensor([classifier, lesion, offset], device=self.fusion.device)
        self.is_fused[finding] = True

    def forget_fusion(self) -> None:
        """Leave all findings to the classifier again."""
        self.fusion.zero_()
        self.is_fused.zero_()

    def draw(
        self,
        tokens: TokenFeatures,
        image: Tensor,
        valid_size: Tensor | None = None,
        crop_start: Tensor | None = None,
        crop_size: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw whole scans or crops; arguments and result as `LesionLocalizationModule.logits_and_denoising`."""
        local = self.localization.local_features_of_tokens(tokens, image)
        return self.localization.draw_from_tokens(image, local, valid_size, crop_start, crop_size)

    def pooled_local_features(self, tokens: TokenFeatures, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the local features as the report generator reads them, (B, N', V), and their mask (B, N') or None.

        Tokens that only fill up a batch take no part in the means.
        """
        grid = [-(-n // p) for n, p in zip(image.shape[2:], self.encoder.patch_size, strict=True)]
        local = tokens.local_features.unflatten(1, grid)
        if tokens.token_mask is None:
            return pool_in_plane(local, self.pooling).flatten(1, 3), None
        real = tokens.token_mask.unflatten(1, grid)[..., None].to(local.dtype)
        share = pool_in_plane(real, self.pooling)
        pooled = pool_in_plane(local * real, self.pooling) / share.clamp_min(torch.finfo(local.dtype).tiny)
        return pooled.flatten(1, 3), (share > 0)[..., 0].flatten(1)

    def _in_words(self, evidence: Evidence, spacing_mm: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
        rows = range(len(spacing_mm))
        return {
            "findings": [self.words.findings(evidence.probabilities[row], evidence.predictions[row]) for row in rows],
            "lesions": [self.words.lesions(evidence, row, spacing_mm[row]) for row in rows],
        }

    def _write(
        self,
        image: Tensor,
        tokens: TokenFeatures,
        features: VisionFeatures,
        evidence: Mapping[str, Sequence[Any]],
        report: Sequence[str] | None,
        generate: bool,
    ) -> dict[str, Any]:
        model = self.report_generation.language_model
        counter = PromptTokenCounter(model.tokenizer)
        written = [
            self.prompt.of_evidence(findings, lesions, counter, model.max_prompt_tokens)
            for findings, lesions in zip(evidence["findings"], evidence["lesions"], strict=True)
        ]
        texts = [text for text, _ in written]
        result: dict[str, Any] = {"prompt": texts, "num_lesions_left_out": [left_out for _, left_out in written]}
        if not generate and report is None:
            return result
        local, mask = self.pooled_local_features(tokens, image)
        prompts = self.report_generation.prompts(local, features.global_features, features.region_features, texts, mask)
        if report is not None:
            token_ids, token_mask = model.encode_reports(report)
            result["logits"] = model.report_logits(prompts, token_ids, token_mask, share_prefix=False)
            chosen = result["logits"].log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
            result["loss"] = (-(chosen * token_mask).sum(-1) / token_mask.sum(-1)).mean()
        if generate:
            generated: GeneratedTexts = model.generate(prompts, **self.report_generation.generation)
            result |= {"generated_text": generated.texts, "generated": generated}
        return result


class FindingsAndLesions(VLM3DMultiTask):
    """`VLM3DMultiTask` for export: one image in; the same weights under the same names. The language model is exported
    by the tools that it comes from."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the findings' probabilities (B, F), found without a mask, and the lesions' (B, L, d, h, w).

        Args:
            image: (B, in_channels, d, h, w) in [0, 1], of the encoder's `reference_spacing_mm`.
        """
        tokens = self.encoder.encode_tokens(image)
        drawn = self.draw(tokens, image)[0].float()
        return self.classify(self.encoder.gather_regions(tokens, image), drawn)["probabilities"], drawn.sigmoid()


def classifier_features(features: VisionFeatures) -> Tensor:
    """Return what the classifier sees, (B, 1 + R, V): the global feature, then the regions."""
    return torch.cat([features.global_features[:, None], features.region_features], dim=1)


def _name_the_encoder_once(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state_dict if name.startswith(tuple(prefix + shared for shared in _SHARED))]:
        del state_dict[name]


def _name_the_encoder_everywhere(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = prefix + "encoder."
    for name in [name for name in state_dict if name.startswith(own)]:
        for shared in _SHARED:
            state_dict[prefix + shared + name.removeprefix(own)] = state_dict[name]
