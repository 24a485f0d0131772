"""Text sets of a recipe (calibration, recovery, protection of heads), and the tokens that were used of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from laconic.data.mix import TextSource, read_mix
from laconic.data.text import calibration_windows, read_documents
from laconic.recipe import Calibration, Recipe
from laconic.stages.pruning import Protect, PruningStage
from laconic.train.stage import TrainingStage


@dataclass(frozen=True)
class TextSet:
    """One text set of a recipe.

    Attributes:
        key: Dotted path of the set in the recipe.
        use: Purpose of the set.
        spec: Entry of the recipe that names the set.
        length: Largest number of tokens per sequence.
        seed: Seed of the choice of sequences.
    """

    key: str
    use: str
    spec: Calibration | Protect | TextSource
    length: int
    seed: int


def sets_of(recipe: Recipe, *, calibrated: bool) -> list[TextSet]:
    """List every text set that a recipe reads.

    Args:
        recipe: The recipe.
        calibrated: Whether a stage used the calibration set.

    Returns:
        The sets, in the order of the recipe.
    """
    sets = []
    if recipe.calibration and calibrated:
        length = recipe.calibration.max_seq_length
        sets.append(TextSet("calibration", "calibration", recipe.calibration, length, recipe.seed))
    for number, stage in enumerate(recipe.stages):
        if isinstance(stage, PruningStage) and (protect := stage.protect):
            key = f"stages.{number}.protect"
            sets.append(TextSet(key, "protection of heads", protect, protect.max_seq_length, recipe.seed))
        if isinstance(stage, TrainingStage):
            for place, part in enumerate(stage.data):
                key = f"stages.{number}.data.{place}"
                sets.append(TextSet(key, "recovery", part, stage.max_seq_length, recipe.seed))
    return sets


def token_ids(texts: TextSet, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Read again the token sequences that were used of a set; the seed gives the same choice.

    Args:
        texts: The set.
        tokenizer: Tokenizer of the model.

    Returns:
        Token ids, one int64 tensor (n,) per sequence; of a recovery set also the held-out sequences.

    Raises:
        ValueError: The set cannot be read any more.
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
    """Describe, for a reader, which part of a set was used.

    Args:
        texts: The set.

    Returns:
        One phrase per filter, in the order in which they apply.
    """
    spec, length = texts.spec, texts.length
    if not isinstance(spec, TextSource):
        return [
            f"documents joined and cut into windows of {length:,} tokens",
            f"at most {spec.num_calibration_samples:,} of the windows, chosen by seed {texts.seed} among the first "
            f"{4 * spec.num_calibration_samples:,}",
        ]
    filters = []
    if spec.format == "text":
        filters.append(f"documents joined and cut into sequences of {length:,} tokens")
    else:
        filters.append(
            f"conversations cut at {length:,} tokens; conversations without an answer before the cut dropped"
        )
        filters.append("loss on answers only" if spec.answers_only else "loss on whole conversations")
    if spec.limit:
        filters.append(f"the first {spec.limit:,} sequences")
    return [*filters, f"weight {spec.weight:g} in the mix, relative to the other parts"]


def declared(texts: TextSet) -> dict[str, Any]:
    """Return licence, source and domain of a set as the recipe declares them; None for what it does not declare.

    Args:
        texts: The set.
    """
    return {key: getattr(texts.spec, key) for key in ("license", "source", "domain")}
