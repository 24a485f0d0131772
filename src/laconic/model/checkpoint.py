"""A Hugging Face checkpoint on disk: where each tensor is, checked before anything is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint. dtype: safetensors' name of it (BF16, F32, ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors. `tensors` maps every name to where it is."""

    folder: Path
    tensors: Mapping[str, Stored]

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read tensors, file by file.

        Raises: ValueError when one is missing, cannot be read, or holds NaN or infinity.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise ValueError(f"the checkpoint in {self.folder} has no tensor '{name}'; download it again")
            wanted.setdefault(self.tensors[name].file, []).append(name)
        out: dict[str, Tensor] = {}
        for file, inside in wanted.items():
            with reading(file), safe_open(file, framework="pt", device=str(device)) as f:
                for name in inside:
                    out[name] = f.get_tensor(name)
        for name, tensor in out.items():
            if tensor.is_floating_point() and tensor.element_size() > 1 and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"tensor '{name}' in {self.tensors[name].file} holds NaN or infinity; the checkpoint is damaged"
                )
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(f.stat().st_size for f in {s.file for s in self.tensors.values()})


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say which file could not be read, and what to do."""
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} cannot be read ({e}); it may be truncated: download it again") from e


def open_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Find every tensor in `folder`, from its index or its single file.

    allow_pickle: convert `pytorch_model*.bin` files (read by torch with weights_only) to safetensors beside them.
    Raises: ValueError for missing, truncated or stray files, and for pickle weights unless allowed.
    """
    if (folder / INDEX).exists():
        files = _indexed_files(folder)
    elif (folder / SINGLE).exists():
        files = [folder / SINGLE]
    elif any((folder / name).exists() for name in _PICKLES):
        if not allow_pickle:
            raise ValueError(
                f"{folder} holds pickle weights, which can run code when opened; "
                "convert them to safetensors, or pass --allow-pickle if you trust them"
            )
        files = [_unpickle(folder)]
    else:
        raise ValueError(f"{folder} has no {SINGLE} or {INDEX}; is it a Hugging Face model folder?")
    tensors: dict[str, Stored] = {}
    for file in files:
        tensors.update(_header(file))
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        if lost := sorted(set(weight_map) - set(tensors)):
            raise ValueError(f"{folder / INDEX} names tensor '{lost[0]}', which no file holds; download it again")
    return Checkpoint(folder, tensors)


def read_json(file: Path) -> Any:
    """A JSON file of the user's, or a ValueError that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ValueError(f"{file} is missing; is {file.parent} a Hugging Face model folder?") from e
    except (ValueError, OSError) as e:
        raise ValueError(f"{file} is not valid JSON ({e}); download it again") from e


def _indexed_files(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{folder / INDEX} has no weight_map; download it again")
    files = []
    for name in sorted(set(index["weight_map"].values())):
        file = folder / name
        # Weight files may be links (the Hub's cache is), but the *name* must stay in the folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder / INDEX} points outside the folder, to '{name}'; do not trust this checkpoint")
        if not file.exists():
            raise ValueError(f"{file} is missing, though the index names it; download it again")
        files.append(file)
    return files


def _header(file: Path) -> dict[str, Stored]:
    """Names, shapes and dtypes from a safetensors header; the file must be as long as the header says."""
    with reading(file), safe_open(file, framework="pt") as f:
        found = {}
        for name in f.keys():  # noqa: SIM118 - not a dict
            part = f.get_slice(name)
            found[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
    return found


def _unpickle(folder: Path) -> Path:
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        state.update(torch.load(file, map_location="cpu", weights_only=True))
    target = folder / SINGLE
    partial = target.with_suffix(".partial")
    save_file({k: v.contiguous().clone() for k, v in state.items()}, partial, metadata={"format": "pt"})
    partial.rename(target)
    return target


def count_elements(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)
