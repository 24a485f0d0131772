"""Permissions of a model's files when they are opened; chosen by the user, and passed down as one object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trust:
    """Permissions of a model's files. By default they are only read as data.

    Attributes:
        remote_code: Run Python code that comes with the model (`auto_map` in config.json).
        pickle: Read weights from pickle files (with torch's `weights_only`), where there are no safetensors.
    """

    remote_code: bool = False
    pickle: bool = False


UNTRUSTED = Trust()
