"""Rounds of sampling, and which of their groups an iteration trains on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdrl_jax.config import Config
from kdrl_jax.hosts import Share, gather, spread
from kdrl_jax.hosts import total as total_over_hosts
from kdrl_jax.metrics import completion_metrics, repeated_ngrams, reward_metrics
from kdrl_jax.objective.advantages import has_signal, length_reward, overlong_penalty
from kdrl_jax.rewards.pool import Scored, function_names, is_correct, total
from kdrl_jax.rollout.finish import finish_reason
from kdrl_jax.sharding import rows as row_sharding
from kdrl_jax.types import Metrics, Prompts, Rollouts


@dataclasses.dataclass(frozen=True)
class Round:
    """Completions of one draw of prompts, with all that is known of them."""

    prompts: Prompts
    """Of the rows that this process holds."""
    rollouts: Rollouts
    share: Share
    """Which rows these are, and which of them this process answers for."""
    ids: list[np.ndarray]
    """Each completion's tokens, of the rows that this process answers for."""
    texts: list[str]
    """Of the same rows."""
    scored: list[Scored] | None
    """Verdicts on the same rows; None for completions of a dataset."""
    rewards_B: np.ndarray
    """float32: verifier and shaping; 0 for completions of a dataset."""
    correct_B: np.ndarray
    """bool: the verifier's verdict."""
    parts: dict[str, np.ndarray]
    """float32 [B] each: what each function scored, before its weight, and 0 if it failed; empty for
    completions of a dataset."""
    lengths_B: np.ndarray
    """int32: completion tokens."""
    ended_B: np.ndarray
    """bool: as in `Rollouts`."""
    max_new_tokens: int
    """Tokens that a completion could have."""
    idle_frac: float | None
    """Share of slots' steps without a row; None where nothing was sampled."""
    sources: list[str]
    """Of each row, the source of its prompt."""

    def length_parts(self, config: Config) -> dict[str, np.ndarray]:
        """float32 [B] each: the rewards for length in use, before their weights."""
        r, lengths, parts = config.reward, jnp.asarray(self.lengths_B), {}
        if r.overlong_buffer:
            parts["overlong"] = overlong_penalty(lengths, self.max_new_tokens, r.overlong_buffer)
        if r.length_weight:
            correct = jnp.asarray(self.correct_B)
            parts["length"] = length_reward(lengths, correct, config.rollout.group_size)
        return {name: np.asarray(part, np.float32) for name, part in parts.items()}

    def total_rewards(self, config: Config) -> np.ndarray:
        """float32 [B]: all that is rewarded."""
        r = config.reward
        weights = {"overlong": r.overlong_penalty, "length": r.length_weight}
        rewards = self.rewards_B
        for name, part in self.length_parts(config).items():
            rewards = rewards + weights[name] * part
        return rewards


def verdicts(
    config: Config, scored: Sequence[Scored] | None, share: Share
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """`Round.rewards_B`, `correct_B` and `parts`, from the verdicts on the rows of each process."""
    r = config.reward
    if scored is None:
        return np.zeros(share.num_rows, np.float32), np.zeros(share.num_rows, bool), {}
    names, num_held = function_names(r.verifier, r.shaping), len(share.held)
    rewards, correct = np.zeros(num_held, np.float32), np.zeros(num_held, bool)
    scores = np.zeros((num_held, len(names)), np.float32)
    rewards[share.owned] = [total(s, r.verifier, r.shaping) for s in scored]
    correct[share.owned] = [is_correct(s, r.verifier) for s in scored]
    for i, name in enumerate(names):
        scores[share.owned, i] = [s.scores[name] for s in scored]
    parts = dict(zip(names, gather(scores, share).T, strict=True))
    return gather(rewards, share), gather(correct, share), parts


def wants_another(config: Config, rounds: Sequence[Round]) -> bool:
    """Whether groups without signal are to be replaced by those of a further round."""
    if len(rounds) > config.rl.resample_rounds:
        return False
    return _signals(config, rounds).sum() < config.train.prompts_per_iteration


def _signals(config: Config, rounds: Sequence[Round]) -> np.ndarray:
    """bool, for each group drawn: by the answers; that lengths differ is no reason to keep a group."""
    rewards = np.concatenate([r.rewards_B for r in rounds])
    return np.asarray(has_signal(jnp.asarray(rewards), config.rollout.group_size))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The rows that an iteration trains on."""

    rollouts: Rollouts
    rewards_B: jax.Array
    correct_B: jax.Array
    rl_rows_B: jax.Array | None
    """bool: rows that RL is about; None for all."""
    sources: list[str]
    """Of each row."""


def choose(config: Config, rounds: Sequence[Round], mesh: Mesh) -> Chosen:
    """All rows of the only round; or, where groups are replaced, the first groups with signal for RL, and
    besides them as many others as there is room for, which only distil."""
    put = row_sharding(mesh)
    if not config.rl.resample_rounds:
        (only,) = rounds
        rewards_B, correct_B = (spread(x, put) for x in (only.total_rewards(config), only.correct_B))
        return Chosen(only.rollouts, rewards_B, correct_B, None, only.sources)
    groups, rl, used = plan_groups(
        _signals(config, rounds), config.train.prompts_per_iteration, config.groups_per_batch
    )
    size = config.rollout.group_size
    rows = (groups[:, None] * size + np.arange(size)).ravel()
    # A place that nothing fills holds no completion, so that no mean and no denominator counts it.
    lengths = np.where(np.repeat(used, size), np.concatenate([r.lengths_B for r in rounds])[rows], 0)
    rewards_B, correct_B = (spread(x[rows], put) for x in _verdicts_of(config, rounds))
    rl_B = spread(np.repeat(rl, size), put)
    with jax.set_mesh(mesh):
        rollouts = jax.device_put(_take([r.rollouts for r in rounds], rows), put)
    rollouts = dataclasses.replace(rollouts, completion_lengths_B=spread(lengths, put))
    sources = [source for r in rounds for source in r.sources]
    return Chosen(rollouts, rewards_B, correct_B, rl_B, [sources[b] for b in rows])


def _verdicts_of(config: Config, rounds: Sequence[Round]) -> tuple[np.ndarray, np.ndarray]:
    rewards = [r.total_rewards(config) for r in rounds]
    return np.concatenate(rewards), np.concatenate([r.correct_B for r in rounds])


def plan_groups(
    signal: np.ndarray, num_rl: int, num_places: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(group in each place, whether RL trains on it there, whether the place is used).

    Args:
        signal: bool, for each group in the order drawn.
        num_rl: at most so many groups are for RL: the first with signal.
        num_places: the rest goes to other groups in the order drawn; a place for which none is left
            repeats one, and is not used.
    """
    for_rl = np.flatnonzero(signal)[:num_rl]
    others = np.setdiff1d(np.arange(len(signal)), for_rl)[: num_places - len(for_rl)]
    used = np.concatenate([for_rl, others])
    empty = num_places - len(used)
    groups = np.concatenate([used, np.zeros(empty, used.dtype)])
    place = np.arange(num_places)
    return groups, place < len(for_rl), place < len(used)


@jax.jit
def _take(rounds: list[Any], rows: np.ndarray) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[rows], *rounds)


def round_metrics(config: Config, rounds: Sequence[Round]) -> Metrics:
    """Of all completions that were sampled, trained on or not."""
    lengths, ended = (np.concatenate([getattr(r, name) for r in rounds]) for name in ("lengths_B", "ended_B"))
    repeats = repeated_ngrams([row for r in rounds for row in r.ids])
    repeats = tuple(total_over_hosts(np.array(repeats)).tolist())
    out = completion_metrics(lengths, ended, repeats)
    idle = [r.idle_frac for r in rounds if r.idle_frac is not None]
    if idle:
        out["rollout/idle_slot_frac"] = float(np.mean(idle))
    if rounds[0].scored is not None:
        errors = sum(s.error is not None for r in rounds for s in r.scored or ())
        errors = int(total_over_hosts(np.array(errors)))
        rewards, correct = _verdicts_of(config, rounds)
        out |= reward_metrics(rewards, correct, errors, config.rollout.group_size)
        parts = [r.parts | r.length_parts(config) for r in rounds]
        out |= {
            f"reward/part/{name}": float(np.mean(np.concatenate([part[name] for part in parts])))
            for name in parts[0]
        }
    if config.rl.resample_rounds:
        out["reward/rounds"] = len(rounds)
    return out


def sample_rows(
    config: Config, sampled: Round, step: int, end_ids: Sequence[int], limit: int | None = None
) -> list[dict[str, Any]]:
    """Completions of those that this process answers for, as readable records: the first so many, or all."""
    assert sampled.scored is not None
    group_size, rewards = config.rollout.group_size, sampled.total_rewards(config)
    prompts, held = sampled.prompts, np.flatnonzero(sampled.share.owned)
    rows = sampled.share.owned_rows
    return [
        {
            "step": step,
            "question": prompts.questions[held[i] // group_size],
            "answer": prompts.answers[held[i] // group_size],
            "source": prompts.sources[held[i] // group_size],
            "sample": int(rows[i]) % group_size,
            "completion": sampled.texts[i],
            "reward": float(rewards[rows[i]]),
            "correct": bool(sampled.correct_B[rows[i]]),
            "scores": sampled.scored[i].scores,
            "error": sampled.scored[i].error,
            "finish": finish_reason(sampled.ids[i].tolist(), bool(sampled.ended_B[rows[i]]), end_ids),
        }
        for i in range(len(sampled.texts))[:limit]
    ]
