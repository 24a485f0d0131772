"""Layout of checkpoint files, which may differ from the model's parameters: other names, transposed, or stacked.

Files may lack the prefix of the base model, use names that transformers changes while loading, store Conv1D weights as
(in, out), and stack experts in one tensor. `arrange` maps a checkpoint to the names and shapes of a model's parameters;
`to_file_layout` is the inverse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D

from laconic.checkpoint.files import DTYPES, Checkpoint, Decoding, StoredTensor
from laconic.structure.experts import Experts
from laconic.structure.stacking import BIAS, DOWN, GATE_UP, UP


class TransposedLinear(nn.Linear):
    """A linear whose weight is stored as (in, out) in files."""


def unwrap_conv1d(model: nn.Module) -> None:
    """Replace every Conv1D of a model by a linear; a Conv1D is a linear with a transposed weight.

    Args:
        model: The model, changed in place; it is built without weights, and none are copied.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linear = TransposedLinear(inputs, outputs, device=module.weight.device, dtype=module.weight.dtype)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)


def arrange(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """Map a checkpoint to the names and shapes of a model's parameters.

    Tensors of no module of the model keep their names. Left out are former buffers of a module, which transformers
    computes now and ignores in files.

    Args:
        checkpoint: Checkpoint with the names of its files.
        model: The model, with a linear for every matrix (`source.build_skeleton`).

    Returns:
        The checkpoint with locations by the model's names, `paths` and `stacks` filled.
    """
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    modules, prefix = dict(model.named_modules()), model.base_model_prefix
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    tensors: dict[str, StoredTensor] = {}
    paths: dict[str, str] = {}
    for key, stored in checkpoint.tensors.items():
        renamed = _renamed(key, renamings)
        path, _, leaf = renamed.rpartition(".")
        if path not in modules and f"{prefix}.{path}" in modules:
            path = f"{prefix}.{path}"
        elif path not in modules and path.removeprefix(f"{prefix}.") in modules:
            path = path.removeprefix(f"{prefix}.")
        module, name = modules.get(path), f"{path}.{leaf}" if path else leaf
        if isinstance(module, Experts) and (pieces := list(_unstacked(module, leaf, stored))):
            # A name that transformers changes is no name for one expert.
            base = key.rpartition(".")[0] if key.endswith(f".{leaf}") else renamed.rpartition(".")[0]
            for name, piece in pieces:
                tensors[f"{path}.{name}"] = piece
                linear = name.rpartition(".")[0]
                paths[f"{path}.{linear}"] = f"{base}.{linear}"
        elif module is None:
            tensors[key] = stored
        elif leaf in module.state_dict() or not any(p.search(key) for p in ignored):
            transposed = isinstance(module, TransposedLinear) and leaf == "weight"
            tensors[name] = replace(stored, shape=stored.shape[::-1], transposed=True) if transposed else stored
            paths[path] = key.rpartition(".")[0]
    stacks = {n: p for _, pieces in _missing_stacks(model, tensors, paths) for n, p in pieces.items()}
    return replace(checkpoint, tensors=tensors, paths=paths, stacks=stacks)


def to_file_layout(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of a model the names and the layout of its source's files; the inverse of `arrange`.

    Tensors that are unchanged get the source's dtype, and so its bytes. The experts of a layer are stacked again if all
    are dense; otherwise each is a separate tensor. Dense experts that the source holds singly are stacked where
    transformers reads no others.

    Args:
        checkpoint: The arranged checkpoint of the source.
        tensors: Tensors by the model's names.

    Returns:
        Tensors by the names of files.
    """
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    places = {n: s for n, s in checkpoint.tensors.items() if s.index is not None} | dict(checkpoint.stacks)
    for name, tensor in tensors.items():
        if name in places:
            stacks.setdefault(places[name].key, {})[name] = tensor
            continue
        stored = checkpoint.tensors.get(name)
        path, _, leaf = name.rpartition(".")
        base = checkpoint.paths.get(path, path)
        key = stored.key if stored is not None else f"{base}.{leaf}" if base else leaf
        tensor = _source_dtype(checkpoint, name, tensor)
        out[key] = tensor.T.contiguous() if stored is not None and stored.transposed else tensor
    for key, pieces in stacks.items():
        stacked = {n for n, place in places.items() if place.key == key}
        weights = [tensors.get(f"{n.rpartition('.')[0]}.weight") for n in pieces]
        if stacked == pieces.keys() and all(
            t is not None and t.is_floating_point() and t.element_size() > 1 for t in weights
        ):
            out[key] = _restacked(places, {n: _source_dtype(checkpoint, n, t) for n, t in pieces.items()})
        else:
            for n, t in pieces.items():
                linear, _, leaf = n.rpartition(".")
                out[f"{checkpoint.paths[linear]}.{leaf}"] = t
    return out


def stack_experts(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """Stack the experts of a decoded checkpoint where transformers does not read tensors of single experts in 16 bit.

    Args:
        checkpoint: The checkpoint, with the names of its files; it is written, not arranged again.
        model: The model, with a linear for every matrix (`source.build_skeleton`).

    Returns:
        The checkpoint with a tensor for each stack, which is assembled from those of its experts when it is loaded.
    """
    arranged, tensors = arrange(checkpoint, model), dict(checkpoint.tensors)
    for stack, pieces in _missing_stacks(model, arranged.tensors, arranged.paths):
        sources = {name: arranged.tensors[name] for name in pieces}
        parts = {f"{n}:{key}": part for n, s in sources.items() for key, part in s.parts.items()}
        for source in sources.values():
            del tensors[source.key]
        tensors[stack.key] = replace(stack, decoding=Decoding(parts, partial(_stacked, pieces, sources), whole=True))
    return replace(checkpoint, tensors=dict(sorted(tensors.items())))


def engine_names(checkpoint: Checkpoint, model: PreTrainedModel, linears: Iterable[str]) -> dict[str, str]:
    """Map linears to the names that serving engines use: those of the files, with the prefix of the base model.

    Args:
        checkpoint: The arranged checkpoint.
        model: The model.
        linears: Names of linears in the model.

    Returns:
        Names for engines by the names in the model.
    """
    prefix = f"{model.base_model_prefix}."
    names = {}
    for linear in linears:
        name = checkpoint.paths.get(linear, linear)
        lacks_prefix = linear.startswith(prefix) and not name.startswith(prefix)
        names[linear] = f"{prefix}{name}" if lacks_prefix else name
    return names


def is_computed(model: PreTrainedModel, name: str) -> bool:
    """Return whether transformers computes a tensor from others while it loads them, other than by renaming.

    Args:
        model: The model.
        name: Name of the tensor in the model.
    """
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    # Groups of a source pattern stand for names between dots.
    patterns = [re.sub(r"\\\d", r"[^.]+", p) for c in converters for p in c.target_patterns]
    return any(re.search(pattern, name) for pattern in patterns)


def _unstacked(experts: Experts, leaf: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """List the tensors in one stacked tensor: name within the experts, and location."""
    pieces = experts.stacking.pieces(leaf, experts.intermediate, experts.hidden)
    rows = max((piece.rows[1] for piece in pieces), default=0)
    # Where the shape fits both, transformers' conversion says which.
    transposed = len(stored.shape) == 3 and (
        experts.stacking.transposed_in_files if stored.shape[1] == stored.shape[2] else stored.shape[2] == rows
    )
    inputs = stored.shape[1:2] if transposed else stored.shape[2:]
    for i in range(stored.shape[0]):
        for piece in pieces:
            shape = (len(range(*piece.rows)), *inputs)
            location = replace(stored, shape=shape, index=i, rows=piece.rows, transposed=transposed)
            yield f"{i}.{piece.linear}.{piece.leaf}", location


def _missing_stacks(
    model: nn.Module, tensors: Mapping[str, StoredTensor], paths: Mapping[str, str]
) -> Iterator[tuple[StoredTensor, dict[str, StoredTensor]]]:
    """List stacks that transformers needs in 16 bit, where a checkpoint holds single experts: each, and its pieces."""
    for path, experts in model.named_modules():
        first = f"{path}.0.{experts.names.down}" if isinstance(experts, Experts) else ""
        stored = tensors.get(f"{first}.weight")
        if not isinstance(experts, Experts) or experts.stacking.single or stored is None or stored.index is not None:
            continue
        base = paths[first].removesuffix(first.removeprefix(path))
        for leaf, shape in _stacks(experts):
            stack = StoredTensor(stored.file, shape, stored.dtype, f"{base}.{leaf}")
            pieces = {f"{path}.{name}": piece for name, piece in _unstacked(experts, leaf, stack)}
            if all(name in tensors and tensors[name].index is None for name in pieces):
                yield stack, pieces


def _stacks(experts: Experts) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List the stacked tensors of experts: name within the experts, and shape in files."""
    stacking, count, hidden = experts.stacking, experts.num_experts, experts.hidden
    for stack in (GATE_UP if stacking.gated else UP, DOWN):
        outputs = max(piece.rows[1] for piece in stacking.pieces(stack, experts.intermediate, hidden))
        inputs = experts.intermediate if stack == DOWN else hidden
        yield stack, (count, inputs, outputs) if stacking.transposed_in_files else (count, outputs, inputs)
        if stacking.biased:
            yield f"{stack}{BIAS}", (count, outputs)


def _stacked(
    pieces: Mapping[str, StoredTensor], sources: Mapping[str, StoredTensor], loaded: Mapping[str, Tensor]
) -> Tensor:
    """Stack the tensors of experts from what a checkpoint holds of them, by `NAME:PART`."""
    return _restacked(
        pieces, {n: s.assemble({key: loaded[f"{n}:{key}"] for key in s.parts}) for n, s in sources.items()}
    )


def _restacked(places: Mapping[str, StoredTensor], pieces: Mapping[str, Tensor]) -> Tensor:
    """Stack the tensors of experts into one tensor, as the file does."""
    experts: dict[int, list[tuple[StoredTensor, Tensor]]] = {}
    for name, tensor in pieces.items():
        stored = places[name]
        assert stored.index is not None
        experts.setdefault(stored.index, []).append((stored, tensor))
    return torch.stack([_joined(parts) for _, parts in sorted(experts.items())])


def _joined(parts: Sequence[tuple[StoredTensor, Tensor]]) -> Tensor:
    """Join the linears of one expert that a file holds in one matrix."""
    located = {stored.rows or (0, 0, 1): tensor for stored, tensor in parts}
    # In order of their first rows, whose numbers are others where experts were narrowed.
    ordered = [tensor for _, tensor in sorted(located.items(), key=lambda part: part[0])]
    interleaved = next(iter(located))[2] > 1
    joined = torch.stack(ordered, 1).flatten(0, 1) if interleaved else torch.cat(ordered)
    return joined.T if parts[0][0].transposed else joined


def _source_dtype(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """Return the source's tensor if this one has the same values in another float dtype."""
    stored = checkpoint.tensors.get(name)
    if stored is None or DTYPES.get(stored.dtype) in (None, tensor.dtype) or not tensor.is_floating_point():
        return tensor
    original = checkpoint.load([name], tensor.device)[name]
    return original if torch.equal(original.to(tensor.dtype), tensor) else tensor


def _renamed(key: str, renamings: Iterable[WeightRenaming]) -> str:
    """Apply every renaming of transformers to a tensor's name, in order."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key
