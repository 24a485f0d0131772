"""A model wide enough for every preset as it is, groups of 128 and blocks of 128 x 128 included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import make_model

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", **WIDE)


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, where other people's arithmetic can be compared with ours closely."""
    return make_model(tmp_path_factory.mktemp("models") / "exact", dtype=torch.float32, **WIDE)
