"""The quantization of an artifact as engines are told it, and artifacts that transformers does not open."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from laconic.checkpoint.files import Checkpoint
from laconic.checkpoint.layout import TransposedLinear, engine_names
from laconic.formats.schemes import Scheme
from laconic.runtime.quant_config import to_config
from laconic.structure.blank import copy_to_meta
from laconic.structure.experts import Experts, enclosing_experts
from laconic.walk.plan import Plan


def quantization_config(
    schemes: Mapping[str, Scheme],
    linears: Sequence[str],
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    extra: Sequence[str] = (),
) -> Callable[[Mapping[str, Scheme]], dict[str, Any]]:
    """Prepare the quantization_config of an artifact, under all names by which engines may know its linears.

    Args:
        schemes: as planned, by full name.
        linears: full names of all linears, routers included.
        model: a skeleton.
        checkpoint: the source's, arranged.
        extra: names or patterns of linears that are not part of the text model.

    Returns:
        A function of the schemes as they were written, which may be called when the skeleton has changed.
    """
    names = engine_names(checkpoint, model, linears)
    inside = [n for n in linears if enclosing_experts(model, n)]
    leaves = {str(enclosing_experts(model, n)).rpartition(".")[2] for n in inside}
    unusual = len(set(schemes.values())) == 1 and _packs_unusual_linears(schemes, model)
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    embeddings = [n for n in tables if n in schemes]
    # Other tables (positions) are of the class that stands for quantized embeddings.
    dense_tables = [n for n in tables if n not in schemes] if embeddings else []
    head = [n for n in schemes if model.get_submodule(n) is model.get_output_embeddings()]

    def describe(written: Mapping[str, Scheme]) -> dict[str, Any]:
        by_name = {n: s for name, s in written.items() for n in dict.fromkeys((name, names[name]))}
        all_names = dict.fromkeys(n for pair in names.items() for n in pair)
        kinds = {written.get(n) for n in inside}
        if len(kinds) == len(leaves) == 1:
            # One pattern stands for thousands of experts; transformers finds their scheme by it.
            pattern = rf"re:.*\.{next(iter(leaves))}\.\d+\..*"
            if (scheme := kinds.pop()) is None:
                all_names = dict.fromkeys([*(n for n in all_names if not re.match(pattern[3:], n)), pattern])
            else:
                by_name[pattern] = scheme
        heads, quantized_tables = ([n for name in part for n in (name, names[name])] for part in (head, embeddings))
        linears = [*all_names, *(n for n in extra if n not in all_names), *dense_tables]
        config = to_config(by_name, linears, head=heads, embeddings=quantized_tables)
        # transformers opens these only when it decodes them while loading, which it does for one scheme only.
        return config | ({"dequantize": True} if unusual else {})

    return describe


def _packs_unusual_linears(schemes: Mapping[str, Scheme], model: PreTrainedModel) -> bool:
    """Return whether transformers asks for the weights of packed modules, which have none (embeddings; Falcon)."""
    packed = {n for n, s in schemes.items() if s.storage == "pack-quantized" and not s.simulated}
    unusual = any(type(model.get_submodule(n)) is not nn.Linear for n in packed)
    return unusual or _initializes_any(packed, model)


def _initializes_any(packed: Set[str], model: PreTrainedModel) -> bool:
    """Return whether transformers' initialization of weights reads those of packed linears, which have none."""
    kinds: set[type] = set()
    for path, module in model.named_modules():
        inside = [n for n in packed if n == path or n.startswith(f"{path}.")]
        if not inside or type(module) in kinds or isinstance(module, PreTrainedModel | nn.ModuleList):
            continue
        kinds.add(type(module))
        # One module of each class shows it for all; the list of blocks would be the whole model.
        trial = copy_to_meta(module)
        for n in inside:
            del trial.get_submodule(n.removeprefix(path).removeprefix("."))._parameters["weight"]
        try:
            with torch.no_grad():
                model._init_weights(trial)
        except AttributeError:
            return True
        except Exception:
            continue
    return False


def _decodes_experts(scheme: Scheme) -> bool:
    """Return whether transformers decodes experts of a scheme while it loads them."""
    if scheme.storage == "pack-quantized":
        return scheme.weights.symmetric
    if scheme.storage == "mxfp4-pack-quantized":
        return True
    return scheme.storage == "float-quantized" and scheme.weights.row_unit == 1


def closed_to_transformers(plan: Plan, model: PreTrainedModel) -> str | None:
    """Return the part of an artifact for which transformers does not open it; None where it does.

    vLLM and `laconic.load` open it.

    Args:
        plan: of the walk.
        model: a skeleton.
    """
    quantized = plan.schemes
    if any(isinstance(model.get_submodule(n), TransposedLinear) for n in quantized):
        return "quantized Conv1D linears (it initializes their weights at random, or stops)"
    schemes = set(quantized.values())
    mixtures = [m for m in model.modules() if isinstance(m, Experts)]
    if any(not m.stacking.merged for m in mixtures) and any(enclosing_experts(model, n) for n in quantized):
        return "quantized experts of this model (it reads them stacked only)"
    experts = {(s := quantized.get(n)) and s.plain for n in plan.linears if enclosing_experts(model, n)}
    if any(s.native and s.outlier_columns is not None for s in schemes):
        # It opens those by way of laconic, where `weight` of an expert is no tensor of its own.
        unread = [s.name for s in experts if s and s.storage in ("int-quantized", "float-quantized")]
        return f"experts in {unread[0]}" if unread else None
    if len(schemes) > 1 and _packs_unusual_linears(plan.schemes, model):
        if plan.anatomy.embeddings in quantized:
            return "quantized embeddings beside another scheme"
        return "packed weights of more than one scheme in this model"
    if len(experts) > 1:
        return "experts of more than one scheme"
    scheme = next(iter(experts), None)
    if scheme and not _decodes_experts(scheme):
        return f"experts in {scheme.name}"
    if experts == {None} and any(s.storage != "float-quantized" for s in schemes):
        return "16-bit experts beside quantized linears"
    if not experts and len(schemes) > 1 and not all(s.weights.symmetric for s in schemes):
        return "zero points mixed with another scheme"
    return None
