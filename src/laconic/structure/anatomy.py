"""Parts of a model that a compressor needs, found by structure: its decoder blocks, and linears that share an input.

No architecture is named. The blocks are the longest ModuleList of modules that contain linears; the taps of a block are
found by running it on the meta device, where a tensor has an identity but no memory.
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
from laconic.structure.hooks import (
    Hook,
    StopForward,
    capture_inputs,
    capture_outputs,
    forward_hooks,
    patched_forwards,
)


@dataclass(frozen=True)
class Tap:
    """Linears of a block that read the same input tensor (q/k/v; gate/up), and so share one Hessian.

    Attributes:
        linears: Names within the block, in order of execution.
        experts: Name within the block of the `Experts` module that contains them; None for other linears.
    """

    linears: tuple[str, ...]
    experts: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """Decoder blocks of a model, the taps of each block, and the output head.

    Attributes:
        blocks: Name of the ModuleList of blocks (`model.layers`).
        taps: Taps of each block, in order of execution.
        head: Name of the linear that computes logits.
        tied: Whether the head shares its weight with the embeddings.
        wrapped: Whether a block returns its hidden states in a tuple.
        routers: Full names of modules that weigh experts or a shared expert; they are not compressed.
    """

    blocks: str
    taps: tuple[tuple[Tap, ...], ...]
    head: str
    tied: bool
    wrapped: bool = False
    routers: frozenset[str] = frozenset()

    def block_name(self, i: int) -> str:
        """Return the full name of block i.

        Args:
            i: Index of the block, from 0.
        """
        return f"{self.blocks}.{i}"


@dataclass(frozen=True)
class BlockCall:
    """Arguments with which the model calls one of its blocks, apart from the hidden states.

    They are the same for every calibration sample, since all samples have one length and no padding.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments (position embeddings, attention mask).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run the block on hidden states (batch, tokens, hidden), and return those it computes."""
        out = block(hidden, *self.args, **self.kwargs)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first

    def to(self, device: torch.device | str) -> BlockCall:
        """Copy the call with its tensors on a device.

        Args:
            device: The device.

        Returns:
            A new call; tensors that are on the device already are shared.
        """
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
        return BlockCall(tree_map(move, self.args), tree_map(move, self.kwargs))


def dissect(model: PreTrainedModel) -> Anatomy:
    """Find blocks, taps and head of a model.

    Args:
        model: A model; its parameters may be on the meta device (`checkpoint.source.build_skeleton`).

    Returns:
        The parts of the model, with the names that they have in it.

    Raises:
        ValueError: The model has no decoder blocks with linears, or its blocks cannot be traced.
    """
    name = find_blocks(model)
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    head = _find_head(model)
    try:
        # The embedding's weights may not be loaded; zeros replace its output.
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
    """Group taps for sequential calibration of a block: the taps of a group are observed in one pass.

    Every tap is a group by itself, except that the same tap of all experts of a layer forms one group, since no expert
    reads another's output.

    Args:
        taps: Taps of the block, in order of execution.

    Returns:
        The groups, in order of execution.
    """
    groups: dict[Any, list[Tap]] = {}
    for tap in taps:
        leaves = tuple(n.rpartition(".")[2] for n in tap.linears)
        groups.setdefault((tap.experts, leaves) if tap.experts else tap, []).append(tap)
    return list(groups.values())


def capture_calls(model: PreTrainedModel, blocks_name: str, **inputs: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Record the arguments with which the model calls its blocks, without running any block.

    Weights outside the blocks that are not loaded (learned positions) are replaced by zeros.

    Args:
        model: The model.
        blocks_name: Name of its ModuleList of blocks.
        **inputs: Inputs of the model: `input_ids`, or `inputs_embeds`.

    Returns:
        Hidden states as the first block gets them, and one call per block.

    Raises:
        ValueError: The model does not call its blocks one after another.
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
        functional_call(model, _zero_weights(model, blocks_name), kwargs={**inputs, "use_cache": False})
    if len(calls) != len(blocks):
        raise ValueError(f"unsupported architecture '{model.config.model_type}': its blocks are not called one by one")
    return first[0], calls


def block_signature(block: nn.Module, taps: Sequence[Tap]) -> Any:
    """Make a hashable key that is equal for blocks of the same modules, shapes and taps.

    Args:
        block: The block.
        taps: Its taps.

    Returns:
        A hashable key: the taps, and name, class and shape of each module.
    """
    return taps, tuple((name, type(m), m.extra_repr()) for name, m in block.named_modules())


def compute_head_input(model: PreTrainedModel, anatomy: Anatomy, hidden: Tensor) -> Tensor:
    """Compute the input of the head from the output of the last block.

    Args:
        model: The model, its modules outside the blocks loaded.
        anatomy: Its blocks and head.
        hidden: (batch, tokens, hidden), the output of the last block.

    Returns:
        (batch, tokens, hidden), after the final norm.
    """
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
    with capture_inputs({"head": head}) as inputs, patched_forwards(skipped), suppress(StopForward), torch.no_grad():
        model(inputs_embeds=blank, use_cache=False)
    return inputs["head"]


def linear_at(module: nn.Module, name: str) -> nn.Linear:
    """Return a linear by its name.

    Args:
        module: The module that contains it.
        name: Name of the linear within the module.
    """
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears inside a module, by name.

    Args:
        module: The module; if it is a linear, its name is empty.
    """
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def zero_embeddings(model: PreTrainedModel, samples: int, tokens: int) -> Tensor:
    """Make embeddings of zeros.

    Args:
        model: The model, for their width and dtype.
        samples: Number of samples.
        tokens: Number of tokens of each.

    Returns:
        (samples, tokens, hidden), in the dtype of the model, on the CPU.
    """
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    return torch.zeros(samples, tokens, embeddings.shape[1], dtype=model.dtype)


def _zero_weights(model: PreTrainedModel, blocks: str) -> dict[str, Tensor]:
    """Make zeros for unloaded parameters outside the blocks, the embeddings and the head."""
    ends = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    return {
        n: torch.zeros_like(p, device="cpu")
        for n, p in model.named_parameters()
        if p.is_meta and not n.startswith(f"{blocks}.") and not any(p is end for end in ends)
    }


def _trace(block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[tuple[Tap, ...], bool]:
    """Find the taps of a block, and whether it returns a tuple."""
    # On the meta device a tensor has an identity but no memory, so that a block of any size can be traced.
    block = copy.deepcopy(block).to("meta")
    linears = linears_of(block)
    # References are held while tracing: the id of a freed tensor would be used again.
    groups: list[tuple[Tensor, list[str]]] = []

    def group_by_input(name: str) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, names in groups:
                if tensor is args[0]:
                    names.append(name)
                    return
            groups.append((args[0], [name]))

        return hook

    hooks = forward_hooks(((linear, group_by_input(name)) for name, linear in linears.items()), before=True)
    with torch.no_grad(), hooks, capture_outputs({"block": block}) as outputs:
        call.to("meta")(block, hidden.to("meta"))
    taps = tuple(Tap(tuple(names), enclosing_experts(block, names[0])) for _, names in groups)
    return taps, isinstance(outputs["block"], tuple)


def find_blocks(model: nn.Module) -> str:
    """Find the name of the list of decoder blocks: the longest ModuleList of modules that contain linears.

    Args:
        model: The model; its parameters may be on the meta device.

    Returns:
        Full name of the ModuleList (`model.layers`).

    Raises:
        ValueError: There is none.
    """
    candidates: dict[str, nn.ModuleList] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linears_of(child) for child in module)
    }
    # Lists inside blocks (experts) are not the blocks.
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
