"""Checks of `laconic bench serving` that need only the config of a model, before an engine loads weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from laconic.bench.serving_options import ServingOptions
from laconic.bench.vllm_python import VllmPython
from laconic.checkpoint.files import KV_CONFIG, linear_quantization_config
from laconic.formats.schemes import PRESETS, Scheme, layout_depends_on_engine
from laconic.formats.support import ENGINES, EngineName, support
from laconic.runtime.quant_config import NATIVE, is_readable, schemes_from_config
from laconic.structure.config_keys import WIDTHS

# vLLM's quantized kernels for GPUs begin with Turing.
_MIN_CAPABILITY = (7, 5)


def check_context(folder: Path, config: Mapping[str, Any], options: ServingOptions) -> None:
    """Check that prompts and answers fit the context of a model.

    Args:
        folder: Folder of the model, for the message.
        config: Contents of its config.json.
        options: Options of the benchmark.

    Raises:
        ValueError: They do not.
    """
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings")
    if limit is not None and options.context > limit:
        raise ValueError(
            f"--prompts {max(options.prompts)} and --new-tokens {options.new_tokens} exceed the context of {limit} "
            f"tokens of {folder}; lower one of them"
        )


def check_engine(folder: Path, config: Mapping[str, Any], engine: VllmPython) -> None:
    """Check that vLLM has what an artifact needs.

    Args:
        folder: Folder of the model, for the messages.
        config: Contents of its config.json.
        engine: vLLM and its card.

    Raises:
        ValueError: The plugin is missing, or vLLM has no kernel for a scheme on this device.
    """
    quantization = linear_quantization_config(config)
    native = bool(quantization) and quantization.get("quant_method") == NATIVE if quantization else False
    if (native or KV_CONFIG in config or WIDTHS in config) and not engine.plugin:
        raise ValueError(
            f"vLLM opens {folder} with laconic's plugin only; install it there: {engine.python} -m pip install "
            "--no-deps laconic"
        )
    if quantization and is_readable(quantization):
        for scheme in schemes_in(quantization):
            _check_scheme(folder, scheme, engine)


def schemes_in(quantization: Mapping[str, Any]) -> list[Scheme]:
    """Return the schemes of a quantization_config, each once; no model is needed.

    Args:
        quantization: The quantization_config.
    """
    groups = (quantization.get("config_groups") or {}).values()
    targets = [t for g in groups for t in g["targets"] if not t.startswith("re:")]
    # A name that no pattern of `ignore` is likely to match stands for the rule of all linears.
    names = [t if t != "Linear" else "model.layers.0.self_attn.q_proj" for t in targets]
    return list({s.plain: s.plain for s in schemes_from_config(quantization, names).values()})


def _check_scheme(folder: Path, scheme: Scheme, engine: VllmPython) -> None:
    name: EngineName = "vllm" if engine.device == "cuda" else "vllm-cpu"
    if engine.capability and engine.capability < _MIN_CAPABILITY:
        least, card = (".".join(map(str, c)) for c in (_MIN_CAPABILITY, engine.capability))
        raise ValueError(
            f"vLLM's kernels for {scheme.name} need compute capability {least}, and {engine.device_name} has {card}; "
            "measure on a newer card, or with --engine hf"
        )
    if layout_depends_on_engine(scheme) and (scheme.storage == "pack-quantized") != (name == "vllm"):
        wanted = "engine: vllm-cpu" if name == "vllm-cpu" else "engine: vllm"
        raise ValueError(
            f"{folder} holds {scheme.name} stored as {scheme.storage}, which {ENGINES[name]} does not read; compress "
            f"again with {wanted} in the recipe"
        )
    if not (known := support(scheme.name, name)).runs:
        nearest = nearest_scheme(scheme, name, PRESETS.values())
        raise ValueError(
            f"{ENGINES[name]} does not run {scheme.name} of {folder} ({known}); the nearest scheme that it runs is "
            f"{nearest.name if nearest else 'none of ours: serve 16 bit'}"
        )


def nearest_scheme(scheme: Scheme, engine: EngineName, presets: Iterable[Scheme]) -> Scheme | None:
    """Return the preset that an engine runs and that is nearest to a scheme.

    Args:
        scheme: The scheme.
        engine: Name of the engine.
        presets: Presets to choose from.

    Returns:
        The preset with the nearest bits of activations, then of weights, the same kind of numbers and the tried first;
        None if it runs none of them.
    """

    def distance(preset: Scheme) -> tuple[int, int, bool, bool]:
        activation_bits = abs(_activation_bits(preset) - _activation_bits(scheme))
        bits = abs(preset.weights.num_bits - scheme.weights.num_bits)
        other_numbers = type(preset.weights) is not type(scheme.weights)
        return activation_bits, bits, other_numbers, support(preset.name, engine).outcome != "tried"

    candidates = [p for p in presets if not p.native and support(p.name, engine).runs]
    return min(candidates, key=distance, default=None)


def _activation_bits(scheme: Scheme) -> int:
    return scheme.input_activations.format.num_bits if scheme.input_activations else 16
