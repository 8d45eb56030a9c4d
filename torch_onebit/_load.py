"""Loads the compiled operators into ``torch.ops.onebit``."""

from pathlib import Path

import torch


def load() -> None:
    """Load ``_C``; the error of a missing or mismatched build says what to run."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        raise ImportError(
            "torch_onebit._C is not built: run `pip install --no-build-isolation .` "
            "(or `python setup.py build_ext --inplace`) in the torch_onebit sources"
        )
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        raise ImportError(
            f"torch_onebit._C was built for another torch than {torch.__version__}: build it again "
            f"with `pip install --no-build-isolation --force-reinstall --no-deps .` ({error})"
        ) from error
