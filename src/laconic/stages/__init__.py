"""The contract of linear, block, model, cache and training stages."""
