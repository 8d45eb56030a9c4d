"""The heads of models of transformers: what stays float unless somebody asks.

One bit costs most per byte there (docs/which_method.md has figures), and transformers' own
quantizers leave them too. A model of another kind does not say which of its layers are heads.
"""

from torch import nn

HEAD = "a head: skip=[] makes it 1-bit too"
TIED = "tied to a head: skip=[] makes both 1-bit"


def heads(model: nn.Module) -> dict[int, str]:
    """Why layers stay, by their identity: those outside the base model, output embeddings, and
    whatever shares its weight with one of these."""
    found: dict[int, str] = {}
    for part in model.modules():
        if hasattr(type(part), "base_model_prefix"):
            found |= dict.fromkeys(map(id, _heads_of(part)), HEAD)
    weights = {id(m.weight) for m in model.modules() if id(m) in found and _has_weight(m)}
    tied = [m for m in model.modules() if _has_weight(m) and id(m.weight) in weights]
    # Before weights are loaded, ties are names.
    for names in getattr(model, "all_tied_weights_keys", {}).items():
        pair = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        tied += pair if any(id(module) in found for module in pair) else []
    return dict.fromkeys(map(id, tied), TIED) | found


def _heads_of(model: nn.Module) -> list[nn.Module]:
    base, output = model.base_model, model.get_output_embeddings()
    inside = {id(module) for module in base.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    return [module for module in [*outside, output] if module not in (None, model)]


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None
