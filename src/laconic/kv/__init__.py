"""Quantized key-value cache: how keys and values are stored, and how attention reads them.

The modules build on one another in this order:

    planes, planes_triton           codes of 1 to 8 bits in bytes
    format, scheme                  keys and values as codes; the formats of a whole model
    kmeans, fit                     ranges and levels from calibration
    rotary, positions               rotary embeddings; the positions of cached tokens
    packed                          what attention reads, and what the kernel supports
    attention                       attention over packed tokens: the reference, and the choice of the kernel
    attention_triton                the kernel: attend_packed_triton, with packed_block_triton and splits_triton
    stored                          encoded keys and values of a layer, cut and joined along time
    lazy, layer, cache              the cache as transformers sees it
    shape, attention_interface      which models can have such a cache; their attention function
    attach, files                   caches for a model; a cache's files in an artifact

Names of tensors end in their axes, here and in `laconic.serving` and `laconic.calibrate.attention`:

    B  sequences of a batch                             C  channels of a head
    H  key-value heads                                  G  groups of numbers that share a range
    Q  query heads, Q = H R                             K  outliers of a token and head
    R  query heads that share a key-value head          L  levels of a table
    N  new tokens of a forward pass                     U  units: runs of M tokens that are encoded together
    T  cached tokens                                    P  pages
    W  tokens of the recent window                      X  bytes
    S  sinks: first tokens kept in 16 bit
"""
