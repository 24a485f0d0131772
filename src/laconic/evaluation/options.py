"""Options of the four kinds of evaluation: texts, text domains, tasks, and long contexts through a cache.

This module imports neither torch nor transformers, so that a command line can fill these objects quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.evaluation.longbench import is_longbench

LONGBENCH = "longbench"
LONG_PARTS = ("perplexity", "needle", "memory", "speed")
NEEDLE_PROMPTS = ("needle", "comment", "passkey")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of `laconic eval text`.

    Attributes:
        text: `wikitext2`, `c4`, a file, or a dataset of the Hub.
        baseline: The original model, to compare with.
        context_length: Tokens per window. None: the model's context, at most 2048. Windows do not overlap.
        windows: Largest number of windows. None: all that the text fills.
        dtype: `float32`, `bfloat16` or `float16`. None: the dtype of the checkpoint.
        device: `auto`, `cpu` or `cuda`.
        trust: Permissions of the models' files.
        generate: Number of openings of the text that both models continue.
    """

    text: str = "wikitext2"
    baseline: str | None = None
    context_length: int | None = None
    windows: int | None = None
    dtype: str | None = None
    device: str = "auto"
    trust: Trust = UNTRUSTED
    generate: int = 0


@dataclass(frozen=True, kw_only=True)
class DomainOptions:
    """Options of `laconic eval domains`.

    Attributes:
        domains: Name of each domain, and its text in the form of `TextOptions.text`.
        baseline: The original model, to compare with.
        context_length: Tokens per window. None: the model's context, at most 2048. Windows do not overlap.
        windows: Largest number of windows of each text. None: all that the text fills.
        dtype: `float32`, `bfloat16` or `float16`. None: the dtype of the checkpoint.
        device: `auto`, `cpu` or `cuda`.
        trust: Permissions of the models' files.
    """

    domains: Mapping[str, str]
    baseline: str | None = None
    context_length: int | None = None
    windows: int | None = None
    dtype: str | None = None
    device: str = "auto"
    trust: Trust = UNTRUSTED

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("no domain is named; give some, as in web=c4.jsonl")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of `laconic eval tasks`.

    Attributes:
        tasks: lm-eval's names of tasks, groups or tags, or patterns of them.
        suite: `standard`: the tasks of `suites.STANDARD`, in place of `tasks`. Tasks whose documents are missing in
            `data` are skipped, and listed in the result.
        baseline: The original model, to compare with.
        data: Folder of JSONL files with the documents, in place of the Hub.
        limit: Number of documents of each task, from its first one. None: all.
        fewshot: Number of examples in a prompt. None: the task's default.
        batch_size: Prompts per forward pass.
        context_length: Largest number of tokens of a prompt and its answer. None: the model's context. A longer prompt
            is truncated at its beginning.
        dtype: `float32`, `bfloat16` or `float16`. None: the dtype of the checkpoint.
        device: `auto`, `cpu` or `cuda`.
        trust: Permissions of the models' files.
        kv: At most one cache, in the form of a recipe's stage, with which the artifact generates in place of its own.
        quiet: Whether to hide lm-eval's progress bars.
    """

    tasks: Sequence[str] = ()
    suite: str | None = None
    baseline: str | None = None
    data: str | Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int = 8
    context_length: int | None = None
    dtype: str | None = None
    device: str = "auto"
    trust: Trust = UNTRUSTED
    kv: Sequence[str] = ()
    quiet: bool = False

    def __post_init__(self) -> None:
        _check_at_least({"--limit": self.limit}, 1)
        _check_at_least({"--fewshot": self.fewshot}, 0)
        _check_at_least({"--batch-size": self.batch_size}, 1)
        if len(self.kv) > 1:
            raise ValueError(
                "tasks are measured with one cache; give --kv once, or compare several with laconic eval long"
            )


@dataclass(frozen=True, kw_only=True)
class LongBenchOptions:
    """Options of LongBench, in `laconic eval longbench`.

    Attributes:
        tasks: LongBench's tasks by lm-eval's names; `longbench` is the group of all.
        data: Folder of JSONL files with the documents, in place of the Hub.
        limit: Number of documents of each task, from its first one. None: all.
    """

    tasks: Sequence[str] = (LONGBENCH,)
    data: str | Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_at_least({"--limit": self.limit}, 1)
        for name in self.tasks:
            if not is_longbench(name):
                raise ValueError(
                    f"laconic eval longbench measures LongBench's tasks only (longbench, longbench_hotpotqa, ...), not "
                    f"'{name}'; measure others with laconic eval tasks"
                )


@dataclass(frozen=True, kw_only=True)
class LongOptions:
    """Options of `laconic eval long`.

    Attributes:
        kv: Caches to measure beside the 16-bit one and the artifact's own, each in the form of a recipe's stage.
        text: Text for perplexity, and the haystack; in the form of `TextOptions.text`.
        lengths: Context lengths in tokens; windows of perplexity have the largest of them. None: 512, 2048 and 8192, as
            far as the model's context allows.
        depths: Number of depths at which a needle is placed.
        trials: Number of needles per length and depth.
        windows: Largest number of windows of the text.
        prompt: Wording of needles, one of `NEEDLE_PROMPTS`.
        parts: Some of `LONG_PARTS` and `longbench`. None: `LONG_PARTS`.
        longbench: Options of the part `longbench`.
        chunk: Tokens per forward pass through the cache.
        batch_size: Needle prompts per forward pass; also the rows of the batch whose bytes are counted.
        seed: Seed of the needles.
        dtype: `float32`, `bfloat16` or `float16`. None: the dtype of the checkpoint.
        device: `auto`, `cpu` or `cuda`.
        trust: Permissions of the models' files.
    """

    kv: Sequence[str] = ()
    text: str = "wikitext2"
    lengths: Sequence[int] | None = None
    depths: int = 5
    trials: int = 4
    windows: int = 4
    prompt: str = "needle"
    parts: Sequence[str] | None = None
    longbench: LongBenchOptions = field(default_factory=LongBenchOptions)
    chunk: int = 32
    batch_size: int = 8
    seed: int = 0
    dtype: str | None = None
    device: str = "auto"
    trust: Trust = UNTRUSTED

    def __post_init__(self) -> None:
        counts = {"--depths": self.depths, "--trials": self.trials, "--windows": self.windows, "--chunk": self.chunk}
        _check_at_least(counts | {"--batch-size": self.batch_size}, 1)
        if not self.measured:
            raise ValueError(f"--measure names nothing; name some of {', '.join(LONG_PARTS)}")
        # Not offered: on the command line LongBench has a command of its own.
        _check_known("--measure", [part for part in self.measured if part != LONGBENCH], LONG_PARTS)
        _check_known("--prompt", [self.prompt], NEEDLE_PROMPTS)
        if self.lengths is not None and not self.lengths:
            raise ValueError("--lengths names no length; name some, as in --lengths 512,2048")

    @property
    def measured(self) -> Sequence[str]:
        """Names of the parts to measure."""
        return LONG_PARTS if self.parts is None else self.parts


EvalOptions = TextOptions | DomainOptions | TaskOptions | LongOptions


def _check_at_least(values: Mapping[str, int | None], least: int) -> None:
    for option, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{option} {value} is less than {least}")


def _check_known(option: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name} is not one of {', '.join(known)}")
