"""SentencePiece tokenizers (.model files)."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from kdrl_jax.data.tokenizer_files import SETTINGS, copy_file, copy_files, write_settings
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata, choose_pad_id, ordered_end_ids, read_metadata

# Protocol buffers. Of a field that comes twice the last one holds, and messages that come twice are merged,
# so what is appended changes what is there: field 3 of a piece is its type, field 3 of the model its
# normaliser, whose field 3 is add_dummy_prefix.
_PIECES_TAG = 0x0A
_TYPE_USER_DEFINED = b"\x18\x04"  # the last field of a piece, as the library writes it
_TYPE_CONTROL = b"\x18\x03"
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """A SentencePiece model behind the `Tokenizer` protocol, which documents the methods.

    What the model's normalisation changes (often runs of spaces, and compatibility forms of characters)
    does not come back from `decode`. Where a text is cut at added or special tokens, each piece between
    them is encoded as a text of its own: with the model's space in front if it puts one, unless
    tokenizer_config.json says `legacy: false`; then only what begins the text gets that space.
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor, metadata: TokenizerMetadata, path: Path):
        """Wraps a loaded model.

        Args:
            model: the SentencePiece model.
            metadata: end tokens, BOS, padding, chat template, added tokens, as far as they are known.
            path: the file it came from, for errors and for `save`.

        Raises:
            ValueError: no end token, or added tokens that do not fit the model.
        """
        self._path = path
        self._num_pieces: int = model.get_piece_size()
        ids = {model.id_to_piece(i): i for i in range(self._num_pieces)}
        _check_added(path, model, ids, metadata.added)
        ids |= {token.content: i for i, token in metadata.added.items()}
        self.vocab_size: int = max(ids.values()) + 1
        named = {name: ids[token] for name, token in metadata.tokens.items() if token in ids}
        builtin = model.eos_id() if model.eos_id() >= 0 else None
        self.end_ids: tuple[int, ...] = ordered_end_ids(
            str(path), [named.get("eos_token", builtin), *metadata.end_ids], self.vocab_size
        )
        control = {i for i in range(self._num_pieces) if model.is_control(i)}
        control |= {i for i, token in metadata.added.items() if token.special and i != model.unk_id()}
        self._strings = ["" if model.is_unused(i) else model.id_to_piece(i) for i in range(self._num_pieces)]
        self._strings += [""] * (self.vocab_size - self._num_pieces)
        for i, token in metadata.added.items():
            self._strings[i] = token.content
        self.pad_id: int = choose_pad_id(
            named.get("pad_token", model.pad_id()),
            model.unk_id(),
            {i: self._strings[i] for i in sorted(control)},
            self.end_ids,
            self.vocab_size,
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
        self.special_ids: frozenset[int] = frozenset(
            {*control, *self.end_ids, *named.values(), model.unk_id()}
        )
        # Not the named padding, which may be an ordinary piece.
        self._silent = frozenset({*control, *self.end_ids, model.unk_id()})
        strings = {self._strings[i] for i in self.special_ids} - {""}
        self.special_strings: tuple[str, ...] = tuple(sorted(strings))
        self._plain_ids = frozenset(i for i in metadata.added if i >= self._num_pieces) - self.special_ids
        self._plain = _Cutter(self._strings, self._plain_ids, metadata.added)
        self._any = _Cutter(self._strings, self._plain_ids | self.special_ids, metadata.added)
        self._model = _changed(model, as_control=self.special_ids)
        self._after = self._model
        if metadata.legacy is False:
            self._after = _changed(self._model, dummy_prefix=False)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`. Unknown characters become the unknown token or bytes."""
        ids: list[int] = []
        for start, piece in (self._any if special else self._plain).cut(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += (self._after if start else self._model).encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(i) for i in ids if i not in self._silent and 0 <= i < self.vocab_size]
        text, run, model = "", [], self._model
        for i in kept:
            if i < self._num_pieces:
                run.append(i)
                continue
            text += model.decode(run) + self._strings[i]
            run, model = [], self._after
        return text + model.decode(run)

    def token_strings(self) -> list[str]:
        """See `Tokenizer.token_strings`."""
        return list(self._strings)

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`. The .model file is copied as tokenizer.model, with the files beside it.

        transformers 5 makes its own tokenizer of it, which gives the same ids but for a text that begins
        with a space: it drops that space where the model adds one. SentencePiece itself does not.

        Raises:
            ValueError: a unigram model without tokenizer_config.json: what of transformers would read it?
        """
        settings = self._path.parent / "tokenizer_config.json"
        if not settings.is_file() and not self._is_bpe():
            raise ValueError(
                f"{self._path}: a unigram model without {settings.name} beside it; put that there, so that "
                "transformers knows how to read the model"
            )
        copy_file(self._path, folder / "tokenizer.model")
        copy_files(self._path.parent, folder, SETTINGS)
        if settings.is_file():
            return
        tokens = {name: self.template_tokens.get(name) for name in ("bos_token", "unk_token")}
        tokens["eos_token"] = self._strings[self.end_ids[0]]
        tokens["pad_token"] = self._strings[self.pad_id] if self.pad_id in self.special_ids else None
        write_settings(
            folder,
            tokens,
            None,  # chat_template.jinja is copied if there is one
            tokenizer_class="LlamaTokenizer",
            add_bos_token=self.bos_id is not None,
            add_prefix_space=self._model.encode("a", out_type=str)[0].startswith("▁"),
            legacy=True,
        )

    def _is_bpe(self) -> bool:
        # A BPE model scores its pieces 0, -1, -2 ...; a unigram model by log-probabilities.
        return all(self._model.get_score(i).is_integer() for i in range(self._num_pieces))


class _Cutter:
    """Cuts texts at the strings of some tokens, the longest first where several would fit."""

    def __init__(
        self, strings: Sequence[str], ids: Collection[int], added: Mapping[int, tokenizers.AddedToken]
    ):
        self._ids = sorted((i for i in ids if strings[i]), key=lambda i: (-len(strings[i]), i))
        patterns = []
        for i in self._ids:
            pattern, rules = re.escape(strings[i]), added.get(i)
            if rules is not None and rules.single_word:
                pattern = rf"(?<!\w){pattern}(?!\w)"
            if rules is not None and rules.lstrip:
                pattern = rf"\s*{pattern}"
            if rules is not None and rules.rstrip:
                pattern = rf"{pattern}\s*"
            patterns.append(f"({pattern})")
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def cut(self, text: str) -> Iterable[tuple[int, str | int]]:
        """Where each piece starts, and the piece: a text that is not empty, or a token's id."""
        start = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            if match.start() > start:
                yield start, text[start : match.start()]
            assert match.lastindex is not None
            yield match.start(), self._ids[match.lastindex - 1]
            start = match.end()
        if start < len(text):
            yield start, text[start:]


def _check_added(
    path: Path,
    model: sentencepiece.SentencePieceProcessor,
    ids: Mapping[str, int],
    added: Mapping[int, tokenizers.AddedToken],
) -> None:
    for i, token in added.items():
        if ids.get(token.content, i) != i or (i < len(ids) and token.content not in ids):
            piece = f"{model.id_to_piece(i)!r}" if i < model.get_piece_size() else "beyond the model's pieces"
            raise ValueError(
                f"{path}: id {i} is {piece}, but {token.content!r} in tokenizer_config.json or "
                "added_tokens.json; the files do not belong together, fetch them again"
            )


def _changed(
    model: sentencepiece.SentencePieceProcessor,
    *,
    as_control: Collection[int] = (),
    dummy_prefix: bool = True,
) -> sentencepiece.SentencePieceProcessor:
    """The model with those of some pieces that are user-defined as control tokens, or without its space in
    front of texts.

    A user-defined piece is found in any text. Gemma's turn marks are such pieces: a question could end its
    own turn by spelling one. No text contains control tokens.
    """
    proto = model.serialized_model_proto()
    if as_control:
        proto = _with_control(proto, as_control)
    if not dummy_prefix:
        proto += _NO_DUMMY_PREFIX
    if proto == model.serialized_model_proto():
        return model
    changed = sentencepiece.SentencePieceProcessor()
    changed.LoadFromSerializedProto(proto)
    return changed


def _with_control(proto: bytes, ids: Collection[int]) -> bytes:
    out, position, index = bytearray(), 0, 0
    while position < len(proto):
        if proto[position] != _PIECES_TAG:  # pieces come first; the rest stays as it is
            return bytes(out) + proto[position:]
        size, start = _varint(proto, position + 1)
        payload = proto[start : start + size]
        if index in ids and payload.endswith(_TYPE_USER_DEFINED):
            payload += _TYPE_CONTROL
        out += bytes([_PIECES_TAG]) + _as_varint(len(payload)) + payload
        position, index = start + size, index + 1
    return bytes(out)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def load_sentencepiece_tokenizer(path: Path) -> SentencePieceTokenizer:
    """A SentencePiece .model, with the Hugging Face files of the same folder as far as they are there.

    Raises:
        ValueError: not a SentencePiece model, no end token, or files that do not fit together.
    """
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error}); fetch it again") from None
    return SentencePieceTokenizer(model, read_metadata(path.parent), path)
