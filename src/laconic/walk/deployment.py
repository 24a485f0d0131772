"""Target of an artifact: the engine, and the number of GPUs over which it splits each linear.

With tensor parallelism of n GPUs, vLLM splits the rows of linears that read the residual stream (q, k, v, gate, up:
column-parallel in its words) and the columns of those that write to it (o, down: row-parallel). A scale that would be
shared by columns of two GPUs cannot be served.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.formats import ScalarFormat
from laconic.formats.schemes import Scheme, for_cpu, regroup
from laconic.formats.support import EngineName
from laconic.formats.tiling import auto_tiling, groups_for
from laconic.stages.quantizing import QuantizingStage
from laconic.structure.anatomy import Anatomy

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Deployment:
    """How an artifact will be served.

    Attributes:
        engine: Name of the engine, as a recipe has it.
        tensor_parallel: Number of GPUs that share each linear.
    """

    engine: EngineName = "vllm"
    tensor_parallel: int = 1


UNDIVIDED = Deployment()


def propose_schemes(
    stage: QuantizingStage, names: Sequence[str], *, anatomy: Anatomy, shapes: Shapes, deployment: Deployment
) -> dict[str, Scheme]:
    """Return the scheme that a stage proposes for each of its linears.

    `group_size: auto` is resolved here: the group divides the inputs of each GPU, and all linears of the experts of a
    layer, which engines fuse, get the same.

    Args:
        stage: the stage.
        names: full names of its linears.
        anatomy: of the model.
        shapes: of all linears, by full name.
        deployment: how the artifact will be served.
    """
    proposed = {n: deployed_scheme(stage.scheme_for(shapes[n]), deployment) for n in names}
    if stage.group_size != "auto":
        return proposed
    columns = {n: shapes[n][1] for n in names}
    for name in row_parallel(anatomy, shapes) & columns.keys():
        columns[name] = math.gcd(columns[name], columns[name] // deployment.tensor_parallel)
    for experts in _experts(anatomy):
        together = [n for n in experts if n in columns]
        columns |= dict.fromkeys(together, math.gcd(*(columns[n] for n in together)))
    return {n: regroup(s, auto_tiling(columns[n])) for n, s in proposed.items()}


def deployed_scheme(scheme: Scheme, deployment: Deployment) -> Scheme:
    """Return a scheme with its codes laid out as the engine reads them.

    Args:
        scheme: of a linear.
        deployment: how the artifact will be served.
    """
    return for_cpu(scheme) if deployment.engine == "vllm-cpu" else scheme


def row_parallel(anatomy: Anatomy, shapes: Shapes) -> set[str]:
    """Return the full names of linears that write to the residual stream, whose columns are split over GPUs.

    Those are the linears that read a tensor of their own, are as high as the residual stream is wide, and are not the
    first of their block.

    Args:
        anatomy: of the model.
        shapes: (out, in) of all linears, by full name.
    """
    names = set()
    for i, taps in enumerate(anatomy.taps):
        block = anatomy.block_name(i)
        width = shapes[f"{block}.{taps[0].linears[0]}"][1]
        alone = (f"{block}.{tap.linears[0]}" for tap in taps[1:] if len(tap.linears) == 1)
        names |= {n for n in alone if shapes[n][0] == width}
    return names


def check_deployment(
    deployment: Deployment, config: Any, anatomy: Anatomy, schemes: Mapping[str, Scheme], shapes: Shapes
) -> None:
    """Check that engines can split the model over its GPUs.

    Args:
        deployment: how the artifact will be served.
        config: of the text model.
        anatomy: of the model.
        schemes: of quantized linears, by full name.
        shapes: of all linears.

    Raises:
        ValueError: if heads, linears or what shares a scale would be cut; the message names the fix.
    """
    gpus = deployment.tensor_parallel
    if gpus == 1:
        return
    _check_heads(gpus, config)
    split_columns = row_parallel(anatomy, shapes)
    for taps, block in ((taps, anatomy.block_name(i)) for i, taps in enumerate(anatomy.taps)):
        for name in (f"{block}.{n}" for tap in taps for n in tap.linears):
            scheme = schemes.get(name)
            if name in split_columns:
                _check_columns(gpus, name, shapes[name][1], scheme)
            else:
                _check_rows(gpus, name, shapes[name][0], scheme, config)


def _check_heads(gpus: int, config: Any) -> None:
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and heads % gpus:
        raise ValueError(
            f"tensor_parallel {gpus} does not divide the {heads} attention heads of the model; use {_divisors(heads)}"
        )
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(groups, int) and groups % gpus and gpus % groups:
        allowed = [n for n in range(1, (heads or groups) + 1) if not (groups % n and n % groups)]
        raise ValueError(
            f"tensor_parallel {gpus} neither divides the {groups} key-value heads of the model nor is a multiple of "
            f"them; use {', '.join(map(str, allowed))}"
        )


def _check_columns(gpus: int, name: str, inputs: int, scheme: Scheme | None) -> None:
    """Check a linear whose columns are split."""
    if inputs % gpus:
        raise ValueError(
            f"tensor_parallel {gpus} does not divide the {inputs} inputs of {name}; use {_divisors(inputs)}"
        )
    if scheme and (scheme.input_transform == 2 or scheme.input_rotation):
        raise ValueError(
            f"tensor_parallel {gpus} cannot divide the inputs of {name}, which {scheme.title} mixes; use another "
            "scheme there, ignore it, or tensor_parallel: 1"
        )
    unit = _column_unit(scheme)
    if (inputs // gpus) % unit == 0:
        return
    fitting = [n for n in range(1, gpus) if inputs % n == 0 and (inputs // n) % unit == 0]
    problem, fix = f"{unit} of them are stored together", "another scheme there, ignore it"
    if scheme and isinstance(scheme.weights, ScalarFormat) and scheme.weights.tiling.group_size:
        problem = f"groups of {unit} would reach over two GPUs"
        if scheme.weights.regroupable:
            fix = f"group_size: auto, one of {groups_for(inputs // gpus)}"
    raise ValueError(
        f"tensor_parallel {gpus} gives a GPU {inputs // gpus} inputs of {name}, and {problem}; use {fix}, or "
        f"tensor_parallel: {fitting[-1] if fitting else 1}"
    )


def _check_rows(gpus: int, name: str, outputs: int, scheme: Scheme | None, config: Any) -> None:
    """Check a linear whose rows are split."""
    groups, channels = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    if isinstance(groups, int) and isinstance(channels, int) and groups < gpus and outputs == groups * channels:
        # Of keys and values each GPU has a copy of one head.
        gpus = groups
    if outputs % gpus:
        raise ValueError(
            f"tensor_parallel {gpus} does not divide the {outputs} outputs of {name}; use {_divisors(outputs)}"
        )
    unit = _row_unit(scheme)
    if (outputs // gpus) % unit:
        fitting = [n for n in range(1, gpus) if outputs % n == 0 and (outputs // n) % unit == 0]
        raise ValueError(
            f"tensor_parallel {gpus} gives a GPU {outputs // gpus} outputs of {name}, and {unit} of them are stored "
            f"together; use another scheme there, ignore it, or tensor_parallel: {fitting[-1] if fitting else 1}"
        )


def _column_unit(scheme: Scheme | None) -> int:
    """Return how many neighbouring columns cannot be separated: those of a group, or codes of whole words."""
    if scheme is None:
        return 1
    return math.lcm(scheme.weights.column_unit or 1, _codes_of_whole_words(scheme))


def _row_unit(scheme: Scheme | None) -> int:
    """Return how many neighbouring rows cannot be separated: those of a block, or zero points of whole words."""
    if scheme is None:
        return 1
    return math.lcm(scheme.weights.row_unit or 1, 1 if scheme.weights.symmetric else _codes_of_whole_words(scheme))


def _codes_of_whole_words(scheme: Scheme) -> int:
    # Our plugin cuts decoded codes where no word ends.
    return 1 if scheme.native else scheme.weights.word_codes


def _divisors(number: int) -> str:
    """Return the usual numbers of GPUs that divide a number."""
    return ", ".join(str(n) for n in range(1, 17) if number % n == 0)


def _experts(anatomy: Anatomy) -> Iterable[list[str]]:
    """Yield the full names of the linears of all experts of a layer."""
    for i, taps in enumerate(anatomy.taps):
        layers: dict[str, list[str]] = {}
        for tap in taps:
            if tap.experts:
                layers.setdefault(tap.experts, []).extend(f"{anatomy.block_name(i)}.{n}" for n in tap.linears)
        yield from layers.values()
