"""What the walk shows a stage is what the whole model, run by transformers, would show."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from artifacts import inputs, original, tokens
from laconic.calibrate.stream import StreamStorage
from laconic.methods.awq import Awq
from laconic.methods.smoothquant import SmoothQuant
from laconic.solvers.moments import Moments
from laconic.structure.anatomy import dissect
from tiny import ARCHITECTURES, make_model
from watching import Learn, Watch, stroll

WINDOWS = tokens(6, 40)


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "precise", dtype=torch.float32)


def taps_of(model: PreTrainedModel) -> list[list[tuple[str, ...]]]:
    """Full names of the linears on every tap, block by block."""
    anatomy = dissect(model)
    return [
        [tuple(f"{anatomy.block_name(i)}.{n}" for n in tap.linears) for tap in taps]
        for i, taps in enumerate(anatomy.taps)
    ]


def assert_seen(moments: Moments, x: torch.Tensor, x_full: torch.Tensor | None = None) -> None:
    """These are the moments of these activations."""
    H = x.T @ x / len(x)
    assert moments.tokens == len(x)
    torch.testing.assert_close(moments.H.double(), H, rtol=1e-3, atol=1e-4 * float(H.diagonal().mean()))
    assert float(moments.lo.min()) == pytest.approx(float(x.min()), rel=1e-3)
    assert float(moments.hi.max()) == pytest.approx(float(x.max()), rel=1e-3)
    torch.testing.assert_close(moments.peak.double(), x.abs().amax(0), rtol=1e-3, atol=0)
    if x_full is not None:
        torch.testing.assert_close(
            moments.D.double(), (x_full - x).T @ x / len(x), rtol=1e-3, atol=1e-4 * float(H.diagonal().mean())
        )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tap_and_the_head_see_what_they_see_in_the_whole_model(arch: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", arch, dtype=torch.float32)
    (seen,) = stroll(folder, tmp_path / "out", WINDOWS, Watch(targets=("Linear", "lm_head")))
    expected = inputs(original(folder), WINDOWS, list(seen))
    assert list(seen)[-1] == "lm_head"
    for name, moments in seen.items():
        assert_seen(moments, expected[name])


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "together"])
def test_a_linear_sees_the_compressed_linears_before_it(sequential: bool, precise: Path, tmp_path: Path) -> None:
    stage = Watch(factor=0.5, true_sequential=sequential, with_original=True)
    (seen,) = stroll(precise, tmp_path / "out", WINDOWS, stage)
    model = original(precise)
    full = inputs(model, WINDOWS, list(seen))
    for taps in taps_of(model):
        for together in [[t] for t in taps] if sequential else [taps]:
            now = inputs(model, WINDOWS, [tap[0] for tap in together])
            for tap in together:
                assert_seen(seen[tap[0]], now[tap[0]], full[tap[0]])
                for linear in tap:
                    model.get_submodule(linear).weight.data *= 0.5


def test_a_later_stage_sees_what_an_earlier_one_made_of_its_block(precise: Path, tmp_path: Path) -> None:
    first, second = Watch(factor=0.5, targets="re:.*self_attn.*"), Watch(factor=0.25, targets="re:.*mlp.*")
    seen = [s for one in stroll(precise, tmp_path / "out", WINDOWS, first, second) for s in one.items()]
    model = original(precise)
    for taps in taps_of(model):
        for tap in taps:
            assert_seen(dict(seen)[tap[0]], inputs(model, WINDOWS, [tap[0]])[tap[0]])
            for linear in tap:
                model.get_submodule(linear).weight.data *= 0.5 if "self_attn" in linear else 0.25


@torch.no_grad()
def outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """What every block puts out."""
    made: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, output: made.append(output))
    model(input_ids=WINDOWS, use_cache=False)
    return made


def assert_nothing_differs(seen: dict[str, Moments]) -> None:
    """The compressed model's activations are the original's."""
    for moments in seen.values():
        assert float(moments.D.abs().max()) < 1e-5 * float(moments.H.diagonal().max())


@pytest.mark.parametrize("budget", [1e9, 0], ids=["in memory", "in files"])
@pytest.mark.parametrize("kinds", ["LL", "LW", "WL", "LWL", "LLWW"])
def test_stages_of_one_block_learn_from_the_original_one_after_another(
    kinds: str, budget: float, precise: Path, tmp_path: Path
) -> None:
    stages = [Learn() if kind == "L" else Watch(with_original=True) for kind in kinds]
    for seen in stroll(precise, tmp_path / "out", WINDOWS, *stages, budget=budget):
        assert_nothing_differs(seen)
    expected = outputs(original(precise))
    for stage in stages:
        if isinstance(stage, Learn):
            for found, output in zip(stage._taught, expected, strict=True):
                torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-4)


def test_scales_that_moved_are_no_difference_from_the_original(precise: Path, tmp_path: Path) -> None:
    # Twice, so that the second scales come on top of the first.
    moving = (SmoothQuant(), SmoothQuant(alpha=0.8))
    (seen,) = stroll(precise, tmp_path / "out", WINDOWS, *moving, Watch(with_original=True))
    assert_nothing_differs(seen)


def test_scales_that_moved_for_another_are_no_difference_from_the_original(tmp_path: Path) -> None:
    # In Falcon one norm feeds attention and MLP: scales found for the one are moved into the other as well.
    folder = make_model(tmp_path / "model", "falcon", dtype=torch.float32)
    moving = Awq(scheme="W2A16", group_size=16, targets="re:.*query_key_value")
    watching = Watch(with_original=True, targets="re:.*h.0.mlp.dense_h_to_4h")
    (seen,) = stroll(folder, tmp_path / "out", WINDOWS, moving, watching)
    assert_nothing_differs(seen)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_how_many_samples_run_at_once_changes_nothing(batch: int, precise: Path, tmp_path: Path) -> None:
    (seen,) = stroll(precise, tmp_path / "out", WINDOWS, Watch(), batch=batch)
    expected = inputs(original(precise), WINDOWS, list(seen))
    for name, moments in seen.items():
        assert_seen(moments, expected[name])


def test_activations_in_a_file_are_those_in_memory(precise: Path, tmp_path: Path) -> None:
    runs = [
        stroll(precise, tmp_path / str(budget), WINDOWS, Watch(factor=0.5, with_original=True), budget=budget)[0]
        for budget in (1e9, 0)
    ]
    for in_memory, in_file in zip(*(run.values() for run in runs), strict=True):
        assert torch.equal(in_memory.H, in_file.H)
        assert torch.equal(in_memory.D, in_file.D)
    assert (tmp_path / "0.partial" / "activations-1.writing").stat().st_size == WINDOWS.numel() * 64 * 4
    assert not list((tmp_path / "1000000000.0.partial").glob("activations*"))


def test_a_disk_without_room_for_activations_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"no room for 2\.0 GB of calibration activations"):
        StreamStorage(0, tmp_path / "spill").allocate((1000, 1000, 1000), torch.bfloat16, 1)
