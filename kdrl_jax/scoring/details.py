"""For readers, of each token: how far student and teacher are apart, and what the teacher would say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from kdrl_jax.models.head import Head, head_logits
from kdrl_jax.objective.divergence import Divergence, divergence
from kdrl_jax.scoring.head import teacher_logprobs
from kdrl_jax.scoring.passes import Operands, Pieces, run
from kdrl_jax.scoring.types import HeadSettings, TeacherSide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenDetails:
    """About each token of some lists, [B, N], float32 unless said otherwise; without gradients."""

    student_logprobs: jax.Array
    """Of the tokens themselves, nats."""
    teacher_logprobs: jax.Array
    """The same, the teacher's."""
    reverse_kl: jax.Array
    """Exact KL(student || teacher) where the token was drawn, nats."""
    top_ids: jax.Array
    """int32 [B, N, K]: the teacher's most likely tokens there, the likeliest first."""
    top_teacher: jax.Array
    """[B, N, K]: the teacher's log-probabilities of them."""
    top_student: jax.Array
    """[B, N, K]: the student's."""


def describe_predictors(
    states_BND: jax.Array,
    head: Head,
    targets_BN: jax.Array,
    temperature: jax.Array | float,
    settings: HeadSettings,
    teacher: TeacherSide,
    *,
    num_top: int,
    counts_B: jax.Array | None = None,
) -> TokenDetails:
    """Compares student and teacher at completion tokens.

    Args:
        states_BND, head, targets_BN, temperature, teacher, counts_B: as in `score_predictors`.
        num_top: K; no more than there are tokens.
    """
    operands = Operands(
        states_BND, head, targets_BN, jnp.asarray(temperature, jnp.float32), counts_B, None, teacher
    )
    details: TokenDetails = run(functools.partial(_describe, settings, num_top), operands, settings).joined
    return details


def _describe(settings: HeadSettings, num_top: int, operands: Operands) -> Pieces:
    logits = head_logits(
        operands.states, operands.head, num_tokens=settings.num_tokens, temperature=operands.temperature
    )
    student, teacher = jax.nn.log_softmax(logits), teacher_logprobs(operands, settings.num_tokens)
    assert teacher is not None
    # One tokenizer, but each model pads its vocabulary its own way.
    width = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :width], teacher[..., :width]
    top_teacher, top_ids = jax.lax.top_k(teacher, min(num_top, settings.num_tokens))
    drawn = operands.targets[..., None]
    details = TokenDetails(
        student_logprobs=jnp.take_along_axis(student, drawn, -1)[..., 0],
        teacher_logprobs=jnp.take_along_axis(teacher, drawn, -1)[..., 0],
        reverse_kl=divergence(Divergence("reverse_kl"), student, teacher),
        top_ids=top_ids,
        top_teacher=top_teacher,
        top_student=jnp.take_along_axis(student, top_ids, -1),
    )
    return Pieces((), None, details)
