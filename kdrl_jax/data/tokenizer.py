"""What the rest of the code knows of a tokenizer, the built-in one, and the choice between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kdrl_jax.config.models import TokenizerConfig
from kdrl_jax.data.tokenizer_files import write_settings
from kdrl_jax.data.tokenizer_gguf import load_gguf_tokenizer
from kdrl_jax.data.tokenizer_hf import load_hf_tokenizer
from kdrl_jax.data.tokenizer_sentencepiece import load_sentencepiece_tokenizer
from kdrl_jax.data.tokenizer_tiktoken import is_tiktoken_file, load_tiktoken_tokenizer


class Tokenizer(Protocol):
    """Text to token ids and back. Attributes do not change after construction."""

    @property
    def vocab_size(self) -> int:
        """Number of real token ids (largest id + 1). A model's head may have more columns: padding."""

    @property
    def pad_id(self) -> int:
        """Fills rows up after their length. Never an end id, so that padding never reads as an ending."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, the one to train on first. Never empty."""

    @property
    def bos_id(self) -> int | None:
        """The id that every plain text begins with, or None if the tokenizer adds none.
        `encode` never adds it, and with a chat template only the template decides."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source, or None."""

    @property
    def template_tokens(self) -> Mapping[str, str]:
        """Variables a chat template may use: `bos_token`, `eos_token`, `pad_token`, `unk_token`."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special (control) tokens: those that `encode` gives with `special=True` only, or never."""

    @property
    def special_strings(self) -> tuple[str, ...]:
        """Strings that `encode` turns into special tokens with `special=True` only."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, with nothing added at either end.

        Args:
            text: any text; `CharTokenizer` knows printable ASCII and newline only.
            special: whether the strings of special tokens (`<|im_end|>`) become those tokens, as a
                rendered chat template needs, or stay the letters they are, as a user's text needs.

        Raises:
            ValueError: naming a character the tokenizer cannot encode.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids. Special tokens and ids without a token are left out."""

    def token_strings(self) -> list[str]:
        """The token of each id, `vocab_size` of them; "" where an id has none. For comparisons."""

    def save(self, folder: Path) -> None:
        """Writes what `transformers.AutoTokenizer.from_pretrained(folder)` needs to give the same ids, end,
        padding and BOS tokens and chat template; `load_tokenizer` reads it too.

        Files of Hugging Face's are copied as they were. config.json and generation_config.json are the
        model's and not written here: end ids beyond the first are in generation_config.json only.

        Args:
            folder: an existing folder.

        Raises:
            FileNotFoundError: a file to copy is gone.
            ValueError: transformers could not read this kind of tokenizer.
        """


class CharTokenizer:
    """Built in: one token per printable ASCII character or newline, a pad (0) and an end token (1)."""

    chat_template: str | None = None
    bos_id: int | None = None
    pad_id: int = 0
    end_ids: tuple[int, ...] = (1,)
    special_ids: frozenset[int] = frozenset({0, 1})
    special_strings: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._strings = ["<pad>", "<end>", "\n", *map(chr, range(ord(" "), ord("~") + 1))]
        self._ids = {s: i for i, s in enumerate(self._strings) if len(s) == 1}
        self.vocab_size: int = len(self._strings)
        self.template_tokens: Mapping[str, str] = {"pad_token": "<pad>", "eos_token": "<end>"}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`; there are no strings for special tokens here."""
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            char = error.args[0]
            raise ValueError(
                f"the char tokenizer has no token for {char!r} (U+{ord(char):04X}) in {text[:60]!r}; it "
                "knows printable ASCII and newline. Replace the character or choose another tokenizer.kind"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return "".join(self._strings[i] for i in ids if 2 <= i < self.vocab_size)

    def token_strings(self) -> list[str]:
        """See `Tokenizer.token_strings`."""
        return list(self._strings)

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`. An unknown character is an error there too.

        Beside a config.json of `model_type: qwen2`, transformers 5 takes any tokenizer for Qwen2's own and
        would lose spaces and newlines: there, use `PreTrainedTokenizerFast.from_pretrained`.
        """
        vocab = {string: i for i, string in enumerate(self._strings)}
        # An unknown token that is not in the vocabulary: nothing to fall back on.
        backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unknown>"))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(list(self.template_tokens.values()))
        backend.save(str(folder / "tokenizer.json"))
        write_settings(
            folder,
            {**self.template_tokens, "bos_token": None, "unk_token": None},
            None,
            tokenizer_class="PreTrainedTokenizerFast",
            add_bos_token=False,
            # "<end>" in a text stays five characters.
            split_special_tokens=True,
        )


def load_tokenizer(config: TokenizerConfig, model_path: str | None) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        config: which kind, and with kind `file` its path.
        model_path: with kind `model`: a Hugging Face folder or a .gguf file on this machine.

    Raises:
        FileNotFoundError: naming the file looked for and what to do.
        ValueError: a file that cannot be used, or no model to take the tokenizer from.
        ImportError: a .gguf file without the optional package `gguf`.
    """
    if config.kind == "char":
        return CharTokenizer()
    key, named = ("tokenizer.path", config.path) if config.kind == "file" else ("model path", model_path)
    if named is None:
        raise ValueError(
            "tokenizer.kind='model' takes the tokenizer beside a model's weights, but no model has a path; "
            "set tokenizer.kind to 'char', or to 'file' with tokenizer.path"
        )
    path = Path(named)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key} {named}: no such file or folder (looked at {path.absolute()})")
    if path.suffix == ".gguf":
        return load_gguf_tokenizer(path)
    if path.suffix == ".json":
        return load_hf_tokenizer(path)
    if path.suffix == ".model":
        return _load_model_file(path)
    raise ValueError(
        f"{key} {named}: expected a folder, tokenizer.json, a .gguf file or a .model file (SentencePiece, or "
        "Llama 3's as tiktoken writes them)"
    )


def _load_model_file(path: Path) -> Tokenizer:
    return load_tiktoken_tokenizer(path) if is_tiktoken_file(path) else load_sentencepiece_tokenizer(path)


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return load_hf_tokenizer(folder / "tokenizer.json")
    found = sorted(folder.glob("*.model"))
    if len(found) == 1:
        return _load_model_file(found[0])
    if found:
        raise ValueError(f"{folder} holds {[m.name for m in found]}; name one with tokenizer.path")
    raise FileNotFoundError(
        f"{folder} holds neither tokenizer.json nor a .model file; copy one there, or set "
        "tokenizer.kind='file' and tokenizer.path. (vocab.json with merges.txt alone is not read: load it "
        "with transformers' AutoTokenizer and save_pretrained, which writes tokenizer.json.)"
    )
