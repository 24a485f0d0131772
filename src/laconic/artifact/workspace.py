"""Writing an artifact so that a kill at any moment loses nothing: every file is whole or absent.

The work goes on in `OUTPUT.partial`. A shard is written under a temporary name, flushed to the disk and renamed; a
finished shard is the only record that its block is done. The folder takes its final name when all is there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from laconic.artifact.locks import lock_folder
from laconic.checkpoint.atomic import copy_file, fsync_folder, wrap_disk_errors, write_file, write_text
from laconic.checkpoint.files import INDEX, KV_CACHE

RECIPE, LOG, SURVEY = "recipe.yaml", "log.jsonl", "survey.json"
_REPLACED, _CALIBRATION, _SCRATCH = ".replaced", "calibration", "scratch"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
# A model card is a person's too, and outlives the weights that it was written for.
_OUTLIVE = ("README.md", "cards/facts.json")
_NOT_COPIED = {"config.json", INDEX, SURVEY, "training_log.json"}


class Workspace:
    """The folder where an artifact grows, ours alone until closed. shards: how many there will be, if any is to be
    written.

    Raises: ValueError when the output exists, was begun with another recipe, or is being written by another process.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], shards: int, *, overwrite: bool) -> None:
        self.output, self.shards = output, shards
        self.folder = partial_folder(output)
        check_output(output, overwrite=overwrite)
        with wrap_disk_errors(output):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._locks = [lock_folder(self.folder)]
        try:
            # Another process may have finished, or begun, since the first look.
            check_output(output, overwrite=overwrite)
            check_identity(output, identity, overwrite=overwrite)
            self._clear(keep=read_identity(self.folder) == dict(identity))
            if not (self.folder / RECIPE).exists():
                write_text(self.folder / RECIPE, yaml.safe_dump(dict(identity), sort_keys=False, allow_unicode=True))
        except BaseException:
            with suppress(OSError):  # what holds something stays
                self.folder.rmdir()
            self.close()
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process, or another run of this one, have the folder."""
        while self._locks:
            os.close(self._locks.pop())

    def _clear(self, *, keep: bool) -> None:
        """Remove what a killed run left half-written; and all it finished, unless that is to be kept."""
        for file in self.folder.iterdir():
            if not keep or file.suffix == ".writing":
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()

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
        write_file(self.shard(i), lambda file: save_file(contiguous, file, metadata={"format": "pt"}))

    @property
    def scratch(self) -> Path:
        """A folder for what is needed to go on after a kill, gone with `finish`."""
        folder = scratch_folder(self.folder)
        folder.mkdir(exist_ok=True)
        return folder

    def copy_weights(self, source: Path) -> None:
        """Take the weights of `source` over as they are."""
        for file in [*source.glob("*.safetensors"), *source.glob(INDEX)]:
            copy_file(file, self.folder / file.name)

    def write_log(self, events: list[dict[str, Any]]) -> None:
        """Write what happened outside of any shard, in place of what was said of that before."""
        log = [*events, *(e for e in read_log(self.folder) if "shard" in e)]
        write_text(self.folder / LOG, "".join(json.dumps(e) + "\n" for e in log))

    def write_calibration(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep what calibrating the cache told of block i, until `finish`. To be called before its shard is written."""
        contiguous = {n: t.detach().cpu().contiguous() for n, t in sorted(tensors.items())}
        write_file(self.folder / f"{_CALIBRATION}-{i + 1:05d}", lambda file: save_file(contiguous, file))

    def calibration(self, blocks: int) -> list[dict[str, Tensor]]:
        """All of it, by block."""
        return [load_file(self.folder / f"{_CALIBRATION}-{i + 1:05d}") for i in range(blocks)]

    def write_cache(self, fixed: Mapping[str, Tensor]) -> None:
        """Write what is fixed of the cache."""
        write_file(self.folder / KV_CACHE, lambda file: save_file(dict(fixed), file, metadata={"format": "pt"}))

    def survey(self) -> list[dict[str, Any]] | None:
        """What a survey of the original model found, if it was written down."""
        file = self.folder / SURVEY
        return list(json.loads(file.read_text())) if file.exists() else None

    def write_survey(self, found: list[dict[str, Any]]) -> None:
        """Write down what a survey found, before anything goes by it."""
        write_text(self.folder / SURVEY, json.dumps(found, indent=1) + "\n")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor in the finished shards, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for i in range(self.shards):
            with safe_open(self.shard(i), framework="pt") as f:
                found |= {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118 - not a dict
        return found

    def finish(
        self,
        config: Mapping[str, Any],
        source: Path,
        carried: Path | None = None,
        describe: Callable[[Path], None] = lambda _: None,
    ) -> Path:
        """Write the index and the config, copy the tokenizer, give the folder its name. carried: the artifact of the
        step before, whose log comes first, and whose folders go with this one. describe: writes the cards into the
        folder, which has all the rest by then."""
        if carried:
            own = [e for e in read_log(self.folder) if "shard" not in e and "step" not in e]
            log = [{k: v for k, v in e.items() if k != "shard"} for e in read_log(carried)]
            self.write_log([*({"step": carried.name, **e} for e in log), *own])
            _copy_folders(carried, self.folder)
        if self.shards:
            self._write_index()
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                    copy_file(file, self.folder / file.name)
        for name in _OUTLIVE:
            if (file := self.output / name).is_file():
                (self.folder / name).parent.mkdir(exist_ok=True)
                copy_file(file, self.folder / name)
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        for junk in [*self.folder.rglob("*.writing"), *self.folder.glob(f"{_CALIBRATION}-*")]:
            junk.unlink()
        shutil.rmtree(scratch_folder(self.folder), ignore_errors=True)
        describe(self.folder)
        self._publish()
        return self.output

    def _write_index(self) -> None:
        weight_map, total = {}, 0
        for i in range(self.shards):
            with safe_open(self.shard(i), framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    weight_map[name] = self.shard(i).name
            total += self.shard(i).stat().st_size
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _publish(self) -> None:
        """Give the folder its name. An old output is moved into it, and out again to be deleted, so that whenever a
        kill comes one of the two has the name, or the next run will give it."""
        if self.output.exists():
            self.output.rename(self.folder / _REPLACED)
        replaced = (self.folder / _REPLACED).exists()
        if replaced:
            # Where it will be deleted, another process could take it for an interrupted run.
            self._locks.append(lock_folder(self.folder / _REPLACED))
        self.folder.rename(self.output)
        if replaced:
            (self.output / _REPLACED).rename(self.folder)
            shutil.rmtree(self.folder)
        fsync_folder(self.output.parent)


def partial_folder(output: Path) -> Path:
    """Where the work for `output` goes on."""
    return output.with_name(output.name + ".partial")


def scratch_folder(folder: Path) -> Path:
    """Where a stage that works in `folder` keeps what it needs to go on."""
    return folder / _SCRATCH


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raises: ValueError when nothing can be written at `output`, or something there would be lost that was not said
    to be overwritten."""
    partial = partial_folder(output)
    above = next(p for p in output.parents if p.exists())
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; choose another name")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"output {output} cannot be made: {above} is no folder that you may write to")
    if output.is_mount():
        raise ValueError(f"output {output} is a mount point, which cannot be renamed; name a folder inside it")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise ValueError(f"output {output} exists; choose another name, or pass --overwrite")
        if not (output / RECIPE).exists():
            raise ValueError(f"output {output} is no artifact, so --overwrite leaves it alone; choose another name")
    if partial.exists() and (not partial.is_dir() or (read_identity(partial) is None and any(_foreign(partial)))):
        raise ValueError(f"{partial}, where the work would go on, is something else; move it away")


def check_identity(output: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raises: ValueError when `output` was begun with another recipe, and that was not said to be overwritten."""
    begun = read_identity(partial_folder(output))
    if begun is not None and begun != dict(identity) and not overwrite:
        raise ValueError(
            f"{partial_folder(output)} was begun with another recipe (different: {differing_keys(begun, identity)}); "
            "finish it with that one, choose another output, or pass --overwrite"
        )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of an artifact, in order."""
    file = folder / LOG
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _copy_folders(source: Path, target: Path) -> None:
    """Copy what a folder's folders hold and the other has not."""
    for file in source.glob("*/**/*"):
        to = target / file.relative_to(source)
        if file.is_file() and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, to)


def read_identity(folder: Path) -> dict[str, Any] | None:
    """What a folder was begun with: nothing if it was not, an empty mapping if that cannot be read any more."""
    try:
        begun = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return begun if isinstance(begun, dict) else {}


def _foreign(folder: Path) -> Iterator[Path]:
    """Files that no run of ours leaves in a folder before its recipe is there."""
    return (f for f in folder.iterdir() if f.suffix != ".writing")


def differing_keys(begun: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Keys by which two identities differ; a recipe's as the user wrote them."""
    old, new = _leaves(begun), _leaves(identity)
    return ", ".join(sorted(k.removeprefix("recipe.") for k in {*old, *new} if old.get(k) != new.get(k)))


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every plain value in nested mappings and lists, by its dotted path."""
    if not isinstance(value, Mapping | list):
        return {path: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {p: leaf for key, v in items for p, leaf in _leaves(v, f"{path}.{key}" if path else str(key)).items()}
