"""Training by gradient: one block on activations in memory, or a whole model on text."""
