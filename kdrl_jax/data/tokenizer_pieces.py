"""Tokens as the parts of a text, for readers."""

from collections.abc import Sequence

from kdrl_jax.data.tokenizer import Tokenizer

_WINDOW = 32
"""Tokens that are decoded again for each further one, at most."""
_HALF = "\ufffd"
"""What bytes decode to that are no whole character yet."""


class TokenPieces:
    """What each token of a sequence adds to its text, and what a token reads as by itself."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._decode = tokenizer, tokenizer.decode
        self._strings = tokenizer.token_strings()
        self._anchor = tokenizer.encode("a")
        self._names: dict[int, str] = {}

    def split(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; joined they are `decode(ids)`.

        Empty for tokens that decoding leaves out, and for all bytes of a character but its last: that one
        has the character.
        """
        whole = self._decode(ids)
        pieces = self._in_windows(ids)
        return pieces if "".join(pieces) == whole else self._from_start(ids, whole)

    def _in_windows(self, ids: Sequence[int]) -> list[str]:
        """As `split`, of tokenizers whose text of a token depends on the token before it alone."""
        pieces: list[str] = []
        start, done = 0, ""
        for i in range(len(ids)):
            text = self._decode(ids[start : i + 1])
            if text.endswith(_HALF) and i + 1 < len(ids):
                pieces.append("")
                continue
            pieces.append(text[len(done) :])
            done = text
            if i - start >= _WINDOW:
                start, done = i, self._decode(ids[i : i + 1])
        return pieces

    def _from_start(self, ids: Sequence[int], whole: str) -> list[str]:
        """As `split`, of any tokenizer, in a time that grows with the square of the length: a token adds what
        its decoding has more in common with the whole text."""
        pieces, at = [], 0
        for i in range(1, len(ids)):
            text = self._decode(ids[:i])
            end = at
            while end < min(len(text), len(whole)) and text[end] == whole[end]:
                end += 1
            pieces.append(whole[at:end])
            at = end
        return [*pieces, whole[at:]] if len(ids) else []

    def name(self, token: int) -> str:
        """The token within a text, its leading space included; where it is none, as the vocabulary has it."""
        if token not in self._names:
            before, after = self._decode(self._anchor), self._decode([*self._anchor, token])
            text = after.removeprefix(before)
            known = self._strings[token] if token < len(self._strings) else ""
            self._names[token] = text if text and _HALF not in text else known or f"[{token}]"
        return self._names[token]
