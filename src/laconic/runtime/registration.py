"""Registration with transformers on demand, so that `from_pretrained` opens artifacts after `import laconic`.

transformers reads `quant_method` and `model_type` from two registries. Importing it takes seconds, so `import laconic`
imports nothing of it: a finder on `sys.meta_path` adds our classes right after the module that holds a registry is
loaded, or at once where it is loaded already. Either order of the two imports works.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# By the module of transformers that holds a registry, our module whose `register()` adds to it. Other modules of
# transformers may be half loaded then, so ours import only what the registry has imported.
_REGISTRIES = {
    "transformers.models.auto.configuration_auto": "laconic.structure.model_type",
    "transformers.quantizers.auto": "laconic.runtime.quantizer",
}


def register_with_transformers() -> None:
    """Add our classes to the registries of transformers, or prepare to do so once they are loaded."""
    if any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _RegistryFinder())
    for registry in _REGISTRIES:
        if registry in sys.modules:
            import_module(registry)  # waits for a thread that is loading it right now
            _register(registry)


def _register(registry: str) -> None:
    import_module(_REGISTRIES[registry]).register()


class _RegistryFinder(MetaPathFinder):
    """A finder that delegates to the other finders, and registers with a registry once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTRIES:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((s for finder in finders if (s := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegistryLoader(spec.loader, lambda: _register(name))
        return spec


class _RegistryLoader(Loader):
    """A loader that delegates to another one, and makes a call once the module is executed."""

    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # `inspect` and tracebacks read the source through the module's own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then()
