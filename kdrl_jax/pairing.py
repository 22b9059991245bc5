"""Whether student and teacher mean the same by the same id: compared before a weight of either is read.

A run has one tokenizer (the student's, unless the config names another), which encodes prompts and decodes
completions for both models. Where another model would read an id as another token, distillation is noise:
that is a problem, and the pair is refused. Where the ids mean the same but the other model is used to see
them otherwise (split, wrapped in a chat template), the pair works; a note says so.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from kdrl_jax.data.chat import ChatMode, render_prompt
from kdrl_jax.data.tokenizer import Tokenizer
from kdrl_jax.models.decoder_config import DecoderConfig

NO_MEANING = re.compile(
    r"|\[PAD\d*\]|<\|?(pad|extra|dummy|reserved|unused|placeholder)\w*\|?>", re.IGNORECASE
)
"""Strings of ids that no text encodes to: none at all, or padding that fills a vocabulary up."""

PROBES = (
    "0 7 42 123 1234 1234567 3.14159 1,000,000 -5 2^10 99% $12.50 007",
    "\\frac{3}{4} \\cdot \\sqrt{2x+1} = \\boxed{\\text{B}}, \\quad \\left( a_1 \\right)^{n-1} $x \\leq y$",
    'def f(x):\n    return {"k": x[1:]} if x != 0 else None  # it\'s done\n\n\nif __name__ == "__main__":\n'
    "\tprint(f'{f(3)!r}')\n",
    "It's what they'll say: WE'VE done camelCase and snake_case, haven't we? (See https://a.b/c?d=1&e.)",
    "na\u00efve caf\u00e9 cafe\u0301 \u2014 \u4f60\u597d\uff0c\u4e16\u754c "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \U0001f642"
    "\U0001f469\u200d\U0001f680 \ufb01 \u2163 \u00bd x\u00b2 \u2264",
    "a  b   c    d        e\t\tf \t g  ",
    "  one\ntwo\n\nthree\n\n\n  four \n \n\r\nfive\r\n",
)
"""Texts on which tokenizers of one vocabulary part: digits, LaTeX, code, apostrophes, composed and
decomposed Unicode, runs of spaces, newlines."""

_QUESTION = "What is 12 + 7?"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two models, as far as it is known before anything of it is loaded."""

    name: str
    """`student` or `teacher`."""
    config: DecoderConfig
    tokenizer: Tokenizer | None
    """Its own; None for random weights, which take whatever tokenizer the run has."""


@dataclasses.dataclass(frozen=True)
class Pairing:
    """What a comparison found."""

    num_tokens: int
    """Ids that are sampled and scored, [0, num_tokens): the tokenizer's, less padding at its end for which
    one of the models has no column. Columns from here on are masked."""
    problems: tuple[str, ...]
    """Why the models cannot be used together; each says what to do."""
    notes: tuple[str, ...]
    """What someone who knows it may want to change."""

    def require(self) -> "Pairing":
        """Itself, if there are no problems.

        Raises:
            ValueError: all problems, in one line.
        """
        if self.problems:
            raise ValueError("; and ".join(self.problems))
        return self


def compare(
    used: Tokenizer,
    sides: Sequence[Side],
    *,
    same_end: bool,
    longest: int,
    prompt_template: str = "{question}",
    chat: ChatMode = "auto",
) -> Pairing:
    """Compares the models of a run with its tokenizer, and so with each other.

    Args:
        used: the run's tokenizer: one of the sides' own, or another.
        sides: the student, and the teacher if there is one.
        same_end: whether end ids must be the same; with `kd.end_token: false` they may differ.
        longest: tokens of the longest row, prompt and completion.
        prompt_template, chat: how the run writes its prompts.
    """
    problems: list[str] = []
    notes: list[str] = []
    # Whose it is; `run` is a tokenizer that the config names, or the built-in one.
    name = next((s.name for s in sides if s.tokenizer is used), "run")
    for side in sides:
        other = side.tokenizer
        if other is None or other is used:
            continue
        # As a user thinks of it: the student first.
        pair = ((name, used), (side.name, other))
        if side.name == "student":
            pair = pair[::-1]
        found = _vocabulary_problem(*pair)
        problems += [found] if found else []
        if same_end and (found := _end_problem(*pair)):
            problems.append(found)
        if not problems:
            notes += _special_notes(*pair, used=name)
            notes += _reading_notes((name, used), (side.name, other), prompt_template, chat)
    needed = _num_needed(used)
    for side in sides:
        if needed > side.config.vocab_size:
            problems.append(
                f"the tokenizer has {needed} tokens, but the {side.name} has rows for "
                f"{side.config.vocab_size}: it is not this model's tokenizer"
            )
        if longest > side.config.longest:
            problems.append(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}, but the {side.name} was made "
                f"for {side.config.longest} positions; lower one of them"
            )
    widths = {side.name: side.config.vocab_size for side in sides}
    num_tokens = min(used.vocab_size, *widths.values())
    if len(set(widths.values())) > 1:
        columns = " and ".join(f"{width} ({name})" for name, width in widths.items())
        notes.append(f"{num_tokens} shared tokens; heads of {columns} columns, padding masked")
    return Pairing(num_tokens, tuple(problems), tuple(notes))


_Named = tuple[str, Tokenizer]


def _vocabulary_problem(a: _Named, b: _Named) -> str | None:
    """The first ten ids that mean different tokens. Ids without meaning may differ: no text uses them."""
    ours, theirs = a[1].token_strings(), b[1].token_strings()
    size = max(len(ours), len(theirs))
    ours += [""] * (size - len(ours))
    theirs += [""] * (size - len(theirs))
    different = [
        (i, x, y)
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True))
        if x != y and not (NO_MEANING.fullmatch(x) and NO_MEANING.fullmatch(y))
    ]
    if not different:
        return None
    shown = "; ".join(f"{i}: {x!r} vs {y!r}" for i, x, y in different[:10])
    return (
        f"{a[0]} and {b[0]} do not share a vocabulary: {len(different)} of {size} tokens differ, first "
        f"(id: {a[0]} vs {b[0]}) {shown}. Distillation compares the two models id by id: take models of one "
        "family with their own tokenizer (tokenizer.kind=model)"
    )


def _end_problem(a: _Named, b: _Named) -> str | None:
    if set(a[1].end_ids) == set(b[1].end_ids):
        return None

    def shown(tokenizer: Tokenizer) -> str:
        strings = tokenizer.token_strings()
        return "{" + ", ".join(f"{i}: {strings[i]!r}" for i in sorted(tokenizer.end_ids)) + "}"

    return (
        f"end ids differ, {a[0]} {shown(a[1])} vs {b[0]} {shown(b[1])}. If the vocabularies are the same, "
        "kd.end_token=false leaves the end token out of distillation"
    )


def _num_needed(tokenizer: Tokenizer) -> int:
    """Columns that a model must have: up to the last id that can stand in a row."""
    strings = tokenizer.token_strings()
    meaning = (i for i in range(len(strings) - 1, -1, -1) if not NO_MEANING.fullmatch(strings[i]))
    return 1 + max(next(meaning, 0), tokenizer.pad_id, *tokenizer.end_ids)


def _silent_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that `decode` leaves out."""
    return tokenizer.special_ids | set(tokenizer.end_ids)


def _special_notes(a: _Named, b: _Named, used: str) -> Iterator[str]:
    """Tokens that only one of two tokenizers of one vocabulary treats as control tokens."""
    strings = max(a[1].token_strings(), b[1].token_strings(), key=len)
    kinds = [(a[0], _silent_ids(a[1])), (b[0], _silent_ids(b[1]))]
    for (name, ids), (other, others) in (kinds, kinds[::-1]):
        only = [i for i in sorted(ids - others) if not NO_MEANING.fullmatch(strings[i])]
        if only:
            shown = ", ".join(f"{i}: {strings[i]!r}" for i in only[:10])
            yield (
                f"{len(only)} tokens are special for the {name} and ordinary text for the {other}, first "
                f"{shown}. Rewards see completions without the tokens that are special for the {used}; "
                "tokenizer.path can name the tokenizer to use"
            )


def _reading_notes(used: _Named, other: _Named, template: str, chat: ChatMode) -> Iterator[str]:
    """How text reaches the model that `other` belongs to, where it was trained to see it otherwise."""
    prompts = [_prompt(t, template, chat) for _, t in (used, other)]
    written = [_text(t, ids) for (_, t), ids in zip((used, other), prompts, strict=True)]
    splits = [[_encode(t, text) for _, t in (used, other)] for text in PROBES]
    if written[0] == written[1]:
        splits.append(prompts)
    found = next((pair for pair in splits if pair[0] != pair[1]), None)
    if found is not None:
        at = _first_difference(*found)
        shown = [_pieces(t, ids[at : at + 6]) for (_, t), ids in zip((used, other), found, strict=True)]
        yield (
            f"text is split otherwise by the {used[0]}, {shown[0]}, and by the {other[0]}, {shown[1]}. The "
            f"{used[0]}'s splits are used, which the {other[0]} was not trained on; tokenizer.path can name "
            "the tokenizer to use"
        )
    if written[0] == written[1] or not all(prompts):
        return
    (bos, rest), (other_bos, other_rest) = map(_bos_and_rest, (used[1], other[1]), prompts)
    if rest == other_rest:
        yield (
            f"prompts begin with {bos} as the {used[0]} has it, which is used; the {other[0]}'s own "
            f"tokenizer begins them with {other_bos}. add_bos_token in tokenizer_config.json decides, or the "
            "chat template"
        )
        return
    at = max(0, _first_difference(*written) - 10)
    cut = [f"{'…' if at else ''}{s[at : at + 80]}{'…' if len(s) > at + 80 else ''}" for s in written]
    yield (
        f"prompts are written as the {used[0]} has them, {cut[0]!r}; by the {other[0]}'s own chat template "
        f"they would be {cut[1]!r}. tokenizer.chat_template and data.prompt_template choose the form"
    )


def _prompt(tokenizer: Tokenizer, template: str, chat: ChatMode) -> list[int]:
    try:
        return render_prompt(tokenizer, _QUESTION, template, chat)
    except ValueError:  # reported where prompts are made, if it is the run's tokenizer
        return []


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError:  # the char tokenizer knows ASCII only
        return []


def _bos_and_rest(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[int]]:
    if tokenizer.bos_id is None or ids[:1] != [tokenizer.bos_id]:
        return "no BOS", ids
    return f"BOS {_text(tokenizer, ids[:1])!r}", ids[1:]


def _first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each id's text; the token as the vocabulary has it where it is no text by itself."""
    strings = tokenizer.token_strings()
    texts = ((i, tokenizer.decode([i])) for i in ids)
    return [strings[i] if not text or "\ufffd" in text else text for i, text in texts]


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """`decode`, with the tokens it leaves out written as well."""
    silent = _silent_ids(tokenizer)
    strings = tokenizer.token_strings()
    text, run = "", list[int]()
    for i in ids:
        if i in silent:
            text, run = text + tokenizer.decode(run) + strings[i], []
        else:
            run.append(i)
    return text + tokenizer.decode(run)
