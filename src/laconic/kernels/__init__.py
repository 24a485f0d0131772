"""The few loops worth a kernel: plain torch that runs everywhere, and beside it Triton for a GPU."""
