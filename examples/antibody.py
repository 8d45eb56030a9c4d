"""A pretrained model and real data, both from PyPI: AntiBERTy and human antibody reads.

AntiBERTy (package antiberty, MIT) is a BERT of 26 million parameters that was trained on 558
million antibody sequences to guess hidden residues. Only its checkpoint is used, in transformers'
own BertForMaskedLM. The sequences are the 1,000 human antibody reads that the package abstar (MIT)
ships for its tests. Nothing in this file knows about 1-bit weights.
"""

import itertools
import re
from pathlib import Path

import packages
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGES = ("antiberty==0.1.3", "abstar==0.8.0")
CHECKPOINT = "antiberty/trained_models/AntiBERTy_md_smooth/"
VOCABULARY = "antiberty/trained_models/vocab.txt"
READS = "abstar/test_data/test_1k.fasta"

BASES = "TCAG"
CODE = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"  # the genetic code
CODONS = {"".join(c): a for c, a in zip(itertools.product(BASES, repeat=3), CODE, strict=True)}
PRIMER = 4  # residues at the start of a read that the primer left
END = "VTVSS"  # of a heavy chain's variable region

PAD, CLS, SEP, MASK = 0, 2, 3, 4
MASKED_SHARE = 0.15

Batch = dict[str, Tensor]


def download(folder: Path) -> bool:
    """Fetch the two wheels into folder; false, and pip's last words printed, if that fails."""
    return packages.download(folder, PACKAGES)


def load_model(folder: Path) -> nn.Module:
    """AntiBERTy as a BertForMaskedLM in eval mode; what its other heads hold is left out."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    packages.extract(folder, PACKAGES[0], VOCABULARY)
    packages.extract(folder, PACKAGES[0], CHECKPOINT)
    return transformers.BertForMaskedLM.from_pretrained(folder / CHECKPOINT).eval()


def empty_model(folder: Path) -> nn.Module:
    """The same architecture with random weights."""
    import transformers

    config = transformers.BertConfig.from_pretrained(folder / CHECKPOINT)
    return transformers.BertForMaskedLM(config).eval()


def load_sequences(folder: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) heavy chains, each different from all others; one in four held out."""
    with packages.open_wheel(folder, PACKAGES[1]) as wheel:
        records = wheel.read(READS).decode().split(">")[1:]
    reads = ["".join(record.splitlines()[1:]).upper() for record in records]
    chains = list(dict.fromkeys(chain for read in reads if (chain := heavy_chain(read))))
    return [c for i, c in enumerate(chains) if i % 4], chains[::4]


def heavy_chain(read: str) -> str | None:
    """The residues of a read up to the end of the variable region; None if no frame is open."""
    for frame in range(3):
        protein = "".join(CODONS.get(read[i : i + 3], "*") for i in range(frame, len(read) - 2, 3))
        found = re.match(f"[^*]*{END}", protein)
        if found:
            return found[0][PRIMER:]
    return None


class Masking:
    """Sequences into batches with hidden residues, and the residues that were there."""

    def __init__(self, folder: Path) -> None:
        words = (folder / VOCABULARY).read_text().split()
        self.ids = {word: index for index, word in enumerate(words)}

    def batch(self, sequences: list[str], generator: torch.Generator) -> tuple[Batch, Tensor]:
        """(inputs of the model, targets ``[batch, time]`` int64: -100 where nothing is hidden)."""
        rows = [torch.tensor([CLS, *(self.ids[r] for r in s), SEP]) for s in sequences]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        hidden = (torch.rand(tokens.shape, generator=generator) < MASKED_SHARE) & (tokens > MASK)
        inputs = {
            "input_ids": tokens.masked_fill(hidden, MASK),
            "attention_mask": (tokens != PAD).long(),
        }
        return inputs, tokens.masked_fill(~hidden, -100)

    def batches(self, sequences: list[str], size: int, seed: int) -> list[tuple[Batch, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        return [self.batch(part, generator) for part in parts]


def masked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats per hidden residue."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.inference_mode()
def evaluate(model: nn.Module, batches: list[tuple[Batch, Tensor]]) -> tuple[float, float, int]:
    """(loss in nats, share guessed right, hidden residues)."""
    loss, right, count = 0.0, 0, 0
    for inputs, targets in batches:
        hidden = targets >= 0
        logits, wanted = model(**inputs).logits[hidden], targets[hidden]
        loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return loss / count, right / count, count
