"""Matrices of compressed-tensors checkpoints and of our own artifacts, as a 16-bit checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from laconic.checkpoint.files import Checkpoint, StoredTensor
from laconic.checkpoint.layout import TransposedLinear, arrange, engine_names
from laconic.checkpoint.source import build_skeleton
from laconic.checkpoint.trust import Trust
from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.runtime.decoding import Matrix, Parts
from laconic.runtime.quant_config import schemes_from_config, schemes_of
from laconic.structure.anatomy import find_embeddings, linears_of

# Tensors by which a linear is known to hold codes.
_CODES = ("weight_packed", "weight_scale")
# Parameters of the rounding of inputs, and scales of a cache that other tools write into the layers.
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")


def compressed_matrices(
    checkpoint: Checkpoint, quantization: Mapping[str, Any], config: PretrainedConfig, trust: Trust
) -> dict[str, Matrix]:
    """Find the quantized matrices of a checkpoint, and how to decode them.

    Args:
        checkpoint: The checkpoint, with the names of its files.
        quantization: Its quantization_config, without the cache's part.
        config: Configuration of the model, without its quantization.
        trust: Permissions of the model's files.

    Returns:
        The matrices, by their names in a 16-bit checkpoint.

    Raises:
        ValueError: The config describes a format that is not read, or not every linear that holds codes.
    """
    leaves: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in checkpoint.tensors.items():
        path, _, leaf = name.rpartition(".")
        leaves.setdefault(path, {})[leaf] = stored
    coded = {path: of_path for path, of_path in leaves.items() if any(leaf in of_path for leaf in _CODES)}
    schemes, shapes, transposed = _schemes(checkpoint, quantization, config, coded, trust)
    for path in coded:
        if path not in schemes:
            raise ValueError(
                f"{checkpoint.folder} holds codes of '{path}', which its quantization_config does not describe; start "
                "from the original 16-bit model"
            )
    named = [
        f"{path}.weight_shape" for path, of_path in coded.items() if path not in shapes and "weight_shape" in of_path
    ]
    shapes |= {n.removesuffix(".weight_shape"): tuple(t.tolist()) for n, t in checkpoint.load(named).items()}
    matrices = {}
    for path, of_path in coded.items():
        scheme, turned = schemes[path], path in transposed
        shape = shapes.get(path) or _shape_of_codes(of_path)
        _check_scheme(path, scheme, of_path)
        parts = {leaf: f"{path}.{leaf}" for leaf in of_path if leaf != "bias" and leaf not in _UNUSED}
        decode = partial(_decode, scheme=scheme, shape=shape, turned=turned)
        dropped = tuple(f"{path}.{leaf}" for leaf in _UNUSED if leaf in of_path)
        matrices[f"{path}.weight"] = Matrix(shape[::-1] if turned else shape, parts, decode, dropped)
    return matrices


def _schemes(
    checkpoint: Checkpoint,
    quantization: Mapping[str, Any],
    config: PretrainedConfig,
    coded: Iterable[str],
    trust: Trust,
) -> tuple[dict[str, Scheme], dict[str, tuple[int, int]], set[str]]:
    """Return schemes and shapes of coded linears and embeddings by path in files, and the paths of transposed ones."""
    try:
        model = build_skeleton(deepcopy(config), torch.bfloat16, trust=trust)
    except ValueError:
        # An architecture that cannot be split into linears: its tensors can be decoded by name.
        return schemes_from_config(quantization, coded), {}, set()
    arranged = arrange(checkpoint, model)
    embeddings = [n for n in [find_embeddings(model)] if n]
    modules: dict[str, nn.Linear | nn.Embedding] = dict(linears_of(model))
    modules |= {n: m for n in embeddings if isinstance(m := model.get_submodule(n), nn.Embedding)}
    by_name = schemes_of(quantization, engine_names(arranged, model, modules), embeddings)
    paths = {name: arranged.paths.get(name, name) for name in by_name}
    schemes = {paths[name]: scheme for name, scheme in by_name.items()}
    shapes = {path: (modules[n].weight.shape[0], modules[n].weight.shape[1]) for n, path in paths.items()}
    transposed = {path for n, path in paths.items() if isinstance(modules[n], TransposedLinear)}
    outside = [path for path in coded if path not in schemes]
    return schemes | schemes_from_config(quantization, outside), shapes, transposed


def _shape_of_codes(leaves: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Return the shape of a matrix with one code a byte, or two."""
    rows, columns = (leaves.get("weight_packed") or leaves["weight"]).shape
    return rows, columns * 2 if "weight_packed" in leaves else columns


def _check_scheme(path: str, scheme: Scheme, leaves: Iterable[str]) -> None:
    if not scheme.weights.readable:
        raise ValueError(
            f"the zero points of '{path}' are stored in a layout that is not read; start from the original 16-bit model"
        )


def _decode(parts: Parts, *, scheme: Scheme, shape: tuple[int, int], turned: bool) -> Tensor:
    """Decode a matrix (out, in). turned: whether the file of a 16-bit model has it as (in, out)."""
    tensors = dict(parts)
    if turned and "weight" in tensors:
        tensors["weight"] = tensors["weight"].T.contiguous()
    groups = tensors.pop("weight_g_idx", None)
    weight = Quantized.from_tensors(scheme.weights, tensors, shape)
    if groups is not None and int(groups.min()) >= 0:
        # Columns of a group lie apart from each other: decoded in the order of groups, and put back.
        order = groups.argsort(stable=True)
        columns = Quantized(weight.format, weight.codes[:, order], weight.params, shape).decode()
        W = torch.empty_like(columns)
        W[:, order] = columns
    else:
        W = weight.decode()
    return W.T.contiguous() if turned else W
