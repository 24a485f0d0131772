"""Stand-ins for torch and other large libraries, for commands that need only the declarations in Laconic's modules.

`laconic validate` and `laconic ls` read the options of the methods and the presets of the schemes, which are declared
in the same files as the mathematics. Importing these files takes a fraction of a second, and importing the libraries
that they compute with takes many. So these commands import them with stand-ins, which can be subclassed, called as
decorators and written in annotations, as Sphinx does it for `autodoc_mock_imports`.

A stand-in computes nothing. If one is asked for a value, or anything else goes wrong but a mistake of the user's, the
command starts again with the libraries themselves. Modules that were imported with stand-ins are forgotten afterwards.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any, TypeVar

Result = TypeVar("Result")

LIBRARIES = frozenset(
    ("accelerate", "compressed_tensors", "huggingface_hub", "numpy", "safetensors", "torch", "transformers", "triton")
)
# What module-level code may do with a library's values while it is imported; the outcome is another stand-in.
_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "pow",
    "lshift",
    "radd",
    "rsub",
    "rmul",
    "rtruediv",
    "getitem",
)
# What has to have the library's own outcome.
_DECISIONS = ("bool", "len", "iter", "contains", "lt", "le", "gt", "ge", "int", "float", "index")


class NeedsLibrary(BaseException):
    """Stand-ins do not suffice; no `Exception`, so that no handler on the way takes it for an error."""


def declarations(modules: Sequence[str], read: Callable[[], Result]) -> Result:
    """Call a function on the declarations of modules, without importing the libraries that they compute with.

    Args:
        modules: Modules to import first.
        read: Returns plain values from these modules, which it imports once more.

    Returns:
        The result of `read`; it is called once more, with the libraries themselves, if stand-ins do not suffice.

    Raises:
        ValueError: `read` raises it, for what a user got wrong.
        OSError: Likewise.
    """
    if "torch" in sys.modules:
        return read()
    with suppress(NeedsLibrary), _stand_ins() as finder:
        try:
            for module in modules:
                import_module(module)
        except Exception as e:
            raise NeedsLibrary(str(e)) from e
        finder.sealed = True
        try:
            return read()
        except (ValueError, OSError):
            raise
        except Exception as e:
            raise NeedsLibrary(str(e)) from e
    return read()


@contextmanager
def _stand_ins() -> Iterator[_Finder]:
    """Install stand-ins, and forget them and all modules that were imported with them."""
    finder, modules = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)
        finder.sealed = True
        for name in sys.modules.keys() - modules:
            if name.partition(".")[0] in finder.libraries | {"laconic"}:
                module = sys.modules.pop(name)
                parent, _, child = name.rpartition(".")
                if vars(sys.modules.get(parent, finder)).get(child) is module:
                    delattr(sys.modules[parent], child)


class _Finder(MetaPathFinder, Loader):
    """A finder of stand-ins for the libraries that are not loaded.

    Attributes:
        libraries: The libraries that have stand-ins.
        sealed: Whether all modules are imported, so that stand-ins do no more.
    """

    def __init__(self) -> None:
        self.libraries = LIBRARIES - sys.modules.keys()
        self.sealed = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.libraries:
            return None
        self.check(name)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandInModule(self, spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in has no code."""

    def create(self, path: str) -> Any:
        """Return a stand-in for the value at a dotted path of a library."""
        self.check(path)
        return _StandIn(path, (), {"finder": self})

    def check(self, path: str) -> None:
        """Raise `NeedsLibrary` once all modules are imported."""
        if self.sealed:
            raise NeedsLibrary(path)


class _StandInModule(ModuleType):
    """A stand-in for a module of a library."""

    def __init__(self, finder: _Finder, name: str) -> None:
        super().__init__(name)
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        # Python itself asks for dunder names, and does without them.
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._finder.create(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _StandIn(ABCMeta):
    """The type of stand-ins for values. They are classes, because modules derive classes from them, some abstract."""

    finder: _Finder

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = cls.finder.create(f"{cls.__name__}.{name}")
        setattr(cls, name, value)
        return value

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "finder" not in vars(cls):
            return super().__call__(*args, **kwargs)
        # As a decorator it leaves a function a function: pydantic takes other values in a class for fields.
        if len(args) == 1 and isinstance(args[0], FunctionType | type):
            return args[0]
        return cls.finder.create(f"{cls.__name__}()")


def _operate(cls: _StandIn, *_: Any) -> Any:
    return cls.finder.create(cls.__name__)


def _decide(cls: _StandIn, *_: Any) -> Any:
    raise NeedsLibrary(cls.__name__)


for _name in _OPERATORS:
    setattr(_StandIn, f"__{_name}__", _operate)
for _name in _DECISIONS:
    setattr(_StandIn, f"__{_name}__", _decide)
