"""A stage that needs the model whole: structured pruning, recovery by training. A barrier between walks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.checkpoint.source import Source
from laconic.config import Config

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """What a model stage is given. folder: the model as earlier stages left it. original: the recipe's own model.
    windows: calibration token ids (samples, tokens), None unless the stage observes. scratch: a folder for what a long
    stage needs to go on after a kill; it is removed with the end of the stage. artifact: the folder that grows, for
    folders of the stage's own, which go with the artifact from then on."""

    folder: Path
    original: Path
    windows: Tensor | None
    device: torch.device
    seed: int
    scratch: Path
    artifact: Path
    report: Report
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Remade:
    """What a model stage made. model: dense, None where no weight changed. config: keys of config.json that did (None
    as a value takes a key away). events: for the log. results: for `results/`, by name."""

    model: PreTrainedModel | None
    config: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def run_through(model: PreTrainedModel, windows: Tensor, batch_size: int, report: Report) -> None:
    """Run a model over token ids (samples, tokens), for those who look on by hooks."""
    batches = windows.split(batch_size)
    for i, ids in enumerate(batches):
        model(input_ids=ids.to(model.device), use_cache=False)
        report({"event": "work", "done": i + 1, "total": len(batches)})


def check_finite(figures: Tensor, what: str) -> None:
    """Raises: ValueError when a model, run over its calibration text, gave no numbers to choose by."""
    if not bool(figures.isfinite().all()):
        raise ValueError(f"{what} hold NaN or infinity; check the model and the calibration text")


def sizes_of(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, int]:
    """How many parameters there were, and are, for `results/`."""
    models = {"parameters_before": before, "parameters_after": after}
    return {key: sum(p.numel() for p in model.parameters()) for key, model in models.items()}


class ModelStage(Config):
    """A stage that treats the model as a whole: `remake(work) -> Remade`."""

    scope: ClassVar[Literal["model"]] = "model"
    method: str

    @property
    def observes(self) -> bool:
        """Whether the stage needs the recipe's calibration text."""
        return False

    @property
    def reshapes(self) -> bool:
        """Whether linears, heads or blocks have other sizes afterwards."""
        return False

    @property
    def takes_codes(self) -> bool:
        """Whether the stage works on a model that is quantized already."""
        return False

    def leaves_adapters(self, *, quantized: bool) -> bool:
        """Whether the weights stay as they are, and adapters stand beside them, after which no other stage can come.
        quantized: as for `check`."""
        return False

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        """Look for what cannot work before anything is computed. model: a skeleton; where an earlier stage reshapes
        (`reshaped`), that of the original. quantized: whether earlier stages leave codes.

        Returns: hashes of texts that the stage reads beside the recipe's calibration, by its key for them: with others,
        an interrupted run does not go on. Raises: ValueError that names the fix.
        """
        return {}

    def warnings(self, source: Source) -> Iterator[str]:
        """What a user would want to know that is no error."""
        return iter(())

    def remake(self, work: Work) -> Remade:
        """Do it. Killed and called again with the same `work`, it comes to the same result, bit for bit."""
        raise NotImplementedError
