"""What a plan says without being asked: group sizes, weights that stay in 16 bit, patterns without effect."""

from __future__ import annotations

from pathlib import Path

import pytest

import laconic
from artifacts import Stage, rtn, tensors
from commands import Laconic
from tiny import make_model, make_recipe

OUTPUTS = {"ignore": ["lm_head", "re:.*o_proj"]}


def test_what_stays_in_16_bit_is_counted_by_reason_in_plan_and_log(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", tied=True)
    artifact = laconic.compress(str(model), {"stages": [rtn("W8A8", **OUTPUTS)]}, tmp_path / "out")
    (event,) = [e for e in artifact.log if e["event"] == "kept"]
    weights = {n: t.numel() for n, t in tensors(model).items()}
    total = sum(weights.values())
    shares = {
        "embeddings (shared with lm_head)": (weights["model.embed_tokens.weight"], 0),
        "ignored by 're:.*o_proj'": (2 * 64 * 64, 2),
        "norms and biases": (sum(n for name, n in weights.items() if "norm" in name), 0),
    }
    assert {p["reason"]: (p["share"], p["linears"]) for p in event["parts"]} == {
        reason: (round(n / total, 4), linears) for reason, (n, linears) in shares.items()
    }
    assert event["share"] == pytest.approx(sum(n for n, _ in shares.values()) / total, abs=1e-4)
    plan = laconic.plan(str(model), {"stages": [rtn("W8A8", **OUTPUTS)]}, tmp_path / "other")
    assert plan.notes == (event["message"],)
    assert "in 2 linears ignored by 're:.*o_proj'" in event["message"]


@pytest.mark.parametrize(
    ("pattern", "fix"),
    [
        ("down_proj", "did you mean 're:.*down_proj'?"),
        ("re:down_proj", "did you mean 're:.*down_proj'?"),
        ("*lm_head", "did you mean 'lm_head'?"),
        ("re:.*vision", "its linears end in down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"),
    ],
)
def test_an_ignore_that_matches_nothing_is_warned_of(pattern: str, fix: str, llama: Path, tmp_path: Path) -> None:
    plan = laconic.plan(str(llama), {"stages": [rtn("W8A8", ignore=[pattern])]}, tmp_path / "out")
    assert plan.warnings[0] == f"stages.0.ignore '{pattern}' matches nothing in this model; {fix}"


@pytest.mark.parametrize("pattern", ["lm_head", "re:.*embed_tokens", "re:.*norm", "model.layers.0.mlp.down_proj"])
def test_an_ignore_of_any_part_of_the_model_is_no_mistake(pattern: str, llama: Path, tmp_path: Path) -> None:
    plan = laconic.plan(str(llama), {"stages": [rtn("W8A8", ignore=[pattern])]}, tmp_path / "out")
    assert not plan.warnings


def test_group_sizes_are_said_once_and_after_a_run_where_they_are_not_the_largest(
    laconic: Laconic, tmp_path: Path
) -> None:
    stage: Stage = rtn("W4A16", group_size="auto")
    sizes = {"hidden_size": 128, "head_dim": 32}
    for name, inputs, note in (
        ("wide", 256, ""),
        (
            "odd",
            192,
            "note: group_size auto chose groups of 128 in 12 linears of 128 inputs, groups of 64 in 2 linears ",
        ),
    ):
        model = make_model(tmp_path / name, intermediate_size=inputs, **sizes)
        recipe = make_recipe(tmp_path / f"{name}.yaml", stage, model=str(model), output=str(tmp_path / f"{name}-out"))
        assert "group_size auto chose groups of 128 in 1" in laconic("compress", recipe, "--dry-run").out
        assert laconic("compress", recipe).err.partition("of 192")[0] == note
