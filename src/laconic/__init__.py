"""Laconic compresses large language models: from a Hugging Face model and a recipe to a smaller checkpoint.

Attributes:
    METHODS: Classes of all compression methods.
    __version__: Version of the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from laconic.runtime.registration import register_with_transformers

if TYPE_CHECKING:
    from laconic.artifact.artifact import Artifact
    from laconic.checkpoint.trust import Trust
    from laconic.evaluation.evaluate import evaluate
    from laconic.evaluation.options import DomainOptions, LongBenchOptions, LongOptions, TaskOptions, TextOptions
    from laconic.methods import METHODS
    from laconic.pipeline.compression import compress
    from laconic.pipeline.kv_cache import kv_cache
    from laconic.pipeline.preview import CompressionPlan, plan
    from laconic.recipe import Recipe, gallery
    from laconic.runtime.reading import load

__all__ = [
    "METHODS",
    "Artifact",
    "CompressionPlan",
    "DomainOptions",
    "LongBenchOptions",
    "LongOptions",
    "Recipe",
    "TaskOptions",
    "TextOptions",
    "Trust",
    "__version__",
    "compress",
    "evaluate",
    "gallery",
    "kv_cache",
    "load",
    "plan",
]

# Module of each public name, imported when the name is first read: `import laconic` imports neither torch nor
# transformers.
_MODULES = {
    "Artifact": "laconic.artifact.artifact",
    "CompressionPlan": "laconic.pipeline.preview",
    "DomainOptions": "laconic.evaluation.options",
    "LongBenchOptions": "laconic.evaluation.options",
    "LongOptions": "laconic.evaluation.options",
    "METHODS": "laconic.methods",
    "Recipe": "laconic.recipe",
    "TaskOptions": "laconic.evaluation.options",
    "TextOptions": "laconic.evaluation.options",
    "Trust": "laconic.checkpoint.trust",
    "compress": "laconic.pipeline.compression",
    "evaluate": "laconic.evaluation.evaluate",
    "gallery": "laconic.recipe",
    "kv_cache": "laconic.pipeline.kv_cache",
    "load": "laconic.runtime.reading",
    "plan": "laconic.pipeline.preview",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("laconic")
        except PackageNotFoundError:
            # Run from a source tree.
            return "0"
    if name not in _MODULES:
        raise AttributeError(f"module 'laconic' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
