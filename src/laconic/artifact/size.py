"""Size of a checkpoint, counted on its stored tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from laconic.checkpoint.extra import names_outside
from laconic.checkpoint.files import count_elements, linear_quantization_config, open_checkpoint, open_shard
from laconic.checkpoint.layout import arrange, engine_names
from laconic.checkpoint.source import build_skeleton, main_dtype, read_config
from laconic.checkpoint.trust import UNTRUSTED, Trust
from laconic.runtime.adapters import ADAPTER_WEIGHTS, adapter_folders
from laconic.runtime.decoding import is_decodable
from laconic.runtime.inputs import decode_checkpoint
from laconic.runtime.quant_config import is_readable, schemes_of
from laconic.structure.anatomy import find_embeddings, linears_of


@dataclass(frozen=True)
class Size:
    """Size of a checkpoint.

    Attributes:
        parameters: Parameters of the dense model and extra tensors of its files, a tied weight counted once.
        tensor_bytes: Bytes of all stored tensors, those of a kept adapter included.
        bits_per_weight: Stored bits (with scales, zero points, embeddings and head) per parameter.
        file_bytes: Bytes of the weight files, that of a kept adapter included.
        schemes: Number of linears, quantized embeddings included, by scheme.
        covered: Share of parameters that is quantized.
        simulated: Whether any scheme needs arithmetic that no engine has.
        adapter_bytes: Bytes of the tensors of a kept adapter.
    """

    parameters: int
    tensor_bytes: int
    bits_per_weight: float
    file_bytes: int
    schemes: dict[str, int]
    covered: float
    simulated: bool
    adapter_bytes: int = 0


def measure_size(folder: Path, *, trust: Trust = UNTRUSTED) -> Size:
    """Measure the size of a checkpoint folder.

    Args:
        folder: The folder.
        trust: Permissions of its files.

    Returns:
        Its size. `schemes` has the method of other tools (`gptq`) for what they quantized; it is empty if the model is
        not quantized, or in a way that Laconic cannot read.

    Raises:
        ValueError: It cannot be read.
    """
    checkpoint = open_checkpoint(folder, trust=trust)
    raw, config = read_config(folder, trust=trust)
    quantization = linear_quantization_config(raw)
    if quantization:
        del config.quantization_config
    model = build_skeleton(config, main_dtype(checkpoint), trust=trust)
    foreign = quantization["quant_method"] if quantization and is_decodable(quantization) else None
    source = decode_checkpoint(checkpoint, raw, config, trust) if foreign else checkpoint
    matrices = {s.key: count_elements(s.shape) for s in source.tensors.values() if s.decoding}
    arranged = arrange(source, model)
    embeddings = [n for n in [find_embeddings(model)] if n]
    names = engine_names(arranged, model, [*linears_of(model), *embeddings])
    schemes = schemes_of(quantization, names, embeddings) if quantization and is_readable(quantization) else {}
    adapters = [open_shard(place / ADAPTER_WEIGHTS) for place in adapter_folders(folder)]
    adapter_bytes = sum(s.nbytes for adapter in adapters for s in adapter.tensors.values())
    tensor_bytes = adapter_bytes + sum(s.nbytes for s in (checkpoint if foreign else arranged).tensors.values())
    extra = sum(count_elements(arranged.tensors[n].shape) for n in names_outside(arranged, model))
    parameters = extra + sum(p.numel() for p in model.parameters())
    quantized = sum(model.get_parameter(f"{n}.weight").numel() for n in schemes) + sum(matrices.values())
    counts = Counter(s.title for s in schemes.values())
    if foreign:
        counts[foreign] = len(matrices)
    return Size(
        parameters,
        tensor_bytes,
        8 * tensor_bytes / parameters,
        checkpoint.nbytes + sum(adapter.nbytes for adapter in adapters),
        dict(counts),
        quantized / parameters,
        any(s.simulated for s in schemes.values()),
        adapter_bytes,
    )
