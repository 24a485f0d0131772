"""Provenance of an artifact: its recipe, source, software and machine, and the time and memory that it took."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shlex
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.artifact.artifact import Artifact
from laconic.checkpoint.source import Source
from laconic.recipe import Recipe

# Keys of a recipe that may change before an interrupted run resumes: the codes do not depend on them.
_FOR_THE_CARDS = {"license", "source", "domain"}
_WITHOUT_EFFECT: Any = {
    "output": True,
    "device": True,
    "calibration": {"max_memory_gb", *_FOR_THE_CARDS},
    "stages": {"__all__": {"data": {"__all__": _FOR_THE_CARDS}, "protect": _FOR_THE_CARDS}},
}


def identify(recipe: Recipe, source: Source, windows: Tensor | None) -> dict[str, Any]:
    """Return what an artifact is made of; an interrupted run resumes only with the same.

    Args:
        recipe: up to the last stage of the step.
        source: the original checkpoint.
        windows: calibration token ids (samples, tokens).
    """
    return {
        "recipe": recipe.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "source": identify_source(source),
        "calibration": windows is not None
        and {"samples": len(windows), "tokens": windows.numel(), "sha256": sha256(windows)},
        "laconic": _version_of("laconic"),
    }


def identify_source(source: Source) -> dict[str, str]:
    """Return the name of a checkpoint, and a hash of its config and of a sample of its weights.

    Args:
        source: The checkpoint.
    """
    return {"model": source.name, "sha256": _fingerprint(source)}


def account(
    start: float, device: torch.device, seed: int, *, earlier: Path | None = None, **more: Any
) -> dict[str, Any]:
    """Return `results/compress.json`: time, memory, device, command and versions.

    Args:
        start: of this step, by the monotonic clock, in seconds.
        device: that computed.
        seed: of the recipe.
        earlier: the artifact of the step before, whose time and memory count too.
        **more: further entries.
    """
    before = Artifact(earlier).results["compress"] if earlier else {"seconds": 0.0, "peak_memory_bytes": 0}
    return {
        "seconds": round(time.monotonic() - start + before["seconds"], 2),
        "peak_memory_bytes": max(_peak_memory(device), before["peak_memory_bytes"]),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "command": command_line(),
        "seed": seed,
        "versions": versions(),
        **more,
    }


def command_line() -> str:
    """Return the command as it was typed, quoted for a shell; our own command without the folder it lies in."""
    program, *rest = sys.argv
    return shlex.join(["laconic" if Path(program).name == "laconic" else program, *rest])


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    packages = ("laconic", "torch", "transformers", "compressed-tensors", "safetensors")
    return {"python": platform.python_version()} | {p: _version_of(p) for p in packages}


@cache
def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # Run from a source tree.
        return "not installed"


def _fingerprint(source: Source) -> str:
    """Return a hash of names, shapes, dtypes, and a sample of the bytes of every weight file."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    tensors = {n: (s.shape, s.dtype) for n, s in sorted(source.checkpoint.tensors.items())}
    digest.update(json.dumps(tensors).encode())
    for file in sorted(source.checkpoint.files):
        size = file.stat().st_size
        with file.open("rb") as f:
            for at in (0, size // 2, max(0, size - 65536)):
                f.seek(at)
                digest.update(f.read(65536))
    return digest.hexdigest()


def reset_peak_memory() -> bool:
    """Reset the peak memory that `account` reports, where many runs share a process.

    Returns:
        Whether the system can do that.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def sha256(ids: Tensor) -> str:
    """Return the SHA-256 of token ids.

    Args:
        ids: of any shape, on the CPU.
    """
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # What getrusage says begins, on Linux, with what the parent process had taken; and on macOS is in bytes.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if kilobytes is None else kilobytes * 1024


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.processor() or platform.machine()})"
    )
