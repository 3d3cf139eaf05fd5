from .anatomical_structure_encoder import AnatomicalStructureEncoder
from .sentence_encoder import HashedNgramSentenceEncoder
from .volume_transformer_block import VolumeTransformerBlock

__all__ = ["AnatomicalStructureEncoder", "HashedNgramSentenceEncoder", "VolumeTransformerBlock"]
