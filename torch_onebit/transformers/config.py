"""OneBitConfig: what config.json says of a 1-bit model."""

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from torch_onebit.checks import check_group_size
from torch_onebit.loading import check_other_bits
from torch_onebit.methods import check_method


class OneBitConfig(QuantizationConfigMixin):
    """How a model of transformers is, or is to be, quantized to 1 bit.

    Args:
        group_size: weights that share a scale: 32, 64 or 128.
        method, symmetric: as in ``quantize_``.
        modules_to_not_convert: layers to leave, by name, beginning, end or pattern; None leaves the
            heads and what is tied to them, as ``quantize_`` does; an empty list leaves none.
        other_bits: layers of other than 1 bit in an MLX folder: "error" names them, "dequantize"
            makes them dense; give it to ``from_pretrained``.
        bits, mode: 1 and "affine", as MLX has them.
        layers: what a checkpoint says of single layers; it is read from the tensors themselves.
    Raises:
        ValueError: a group size, method, number of bits or mode that is not allowed.
    """

    def __init__(
        self,
        group_size: int = 128,
        method: str = "optimal",
        symmetric: bool = False,
        modules_to_not_convert: list[str] | None = None,
        other_bits: str = "error",
        bits: int = 1,
        mode: str = "affine",
        **layers: Any,
    ) -> None:
        check_group_size(group_size)
        check_method(method, symmetric, data=False)
        check_other_bits(other_bits)
        if bits != 1 or mode != "affine":
            raise ValueError(f"bits must be 1 and mode affine, got {bits!r} and {mode!r}")
        self.quant_method = "onebit"
        self.group_size = group_size
        self.method = method
        self.symmetric = symmetric
        self.modules_to_not_convert = modules_to_not_convert
        self.other_bits = other_bits
        self.bits = bits
        self.mode = mode

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes from here where the folder has a config of its own."""
        return {"other_bits": self.other_bits}


def of_mlx(described: Any) -> Any:
    """The quantization block of config.json; one that MLX wrote is made ours, others stay."""
    if (
        isinstance(described, dict)
        and "quant_method" not in described
        and described.get("bits") == 1
        and "group_size" in described
        and (described.get("mode") or "affine") == "affine"
    ):
        return {**described, "mode": "affine", "quant_method": "onebit"}
    return described
