"""The picture of a training shows every loss, at its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from laconic.artifact.artifact import Artifact
from laconic.report.chart import standalone
from laconic.report.entries import read_entries
from laconic.report.loss_curve import loss_curve
from laconic.report.page import write_page

SVG = "{http://www.w3.org/2000/svg}"


def a_result(losses: list[float], held: dict[int, float], **keys: Any) -> dict[str, Any]:
    return {
        "loss": "lm",
        "steps": len(losses),
        "best_step": min(held, key=lambda s: held[s], default=len(losses)),
        "curve": [{"step": i, "loss": v} for i, v in enumerate(losses, 1)],
        "held_out": [{"step": s, "loss": v} for s, v in held.items()],
        "seconds": 1.0,
    } | keys


@pytest.mark.parametrize(
    ("losses", "held"),
    [([3.0, 2.0, 1.5, 1.2], {0: 3.1, 2: 2.2, 4: 1.4}), ([1.0], {}), ([2.0, 2.0], {0: 2.0, 2: 2.0})],
)
def test_points_lie_where_their_losses_are(losses: list[float], held: dict[int, float]) -> None:
    drawn = ElementTree.fromstring(standalone(loss_curve("a & b", a_result(losses, held))))
    circles = [c for g in drawn.iter(f"{SVG}svg") for c in g.iter(f"{SVG}circle")]
    places = {
        colour: [float(c.get("cy", "")) for c in circles if colour in c.get("class", "").split() and c.get("r") == size]
        for colour, size in (("s7", "0"), ("s0", "4"))
    }
    trained, kept = places["s7"], places["s0"]
    assert (len(trained), len(kept)) == (len(losses), len(held))
    points = sorted(zip([*losses, *held.values()], [*trained, *kept], strict=True))
    # A higher loss stands higher, in proportion.
    spread = points[-1][0] - points[0][0]
    for value, y in points:
        share = (value - points[0][0]) / spread if spread else 0
        assert y == pytest.approx(points[0][1] + share * (points[-1][1] - points[0][1]), abs=0.11)
    assert points[0][1] >= points[-1][1]


def test_the_page_shows_a_training_though_nothing_was_evaluated(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    Artifact(tmp_path / "a").save_result("training-lora", a_result([3.0, 2.0], {0: 3.0, 2: 2.1}))
    write_page(read_entries([tmp_path / "a"]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "held-out loss 3.0000 -&gt; 2.1000" in page
