"""What is optimised: the terms of the loss, their coefficients, masks and denominators."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdrl_jax.config.base import AboveZero, Flag, Positive, Section
from kdrl_jax.config.estimators import SAMPLED, Estimator, Placement, check_pair, check_unnormalised
from kdrl_jax.config.schedules import Schedule, constant

Denominator = Literal["tokens", "all_tokens", "sequences", "max_tokens"]
"""What a term's sum over the minibatch is divided by: `tokens`, the tokens its mask keeps; `all_tokens`, all
completion tokens, kept or not; `sequences`, the completions it keeps, each counting its own token mean;
`max_tokens`, completions x rollout.max_new_tokens, a constant (Dr. GRPO)."""

OpenFraction = Annotated[float, Field(strict=True, gt=0, lt=1)]


class RLConfig(Section):
    """The policy term: task reward, compared within each group."""

    coef: Schedule = constant(1.0)
    loss: Literal["ppo", "cispo", "gspo", "reinforce"] = "ppo"
    """`ppo`: clipped ratio per token (GRPO, DAPO); `cispo`: clipped, stopped ratio times log-probability;
    `gspo`: one clipped ratio per completion; `reinforce`: no ratio. See `objective.policy`."""
    advantage: Literal["grpo", "grpo_no_std", "rloo"] = "grpo"
    """Reward minus the group's mean, divided by its standard deviation (`grpo`) or not (Dr. GRPO); or minus
    the mean of the others (`rloo`)."""
    clip_low: Schedule = constant(0.2)
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: Schedule = constant(0.2)
    anchor_share: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    """Share of the old policy in what the ratio is taken against, the rest being the teacher's (TRRD,
    arXiv 2602.22495): (pi/pi_old)^share (pi/pi_T)^(1 - share). 1 is the plain ratio. `ppo` only."""
    denominator: Denominator = "tokens"
    truncated: Flag = True
    """Whether completions that were cut off for length are trained on."""
    resample_rounds: Annotated[int, Field(strict=True, ge=0, le=16)] = 0
    """Further rounds of sampling, at most, to replace groups whose answers are all rewarded alike (DAPO's
    dynamic sampling; what comes off for length is left aside). Others still distil: an update is on twice as
    many groups as train.prompts_per_iteration."""


class KDConfig(Section):
    """The distillation term: student against teacher on the same tokens."""

    coef: Schedule = constant(0.0)
    estimator: Estimator = "k2"
    """How the divergence is estimated at each token; `config.estimators` has the gradient of each."""
    placement: Placement = "loss"
    """`loss`: a term of its own; `reward`: added to the advantage, after that was normalised. Useless pairs
    are refused."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"] = (
        "reverse_kl"
    )
    """With `full` and `top_k`: which divergence over the vocabulary; see `objective.divergence`."""
    jsd_beta: OpenFraction = 0.5
    """Weight of the teacher in the mixture of `jsd` (GKD, arXiv 2306.13649)."""
    skew: OpenFraction = 0.1
    """Share of the first distribution that is mixed into the second, with `skew_*` (DistiLLM, 2402.03898)."""
    top_k: Positive = 64
    """With estimator `top_k`: so many tokens, and one bucket for all others."""
    support: Literal["student", "teacher"] = "student"
    """Whose most likely tokens `top_k` takes."""
    mask: Literal["none", "response", "group", "response_correct", "group_solved"] = "none"
    """`response`: only wrong completions; `group`: only groups without a correct one; `response_correct` and
    `group_solved`: only the others."""
    group_weight: Literal["none", "failure_rate"] = "none"
    """`failure_rate`: a group's tokens count by its share of wrong completions."""
    teacher_entropy_scale: AboveZero | None = None
    """A token's term is multiplied by exp(-H / scale), H being the teacher's entropy there in nats."""
    denominator: Denominator = "tokens"
    end_token: Flag = True
    """Whether the final end token is distilled (turn off when end tokens differ in meaning)."""
    truncated: Flag = True
    """Whether completions that were cut off for length are distilled."""
    max_abs_logratio: AboveZero | None = None
    """Bound on log pi_S - log pi_T inside k1, k2 and score_function (counted in `kd/clip_frac`), and inside
    rl.anchor_share (counted in `rl/anchor_clip_frac`)."""
    bound: Literal["clip", "tanh"] = "clip"
    """How max_abs_logratio bounds."""
    extrapolation: AboveZero = 1.0
    """The target is pi_ref (pi_T / pi_ref)^extrapolation (G-OPD, arXiv 2602.12125); 1 is the teacher."""
    mixture: dict[str, AboveZero] | None = None
    """Weights of several `teachers`, all of which score every completion: the target is the weighted mean of
    their distributions."""

    @model_validator(mode="after")
    def _check(self) -> "KDConfig":
        check_pair(self.estimator, self.placement)
        e = self.estimator
        if self.bound != "clip" and self.max_abs_logratio is None:
            raise ValueError(f"bound={self.bound} says how max_abs_logratio bounds, which is not set")
        if self.divergence != "reverse_kl" and e in SAMPLED:
            raise ValueError(
                f"divergence={self.divergence} is over the vocabulary, but kd.estimator={e} looks at sampled "
                "tokens; set kd.estimator=full (or top_k)"
            )
        unread = {
            "top_k": self.top_k != 64 and e != "top_k",
            "support": self.support != "student" and e != "top_k",
            "jsd_beta": self.jsd_beta != 0.5 and self.divergence != "jsd",
            "skew": self.skew != 0.1 and not self.divergence.startswith("skew"),
        }
        for name in (name for name, is_unread in unread.items() if is_unread):
            raise ValueError(
                f"{name}={getattr(self, name)} is read by nothing with kd.estimator={e} and "
                f"kd.divergence={self.divergence}; leave it out"
            )
        if self.extrapolation != 1:
            check_unnormalised(e)
        return self


class RefConfig(Section):
    """Reverse KL to a frozen reference: `reference`, or the student as it started. Off at 0."""

    coef: Schedule = constant(0.0)
    estimator: Literal["k2", "k3_forward", "score_function"] = "k2"
    """As for kd; `k3_forward` is what GRPO's paper adds, and follows the forward KL."""


class EntropyConfig(Section):
    """Bonus for the entropy of the student's distribution at each token that RL trains."""

    coef: Schedule = constant(0.0)


class SFTConfig(Section):
    """Imitation of completions that the student did not sample."""

    coef: Schedule = constant(0.0)
    """Weight of -log pi_S(completion); needs `rollout.source: dataset` or `teacher`."""
