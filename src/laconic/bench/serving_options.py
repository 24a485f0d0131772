"""Options of `laconic bench serving`.

This module imports neither torch nor transformers, so that a command line can fill the object quickly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from laconic.checkpoint.trust import UNTRUSTED, Trust

ENGINES = ("vllm", "hf")
DEVICES = ("auto", "cpu", "cuda")
VLLM_PYTHON = "LACONIC_VLLM_PYTHON"


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Options of `laconic bench serving`.

    Attributes:
        baseline: The original model, with which artifacts are compared. None: the first model.
        engine: Of `ENGINES`; `hf` is transformers' own `generate`.
        batches: Numbers of requests that are served at once.
        prompts: Tokens of a prompt.
        new_tokens: Tokens that are generated for each request.
        rounds: Requests of a measurement, as a multiple of the batch; at least 4 are sent.
        dummy: Whether weights are random, so that a folder with only config.json can be timed.
        device: Of `DEVICES`; `auto` is the GPU that the engine finds, or else the CPU.
        dtype: `float32`, `bfloat16` or `float16`. None: the engine's choice.
        engine_args: Flags of the engine by name.
        vary: Flags of the engine with several values each: every combination is measured.
        vllm_python: Python that has vLLM. None: that of the environment variable `LACONIC_VLLM_PYTHON`, or this one.
        start_seconds: Time in which an engine has to be ready.
        trust: What the files of the models may do.
    """

    baseline: str | None = None
    engine: str = "vllm"
    batches: Sequence[int] = (1, 16, 64, 256)
    prompts: Sequence[int] = (512,)
    new_tokens: int = 128
    rounds: int = 2
    dummy: bool = False
    device: str = "auto"
    dtype: str | None = None
    engine_args: Mapping[str, str] = field(default_factory=dict)
    vary: Mapping[str, Sequence[str]] = field(default_factory=dict)
    vllm_python: str | None = None
    start_seconds: float = 900.0
    trust: Trust = UNTRUSTED

    def __post_init__(self) -> None:
        for option, value, choices in (("--engine", self.engine, ENGINES), ("--device", self.device, DEVICES)):
            if value not in choices:
                raise ValueError(f"{option} {value} is not one of {', '.join(choices)}")
        counts = {
            "--batches": min(self.batches, default=0),
            "--prompts": min(self.prompts, default=0),
            "--new-tokens": self.new_tokens - 1,
            "--rounds": self.rounds,
        }
        for option, count in counts.items():
            if count < 1:
                least = "2 or more" if option == "--new-tokens" else "1 or more"
                raise ValueError(f"{option} is too small; give {least}")
        if twice := sorted(self.engine_args.keys() & self.vary.keys()):
            raise ValueError(f"'{twice[0]}' is in --engine-args and in --vary; leave it out of --engine-args")

    @property
    def python(self) -> str:
        """Python that has vLLM."""
        return self.vllm_python or os.environ.get(VLLM_PYTHON) or sys.executable

    @property
    def context(self) -> int:
        """Tokens of the longest request, with its answer."""
        return max(self.prompts) + self.new_tokens

    @property
    def cases(self) -> Iterator[tuple[int, int]]:
        """Pairs of a prompt and a batch, in the order in which they are measured."""
        return product(sorted(set(self.prompts)), sorted(set(self.batches)))

    @property
    def variants(self) -> list[dict[str, str]]:
        """Flags of the engine by variant: the values of `vary` alone, one dict per combination."""
        return [dict(zip(self.vary, values, strict=True)) for values in product(*self.vary.values())]


def parse_flags(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Read flags of an engine.

    Args:
        option: Name of the option, for the error message.
        pairs: Flags as `key=value`.

    Returns:
        Values by name; names have hyphens, as on vLLM's command line.

    Raises:
        ValueError: A pair has no key or no equals sign.
    """
    flags = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        flag, dot, field_name = key.strip().lstrip("-").partition(".")
        if not equals or not flag:
            raise ValueError(f"{option} '{pair}' is no key=value; write it as in {option} kv-cache-dtype=fp8")
        flags[flag.replace("_", "-") + dot + field_name] = value.strip()
    return flags
