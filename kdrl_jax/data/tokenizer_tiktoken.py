"""Llama 3's own tokenizer.model: lines of `base64 rank`, the format of the `tiktoken` library.

The file holds tokens and the order in which they were merged. It becomes a `tokenizers.Tokenizer` that
gives tiktoken's ids, so that nothing else has to know of the format.
"""

import base64
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kdrl_jax.data.tokenizer_hf import HFTokenizer
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata, read_metadata

# How Llama 3 cuts text into words before merging (the file does not say).
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_FIRST = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
LLAMA3_SPECIAL = (*_LLAMA3_FIRST, *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)))
"""The 256 special tokens of Llama 3.1 and later, in the order of their ids, which follow the ranks."""
_LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
"""As Llama 3.1 Instruct's generation_config.json has them."""

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2}[ \t]+\d+")


def is_tiktoken_file(path: Path) -> bool:
    """Whether a .model file is text, as tiktoken's are, and not a serialised SentencePiece model."""
    with path.open("rb") as file:
        start = file.read(4096)
    # A SentencePiece model begins with the tag of its first piece (a newline) and has zero bytes in its
    # scores; base64, and whatever was fetched in a file's place (a page, a Git LFS pointer), has neither.
    return bool(start) and not start.startswith(b"\n") and b"\0" not in start


def load_tiktoken_tokenizer(path: Path) -> HFTokenizer:
    """A tiktoken-style tokenizer.model of the Llama 3 family.

    Special tokens are those of tokenizer_config.json beside it, or Llama 3.1's where there are none; then
    texts begin with <|begin_of_text|> and completions end with any of <|end_of_text|>, <|eom_id|> and
    <|eot_id|>, unless generation_config.json names others.

    Raises:
        ValueError: a file that is cut short or is something else, or does not fit the files beside it.
    """
    tokens = _read_tokens(path)
    metadata = read_metadata(path.parent)
    _refuse_own_code(path)
    alphabet = _byte_alphabet()
    strings = [token.decode("latin-1").translate(alphabet) for token in tokens]
    added = _added_tokens(path, strings, metadata)
    merges = [
        (left.decode("latin-1").translate(alphabet), right.decode("latin-1").translate(alphabet))
        for left, right in _merges(tokens)
    ]
    vocab = {string: i for i, string in enumerate(strings)}
    # tiktoken looks whole words up before it merges anything; so does ignore_merges.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added.values()))
    return HFTokenizer(backend, _complete(metadata, added), str(path))


def _read_tokens(path: Path) -> list[bytes]:
    """Tokens in the order of their ranks, which are their ids."""
    ranks: dict[bytes, int] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        try:
            if not _LINE.fullmatch(line.strip()):
                raise ValueError
            token = base64.b64decode(fields[0], validate=True)
        except ValueError:
            seen = line[:40].decode("utf-8", errors="replace")
            hint = "; this is a Git LFS pointer: run `git lfs pull`" if b"git-lfs" in line else ""
            raise ValueError(
                f"{path}: line {number} of {len(lines)} is {seen!r}, not `base64 rank` as tiktoken writes it"
                f"{hint or '; the file is cut short or something else, fetch it again'}"
            ) from None
        if token in ranks:
            raise ValueError(f"{path}: line {number} repeats the token {token!r}; fetch the file again")
        ranks[token] = int(fields[1])
    tokens = sorted(ranks, key=ranks.__getitem__)
    if not tokens or [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(
            f"{path}: the ranks of its {len(tokens)} tokens are not 0, 1, 2 ... without gaps; the file is "
            "cut short or something else, fetch it again"
        )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{path}: no token for {len(missing)} of the 256 single bytes, such as {missing[0]:#04x}, so not "
            "every text could be encoded; fetch the file again"
        )
    return tokens


def _refuse_own_code(path: Path) -> None:
    config = path.parent / "tokenizer_config.json"
    if config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(
            f"{path}: {config.name} names Python code of the model's own (auto_map), so words may be cut "
            "otherwise than Llama 3 does; put the model's tokenizer.json beside it"
        )


def _byte_alphabet() -> dict[int, int]:
    """The characters that stand for bytes in byte-level BPE: printable ones for themselves, the other 68
    by the characters from 256 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: 256 + i for i, byte in enumerate(others)}


def _merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that make a token, in the order of its rank.

    tiktoken merges whatever two neighbours make a token, lowest rank first, then leftmost; a list of pairs
    merges the earliest pair first. They agree because of the pairs that make one token only one ever stands
    in a text: with nothing merged across the token's bounds, its bytes were merged as they would be alone,
    so the last two parts of them are the same everywhere.
    """
    known = frozenset(tokens)
    return [
        (token[:i], token[i:])
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in known and token[i:] in known
    ]


def _added_tokens(
    path: Path, strings: Sequence[str], metadata: TokenizerMetadata
) -> dict[int, tokenizers.AddedToken]:
    """Added tokens by id, without gaps after the ranks."""
    size = len(strings)
    named = dict(metadata.added)
    if not named:
        return {size + i: _special(string) for i, string in enumerate(LLAMA3_SPECIAL)}
    for i, token in named.items():
        if i < size and strings[i] != token.content:
            raise ValueError(
                f"{path}: id {i} is {strings[i]!r}, but {token.content!r} in tokenizer_config.json; the file "
                "is not this model's or is too long, fetch both again"
            )
    beyond = [i for i in named if i >= size]
    if beyond and min(beyond) > size:
        raise ValueError(
            f"{path}: {size} tokens, but the first special token of tokenizer_config.json has id "
            f"{min(beyond)}; the file is cut short, fetch it again"
        )
    fill = {i: _special(f"<|reserved_token_{i}|>") for i in range(size, max(beyond, default=size - 1) + 1)}
    return dict(sorted({**fill, **named}.items()))


def _special(string: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(string, special=True, normalized=False)


def _complete(metadata: TokenizerMetadata, added: Mapping[int, tokenizers.AddedToken]) -> TokenizerMetadata:
    """What Llama 3 has, where no file says otherwise."""
    ids = {token.content: i for i, token in added.items()}
    tokens = dict(metadata.tokens)
    end_ids = metadata.end_ids
    if not end_ids and "eos_token" not in tokens:
        end_ids = tuple(ids[end] for end in _LLAMA3_ENDS if end in ids)
    if "eos_token" not in tokens and end_ids and end_ids[0] in added:
        tokens["eos_token"] = added[end_ids[0]].content
    for name, string in (("bos_token", "<|begin_of_text|>"), ("pad_token", "<|finetune_right_pad_id|>")):
        if string in ids:
            tokens.setdefault(name, string)
    add_bos = metadata.add_bos if metadata.add_bos is not None else "bos_token" in tokens
    return dataclasses.replace(metadata, tokens=tokens, end_ids=end_ids, add_bos=add_bos)
