"""Pure maths on tensors: second moments, the column loop of GPTQ and SparseGPT, masks, range searches, allocation."""
