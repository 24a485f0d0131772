"""An artifact: a checkpoint folder that serving engines open, with its recipe, its log and its results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from laconic.artifact.identity import RECIPE, read_identity
from laconic.artifact.workspace import LOG, read_log
from laconic.checkpoint.atomic import check_writable, write_text
from laconic.checkpoint.files import read_json

# A result replaces an older one of its name if these keys are equal.
_REPLACE_KEYS = ("text", "texts", "baseline", "dtype", "data", "load")


@dataclass(frozen=True)
class Artifact:
    """An artifact, or any model folder.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Contents of config.json."""
        return dict(read_json(self.path / "config.json"))

    @property
    def recipe(self) -> dict[str, Any] | None:
        """Recipe and source model that it was made from; None for a plain model."""
        file = self.path / RECIPE
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None

    @property
    def log(self) -> list[dict[str, Any]]:
        """Events of the compression, for instance errors, damping and time of each linear."""
        return read_log(self.path)

    @property
    def results(self) -> dict[str, Any]:
        """Contents of every file of `results/`, by its name without suffix."""
        return {f.stem: json.loads(f.read_text()) for f in sorted((self.path / "results").glob("*.json"))}

    @classmethod
    def open_with_results(cls, folder: Path) -> tuple[Artifact, dict[str, Any]]:
        """Open an artifact and its results, and check that recipe, log and results can be read.

        Args:
            folder: The folder.

        Returns:
            The artifact, and its results by name.

        Raises:
            ValueError: The folder is not a model, or its recipe, log or a result cannot be read.
        """
        if not (folder / "config.json").exists():
            raise ValueError(
                f"{folder} is no artifact: it has no config.json; name a folder that 'laconic compress' wrote"
            )
        artifact = cls(folder)
        for file, read in ((RECIPE, read_identity), (LOG, read_log)):
            try:
                broken = read(folder) == {}
            except ValueError:
                broken = True
            if broken:
                raise ValueError(f"{folder / file} cannot be read; copy the artifact again, or compress again")
        try:
            results = artifact.results
        except ValueError as e:
            raise ValueError(f"a result in {folder / 'results'} is not valid JSON; delete it and measure again") from e
        for name, result in results.items():
            if not isinstance(result, dict):
                raise ValueError(f"{folder / 'results' / name}.json holds no keys and values; delete it, measure again")
        return artifact, results

    def check_results(self) -> None:
        """Check that results can be written to this artifact.

        Raises:
            ValueError: They cannot be written.
        """
        check_writable(self.path / "results" / "result.json")

    def save_result(self, name: str, result: dict[str, Any]) -> Path:
        """Write a result to `results/NAME.json`, or to NAME-2 and so on if that is a result of other conditions.

        A result of the same conditions (text or load, original model, dtype) is replaced.

        Args:
            name: Name of the result.
            result: Its contents.

        Returns:
            The file.
        """
        folder = self.path / "results"
        folder.mkdir(exist_ok=True)
        names = (name if i == 1 else f"{name}-{i}" for i in count(1))
        file = next(f for n in names if not _has_other_conditions(f := folder / f"{n}.json", result))
        write_text(file, json.dumps(result, indent=2) + "\n")
        return file


def _has_other_conditions(file: Path, result: dict[str, Any]) -> bool:
    """Return whether a file is a result of other conditions, which must not be replaced."""
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return any(old.get(key) != result.get(key) for key in _REPLACE_KEYS)
