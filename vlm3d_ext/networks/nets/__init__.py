from .encoder_pretraining import EncoderPretraining
from .three_d_vision_encoder import RegionTokenEncoder, ThreeDVisionEncoder, VisionFeatures

__all__ = ["EncoderPretraining", "RegionTokenEncoder", "ThreeDVisionEncoder", "VisionFeatures"]
