"""Laconic: the same model, said in fewer bits."""

from __future__ import annotations

import laconic.model.quantizer  # noqa: F401  - registers `quant_method: laconic` with transformers
from laconic.compress import compress
from laconic.engine.artifact import Artifact
from laconic.model.reading import load
from laconic.recipe import Recipe

__all__ = ["Artifact", "Recipe", "compress", "load"]
