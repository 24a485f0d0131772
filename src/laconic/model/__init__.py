"""A model as a compressor sees it: tensors on disk, decoder blocks, linears that share an input, calibration text."""
