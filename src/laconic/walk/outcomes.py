"""Checks of what methods return, and errors of it for the log: an outcome that breaks the contract names its method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.formats.storage import scheme_of_shapes, stored_shapes
from laconic.solvers.moments import Moments, output_error
from laconic.stages.block import BlockStage
from laconic.stages.linear import Outcome, WeightStage


def check_outcome(stage: WeightStage, outcome: Any, scheme: Scheme | None, shape: tuple[int, int]) -> Outcome:
    """Check what a method returned for the linears of one task.

    Args:
        stage: the method.
        outcome: what it returned.
        scheme: of the linears; None for a stage that leaves dense weights.
        shape: (out, in) of all their rows.

    Returns:
        The outcome.

    Raises:
        TypeError: if it is no `Outcome`, a note is no number, or its weight does not fit the scheme and the shape.
    """
    where = f"{type(stage).__name__}.compress()"
    if not isinstance(outcome, Outcome):
        raise TypeError(f"{where} returned {type(outcome).__name__}; return laconic.stages.linear.Outcome(weight)")
    for key, value in outcome.notes.items():
        if not isinstance(value, int | float):
            raise TypeError(
                f"{where} returned a {type(value).__name__} as the note '{key}'; notes are numbers for the log: use "
                "float(...) or int(...)"
            )
    weight = outcome.weight
    if scheme is None and not isinstance(weight, Tensor):
        raise TypeError(
            f"{where} returned a {type(weight).__name__} for linears without a scheme; return a dense weight, or "
            "derive from QuantizingStage"
        )
    if scheme is not None and not isinstance(weight, Quantized):
        raise TypeError(
            f"{where} returned a {type(weight).__name__} for linears of scheme {scheme.name}; return a Quantized"
        )
    if tuple(weight.shape) != tuple(shape):
        raise TypeError(f"{where} returned a weight {tuple(weight.shape)} for {tuple(shape)}; return all rows")
    if isinstance(weight, Quantized) and scheme is not None and weight.format != scheme.weights:
        raise TypeError(
            f"{where} returned codes of {weight.format}, and the plan has {scheme.weights} for these linears; take "
            "the format from the task"
        )
    return outcome


def check_block_outcomes(
    stage: BlockStage, outcomes: Any, schemes: Mapping[str, Scheme | None]
) -> Mapping[tuple[str, ...], Any]:
    """Check for which linears of a block a stage returned something.

    Args:
        stage: the method.
        outcomes: what it returned.
        schemes: of the targeted linears, by name within the block.

    Returns:
        The outcomes.

    Raises:
        TypeError: if they are no mapping of tuples of linears, or codes are missing for a linear.
    """
    where = f"{type(stage).__name__}.compress()"
    if not isinstance(outcomes, Mapping) or not all(isinstance(names, tuple) for names in outcomes):
        raise TypeError(f"{where} must return a mapping from tuples of linears to outcomes")
    names = [n for together in outcomes for n in together]
    if unknown := sorted(set(names) - schemes.keys()):
        raise TypeError(
            f"{where} returned an outcome for {unknown[0]}, which is none of its linears within the block "
            f"({', '.join(sorted(schemes))})"
        )
    if stage.quantizes and (missing := sorted(schemes.keys() - set(names))):
        raise TypeError(f"{where} returned no codes for {missing[0]}; return an outcome for each of block.schemes")
    if mixed := [t for t in outcomes if len({schemes[n] for n in t}) > 1]:
        raise TypeError(f"{where} stacked {', '.join(mixed[0])}, whose schemes differ; take stacks from block.stacks()")
    return outcomes


def check_figures(stage: WeightStage, figures: Any, linears: Iterable[str]) -> None:
    """Check what a stage measured of a block in the survey.

    Args:
        stage: the method.
        figures: what it returned.
        linears: names of its linears within the block.

    Raises:
        TypeError: if they are no figures of these linears, or no numbers.
    """
    where = f"{type(stage).__name__}.survey()"
    if not isinstance(figures, Mapping) or not all(isinstance(f, Mapping) for f in figures.values()):
        raise TypeError(f"{where} must return a mapping from names of linears to their figures by name")
    if unknown := sorted(figures.keys() - set(linears)):
        raise TypeError(f"{where} returned figures of {unknown[0]}; return those of block.linears")
    for key, value in ((k, v) for of_linear in figures.values() for k, v in of_linear.items()):
        if not all(isinstance(v, int | float) for v in (value if isinstance(value, list) else [value])):
            raise TypeError(f"{where} returned a {type(value).__name__} as '{key}'; return numbers, or lists of them")


def check_tensors(
    name: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Check that a linear's tensors are those that its scheme has in a file.

    Args:
        name: of the linear.
        tensors: of its codes, by their name within the linear.
        scheme: by the plan; the number of its outlier columns may be open.
        shape: (out, in) of the linear.
        dtype: of the model.

    Raises:
        TypeError: if a name, shape or dtype differs.
    """
    if scheme.outlier_columns is None:
        columns = scheme_of_shapes(scheme, {n: tuple(t.shape) for n, t in tensors.items()}).outlier_columns
        scheme = replace(scheme, outlier_columns=columns)
    expected = stored_shapes(scheme, shape, dtype)
    for n in sorted(expected.keys() | tensors.keys()):
        planned, chosen = _spell(expected.get(n)), _spell(tensors.get(n))
        if planned != chosen:
            raise TypeError(
                f"{name}: the method left {chosen} as {n}, and the scheme has {planned}; compute parameters in the "
                "task's dtype, and add side tensors and transforms to the scheme"
            )


def _spell(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def error_figures(before: Tensor, after: Tensor, moments: Moments | None) -> dict[str, float]:
    """Return the errors of a compressed weight, for the log.

    Args:
        before: (out, in) float32, the dense weight.
        after: Likewise, the compressed one, decoded.
        moments: Statistics of the input, if it was observed.

    Returns:
        `weight_error`, the relative squared error, and with a Hessian `output_error`, that of the output.
    """
    error = float((before - after).square().sum() / before.square().sum().clamp(min=1e-30))
    figures = {"weight_error": error}
    if moments is not None and moments.H is not None:
        figures["output_error"] = output_error(before, after, moments.H)
    return figures
