"""Evaluations of a model on held-out questions.

`evaluator` answers the questions and has the answers verified, `results` makes numbers with intervals of the
verdicts, `agreement` compares student and teacher on the teacher's answers.
"""

from kdrl_jax.evaluate.agreement import Agreement
from kdrl_jax.evaluate.evaluator import Evaluation, Evaluator, OnStep, eval_sampler, take
from kdrl_jax.evaluate.results import Results

__all__ = [
    "Agreement",
    "Evaluation",
    "Evaluator",
    "OnStep",
    "Results",
    "eval_sampler",
    "take",
]
