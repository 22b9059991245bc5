"""The data that travels between the stages of an iteration.

Letters in names are dimensions: P prompts, G completions per prompt, B = P * G rows, T positions,
D embedding. One rule of alignment everywhere: `x_BT[b, t]` is about `tokens_BT[b, t]`, and a
log-probability at t is log p(token_t | tokens_<t). Row b belongs to prompt b // G.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
"""A model's parameters: nested dicts of arrays, as `models.decoder.Decoder` names them."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions of one iteration, on the host that holds their rows."""

    tokens_PT: np.ndarray
    """int32 [P, max_prompt_tokens], right-padded."""
    lengths_P: np.ndarray
    """int32 [P], at least 1."""
    draws_P: np.ndarray
    """int32 [P]: how many prompts were drawn before this one in the whole run. With the seed and the
    sample number it identifies a completion, so a question drawn twice gets different ones."""
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    """Gold answers as the data has them; verifiers extract what they need."""
    completions: tuple[str | None, ...]
    """Completions to imitate, where the data has them (SFT)."""
    sources: tuple[str, ...]
    """The source each prompt came from, for logs."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions of one iteration: prompt and completion side by side in each row, right-padded."""

    tokens_BT: jax.Array
    """int32: prompt, completion (its end token included, if it ended), then padding."""
    prompt_lengths_B: jax.Array
    completion_lengths_B: jax.Array
    """int32: tokens sampled, the end token included."""
    ended_B: jax.Array
    """bool: an end token was sampled, or a text of rollout.stop (False: truncated)."""
    sampler_logprobs_BT: jax.Array
    """float32: the engine's log-probability of each completion token; 0 elsewhere."""

    @property
    def completion_mask_BT(self) -> jax.Array:  # noqa: N802 - dimensions in names
        """bool: completion tokens, the end token included (ending is an action and is trained)."""

        position = jnp.arange(self.tokens_BT.shape[1])[None, :]
        start = self.prompt_lengths_B[:, None]
        return (position >= start) & (position < start + self.completion_lengths_B[:, None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenScores:
    """What frozen models say of an iteration's completions."""

    teacher_logprobs_BT: jax.Array | None = None
    """float32, of the sampled tokens; None without a teacher."""
    teacher_entropy_BT: jax.Array | None = None
    """float32, nats; None unless it weighs the tokens."""
    ref_logprobs_BT: jax.Array | None = None
    """float32; None without a reference."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """What the loss needs to know of completions beside their tokens: of an iteration, or of a minibatch."""

    starts_B: jax.Array
    """int32: position of each completion's first token."""
    temperature: jax.Array
    """float32 scalar: that the completions were sampled at."""
    completion_mask_BT: jax.Array
    """bool: completion tokens, the end token included."""
    rl_rows_B: jax.Array
    """bool: completions that RL is about, which its denominators count; the others only distil."""
    rl_mask_BT: jax.Array
    """bool: tokens of the policy term (and of SFT, the entropy bonus and the reference KL)."""
    kd_mask_BT: jax.Array
    """bool: tokens of the distillation term."""
    kd_scale_BT: jax.Array | None
    """float32: what the distillation term is multiplied by at each token; None where nothing scales it."""
    advantages_B: jax.Array
    """float32: group-relative advantage of the task reward alone; KD never enters it."""
    correct_B: jax.Array
    """bool: the verifier's verdict, for metrics."""
    sampler_logprobs_BT: jax.Array
    old_logprobs_BT: jax.Array | None
    """float32: the trainer's log-probabilities before the iteration's first update; None when there
    is only one update, which is its own old policy."""
    frozen: FrozenScores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Usual:
    """Recent values of the loss and of the logarithm of its gradient's norm."""

    count: jax.Array
    """int32 scalar: updates that were looked at: neither skipped nor without a gradient."""
    mean_2: jax.Array
    variance_2: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. Keys are derived from the seed, never stored."""

    step: jax.Array
    """int32 scalar: optimizer updates so far, skipped ones included."""
    params: Params
    """What of the student is trained, in float32: all its weights, or its adapters alone."""
    opt_state: Any
    skipped: jax.Array
    """int32 scalar: updates skipped in a row because they were not finite, or not usual."""
    skipped_total: jax.Array
    """int32 scalar: updates skipped in the whole run."""
    usual: Usual

    @classmethod
    def first(cls, params: Params, opt_state: Any) -> "TrainState":
        """Before any update; the counters are numpy's, to be laid out like the rest."""
        zero, two = np.zeros((), np.int32), np.zeros(2, np.float32)
        return cls(zero, params, opt_state, zero, zero, Usual(zero, two, two))  # type: ignore[arg-type]


class TrainingError(RuntimeError):
    """The run cannot go on; one line says why and what to do. What was saved stays usable."""


Metrics = dict[str, Any]
"""Name -> scalar; the names are listed in the README."""
