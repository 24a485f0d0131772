"""The parts of a model a compressor needs, found by structure: its decoder blocks, and which linears share an input.

Nothing here knows an architecture's name. The blocks are the longest ModuleList of modules that hold linears; the taps
of a block are found by running it on the meta device, where a tensor has an identity but no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from laconic.structure.experts import enclosing_experts, routers_of
from laconic.structure.hooks import StopForward, capture_inputs, capture_outputs, forward_pre_hooks, patched_forwards


@dataclass(frozen=True)
class Tap:
    """Linears that read the same tensor (q/k/v; gate/up), in order of execution; names within the block. experts: the
    name of the experts that they belong to, if any."""

    linears: tuple[str, ...]
    experts: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """blocks: name of the ModuleList (`model.layers`). taps: for each block its taps in order of execution.
    head: name of the linear that makes logits. tied: whether it shares its weight with the embeddings. wrapped: whether
    a block returns its hidden states in a tuple. routers: what weighs experts; it stays as
    it is."""

    blocks: str
    taps: tuple[tuple[Tap, ...], ...]
    head: str
    tied: bool
    wrapped: bool = False
    routers: frozenset[str] = frozenset()

    def block_name(self, i: int) -> str:
        """Full name of block i."""
        return f"{self.blocks}.{i}"


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one of its blocks, apart from the hidden states: the same for every calibration sample,
    since all have one length and no padding."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run the block on hidden states (batch, tokens, hidden)."""
        out = block(hidden, *self.args, **self.kwargs)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    def to(self, device: torch.device | str) -> BlockCall:
        """The same call with its tensors elsewhere."""
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
        return BlockCall(tree_map(move, self.args), tree_map(move, self.kwargs))


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find blocks, taps and head of a model skeleton.

    Raises: ValueError for a model that has no decoder blocks with linears, or whose blocks cannot be traced.
    """
    name = find_blocks(model)
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    head = _find_head(model)
    try:
        # Made-up embeddings stand in for the embedding's weights, which are not loaded.
        hidden, calls = capture_calls(model, name, inputs_embeds=zero_embeddings(model, 1, 4))
        traced = [_trace(block, call, hidden) for block, call in zip(blocks, calls, strict=True)]
    except ValueError:
        raise
    except Exception as e:
        reason = str(e).splitlines()[0] if str(e) else repr(e)
        raise ValueError(
            f"unsupported architecture '{model.config.model_type}': cannot follow its blocks ({reason})"
        ) from e
    embeddings = model.get_input_embeddings()
    tied = model.get_submodule(head).weight is embeddings.weight
    routers = frozenset(f"{name}.{i}.{router}" for i, block in enumerate(blocks) for router in routers_of(block))
    return Anatomy(name, tuple(taps for taps, _ in traced), head, tied, any(w for _, w in traced), routers)


def observation_rounds(taps: Sequence[Tap]) -> list[list[Tap]]:
    """Taps that are observed together where a block is treated in sequence: each alone, but that of all experts at
    once, since none of them depends on another's."""
    found: dict[Any, list[Tap]] = {}
    for tap in taps:
        leaves = tuple(n.rpartition(".")[2] for n in tap.linears)
        found.setdefault((tap.experts, leaves) if tap.experts else tap, []).append(tap)
    return list(found.values())


def capture_calls(model: PreTrainedModel, blocks_name: str, **inputs: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Embed `input_ids` (or take `inputs_embeds`) and record how each block would be called, without running any block.
    Weights outside the blocks that are not loaded (learned positions) count as zero.

    Returns: hidden states as the first block gets them, and one Call a block.
    """
    blocks = model.get_submodule(blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def bypass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not first:
            first.append(hidden_states)
        calls.append(BlockCall(args, kwargs))
        if len(calls) == len(blocks):
            raise StopForward
        return hidden_states

    with torch.no_grad(), suppress(StopForward), patched_forwards((block, bypass) for block in blocks):
        functional_call(model, _blanks(model, blocks_name), kwargs={**inputs, "use_cache": False})
    if len(calls) != len(blocks):
        raise ValueError(f"unsupported architecture '{model.config.model_type}': its blocks are not called one by one")
    return first[0], calls


def compute_head_input(model: PreTrainedModel, anatomy: Anatomy, hidden: Tensor) -> Tensor:
    """What the head reads when the last block has put out `hidden` (batch, tokens, hidden)."""
    blocks = model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    output = (hidden,) if anatomy.wrapped else hidden

    def skip_block(*_: Any, **__: Any) -> Any:
        return output

    def skip_head(_: Tensor) -> None:
        raise StopForward

    head = model.get_submodule(anatomy.head)
    skipped = [*((block, skip_block) for block in blocks), (head, skip_head)]
    blank = zero_embeddings(model, *hidden.shape[:2]).to(hidden.device, hidden.dtype)
    with capture_inputs({anatomy.head: head}) as inputs, patched_forwards(skipped):
        with torch.no_grad(), suppress(StopForward):
            model(inputs_embeds=blank, use_cache=False)
    return inputs[anatomy.head]


def linear_at(module: nn.Module, name: str) -> nn.Linear:
    """The linear of this name in a module."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Linears inside a module, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def zero_embeddings(model: PreTrainedModel, samples: int, tokens: int) -> Tensor:
    """Hidden states as if every embedding were zero."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return torch.zeros(samples, tokens, embeddings.shape[1], dtype=model.dtype)


def _blanks(model: PreTrainedModel, blocks: str) -> dict[str, Tensor]:
    """Zeros in place of weights that are not loaded, of what is neither block nor embedding nor head."""
    ends = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    return {
        n: torch.zeros_like(p, device="cpu")
        for n, p in model.named_parameters()
        if p.is_meta and not n.startswith(f"{blocks}.") and not any(p is end for end in ends)
    }


def _trace(block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[tuple[Tap, ...], bool]:
    """The taps of a block, and whether it returns a tuple."""
    # On the meta device a tensor has an identity but no memory, so a block of any size can be followed.
    block = copy.deepcopy(block).to("meta")
    linears = linears_of(block)
    # The tensors themselves are kept while tracing, because the id of a freed one is used again.
    groups: list[tuple[Tensor, list[str]]] = []

    def hook(name: str) -> Any:
        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, names in groups:
                if tensor is args[0]:
                    names.append(name)
                    return
            groups.append((args[0], [name]))

        return remember

    observed = forward_pre_hooks((linear, hook(name)) for name, linear in linears.items())
    with torch.no_grad(), observed, capture_outputs({"block": block}) as outputs:
        call.to("meta")(block, hidden.to("meta"))
    taps = tuple(Tap(tuple(names), enclosing_experts(block, names[0])) for _, names in groups)
    return taps, isinstance(outputs["block"], tuple)


def find_blocks(model: nn.Module) -> str:
    """The name of the list of decoder blocks: the longest ModuleList of modules that hold linears.

    Raises: ValueError when there is none.
    """
    candidates: dict[str, nn.ModuleList] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linears_of(child) for child in module)
    }
    # Lists inside blocks (experts, heads) are not the blocks.
    outer = {n: m for n, m in candidates.items() if not any(n.startswith(f"{o}.") for o in candidates)}
    if not outer:
        raise ValueError(
            f"unsupported architecture '{type(model).__name__}': found no list of decoder blocks with linears"
        )
    return max(outer, key=lambda n: len(outer[n]))


def _find_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and head is not None:
            return str(name)
    raise ValueError(f"unsupported architecture '{type(model).__name__}': it has no output head")
