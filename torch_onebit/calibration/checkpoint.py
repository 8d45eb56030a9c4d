"""Finished layers on disk: a calibration that was cut short goes on from there."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_onebit.calibration.batches import Call
from torch_onebit.calibration.jobs import Job
from torch_onebit.calibration.layer import Result
from torch_onebit.solver import CalibrationOptions

FORMAT = 4  # of the files, and of what the algorithm makes of the same inputs


class Store:
    """A folder with one file per layer, written whole or not at all; without a folder, nothing.

    Files belong to a model, batches and options by their contents: a hash of them all.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = ""

    def open(
        self,
        model: nn.Module,
        jobs: list[Job],
        calls: list[Call],
        options: CalibrationOptions,
        rank: int,
    ) -> None:
        """Make the folder ready for this run.

        Raises:
            ValueError: batches hold something without contents that could be compared.
        """
        if self.folder is None:
            return
        names = [(job.names, job.group_size, job.symmetric, job.reason) for job in jobs]
        tensors = [dict(model.named_parameters()), dict(model.named_buffers())]
        self.key = contents([FORMAT, vars(options), rank, names, tensors, calls])
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, index: int, device: torch.device) -> Result | None:
        """Layer number index, when it was finished.

        Raises:
            ValueError: the file is of another run, or none of ours.
        """
        if self.folder is None or not self._path(index).exists():
            return None
        try:
            saved = torch.load(self._path(index), map_location=device)
            key = saved.pop("key")
        except Exception as error:
            raise ValueError(
                f"checkpoint must hold files of calibrate_, got {self._path(index)}: {error}"
            ) from error
        if key != self.key:
            raise ValueError(
                "checkpoint must hold layers of this model with these batches and options, got "
                f"another {self._path(index)}"
            )
        return Result(**saved)

    def save(self, index: int, result: Result) -> None:
        if self.folder is None:
            return
        partial = self._path(index).with_suffix(".partial")
        torch.save({"key": self.key, **vars(result)}, partial)
        partial.replace(self._path(index))

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:05}.pt"


def contents(value: Any) -> str:
    """A hash of tensors, numbers, strings and containers of these, by what they hold."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)} ".encode())
        for key, inner in value.items():
            _update(digest, key)
            _update(digest, inner)
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)} ".encode())
        for inner in value:
            _update(digest, inner)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        digest.update(f"{type(value).__name__} {value!r} ".encode())
    else:
        raise ValueError(
            "batches must hold tensors, numbers and strings for a checkpoint to know them again, "
            f"got {type(value).__name__}"
        )
