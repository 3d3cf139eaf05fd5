"""Prompt texts, one file each; a config cannot hold them, because MONAI turns every # of a string into ::."""
