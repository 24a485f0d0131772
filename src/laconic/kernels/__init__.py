"""Kernels: a torch reference that runs on every device, and beside it a Triton kernel for GPUs.

A dispatcher (`columns`, `block_sparse`) imports its Triton kernel at its first call on a GPU; kernels never import a
dispatcher.
"""
