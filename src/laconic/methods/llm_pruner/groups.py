"""Dependency groups: rows and columns of a block's linears that must be removed together.

A group consists of units. A unit of an MLP is a channel: a row of gate and of up, and a column of down. A unit of
attention is a key-value head with the query heads that share it (rows of q, k and v, columns of o), or a query head
alone where all share one key-value head. All experts of a layer have one width, so a unit of theirs is a channel of
each; which channels of different experts form a unit is free (`match_channels`).

No architecture is named: candidates are proposed by shape, and each is verified on the block with random weights. With
half of the units removed, and the keys of the config changed to match, transformers must build a block of the same
shapes, and this block must compute what the whole block does when the columns that read the removed units are zero.

If no key of the config sets the total width of all heads, the width is the hidden size; then a key of the attention
alone sets it (`self_attn.hidden_size`, see `structure.widths`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from laconic.checkpoint.layout import unwrap_conv1d
from laconic.structure.anatomy import Anatomy, Tap, block_signature, linear_at
from laconic.structure.calls import BlockCall, capture_without_weights
from laconic.structure.config_keys import WIDTHS
from laconic.structure.experts import Experts, unstack_experts_like
from laconic.structure.links import copy_with_random_weights, head_widths
from laconic.structure.widths import build_block

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = ("attention", "mlp")


@dataclass(frozen=True, eq=False)
class Slice:
    """Rows or columns of one linear that belong to each unit of a group.

    Attributes:
        linear: Name of the linear within the block.
        axis: 0 for rows (and the bias), 1 for columns.
        channels: (units, n) indices of the rows or columns of each unit.
    """

    linear: str
    axis: int
    channels: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """A dependency group of a block.

    Attributes:
        kind: `attention` or `mlp`.
        slices: Rows and columns of each linear; the linear that reads the units is last.
        keys: Config keys that set the width, and the amount of each per unit (`num_attention_heads: 4` if four query
            heads share a key-value head). The key of a submodule alone has its name in front
            (`self_attn.hidden_size`).
        fixed_keys: Config keys that must be set beside them, since their default would follow from `keys`.
        heads: Query heads of a unit; 0 for an MLP.
        kv_heads: Key-value heads of a unit; 0 if all units share one.
    """

    kind: Kind
    slices: tuple[Slice, ...]
    keys: Mapping[str, int]
    fixed_keys: Mapping[str, int]
    heads: int = 0
    kv_heads: int = 0

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.slices[0].channels)

    def unit_size(self, block: nn.Module) -> int:
        """Count the weights of a unit.

        Args:
            block: The block of the group.

        Returns:
            Number of weights; biases do not count.
        """
        return sum(s.channels.shape[1] * linear_at(block, s.linear).weight.shape[1 - s.axis] for s in self.slices)

    @property
    def by_module(self) -> dict[str, tuple[Slice, ...]]:
        """Slices by the module that contains their linears: one module, or each expert."""
        slices: dict[str, tuple[Slice, ...]] = {}
        for s in self.slices:
            name = parent_name(s.linear)
            slices[name] = (*slices.get(name, ()), s)
        return slices

    def widths(self, units: int) -> dict[str, int]:
        """Return the values of the config keys when some units remain.

        Args:
            units: Number of units that remain.
        """
        return {**{key: amount * units for key, amount in self.keys.items()}, **self.fixed_keys}

    @property
    def fits_stock_config(self) -> bool:
        """Whether keys of a stock config can set the width."""
        return not any("." in key for key in self.keys)


def find_groups(
    model: PreTrainedModel, anatomy: Anatomy, kinds: Sequence[Kind] = KINDS
) -> tuple[tuple[Group, ...], ...]:
    """Find the dependency groups of every block.

    Args:
        model: The model; its parameters may be on the meta device.
        anatomy: Its blocks and taps.
        kinds: Kinds of groups to find.

    Returns:
        The groups of each block: at most one of attention, one of the MLP and one of experts.
    """
    hidden, calls = capture_without_weights(model, anatomy.blocks)
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    by_signature: dict[Any, tuple[Group, ...]] = {}
    groups = []
    for i, (block, call, taps) in enumerate(zip(blocks, calls, anatomy.taps, strict=True)):
        signature = block_signature(block, taps)
        if signature not in by_signature:
            trial = _GroupTrialBlock(model, i, block, call, hidden.shape[-1])
            by_signature[signature] = tuple(g for kind in kinds for g in _verified_groups(kind, trial, taps))
        groups.append(by_signature[signature])
    return tuple(groups)


def match_channels(group: Group, importance: Mapping[str, Tensor]) -> Group:
    """Form the units of experts anew: a unit consists of the channels of equal rank by importance in every module.

    Args:
        group: A group of several modules (experts).
        importance: Importance of the channels of each module, in the order of its slices.

    Returns:
        The group with its new units, the most important first.
    """
    slices = []
    for name, module_slices in group.by_module.items():
        order = importance[name].argsort(descending=True, stable=True).cpu()
        slices += [replace(s, channels=s.channels.flatten()[order].view_as(s.channels)) for s in module_slices]
    return replace(group, slices=tuple(slices))


def remove_units(tensors: Mapping[str, Tensor], group: Group, keep: Tensor) -> dict[str, Tensor]:
    """Remove units of a group from the parameters of a block.

    Args:
        tensors: Parameters of the block, by name within it.
        group: The group.
        keep: (units,) bool, units that remain.

    Returns:
        All parameters of the block.
    """
    out = dict(tensors)
    for s in group.slices:
        for leaf in ("weight", "bias") if s.axis == 0 else ("weight",):
            name = f"{s.linear}.{leaf}"
            if name in out:
                mask = torch.ones(out[name].shape[s.axis], dtype=torch.bool)
                mask[s.channels[~keep.cpu()].flatten()] = False
                out[name] = out[name].index_select(s.axis, mask.nonzero()[:, 0].to(out[name].device))
    return out


def parent_name(linear: str) -> str:
    """Return the name of the module that contains a linear.

    Args:
        linear: Name of the linear within the block.
    """
    return linear.rpartition(".")[0]


class _GroupTrialBlock:
    """A block with random weights, on which candidates are verified.

    Args:
        model: The model of the block.
        number: Number of the block.
        block: The block.
        call: Arguments with which the model calls it.
        width: Hidden size.
    """

    def __init__(self, model: PreTrainedModel, number: int, block: nn.Module, call: BlockCall, width: int) -> None:
        self.number, self.config, self.heads = number, model.config, head_widths(model)
        self.block = copy_with_random_weights(block).float()
        to_float = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        self.call = BlockCall(tree_map(to_float, call.args), tree_map(to_float, call.kwargs))
        self.hidden = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
        self.widths = dict((getattr(model.config, WIDTHS, None) or {number: {}})[number])
        with torch.no_grad():
            self.output = self.call(self.block, self.hidden)

    def output_with_zeros(self, slices: Sequence[Slice], keep: Tensor) -> Tensor:
        """Compute the block's output when the columns that read units outside `keep` are zero."""
        readers = {linear_at(self.block, s.linear): s for s in slices if s.axis == 1}
        weights = {linear: linear.weight.data for linear in readers}
        for linear, s in readers.items():
            linear.weight.data = weights[linear].clone()
            linear.weight.data[:, s.channels[~keep].flatten()] = 0
        try:
            return self.call(self.block, self.hidden)
        finally:
            for linear, weight in weights.items():
                linear.weight.data = weight

    def build(self, widths: Mapping[str, int], tensors: Mapping[str, Tensor]) -> nn.Module | None:
        """Build the block with other widths, and put tensors in it; None if transformers builds other shapes."""
        from accelerate import init_empty_weights

        try:
            with init_empty_weights(include_buffers=False):
                block = build_block(type(self.block), self.config, {**self.widths, **widths}, self.number)
        except Exception:  # each architecture raises errors of its own for widths that it does not support
            return None
        unwrap_conv1d(block)
        unstack_experts_like(block, self.block)
        if {n: p.shape for n, p in block.named_parameters()} != {n: t.shape for n, t in tensors.items()}:
            return None
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
        return block.eval()

    def keys_with_values(self, values: set[int], module: str = "") -> dict[str, int]:
        """List the config keys that have one of these values, for the block or for one of its modules."""
        widths = {k.removeprefix(f"{module}."): v for k, v in self.widths.items() if k.rpartition(".")[0] == module}
        return {k: v for k, v in {**self.config.to_dict(), **widths}.items() if type(v) is int and v in values}

    def unset_keys(self) -> list[str]:
        """List the config keys without a value; each may have a default that depends on others."""
        return [k for k, v in {**self.config.to_dict(), **self.widths}.items() if v is None]


@dataclass(frozen=True)
class _Candidate:
    """Slices that may form a group; attributes as of `Group`."""

    slices: tuple[Slice, ...]
    heads: int = 0
    kv_heads: int = 0


@torch.no_grad()
def _verified_groups(kind: Kind, trial: _GroupTrialBlock, taps: Sequence[Tap]) -> Iterator[Group]:
    """Find the first verified group of the block's linears outside experts, and that of its experts."""
    plain = [
        candidate
        for number, tap in enumerate(taps)
        if len(tap.linears) == 1 and not tap.experts
        for candidate in _candidates(kind, trial, taps[:number], tap.linears[0])
    ]
    for candidates in (plain, _expert_candidates(trial, plain) if kind == "mlp" else ()):
        if group := next((g for c in candidates if (g := _verify(kind, trial, c))), None):
            yield group


def _candidates(kind: Kind, trial: _GroupTrialBlock, earlier: Sequence[Tap], reader: str) -> Iterator[_Candidate]:
    """Propose groups whose units a linear reads, by the shapes of the linears before it."""
    width = linear_at(trial.block, reader).in_features
    for tap in reversed(earlier):
        outs = {n: linear_at(trial.block, n).out_features for n in tap.linears}
        if kind == "attention":
            # An MLP parallel to the attention may read the same tensor.
            siblings = {n: out for n, out in outs.items() if parent_name(n) == parent_name(reader)}
            yield from _head_candidates(siblings, reader, width, trial.heads)
        elif not tap.experts:
            channels = torch.arange(width)[:, None]
            columns = Slice(reader, 1, channels)
            same_width = [n for n, out in outs.items() if out == width]
            if 1 <= len(same_width) <= 2:
                yield _Candidate((*(Slice(n, 0, channels) for n in same_width), columns))
            for fused in (n for n, out in outs.items() if out == 2 * width):  # gate and up in one linear
                yield _Candidate((Slice(fused, 0, torch.cat([channels, width + channels], 1)), columns))


def _expert_candidates(trial: _GroupTrialBlock, plain: Sequence[_Candidate]) -> Iterator[_Candidate]:
    """Propose all experts of a layer, alone and with a shared MLP whose width the same key may set."""
    for path, experts in trial.block.named_modules():
        if isinstance(experts, Experts):
            width, channels = experts.intermediate, torch.arange(experts.intermediate)[:, None]
            axes = [(name, int(name == experts.names.down)) for name in experts.stacking.linears]
            numbers = range(experts.num_experts)
            slices = tuple(Slice(f"{path}.{i}.{name}", axis, channels) for i in numbers for name, axis in axes)
            yield _Candidate(slices)
            for shared in plain:
                if all(s.channels.shape[1] == 1 and len(s.channels) % width == 0 for s in shared.slices):
                    shared_slices = (replace(s, channels=s.channels.view(width, -1)) for s in shared.slices)
                    yield _Candidate((*slices, *shared_slices))


def _head_candidates(
    outs: Mapping[str, int], reader: str, width: int, head_dims: Sequence[int]
) -> Iterator[_Candidate]:
    """Propose groups of heads, for queries, keys and values in three linears or in one."""
    for d in head_dims:
        if width % d or any(out % d for out in outs.values()):
            continue
        heads, counts = width // d, {n: out // d for n, out in outs.items()}
        kv_heads, rest = divmod(sum(counts.values()) - heads, 2)
        separate = sorted(counts.values()) == sorted((heads, kv_heads, kv_heads))
        if rest or kv_heads < 1 or heads % kv_heads or heads == 1 or not (separate or len(counts) == 1):
            continue
        units = kv_heads if kv_heads > 1 else heads
        if kv_heads == 1:
            # The only key-value head remains.
            queries = next(n for n, count in counts.items() if count >= heads)
            layouts = [{queries: _head_channels(heads, units, d)}]
        elif separate:
            layouts = [{n: _head_channels(count, units, d) for n, count in counts.items()}]
        else:
            (fused,) = counts
            starts = ((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads))
            concatenated = torch.cat([start * d + _head_channels(count, units, d) for start, count in starts], 1)
            interleaved = _head_channels(heads + 2 * kv_heads, units, d)
            layouts = [{fused: concatenated}, {fused: interleaved}]
        columns = Slice(reader, 1, _head_channels(heads, units, d))
        for rows in layouts:
            slices = (*(Slice(n, 0, channels) for n, channels in rows.items()), columns)
            yield _Candidate(slices, heads // units, int(kv_heads > 1))


def _head_channels(heads: int, units: int, d: int) -> Tensor:
    """List the channels of heads of width d by unit: (units, channels of a unit)."""
    return torch.arange(heads * d).view(units, -1)


def _verify(kind: Kind, trial: _GroupTrialBlock, candidate: _Candidate) -> Group | None:
    """Find config keys with which a block without some units computes the same; None if there are none."""
    units = len(candidate.slices[0].channels)
    # The first unit is removed, so that all others move.
    keep = torch.rand(units, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[0], keep[-1] = False, True
    expected = trial.output_with_zeros(candidate.slices, keep)
    if torch.equal(expected, trial.output):
        return None
    without_keys = Group(kind, candidate.slices, {}, {}, candidate.heads, candidate.kv_heads)
    tensors = remove_units({n: p.data for n, p in trial.block.named_parameters()}, without_keys, keep)
    for keys, fixed_keys in _key_choices(trial, candidate, units):
        group = replace(without_keys, keys=keys, fixed_keys=fixed_keys)
        block = trial.build(group.widths(int(keep.sum())), tensors)
        if block is not None and _close(_run_copy(trial, block), expected):
            return group
    return None


def _key_choices(
    trial: _GroupTrialBlock, candidate: _Candidate, units: int
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Propose `keys` and `fixed_keys` of a group: one or two config keys whose values match its number of units."""
    values = {units, units * max(1, candidate.heads)}
    matching = trial.keys_with_values(values)
    # A key without a value has a default, which then equals the number of units.
    for names in [*((k,) for k in matching), *combinations(matching, 2), *((k,) for k in trial.unset_keys())]:
        keys = {k: matching.get(k, units) // units for k in names}
        yield keys, {}
        if candidate.heads:
            yield keys, {"head_dim": candidate.slices[-1].channels.shape[1] // candidate.heads}
    if candidate.heads and (module := parent_name(candidate.slices[-1].linear)):
        channels = candidate.slices[-1].channels
        matching = trial.keys_with_values(values, module)
        width_keys = trial.keys_with_values({channels.numel()}, module)
        for names, width in product([*((k,) for k in matching), *combinations(matching, 2)], width_keys):
            keys = {f"{module}.{k}": matching[k] // units for k in names}
            yield {**keys, f"{module}.{width}": channels.shape[1]}, {}


def _run_copy(trial: _GroupTrialBlock, block: nn.Module) -> Tensor | None:
    """Run a copy of a block on the trial's input; None if it fails."""
    try:
        return trial.call(copy.deepcopy(block), trial.hidden)
    except Exception:  # the block uses the number of heads elsewhere, and raises an error of its own
        return None


def _close(a: Tensor | None, b: Tensor) -> bool:
    """Return whether two outputs are equal up to the rounding of float32."""
    return a is not None and a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())
