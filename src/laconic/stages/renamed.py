"""Keys that had another name in earlier releases: they are an error that names the new key."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator


def refuse_renamed(**renamed: str) -> Any:
    """Return a validator that refuses old keys of a stage with a ValueError that names the new key.

    Args:
        renamed: new name of each old key.
    """

    def check(data: Any) -> Any:
        for old, new in renamed.items():
            if isinstance(data, dict) and old in data:
                raise ValueError(f"'{old}' is now called '{new}'; rename the key")
        return data

    return model_validator(mode="before")(check)
