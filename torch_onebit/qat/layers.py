"""Layers that train latent float weights and compute with 1-bit ones."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit.checks import NotScriptable, check_group_size, check_kind
from torch_onebit.float_layers import is_conv1d
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule
from torch_onebit.nn.fast_path import decline_fast_path
from torch_onebit.ops import (
    RULES,
    quantize_affine,
    quantize_levels,
)
from torch_onebit.padding import fill
from torch_onebit.qat.function import binary_weights, latent_linear

QAT_METHODS = (*RULES, "learnable")
QAT_SYMMETRIC_METHODS = ("sign", "learnable")


class LatentModule(NotScriptable, nn.Module):
    """What QATLinear and QATEmbedding have in common: latent weights and a method for their levels.

    The latent ``weight`` is the parameter of the float layer itself: optimizers, tied weights and
    state dicts made before go on working. Method "learnable" adds parameters ``scales`` and
    ``biases`` ``[rows, groups]`` that start at the levels of method "mean", or without biases at
    those of "sign" when symmetric.
    """

    weight: nn.Parameter
    scales: nn.Parameter | None
    biases: nn.Parameter | None
    transposed = False  # weight is [columns, rows]
    _loading = False
    is_onebit = True  # for reports: its parameters are not left float

    def __init__(self) -> None:
        super().__init__()
        decline_fast_path(self)

    def _set_method(self, method: str, group_size: int, symmetric: bool, source: nn.Module) -> None:
        check_qat_method(method, group_size, symmetric)
        self.method = method
        self.group_size = group_size
        self.symmetric = symmetric
        self.register_parameter("scales", None)
        self.register_parameter("biases", None)
        if method == "learnable":
            w = fill(self.matrix.detach(), group_size)
            scales, biases = first_levels(w, group_size, symmetric, source)
            self.scales = nn.Parameter(scales)
            if biases is not None:
                self.biases = nn.Parameter(biases)

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_parameters", {}).get(name) if name == "weight" else None
        # FSDP sets DTensors and Parameters by turns; load_state_dict brings levels too.
        plain = type(old) is nn.Parameter and type(value) is nn.Parameter
        if plain and value is not old and not self._loading:
            self._follow(old, value)
        super().__setattr__(name, value)

    @torch.no_grad()
    def _follow(self, old: Tensor, new: Tensor) -> None:
        """Make trained levels those of a weight whose rows are multiples of the ones before, such
        as ``torch.nn.utils.fuse_linear_bn_eval`` sets."""
        if self.transposed:  # it would scale the wrong side, and may go unnoticed in a square
            raise ValueError("weight must stay the Parameter it is in a Conv1D, got another")
        if self.scales is None:  # levels are made of the weight
            return
        factors = row_factors(old, new)
        if factors is None:
            raise ValueError(
                "weight must have rows that are multiples of those before, whose levels are "
                "trained, got another Parameter: change it in place, or prepare the float layer"
            )
        for levels in (self.scales, self.biases):
            if levels is not None:
                levels.mul_(factors)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._loading = True
        try:
            super()._load_from_state_dict(*args)
        finally:
            del self._loading

    @property
    def matrix(self) -> Tensor:
        """The latent weights ``[rows, columns]``."""
        return self.weight.t() if self.transposed else self.weight

    def levels(self) -> tuple[Tensor | None, Tensor | None]:
        """(scales, biases) of method "learnable"; None for the others."""
        if self.scales is None or self.biases is not None:
            return self.scales, self.biases
        return self.scales, self.scales * -0.5

    @torch.no_grad()
    def quantize(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(packed, scales, biases) of the weights the layer computes with."""
        w = fill(self.matrix, self.group_size)
        if self.method == "learnable":
            packed = quantize_affine(w, *self.levels(), self.group_size)
            return packed, self.scales.clone(), None if self.symmetric else self.biases.clone()
        packed, scales, biases = quantize_levels(w, self.method, self.group_size)
        return packed, scales, None if self.symmetric else biases

    def _extra(self) -> str:
        symmetric = ", symmetric=True" if self.symmetric else ""
        return f"method={self.method}, group_size={self.group_size}{symmetric}"


class QATLinear(LatentModule):
    """``nn.Linear`` whose weights are 1-bit in forward and float for the optimizer.

    Gradients go straight through for the bit and exactly through the levels. Backward rebuilds the
    1-bit weights from the latent ones, so they take no memory between the two.

    Args:
        linear: its ``weight`` and ``bias`` parameters are taken over, not copied, also those of
            GPT-2's ``Conv1D``. An ``OneBitLinear`` starts from its weights as they are: latent
            weights at their levels, and with method "learnable" its scales and biases.
        method: "mean", "sign", "optimal", "minmax" or "learnable" (free scales and biases).
        group_size: 32, 64 or 128.
        symmetric: weights of ``±scale / 2``, converted to the form without biases; methods "sign"
            and "learnable".
    Shape:
        x ``[..., k]`` to y ``[..., n]``, dtypes as in ``nn.Linear``, autocast included.
    Raises:
        ValueError: a method or group size that is not allowed.
        TypeError: another kind of layer.
    """

    def __init__(
        self,
        linear: nn.Linear | OneBitLinear,
        *,
        method: str = "mean",
        group_size: int = 128,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = is_conv1d(linear)
        if not self.transposed:
            kinds = (nn.Linear, OneBitLinear)
            check_kind("linear", linear, kinds, "an nn.Linear or OneBitLinear")
        self.weight = latent_weight(linear)
        self.out_features, self.in_features = self.matrix.shape
        self.register_parameter("bias", linear.bias)
        self._set_method(method, group_size, symmetric, linear)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return latent_linear(
            x, self.matrix, self.bias, self.method, self.group_size, *self.levels()
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._extra()}"
        )


class QATEmbedding(LatentModule):
    """``nn.Embedding`` whose rows are 1-bit in forward and float for the optimizer.

    Only the rows looked up are quantized: a group never crosses rows.

    Args:
        embedding: its ``weight`` parameter is taken over, not copied; without ``max_norm``. An
            ``OneBitEmbedding`` as in ``QATLinear``.
        method, group_size, symmetric: as in ``QATLinear``.
    Raises:
        ValueError: a method, group size or max_norm that is not allowed.
        TypeError: another kind of layer.
    """

    max_norm, norm_type = None, 2.0  # of nn.Embedding, for code that looks at them

    def __init__(
        self,
        embedding: nn.Embedding | OneBitEmbedding,
        *,
        method: str = "mean",
        group_size: int = 128,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        kinds = (nn.Embedding, OneBitEmbedding)
        check_kind("embedding", embedding, kinds, "an nn.Embedding or OneBitEmbedding")
        if getattr(embedding, "max_norm", None) is not None:
            raise ValueError(f"embedding must have no max_norm, got {embedding.max_norm}")
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.scale_grad_by_freq = embedding.scale_grad_by_freq
        self.sparse = embedding.sparse
        self.weight = latent_weight(embedding)
        self._set_method(method, group_size, symmetric, embedding)
        self.train(embedding.training)

    def forward(self, indices: Tensor) -> Tensor:
        rows, scales, biases = (
            None if t is None else self._look_up(indices, t)
            for t in (self.weight, self.scales, self.biases)
        )
        if scales is not None and biases is None:
            biases = scales * -0.5
        return binary_weights(rows, scales, biases, self.method, self.group_size)

    def _look_up(self, indices: Tensor, rows: Tensor) -> Tensor:
        options = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
        return F.embedding(indices, rows, self.padding_idx, **options)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._extra()}"


def row_factors(old: Tensor, new: Tensor) -> Tensor | None:
    """``[rows, 1]`` by which rows of new are multiples of those of old, or None."""
    if old.shape != new.shape:
        return None
    a, b = old.double(), new.double()
    squares = a.square().sum(1, keepdim=True)
    factors = torch.where(squares > 0, (a * b).sum(1, keepdim=True) / squares, 1.0)
    off = (b - factors * a).norm(dim=1) > 2 * torch.finfo(new.dtype).eps * b.norm(dim=1)
    return None if off.any() else factors.to(old.dtype)


def latent_weight(source: nn.Module) -> nn.Parameter:
    """The float weights of a layer; those of a packed layer are its dequantized ones."""
    if not isinstance(source, OneBitModule):
        return source.weight
    dtype = getattr(source, "output_dtype", None) or source.level_options["dtype"]
    return nn.Parameter(source.dequantize().detach().to(dtype))


def first_levels(
    w: Tensor, group_size: int, symmetric: bool, source: nn.Module
) -> tuple[Tensor, Tensor | None]:
    """(scales, biases) that learnable levels of w ``[rows, whole groups]`` start from."""
    packed = isinstance(source, OneBitModule) and source.group_size == group_size
    if packed and (source.symmetric or not symmetric):
        levels = source.canonical()
        scales = levels.scales.detach().clone()
        if symmetric:
            return scales, None
        return scales, scales * -0.5 if levels.biases is None else levels.biases.detach().clone()
    _, scales, biases = quantize_levels(w, "sign" if symmetric else "mean", group_size)
    return scales, None if symmetric else biases


class FakeQuantize(nn.Module):
    """A parametrization: the 1-bit form of a weight that is itself computed from others."""

    is_onebit = True

    def __init__(self, method: str, group_size: int) -> None:
        super().__init__()
        self.method = method
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:
        return binary_weights(weight, None, None, self.method, self.group_size)

    def extra_repr(self) -> str:
        return f"method={self.method}, group_size={self.group_size}"


def check_qat_method(method: str, group_size: int, symmetric: bool) -> None:
    """Raise ValueError for what no layer allows."""
    check_group_size(group_size)
    methods = QAT_SYMMETRIC_METHODS if symmetric else QAT_METHODS
    if method not in methods:
        form = " for symmetric weights" if symmetric else ""
        raise ValueError(f"method must be one of {', '.join(methods)}{form}, got {method}")
