"""A small sentence encoder that is trained from nothing, for text beside images when no language model is at hand."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["HashedNgramSentenceEncoder"]


class HashedNgramSentenceEncoder(nn.Module):
    """Mean of the embeddings of a sentence's hashed word n-grams, then an MLP.

    Bigrams let it tell "no effusion" from "effusion". The ids come from `vlm3d_ext.text.hashed_ngrams`.

    Source: fastText (Joulin et al. 2017, section 2.1), with a hidden layer.

    Args:
        num_buckets: number of ids; id 0 is padding and embeds to nothing.
        embedding_dim: channels of the n-gram embeddings.
        out_dim: channels of the result.
    """

    def __init__(self, num_buckets: int, embedding_dim: int, out_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, embedding_dim, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(embedding_dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))

    def forward(self, ngram_ids: Tensor) -> Tensor:
        """Return (B, S, out_dim) for ids (B, S, L), padded with 0; an empty sentence gives the encoding of nothing."""
        counts = (ngram_ids != 0).sum(-1, keepdim=True).clamp_min(1)
        return self.mlp(self.embedding(ngram_ids).sum(-2) / counts)
