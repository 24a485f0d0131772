"""The `quantization_config` of config.json: which linear has which scheme, in compressed-tensors' words.

Schemes that engines run are written under `quant_method: compressed-tensors`. Schemes that only we read are written in
the same words under `quant_method: laconic`, so that no engine opens them by mistake; there `outlier_columns` and
`low_rank` say how many columns, and what rank, a linear has beside its codes, by its full name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from pydantic import ValidationError

from laconic.formats import Format
from laconic.formats.floats import Fp8
from laconic.formats.fp4 import Fp4, MxFp4, NvFp4
from laconic.formats.int_affine import IntAffine
from laconic.formats.schemes import PRESETS, Activations, Scheme
from laconic.formats.tiling import Tiling

COMPRESSED_TENSORS = "compressed-tensors"
NATIVE = "laconic"

# Groups with a scale of the whole tensor beside theirs.
_TENSOR_GROUP = "tensor_group"
_SCALE_DTYPE = {MxFp4: torch.uint8, NvFp4: torch.float8_e4m3fn}


def to_config(schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of a model. schemes: by full name of each quantized linear, or by a pattern (`re:`) of
    many. linears: every linear, or a pattern of many that are not quantized."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(replace(scheme, outlier_columns=0, rank=0), []).append(name)
    # The commonest scheme is the rule, the others are exceptions by name, and come first.
    ordered = sorted(groups, key=lambda s: len(groups[s]))
    storages = {s.storage for s in ordered}
    native = any(s.native for s in schemes.values())
    config: dict[str, Any] = QuantizationConfig.model_validate(
        {
            "config_groups": {
                f"group_{i}": {
                    "targets": ["Linear", *(n for n in groups[s] if _is_pattern(n) and len(ordered) > 1)]
                    if s is ordered[-1]
                    else groups[s],
                    "weights": _args(s.weights, False),
                    "input_activations": s.input_activations
                    and _args(s.input_activations.format, s.input_activations.dynamic),
                    "format": s.storage,
                }
                for i, s in enumerate(ordered)
            },
            "format": "dense" if not storages else storages.pop() if len(storages) == 1 else "mixed-precision",
            "quantization_status": QuantizationStatus.COMPRESSED,
            "ignore": [name for name in linears if name not in schemes],
        }
    ).model_dump(mode="json")
    config["quant_method"] = NATIVE if native else COMPRESSED_TENSORS
    if native:
        config["outlier_columns"] = {n: s.outlier_columns for n, s in schemes.items() if s.outlier_columns}
        config["low_rank"] = {n: s.rank for n, s in schemes.items() if s.rank}
    if len(ordered) == 1 and not native and _decoded_while_loading(ordered[0]):
        config["dequantize"] = True
    return config


def _decoded_while_loading(scheme: Scheme) -> bool:
    """Whether transformers must decode a scheme as it loads it. Otherwise it sets up packed zero points with the wrong
    shape, and multiplies weights of FP4, which it decodes to bfloat16, with activations of whatever dtype."""
    fp4 = isinstance(scheme.weights, Fp4) and scheme.input_activations is None
    return fp4 or not scheme.weights.symmetric


def schemes_from_config(config: Mapping[str, Any], linears: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of every quantized linear: the inverse of `to_config`, for our own artifacts and others'.

    Raises: ValueError for what we have no format for.
    """
    parsed = _parse(config)
    schemes = {t: _scheme(g, parsed) for g in parsed.config_groups.values() for t in g.targets}
    # As compressed-tensors ranks them: a full name comes before a pattern, a pattern before a class.
    ranked = sorted(schemes, key=lambda t: (t == "Linear", t.startswith("re:"), t))
    out: dict[str, Scheme] = {}
    for name in linears:
        target = next((t for t in ranked if t == "Linear" or _matches(name, t)), None)
        if target and not any(_matches(name, pattern) for pattern in parsed.ignore or ()):
            out[name] = replace(
                schemes[target],
                outlier_columns=(config.get("outlier_columns") or {}).get(name, 0),
                rank=(config.get("low_rank") or {}).get(name, 0),
            )
    return out


def schemes_of(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Scheme]:
    """The scheme of every quantized linear of a model that engines may know by another name. names: theirs by ours."""
    theirs = schemes_from_config(config, dict.fromkeys(names.values()))
    ours = schemes_from_config(config, names)
    return {name: theirs[other] for name, other in names.items() if other in theirs and name in ours}


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether we can read a model with this quantization_config."""
    return config.get("quant_method") in (COMPRESSED_TENSORS, NATIVE)


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if _is_pattern(pattern) else name == pattern


def _is_pattern(name: str) -> bool:
    return name.startswith("re:")


def _args(fmt: Format, dynamic: bool | str) -> dict[str, Any]:
    tiling = fmt.tiling
    args: dict[str, Any] = {
        "num_bits": fmt.num_bits,
        "type": "int" if isinstance(fmt, IntAffine) else "float",
        "symmetric": fmt.symmetric,
        "strategy": _TENSOR_GROUP if isinstance(fmt, NvFp4) else tiling.strategy,
        "dynamic": dynamic,
    }
    if isinstance(fmt, Fp4):
        args["scale_dtype"] = _SCALE_DTYPE[type(fmt)]
    if tiling.group_size:
        args["group_size"] = tiling.group_size
    if tiling.block_structure:
        args["block_structure"] = list(tiling.block_structure)
    return args


def _parse(config: Mapping[str, Any]) -> QuantizationConfig:
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if config.get("kv_cache_scheme") or config.get("transform_config") or sparsity != "dense":
        raise ValueError("cannot read a model with a quantized KV cache, with transforms or with sparse weights")
    known = {k: v for k, v in config.items() if k in QuantizationConfig.model_fields}
    try:
        return QuantizationConfig.model_validate(known)
    except ValidationError as e:
        raise ValueError(f"cannot read the quantization_config: {e.errors()[0]['msg']}") from e


def _scheme(group: QuantizationScheme, config: QuantizationConfig) -> Scheme:
    given = group.input_activations
    if group.weights is None or group.output_activations or (given and not (given.symmetric or given.dynamic)):
        raise ValueError("cannot read linears whose outputs are rounded, or inputs alone, or inputs from a zero point")
    weights = _format(group.weights)
    acts = None
    if given:
        fmt = _format(given, narrow=given.type == "int" and given.symmetric)
        acts = Activations(fmt, "local" if given.dynamic == "local" else bool(given.dynamic))
    name = _name(weights, acts)
    native = config.quant_method == NATIVE
    engine = PRESETS[name].engine if name in PRESETS else "laconic" if native else "vllm"
    found = Scheme(name, weights, acts, engine)
    storage = group.format or config.format
    if storage not in ("mixed-precision", found.storage):
        raise ValueError(f"cannot read weights of {name} stored as '{storage}'")
    return found


def _format(args: QuantizationArgs, *, narrow: bool = False) -> Format:
    if args.type == "float" and args.num_bits == 4:
        return _fp4(args)
    block = args.block_structure
    tiling = Tiling(
        args.strategy,
        args.group_size if args.strategy == "group" else None,
        (block[0], block[1]) if block else None,
    )
    if args.type == "float":
        if args.num_bits != 8:
            raise ValueError(f"cannot read {args.num_bits}-bit floats")
        return Fp8(tiling)
    return IntAffine(args.num_bits, args.symmetric, tiling, narrow=narrow)


def _fp4(args: QuantizationArgs) -> Fp4:
    found: Fp4 = NvFp4() if args.strategy == _TENSOR_GROUP else MxFp4()
    grouped = args.strategy in (_TENSOR_GROUP, "group") and args.group_size == found.tiling.group_size
    if not grouped or not args.symmetric or args.scale_dtype not in (None, _SCALE_DTYPE[type(found)]):
        raise ValueError("cannot read 4-bit floats that are neither MXFP4 nor NVFP4")
    return found


def _name(weights: Format, acts: Activations | None) -> str:
    """The preset of the same kind, for reading; varied presets keep their preset's name."""
    wanted = _kind(weights, acts)
    same = (name for name, preset in PRESETS.items() if _kind(preset.weights, preset.input_activations) == wanted)
    return next(same, f"W{weights.num_bits}A{acts.format.num_bits if acts else 16}")


def _kind(weights: Format, acts: Activations | None) -> tuple[Any, ...]:
    block = weights.tiling.strategy == "block"
    # Integer presets have one name for static and dynamic activations, FP8 has two.
    rounding = acts and (type(acts.format), acts.format.num_bits, acts.dynamic or isinstance(weights, IntAffine))
    return type(weights), weights.num_bits, weights.symmetric, block, rounding


def count_schemes(schemes: Mapping[str, Scheme]) -> dict[str, int]:
    """How many linears have each scheme, by name."""
    return dict(Counter(s.title for s in schemes.values()))
