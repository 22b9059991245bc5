"""Tokenizers inside .gguf files, rebuilt from their metadata with the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from kdrl_jax.data.tokenizer_hf import HFTokenizer
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata

# Token types of tokenizer.ggml.token_type; the others (normal, unknown, byte) are ordinary tokens here.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

# The rule of transformers' Qwen2Tokenizer.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_split() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_split()])


def _qwen2_split() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_SPLITS = {
    "gpt-2": _gpt2_split,
    "smollm": _smollm_split,
    "qwen2": _qwen2_split,
    "deepseek-r1-qwen": _qwen2_split,
}
"""How text is cut into words before merging, by `tokenizer.ggml.pre`."""
_NORMALIZED = ("qwen2", "deepseek-r1-qwen")
"""Those that bring Unicode into its composed form (NFC) first."""


def load_gguf_tokenizer(path: Path) -> HFTokenizer:
    """The tokenizer of a .gguf file.

    Raises:
        ImportError: the optional package `gguf` is not installed.
        ValueError: not a GGUF file, no tokenizer in it, or a kind of tokenizer that is not supported.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError(
            f"{path}: reading .gguf files needs an extra: pip install 'kdrl_jax[gguf]'"
        ) from None
    try:
        fields = gguf.GGUFReader(path).fields
        values = {
            key: field.contents()
            for key, field in fields.items()
            if key.startswith("tokenizer.") and key != "tokenizer.ggml.scores"
        }
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable GGUF file ({error}); fetch it again") from None
    return gguf_tokenizer(values, str(path))


def gguf_tokenizer(values: Mapping[str, Any], place: str) -> HFTokenizer:
    """Builds a tokenizer from GGUF metadata.

    Args:
        values: the `tokenizer.*` keys.
        place: the file they came from, for errors.

    Raises:
        ValueError: keys are missing, or say a kind of tokenizer that is not supported.
    """

    def needed(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in values:
            raise ValueError(
                f"{place}: no tokenizer.ggml.{key}; set tokenizer.kind='file' and tokenizer.path to the "
                "tokenizer.json of the original model"
            )
        return values[f"tokenizer.ggml.{key}"]

    kind = needed("model")
    pre = needed("pre") if kind == "gpt2" else None
    if kind != "gpt2" or pre not in _SPLITS:
        raise ValueError(
            f"{place}: tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={pre!r} is not supported (model "
            f"'gpt2' with pre {sorted(_SPLITS)} is); set tokenizer.kind='file' and tokenizer.path to the "
            "tokenizer.json of the original model"
        )
    tokens: Sequence[str] = needed("tokens")
    types: Sequence[int] = needed("token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in needed("merges")]
    # Unused tokens only fill the vocabulary up; their strings must not be found in text.
    vocab = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != _UNUSED}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _SPLITS[pre]()
    backend.decoder = decoders.ByteLevel()

    def typed(wanted: int) -> list[tokenizers.AddedToken]:
        chosen = [token for token, t in zip(tokens, types, strict=True) if t == wanted]
        return [tokenizers.AddedToken(t, special=wanted == _CONTROL, normalized=False) for t in chosen]

    backend.add_special_tokens(typed(_CONTROL))
    backend.add_tokens(typed(_USER_DEFINED))
    return HFTokenizer(backend, _metadata(values, tokens), place)


def _metadata(values: Mapping[str, Any], tokens: Sequence[str]) -> TokenizerMetadata:
    def token_id(name: str) -> int | None:
        i = values.get(f"tokenizer.ggml.{name}_token_id")
        return int(i) if i is not None and 0 <= i < len(tokens) else None

    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {name: tokens[i] for name, key in keys.items() if (i := token_id(key)) is not None}
    # eot ends a turn and eom a message, where a model has other tokens for them than eos.
    ends = (token_id("eos"), token_id("eot"), token_id("eom"))
    return TokenizerMetadata(
        tokens=named,
        # Absent means no: the kinds supported here add none by default.
        add_bos=bool(values.get("tokenizer.ggml.add_bos_token", False)),
        end_ids=tuple(i for i in ends if i is not None),
        chat_template=values.get("tokenizer.chat_template"),
    )
