"""A quantized model that computes: QLinear, products, adapters, `quantization_config`, and our own reading."""
