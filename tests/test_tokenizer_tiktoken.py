"""Llama 3's tokenizer.model against the `tiktoken` package itself."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from kdrl_jax.config.models import TokenizerConfig
from kdrl_jax.data.chat import render_prompt
from kdrl_jax.data.tokenizer import Tokenizer, load_tokenizer

REPO = Path(__file__).parents[1]
MODEL = TokenizerConfig()
# As in Meta's own tokenizer.py for Llama 3, written out again: the package must not be its own judge.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = [bytes([b]) for b in range(256)]


def train_ranks(size: int) -> list[bytes]:
    """Byte-level BPE of this repository's own text, cut into words as Llama 3 does."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [path.read_text() for path in sorted(REPO.rglob("kdrl_jax/*/*.py"))]
    backend.train_from_iterator([*texts, "        \n" * 50, "naïve Übermaß 你好 🙂 " * 50], trainer)
    readable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in readable]
    byte_of = {chr(b): b for b in readable} | {chr(256 + i): b for i, b in enumerate(others)}
    ids = backend.get_vocab()
    return [bytes(byte_of[char] for char in token) for token in sorted(ids, key=ids.__getitem__)]


RANKS = train_ranks(3000)


def write_ranks(folder: Path, tokens: Sequence[bytes] = RANKS, **files: Any) -> Path:
    """A folder with tokenizer.model; keyword `tokenizer_config={...}` becomes tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def load(folder: Path, tokens: Sequence[bytes] = RANKS, **files: Any) -> Tokenizer:
    return load_tokenizer(MODEL, str(write_ranks(folder, tokens, **files)))


def reference(tokens: Sequence[bytes], special: dict[str, int]) -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding("test", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def judge(bare: Tokenizer) -> Any:
    return reference(RANKS, {bare.token_strings()[i]: i for i in bare.special_ids})


CODE = st.text(st.sampled_from("  \t\r\n\x0b\x85\u00a0\u3000'sStTlLdDſK019²½.,(){}[]=+-_aeé你🙂<|eot_id|>"))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), CODE))
@example("a<|eot_id|>b")
@example("if x:\n        return 12345678 + y  # they'LL\r\n\r\n\n   ")
def test_ids_are_tiktokens(bare: Tokenizer, judge: Any, text: str) -> None:
    assert bare.encode(text) == judge.encode(text, disallowed_special=())
    assert bare.encode(text, special=True) == judge.encode(text, allowed_special="all")
    assert bare.decode(bare.encode(text)) == text


def test_ids_of_every_character(bare: Tokenizer, judge: Any) -> None:
    text = "".join(f"a{c} {c}{c}1" for c in map(chr, [*range(0x3000), *range(0x1F000, 0x20000)]))
    assert bare.encode(text) == judge.encode(text, disallowed_special=())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=2, max_size=7), max_size=25, unique=True),
    st.lists(st.text("ab", max_size=40), min_size=1, max_size=4),
)
@example(["aa", "aaa", "aaaa"], ["a" * n for n in range(12)])
@example(["ab", "aab", "baab", "aabb"], ["abaabbaab"])
def test_ids_in_any_order_of_ranks(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], texts: list[str]
) -> None:
    # Tokens with several ways to be merged, with none, and with parts of a higher rank than their own.
    tokens = [*BYTES, *(word.encode() for word in words)]
    tokenizer = load(tmp_path_factory.getbasetemp() / "any_order", tokens)
    expected = reference(tokens, {})
    for text in texts:
        assert tokenizer.encode(text) == expected.encode(text)


def test_a_bare_file_is_llama_3_1(bare: Tokenizer) -> None:
    size = len(RANKS)
    assert bare.vocab_size == size + 256
    strings = bare.token_strings()
    # Ids of Llama 3.1, whose file has 128,000 ranks.
    for string, i in {
        "<|begin_of_text|>": 0,
        "<|finetune_right_pad_id|>": 4,
        "<|start_header_id|>": 6,
        "<|python_tag|>": 10,
        "<|reserved_special_token_3|>": 11,
        "<|reserved_special_token_247|>": 255,
    }.items():
        assert strings[size + i] == string
    assert [strings[i] for i in bare.end_ids] == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert bare.end_ids == (size + 1, size + 8, size + 9)
    assert (bare.bos_id, bare.pad_id) == (size, size + 4)
    assert bare.special_ids == frozenset(range(size, size + 256))
    assert bare.template_tokens["bos_token"] == "<|begin_of_text|>"
    assert render_prompt(bare, "Hello", "{question}", "auto") == [size, *bare.encode("Hello")]


def added(first: int, *strings: str) -> dict[str, Any]:
    return {str(first + i): {"content": s, "special": s.startswith("<|")} for i, s in enumerate(strings)}


def test_files_beside_it(tmp_path: Path) -> None:
    size = len(RANKS)
    decoder = added(size, "<|begin_of_text|>", "<|end_of_text|>") | added(size + 4, "<|eot_id|>", "<think>")
    config = {"added_tokens_decoder": decoder, "eos_token": "<|eot_id|>", "add_bos_token": False}
    tokenizer = load(tmp_path, tokenizer_config=config)
    assert tokenizer.vocab_size == size + 6
    assert tokenizer.token_strings()[size + 3] == f"<|reserved_token_{size + 3}|>"
    assert (tokenizer.end_ids, tokenizer.bos_id) == ((size + 4,), None)
    # One that is not special is a token in any text, and is text itself.
    assert tokenizer.encode("<think>") == [size + 5]
    assert tokenizer.decode([size + 5, size + 4]) == "<think>"
    assert size + 5 not in tokenizer.special_ids
    listed = load(tmp_path, generation_config={"eos_token_id": [size + 1, size + 4]}, tokenizer_config={})
    assert listed.end_ids == (size + 1, size + 4)
    one = load(tmp_path, generation_config={"eos_token_id": size + 9})
    assert one.end_ids == (size + 9,)
    assert one.template_tokens["eos_token"] == "<|eot_id|>"


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    size = len(RANKS)
    config = {"added_tokens_decoder": added(size, "<|begin_of_text|>", "<|end_of_text|>")}
    with pytest.raises(
        ValueError, match=rf"{size - 5} tokens, but the first special .* id {size}; .*cut short"
    ):
        load(tmp_path, RANKS[:-5], tokenizer_config=config)
    with pytest.raises(ValueError, match=rf"id {size} is .*'<\|begin_of_text\|>' in tokenizer_config"):
        load(tmp_path, [*RANKS, b"~!~!~"], tokenizer_config=config)
    with pytest.raises(ValueError, match=r"auto_map.*tokenizer\.json beside it"):
        load(tmp_path, tokenizer_config={"auto_map": {"AutoTokenizer": ["kimi.Tokenizer", None]}})


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    size = len(RANKS)
    config = {"added_tokens_decoder": added(size, "<|begin_of_text|>", "<|end_of_text|>")}
    file = write_ranks(tmp_path, tokenizer_config=config) / "tokenizer.model"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert load_tokenizer(MODEL, str(tmp_path)).vocab_size == size + 2, "only the last newline is missing"
    bodies = {whole[:-n]: "" for n in [*range(2, 60), len(whole) - 5000, len(whole) - 3]}
    bodies |= {
        b"<!DOCTYPE html>\n<html>": "line 1 of 2 is '<!DOCTYPE html>'",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n": "git lfs pull",
        whole.replace(b" 300\n", b" 300x\n"): "line 301 of 3000",
        whole.replace(b" 300\n", b" 299\n"): "ranks of its 3000 tokens are not 0, 1, 2",
        whole + b"IQ== 3000\n": "line 3001 repeats the token b'!'",
        b"".join(whole.splitlines(keepends=True)[1:]): "not 0, 1, 2",
        b"IQ== 0\n": "no token for 255 of the 256 single bytes",
        b"": "fetch it again",
        b"\n\x04\x0a\x02ab" + whole[:50]: "not a SentencePiece model",
    }
    for body, message in bodies.items():
        file.write_bytes(body)
        with pytest.raises(ValueError, match=r"^/.*tokenizer\.model: ") as error:
            load_tokenizer(MODEL, str(tmp_path))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
