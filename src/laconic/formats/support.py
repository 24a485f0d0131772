"""Support of schemes in engines, and its evidence: the one table from which warnings and documents are made.

`tried` means that an artifact was run there and compared with our own reading; `refused`, that the engine read it and
refused. `no kernel` is what the engine's source says. Everything else is `not tried`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from laconic.formats.schemes import PRESETS

EngineName = Literal["vllm", "vllm-cpu", "transformers"]
Outcome = Literal["tried", "refused", "no kernel", "not tried"]


@dataclass(frozen=True)
class Engine:
    """An engine of one version on one kind of device.

    Attributes:
        title: Engine and version, for people.
        device: Device on which it was tried.
    """

    title: str
    device: str

    def __str__(self) -> str:
        return f"{self.title}, {self.device}" if self.device else self.title


@dataclass(frozen=True)
class Support:
    """Outcome of one scheme in one engine.

    Attributes:
        outcome: What is known.
        note: A condition, or what was seen.
    """

    outcome: Outcome
    note: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.note}" if self.note else self.outcome

    @property
    def runs(self) -> bool:
        """Whether the scheme is not known to fail."""
        return self.outcome in ("tried", "not tried")


ENGINES: Mapping[EngineName, Engine] = {
    "vllm": Engine("vLLM 0.32", "H100/H200"),
    "vllm-cpu": Engine("vLLM 0.32", "CPU"),
    "transformers": Engine("transformers 5.23", ""),
}
"""The engines of the table, by the name that a recipe's `engine` has."""

_TRIED, _NOT_TRIED, _NO_KERNEL = Support("tried"), Support("not tried"), Support("no kernel")
_AVX512, _VNNI = Support("tried", "needs AVX-512"), Support("tried", "exact with VNNI")
_HUMMING = Support("tried", "Humming; log-probabilities within 0.015-0.037 of ours")
_READ_THEN_REFUSED = Support("refused", "reads the config, and has no kernel")
_REGISTERED = Support("tried", "with `import laconic`, simulated")

_SIMULATED = "with our plugin, simulated"


def _h200(note: str, distance: float) -> Support:
    """Return what benchmarks/serve_matrix.py found on an H200.

    Args:
        note: The kernel in vLLM's log, or a condition.
        distance: Mean distance of log-probabilities from ours, on a random Llama of 512 channels in bfloat16.
    """
    return Support("tried", f"{note}; {distance:.3f}".removeprefix("; "))


SUPPORT: Mapping[str, tuple[Support, Support, Support]] = {
    "W8A16": (_h200("Machete", 0.020), _NO_KERNEL, _TRIED),
    "W4A16": (_h200("Machete; Humming at groups of 32", 0.021), _AVX512, _TRIED),
    "W4A16_ASYM": (_h200("Machete", 0.029), _AVX512, _TRIED),
    "W3A16": (_HUMMING, _NO_KERNEL, _TRIED),
    "W2A16": (_HUMMING, _NO_KERNEL, _TRIED),
    "W8A8": (_h200("CUTLASS", 0.051), _VNNI, _TRIED),
    "W4A8": (
        _h200("Machete; refuses what `engine: vllm-cpu` writes", 0.047),
        Support("tried", "as `engine: vllm-cpu` writes it"),
        _TRIED,
    ),
    "W7A7": (_h200(_SIMULATED, 0.090), Support("not tried", _SIMULATED), _REGISTERED),
    "W6A6": (_h200(_SIMULATED, 0.166), Support("tried", _SIMULATED), _REGISTERED),
    "W4A6": (_h200(_SIMULATED, 0.158), Support("not tried", _SIMULATED), _REGISTERED),
    "W4A4": (_h200(_SIMULATED, 0.538), Support("not tried", _SIMULATED), _REGISTERED),
    "FP8": (_h200("", 0.096), _NO_KERNEL, _TRIED),
    "FP8_DYNAMIC": (_h200("", 0.117), _TRIED, _TRIED),
    "FP8_BLOCK": (_h200("", 0.111), Support("tried", "needs AMX"), _TRIED),
    "NVFP4A16": (_h200("Humming", 0.025), _READ_THEN_REFUSED, _TRIED),
    "NVFP4": (
        Support("not tried", "FP4 arithmetic on Blackwell alone, elsewhere Humming without rounding activations"),
        Support("no kernel", "its own emulation, in float32, has our log-probabilities to 1e-3"),
        Support("tried", "in bfloat16"),
    ),
    "MXFP4A16": (_h200("Humming", 0.119), _READ_THEN_REFUSED, _TRIED),
    "MXFP4": (
        Support("not tried", "FP4 arithmetic on Blackwell alone, elsewhere Humming without rounding activations"),
        _READ_THEN_REFUSED,
        Support("tried", "in bfloat16"),
    ),
}
"""By preset, what is known of it in each of `ENGINES`, in their order. A varied preset is as its preset."""


PARTS: Mapping[str, tuple[Support, Support, Support]] = {
    "quantized head": (_h200("W4A16, W8A16", 0.021), Support("tried", "W4A16"), _TRIED),
    "quantized embeddings": (
        _h200("W4A16, W8A16; beside a quantized head", 0.020),
        Support("refused", "its kernel needs Triton"),
        Support("tried", "where the model has one scheme"),
    ),
}
"""Outcomes likewise of parts of a model beside the linears of its blocks."""


def support(preset: str, engine: EngineName) -> Support:
    """Return what is known of a preset, or of a part of a model, in an engine; presets of plugins are not tried.

    Args:
        preset: Name of the preset, or of a part.
        engine: Name of the engine.
    """
    rows = {**SUPPORT, **PARTS}
    return rows[preset][[*ENGINES].index(engine)] if preset in rows else _NOT_TRIED


def tried_in(preset: str) -> str:
    """Return the engines in which a preset was tried, for a table.

    Args:
        preset: Name of the preset.
    """
    tried = {e: s for e in ENGINES if (s := support(preset, e)).outcome == "tried"}
    plugin = PRESETS[preset].engine == "laconic"
    return "; ".join(f"{ENGINES[e]} ({s.note})" if plugin else str(ENGINES[e]) for e, s in tried.items())


def engine_table() -> str:
    """Return the whole table as Markdown."""
    rows = {**SUPPORT, **PARTS}
    lines = [f"| scheme | {' | '.join(map(str, ENGINES.values()))} |", "|---" * (1 + len(ENGINES)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows.items())])
