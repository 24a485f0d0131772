"""Times are what was taken, in turns; energy is what the device counted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laconic.bench import energy
from laconic.bench.energy import measure_energy
from laconic.bench.timing import WARM_UP, Times, time_interleaved

CPU = torch.device("cpu")


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_percentiles_are_times_that_were_taken(rounds: list[float]) -> None:
    times = Times(tuple(rounds))
    for share, value in ((0.5, times.median), (0.99, times.percentile(0.99)), (1.0, max(rounds))):
        assert value in rounds
        assert sum(r <= value for r in rounds) >= share * len(rounds)
        assert sum(r < value for r in rounds) < share * len(rounds)


def test_each_has_its_turn_and_the_slower_is_slower() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> object:
        order.append(name)
        time.sleep(seconds)
        return None

    times = time_interleaved(
        {"fast": [lambda: call("fast", 0.004)], "slow": [lambda: call("slow", 0.02)]}, CPU, rounds=4, seconds=60
    )
    assert [len(t.rounds) for t in times.values()] == [4, 4]
    assert order[: 2 * WARM_UP] == ["fast", "slow"] * WARM_UP
    assert order[-8:] == ["fast", "slow"] * 4
    assert 0.004 <= times["fast"].median < 0.02 <= times["slow"].median


def test_time_of_one_of_several_calls_and_at_least_three_rounds() -> None:
    times = time_interleaved({"a": [lambda: time.sleep(0.005)] * 3}, CPU, rounds=9, seconds=0)
    assert len(times["a"].rounds) == 3
    assert 0.005 <= times["a"].median < 0.014


def test_rapl_counts_all_packages_and_begins_anew_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, (now, end) in {"intel-rapl:0": (990_000, 999_999), "intel-rapl:1": (5, 999_999)}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "energy_uj").write_text(str(now))
        (tmp_path / package / "max_energy_range_uj").write_text(str(end))
    # A part of package 0, which counts it already.
    (tmp_path / "intel-rapl:0:0").mkdir()
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("0")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def run() -> None:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("500000")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("250005")

    spent = measure_energy(run, CPU, seconds=0)
    assert spent is not None
    assert (spent.source, spent.runs) == ("RAPL", 1)
    assert spent.joules == pytest.approx(0.51 + 0.25)


def test_no_meter_is_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert measure_energy(lambda: None, CPU, seconds=0) is None
