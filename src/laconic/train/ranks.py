"""Which process of a launch this is. `torchrun` and `accelerate launch` say so in the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among all of the launch; 0 where there is but one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes; the others only help it train."""
    return rank() == 0
