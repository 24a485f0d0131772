"""Quantized checkpoints of other tools, read as 16-bit ones: every matrix is decoded when it is loaded.

Read are `fp8` (DeepSeek-V3, Qwen3-FP8), `gptq`, `awq` and `mxfp4` (gpt-oss). Names and shapes of the 16-bit checkpoint
are known from the headers of files, so that a walk decodes block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laconic.checkpoint.files import Checkpoint, Decoding, StoredTensor
from laconic.formats.floats import Fp8
from laconic.formats.fp4 import MxFp4
from laconic.formats.gptq_layout import decode_awq, decode_gptq
from laconic.formats.tiling import CHANNEL, TENSOR, Tiling

FP8, GPTQ, AWQ, MXFP4 = "fp8", "gptq", "awq", "mxfp4"
"""Values of `quant_method` that are decoded here."""

# Scales of the input of an FP8 linear, which a 16-bit checkpoint has no use for.
_INPUT_SCALES = ("activation_scale", "input_scale")

Parts = Mapping[str, Tensor]
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Matrix:
    """A matrix of a quantized checkpoint, or a stack of them.

    Attributes:
        shape: Shape of its tensor in a 16-bit checkpoint.
        parts: Names in the file of the tensors that it is decoded from, by their name for `decode`.
        decode: Returns one matrix from its parts.
        dropped: Names in the file of tensors that go with it and are not needed.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    decode: Callable[[Parts], Tensor]
    dropped: tuple[str, ...] = ()


def is_decodable(quantization: Mapping[str, Any]) -> bool:
    """Return whether checkpoints with this quantization_config can be read as 16-bit ones by `decode_foreign`.

    Args:
        quantization: The quantization_config.
    """
    return quantization.get("quant_method") in _MATRICES


def decode_foreign(
    checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: str, transposed: Collection[str] = ()
) -> Checkpoint:
    """Return a quantized checkpoint of another tool as a 16-bit one.

    Args:
        checkpoint: The checkpoint, with the names of its files.
        quantization: Its quantization_config.
        dtype: Dtype of decoded matrices, by its name in safetensors.
        transposed: Names in files of the linears that are decoded as (out, in), and whose weight a 16-bit checkpoint
            has as (in, out).

    Returns:
        A checkpoint in which each quantized matrix is a tensor that is decoded when it is loaded.

    Raises:
        ValueError: The variant of the quantization is not read, or no tensor is quantized so.
    """
    method = quantization["quant_method"]
    matrices = _MATRICES[method](checkpoint.tensors, quantization)
    if not matrices:
        raise ValueError(
            f"config.json of {checkpoint.folder} says that the model is quantized by '{method}', but none of its "
            "tensors is; download it again"
        )
    turned = {name: m for name, m in matrices.items() if name.removesuffix(".weight") in transposed}
    matrices |= {n: replace(m, shape=m.shape[::-1], decode=partial(_turned, m.decode)) for n, m in turned.items()}
    return with_matrices(checkpoint, matrices, dtype)


def _turned(decode: Callable[[Parts], Tensor], parts: Parts) -> Tensor:
    return decode(parts).T.contiguous()


def with_matrices(checkpoint: Checkpoint, matrices: Mapping[str, Matrix], dtype: str) -> Checkpoint:
    """Return a checkpoint with decoded matrices in place of the tensors that they are decoded from.

    Args:
        checkpoint: The checkpoint, with the names of its files.
        matrices: The matrices, by name.
        dtype: Dtype of decoded matrices, by its name in safetensors.
    """
    stored = checkpoint.tensors
    read = {key for matrix in matrices.values() for key in (*matrix.parts.values(), *matrix.dropped)}
    tensors = {name: tensor for name, tensor in stored.items() if name not in read}
    for name, matrix in matrices.items():
        parts = {part: stored[key] for part, key in matrix.parts.items()}
        file = next(iter(parts.values())).file
        tensors[name] = StoredTensor(file, matrix.shape, dtype, name, decoding=Decoding(parts, matrix.decode))
    return replace(checkpoint, tensors=dict(sorted(tensors.items())))


def _fp8_matrices(tensors: Tensors, quantization: Mapping[str, Any]) -> dict[str, Matrix]:
    """Find the FP8 matrices: `weight` with `weight_scale_inv`, one scale for a block, a row or the whole."""
    block = quantization.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise ValueError(f"weight_block_size {block} of config.json is no pair of numbers; download the model again")
    matrices = {}
    for name, stored in tensors.items():
        scale = next((f"{name}{s}" for s in ("_scale_inv", "_scale") if f"{name}{s}" in tensors), None)
        if stored.dtype != "F8_E4M3":
            continue
        if scale is None:
            # Scales of caches and of inputs may be in FP8 as well, and have no scale.
            if len(stored.shape) > 1:
                raise ValueError(f"tensor '{name}' is FP8 and has no scale beside it; download the model again")
            continue
        tiling = _fp8_tiling(name, stored.shape, tensors[scale].shape, block)
        path = name.rpartition(".")[0]
        dropped = tuple(n for leaf in _INPUT_SCALES if (n := f"{path}.{leaf}") in tensors)
        decode = partial(_decode_fp8, tiling=tiling)
        matrices[name] = Matrix(stored.shape, {"codes": name, "scale": scale}, decode, dropped)
    return matrices


def _fp8_tiling(
    name: str, shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | list[int] | None
) -> Tiling:
    """Return how the scales of an FP8 matrix are laid out, by their shape."""
    rows, columns = shape[-2:]
    stacked = len(shape) == 3
    of_one = scales[1:] if stacked else scales
    if all(n == 1 for n in of_one):
        return TENSOR
    if of_one in ((rows, 1), (rows,)):
        return CHANNEL
    height, width = block or (-(-rows // of_one[0]), -(-columns // of_one[-1]))
    if of_one != (-(-rows // height), -(-columns // width)):
        raise ValueError(
            f"the scales of '{name}' have shape {scales}, which is no grid of blocks of {height} x {width}; "
            "start from the original 16-bit model"
        )
    return Tiling("block", block_structure=(height, width))


def _decode_fp8(parts: Parts, *, tiling: Tiling) -> Tensor:
    codes, scale = parts["codes"], parts["scale"]
    if scale.dtype == torch.uint8:  # an exponent alone (E8M0)
        scale = scale.view(torch.float8_e8m0fnu)
    shape = (codes.shape[0], codes.shape[1])
    return Fp8(tiling).decode(codes, {"scale": scale.float().reshape(tiling.param_shape(shape))}, shape)


def _gptq_matrices(tensors: Tensors, quantization: Mapping[str, Any]) -> dict[str, Matrix]:
    """Find the matrices of GPTQ: `qweight`, `qzeros`, `scales` and perhaps `g_idx`."""
    bits, size = quantization.get("bits", 4), quantization.get("group_size", 128)
    version = quantization.get("checkpoint_format", "gptq")
    # Names that begin with "-:" are those of linears in 16 bit.
    mixed = any(not str(name).startswith("-:") for name in quantization.get("dynamic") or ())
    if bits not in (2, 3, 4, 8) or version not in ("gptq", "gptq_v2") or mixed or not _is_size(size):
        raise ValueError(
            f"GPTQ in {'several widths' if mixed else f'{bits} bits'}, layout '{version}', is not read; start from the "
            "original 16-bit model"
        )
    matrices = {}
    for path in _paths(tensors, "qweight"):
        outputs, inputs = tensors[f"{path}.qweight"].shape[1], tensors[f"{path}.qweight"].shape[0] * 32 // bits
        groups = 1 if size == -1 else -(-inputs // size)
        shapes: dict[str, tuple[int, ...]] = {"qzeros": (groups, outputs * bits // 32), "scales": (groups, outputs)}
        shapes |= {"g_idx": (inputs,)} if f"{path}.g_idx" in tensors else {}
        _check_shapes(path, tensors, shapes)
        parts = {leaf: f"{path}.{leaf}" for leaf in ("qweight", *shapes)}
        decode = partial(_decode_gptq, bits=bits, size=size, zero_offset=int(version == "gptq"))
        matrices[f"{path}.weight"] = Matrix((outputs, inputs), parts, decode)
    return matrices


def _decode_gptq(parts: Parts, *, bits: int, size: int, zero_offset: int) -> Tensor:
    inputs = parts["qweight"].shape[0] * 32 // bits
    groups = parts.get("g_idx")
    if groups is None:
        groups = torch.arange(inputs, device=parts["qweight"].device) // (inputs if size == -1 else size)
    return decode_gptq(
        parts["qweight"], parts["qzeros"], parts["scales"], groups, num_bits=bits, zero_offset=zero_offset
    )


def _awq_matrices(tensors: Tensors, quantization: Mapping[str, Any]) -> dict[str, Matrix]:
    """Find the matrices of AWQ: `qweight`, `qzeros` and `scales`."""
    bits, size = quantization.get("bits", 4), quantization.get("group_size", 128)
    version = str(quantization.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not _is_size(size):
        raise ValueError(
            f"AWQ in {bits} bits, layout '{version}', is not read (4 bits in layout 'gemm' are); start from the "
            "original 16-bit model"
        )
    matrices = {}
    for path in _paths(tensors, "qweight"):
        inputs, words = tensors[f"{path}.qweight"].shape
        groups = 1 if size == -1 else -(-inputs // size)
        _check_shapes(path, tensors, {"qzeros": (groups, words), "scales": (groups, words * 8)})
        parts = {leaf: f"{path}.{leaf}" for leaf in ("qweight", "qzeros", "scales")}
        matrices[f"{path}.weight"] = Matrix((words * 8, inputs), parts, lambda p: decode_awq(**p))
    return matrices


def _mxfp4_matrices(tensors: Tensors, quantization: Mapping[str, Any]) -> dict[str, Matrix]:
    """Find the matrices of gpt-oss: `NAME_blocks` (experts, out, groups, 16) and `NAME_scales` (experts, out, groups).

    The 16-bit model has them as (experts, in, out).
    """
    matrices = {}
    for key, stored in tensors.items():
        name = key.removesuffix("_blocks")
        if name != key and f"{name}_scales" in tensors and stored.dtype == "U8":
            *stack, rows, groups, half = stored.shape
            shape = (*stack, groups * half * 2, rows)
            matrices[name] = Matrix(shape, {"blocks": key, "scales": f"{name}_scales"}, _decode_mxfp4)
    return matrices


def _decode_mxfp4(parts: Parts) -> Tensor:
    packed = parts["blocks"].flatten(1)
    shape = (packed.shape[0], 2 * packed.shape[1])
    codes, params = MxFp4().from_tensors({"weight_packed": packed, "weight_scale": parts["scales"]}, shape)
    return MxFp4().decode(codes, params, shape).T.contiguous()


def _is_size(size: object) -> bool:
    """Return whether a config's group_size is a number of columns, or -1 for a whole row."""
    return isinstance(size, int) and (size > 0 or size == -1)


def _check_shapes(path: str, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a module has tensors of these shapes, by their name in it."""
    for leaf, shape in shapes.items():
        stored = tensors.get(f"{path}.{leaf}")
        if stored is None or stored.shape != shape:
            held = "missing" if stored is None else f"of shape {stored.shape}"
            raise ValueError(
                f"tensor '{path}.{leaf}' is {held}, and config.json asks for {shape}; download the model again"
            )


def _paths(tensors: Tensors, leaf: str) -> list[str]:
    """List the modules that have a tensor of this name."""
    return [name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] == leaf]


_MATRICES: Mapping[str, Callable[[Tensors, Mapping[str, Any]], dict[str, Matrix]]] = {
    FP8: _fp8_matrices,
    GPTQ: _gptq_matrices,
    AWQ: _awq_matrices,
    MXFP4: _mxfp4_matrices,
}
