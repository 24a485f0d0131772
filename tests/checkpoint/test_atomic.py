"""A file that has its name is on the disk: flushed before it is renamed, and its folder after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from laconic.checkpoint.atomic import write_text


def test_a_file_is_flushed_before_it_gets_its_name_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = Path.rename

    def flush(fd: int) -> None:
        events.append(f"flush {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")

    def renamed(file: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(file, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", renamed)
    write_text(tmp_path / "a", "text")
    assert events == ["flush a.writing", "rename to a", f"flush {tmp_path.name}"]
    assert (tmp_path / "a").read_text() == "text"
