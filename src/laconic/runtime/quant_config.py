"""The `quantization_config` of config.json: which linear has which scheme, in compressed-tensors' words.

Schemes that engines run are written under `quant_method: compressed-tensors`. Schemes that only we read are written in
the same words under `quant_method: laconic`, so that no engine opens them by mistake. There `outlier_columns`,
`low_rank`, `input_transform` and `output_transform` give the sizes of a linear's 16-bit side tensors, by its full name,
and `input_rotation` the number of its input channels where they are rotated;
and a format that compressed-tensors cannot describe has an entry in its own words (`Format.to_config`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from pydantic import ValidationError

from laconic.formats import Format
from laconic.formats.scalar import as_scalar
from laconic.formats.schemes import PRESETS, Activations, Scheme, known_formats

COMPRESSED_TENSORS = "compressed-tensors"
NATIVE = "laconic"

# The fix for models that other tools quantized in a way that we do not read.
_ELSEWHERE = "open it with transformers or vLLM, or compress the original model with laconic"

# Types of numbers that compressed-tensors can describe.
_STANDARD_TYPES = ("int", "float")

# Layouts that transformers decodes to bfloat16, and then multiplies with activations of whatever dtype.
_DECODED_LAYOUTS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")

# Side tensors of a linear, by our key in the config and the field of its scheme.
_SIDES = {
    "outlier_columns": "outlier_columns",
    "low_rank": "rank",
    "input_transform": "input_transform",
    "output_transform": "output_transform",
    "input_rotation": "input_rotation",
}
_ALWAYS_WRITTEN = ("outlier_columns", "low_rank")

# Classes of modules as compressed-tensors targets them.
_LINEAR, _EMBEDDING = "Linear", "Embedding"


def to_config(
    schemes: Mapping[str, Scheme],
    linears: Iterable[str],
    *,
    head: Collection[str] = (),
    embeddings: Collection[str] = (),
) -> dict[str, Any]:
    """Return the quantization_config of a model.

    Args:
        schemes: Scheme by full name of each quantized linear, or by a pattern (`re:`) of many; and of the embeddings.
        linears: Full name of every linear, or a pattern of many that are not quantized.
        head: Full names of the head, which is no `Linear` for vLLM.
        embeddings: Full names of the input embeddings.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme.plain, []).append(name)
    # The most frequent scheme is the rule; the others are exceptions by name, and come first.
    ordered = sorted(groups, key=lambda s: sum(n not in embeddings for n in groups[s]))
    storages = {s.storage for s in ordered}
    native = any(s.native for s in schemes.values())
    entries = {f"group_{i}": _group(s, groups[s], s is ordered[-1], len(ordered)) for i, s in enumerate(ordered)}
    for entry, scheme in zip(entries.values(), ordered, strict=True):
        # vLLM's embeddings have no name of their own in many of its models.
        parts = [n for n in groups[scheme] if n in head or n in embeddings]
        parts += [_EMBEDDING] * any(n in embeddings for n in parts)
        entry["targets"] = [*entry["targets"], *(n for n in parts if n not in entry["targets"])]
    standard = {key: e for (key, e), s in zip(entries.items(), ordered, strict=True) if s.weights.standard}
    config: dict[str, Any] = QuantizationConfig.model_validate(
        {
            "config_groups": standard,
            "format": "dense" if not storages else storages.pop() if len(storages) == 1 else "mixed-precision",
            "quantization_status": QuantizationStatus.COMPRESSED,
            "ignore": [name for name in linears if name not in schemes],
        }
    ).model_dump(mode="json")
    config["config_groups"] = {key: config["config_groups"].get(key, entry) for key, entry in entries.items()}
    config["quant_method"] = NATIVE if native else COMPRESSED_TENSORS
    if native:
        for key, field in _SIDES.items():
            sizes = {n: size for n, s in schemes.items() if (size := getattr(s, field))}
            if sizes or key in _ALWAYS_WRITTEN:
                config[key] = sizes
    if len(ordered) == 1 and not native and _decoded_while_loading(ordered[0]):
        config["dequantize"] = True
    return config


def _group(scheme: Scheme, names: Sequence[str], rule: bool, groups: int) -> dict[str, Any]:
    """Return an entry of `config_groups`; with `rule` it holds for all linears that no other entry names."""
    acts = scheme.input_activations
    return {
        "targets": [_LINEAR, *(n for n in names if _is_pattern(n) and groups > 1)] if rule else names,
        "weights": scheme.weights.to_config() | {"dynamic": False},
        "input_activations": acts and acts.format.to_config() | {"dynamic": acts.dynamic},
        "format": scheme.storage,
    }


def _decoded_while_loading(scheme: Scheme) -> bool:
    """Return whether transformers must decode a scheme as it loads it.

    Otherwise it sets up packed zero points with the wrong shape, and computes with FP4 in two dtypes.
    """
    fp4 = scheme.storage in _DECODED_LAYOUTS and scheme.input_activations is None
    return fp4 or not scheme.weights.symmetric


def schemes_from_config(
    config: Mapping[str, Any], linears: Iterable[str], embeddings: Collection[str] = ()
) -> dict[str, Scheme]:
    """Return the scheme of every quantized linear: the inverse of `to_config`, for artifacts of other tools too.

    Args:
        config: The quantization_config.
        linears: Full names of all linears, and of embeddings.
        embeddings: Which of them are embeddings.

    Raises:
        ValueError: The config describes something that no format here reads.
    """
    groups: Mapping[str, Mapping[str, Any]] = config.get("config_groups") or {}
    native = {key: g for key, g in groups.items() if isinstance(g, Mapping) and not _is_standard(g)}
    parsed = _parse({**config, "config_groups": {key: g for key, g in groups.items() if key not in native}})
    schemes = {t: _scheme(g, parsed) for g in parsed.config_groups.values() for t in g.targets}
    schemes |= {t: _native_scheme(g) for g in native.values() for t in g["targets"]}
    # As compressed-tensors ranks them: a full name comes before a pattern, a pattern before a class.
    ranked = sorted(schemes, key=lambda t: (t in (_LINEAR, _EMBEDDING), t.startswith("re:"), t))
    by_name: dict[str, Scheme] = {}
    for name in linears:
        kind = _EMBEDDING if name in embeddings else _LINEAR
        target = next((t for t in ranked if t == kind or _matches(name, t)), None)
        if target and not any(_matches(name, pattern) for pattern in parsed.ignore or ()):
            sides = {field: (config.get(key) or {}).get(name, 0) for key, field in _SIDES.items()}
            by_name[name] = replace(schemes[target], **sides)
    return by_name


def _is_standard(group: Mapping[str, Any]) -> bool:
    weights = group.get("weights")
    return not isinstance(weights, Mapping) or weights.get("type", "int") in _STANDARD_TYPES


def schemes_of(
    config: Mapping[str, Any], names: Mapping[str, str], embeddings: Collection[str] = ()
) -> dict[str, Scheme]:
    """Return the scheme of every quantized linear of a model whose linears engines may know by another name.

    Args:
        config: The quantization_config.
        names: Name of each linear, and of embeddings, in engines, by its full name in the model.
        embeddings: Which of the names in the model are embeddings.

    Raises:
        ValueError: The config describes something that no format here reads.
    """
    by_engine_name = schemes_from_config(config, dict.fromkeys(names.values()), [names[n] for n in embeddings])
    by_name = schemes_from_config(config, names, embeddings)
    return {n: by_engine_name[name] for n, name in names.items() if name in by_engine_name and n in by_name}


def is_readable(config: Mapping[str, Any]) -> bool:
    """Return whether `laconic.load` reads models with this quantization_config.

    Args:
        config: The quantization_config.
    """
    return config.get("quant_method") in (COMPRESSED_TENSORS, NATIVE)


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if _is_pattern(pattern) else name == pattern


def _is_pattern(name: str) -> bool:
    return name.startswith("re:")


def _parse(config: Mapping[str, Any]) -> QuantizationConfig:
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if config.get("kv_cache_scheme") or config.get("transform_config") or sparsity != "dense":
        raise ValueError(
            f"cannot read a model with a quantized KV cache, with transforms or with sparse weights; {_ELSEWHERE}"
        )
    fields = {k: v for k, v in config.items() if k in QuantizationConfig.model_fields}
    try:
        return QuantizationConfig.model_validate(fields)
    except ValidationError as e:
        raise ValueError(
            f"cannot read the quantization_config in config.json ({e.errors()[0]['msg']}); compress the original model "
            "with laconic"
        ) from e


def _scheme(group: QuantizationScheme, config: QuantizationConfig) -> Scheme:
    inputs = group.input_activations
    if group.weights is None or group.output_activations or (inputs and not (inputs.symmetric or inputs.dynamic)):
        raise ValueError(
            "cannot read linears with quantized outputs, with quantized inputs alone, or with inputs that have a zero "
            f"point; {_ELSEWHERE}"
        )
    native = config.quant_method == NATIVE
    storage = group.format or config.format
    if storage == "mixed-precision":
        # A config of several schemes need not name the layout of each; engines read plain integers for int8 products.
        storage = "int-quantized" if inputs and not native else "pack-quantized"
    weights = _format(group.weights.model_dump() | {"format": storage})
    acts = None
    if inputs:
        fmt = as_scalar(_format(inputs.model_dump()))
        acts = Activations(fmt.for_activations(), "local" if inputs.dynamic == "local" else bool(inputs.dynamic))
    name = _name(weights, acts)
    engine = PRESETS[name].engine if name in PRESETS else "laconic" if native else "vllm"
    if (group.format or config.format) not in ("mixed-precision", weights.storage):
        raise ValueError(f"cannot read weights of {name} stored as '{group.format or config.format}'; {_ELSEWHERE}")
    return Scheme(name, weights, acts, engine)


def _native_scheme(group: Mapping[str, Any]) -> Scheme:
    """Return the scheme of a group whose format compressed-tensors cannot describe."""
    weights = _format(group["weights"] | {"format": group["format"]})
    return Scheme(_name(weights, None), weights, None, "laconic")


def _format(entry: Mapping[str, Any]) -> Format:
    for kind in known_formats():
        if (fmt := kind.from_config(entry)) is not None:
            return fmt
    bits, type_ = entry.get("num_bits"), entry.get("type")
    if type_ == "float" and bits == 4:
        raise ValueError(f"cannot read 4-bit floats that are neither MXFP4 nor NVFP4; {_ELSEWHERE}")
    raise ValueError(f"cannot read weights of type '{type_}', which this version of laconic lacks; update laconic")


def _name(weights: Format, acts: Activations | None) -> str:
    """Return the name of the preset of the same kind; a varied preset keeps its name."""
    kind = _kind(weights, acts)
    same = (name for name, preset in PRESETS.items() if _kind(preset.weights, preset.input_activations) == kind)
    return next(same, f"W{weights.num_bits}A{acts.format.num_bits if acts else 16}")


def _kind(weights: Format, acts: Activations | None) -> tuple[Any, ...]:
    block = weights.row_unit != 1
    # Integer presets have one name for static and dynamic activations, FP8 has two.
    integer = weights.integer_range is not None
    rounding = acts and (acts.format.title, acts.format.num_bits, acts.dynamic or integer)
    return weights.title, weights.num_bits, weights.symmetric, block, rounding
