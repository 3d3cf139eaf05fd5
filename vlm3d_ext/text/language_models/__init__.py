"""Architectures of language models, one JSON file each; a package, so that an installation carries them along."""
