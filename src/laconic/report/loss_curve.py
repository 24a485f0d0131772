"""Chart of the losses of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laconic.report.chart import Axis, Mark, Series, chart


def loss_curve(name: str, result: Mapping[str, Any]) -> str:
    """Draw the training loss of each step and the held-out loss; the filled mark is the selected step.

    Args:
        name: Title of the chart.
        result: Result `training-METHOD`.

    Returns:
        The SVG.
    """
    unit = "nats per token" if result["loss"] == "lm" else "nats per token, relative to the original"
    training = [Mark(c["step"], c["loss"], "", size=0) for c in result["curve"]]
    held_out = [
        Mark(
            m["step"],
            m["loss"],
            f"step {m['step']}: held-out loss {m['loss']:.4f}" + ", selected" * (m["step"] == result["best_step"]),
            hollow=m["step"] != result["best_step"],
            size=4,
        )
        for m in result["held_out"]
    ]
    series = [
        Series("training", training, line=True, colour=7),
        Series("held out (filled: selected)", held_out, line=True, colour=0),
    ]
    return chart(name, series, Axis("step"), Axis(f"loss ({unit})"), height=300)
