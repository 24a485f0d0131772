"""The cache of an artifact: its scheme in config.json, and what calibration fixed of it in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from laconic.checkpoint.files import KV_CACHE, KV_CONFIG, first_line
from laconic.kv.cache import Calibrated
from laconic.kv.scheme import KvScheme


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
    try:
        fixed = by_layer(load_file(file), len(scheme.layers))
    except (SafetensorError, ValueError, IndexError) as e:
        raise ValueError(f"{file} cannot be read ({first_line(e)}); copy it again, or compress again") from e
    if lacking := _lacking(scheme, fixed):
        raise ValueError(f"{file} lacks '{lacking}'; copy it again, or compress again")
    return scheme, fixed


def _lacking(scheme: KvScheme, fixed: Calibrated) -> str | None:
    """The name of a tensor that is not there."""
    for i, layer in enumerate(scheme.layers):
        for which in ("keys", "values") if scheme.rotation == "attention" else ():
            if which not in fixed[i].get("turn.0", {}):
                return f"{i}.turn.0.{which}"
        for g, group in enumerate(layer):
            for which, fmt in (("keys", group.keys), ("values", group.values)):
                wanted = ["scale"] if fmt.calibrated and fmt.group_size is None else []
                wanted += ["levels"] if fmt.calibrated and fmt.datatype == "table" else []
                for leaf in wanted:
                    if leaf not in fixed[i].get(f"{which}.{g}", {}):
                        return f"{i}.{which}.{g}.{leaf}"
    return None


def by_layer(fixed: Mapping[str, Tensor], layers: int) -> Calibrated:
    """Tensors named `LAYER.keys.GROUP.scale` and so on, of each layer by `keys.GROUP`."""
    found: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(layers)]
    for name, tensor in fixed.items():
        layer, which, group, leaf = name.split(".")
        found[int(layer)].setdefault(f"{which}.{group}", {})[leaf] = tensor
    return found
