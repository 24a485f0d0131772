"""Links: where a scale put on the input channels of some linears can be taken back without changing the function.

AWQ and SmoothQuant multiply the columns of linears by s and divide what feeds them by s. What feeds them is a norm
whose output they alone read, or a linear whose output channels reach them unmixed (v -> o through attention, also
grouped; up -> down through a gate). Nothing is assumed: every candidate is tried on the block with random weights and
scales that are powers of two, under which floating-point arithmetic is exact, and it is a link if the output of the
block stays the same to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.structure.anatomy import Anatomy, BlockCall, Tap, capture_calls, linear_at, zero_embeddings
from laconic.structure.experts import Experts, routers_of
from laconic.structure.hooks import capture_inputs, forward_hooks


@dataclass(frozen=True, eq=False)
class Link:
    """readers: what has its columns multiplied: all linears, and routers, that read the tensor. source: the norm or
    linear whose output is divided. channels: for each input channel of the readers, the source's output channel that
    feeds it; None when they are the same. offset: a norm that multiplies by 1 + weight."""

    readers: tuple[str, ...]
    source: str
    channels: Tensor | None = None
    offset: bool = False

    @property
    def is_norm(self) -> bool:
        """Whether a norm feeds the readers."""
        return self.channels is None


def fold(block: nn.Module, link: Link, s: Tensor) -> Tensor:
    """Divide what feeds the readers by s and multiply their columns by it, in place.

    s: positive, one a channel of the source that is linked (all of a norm's; in order of `used`). Returns: the scales
    of the readers' columns (in,), as they came out in the source's dtype.
    """
    if link.is_norm:
        source = block.get_submodule(link.source)
        old = _multiplier(source, link)
        _divide_norm(source, s, link)
        # Columns get what the norm really lost to rounding, so that the product stays as it was.
        now = _multiplier(source, link)
        columns = torch.where((now != 0) & (old != 0), old / now, s)
    else:
        assert link.channels is not None
        linear = linear_at(block, link.source)
        full = torch.ones(linear.out_features, device=s.device)
        full[linked_channels(link).to(s.device)] = s.float()
        linear.weight.data = (linear.weight.float() / full[:, None]).to(linear.weight.dtype)
        if linear.bias is not None:
            linear.bias.data = (linear.bias.float() / full).to(linear.bias.dtype)
        columns = full[link.channels.to(s.device)]
    for name in link.readers:
        weight = block.get_submodule(name).get_parameter("weight")
        weight.data = (weight.float() * columns).to(weight.dtype)
    return columns


def linked_channels(link: Link) -> Tensor:
    """The source's channels that feed the readers, each once, ascending."""
    assert link.channels is not None
    channels: Tensor = torch.unique(link.channels)
    return channels


def pool_to_source(link: Link, x: Tensor) -> Tensor:
    """A figure of every input channel, as one of every linked channel of the source: the largest of those it feeds."""
    if link.channels is None:
        return x
    _, index = link.channels.to(x.device).unique(return_inverse=True)
    out = torch.full((int(index.max()) + 1,), -torch.inf, device=x.device)
    out.scatter_reduce_(0, index, x.float(), "amax")
    return out


def links_without(links: Mapping[Tap, Link], quantized: Set[str]) -> Mapping[Tap, Link]:
    """Those of a block's links that touch none of these linears: codes take no scale."""
    return {tap: link for tap, link in links.items() if quantized.isdisjoint((link.source, *link.readers))}


def find_links(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Mapping[Tap, Link], ...]:
    """The link of every tap that has one, block by block."""
    hidden, calls = capture_calls(model, anatomy.blocks, inputs_embeds=zero_embeddings(model, 1, 4))
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    known: dict[Any, Mapping[Tap, Link]] = {}
    found = []
    for block, call, taps in zip(blocks, calls, anatomy.taps, strict=True):
        kind = (taps, tuple((n, type(m), m.extra_repr()) for n, m in block.named_modules()))
        if kind not in known:
            known[kind] = _links_of(block, call, taps, head_widths(model), hidden.shape[-1])
        found.append(known[kind])
    return tuple(found)


def _links_of(
    block: nn.Module, call: BlockCall, taps: Sequence[Tap], heads: Sequence[int], width: int
) -> dict[Tap, Link]:
    block = copy_with_random_weights(block)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, width, generator=generator).to(next(block.parameters()).dtype)
    found: dict[Tap, Link] = {}
    with torch.no_grad():
        norms, expected = _norms_before(block, call, hidden, taps)
        for i, tap in enumerate(taps):
            for link in () if tap.experts else [*norms.get(tap, ()), *_linears_before(block, taps[:i], tap, heads)]:
                if _holds(block, call, hidden, link, expected, generator):
                    found[tap] = link
                    break
        for link, behind in _experts_links(block, taps, norms):
            # Which experts the tokens reach is chance; but all are treated alike, so that some show it of all.
            if link.channels is not None or _holds(block, call, hidden, link, expected, generator):
                found |= dict.fromkeys(behind, link)
    return found


def _experts_links(
    block: nn.Module, taps: Sequence[Tap], norms: Mapping[Tap | str, Sequence[Link]]
) -> Iterator[tuple[Link, list[Tap]]]:
    """Links that might be, with the taps of experts that have them: the norm before all experts of a layer, their
    router and whatever else reads it; and in each expert up before down, which is one by what `Experts` computes."""
    for name in dict.fromkeys(tap.experts for tap in taps if tap.experts):
        experts = block.get_submodule(name)
        assert isinstance(experts, Experts)
        ours = [tap for tap in taps if tap.experts == name]
        first = [tap for tap in ours if experts.names.down not in {n.rpartition(".")[2] for n in tap.linears}]
        inside = [n for tap in first for n in tap.linears]
        for link in norms.get(name, ()):
            yield Link((*link.readers, *inside), link.source, offset=link.offset), first
        for tap in ours:
            if tap not in first:
                (down,) = tap.linears
                up = f"{down.rpartition('.')[0]}.{experts.names.up}"
                yield Link((down,), up, torch.arange(experts.intermediate)), [tap]


def copy_with_random_weights(block: nn.Module) -> nn.Module:
    """The same block with weights of its own: random matrices, norms that do nothing."""
    block = copy.deepcopy(block)
    noise = torch.randn(65537, generator=torch.Generator().manual_seed(0))
    for module in block.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old.dim() > 1:
                # One stretch of noise, repeated with a prime length, is random enough and takes no time.
                new = noise.repeat(old.numel() // len(noise) + 1)[: old.numel()].view(old.shape) / old.shape[-1] ** 0.5
            else:
                new = torch.ones(old.shape) if name == "weight" else noise[: old.numel()]
            setattr(module, name, nn.Parameter(new.to(old.dtype), requires_grad=False))
    return block


def _norms_before(
    block: nn.Module, call: BlockCall, hidden: Tensor, taps: Sequence[Tap]
) -> tuple[dict[Tap | str, list[Link]], Tensor]:
    """For each tap, and for all experts of a layer by their name, the norm that made the tensor read there, if one did;
    and the block's output."""
    made: list[tuple[str, Tensor]] = []

    def remember(name: str) -> Any:
        return lambda _, __, output: made.append((name, output))

    norms = [n for n, m in block.named_modules() if getattr(getattr(m, "weight", None), "dim", lambda: 0)() == 1]
    plain = [n for tap in taps if not tap.experts for n in tap.linears]
    routers = sorted(routers_of(block) - set(plain))
    mixtures = list(dict.fromkeys(tap.experts for tap in taps if tap.experts))
    readers = {n: block.get_submodule(n) for n in (*plain, *routers, *mixtures)}
    with forward_hooks((block.get_submodule(n), remember(n)) for n in norms), capture_inputs(readers) as read:
        expected = call(block, hidden)

    def links_to(name: str) -> list[Link]:
        # What is read may be a view of what the norm put out: tokens in one row.
        sources = [n for n, y in made if name in read and _same(y, read[name])]
        return [
            Link(
                tuple(n for n in (*plain, *routers) if n in read and _same(read[n], read[name])),
                source,
                offset=_has_offset(block.get_submodule(source)),
            )
            for source in sources
        ]

    found: dict[Tap | str, list[Link]] = {tap: links_to(tap.linears[0]) for tap in taps if not tap.experts}
    return found | {name: links_to(name) for name in mixtures}, expected


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors are one memory, if perhaps in different shapes."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _has_offset(norm: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight: with a weight of zero it still lets something through."""
    silent = copy.deepcopy(norm)
    for parameter in silent.parameters():
        nn.init.zeros_(parameter)
    weight = norm.get_parameter("weight")
    return bool(silent(torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype)[None]).any())


def _linears_before(block: nn.Module, earlier: Sequence[Tap], tap: Tap, heads: Sequence[int]) -> Iterator[Link]:
    """Links that might be, from the nearest linear back."""
    width = linear_at(block, tap.linears[0]).in_features
    for name in reversed([n for t in earlier for n in t.linears]):
        for channels in _channel_maps(linear_at(block, name).out_features, width, heads):
            yield Link(tap.linears, name, channels)


def _channel_maps(out: int, width: int, heads: Sequence[int]) -> Iterator[Tensor]:
    """Ways in which `out` channels of a linear may feed `width` inputs of another. heads: widths of a head."""
    if out == width:
        yield torch.arange(width)
    if out == 2 * width:  # gate and up in one
        yield torch.arange(width, out)
        yield torch.arange(width)
    for d in heads:
        if width % d or out % d:
            continue
        query = torch.arange(width // d)
        alone, fused = out // d, (out - width) // d // 2
        if out < width and len(query) % alone == 0:
            yield _of_heads(query // (len(query) // alone), d)
        if out > width and out - width == 2 * fused * d and len(query) % fused == 0:
            group = query // (len(query) // fused)
            yield _of_heads(len(query) + fused + group, d)  # all q, all k, all v
            each = len(query) // fused + 2
            yield _of_heads(group * each + each - 1, d)  # q, k, v of a head or a group, then of the next


def _of_heads(head: Tensor, d: int) -> Tensor:
    """The channels of some heads, in this order."""
    return (head[:, None] * d + torch.arange(d)).flatten()


def _holds(
    block: nn.Module, call: BlockCall, hidden: Tensor, link: Link, expected: Tensor, generator: torch.Generator
) -> bool:
    """Whether the block computes the same when scales that are powers of two go through the link."""
    names = [link.source, *link.readers]
    before = {(n, leaf): p.data for n in names for leaf, p in block.get_submodule(n).named_parameters()}
    count = (
        block.get_submodule(link.source).get_parameter("weight").shape[0]
        if link.is_norm
        else len(linked_channels(link))
    )
    s = torch.tensor([0.5, 1.0, 2.0, 4.0])[torch.randint(4, (count,), generator=generator)]
    try:
        fold(block, link, s)
        return torch.equal(call(block, hidden), expected)
    finally:
        for (n, leaf), data in before.items():
            block.get_submodule(n).get_parameter(leaf).data = data


def _multiplier(norm: nn.Module, link: Link) -> Tensor:
    return norm.get_parameter("weight").data.float() + float(link.offset)


def _divide_norm(norm: nn.Module, s: Tensor, link: Link) -> None:
    new = _multiplier(norm, link) / s - float(link.offset)
    weight = norm.get_parameter("weight")
    weight.data = new.to(weight.dtype)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        bias.data = (bias.float() / s).to(bias.dtype)


def head_widths(model: PreTrainedModel) -> list[int]:
    """How many channels a head may have."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    given = getattr(config, "head_dim", None)
    return list(dict.fromkeys(d for d in (given, heads and config.hidden_size // heads) if d))
