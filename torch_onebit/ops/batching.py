"""What the rules for torch.vmap are made of. A rule gets arguments of which some carry an extra
dimension (``in_dims``), and returns the result with the extra dimension in front.
"""

from torch import Tensor

Dims = tuple[int | None, ...]


def front(t: Tensor | None, dim: int | None) -> Tensor | None:
    return t if t is None or dim is None else t.movedim(dim, 0)


def stack_all(size: int, tensors: list[Tensor | None], dims: list[int | None]) -> list:
    """All tensors with the extra dimension in front, expanded where they had none."""
    return [
        t if t is None else (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0))
        for t, dim in zip(tensors, dims, strict=True)
    ]


def pad(t: Tensor, batched: bool, rank: int) -> Tensor:
    """Leading dimensions of size 1, after the extra one, up to ``rank`` dimensions without it."""
    own = t.dim() - batched
    shape = [1] * (rank - own)
    return t.reshape(*t.shape[:batched], *shape, *t.shape[batched:])
