"""Folders of the steps before the last: beside the output until it is done, or shared by many recipes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from laconic.artifact.identity import read_identity
from laconic.checkpoint.source import Source


def own_folder(output: Path) -> Path:
    """Return the folder in which the steps of one recipe lie until the last is done.

    Args:
        output: folder of the artifact.
    """
    return output.with_name(output.name + ".steps")


def step_folder(output: Path, number: int, identity: Mapping[str, Any], shared: Path | None) -> Path:
    """Return the folder of a step.

    Args:
        output: of the recipe.
        number: of the step, from 1.
        identity: of the step; in a shared folder steps are known by it.
        shared: the folder that many recipes share, if they do.
    """
    if shared is None:
        return own_folder(output) / f"{number}"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return shared / digest[:16]


def check_own_folder(output: Path, source: Source) -> None:
    """Check that the folder of steps holds nothing else, since it is removed in the end.

    Args:
        output: folder of the artifact.
        source: the original checkpoint, whose folder must lie elsewhere.

    Raises:
        ValueError: if it holds other files, or is or holds the model's folder.
    """
    folder, model = own_folder(output), source.folder.resolve()
    if not folder.exists():
        return
    ours = folder.is_dir() and all(_is_step(entry) or entry.suffix == ".last-good" for entry in folder.iterdir())
    if not ours or folder in (model, *model.parents):
        raise ValueError(
            f"{folder}, where earlier steps are kept until the last is done, holds other files; move it away, or "
            "choose another output"
        )


def remove_steps(output: Path) -> None:
    """Remove the steps of a finished recipe, and nothing else.

    Args:
        output: folder of the artifact.
    """
    folder = own_folder(output)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if _is_step(entry):
            shutil.rmtree(entry, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def wait_for_step(folder: Path, identity: Mapping[str, Any]) -> None:
    """Wait until the first process of a launch has finished a step, however long that takes.

    Args:
        folder: folder of the step.
        identity: of the step.
    """
    while read_identity(folder) != identity:
        time.sleep(0.5)


def _is_step(entry: Path) -> bool:
    number, _, rest = entry.name.partition(".")
    if not number.isdecimal() or rest not in ("", "partial") or not entry.is_dir() or entry.is_symlink():
        return False
    # A step that was just begun is empty, but for a recipe that is being written.
    return read_identity(entry) is not None or all(file.suffix == ".writing" for file in entry.iterdir())
