"""Locks between processes that write the same folder; the operating system releases them when the holder exits."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def wait_for_lock(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, after waiting for any process that holds it to finish or to exit.

    Args:
        target: File or folder to lock; it need not exist. The lock file `TARGET.lock` stays beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_folder(folder: Path) -> int:
    """Lock a folder until the returned file descriptor is closed or the process exits.

    The folder itself is locked, so no lock file is left behind.

    Args:
        folder: An existing folder.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        ValueError: Another process holds the lock, or has replaced the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        acquired = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
    except BlockingIOError:
        acquired = False
    except OSError:  # a filesystem without locks
        acquired = True
    if not acquired:
        os.close(descriptor)
        raise ValueError(f"another process is writing {folder}; wait for it, or choose another output")
    return descriptor
