"""Layers that train latent float weights and compute with 1-bit ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_onebit.checks import NotScriptable, check_group_size, check_kind
from torch_onebit.nn import OneBitEmbedding, OneBitLinear, OneBitModule
from torch_onebit.ops import (
    RULES,
    fake_quantize,
    fake_quantize_affine,
    quantize_affine,
    quantize_levels,
)
from torch_onebit.qat.function import latent_linear

QAT_RULES = (*RULES, "learnable")


class LatentModule(NotScriptable, nn.Module):
    """What QATLinear and QATEmbedding have in common: latent weights and a rule for their levels.

    The latent ``weight`` is the parameter of the float layer itself: optimizers, tied weights and
    state dicts made before go on working. Rule "learnable" adds parameters ``scales`` and
    ``biases`` ``[rows, columns // group_size]`` that start at the levels of rule "mean".
    """

    weight: nn.Parameter
    scales: nn.Parameter | None
    biases: nn.Parameter | None

    def _set_rule(self, rule: str, group_size: int, symmetric: bool, source: nn.Module) -> None:
        check_rule(rule, group_size, symmetric)
        columns = self.weight.shape[1]
        if columns % group_size:
            raise ValueError(
                f"columns must be a multiple of group_size {group_size}, got {columns}"
            )
        self.rule = rule
        self.group_size = group_size
        self.symmetric = symmetric
        self.register_parameter("scales", None)
        self.register_parameter("biases", None)
        if rule == "learnable":
            scales, biases = first_levels(self.weight.detach(), group_size, source)
            self.scales = nn.Parameter(scales)
            self.biases = nn.Parameter(biases)

    @torch.no_grad()
    def quantize(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(packed, scales, biases) of the weights the layer computes with."""
        if self.rule == "learnable":
            packed = quantize_affine(self.weight, self.scales, self.biases, self.group_size)
            return packed, self.scales.clone(), self.biases.clone()
        packed, scales, biases = quantize_levels(self.weight, self.rule, self.group_size)
        return packed, scales, None if self.symmetric else biases

    def _extra(self) -> str:
        symmetric = ", symmetric=True" if self.symmetric else ""
        return f"rule={self.rule}, group_size={self.group_size}{symmetric}"


class QATLinear(LatentModule):
    """``nn.Linear`` whose weights are 1-bit in forward and float for the optimizer.

    Gradients go straight through for the bit and exactly through the levels. Backward rebuilds the
    1-bit weights from the latent ones, so they take no memory between the two.

    Args:
        linear: its ``weight`` and ``bias`` parameters are taken over, not copied. An
            ``OneBitLinear`` starts from its weights as they are: latent weights at their levels,
            and with rule "learnable" its scales and biases.
        rule: "mean", "sign", "optimal", "minmax" or "learnable" (free scales and biases).
        group_size: 32, 64 or 128.
        symmetric: convert to the form without biases; rule "sign" only.
    Shape:
        x ``[..., k]`` to y ``[..., n]``, dtypes as in ``nn.Linear``, autocast included.
    Raises:
        ValueError: a rule, group size or shape that is not allowed.
    """

    def __init__(
        self,
        linear: nn.Linear | OneBitLinear,
        *,
        rule: str = "mean",
        group_size: int = 128,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        kinds = (nn.Linear, OneBitLinear)
        check_kind("linear", linear, kinds, "an nn.Linear or OneBitLinear")
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = latent_weight(linear)
        self.register_parameter("bias", linear.bias)
        self._set_rule(rule, group_size, symmetric, linear)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return latent_linear(
            x, self.weight, self.bias, self.rule, self.group_size, self.scales, self.biases
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
        rule, group_size, symmetric: as in ``QATLinear``.
    Raises:
        ValueError: a rule, group size, shape or max_norm that is not allowed.
    """

    def __init__(
        self,
        embedding: nn.Embedding | OneBitEmbedding,
        *,
        rule: str = "mean",
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
        self.weight = latent_weight(embedding)
        self._set_rule(rule, group_size, symmetric, embedding)
        self.train(embedding.training)

    def forward(self, indices: Tensor) -> Tensor:
        rows = F.embedding(indices, self.weight, self.padding_idx)
        if self.scales is None:
            return fake_quantize(rows, self.rule, self.group_size)
        scales, biases = (
            F.embedding(indices, t, self.padding_idx) for t in (self.scales, self.biases)
        )
        return fake_quantize_affine(rows, scales, biases, self.group_size)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._extra()}"


def latent_weight(source: nn.Module) -> nn.Parameter:
    """The float weights of a layer; those of a packed layer are its dequantized ones."""
    if not isinstance(source, OneBitModule):
        return source.weight
    return nn.Parameter(source.dequantize().detach())


def first_levels(weight: Tensor, group_size: int, source: nn.Module) -> tuple[Tensor, Tensor]:
    """(scales, biases) that learnable levels start from."""
    if isinstance(source, OneBitModule) and source.group_size == group_size:
        scales = source.scales.detach().clone()
        biases = scales * -0.5 if source.biases is None else source.biases.detach().clone()
        return scales, biases
    return quantize_levels(weight, "mean", group_size)[1:]


class FakeQuantize(nn.Module):
    """A parametrization: the 1-bit form of a weight that is itself computed from others."""

    def __init__(self, rule: str, group_size: int) -> None:
        super().__init__()
        self.rule = rule
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.rule, self.group_size)

    def extra_repr(self) -> str:
        return f"rule={self.rule}, group_size={self.group_size}"


def check_rule(rule: str, group_size: int, symmetric: bool) -> None:
    """Raise ValueError for what no layer allows."""
    if rule not in QAT_RULES:
        raise ValueError(f"rule must be one of {', '.join(QAT_RULES)}, got {rule}")
    check_group_size(group_size)
    if symmetric and rule != "sign":
        raise ValueError(f"rule must be sign for symmetric weights, got {rule}")
