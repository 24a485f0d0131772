"""Every model type that the installed transformers ships: it works, compared with transformers, or is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers

from every_model import FAULT, STEPS, Report, check
from shrunk import model_types

ROOT = Path(__file__).resolve().parents[2]
# One type of each structure goes through every step, the others through what differs most between models.
FAMILIES = (
    "bloom",  # positions as biases of each sample
    "deepseek_v3",  # latent attention
    "falcon",  # linears of a class of the model's own
    "gemma3",  # a tower, and masks by type of layer
    "gemma4_text",  # inputs of each block that differ between texts
    "gpt2",  # transposed linears
    "gpt_oss",  # experts with biases, gates and ups alternating
    "granitemoehybrid",  # experts under other names, beside state-space layers
    "llama",
    "llama4_text",  # tokens sorted by expert
    "nemotron_h",  # experts without a gate
    "qwen3_5_moe",  # linear attention, experts, a tower
)


def faults(report: Report) -> list[str]:
    found = [f"{step}: {reason}" for step, (result, reason) in report.results.items() if result == FAULT]
    return [*found, report.opens] if report.opens.startswith("no, unsaid") else found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in FAMILIES])
def test_a_model_type_works_or_is_refused(model_type: str, text: Path, tmp_path: Path) -> None:
    assert faults(check(model_type, tmp_path / "model", text, ("stream", "rtn", "cache"))) == []


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_goes_through_every_step(model_type: str, text: Path, tmp_path: Path) -> None:
    assert faults(check(model_type, tmp_path / "model", text, STEPS)) == []


def test_the_page_names_every_model_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    from models_page import PAGE, types_on

    version, types = types_on(PAGE.read_text())
    if version != transformers.__version__:
        pytest.skip(f"the page is of transformers {version}: run scripts/models_page.py")
    assert types == set(model_types())
