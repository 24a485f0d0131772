"""Calls of decoder blocks: the arguments with which a model calls each of its blocks, recorded without running any.

A block is then run alone, on the hidden states of any calibration samples.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import PreTrainedModel

from laconic.structure.blank import copy_to_meta, with_blank_inputs, zero_embeddings, zero_weights
from laconic.structure.hooks import StopForward, patched_forwards

Samples = slice | Tensor
"""Numbers of calibration samples."""

LINKED = "pass more than hidden states to later blocks"
"""An obstacle of `BlockCall`: a block reads what earlier blocks compute beside hidden states."""

LOOPED = "are called more than once for each text"
"""An obstacle of `BlockCall`: the model runs through its blocks again."""


@dataclass(frozen=True)
class BlockCall:
    """Arguments with which the model calls one of its blocks, apart from the hidden states.

    All calibration samples have one length and no padding, so most arguments are the same for each of them. Those that
    are not are in `by_sample`.

    Attributes:
        args: Positional arguments after the hidden states, recorded for one sample.
        kwargs: Keyword arguments (position embeddings, attention mask), likewise.
        obstacle: Why the block cannot be run alone on hidden states after the block before it; None where it can.
        repeated: Numbers, among the leaves of (args, kwargs), of tensors that are repeated for each sample of a batch.
        by_sample: Tensors that differ between samples, (samples, ...), by their numbers likewise.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    obstacle: str | None = None
    repeated: frozenset[int] = frozenset()
    by_sample: Mapping[int, Tensor] = field(default_factory=dict)

    def __call__(self, block: nn.Module, hidden: Tensor, samples: Samples | None = None) -> Tensor:
        """Run the block on hidden states, and return those it computes.

        Args:
            block: The block.
            hidden: (batch, tokens, hidden), on the device of the call.
            samples: Numbers of the calibration samples that they are; needed where arguments differ between samples.

        Raises:
            ValueError: Arguments differ between samples and no samples are given, or the block's own code fails.
        """
        args, kwargs = self._arguments(hidden, samples)
        first: Tensor = first_output(_run(block, hidden, args, kwargs))
        return first

    def to(self, device: torch.device | str) -> BlockCall:
        """Copy the call with the tensors of one sample on a device; those of all samples stay where they are.

        Args:
            device: The device.

        Returns:
            A new call; tensors that are on the device already are shared.
        """
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
        return replace(self, args=tree_map(move, self.args), kwargs=tree_map(move, self.kwargs))

    def _arguments(self, hidden: Tensor, samples: Samples | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.repeated and not self.by_sample:
            return self.args, self.kwargs
        leaves, structure = tree_flatten((self.args, self.kwargs))
        for i in self.repeated:
            leaves[i] = leaves[i].repeat(len(hidden), *[1] * (leaves[i].dim() - 1))
        for i, tensors in self.by_sample.items():
            if samples is None:
                raise ValueError("blocks of this model read more of each text than hidden states; use another method")
            leaves[i] = tensors[samples].flatten(0, 1).to(hidden.device)
        args, kwargs = tree_unflatten(leaves, structure)
        return args, kwargs


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
    try:
        hidden, calls = _bypass(model, blocks_name, inputs, lambda *_: ())
        understood = not any(call.obstacle for call in calls)
    except (AttributeError, ValueError, TypeError, IndexError, RuntimeError):
        understood = False
    if not understood:
        # The model takes several values from each block; the block itself shows which.
        hidden, calls = _bypass(model, blocks_name, inputs, _other_outputs)
    return hidden, calls


def capture_without_weights(model: PreTrainedModel, blocks_name: str) -> tuple[Tensor, list[BlockCall]]:
    """Record calls of blocks for one sample of four tokens, as `capture_calls` does, of a model without weights.

    Args:
        model: The model, whose embeddings need not be loaded.
        blocks_name: Name of its ModuleList of blocks.

    Returns:
        Hidden states (1, 4, hidden) as the first block gets them, all zero or nearly so, and one call per block.

    Raises:
        ValueError: The model does not call its blocks one after another.
    """
    zeros = zero_embeddings(model, 1, 4)
    return with_blank_inputs(zeros, lambda inputs: capture_calls(model, blocks_name, **inputs))


def embed_ids(model: PreTrainedModel, blocks_name: str, ids: Tensor) -> Tensor:
    """Compute the hidden states before the first block, without running any block.

    Args:
        model: The model, its modules outside the blocks loaded.
        blocks_name: Name of its ModuleList of blocks.
        ids: Token ids (samples, tokens).

    Returns:
        (samples, tokens, hidden).
    """
    hidden, _ = _bypass(model, blocks_name, {"input_ids": ids}, lambda *_: (), first_only=True)
    return hidden


def record_calls(model: PreTrainedModel, blocks_name: str, windows: Tensor, budget: float) -> list[BlockCall]:
    """Record the calls of blocks for calibration samples.

    Args:
        model: The model, its modules outside the blocks loaded.
        blocks_name: Name of its ModuleList of blocks.
        windows: Token ids (samples, tokens).
        budget: Bytes that arguments which differ between samples may take.

    Returns:
        One call per block.

    Raises:
        ValueError: Such arguments take more.
    """
    hidden, calls = capture_calls(model, blocks_name, input_ids=windows[:1])
    if len(windows) == 1:
        return calls
    other, both = (capture_calls(model, blocks_name, input_ids=ids)[1] for ids in (windows[1:2], windows[:2]))
    differing = [_differing(call, second) for call, second in zip(calls, other, strict=True)]
    blocks = list(model.get_submodule(blocks_name).children())
    repeated = [_repeated(*recorded, hidden) for recorded in zip(blocks, calls, both, differing, strict=True)]
    calls = [replace(call, repeated=numbers) for call, numbers in zip(calls, repeated, strict=True)]
    if any(differing):
        return _with_samples(model, blocks_name, windows, calls, differing, budget)
    return calls


def _with_samples(
    model: PreTrainedModel,
    blocks_name: str,
    windows: Tensor,
    calls: Sequence[BlockCall],
    differing: Sequence[Sequence[int]],
    budget: float,
) -> list[BlockCall]:
    """Record the arguments that differ between samples for each sample."""
    # Blocks often share a tensor; it is held once.
    keys = [
        {n: id(tree_leaves((call.args, call.kwargs))[n]) for n in numbers}
        for call, numbers in zip(calls, differing, strict=True)
    ]
    tensors: dict[int, list[Tensor]] = {}
    for ids in windows.split(1):
        _, of_sample = capture_calls(model, blocks_name, input_ids=ids)
        seen: set[int] = set()
        for call, of_block in zip(of_sample, keys, strict=True):
            leaves = tree_leaves((call.args, call.kwargs))
            for n, key in of_block.items():
                if key not in seen:
                    tensors.setdefault(key, []).append(leaves[n].to("cpu"))
                    seen.add(key)
        size = len(windows) * sum(t[0].nbytes for t in tensors.values())
        if size > budget:
            raise ValueError(
                f"blocks of '{model.config.model_type}' read {size / 1e9:.1f} GB of these texts beside hidden states; "
                "use fewer or shorter samples, or raise calibration.max_memory_gb"
            )
    stacked = {key: torch.stack(parts) for key, parts in tensors.items()}
    return [
        replace(call, by_sample={n: stacked[key] for n, key in of_block.items()})
        for call, of_block in zip(calls, keys, strict=True)
    ]


def _differing(call: BlockCall, other: BlockCall) -> list[int]:
    """Return the numbers of the arguments that are not the same for two samples."""
    pairs = zip(*(tree_leaves((c.args, c.kwargs)) for c in (call, other)), strict=True)
    return [n for n, (x, y) in enumerate(pairs) if isinstance(x, Tensor) and not torch.equal(x, y)]


def _repeated(
    block: nn.Module, call: BlockCall, pair: BlockCall, differing: Sequence[int], hidden: Tensor
) -> frozenset[int]:
    """Return the numbers of the arguments that a block must get for each sample of a batch, and not once for all.

    Args:
        block: The block.
        call: Its call for one sample.
        pair: Its call for two.
        differing: Numbers of the arguments that differ between samples.
        hidden: (1, tokens, hidden), as the first block gets them.
    """
    leaves = [tree_leaves((c.args, c.kwargs)) for c in (call, pair)]
    larger = {
        n
        for n, (x, y) in enumerate(zip(*leaves, strict=True))
        if isinstance(x, Tensor) and n not in differing and x.shape != y.shape and len(y) == 2 * len(x)
    }
    if all(len(leaves[0][n]) == 1 for n in larger) and (not larger or _takes_batches(block, call, differing, hidden)):
        return frozenset()
    return frozenset(larger)


def _takes_batches(block: nn.Module, call: BlockCall, differing: Sequence[int], hidden: Tensor) -> bool:
    """Return whether a block computes on two samples with the arguments of one that do not differ."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    leaves = [torch.cat([x, x]) if n in differing else x for n, x in enumerate(leaves)]
    args, kwargs = tree_unflatten(leaves, structure)
    try:
        BlockCall(args, kwargs).to("meta")(copy_to_meta(block), torch.cat([hidden, hidden]).to("meta"))
    except Exception:
        return False
    return True


def _bypass(
    model: PreTrainedModel,
    blocks_name: str,
    inputs: Mapping[str, Tensor],
    other_outputs: Callable[[nn.Module, BlockCall, Tensor], tuple[Any, ...]],
    *,
    first_only: bool = False,
) -> tuple[Tensor, list[BlockCall]]:
    """Run a model whose blocks return their hidden states unchanged, and record their calls.

    `other_outputs` gives what a block returns beside them; `first_only` stops at the first block.
    """
    blocks = model.get_submodule(blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    calls: dict[int, BlockCall] = {}
    first: list[Tensor] = []
    passed: list[Any] = []
    expected: list[Tensor] = []

    def bypass(i: int, block: nn.Module) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            obstacle: str | None = None
            if any(x is y for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) for y in passed):
                obstacle = LINKED
            if first and (i != len(calls) or hidden_states is not expected[-1]):
                obstacle = "do not get what the block before them computes"
            if i in calls:
                calls[i] = replace(calls[i], obstacle=LOOPED)
            else:
                calls[i] = BlockCall(args, kwargs, obstacle)
            first.append(hidden_states)
            if first_only:
                raise StopForward
            others = other_outputs(block, calls[i], hidden_states) if len(calls) < len(blocks) else ()
            passed.extend(x for x in tree_leaves(others) if isinstance(x, Tensor))
            expected.append(hidden_states)
            return (hidden_states, *others) if others else hidden_states

        return forward

    def stop(*_: Any, **__: Any) -> Any:
        raise StopForward

    head = model.get_output_embeddings()
    patches = [(block, bypass(i, block)) for i, block in enumerate(blocks)]
    with torch.no_grad(), suppress(StopForward), patched_forwards([*patches, *([(head, stop)] if head else [])]):
        try:
            functional_call(model, zero_weights(model, blocks_name), kwargs={**inputs, "use_cache": False})
        except StopForward:
            raise
        except Exception:
            # What comes after the last block may need what it returns.
            if len(calls) < len(blocks):
                raise
    if len(calls) < (1 if first_only else len(blocks)):
        raise ValueError(f"unsupported architecture '{model.config.model_type}': its blocks are not called one by one")
    return first[0], [call for _, call in sorted(calls.items())]


def _other_outputs(block: nn.Module, call: BlockCall, hidden: Tensor) -> tuple[Any, ...]:
    """Return what a block returns after its hidden states, with zeros in place of tensors."""
    call = call.to("meta")
    with torch.no_grad():
        outputs = _run(copy_to_meta(block), hidden.to("meta"), call.args, call.kwargs)
    zeros = lambda x: torch.zeros_like(x, device=hidden.device) if isinstance(x, Tensor) else x  # noqa: E731
    others: tuple[Any, ...] = tree_map(zeros, tuple(outputs[1:])) if isinstance(outputs, tuple | list) else ()
    return others


def _run(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a block; an error of its own code is raised as one line."""
    try:
        return block(hidden, *args, **kwargs)
    except Exception as e:
        if not is_of_transformers(e):
            raise
        reason = (str(e) or repr(e)).splitlines()[0]
        raise ValueError(f"transformers cannot run a {type(block).__name__} in {hidden.dtype}: {reason}") from e


def is_of_transformers(e: Exception) -> bool:
    """Return whether the code of a model in transformers raised an error, other than for want of memory.

    Args:
        e: The error, caught.
    """
    frames = [f.filename for f in traceback.extract_tb(e.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    in_model = f"{os.sep}transformers{os.sep}models{os.sep}" in frames[-1]
    return in_model and not isinstance(e, torch.OutOfMemoryError | MemoryError)


def first_output(output: Any) -> Any:
    """Return the hidden states that a block returns, alone or before other values.

    Args:
        output: What the block returns.
    """
    return output[0] if isinstance(output, tuple | list) else output
