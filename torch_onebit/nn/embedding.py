"""OneBitEmbedding: nn.Embedding over packed weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit import ops
from torch_onebit.checks import check_kind, check_level_dtype, check_packed
from torch_onebit.methods import quantize_weight
from torch_onebit.nn.sizes import stored_columns
from torch_onebit.nn.weight import OneBitModule
from torch_onebit.ops import linear_op
from torch_onebit.padding import pad_rows


class OneBitEmbedding(OneBitModule):
    """Rows of a packed matrix, decoded as they are looked up; a drop-in for ``nn.Embedding``.

    Args:
        num_embeddings: rows.
        embedding_dim: k; where ``group_size`` does not divide it, the last group is filled up.
        padding_idx: the row that gets no gradient and starts as zeros.
        scale_grad_by_freq, sparse: kept for ``to_embedding``; levels that train have no such
            gradients.
        output_dtype: of the rows looked up, so that scales of 16 bits can serve a float32 model;
            the dtype of scales without it. ``.to(dtype)`` and the like change it with the scales.
        group_size, symmetric, device, dtype: as in ``OneBitLinear``.
    Shape:
        indices of any shape, int32 or int64, to ``[*indices.shape, k]`` in ``output_dtype``.
    Raises:
        ValueError: a group size, padding_idx or dtype that is not allowed.
        TypeError: an argument of the wrong kind.
        NotImplementedError: (forward) levels train, and scale_grad_by_freq or sparse is set.
        IndexError: (forward) an index outside the rows.
    """

    rows_name, columns_name = "num_embeddings", "embedding_dim"
    max_norm, norm_type = None, 2.0  # of nn.Embedding, for code that looks at them

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        output_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            group_size=group_size,
            symmetric=symmetric,
            device=device,
            dtype=dtype,
        )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        if padding_idx is not None:
            within = f"padding_idx must be an integer within the {num_embeddings} rows"
            if type(padding_idx) is not int:
                raise TypeError(f"{within}, got {padding_idx!r}")
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(f"{within}, got {padding_idx!r}")
            padding_idx %= num_embeddings
        self.padding_idx = padding_idx
        self.scale_grad_by_freq = scale_grad_by_freq
        self.sparse = sparse
        check_level_dtype(output_dtype, "output_dtype")
        self.output_dtype = output_dtype
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random bits of standard deviation 1, as nn.Embedding starts; zeros at ``padding_idx``."""
        self._reset_weight(1.0)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.scales[self.padding_idx] = 0
                if self.biases is not None:
                    self.biases[self.padding_idx] = 0

    def forward(self, indices: Tensor) -> Tensor:
        rows = ops.embedding(indices, self.weight, self.scales, self.biases, self.group_size)
        if torch.is_grad_enabled():
            if (self.sparse or self.scale_grad_by_freq) and rows.requires_grad:
                raise NotImplementedError(
                    "levels that train must have neither sparse nor scale_grad_by_freq, "
                    f"got sparse={self.sparse}, scale_grad_by_freq={self.scale_grad_by_freq}"
                )
            if self.padding_idx is not None:
                rows = torch.where((indices == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        if self._lacking:
            rows = rows[..., : self.embedding_dim]
        return rows if self.output_dtype is None else rows.to(self.output_dtype)

    def as_linear(self, x: Tensor) -> Tensor:
        """``x @ w.T``, the head of a model that ties it to its embedding: ``[..., rows]``."""
        if self._lacking:
            x = pad_rows(x, self._lacking)
        return linear_op(x, self.weight, self.scales, self.biases, None, self.group_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OneBitEmbedding":
        super()._apply(fn, recurse)
        if self.output_dtype is not None:  # what becomes of a parameter that has it
            like = torch.empty(0, dtype=self.output_dtype, device=self.scales.device)
            self.output_dtype = fn(like).dtype
        return self

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        method: str = "optimal",
        importance: Tensor | None = None,
    ) -> "OneBitEmbedding":
        """Quantize an ``nn.Embedding``.

        Args:
            method, importance: as in ``quantize_weight``, without "calibrated": rows have no
                inputs.
        Raises:
            ValueError: a group size that the format does not allow, a method that does not exist,
                or an embedding with ``max_norm``, which rewrites rows as they are looked up.
            TypeError: another kind of layer.
        """
        check_kind("embedding", embedding, nn.Embedding, "an nn.Embedding")
        if embedding.max_norm is not None:
            raise ValueError(f"embedding must have no max_norm, got {embedding.max_norm}")
        packed = quantize_weight(
            embedding.weight, method, group_size, symmetric=symmetric, importance=importance
        )
        layer = cls.from_packed(
            *packed,
            embedding.padding_idx,
            group_size=group_size,
            embedding_dim=embedding.embedding_dim,
            scale_grad_by_freq=embedding.scale_grad_by_freq,
            sparse=embedding.sparse,
        )
        return layer.train(embedding.training)

    @classmethod
    def from_packed(
        cls,
        weight: Tensor,
        scales: Tensor,
        biases: Tensor | None,
        padding_idx: int | None = None,
        *,
        group_size: int,
        embedding_dim: int | None = None,
        **options: Any,
    ) -> "OneBitEmbedding":
        """A layer that holds tensors of the format, as they are; see ``OneBitLinear.from_packed``.

        Args:
            embedding_dim: k, when the last group is not full; all columns without it.
            options: scale_grad_by_freq, sparse and output_dtype, as in the constructor.
        Raises:
            ValueError: a tensor that the format does not allow; the message names it.
            TypeError: something else than a tensor.
        """
        check_packed(weight, scales, biases, group_size)
        k = stored_columns(weight, group_size, "embedding_dim", embedding_dim)
        options |= {"group_size": group_size, "symmetric": biases is None, "device": "meta"}
        layer = cls(len(weight), k, padding_idx, **options)
        layer._take(weight, scales, biases)
        return layer

    def to_embedding(self) -> nn.Embedding:
        """An ``nn.Embedding`` of the dequantized weights, in ``output_dtype``."""
        weight = self.dequantize().detach()
        if self.output_dtype is not None:
            weight = weight.to(self.output_dtype)
        embedding = nn.Embedding.from_pretrained(
            weight,
            freeze=False,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        names = ("padding_idx", "scale_grad_by_freq", "sparse", "output_dtype")
        given = {name: getattr(self, name) for name in names}
        extra = "".join(f", {k}={v}" for k, v in given.items() if v is not None and v is not False)
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{extra}, "
            f"group_size={self.group_size}, symmetric={self.symmetric}"
        )
