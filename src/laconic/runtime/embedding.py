"""QEmbedding: a table of embeddings that is stored as codes, of which each lookup decodes the rows that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laconic.formats import Quantized
from laconic.formats.schemes import Scheme
from laconic.formats.storage import stored_shapes

# The one tensor in a file that belongs to no row.
_SHAPE = "weight_shape"


def check_table(name: str, scheme: Scheme) -> None:
    """Check that rows of a table can be looked up under a scheme.

    Args:
        name: Full name of the embeddings.
        scheme: Scheme of the table.

    Raises:
        ValueError: They cannot; the message names the fix.
    """
    if not scheme.weights.table or scheme.input_activations is not None or scheme != scheme.plain:
        raise ValueError(
            f"{name} is looked up row by row, which {scheme.title} does not allow; use W8A16, W4A16 or W2A16, "
            "symmetric and without side tensors"
        )


class QEmbedding(nn.Module):
    """Embeddings whose parameters are the stored tensors of one quantized table, under their stored names.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Width of a row.
        scheme: Scheme of the table.
        dtype: Dtype of the rows that a lookup returns, and of scales.
        factor: What the model multiplies a row by after its lookup, () or (1,); None for nothing.
    """

    factor: Tensor | None

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, scheme: Scheme, dtype: torch.dtype, factor: Tensor | None
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scheme, self.dtype = scheme, dtype
        stored = stored_shapes(scheme, (num_embeddings, embedding_dim), dtype)
        self.names = tuple(stored)
        device = torch.empty(0).device
        for name, meta in stored.items():
            empty = torch.empty_like(meta, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.register_buffer("factor", factor, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Decoded table, (num_embeddings, embedding_dim), in new memory."""
        return self.decode(self.dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded table, (num_embeddings, embedding_dim).

        Args:
            dtype: Dtype of the result.
        """
        return self._quantized({n: self.get_parameter(n) for n in self.names}, self.num_embeddings).decode(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids.

        Args:
            ids: Token ids of any shape.

        Returns:
            (*ids.shape, embedding_dim).
        """
        flat = ids.reshape(-1)
        stored = {n: p if n == _SHAPE else p[flat] for n in self.names for p in (self.get_parameter(n),)}
        rows = self._quantized(stored, len(flat)).decode(self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.factor is None else rows * self.factor.to(rows.dtype)

    def _quantized(self, stored: Mapping[str, Tensor], rows: int) -> Quantized:
        return Quantized.from_tensors(self.scheme.weights, stored, (rows, self.embedding_dim))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QEmbedding:
        """Move the module, or change its dtype. Codes and their parameters keep the dtype in which they are stored."""
        originals = {n: self.get_parameter(n).data for n in self.names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in originals.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != original.dtype:
                parameter.data = original.to(parameter.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(iter(originals.values())).device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"


def replace_embedding(model: nn.Module, name: str, scheme: Scheme, dtype: torch.dtype) -> QEmbedding:
    """Replace the embeddings of a model by a QEmbedding of the same shape, its tensors not set yet.

    Args:
        model: The model, changed in place.
        name: Name of the embeddings.
        scheme: Scheme of the table.
        dtype: Dtype of rows and scales.

    Returns:
        The QEmbedding, on the default device.

    Raises:
        ValueError: The model does more with a row than to multiply it by one number.
    """
    new = make_embedding(model.get_submodule(name), name, scheme, dtype)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return new


def make_embedding(dense: nn.Module, name: str, scheme: Scheme, dtype: torch.dtype) -> QEmbedding:
    """Make a QEmbedding of the same shape as a table, its tensors not set yet.

    Args:
        dense: The table; its weight may be on the meta device.
        name: Its name, for messages.
        scheme: Scheme of the new table.
        dtype: Dtype of rows and scales.

    Returns:
        The QEmbedding, on the default device.

    Raises:
        ValueError: The table does more with a row than to multiply it by one number.
    """
    assert isinstance(dense, nn.Embedding)
    check_table(name, scheme)
    factor = _factor(dense, name)
    return QEmbedding(dense.num_embeddings, dense.embedding_dim, scheme=scheme, dtype=dtype, factor=factor)


def _factor(embedding: nn.Embedding, name: str) -> Tensor | None:
    """Return what a row is multiplied by after its lookup (Gemma), found by trying rows of ones and of twos."""
    if type(embedding) is nn.Embedding:
        return None
    rows = []
    with torch.no_grad(), torch.device("cpu"):
        for value in (1.0, 2.0):
            table = torch.full((), value, dtype=torch.float32).expand(embedding.num_embeddings, embedding.embedding_dim)
            rows.append(functional_call(embedding, {"weight": table}, torch.zeros(1, 1, dtype=torch.long)).float())
    factor: Tensor = rows[0].flatten()[:1]
    if not torch.equal(rows[0], factor.expand_as(rows[0])) or not torch.equal(rows[1], 2 * rows[0]):
        raise ValueError(
            f"{name} ({type(embedding).__name__}) is more than a table of rows; leave Embedding out of targets"
        )
    return factor
