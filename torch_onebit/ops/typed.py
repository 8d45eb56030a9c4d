"""What is wrong with a type, in the words of the other refusals instead of the dispatcher's."""

import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P, R = ParamSpec("P"), TypeVar("R")

_DISPATCHER = re.compile(
    r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(\w+)'"
)
_KINDS = {"int": "an int", "bool": "a bool", "str": "a str", "Tensor": "a tensor"}


def typed(op: Callable[P, R]) -> Callable[P, R]:
    """The operator, raising a TypeError for an argument of a type that it cannot have."""

    @wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return op(*args, **kwargs)
        except RuntimeError as error:
            # After the fact: a check of each argument would cost every call that is right.
            found = _DISPATCHER.search(str(error))
            if not found:
                raise
            kind, name, got = found.groups()
        optional = re.fullmatch(r"Optional\[(.*)\]", kind)
        if optional:
            kind = optional[1]
        if kind == got:  # an int of more than 64 bits
            raise OverflowError(f"{name} must be an int of 64 bits, got a larger one")
        rule = "a torch.dtype" if name == "dtype" else _KINDS[kind]
        rule += " or None" if optional else ""
        raise TypeError(f"{name} must be {rule}, got {'None' if got == 'NoneType' else got}")

    return call
