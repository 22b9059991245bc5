"""SentencePiece tokenizers (.model files)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata, choose_pad_id, ordered_end_ids, read_metadata


class SentencePieceTokenizer:
    """A SentencePiece model behind the `Tokenizer` protocol, which documents the methods.

    What the model's normalisation changes (often runs of spaces, and compatibility forms of characters)
    does not come back from `decode`. Where a rendered template is cut at special tokens, each piece between
    them is encoded as a text of its own, with the model's space in front if it puts one.
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor, metadata: TokenizerMetadata, place: str):
        """Wraps a loaded model.

        Args:
            model: the SentencePiece model.
            metadata: end tokens, BOS, padding, chat template, as far as they are known.
            place: the file it came from, for errors.

        Raises:
            ValueError: no end token, or added tokens that a .model file cannot hold.
        """
        self._model = model
        self.vocab_size: int = model.get_piece_size()
        if beyond := {t: i for t, i in metadata.added_ids.items() if i >= self.vocab_size}:
            raise ValueError(
                f"{place}: tokenizer_config.json adds {len(beyond)} tokens beyond its {self.vocab_size}, "
                f"such as {next(iter(beyond))!r}; put the model's tokenizer.json beside it, which has them"
            )
        ids = {model.id_to_piece(i): i for i in range(self.vocab_size)}
        named = {name: ids[token] for name, token in metadata.tokens.items() if token in ids}
        builtin = model.eos_id() if model.eos_id() >= 0 else None
        self.end_ids: tuple[int, ...] = ordered_end_ids(
            place, [named.get("eos_token", builtin), *metadata.end_ids], self.vocab_size
        )
        control = {i: piece for piece, i in ids.items() if model.is_control(i)}
        self.pad_id: int = choose_pad_id(
            named.get("pad_token", model.pad_id()), model.unk_id(), control, self.end_ids, self.vocab_size
        )
        self.bos_id: int | None = None
        if metadata.add_bos and model.bos_id() >= 0:
            self.bos_id = named.get("bos_token", model.bos_id())
        self.chat_template: str | None = metadata.chat_template
        builtin_tokens = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
        }
        self.template_tokens: Mapping[str, str] = {
            **{name: model.id_to_piece(i) for name, i in builtin_tokens.items() if i >= 0},
            **metadata.tokens,
        }
        self._silent = frozenset({*control, *self.end_ids, model.unk_id()})
        self._special_ids = {model.id_to_piece(i): i for i in {*control, *self.end_ids, *named.values()}}
        self.special_strings: tuple[str, ...] = tuple(sorted(self._special_ids, key=len, reverse=True))
        self._special = re.compile(f"({'|'.join(map(re.escape, self.special_strings))})")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`. Unknown characters become the unknown token or bytes."""
        if not special:
            return self._model.encode(text)
        ids: list[int] = []
        for piece in self._special.split(text):
            if piece in self._special_ids:
                ids.append(self._special_ids[piece])
            elif piece:
                ids.extend(self._model.encode(piece))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._model.decode([int(i) for i in ids if i not in self._silent and 0 <= i < self.vocab_size])

    def token_strings(self) -> list[str]:
        """See `Tokenizer.token_strings`."""
        return [
            "" if self._model.is_unused(i) else self._model.id_to_piece(i) for i in range(self.vocab_size)
        ]


def load_sentencepiece_tokenizer(path: Path) -> SentencePieceTokenizer:
    """A SentencePiece .model, with the Hugging Face files of the same folder as far as they are there.

    Raises:
        ValueError: not a SentencePiece model, or no end token.
    """
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error}); fetch it again") from None
    return SentencePieceTokenizer(model, read_metadata(path.parent), str(path))
