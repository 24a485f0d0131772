"""The processes of a launch, as `torchrun` and `accelerate launch` describe them in the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """Return the number of this process among all of the launch; 0 if there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process writes; the others only help to train."""
    return rank() == 0
