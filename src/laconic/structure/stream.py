"""The residual stream: the norms and linears that read it, the linears and embeddings that write it, and its rotation.

A rotation x -> x Q of the residual stream leaves a model's function unchanged (QuaRot, arXiv 2404.00456) if the outputs
of all that writes it are multiplied by Q, and the inputs of all that reads it by Q^T. A norm commutes with Q once its
weights are folded into its readers; a norm that subtracts the mean also needs a stream of zero mean, and a Q that keeps
the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laconic.solvers.orthogonal import Rotation
from laconic.structure.anatomy import linear_at

# Rows of a matrix that are rotated at once: bounds the float32 memory beside embeddings.
_ROWS = 8192


@dataclass(frozen=True)
class StreamNorm:
    """A norm that reads the residual stream.

    Attributes:
        source: Name of the norm.
        readers: Names of all linears and routers that read its output.
        offset: Whether it multiplies by 1 + weight.
    """

    source: str
    readers: tuple[str, ...]
    offset: bool


@dataclass(frozen=True, eq=False)
class ValueHeads:
    """A linear that computes the values of attention heads, and the linears that read them unmixed within a head.

    Attributes:
        source: Name of the linear that computes the values.
        readers: Names of the linears that read them.
        channels: (in,) for each input channel of the readers, the output channel of the source that feeds it.
        width: Channels of a head.
    """

    source: str
    readers: tuple[str, ...]
    channels: Tensor
    width: int


@dataclass(frozen=True, eq=False)
class BlockStream:
    """Parts of a block that read or write the residual stream, by names within the block.

    Attributes:
        norms: Norms that read it.
        writers: Linears whose output is added to it.
        values: Heads, whose channels can be rotated too; None if there are none.
        centred: Whether norms subtract the mean.
    """

    norms: tuple[StreamNorm, ...]
    writers: tuple[str, ...]
    values: ValueHeads | None
    centred: bool


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """Parts of a model that read or write the residual stream.

    Attributes:
        width: Number of its channels.
        blocks: Parts of each block.
        embeddings: Full names of the embeddings that write it: of tokens, and of positions.
        final_norm: The norm before the head, by full names.
        centred: Whether norms subtract the mean.
    """

    width: int
    blocks: tuple[BlockStream, ...]
    embeddings: tuple[str, ...]
    final_norm: StreamNorm
    centred: bool


def rotate_block(
    block: nn.Module, parts: BlockStream, rotation: Rotation | None, head_rotation: Rotation | None
) -> None:
    """Rotate the residual stream around a block, and the values of its attention, in place.

    Args:
        block: The block, its parameters in float32.
        parts: What reads and writes the stream.
        rotation: Of the residual stream; None leaves it.
        head_rotation: Of the values of each head; None leaves them.

    Raises:
        ValueError: A norm has a bias that no rotated norm can have.
    """
    if rotation:
        for norm in parts.norms:
            readers = [block.get_submodule(n) for n in norm.readers]
            rotate_readers(block.get_submodule(norm.source), norm.offset, readers, rotation)
        for name in parts.writers:
            _rotate_writer(linear_at(block, name), rotation, parts.centred)
    if head_rotation and parts.values:
        rotate_values(block, parts.values, head_rotation)


def rotate_readers(norm: nn.Module, offset: bool, readers: Sequence[nn.Module], rotation: Rotation) -> None:
    """Fold the weights of a norm into its readers, and rotate their input, in place.

    The norm's bias goes into the biases of its readers, or stays a bias of the norm where a reader has none.

    Args:
        norm: The norm; its weights become one.
        offset: Whether it multiplies by 1 + weight.
        readers: All that reads its output.
        rotation: Of the residual stream.

    Raises:
        ValueError: A channel of the norm has a bias and a weight of zero, and a reader has no bias.
    """
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    scale = weight.data.float() + float(offset)
    if isinstance(bias, Tensor):
        if all(isinstance(getattr(reader, "bias", None), Tensor) for reader in readers):
            for reader in readers:
                b, W = reader.get_parameter("bias"), reader.get_parameter("weight")
                b.data = b.data + (W.data.float() @ bias.data.float()).to(b.dtype)
            bias.data = torch.zeros_like(bias.data)
        else:
            if bool(((scale == 0) & (bias.data != 0)).any()):
                raise ValueError(
                    "a norm has channels with a bias and no weight, and its linears have no bias; leave rotate out"
                )
            unscaled = torch.where(bias.data == 0, 0, bias.data.float() / scale)
            bias.data = rotation.apply(unscaled).to(bias.dtype)
    for reader in readers:
        W = reader.get_parameter("weight")
        W.data = rotate_rows(W.data, rotation, scale=scale)
    weight.data = torch.full_like(weight.data, 1.0 - float(offset))


def rotate_rows(W: Tensor, rotation: Rotation, *, scale: Tensor | None = None, centre: bool = False) -> Tensor:
    """Compute W diag(scale) Q in float32, some rows at a time.

    Args:
        W: (rows, n), such as the weight of a reader, or embeddings.
        rotation: Q.
        scale: (n,); None for ones.
        centre: Whether the mean of each row is subtracted first.

    Returns:
        (rows, n), in the dtype of W.
    """
    out = torch.empty_like(W)
    for rows, target in zip(W.split(_ROWS), out.split(_ROWS), strict=True):
        x = rows.float()
        x = x if scale is None else x * scale
        target.copy_(rotation.apply(x - x.mean(1, keepdim=True) if centre else x))
    return out


def rotate_values(block: nn.Module, values: ValueHeads, rotation: Rotation) -> None:
    """Rotate the values of each attention head, in place.

    Args:
        block: The block, its parameters in float32.
        values: Where values come from, and what reads them.
        rotation: Of the channels of a head.
    """
    source, d = linear_at(block, values.source), values.width
    rows = values.channels.unique().to(source.weight.device)
    W = source.weight.data.clone()
    heads = W[rows].view(-1, d, W.shape[1]).transpose(1, 2)
    W[rows] = rotation.apply(heads).transpose(1, 2).reshape(len(rows), -1)
    source.weight.data = W
    if source.bias is not None:
        bias = source.bias.data.clone()
        bias[rows] = rotation.apply(bias[rows].view(-1, d)).flatten()
        source.bias.data = bias
    for name in values.readers:
        reader = linear_at(block, name)
        columns = reader.weight.data.view(reader.out_features, -1, d)
        reader.weight.data = rotation.apply(columns).view_as(reader.weight)


def _rotate_writer(linear: nn.Linear, rotation: Rotation, centre: bool) -> None:
    """Rotate the output of a linear."""
    linear.weight.data = rotate_rows(linear.weight.data.T, rotation, centre=centre).T.contiguous()
    if linear.bias is not None:
        linear.bias.data = rotate_rows(linear.bias.data[None], rotation, centre=centre)[0]
