"""What a page is made of: artifacts with what was measured of them, or the runs of a study."""

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
from laconic.report.figures import Measured, Quality, Speed, check_figures

Result = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """An artifact, and what was measured of it. values: what the axes of a study chose for it. error: why a run of a
    study failed. speeds: results of `laconic bench sparsity`.
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

    @property
    def with_intervals(self) -> list[Result]:
        """Results whose figures have intervals."""
        return [r for r in (*self.evaluations, *self.domains, *self.tasks) if "intervals" in r]

    @property
    def everything(self) -> list[Result]:
        """All results of commands that measured something."""
        return [*self.evaluations, *self.domains, *self.tasks, *self.long, *self.speeds, *self.samples]

    @property
    def measured(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.everything or self.training)

    @property
    def quality(self) -> Result | None:
        """The first comparison with the original, or else the first evaluation."""
        compared = [r for r in self.evaluations if r.get("kl_mean") is not None]
        return next(iter(compared or self.evaluations), None)

    @property
    def source(self) -> str | None:
        """The fingerprint of what it was made from."""
        found: str | None = (self.recipe or {}).get("source", {}).get("sha256")
        return found

    @property
    def original(self) -> str | None:
        """The name of the model that it was compared with."""
        return next((r["baseline"] for r in self.everything if r.get("baseline")), None)

    @property
    def decoding(self) -> Result | None:
        """What was timed of decoding, by the better kernels: speedup, tokens_per_second."""
        timed = [row["decode"] for r in self.speeds for row in r.get("models", ())[1:]]
        return max(timed, key=lambda d: float(d["speedup"])) if timed else None

    @property
    def speed(self) -> float | None:
        """How many times as fast as the original it decodes."""
        return None if self.decoding is None else float(self.decoding["speedup"])

    @property
    def retention(self) -> float | None:
        """The share of the original's scores over tasks that is kept; of several sets of tasks the least."""
        worst = self.worst_tasks
        return None if worst is None else float(worst["mean_retention"])

    @property
    def worst_tasks(self) -> Result | None:
        """The set of tasks of which the least is kept."""
        found = [t for t in self.tasks if t.get("mean_retention") is not None]
        return min(found, key=lambda t: float(t["mean_retention"]), default=None)


def gather(folders: Sequence[Path]) -> list[Evaluated]:
    """Read artifacts, and the runs of studies.

    Raises: ValueError for a folder that is neither, or a result that cannot be read, or nothing measured.
    """
    found: list[Evaluated] = []
    for folder in folders:
        found += _runs(folder) if is_study(folder) else [_artifact(folder)]
    if not any(a.measured for a in found):
        raise ValueError("none of these artifacts was evaluated; run 'laconic eval DIR --baseline MODEL' first")
    check_one_original({a.path: (a.source, a.original) for a in found if a.original and not a.values})
    found = _aligned(found)
    short = [a.name for a in found]
    return found if len(set(short)) == len(short) else [_named(a, str(a.path)) for a in found]


def is_study(folder: Path) -> bool:
    """Whether a folder is what `laconic sweep` leaves."""
    return (folder / "results.parquet").exists() and not (folder / "config.json").exists()


def axes_of(entries: Sequence[Evaluated]) -> list[str]:
    """The axes of the study that these are of."""
    return list(dict.fromkeys(key for e in entries for key in e.values))


def ground(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an evaluation was made on; only those of one ground can be compared."""
    keys = ("baseline", "text", "context_length", "windows", "dtype")
    return tuple(plain_name(r) if k == "baseline" and (r := result.get(k)) else result.get(k) for k in keys)


def grounds(entries: Sequence[Evaluated]) -> list[tuple[Any, ...]]:
    """Every ground on which some were compared with the original, the most common first."""
    counted = Counter(g for e in entries for g in dict.fromkeys(ground(r) for r in e.evaluations if compared(r)))
    return [g for g, _ in counted.most_common()]


def on_ground(entries: Sequence[Evaluated], where: tuple[Any, ...]) -> list[Evaluated]:
    """Those that were measured there, with that evaluation alone."""
    found = []
    for e in entries:
        here = [r for r in e.evaluations if compared(r) and ground(r) == where]
        if here:
            found.append(replace(e, evaluations=here[:1]))
    return found


def check_one_original(bases: Mapping[Path, tuple[str | None, str]]) -> None:
    """bases: of each artifact the fingerprint of its source, where it is known, and the name of its original.

    Raises: ValueError when they are of several models, which no picture can compare.
    """
    sources = {source for source, _ in bases.values()}
    if len({plain_name(name) for _, name in bases.values()}) > 1 and (len(sources) > 1 or None in sources):
        of = ", ".join(f"{folder} of {name}" for folder, (_, name) in bases.items())
        raise ValueError(f"these artifacts are of different models ({of}); draw those of one model at a time")


def plain_name(name: str) -> str:
    """A local folder as one name, however it was written."""
    return str(Path(name).resolve()) if Path(name).exists() else name.rstrip("/")


def _aligned(entries: Sequence[Evaluated]) -> list[Evaluated]:
    """With the evaluation that most of them have first, so that `quality` is of one ground where it can be."""
    most = next(iter(grounds(entries)), None)
    return [replace(e, evaluations=sorted(e.evaluations, key=lambda r: ground(r) != most)) for e in entries]


def compared(result: Mapping[str, Any]) -> bool:
    """Whether an evaluation was made beside the original."""
    return result.get("kl_mean") is not None


def _artifact(folder: Path) -> Evaluated:
    artifact, results = Artifact.measured(folder)
    for name, result in results.items():
        file = folder / "results" / f"{name}.json"
        if name.startswith("eval-") and compared(result):
            check_figures(file, result, Quality, "laconic eval")
        if name.startswith("bench-sparsity") and result.get("models"):
            check_figures(file, result, Speed, "laconic bench sparsity")
    return _of(artifact, folder.resolve().name, results)


def _of(artifact: Artifact, name: str, results: Mapping[str, Result]) -> Evaluated:
    def kind(prefix: str) -> list[Result]:
        return [r for n, r in results.items() if n.startswith(prefix)]

    training = [(n.removeprefix("training-"), r) for n, r in results.items() if n.startswith("training-")]
    return Evaluated(
        artifact.path,
        artifact.recipe,
        artifact.log,
        results.get("compress"),
        kind("eval-"),
        [rename_old_keys(r) for r in kind("tasks-")],
        kind("long-"),
        training,
        kind("bench-sparsity"),
        kind("samples-"),
        name=name,
        domains=kind("domains-"),
    )


def _runs(folder: Path) -> list[Evaluated]:
    """The runs of a study, in the order of its table, failed ones too."""
    found = []
    for file in sorted((folder / "results").glob("*.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            values, path, recipe = result["values"], folder / result["artifact"], {"recipe": result["recipe"]}
            name = ", ".join(spelled(v) for v in values.values()) or result["run"][:6]
            if result["status"] != "done":
                found.append(Evaluated(path, recipe, [], None, [], values=values, name=name, error=result["error"]))
                continue
            # An artifact may have been thrown away after it was measured.
            own = Artifact(path)
            there = (path / "config.json").exists()
            plain = _of(own, name, own.results) if there else Evaluated(path, None, [], None, [], name=name)
            measured = result["evaluations"]
            if not (measured and isinstance(result["compress"], dict)):
                raise ValueError("nothing was measured")
            for figures in measured:
                check_figures(file, figures, Measured, "laconic sweep")
            told = {"recipe": recipe, "compression": result["compress"], "evaluations": measured}
            written = [r for r in measured if "samples" in r]
            written += [r for r in plain.samples if r["samples"] not in [w["samples"] for w in written]]
            found.append(replace(plain, values=values, samples=written, **told))
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as e:
            raise ValueError(f"{file} is no result of a sweep; delete it, and run 'laconic sweep' again") from e
    order = _order(folder)
    return sorted(found, key=lambda e: order.get(e.path.name, len(order)))


def _order(folder: Path) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "results.parquet"
    try:
        runs = pq.read_table(file, columns=["artifact"]).column("artifact").to_pylist()
    except pa.ArrowException as e:
        raise ValueError(f"{file} is no table of a sweep; run 'laconic sweep' again, which writes it anew") from e
    return {Path(artifact).name: i for i, artifact in enumerate(runs) if artifact}


def _named(entry: Evaluated, name: str) -> Evaluated:
    return replace(entry, name=name)


def spelled(value: Any) -> str:
    """A value of an axis as tables and names have it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
