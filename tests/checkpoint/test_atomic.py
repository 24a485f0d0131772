"""A file that has its name is on the disk: flushed before it is renamed, and its folder after."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from laconic.checkpoint.atomic import created_folder, write_file, write_text


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


def test_a_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_file(tmp_path / "a", lambda file: save_file({"w": torch.zeros(1)}, file))
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_folder_is_removed_again_if_nothing_could_be_written_to_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / ("x" * 300)
    with pytest.raises(OSError, match="name too long"), created_folder(file):
        write_text(file, "text")
    assert not any(tmp_path.iterdir())
