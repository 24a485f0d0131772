"""Passes: one forward pass a batch, halted at the taps, shows what passes begun anew would show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from artifacts import original, tokens
from laconic.calibrate.passes import Passes
from laconic.calibrate.stream import Stream
from laconic.structure.anatomy import Anatomy, dissect
from laconic.structure.calls import BlockCall, capture_calls
from tiny import make_model

IDS = tokens(6, 24)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[nn.Module, Anatomy, BlockCall, Stream]:
    model = original(make_model(tmp_path / "model", dtype=torch.float32))
    anatomy = dissect(model)
    hidden, calls = capture_calls(model, anatomy.blocks, input_ids=IDS)
    return model.get_submodule(anatomy.block_name(0)), anatomy, calls[0], Stream(hidden.clone(), batch=4)


@pytest.mark.parametrize("held", [True, False], ids=["held", "anew"])
@torch.no_grad()
def test_what_is_changed_before_a_tap_is_seen_behind_it(
    parts: tuple[nn.Module, Anatomy, BlockCall, Stream], held: bool
) -> None:
    block, anatomy, call, stream = parts
    taps = anatomy.taps[0]
    before = stream.hidden.clone()
    with Passes(block, taps, call, stream, torch.device("cpu"), held) as passes:
        for tap in taps:
            seen = torch.cat([x for _, x in passes.inputs([tap])])
            expected = list[torch.Tensor]()
            handle = block.get_submodule(tap.linears[0]).register_forward_pre_hook(
                lambda _, args, into=expected: into.append(args[0])
            )
            # The pass that checks must not halt: it runs where nobody waits.
            forwards = {n: m.__dict__.pop("forward", None) for n, m in block.named_modules()}
            call(block, before)
            for name, forward in forwards.items():
                if forward:
                    block.get_submodule(name).forward = forward
            handle.remove()
            assert torch.equal(seen, expected[0])
            for name in tap.linears:
                block.get_submodule(name).weight.data *= 0.5
        passes.finish()
    assert torch.equal(stream.hidden, torch.cat([call(block, b) for b in before.split(4)]))


@torch.no_grad()
def test_a_replaced_linear_is_the_one_that_runs(parts: tuple[nn.Module, Anatomy, BlockCall, Stream]) -> None:
    block, anatomy, call, stream = parts
    before = stream.hidden.clone()
    tap = anatomy.taps[0][2]
    with Passes(block, anatomy.taps[0], call, stream, torch.device("cpu"), resume=True) as passes:
        assert len(list(passes.inputs([tap]))) == 2
        old = block.mlp.gate_proj
        block.mlp.gate_proj = nn.Linear(old.in_features, old.out_features, bias=False)
        passes.finish()
    assert torch.equal(stream.hidden, torch.cat([call(block, b) for b in before.split(4)]))


@torch.no_grad()
def test_through_passes_on_what_it_shows(parts: tuple[nn.Module, Anatomy, BlockCall, Stream]) -> None:
    block, anatomy, call, stream = parts
    before = stream.hidden.clone()
    with Passes(block, anatomy.taps[0], call, stream, torch.device("cpu"), resume=False) as passes:
        seen = [tap for tap, _ in passes.inputs_and_advance(anatomy.taps[0])]
    assert seen == [*anatomy.taps[0], *anatomy.taps[0]]
    assert torch.equal(stream.hidden, torch.cat([call(block, b) for b in before.split(4)]))


@torch.no_grad()
def test_closed_passes_leave_no_trace(parts: tuple[nn.Module, Anatomy, BlockCall, Stream]) -> None:
    block, anatomy, call, stream = parts
    expected = call(block, stream.hidden)
    with Passes(block, anatomy.taps[0], call, stream, torch.device("cpu"), resume=True) as passes:
        next(passes.inputs([anatomy.taps[0][1]]))
    assert all("forward" not in vars(m) for m in block.modules())
    assert torch.equal(call(block, stream.hidden), expected)
