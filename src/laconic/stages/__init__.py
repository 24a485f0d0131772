"""What a stage is: the contract of linear, block, model, cache and training stages."""
