"""Tensors of a Hugging Face checkpoint on disk: their files, names, shapes and dtypes, checked before computing."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laconic.checkpoint.trust import UNTRUSTED, Trust

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# Files of a model folder beside its weights: configs, tokenizers, chat templates, code, licences.
SMALL_FILES = (
    "*.json",
    "*.txt",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.py",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.vocab",
    "LICENSE*",
    "NOTICE*",
)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Bytes of an element, by the name of its dtype in safetensors.
_ITEMSIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8"}


@dataclass(frozen=True)
class Decoding:
    """How a matrix is decoded from the tensors that a quantized checkpoint stores for it.

    Attributes:
        parts: Location of each of these tensors, by its name for `decode`. Those of stacked matrices have one more
            dimension, the first.
        decode: Returns one matrix, from its parts by name.
        whole: Whether `decode` returns all stacked matrices at once.
    """

    parts: Mapping[str, StoredTensor]
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    whole: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor of a checkpoint.

    Attributes:
        file: The file that contains it.
        shape: Shape as it is loaded.
        dtype: Name of its dtype in safetensors (BF16, F32, ...).
        key: Its name in the file.
        transposed: Whether the file stores its transpose.
        index: Index of the expert in a tensor that stacks several; None if the tensor is stored alone.
        rows: First row, last row (exclusive) and step of its part of a stacked tensor; of columns, where that is
            transposed.
        decoding: How it is decoded from other tensors; None if the file holds it as it is.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    key: str
    transposed: bool = False
    index: int | None = None
    rows: tuple[int, int, int] | None = None
    decoding: Decoding | None = None

    @property
    def parts(self) -> dict[str, StoredTensor]:
        """Locations of what is read for it, by part: itself, or what it is decoded from."""
        if self.decoding is None:
            return {"": self}
        if self.index is None:
            return dict(self.decoding.parts)
        return {name: replace(part, index=self.index) for name, part in self.decoding.parts.items()}

    def assemble(self, loaded: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor from its loaded parts.

        Args:
            loaded: A tensor for each of `parts`.
        """
        if self.decoding is None:
            return loaded[""]
        dtype = DTYPES[self.dtype]
        if self.index is None and len(self.shape) == 3 and not self.decoding.whole:
            first = next(iter(loaded.values()))
            tensor = torch.empty(self.shape, dtype=dtype, device=first.device)
            for i in range(self.shape[0]):
                tensor[i] = self.decoding.decode({name: part[i] for name, part in loaded.items()})
            return tensor
        tensor = self.decoding.decode(loaded).to(dtype)
        return _cut(tensor, self)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes once it is loaded."""
        return count_elements(self.shape) * _ITEMSIZES.get(self.dtype, 1)


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors files, or of pickle files where the user allows them.

    Attributes:
        folder: The folder.
        tensors: Location of each tensor by name.
        paths: Name in the file of each module, if `tensors` has the names of a model (`layout.arrange`).
        stacks: Place of tensors of single experts in the stacks that transformers reads instead in 16 bit, by the
            model's names.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    paths: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def pickled(self) -> bool:
        """Whether any of its files is a pickle."""
        return any(stored.file.suffix == ".bin" for stored in self.tensors.values())

    def load(
        self, names: Iterable[str], device: torch.device | str = "cpu", *, finite: bool = True
    ) -> dict[str, Tensor]:
        """Load tensors, file by file.

        Args:
            names: Names of the tensors.
            device: Device to load them on.
            finite: Whether NaN and infinity are rejected.

        Returns:
            The tensors by name, in the dtype of the file.

        Raises:
            ValueError: A tensor is missing, cannot be read, or holds NaN or infinity where it may not.
        """
        by_file: dict[Path, list[tuple[str, str, StoredTensor]]] = {}
        for name in names:
            if name not in self.tensors:
                raise ValueError(f"the checkpoint in {self.folder} has no tensor '{name}'; download it again")
            for part, stored in self.tensors[name].parts.items():
                by_file.setdefault(stored.file, []).append((name, part, stored))
        loaded: dict[str, dict[str, Tensor]] = {}
        for file, locations in by_file.items():
            with _opened(file, device) as get:
                for name, part, stored in locations:
                    loaded.setdefault(name, {})[part] = get(stored)
        out = {name: self.tensors[name].assemble(loaded.pop(name)) for name in list(loaded)}
        for name, tensor in out.items() if finite else ():
            if tensor.is_floating_point() and tensor.element_size() > 1 and not torch.isfinite(tensor).all():
                raise ValueError(
                    f"tensor '{name}' in {self.tensors[name].file} holds NaN or infinity; the checkpoint is damaged"
                )
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(f.stat().st_size for f in self.files)

    @property
    def files(self) -> set[Path]:
        """All weight files."""
        return {part.file for stored in self.tensors.values() for part in stored.parts.values()}


@contextmanager
def wrap_read_errors(file: Path) -> Iterator[None]:
    """Turn errors of reading a weight file into a ValueError that names the file and the fix.

    Args:
        file: The file that is read inside the context.

    Raises:
        ValueError: safetensors or the operating system cannot read the file.
    """
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file} cannot be read ({e}); it may be truncated: download it again") from e


def open_checkpoint(folder: Path, *, trust: Trust = UNTRUSTED) -> Checkpoint:
    """Locate every tensor in a folder, by its index or its single file.

    Args:
        folder: The folder.
        trust: Permissions of its files; `pytorch_model*.bin` is read (by torch, with weights_only) if pickles may be.

    Returns:
        The checkpoint, with the tensors' names in the files.

    Raises:
        ValueError: Files are missing, truncated or outside the folder, or weights are pickles and not allowed.
    """
    entry = next((folder / n for n in (SINGLE, INDEX, _PICKLE, _PICKLE_INDEX) if (folder / n).exists()), None)
    if entry is None:
        raise ValueError(f"{folder} has no {SINGLE} or {INDEX}; is it a Hugging Face model folder?")
    if entry.name in (_PICKLE, _PICKLE_INDEX) and not trust.pickle:
        raise ValueError(
            f"{folder} holds pickle weights, which can run code when opened; "
            "convert them to safetensors, or pass --allow-pickle if you trust them"
        )
    weight_map = _weight_map(entry) if entry.suffix == ".json" else {}
    tensors: dict[str, StoredTensor] = {}
    for file in sorted({folder / name for name in weight_map.values()}) or [entry]:
        tensors.update(_header(file))
    if missing := sorted(set(weight_map) - set(tensors)):
        raise ValueError(f"{entry} names tensor '{missing[0]}', which no file holds; download it again")
    return Checkpoint(folder, tensors)


def open_shard(file: Path) -> Checkpoint:
    """Locate every tensor in one safetensors file.

    Args:
        file: The file.

    Returns:
        A checkpoint of this file alone.

    Raises:
        ValueError: The file cannot be read.
    """
    return Checkpoint(file.parent, _header(file))


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Args:
        file: The file, in UTF-8.

    Returns:
        The decoded value.

    Raises:
        ValueError: The file is missing or not valid JSON; the message names it.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ValueError(f"{file} is missing; is {file.parent} a Hugging Face model folder?") from e
    except (ValueError, OSError) as e:
        raise ValueError(f"{file} is not valid JSON ({e}); download it again") from e


def _weight_map(index: Path) -> dict[str, str]:
    """Read the file name of each tensor from an index, and check that every file is in the index's folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files; download it again")
    for name in sorted(set(weight_map.values())):
        # Weight files may be symbolic links (in the Hub's cache they are), but their names must stay in the folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index} points outside the folder, to '{name}'; do not trust this checkpoint")
        if not (index.parent / name).exists():
            raise ValueError(f"{index.parent / name} is missing, though the index names it; download it again")
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    """Read names, shapes and dtypes of the tensors in a file; safetensors checks its length against the header."""
    if file.suffix == ".bin":
        state = _unpickle(file)
        return {n: StoredTensor(file, tuple(t.shape), _NAMES.get(t.dtype, str(t.dtype)), n) for n, t in state.items()}
    with wrap_read_errors(file), safe_open(file, framework="pt") as f:
        tensors = {}
        for name in f.keys():  # noqa: SIM118 - not a dict
            tensor_slice = f.get_slice(name)
            tensors[name] = StoredTensor(file, tuple(tensor_slice.get_shape()), tensor_slice.get_dtype(), name)
    return tensors


@contextmanager
def _opened(file: Path, device: torch.device | str) -> Iterator[Callable[[StoredTensor], Tensor]]:
    """Open a file, and yield a function that loads a tensor by its location."""
    if file.suffix == ".bin":
        state = _unpickle(file)
        yield lambda stored: _part(state[stored.key], stored).to(device, copy=True)
    else:
        with wrap_read_errors(file), safe_open(file, framework="pt", device=str(device)) as f:
            yield lambda s: _part(f.get_tensor(s.key) if s.index is None else f.get_slice(s.key), s)


def _part(source: Any, stored: StoredTensor) -> Tensor:
    """Take the located part of a tensor, or of a safetensors slice that is not loaded yet."""
    if stored.index is None:
        return _cut(source, stored)
    if stored.rows is None or (stored.rows[2] == 1 and not stored.transposed):
        tensor: Tensor = source[stored.index, slice(*(stored.rows or (None,))[:2])]
        return tensor
    return _cut(source[stored.index, :], stored)


def _cut(matrix: Tensor, stored: StoredTensor) -> Tensor:
    """Take the located rows of a matrix as a file has it."""
    rows = slice(*(stored.rows or (None,)))
    part = matrix[..., rows].T if stored.transposed else matrix[rows] if stored.rows else matrix
    return part.contiguous()


def _unpickle(file: Path) -> dict[str, Tensor]:
    """Load the tensors of a pickle file with weights_only, memory-mapped where its format allows it."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:
        raise ValueError(f"{file} cannot be read as plain tensors; it is damaged, or holds code") from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file} holds something other than named tensors; save the model's state_dict alone")
    return state


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if the message is empty.

    Args:
        error: The exception.
    """
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def count_elements(shape: tuple[int, ...]) -> int:
    """Count the elements of a tensor.

    Args:
        shape: Its shape.

    Returns:
        Their number.
    """
    return math.prod(shape)


KV_CONFIG, KV_CACHE = "laconic_kv_cache", "kv_cache.safetensors"


def linear_quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the part of `quantization_config` that describes linears; None if there is none.

    With a quantized cache of ours, config.json also has a `kv_cache_scheme` there, for other engines; it is left out.

    Args:
        config: Contents of config.json.
    """
    quantization = config.get("quantization_config")
    if not quantization or KV_CONFIG not in config:
        return quantization
    return {key: value for key, value in quantization.items() if key != "kv_cache_scheme"}
