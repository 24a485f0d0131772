"""What an artifact claims to hold is read back before its folder gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from artifacts import press, rtn
from laconic.checkpoint.layout import to_file_layout
from laconic.walk import walk
from shrunk import make_shrunk


def test_a_folder_that_would_not_be_read_back_is_never_left_behind(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def renamed(checkpoint: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n.replace("up_proj", "upward"): t for n, t in to_file_layout(checkpoint, tensors).items()}

    monkeypatch.setattr(walk, "to_file_layout", renamed)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.\w+ would not be read back from the artifact"):
        press(llama, tmp_path / "out" / "artifact", rtn("W8A16"))
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_transformers_computes_from_others_are_told(tmp_path: Path) -> None:
    folder = make_shrunk(tmp_path / "model", "kimi_linear")
    with pytest.raises(
        ValueError, match=r"transformers computes 'model\.layers\.0\.self_attn\.conv1d\.weight' from other"
    ):
        press(folder, tmp_path / "artifact", rtn("W8A16"))
