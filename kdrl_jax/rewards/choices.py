"""Verifiers of answers that are a letter, or that a pattern finds."""

import re
from collections.abc import Callable

from kdrl_jax.rewards.answers import MAX_TEXT_CHARS, clean, find_marked, normalise

_MARKED = re.compile(
    r"(?:(?i:option|choice|answer)(?: is)?:? ?)?"
    r"(?:[(\[] ?(?P<inner>[A-Za-z]) ?[)\]](?: .*)?|(?P<bare>[A-Za-z])(?:[.:)](?: .*)?)?)"
)
"""All that a marked answer says: `C`, `(C)`, `(C) 12`, `C. 12`, `Option C`; not `A circle`."""
_LINE = re.compile(r"(?:[(\[] ?(?P<inner>[A-Z]) ?[)\]]\.?|(?P<bare>[A-Z])(?:[.:)](?: .*)?)?)")
"""The same of a last line, in which `(C) is wrong` may stand."""
_LETTER = (
    r"(?:option |choice )?(?P<open>\()? ?(?-i:(?P<letter>[A-Z]|[a-z](?=\))))(?![\w'’])"
    r"(?P<rest> ?\)| ?[.,;:!*]| ?$| (?:because|since|as|so|for)\b)?"
)
_RIGHT = (
    r" ?\)?(?: is| would be| must be) (?:the )?"
    r"(?:(?:correct|right|best)(?: answer| choice| option)?|answer)\b"
)
_STATED = re.compile(
    r"(?:\banswer(?: (?:choice|option))?(?: is| should be| must be)?|\b(?:option|choice)(?: is|:)"
    r"|\b(?:is|be) (?:option|choice)|\bI (?:choose|pick|select)) ?:? ?" + _LETTER,
    re.IGNORECASE,
)
"""That a letter is the answer; or what is said before it, `C is correct`."""
_CALLED_RIGHT = re.compile(r"(?<![\w'’])(?-i:(?P<letter>[A-Z]))" + _RIGHT, re.IGNORECASE)
_MENTIONED = re.compile(r"\b(?:option|choice) ?" + _LETTER, re.IGNORECASE)
"""An option that is spoken of, with nothing said of it where it ends the clause."""
_LAST = re.compile(r"\(([A-Z])\)")


def choice(question: str, completion: str, answer: str) -> float:
    """1 if the completion chooses the gold answer's letter, else 0.

    Its choice is the letter in its last `\\boxed{...}` or after its last `####`; else the last one that it
    states (`the answer is (C)`, `Answer: C`, `C is correct`); else an option that it ends a clause with
    (`so option C.`), if that is the only one; else its last line if that is a letter, or the last `(C)` in
    it. A or I with other words behind it is a word, not a letter.

    Raises:
        ValueError: if the gold answer is no letter.
    """
    marked_gold = find_marked(answer)
    gold = _letter(_MARKED, _plain(answer if marked_gold is None else marked_gold.answer))
    if gold is None:
        raise ValueError(
            f"the gold answer {answer[-80:]!r} is no letter; use reward.verifier=exact or math for such data"
        )
    return float(chosen(completion) == gold)


def _letter(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.fullmatch(text)
    return None if match is None else (match["inner"] or match["bare"]).upper()


def chosen(completion: str) -> str | None:
    """The letter that a completion chooses, as `choice` has it; None if it chooses none."""
    marked = find_marked(completion)
    if marked is not None:
        return _letter(_MARKED, _plain(marked.answer))
    lines = [_plain(line) for line in completion[-MAX_TEXT_CHARS:].strip().splitlines()[-3:]]
    for line in reversed(lines):
        if stated := _stated(line[-1000:]):
            return stated
    for line in reversed(lines):
        mentioned = {m["letter"].upper() for m in _MENTIONED.finditer(line[-1000:])}
        if len(mentioned) == 1 and any(m["rest"] is not None for m in _MENTIONED.finditer(line[-1000:])):
            return mentioned.pop()
    last = lines[-1] if lines else ""
    in_brackets = _LAST.findall(last)
    return _letter(_LINE, last) or (in_brackets[-1] if in_brackets else None)


def _stated(line: str) -> str | None:
    """The last letter that a line says is the answer."""
    found = [(m.start("letter"), m["letter"]) for m in _CALLED_RIGHT.finditer(line)]
    for m in _STATED.finditer(line):
        if m["letter"] not in "AI" or m["open"] or m["rest"] is not None:
            found.append((m.start("letter"), m["letter"]))
    return max(found)[1].upper() if found else None


def _plain(text: str) -> str:
    return " ".join(clean(text[-MAX_TEXT_CHARS:]).replace("$", "").split()).strip()


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Raises ValueError: it is no pattern."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"reward.pattern={pattern!r} is no regular expression: {error}") from error


def last_group(pattern: re.Pattern[str], completion: str) -> str | None:
    """What the first group holds in the last match; None without a match, or if it has no part in it."""
    found = None
    for match in pattern.finditer(completion[-MAX_TEXT_CHARS:]):
        found = match[1]
    return found


def make_regex(pattern: str) -> Callable[[str, str, str], float]:
    """The `regex` function of a pattern.

    With a group, 1 if what the group holds in the last match anywhere in the completion is the gold answer,
    as `exact` compares them; without one, 1 if the pattern matches the whole completion, whatever the gold
    answer. A pattern that runs on and on is ended by the worker's time limit.

    Raises:
        ValueError: if it is no pattern.
    """
    compiled = compile_pattern(pattern)

    def regex(question: str, completion: str, answer: str) -> float:
        if not compiled.groups:
            return float(compiled.fullmatch(completion[-MAX_TEXT_CHARS:]) is not None)
        found = last_group(compiled, completion)
        marked = find_marked(answer)
        gold = normalise(answer if marked is None else marked.answer)
        if not gold:
            raise ValueError(f"the gold answer {answer[-80:]!r} is empty; check data.*.answer_field")
        return float(found is not None and normalise(found) == gold)

    return regex
