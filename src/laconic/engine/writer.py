"""Writing an artifact so that a kill at any moment loses nothing: every file is whole or absent.

The work goes on in `OUTPUT.partial`. A shard is written under a temporary name, flushed to the disk and renamed; a
finished shard is the only record that its block is done. The folder takes its final name when all is there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from laconic.model.checkpoint import INDEX

RECIPE, LOG = "recipe.yaml", "log.jsonl"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = {"config.json", INDEX, "training_log.json"}


class Workspace:
    """The folder where an artifact grows. shards: how many there will be.

    Raises: ValueError when the output exists, or was begun with another recipe.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], shards: int, *, overwrite: bool) -> None:
        self.output, self.shards, self.overwrite = output, shards, overwrite
        self.folder = partial_of(output)
        check_output(output, identity, overwrite=overwrite)
        if overwrite and self.folder.exists() and _begun_with(self.folder) != dict(identity):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        if _begun_with(self.folder) is None:
            write_text(self.folder / RECIPE, yaml.safe_dump(dict(identity), sort_keys=False, allow_unicode=True))
        for stale in self.folder.glob("*.writing"):
            stale.unlink()

    def shard(self, i: int) -> Path:
        """The file of shard i."""
        return self.folder / f"model-{i + 1:05d}-of-{self.shards:05d}.safetensors"

    def done(self, i: int) -> bool:
        """Whether shard i is finished."""
        return self.shard(i).exists()

    def write_shard(self, i: int, tensors: Mapping[str, Tensor], events: list[dict[str, Any]]) -> None:
        """Write shard i and what happened in it. The log comes first: with the shard, it counts."""
        log = [e for e in read_log(self.folder) if e.get("shard") != i] + [{**e, "shard": i} for e in events]
        write_text(self.folder / LOG, "".join(json.dumps(e) + "\n" for e in log))
        contiguous = {n: t.detach().cpu().contiguous() for n, t in sorted(tensors.items())}
        _replace(self.shard(i), lambda file: save_file(contiguous, file, metadata={"format": "pt"}))

    def finish(self, config: Mapping[str, Any], source: Path) -> Path:
        """Write the index and the config, copy the tokenizer, give the folder its name."""
        weight_map, total = {}, 0
        for i in range(self.shards):
            with safe_open(self.shard(i), framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    weight_map[name] = self.shard(i).name
            total += self.shard(i).stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                    _replace(self.folder / file.name, lambda to, file=file: shutil.copyfile(file, to))  # type: ignore[misc]
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        (self.folder / ".lock").unlink(missing_ok=True)
        if self.output.exists():
            old = self.output.with_name(self.output.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            self.output.rename(old)
            self.folder.rename(self.output)
            shutil.rmtree(old)
        else:
            self.folder.rename(self.output)
        os.close(self._lock)
        return self.output


def partial_of(output: Path) -> Path:
    """Where the work for `output` goes on."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raises: ValueError when writing to `output` would destroy something that was not said to be overwritten."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; choose another name")
    if output.exists() and not overwrite and any(output.iterdir()):
        raise ValueError(f"output {output} exists; choose another name, or pass --overwrite")
    begun = _begun_with(partial_of(output))
    if begun is not None and begun != dict(identity) and not overwrite:
        changed = sorted(k for k in {*begun, *identity} if begun.get(k) != identity.get(k))
        raise ValueError(
            f"{partial_of(output)} was begun with another recipe (different: {', '.join(changed)}); "
            "finish it with that one, choose another output, or pass --overwrite"
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of an artifact, in order."""
    file = folder / LOG
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    _replace(file, lambda to: to.write_text(text, encoding="utf-8"))


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    partial = file.with_name(file.name + ".writing")
    with _disk_errors(file):
        write(partial)
        with partial.open("rb+") as f:
            os.fsync(f.fileno())
        partial.rename(file)
        _fsync_folder(file.parent)


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        # safetensors wraps the system's error in one of its own, whose text is all that is left of it.
        full = getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e) or "os error 28" in str(e)
        if not full:
            raise
        raise ValueError(
            f"the disk of {file.parent} is full; free some space and run the same command: it resumes"
        ) from e


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _begun_with(folder: Path) -> dict[str, Any] | None:
    file = folder / RECIPE
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None


def _lock(folder: Path) -> int:
    """Held until the process ends, however it ends."""
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not on this platform
        return fd
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise ValueError(f"another process is writing {folder}; wait for it, or choose another output") from e
    return fd
