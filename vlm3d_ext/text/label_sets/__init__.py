"""One JSON file per label set; a package, so that an installation carries them along."""
