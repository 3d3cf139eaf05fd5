"""Where the bundles are."""

from pathlib import Path

__all__ = ["BUNDLES", "ROOT"]

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = ROOT / "bundles"
