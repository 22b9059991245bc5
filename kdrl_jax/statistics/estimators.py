"""What several answers to one question say of it: pass@k and the vote of the majority."""

import math

import numpy as np


def pass_sizes(num_samples: int) -> list[int]:
    """The k of pass@k that are reported of so many samples: powers of two up to their number."""
    return [1 << i for i in range(num_samples.bit_length())]


def pass_at_k(correct_P: np.ndarray, num_samples: int, k: int) -> np.ndarray:
    """The probability that of k answers at least one is right, without bias, for each question.

    1 - C(n - c, k) / C(n, k) for c right ones of n (Chen et al. 2021, arXiv 2107.03374, eq. 1): the share of
    all choices of k among the n that hold a right one. In whole numbers of any size and rounded once, so
    exact for any n, where a product of factors would round in each.

    Args:
        correct_P: int [P], from 0 to `num_samples`: right answers to each question.
        num_samples: n.
        k: from 1 to n.

    Returns:
        float64 [P].

    Raises:
        ValueError: k or a count is out of range.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples; k is from 1 to {num_samples}")
    correct_P = np.asarray(correct_P)
    if correct_P.size and not 0 <= correct_P.min() <= correct_P.max() <= num_samples:
        raise ValueError(
            f"{correct_P.min()} to {correct_P.max()} right answers of {num_samples}; give counts of that many"
        )
    choices = math.comb(num_samples, k)
    of_count = [(choices - math.comb(num_samples - c, k)) / choices for c in range(num_samples + 1)]
    return np.array(of_count)[correct_P]


def majority(votes_PN: np.ndarray, correct_PN: np.ndarray) -> np.ndarray:
    """Whether the most common answer to each question is right (self-consistency, arXiv 2203.11171).

    An answer that says nothing (-1) has no vote, as in the paper, where what cannot be parsed is left out; a
    question without votes counts as wrong. Among answers with equally many votes one is drawn: the result is
    the mean over all such draws, so that it does not depend on the order of samples. The same holds where a
    verifier judges equal answers differently.

    Args:
        votes_PN: int [P, N]: equal numbers in a row are equal answers; -1 for none.
        correct_PN: bool [P, N]: the verdict on each.

    Returns:
        float64 [P], from 0 to 1.
    """
    same_PNN = (votes_PN[:, :, None] == votes_PN[:, None, :]) & (votes_PN >= 0)[:, :, None]
    support_PN = same_PNN.sum(-1)
    most_P = support_PN.max(-1, initial=0)
    # All supporters of a tied answer are as many, so their mean is the mean over the tied answers.
    drawn_PN = (support_PN == most_P[:, None]) & (most_P > 0)[:, None]
    num_P = drawn_PN.sum(-1)
    return np.where(num_P > 0, (drawn_PN & correct_PN).sum(-1) / np.maximum(num_P, 1), 0.0)
