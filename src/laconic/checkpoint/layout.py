"""How files lay out what a model holds: under other names, transposed, or stacked.

A checkpoint's own names come from whoever made it: without the prefix of the whole model, as engines know them rather
than transformers (which renames while loading), Conv1D weights as (in, out), experts in one tensor. `arrange` gives a
checkpoint the names and shapes that the model's parameters have; `to_file` is the way back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from laconic.checkpoint.files import DTYPES, Checkpoint, StoredTensor
from laconic.structure.experts import DOWN, GATE_UP, Experts


class TransposedLinear(nn.Linear):
    """A linear whose weight is (in, out) in files."""


def unwrap_conv1d(model: nn.Module) -> None:
    """Put a linear where a model has a Conv1D, which is one with its weight transposed."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linear = TransposedLinear(inputs, outputs, device=module.weight.device, dtype=module.weight.dtype)
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)


def arrange(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """The same checkpoint under the names, and in the shapes, of a model's parameters. Tensors that are in no module of
    the model keep their names; what transformers says is to be ignored is left out."""
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    modules, prefix = dict(model.named_modules()), model.base_model_prefix
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    tensors: dict[str, StoredTensor] = {}
    paths: dict[str, str] = {}
    for key, stored in checkpoint.tensors.items():
        path, _, leaf = _renamed(key, renamings).rpartition(".")
        if path not in modules and f"{prefix}.{path}" in modules:
            path = f"{prefix}.{path}"
        elif path not in modules and path.removeprefix(f"{prefix}.") in modules:
            path = path.removeprefix(f"{prefix}.")
        module, name = modules.get(path), f"{path}.{leaf}" if path else leaf
        if isinstance(module, Experts) and leaf in (GATE_UP, DOWN):
            for own, piece in _pieces(module, leaf, stored):
                tensors[f"{path}.{own}.weight"] = piece
                paths[f"{path}.{own}"] = f"{key.rpartition('.')[0]}.{own}"
        elif module is None:
            if not any(p.search(key) for p in ignored):
                tensors[key] = stored
        elif leaf in module.state_dict() or not any(p.search(key) for p in ignored):
            flipped = isinstance(module, TransposedLinear) and leaf == "weight"
            tensors[name] = replace(stored, shape=stored.shape[::-1], transposed=True) if flipped else stored
            paths[path] = key.rpartition(".")[0]
    return replace(checkpoint, tensors=tensors, paths=paths)


def to_file_layout(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model as its (arranged) source would have them: names, layout, and the very bytes of those that are
    still what the source holds. Experts that are no longer all dense come one by one."""
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stored = checkpoint.tensors.get(name)
        if stored is not None and stored.index is not None:
            stacks.setdefault(stored.key, {})[name] = tensor
            continue
        path, _, leaf = name.rpartition(".")
        base = checkpoint.paths.get(path, path)
        key = stored.key if stored is not None else f"{base}.{leaf}" if base else leaf
        tensor = _as_it_was(checkpoint, name, tensor)
        out[key] = tensor.T.contiguous() if stored is not None and stored.transposed else tensor
    for key, pieces in stacks.items():
        whole = {n for n, s in checkpoint.tensors.items() if s.key == key}
        if whole == pieces.keys() and all(t.is_floating_point() and t.element_size() > 1 for t in pieces.values()):
            out[key] = _restacked(checkpoint, {n: _as_it_was(checkpoint, n, t) for n, t in pieces.items()})
        else:
            out.update((f"{checkpoint.paths[n.rpartition('.')[0]]}.weight", t) for n, t in pieces.items())
    return out


def engine_names(checkpoint: Checkpoint, model: PreTrainedModel, linears: Iterable[str]) -> dict[str, str]:
    """What an engine calls each linear: as the file does, but with the prefix of the whole model, where transformers
    has that."""
    prefix = f"{model.base_model_prefix}."
    names = {}
    for linear in linears:
        name = checkpoint.paths.get(linear, linear)
        lacking = linear.startswith(prefix) and not name.startswith(prefix)
        names[linear] = f"{prefix}{name}" if lacking else name
    return names


def _pieces(experts: Experts, leaf: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """The linears that are in one stacked tensor: name within the experts, and where it is."""
    middle, rows = experts.intermediate, stored.shape[1]
    parts = {experts.names.gate: (0, middle), experts.names.up: (middle, rows)}
    for i in range(stored.shape[0]):
        for name, (start, stop) in (parts if leaf == GATE_UP else {experts.names.down: (0, rows)}).items():
            shape = (stop - start, stored.shape[2])
            yield f"{i}.{name}", replace(stored, shape=shape, index=i, rows=(start, stop))


def _restacked(checkpoint: Checkpoint, pieces: Mapping[str, Tensor]) -> Tensor:
    experts: dict[int, list[tuple[int, Tensor]]] = {}
    for name, tensor in pieces.items():
        place = checkpoint.tensors[name]
        assert place.index is not None
        assert place.rows is not None
        experts.setdefault(place.index, []).append((place.rows[0], tensor))
    ordered = [torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for _, parts in sorted(experts.items())]
    return torch.stack(ordered)


def _as_it_was(checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype of the source, where it is still the source's."""
    stored = checkpoint.tensors.get(name)
    if stored is None or DTYPES.get(stored.dtype) in (None, tensor.dtype) or not tensor.is_floating_point():
        return tensor
    was = checkpoint.load([name], tensor.device)[name]
    return was if torch.equal(was.to(tensor.dtype), tensor) else tensor


def _renamed(key: str, renamings: Iterable[WeightRenaming]) -> str:
    """A tensor's name as transformers would have it, every renaming applied in turn."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key
