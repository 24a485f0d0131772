"""Short ways to interrupt a run, and to compare what is left with what an uninterrupted one makes."""

from __future__ import annotations

import json
from pathlib import Path


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that must not depend on when it was written. The cards tell how long it took."""
    files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
    timed = {"log.jsonl", "results/compress.json", "README.md", "cards/data.md", "cards/facts.json"}
    return {name: f.read_bytes() for name, f in files.items() if name not in timed}


def is_whole(folder: Path) -> bool:
    """Whether nothing is missing, and nothing is left over from the work."""
    shards = {f.name for f in folder.glob("*.safetensors")}
    named = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    left = [f for f in folder.rglob("*") if f.name.startswith(".") or f.suffix == ".writing"]
    return shards == named and (folder / "results" / "compress.json").exists() and not left
