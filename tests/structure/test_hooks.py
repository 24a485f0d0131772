"""Hooks and patched forwards restore their modules, whatever happens inside."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import laconic
from laconic.structure.hooks import (
    StopForward,
    capture_inputs,
    capture_outputs,
    forward_hooks,
    gradient_hooks,
    install_forward_pre_hook,
    patched_forwards,
)

X = torch.ones(1, 2)


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_captured_tensors_are_those_that_pass(net: nn.Sequential) -> None:
    names = dict(net.named_children())
    with capture_inputs(names) as inputs, capture_outputs(names) as outputs:
        y = net(X)
    assert inputs["0"] is X
    assert inputs["1"] is outputs["0"]
    assert outputs["1"] is y
    net(2 * X)
    assert inputs["0"] is X


def test_hooks_are_removed_after_an_error(net: nn.Sequential) -> None:
    def stop(*_: object) -> None:
        raise StopForward

    pre_hooks, hooks = [(net[1], stop)], [(net[0], lambda *_: None)]
    with suppress(StopForward), forward_hooks(pre_hooks, before=True), forward_hooks(hooks):
        net(X)
    assert not net[1]._forward_pre_hooks
    assert not net[0]._forward_hooks


def test_those_already_set_are_removed_when_a_later_one_cannot_be(net: nn.Sequential) -> None:
    with pytest.raises(AttributeError), forward_hooks([(net[0], print), (None, print)]):
        pass
    assert not net[0]._forward_hooks
    with pytest.raises(TypeError), patched_forwards([(net[0], print), (None, print)]):
        pass
    assert "forward" not in vars(net[0])


def test_nested_patches_are_undone_one_by_one(net: nn.Sequential) -> None:
    plain = net(X)
    with patched_forwards([(net[1], lambda x: x + 1)]):
        with patched_forwards([(net[1], lambda x: x + 2)]):
            assert torch.equal(net(X), net[0](X) + 2)
        assert torch.equal(net(X), net[0](X) + 1)
    assert torch.equal(net(X), plain)


def test_gradient_hooks_run_once_a_gradient_is_there(net: nn.Sequential) -> None:
    gradients = []
    with gradient_hooks([(net[0].weight, lambda p: gradients.append(p.grad))]):
        net(X).sum().backward()
    net(X).sum().backward()
    assert len(gradients) == 1
    assert gradients[0] is not None


def test_hooks_and_patched_forwards_are_set_in_one_module() -> None:
    setting = re.compile(r"register_(full_)?(forward|backward)\w*hook|\.forward = |\[\"forward\"\] = ")
    package = Path(laconic.__file__).parent
    files = {f.relative_to(package) for f in package.rglob("*.py") if setting.search(f.read_text())}
    assert files == {Path("structure/hooks.py")}


def test_an_installed_hook_stays_and_is_installed_once(net: nn.Sequential) -> None:
    calls: list[dict[str, object]] = []

    def hook(_: nn.Module, args: object, kwargs: dict[str, object]) -> None:
        calls.append(kwargs)

    for _ in range(2):
        install_forward_pre_hook(net, hook, with_kwargs=True)
    net(X)
    assert calls == [{}]
