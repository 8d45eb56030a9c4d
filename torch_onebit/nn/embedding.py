"""OneBitEmbedding: nn.Embedding over packed weights."""

import torch
from torch import Tensor, nn

from torch_onebit import ops
from torch_onebit.checks import check_kind, check_packed
from torch_onebit.methods import quantize_weight
from torch_onebit.nn.weight import OneBitModule
from torch_onebit.ops import linear_op
from torch_onebit.packing import WORD_BITS


class OneBitEmbedding(OneBitModule):
    """Rows of a packed matrix, decoded as they are looked up; a drop-in for ``nn.Embedding``.

    Args:
        num_embeddings: rows.
        embedding_dim: k, a multiple of ``group_size``.
        padding_idx: the row that gets no gradient and starts as zeros.
        group_size, symmetric, device, dtype: as in ``OneBitLinear``.
    Shape:
        indices of any shape, int32 or int64, to ``[*indices.shape, k]`` in the dtype of scales.
    Raises:
        ValueError: a group size, k or padding_idx that is not allowed.
        IndexError: (forward) an index outside the rows.
    """

    rows_name, columns_name = "num_embeddings", "embedding_dim"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group_size: int = 128,
        symmetric: bool = False,
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
            if type(padding_idx) is not int or not (
                -num_embeddings <= padding_idx < num_embeddings
            ):
                raise ValueError(
                    f"padding_idx must be an integer within the {num_embeddings} rows, "
                    f"got {padding_idx!r}"
                )
            padding_idx %= num_embeddings
        self.padding_idx = padding_idx
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
        if self.padding_idx is not None and torch.is_grad_enabled():
            rows = torch.where((indices == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows

    def as_linear(self, x: Tensor) -> Tensor:
        """``x @ w.T``, the head of a model that ties it to its embedding: ``[..., rows]``."""
        prepacked = self._prepacked_now()
        return linear_op(x, self.weight, self.scales, self.biases, None, prepacked, self.group_size)

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
            ValueError: a group size or ``embedding_dim`` that the format does not allow, a method
                that does not exist, or an embedding with ``max_norm``, which rewrites rows as they
                are looked up.
        """
        check_kind("embedding", embedding, nn.Embedding, "an nn.Embedding")
        if embedding.max_norm is not None:
            raise ValueError(f"embedding must have no max_norm, got {embedding.max_norm}")
        packed = quantize_weight(
            embedding.weight, method, group_size, symmetric=symmetric, importance=importance
        )
        layer = cls.from_packed(*packed, embedding.padding_idx, group_size=group_size)
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
    ) -> "OneBitEmbedding":
        """A layer that holds tensors of the format, as they are; see ``OneBitLinear.from_packed``.

        Raises:
            ValueError: a tensor that the format does not allow; the message names it.
            TypeError: something else than a tensor.
        """
        check_packed(weight, scales, biases, group_size)
        rows, words = weight.shape
        options = {"group_size": group_size, "symmetric": biases is None, "device": "meta"}
        layer = cls(rows, words * WORD_BITS, padding_idx, **options)
        layer._take(weight, scales, biases)
        return layer

    def to_embedding(self) -> nn.Embedding:
        """An ``nn.Embedding`` of the dequantized weights."""
        weight = self.dequantize().detach()
        embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=self.padding_idx)
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, "
            f"group_size={self.group_size}, symmetric={self.symmetric}"
        )
