"""Which checkpoints are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """What is kept; a checkpoint that any of the three wants stays."""

    last: int
    """The newest so many."""
    every: int = 0
    """Those of steps that are multiples of it; 0: none for that reason."""
    best: int = 0
    """So many with the highest accuracies; see `best_steps`."""

    def __call__(self, steps: Sequence[int], accuracies: Mapping[int, float]) -> set[int]:
        """Of the steps of checkpoints, those to keep.

        Args:
            accuracies: by step; a checkpoint without one is none of the best.
        """
        newest = set(sorted(steps)[-self.last :])
        regular = {step for step in steps if self.every and step % self.every == 0}
        return newest | regular | set(best_steps(steps, accuracies, self.best))


def best_steps(steps: Sequence[int], accuracies: Mapping[int, float], num: int) -> list[int]:
    """So many of the steps with the highest accuracies, the best first, of equal ones the newer; fewer if no
    more have one."""
    ranked = sorted(((accuracies[step], step) for step in steps if step in accuracies), reverse=True)
    return [step for _, step in ranked[:num]]
