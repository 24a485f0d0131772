"""Hugging Face checkpoints on disk: reading tensors, file layouts, opening models, rebuilding them in other sizes."""
