"""Recipe and source model of an artifact (`recipe.yaml`): work that was interrupted is resumed only by an equal run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

RECIPE = "recipe.yaml"


def partial_folder(output: Path) -> Path:
    """Return the folder in which an unfinished artifact is written.

    Args:
        output: Folder of the finished artifact.
    """
    return output.with_name(output.name + ".partial")


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Read the recipe and source model of an artifact or of unfinished work.

    Args:
        folder: Folder of the artifact or of the work.

    Returns:
        Recipe and source model as written; None if the folder has no recipe; an empty dict if it cannot be read.
    """
    try:
        identity = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return identity if isinstance(identity, dict) else {}


def check_identity(output: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check that unfinished work at an output has the same identity.

    Args:
        output: Folder of the artifact.
        identity: Recipe and source model of this run.
        overwrite: Whether work of another identity may be discarded.

    Raises:
        ValueError: The work was begun with another recipe, and may not be discarded.
    """
    previous = read_identity(partial_folder(output))
    if previous is not None and previous != dict(identity) and not overwrite:
        keys = differing_keys(previous, identity)
        raise ValueError(
            f"{partial_folder(output)} was begun with another recipe (different: {keys}); "
            "finish it with that one, choose another output, or pass --overwrite"
        )


def differing_keys(previous: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """List the keys in which two identities differ, for messages; those of the recipe as the user writes them.

    Args:
        previous: Identity of the work.
        identity: Identity of this run.

    Returns:
        Dotted keys, sorted and joined by commas.
    """
    old, new = _leaves(previous), _leaves(identity)
    return ", ".join(sorted(k.removeprefix("recipe.") for k in {*old, *new} if old.get(k) != new.get(k)))


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to plain values by dotted path."""
    if not isinstance(value, Mapping | list):
        return {path: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {p: leaf for key, v in items for p, leaf in _leaves(v, f"{path}.{key}" if path else str(key)).items()}
