"""Laconic: the same model, said in fewer bits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import laconic.runtime.quantizer
import laconic.structure.widths  # noqa: F401  - they register `quant_method` and `model_type: laconic` with transformers

if TYPE_CHECKING:
    from laconic.artifact.artifact import Artifact
    from laconic.pipeline.compression import compress
    from laconic.pipeline.kv_cache import kv_cache
    from laconic.recipe import Recipe
    from laconic.runtime.reading import load

__all__ = ["Artifact", "Recipe", "compress", "kv_cache", "load"]

# Loaded when asked for: an engine that only reads an artifact should not need what compresses one.
_HOMES = {
    "Artifact": "laconic.artifact.artifact",
    "Recipe": "laconic.recipe",
    "compress": "laconic.pipeline.compression",
    "kv_cache": "laconic.pipeline.kv_cache",
    "load": "laconic.runtime.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'laconic' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
