"""The root of all stages: a frozen config that says what it needs, with one function at the smallest possible scope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from laconic.config import Config

Scope = Literal["linear", "block", "model", "cache"]


@dataclass(frozen=True)
class Needs:
    """Data that a stage must be given before it can work.

    Attributes:
        activations: calibration activations, or calibration text where the model is treated as a whole.
        second_moments: the Hessian H = E[x x^T] of each linear's input.
        cross_moments: the original model's activations beside those of the compressed model, E[(x_full - x) x^T].
        ranges: smallest and largest value of each input channel.
        links: where a scale can be moved between a linear and what feeds it.
        sequential: whether linears of a block are observed after the earlier ones of the block are compressed.
        survey: a pass over the whole original model before any of it is changed, in which `WeightStage.survey`
            measures each block.
        survey_second_moments: Hessians in that pass.
        gradients: gradients of the loss.
        original_activations: whether the original model's activations alone are enough, so that the compressed model
            need not be run.
        reason: what needs calibration text, for messages; the method's name if empty.
    """

    activations: bool = False
    second_moments: bool = False
    cross_moments: bool = False
    ranges: bool = False
    links: bool = False
    sequential: bool = True
    survey: bool = False
    survey_second_moments: bool = False
    gradients: bool = False
    original_activations: bool = False
    reason: str = ""

    @property
    def observation(self) -> bool:
        """Whether calibration activations have to be observed."""
        return self.activations or self.second_moments or self.cross_moments or self.ranges

    @property
    def calibration(self) -> bool:
        """Whether the recipe must name calibration text."""
        return self.observation or self.survey


class Stage(Config):
    """The config of one stage of a recipe.

    Attributes:
        method: name of the method.
    """

    scope: ClassVar[Scope]
    example: ClassVar[Mapping[str, Any]] = {}
    """Options of a small instance, for a model of two blocks and 64 channels; TEXT stands for a text file."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """New name of each renamed key: the old one is an error, except in the recipe of an artifact."""

    method: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_renamed(cls, data: Any) -> Any:
        for old, new in cls.renamed.items():
            if isinstance(data, dict) and old in data:
                raise ValueError(f"'{old}' is now called '{new}'; rename the key")
        return data

    @property
    def needs(self) -> Needs:
        """Data that the method must be given; the plan adds what the schemes of its linears need."""
        return Needs()

    @property
    def proposed_needs(self) -> Needs:
        """The needs of the stage under the schemes that it proposes."""
        return self.needs


TEXT = "TEXT"


def example_of(kind: type[Stage], text: str) -> dict[str, Any]:
    """Return the small example of a method as a recipe spells it.

    Args:
        kind: the stage class.
        text: the file that its texts are read from.
    """
    return {"method": method_name(kind), **_with_text(dict(kind.example), text)}


def method_name(kind: type[Stage]) -> str:
    """Return the name by which recipes call a stage class.

    Args:
        kind: the stage class.
    """
    return str(kind.model_fields["method"].default)


def _with_text(value: Any, text: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_text(v, text) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_text(v, text) for v in value]
    return text if value == TEXT else value
