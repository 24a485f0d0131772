"""Safetensors files that are written tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from laconic.checkpoint import streaming
from laconic.checkpoint.files import open_shard

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "codes": torch.arange(5, dtype=torch.uint8),
}


def test_a_streamed_file_is_one_of_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs")
    streaming.write_tensors(tmp_path / "ours", open_shard(tmp_path / "theirs").tensors, TENSORS.__getitem__)
    ours = load_file(tmp_path / "ours")
    assert ours.keys() == TENSORS.keys()
    assert all(torch.equal(t, TENSORS[n]) and t.dtype == TENSORS[n].dtype for n, t in ours.items())


def test_a_file_that_is_read_back_otherwise_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "theirs")
    check = streaming._check

    def damage(file: Path, *rest: Any) -> None:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        check(file, *rest)

    monkeypatch.setattr(streaming, "_check", damage)
    with pytest.raises(ValueError, match=r"of .*ours is read back otherwise than it was written; check the disk"):
        streaming.write_tensors(tmp_path / "ours", open_shard(tmp_path / "theirs").tensors, TENSORS.__getitem__)
    assert [f.name for f in tmp_path.iterdir()] == ["theirs"]
