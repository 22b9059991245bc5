"""The compiled update on a real (tiny) decoder: what must not change it, and what must."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import plain_step
import pytest

from kdrl_jax import sharding
from kdrl_jax.batch import make_batch_builder, take_rows
from kdrl_jax.config import Config, MeshConfig
from kdrl_jax.models.attend import PLAIN, RowAttention
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.models.remat import LADDER
from kdrl_jax.scoring import HeadSettings, TeacherStates, TokenScores, make_scorer, score_rows
from kdrl_jax.scoring.packer import minibatch_rows
from kdrl_jax.step import Minibatch, Objective, make_diagnostics, make_update
from kdrl_jax.step.objective import StepInputs
from kdrl_jax.step.terms import Terms
from kdrl_jax.step.update import finish
from kdrl_jax.types import FrozenScores, Rollouts, TrainState, Usual

V, G, P, T = 23, 4, 4, 20
STUDENT = make_model(DecoderConfig(V, 16, 24, 2, 4, 2, 8, qkv_bias=True))
TEACHER = make_model(DecoderConfig(V, 12, 24, 1, 2, 1, 8, tie_embeddings=True))
PARAMS = STUDENT.init(jax.random.key(0))
REWARDS = jnp.array([0.0, 1.0, 0.0, 0.0] + [0.0] * 4 + [1.0] * 4 + [0.0, 1.0, 1.0, 0.0])


@functools.cache
def teacher_params(seed=1):
    return TEACHER.init(jax.random.key(seed))


def config(**sections):
    tree = {
        "name": "t",
        "student": {"path": "x"},
        "teacher": {"path": "y"},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
        "rollout": {"group_size": G},
        "kd": {"coef": 0.7},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"num_steps": 10, "prompts_per_iteration": P},
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value}
    return Config.model_validate(tree)


@functools.cache
def rollouts(pad=0):
    """Rows of uneven prompts and completions."""
    rng = np.random.default_rng(0)
    b = P * G
    prompt = np.repeat(rng.integers(1, 6, P), G)
    length = rng.integers(1, T - 6, b)
    tokens = rng.integers(3, V, (b, T))
    at = np.arange(T)[None]
    tokens = np.where(at < prompt[:, None], tokens[np.arange(b) // G * G], tokens)  # a group has one prompt
    tokens[at >= (prompt + length)[:, None]] = pad
    mask = (at >= prompt[:, None]) & (at < (prompt + length)[:, None])
    lp = plain_logprobs(STUDENT, PARAMS, jnp.asarray(tokens))
    ended = np.asarray(rng.integers(0, 2, b), bool)
    return Rollouts(
        *(jnp.asarray(x) for x in (tokens, prompt, length, ended)), jnp.where(jnp.asarray(mask), lp, 0.0)
    )


HEAD = HeadSettings(num_tokens=V, chunk=64)
SHAPE = packed.shape_for(P * G, T, length=2 * T, rows_per_pass=2)
BLOCKWISE = RowAttention("blockwise", block=8)


def plain_logprobs(model, params, tokens):
    logp = plain_step.log_probabilities(model, params, tokens, V)
    return plain_step.token_logprobs(logp, tokens)


@functools.cache
def teacher_logp(seed, pad):
    """[B, T, V]."""
    return plain_step.log_probabilities(TEACHER, teacher_params(seed), rollouts(pad).tokens_BT, V)


def frozen_scores(c, pad=0, seed=1):
    r, logp = rollouts(pad), teacher_logp(seed, pad)

    def at_tokens(x):
        return jnp.where(r.completion_mask_BT, x, 0.0)

    reference = plain_step.token_logprobs(teacher_logp(5, pad), r.tokens_BT)
    return FrozenScores(
        at_tokens(plain_step.token_logprobs(logp, r.tokens_BT)) if c.scores_teacher else None,
        at_tokens(plain_step.entropy(logp)) if c.kd.teacher_entropy_scale else None,
        at_tokens(reference) if c.uses_reference else None,
    )


def packs(batch, pad=0, shape=SHAPE):
    """Where the completions of a batch (of the first rows) lie."""
    lengths = batch.completion_mask_BT.sum(1)
    tokens = rollouts(pad).tokens_BT[: len(lengths)]
    return packed.packed(tokens, batch.starts_B, lengths, shape, G)


def states_of(model, params, rows):
    return score_rows(model, params, rows, 1.0, HEAD, keep_states=True).states_RND


def minibatch(c, batch, pad=0, seed=1, shape=SHAPE, teacher=None):
    """The batch in packed rows; the teacher's states by `teacher` (model, params)."""
    where = packs(batch, pad, shape)
    kept = None
    if c.teacher_states:
        model, params = teacher or (TEACHER, teacher_params(seed))
        kept = TeacherStates((states_of(model, params, where.rows),))
    return Minibatch(batch, where, kept)


def make_batch(c, pad=0, seed=1, old=None, frozen=None):
    frozen = frozen_scores(c, pad, seed) if frozen is None else frozen
    return make_batch_builder(c)(rollouts(pad), REWARDS, REWARDS >= 1, 1.0, old, frozen)


def heads(c, seed=1):
    return (TEACHER.bind(teacher_params(seed)).output_head(),) if c.teacher_states else ()


def wider_head(c, columns, fill):
    """The teacher's (tied) head with so many columns of padding more."""
    (head,) = heads(c)
    return (
        dataclasses.replace(head, kernel=jnp.pad(head.kernel, ((0, columns), (0, 0)), constant_values=fill)),
    )


def gradient(
    c, batch=None, seed=1, pad=0, head=HEAD, teacher=None, shape=SHAPE, student=STUDENT, teacher_model=None
):
    """Gradient of the minibatch's loss, as SGD with learning rate 1 would apply it."""
    batch = make_batch(c, seed=seed) if batch is None else batch
    c = c.model_copy(update={"optimizer": c.optimizer.model_copy(update={"learning_rate": one()})})
    update = jax.jit(make_update(Objective(c, student, head, shape), optax.identity()))
    state = TrainState.first(PARAMS, optax.EmptyState())
    new, metrics = update(
        state,
        {},
        minibatch(c, batch, pad, seed, shape, teacher_model),
        heads(c, seed) if teacher is None else teacher,
    )
    return jax.tree.map(jnp.subtract, PARAMS, new.params), metrics


def plain_gradient(c, batch=None):
    """Of the textbook's loss, and its metrics."""
    batch = make_batch(c) if batch is None else batch
    logp, tokens = teacher_logp(1, 0) if c.teacher_states else None, rollouts().tokens_BT

    def loss(params):
        return plain_step.loss(c, STUDENT, params, batch, tokens, V, logp)

    (value, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    return grads, finish(sums) | {"loss": value, "grad_norm": optax.global_norm(grads)}


def one():
    from kdrl_jax.config.schedules import Constant

    return Constant(value=1.0)


def flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def close(a, b, rtol=1e-5):
    """Relative to the largest entry: single entries near 0 are differences of large sums."""
    a, b = flat(a), flat(b)
    np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max()))


KD = {
    "k1 reward": {"estimator": "k1", "placement": "reward"},
    "k2": {"estimator": "k2"},
    "k2 bounded": {"estimator": "k2", "max_abs_logratio": 1.0, "bound": "tanh"},
    "score_function": {"estimator": "score_function"},
    "k3_forward": {"estimator": "k3_forward"},
    "full": {"estimator": "full"},
    "jsd": {"estimator": "full", "divergence": "jsd", "jsd_beta": 0.3},
    "skew forward": {"estimator": "full", "divergence": "skew_forward_kl"},
    "top_k": {"estimator": "top_k", "top_k": 5, "support": "teacher"},
    "beyond the teacher": {"estimator": "k2", "extrapolation": 1.5},
}
RL = {
    "grpo": {"loss": "ppo"},
    "cispo": {"loss": "cispo"},
    "gspo": {"loss": "gspo", "denominator": "sequences"},
    "reinforce": {"loss": "reinforce", "advantage": "rloo", "denominator": "max_tokens"},
    "trrd": {"loss": "ppo", "anchor_share": 0.5},
}
# What compiles the most kinds of heads; the others follow the same paths, and are tested by -m slow.
OFTEN = {"k1 reward", "k2", "full", "top_k"}
some_kd = pytest.mark.parametrize(
    "kd",
    [pytest.param(kd, id=n, marks=() if n in OFTEN else pytest.mark.slow) for n, kd in KD.items()],
)


@some_kd
def test_another_teacher_changes_the_gradient(kd):
    c = config(kd=kd)
    a, b = flat(gradient(c, seed=1)[0]), flat(gradient(c, seed=2)[0])
    assert jnp.abs(a - b).max() > 1e-2 * jnp.abs(a).max()


@some_kd
def test_doubling_the_kd_coefficient_doubles_the_kd_gradient(kd):
    def total(coef):
        return flat(gradient(config(kd={"coef": coef, **kd}))[0])

    rl_only = flat(gradient(config(kd={"coef": 0.0}))[0])
    np.testing.assert_allclose(
        total(1.4) - rl_only, 2 * (total(0.7) - rl_only), atol=2e-5 * float(jnp.abs(total(1.4)).max())
    )


def test_a_group_with_equal_rewards_still_distils():
    c = config(rl={"coef": 1.0})
    batch = make_batch(c)
    equal = jnp.repeat(jnp.array([False, True, True, False]), G)[:, None]
    only = dataclasses.replace(
        batch, rl_mask_BT=batch.rl_mask_BT & equal, kd_mask_BT=batch.kd_mask_BT & equal
    )
    diagnose = jax.jit(make_diagnostics(Objective(c, STUDENT, HEAD, SHAPE)))
    found = diagnose(jnp.int32(0), PARAMS, {}, minibatch(c, only), ())
    assert float(found["rl/grad_norm"]) == 0.0
    assert float(found["kd/grad_norm"]) > 1e-3
    assert float(found["grad_cosine"]) == 0.0


def test_rows_left_out_of_rl_still_distil():
    """The masks of both terms are apart, and so are their denominators."""
    c = config(rl={"denominator": "tokens"})
    rows = jnp.arange(P * G) < 4
    batch = make_batch_builder(c)(
        rollouts(), REWARDS, REWARDS >= 1, 1.0, None, frozen_scores(c), rl_rows_B=rows
    )
    kept = batch.completion_mask_BT
    np.testing.assert_array_equal(batch.rl_mask_BT, kept & rows[:, None])
    np.testing.assert_array_equal(batch.kd_mask_BT, kept)
    lengths = np.asarray(kept.sum(1))
    for denominator, total in (
        ("tokens", 1.0),
        ("sequences", 1.0),
        ("all_tokens", 1.0),
        ("max_tokens", lengths[:4].sum() / (4 * c.rollout.max_new_tokens)),
    ):
        c = config(rl={"denominator": denominator})
        weights = Terms(c).inputs(batch, plain_step.Rows(kept)).rl_weights
        assert float(weights.sum()) == pytest.approx(total, rel=1e-5), denominator
        assert float(weights[~rows].sum()) == 0.0


@pytest.mark.parametrize("denominator", ["tokens", "all_tokens", "sequences", "max_tokens"])
def test_rows_without_a_completion_count_nowhere(denominator):
    """Places that no group fills: the same gradient and the same means as without them."""
    c = config(rl={"denominator": denominator}, kd={"denominator": denominator})
    r = rollouts()
    half = jax.tree.map(lambda x: x[:8], r)
    filled = dataclasses.replace(
        r, completion_lengths_B=jnp.where(jnp.arange(P * G) < 8, r.completion_lengths_B, 0)
    )
    frozen = frozen_scores(c)
    build = make_batch_builder(c)
    some = build(half, REWARDS[:8], REWARDS[:8] >= 1, 1.0, None, jax.tree.map(lambda x: x[:8], frozen))
    every = build(filled, REWARDS, REWARDS >= 1, 1.0, None, frozen)
    (a, measured), (b, measured_filled) = gradient(c, some), gradient(c, every)
    close(b, a)
    measured.pop("sampler/logprob_gap")  # a rounding error of 0 here
    for name in measured:
        np.testing.assert_allclose(measured_filled[name], measured[name], rtol=5e-5, atol=2e-7, err_msg=name)


@pytest.mark.parametrize(
    "sections",
    [
        {"kd": {"estimator": "k3_forward", "mask": "response"}},
        {"rl": {"anchor_share": 0.5, "truncated": False}, "kd": {"coef": 0.0}},
    ],
    ids=["k3", "anchor"],
)
def test_what_counts_nowhere_may_overflow(sections):
    """A teacher certain of something else at a masked token, or on padding, is not 0 times infinity."""
    c = config(**sections)
    batch = make_batch(c)
    counted = batch.kd_mask_BT if "mask" in sections["kd"] else batch.rl_mask_BT
    far = jnp.where(counted, batch.frozen.teacher_logprobs_BT, -400.0 if "rl" in sections else 400.0)
    frozen = dataclasses.replace(batch.frozen, teacher_logprobs_BT=far)
    found, metrics = gradient(c, dataclasses.replace(batch, frozen=frozen))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    close(found, gradient(c, batch)[0])


@pytest.mark.parametrize("estimator", ["k2", "k3_forward", "full"])
def test_a_bound_on_the_anchor_is_one_on_kd_only_where_kd_has_one(estimator):
    kd = {"estimator": estimator}
    anchored = {"anchor_share": 0.5}
    bounded = config(rl=anchored, kd=kd | {"max_abs_logratio": 0.5})
    _, metrics = gradient(bounded, make_batch(bounded))
    assert 0 < metrics["rl/anchor_clip_frac"] < 1
    assert ("kd/clip_frac" in metrics) == (estimator == "k2")
    free = config(rl=anchored, kd=kd)
    _, without = gradient(free, make_batch(free))
    same = float(metrics["kd/loss"]) == pytest.approx(float(without["kd/loss"]), rel=1e-6)
    assert same == (estimator != "k2")


def test_soft_weights_leave_the_denominator_alone():
    """Failure rates and the teacher's entropy scale tokens; the rest keep what they weighed."""
    c = config(kd={"group_weight": "failure_rate", "teacher_entropy_scale": 2.0})
    batch = make_batch(c)
    inputs, plain = (
        Terms(k).inputs(make_batch(k), plain_step.Rows(batch.completion_mask_BT)).kd_weights
        for k in (c, config())
    )
    failed = 1 - np.repeat(np.asarray(REWARDS >= 1).reshape(P, G).mean(1), G)
    entropy = np.asarray(frozen_scores(c).teacher_entropy_BT)
    scale = failed[:, None] * np.exp(-entropy / 2.0)
    np.testing.assert_allclose(batch.kd_scale_BT, scale, rtol=1e-5)
    np.testing.assert_allclose(inputs, np.asarray(plain) * scale, rtol=1e-5, atol=1e-9)


def test_truncated_completions_can_be_left_out_of_each_term():
    ended = np.asarray(rollouts().ended_B)
    batch = make_batch(config(rl={"truncated": False}))
    assert np.asarray(batch.rl_mask_BT.any(1)).tolist() == ended.tolist()
    assert batch.kd_mask_BT.any(1).all()
    batch = make_batch(config(kd={"truncated": False}))
    assert np.asarray(batch.kd_mask_BT.any(1)).tolist() == ended.tolist()


def test_a_kd_reward_is_clipped_together_with_the_advantage():
    """Old samples beyond the clip: the sum of both rewards says whether the gradient is cut off."""
    c = config(kd={**KD["k1 reward"], "coef": 1e3}, rl={"coef": 1.0})
    old = rollouts().sampler_logprobs_BT - 1.0  # every ratio is e
    _, metrics = gradient(c, make_batch(c, old=old))
    terms, batch = Terms(c), make_batch(c, old=old)
    inputs = terms.inputs(batch, plain_step.Rows(batch.completion_mask_BT))
    at = terms.scalars(jnp.int32(0))

    def loss(student):
        scores = TokenScores(student, jnp.zeros_like(student))
        return terms.loss(scores, (inputs, at))[0]

    student = inputs.old + 1.0
    grad = jax.grad(loss)(student)
    # The KD reward is 1,000 times the advantage's size here: where it pushes up, the clip acts.
    pushes_up = inputs.teacher > student
    assert (grad[pushes_up & inputs.mask] == 0).all()
    assert (jnp.abs(grad[~pushes_up & inputs.mask]) > 0).all()
    assert np.isfinite(metrics["loss"])


def test_metrics_of_parts_are_means_over_them():
    c = config()
    batch = make_batch(c)
    _, metrics = gradient(c, batch)
    d = np.asarray(rollouts().sampler_logprobs_BT - batch.frozen.teacher_logprobs_BT)
    mask, correct = np.asarray(batch.completion_mask_BT), np.asarray(REWARDS >= 1)
    assert metrics["kd/reverse_kl"] == pytest.approx(d[mask].mean(), rel=1e-4)
    assert metrics["kd/reverse_kl_correct"] == pytest.approx(d[correct][mask[correct]].mean(), rel=1e-4)
    assert metrics["kd/reverse_kl_wrong"] == pytest.approx(d[~correct][mask[~correct]].mean(), rel=1e-4)
    quarter = (np.arange(T) - np.asarray(batch.starts_B)[:, None]) * 4 // c.rollout.max_new_tokens
    assert metrics["kd/reverse_kl_q1"] == pytest.approx(d[mask & (quarter == 0)].mean(), rel=1e-4)
    assert np.isnan(metrics["kd/reverse_kl_q4"])  # no completion is that long
    advantages = np.asarray(batch.advantages_B)[:, None]
    assert metrics["sign_conflict_frac"] == pytest.approx((advantages * -d < 0)[mask].mean(), rel=1e-4)


def test_importance_of_stale_samplers_is_capped_and_seen():
    """A sampler half as sure: ratios of 2, cut to the cap, and an effective sample size that says so."""
    c = config(kd={"coef": 0.0}, rollout={"importance_cap": 1.5})
    sampler = rollouts().sampler_logprobs_BT
    off = dataclasses.replace(make_batch(c), sampler_logprobs_BT=sampler - np.log(2.0))
    plain, _ = gradient(config(kd={"coef": 0.0}), off)
    capped, metrics = gradient(c, off)
    close(capped, jax.tree.map(lambda g: 1.5 * g, plain))
    assert metrics["ratio/mean"] == pytest.approx(2.0, rel=1e-4)
    assert metrics["ratio/ess"] == pytest.approx(1.0, rel=1e-4)
    one_row = sampler.at[0].add(-3.0)
    _, metrics = gradient(c, dataclasses.replace(off, sampler_logprobs_BT=one_row))
    assert float(metrics["ratio/ess"]) < 0.7


CUTS = {
    "k2, tokens": {"rl": {}, "kd": {"mask": "response", "group_weight": "failure_rate"}},
    "full, sequences": {
        "rl": {"denominator": "sequences"},
        "kd": {"estimator": "full", "denominator": "sequences"},
    },
    "top_k, all tokens": {"kd": {**KD["top_k"], "mask": "group", "denominator": "all_tokens"}},
    "k1 reward, cispo": {"rl": RL["cispo"], "kd": KD["k1 reward"]},
    "gspo, reference, entropy": {"rl": RL["gspo"], "ref": {"coef": 0.3}, "entropy": {"coef": 0.1}},
    "trrd": {"rl": RL["trrd"], "kd": {"coef": 0.0}, "rollout": {"importance_cap": 2.0}},
}
some_cuts = pytest.mark.parametrize("cut", CUTS)


@functools.cache
def uncut(name):
    """Gradient and metrics of the textbook's loss."""
    return plain_gradient(config(**CUTS[name]))


def assert_equal_metrics(found, expected, atol=2e-7):
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=5e-5, atol=atol, err_msg=name)


SHAPES = {
    "one row each": packed.shape_for(P * G, T, length=T, share=False),
    "all at once": packed.shape_for(P * G, T, length=T, rows_per_pass=P * G, share=False),
    "shared prompts": packed.shape_for(P * G, T, length=3 * T, rows_per_pass=2),
    "one long row": packed.shape_for(P * G, T, length=16 * T),
}


@some_cuts
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(s, id=n, marks=() if n in ("shared prompts", "one long row") else pytest.mark.slow)
        for n, s in SHAPES.items()
    ],
)
def test_packing_does_not_change_the_gradient(cut, shape):
    """However rows are packed and cut into passes: old samples, blockwise attention."""
    c = config(**CUTS[cut])
    batch = make_batch(c, old=rollouts().sampler_logprobs_BT - 0.1)
    whole, measured = plain_gradient(c, batch)
    student = dataclasses.replace(make_model(STUDENT.config, attention=BLOCKWISE), dims=STUDENT.dims)
    found, measured_packed = gradient(c, batch, shape=shape, student=student)
    close(found, whole)
    assert_equal_metrics(measured_packed, measured)


@some_cuts
@pytest.mark.parametrize(("chunk", "remat"), [(1, "full"), (48, "products")])
def test_head_chunks_and_remat_do_not_change_the_gradient(chunk, remat, cut):
    c = config(**CUTS[cut], train={"remat": remat})
    found, _ = gradient(c, head=dataclasses.replace(HEAD, chunk=chunk))
    close(found, uncut(cut)[0])


@pytest.mark.parametrize("remat", LADDER)
@pytest.mark.parametrize("kind", ["plain", "blockwise"])
def test_every_rung_of_remat_gives_the_same_gradient(remat, kind):
    c = config(**CUTS["k2, tokens"], train={"remat": remat})
    student = make_model(STUDENT.config, attention=RowAttention(kind, block=8))
    close(gradient(c, student=student)[0], uncut("k2, tokens")[0])


@some_cuts
def test_both_paths_of_the_head_give_the_same_gradient(cut):
    """The terms by themselves, as diagnostics differentiate them, add up to the update's loss."""
    c = config(**CUTS[cut])
    objective = Objective(c, STUDENT, HEAD, SHAPE)
    batch, at = make_batch(c), objective.terms.scalars(jnp.int32(0))
    shared = StepInputs(at, heads(c), batch)

    def total(params, mini):
        sums = objective.accumulate(lambda part: objective.sums(params, part, shared), mini)
        return sum(at.coefs[t] * value for t, value in sums.items())

    def of_part(part):
        def loss(params):
            sums = objective.sums(params, part, shared)
            return sum(at.coefs[t] * value for t, value in sums.items())

        return jax.grad(loss)(PARAMS)

    found = jax.jit(lambda mini: objective.accumulate(of_part, mini))(minibatch(c, batch))
    close(found, uncut(cut)[0])


def test_padding_and_prompts_do_not_leak():
    """Other pads change nothing; nor does a prompt token's own score (only what it conditions)."""
    c = config()
    whole, _ = gradient(c, make_batch(c))
    other, _ = gradient(c, make_batch(c, pad=7), pad=7)
    close(other, whole)
    batch = make_batch(c)
    noise = jnp.where(batch.completion_mask_BT, 0.0, 100.0)
    frozen = dataclasses.replace(batch.frozen, teacher_logprobs_BT=batch.frozen.teacher_logprobs_BT + noise)
    disturbed = dataclasses.replace(
        batch, frozen=frozen, sampler_logprobs_BT=batch.sampler_logprobs_BT + noise
    )
    same, _ = gradient(c, disturbed)
    np.testing.assert_array_equal(flat(same), flat(whole))


@pytest.mark.parametrize("kd", [kd for name, kd in KD.items() if "beyond" not in name], ids=str)
def test_a_teacher_equal_to_the_student_gives_nothing(kd):
    c = config(rl={"coef": 0.0}, kd=kd)
    r = rollouts()
    frozen = FrozenScores(plain_logprobs(STUDENT, PARAMS, r.tokens_BT) * r.completion_mask_BT)
    head = (STUDENT.bind(PARAMS).output_head(),) if c.teacher_states else ()
    batch = make_batch(c, frozen=frozen)
    _, metrics = gradient(c, batch, teacher=head, teacher_model=(STUDENT, PARAMS))
    assert abs(float(metrics["kd/reverse_kl"])) < 1e-6
    assert float(metrics["grad_norm"]) < 1e-5


def total_gradient(c, student, params, teacher):
    """Of another student's loss."""
    objective, batch = Objective(c, student, HEAD, SHAPE), make_batch(c)
    shared = StepInputs(objective.terms.scalars(jnp.int32(0)), teacher, batch)

    def of_part(part):
        return jax.grad(lambda p: objective.loss(p, part, shared)[0])(params)

    return jax.jit(lambda mini: objective.accumulate(of_part, mini))(minibatch(c, batch))


def test_padded_columns_of_the_vocabulary_change_nothing():
    """A student with 4 more columns than the tokenizer: whatever they hold, the gradient is the same."""
    wide = make_model(dataclasses.replace(STUDENT.config, vocab_size=V + 4))

    def grads(fill):
        params = jax.tree.map(lambda x: x, PARAMS)
        params["head"] = jnp.pad(params["head"], ((0, 0), (0, 4)), constant_values=fill)
        params["embed"] = jnp.pad(params["embed"], ((0, 4), (0, 0)), constant_values=fill)
        c = config(kd={"estimator": "full"})
        return total_gradient(c, wide, params, wider_head(c, 4, -fill))

    a, b = grads(0.0), grads(50.0)
    close(
        {"head": b["head"][:, :V], "layers": b["layers"]}, {"head": a["head"][:, :V], "layers": a["layers"]}
    )
    assert (b["head"][:, V:] == 0).all()
    close({"h": a["head"][:, :V]}, {"h": gradient(config(kd={"estimator": "full"}))[0]["head"]})


def test_student_and_teacher_may_pad_their_vocabularies_differently():
    """4 and 9 more columns than the tokenizer: the same exact divergence as without."""
    c = config(rl={"coef": 0.0}, kd={"estimator": "full"})
    wide = make_model(dataclasses.replace(STUDENT.config, vocab_size=V + 4))
    params = {**PARAMS, "head": jnp.pad(PARAMS["head"], ((0, 0), (0, 4)), constant_values=3.0)}
    params["embed"] = jnp.pad(PARAMS["embed"], ((0, 4), (0, 0)))
    teacher = wider_head(c, 9, -5.0)
    found = [
        total_gradient(c, model, p, k)["layers"]
        for model, p, k in ((STUDENT, PARAMS, heads(c)), (wide, params, teacher))
    ]
    close(found[1], found[0], rtol=1e-6)


@pytest.mark.parametrize("attention", [PLAIN, BLOCKWISE], ids=["plain", "blockwise"])
def test_scoring_in_passes_is_scoring_rows(attention):
    """Packed or not, with shared prompts or not, two rows at a time or all: the textbook's numbers."""
    r, logp = rollouts(), teacher_logp(1, 0)
    model = make_model(TEACHER.config, attention=attention)
    expected = (plain_step.token_logprobs(logp, r.tokens_BT), plain_step.entropy(logp))
    for shape in SHAPES.values():
        score = make_scorer(model, HEAD, shape, keep_entropy=True)
        where = packed.packed(r.tokens_BT, r.prompt_lengths_B, r.completion_lengths_B, shape, G)
        found = score(teacher_params(), where.rows, 1.0, (0, where.bounds[-1]))
        for x_RN, x_BT in zip((found.logprobs_RN, found.entropy_RN), expected, strict=True):
            back = where.rows.put_back(x_RN, r.tokens_BT)
            np.testing.assert_allclose(back, np.where(r.completion_mask_BT, x_BT, 0), atol=1e-5)


@pytest.mark.parametrize(("num", "whole_groups"), [(4, True), (2, True), (8, False), (16, False)])
def test_minibatches_keep_every_row_once(num, whole_groups):
    batch = make_batch(config())
    parts = [take_rows(batch, rows) for rows in minibatch_rows(P * G, G, num)]
    got = np.concatenate([np.asarray(p.sampler_logprobs_BT) for p in parts])
    assert sorted(map(tuple, got)) == sorted(map(tuple, np.asarray(batch.sampler_logprobs_BT)))
    groups = [{int(b) // G for b in rows} for rows in minibatch_rows(P * G, G, num)]
    assert all(len(g) == P // num for g in groups) == whole_groups


def test_old_logprobs_make_the_ratio():
    """With recorded old log-probabilities lower by log 1.1, every ratio is 1.1."""
    c = config(kd={"coef": 0.0})
    r = rollouts()
    lp = plain_logprobs(STUDENT, PARAMS, r.tokens_BT)
    fresh, _ = gradient(c, make_batch(c, old=lp))
    on_policy, _ = gradient(c, make_batch(c))
    stale, _ = gradient(c, make_batch(c, old=lp - np.log(1.1)))
    close(fresh, on_policy)
    close(stale, jax.tree.map(lambda g: 1.1 * g, on_policy))


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters():
    c = config()
    optimizer = optax.scale_by_adam()
    update = jax.jit(make_update(Objective(c, STUDENT, HEAD, SHAPE), optimizer))
    state = TrainState.first(PARAMS, optimizer.init(PARAMS))
    good = make_batch(c)
    lp = good.frozen.teacher_logprobs_BT.at[0].set(jnp.nan)
    bad = dataclasses.replace(good, frozen=dataclasses.replace(good.frozen, teacher_logprobs_BT=lp))
    skipped, metrics = update(state, {}, minibatch(c, bad), ())
    assert int(metrics["skipped_updates"]) == int(metrics["skipped_in_a_row"]) == 1
    for a, b in zip(
        jax.tree.leaves((skipped.params, skipped.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    after, metrics = update(skipped, {}, minibatch(c, good), ())
    assert int(after.step) == 2
    assert int(metrics["skipped_in_a_row"]) == 0
    assert int(metrics["skipped_updates"]) == 1
    assert jnp.abs(flat(after.params) - flat(state.params)).max() > 0


def test_an_update_that_is_not_finite_is_skipped_though_its_gradient_is():
    c, optimizer = config(), optax.scale(jnp.inf)
    update = jax.jit(make_update(Objective(c, STUDENT, HEAD, SHAPE), optimizer))
    state = TrainState.first(PARAMS, optimizer.init(PARAMS))
    after, metrics = update(state, {}, minibatch(c, make_batch(c)), ())
    assert np.isfinite(metrics["grad_norm"])
    assert int(metrics["skipped_in_a_row"]) == 1
    assert not metrics["is_spike"]
    np.testing.assert_array_equal(flat(after.params), flat(state.params))


def test_a_spike_is_skipped_too_where_that_is_asked_for():
    optimizer = optax.scale_by_adam()
    state = TrainState.first(PARAMS, optimizer.init(PARAMS))
    # Much smaller losses and gradients have been usual than the one that comes.
    small = Usual(jnp.int32(100), jnp.array([-50.0, -20.0]), jnp.array([0.1, 0.1]))
    state = dataclasses.replace(state, usual=small)
    for sigmas, taken in ((None, True), (6.0, False)):
        c = config(train={"spike_sigmas": sigmas})
        update = jax.jit(make_update(Objective(c, STUDENT, HEAD, SHAPE), optimizer))
        after, metrics = update(state, {}, minibatch(c, make_batch(c)), ())
        assert np.isfinite(metrics["loss"])
        assert int(metrics["skipped_in_a_row"]) == bool(metrics["is_spike"]) == (not taken)
        assert bool(jnp.abs(flat(after.params) - flat(state.params)).max() > 0) == taken
        assert int(after.usual.count) == 100 + taken


@pytest.mark.parametrize(
    ("mesh", "sections"),
    [
        ({"fsdp": 8}, "k2, tokens"),
        ({"fsdp": 4, "tensor": 2}, "full, sequences"),
        ({"data": 2, "tensor": 4}, "top_k, all tokens"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "gspo, reference, entropy"),
        ({"data": 2, "tensor": 4}, "full, sequences"),
    ],
    ids=str,
)
def test_meshes_give_the_same_gradient(mesh, sections):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; tests/conftest.py asks for them")
    c = config(**CUTS[sections])
    whole, measured = uncut(sections)
    m = sharding.make_mesh(MeshConfig(**{"fsdp": 1, **mesh}), jax.devices()[:8])
    shape = packed.shape_for(P * G, T, length=2 * T, rows_per_pass=8)
    mini = minibatch(c, make_batch(c), shape=shape)
    mini = jax.tree.map(lambda x: jax.device_put(x, sharding.rows(m) if x.ndim > 1 else None), mini)
    placed = jax.tree.map(
        lambda x, dims: jax.device_put(x, sharding.sharding(dims, x.shape, m)), PARAMS, STUDENT.dims
    )
    c1 = c.model_copy(update={"optimizer": c.optimizer.model_copy(update={"learning_rate": one()})})
    student = make_model(STUDENT.config, attention=BLOCKWISE)
    update = jax.jit(make_update(Objective(c1, student, HEAD, shape), optax.identity()))
    with jax.set_mesh(m):
        new, metrics = update(TrainState.first(placed, optax.EmptyState()), {}, mini, heads(c))
    close(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, new.params), whole)
    assert_equal_metrics(metrics, measured, atol=1e-6)
