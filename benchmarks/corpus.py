"""English text that machines have without a network: documentation, as tokens of a model.

``python benchmarks/corpus.py FOLDER ... --out tokens.npz`` reads pages, manuals and read-me files
below the folders, and the docstrings of Python files. One document in 32 is held out, and no
paragraph of those is left in the others; what occurs twice is kept once.
"""

import argparse
import ast
import hashlib
import html
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

LEAST = 500  # characters of a document
MOST = 2_000_000  # bytes of a file
HELD_OUT = 32


def of_page(source: str) -> str:
    """What a page of HTML says, a paragraph to a block."""
    source = re.sub(r"(?is)<(script|style|head|nav|footer)\b.*?</\1>", " ", source)
    source = re.sub(
        r"(?i)</?(p|li|ul|ol|table|tr|h\d|div|pre|dt|dd|section)\b[^>]*>", "\n\n", source
    )
    return html.unescape(re.sub(r"<[^>]*>", "", source))


def of_module(source: str) -> str:
    """The docstrings of a Python file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


READERS: dict[str, Callable[[str], str]] = {
    ".html": of_page, ".py": of_module, ".txt": str, ".md": str, ".rst": str, ".pod": str, "": str
}  # fmt: skip
WITHOUT_SUFFIX = {"METADATA", "README"}


def is_english(text: str) -> bool:
    """Prose of ASCII, no table and no other language."""
    words = text.split()
    articles = sum(word in ("the", "a", "is", "of", "to") for word in words)
    letters = len(re.sub(r"[^a-zA-Z]+", "", text))
    others = len(re.sub(r"[\0-\x7f]+", "", text))
    written = len("".join(words))
    return articles > len(words) / 20 and letters > 0.75 * written and others < len(text) / 50


def documents(folders: list[str]) -> Iterator[tuple[str, str]]:
    """(path, text), in an order that does not depend on the machine."""
    for folder in folders:
        for root, inner, names in os.walk(folder):
            inner[:] = sorted(n for n in inner if n not in ("_sources", "locale", "test", "tests"))
            for name in sorted(names):
                path = Path(root, name)
                reader = READERS.get(path.suffix)
                if reader is None or (not path.suffix and name not in WITHOUT_SUFFIX):
                    continue
                if path.is_symlink() or path.stat().st_size > MOST:
                    continue
                text = reader(path.read_text(errors="replace"))
                if len(text) >= LEAST and is_english(text):
                    yield str(path.relative_to(folder)), text


def split(found: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Documents to train on and held out, each paragraph at its first place alone."""

    def is_held_out(name: str) -> bool:
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0

    seen: set[bytes] = set()

    def fresh(text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            letters = re.sub(r"[^a-z]+", "", paragraph.lower())
            key = hashlib.blake2b(letters.encode(), digest_size=12).digest()
            if len(letters) >= 20 and key not in seen:
                seen.add(key)
                kept.append(re.sub(r"[ \t]+", " ", paragraph).strip())
        return "\n\n".join(kept)

    held_out = [fresh(text) for name, text in found if is_held_out(name)]
    train = [fresh(text) for name, text in found if not is_held_out(name)]
    return tuple([t for t in texts if len(t) >= LEAST] for texts in (train, held_out))


def main() -> None:
    import smollm2

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--model", type=Path, default=Path("out/smollm2"), help="of smollm2.py")
    parser.add_argument("--out", type=Path, default=Path("out/smollm2/tokens.npz"))
    args = parser.parse_args()
    tokenizer = smollm2.load_tokenizer(args.model)
    tokens = {}
    for name, texts in zip(
        ("train", "held_out"), split(list(documents(args.folders))), strict=True
    ):
        ends = tokenizer.eos_token_id
        ids = tokenizer(texts).input_ids
        tokens[name] = np.concatenate([np.array([*row, ends], dtype=np.uint16) for row in ids])
        print(f"{name}: {len(texts)} documents, {tokens[name].size:,} tokens")
    np.savez_compressed(args.out, **tokens)


if __name__ == "__main__":
    main()
