"""The terms of the loss, summed over tokens: a config's choice among the functions of `objective`.

Everything here is a sum over the tokens it is given, with weights that were counted over the whole
minibatch before. So the same function serves a chunk of the vocabulary head, a microbatch or all rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kdrl_jax.config import Config
from kdrl_jax.config.estimators import BOUNDED
from kdrl_jax.config.schedules import Schedule, is_zero
from kdrl_jax.objective import kl, policy
from kdrl_jax.objective.divergence import Divergence
from kdrl_jax.objective.kdrl import sampled_kd_loss
from kdrl_jax.objective.masks import token_weights
from kdrl_jax.optim import make_schedule
from kdrl_jax.scoring import PackedRows, TokenScores
from kdrl_jax.types import Metrics, TrainBatch

NUM_QUARTERS = 4
"""Parts of the longest completion that KL is measured in."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """What the terms need of each completion token beside the student's scores; every array is [R, N].

    Weights are divided by what the whole minibatch holds, so that sums over its parts add up.
    """

    mask: jax.Array
    """bool: a completion token."""
    weights: jax.Array
    """Mean over all completion tokens, before masks (metrics)."""
    rl_weights: jax.Array
    kd_weights: jax.Array
    """With the token's scale, which is no part of the denominator."""
    part_weights: dict[str, jax.Array]
    """Means over parts of the completion tokens: `correct`, `wrong`, `q1` to `q4`."""
    advantages: jax.Array
    sampler: jax.Array
    """Log-probabilities of the sampled tokens, as are the next ones."""
    old: jax.Array | None
    teacher: jax.Array | None
    ref: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepScalars:
    """What schedules say at one step."""

    coefs: dict[str, jax.Array]
    """Of each term in use."""
    clip_low: jax.Array
    clip_high: jax.Array


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms that a config has in use."""

    config: Config

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Coefficient of every term there is."""
        c = self.config
        return {
            "rl": c.rl.coef,
            "kd": c.kd.coef,
            "ref": c.ref.coef,
            "entropy": c.entropy.coef,
            "sft": c.sft.coef,
        }

    @property
    def in_use(self) -> tuple[str, ...]:
        """Terms whose coefficient is not the constant 0; the others cost nothing."""
        return tuple(t for t, coef in self.schedules.items() if not is_zero(coef))

    @property
    def whole_rows(self) -> bool:
        """Whether a token's term depends on its whole completion."""
        return self.config.rl.loss == "gspo" and ("rl" in self.in_use or self._rewards_kd)

    @property
    def divergence(self) -> Divergence | None:
        """The divergence over the vocabulary that is asked of the head."""
        kd = self.config.kd
        if not self.config.teacher_states:
            return None
        top_k = kd.top_k if kd.estimator == "top_k" else None
        return Divergence(kd.divergence, kd.jsd_beta, kd.skew, top_k, kd.support)

    @property
    def _rewards_kd(self) -> bool:
        return "kd" in self.in_use and self.config.kd.placement == "reward"

    def scalars(self, step: jax.Array) -> StepScalars:
        """The schedules' values at a step."""
        coefs = {t: jnp.asarray(make_schedule(self.schedules[t])(step)) for t in self.in_use}
        rl = self.config.rl
        low, high = (jnp.asarray(make_schedule(s)(step)) for s in (rl.clip_low, rl.clip_high))
        return StepScalars(coefs, low, high)

    def inputs(self, batch: TrainBatch, rows: PackedRows) -> TokenInputs:
        """A whole minibatch's weights and values, before it is cut.

        Args:
            rows: where its completions lie.
        """
        c, f = self.config, batch.frozen
        mask, longest = batch.completion_mask_BT, c.rollout.max_new_tokens
        kd_weights = token_weights(batch.kd_mask_BT, mask, c.kd.denominator, max_new_tokens=longest)
        if batch.kd_scale_BT is not None:
            kd_weights = kd_weights * batch.kd_scale_BT

        def mean_over(part: jax.Array) -> jax.Array:
            return token_weights(mask & part, mask, "tokens", max_new_tokens=longest)

        correct = batch.correct_B[:, None]
        parts = {}
        if c.rollout.source != "dataset":  # whose completions nobody verifies
            parts = {"correct": mean_over(correct), "wrong": mean_over(~correct)}
        position = jnp.arange(mask.shape[1]) - batch.starts_B[:, None]
        quarter = position * NUM_QUARTERS // longest
        parts |= {f"q{i + 1}": mean_over(quarter == i) for i in range(NUM_QUARTERS)}
        by_position = TokenInputs(
            mask=mask,
            weights=mean_over(mask),
            rl_weights=token_weights(
                batch.rl_mask_BT, mask & batch.rl_rows_B[:, None], c.rl.denominator, max_new_tokens=longest
            ),
            kd_weights=kd_weights,
            part_weights=parts,
            advantages=batch.advantages_B,
            sampler=batch.sampler_logprobs_BT,
            old=batch.old_logprobs_BT,
            teacher=f.teacher_logprobs_BT,
            ref=f.ref_logprobs_BT,
        )
        return jax.tree.map(rows.take, by_position)

    def loss(self, scores: TokenScores, inputs: tuple[TokenInputs, StepScalars]) -> tuple[jax.Array, Metrics]:
        """The coefficient-weighted sum of all terms over some tokens, and sums for the metrics."""
        x, at = inputs
        terms = self.sums(scores, x, at)
        metrics = self._measure(scores, x) | {f"{t}/loss": value for t, value in terms.items()}
        weights, advantages = x.rl_weights, x.advantages
        if self._rewards_kd:
            # One surrogate of both: the clip looks at what RL and the teacher want together. Weights and
            # coefficients may stand inside, since the surrogate is homogeneous in the advantage.
            advantages = at.coefs["kd"] * x.kd_weights * self._kd_reward(scores, x)
            weights = x.kd_weights
            if "rl" in self.in_use:
                advantages += at.coefs["rl"] * x.rl_weights * x.advantages
                weights = weights + x.rl_weights
            loss, acts = self._policy(scores, x, at, advantages, weights)
            terms = {t: v for t, v in terms.items() if t not in ("rl", "kd")} | {"policy": jnp.sum(loss)}
            metrics |= _clip_fractions(acts, weights)
        elif "rl" in self.in_use:
            metrics |= _clip_fractions(self._policy(scores, x, at, advantages, weights)[1], weights)
        coefs = at.coefs | {"policy": jnp.ones(())}
        total = sum((coefs[t] * value for t, value in terms.items()), jnp.zeros(()))
        return total, jax.lax.stop_gradient(metrics)

    def sums(self, scores: TokenScores, x: TokenInputs, at: StepScalars) -> dict[str, jax.Array]:
        """Each term by itself, over some tokens."""
        terms: dict[str, jax.Array] = {}
        if "rl" in self.in_use:
            loss, _ = self._policy(scores, x, at, x.advantages, x.rl_weights)
            terms["rl"] = jnp.sum(x.rl_weights * loss)
        if "kd" in self.in_use:
            terms["kd"] = jnp.sum(self._kd(scores, x, at))
        if "ref" in self.in_use:
            assert x.ref is not None
            ref = self._sampled(self.config.ref.estimator, scores, x, x.ref, x.rl_weights)
            terms["ref"] = jnp.sum(x.rl_weights * ref)
        if "entropy" in self.in_use:
            terms["entropy"] = -jnp.sum(x.rl_weights * scores.entropy)
        if "sft" in self.in_use:
            terms["sft"] = -jnp.sum(x.rl_weights * scores.logprobs)
        return terms

    def _old(self, scores: TokenScores, x: TokenInputs) -> jax.Array:
        # Without recorded old log-probabilities the samples are the student's own, just drawn.
        return jax.lax.stop_gradient(scores.logprobs) if x.old is None else x.old

    def _trust(self, scores: TokenScores, x: TokenInputs) -> jax.Array | float:
        cap = self.config.rollout.importance_cap
        return 1.0 if cap is None else policy.truncated_weight(self._old(scores, x), x.sampler, cap)

    def _policy(
        self,
        scores: TokenScores,
        x: TokenInputs,
        at: StepScalars,
        advantages: jax.Array,
        weights: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The policy loss per token, and where the clip acts from below and from above.

        Args:
            weights: where they are 0 nothing is read, and the loss is that of a ratio of 1.
        """
        rl, student, old = self.config.rl, scores.logprobs, self._old(scores, x)
        if rl.anchor_share < 1:
            assert x.teacher is not None
            anchor = policy.mixture_anchor(old, x.teacher, rl.anchor_share, self._bound)
            old = _where_counted(weights, anchor, student)
        clip = (at.clip_low, at.clip_high)
        if rl.loss == "ppo":
            loss, low, high = policy.clipped_policy_loss(student, old, advantages, *clip)
        elif rl.loss == "cispo":
            loss, low, high = policy.cispo_loss(student, old, advantages, *clip)
        elif rl.loss == "gspo":
            loss, low, high = policy.gspo_loss(student, old, advantages, x.mask, *clip)
        else:
            return self._trust(scores, x) * policy.reinforce_loss(student, advantages), {}
        return self._trust(scores, x) * loss, {"low": low, "high": high}

    @property
    def _bound(self) -> kl.Bound | None:
        kd = self.config.kd
        return None if kd.max_abs_logratio is None else kl.Bound(kd.max_abs_logratio, kd.bound)

    @property
    def _kd_bound(self) -> kl.Bound | None:
        """Of the distillation term: an anchor may have one beside an estimator that has none."""
        return self._bound if self.config.kd.estimator in BOUNDED else None

    def _target(self, x: TokenInputs) -> jax.Array:
        """Log-probability of the sampled token that the student is pulled to."""
        assert x.teacher is not None
        if self.config.kd.extrapolation == 1:
            return x.teacher
        assert x.ref is not None
        return kl.extrapolate(x.teacher, x.ref, self.config.kd.extrapolation)

    def _kd_reward(self, scores: TokenScores, x: TokenInputs) -> jax.Array:
        return kl.k1_reward(scores.logprobs, self._target(x), self._kd_bound)

    def _sampled(
        self,
        estimator: str,
        scores: TokenScores,
        x: TokenInputs,
        target: jax.Array,
        weights: jax.Array,
        bound: kl.Bound | None = None,
    ) -> jax.Array:
        """An estimator per token, where its weights count."""
        target = _where_counted(weights, target, scores.logprobs)
        value = sampled_kd_loss(estimator, scores.logprobs, target, self._old(scores, x), bound)
        return self._trust(scores, x) * value

    def _kd(self, scores: TokenScores, x: TokenInputs, at: StepScalars) -> jax.Array:
        """The weighted distillation term per token."""
        if self._rewards_kd:
            return self._policy(scores, x, at, x.kd_weights * self._kd_reward(scores, x), x.kd_weights)[0]
        if scores.divergence is not None:
            return x.kd_weights * scores.divergence
        estimator, target = self.config.kd.estimator, self._target(x)
        return x.kd_weights * self._sampled(estimator, scores, x, target, x.kd_weights, self._kd_bound)

    def _measure(self, scores: TokenScores, x: TokenInputs) -> Metrics:
        """Sums that become means over the completion tokens, before masks; see `mean_of`."""
        out: Metrics = {"entropy": jnp.sum(x.weights * scores.entropy)}
        if self.config.samples_student:
            gap = jnp.abs(self._old(scores, x) - x.sampler)
            out["sampler/logprob_gap"] = jnp.sum(x.weights * gap)
            ratio = jnp.exp(scores.logprobs - x.sampler)
            sums = policy.effective_sample_sums(x.weights, ratio)
            out["ratio/mean"], out["ratio/mean_square"] = sums
        if x.ref is not None:
            out["ref/reverse_kl"] = jnp.sum(x.weights * (scores.logprobs - x.ref))
        measured = scores.reverse_kl
        if x.teacher is not None and self.config.samples_student:
            d = scores.logprobs - x.teacher
            out["kd/reverse_kl"] = jnp.sum(x.weights * d)
            measured = d if measured is None else measured
            if "rl" in self.in_use and "kd" in self.in_use:
                conflict = policy.signs_disagree(x.advantages, self._target(x), scores.logprobs)
                out["sign_conflict_frac"] = jnp.sum(x.weights * conflict)
            out |= self._bounds(scores, x)
        if scores.reverse_kl is not None:
            out["kd/reverse_kl_exact"] = jnp.sum(x.weights * scores.reverse_kl)
        if scores.teacher_mass is not None:
            out["kd/teacher_top_mass"] = jnp.sum(x.weights * scores.teacher_mass)
        if measured is not None:
            for name, w in x.part_weights.items():
                out |= mean_of(f"kd/reverse_kl_{name}", measured, w)
        return out

    def _bounds(self, scores: TokenScores, x: TokenInputs) -> Metrics:
        """Where the bound on log-ratios acts, in each term that has one."""
        out: Metrics = {}
        if "kd" in self.in_use and self._kd_bound is not None:
            acts = kl.bound_acts(scores.logprobs, self._target(x), self._kd_bound)
            out |= mean_of("kd/clip_frac", acts, x.kd_weights)
        if self.config.rl.anchor_share < 1 and x.teacher is not None and self._bound is not None:
            acts = kl.bound_acts(self._old(scores, x), x.teacher, self._bound)
            out |= mean_of("rl/anchor_clip_frac", acts, x.rl_weights)
        return out


def _where_counted(weights: jax.Array, value: jax.Array, student: jax.Array) -> jax.Array:
    """The value where it counts, else the student's own: 0 times what overflows would be no number."""
    return jnp.where(weights != 0, value, jax.lax.stop_gradient(student))


def _clip_fractions(acts: dict[str, jax.Array], weights: jax.Array) -> Metrics:
    out: Metrics = {}
    for side, where in acts.items():
        out |= mean_of(f"rl/clip_{side}_frac", where, weights)
    return out


_WEIGHT = "weight of "


def mean_of(name: str, value: jax.Array, weights: jax.Array) -> Metrics:
    """A weighted mean, as two sums that add up over parts; `finish_means` divides them."""
    return {name: jnp.sum(weights * value), _WEIGHT + name: jnp.sum(weights)}


def finish_means(sums: Metrics) -> Metrics:
    """The means of `mean_of`; nan over nothing."""
    out = {name: value for name, value in sums.items() if not name.startswith(_WEIGHT)}
    for name in out:
        if (weight := sums.get(_WEIGHT + name)) is not None:
            out[name] = jnp.where(weight > 0, out[name] / jnp.where(weight > 0, weight, 1.0), jnp.nan)
    return out
