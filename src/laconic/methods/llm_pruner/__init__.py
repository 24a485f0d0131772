"""LLM-Pruner (arXiv 2305.11627): structured pruning of attention heads, MLP channels and residual channels.

Read the modules in this order:

1. `stage`: the stage's configuration, and the steps of a run.
2. `groups`: dependency groups. What of a block must be removed together (units: key-value heads with their query heads,
   MLP channels), found by trying on a block with random weights.
3. `limits`: how much of the groups can be removed, and the check of a requested sparsity against it.
4. `narrowing`: which groups of which blocks may be pruned, and how many units of each remain.
5. `gradients`: gradients of the loss on calibration text.
6. `saliency`: importance of units from weights and gradients, and the choice of the units to remove.
7. `residual_width`: the channels of the residual stream, for `groups: [hidden]`.

No other method imports them.
"""
