"""What the localizer takes from the text encoder before its first step."""

from __future__ import annotations

from ignite.engine import Engine, Events

from ..networks.blocks import PromptedTextEncoder, TextEmbedder

__all__ = ["DiseaseTextInitialization"]


class DiseaseTextInitialization:
    """Computes the embeddings of the disease descriptions when training starts; they are never computed again.

    Args:
        text_embedder: whose buffers are filled.
        text_encoder: frozen, in no checkpoint.
    """

    def __init__(self, text_embedder: TextEmbedder, text_encoder: PromptedTextEncoder) -> None:
        self.text_embedder = text_embedder
        self.text_encoder = text_encoder

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Embed the descriptions."""
        self.text_embedder.compute(self.text_encoder)
        engine.logger.info(
            f"{self.text_embedder.disease_set.num_diseases} disease descriptions embedded by {self.text_encoder.name}."
        )
