"""Whether a training question is one of the held-out ones, or shares a long run of words with one."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

# One spelling for what TeX and Unicode have several for. By hand and first: NFKC makes 10² into 102.
_SIGNS = str.maketrans(
    {"×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "⁄": "/", "−": "-", "–": "-", "≤": "<=", "≥": ">=",
     "π": " pi ", "θ": " theta ", "√": " sqrt ", "∞": " infty ", "°": "^ circ "}
    | {raised: f"^{digit}" for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)  # fmt: skip
_VULGAR = re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])")
_LATEX = [
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox"
                r"|quad|qquad)(?![A-Za-z])|\\[,;:! ]|[$~]"), " "),
    (re.compile(r"(?<=\w)\*\*(?=\w)|(?<=\w) \*\* (?=\w)"), "^"),  # and not what is printed bold
    (re.compile(r"\*\*"), " "),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\leq?(?![A-Za-z])|\\leqslant(?![A-Za-z])"), "<="),
    (re.compile(r"\\geq?(?![A-Za-z])|\\geqslant(?![A-Za-z])"), ">="),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(\\frac ?)([0-9]) ?([0-9])"), r"\1 \2 \3 "),
]  # fmt: skip
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,|\{,\})(?=[0-9]{3}(?![0-9]))")
# Signs of arithmetic are words: 3 + 4 is another question than 3 * 4. A number and a letter beside it are two
# words, as 2x and 2 x are the same; where a script has no spaces, each character is one. All else is dropped.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[0-9]+(?:\.[0-9]+)?|[{_UNSPACED}]|[^\W_0-9{_UNSPACED}]+|[-+*/^=<>%]")


def words(question: str) -> list[str]:
    """The words of a question in one spelling: lower case, compatible characters and TeX's spellings of a
    sign alike, no punctuation."""
    text = question
    if not text.isascii():
        text = _VULGAR.sub(" ", text).translate(_SIGNS)
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    if "\\" in text or "$" in text or "**" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    return _WORDS.findall(_THOUSANDS.sub("", text).casefold())


class HeldOutQuestions:
    """Held-out questions by their runs of words; looking one up takes time in proportion to its length."""

    def __init__(self, questions: Iterable[str], ngram: int | None):
        """Reads the questions.

        Args:
            ngram: words in a row that no other question may share; None compares questions whole.
        """
        self._ngram = ngram
        self._found: dict[str, str] = {}
        digest = hashlib.blake2b(digest_size=8)
        for question in questions:
            for key in self._keys(question):
                self._found.setdefault(key, question)
            digest.update(question.encode() + b"\0")
        self.digest = digest.hexdigest()
        """Of the questions in their order."""

    def match(self, question: str) -> str | None:
        """The first held-out question that this one overlaps with, or None."""
        return next((found for key in self._keys(question) if (found := self._found.get(key))), None)

    def _keys(self, question: str) -> Iterable[str]:
        # A question without a word (of pictograms) is compared as it is written.
        found, n = words(question) or [question.strip()], self._ngram
        # A question as short as that has no run of n words; a run never equals it, being longer.
        if n is None or len(found) < n:
            return (" ".join(found),)
        return (" ".join(found[i : i + n]) for i in range(len(found) - n + 1))
