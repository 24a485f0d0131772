"""Energy that a device says it took: NVML's or nvidia-smi's of a GPU, RAPL's of a CPU."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
# Counters move in steps of up to a tenth of a second.
LONG_ENOUGH = 2.0


@dataclass(frozen=True)
class Energy:
    """joules: taken while `runs` calls ran. source: who said so."""

    joules: float
    runs: int
    source: str


def energy_of(run: Callable[[], object], device: torch.device, seconds: float = LONG_ENOUGH) -> Energy | None:
    """What calls take of the device as a whole, idle power included, repeated for so many seconds.

    Returns: None where the device reports none.
    """
    meter = _meter(device)
    if meter is None:
        return None
    source, measure = meter
    runs = 0

    def work() -> None:
        nonlocal runs
        until = time.monotonic() + seconds
        while runs == 0 or time.monotonic() < until:
            run()
            runs += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    joules = measure(work)
    return Energy(joules, runs, source)


Measure = Callable[[Callable[[], None]], float]


def _meter(device: torch.device) -> tuple[str, Measure] | None:
    if device.type == "cuda":
        return _nvml(device) or _smi(device)
    return _rapl(POWERCAP)


def _nvml(device: torch.device) -> tuple[str, Measure] | None:
    """The counter of a GPU's board, in millijoules since the driver was loaded."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no driver, no such counter, no right to read it: all the same here
        return None
    return "NVML", lambda work: _difference(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), work) / 1e3


def _smi(device: torch.device) -> tuple[str, Measure] | None:
    """Power as nvidia-smi prints it, ten times a second, times time."""
    which = str(torch.cuda.get_device_properties(device).uuid)
    command = ["nvidia-smi", f"--id=GPU-{which}", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None

    def measure(work: Callable[[], None]) -> float:
        with subprocess.Popen([*command, "--loop-ms=100"], stdout=subprocess.PIPE, text=True) as smi:
            begun = time.monotonic()
            work()
            took = time.monotonic() - begun
            smi.terminate()
            watts = [float(line) for line in smi.communicate()[0].split()]
        return took * sum(watts) / len(watts) if watts else float("nan")

    return "nvidia-smi", measure


def _rapl(powercap: Path) -> tuple[str, Measure] | None:
    """The counters of all CPU packages, in microjoules, which begin anew at their largest value."""
    packages = [p for p in powercap.glob("intel-rapl:*") if p.name.count(":") == 1 and _readable(p / "energy_uj")]
    if not packages:
        return None

    def measure(work: Callable[[], None]) -> float:
        before = [_count(p / "energy_uj") for p in packages]
        work()
        after = [_count(p / "energy_uj") for p in packages]
        ends = [_count(p / "max_energy_range_uj") for p in packages]
        return sum((b - a) % (end + 1) for a, b, end in zip(before, after, ends, strict=True)) / 1e6

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
