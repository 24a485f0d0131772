"""Stages that need the whole model: structured pruning, training. Each is a step of its own between walks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laconic.checkpoint.source import Source
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.stages.stage import Scope, Stage

Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class ModelTask:
    """A model that a stage treats as a whole.

    Attributes:
        folder: the checkpoint as earlier stages left it.
        original: the checkpoint that the recipe began with.
        calibration: calibration token ids (samples, tokens); None unless the stage needs activations.
        device: where to compute.
        seed: of every random choice.
        scratch: a folder for what a long stage needs to resume after a kill; removed when the stage ends.
        artifact: the folder of the artifact, for files of the stage's own, which stay in it.
        report: called with events of progress.
        trust: what the files of the checkpoint may do.
    """

    folder: Path
    original: Path
    calibration: Tensor | None
    device: torch.device
    seed: int
    scratch: Path
    artifact: Path
    report: Report
    trust: Trust = UNTRUSTED

    @property
    def windows(self) -> Tensor:
        """Calibration token ids (samples, tokens); a TypeError for a stage that declares no need of them."""
        if self.calibration is None:
            raise TypeError("no calibration text was read; declare activations in the method's needs")
        return self.calibration


@dataclass(frozen=True)
class ModelOutcome:
    """The model that a stage leaves.

    Attributes:
        model: the model, None where no weight changed. Linears that hold codes (`runtime.linear.QLinear`) are written
            as these codes.
        config: keys of config.json that changed; a value of None removes the key.
        events: for the log.
        results: for `results/`, by name.
        blocks: numbers of the decoder blocks that remain; None for all of them.
        shards: in place of `model`, functions that compute the tensors of each weight file by their names in it. They
            are called one after another, so that the model is never in memory as a whole.
    """

    model: PreTrainedModel | None
    config: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    blocks: Sequence[int] | None = None
    shards: Sequence[Callable[[], Mapping[str, Tensor]]] = ()


class ModelStage(Stage):
    """A stage that treats the model as a whole."""

    scope: ClassVar[Scope] = "model"

    @property
    def reshapes(self) -> bool:
        """Whether linears, heads or blocks have other sizes afterwards."""
        return False

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that earlier stages made zero stay zero."""
        return True

    @property
    def accepts_codes(self) -> bool:
        """Whether the stage can follow stages that quantize."""
        return False

    def leaves_adapters(self, *, quantized: bool) -> bool:
        """Return whether adapters stand beside unchanged weights afterwards, so that no other stage can follow.

        Args:
            quantized: whether earlier stages leave codes.
        """
        return False

    def check(self, source: Source, model: PreTrainedModel, *, quantized: bool, reshaped: bool) -> Mapping[str, str]:
        """Check everything that can be checked before anything is computed.

        Args:
            source: the original checkpoint.
            model: a skeleton of the original, also where an earlier stage reshapes it.
            quantized: whether earlier stages leave codes.
            reshaped: whether an earlier stage reshapes the model.

        Returns:
            Hashes of texts that the stage reads beside the recipe's calibration, by its key for them; a run that was
            interrupted does not resume with other texts.

        Raises:
            ValueError: if the stage cannot work; the message names the fix.
        """
        return {}

    def check_parallel(self, gpus: int) -> None:
        """Check that engines can split the widths that the stage leaves over GPUs.

        Args:
            gpus: their number.

        Raises:
            ValueError: if they cannot; the message names the fix.
        """

    def warnings(self, source: Source) -> Iterator[str]:
        """Yield what a user should know that is no error.

        Args:
            source: the original checkpoint.
        """
        return iter(())

    def planned_source(self, source: Source, model: PreTrainedModel) -> Source:
        """Return the checkpoint with which later steps are planned, before this stage has written any.

        Args:
            source: the checkpoint as earlier stages are planned to leave it.
            model: a skeleton of the original.
        """
        return source

    @abstractmethod
    def apply(self, task: ModelTask) -> ModelOutcome:
        """Treat the model.

        Killed and called again with the same `task`, it must come to the same result, bit for bit.

        Args:
            task: the model, as earlier stages left it.

        Returns:
            The model that the stage leaves, with figures for the log and `results/`.

        Raises:
            ValueError: if the model or its texts are unfit; the message names the fix.
        """


def run_batches(model: PreTrainedModel, windows: Tensor, batch_size: int, report: Report) -> None:
    """Run a model over token ids, for callers that observe it by hooks.

    Args:
        model: the model; its outputs are dropped.
        windows: token ids (samples, tokens) int64, on any device.
        batch_size: samples run at once.
        report: called with an event after each batch.
    """
    batches = windows.split(batch_size)
    for i, ids in enumerate(batches):
        model(input_ids=ids.to(model.device), use_cache=False)
        report({"event": "work", "done": i + 1, "total": len(batches)})


def check_finite(figures: Tensor, noun: str) -> None:
    """Check figures that were measured on calibration text.

    Args:
        figures: of any shape.
        noun: what they were computed from, in the plural, for the message.

    Raises:
        ValueError: if any is NaN or infinite.
    """
    if not bool(figures.isfinite().all()):
        raise ValueError(f"{noun} hold NaN or infinity; check the model and the calibration text")


def parameter_counts(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, int]:
    """Return the numbers of parameters before and after a stage, for `results/`.

    Args:
        before: the model before the stage.
        after: the model that it leaves.
    """
    models = {"parameters_before": before, "parameters_after": after}
    return {key: sum(p.numel() for p in model.parameters()) for key, model in models.items()}
