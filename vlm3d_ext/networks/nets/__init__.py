from .encoder_pretraining import EncoderPretraining, PretrainingHeads
from .three_d_vision_encoder import RegionTokenEncoder, ThreeDVisionEncoder, VisionFeatures

__all__ = ["EncoderPretraining", "PretrainingHeads", "RegionTokenEncoder", "ThreeDVisionEncoder", "VisionFeatures"]
