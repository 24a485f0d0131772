"""Laconic: the same model, said in fewer bits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import laconic.model.quantizer
import laconic.model.widths  # noqa: F401  - they register `quant_method` and `model_type: laconic` with transformers

if TYPE_CHECKING:
    from laconic.compression import compress
    from laconic.engine.artifact import Artifact
    from laconic.kv import kv_cache
    from laconic.model.reading import load
    from laconic.recipe import Recipe

__all__ = ["Artifact", "Recipe", "compress", "kv_cache", "load"]

# Loaded when asked for: an engine that only reads an artifact should not need what compresses one.
_HOMES = {
    "Artifact": "laconic.engine.artifact",
    "Recipe": "laconic.recipe",
    "compress": "laconic.compression",
    "kv_cache": "laconic.kv",
    "load": "laconic.model.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'laconic' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
