"""Order of the steps of a recipe: what earlier steps leave, and what a step cannot work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from laconic.checkpoint.source import Source
from laconic.stages.model import ModelStage
from laconic.stages.stage import Stage


@dataclass(frozen=True)
class ModelState:
    """State of the model after some steps of a recipe.

    Attributes:
        quantized: whether linears hold codes.
        reshaped: whether it has another shape than the original.
        pruned: the stage that made weights zero, for messages.
        adapters: number of the stage that left adapters beside the weights.
        cache: the stage that says how the key-value cache is stored, for messages.
        texts: hashes of texts that stages read beside the calibration set, by key of the recipe.
    """

    quantized: bool = False
    reshaped: bool = False
    pruned: str | None = None
    adapters: int | None = None
    cache: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


def check_order(number: int, stage: Stage, state: ModelState, source: Source, model: PreTrainedModel) -> ModelState:
    """Check that a step may follow the steps before it.

    Args:
        number: of its first stage.
        stage: its first stage.
        state: after the steps before.
        source: the original checkpoint.
        model: a skeleton of the original.

    Returns:
        The state after the step, as far as its first stage tells.

    Raises:
        ValueError: if it cannot follow; the message names the fix.
    """
    label = f"stages.{number} ({stage.method})"
    if state.adapters is not None:
        raise ValueError(
            f"{label} comes after stages.{state.adapters}, whose adapters stay beside the weights that they were "
            "trained for; list it before that stage" + ("" if state.quantized else ", or leave out keep_adapters there")
        )
    if not isinstance(stage, ModelStage):
        if state.quantized:
            raise ValueError(
                f"{label} comes after a stage that was quantized and then trained; list it before the training"
            )
        return state
    if number == 0 and source.checkpoint.pickled:
        raise ValueError(
            f"{label} needs the model whole, and reads no pickle weights; convert them to safetensors first "
            "(transformers' save_pretrained writes those)"
        )
    if state.quantized and not stage.accepts_codes:
        raise ValueError(f"{label} changes weights, and earlier stages have quantized them; list it before them")
    if state.pruned and not stage.keeps_zeros:
        raise ValueError(
            f"{label} mixes channels, so that weights pruned by {state.pruned} would not stay zero; list it before "
            "that stage"
        )
    adapters = stage.leaves_adapters(quantized=state.quantized)
    if state.cache and not adapters:
        raise ValueError(f"{label} changes the model whose cache {state.cache} looks at; list it before that stage")
    try:
        texts = stage.check(source, model, quantized=state.quantized, reshaped=state.reshaped)
    except ValueError as e:
        raise ValueError(f"{label}: {e}") from e
    hashes = {f"stages.{number}.{key}": sha for key, sha in texts.items()}
    return replace(
        state,
        reshaped=state.reshaped or stage.reshapes,
        adapters=number if adapters else None,
        texts={**state.texts, **hashes},
    )
