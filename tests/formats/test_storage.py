"""Storage: a quantized weight as the tensors of a file, read back by us and by compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from laconic.formats import Quantized, quantize
from laconic.formats.schemes import PRESETS, Scheme, scheme
from laconic.formats.storage import stored_bytes, stored_shapes
from laconic.runtime.quant_config import to_config

VARIED = (
    scheme("W4A16", group_size=-1),
    scheme("W4A16", group_size=32),
    scheme("W3A16", symmetric=False),
    scheme("W8A16", symmetric=False),
    scheme("W8A8", strategy="tensor"),
    scheme("FP8", strategy="channel"),
)
SHAPES = ((7, 128), (40, 256), (200, 384))

every_scheme = pytest.mark.parametrize(
    "kept", [*PRESETS.values(), *VARIED], ids=lambda s: f"{s.name}-{s.weights.tiling.strategy}"
)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def made(kept: Scheme, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Quantized:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return quantize(kept.weights, w, kept.weights.fit(w, dtype))


@every_scheme
@every_shape
def test_what_was_stored_is_read_back_bit_for_bit(kept: Scheme, shape: tuple[int, int]) -> None:
    q = made(kept, shape)
    back = Quantized.from_tensors(kept.weights, q.to_tensors(), shape)
    assert torch.equal(back.codes.view(torch.int8), q.codes.view(torch.int8))
    assert back.params.keys() == q.params.keys()
    assert all(torch.equal(back.params[n].float(), q.params[n].float()) for n in q.params)


@every_scheme
@every_shape
def test_compressed_tensors_decodes_what_we_store(kept: Scheme, shape: tuple[int, int]) -> None:
    q = made(kept, shape, torch.float32)
    group = to_config({"linear": kept}, ["linear"])["config_groups"]["group_0"]
    theirs = BaseCompressor.get_value_from_registry(kept.storage)
    read = theirs.decompress(q.to_tensors(), QuantizationScheme.model_validate(group))["weight"]
    assert torch.equal(read, q.decode(read.dtype))


@every_scheme
@every_shape
def test_the_bytes_foretold_are_the_bytes_in_the_file(kept: Scheme, shape: tuple[int, int], tmp_path: Path) -> None:
    save_file(made(kept, shape).to_tensors(), tmp_path / "linear.safetensors")
    written = load_file(tmp_path / "linear.safetensors")
    assert stored_bytes(kept, shape, torch.bfloat16) == sum(t.nbytes for t in written.values())
    foretold = stored_shapes(kept, shape, torch.bfloat16)
    assert {n: (t.shape, t.dtype) for n, t in foretold.items()} == {n: (t.shape, t.dtype) for n, t in written.items()}


@pytest.mark.parametrize(("preset", "bits"), [("W4A16", 4), ("W3A16", 3), ("W2A16", 2), ("W6A6", 6), ("W8A8", 8)])
def test_codes_take_the_bits_their_name_says(preset: str, bits: int) -> None:
    kept, shape = PRESETS[preset], (64, 1024)
    scales = made(kept, shape).to_tensors()["weight_scale"].numel() * 2
    shape_itself = 16 if kept.storage == "pack-quantized" else 0
    assert stored_bytes(kept, shape, torch.bfloat16) - scales - shape_itself == 64 * 1024 * bits // 8


@pytest.mark.parametrize(("preset", "bits"), [("NVFP4A16", 4 + 8 / 16), ("MXFP4A16", 4 + 8 / 32)])
def test_small_groups_of_fp4_take_eight_bits_more_each(preset: str, bits: float) -> None:
    whole_tensor = 4 if preset.startswith("NV") else 0
    assert stored_bytes(PRESETS[preset], (64, 1024), torch.bfloat16) - whole_tensor == 64 * 1024 * bits / 8
