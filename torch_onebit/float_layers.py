"""The float layers that can become 1-bit, seen as matrices ``[n, k]``, and what stands in the way.

Only the classes themselves: the owner of a subclass may look into its weight.
"""

from torch import Tensor, nn

from torch_onebit.checks import LEVEL_DTYPES


def is_conv1d(layer: nn.Module) -> bool:
    """Whether layer is GPT-2's linear layer, which holds its weight as ``[k, n]``."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or is_conv1d(layer)


def is_embedding(layer: nn.Module) -> bool:
    return type(layer) is nn.Embedding


def matrix(layer: nn.Module) -> Tensor:
    """The weight as ``[n, k]``: a view of the parameter where it is stored the other way."""
    return layer.weight.t() if is_conv1d(layer) else layer.weight


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(n, k) of a linear layer or rows and columns of an embedding, float or 1-bit."""
    for rows, columns in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if hasattr(layer, rows):
            return getattr(layer, rows), getattr(layer, columns)
    n, k = matrix(layer).shape
    return n, k


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot become 1-bit, or None."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return (
            "its weight is computed when it is called (weight_norm, spectral_norm or prune of "
            "torch.nn.utils): remove that first, or use torch.nn.utils.parametrizations"
        )
    if weight.dtype not in LEVEL_DTYPES:
        return f"weights are {weight.dtype}"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites rows as they are looked up"
    if "forward" in vars(layer):
        return "its forward was replaced: the one that takes its place would not be called"
    if layer._forward_hooks and layer._forward_pre_hooks:
        return "it has hooks both before and after forward: remove one kind first"
    return None
