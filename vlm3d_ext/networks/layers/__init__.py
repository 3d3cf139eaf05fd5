from .feature_whitening import FeatureMoments, FeatureWhitening
from .finding_attention import FindingAttention
from .patches import pad_to_patches, region_histograms_of_tokens, region_shares_of_mask, volume_to_patches
from .positions import RotaryDepthEmbedding, SineCosinePositionEmbedding, token_centres_mm
from .region_aware_attention import RegionAwareAttention
from .slice_aware_attention import FullAttention, SliceAwareAttention
from .synchronized_batch_norm import SynchronizedBatchNorm

__all__ = [
    "FeatureMoments",
    "FeatureWhitening",
    "FindingAttention",
    "FullAttention",
    "RegionAwareAttention",
    "RotaryDepthEmbedding",
    "SineCosinePositionEmbedding",
    "SliceAwareAttention",
    "SynchronizedBatchNorm",
    "pad_to_patches",
    "region_histograms_of_tokens",
    "region_shares_of_mask",
    "token_centres_mm",
    "volume_to_patches",
]
