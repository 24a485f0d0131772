"""Find what reads and writes the residual stream of a model, by trying it.

No architecture is named. In a block whose linears all return zeros, a norm whose input is the block's input reads the
stream; a linear that changes the block's output when it alone returns something else writes it. Then the rotated block
must compute what the block does, in float32 with random weights; the same is asked of what surrounds the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from laconic.solvers.orthogonal import Rotation, make_rotation
from laconic.structure.anatomy import Anatomy, Tap, block_signature, linears_of
from laconic.structure.blank import zero_embeddings
from laconic.structure.calls import BlockCall, capture_calls
from laconic.structure.experts import Experts
from laconic.structure.hooks import StopForward, capture_inputs, capture_outputs, patched_forwards
from laconic.structure.links import Link, copy_with_random_weights, find_links, has_offset, head_widths
from laconic.structure.stream import (
    BlockStream,
    ResidualStream,
    StreamNorm,
    ValueHeads,
    rotate_block,
    rotate_readers,
    rotate_rows,
    rotate_values,
)

# Largest relative deviation of a rotated block. Rounding in float32 makes some 1e-6; what does not commute with a
# rotation makes a tenth and more.
_TOLERANCE = 1e-3


@torch.no_grad()
def find_residual_stream(model: PreTrainedModel, anatomy: Anatomy) -> ResidualStream:
    """Find what reads and writes the residual stream of a model, and verify that it can be rotated.

    Args:
        model: The model; its parameters may be on the meta device.
        anatomy: Its blocks and head.

    Returns:
        The parts that read or write it.

    Raises:
        ValueError: The model would compute something else with a rotated stream; the message says where.
    """
    if anatomy.obstacle:
        raise _unsupported(model, f"its blocks {anatomy.obstacle}")
    try:
        return _find(model, anatomy)
    except _Unsupported:
        raise
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else repr(e)
        raise _unsupported(model, f"it cannot be tried ({reason})") from e


def _find(model: PreTrainedModel, anatomy: Anatomy) -> ResidualStream:
    hidden, calls = capture_calls(model, anatomy.blocks, inputs_embeds=zero_embeddings(model, 1, 4))
    width = hidden.shape[-1]
    if zero_embeddings(model, 1, 1).shape[-1] != width:
        raise _unsupported(model, "its embeddings have another width than its blocks")
    by_signature: dict[Any, BlockStream] = {}
    blocks = []
    links = find_links(model, anatomy)
    children = model.get_submodule(anatomy.blocks).children()
    for block, call, taps, of_block in zip(children, calls, anatomy.taps, links, strict=True):
        # Parameters of the block itself, such as a bias that is added to the stream, are in no module's description.
        signature = block_signature(block, taps), tuple((n, p.shape) for n, p in block.named_parameters())
        if signature not in by_signature:
            trial = _StreamTrialBlock(block, call, width)
            parts = trial.find(taps, of_block, head_widths(model))
            if parts is None or not trial.preserves_output(parts):
                raise _unsupported(
                    model, "its blocks compute something else then (such as by a norm or a scale after a sublayer)"
                )
            by_signature[signature] = parts
        blocks.append(by_signature[signature])
    centred = blocks[0].centred
    embeddings, final_norm = _Ends(model, anatomy, width).find(centred)
    if any(b.centred != centred for b in blocks):
        raise _unsupported(model, "some of its norms subtract the mean, and others do not")
    return ResidualStream(width, tuple(blocks), embeddings, final_norm, centred)


class _Unsupported(ValueError):
    """A model whose residual stream cannot be rotated."""


def _unsupported(model: PreTrainedModel, reason: str) -> _Unsupported:
    kind = model.config.model_type
    return _Unsupported(f"the residual stream of '{kind}' cannot be rotated: {reason}; leave rotate out")


class _StreamTrialBlock:
    """A block with random weights, on which candidates are tried.

    Args:
        block: The block.
        call: Arguments with which the model calls it.
        width: Channels of the residual stream.
    """

    def __init__(self, block: nn.Module, call: BlockCall, width: int) -> None:
        self.block = copy_with_random_weights(block).float()
        generator = torch.Generator().manual_seed(0)
        _draw_norm_weights(self.block, generator)
        to_float = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        self.call = replace(call, args=tree_map(to_float, call.args), kwargs=tree_map(to_float, call.kwargs))
        self.hidden = torch.randn(1, 4, width, generator=generator)
        self.output = self.call(self.block, self.hidden)

    def find(self, taps: Sequence[Tap], links: Mapping[Tap, Link], heads: Sequence[int]) -> BlockStream | None:
        """Find the parts of the block; None if no norm reads the stream, or something but its linears writes it.

        Args:
            taps: Of the block.
            links: Of its taps.
            heads: Widths that a head may have.
        """
        linears = linears_of(self.block)
        readers: dict[str, dict[str, None]] = {}
        offsets = {link.source: link.offset for link in links.values()}
        for link in links.values():
            if link.is_norm:
                readers.setdefault(link.source, {}).update(dict.fromkeys(link.readers))
        silent = {name: _constant(torch.zeros(linear.out_features)) for name, linear in linears.items()}
        with capture_inputs({n: self.block.get_submodule(n) for n in readers}) as inputs:
            if not torch.equal(self._run(silent), self.hidden):
                return None
        norms = tuple(
            StreamNorm(source, tuple(names), offsets[source])
            for source, names in readers.items()
            if torch.equal(inputs[source].flatten(), self.hidden.flatten())
        )
        if not norms:
            return None
        read = {n for norm in norms for n in norm.readers}
        downs = _down_projections(self.block)
        constant = torch.randn(self.hidden.shape[-1], generator=torch.Generator().manual_seed(1))
        experts = {n for tap in taps if tap.experts for n in tap.linears}
        writers = [
            name
            for name, linear in linears.items()
            if name in downs
            or (
                name not in experts | read
                and linear.out_features == len(constant)
                and not torch.equal(self._run({**silent, name: _constant(constant)}), self.hidden)
            )
        ]
        centred = all(_subtracts_mean(self.block.get_submodule(norm.source)) for norm in norms)
        return BlockStream(norms, tuple(writers), self._value_heads(links, heads), centred)

    def preserves_output(self, parts: BlockStream) -> bool:
        """Rotate the block, and return whether it computes the same; it is not used afterwards.

        Args:
            parts: What reads and writes the residual stream.
        """
        rotation = make_rotation(self.hidden.shape[-1], "hadamard", 0, keep_mean=parts.centred)
        rotate_block(self.block, parts, rotation, None)
        hidden, expected = (_rotated(x, rotation, parts.centred) for x in (self.hidden, self.output))
        return self._is_near(self.call(self.block, hidden), expected)

    def _value_heads(self, links: Mapping[Tap, Link], widths: Sequence[int]) -> ValueHeads | None:
        for tap, link in links.items():
            if link.channels is None or tap.experts:
                continue
            for d in widths:
                if len(link.channels) % d:
                    continue
                heads = link.channels.view(-1, d)
                values = ValueHeads(link.source, link.readers, link.channels, d)
                if torch.equal(heads, heads[:, :1] + torch.arange(d)) and self._preserves_values(values):
                    return values
        return None

    def _preserves_values(self, values: ValueHeads) -> bool:
        before = {p: p.data for n in (values.source, *values.readers) for p in self.block.get_submodule(n).parameters()}
        try:
            rotate_values(self.block, values, make_rotation(values.width, "hadamard", 0))
            return self._is_near(self.call(self.block, self.hidden), self.output)
        finally:
            for parameter, data in before.items():
                parameter.data = data

    def _is_near(self, output: Tensor, expected: Tensor) -> bool:
        written = (self.output - self.hidden).square().mean()
        return bool((output - expected).square().mean() < _TOLERANCE**2 * written)

    def _run(self, outputs: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """Run the block with other forwards of its linears, by name."""
        with patched_forwards((self.block.get_submodule(n), forward) for n, forward in outputs.items()):
            return self.call(self.block, self.hidden)


class _Ends:
    """Modules around the blocks, with random weights: embeddings of positions, the final norm.

    Args:
        model: The model.
        anatomy: Its blocks and head.
        width: Channels of the residual stream.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, width: int) -> None:
        self.model, self.anatomy = copy.deepcopy(model), anatomy
        generator = torch.Generator().manual_seed(0)
        inside = f"{anatomy.blocks}."
        ends = {self.model.get_input_embeddings(), self.model.get_submodule(anatomy.head)}
        self.outside = {n: m for n, m in self.model.named_modules() if not f"{n}.".startswith(inside) and m not in ends}
        for module in self.outside.values():
            for name, parameter in list(module.named_parameters(recurse=False)):
                noise = torch.randn(parameter.shape, generator=generator)
                setattr(module, name, nn.Parameter(noise, requires_grad=False))
            _draw_norm_weights(module, generator, recurse=False)
        self.embeddings = torch.randn(1, 4, width, generator=generator)
        self.head = nn.Linear(width, 8, bias=self.model.get_submodule(anatomy.head).bias is not None)

    def find(self, centred: bool) -> tuple[tuple[str, ...], StreamNorm]:
        """Find the embeddings and the final norm, and verify that they can be rotated.

        Args:
            centred: Whether the norms of the blocks subtract the mean.

        Returns:
            Names of the embeddings that write the stream, and the final norm.

        Raises:
            ValueError: The model would compute something else.
        """
        norms = {n: m for n, m in self.outside.items() if _is_norm(m)}
        width = self.embeddings.shape[-1]
        with capture_outputs(norms) as outputs:
            hidden, final = self._run(self.embeddings)
        finals = [n for n, y in outputs.items() if isinstance(y, Tensor) and y.data_ptr() == final.data_ptr()]
        if len(finals) != 1:
            raise _unsupported(self.model, "no norm comes right before its head")
        offset = has_offset(norms[finals[0]])
        if offset is None:
            raise _unsupported(self.model, "the norm before its head takes more than one tensor")
        logits = self.head(final)
        norm = StreamNorm(finals[0], (self.anatomy.head,), offset)
        tables = [n for n, m in self.outside.items() if isinstance(m, nn.Embedding) and m.weight.shape[1] == width]
        rotation = make_rotation(width, "hadamard", 0, keep_mean=centred)
        for name in tables:
            table = self.outside[name].get_parameter("weight")
            table.data = rotate_rows(table.data, rotation, centre=centred)
        rotate_readers(norms[norm.source], norm.offset, [self.head], rotation)
        rotated_hidden, rotated_final = self._run(_rotated(self.embeddings, rotation, centred))
        expected = _rotated(hidden, rotation, centred)
        for output, target in ((rotated_hidden, expected), (self.head(rotated_final), logits)):
            if (output - target).square().mean() > _TOLERANCE**2 * target.square().mean():
                raise _unsupported(self.model, "what surrounds its blocks computes something else then")
        embed = self.model.get_input_embeddings()
        return (next(n for n, m in self.model.named_modules() if m is embed), *tables), norm

    def _run(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the first block and of the head, where blocks return their input."""
        blocks = list(self.model.get_submodule(self.anatomy.blocks).children())
        first: list[Tensor] = []

        def bypass(hidden: Tensor, *_: Any, **__: Any) -> Any:
            first.append(hidden)
            return (hidden, *[None] * (self.anatomy.outputs - 1)) if self.anatomy.outputs else hidden

        def skip_head(_: Tensor) -> None:
            raise StopForward

        head = self.model.get_submodule(self.anatomy.head)
        skipped: list[tuple[nn.Module, Callable[..., Any]]] = [*((b, bypass) for b in blocks), (head, skip_head)]
        with capture_inputs({"head": head}) as inputs, patched_forwards(skipped), suppress(StopForward):
            self.model(inputs_embeds=embeddings, use_cache=False)
        return first[0], inputs["head"]


def _rotated(x: Tensor, rotation: Rotation, centre: bool) -> Tensor:
    return rotation.apply(x - x.mean(-1, keepdim=True) if centre else x)


def _constant(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the forward of a linear whose output is a constant."""
    return lambda x: value.expand(*x.shape[:-1], -1).clone()


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


def _norms_of(module: nn.Module, recurse: bool) -> Iterator[nn.Module]:
    return (m for m in (module.modules() if recurse else [module]) if _is_norm(m))


def _draw_norm_weights(module: nn.Module, generator: torch.Generator, *, recurse: bool = True) -> None:
    """Draw weights of norms from 0.5 to 1.5."""
    for norm in _norms_of(module, recurse):
        weight = norm.get_parameter("weight")
        weight.data = torch.rand(weight.shape, generator=generator) + 0.5


def _subtracts_mean(norm: nn.Module) -> bool:
    """Return whether a norm subtracts the mean of its input: a constant added to the input changes nothing."""
    n = norm.get_parameter("weight").numel()
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
    return torch.allclose(norm(x), norm(x + 1), atol=1e-3)


def _down_projections(block: nn.Module) -> set[str]:
    """Return the names of linears that compute the output of experts."""
    return {
        f"{name}.{i}.{experts.names.down}"
        for name, experts in block.named_modules()
        if isinstance(experts, Experts)
        for i in range(experts.num_experts)
    }
