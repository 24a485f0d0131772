"""Preview of a compression, before any work: `laconic compress --dry-run` and `laconic.plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laconic.checkpoint.trust import UNTRUSTED, Trust

if TYPE_CHECKING:
    from laconic.pipeline.pipeline import Pipeline, Step
    from laconic.pipeline.walk_step import Walk
    from laconic.recipe import Recipe
    from laconic.walk.forecast import Forecast


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a recipe, matched with a model.

    Attributes:
        number: Position in the recipe's `stages`.
        method: Name of the method.
        scope: What the stage works on, such as `14 linears` or `the whole model`.
    """

    number: int
    method: str
    scope: str

    def __str__(self) -> str:
        return f"{self.method} on {self.scope}"


@dataclass(frozen=True)
class PlannedStep:
    """Stages of a recipe that share one pass through the model.

    Attributes:
        stages: The stages, in order.
        walk: Whether the model streams through them block by block; otherwise they hold it whole.
    """

    stages: tuple[PlannedStage, ...]
    walk: bool


@dataclass(frozen=True)
class CompressionPlan:
    """A recipe matched with a model; `str()` of it is the table of `laconic compress --dry-run`.

    Attributes:
        model: Name of the model.
        output: Folder of the artifact.
        blocks: Number of decoder blocks; None where no stage streams the model block by block.
        steps: Steps of the recipe, in order.
        schemes: Number of linears that the last walk quantizes, by name of the scheme.
        calibration: Number of calibration samples and their length in tokens; None where no stage needs any.
        forecast: Size of the artifact and peak memory in bytes, of the last walk; None where there is no walk.
        notes: What the last walk decides without being asked: group sizes, and what stays in 16 bit.
        warnings: What is allowed, but may surprise.
    """

    model: str
    output: Path
    blocks: int | None
    steps: tuple[PlannedStep, ...]
    schemes: Mapping[str, int]
    calibration: tuple[int, int] | None
    forecast: Forecast | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of the table, each a name and its value."""
        rows = [("model", self.model + (f" ({self.blocks} blocks)" if self.blocks else ""))]
        for number, step in enumerate(self.steps, 1):
            if not self._is_one_walk:
                rows.append((f"step {number}", "a walk" if step.walk else ", ".join(map(str, step.stages))))
            if step.walk:
                rows += [(f"stage {stage.number}", str(stage)) for stage in step.stages]
        if self.blocks:
            rows.append(("schemes", ", ".join(f"{n} x {s}" for s, n in self.schemes.items()) or "none"))
        rows += [("note", note) for note in self.notes]
        samples = "none needed" if self.calibration is None else "{} x {} tokens".format(*self.calibration)
        rows.append(("calibration", samples))
        if self.forecast:
            before, after = self.forecast.bytes_before, self.forecast.bytes_after
            sizes = f"{format_bytes(before)} -> {format_bytes(after)} ({before / after:.2f}x smaller)"
            rows.append(("size", sizes))
            rows.append(("memory", f"about {format_bytes(self.forecast.peak_bytes)} beyond Python and torch"))
        return [*rows, ("output", str(self.output))]

    def to_dict(self) -> dict[str, Any]:
        """Return what `laconic compress --dry-run --json` prints."""
        values: dict[str, Any] = {}
        if self.forecast:
            values = {**asdict(self.forecast), "schemes": dict(self.schemes), "blocks": self.blocks}
        if not self._is_one_walk:
            values["steps"] = [[stage.method for stage in step.stages] for step in self.steps]
        if self.notes:
            values["notes"] = list(self.notes)
        return values | {"output": str(self.output)}

    @property
    def _is_one_walk(self) -> bool:
        return len(self.steps) == 1 and self.steps[0].walk

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join([*(f"warning: {warning}" for warning in self.warnings), *lines])


def plan(
    model: str | None = None,
    recipe: str | Path | dict[str, Any] | Recipe = "gptq-w4a16",
    output: str | Path | None = None,
    *,
    overrides: list[str] | None = None,
    overwrite: bool = False,
    trust: Trust = UNTRUSTED,
) -> CompressionPlan:
    """Check a recipe against a model and return what it will do, without doing it.

    Args:
        model: Folder of a model or its name on the Hub, in place of the recipe's.
        recipe: Name of a gallery recipe, a YAML file, or the keys of a recipe.
        output: Folder of the artifact, in place of the recipe's. Nothing is written there.
        overrides: Changes of the recipe, each `key.path=value`.
        overwrite: Whether the output may exist already.
        trust: Permissions of the model's files.

    Returns:
        The plan, which `print` shows as a table.

    Raises:
        ValueError: The recipe, the model or the output cannot be used; the message names the fix.
    """
    from laconic.pipeline.compression import prepare

    return describe_plan(prepare(model, recipe, output, overrides=overrides, overwrite=overwrite, trust=trust))


def describe_plan(pipeline: Pipeline) -> CompressionPlan:
    """Return what a prepared recipe will do.

    Args:
        pipeline: Result of `prepare`.
    """
    steps = [_walk_step(step.walk) if step.walk else _model_step(step) for step in pipeline.steps]
    first = next((step.walk for step in pipeline.steps if step.walk), None)
    last, windows = pipeline.walk, pipeline.windows
    return CompressionPlan(
        model=pipeline.source.name,
        output=pipeline.output,
        blocks=len(first.plan.anatomy.taps) if first else None,
        steps=tuple(steps),
        schemes=Counter(scheme.name for scheme in last.plan.schemes.values()) if last else {},
        calibration=None if windows is None else (windows.shape[0], windows.shape[1]),
        forecast=pipeline.forecast,
        notes=tuple(event["message"] for event in last.remarks) if last else (),
        warnings=tuple(dict.fromkeys(_warnings(pipeline))),
    )


def _walk_step(walk: Walk) -> PlannedStep:
    plan = walk.plan
    linears = enumerate(zip(plan.stages, plan.targets, strict=True), plan.first)
    stages = [PlannedStage(i, stage.method, f"{len(names)} linears") for i, (stage, names) in linears]
    if plan.cache:
        stage, shape = plan.cache
        scope = f"the cache of {shape.layers} layers x {shape.heads} heads"
        stages.append(PlannedStage(plan.first + len(stages), stage.method, scope))
    return PlannedStep(tuple(stages), walk=True)


def _model_step(step: Step) -> PlannedStep:
    stages = (PlannedStage(i, stage.method, "the whole model") for i, stage in enumerate(step.stages, step.first))
    return PlannedStep(tuple(stages), walk=False)


def _warnings(pipeline: Pipeline) -> Iterator[str]:
    from laconic.checkpoint.files import read_json
    from laconic.stages.model import ModelStage

    calibration, windows = pipeline.recipe.calibration, pipeline.windows
    if (pipeline.source.folder / "adapter" / "adapter_config.json").exists():
        yield f"the adapters in {pipeline.source.folder / 'adapter'} are not part of its weights, and are left out"
    if windows is not None and calibration is not None and len(windows) < calibration.num_calibration_samples:
        asked = calibration.num_calibration_samples
        yield f"the calibration text fills {len(windows)} of {asked} samples; using those"
    if pipeline.source.quantized:
        yield (
            f"{pipeline.source.name} is quantized already ({pipeline.source.quantized}); its weights are decoded, and "
            "errors add up: an original in 16 bit gives a better result"
        )
    written = read_json(pipeline.source.folder / "config.json")
    if written.get("tie_word_embeddings") != pipeline.source.raw.get("tie_word_embeddings"):
        yield (
            "config.json ties the head to the embeddings, but the checkpoint has a head of its own; the head is used, "
            "as in transformers, and the artifact's config.json says so"
        )
    if pipeline.extra_tensors:
        reshapes = any(isinstance(s, ModelStage) and s.reshapes for step in pipeline.steps for s in step.stages)
        smaller = " (they may not fit the smaller model)" if reshapes else ""
        how = "in 16 bit" if pipeline.source.quantized else "unchanged"
        yield f"{pipeline.extra_tensors} go into the artifact {how}{smaller}"
    reshaped = False
    for step in pipeline.steps:
        if step.walk:
            yield from _walk_warnings(step.walk)
            if reshaped:
                yield f"the sizes of {step.stages[0].method} are those of the model before it is made smaller"
        stage = step.stages[0]
        if isinstance(stage, ModelStage):
            yield from stage.warnings(pipeline.source)
            reshaped |= stage.reshapes


def _walk_warnings(walk: Walk) -> Iterator[str]:
    from laconic.formats.support import ENGINES, support
    from laconic.pipeline.engines import closed_to_transformers
    from laconic.walk.remarks import unmatched_patterns

    yield from unmatched_patterns(walk.plan, walk.model)
    engine = walk.recipe.engine
    names = {s.name for s in walk.plan.schemes.values()}
    names |= {"quantized embeddings"} if walk.plan.anatomy.embeddings in walk.plan.schemes else set()
    for name in sorted(names):
        if not (known := support(name, engine)).runs:
            yield f"{ENGINES[engine]} does not serve {name} ({known}); transformers opens it"
    simulated = sorted({s.title for s in walk.plan.schemes.values() if s.simulated})
    if simulated:
        yield f"neither vLLM nor transformers runs {', '.join(simulated)}; its arithmetic is simulated by laconic"
    if any(s.outlier_columns is None for s in walk.plan.schemes.values()):
        yield "the number of columns in 16 bit is known after calibration; the predicted size counts none"
    if reason := closed_to_transformers(walk.plan, walk.model):
        yield f"transformers cannot open {reason}; vLLM and laconic.load can"
    covered = walk.forecast(None).covered
    if walk.plan.schemes and covered < 0.5:
        yield f"only {covered:.0%} of the parameters will be quantized"


def format_bytes(n: float) -> str:
    """Return a number of bytes in words, such as `1.23 MB` (of 10^6 bytes).

    Args:
        n: Number of bytes, not negative.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"
