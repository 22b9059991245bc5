"""Which questions are passed over, by how this run's own completions of them did."""

import base64
import hashlib
from collections.abc import Sequence

import numpy as np

from kdrl_jax.config.data import CurriculumConfig

Place = tuple[int, int]
"""The number of a source, and of a row in it."""

TRIES = 100
"""Questions looked at for one draw; where all would be passed over, the last is taken all the same."""

_MIXED, _SOLVED, _UNSOLVED = 0, 1, 2
"""What became of a question: both, or not sampled yet; all its completions were right; all were wrong."""


class Curriculum:
    """What became of each question when it was last sampled.

    Whether a question is passed over, and which takes its place, follows from the seed, the position of the
    draw and this table alone, so that a position and a table are all there is to save. The table is the same
    on every process: it is made of verdicts that all of them have.
    """

    def __init__(self, config: CurriculumConfig, sizes: Sequence[int], seed: int):
        """Nothing is known yet.

        Args:
            sizes: rows of each source; 0 for one whose questions are not kept.
            seed: of the choices.
        """
        self._skip = {_SOLVED: config.skip_solved, _UNSOLVED: config.skip_unsolved}
        self._seed = seed
        self._table = [np.zeros(size, np.uint8) for size in sizes]

    def choose(self, position: int, place: Place) -> Place:
        """What is drawn at a position where the stream has `place`: that, or another row of its source."""
        source, row = place
        table = self._table[source]
        for attempt in range(TRIES if len(table) else 0):
            outcome = int(table[row])
            if outcome == _MIXED:
                break
            chance, other = _random(f"{self._seed}/{position}/{attempt}")
            if chance >= self._skip[outcome]:
                break
            row = other % len(table)
        return source, row

    def observe(self, places: Sequence[Place], correct_PG: np.ndarray) -> None:
        """Takes notice of verdicts on the groups of some draws: bool, of each completion."""
        for (source, row), correct_G in zip(places, correct_PG, strict=True):
            if len(self._table[source]):
                outcome = _SOLVED if correct_G.all() else _MIXED if correct_G.any() else _UNSOLVED
                self._table[source][row] = outcome

    def shares(self) -> tuple[float, float]:
        """Shares of the questions of which all, and of which no completions were right last time."""
        whole = np.concatenate(self._table)
        return float(np.mean(whole == _SOLVED)), float(np.mean(whole == _UNSOLVED))

    def get_state(self) -> dict[str, list[str]]:
        """The table, ready for JSON: for each source a bit per row, in base64."""
        return {
            name: [_encode(table == outcome) for table in self._table]
            for name, outcome in (("solved", _SOLVED), ("unsolved", _UNSOLVED))
        }

    def set_state(self, state: dict[str, list[str]] | None) -> None:
        """Continues from `get_state` of a table of the same sizes; None is an empty one."""
        for table in self._table:
            table[:] = _MIXED
        for name, outcome in (("solved", _SOLVED), ("unsolved", _UNSOLVED)):
            for table, text in zip(self._table, state[name] if state else (), strict=False):
                table[_decode(text, len(table))] = outcome


def _random(key: str) -> tuple[float, int]:
    """(a number from [0, 1), a whole number below 2**64), as a hash has them."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53, int.from_bytes(digest[8:], "big")


def _encode(bits: np.ndarray) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _decode(text: str, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=size).astype(bool)
