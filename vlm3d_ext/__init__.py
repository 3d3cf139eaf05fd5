"""VLM3D: parts for chest-CT vision-language systems built as MONAI bundles."""

__version__ = "0.6.0"
