"""Links: pairs of a source and its readers between which a scale can be moved without changing the block's function.

AWQ and SmoothQuant multiply the columns of linears (the readers) by s and divide the output channels of their source by
s. The source is a norm whose output only the readers read, or a linear whose output channels reach them unmixed (v -> o
through attention, also grouped; up -> down through a gate). Nothing is assumed: every candidate is tried on the block
with random weights and scales that are powers of two, for which floating-point arithmetic is exact; it is a link if the
output of the block stays the same to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.structure.anatomy import Anatomy, Tap, block_signature, linear_at
from laconic.structure.calls import BlockCall, capture_without_weights
from laconic.structure.experts import Experts, routers_of
from laconic.structure.hooks import Hook, capture_inputs, forward_hooks


@dataclass(frozen=True, eq=False)
class Link:
    """A source and its readers, by names within the block.

    Attributes:
        readers: All linears and routers that read the source's output; their columns are multiplied.
        source: Norm or linear whose output channels are divided.
        channels: (in,) for each input channel of the readers, the output channel of the source that feeds it; None for
            a norm, whose channels are in the same order.
        offset: Whether the source is a norm that multiplies by 1 + weight.
    """

    readers: tuple[str, ...]
    source: str
    channels: Tensor | None = None
    offset: bool = False

    @property
    def is_norm(self) -> bool:
        """Whether the source is a norm."""
        return self.channels is None


def fold(block: nn.Module, link: Link, s: Tensor) -> Tensor:
    """Divide the source's channels by s and multiply the readers' columns by it, in place.

    Args:
        block: The block that contains them.
        link: The source and its readers.
        s: Positive scales, one per linked channel of the source (all channels of a norm; `linked_channels` of a
            linear).

    Returns:
        Scales of the readers' columns, (in,), as rounded to the source's dtype.
    """
    if link.is_norm:
        source = block.get_submodule(link.source)
        old = _multiplier(source, link)
        _divide_norm(source, s, link)
        # Columns are scaled by the norm's change after rounding, so that the product stays the same.
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
    """Return the output channels of the source that feed the readers, each once, ascending.

    Args:
        link: A link whose source is a linear.

    Returns:
        (n,) int64.
    """
    assert link.channels is not None
    channels: Tensor = torch.unique(link.channels)
    return channels


def pool_to_source(link: Link, x: Tensor) -> Tensor:
    """Reduce values of the readers' input channels to the linked channels of the source, by their maximum.

    Args:
        link: The source and its readers.
        x: (in,), a value per input channel.

    Returns:
        A value per linked channel of the source, in the order of `linked_channels`.
    """
    if link.channels is None:
        return x
    _, index = link.channels.to(x.device).unique(return_inverse=True)
    out = torch.full((int(index.max()) + 1,), -torch.inf, device=x.device)
    out.scatter_reduce_(0, index, x.float(), "amax")
    return out


def links_without(links: Mapping[Tap, Link], quantized: Set[str]) -> Mapping[Tap, Link]:
    """Remove links that contain a quantized linear, since codes cannot be scaled.

    Args:
        links: Links of a block by tap.
        quantized: Names of quantized linears within the block.

    Returns:
        The remaining links by tap.
    """
    return {tap: link for tap, link in links.items() if quantized.isdisjoint((link.source, *link.readers))}


def find_links(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Mapping[Tap, Link], ...]:
    """Find the link of every tap that has one, block by block.

    Args:
        model: The model; its parameters may be on the meta device.
        anatomy: Its blocks and taps.

    Returns:
        For each block, links by tap; taps without a link are absent.

    Raises:
        ValueError: The model does not call its blocks one after another.
    """
    hidden, calls = capture_without_weights(model, anatomy.blocks)
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    by_signature: dict[Any, Mapping[Tap, Link]] = {}
    links = []
    for block, call, taps in zip(blocks, calls, anatomy.taps, strict=True):
        signature = block_signature(block, taps)
        if signature not in by_signature:
            by_signature[signature] = _links_of(block, call, taps, head_widths(model), hidden)
        links.append(by_signature[signature])
    return tuple(links)


def _links_of(
    block: nn.Module, call: BlockCall, taps: Sequence[Tap], heads: Sequence[int], zeros: Tensor
) -> dict[Tap, Link]:
    block = copy_with_random_weights(block)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(zeros.shape, generator=generator).to(zeros.dtype)
    links: dict[Tap, Link] = {}
    with torch.no_grad():
        norms, expected = _norms_before(block, call, hidden, taps)
        for i, tap in enumerate(taps):
            for link in () if tap.experts else [*norms.get(tap, ()), *_linears_before(block, taps[:i], tap, heads)]:
                if _preserves_output(block, call, hidden, link, expected, generator):
                    links[tap] = link
                    break
        for link, reading_taps in _experts_links(block, taps, norms):
            # Routing decides which experts compute anything; all have one structure, so that some show it for all.
            if link.channels is not None or _preserves_output(block, call, hidden, link, expected, generator):
                links |= dict.fromkeys(reading_taps, link)
    return links


def _experts_links(
    block: nn.Module, taps: Sequence[Tap], norms: Mapping[Tap | str, Sequence[Link]]
) -> Iterator[tuple[Link, list[Tap]]]:
    """Propose links of experts, with the taps that have them.

    A candidate is the norm before all experts of a layer, read by them, their router and other linears; in each
    expert, up before down is a link by what `Experts` computes.
    """
    for name in dict.fromkeys(tap.experts for tap in taps if tap.experts):
        experts = block.get_submodule(name)
        assert isinstance(experts, Experts)
        expert_taps = [tap for tap in taps if tap.experts == name]
        first = [tap for tap in expert_taps if experts.names.down not in {n.rpartition(".")[2] for n in tap.linears}]
        inside = [n for tap in first for n in tap.linears]
        for link in norms.get(name, ()):
            yield Link((*link.readers, *inside), link.source, offset=link.offset), first
        for tap in expert_taps:
            if tap not in first:
                (down,) = tap.linears
                up = f"{down.rpartition('.')[0]}.{experts.names.up}"
                yield Link((down,), up, torch.arange(experts.intermediate)), [tap]


def copy_with_random_weights(block: nn.Module) -> nn.Module:
    """Copy a block with random matrices and biases, and norms whose weights are one.

    Args:
        block: The block; its parameters may be on the meta device.

    Returns:
        A copy with the same dtypes, its parameters on the CPU and without gradients; the same in every call.
    """
    block = copy.deepcopy(block)
    noise = torch.randn(65537, generator=torch.Generator().manual_seed(0))
    for module in block.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old.dim() > 1:
                # Repeating noise of a prime length is random enough, and much faster than drawing all of it.
                new = noise.repeat(old.numel() // len(noise) + 1)[: old.numel()].view(old.shape) / old.shape[-1] ** 0.5
            else:
                new = torch.ones(old.shape) if name == "weight" else noise[: old.numel()]
            setattr(module, name, nn.Parameter(new.to(old.dtype), requires_grad=False))
    return block


def _norms_before(
    block: nn.Module, call: BlockCall, hidden: Tensor, taps: Sequence[Tap]
) -> tuple[dict[Tap | str, list[Link]], Tensor]:
    """Find the norms that compute the input of each tap, and of all experts of a layer by their name; run the block.

    Returns:
        Candidate links by tap or name of experts, and the block's output.
    """
    norm_outputs: list[tuple[str, Tensor]] = []

    def record(name: str) -> Hook:
        return lambda _, __, output: norm_outputs.append((name, output))

    norms = [n for n, m in block.named_modules() if getattr(getattr(m, "weight", None), "dim", lambda: 0)() == 1]
    plain = [n for tap in taps if not tap.experts for n in tap.linears]
    routers = sorted(routers_of(block) - set(plain))
    mixtures = list(dict.fromkeys(tap.experts for tap in taps if tap.experts))
    readers = {n: block.get_submodule(n) for n in (*plain, *routers, *mixtures)}
    with forward_hooks((block.get_submodule(n), record(n)) for n in norms), capture_inputs(readers) as inputs:
        expected = call(block, hidden)

    def links_to(name: str) -> list[Link]:
        # The input may be a view of the norm's output, with all tokens in one dimension.
        sources = [n for n, y in norm_outputs if name in inputs and _share_memory(y, inputs[name])]
        readers = tuple(n for n in (*plain, *routers) if n in inputs and _share_memory(inputs[n], inputs[name]))
        offsets = {source: has_offset(block.get_submodule(source)) for source in sources}
        return [Link(readers, source, offset=offset) for source, offset in offsets.items() if offset is not None]

    by_tap: dict[Tap | str, list[Link]] = {tap: links_to(tap.linears[0]) for tap in taps if not tap.experts}
    return by_tap | {name: links_to(name) for name in mixtures}, expected


def _share_memory(a: Any, b: Any) -> bool:
    """Return whether two tensors are views of the same memory, perhaps in different shapes."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def has_offset(norm: nn.Module) -> bool | None:
    """Return whether a norm multiplies by 1 + weight: with a weight of zero its output is not zero.

    Args:
        norm: The norm, its parameters not on the meta device.

    Returns:
        None where that cannot be tried, since the norm takes more than one tensor (a gate).
    """
    zeroed = copy.deepcopy(norm)
    for parameter in zeroed.parameters():
        nn.init.zeros_(parameter)
    weight = norm.get_parameter("weight")
    try:
        return bool(zeroed(torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype)[None]).any())
    except (TypeError, RuntimeError):
        return None


def _linears_before(block: nn.Module, earlier: Sequence[Tap], tap: Tap, heads: Sequence[int]) -> Iterator[Link]:
    """Propose links from earlier linears to a tap, the nearest linear first."""
    width = linear_at(block, tap.linears[0]).in_features
    for name in reversed([n for t in earlier for n in t.linears]):
        for channels in _channel_maps(linear_at(block, name).out_features, width, heads):
            yield Link(tap.linears, name, channels)


def _channel_maps(out: int, width: int, heads: Sequence[int]) -> Iterator[Tensor]:
    """Propose ways in which `out` channels of a linear may feed `width` inputs of another.

    Args:
        out: Output channels of the first linear.
        width: Input channels of the second.
        heads: Widths that a head may have.
    """
    if out == width:
        yield torch.arange(width)
    if out == 2 * width:  # gate and up in one
        yield torch.arange(width, out)
        yield torch.arange(width)
    for d in heads:
        if width % d or out % d:
            continue
        query = torch.arange(width // d)
        kv_heads, fused = out // d, (out - width) // d // 2
        if out < width and len(query) % kv_heads == 0:
            yield _channels_of_heads(query // (len(query) // kv_heads), d)
        if out > width and out - width == 2 * fused * d and len(query) % fused == 0:
            group = query // (len(query) // fused)
            yield _channels_of_heads(len(query) + fused + group, d)  # all q, all k, all v
            group_size = len(query) // fused + 2
            yield _channels_of_heads(group * group_size + group_size - 1, d)  # q, k, v of a group, then of the next


def _channels_of_heads(head: Tensor, d: int) -> Tensor:
    """List the channels of heads, in the order of the heads."""
    return (head[:, None] * d + torch.arange(d)).flatten()


def _preserves_output(
    block: nn.Module, call: BlockCall, hidden: Tensor, link: Link, expected: Tensor, generator: torch.Generator
) -> bool:
    """Return whether the block computes the same after scales that are powers of two are moved through the link."""
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
    """Return the numbers of channels that a head may have by the config: `head_dim`, and width by number of heads.

    Args:
        model: The model.
    """
    widths: list[Any] = []
    text = model.config.get_text_config()
    for config in text.per_layer_config if text.is_heterogeneous else [text]:
        heads = getattr(config, "num_attention_heads", None)
        widths += [getattr(config, "head_dim", None), heads and config.hidden_size // heads]
    return list(dict.fromkeys(d for d in widths if d))
