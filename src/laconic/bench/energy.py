"""Energy that a device reports: through NVML or nvidia-smi for a GPU, through RAPL for a CPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
# Counters are updated every tenth of a second or faster, so this is accurate to a few percent.
MIN_SECONDS = 2.0
Measure = Callable[[Callable[[], None]], float]
"""Runs a function and returns the energy in joules."""


@dataclass(frozen=True)
class Energy:
    """Energy of repeated calls.

    Attributes:
        joules: Energy of all calls.
        runs: Number of calls.
        source: Source of the figure: `NVML`, `nvidia-smi` or `RAPL`.
    """

    joules: float
    runs: int
    source: str


def measure_energy(run: Callable[[], object], device: torch.device, seconds: float = MIN_SECONDS) -> Energy | None:
    """Measure the energy of repeated calls, for the whole device and including idle power.

    Args:
        run: The call.
        device: The device that does the work.
        seconds: Time for which the call is repeated.

    Returns:
        The energy; None if the device does not report it.
    """
    meter = _meter(device)
    if meter is None:
        return None
    source, measure = meter
    runs = 0

    def work() -> None:
        nonlocal runs
        end = time.monotonic() + seconds
        while runs == 0 or time.monotonic() < end:
            run()
            runs += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    joules = measure(work)
    return Energy(joules, runs, source)


def _meter(device: torch.device) -> tuple[str, Measure] | None:
    if device.type == "cuda":
        return _nvml(device) or _smi(device)
    return _rapl(POWERCAP)


def _nvml(device: torch.device) -> tuple[str, Measure] | None:
    """Return a meter by the energy counter of a GPU board, in millijoules since the driver was loaded."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # A missing library, driver, counter or permission: the next meter is tried.
        return None
    return "NVML", lambda work: _difference(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), work) / 1e3


def _smi(device: torch.device) -> tuple[str, Measure] | None:
    """Return a meter by nvidia-smi's power, sampled ten times a second."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None

    def measure(work: Callable[[], None]) -> float:
        with subprocess.Popen([*command, "--loop-ms=100"], stdout=subprocess.PIPE, text=True) as smi:
            start = time.monotonic()
            work()
            seconds = time.monotonic() - start
            smi.terminate()
            watts = [float(line) for line in smi.communicate()[0].split()]
        return seconds * sum(watts) / len(watts) if watts else float("nan")

    return "nvidia-smi", measure


def _rapl(powercap: Path) -> tuple[str, Measure] | None:
    """Return a meter by the counters of all CPU packages, in microjoules; a counter wraps around at its maximum."""
    packages = [p for p in powercap.glob("intel-rapl:*") if p.name.count(":") == 1 and _readable(p / "energy_uj")]
    if not packages:
        return None

    def measure(work: Callable[[], None]) -> float:
        before = [_count(p / "energy_uj") for p in packages]
        work()
        after = [_count(p / "energy_uj") for p in packages]
        maxima = [_count(p / "max_energy_range_uj") for p in packages]
        return sum((b - a) % (m + 1) for a, b, m in zip(before, after, maxima, strict=True)) / 1e6

    return "RAPL", measure


def _difference(read: Callable[[], float], work: Callable[[], None]) -> float:
    before = read()
    work()
    return read() - before


def _readable(file: Path) -> bool:
    try:
        _count(file)
    except (OSError, ValueError):
        return False
    return True


def _count(file: Path) -> int:
    return int(file.read_text())
