"""A Hugging Face checkpoint on disk: where each tensor is, checked before anything is computed."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint. shape: as it is read. dtype: safetensors' name of it (BF16, F32, ...). key: its name
    in the file. transposed: whether it is the other way round there. index, rows: the part that it is of the tensor
    there, which stacks many."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    key: str
    transposed: bool = False
    index: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors (or of pickles, where they were allowed). `tensors` maps every name to where it is.
    paths: what the file calls a module, where the names are a model's (`layout.arrange`)."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def pickled(self) -> bool:
        """Whether any of it is a pickle."""
        return any(stored.file.suffix == ".bin" for stored in self.tensors.values())

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
            with _opened(file, device) as get:
                out.update((name, get(self.tensors[name])) for name in inside)
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
def wrap_read_errors(file: Path) -> Iterator[None]:
    """Say which file could not be read, and what to do."""
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} cannot be read ({e}); it may be truncated: download it again") from e


def open_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Find every tensor in `folder`, from its index or its single file.

    allow_pickle: also read `pytorch_model*.bin` files (by torch, with weights_only).
    Raises: ValueError for missing, truncated or stray files, and for pickle weights unless allowed.
    """
    found = next((folder / n for n in (SINGLE, INDEX, _PICKLE, _PICKLE_INDEX) if (folder / n).exists()), None)
    if found is None:
        raise ValueError(f"{folder} has no {SINGLE} or {INDEX}; is it a Hugging Face model folder?")
    if found.name in (_PICKLE, _PICKLE_INDEX) and not allow_pickle:
        raise ValueError(
            f"{folder} holds pickle weights, which can run code when opened; "
            "convert them to safetensors, or pass --allow-pickle if you trust them"
        )
    weight_map = _weight_map(found) if found.suffix == ".json" else {}
    tensors: dict[str, StoredTensor] = {}
    for file in sorted({folder / name for name in weight_map.values()}) or [found]:
        tensors.update(_header(file))
    if lost := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{found} names tensor '{lost[0]}', which no file holds; download it again")
    return Checkpoint(folder, tensors)


def open_shard(file: Path) -> Checkpoint:
    """The tensors of one file."""
    return Checkpoint(file.parent, _header(file))


def read_json(file: Path) -> Any:
    """A JSON file of the user's, or a ValueError that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ValueError(f"{file} is missing; is {file.parent} a Hugging Face model folder?") from e
    except (ValueError, OSError) as e:
        raise ValueError(f"{file} is not valid JSON ({e}); download it again") from e


def _weight_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in, by the index; every file is there, and is in the index's folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files; download it again")
    for name in sorted(set(weight_map.values())):
        # Weight files may be links (the Hub's cache is), but the *name* must stay in the folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index} points outside the folder, to '{name}'; do not trust this checkpoint")
        if not (index.parent / name).exists():
            raise ValueError(f"{index.parent / name} is missing, though the index names it; download it again")
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of a file; a safetensors file must be as long as its header says."""
    if file.suffix == ".bin":
        state = _unpickle(file)
        return {n: StoredTensor(file, tuple(t.shape), _NAMES.get(t.dtype, str(t.dtype)), n) for n, t in state.items()}
    with wrap_read_errors(file), safe_open(file, framework="pt") as f:
        found = {}
        for name in f.keys():  # noqa: SIM118 - not a dict
            part = f.get_slice(name)
            found[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype(), name)
    return found


@contextmanager
def _opened(file: Path, device: torch.device | str) -> Iterator[Callable[[StoredTensor], Tensor]]:
    """A function from a tensor's place to the tensor."""
    if file.suffix == ".bin":
        state = _unpickle(file)
        yield lambda stored: _part(state[stored.key], stored).to(device, copy=True)
    else:
        with wrap_read_errors(file), safe_open(file, framework="pt", device=str(device)) as f:
            yield lambda s: _part(f.get_tensor(s.key) if s.index is None else f.get_slice(s.key), s)


def _part(whole: Any, stored: StoredTensor) -> Tensor:
    """What is meant of a tensor, or of a slice that is not read yet."""
    tensor: Tensor = whole if stored.index is None else whole[stored.index, slice(*(stored.rows or ()))]
    return tensor.T.contiguous() if stored.transposed else tensor


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped into memory where its format allows that; nothing else in it is built."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:
        raise ValueError(f"{file} cannot be read as plain tensors; it is damaged, or holds code") from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file} holds something other than named tensors; save the model's state_dict alone")
    return state


def first_line(error: Exception) -> str:
    """The first line of what somebody else's code said was wrong."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def count_elements(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)


KV_CONFIG, KV_CACHE = "laconic_kv_cache", "kv_cache.safetensors"


def linear_quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of quantized linears; of a cache of ours it tells other engines there, too."""
    told = config.get("quantization_config")
    if not told or KV_CONFIG not in config:
        return told
    return {key: value for key, value in told.items() if key != "kv_cache_scheme"}
