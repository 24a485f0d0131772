"""`laconic eval --suite long`: what a quantized cache of keys and values costs and saves, beside 16 bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from laconic.artifact.artifact import Artifact
from laconic.checkpoint.source import load_tokenizer, model_folder
from laconic.data.text import HUB_TEXTS, bos_prefix, evaluation_windows, read_documents
from laconic.evaluate.cache_cost import memory_by_length, speed_by_length
from laconic.evaluate.caches import caches_for, of_caches
from laconic.evaluate.context_perplexity import perplexity_by_position
from laconic.evaluate.long_tasks import check_names, open_longbench, score_by_cache
from laconic.evaluate.needle import FORMS, find_needles, make_prompt
from laconic.pipeline.provenance import command_line, versions
from laconic.runtime.reading import load

PARTS = ("perplexity", "needle", "memory", "speed")
LONGBENCH = "longbench"
LENGTHS = (512, 2048, 8192)


def evaluate_long(
    model: str | Path,
    *,
    kv: Sequence[str] = (),
    text: str = "wikitext2",
    lengths: Sequence[int] | None = None,
    depths: int = 5,
    trials: int = 4,
    windows: int = 4,
    prompt: str = "needle",
    parts: Sequence[str] | None = None,
    tasks: Sequence[str] = (LONGBENCH,),
    data: str | Path | None = None,
    limit: int | None = None,
    chunk: int = 32,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "auto",
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Perplexity through the cache by position, needles, bytes and speed, for each cache.

    kv: caches to measure beside the artifact's own, each as `caches_for` reads it. text: for perplexity, and the hay.
    lengths: of contexts, in tokens; perplexity is measured in windows of the longest. depths, trials: of needles; a
    cell of the heat map is so many trials. prompt: of `needle.FORMS`. windows: of text, at most. chunk: tokens of one
    forward pass. batch_size: prompts read at once, and requests of a batch whose bytes are counted. parts: of `PARTS`,
    all when not given, and `longbench`, which has to be named. tasks, data, limit: of LongBench, the tasks by lm-eval's
    names, a folder of local files in place of the Hub, the first so many documents of each.
    report: told in a few words what is going on.

    Returns what is written to `results/` of the artifact; where LongBench was not run, it says why.
    Raises: ValueError for what the caller can mend.
    """
    for what, number in (
        ("--depths", depths),
        ("--trials", trials),
        ("--windows", windows),
        ("--chunk", chunk),
        ("--batch-size", batch_size),
    ):
        if number < 1:
            raise ValueError(f"{what} {number} is less than 1")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} is less than 1")
    named = parts is not None
    parts = PARTS if parts is None else parts
    if not parts:
        raise ValueError(f"--measure names nothing; name some of {', '.join((*PARTS, LONGBENCH))}")
    _check_names("--measure", parts, (*PARTS, LONGBENCH))
    check_names(tasks)
    _check_names("--prompt", [prompt], tuple(FORMS))
    begun = time.monotonic()
    folder = model_folder(str(model))
    tokenizer = load_tokenizer(folder)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    ours = load(folder, device=place, dtype=getattr(torch, dtype) if dtype else None)
    context = getattr(ours.config.get_text_config(), "max_position_embeddings", None)
    chosen = _lengths(lengths, context)
    caches = caches_for(ours, kv)
    found: dict[str, Any] = {}
    opened = None
    room = chosen[-1] if lengths or context is None else context
    if LONGBENCH in parts:
        try:
            opened = open_longbench(tasks, data, room)
        except ValueError as e:
            if set(parts) == {LONGBENCH}:
                raise
            # What else was asked for is worth having.
            found[LONGBENCH] = {"not_run": str(e)}
    elif not named:
        found[LONGBENCH] = {"not_run": "it has to be named, as in --measure longbench"}
    ids, hay = None, []
    if {"perplexity", "needle"} & set(parts):
        ids = evaluation_windows(
            read_documents(**HUB_TEXTS.get(text, {"dataset": text})), tokenizer, length=chosen[-1], limit=None
        )
        hay = ids[:, len(bos_prefix(tokenizer)) :].flatten().tolist()
    if "needle" in parts:
        # Says what is wrong now rather than in an hour.
        make_prompt(tokenizer, hay, FORMS[prompt], length=chosen[0], depth=0.5, seed="")
    if "perplexity" in parts and ids is not None:
        report(f"perplexity at {chosen[-1]} tokens")
        buckets = perplexity_by_position(ours, ids[:windows], caches, chunk=chunk)
        found["perplexity"] = {
            name: [asdict(b) | {"perplexity": b.perplexity} for b in row] for name, row in buckets.items()
        }
    if "needle" in parts:
        found["needle"] = {name: [] for name in caches}
        for length in chosen:
            report(f"needles at {length} tokens")
            cells = find_needles(
                ours,
                tokenizer,
                hay,
                caches,
                lengths=[length],
                depths=depths,
                trials=trials,
                form=FORMS[prompt],
                chunk=chunk,
                batch_size=batch_size,
                seed=seed,
            )
            for name, row in cells.items():
                found["needle"][name] += [asdict(cell) for cell in row]
    if "memory" in parts:
        report("bytes")
        memory = memory_by_length(ours, caches, chosen, batch=batch_size)
        found["memory"] = {name: [asdict(m) for m in row] for name, row in memory.items()}
    if "speed" in parts:
        report("tokens a second")
        speed = speed_by_length(ours, caches, chosen)
        found["speed"] = {name: [asdict(s) for s in row] for name, row in speed.items()}
    if opened is not None:
        report("LongBench")
        how: dict[str, Any] = {"context_length": room, "limit": limit}
        scored = score_by_cache(ours, tokenizer, caches, opened, chunk=chunk, batch_size=batch_size, **how)
        found[LONGBENCH] = {"tasks": list(tasks), "data": str(data) if data else "Hub", **how, **scored}
    result: dict[str, Any] = {
        "model": str(model),
        "suite": "long",
        "caches": list(caches),
        "kv": list(kv),
        **found,
        "text": text,
        "lengths": chosen,
        "depths": depths,
        "trials": trials,
        "windows": 0 if ids is None else min(windows, len(ids)),
        "prompt": prompt,
        "chunk": chunk,
        "batch_size": batch_size,
        "dtype": str(ours.dtype).removeprefix("torch."),
        "device": place,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 2),
        "command": command_line(),
        "versions": versions() | ({} if opened is None else {"lm-eval": version("lm-eval")}),
    }
    artifact = Artifact(folder)
    if artifact.recipe is not None:
        measured = "" if set(parts) == set(PARTS) else "-" + "+".join(p for p in (*PARTS, LONGBENCH) if p in parts)
        if LONGBENCH in parts:
            measured += "".join(f"-{task}" for task in tasks if task != LONGBENCH) + (f"-{limit}" if limit else "")
        name = f"long-{Path(text).stem}-{chosen[-1]}" + (f"-{prompt}" if "needle" in parts else "") + measured
        artifact.save_result(name + of_caches(kv), result)
    return result


def _lengths(asked: Sequence[int] | None, limit: int | None) -> list[int]:
    """Lengths in order. Raises: ValueError for one that the model's context has not."""
    if asked is None:
        return [n for n in LENGTHS if limit is None or n <= limit] or [limit or LENGTHS[0]]
    for length in asked:
        if length < 2 or (limit is not None and length > limit):
            raise ValueError(f"--lengths {length} is not between 2 and the model's context of {limit}")
    if not asked:
        raise ValueError("--lengths names no length; name some, as in --lengths 512,2048")
    return sorted(set(asked))


def _check_names(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{option} {name} is not one of {', '.join(known)}")
