"""Parts of a model that a compressor needs, found by structure: its decoder blocks, and linears that share an input.

No architecture is named. The blocks are the longest ModuleList of modules that contain linears; the taps of a block are
found by running it on the meta device, where a tensor has an identity but no memory.
"""

from __future__ import annotations

import copy
from collections import Counter, UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from laconic.structure.blank import copy_to_meta, run_without_embeddings, with_blank_inputs, zero_embeddings
from laconic.structure.calls import LINKED, BlockCall, capture_calls
from laconic.structure.experts import enclosing_experts, routers_of
from laconic.structure.hooks import (
    Hook,
    StopForward,
    capture_inputs,
    capture_outputs,
    forward_hooks,
    patched_forwards,
    watched_mappings,
    watched_weights,
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
        outputs: Number of values that a block returns in a tuple; 0 if it returns hidden states alone.
        routers: Full names of modules that weigh experts or a shared expert; they are not compressed.
        bare: Full names of linears in blocks that cannot hold codes: they are never called, are called with several
            inputs, do not compute x W^T + b, or the model reads their weight itself (Mamba's `dt_proj`).
        obstacle: Why blocks cannot be run alone on calibration samples; None where they can.
        embeddings: Name of the table of input embeddings; empty where the model has none of torch's kind.
    """

    blocks: str
    taps: tuple[tuple[Tap, ...], ...]
    head: str
    tied: bool
    outputs: int = 0
    routers: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    obstacle: str | None = None
    embeddings: str = ""

    def block_name(self, i: int) -> str:
        """Return the full name of block i.

        Args:
            i: Index of the block, from 0.
        """
        return f"{self.blocks}.{i}"


@dataclass(frozen=True)
class _Trace:
    """Record of one run of a block on the meta device.

    Attributes:
        taps: Linears with one input, in order of execution.
        outputs: Number of values that the block returns in a tuple; 0 if it returns hidden states alone.
        bare: Linears that are not called once, or whose weight is read by other code than their own.
    """

    taps: tuple[Tap, ...]
    outputs: int
    bare: frozenset[str]


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
    _check_unshared(model, blocks)

    def follow(inputs: Mapping[str, Tensor]) -> tuple[str | None, list[_Trace], set[str]]:
        with watched_weights(blocks) as read:
            hidden, calls = capture_calls(model, name, **inputs)
        # Blocks may leave keys and values there, which later blocks share.
        mappings = [x for call in calls for x in call.kwargs.values() if isinstance(x, UserDict)]
        with watched_mappings(mappings) as read_back:
            traces = [_trace(*pair, hidden) for pair in zip(blocks, calls, strict=True)]
        return LINKED if read_back else _obstacle(hidden, calls), traces, read

    unsupported = f"unsupported architecture '{model.config.model_type}'"
    try:
        obstacle, traces, read = with_blank_inputs(zero_embeddings(model, 1, 4), follow)
    except Exception as e:
        if str(e).startswith(unsupported):
            raise
        reason = str(e).splitlines()[0] if str(e) else repr(e)
        raise ValueError(f"{unsupported}: cannot follow its blocks ({reason})") from e
    embeddings = model.get_input_embeddings()
    tied = model.get_submodule(head).weight is embeddings.weight
    routers = frozenset(f"{name}.{i}.{router}" for i, block in enumerate(blocks) for router in routers_of(block))
    return Anatomy(
        name,
        tuple(trace.taps for trace in traces),
        head,
        tied,
        max(trace.outputs for trace in traces),
        routers,
        frozenset(f"{name}.{n}" for n in read | {f"{i}.{n}" for i, trace in enumerate(traces) for n in trace.bare}),
        obstacle,
        find_embeddings(model),
    )


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
    output = (hidden, *[None] * (anatomy.outputs - 1)) if anatomy.outputs else hidden

    def skip_block(*_: Any, **__: Any) -> Any:
        return output

    def skip_head(_: Tensor) -> None:
        raise StopForward

    head = model.get_submodule(anatomy.head)
    skipped = [*((block, skip_block) for block in blocks), (head, skip_head)]
    with capture_inputs({"head": head}) as inputs, patched_forwards(skipped):
        run_without_embeddings(model, anatomy.blocks, hidden)
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


def _trace(block: nn.Module, call: BlockCall, hidden: Tensor) -> _Trace:
    """Run a block to find its taps, and the linears that cannot hold codes."""
    block = copy_to_meta(block)
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
    with torch.no_grad(), watched_weights(block) as read, hooks, capture_outputs({"block": block}) as outputs:
        call.to("meta")(block, hidden.to("meta"))
    # One linear of each class and shape shows it for all.
    kinds = {(type(m), m.extra_repr()): m for m in linears.values() if type(m).forward is not nn.Linear.forward}
    others = {kind for kind, linear in kinds.items() if not _is_product(linear)}
    read |= {n for n, m in linears.items() if (type(m), m.extra_repr()) in others}
    # A linear of several inputs has no moments of its own.
    counts = Counter(n for _, names in groups for n in dict.fromkeys(names))
    read |= {n for n, count in counts.items() if count > 1}
    called = [[n for n in dict.fromkeys(names) if n not in read] for _, names in groups]
    taps = tuple(Tap(tuple(names), enclosing_experts(block, names[0])) for names in called if names)
    bare = linears.keys() - {n for names in called for n in names}
    returned = outputs["block"]
    return _Trace(taps, len(returned) if isinstance(returned, tuple | list) else 0, frozenset(bare))


def _is_product(linear: nn.Linear) -> bool:
    """Return whether a linear computes x W^T + b; a class of the model's own may multiply in groups."""
    generator = torch.Generator().manual_seed(0)
    linear = copy.deepcopy(linear)
    # Repeating noise of a prime length is random enough, and much faster than drawing all of it.
    noise = torch.randn(65537, generator=generator)
    for name, parameter in list(linear.named_parameters(recurse=False)):
        values = noise.repeat(parameter.numel() // len(noise) + 1)[: parameter.numel()].view(parameter.shape)
        setattr(linear, name, nn.Parameter(values / linear.in_features**0.5, requires_grad=False))
    x = torch.randn(1, 2, linear.in_features, generator=generator)
    try:
        with torch.no_grad():
            return torch.allclose(linear(x), F.linear(x, linear.weight, linear.bias), rtol=1e-3, atol=1e-3)
    except (RuntimeError, TypeError, ValueError):
        return False


def _obstacle(hidden: Tensor, calls: Sequence[BlockCall]) -> str | None:
    """Return why blocks cannot be run alone on calibration samples; None where they can."""
    if obstacle := next((call.obstacle for call in calls if call.obstacle), None):
        return obstacle
    if hidden.dim() != 3 or hidden.shape[:2] != (1, 4):
        return "take more than one hidden state of each token"
    return None


def _check_unshared(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Raise an error for blocks that share weights, which cannot be compressed one by one."""
    first: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for parameter in block.parameters():
            if first.setdefault(id(parameter), i) != i:
                raise ValueError(
                    f"unsupported architecture '{model.config.model_type}': its blocks {first[id(parameter)]} and {i} "
                    "share weights"
                )


def find_blocks(model: nn.Module) -> str:
    """Find the name of the list of decoder blocks: the longest ModuleList of modules that contain linears.

    Towers for images or sounds are left out, whatever their length.

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
    decoder = decoder_name(model)
    if inside := {n: m for n, m in candidates.items() if n.startswith(f"{decoder}.")}:
        candidates = inside
    # Lists inside blocks (experts) are not the blocks.
    outer = {n: m for n, m in candidates.items() if not any(n.startswith(f"{o}.") for o in candidates)}
    if not outer:
        raise ValueError(
            f"unsupported architecture '{type(model).__name__}': found no list of decoder blocks with linears"
        )
    return max(outer, key=lambda n: len(outer[n]))


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that reads text, without its head.

    Args:
        model: The model.
    """
    decoder = model.get_decoder()
    # Some models call their head the decoder.
    text_part: Any = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    return text_part  # type: ignore[no-any-return]


def decoder_name(model: nn.Module) -> str:
    """Return the name of the module that transformers calls the decoder: of a model with towers, the text part.

    Args:
        model: The model.

    Returns:
        Full name; empty where there is none.
    """
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else None
    return next((str(name) for name, module in model.named_modules() if module is decoder), "")


def find_embeddings(model: PreTrainedModel) -> str:
    """Find the name of the table of input embeddings.

    Args:
        model: The model.

    Returns:
        Its full name; empty where the model has none of torch's kind.
    """
    table = model.get_input_embeddings()
    return next((n for n, m in model.named_modules() if m is table and isinstance(m, nn.Embedding)), "")


def _find_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and head is not None:
            return str(name)
    raise ValueError(f"unsupported architecture '{type(model).__name__}': it has no output head")
