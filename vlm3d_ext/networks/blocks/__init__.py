from .anatomical_structure_encoder import AnatomicalStructureEncoder
from .prompted_text_encoder import PromptedTextEncoder
from .sentence_encoder import HashedNgramSentenceEncoder
from .volume_transformer_block import VolumeTransformerBlock

__all__ = [
    "AnatomicalStructureEncoder",
    "HashedNgramSentenceEncoder",
    "PromptedTextEncoder",
    "VolumeTransformerBlock",
]
