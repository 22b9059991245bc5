"""What the words around a number make of it: `5 apples` is 5; `5 million` and `half of 5` are not.

Words that are not known to change a value leave it alone, as no list holds all things that can be counted.
"""

import re
from fractions import Fraction

from kdrl_jax.rewards import units

_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_NEGATIVE = frozenset({"negative", "minus"})
_CHANGING_BEFORE = frozenset(
    {"not", "no", "non", "nor", "never", "neither", "cannot", "without", "except", "than", "least",
     "most", "up", "over", "under", "above", "below", "beyond", "exceeds", "exceeding", "half", "third",
     "quarter", "fourth", "fifth", "sixth", "eighth", "tenth", "twice", "double", "triple", "thrice",
     "times", "plus", "root", "square", "squared", "cube", "cubed", "factorial", "reciprocal",
     "inverse", "opposite", "negation", "absolute", "logarithm", "point", "zero", "one", "two", "three",
     "four", "five", "six", "seven", "eight", "nine", "ten"}
)  # fmt: skip
_CHANGING_AFTER = frozenset(
    {"factorial", "plus", "minus", "than", "not", "except", "below", "squared", "cubed", "halves",
     "thirds", "fourths", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths", "hundredths",
     "thousandths", "millionths", "wrong", "incorrect", "false", "impossible", "undefined", "extraneous"}
)  # fmt: skip
_ADJACENT = frozenset({"squared", "cubed"})
"""Behind a unit these belong to it: 5 meters squared."""
_MATHEMATICS = frozenset(
    {"pi", "sqrt", "log", "ln", "exp", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos",
     "arctan", "sinh", "cosh", "tanh", "mod", "and", "or"}
)  # fmt: skip
_SHORT = frozenset(
    {"a", "i", "is", "of", "in", "so", "an", "as", "at", "by", "if", "it", "me", "my", "on", "to", "us",
     "we", "he", "do", "be", "am"}
)  # fmt: skip
"""Words of one or two letters, where others are products of letters; a and i only before another word."""
_PASSED_OVER = frozenset({"of", "the", "a", "an", "to", "only", "just"})
"""Between a number and the word that changes it: half of the 5."""
_WORD = re.compile(r"[A-Za-z]+")
_RESIDUE = re.compile(r"[A-Za-z .,:;!?'\"$€£¥%°/²³µμΩ()]*")
_AND_A_PART = re.compile(r" and (?:a|one) (?:half|third|quarter)\b")


def is_word(run: str) -> bool:
    """Whether a run of letters is a word rather than a product: three letters or more with a vowel among
    them, not in the order of the alphabet (abc, xyz). Capitals alone are points or options in an order."""
    if len(run) < 3 or run in "abcdefghijklmnopqrstuvwxyz":
        return False
    return run.isupper() or any(letter in "aeiouAEIOU" for letter in run)


def _scale(words: list[str]) -> tuple[Fraction, list[str]]:
    """The factor that the first words are, and the words behind them."""
    factor = Fraction(1)
    while words and (scale := _SCALES.get(words[0].lower().removesuffix("s"))):
        factor, words = factor * scale, words[1:]
    return factor, words


def factor(before: str, after: str) -> Fraction | None:
    """What to multiply a number by for the words around it, all of them; None if something else stands there,
    or the words change the value in another way.

    Args:
        before, after: the text at its two sides, without powers of units.
    """
    if (
        not (_RESIDUE.fullmatch(before) and _RESIDUE.fullmatch(after))
        or before[-1:].isalpha()
        or "(" in before
    ):
        return None
    sign, words = Fraction(1), _WORD.findall(before)
    if words and words[-1].lower() in _NEGATIVE:
        sign = Fraction(-1)
        words.pop()
    if not _all_words(words) or any(_changes(word, _CHANGING_BEFORE | _NEGATIVE) for word in words):
        return None
    if units.read_unit(after) is not None:
        return None if _is_product(after) else sign
    if "(" in after or _is_product(after):
        return None
    scale, words = _scale(_WORD.findall(after))
    if words and words[0].lower() in _ADJACENT:
        return None
    if any(_changes(word, _CHANGING_AFTER - _ADJACENT) for word in words) or not _all_words(
        words, with_units=True
    ):
        return None
    return sign * scale


def _is_product(after: str) -> bool:
    """Whether a number's next character is a letter that is no unit there: 2ab, 2m."""
    close = re.match(r"[A-Za-zµμΩ]+", after)
    return close is not None and not units.is_written_close(close[0])


def _changes(word: str, changing: frozenset[str]) -> bool:
    return word.lower() in changing or word.lower().removesuffix("s") in _SCALES


def _all_words(words: list[str], with_units: bool = False) -> bool:
    for at, word in enumerate(words):
        small = word.lower()
        if small in _MATHEMATICS:
            return False
        if len(word) == 1 and small in _SHORT and (at + 1 == len(words) or len(words[at + 1]) == 1):
            return with_units and units.is_unit(word)
        if not (is_word(word) or small in _SHORT or (with_units and units.is_unit(word))):
            return False
    return True


def beside(before: str, after: str) -> Fraction | None:
    """As `factor`, for a number in prose: by the words next to it alone."""
    clause = re.split(r"[.,;:!?()=]", before)[-1]
    words = [word.lower() for word in _WORD.findall(clause)][-5:]
    sign = Fraction(1)
    if words and words[-1] in _NEGATIVE:
        if re.search(r"[0-9] ?(?:minus|negative)\W*$", clause, re.IGNORECASE):
            return None  # 10 minus 5
        sign = Fraction(-1)
    else:
        while words and words[-1] in _PASSED_OVER:
            words.pop()
        if words and words[-1] in _CHANGING_BEFORE - {"up"}:  # she picked up 10
            return None
    close = re.match(r"[A-Za-z]{1,2}(?![A-Za-z])", after)
    if close is not None and not units.is_unit(close[0]) and close[0] not in ("st", "nd", "rd", "th"):
        return None  # 72x
    following = re.match(r" ?((?:[A-Za-z]+ ?){0,3})", after)
    scale, words = _scale(following[1].lower().split() if following else [])
    if (words and words[0] in _CHANGING_AFTER) or _AND_A_PART.match(after):
        return None
    return sign * scale


_SCALE_WORD = re.compile(rf"(?i)\b({'|'.join(_SCALES)})s?\b")


def without_scales(text: str, question: str) -> str:
    """The text without million, dozen and the like where the question has the word: there it may be what is
    counted, so that `7 dozen` answers `How many dozen eggs ...?` as 7 does."""
    asked = {word.lower() for word in _SCALE_WORD.findall(question)}
    if not asked:
        return text
    return _SCALE_WORD.sub(lambda match: "" if match[1].lower() in asked else match[0], text)


def without_nouns(text: str) -> str:
    """An expression without the words behind it (`2\\sqrt{3} apples`); the text itself if some of them change
    its value or are no words."""
    words = text.split(" ")
    at = len(words)
    while at > 0 and _WORD.fullmatch(words[at - 1].rstrip(".,")):
        at -= 1
    value, nouns = " ".join(words[:at]), [word.rstrip(".,") for word in words[at:]]
    if len(nouns) > 0 and _WORD.fullmatch(nouns[0]) and not is_word(nouns[0]):
        return text
    if not value or not nouns or not _all_words(nouns):
        return text
    changing = _CHANGING_AFTER | _CHANGING_BEFORE
    return text if any(_changes(word, changing) for word in nouns) else value
