"""The vocabulary head: states to scores and to gradients, without ever holding [B, N, V].

Two ways. `head_loss` evaluates a loss per token inside each pass and forms its gradients there, for the
work of the plain computation (PPO's and KDRL's losses are such sums). `score_predictors` gives the scores
themselves, for losses that need whole sequences; its backward pass computes the logits again.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdrl_jax.models.head import Head, head_logits, products, products_gradient, temper
from kdrl_jax.objective.divergence import Divergence, divergence, mixture
from kdrl_jax.scoring.passes import Operands, Pieces, run
from kdrl_jax.scoring.types import HeadSettings, TeacherSide, TokenLoss, TokenScores


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What is fixed when the passes are compiled."""

    settings: HeadSettings
    divergence: Divergence | None
    train_head: bool
    token_loss: TokenLoss | None = None


def head_loss(
    states_BND: jax.Array,
    head: Head,
    targets_BN: jax.Array,
    temperature: jax.Array | float,
    inputs: Any,
    token_loss: TokenLoss,
    settings: HeadSettings,
    teacher: TeacherSide | None = None,
    divergence: Divergence | None = None,
    *,
    counts_B: jax.Array | None = None,
    train_head: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of `token_loss` over all tokens, and of its metrics; differentiable in states and kernel.

    The gradients are formed in the forward pass, inside each pass over some tokens; the backward pass
    scales them. Without differentiation none are formed.

    Args:
        states_BND: those that predict the tokens.
        temperature: float32, scalar or [B]; divides the logits of student and teacher alike.
        inputs: what `token_loss` needs beside the scores. Arrays [B, N, ...] come cut to the same tokens,
            arrays [B] and scalars whole. Arrays travel here rather than in a closure.
        token_loss: of the scores of some tokens of each row, [B, n], and the inputs about them; see
            `TokenLoss`. It is called under differentiation; the sums carry no gradient.
        teacher, divergence: as in `score_predictors`.
        counts_B: int32; tokens of each row that count, which come first. The loss must be 0 at the others,
            since some of them are not looked at. None: all count.
        train_head: False for a frozen head (LoRA): its gradient is 0 and is not computed.

    Returns:
        The loss, float32 scalar, and the sums.
    """
    rules = _Rules(settings, divergence, train_head, token_loss)
    rest = _rest(head, targets_BN, temperature, counts_B, inputs, teacher, rules)
    loss: tuple[jax.Array, dict[str, jax.Array]] = _loss(rules, states_BND, head.kernel, rest)
    return loss


def score_predictors(
    states_BND: jax.Array,
    head: Head,
    targets_BN: jax.Array,
    temperature: jax.Array | float,
    settings: HeadSettings,
    teacher: TeacherSide | None = None,
    divergence: Divergence | None = None,
    *,
    counts_B: jax.Array | None = None,
    train_head: bool = True,
) -> TokenScores:
    """Scores completion tokens, differentiable in states and kernel.

    Nothing but the states is kept for the backward pass, which computes the logits again: 1.5 to 1.65 times
    the work of `head_loss` (`benchmarks/head.py`).

    Args:
        states_BND: of `predictors`.
        targets_BN: int32, the tokens.
        temperature: float32, scalar or [B]; divides the logits of student and teacher alike.
        divergence: which one `TokenScores.divergence` is; None for none. Needs a teacher.
        counts_B, train_head: as in `head_loss`.
    """
    rules = _Rules(settings, divergence, train_head)
    rest = _rest(head, targets_BN, temperature, counts_B, None, teacher, rules)
    scores: TokenScores = _scores(rules, states_BND, head.kernel, rest)
    return scores


def _rest(
    head: Head,
    targets: jax.Array,
    temperature: jax.Array | float,
    counts: jax.Array | None,
    inputs: Any,
    teacher: TeacherSide | None,
    rules: _Rules,
) -> Operands:
    if rules.divergence is not None and teacher is None:
        raise ValueError(f"{rules.divergence} needs a teacher; give a TeacherSide")
    if teacher is not None and teacher.weights_BK is None and len(teacher.states) > 1:
        raise ValueError(f"{len(teacher.states)} teachers without weights; give TeacherSide.weights_BK")
    if rules.train_head and head.scale_V is not None:
        raise ValueError("an int8 head cannot be trained; pass train_head=False")
    inputs = jax.tree.map(jnp.asarray, inputs)
    for path, x in jax.tree_util.tree_leaves_with_path(inputs):
        if x.shape[:2] != targets.shape[: x.ndim]:
            raise ValueError(
                f"inputs{jax.tree_util.keystr(path)} has shape {x.shape}; give arrays of "
                f"{targets.shape[0]} rows, with {targets.shape[1]} tokens each, or scalars"
            )
    # States and kernel go as arguments of their own: the two that have a gradient.
    head = dataclasses.replace(head, kernel=None)  # type: ignore[arg-type]
    temperature = jnp.asarray(temperature, jnp.float32)
    return Operands(None, head, targets, temperature, counts, inputs, teacher)  # type: ignore[arg-type]


def _passes(one_pass: Any, rules: _Rules, states: jax.Array, kernel: jax.Array, rest: Operands) -> Pieces:
    head = dataclasses.replace(rest.head, kernel=kernel)
    operands = dataclasses.replace(rest, states=states, head=head)
    return run(functools.partial(one_pass, rules), operands, rules.settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(rules: _Rules, states: jax.Array, kernel: jax.Array, rest: Operands) -> Any:
    return _passes(_loss_pass, rules, states, kernel, rest).sums


def _loss_fwd(rules: _Rules, states: jax.Array, kernel: jax.Array, rest: Operands) -> Any:
    pieces = _passes(_gradient_pass, rules, states, kernel, rest)
    return pieces.sums, (pieces.joined, _like(kernel, pieces.kernel_gradient))


def _loss_bwd(rules: _Rules, gradients: Any, cotangents: Any) -> Any:
    scale, _ = cotangents
    return *jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients), None


_loss.defvjp(_loss_fwd, _loss_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(rules: _Rules, states: jax.Array, kernel: jax.Array, rest: Operands) -> TokenScores:
    scores: TokenScores = _passes(_score_pass, rules, states, kernel, rest).joined
    return scores


def _scores_fwd(rules: _Rules, states: jax.Array, kernel: jax.Array, rest: Operands) -> Any:
    return _scores(rules, states, kernel, rest), (states, kernel, rest)


def _scores_bwd(rules: _Rules, kept: Any, cotangents: TokenScores) -> Any:
    """The gradient of `sum(cotangents * scores)`, as that of any other loss per token."""
    states, kernel, rest = kept
    rules = dataclasses.replace(rules, token_loss=_weighted)
    inputs = (cotangents.logprobs, cotangents.entropy, cotangents.divergence)
    pieces = _passes(_gradient_pass, rules, states, kernel, dataclasses.replace(rest, inputs=inputs))
    return pieces.joined, _like(kernel, pieces.kernel_gradient), None


_scores.defvjp(_scores_fwd, _scores_bwd)


def _weighted(scores: TokenScores, weights: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    terms = jax.tree.map(jnp.multiply, (scores.logprobs, scores.entropy, scores.divergence), weights)
    return sum(map(jnp.sum, jax.tree.leaves(terms)), jnp.zeros(())), {}


def _like(kernel: jax.Array, gradient: jax.Array | None) -> jax.Array | None:
    """The gradient in the kernel's shape (columns that no teacher has may have been left out) and type."""
    if gradient is None:
        return None
    missing = [(0, k - g) for k, g in zip(kernel.shape, gradient.shape, strict=True)]
    return jnp.pad(gradient, missing).astype(kernel.dtype)


def _score_pass(rules: _Rules, operands: Operands) -> Pieces:
    logits = products(operands.states, operands.head)
    return Pieces(
        (),
        None,
        _token_scores(rules, operands, logits, teacher_logprobs(operands, rules.settings.num_tokens)),
    )


def _loss_pass(rules: _Rules, operands: Operands) -> Pieces:
    assert rules.token_loss is not None
    scores = _score_pass(rules, operands).joined
    return Pieces(rules.token_loss(scores, operands.inputs), None, ())


def _gradient_pass(rules: _Rules, operands: Operands) -> Pieces:
    """Loss and gradients of some tokens. Only what follows the product is differentiated by jax; the two
    products of the backward pass are our own, which fixes their types and that there are no more."""
    token_loss = rules.token_loss
    assert token_loss is not None
    teacher_logp = teacher_logprobs(operands, rules.settings.num_tokens)

    def loss(bare: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return token_loss(_token_scores(rules, operands, bare, teacher_logp), operands.inputs)

    bare = products(operands.states, operands.head)
    value, pull, sums = jax.vjp(loss, bare, has_aux=True)
    (cotangent,) = pull(jnp.ones_like(value))
    in_states, in_kernel = products_gradient(
        cotangent, operands.states, operands.head, kernel=rules.train_head
    )
    return Pieces((value, sums), in_kernel, in_states)


def teacher_logprobs(operands: Operands, num_tokens: int) -> jax.Array | None:
    """Log-probabilities [B, n, V] of the teacher, or of the mixture; None without one."""
    teacher = operands.teacher
    if teacher is None:
        return None

    def logp(states: jax.Array, head: Head) -> jax.Array:
        logits = head_logits(states, head, num_tokens=num_tokens, temperature=operands.temperature)
        return jax.nn.log_softmax(logits)

    logps = [logp(states, head) for states, head in zip(teacher.states, teacher.heads, strict=True)]
    if teacher.weights_BK is None:
        return logps[0]
    width = min(x.shape[-1] for x in logps)
    return mixture([x[..., :width] for x in logps], teacher.weights_BK)


def _token_scores(
    rules: _Rules, operands: Operands, bare: jax.Array, teacher_logp: jax.Array | None
) -> TokenScores:
    """Scores [B, n] of some tokens from the products of their states and the kernel.

    Over the vocabulary only sums and extrema are taken: the passes over the logits that they need are few,
    their gradients need no scatter, and where it lies on several devices only results of size [B, n] travel.
    """
    logits = temper(
        bare, operands.head, num_tokens=rules.settings.num_tokens, temperature=operands.temperature
    )
    columns = jnp.arange(logits.shape[-1])

    def pick(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(columns[: x.shape[-1]] == at[..., None], x, 0.0), axis=-1)

    total = jax.nn.logsumexp(logits, axis=-1)
    logp = logits - total[..., None]
    # Picked from the logits, which needs no total: one pass over them gives both.
    logprobs = pick(logits, operands.targets) - total
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    if teacher_logp is None:
        return TokenScores(logprobs, entropy)
    # One tokenizer, but each model pads its vocabulary its own way; the padding is masked out.
    width = min(logp.shape[-1], teacher_logp.shape[-1])
    logp, teacher_logp = logp[..., :width], teacher_logp[..., :width]
    asked = None
    if rules.divergence is not None:
        asked = divergence(rules.divergence, logp, teacher_logp)
    # The first of the largest; argmax would be one more pass over the logits than their maximum.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    top = jnp.min(jnp.where(logits == largest, columns, columns.size), axis=-1)
    teacher_at_top = pick(teacher_logp, top)
    return TokenScores(
        logprobs,
        entropy,
        divergence=asked,
        reverse_kl=jax.lax.stop_gradient(divergence(Divergence("reverse_kl"), logp, teacher_logp)),
        same_top=teacher_at_top >= jnp.max(teacher_logp, axis=-1),
        teacher_mass=jnp.exp(teacher_at_top),
    )
