"""How a training went, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laconic.report.chart import Axis, Mark, Series, chart


def loss_curve(name: str, result: Mapping[str, Any]) -> str:
    """The loss of each step, and the held-out loss; a ring where the adapters that were taken stand. result: of
    `results/training-METHOD.json`."""
    what = "nats a token" if result["loss"] == "lm" else "nats a token, to the original"
    trained = [Mark(c["step"], c["loss"], "", size=0) for c in result["curve"]]
    held = [
        Mark(
            m["step"],
            m["loss"],
            f"step {m['step']}: {m['loss']:.4f} held out{', taken' if m['step'] == result['best_step'] else ''}",
            hollow=m["step"] != result["best_step"],
            size=4,
        )
        for m in result["held_out"]
    ]
    series = [
        Series("in training", trained, line=True, colour=7),
        Series("held out (filled: taken)", held, line=True, colour=0),
    ]
    return chart(name, series, Axis("step"), Axis(f"loss ({what})"), height=300)
