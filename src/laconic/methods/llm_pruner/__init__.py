"""LLM-Pruner: structured pruning by dependency groups, and the tools that only it uses."""
