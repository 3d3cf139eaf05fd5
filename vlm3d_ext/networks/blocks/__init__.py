from .anatomical_structure_encoder import AnatomicalStructureEncoder
from .denoising_transformer import DenoisedFeatures, DenoisingTransformer
from .prompted_text_encoder import PromptedTextEncoder
from .sentence_encoder import HashedNgramSentenceEncoder
from .text_embedder import TextEmbedder
from .text_guided_attention_unet import TextGuidedAttentionUNet
from .vision_to_llm_projector import VisionToLLMProjector
from .volume_transformer_block import VolumeTransformerBlock

__all__ = [
    "AnatomicalStructureEncoder",
    "DenoisedFeatures",
    "DenoisingTransformer",
    "HashedNgramSentenceEncoder",
    "PromptedTextEncoder",
    "TextEmbedder",
    "TextGuidedAttentionUNet",
    "VisionToLLMProjector",
    "VolumeTransformerBlock",
]
