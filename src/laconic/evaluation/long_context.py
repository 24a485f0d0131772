"""`laconic eval long`: cost and savings of quantized caches of keys and values, beside the 16-bit cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laconic.artifact.artifact import Artifact
from laconic.checkpoint.source import load_tokenizer, model_folder
from laconic.data.text import HUB_TEXTS, bos_prefix, evaluation_windows, read_documents
from laconic.evaluation.cache_cost import memory_by_length, speed_by_length
from laconic.evaluation.caches import cache_suffix, caches_for
from laconic.evaluation.context_perplexity import perplexity_by_position
from laconic.evaluation.longbench_scores import open_longbench, score_by_cache
from laconic.evaluation.models import device_named, dtype_named, name_of_dtype
from laconic.evaluation.needle import TEMPLATES, NeedleOptions, find_needles, make_prompt
from laconic.evaluation.options import LONG_PARTS, LONGBENCH, LongOptions
from laconic.evaluation.task_files import OpenTasks
from laconic.evaluation.through_cache import Caches
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load

LENGTHS = (512, 2048, 8192)
Report = Callable[[str], None]


@dataclass(frozen=True)
class _LongContextInputs:
    """All inputs of the measurements.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        caches: The caches to compare.
        lengths: Context lengths, in order.
        longbench_context: Tokens of a prompt and its answer of LongBench.
        windows: (n, length) token ids of the text; None if no part needs a text.
        hay: Token ids of the text without prefixes.
        tasks: Tasks of LongBench; None if they are not measured.
        not_run: The reason why LongBench is not measured; empty if it is, or was not asked for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    caches: Caches
    lengths: list[int]
    longbench_context: int
    windows: Tensor | None
    hay: list[int]
    tasks: OpenTasks | None
    not_run: str


def evaluate_long(
    model: str | Path, options: LongOptions | None = None, *, report: Report = lambda _: None
) -> dict[str, Any]:
    """Measure perplexity by position, needles, bytes and speed through each cache; LongBench if asked for.

    Args:
        model: Folder of an artifact or of any model, or a name on the Hub.
        options: Options of the measurement.
        report: Called with the name of each measurement before it starts.

    Returns:
        The result, as it is saved in `results/` of an artifact. If LongBench was not run, it gives the reason.

    Raises:
        ValueError: An option does not fit the model, or the text or a task cannot be read.
    """
    options = options or LongOptions()
    start = time.monotonic()
    folder = model_folder(str(model), trust=options.trust)
    inputs = _prepare(folder, options)
    measurements = _measure(inputs, options, report)
    result: dict[str, Any] = {
        "model": str(model),
        "suite": "long",
        "caches": list(inputs.caches),
        "kv": list(options.kv),
        **measurements,
        "text": options.text,
        "lengths": inputs.lengths,
        "depths": options.depths,
        "trials": options.trials,
        "windows": 0 if inputs.windows is None else min(options.windows, len(inputs.windows)),
        "prompt": options.prompt,
        "chunk": options.chunk,
        "batch_size": options.batch_size,
        "dtype": name_of_dtype(inputs.model.dtype),
        "device": device_named(options.device),
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "seconds": round(time.monotonic() - start, 2),
        "command": command_line(),
        "versions": versions() | ({} if inputs.tasks is None else {"lm-eval": version("lm-eval")}),
    }
    artifact = Artifact(folder)
    if artifact.recipe is not None:
        artifact.save_result(_file_name(options, inputs.lengths[-1]), result)
    return result


def _prepare(folder: Path, options: LongOptions) -> _LongContextInputs:
    """Open and check everything, so that errors come before hours of measuring."""
    tokenizer = load_tokenizer(folder, trust=options.trust)
    device, dtype = device_named(options.device), dtype_named(options.dtype)
    model = load(folder, device=device, dtype=dtype, trust=options.trust)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = _lengths(options, context)
    caches = caches_for(model, options.kv)
    longbench_context = lengths[-1] if options.lengths or context is None else context
    tasks, not_run = _open_longbench(options, longbench_context)
    windows, hay = None, list[int]()
    if {"perplexity", "needle"} & set(options.measured):
        documents = read_documents(**HUB_TEXTS.get(options.text, {"dataset": options.text}))
        windows = evaluation_windows(documents, tokenizer, length=lengths[-1], limit=None)
        hay = windows[:, len(bos_prefix(tokenizer)) :].flatten().tolist()
    if "needle" in options.measured:
        make_prompt(tokenizer, hay, TEMPLATES[options.prompt], length=lengths[0], depth=0.5, seed="")
    return _LongContextInputs(model, tokenizer, caches, lengths, longbench_context, windows, hay, tasks, not_run)


def _open_longbench(options: LongOptions, context_length: int) -> tuple[OpenTasks | None, str]:
    """Open the tasks of LongBench; return the reason if they cannot be opened and other parts can be measured."""
    if LONGBENCH not in options.measured:
        return None, "it has a command of its own, laconic eval longbench" if options.parts is None else ""
    try:
        return open_longbench(options.longbench, context_length), ""
    except ValueError as e:
        if set(options.measured) == {LONGBENCH}:
            raise
        return None, str(e)


def _measure(inputs: _LongContextInputs, options: LongOptions, report: Report) -> dict[str, Any]:
    """Measure the parts that were asked for, by name."""
    results: dict[str, Any] = {}
    model, caches, lengths = inputs.model, inputs.caches, inputs.lengths
    if "perplexity" in options.measured and inputs.windows is not None:
        report(f"perplexity at {lengths[-1]} tokens")
        windows = inputs.windows[: options.windows]
        buckets = perplexity_by_position(model, windows, caches, chunk=options.chunk)
        results["perplexity"] = {
            name: [asdict(b) | {"perplexity": b.perplexity} for b in row] for name, row in buckets.items()
        }
    if "needle" in options.measured:
        results["needle"] = _find_needles(inputs, options, report)
    if "memory" in options.measured:
        report("bytes")
        memory = memory_by_length(model, caches, lengths, batch=options.batch_size)
        results["memory"] = {name: [asdict(m) for m in row] for name, row in memory.items()}
    if "speed" in options.measured:
        report("tokens per second")
        speed = speed_by_length(model, caches, lengths)
        results["speed"] = {name: [asdict(s) for s in row] for name, row in speed.items()}
    if inputs.tasks is not None:
        report("LongBench")
        results[LONGBENCH] = _score_longbench(inputs, inputs.tasks, options)
    elif inputs.not_run:
        results[LONGBENCH] = {"not_run": inputs.not_run}
    return results


def _find_needles(inputs: _LongContextInputs, options: LongOptions, report: Report) -> dict[str, list[dict[str, Any]]]:
    needles = NeedleOptions(
        depths=options.depths,
        trials=options.trials,
        template=TEMPLATES[options.prompt],
        chunk=options.chunk,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in inputs.caches}
    for length in inputs.lengths:
        report(f"needles at {length} tokens")
        rows = find_needles(inputs.model, inputs.tokenizer, inputs.hay, inputs.caches, [length], needles)
        for name, row in rows.items():
            cells[name] += [cell.to_json() for cell in row]
    return cells


def _score_longbench(inputs: _LongContextInputs, tasks: OpenTasks, options: LongOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {"context_length": inputs.longbench_context, "limit": options.longbench.limit}
    scores = score_by_cache(
        inputs.model,
        inputs.tokenizer,
        inputs.caches,
        tasks,
        chunk=options.chunk,
        batch_size=options.batch_size,
        **settings,
    )
    data = str(options.longbench.data) if options.longbench.data else "Hub"
    return {"tasks": list(options.longbench.tasks), "data": data, **settings, **scores}


def _lengths(options: LongOptions, limit: int | None) -> list[int]:
    """Return context lengths in order.

    Raises:
        ValueError: A length is not within the model's context.
    """
    if options.lengths is None:
        return [n for n in LENGTHS if limit is None or n <= limit] or [limit or LENGTHS[0]]
    option = "--context-length" if set(options.measured) == {LONGBENCH} else "--lengths"
    for length in options.lengths:
        if length < 2 or (limit is not None and length > limit):
            raise ValueError(f"{option} {length} is not between 2 and the model's context of {limit}")
    return sorted(set(options.lengths))


def _file_name(options: LongOptions, length: int) -> str:
    """Return a name of the result that differs between other texts, parts, tasks and caches."""
    parts = options.measured
    name = f"long-{Path(options.text).stem}-{length}" + (f"-{options.prompt}" if "needle" in parts else "")
    if set(parts) != set(LONG_PARTS):
        name += "-" + "+".join(p for p in (*LONG_PARTS, LONGBENCH) if p in parts)
    if LONGBENCH in parts:
        bench = options.longbench
        name += "".join(f"-{task}" for task in bench.tasks if task != LONGBENCH)
        name += f"-{bench.limit}" if bench.limit else ""
    return name + cache_suffix(options.kv)
