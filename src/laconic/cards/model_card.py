"""The model card, `README.md`: metadata for the Hub, size, results, use, recipe, commands and data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from laconic.artifact.size import Size
from laconic.cards.data_card import license_of
from laconic.cards.results import Results, commands, model_index, tables
from laconic.checkpoint.files import KV_CONFIG
from laconic.checkpoint.source import auto_class_name
from laconic.formats.support import ENGINES, support
from laconic.runtime.quant_config import NATIVE

# Local folders are private, and useless to a reader of the card.
_FOLDERS = re.compile(r"(?<![\w.:/])(?:~|/)(?:[^\s'\"/]*/)+")


@dataclass(frozen=True)
class CardInputs:
    """Inputs of a model card.

    Attributes:
        name: Name of the artifact.
        facts: Facts of `read_facts`.
        recipe: The recipe, as `recipe.yaml` holds it.
        config: The model's `config.json`.
        size: Measured size.
        results: Results by name.
    """

    name: str
    facts: Mapping[str, Any]
    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    size: Size
    results: Results


def card_metadata(inputs: CardInputs) -> dict[str, Any]:
    """Return the metadata (front matter) of a model card as plain values.

    Args:
        inputs: Inputs of the card.
    """
    size, config = inputs.size, inputs.config
    base, methods = inputs.facts.get("base") or {}, _methods(inputs.recipe)
    quantized = bool(size.schemes) or KV_CONFIG in config
    quantization = {
        "methods": methods,
        "schemes": dict(size.schemes),
        "bits_per_weight": round(size.bits_per_weight, 3),
        "simulated": size.simulated,
    }
    if cache := config.get(KV_CONFIG):
        quantization["kv_cache"] = cache.get("method", "quantized")
    datasets = [s["dataset"] for s in inputs.facts.get("sets") or [] if s["on_hub"]]
    inherited: dict[str, Any] = {k: base.get(k) for k in ("license", "license_name", "license_link", "language")}
    data: Any = ModelCardData(
        base_model=base.get("model"),
        base_model_relation=("quantized" if quantized else "finetune") if base.get("model") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["laconic", *_format_tags(config), *methods, *size.schemes])),
        datasets=list(dict.fromkeys(datasets)) or None,
        quantization=quantization,
        eval_results=model_index(inputs.results) or None,
        model_name=inputs.name,
        **inherited,
    )
    metadata: dict[str, Any] = data.to_dict()
    return metadata


def card_body(inputs: CardInputs) -> str:
    """Return the Markdown of a model card, without its metadata.

    Args:
        inputs: Inputs of the card.
    """
    results, recipe = inputs.results, inputs.recipe
    base = inputs.facts.get("base") or {}
    original = base.get("model") or base.get("name") or "an unnamed model"
    compression = results.get("compress") or {}
    version = (compression.get("versions") or {}).get("laconic", "")
    lines = [
        f"# {inputs.name}",
        "",
        f"`{original}`, compressed by Laconic {version} with {', '.join(_methods(recipe)) or 'nothing'}.".replace(
            "  ", " "
        ),
        "",
        f"**Licence:** {_license(base)}",
        "",
        "## Size",
        "",
        *_size(base, inputs.size),
        "",
        "## Results",
        "",
        *_results(results),
        "## Usage",
        "",
        *_usage(inputs.config, inputs.size),
        "",
        "## Recipe",
        "",
        "```yaml",
        shortened(yaml.safe_dump(_recipe(recipe), sort_keys=False, allow_unicode=True)).rstrip(),
        "```",
        "",
        "Commands, with paths shortened to file names:",
        "",
        "```",
        *(shortened(command) for command in commands(results)),
        "```",
        "",
        *_run(compression),
        "## Data",
        "",
        *_data(inputs.facts.get("sets") or []),
    ]
    return "\n".join(lines)


def shortened(text: str) -> str:
    """Replace every absolute path in a text by its file name.

    Args:
        text: A text of any number of lines.

    Returns:
        The text, with `/a/b/c` and `~/b/c` shortened to `c`.
    """
    return _FOLDERS.sub("", text)


def _methods(recipe: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(str(stage["method"]) for stage in recipe.get("stages") or []))


def _format_tags(config: Mapping[str, Any]) -> list[str]:
    method = (config.get("quantization_config") or {}).get("quant_method")
    return [method] if method and method != NATIVE else []


def _license(base: Mapping[str, Any]) -> str:
    if name := base.get("license"):
        full_name = f"{name} ({base['license_name']})" if base.get("license_name") else name
        return f"{full_name}, the licence of the original."
    file = base.get("license_file")
    copied = f" Its file `{file}` is included." if file else ""
    return f"**not known**: the card of the original names none.{copied}"


def _size(base: Mapping[str, Any], size: Size) -> list[str]:
    schemes = ", ".join(f"{n} linears in {scheme}" for scheme, n in size.schemes.items()) or "none quantized"
    rows = {"weight files": f"{size.file_bytes:,} bytes"}
    if before := base.get("file_bytes"):
        rows["weight files of the original"] = (
            f"{before:,} bytes in {base['dtype']}, {before / size.file_bytes:.2f} times as large"
        )
    rows |= {
        "parameters": f"{size.parameters:,}, of which {size.covered:.1%} are quantized",
        "bits per weight": f"{size.bits_per_weight:.2f}, including embeddings, head, scales and zero points",
        "schemes": schemes,
    }
    if size.simulated:
        rows["arithmetic"] = "simulated: no engine implements it, so its speed is not meaningful"
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]


def _results(results: Results) -> list[str]:
    lines = tables(results) or ["Not measured yet: run `laconic eval ARTIFACT --baseline ORIGINAL`.", ""]
    if any(name.startswith("long-") for name in results):
        lines += ["Results of the key-value cache at long contexts: `results/long-*.json`.", ""]
    return lines


def _usage(config: Mapping[str, Any], size: Size) -> list[str]:
    method = (config.get("quantization_config") or {}).get("quant_method")
    native = method == NATIVE or config.get("model_type") == "laconic"
    cache, auto_class = KV_CONFIG in config, auto_class_name(config)
    packages = "transformers accelerate" + (" compressed-tensors" if method and not native else "")
    lines = ["```", f"pip install {packages}" + (" laconic" if native or cache else ""), "```", "", "```python"]
    if native:
        lines.append("import laconic  # registers the format with transformers")
    lines += [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        'folder = "FOLDER_OR_REPO_ID"',
        f'model = {auto_class}.from_pretrained(folder, dtype="auto", device_map="auto")',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
    ]
    if cache:
        lines += [
            "This loads the weights only. For the quantized key-value cache use `laconic.load(folder)`, which "
            "generates through it, or vLLM with the plugin that Laconic installs.",
            "",
        ]
    if not native and not all(support(s, "vllm").runs for s in size.schemes):
        return [*lines, f"{ENGINES['vllm']} does not load this model."]
    plugin = ", with Laconic installed, whose plugin reads the format" if native or cache else ""
    return [*lines, f"In vLLM{plugin}:", "", "```", "vllm serve FOLDER_OR_REPO_ID", "```"]


def _recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe that were set."""
    keys = {k: v for k, v in recipe.items() if v is not None and k not in ("output", "device")}
    if calibration := keys.get("calibration"):
        keys["calibration"] = {k: v for k, v in calibration.items() if v is not None}
    keys["stages"] = [{k: v for k, v in stage.items() if v not in (None, {}, [])} for stage in keys.get("stages") or []]
    return keys


def _run(compression: Mapping[str, Any]) -> list[str]:
    if not compression:
        return []
    versions = ", ".join(f"{name} {number}" for name, number in (compression.get("versions") or {}).items())
    memory = f"{compression['peak_memory_bytes'] / 1e9:.2f} GB"
    return [
        f"Compression took {compression['seconds']:.1f} s, with a peak memory of {memory}, "
        f"on {compression['device']}, seed {compression['seed']}; {versions}.",
        "",
    ]


def _data(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    if not sets:
        return ["No text was read."]
    lines = ["| set | used for | licence | sequences | tokens |", "|---|---|---|---:|---:|"]
    for entry in sets:
        counts = [f"{entry[key]:,}" if key in entry else "not known" for key in ("sequences", "tokens")]
        lines.append(f"| {entry['dataset']} | {entry['use']} | {license_of(entry)} | {' | '.join(counts)} |")
    return [*lines, "", "Sources, filters, hashes, languages and contamination: [the data card](cards/data.md)."]
