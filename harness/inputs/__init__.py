"""The tensors of a case: `draw` (draw.py), the exact fill, a router's logits, sizes in bytes."""
