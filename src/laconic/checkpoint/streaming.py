"""Safetensors files of any size, written with one tensor in memory at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from laconic.checkpoint.atomic import write_file
from laconic.checkpoint.files import StoredTensor

# The data of a file begins at a multiple of this.
_ALIGNMENT = 8
# Bytes that are read back at once.
_CHUNK = 1 << 24


def write_tensors(file: Path, tensors: Mapping[str, StoredTensor], load: Callable[[str], Tensor]) -> None:
    """Write a safetensors file atomically, and read every tensor of it back.

    Args:
        file: Path of the file.
        tensors: Shape and dtype of each tensor, by name.
        load: Returns a tensor by its name.

    Raises:
        ValueError: A tensor has another shape or dtype than was announced, is read back otherwise than it was written,
            or the disk is full.
    """
    write_file(file, lambda partial: _check(partial, _write(partial, tensors, load), file))


def _write(file: Path, tensors: Mapping[str, StoredTensor], load: Callable[[str], Tensor]) -> dict[str, int]:
    """Write a file, and return a checksum of each tensor."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        begin, end = end, end + stored.nbytes
        header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    checksums = {}
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for name, stored in tensors.items():
            tensor = load(name)
            if tuple(tensor.shape) != stored.shape or tensor.nbytes != stored.nbytes:
                raise ValueError(f"tensor '{name}' in {stored.file} is not of the shape that its config says")
            data = _bytes(tensor)
            checksums[name] = zlib.crc32(data)
            f.write(data)
    return checksums


def _check(file: Path, checksums: Mapping[str, int], name: Path) -> None:
    """Check that a file can be opened, and holds the tensors that were written."""
    with safe_open(file, framework="pt") as f:
        complete = set(f.keys()) == checksums.keys()
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        for key, checksum in checksums.items():
            begin, end = header[key]["data_offsets"]
            f.seek(8 + size + begin)
            if not complete or _checksum(f, end - begin) != checksum:
                raise ValueError(f"'{key}' of {name} is read back otherwise than it was written; check the disk")


def _checksum(file: BinaryIO, nbytes: int) -> int:
    """Return the checksum of the next bytes of a file, which are read without mapping the file into memory."""
    checksum = 0
    while nbytes > 0 and (data := file.read(min(nbytes, _CHUNK))):
        checksum, nbytes = zlib.crc32(data, checksum), nbytes - len(data)
    return checksum


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
