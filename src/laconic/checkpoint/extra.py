"""Extra tensors: those of a checkpoint that belong to no part of its text model, and are written unchanged.

Heads for multi-token prediction are the usual case: engines read them, transformers ignores them. Each tensor keeps the
bytes and the name that it has in the source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from laconic.checkpoint.files import Checkpoint

# Most bytes of extra tensors in one shard, which are in memory while it is written.
_SHARD_BYTES = 4_000_000_000

_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


def extra_names(checkpoint: Checkpoint, model: PreTrainedModel) -> list[str]:
    """List the tensors of an unquantized checkpoint that are neither parameters nor buffers of its text model.

    Args:
        checkpoint: The arranged checkpoint.
        model: The model, with a linear for every matrix (`source.build_skeleton`).

    Returns:
        Names in `checkpoint.tensors`.
    """
    owned = model.state_dict().keys()
    return [name for name in checkpoint.tensors if name not in owned]


def names_outside(checkpoint: Checkpoint, model: PreTrainedModel) -> list[str]:
    """List the tensors of a checkpoint, quantized or not, that are in no module of its text model.

    Args:
        checkpoint: The arranged checkpoint.
        model: The model.

    Returns:
        Names in `checkpoint.tensors`.
    """
    modules = dict(model.named_modules())
    return [name for name in checkpoint.tensors if name.rpartition(".")[0] not in modules]


def extra_shards(checkpoint: Checkpoint, names: Sequence[str]) -> list[list[str]]:
    """Divide extra tensors among shards of a limited size.

    Args:
        checkpoint: The arranged checkpoint.
        names: Names of the extra tensors.

    Returns:
        The names of each shard; an empty list if there are no names.
    """
    shards: list[list[str]] = []
    size = 0
    for name in names:
        nbytes = checkpoint.tensors[name].nbytes
        if not shards or size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def load_extra(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Tensor]:
    """Load extra tensors.

    Args:
        checkpoint: The arranged checkpoint.
        names: Names of the extra tensors.

    Returns:
        The tensors by their names in files.
    """
    tensors = checkpoint.load(names, finite=False)
    return {checkpoint.tensors[name].key: tensor for name, tensor in tensors.items()}


def extra_linears(checkpoint: Checkpoint, names: Sequence[str]) -> list[str]:
    """List the linears among extra tensors, for `ignore` of a quantization_config.

    A matrix that is no linear (an embedding) is listed too: its name does not tell, and engines have no use for the
    entry.

    Args:
        checkpoint: The arranged checkpoint.
        names: Names of the extra tensors.

    Returns:
        Names in files; one pattern (`re:`) for all experts of a layer.
    """
    linears: dict[str, None] = {}
    for name in names:
        stored = checkpoint.tensors[name]
        path, _, leaf = stored.key.rpartition(".")
        if leaf == "weight" and len(stored.shape) == 2:
            expert = _EXPERT.fullmatch(path)
            linears[rf"re:{re.escape(expert[1])}\.\d+\..*" if expert else path] = None
        elif leaf != "weight" and len(stored.shape) == 3:
            linears[path] = None
    return list(linears)


def renumber_blocks(
    tensors: Mapping[str, Tensor], blocks: Collection[str], numbers: Sequence[int], count: int
) -> dict[str, Tensor]:
    """Rename extra tensors for a model from which decoder blocks were dropped.

    Those of dropped blocks are left out. Blocks beyond the last one, where engines look for prediction heads, move up.

    Args:
        tensors: The tensors by their names in files.
        blocks: Names that the list of blocks may have in files.
        numbers: Numbers of the blocks that remain, in order.
        count: Number of blocks before.

    Returns:
        The tensors by their new names.
    """
    new_numbers = {old: new for new, old in enumerate(numbers)}
    out = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"({'|'.join(map(re.escape, blocks))})\.(\d+)\.(.*)", name)
        if match is None:
            out[name] = tensor
        elif (number := int(match[2])) >= count or number in new_numbers:
            new = new_numbers.get(number, number - count + len(numbers))
            out[f"{match[1]}.{new}.{match[3]}"] = tensor
    return out


def describe_extra(checkpoint: Checkpoint, names: Sequence[str], model: PreTrainedModel) -> str:
    """Say how many extra tensors there are, and where.

    Args:
        checkpoint: The arranged checkpoint.
        names: Names of the extra tensors.
        model: The model.

    Returns:
        A subject for a sentence, such as `9 tensors that are not part of the text model (mtp)`.
    """
    modules = {name for name, _ in model.named_modules()}
    groups = list(dict.fromkeys(_shortest_outside(name, modules) for name in names))
    listed = ", ".join(groups[:3]) + (f" and {len(groups) - 3} more" if len(groups) > 3 else "")
    count = "1 tensor that is" if len(names) == 1 else f"{len(names)} tensors that are"
    return f"{count} not part of the text model ({listed})"


def _shortest_outside(name: str, modules: Collection[str]) -> str:
    """Return the shortest leading part of a tensor's name that names no module."""
    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in above if path not in modules), name)
