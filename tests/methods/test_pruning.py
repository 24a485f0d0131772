"""Pruning stages: which weights go, how many of which linear, and what a restart makes of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import laconic
from artifacts import inputs, linear_events, original, press, recipe, same_bytes, tensors, windows
from laconic.methods.magnitude import Magnitude
from laconic.methods.sparsegpt import SparseGpt
from laconic.methods.wanda import Wanda
from laconic.solvers.allocate import allocate_sparsity, owl_sparsities
from laconic.walk import walk
from linears import correlated, made_of, output_error, weight
from tiny import make_model

W, X = weight(), correlated()


# --- one linear ---


def wanda(W: Tensor, x: Tensor, sparsity: float, n_of_m: tuple[int, int] | None = None) -> Tensor:
    """The paper's listing, row by row in float64; of N:M, n of m *go*."""
    score = W.double().abs() * x.double().square().sum(0).sqrt()
    made = W.clone()
    width = n_of_m[1] if n_of_m else W.shape[1]
    for i, start in itertools.product(range(len(W)), range(0, W.shape[1], width)):
        gone = n_of_m[0] if n_of_m else int(W.shape[1] * sparsity)
        made[i, start + score[i, start : start + width].argsort()[:gone]] = 0
    return made


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_wanda_is_the_papers(sparsity: float) -> None:
    assert torch.equal(made_of(Wanda(sparsity=sparsity), W, X), wanda(W, X, sparsity))


@pytest.mark.parametrize(("structure", "gone"), [("2:4", (2, 4)), ("4:8", (4, 8))])
def test_wanda_in_groups_is_the_papers(structure: str, gone: tuple[int, int]) -> None:
    assert torch.equal(made_of(Wanda(mask_structure=structure), W, X), wanda(W, X, 0.5, gone))


def test_magnitude_takes_the_smallest_of_the_matrix() -> None:
    made = made_of(Magnitude(sparsity=0.3), W, X)
    assert torch.equal(made, W * (W.abs() > W.abs().flatten().sort().values[round(0.3 * W.numel()) - 1]))


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "4x8"])
def test_the_more_a_method_knows_the_closer_it_comes(structure: str) -> None:
    keys = {"mask_structure": structure}
    stages = [Magnitude.model_validate(keys), Wanda.model_validate(keys)]
    stages += [Wanda.model_validate(keys | {"update": True}), SparseGpt.model_validate(keys)]
    blind, looking, answering, column_loop = (output_error(W, made_of(s, W, X), X) for s in stages)
    assert max(answering, column_loop) < looking < blind


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    x = X.clone()
    x[:, [3, 64, 127]] = 0
    for stage in (Wanda(update=True), SparseGpt(), SparseGpt(mask_structure="2:4", actorder="weight")):
        made = made_of(stage, W, x)
        assert made.isfinite().all()
        assert output_error(W, made, x) < output_error(W, made_of(Magnitude(), W, x), x)


# --- sparsities of their own ---


def ratios(folder: Path) -> dict[str, float]:
    """The share of zeros of every linear in the blocks."""
    found = {n.removesuffix(".weight"): t for n, t in tensors(folder).items() if "_proj" in n}
    return {n: float((t == 0).float().mean()) for n, t in found.items()}


def mean(folder: Path) -> float:
    """The share of zeros over all weights of the linears in the blocks."""
    found = [t for n, t in tensors(folder).items() if "_proj" in n]
    return sum(int((t == 0).sum()) for t in found) / sum(t.numel() for t in found)


def test_patterns_give_linears_their_own_ratio(llama: Path, text: Path, tmp_path: Path) -> None:
    stage = {"method": "wanda", "ratios": {"re:.*layers.1.*q_proj": 0.75, "re:.*self_attn.*": 0.25}}
    artifact = press(llama, tmp_path / "out", stage, text=text)
    for name, share in ratios(artifact.path).items():
        expected = 0.75 if name.endswith("layers.1.self_attn.q_proj") else 0.25 if "self_attn" in name else 0.5
        assert share == pytest.approx(expected, abs=0.01), name
    told = {e["linear"]: e["sparsity"] for e in artifact.log}
    assert told == pytest.approx(ratios(artifact.path), abs=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["owl", "search"])
def test_an_allocation_keeps_the_mean(method: str, allocation: str, llama: Path, text: Path, tmp_path: Path) -> None:
    stage = {"method": method, "sparsity": 0.6, "allocation": allocation}
    folder = press(llama, tmp_path / "out", stage, text=text).path
    # A row of 64 inputs loses a whole number of them.
    assert mean(folder) == pytest.approx(0.6, abs=0.5 / 64 if method == "wanda" else 1e-3)
    assert len({round(s, 2) for s in ratios(folder).values()}) > 1


@pytest.mark.parametrize("allocation", ["owl", "search"])
def test_a_block_that_is_not_targeted_has_no_part_in_it(
    allocation: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    stage = {"method": "wanda", "allocation": allocation, "targets": "re:.*layers.1.*"}
    found = ratios(press(llama, tmp_path / "out", stage, text=text).path)
    assert all(share < 0.01 for n, share in found.items() if "layers.0." in n)
    assert all(share > 0.1 for n, share in found.items() if "layers.1." in n)


def test_owl_gives_blocks_what_its_formula_says(llama: Path, text: Path, tmp_path: Path) -> None:
    stage = {"method": "wanda", "sparsity": 0.5, "allocation": "owl", "owl_m": 3.0, "owl_lambda": 0.1}
    found = ratios(press(llama, tmp_path / "out", stage, text=text).path)
    model = original(llama)
    seen = inputs(model, windows(llama, text), list(found))
    outliers = []
    for block in (0, 1):
        scores = [
            (model.get_submodule(n).weight.double().abs() * x.square().mean(0).sqrt()).flatten()
            for n, x in seen.items()
            if f"layers.{block}." in n
        ]
        together = torch.cat(scores)
        outliers.append(float((together > 3 * together.mean()).double().mean()))
    # Two blocks of one size: the one with more outliers keeps lambda more than the mean, the other lambda less.
    more = outliers.index(max(outliers))
    for name, share in found.items():
        assert share == pytest.approx(0.4 if f"layers.{more}." in name else 0.6, abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.2, 0.8), st.floats(0, 0.1), st.integers(0, 99))
def test_owls_formula(outliers: list[float], target: float, spread: float, seed: int) -> None:
    sizes = torch.randint(1, 9, (len(outliers),), generator=torch.Generator().manual_seed(seed)).tolist()
    shares = owl_sparsities(outliers, sizes, target, spread)
    assert sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes) == pytest.approx(target)
    assert max(shares) - min(shares) == pytest.approx(2 * spread if len(set(outliers)) > 1 else 0, abs=1e-6)
    for (a, x), (b, y) in itertools.combinations(zip(outliers, shares, strict=True), 2):
        assert (a - b) * (x - y) <= 1e-12


@given(st.integers(0, 999), st.floats(0.3, 0.7))
def test_no_other_sharing_has_less_error(seed: int, target: float) -> None:
    """Against every allocation on a grid, errors being convex and linear in between."""
    generator = torch.Generator().manual_seed(seed)
    tried = [0.8, 0.6, 0.4, 0.2]
    steps = torch.rand(3, 3, generator=generator).sort(1).values
    errors = [[float(s[k:].sum()) for k in range(4)] for s in steps.flip(1)]
    sizes = torch.randint(1, 5, (3,), generator=generator).tolist()
    shares = allocate_sparsity(errors, sizes, tried, target)
    assert sum(s * n for s, n in zip(shares, sizes, strict=True)) / sum(sizes) == pytest.approx(target)

    def cost(share: float, own: list[float]) -> float:
        at = min(int((0.8 - share) / 0.2 + 1e-9), 2)
        return own[at] + (own[at + 1] - own[at]) * ((tried[at] - share) / 0.2)

    ours = sum(cost(s, own) for s, own in zip(shares, errors, strict=True))
    grid = [0.2 + 0.05 * k for k in range(13)]
    for others in itertools.product(grid, repeat=2):
        last = (target * sum(sizes) - sum(s * n for s, n in zip(others, sizes, strict=False))) / sizes[2]
        if 0.2 <= last <= 0.8:
            assert ours <= sum(cost(s, own) for s, own in zip((*others, last), errors, strict=True)) + 1e-6


# --- heads that are left whole ---


def test_heads_that_matter_on_a_text_keep_their_weights(llama: Path, text: Path, tmp_path: Path) -> None:
    protect = {"dataset": str(text), "heads": 0.25, "num_calibration_samples": 8, "max_seq_length": 32}
    stage = {"method": "sparsegpt", "mask_structure": "2:4", "protect": protect}
    folder = press(llama, tmp_path / "out", stage, text=text).path
    chosen = loudest_heads(llama, windows(llama, text))
    after = tensors(folder)

    def zeros(linear: str, own: slice | tuple[slice, slice]) -> Any:
        return pytest.approx(float((after[f"{linear}.weight"][own] == 0).float().mean()), abs=0.01)

    for b, h in itertools.product(range(2), range(4)):
        prefix, own, group = (
            f"model.layers.{b}.self_attn",
            slice(16 * h, 16 * h + 16),
            slice(h // 2 * 16, h // 2 * 16 + 16),
        )
        assert zeros(f"{prefix}.q_proj", own) == (0.0 if (b, h) in chosen else 0.5)
        assert zeros(f"{prefix}.o_proj", (slice(None), own)) == (0.0 if (b, h) in chosen else 0.5)
        # Two heads read one key and one value.
        read = (b, h) in chosen or (b, h ^ 1) in chosen
        assert zeros(f"{prefix}.k_proj", group) == (0.0 if read else 0.5)
        assert zeros(f"{prefix}.v_proj", group) == (0.0 if read else 0.5)
    assert zeros("model.layers.0.mlp.up_proj", slice(None)) == 0.5
    told = json.loads((folder / "survey.json").read_text())[0]
    assert {
        (b, h) for b in (0, 1) for h in told.get(f"model.layers.{b}.self_attn.o_proj", {}).get("heads", ())
    } == chosen


@torch.no_grad()
def loudest_heads(folder: Path, ids: Tensor) -> set[tuple[int, int]]:
    """The two heads of eight that add most energy to the residual stream, for what is there behind their block."""
    model = original(folder)
    behind: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: behind.append(out.double()))
    names = [f"model.layers.{b}.self_attn.o_proj" for b in (0, 1)]
    seen = inputs(model, ids, names)
    shares = {}
    for b, name in enumerate(names):
        W = model.get_submodule(name).weight.double()
        for h in range(4):
            own = slice(16 * h, 16 * h + 16)
            added = seen[name][:, own] @ W[:, own].T
            shares[b, h] = float(added.square().sum() / behind[b].square().sum())
    return set(sorted(shares, key=lambda k: -shares[k])[:2])


def test_magnitude_needs_no_text_but_that_of_the_heads(llama: Path, text: Path, tmp_path: Path) -> None:
    protect = {"dataset": str(text), "heads": 0.5, "max_seq_length": 32}
    folder = press(llama, tmp_path / "out", {"method": "magnitude", "sparsity": 0.5, "protect": protect}).path
    before, after = tensors(llama), tensors(folder)
    kept = [
        torch.equal(before[n][16 * h : 16 * h + 16], after[n][16 * h : 16 * h + 16])
        for n in (f"model.layers.{b}.self_attn.q_proj.weight" for b in (0, 1))
        for h in range(4)
    ]
    assert sum(kept) == 4


def test_heads_of_a_fused_projection_are_refused(text: Path, tmp_path: Path) -> None:
    fused = make_model(tmp_path / "model", "phi3")
    stage = {"method": "magnitude", "protect": {"dataset": str(text), "heads": 0.5}}
    with pytest.raises(
        ValueError, match=r"stages\.0\.protect: the heads of 'phi3' cannot be told apart: it has no linears "
    ):
        press(fused, tmp_path / "out", stage)


def test_a_mean_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is not between 0\.2 and 0\.8"):
        allocate_sparsity([[1.0, 0.0]], [1], [0.8, 0.2], 0.9)


def test_a_restarted_run_goes_by_the_same_survey(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(event: Mapping[str, Any]) -> None:
        if event["event"] == "block" and event["block"] == 1:
            raise Killed

    stages = [{"method": "sparsegpt", "allocation": "search"}, {"method": "rtn", "scheme": "W8A16"}]
    whole = press(llama, tmp_path / "whole", *stages, text=text).path
    looked: list[int] = []
    look = walk.survey_block
    monkeypatch.setattr(walk, "survey_block", lambda *args, **rest: looked.append(args[1]) or look(*args, **rest))
    with pytest.raises(Killed):
        laconic.compress(str(llama), recipe(*stages, text=text), tmp_path / "out", report=die)
    assert looked == [0, 1]
    press(llama, tmp_path / "out", *stages, text=text)
    assert looked == [0, 1]
    assert same_bytes(whole, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "survey.json").read_text())
    assert kept == json.loads((whole / "survey.json").read_text())
    assert set(kept[0]) == {e["linear"] for e in linear_events(laconic.Artifact(whole))}


@pytest.mark.parametrize("then", [{"method": "smoothquant"}, {"method": "llm_int8"}], ids=lambda s: s["method"])
def test_a_restarted_run_passes_on_what_the_pruned_block_puts_out(
    then: dict[str, Any], llama: Path, text: Path, tmp_path: Path
) -> None:
    """These methods are content with the original model's activations, which a pruned block does not give."""

    class Killed(BaseException):
        pass

    def die(event: Mapping[str, Any]) -> None:
        if event["event"] == "block" and event["block"] == 1:
            raise Killed

    stages = [{"method": "magnitude"}, then]
    whole = press(llama, tmp_path / "whole", *stages, text=text).path
    with pytest.raises(Killed):
        laconic.compress(str(llama), recipe(*stages, text=text), tmp_path / "out", report=die)
    assert same_bytes(whole, press(llama, tmp_path / "out", *stages, text=text).path)


def test_no_survey_where_no_stage_asks_for_one(llama: Path, text: Path, tmp_path: Path) -> None:
    assert not (press(llama, tmp_path / "out", {"method": "wanda"}, text=text).path / "survey.json").exists()


def test_a_pruned_head(llama: Path, text: Path, tmp_path: Path) -> None:
    stage = {"method": "sparsegpt", "targets": "lm_head", "ignore": []}
    head = tensors(press(llama, tmp_path / "out", stage, text=text).path)["lm_head.weight"]
    assert float((head == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
