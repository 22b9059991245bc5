"""Questions of `reasoning-gym` (github.com/open-thought/reasoning-gym, arXiv 2505.24760), with their answers.

Its generators alone are used. Its scorers never are: those of number_sorting, spiral_matrix, binary_matrix,
n_queens and string_insertion call `eval` on what a model wrote, and a generator, codeio, runs code of its
data. Answers are compared by `reward.verifier`, so a task is of use only if its answer is one text.
"""

import difflib
import hashlib
import traceback
from collections import Counter
from typing import Any

from kdrl_jax.config.data import GymSourceConfig
from kdrl_jax.data.rows import BadRows, Row

# These have the library's own scorer for tasks with a single answer (`ProceduralDataset.score_answer`, which
# compares the texts). acre has it too, but its row i depends on more than i.
_COMPARED = (
    "aiw",
    "arc_1d",
    "base_conversion",
    "basic_arithmetic",
    "bf",
    "binary_alternation",
    "caesar_cipher",
    "count_bits",
    "count_primes",
    "course_schedule",
    "gcd",
    "isomorphic_strings",
    "largest_island",
    "lcm",
    "leg_counting",
    "letter_counting",
    "list_functions",
    "mahjong_puzzle",
    "maze",
    "modulo_grid",
    "number_filtering",
    "number_sequence",
    "ransom_note",
    "rotate_matrix",
    "rotten_oranges",
    "simple_equations",
    "simple_geometry",
    "string_manipulation",
    "string_splitting",
    "string_synthesis",
    "syllogism",
    "word_sequence_reversal",
)
# These have scorers of their own, which take other spellings, or give a part for being near; the right answer
# is one number, one word or one name all the same.
_LENIENT = (
    "bitwise_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "circuit_logic",
    "color_cube_rotation",
    "decimal_chain_sum",
    "dice",
    "family_relationships",
    "fraction_simplification",
    "game_of_life_halting",
    "gsm_symbolic",
    "needle_haystack",
    "products",
    "rectangle_count",
    "self_reference",
    "spell_backward",
    "string_insertion",
    "zebra_puzzles",
)
TASKS = frozenset(_COMPARED + _LENIENT)
"""Generators whose answers are one text, and whose row i follows from the seed and i (looked at in version
0.1.25)."""

ROWS_CHECKED = 100
"""Some generators take a tenth of a second for a row."""


class GymSource:
    """Rows of a generator, made when asked for."""

    in_memory = False
    may_change = True

    def __init__(self, config: GymSourceConfig):
        """Makes the generator.

        Raises:
            ImportError: reasoning-gym is not installed.
            ValueError: another task, or settings that it does not have.
        """
        if config.task not in TASKS:
            near = difflib.get_close_matches(config.task, sorted(TASKS), n=3, cutoff=0.5) or sorted(TASKS)
            raise ValueError(
                f"task={config.task!r} is none of the generators of reasoning-gym with one right answer in "
                f"text; nearest: {', '.join(near)}"
            )
        try:
            import reasoning_gym
        except ImportError:
            raise ImportError(
                f"{config.task}: for kind=gym, pip install 'kdrl_jax[gym]' (reasoning-gym)"
            ) from None
        self.name = f"{config.task}/{config.seed}"
        self.bad = BadRows(0)
        self.left_out: Counter[str] = Counter()
        self._size = config.size
        self._settings = f"task={config.task}, options={config.options}"
        self.num_checked = min(config.size, ROWS_CHECKED)
        try:
            self._rows = reasoning_gym.create_dataset(
                config.task, **config.options, seed=_far_seed(config.seed), size=config.size
            )
        except (TypeError, ValueError, AssertionError) as error:
            raise self._of_options(error) from error
        self[0]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        try:
            row: dict[str, Any] = self._rows[index]
        except Exception as error:
            # Of the library's code, by options that it did not think of: in any class.
            raise self._of_options(error, f"row {index}: ") from error
        return Row(row["question"], row["answer"], None, self.name)

    def _of_options(self, error: Exception, place: str = "") -> ValueError:
        return ValueError(
            f"{self._settings}: {place}{_reason(error)}; see the generator's config in reasoning-gym"
        )

    def place(self, index: int) -> str:
        """See `Source.place`."""
        return f"{self.name} row {index}"


def _reason(error: Exception) -> str:
    """What an error of the library says; of one that says nothing, the line it comes from."""
    said = " ".join(str(error).split())[:200]
    return said or f"{type(error).__name__} of `{traceback.extract_tb(error.__traceback__)[-1].line}`"


def _far_seed(seed: int) -> int:
    """Row i of the library's seed s is row i - 1 of its seed s + 1: neighbouring seeds would share rows. Of
    two hashed seeds of 100,000 rows each, that is so with a chance of 1 in 20,000."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
