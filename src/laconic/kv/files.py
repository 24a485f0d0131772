"""The cache of an artifact: its scheme in config.json, and its static parameters in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from laconic.checkpoint.files import KV_CACHE, KV_CONFIG, first_line
from laconic.kv.cache import StaticByLayer
from laconic.kv.scheme import ROTATIONS, KvScheme


def read_kv_scheme(folder: Path, config: Mapping[str, Any]) -> tuple[KvScheme, StaticByLayer | None] | None:
    """Read the cache of an artifact.

    Args:
        folder: Folder of the artifact.
        config: Contents of its config.json.

    Returns:
        The scheme, and the static parameters of each layer, if it needs any; None if the artifact has no scheme.

    Raises:
        ValueError: They cannot be read.
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
        static = by_layer(load_file(file), len(scheme.layers))
    except (SafetensorError, ValueError, IndexError) as e:
        raise ValueError(f"{file} cannot be read ({first_line(e)}); copy it again, or compress again") from e
    if missing := _missing_tensor(scheme, static):
        raise ValueError(f"{file} lacks '{missing}'; copy it again, or compress again")
    return scheme, static


def _missing_tensor(scheme: KvScheme, static: StaticByLayer) -> str | None:
    """Return the name of a tensor that the scheme needs and the file does not have."""
    for i, layer in enumerate(scheme.layers):
        for which in ("keys", "values") if scheme.rotation == "attention" else ():
            if which not in static[i].get(ROTATIONS, {}):
                return f"{i}.{ROTATIONS}.{which}"
        for g, group in enumerate(layer):
            for which, fmt in (("keys", group.keys), ("values", group.values)):
                needed = ["scale"] if fmt.calibrated and fmt.group_size is None else []
                needed += ["levels"] if fmt.calibrated and fmt.datatype == "table" else []
                for leaf in needed:
                    if leaf not in static[i].get(f"{which}.{g}", {}):
                        return f"{i}.{which}.{g}.{leaf}"
    return None


def by_layer(tensors: Mapping[str, Tensor], layers: int) -> StaticByLayer:
    """Group tensors named `LAYER.keys.GROUP.scale` and so on by layer, and within it by `keys.GROUP`.

    Args:
        tensors: Tensors of the file, by name.
        layers: Number of layers of the model.

    Returns:
        For each layer, parameters by name (`scale`, ...) by `keys.GROUP` or `values.GROUP`.

    Raises:
        ValueError: A name has another form.
        IndexError: A layer is not of the model.
    """
    static: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(layers)]
    for name, tensor in tensors.items():
        layer, which, group, leaf = name.split(".")
        static[int(layer)].setdefault(f"{which}.{group}", {})[leaf] = tensor
    return static
