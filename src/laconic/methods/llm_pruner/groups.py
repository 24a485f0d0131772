"""Dependency groups: what of a block must go together, so that it can be narrower.

A unit of an MLP is a channel: a row of gate and of up, a column of down. A unit of attention is a key-value head with
the query heads that share it: rows of q, k and v, columns of o; where all share one, a query head alone. Experts are as
wide as each other, so a unit of theirs is a channel of each: which of one with which of another is free. Nothing is
assumed: candidates are proposed by shape, and each is tried on the block with random weights. Without half of the
units, and with the config's keys changed to match, transformers must build a block of just these shapes, and it must
compute what the whole block does when the columns that read those units are zero.

Where no key says how wide all heads are together, it is the hidden size: the attention alone is then told another
(`structure.widths`).
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
from laconic.structure.anatomy import Anatomy, BlockCall, Tap, capture_calls, linear_at, zero_embeddings
from laconic.structure.config_keys import WIDTHS
from laconic.structure.experts import Experts, unstack_experts_like
from laconic.structure.links import copy_with_random_weights, head_widths
from laconic.structure.widths import build_block

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = ("attention", "mlp")


@dataclass(frozen=True, eq=False)
class Slice:
    """What of a linear belongs to each unit. axis: 0 for rows (and the bias), 1 for columns. channels: (units, n)."""

    linear: str
    axis: int
    channels: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """keys: of the config, and how much of each a unit has (`num_attention_heads: 4` of a head shared by four); with a
    part's name before it (`self_attn.hidden_size`) where only that part of the block is told. given: keys that must be
    said beside them, since they could no longer be told from the others. heads, kv_heads: of a unit; no key-value head
    where all units share one."""

    kind: Kind
    slices: tuple[Slice, ...]
    keys: Mapping[str, int]
    given: Mapping[str, int]
    heads: int = 0
    kv_heads: int = 0

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.slices[0].channels)

    def unit_size(self, block: nn.Module) -> int:
        """How many weights a unit has."""
        return sum(p.channels.shape[1] * linear_at(block, p.linear).weight.shape[1 - p.axis] for p in self.slices)

    @property
    def parts(self) -> dict[str, tuple[Slice, ...]]:
        """The slices by the part of the block that they are in: one, or each expert."""
        found: dict[str, tuple[Slice, ...]] = {}
        for own in self.slices:
            name = part_of(own.linear)
            found[name] = (*found.get(name, ()), own)
        return found

    def widths(self, kept: int) -> dict[str, int]:
        """The config's keys when so many units are kept."""
        return {**{key: share * kept for key, share in self.keys.items()}, **self.given}

    @property
    def stock(self) -> bool:
        """Whether a stock config can say the widths."""
        return not any("." in key for key in self.keys)


def find_groups(
    model: PreTrainedModel, anatomy: Anatomy, kinds: Sequence[Kind] = KINDS
) -> tuple[tuple[Group, ...], ...]:
    """The groups of every block that can be made narrower, of one kind each."""
    hidden, calls = capture_calls(model, anatomy.blocks, inputs_embeds=zero_embeddings(model, 1, 4))
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    known: dict[Any, tuple[Group, ...]] = {}
    found = []
    for i, (block, call, taps) in enumerate(zip(blocks, calls, anatomy.taps, strict=True)):
        like = (taps, tuple((n, type(m), m.extra_repr()) for n, m in block.named_modules()))
        if like not in known:
            trial = _Trial(model, i, block, call, hidden.shape[-1])
            known[like] = tuple(g for kind in kinds for g in _groups_of(kind, trial, taps))
        found.append(known[like])
    return tuple(found)


def matched(group: Group, importance: Mapping[str, Tensor]) -> Group:
    """The same group with other units: the most important channels of every part together, and so on.

    importance: of the channels of each part, in the order in which its slices have them.
    """
    slices = []
    for name, own in group.parts.items():
        order = importance[name].argsort(descending=True, stable=True).cpu()
        slices += [replace(s, channels=s.channels.flatten()[order].view_as(s.channels)) for s in own]
    return replace(group, slices=tuple(slices))


def narrow(tensors: Mapping[str, Tensor], group: Group, kept: Tensor) -> dict[str, Tensor]:
    """A block's parameters by name, without the units that are not kept. kept: (units,) of bool."""
    out = dict(tensors)
    for part in group.slices:
        for leaf in ("weight", "bias") if part.axis == 0 else ("weight",):
            name = f"{part.linear}.{leaf}"
            if name in out:
                stays = torch.ones(out[name].shape[part.axis], dtype=torch.bool)
                stays[part.channels[~kept.cpu()].flatten()] = False
                out[name] = out[name].index_select(part.axis, stays.nonzero()[:, 0].to(out[name].device))
    return out


def part_of(linear: str) -> str:
    """The part of a block that a linear of this name is in."""
    return linear.rpartition(".")[0]


class _Trial:
    """A block with random weights, and what it computes."""

    def __init__(self, model: PreTrainedModel, number: int, block: nn.Module, call: BlockCall, width: int) -> None:
        self.number, self.config, self.heads = number, model.config, head_widths(model)
        self.block = copy_with_random_weights(block).float()
        floats = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
        self.call = BlockCall(tree_map(floats, call.args), tree_map(floats, call.kwargs))
        self.hidden = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
        self.own = dict((getattr(model.config, WIDTHS, None) or {number: {}})[number])
        with torch.no_grad():
            self.whole = self.call(self.block, self.hidden)

    def without(self, slices: Sequence[Slice], kept: Tensor) -> Tensor:
        """What the block puts out when the columns that read units are zero."""
        readers = {linear_at(self.block, part.linear): part for part in slices if part.axis == 1}
        before = {linear: linear.weight.data for linear in readers}
        for linear, part in readers.items():
            linear.weight.data = before[linear].clone()
            linear.weight.data[:, part.channels[~kept].flatten()] = 0
        try:
            return self.call(self.block, self.hidden)
        finally:
            for linear, weight in before.items():
                linear.weight.data = weight

    def built(self, widths: Mapping[str, int], tensors: Mapping[str, Tensor]) -> nn.Module | None:
        """The block as transformers builds it with such widths, holding these tensors; None where they do not fit."""
        from accelerate import init_empty_weights

        try:
            with init_empty_weights(include_buffers=False):
                block = build_block(type(self.block), self.config, {**self.own, **widths}, self.number)
        except Exception:  # whatever a model says of a width that it cannot have
            return None
        unwrap_conv1d(block)
        unstack_experts_like(block, self.block)
        if {n: p.shape for n, p in block.named_parameters()} != {n: t.shape for n, t in tensors.items()}:
            return None
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
        return block.eval()

    def said(self, values: set[int], part: str = "") -> dict[str, int]:
        """The keys of the config that say one of these, for the block or a part of it."""
        own = {k.removeprefix(f"{part}."): v for k, v in self.own.items() if k.rpartition(".")[0] == part}
        return {k: v for k, v in {**self.config.to_dict(), **own}.items() if type(v) is int and v in values}

    def unsaid(self) -> list[str]:
        """The keys of the config that say nothing: each may stand for a default."""
        return [k for k, v in {**self.config.to_dict(), **self.own}.items() if v is None]


@dataclass(frozen=True)
class _Candidate:
    """Slices that may be a group; the reader of its units is the last. heads, kv_heads: of a unit."""

    slices: tuple[Slice, ...]
    heads: int = 0
    kv_heads: int = 0


@torch.no_grad()
def _groups_of(kind: Kind, trial: _Trial, taps: Sequence[Tap]) -> Iterator[Group]:
    """One of the block's own linears, and one of its experts."""
    plain = [
        candidate
        for number, tap in enumerate(taps)
        if len(tap.linears) == 1 and not tap.experts
        for candidate in _candidates(kind, trial, taps[:number], tap.linears[0])
    ]
    for candidates in (plain, _experts(trial, plain) if kind == "mlp" else ()):
        if found := next((g for c in candidates if (g := _tried(kind, trial, c))), None):
            yield found


def _candidates(kind: Kind, trial: _Trial, earlier: Sequence[Tap], reader: str) -> Iterator[_Candidate]:
    width = linear_at(trial.block, reader).in_features
    for tap in reversed(earlier):
        outs = {n: linear_at(trial.block, n).out_features for n in tap.linears}
        if kind == "attention":
            # An MLP beside attention may read the same.
            beside = {n: out for n, out in outs.items() if part_of(n) == part_of(reader)}
            yield from _heads(beside, reader, width, trial.heads)
        elif not tap.experts:
            each = torch.arange(width)[:, None]
            columns = Slice(reader, 1, each)
            alike = [n for n, out in outs.items() if out == width]
            if 1 <= len(alike) <= 2:
                yield _Candidate((*(Slice(n, 0, each) for n in alike), columns))
            for both in (n for n, out in outs.items() if out == 2 * width):  # gate and up in one
                yield _Candidate((Slice(both, 0, torch.cat([each, width + each], 1)), columns))


def _experts(trial: _Trial, plain: Sequence[_Candidate]) -> Iterator[_Candidate]:
    """All experts of a layer; and with an MLP that is as wide as one or several of them, where one key says both."""
    for path, experts in trial.block.named_modules():
        if isinstance(experts, Experts):
            width, each = experts.intermediate, torch.arange(experts.intermediate)[:, None]
            sides = [(experts.names.gate, 0), (experts.names.up, 0), (experts.names.down, 1)]
            numbers = range(experts.num_experts)
            own = tuple(Slice(f"{path}.{i}.{name}", axis, each) for i in numbers for name, axis in sides)
            yield _Candidate(own)
            for shared in plain:
                if all(s.channels.shape[1] == 1 and len(s.channels) % width == 0 for s in shared.slices):
                    beside = (replace(s, channels=s.channels.view(width, -1)) for s in shared.slices)
                    yield _Candidate((*own, *beside))


def _heads(outs: Mapping[str, int], reader: str, width: int, head_dims: Sequence[int]) -> Iterator[_Candidate]:
    """By the ways in which heads of queries, keys and values lie in three linears or in one."""
    for d in head_dims:
        if width % d or any(out % d for out in outs.values()):
            continue
        heads, counts = width // d, {n: out // d for n, out in outs.items()}
        groups, rest = divmod(sum(counts.values()) - heads, 2)
        apart = sorted(counts.values()) == sorted((heads, groups, groups))
        if rest or groups < 1 or heads % groups or heads == 1 or not (apart or len(counts) == 1):
            continue
        units = groups if groups > 1 else heads
        if groups == 1:
            # Their one key and value stay.
            queries = next(n for n, count in counts.items() if count >= heads)
            ways = [{queries: _runs(heads, units, d)}]
        elif apart:
            ways = [{n: _runs(count, units, d) for n, count in counts.items()}]
        else:
            (fused,) = counts
            starts = ((0, heads), (heads, groups), (heads + groups, groups))
            each_after_another = torch.cat([start * d + _runs(count, units, d) for start, count in starts], 1)
            ways = [{fused: each_after_another}, {fused: _runs(heads + 2 * groups, units, d)}]
        columns = Slice(reader, 1, _runs(heads, units, d))
        for rows in ways:
            slices = (*(Slice(n, 0, channels) for n, channels in rows.items()), columns)
            yield _Candidate(slices, heads // units, int(groups > 1))


def _runs(heads: int, units: int, d: int) -> Tensor:
    """The channels of so many heads of d, (units, channels of a unit)."""
    return torch.arange(heads * d).view(units, -1)


def _tried(kind: Kind, trial: _Trial, candidate: _Candidate) -> Group | None:
    units = len(candidate.slices[0].channels)
    # The first unit goes: what is left moves to other places.
    kept = torch.rand(units, generator=torch.Generator().manual_seed(0)) < 0.5
    kept[0], kept[-1] = False, True
    expected = trial.without(candidate.slices, kept)
    if torch.equal(expected, trial.whole):
        return None
    bare = Group(kind, candidate.slices, {}, {}, candidate.heads, candidate.kv_heads)
    tensors = narrow({n: p.data for n, p in trial.block.named_parameters()}, bare, kept)
    for keys, given in _keys(trial, candidate, units):
        group = replace(bare, keys=keys, given=given)
        block = trial.built(group.widths(int(kept.sum())), tensors)
        if block is not None and _same(_output(trial, block), expected):
            return group
    return None


def _keys(trial: _Trial, candidate: _Candidate, units: int) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Which keys may say how many units there are, with how much of each a unit has: one, or two together; and which
    must be given beside them."""
    values = {units, units * max(1, candidate.heads)}
    said = trial.said(values)
    # A key that says nothing stands for the default, which is what all units have.
    for some in [*((k,) for k in said), *combinations(said, 2), *((k,) for k in trial.unsaid())]:
        keys = {k: said.get(k, units) // units for k in some}
        yield keys, {}
        if candidate.heads:
            yield keys, {"head_dim": candidate.slices[-1].channels.shape[1] // candidate.heads}
    if candidate.heads and (part := part_of(candidate.slices[-1].linear)):
        channels = candidate.slices[-1].channels
        said, wide = trial.said(values, part), trial.said({channels.numel()}, part)
        for some, width in product([*((k,) for k in said), *combinations(said, 2)], wide):
            keys = {f"{part}.{k}": said[k] // units for k in some}
            yield {**keys, f"{part}.{width}": channels.shape[1]}, {}


def _output(trial: _Trial, block: nn.Module) -> Tensor | None:
    try:
        return trial.call(copy.deepcopy(block), trial.hidden)
    except Exception:  # a block that looks at heads in yet another place
        return None


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())
