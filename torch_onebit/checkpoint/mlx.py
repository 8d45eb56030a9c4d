"""MLX checkpoints: a folder of config.json and model*.safetensors, one or with an index.

A layer is quantized iff ``{path}.scales`` exists; ``{path}.weight`` are its words,
``{path}.biases`` its lower levels and ``{path}.bias`` what the layer adds. Sizes and offsets of the
safetensors files are checked by their own library.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_onebit.checkpoint.files import check_regular, file_in, read_json, replaced_folder
from torch_onebit.checkpoint.source import CheckpointError, Layer, Packed
from torch_onebit.packing import WORD_BITS, unpack_bits

INDEX = "model.safetensors.index.json"
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
MAX_SHARD_BYTES = 5 << 30  # as mlx-lm
ENTRIES = ("weight", "scales", "biases")
LEVELS = ("F16", "BF16", "F32", "F64")


class MLXCheckpoint:
    """An open folder; a ``Source``.

    Args:
        path: the folder.
    Raises:
        ImportError: the package safetensors is not installed.
        CheckpointError: a file that is missing, damaged, or contradicts another.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise CheckpointError(f"path must be a folder of an MLX checkpoint, got {path}")
        self.config = read_json(self.folder / "config.json")
        self.quantization = _quantization(self.config)
        self._files = dict(_open_shards(self.folder))  # of each tensor
        self.paths = [n.removesuffix(".scales") for n in self._files if n.endswith(".scales")]
        for path_ in self.paths:
            if f"{path_}.weight" not in self._files:
                raise CheckpointError(f"{self.folder}: {path_}.scales must have a {path_}.weight")
        packed = {f"{p}.{entry}" for p in self.paths for entry in ENTRIES}
        self.names = [name for name in self._files if name not in packed]

    def layer(self, path: str, columns: int | None = None) -> Layer:
        *lead, groups = self.shape(f"{path}.scales") or (0,)
        *same, words = self.shape(f"{path}.weight") or (0,)
        if len(lead) not in (1, 2) or lead != same or not groups:
            raise CheckpointError(
                f"{path}.scales must have shape [n, groups] beside words [n, k * bits / 32], or "
                f"both for a stack of matrices, got {[*lead, groups]} and {[*same, words]}"
            )
        layer = self._described(path, tuple(lead), groups, words, columns)
        if words * WORD_BITS != layer.columns * layer.bits:
            raise CheckpointError(
                f"{path}.weight must have {layer.columns * layer.bits / WORD_BITS:g} words in a "
                f"row, for {groups} groups of {layer.group_size} weights of {layer.bits} bits, "
                f"got {words}"
            )
        if self.dtype(f"{path}.weight") != "U32":
            raise CheckpointError(f"{path}.weight must be U32, got {self.dtype(f'{path}.weight')}")
        if layer.mode == "affine":
            self._check_levels(path)
        return layer

    def _described(
        self, path: str, shape: tuple[int, ...], groups: int, words: int, columns: int | None
    ) -> Layer:
        """What config.json says of this path, else, as in mlx-lm, what the shapes say, else what
        config.json says of all."""
        own = self.quantization.get(path)
        options = {key: self.quantization.get(key) for key in ("bits", "group_size", "mode")}
        options["mode"] = options["mode"] or "affine"
        if isinstance(own, dict):
            options = {**options, "mode": "affine", **own}
        elif columns and columns % groups == 0 and words * WORD_BITS % columns == 0:
            inferred = {"bits": words * WORD_BITS // columns, "group_size": columns // groups}
            if self.dtype(f"{path}.scales") in LEVELS:  # other modes have scales of a byte
                options = {**inferred, "mode": "affine"}
        for name, most in (("bits", 32), ("group_size", 1 << 20)):
            value = options[name]
            if type(value) is not int or not 1 <= value <= most:
                raise CheckpointError(f"{name} of {path} must be a positive integer, got {value!r}")
        if not isinstance(options["mode"], str):
            raise CheckpointError(f"mode of {path} must be a string, got {options['mode']!r}")
        group_size = options["group_size"]
        *lead, rows = shape
        columns = groups * group_size
        return Layer(options["bits"], group_size, options["mode"], rows, columns, tuple(lead))

    def _check_levels(self, path: str) -> None:
        scales, biases = f"{path}.scales", f"{path}.biases"
        if biases not in self._files:
            raise CheckpointError(f"{scales} must have {biases} beside it, got none")
        if self.dtype(scales) not in LEVELS:
            raise CheckpointError(f"{scales} must be one of {LEVELS}, got {self.dtype(scales)}")
        if self.dtype(scales) != self.dtype(biases):
            raise CheckpointError(
                f"{biases} must be {self.dtype(scales)}, got {self.dtype(biases)}"
            )
        if self.shape(scales) != self.shape(biases):
            raise CheckpointError(
                f"{biases} must have shape {list(self.shape(scales))}, "
                f"got {list(self.shape(biases))}"
            )

    def packed(self, path: str) -> Packed:
        words, scales, biases = (self.tensor(f"{path}.{entry}") for entry in ENTRIES)
        group_size = words.shape[-1] * WORD_BITS // scales.shape[-1]
        return Packed(words.view(torch.int32), scales, biases, group_size)

    def dequantized(self, path: str, layer: Layer) -> Tensor:
        if layer.mode != "affine" or layer.bits not in AFFINE_BITS:
            raise CheckpointError(f"{path} must be affine of {AFFINE_BITS} bits, got {layer}")
        return decode_affine([self.tensor(f"{path}.{entry}") for entry in ENTRIES], layer)

    def has(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._files[name].get_slice(name).get_dtype()

    def tensor(self, name: str) -> Tensor:
        tensor = self._files[name].get_tensor(name)
        # A header of any length, or an odd count of 16-bit values, may put it anywhere.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def decode_affine(stored: list[Tensor], layer: Layer) -> Tensor:
    """Words, scales and biases of any number of bits as the weights they stand for.

    Raises:
        CheckpointError: a layer of another mode, or of bits that MLX does not have.
    """
    if layer.mode != "affine" or layer.bits not in AFFINE_BITS:
        raise CheckpointError(f"layers must be affine of {AFFINE_BITS} bits, got {layer}")
    words, scales, biases = (t.flatten(0, -2) for t in stored)
    decoded = torch.empty(len(words), layer.columns, dtype=scales.dtype)
    powers = 2 ** torch.arange(layer.bits, dtype=torch.uint8)
    for start in range(0, len(words), 256):  # bits of some rows, a byte each
        some = slice(start, start + 256)
        bits = unpack_bits(words[some]).unflatten(-1, (layer.columns, layer.bits))
        codes = (bits * powers).sum(-1, dtype=torch.uint8).to(scales.dtype)
        grouped = codes.unflatten(-1, (-1, layer.group_size))
        values = grouped * scales[some, :, None] + biases[some, :, None]
        decoded[some] = values.flatten(-2)
    return decoded.view(layer.shape)


def save_mlx(
    path: str | Path,
    config: dict[str, Any],
    layers: Iterable[tuple[str, Packed]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint in the place of the one at path, at once; other files there are kept.

    Args:
        path: the folder, which need not exist.
        config: of the model; the description of the quantization is added.
        layers: 1-bit layers by path. Levels are stored as they are; ``biases`` None as
            ``-scales / 2``.
        tensors: the others by name.
        max_shard_bytes: a file is begun when the last would be larger.
    Raises:
        ImportError: the package safetensors is not installed.
        CheckpointError: no layers, or a name given twice.
    """
    library = _library()
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    group_sizes: dict[str, int] = {}
    placed: dict[str, int] = {}  # the shard of each tensor
    sizes = 0

    def entries() -> Iterator[tuple[str, Tensor]]:
        for layer_path, layer in layers:
            group_sizes[layer_path] = layer.group_size
            biases = layer.biases
            yield f"{layer_path}.weight", layer.weight.view(torch.uint32)
            yield f"{layer_path}.scales", layer.scales
            yield f"{layer_path}.biases", -layer.scales / 2 if biases is None else biases
        yield from tensors

    for name, tensor in entries():
        if name in placed:
            raise CheckpointError(f"{name} must be given once, got it twice")
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor.detach()
        placed[name] = len(shards)
        room -= size
        sizes += size
    if not group_sizes:
        raise CheckpointError("model must have 1-bit layers, got none")
    config = {**config, **description(group_sizes)}
    count = len(shards)
    files = [
        "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
        for i in range(count)
    ]
    with replaced_folder(Path(path), _of_checkpoint) as draft:
        for file, shard in zip(files, shards, strict=True):
            here = {name: t.cpu().contiguous() for name, t in shard.items()}
            library.torch.save_file(here, draft / file, metadata={"format": "mlx"})
        if count > 1:
            index = {
                "metadata": {"total_size": sizes},
                "weight_map": {name: files[shard - 1] for name, shard in sorted(placed.items())},
            }
            (draft / INDEX).write_text(json.dumps(index, indent=2))
        (draft / "config.json").write_text(json.dumps(config, indent=2))


def _of_checkpoint(name: str) -> bool:
    """Whether a file of a folder belongs to the checkpoint that is replaced."""
    model = name.startswith("model") and name.endswith(".safetensors")
    return model or name in (INDEX, "config.json")


def description(group_sizes: dict[str, int]) -> dict[str, Any]:
    """The quantization blocks of config.json: the commonest group size, and layers of another."""
    common = Counter(group_sizes.values()).most_common(1)[0][0]
    block: dict[str, Any] = {"group_size": common, "bits": 1, "mode": "affine"}
    for path, group_size in group_sizes.items():
        if group_size != common:
            block[path] = {"group_size": group_size, "bits": 1, "mode": "affine"}
    return {"quantization": block, "quantization_config": block}


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The block that describes the quantization, wherever MLX's tools put it."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization", "quantization_config"):
            block = holder.get(key)
            if isinstance(block, dict) and "bits" in block:
                return block
    raise CheckpointError(
        'config.json must have a "quantization" block with bits and group_size, got none: this is '
        "not a quantized MLX checkpoint"
    )


def _library() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "MLX checkpoints need the package safetensors: pip install torch_onebit[safetensors]"
        ) from error
    return safetensors


def _open_shards(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor's name and the open file that has it."""
    library = _library()
    wanted: dict[str, Any] | None = None
    if (folder / INDEX).exists():
        wanted = read_json(file_in(folder, INDEX)).get("weight_map")
        if not isinstance(wanted, dict) or not all(isinstance(f, str) for f in wanted.values()):
            raise CheckpointError(f"{folder / INDEX} must map names to files in weight_map")
        files = sorted(set(wanted.values()))
    else:
        files = sorted(p.name for p in folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} must have model*.safetensors, got none")
    seen: dict[str, str] = {}
    for file in files:
        path = file_in(folder, file)
        check_regular(path)
        try:
            shard = library.safe_open(path, "pt")
        except library.SafetensorError as error:
            raise CheckpointError(f"{path} must be a safetensors file, got {error}") from error
        for name in shard.keys():
            if name in seen:
                raise CheckpointError(f"{name} must be in one file, got {seen[name]} and {file}")
            seen[name] = file
            yield name, shard
    if wanted is not None and wanted != seen:
        name = min(wanted.items() ^ seen.items())[0]
        raise CheckpointError(
            f"{folder / INDEX} must agree with the files about {name}, "
            f"got {wanted.get(name)} and {seen.get(name)}"
        )
