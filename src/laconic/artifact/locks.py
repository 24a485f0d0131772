"""Locks between processes that write the same folder; they end with their holder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def turn(what: Path) -> Iterator[None]:
    """Wait for the process that makes `what` to be done with it, or to end, however it ends. WHAT.lock is left."""
    what.parent.mkdir(parents=True, exist_ok=True)
    with what.with_name(f"{what.name}.lock").open("w") as file:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock(folder: Path) -> int:
    """Held until closed, or until the process ends, however it ends. The folder itself is locked: no file is left."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = folder.exists() and os.path.samestat(os.fstat(fd), folder.stat())
    except BlockingIOError:
        ours = False
    except OSError:  # a filesystem without locks
        ours = True
    if not ours:
        os.close(fd)
        raise ValueError(f"another process is writing {folder}; wait for it, or choose another output")
    return fd
