"""Log-probabilities, entropies and exact divergences of completions, without ever holding [B, T, V].

Rollouts are laid into packed rows (`packing` decides where, `packs` does it and holds the shift), which go
through a model in passes (`microbatches`). The states that predict completion tokens meet the vocabulary a
few tokens at a time (`passes`), and give scores or, with a loss per token, gradients (`head`).
"""

from kdrl_jax.scoring.details import TokenDetails, describe_predictors
from kdrl_jax.scoring.frozen import PackScores, make_scorer, score_rows
from kdrl_jax.scoring.head import head_loss, score_predictors
from kdrl_jax.scoring.microbatches import Bounds, map_passes, sum_passes, take_pass
from kdrl_jax.scoring.packing import PackShape, Places, passes_needed, place
from kdrl_jax.scoring.packs import PackedRows, Packs, pack
from kdrl_jax.scoring.types import HeadSettings, TeacherSide, TeacherStates, TokenLoss, TokenScores

__all__ = [
    "Bounds",
    "HeadSettings",
    "PackScores",
    "PackShape",
    "PackedRows",
    "Packs",
    "Places",
    "TeacherSide",
    "TeacherStates",
    "TokenDetails",
    "TokenLoss",
    "TokenScores",
    "describe_predictors",
    "head_loss",
    "make_scorer",
    "map_passes",
    "pack",
    "passes_needed",
    "place",
    "score_predictors",
    "score_rows",
    "sum_passes",
    "take_pass",
]
