"""Remembering the policy that reinforcement learning begins from."""

from __future__ import annotations

from ignite.engine import Engine, Events

from ..networks.nets.image_prefix_language_model import ImagePrefixLanguageModel

__all__ = ["ReferencePolicy"]


class ReferencePolicy:
    """Keeps the adapters when the engine starts; goes after the handler that loads them, and before one that resumes.

    Args:
        language_model: whose adapters they are.
    """

    def __init__(self, language_model: ImagePrefixLanguageModel) -> None:
        self.language_model = language_model

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Keep them."""
        self.language_model.keep_reference()
