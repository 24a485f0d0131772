"""The cache of an artifact: its scheme in config.json, and what calibration fixed of it in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from laconic.formats.kv_scheme import KvScheme
from laconic.model.kv_cache import Calibrated

KV_CONFIG, KV_CACHE = "laconic_kv_cache", "kv_cache.safetensors"


def read_kv_scheme(folder: Path, config: Mapping[str, Any]) -> tuple[KvScheme, Calibrated | None] | None:
    """The cache's scheme, and of each layer what is fixed of it; None where the artifact has no scheme.

    Raises: ValueError when they cannot be read.
    """
    if KV_CONFIG not in config:
        return None
    scheme = KvScheme.from_dict(config[KV_CONFIG])
    if not scheme.calibrated:
        return scheme, None
    file = folder / KV_CACHE
    if not file.exists():
        raise ValueError(f"{folder} has no {KV_CACHE}, which its cache needs; copy it there, or compress again")
    return scheme, by_layer(load_file(file), len(scheme.layers))


def by_layer(fixed: Mapping[str, Tensor], layers: int) -> Calibrated:
    """Tensors named `LAYER.keys.GROUP.scale` and so on, of each layer by `keys.GROUP`."""
    found: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(layers)]
    for name, tensor in fixed.items():
        layer, which, group, leaf = name.split(".")
        found[int(layer)].setdefault(f"{which}.{group}", {})[leaf] = tensor
    return found
