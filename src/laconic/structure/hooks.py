"""Hooks and patched forwards of modules, as context managers: whatever happens inside, the modules are restored.

Every hook and every patched `forward` of the package is set here; only `install_forward_pre_hook` sets one that stays.
A hook is called as torch calls it: a forward hook as `hook(module, args, output)`, a forward pre-hook as `hook(module,
args)`, both with `kwargs` after `args` where `with_kwargs` is set.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

Hook = Callable[..., Any]


class StopForward(Exception):
    """Raised by a hook to end a forward pass once it has what it needs; the caller suppresses it."""


class _Handle(Protocol):
    def remove(self) -> None: ...


@contextmanager
def forward_hooks(
    hooks: Iterable[tuple[nn.Module, Hook]], *, before: bool = False, with_kwargs: bool = False
) -> Iterator[None]:
    """Call each hook after the forward pass of its module, or before it.

    Args:
        hooks: Pairs of a module and its hook.
        before: Whether the hooks are forward pre-hooks.
        with_kwargs: Whether hooks get the keyword arguments of the forward pass too.

    Yields:
        Nothing; the hooks are removed when the context ends.
    """
    register = nn.Module.register_forward_pre_hook if before else nn.Module.register_forward_hook
    with _removed_at_exit(register(module, hook, with_kwargs=with_kwargs) for module, hook in hooks):
        yield


def install_forward_pre_hook(module: nn.Module, hook: Hook, *, with_kwargs: bool = False) -> None:
    """Call a hook before every forward pass of a module from now on; a hook is installed only once.

    Args:
        module: Module that keeps the hook for as long as it exists.
        hook: The hook.
        with_kwargs: Whether the hook gets the keyword arguments of the forward pass too.
    """
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)


@contextmanager
def gradient_hooks(hooks: Iterable[tuple[Tensor, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Call each hook in the backward pass, when the gradient of its tensor is accumulated in `.grad`.

    Args:
        hooks: Pairs of a leaf tensor that requires a gradient, and its hook.

    Yields:
        Nothing; the hooks are removed when the context ends.
    """
    with _removed_at_exit(tensor.register_post_accumulate_grad_hook(hook) for tensor, hook in hooks):
        yield


@contextmanager
def capture_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the first positional argument of each module's forward pass, by the module's name.

    Args:
        modules: Modules by name.

    Yields:
        A dict filled while the context lasts, in order of execution; a second call of a module replaces its entry.
    """
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0]

        return hook

    with forward_hooks(((module, recorder(name)) for name, module in modules.items()), before=True):
        yield inputs


@contextmanager
def capture_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Record the output of each module's forward pass, by the module's name.

    Args:
        modules: Modules by name.

    Yields:
        A dict filled while the context lasts, in order of execution; a second call of a module replaces its entry.
    """
    outputs: dict[str, Any] = {}

    def recorder(name: str) -> Hook:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            outputs[name] = output

        return hook

    with forward_hooks((module, recorder(name)) for name, module in modules.items()):
        yield outputs


@contextmanager
def patched_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the `forward` of some module instances; hooks of the modules still run.

    Args:
        forwards: Pairs of a module and the function called in place of its `forward`, without the module as argument.

    Yields:
        Nothing; each module gets its earlier `forward` back when the context ends (an earlier patch, or its class's).
    """
    earlier: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module, forward in forwards:
            earlier.append((module, vars(module).get("forward")))
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward_before in reversed(earlier):
            if forward_before is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward_before


@contextmanager
def watched_weights(module: nn.Module) -> Iterator[set[str]]:
    """Find linears whose weight is read by other code than their own forward pass.

    Args:
        module: Module that contains the linears; their classes are others while the context lasts.

    Yields:
        The names of the linears, filled while the context lasts.
    """
    read: set[str] = set()
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    classes = {n: type(m) for n, m in linears.items()}
    try:
        for name, linear in linears.items():
            linear.__class__ = _watching(type(linear), name, read)
        yield read
    finally:
        for name, linear in linears.items():
            linear.__class__ = classes[name]


@contextmanager
def watched_mappings(mappings: Iterable[UserDict[Any, Any]]) -> Iterator[set[Any]]:
    """Find the keys under which mappings are read.

    Args:
        mappings: The mappings; their classes are others while the context lasts.

    Yields:
        The keys, filled while the context lasts.
    """
    read: set[Any] = set()
    classes = {id(mapping): (mapping, type(mapping)) for mapping in mappings}

    def watching(kind: type[UserDict[Any, Any]]) -> type[UserDict[Any, Any]]:
        class Watched(kind):  # type: ignore[misc,valid-type]
            def __getitem__(self, key: Any) -> Any:
                read.add(key)
                return super().__getitem__(key)

        return Watched

    try:
        for mapping, kind in classes.values():
            mapping.__class__ = watching(kind)
        yield read
    finally:
        for mapping, kind in classes.values():
            mapping.__class__ = kind


def _watching(kind: type[nn.Linear], name: str, read: set[str]) -> type[nn.Linear]:
    """Make a class of linears that adds the name to `read` when its weight is read outside of `forward`."""
    computing = False

    class Watched(kind):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal computing
            computing = True
            try:
                return super().forward(*args, **kwargs)
            finally:
                computing = False

        def __getattr__(self, attribute: str) -> Any:
            if attribute == "weight" and not computing:
                read.add(name)
            return super().__getattr__(attribute)

    return Watched


@contextmanager
def _removed_at_exit(registrations: Iterable[_Handle]) -> Iterator[None]:
    """Take the handles of hooks as they are registered, and remove all of them when the context ends."""
    handles: list[_Handle] = []
    try:
        handles.extend(registrations)
        yield
    finally:
        for handle in handles:
            handle.remove()
