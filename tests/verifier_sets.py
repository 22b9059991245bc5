"""The golden and hostile sets of tests/golden, for tests and benchmarks."""

import json
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "verifiers.tsv"
HOSTILE = Path(__file__).parent / "golden" / "hostile.jsonl"


@dataclass(frozen=True)
class Row:
    verifier: str
    """With its pattern: `regex:PATTERN`."""
    gold: str
    completion: str
    is_right: bool
    answer: str
    """As written in the file."""


def golden() -> list[Row]:
    """See the head of the file."""
    rows = []
    for line in GOLDEN.read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        verifier, how, gold, verdict, *answers = line.split("\t")
        assert how in ("boxed", "text"), line
        assert verdict in ("=", "!"), line
        assert answers, line
        for answer in answers:
            text = answer if how == "text" else rf"So the answer is $\boxed{{{answer}}}$."
            texts = (part.replace("⏎", "\n") for part in (gold, text))
            rows.append(Row(verifier, *texts, verdict == "=", answer))
    return rows


def hostile() -> list[str]:
    """Texts made to hang, crash or get into a verifier: each line is a beginning, a part and how often it is
    repeated, and an end."""
    texts = []
    for line in HOSTILE.read_text("utf-8").splitlines():
        row = json.loads(line)
        texts.append(
            row.get("before", "") + row.get("repeat", "") * row.get("times", 0) + row.get("after", "")
        )
    return texts
