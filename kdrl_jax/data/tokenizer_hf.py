"""Tokenizers of the `tokenizers` library: tokenizer.json and what lies beside it."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import processors

from kdrl_jax.data.tokenizer_files import SETTINGS, VOCABULARIES, copy_file, copy_files, write_settings
from kdrl_jax.data.tokenizer_metadata import TokenizerMetadata, choose_pad_id, ordered_end_ids, read_metadata


class HFTokenizer:
    """A `tokenizers.Tokenizer` behind the `Tokenizer` protocol, which documents the methods."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        metadata: TokenizerMetadata,
        place: str,
        *,
        source: Path | None = None,
    ):
        """Takes over `backend` and switches off what would change lengths.

        Args:
            backend: the tokenizer proper.
            metadata: end tokens, BOS, padding, chat template.
            place: the file it came from, for errors.
            source: the tokenizer.json it is, if it is one: saved as it was, with the files beside it.

        Raises:
            ValueError: a named token that the vocabulary lacks, or no end token.
        """
        # Files saved after training often still truncate or pad every text.
        backend.no_truncation()
        backend.no_padding()
        # Tokens added after tokenizer.json was written are in the other files alone.
        there = backend.get_added_tokens_decoder()
        backend.add_tokens([token for i, token in metadata.added.items() if i not in there])
        ids = backend.get_vocab(with_added_tokens=True)
        for token_id, added in metadata.added.items():
            if ids[added.content] != token_id:
                raise ValueError(
                    f"{place}: token {added.content!r} has id {ids[added.content]}, but {token_id} in "
                    "tokenizer_config.json or added_tokens.json; the files do not belong together, fetch "
                    "them again"
                )
        if (eos := metadata.tokens.get("eos_token")) is not None and eos not in ids:
            raise ValueError(f"{place}: eos_token {eos!r} of tokenizer_config.json is not in the vocabulary")
        named = {name: ids[token] for name, token in metadata.tokens.items() if token in ids}
        # Named tokens are special even where tokenizer.json does not say so; ids stay as they are. Tokens
        # it does know keep their own rules on surrounding spaces.
        known = backend.get_added_tokens_decoder()
        backend.add_special_tokens([metadata.tokens[name] for name, i in named.items() if i not in known])
        self._backend = backend
        self._source = source
        self._lock = threading.Lock()
        self.vocab_size: int = max(ids.values()) + 1
        self._strings = [""] * self.vocab_size
        for token, token_id in ids.items():
            self._strings[token_id] = token
        self.end_ids: tuple[int, ...] = ordered_end_ids(
            place, [named.get("eos_token"), *metadata.end_ids], self.vocab_size
        )
        special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.pad_id: int = choose_pad_id(
            named.get("pad_token"), named.get("unk_token"), special, self.end_ids, self.vocab_size
        )
        self.special_ids: frozenset[int] = frozenset(special)
        self.special_strings: tuple[str, ...] = tuple(special.values())
        # Not pad_id: where nothing else was free, padding is an ordinary token that means its text.
        self._silent = frozenset({*special, *self.end_ids})
        self.bos_id: int | None = None
        if metadata.add_bos if metadata.add_bos is not None else self._adds_bos(named.get("bos_token")):
            self.bos_id = named.get("bos_token")
        self.chat_template: str | None = metadata.chat_template
        self.template_tokens: Mapping[str, str] = dict(metadata.tokens)

    def _adds_bos(self, bos_id: int | None) -> bool:
        with_added = self._backend.encode("a", add_special_tokens=True).ids
        return bos_id is not None and with_added[:1] == [bos_id]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        with self._lock:  # the switch belongs to the shared backend
            self._backend.encode_special_tokens = not special
            return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(i) for i in ids if i not in self._silent and 0 <= i < self.vocab_size]
        return self._backend.decode(kept, skip_special_tokens=False)

    def token_strings(self) -> list[str]:
        """See `Tokenizer.token_strings`."""
        return list(self._strings)

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`. A tokenizer.json is copied with the files beside it; what came from another
        kind of file is written anew."""
        if self._source is not None:
            copy_file(self._source, folder / "tokenizer.json")
            copy_files(self._source.parent, folder, SETTINGS + VOCABULARIES)
            if (self._source.parent / "tokenizer_config.json").is_file():
                return
            # Left to guess from config.json, transformers may take the backend apart for a class of its own.
            template = None  # chat_template.jinja, copied
        else:
            self._with_bos().save(str(folder / "tokenizer.json"))
            template = self.chat_template
        bos, pad = self.template_tokens.get("bos_token"), self._strings[self.pad_id]
        tokens = {
            "bos_token": bos,
            "eos_token": self._strings[self.end_ids[0]],
            # A named pad is a special token to every reader; a borrowed one means its text.
            "pad_token": pad if self.pad_id in self.special_ids else None,
            "unk_token": self.template_tokens.get("unk_token"),
        }
        write_settings(
            folder,
            tokens,
            template,
            tokenizer_class="PreTrainedTokenizerFast",
            add_bos_token=self.bos_id is not None,
        )

    def _with_bos(self) -> tokenizers.Tokenizer:
        # Readers before transformers 5 go by the post-processor, later ones by add_bos_token.
        if self.bos_id is None:
            return self._backend
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        bos = self._strings[self.bos_id]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, self.bos_id)]
        )
        return backend


def load_hf_tokenizer(path: Path) -> HFTokenizer:
    """A tokenizer.json, with tokenizer_config.json, special_tokens_map.json, generation_config.json and
    chat_template.jinja of the same folder.

    Raises:
        ValueError: a file that cannot be read, or no end token.
    """
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{path}: not a tokenizer of the `tokenizers` library ({error}); fetch it again"
        ) from None
    return HFTokenizer(backend, read_metadata(path.parent), str(path), source=path)
