"""Figures in the documentation: what stands between ``<!-- name -->`` and ``<!-- end -->``."""

import re
from pathlib import Path


def put(page: Path, name: str, text: str) -> None:
    """Replace the figures called name on a page.

    Raises:
        ValueError: the page has no such place.
    """
    old = page.read_text()
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not place.search(old):
        raise ValueError(f"page must hold <!-- {name} --> and <!-- end -->, got {page}")
    page.write_text(place.sub(lambda m: f"{m[1]}{text.strip()}\n{m[2]}", old))


def table(header: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
