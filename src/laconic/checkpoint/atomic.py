"""Atomic file writes: to a temporary name, flushed to disk, then renamed, so that a file is complete or absent."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


def check_writable(file: Path) -> None:
    """Check that a file can be written at a path.

    Args:
        file: The path; its folder need not exist.

    Raises:
        ValueError: The path is a folder, or lies where the user may not write.
    """
    above = next(p for p in file.absolute().parents if p.exists())
    if file.is_dir():
        raise ValueError(f"{file} is a folder; choose another name")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{file} cannot be written: {above} is no folder that you may write to")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Args:
        file: Path of the file.
        text: Its contents.

    Raises:
        ValueError: The disk is full.
        OSError: The file cannot be written for another reason.
    """
    write_file(file, lambda to: to.write_text(text, encoding="utf-8"))


def copy_file(file: Path, to: Path) -> None:
    """Copy a file atomically.

    Args:
        file: File to copy.
        to: Path of the copy.

    Raises:
        ValueError: The disk is full.
        OSError: The file cannot be read, or the copy cannot be written for another reason.
    """
    write_file(to, lambda writing: shutil.copyfile(file, writing))


def write_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically.

    Args:
        file: Path of the file.
        write: Writes the contents to the temporary path it gets.

    Raises:
        ValueError: The disk is full.
        OSError: The file cannot be written for another reason.
    """
    partial = file.with_name(file.name + ".writing")
    with wrap_disk_errors(file):
        try:
            # safetensors replaces the file by one that only its owner may read; this one has the mode of the umask.
            partial.unlink(missing_ok=True)
            partial.touch()
            mode = partial.stat().st_mode
            write(partial)
            if partial.stat().st_mode != mode:
                partial.chmod(stat.S_IMODE(mode))
            with partial.open("rb+") as f:
                os.fsync(f.fileno())
        except Exception:
            partial.unlink(missing_ok=True)
            raise
        partial.rename(file)
        fsync_folder(file.parent)


@contextmanager
def created_folder(file: Path) -> Iterator[None]:
    """Create the folder of a file for the time in which it is written; after an error it is removed again.

    Args:
        file: The file that is written inside the context.

    Yields:
        Nothing. After an error, those folders that were created and are empty are removed.
    """
    missing = [folder for folder in file.absolute().parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def wrap_disk_errors(file: Path) -> Iterator[None]:
    """Turn errors of writing a file into ones that name the file and the fix.

    Args:
        file: The file that is written inside the context.

    Raises:
        ValueError: The disk is full.
        OSError: Any other error of the operating system, with the name of the file.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        # safetensors raises its own exception, with the error number of the system only in its text.
        match = re.search(r"os error (\d+)", str(e))
        number = e.errno if isinstance(e, OSError) else match and int(match[1])
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"the disk of {file.parent} is full; free some space and run the same command: it resumes"
            ) from e
        if number:
            raise OSError(number, os.strerror(number), str(file)) from e
        raise


def fsync_folder(folder: Path) -> None:
    """Flush the entries of a folder (renames, deletions) to disk.

    Args:
        folder: The folder.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
