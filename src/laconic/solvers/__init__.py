"""Pure maths on tensors: second moments, the optimal-brain-surgeon sweep, scale searches."""
