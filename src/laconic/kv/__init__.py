"""The quantized key-value cache: formats, scheme, storage, attention over packed tokens, files."""
