"""Findings scored by how near a scan's features are to what the findings are called.

Shape letters: B batch; L findings; T = 1 + R tokens, the global feature and the regions; C vision channels; H text
channels; E channels of the common space; S soft tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize

from ...data.anatomical_regions import NUM_REGIONS, region_by_name
from ...text.label_set import Finding, LabelSet, load_label_set
from ..layers import FeatureWhitening, FindingAttention

if TYPE_CHECKING:
    from ..blocks.prompted_text_encoder import FindingEmbeddings, PromptedTextEncoder

__all__ = ["MultiLabelClassifier"]

_SHA256_BYTES = 32


class MultiLabelClassifier(nn.Module):
    """Multi-label classification by the cosine similarity of vision features and text embeddings.

    logit = scale · cos(what the finding sees of the scan, what the finding is called) + bias, with a learnable scale
    (the inverse temperature) and bias. What it sees is a projection of the global feature, and, with
    `use_region_features`, of the regions it attends to (`FindingAttention`). What it is called comes from the finding's
    prompts through a frozen text encoder: the positive prompts' embedding less the negative prompts', projected; both
    with the finding's learnable soft prompt among the words. The difference takes away what all sentences have in
    common, which in pretrained text encoders is nearly everything.

    The text encoder is no part of this module. While training, `embed_findings` is given what it made of the prompts;
    `cache_text_embeddings` keeps the result in the buffer `text_embeddings` (L, E), so that a trained classifier needs
    no text encoder. `score_findings` lets it score other findings than those it was trained on, by their prompts.

    Probabilities are calibrated, sigmoid(logit / temperature + offset), predictions are 1 where a probability reaches
    its finding's threshold; temperature, offsets and thresholds are buffers that are fitted on validation data, before
    that 1, 0 and 0.5.

    Source: CLIP (Radford et al. 2021) with the sigmoid form of SigLIP (Zhai et al. 2023); soft prompts in the input
    embeddings, CoOp (Zhou et al. 2022).

    Args:
        label_set: name or path of the findings, several joined by "+".
        hidden_size: C of the encoder.
        text_hidden_size: H of the text encoder.
        projection_dim: E.
        num_soft_tokens: S, learnable tokens per finding.
        use_region_features: whether findings attend to regions, beside the global feature.
        use_negative_prompts: whether text embeddings are differences.
        num_attention_heads: heads of the attention to regions.
        attention_head_dim: channels of a head.
        dropout: of whitened features while training.
        whitening_shrinkage: see `FeatureWhitening`.
        initial_logit_scale: of the cosine.
        num_regions: R.
    """

    text_embeddings: Tensor
    text_centre: Tensor
    text_encoder_sha256: Tensor
    attends: Tensor
    trained_findings: Tensor
    temperature: Tensor
    offsets: Tensor
    thresholds: Tensor
    _scored_text: Tensor
    _scored_attends: Tensor
    _scored_offsets: Tensor
    _scored_thresholds: Tensor

    def __init__(
        self,
        label_set: str = "ct_rate_18",
        hidden_size: int = 768,
        text_hidden_size: int = 768,
        projection_dim: int = 512,
        num_soft_tokens: int = 8,
        use_region_features: bool = True,
        use_negative_prompts: bool = True,
        num_attention_heads: int = 4,
        attention_head_dim: int = 24,
        dropout: float = 0.1,
        whitening_shrinkage: float = 0.1,
        initial_logit_scale: float = 10.0,
        num_regions: int = NUM_REGIONS,
    ) -> None:
        super().__init__()
        self.label_set: LabelSet = load_label_set(label_set)
        self.use_region_features = use_region_features
        self.use_negative_prompts = use_negative_prompts
        self.dropout = dropout
        self.num_tokens = 1 + num_regions if use_region_features else 1
        num_findings = self.label_set.num_findings

        self.whitening = FeatureWhitening(self.num_tokens, hidden_size, whitening_shrinkage)
        self.vision_projector = nn.Linear(hidden_size, projection_dim)
        self.text_projector = nn.Linear(text_hidden_size, projection_dim)
        self.soft_prompts = nn.Parameter(torch.randn(num_findings, num_soft_tokens, text_hidden_size) * 0.02)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(initial_logit_scale)))
        self.logit_bias = nn.Parameter(torch.zeros(()))
        if use_region_features:
            self.region_attention = FindingAttention(
                hidden_size, projection_dim, self.num_tokens, num_attention_heads, attention_head_dim
            )

        self.register_buffer("text_embeddings", torch.zeros(num_findings, projection_dim))
        self.register_buffer("text_centre", torch.zeros(text_hidden_size))
        self.register_buffer("text_encoder_sha256", torch.zeros(_SHA256_BYTES, dtype=torch.uint8))
        self.register_buffer("trained_findings", torch.zeros(num_findings, dtype=torch.bool))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("offsets", torch.zeros(num_findings))
        self.register_buffer("thresholds", torch.full((num_findings,), 0.5))
        self.register_buffer("attends", self._attended_tokens(self.label_set.findings), persistent=False)
        self._others: tuple[Finding, ...] | None = None

    @property
    def scored_findings(self) -> tuple[Finding, ...]:
        """The columns that `forward` returns: the label set's findings, unless `score_findings` chose others."""
        return self.label_set.findings if self._others is None else self._others

    @property
    def scored_is_trained(self) -> tuple[bool, ...]:
        """For each column, whether the finding was trained; the others are scored by their prompts alone."""
        rows = self._rows_of_own(self.scored_findings)
        return tuple(row is not None and bool(self.trained_findings[row]) for row in rows)

    @property
    def scored_thresholds(self) -> Tensor:
        """For each column, the probability from which it counts as present, (L,)."""
        return self.thresholds if self._others is None else self._scored_thresholds

    def forward(self, features: Tensor, text_embeddings: Tensor | None = None) -> dict[str, Tensor]:
        """Score scans.

        Args:
            features: (B, 1 + R, C), the global feature and then the regions; without region features (B, 1, C) is
                enough, and more is left out.
            text_embeddings: (L, E) of `embed_findings`, while training; None takes the cached ones.

        Returns:
            ``"logits"``, ``"probabilities"`` in [0, 1] and ``"predictions"`` of 0 and 1 (int64), each (B, L), in the
            order of `scored_findings`.

        Raises:
            ValueError: if the features are fewer or of another width.
        """
        attends, offsets, thresholds = self.attends, self.offsets, self.thresholds
        if text_embeddings is None and self._others is None:
            text_embeddings = self.text_embeddings
        elif text_embeddings is None:
            text_embeddings, attends = self._scored_text, self._scored_attends
            offsets, thresholds = self._scored_offsets, self._scored_thresholds
        logits = self._similarity(features, text_embeddings, attends)
        probabilities = torch.sigmoid(logits / self.temperature + offsets)
        predictions = (probabilities >= thresholds).long()
        return {"logits": logits, "probabilities": probabilities, "predictions": predictions}

    def _similarity(self, features: Tensor, text_embeddings: Tensor, attends: Tensor) -> Tensor:
        channels = self.vision_projector.in_features
        # fewer than the statistics' would be repeated without a word
        fits = torch.jit.is_tracing() or (features.shape[1] >= self.num_tokens and features.shape[2] == channels)
        if not fits:
            raise ValueError(f"features must be (B, {self.num_tokens}, {channels}), got {tuple(features.shape)}.")
        features = self.whitening(features[:, : self.num_tokens].float())
        features = dropout(features, self.dropout, self.training)
        seen = self.vision_projector(features[:, :1])  # (B, 1, E): alike for all findings
        if self.use_region_features:
            seen = seen + self.region_attention(features, text_embeddings, attends)
        # under autocast these are bfloat16, whose steps would be larger than differences between cases
        cosine = (normalize(seen.float(), dim=-1) * text_embeddings.float()).sum(-1)
        return self.log_logit_scale.exp() * cosine + self.logit_bias

    def embed_findings(self, embeddings: FindingEmbeddings, text_centre: Tensor | None = None) -> Tensor:
        """Project what a text encoder made of findings' prompts into the common space, (L, E) of unit length.

        Args:
            embeddings: of `PromptedTextEncoder.embed_findings`.
            text_centre: (H,), stands in for a finding's missing negative prompts; None takes their mean over these
                findings, or that of the positive ones where no finding has any.
        """
        if text_centre is None:
            text_centre = self._centre_of(embeddings)
        negative = torch.where(embeddings.has_negative[:, None], embeddings.negative, text_centre)
        return normalize(self.text_projector((embeddings.positive - negative).float()), dim=-1)

    def _centre_of(self, embeddings: FindingEmbeddings) -> Tensor:
        if embeddings.has_negative.any():
            return embeddings.negative[embeddings.has_negative].mean(0).float()
        return embeddings.positive.mean(0).float()

    def embed_own_findings(self, text_encoder: PromptedTextEncoder) -> tuple[Tensor, Tensor]:
        """Return the text embeddings (L, E) of the label set's findings, with gradients, and the centre (H,).

        Raises:
            ValueError: if the text encoder has another width than the classifier was built for.
        """
        self._check_width(text_encoder)
        embeddings = text_encoder.embed_findings(
            self.label_set.findings, self.soft_prompts, use_negative=self.use_negative_prompts
        )
        return self.embed_findings(embeddings), self._centre_of(embeddings)

    @torch.no_grad()
    def cache_text_embeddings(self, text_encoder: PromptedTextEncoder) -> None:
        """Compute the text embeddings as they are now into the buffers that evaluation, checkpoints and exports use."""
        text_embeddings, centre = self.embed_own_findings(text_encoder)
        self.text_embeddings.copy_(text_embeddings)
        self.text_centre.copy_(centre)

    @torch.no_grad()
    def scale_soft_prompts(self, text_encoder: PromptedTextEncoder) -> None:
        """Bring the random soft prompts to the size of the text encoder's words, before they are trained.

        Much smaller, they would be lost among the words they stand between, and learn slowly.
        """
        self.soft_prompts.mul_(text_encoder.word_embedding_deviation / self.soft_prompts.std())

    def set_text_encoder(self, text_encoder: PromptedTextEncoder) -> None:
        """Note which text encoder this classifier is trained with, by the SHA-256 of its weights and pooling."""
        self._check_width(text_encoder)
        self.text_encoder_sha256.copy_(torch.tensor(list(bytes.fromhex(text_encoder.embeddings_sha256))))

    @torch.no_grad()
    def score_findings(
        self, findings: Sequence[Finding] | None, text_encoder: PromptedTextEncoder | None = None
    ) -> None:
        """Choose what the columns of `forward` are; None goes back to the label set's own findings.

        A finding of the label set keeps its text embedding, regions, offset and threshold. Any other is scored by its
        prompts alone, with the mean of the trained soft prompts and of the offsets, and the threshold 0.5.

        Args:
            findings: of another label set, or of `vlm3d_ext.text.prompt_label_set.label_set_of_prompts`.
            text_encoder: the one that the classifier was trained with; needed for findings of no label set it knows.

        Raises:
            ValueError: if the text encoder is needed and absent, or another than in training.
        """
        if findings is None:
            self._others = None
            return
        rows = self._rows_of_own(findings)
        is_new = torch.tensor([row is None for row in rows], device=self.text_embeddings.device)
        taken = [row or 0 for row in rows]
        text, offsets, thresholds = self.text_embeddings[taken], self.offsets[taken], self.thresholds[taken]
        attends = self.attends[taken]
        if is_new.any():
            new = [finding for finding, row in zip(findings, rows, strict=True) if row is None]
            text[is_new] = self._embed_new(new, text_encoder)
            offsets[is_new] = self.offsets.mean()
            thresholds[is_new] = 0.5
            attends[is_new] = self._attended_tokens(new).to(attends.device)
        self._others = tuple(findings)
        self.register_buffer("_scored_text", text, persistent=False)
        self.register_buffer("_scored_attends", attends, persistent=False)
        self.register_buffer("_scored_offsets", offsets, persistent=False)
        self.register_buffer("_scored_thresholds", thresholds, persistent=False)

    def _rows_of_own(self, findings: Sequence[Finding]) -> list[int | None]:
        row_of_key = {key: row for row, key in enumerate(self.label_set.keys)}
        return [row_of_key.get(finding.key) for finding in findings]

    def _embed_new(self, findings: Sequence[Finding], text_encoder: PromptedTextEncoder | None) -> Tensor:
        names = ", ".join(finding.name for finding in findings)
        if text_encoder is None:
            raise ValueError(
                f"{names}: no finding of {self.label_set.name}, and scoring by prompt needs the text encoder of the "
                "training; name it with --text_model."
            )
        self._check_width(text_encoder)
        given, expected = text_encoder.embeddings_sha256, bytes(self.text_encoder_sha256.tolist()).hex()
        if given != expected:
            raise ValueError(
                f"text encoder {text_encoder.name} with {text_encoder.pooling} pooling is not the one that the "
                f"classifier was trained with (SHA-256 of weights and pooling {given[:12]}, expected {expected[:12]}); "
                "name that one with --text_model."
            )
        soft = self.soft_prompts[self.trained_findings] if self.trained_findings.any() else self.soft_prompts
        soft = soft.mean(0).expand(len(findings), -1, -1)
        embeddings = text_encoder.embed_findings(findings, soft, use_negative=self.use_negative_prompts)
        return self.embed_findings(embeddings, self.text_centre)

    def _check_width(self, text_encoder: PromptedTextEncoder) -> None:
        if text_encoder.hidden_size != self.text_projector.in_features:
            raise ValueError(
                f"text encoder {text_encoder.name} has {text_encoder.hidden_size} channels, the classifier was built "
                f"for {self.text_projector.in_features}; set --text_hidden_size {text_encoder.hidden_size} and train."
            )

    def _attended_tokens(self, findings: Sequence[Finding]) -> Tensor:
        """Return (L, T) bool: the global feature and the regions where each finding lives; all, where none is named."""
        attends = torch.zeros(len(findings), self.num_tokens, dtype=torch.bool)
        attends[:, 0] = True
        if self.use_region_features:
            for row, finding in enumerate(findings):
                for name in finding.regions:
                    attends[row, region_by_name(name).index] = True
                if not finding.regions:
                    attends[row] = True
        return attends
