"""Write files whole or not at all: under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def check_writable(file: Path) -> None:
    """Raises: ValueError when no file can be written there."""
    above = next(p for p in file.absolute().parents if p.exists())
    if file.is_dir():
        raise ValueError(f"{file} is a folder; choose another name")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{file} cannot be written: {above} is no folder that you may write to")


def write_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    write_file(file, lambda to: to.write_text(text, encoding="utf-8"))


def copy_file(file: Path, to: Path) -> None:
    write_file(to, lambda writing: shutil.copyfile(file, writing))


def write_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file, whole or not at all."""
    partial = file.with_name(file.name + ".writing")
    with wrap_disk_errors(file):
        try:
            write(partial)
            with partial.open("rb+") as f:
                os.fsync(f.fileno())
        except Exception:
            partial.unlink(missing_ok=True)
            raise
        partial.rename(file)
        fsync_folder(file.parent)


@contextmanager
def wrap_disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as e:
        # safetensors wraps the system's error in one of its own, whose text is all that is left of it.
        told = re.search(r"os error (\d+)", str(e))
        number = e.errno if isinstance(e, OSError) else told and int(told[1])
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"the disk of {file.parent} is full; free some space and run the same command: it resumes"
            ) from e
        if number:
            raise OSError(number, os.strerror(number), str(file)) from e
        raise


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
