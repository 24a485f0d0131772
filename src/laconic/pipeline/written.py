"""The last check before a folder gets its name: whatever its config claims to be quantized is read back from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from laconic.artifact.workspace import Workspace
from laconic.checkpoint.files import Checkpoint, linear_quantization_config, open_shard
from laconic.checkpoint.layout import arrange, engine_names
from laconic.formats.schemes import Scheme
from laconic.formats.storage import stored_shapes
from laconic.runtime.quant_config import schemes_of
from laconic.structure.anatomy import find_embeddings


def check_written(
    workspace: Workspace,
    model: PreTrainedModel,
    schemes: Mapping[str, Scheme],
    linears: Mapping[str, tuple[int, int]],
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Check that the reader finds every quantized linear in the finished shards; remove the shards if not.

    Args:
        workspace: all of its shards are finished.
        model: the skeleton, whose names transformers' own conversion gives to tensors of files.
        schemes: of every quantized linear, by full name.
        linears: (out, in) of every linear of the model, by full name.
        config: contents of config.json.
        dtype: in which parameters of codes are stored.

    Raises:
        ValueError: if a linear would not be read back as it was written.
    """
    problem = _problem(workspace, model, schemes, linears, config=config, dtype=dtype) if schemes else None
    if problem:
        workspace.discard()
        raise ValueError(
            f"unsupported architecture '{model.config.model_type}': {problem} would not be read back from the "
            "artifact, which is removed; add it to ignore"
        )


def _problem(
    workspace: Workspace,
    model: PreTrainedModel,
    schemes: Mapping[str, Scheme],
    linears: Mapping[str, tuple[int, int]],
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> str | None:
    """Return the first linear, or tensor of one, that the reader does not find."""
    shards = [open_shard(workspace.shard(i)) for i in range(workspace.shards)]
    files = Checkpoint(workspace.folder, {n: t for shard in shards for n, t in shard.tensors.items()})
    checkpoint = arrange(files, model)
    table = [n for n in [find_embeddings(model)] if n in linears]
    # A walk that quantizes linears describes them.
    quantization = linear_quantization_config(config) or {}
    claimed = schemes_of(quantization, engine_names(checkpoint, model, linears), table)
    if others := sorted(claimed.keys() ^ schemes.keys()):
        return others[0]
    for linear, scheme in schemes.items():
        for leaf, meta in stored_shapes(scheme, linears[linear], dtype).items():
            stored = checkpoint.tensors.get(f"{linear}.{leaf}")
            # A weight that files store as (in, out) is read in its own shape.
            if stored is None or sorted(stored.shape) != sorted(meta.shape):
                return f"{linear}.{leaf}"
    return None
