"""Tokenizers in GGUF files; llama.cpp, where it is installed, reads our files as we do."""

import pytest
import torch
from test_gguf import build

from torch_onebit import export_gguf
from torch_onebit.checkpoint import CheckpointError
from torch_onebit.checkpoint.gguf import GGUFFile
from torch_onebit.checkpoint.gguf_tokenizer import CUTS, tokenizer_entries

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ROWS = 400
TEXT = (
    "I'll  say 'hello' 1234 times, naïve café…\n\n\t def f(x):\r\n  return x**2  # 東京 \U0001f600 "
)
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer(cut: str = "gpt-2", bos: bool = False, **options):
    """A byte-level BPE trained on a few words, which cuts text as llama.cpp's of that name."""
    pre = tokenizers.pre_tokenizers
    steps = {
        "ByteLevel": pre.ByteLevel(add_prefix_space=False),
        "bytes": pre.ByteLevel(add_prefix_space=False, use_regex=False),
        "Digits": pre.Digits(individual_digits=True),
    }
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre.Sequence(
        [steps[s] if s in steps else pre.Split(tokenizers.Regex(s), "isolated") for s in CUTS[cut]]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=ROWS - 20,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    made.train_from_iterator([TEXT * 3, "return the hello of the café 12 34"], trainer)
    if bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", **options
    )
    fast.add_tokens(["<tool>"])
    return fast


def model():
    torch.manual_seed(0)
    return build("llama", vocab_size=ROWS)


@pytest.mark.parametrize("bos", [False, True])
def test_transformers_reads_the_tokenizer_of_the_file(bos, tmp_path):
    pytest.importorskip("gguf")
    own = tokenizer("llama-bpe", bos, chat_template=CHAT)
    export_gguf(model(), tmp_path / "a.gguf", tokenizer=own)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    words = "hello the café 12"
    options = {"add_special_tokens": False}
    assert read(words, **options).input_ids == own(words, **options).input_ids
    assert read.eos_token_id == own.eos_token_id
    assert read.chat_template == CHAT
    entries = GGUFFile(tmp_path / "a.gguf").metadata
    assert entries["tokenizer.ggml.add_bos_token"] is bos
    kinds = list(entries["tokenizer.ggml.token_type"])
    assert kinds[:2] == [3, 3]  # <s>, </s>
    assert kinds[own.convert_tokens_to_ids("<tool>")] == 4
    assert kinds[-1] == 5  # a row without a token


def test_metadata_takes_the_place_of_entries(tmp_path):
    given = {"tokenizer.ggml.pre": "default", "general.name": "tiny"}
    export_gguf(model(), tmp_path / "a.gguf", tokenizer=tokenizer(), metadata=given)
    entries = GGUFFile(tmp_path / "a.gguf").metadata
    assert entries["tokenizer.ggml.pre"] == "default"
    assert entries["tokenizer.ggml.model"] == "gpt2"
    assert entries["general.name"] == "tiny"


def changed(**parts):
    """A tokenizer whose backend has other parts."""
    fast = tokenizer()
    for name, part in parts.items():
        setattr(fast.backend_tokenizer, name, part)
    return fast


words = lambda: tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
REFUSED = {
    "not a tokenizer": (lambda: 3, "tokenizer must be a fast one of transformers, got int"),
    "words": (
        lambda: transformers.PreTrainedTokenizerFast(tokenizer_object=words()),
        "tokenizer must be byte-level BPE, got WordLevel",
    ),
    "no cut": (
        lambda: changed(pre_tokenizer=tokenizers.pre_tokenizers.Whitespace()),
        r"tokenizer must cut text in one of the ways that llama.cpp calls gpt-2, .*Whitespace",
    ),
    "lower case": (
        lambda: changed(normalizer=tokenizers.normalizers.Lowercase()),
        r"tokenizer must cut text .*Lowercase",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_gguf_cannot_hold_is_refused(make, message):
    with pytest.raises(CheckpointError, match=message):
        tokenizer_entries(make(), ROWS)


def test_more_tokens_than_rows_are_refused():
    own = tokenizer()
    with pytest.raises(CheckpointError, match=rf"at most 100 tokens, got {len(own)}"):
        tokenizer_entries(own, 100)


# --- llama.cpp ---


def llama(path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)


@pytest.mark.parametrize("kind, tied", [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_llama_cpp_computes_the_same_next_tokens(kind, tied, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    torch.manual_seed(0)
    ours = build(kind, tied)
    export_gguf(ours, tmp_path / "a.gguf")
    theirs = llama(tmp_path / "a.gguf")
    ids = [5, 9, 11, 30, 2, 7]
    theirs.eval(ids)
    got = torch.from_numpy(theirs.scores[: len(ids)].copy())
    want = ours.float()(torch.tensor([ids])).logits[0]
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    # It rounds the inputs of every product to 8 bits.
    assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("cut", CUTS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(cut, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    own = tokenizer(cut, bos=True)
    export_gguf(model(), tmp_path / "a.gguf", tokenizer=own)
    theirs = llama(tmp_path / "a.gguf")
    for text in (TEXT, "<tool>hello</s> 12", "a"):
        assert theirs.tokenize(text.encode(), special=True) == own(text).input_ids
