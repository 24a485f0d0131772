"""Hash the artifacts of every gallery recipe and method on tiny models, to show that a refactoring changed no byte.

    python scripts/artifact_hashes.py write before.json          # with the old code
    python scripts/artifact_hashes.py write after.json           # with the new code
    python scripts/artifact_hashes.py compare before.json after.json
    python scripts/artifact_hashes.py write some.json --only /llama --only reap/    # one architecture and one recipe

Hashed are the weight files, their index and config.json. Hashes hold on one machine: processors differ in the last bit.
Recipes are those of the gallery, unchanged but for their texts and the length of their training; a recipe that a model
cannot take is recorded as refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

import laconic
from laconic.recipe import gallery
from tiny import ARCHITECTURES, SHARED, make_model, make_text

# Wide enough for groups of 128, the default of most schemes.
_SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 128, "ffn_dim": 256, "word_embed_proj_dim": 128},
    "gpt2": {"hidden_size": 128, "n_inner": 256},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 256},
    "falcon": {"hidden_size": 128, "ffn_hidden_size": 256},
    "falcon_40b": {"hidden_size": 128, "ffn_hidden_size": 256},
    "qwen3_moe": _SIZES | {"moe_intermediate_size": 128},
    "qwen2_moe": _SIZES | {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256},
    "glm4_moe": _SIZES | {"moe_intermediate_size": 128},
}
# A mixture whose experts are shown every token, as methods that look at the original model too need it.
_ALL_EXPERTS = "qwen3_moe"

# Every method and variation that the gallery has none of: made of a tiny Llama, and `reap` of a mixture.
_MORE: dict[str, list[dict[str, Any]]] = {
    "kvquant": [{"method": "kvquant", "k_bits": 3, "v_bits": 3}],
    "kvquant-budget": [{"method": "kvquant", "budget_bits": 3.0, "per_head": True}],
    "kivi-rotated": [{"method": "kivi", "k_bits": 2, "v_bits": 2, "rotation": "attention", "max_error": 0.2}],
    "kv_per_token": [{"method": "kv_per_token"}],
    "kv_int8": [{"method": "kv_int8"}],
    "kv_fp8": [{"method": "rtn", "scheme": "W4A16"}, {"method": "kv_fp8"}],
    "magnitude": [{"method": "magnitude", "sparsity": 0.5}],
    "wanda-owl": [{"method": "wanda", "sparsity": 0.5, "allocation": "owl", "owl_lambda": 0.1}],
    "wanda-search": [{"method": "wanda", "sparsity": 0.5, "allocation": "search"}],
    "sparsegpt-2of4-rtn": [
        {"method": "sparsegpt", "mask_structure": "2:4"},
        {"method": "rtn", "scheme": "W4A16_ASYM"},
    ],
    "depth-gptq": [{"method": "depth", "blocks": 1}, {"method": "gptq", "scheme": "W4A16"}],
    "qlora": [{"method": "qlora"}],
    "gptq-qlora": [{"method": "gptq", "scheme": "W4A16"}, {"method": "qlora"}],
    "lora-gptq": [{"method": "lora"}, {"method": "gptq", "scheme": "W8A8", "dynamic": False}],
    "outliers": [{"method": "gptq", "scheme": "W4A16", "outlier_ratio": 0.05, "low_rank": 4}],
    "outliers-asymmetric": [
        {"method": "gptq", "scheme": "W4A16_ASYM", "asymmetric_calibration": 1.0, "outlier_ratio": 0.05}
    ],
    "autoround-plain": [{"method": "autoround", "scheme": "W3A16", "asymmetric_calibration": False}],
    "threshold": [{"method": "llm_int8", "threshold": 2.5}],
    "actorder": [{"method": "gptq", "scheme": "W3A16", "actorder": "weight", "group_size": 32}],
    "static": [{"method": "rtn", "scheme": "FP8"}],
    "nvfp4": [{"method": "gptq", "scheme": "NVFP4"}],
    "mxfp4": [{"method": "gptq", "scheme": "MXFP4"}],
    "w6a6": [{"method": "smoothquant"}, {"method": "gptq", "scheme": "W6A6"}],
    "w4a4": [{"method": "awq", "scheme": "W4A4"}],
    "head": [
        {"method": "gptq", "scheme": "W8A16", "targets": "lm_head", "ignore": []},
        {"method": "gptq", "scheme": "W4A16"},
    ],
    "mixed": [
        {"method": "gptq", "scheme": "W4A16", "ignore": ["lm_head", "re:.*down_proj"]},
        {"method": "gptq", "scheme": "W8A8", "targets": "re:.*down_proj"},
    ],
}
_REAP = [{"method": "reap", "sparsity": 0.5}, {"method": "gptq", "scheme": "W4A16", "group_size": 32}]
_TRAINING = {"lora", "qlora"}
_BLOCKWISE = {"autoround", "zeroquant"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    write = actions.add_parser("write", help="make the artifacts and write their hashes")
    write.add_argument("file", type=Path)
    write.add_argument(
        "--only", action="append", help="make only artifacts whose RECIPE/ARCHITECTURE contains this; may be repeated"
    )
    compare = actions.add_parser("compare", help="compare two files of hashes")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "write":
        arguments.file.write_text(json.dumps(hashes(arguments.only or [""]), indent=1) + "\n")
    else:
        sys.exit(differences(*(json.loads(f.read_text()) for f in (arguments.before, arguments.after))))


def hashes(only: Sequence[str]) -> dict[str, Any]:
    """Make every artifact whose name contains one of some texts.

    Args:
        only: The texts; "" for all artifacts.

    Returns:
        Hashes of files by the artifact's name, `RECIPE/ARCHITECTURE`; "refused" for a recipe that was.

    Raises:
        ValueError: A text is in no name.
    """
    recipes = {name: laconic.recipe.read_recipe(name)["stages"] for name in gallery()}
    cases = [(f"{name}/{arch}", arch, stages) for arch in (*ARCHITECTURES, *SHARED) for name, stages in recipes.items()]
    cases += [(f"{name}/llama", "llama", stages) for name, stages in _MORE.items()]
    cases += [
        ("reap/qwen3_moe", "qwen3_moe", _REAP),
        ("wanda/gemma3", "gemma3", [{"method": "wanda", "sparsity": 0.5}]),
    ]
    for part in only:
        if not any(part in name for name, *_ in cases):
            raise ValueError(f"--only {part}: no artifact's name contains it; names are RECIPE/ARCHITECTURE")
    artifacts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = folder / "text.txt"
        text.write_text(make_text(12000))
        models: dict[str, Path] = {}
        for name, arch, stages in cases:
            if not any(part in name for part in only):
                continue
            if arch not in models:
                models[arch] = make_model(folder / arch, arch, **(_OWN_SIZES.get(arch) or _SIZES))
            artifacts[name] = _hash_artifact(models[arch], folder / "artifact", stages, text)
            print(f"{len(artifacts):4d} {name}: {'refused' if artifacts[name] == 'refused' else 'ok'}", flush=True)
    return artifacts


def _hash_artifact(model: Path, output: Path, stages: list[dict[str, Any]], text: Path) -> Any:
    torch.manual_seed(0)
    recipe = {
        "stages": [_small(stage, text) for stage in stages],
        "calibration": {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 128}
        | {"moe_calibrate_all_experts": model.name == _ALL_EXPERTS},
        "device": "cpu",
    }
    try:
        artifact = laconic.compress(str(model), recipe, output, overwrite=True)
    except ValueError as e:
        print(f"     {str(e)[:150]}")
        return "refused"
    files = [*artifact.path.rglob("*.safetensors"), *artifact.path.glob("model.safetensors.index.json")]
    return {
        str(file.relative_to(artifact.path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted([*files, artifact.path / "config.json"])
    }


def _small(stage: dict[str, Any], text: Path) -> dict[str, Any]:
    """The stage with our text, and few steps where it trains."""
    stage = dict(stage)
    if stage["method"] in _TRAINING:
        small = {"data": [{"dataset": str(text)}], "max_steps": 4, "batch_size": 2, "max_seq_length": 64, "rank": 4}
        stage = {k: v for k, v in stage.items() if k not in ("epochs", "patience")} | small
    if stage["method"] in _BLOCKWISE:
        stage |= {"iters": 5}
    if stage["method"] == "llm_pruner":
        # Two blocks, of which the method's defaults would protect more.
        stage |= {"keep_first": 0, "keep_last": 0}
    if "asymmetric_calibration" in stage and not _renamed(stage["method"]):
        stage["asymmetric"] = stage.pop("asymmetric_calibration")
    return stage


def _renamed(method: str) -> bool:
    """Whether GPTAQ's objective has its new name in the code that is hashed."""
    kind = next(m for m in laconic.recipe.METHODS if m.model_fields["method"].default == method)
    return "asymmetric_calibration" in kind.model_fields


def differences(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print the artifacts that differ. Returns: 1 if any does."""
    names = sorted({*before, *after})
    different = [n for n in names if before.get(n) != after.get(n)]
    for name in different:
        a, b = before.get(name), after.get(name)
        files = (
            sorted(f for f in {*a, *b} if a.get(f) != b.get(f)) if isinstance(a, dict) and isinstance(b, dict) else []
        )
        print(f"{name}: {', '.join(files) or f'{_kind(a)} before, {_kind(b)} after'}")
    refused = sum(after.get(n) == "refused" for n in names)
    print(f"{len(names)} artifacts ({refused} refused), {len(different)} different")
    return int(bool(different))


def _kind(artifact: Any) -> str:
    return "absent" if artifact is None else "refused" if artifact == "refused" else "made"


if __name__ == "__main__":
    main()
