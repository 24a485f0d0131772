"""The `quantization_config` of config.json: which linear has which scheme, in compressed-tensors' words.

Schemes that engines run are written under `quant_method: compressed-tensors`. Schemes that only our own QLinear runs are
written in the same words under `quant_method: laconic`, so that no engine opens them by mistake.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

from laconic.formats import Format
from laconic.formats.floats import Fp8
from laconic.formats.int_affine import IntAffine
from laconic.formats.schemes import PRESETS, Activations, Scheme
from laconic.formats.tiling import Tiling

COMPRESSED_TENSORS = "compressed-tensors"
NATIVE = "laconic"


def to_config(schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of a model. schemes: by full name of each quantized linear. linears: every linear."""
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    ordered = sorted(groups, key=lambda s: -len(groups[s]))
    storages = {s.storage for s in ordered}
    native = any(s.simulated for s in ordered)
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {
                # The commonest scheme is the rule, the others are exceptions by name.
                f"group_{i}": {
                    "targets": ["Linear"] if i == 0 else groups[s],
                    "weights": _args(s.weights, None),
                    "input_activations": s.input_activations
                    and _args(s.input_activations.format, s.input_activations.dynamic),
                    "format": s.storage,
                }
                for i, s in enumerate(ordered)
            },
            "format": storages.pop() if len(storages) == 1 else "mixed-precision",
            "quantization_status": QuantizationStatus.COMPRESSED,
            "ignore": [name for name in linears if name not in schemes],
        }
    ).model_dump(mode="json")
    config["quant_method"] = NATIVE if native else COMPRESSED_TENSORS
    return config


def schemes_from_config(config: Mapping[str, Any], linears: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of every quantized linear: the inverse of `to_config`, for our own artifacts and others'.

    Raises: ValueError for what we have no format for.
    """
    ignore = config.get("ignore") or []
    groups = [(g.get("targets") or [], _scheme(g, config)) for g in config["config_groups"].values()]
    out: dict[str, Scheme] = {}
    for name in linears:
        if any(_matches(name, pattern) for pattern in ignore):
            continue
        exact = next((s for targets, s in groups if any(_matches(name, t) for t in targets)), None)
        by_class = next((s for targets, s in groups if "Linear" in targets), None)
        if found := exact or by_class:
            out[name] = found
    return out


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether we can read a model with this quantization_config."""
    return config.get("quant_method") in (COMPRESSED_TENSORS, NATIVE)


def _matches(name: str, pattern: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern


def _args(fmt: Format, dynamic: bool | None) -> dict[str, Any]:
    tiling = fmt.tiling
    args: dict[str, Any] = {
        "num_bits": fmt.num_bits,
        "type": "float" if isinstance(fmt, Fp8) else "int",
        "symmetric": fmt.symmetric,
        "strategy": tiling.strategy,
        "dynamic": bool(dynamic),
    }
    if tiling.group_size:
        args["group_size"] = tiling.group_size
    if tiling.block_structure:
        args["block_structure"] = list(tiling.block_structure)
    return args


def _scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    weights = _format(group["weights"])
    given = group.get("input_activations")
    acts = None
    if given:
        narrow = given["type"] == "int" and given["symmetric"]
        acts = Activations(_format(given, narrow=narrow), bool(given.get("dynamic")))
    native = config.get("quant_method") == NATIVE
    found = Scheme(_name(weights, acts), weights, acts, engine="laconic" if native else "vllm")
    storage = group.get("format") or config.get("format")
    if storage not in (None, "mixed-precision", found.storage):
        raise ValueError(f"cannot read weights stored as '{storage}'")
    return found


def _format(args: Mapping[str, Any], *, narrow: bool = False) -> Format:
    group_size, block = args.get("group_size"), args.get("block_structure")
    strategy = args["strategy"]
    tiling = Tiling(
        strategy,
        group_size if strategy == "group" else None,
        (block[0], block[1]) if strategy == "block" else None,
    )
    if args["type"] == "float":
        if args["num_bits"] != 8:
            raise ValueError(f"cannot read {args['num_bits']}-bit floats")
        return Fp8(tiling)
    return IntAffine(args["num_bits"], args["symmetric"], tiling, narrow=narrow)


def _name(weights: Format, acts: Activations | None) -> str:
    """The preset of the same kinds and bits, for reading; varied presets keep their preset's name."""
    kind = lambda f: f and (type(f), f.num_bits)  # noqa: E731
    for name, preset in PRESETS.items():
        theirs = preset.input_activations
        if kind(preset.weights) == kind(weights) and kind(theirs and theirs.format) == kind(acts and acts.format):
            same_way = (preset.weights.symmetric == weights.symmetric) and (
                not acts or not theirs or acts.dynamic == theirs.dynamic or type(weights) is IntAffine
            )
            block = (preset.weights.tiling.strategy == "block") == (weights.tiling.strategy == "block")
            if same_way and block:
                return name
    return f"W{weights.num_bits}A{acts.format.num_bits if acts else 16}"


def count_schemes(schemes: Mapping[str, Scheme]) -> dict[str, int]:
    """How many linears have each scheme, by name."""
    return dict(Counter(s.name for s in schemes.values()))
