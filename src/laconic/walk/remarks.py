"""Decisions of a plan that no key asked for: group sizes, and weights that stay in 16 bit, as events for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from laconic.checkpoint.files import Checkpoint, count_elements
from laconic.formats.scalar import as_scalar
from laconic.formats.schemes import layout_depends_on_engine
from laconic.stages.quantizing import QuantizingStage
from laconic.stages.targets import matches
from laconic.walk.plan import Plan

Event = dict[str, Any]

# In `ignore` by habit and by default, also where the head has another name.
_HABITUAL = "lm_head"


def remarks(plan: Plan, model: PreTrainedModel, checkpoint: Checkpoint) -> list[Event]:
    """Return the events of a plan, each with a `message` for people.

    Args:
        plan: of a walk.
        model: a skeleton.
        checkpoint: the source's, arranged.
    """
    return [*_group_sizes(plan), *_layouts(plan), *_kept_weights(plan, model, checkpoint)]


def unmatched_patterns(plan: Plan, model: PreTrainedModel) -> Iterator[str]:
    """Yield a warning for each pattern of `ignore` that matches no part of the model.

    Args:
        plan: of a walk.
        model: a skeleton.
    """
    modules = [name for name, _ in model.named_modules() if name]
    leaves = sorted({n.rpartition(".")[2] for n in plan.linears})
    for number, stage in enumerate(plan.stages, plan.first):
        for pattern in stage.ignore:
            if pattern == _HABITUAL or any(matches(n, [pattern]) for n in modules):
                continue
            near = get_close_matches(pattern.removeprefix("re:").strip(".*$^\\"), leaves, 1, 0.4)
            hint = f"its linears end in {', '.join(leaves)}"
            if near:
                exact = near[0] if near[0] in plan.linears else f"re:.*{near[0]}"
                hint = f"did you mean '{exact}'?"
            yield f"stages.{number}.ignore '{pattern}' matches nothing in this model; {hint}"


def _group_sizes(plan: Plan) -> Iterator[Event]:
    """Yield one event with the group sizes that `group_size: auto` has chosen."""
    stages = zip(plan.stages, plan.targets, strict=True)
    automatic = {n for s, names in stages if isinstance(s, QuantizingStage) and s.group_size == "auto" for n in names}
    by_size: dict[int, list[str]] = {}
    for name in sorted(automatic):
        fmt = as_scalar(plan.schemes[name].weights)
        by_size.setdefault(fmt.tiling.group_size or -1, []).append(name)
    if not by_size:
        return
    sizes: list[dict[str, Any]] = [
        {"group_size": size, "linears": len(names), "inputs": sorted({plan.linears[n][1] for n in names})}
        for size, names in sorted(by_size.items(), reverse=True)
    ]
    words = [
        f"{_size_words(s['group_size'])} in {s['linears']} linears of {' or '.join(map(str, s['inputs']))} inputs"
        for s in sizes
    ]
    yield {"event": "group_sizes", "sizes": sizes, "message": f"group_size auto chose {', '.join(words)}"}


def _layouts(plan: Plan) -> Iterator[Event]:
    """Yield one event where the layout of codes depends on the recipe's `engine`."""
    for scheme in {s.name: s for s in plan.schemes.values()}.values():
        if layout_depends_on_engine(scheme):
            words = "vLLM's GPU kernels read it; for its CPU build set engine: vllm-cpu"
            if scheme.storage != "pack-quantized":
                words = "vLLM's CPU build reads it; for GPUs leave engine out"
            message = f"{scheme.name} is written {scheme.storage}, as {words}"
            yield {"event": "layout", "scheme": scheme.name, "storage": scheme.storage, "message": message}


def _size_words(size: int) -> str:
    return f"groups of {size}" if size > 0 else "one scale a channel"


def _kept_weights(plan: Plan, model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[Event]:
    """Yield one event with what a quantizing plan leaves in 16 bit, and why."""
    if not plan.schemes:
        return
    reasons = _Reasons(plan, model)
    elements: Counter[str] = Counter()
    linears: Counter[str] = Counter()
    total = 0
    for name, stored in checkpoint.tensors.items():
        size = count_elements(stored.shape)
        total += size
        linear = name.removesuffix(".weight")
        if linear in plan.schemes and linear != name:
            continue
        reason = reasons.of(name)
        elements[reason] += size
        linears[reason] += linear != name and linear in plan.linears
    parts = [
        {"reason": reason, "share": round(size / max(1, total), 4), "linears": linears[reason]}
        for reason, size in elements.most_common()
    ]
    words = (_words(part) for part in parts)
    share = sum(elements.values()) / max(1, total)
    message = f"{_percent(share)} of the weights stay in 16 bit: {', '.join(words)}"
    yield {"event": "kept", "share": round(share, 4), "parts": parts, "message": message}


def _words(part: Mapping[str, Any]) -> str:
    count = part["linears"]
    noun = f"{count} linear{'s' if count != 1 else ''} " if count else ""
    return f"{_percent(part['share'])} in {noun}{part['reason']}"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %") if share >= 0.0005 else "under 0.1 %"


class _Reasons:
    """Why tensors stay in 16 bit."""

    def __init__(self, plan: Plan, model: PreTrainedModel) -> None:
        self._plan, self._modules = plan, dict(model.named_modules())
        self._embeddings = model.get_input_embeddings()
        self._stages = [s for s in plan.stages if isinstance(s, QuantizingStage)]

    def of(self, tensor: str) -> str:
        plan = self._plan
        owner, _, leaf = tensor.rpartition(".")
        module = self._modules.get(owner)
        if module is None:
            return "tensors outside the model"
        if module is self._embeddings:
            return f"embeddings (shared with {plan.anatomy.head})" if plan.anatomy.tied else "embeddings"
        if isinstance(module, nn.Embedding):
            return "embeddings"
        if owner in plan.anatomy.routers:
            return "routers"
        if owner in plan.linears and leaf == "weight":
            return self._of_linear(owner)
        return "norms and biases"

    def _of_linear(self, name: str) -> str:
        pattern = _first_matching(name, (p for stage in self._stages for p in stage.ignore))
        return f"ignored by '{pattern}'" if pattern else "that no stage targets"


def _first_matching(name: str, patterns: Iterable[str]) -> str | None:
    return next((p for p in patterns if matches(name, [p])), None)
