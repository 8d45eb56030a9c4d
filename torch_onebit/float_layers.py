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


def is_experts(layer: nn.Module) -> bool:
    """Whether layer is the experts of a mixture behind transformers' interface for them, which says
    in what form their matrices are."""
    down = layer._parameters.get("down_proj")
    return down is not None and down.dim() == 3 and hasattr(layer, "is_transposed")


def matrix(layer: nn.Module) -> Tensor:
    """The weight as ``[n, k]``: a view of the parameter where it is stored the other way."""
    return layer.weight.t() if is_conv1d(layer) else layer.weight


def projection_shapes(experts: nn.Module) -> dict[str, tuple[int, ...]]:
    """The matrices ``[count, n, k]`` of experts, float or 1-bit, by MLX's names."""
    down = experts.down_proj
    if isinstance(down, nn.Module):
        count, k, n = down.count, down.out_features, down.in_features
    else:
        count, k, n = down.shape
    return {"gate_proj": (count, n, k), "up_proj": (count, n, k), "down_proj": (count, k, n)}


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """(n, k) of a linear layer or rows and columns of an embedding, float or 1-bit; of experts
    (count, 3 n, k): gate, up and down."""
    if hasattr(layer, "down_proj"):
        count, n, k = projection_shapes(layer)["up_proj"]
        return count, 3 * n, k
    for rows, columns in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if hasattr(layer, rows):
            shape = getattr(layer, rows), getattr(layer, columns)
            return (layer.count, *shape) if hasattr(layer, "count") else shape
    n, k = matrix(layer).shape
    return n, k


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot become 1-bit, or None."""
    if is_experts(layer):
        return experts_obstacle(layer) or _call_obstacle(layer)
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
    return _call_obstacle(layer)


def experts_obstacle(experts: nn.Module) -> str | None:
    """Why the weights of experts cannot become 1-bit, or None."""
    forms = {
        "its experts have biases": experts.has_bias,
        "its experts have no gate": not experts.has_gate,
        "its matrices are stored transposed": experts.is_transposed,
        "rows of gate and up alternate": not experts.is_concatenated,
        "its experts have norms": getattr(experts, "has_post_expert_norm", False),
        "its experts are spread over devices": getattr(experts, "_is_expert_parallel", False),
    }
    for reason, given in forms.items():
        if given:
            return reason
    names = sorted(name for name, _ in experts.named_parameters())
    if names != ["down_proj", "gate_up_proj"]:
        return f"its parameters are {', '.join(names)}"
    count, k, n = experts.down_proj.shape
    if experts.gate_up_proj.shape != (count, 2 * n, k):
        return f"gate_up_proj has shape {list(experts.gate_up_proj.shape)}"
    if experts.down_proj.dtype not in LEVEL_DTYPES:
        return f"weights are {experts.down_proj.dtype}"
    return None


def _call_obstacle(layer: nn.Module) -> str | None:
    if "forward" in vars(layer):
        return "its forward was replaced: the one that takes its place would not be called"
    if layer._forward_hooks and layer._forward_pre_hooks:
        return "it has hooks both before and after forward: remove one kind first"
    return None
