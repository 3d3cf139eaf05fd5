"""Sets of drawn diseases that ship with the package: one JSON file each."""
