"""A Hugging Face checkpoint on disk: tensors, file layout, opening, rebuilding in other sizes."""
