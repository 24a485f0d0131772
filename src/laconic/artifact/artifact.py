"""An artifact: a checkpoint folder that engines open, with its recipe, its log, and its results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from laconic.artifact.workspace import LOG, RECIPE, read_identity, read_log
from laconic.checkpoint.atomic import check_writable, write_text
from laconic.checkpoint.files import read_json

# What a result has to share with an older one to take its place.
_SAME = ("text", "texts", "baseline", "dtype", "data")


@dataclass(frozen=True)
class Artifact:
    """path: the folder."""

    path: Path

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return dict(read_json(self.path / "config.json"))

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe it was made with, and what it was made from; None for a plain model."""
        file = self.path / RECIPE
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None

    @property
    def log(self) -> list[dict[str, Any]]:
        """One event a linear: its errors, damping, time."""
        return read_log(self.path)

    @property
    def results(self) -> dict[str, Any]:
        """Every file of `results/`, by its name without suffix."""
        return {f.stem: json.loads(f.read_text()) for f in sorted((self.path / "results").glob("*.json"))}

    @classmethod
    def measured(cls, folder: Path) -> tuple[Artifact, dict[str, Any]]:
        """An artifact that is to be reported, and its results.

        Raises: ValueError for a folder that is none, or a recipe, log or result that cannot be read.
        """
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} is no artifact: it has no config.json")
        artifact = cls(folder)
        for file, known in ((RECIPE, read_identity), (LOG, read_log)):
            try:
                broken = known(folder) == {}
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
        """Raises: ValueError when no result can be kept here."""
        check_writable(self.path / "results" / "result.json")

    def save_result(self, name: str, result: dict[str, Any]) -> Path:
        """Keep a result under `results/NAME.json`; where one stands there that is of something else (another text,
        original, dtype), under NAME-2 and so on."""
        folder = self.path / "results"
        folder.mkdir(exist_ok=True)
        names = (name if i == 1 else f"{name}-{i}" for i in count(1))
        file = next(f for n in names if not _of_something_else(f := folder / f"{n}.json", result))
        write_text(file, json.dumps(result, indent=2) + "\n")
        return file


def _of_something_else(file: Path, result: dict[str, Any]) -> bool:
    """Whether a result is there that this one should not replace."""
    try:
        old = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return any(old.get(key) != result.get(key) for key in _SAME)
