from .activation_checkpointing import ACTIVATION_CHECKPOINTING, check_activation_checkpointing, run_block
from .feature_whitening import FeatureMoments, FeatureWhitening
from .finding_attention import FindingAttention
from .patch_embedding import PatchEmbedding
from .patches import pad_to_patches, region_histograms_of_tokens, region_shares_of_mask, volume_to_patches
from .positions import RotaryDepthEmbedding, SineCosinePositionEmbedding, token_centres_mm
from .region_aware_attention import RegionAwareAttention
from .residual_layer_norm import ResidualLayerNorm
from .slice_aware_attention import FullAttention, SliceAwareAttention
from .synchronized_batch_norm import SynchronizedBatchNorm

__all__ = [
    "ACTIVATION_CHECKPOINTING",
    "FeatureMoments",
    "FeatureWhitening",
    "FindingAttention",
    "FullAttention",
    "PatchEmbedding",
    "RegionAwareAttention",
    "ResidualLayerNorm",
    "RotaryDepthEmbedding",
    "SineCosinePositionEmbedding",
    "SliceAwareAttention",
    "SynchronizedBatchNorm",
    "check_activation_checkpointing",
    "pad_to_patches",
    "region_histograms_of_tokens",
    "region_shares_of_mask",
    "run_block",
    "token_centres_mm",
    "volume_to_patches",
]
