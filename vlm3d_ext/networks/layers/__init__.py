from .positions import RotaryDepthEmbedding, SineCosinePositionEmbedding, token_centres_mm
from .region_aware_attention import RegionAwareAttention
from .slice_aware_attention import FullAttention, SliceAwareAttention

__all__ = [
    "FullAttention",
    "RegionAwareAttention",
    "RotaryDepthEmbedding",
    "SineCosinePositionEmbedding",
    "SliceAwareAttention",
    "token_centres_mm",
]
