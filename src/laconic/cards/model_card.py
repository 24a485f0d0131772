"""The model card, `README.md`: the Hub's metadata, and what was done to the model and what that cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from laconic.artifact.size import Size
from laconic.cards.data_card import license_of
from laconic.cards.results import Results, commands, model_index, tables
from laconic.checkpoint.files import KV_CONFIG
from laconic.formats.schemes import PRESETS
from laconic.runtime.quant_config import NATIVE

# A folder of one's own is nobody else's business, and of no use to them.
_FOLDERS = re.compile(r"(?<![\w.:/])(?:~|/)(?:[^\s'\"/]*/)+")


def metadata(
    name: str,
    facts: Mapping[str, Any],
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    size: Size,
    results: Results,
) -> dict[str, Any]:
    """The front matter, as plain values. recipe, config: the artifact's."""
    base, methods = facts.get("base") or {}, _methods(recipe)
    quantized = bool(size.schemes) or KV_CONFIG in config
    quantization = {
        "methods": methods,
        "schemes": dict(size.schemes),
        "bits_per_weight": round(size.bits_per_weight, 3),
        "simulated": size.simulated,
    }
    if cache := config.get(KV_CONFIG):
        quantization["kv_cache"] = cache.get("method", "quantized")
    datasets = [s["dataset"] for s in facts.get("sets") or [] if s["on_hub"]]
    carried: dict[str, Any] = {k: base.get(k) for k in ("license", "license_name", "license_link", "language")}
    told: Any = ModelCardData(
        base_model=base.get("model"),
        base_model_relation=("quantized" if quantized else "finetune") if base.get("model") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["laconic", *_format_tags(config), *methods, *size.schemes])),
        datasets=list(dict.fromkeys(datasets)) or None,
        quantization=quantization,
        eval_results=model_index(results) or None,
        model_name=name,
        **carried,
    )
    plain: dict[str, Any] = told.to_dict()
    return plain


def body(
    name: str,
    facts: Mapping[str, Any],
    recipe: Mapping[str, Any],
    config: Mapping[str, Any],
    size: Size,
    results: Results,
) -> str:
    """The card's Markdown."""
    base = facts.get("base") or {}
    original = base.get("model") or base.get("name") or "a model that is not named here"
    made = results.get("compress") or {}
    version = (made.get("versions") or {}).get("laconic", "")
    lines = [
        f"# {name}",
        "",
        f"`{original}`, compressed by Laconic {version} with {', '.join(_methods(recipe)) or 'nothing'}.".replace(
            "  ", " "
        ),
        "",
        f"**Licence:** {_license(base)}",
        "",
        "## Size",
        "",
        *_size(base, size),
        "",
        "## What it cost",
        "",
        *_cost(results, made),
        "## How to load it",
        "",
        *_loading(config, size),
        "",
        "## How it was made",
        "",
        "```yaml",
        shortened(yaml.safe_dump(_recipe(recipe), sort_keys=False, allow_unicode=True)).rstrip(),
        "```",
        "",
        "Commands, the folders of paths left out:",
        "",
        "```",
        *(shortened(command) for command in commands(results)),
        "```",
        "",
        *_made(made),
        "## Data",
        "",
        *_data(facts.get("sets") or []),
    ]
    return "\n".join(lines)


def shortened(text: str) -> str:
    """A text whose absolute paths are names alone."""
    return _FOLDERS.sub("", text)


def _methods(recipe: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(str(stage["method"]) for stage in recipe.get("stages") or []))


def _format_tags(config: Mapping[str, Any]) -> list[str]:
    method = (config.get("quantization_config") or {}).get("quant_method")
    return [method] if method and method != NATIVE else []


def _license(base: Mapping[str, Any]) -> str:
    if found := base.get("license"):
        named = f"{found} ({base['license_name']})" if base.get("license_name") else found
        return f"{named}, that of the original."
    file = base.get("license_file")
    beside = f" A file `{file}` came with it, and is here." if file else ""
    return f"**not known**: the original has no card that names one.{beside}"


def _size(base: Mapping[str, Any], size: Size) -> list[str]:
    schemes = ", ".join(f"{n} linears in {scheme}" for scheme, n in size.schemes.items()) or "none quantized"
    rows = {"weight files": f"{size.file_bytes:,} bytes"}
    if before := base.get("file_bytes"):
        rows["weight files of the original"] = (
            f"{before:,} bytes in {base['dtype']}, {before / size.file_bytes:.2f} times as many"
        )
    rows |= {
        "parameters": f"{size.parameters:,}, of which {size.covered:.1%} are quantized",
        "bits per weight": f"{size.bits_per_weight:.2f}, with embeddings, head, scales and zero points",
        "schemes": schemes,
    }
    if size.simulated:
        rows["arithmetic"] = "simulated: no engine has it, and speed says nothing"
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _cost(results: Results, made: Mapping[str, Any]) -> list[str]:
    found = tables(results) or ["Not measured yet: `laconic eval ARTIFACT --baseline ORIGINAL` fills this in.", ""]
    if any(name.startswith("long-") for name in results):
        found += ["What its cache costs over long contexts is in `results/long-*.json`.", ""]
    return found


def _loading(config: Mapping[str, Any], size: Size) -> list[str]:
    method = (config.get("quantization_config") or {}).get("quant_method")
    native = method == NATIVE or config.get("model_type") == "laconic"
    cache = KV_CONFIG in config
    engines = {PRESETS[s].engine for s in size.schemes if s in PRESETS}
    packages = "transformers accelerate" + (" compressed-tensors" if method and not native else "")
    lines = ["```", f"pip install {packages}" + (" laconic" if native or cache else ""), "```", "", "```python"]
    if native:
        lines.append("import laconic  # registers the format with transformers")
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "FOLDER_OR_REPO_ID"',
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
    ]
    if cache:
        lines += [
            "The weights open as ever; the quantized key-value cache comes by `laconic.load(folder)`, which generates "
            "through it, and in vLLM by the plugin that Laconic installs.",
            "",
        ]
    if engines - {"vllm"} and not native:
        return [*lines, "vLLM has no kernel for weights of these bits; it does not open this model."]
    how = " with Laconic installed beside it, whose plugin reads the format" if native or cache else ""
    return [*lines, f"In vLLM{how}:", "", "```", "vllm serve FOLDER_OR_REPO_ID", "```"]


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, without keys that were left alone."""
    told = {k: v for k, v in recipe.items() if v is not None and k not in ("output", "device")}
    if calibration := told.get("calibration"):
        told["calibration"] = {k: v for k, v in calibration.items() if v is not None}
    told["stages"] = [{k: v for k, v in stage.items() if v not in (None, {}, [])} for stage in told.get("stages") or []]
    return told


def _made(made: Mapping[str, Any]) -> list[str]:
    if not made:
        return []
    versions = ", ".join(f"{name} {number}" for name, number in (made.get("versions") or {}).items())
    return [
        f"It took {made['seconds']:.1f} s and {made['peak_memory_bytes'] / 1e9:.2f} GB of memory at most on "
        f"{made['device']}, seed {made['seed']}; {versions}.",
        "",
    ]


def _data(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    if not sets:
        return ["No text was read to make it."]
    lines = ["| set | used for | licence | sequences | tokens |", "|---|---|---|---:|---:|"]
    for found in sets:
        counts = [f"{found[key]:,}" if key in found else "not known" for key in ("sequences", "tokens")]
        lines.append(f"| {found['dataset']} | {found['use']} | {license_of(found)} | {' | '.join(counts)} |")
    return [*lines, "", "Sources, filters, hashes, languages and contamination: [the data card](cards/data.md)."]
