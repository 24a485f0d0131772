"""The texts of a recipe: what calibrates, trains, or finds what is protected, and the very tokens that were used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from laconic.data.mix import TextSource, read_mix
from laconic.data.text import calibration_windows, read_documents
from laconic.recipe import Calibration, Recipe
from laconic.stages.pruning import Protect


@dataclass(frozen=True)
class TextSet:
    """key: of the recipe, where it stands. use: what it was used for. length: tokens a sequence has at most."""

    key: str
    use: str
    spec: Calibration | Protect | TextSource
    length: int
    seed: int


def sets_of(recipe: Recipe, *, calibrated: bool) -> list[TextSet]:
    """Every set that a recipe reads. calibrated: whether a stage of it looked at the calibration set."""
    found = []
    if recipe.calibration and calibrated:
        length = recipe.calibration.max_seq_length
        found.append(TextSet("calibration", "calibration", recipe.calibration, length, recipe.seed))
    for number, stage in enumerate(recipe.stages):
        protect = getattr(stage, "protect", None)
        if isinstance(protect, Protect):
            key = f"stages.{number}.protect"
            found.append(TextSet(key, "protection of heads", protect, protect.max_seq_length, recipe.seed))
        for place, part in enumerate(getattr(stage, "data", None) or ()):
            if isinstance(part, TextSource):
                key = f"stages.{number}.data.{place}"
                found.append(TextSet(key, "recovery", part, stage.max_seq_length, recipe.seed))
    return found


def token_ids(texts: TextSet, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The sequences (n,) int64 that were used, read anew: the same choice by the same seed. Of a recovery set, those
    held out of training are among them.

    Raises: ValueError when the set cannot be read any more.
    """
    spec = texts.spec
    if isinstance(spec, TextSource):
        mix = read_mix([spec], tokenizer, length=texts.length, held_out=0, held_out_samples=1, seed=texts.seed)
        return [example.ids for example in mix.parts[0]]
    documents = read_documents(spec.dataset, split=spec.split, config=spec.config)
    return list(
        calibration_windows(
            documents, tokenizer, samples=spec.num_calibration_samples, length=texts.length, seed=texts.seed
        )
    )


def filters_of(texts: TextSet) -> list[str]:
    """In words, what was taken of the set and what was not."""
    spec, length = texts.spec, texts.length
    if not isinstance(spec, TextSource):
        return [
            f"documents joined and cut into windows of {length:,} tokens",
            f"at most {spec.num_calibration_samples:,} of the windows, chosen by seed {texts.seed} among the first "
            f"{4 * spec.num_calibration_samples:,}",
        ]
    said = []
    if spec.format == "text":
        said.append(f"documents joined and cut into sequences of {length:,} tokens")
    else:
        said.append(f"conversations cut at {length:,} tokens; those without an answer within them dropped")
        said.append("answers alone are learnt" if spec.answers_only else "whole conversations are learnt")
    if spec.limit:
        said.append(f"the first {spec.limit:,} sequences")
    return [*said, f"weight {spec.weight:g} in the mix, as a ratio to the other parts'"]


def declared(texts: TextSet) -> dict[str, Any]:
    """What the recipe says of the set's licence, origin and domain."""
    return {key: getattr(texts.spec, key) for key in ("license", "source", "domain")}
