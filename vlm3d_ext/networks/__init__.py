"""Networks: tensors in, tensors out. Layers, blocks, heads and whole nets, one idea per file."""
