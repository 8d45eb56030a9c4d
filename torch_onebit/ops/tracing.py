"""What compilers see of operators that C++ has composites of."""

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

TRACED = ("qmm", "gather_qmm", "affine_grad", "dequantize", "embedding")


def fuse_where_there_are_no_kernels(
    mode: ProxyTorchDispatchMode, op: OpOverload, types: Any, args: Any, kwargs: Any
) -> Any:
    """How an operator enters a graph: as one call, and on a device without kernels as what it is
    made of, which the compiler fuses."""
    key = torch._C._parse_dispatch_key(torch._C._dispatch_key_for_device(args[0].device.type))
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        return op.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)


def register() -> None:
    for name in TRACED:
        torch.library.register_torch_dispatch(
            f"onebit::{name}", ProxyTorchDispatchMode, fuse_where_there_are_no_kernels
        )
