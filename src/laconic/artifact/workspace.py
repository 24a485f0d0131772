"""Writing an artifact so that a process killed at any moment can be resumed: every file is complete or absent.

Files are written to `OUTPUT.partial`. A shard is written to a temporary name, flushed to disk and renamed; a finished
shard is the only record that its block is finished. The folder is renamed to OUTPUT when it is complete.
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

from laconic.artifact.identity import RECIPE, check_identity, partial_folder, read_identity
from laconic.artifact.locks import lock_folder
from laconic.checkpoint.atomic import copy_file, fsync_folder, wrap_disk_errors, write_file, write_text
from laconic.checkpoint.files import ADAPTER_CONFIG, INDEX, KV_CACHE, SMALL_FILES

LOG, SURVEY = "log.jsonl", "survey.json"
_REPLACED, _CALIBRATION, _SCRATCH = ".replaced", "calibration", "scratch"
# Descriptions by other tools of a quantization that the artifact does not have any more.
_OF_QUANTIZERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# A user may have edited the model card: it is kept when the weights are overwritten.
_KEPT_FROM_OUTPUT = ("README.md", "cards/facts.json")
_NOT_COPIED = {"config.json", INDEX, SURVEY, "training_log.json", ADAPTER_CONFIG, *_OF_QUANTIZERS}


class Workspace:
    """The folder in which an artifact is written, locked against other processes until it is closed.

    Args:
        output: Folder of the finished artifact.
        identity: Recipe and source model; a run resumes only work of an equal identity.
        shards: Number of shards of the artifact; 0 if no weights are written.
        overwrite: Whether to replace an existing artifact, and to discard work of another identity.

    Attributes:
        output: Folder of the finished artifact.
        folder: Folder of the work, `OUTPUT.partial`.
        shards: Number of shards.

    Raises:
        ValueError: The output exists, was begun with another recipe, or is being written by another process.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], shards: int, *, overwrite: bool) -> None:
        self.output, self.shards = output, shards
        self.folder = partial_folder(output)
        check_output(output, overwrite=overwrite)
        with wrap_disk_errors(output):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._locks = [lock_folder(self.folder)]
        try:
            # Another process may have finished or begun between the first check and the lock.
            check_output(output, overwrite=overwrite)
            check_identity(output, identity, overwrite=overwrite)
            self._clear(keep=read_identity(self.folder) == dict(identity))
            if not (self.folder / RECIPE).exists():
                write_text(self.folder / RECIPE, yaml.safe_dump(dict(identity), sort_keys=False, allow_unicode=True))
        except BaseException:
            with suppress(OSError):  # a folder with files in it stays
                self.folder.rmdir()
            self.close()
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock of the folder."""
        while self._locks:
            os.close(self._locks.pop())

    def discard(self) -> None:
        """Remove the folder with all finished shards, which no later run can go on with."""
        shutil.rmtree(self.folder)

    def _clear(self, *, keep: bool) -> None:
        """Remove temporary files of a killed run, and all other files unless `keep` is set."""
        for file in self.folder.iterdir():
            if not keep or file.suffix == ".writing":
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()

    def shard(self, i: int) -> Path:
        """Return the file of shard i.

        Args:
            i: Number of the shard, from 0.
        """
        return self.folder / f"model-{i + 1:05d}-of-{self.shards:05d}.safetensors"

    def is_finished(self, i: int) -> bool:
        """Return whether shard i is finished.

        Args:
            i: Number of the shard, from 0.
        """
        return self.shard(i).exists()

    def write_shard(self, i: int, tensors: Mapping[str, Tensor], events: list[dict[str, Any]]) -> None:
        """Write shard i and its events.

        The log is written first: events of a shard count only once the shard exists.

        Args:
            i: Number of the shard, from 0.
            tensors: Its tensors by the names of files.
            events: Events of its block, for the log.

        Raises:
            ValueError: The disk is full.
            OSError: The file cannot be written for another reason.
        """
        log = [e for e in read_log(self.folder) if e.get("shard") != i] + [{**e, "shard": i} for e in events]
        write_text(self.folder / LOG, "".join(json.dumps(e) + "\n" for e in log))
        contiguous = {n: t.detach().cpu().contiguous() for n, t in sorted(tensors.items())}
        write_file(self.shard(i), lambda file: save_file(contiguous, file, metadata={"format": "pt"}))

    @property
    def scratch(self) -> Path:
        """Folder for state that a stage needs to resume; `finish` deletes it."""
        folder = scratch_folder(self.folder)
        folder.mkdir(exist_ok=True)
        return folder

    def copy_weights(self, source: Path) -> None:
        """Copy the weight files of a model folder, and their index.

        Args:
            source: The model folder.
        """
        for file in [*source.glob("*.safetensors"), *source.glob(INDEX)]:
            copy_file(file, self.folder / file.name)

    def write_log(self, events: list[dict[str, Any]]) -> None:
        """Write events that belong to no shard, replacing the earlier ones.

        Args:
            events: The events.
        """
        log = [*events, *(e for e in read_log(self.folder) if "shard" in e)]
        write_text(self.folder / LOG, "".join(json.dumps(e) + "\n" for e in log))

    def write_calibration(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the cache's calibration of block i; `finish` deletes it. Call it before the block's shard is written.

        Args:
            i: Number of the block, from 0.
            tensors: Calibration tensors by name.
        """
        contiguous = {n: t.detach().cpu().contiguous() for n, t in sorted(tensors.items())}
        write_file(self.folder / f"{_CALIBRATION}-{i + 1:05d}", lambda file: save_file(contiguous, file))

    def read_calibration(self, blocks: int) -> list[dict[str, Tensor]]:
        """Read the cache's calibration of every block.

        Args:
            blocks: Number of blocks, each with a calibration that is written.

        Returns:
            Tensors of each block, by name.
        """
        return [load_file(self.folder / f"{_CALIBRATION}-{i + 1:05d}") for i in range(blocks)]

    def write_cache(self, fixed: Mapping[str, Tensor]) -> None:
        """Write the calibrated tensors of the cache.

        Args:
            fixed: Tensors by their name in the file.
        """
        write_file(self.folder / KV_CACHE, lambda file: save_file(dict(fixed), file, metadata={"format": "pt"}))

    def read_survey(self) -> list[dict[str, Any]] | None:
        """Read the survey of the original model; None if it is not written yet."""
        file = self.folder / SURVEY
        return list(json.loads(file.read_text())) if file.exists() else None

    def write_survey(self, survey: list[dict[str, Any]]) -> None:
        """Write the survey of the original model, before any stage uses it.

        Args:
            survey: Figures of each block.
        """
        write_text(self.folder / SURVEY, json.dumps(survey, indent=1) + "\n")

    def read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Read the shape of every tensor in the shards, by name; all shards are finished."""
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.shards):
            with safe_open(self.shard(i), framework="pt") as f:
                shapes |= {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}  # noqa: SIM118 - not a dict
        return shapes

    def finish(
        self,
        config: Mapping[str, Any],
        source: Path,
        carried: Path | None = None,
        describe: Callable[[Path], None] = lambda _: None,
    ) -> Path:
        """Write the index and the config, copy the tokenizer, and rename the folder to the output.

        Args:
            config: Contents of config.json.
            source: Model folder from which tokenizer, license and other files are copied.
            carried: Artifact of the previous step; its log is put before this one, and its subfolders are copied.
            describe: Writes the cards, when all other files are in the folder it gets.

        Returns:
            The folder of the artifact.
        """
        if carried:
            events = [e for e in read_log(self.folder) if "shard" not in e and "step" not in e]
            carried_events = [{k: v for k, v in e.items() if k != "shard"} for e in read_log(carried)]
            self.write_log([*({"step": carried.name, **e} for e in carried_events), *events])
            _copy_folders(carried, self.folder)
        if self.shards:
            self._write_index()
        for pattern in SMALL_FILES:
            for file in source.glob(pattern):
                if file.name not in _NOT_COPIED and not file.name.endswith(".index.json"):
                    to = self.folder / file.relative_to(source)
                    to.parent.mkdir(exist_ok=True)
                    copy_file(file, to)
        for name in _KEPT_FROM_OUTPUT:
            if (file := self.output / name).is_file():
                (self.folder / name).parent.mkdir(exist_ok=True)
                copy_file(file, self.folder / name)
        write_text(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
        for temporary in [*self.folder.rglob("*.writing"), *self.folder.glob(f"{_CALIBRATION}-*")]:
            temporary.unlink()
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
        """Rename the folder to the output.

        An old output is moved into the folder first, and out again afterwards to be deleted: at any moment one of the
        two has the output's name, or the next run gives it.
        """
        if self.output.exists():
            self.output.rename(self.folder / _REPLACED)
        replaced = (self.folder / _REPLACED).exists()
        if replaced:
            # At the path where it is deleted, another process could mistake it for an interrupted run.
            self._locks.append(lock_folder(self.folder / _REPLACED))
        self.folder.rename(self.output)
        if replaced:
            (self.output / _REPLACED).rename(self.folder)
            shutil.rmtree(self.folder)
        fsync_folder(self.output.parent)


def scratch_folder(folder: Path) -> Path:
    """Return the folder in which a stage stores the state that it needs to resume; it need not exist.

    Args:
        folder: Folder in which the stage works.
    """
    return folder / _SCRATCH


def check_output(output: Path, *, overwrite: bool) -> None:
    """Check that an artifact can be written.

    Args:
        output: Folder of the artifact.
        overwrite: Whether an existing artifact may be replaced.

    Raises:
        ValueError: The folder cannot be written, or contains something that may not be replaced.
    """
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


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the events of an artifact, in order.

    Args:
        folder: Folder of an artifact, or of unfinished work.

    Returns:
        The events; none if there is no log.

    Raises:
        ValueError: A line of the log is not valid JSON.
    """
    file = folder / LOG
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _copy_folders(source: Path, target: Path) -> None:
    """Copy the files in subfolders of a folder that another folder does not have."""
    for file in source.glob("*/**/*"):
        to = target / file.relative_to(source)
        if file.is_file() and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            copy_file(file, to)


def _foreign(folder: Path) -> Iterator[Path]:
    """List files that a run does not write before the recipe."""
    return (f for f in folder.iterdir() if f.suffix != ".writing")
