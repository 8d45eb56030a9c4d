"""GGUF files of language models: names and sizes as their models have them, Q1_0 kept packed."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_onebit.checkpoint import architectures, blocks
from torch_onebit.checkpoint.gguf import BLOCKS, Q1_0, TERNARY, GGUFFile, GGUFTensor, write_gguf
from torch_onebit.checkpoint.source import CheckpointError, Layer, Packed

MOSTLY_Q1_0 = 40  # general.file_type


class GGUFCheckpoint:
    """An open file; a ``Source``.

    Raises:
        CheckpointError: a file that is damaged, of another architecture, or with tensors of a type
            that is not read here; the message names the tensor and its type.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = GGUFFile(path)
        self._tensors: dict[str, GGUFTensor] = {}
        architectures.check_architecture(self.file.metadata.get("general.architecture"))
        for tensor in self.file.tensors.values():
            check_type(tensor)
            name = architectures.model_name(tensor.name)
            if name is None:
                raise CheckpointError(f"{tensor.name} must be a tensor of the model, got another")
            if tensor.kind == Q1_0 and (len(tensor.shape) != 2 or not name.endswith(".weight")):
                raise CheckpointError(f"{tensor} must be a matrix, got shape {list(tensor.shape)}")
            self._tensors[name] = tensor
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{path} must have a matrix token_embd.weight, got none")
        self.config = architectures.config_from(
            self.file.metadata,
            vocab=embedding.shape[0],
            tied="lm_head.weight" not in self._tensors,
            biased="model.layers.0.self_attn.q_proj.bias" in self._tensors,
        )
        self._check_sizes()
        packed = [name for name, t in self._tensors.items() if t.kind == Q1_0]
        self.paths = [name.removesuffix(".weight") for name in packed]
        self.names = [name for name, t in self._tensors.items() if t.kind != Q1_0]

    def _check_sizes(self) -> None:
        """What the config says of the model must be what the tensors are: it will be built."""
        c, middle = self.config, "model.layers.{}.mlp.down_proj.weight"
        width, wanted = self.shape("model.embed_tokens.weight")[1], []
        wanted.append(("embedding_length", c["hidden_size"], width))
        for layer in range(c["num_hidden_layers"]):
            shape = (
                self._tensors[name].shape if (name := middle.format(layer)) in self._tensors else ()
            )
            wanted.append((f"ffn_down of block {layer}", (width, c["intermediate_size"]), shape))
        for what, described, there in wanted:
            if described != there:
                raise CheckpointError(f"{what} must be as described, {described}, got {there}")
        for name, tensor in self._tensors.items():
            heads = architectures.heads_of(name, self.config)
            if heads and (not tensor.shape or tensor.shape[0] % (2 * heads)):
                raise CheckpointError(f"{tensor} must have rows for {heads} heads of even size")

    def layer(self, path: str, columns: int | None = None) -> Layer:
        rows, stored = self._tensors[f"{path}.weight"].shape
        return Layer(1, blocks.GROUP, "affine", rows, stored)

    def packed(self, path: str) -> Packed:
        name = f"{path}.weight"
        tensor = self._tensors[name]
        rows, columns = tensor.shape
        layer = blocks.unpack_q1_0(tensor.name, self.file.bytes_of(tensor), rows, columns)
        self.file.release(tensor)
        heads = architectures.heads_of(name, self.config)
        return _by_rows(layer, lambda t: architectures.separate(t, heads)) if heads else layer

    def dequantized(self, path: str, layer: Layer) -> Tensor:
        raise CheckpointError(f"{path} must be of 1 bit, got {layer}")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        dense = blocks.decode(tensor.kind, self.file.bytes_of(tensor), tensor.shape)
        heads = architectures.heads_of(name, self.config)
        return architectures.separate(dense, heads) if heads else dense


def check_type(tensor: GGUFTensor) -> None:
    """Raise unless a tensor's type is read here."""
    if tensor.kind in BLOCKS:
        return
    kind = str(tensor)
    ternary = any(f"({name})" in kind for name in TERNARY) or tensor.kind > 42
    hint = ": ternary weights take more than 1 bit" if ternary else ""
    raise CheckpointError(f"tensors must be Q1_0, Q8_0, F16, BF16 or F32, got {kind}{hint}")


def save_gguf(
    path: str | Path,
    config: dict[str, Any],
    layers: Iterable[tuple[str, Packed]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: dict[str, Any],
) -> None:
    """Write a file of Q1_0 layers and dense tensors in the place of the one at path, at once.

    Raises:
        CheckpointError: an architecture, a name or levels that GGUF does not have.
    """
    described = {
        **architectures.metadata_from(config),
        "general.file_type": MOSTLY_Q1_0,
        "general.quantization_version": 2,
        **(metadata or architectures.no_tokenizer(config)),
    }
    config = {**config, "num_key_value_heads": _key_value_heads(config)}

    def entries() -> Iterator[tuple[GGUFTensor, Callable[[], Tensor]]]:
        for layer_path, layer in layers:
            name = f"{layer_path}.weight"
            shape = (layer.weight.shape[0], layer.weight.shape[1] * 32)
            yield _entry(name, Q1_0, shape, _packer(name, layer, config))
        for name, dense in tensors:
            # llama.cpp multiplies by vectors in float32 only
            dense = dense.float() if dense.dim() < 2 else dense
            if dense.dtype not in blocks.KINDS:
                raise CheckpointError(
                    f"{name} must be float32, float16 or bfloat16, got {dense.dtype}"
                )
            heads = architectures.heads_of(name, config)
            ordered = architectures.interleave(dense, heads) if heads else dense
            make = functools.partial(blocks.encode, ordered)
            yield _entry(name, blocks.KINDS[dense.dtype], tuple(dense.shape), make)

    write_gguf(path, described, entries())


def _packer(name: str, layer: Packed, config: dict[str, Any]) -> Callable[[], Tensor]:
    heads = architectures.heads_of(name, config)
    if heads:
        layer = _by_rows(layer, lambda t: architectures.interleave(t, heads))
    return functools.partial(blocks.pack_q1_0, name, layer)


def _entry(
    name: str, kind: int, shape: tuple[int, ...], make: Callable[[], Tensor]
) -> tuple[GGUFTensor, Callable[[], Tensor]]:
    weights, size = BLOCKS[kind]
    count = 1
    for length in shape:
        count *= length
    theirs = architectures.gguf_name(name)
    return GGUFTensor(theirs, kind, shape, 0, count // weights * size), make


def _by_rows(layer: Packed, order: Callable[[Tensor], Tensor]) -> Packed:
    biases = None if layer.biases is None else order(layer.biases)
    return Packed(order(layer.weight), order(layer.scales), biases, layer.group_size)


def _key_value_heads(config: dict[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]
