"""What runs the same product: our kernels and everything on this machine that competes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_onebit import ops

# Calls that would take longer than this are left out (MLX and the scalar table at large m).
MAX_SECONDS = 1.0


@dataclass
class Weights:
    """A random 1-bit matrix ``[n, k]`` with float16 scales and biases."""

    packed: Tensor
    scales: Tensor
    biases: Tensor
    group_size: int

    @classmethod
    def random(cls, n: int, k: int, group_size: int) -> "Weights":
        """Of normally distributed values: levels on both sides of 0, as models have them."""
        packed, scales, biases = ops.quantize(torch.randn(n, k).mul_(0.02).half(), group_size)
        return cls(packed, scales, biases, group_size)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.packed, self.scales, self.biases, self.group_size

    def dense(self) -> Tensor:
        """The exact values, float32."""
        return ops.dequantize(
            self.packed, self.scales.float(), self.biases.float(), self.group_size
        )

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scales, self.biases))


def ours(x: Tensor, w: Weights, isa: str | None = None) -> Callable[[], Tensor]:
    """Our kernel, with the table ``isa`` if one is named, then the table it was before."""
    if isa is None:
        return lambda: ops.qmm(x, *w.tensors())
    before = torch.ops.onebit.cpu_isa()

    def call() -> Tensor:
        torch.ops.onebit.set_cpu_isa(isa)
        y = ops.qmm(x, *w.tensors())
        torch.ops.onebit.set_cpu_isa(before)
        return y

    return call


def prepacked(x: Tensor, w: Weights) -> Callable[[], Tensor]:
    """Our product with prepacked weights."""
    packed, scales, biases, group_size = w.tensors()
    copy = ops.prepack(packed, scales, biases, group_size)
    form = (len(packed), packed.shape[1] * 32, group_size, scales.dtype, biases is None)
    return lambda: ops.qmm_prepacked(x, copy, *form)


def peers(x: Tensor, w: Weights) -> dict[str, Callable[[], Tensor]]:
    """``x @ w.T`` by our tables and by every competitor that is installed."""
    m, k = x.shape
    macs = m * k * w.packed.shape[0]
    bf16 = x.bfloat16()
    calls = {"onebit f32": ours(x, w), "onebit bf16": ours(bf16, w)}
    if torch.ops.onebit.can_prepack():
        calls["onebit f32 prepacked"] = prepacked(x, w)
        calls["onebit bf16 prepacked"] = prepacked(bf16, w)
    for isa in torch.ops.onebit.cpu_isas():
        if isa == torch.ops.onebit.cpu_isa() or (isa == "scalar" and macs / 2e8 > MAX_SECONDS):
            continue
        calls[f"onebit f32 {isa}"] = ours(x, w, isa)
        if isa != "scalar":
            calls[f"onebit bf16 {isa}"] = ours(bf16, w, isa)
    dense = w.dense()
    dense16 = dense.bfloat16()
    calls["F.linear f32"] = lambda: F.linear(x, dense)
    calls["F.linear bf16"] = lambda: F.linear(bf16, dense16)
    calls["torch dynamic int8"] = _dynamic_int8(x, dense)
    if w.group_size >= 32 and k % 256 == 0:
        calls["torch int4 weight-only"] = _int4(bf16, dense, w.group_size)
    if macs / 1e9 < MAX_SECONDS and (call := _mlx(x, w)):
        calls["mlx f32"] = call
    return calls


def _dynamic_int8(x: Tensor, dense: Tensor) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(dense, requires_grad=False)
        model = torch.ao.quantization.quantize_dynamic(
            torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8
        )
    return lambda: model(x)


def _int4(x: Tensor, dense: Tensor, group_size: int) -> Callable[[], Tensor]:
    """Each group's two values as two of torch's sixteen levels."""
    n, k = dense.shape
    groups = dense.view(n, k // group_size, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    levels = ((groups - low[..., None]) / scale[..., None]).round().int().view(n, k)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 2)
    zeros = low + 8 * scale
    scale_and_zero = torch.stack([scale, zeros], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scale_and_zero)


def _mlx(x: Tensor, w: Weights) -> Callable[[], Tensor] | None:
    try:
        import mlx.core as mx
    except ImportError:
        return None
    mx.set_default_device(mx.Device(mx.cpu))
    packed = mx.array(w.packed.view(torch.uint32).numpy())
    scales, biases = (mx.array(t.float().numpy()) for t in (w.scales, w.biases))
    values = mx.array(x.numpy())

    def call() -> Tensor:
        y = mx.quantized_matmul(
            values, packed, scales, biases, transpose=True, group_size=w.group_size, bits=1
        )
        mx.eval(y)
        return torch.from_dlpack(y)

    return call


def error(y: Tensor, x: Tensor, dense: Tensor) -> float:
    """Relative error against float64, over at most 4 rows."""
    want = x[:4].double() @ dense.double().T
    return float((y[:4].double() - want).norm() / want.norm())
