"""Stage 1 of the localizer: what the diseases' descriptions mean, computed once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...text.disease_set import load_disease_set
from .prompted_text_encoder import PromptedTextEncoder

__all__ = ["TextEmbedder"]

_SHA256_BYTES = 32


class TextEmbedder(nn.Module):
    """Keeps one embedding for each disease of a set, and projects it for the stages that follow.

    The embeddings are made once, by a frozen text encoder (`compute`), and travel in the state dict: nothing after
    training needs the encoder. Before the projection their mean is taken away and they are scaled to unit variance,
    because sentence embeddings of one model differ little from each other.

    Args:
        disease_set: name or path, see `vlm3d_ext.text.disease_set.load_disease_set`.
        text_hidden_size: H, channels of the text encoder.
        hidden_size: C, channels of what is returned.
    """

    embeddings: Tensor
    text_encoder_sha256: Tensor

    def __init__(self, disease_set: str = "chest_ct_5", text_hidden_size: int = 768, hidden_size: int = 768) -> None:
        super().__init__()
        self.disease_set = load_disease_set(disease_set)
        self.text_hidden_size = text_hidden_size
        self.projection = nn.Linear(text_hidden_size, hidden_size)
        self.register_buffer("embeddings", torch.zeros(self.disease_set.num_diseases, text_hidden_size))
        self.register_buffer("text_encoder_sha256", torch.zeros(_SHA256_BYTES, dtype=torch.uint8))

    @torch.no_grad()
    def compute(self, text_encoder: PromptedTextEncoder) -> None:
        """Embed the descriptions and note which text encoder did.

        Raises:
            ValueError: if the text encoder has other channels.
        """
        if text_encoder.hidden_size != self.text_hidden_size:
            raise ValueError(
                f"text encoder {text_encoder.name} has {text_encoder.hidden_size} channels, the text embedder was "
                f"built for {self.text_hidden_size}; set --text_hidden_size {text_encoder.hidden_size}."
            )
        found = text_encoder.embed_findings(self.disease_set.findings(), use_negative=False)
        self.embeddings.copy_(found.positive)
        self.text_encoder_sha256.copy_(torch.tensor(list(bytes.fromhex(text_encoder.embeddings_sha256))))

    def forward(self) -> Tensor:
        """Return (diseases, C)."""
        centred = self.embeddings - self.embeddings.mean(0, keepdim=True)
        scale = (centred.square().mean() + 1e-12).rsqrt()
        return self.projection(centred * scale)
