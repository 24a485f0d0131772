"""Entries of a report: artifacts with their results, or the runs of a study."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from laconic.artifact.artifact import Artifact
from laconic.evaluation.retention import rename_old_keys
from laconic.report.result_schemas import EvaluationResult, ServingResult, SpeedResult, StudyEvaluation, check_result

Result = dict[str, Any]


@dataclass(frozen=True)
class ReportEntry:
    """An artifact or a run of a study, with its results.

    Attributes:
        path: Folder of the artifact.
        recipe: Contents of `recipe.yaml`; None without one.
        log: Events of `log.jsonl`.
        compression: Result `compress`; None without one.
        evaluations: Results of `laconic eval` on one text.
        tasks: Results of `laconic eval tasks`.
        long: Results of `laconic eval long`.
        training: Pairs of a method and its result `training-METHOD`.
        speeds: Results of `laconic bench sparsity`.
        servings: Results of `laconic bench serving`.
        samples: Results with text that the models generated.
        values: Axis values of a run of a study.
        name: Name for tables and charts.
        error: Why a run of a study failed; None for all others.
        domains: Results of `laconic eval domains`.
    """

    path: Path
    recipe: Result | None
    log: list[Result]
    compression: Result | None
    evaluations: list[Result]
    tasks: list[Result] = field(default_factory=list)
    long: list[Result] = field(default_factory=list)
    training: list[tuple[str, Result]] = field(default_factory=list)
    speeds: list[Result] = field(default_factory=list)
    samples: list[Result] = field(default_factory=list)
    values: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    error: str | None = None
    domains: list[Result] = field(default_factory=list)
    servings: list[Result] = field(default_factory=list)

    @property
    def with_intervals(self) -> list[Result]:
        """Results with confidence intervals."""
        return [r for r in (*self.evaluations, *self.domains, *self.tasks) if "intervals" in r]

    @property
    def measurements(self) -> list[Result]:
        """All results of commands that measure, that is without compression and training."""
        return [*self.evaluations, *self.domains, *self.tasks, *self.long, *self.speeds, *self.servings, *self.samples]

    @property
    def measured(self) -> bool:
        """Whether the entry has any result to show."""
        return bool(self.measurements or self.training)

    @property
    def quality(self) -> Result | None:
        """First evaluation with a comparison to the original, or else the first evaluation."""
        with_baseline = [r for r in self.evaluations if has_baseline(r)]
        return next(iter(with_baseline or self.evaluations), None)

    @property
    def source(self) -> str | None:
        """Fingerprint of the original model."""
        sha256: str | None = (self.recipe or {}).get("source", {}).get("sha256")
        return sha256

    @property
    def original(self) -> str | None:
        """Name of the original model in the comparisons."""
        return next((r["baseline"] for r in self.measurements if r.get("baseline")), None)

    @property
    def decoding(self) -> Result | None:
        """Decoding speed: `speedup` over the original and `tokens_per_second`.

        That in an engine at the smallest batch, if it was served; otherwise that with the faster kernels.
        """
        timed = [d for r in self.servings if (d := served_decoding(r))]
        timed = timed or [row["decode"] for r in self.speeds for row in r.get("models", ())[1:]]
        return max(timed, key=lambda d: float(d["speedup"])) if timed else None

    @property
    def speed(self) -> float | None:
        """Decoding speed as a multiple of the original's."""
        return None if self.decoding is None else float(self.decoding["speedup"])

    @property
    def retention(self) -> float | None:
        """Mean task score as a fraction of the original's; the lowest of several sets of tasks."""
        worst = self.worst_tasks
        return None if worst is None else float(worst["mean_retention"])

    @property
    def worst_tasks(self) -> Result | None:
        """Task result with the lowest mean retention."""
        candidates = [t for t in self.tasks if t.get("mean_retention") is not None]
        return min(candidates, key=lambda t: float(t["mean_retention"]), default=None)


def read_entries(folders: Sequence[Path]) -> list[ReportEntry]:
    """Read artifacts and studies.

    Args:
        folders: Folders of artifacts, or of studies.

    Returns:
        One entry per artifact, and one per run of a study.

    Raises:
        ValueError: A folder is neither, a result cannot be read, nothing was measured, or the artifacts have different
            original models.
    """
    entries: list[ReportEntry] = []
    for folder in folders:
        entries += _read_study(folder) if is_study(folder) else [_read_artifact(folder)]
    if not any(e.measured for e in entries):
        raise ValueError("none of these artifacts was evaluated; run 'laconic eval DIR --baseline MODEL' first")
    check_one_original({e.path: (e.source, e.original) for e in entries if e.original and not e.values})
    entries = _prefer_common_setting(entries)
    is_unique = len({e.name for e in entries}) == len(entries)
    return entries if is_unique else [replace(e, name=str(e.path)) for e in entries]


def served_decoding(result: Mapping[str, Any]) -> Result | None:
    """Return the decoding speed of an artifact in an engine, at the smallest batch and the shortest prompts.

    Args:
        result: Result of `laconic bench serving`.

    Returns:
        `speedup` over the original and `tokens_per_second`; None without the original. Of several variants of flags
        the fastest counts.
    """
    if not result.get("baseline"):
        return None
    served = result["models"][len(result["models"]) // 2 :]
    loads = [r for model in served for r in model["rows"] if r.get("decode_speedup")]
    smallest = min(((r["batch"], r["prompt"]) for r in loads), default=None)
    rows = [r for r in loads if (r["batch"], r["prompt"]) == smallest]
    fastest = max(rows, key=lambda r: float(r["decode_speedup"]), default=None)
    if fastest is None:
        return None
    return {"speedup": fastest["decode_speedup"], "tokens_per_second": fastest["decode_tokens_per_second"]}


def is_study(folder: Path) -> bool:
    """Return whether a folder is the output of `laconic sweep`.

    Args:
        folder: The folder.
    """
    return (folder / "results.parquet").exists() and not (folder / "config.json").exists()


def axes_of(entries: Sequence[ReportEntry]) -> list[str]:
    """Return the axes of a study, in the order of its runs.

    Args:
        entries: Runs of studies; other entries have no axes.
    """
    return list(dict.fromkeys(key for e in entries for key in e.values))


def setting_of(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the setting of an evaluation: original, text, context length, windows and dtype.

    Only evaluations with the same setting can be compared.

    Args:
        result: Result of `laconic eval` on one text.
    """
    keys = ("baseline", "text", "context_length", "windows", "dtype")
    return tuple(plain_name(r) if k == "baseline" and (r := result.get(k)) else result.get(k) for k in keys)


def common_settings(entries: Sequence[ReportEntry]) -> list[tuple[Any, ...]]:
    """Return the settings of all comparisons with the original, the most common first.

    Args:
        entries: The entries.
    """
    counts = Counter(s for e in entries for s in dict.fromkeys(setting_of(r) for r in e.evaluations if has_baseline(r)))
    return [setting for setting, _ in counts.most_common()]


def with_setting(entries: Sequence[ReportEntry], setting: tuple[Any, ...]) -> list[ReportEntry]:
    """Return the entries that have a comparison with this setting, each with that evaluation only.

    Args:
        entries: The entries.
        setting: A setting of `setting_of`.
    """
    selected = []
    for entry in entries:
        matches = [r for r in entry.evaluations if has_baseline(r) and setting_of(r) == setting]
        if matches:
            selected.append(replace(entry, evaluations=matches[:1]))
    return selected


def check_one_original(bases: Mapping[Path, tuple[str | None, str]]) -> None:
    """Check that artifacts have the same original model.

    Args:
        bases: Fingerprint of the original model, where it is known, and its name, by folder of the artifact.

    Raises:
        ValueError: The original models differ.
    """
    sources = {source for source, _ in bases.values()}
    if len({plain_name(name) for _, name in bases.values()}) > 1 and (len(sources) > 1 or None in sources):
        pairs = ", ".join(f"{folder} of {name}" for folder, (_, name) in bases.items())
        raise ValueError(f"these artifacts are of different models ({pairs}); report on one model at a time")


def plain_name(name: str) -> str:
    """Return the absolute path of a local folder, and any other name without trailing slashes.

    Args:
        name: Folder of a model, or its name on the Hub.
    """
    return str(Path(name).resolve()) if Path(name).exists() else name.rstrip("/")


def _prefer_common_setting(entries: Sequence[ReportEntry]) -> list[ReportEntry]:
    """Sort evaluations so that the most common setting comes first, and `quality` has it wherever possible."""
    common = next(iter(common_settings(entries)), None)
    return [replace(e, evaluations=sorted(e.evaluations, key=lambda r: setting_of(r) != common)) for e in entries]


def has_baseline(result: Mapping[str, Any]) -> bool:
    """Return whether an evaluation includes a comparison with the original.

    Args:
        result: Result of `laconic eval` on one text.
    """
    return result.get("kl_mean") is not None


def _read_artifact(folder: Path) -> ReportEntry:
    artifact, results = Artifact.open_with_results(folder)
    for name, result in results.items():
        file = folder / "results" / f"{name}.json"
        if name.startswith("eval-") and has_baseline(result):
            check_result(file, result, EvaluationResult, "laconic eval")
        if name.startswith("bench-sparsity") and result.get("models"):
            check_result(file, result, SpeedResult, "laconic bench sparsity")
        if name.startswith("bench-serving"):
            check_result(file, result, ServingResult, "laconic bench serving")
    return _entry(artifact, folder.resolve().name, results)


def _entry(artifact: Artifact, name: str, results: Mapping[str, Result]) -> ReportEntry:
    def results_of(prefix: str) -> list[Result]:
        return [r for n, r in results.items() if n.startswith(prefix)]

    training = [(n.removeprefix("training-"), r) for n, r in results.items() if n.startswith("training-")]
    return ReportEntry(
        artifact.path,
        artifact.recipe,
        artifact.log,
        results.get("compress"),
        results_of("eval-"),
        [rename_old_keys(r) for r in results_of("tasks-")],
        results_of("long-"),
        training,
        results_of("bench-sparsity"),
        results_of("samples-"),
        name=name,
        domains=results_of("domains-"),
        servings=results_of("bench-serving"),
    )


def _read_study(folder: Path) -> list[ReportEntry]:
    """Read the runs of a study, including failed ones, in the order of its table."""
    entries = []
    for file in sorted((folder / "results").glob("*.json")):
        try:
            entries.append(_read_run(folder, file))
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
            raise ValueError(f"{file} is not a result of a sweep; delete it, and run 'laconic sweep' again") from e
    order = _order(folder)
    return sorted(entries, key=lambda e: order.get(e.path.name, len(order)))


def _read_run(folder: Path, file: Path) -> ReportEntry:
    result = json.loads(file.read_text(encoding="utf-8"))
    values, path, recipe = result["values"], folder / result["artifact"], {"recipe": result["recipe"]}
    name = ", ".join(format_value(v) for v in values.values()) or result["run"][:6]
    if result["status"] != "done":
        return ReportEntry(path, recipe, [], None, [], values=values, name=name, error=result["error"])
    # A user may delete an artifact after the sweep has measured it.
    artifact = Artifact(path)
    exists = (path / "config.json").exists()
    entry = _entry(artifact, name, artifact.results) if exists else ReportEntry(path, None, [], None, [], name=name)
    evaluations = result["evaluations"]
    if not (evaluations and isinstance(result["compress"], dict)):
        raise ValueError("nothing was measured")
    for evaluation in evaluations:
        check_result(file, evaluation, StudyEvaluation, "laconic sweep")
    samples = [r for r in evaluations if "samples" in r]
    samples += [r for r in entry.samples if r["samples"] not in [s["samples"] for s in samples]]
    return replace(
        entry, values=values, samples=samples, recipe=recipe, compression=result["compress"], evaluations=evaluations
    )


def _order(folder: Path) -> dict[str, int]:
    """Return the position of each artifact in the table of a study."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "results.parquet"
    try:
        runs = pq.read_table(file, columns=["artifact"]).column("artifact").to_pylist()
    except pa.ArrowException as e:
        raise ValueError(f"{file} is not a table of a sweep; run 'laconic sweep' again, which rewrites it") from e
    return {Path(artifact).name: i for i, artifact in enumerate(runs) if artifact}


def format_value(value: Any) -> str:
    """Format an axis value for tables and names.

    Args:
        value: A number, a text, or any other value of a recipe.

    Returns:
        Floats in the shortest form with up to six digits, all other values as `str` writes them.
    """
    return f"{value:g}" if isinstance(value, float) else str(value)
