"""What an artifact was made of, by what, and what that took."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shlex
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laconic.artifact.artifact import Artifact
from laconic.checkpoint.source import Source
from laconic.recipe import Recipe

# Keys of a recipe that may change between an interruption and going on: the codes do not depend on them.
_TOLD = {"license", "source", "domain"}
_FREE: Any = {
    "output": True,
    "device": True,
    "calibration": {"max_memory_gb", *_TOLD},
    "stages": {"__all__": {"data": {"__all__": _TOLD}, "protect": _TOLD}},
}


def identify(recipe: Recipe, source: Source, windows: Tensor | None) -> dict[str, Any]:
    """What an artifact is made of: with the same, an interrupted run goes on."""
    return {
        "recipe": recipe.model_dump(mode="json", exclude=_FREE),
        "source": {"model": source.name, "sha256": _fingerprint(source)},
        "calibration": windows is not None
        and {"samples": len(windows), "tokens": windows.numel(), "sha256": sha256(windows)},
        "laconic": version("laconic"),
    }


def account(
    begun: float, device: torch.device, seed: int, *, earlier: Path | None = None, **more: Any
) -> dict[str, Any]:
    """What goes into `results/compress.json`. begun: of this step, by the monotonic clock. earlier: the artifact of the
    step before, whose time and memory count too."""
    before = Artifact(earlier).results["compress"] if earlier else {"seconds": 0.0, "peak_memory_bytes": 0}
    return {
        "seconds": round(time.monotonic() - begun + before["seconds"], 2),
        "peak_memory_bytes": max(_peak_memory(device), before["peak_memory_bytes"]),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "command": command_line(),
        "seed": seed,
        "versions": versions(),
        **more,
    }


def command_line() -> str:
    """What was typed, so that a shell takes it again as it was; our own command without the folder it lies in."""
    program, *rest = sys.argv
    return shlex.join(["laconic" if Path(program).name == "laconic" else program, *rest])


def versions() -> dict[str, str]:
    """What a result depends on."""
    packages = ("laconic", "torch", "transformers", "compressed-tensors", "safetensors")
    return {"python": platform.python_version()} | {p: _version_of(p) for p in packages}


@cache
def _version_of(package: str) -> str:
    return version(package)


def _fingerprint(source: Source) -> str:
    """Names, shapes, dtypes, and a sample of the bytes of every weight file."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    tensors = {n: (s.shape, s.dtype) for n, s in sorted(source.checkpoint.tensors.items())}
    digest.update(json.dumps(tensors).encode())
    for file in sorted({s.file for s in source.checkpoint.tensors.values()}):
        size = file.stat().st_size
        with file.open("rb") as f:
            for at in (0, size // 2, max(0, size - 65536)):
                f.seek(at)
                digest.update(f.read(65536))
    return digest.hexdigest()


def forget_peak_memory() -> bool:
    """Let the peak that `account` tells begin anew, where many runs share a process. Whether that can be done here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def sha256(ids: Tensor) -> str:
    """Of token ids, by which they are known again."""
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
