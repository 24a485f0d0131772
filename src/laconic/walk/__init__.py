"""Streaming a model block by block through the stages of a plan."""
