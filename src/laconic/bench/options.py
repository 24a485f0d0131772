"""Options of `laconic bench sparsity`.

This module imports neither torch nor transformers, so that a command line can fill the object quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from laconic.checkpoint.trust import UNTRUSTED, Trust

PARTS = ("linears", "models")
KINDS = ("structured", "unstructured", "block", "2:4")
BATCHES = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """Options of `laconic bench sparsity`.

    Attributes:
        baseline: The model that others are compared with. None: the first one.
        shapes: Shapes of linears, a preset or `4096x14336,...`. None: those of the first model, or of Llama 3 8B.
        scaled_to: Hidden size to which the first model's architecture is scaled; the scaled model has random weights.
        sparsities: Shares of weights to prune.
        block: Side of zero blocks, in weights.
        kinds: Kinds of sparsity, of `KINDS`.
        batches: Numbers of tokens that a linear multiplies at once.
        prompt: Tokens that whole models read, and after which they decode.
        sequences: Number of sequences in a batch of whole models.
        parts: Of `PARTS`. None: both, or linears only if no model is named.
        dtype: `float32`, `bfloat16` or `float16`. None: bfloat16 on a GPU, float32 on a CPU; for folders, their own.
        rounds: Largest number of rounds of one measurement.
        seconds: Time after which no round of a measurement begins.
        device: `auto`, `cpu` or `cuda`.
        trust: Permissions of the models' files.
    """

    baseline: str | None = None
    shapes: str | None = None
    scaled_to: int | None = None
    sparsities: Sequence[float] = (0.5,)
    block: int = 64
    kinds: Sequence[str] = KINDS
    batches: Sequence[int] = BATCHES
    prompt: int = 512
    sequences: int = 1
    parts: Sequence[str] | None = None
    dtype: str | None = None
    rounds: int = 30
    seconds: float = 2.0
    device: str = "auto"
    trust: Trust = UNTRUSTED

    def __post_init__(self) -> None:
        for part in self.parts or ():
            if part not in PARTS:
                raise ValueError(f"--measure {part} is not one of {', '.join(PARTS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"--kinds {kind} is not one of {', '.join(KINDS)}")
        for s in self.sparsities:
            if not 0 < s < 1:
                raise ValueError(f"--sparsity {s} is not between 0 and 1; give the share to prune, as in 0.5")
        counts = {"--batch": min(self.batches, default=0), "--prompt": self.prompt, "--sequences": self.sequences}
        for option, count in counts.items():
            if count < 1:
                raise ValueError(f"{option} {count} is less than 1")
        if self.block < 16 or self.block & (self.block - 1):
            raise ValueError(f"--block {self.block} is not a power of two from 16 on; take 32, 64 or 128")
        if not self.seconds >= 0:
            raise ValueError(f"--seconds {self.seconds:g} is not 0 or more; give a time in seconds")
