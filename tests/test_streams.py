"""A stream of prompts goes on exactly from any step, for any number of processes, as a plain loop has it."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import write_jsonl
from test_sources import stored

from kdrl_jax.config.data import DataConfig
from kdrl_jax.data.curriculum import TRIES
from kdrl_jax.data.decontaminate import words
from kdrl_jax.data.prompts import PromptStream, open_prompts
from kdrl_jax.data.sources import open_source
from kdrl_jax.data.tokenizer import CharTokenizer
from kdrl_jax.types import Prompts

GROUP = 3
STEPS = 8
MAX_TOKENS = 6


def open_stream(config: DataConfig, num: int, seed: int, rows: np.ndarray | None = None) -> PromptStream:
    return open_prompts(
        config,
        CharTokenizer(),
        chat_template="auto",
        prompts_per_iteration=num,
        seed=seed,
        needs_completion=False,
        rows=rows,
    )


def verdicts(questions: list[str], iteration: int) -> np.ndarray:
    """bool [B], made up: many groups are all right or all wrong, and not always the same ones."""
    out = []
    for question in questions:
        kind = hashlib.sha256(f"{question}/{iteration // 3}".encode()).digest()[0] % 4
        out.append([[True] * GROUP, [False] * GROUP, [True, False, True], [True] * GROUP][kind])
    return np.array(out, bool).ravel()


class Plain:
    """The same stream, written as a loop over lists: each source's rows that can be used, an order for each
    epoch, and a table of outcomes."""

    def __init__(self, config: DataConfig, seed: int, positions: int):
        self.config, self.seed = config, seed
        held_out = {" ".join(words(q)) for q in self.held_out()} if config.decontaminate else set()

        def usable(question: str) -> bool:
            return len(question) <= MAX_TOKENS and " ".join(words(question)) not in held_out

        self.usable = usable
        self.sources = [open_source(c, False) for c in config.train]
        self.kept = [
            [source[i].question for i in range(len(source)) if usable(source[i].question)]
            if source.in_memory
            else None
            for source in self.sources
        ]
        self.outcomes: dict[tuple[int, int], bool] = {}
        # How grain takes sources in turn by their weights, and permutes, is its own; what follows is not.
        weights = [c.weight for c in config.train]
        endless = [grain.MapDataset.source([i]).repeat() for i in range(len(weights))]
        turns = grain.MapDataset.mix(endless, weights)
        self.source_of = [turns[p] for p in range(positions)]
        self.orders: dict[tuple[int, int], list[int]] = {}

    def held_out(self) -> list[str]:
        return [
            s[i].question for s in (open_source(c, False) for c in self.config.eval) for i in range(len(s))
        ]

    def order(self, source: int, epoch: int, size: int) -> list[int]:
        if (source, epoch) not in self.orders:
            digest = hashlib.blake2b(f"{self.seed}/{source}".encode(), digest_size=4).digest()
            seed = (int.from_bytes(digest, "big") + epoch) % 2**32
            shuffled = grain.MapDataset.range(size).shuffle(seed=seed)
            self.orders[source, epoch] = [shuffled[i] for i in range(size)]
        return self.orders[source, epoch]

    def place(self, position: int) -> tuple[int, int]:
        source = self.source_of[position]
        nth = self.source_of[:position].count(source)
        kept = self.kept[source]
        size = len(self.sources[source]) if kept is None else len(kept)
        row = self.order(source, nth // size, size)[nth % size]
        if self.config.curriculum is not None and kept is not None:
            for attempt in range(TRIES):
                if (source, row) not in self.outcomes:
                    break
                solved = self.outcomes[source, row]
                c = self.config.curriculum
                digest = hashlib.blake2b(
                    f"{self.seed}/{position}/{attempt}".encode(), digest_size=16
                ).digest()
                chance = int.from_bytes(digest[:8], "big") / 2**64
                if chance >= (c.skip_solved if solved else c.skip_unsolved):
                    break
                row = int.from_bytes(digest[8:], "big") % size
        return source, row

    def draw(self, first: int, num: int, iteration: int) -> list[str]:
        places = [self.place(p) for p in range(first, first + num)]
        questions = []
        for source, row in places:
            kept = self.kept[source]
            if kept is not None:
                questions.append(kept[row])
            else:
                made = self.sources[source]
                rows = (made[i % len(made)].question for i in itertools.count(row))
                questions.append(next(q for q in rows if self.usable(q)))
        if self.config.curriculum is not None:
            for place, right in zip(places, verdicts(questions, iteration).reshape(num, GROUP), strict=True):
                self.outcomes.pop(place, None)
                if right.all() or not right.any():
                    self.outcomes[place] = bool(right.all())
        return questions


def next_of(streams: list[PromptStream], rows: list[np.ndarray], iteration: int) -> list[Prompts]:
    """A draw by all processes, each of which then learns all verdicts."""
    drawn = [next(stream) for stream in streams]
    questions = {int(d): q for p in drawn for d, q in zip(p.draws_P, p.questions, strict=True)}
    right = verdicts([questions[d] for d in sorted(questions)], iteration)
    for stream, prompts in zip(streams, drawn, strict=True):
        stream.observe(prompts, right)
    return drawn


KINDS = ("jsonl", "parquet", "array_record", "task")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


def make_source(kind: str, folder: Path, number: int, size: int) -> dict[str, Any]:
    if kind == "task":
        return {"kind": kind, "task": "chain_sum", "size": size, "max_value": 12, "max_terms": 3}
    if kind == "gym":
        return {"kind": kind, "task": "number_sequence", "size": size}
    rows = [{"question": f"{number}+{i}" + "0" * (4 * (i % 3 == 2)), "answer": i} for i in range(size)]
    return stored(kind, folder, rows, f"{kind}{number}_{size}")


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Sources, seed, prompts an iteration, processes, and where to stop."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    num_processes = draw(st.sampled_from([1, 2, 4]))
    return {
        "kinds": kinds,
        "sizes": [draw(st.integers(6, 30)) for _ in kinds],
        "weights": [draw(st.sampled_from([0.3, 1.0, 2.5])) for _ in kinds],
        "seed": draw(st.integers(0, 2**32 - 1)),
        "num": num_processes * draw(st.integers(1, 2)),
        "num_processes": num_processes,
        "stop": draw(st.integers(0, STEPS - 1)),
        "decontaminate": draw(st.booleans()),
        "curriculum": draw(
            st.none() | st.fixed_dictionaries({"skip_solved": st.sampled_from([0.0, 0.6, 1.0]),
                                               "skip_unsolved": st.sampled_from([0.4, 1.0])})
        ),
    }  # fmt: skip


def config_of(mixture: dict[str, Any], folder: Path) -> DataConfig:
    train = [
        make_source(kind, folder, i, size) | {"weight": weight}
        for i, (kind, size, weight) in enumerate(
            zip(mixture["kinds"], mixture["sizes"], mixture["weights"], strict=True)
        )
    ]
    held_out = write_jsonl(
        folder / "held_out.jsonl",
        *({"question": q, "answer": 1} for q in ("0+1", "1+0", " 2 + 1 ", "7+5", "3+4+5")),
    )
    curriculum = mixture["curriculum"] if {*mixture["kinds"]} - {"task", "gym"} else None
    return DataConfig.model_validate(
        {
            "train": train,
            "eval": [{"kind": "jsonl", "path": str(held_out)}],
            "max_prompt_tokens": MAX_TOKENS,
            "decontaminate": {"ngram": 13} if mixture["decontaminate"] else None,
            "curriculum": curriculum,
        }
    )


def check(mixture: dict[str, Any], folder: Path) -> None:
    config, num, seed = config_of(mixture, folder), mixture["num"], mixture["seed"]
    plain = Plain(config, seed, STEPS * num)
    expected = [plain.draw(i * num, num, i) for i in range(STEPS)]

    through = open_stream(config, num, seed)
    states = []
    for i in range(STEPS):
        states.append(json.loads(json.dumps(through.get_state())))
        (drawn,) = next_of([through], [np.arange(num)], i)
        assert list(drawn.questions) == expected[i]
        assert drawn.draws_P.tolist() == list(range(i * num, (i + 1) * num))

    # From a state, by another number of processes; one draw that is then given up, as when a run is stopped.
    stop, per = mixture["stop"], num // mixture["num_processes"]
    rows = [np.arange(num).reshape(per, -1).T[i] for i in range(mixture["num_processes"])]
    resumed = [open_stream(config, num, seed, r) for r in rows]
    for stream in resumed:
        next(stream)
        stream.set_state(states[stop])
    for i in range(stop, min(stop + 3, STEPS)):
        assert all(stream.get_state() == states[i] for stream in resumed)
        drawn_of = next_of(resumed, rows, i)
        by_draw = {int(d): q for p in drawn_of for d, q in zip(p.draws_P, p.questions, strict=True)}
        assert [by_draw[i * num + j] for j in range(num)] == expected[i]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixture=mixtures())
def test_any_stream_goes_on_from_any_step(mixture: dict[str, Any], folder: Path) -> None:
    check(mixture, folder)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mixture=mixtures())
def test_any_of_a_thousand_streams_goes_on_from_any_step(mixture: dict[str, Any], folder: Path) -> None:
    check(mixture, folder)


def test_gym_and_hub_go_on_from_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("test_streams.MAX_TOKENS", 21)  # some questions of number_sequence are longer
    mixture = {
        "kinds": ["gym", "hub"], "sizes": [17, 5], "weights": [1.0, 1.0], "seed": 5, "num": 4,
        "num_processes": 2, "stop": 4, "decontaminate": True,
        "curriculum": {"skip_solved": 0.6, "skip_unsolved": 0.4},
    }  # fmt: skip
    check(mixture, tmp_path)
