"""Log-probabilities, entropies and exact divergences of completions, without ever holding [B, T, V].

Completions are cut out of their rows (`windows`), their states meet the vocabulary a few tokens at a time
(`passes`), and give scores or, with a loss per token, gradients (`head`).
"""

from kdrl_jax.scoring.frozen import RowScores, make_row_scorer, score_tokens
from kdrl_jax.scoring.head import head_loss, score_predictors
from kdrl_jax.scoring.types import HeadSettings, TeacherSide, TokenLoss, TokenScores
from kdrl_jax.scoring.windows import predictors, unwindow, window

__all__ = [
    "HeadSettings",
    "RowScores",
    "TeacherSide",
    "TokenLoss",
    "TokenScores",
    "head_loss",
    "make_row_scorer",
    "predictors",
    "score_predictors",
    "score_tokens",
    "unwindow",
    "window",
]
