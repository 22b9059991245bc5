"""The compiled update on a real (tiny) decoder: what must not change it, and what must."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdrl_jax import sharding
from kdrl_jax.batch import make_batch_builder, split
from kdrl_jax.config import Config, MeshConfig
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.scoring import HeadSettings, score_in_passes, unwindow
from kdrl_jax.scoring import score_tokens as score_windows
from kdrl_jax.step import Objective, make_diagnostics, make_update
from kdrl_jax.types import Rollouts, TrainState

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
    tokens[at >= (prompt + length)[:, None]] = pad
    mask = (at >= prompt[:, None]) & (at < (prompt + length)[:, None])
    lp, _ = score_tokens(STUDENT, PARAMS, jnp.asarray(tokens), jnp.asarray(prompt), HEAD)
    ended = np.asarray(rng.integers(0, 2, b), bool)
    return Rollouts(
        *(jnp.asarray(x) for x in (tokens, prompt, length, ended)), jnp.where(jnp.asarray(mask), lp, 0.0)
    )


HEAD = HeadSettings(num_tokens=V, chunk=64, max_new_tokens=T - 6)


def score_tokens(model, params, tokens, starts, head, score=score_windows, **options):
    """At temperature 1, log-probabilities at their tokens [B, T]."""
    lp, states = score(model, params, tokens, starts, jnp.ones(starts.shape), head, **options)
    return unwindow(lp, tokens, starts), states


@functools.cache
def teacher_scores(seed, pad):
    r = rollouts(pad)
    return score_tokens(
        TEACHER, teacher_params(seed), r.tokens_BT, r.prompt_lengths_B, HEAD, keep_states=True
    )


def make_batch(c, pad=0, seed=1, old=None):
    r = rollouts(pad)
    lp, states = teacher_scores(seed, pad)
    full = c.kd.estimator == "full"
    return make_batch_builder(c)(r, REWARDS, REWARDS >= 1, old, lp, states if full else None)


def kernel(c, seed=1):
    return TEACHER.bind(teacher_params(seed)).output_head() if c.kd.estimator == "full" else None


def wider_head(c, columns, fill):
    """The teacher's (tied) head with so many columns of padding more."""
    head = kernel(c)
    return dataclasses.replace(
        head, kernel=jnp.pad(head.kernel, ((0, columns), (0, 0)), constant_values=fill)
    )


def gradient(c, batch=None, seed=1, head=HEAD):
    """Gradient of the minibatch's loss, as SGD with learning rate 1 would apply it."""
    batch = make_batch(c, seed=seed) if batch is None else batch
    c = c.model_copy(update={"optimizer": c.optimizer.model_copy(update={"learning_rate": one()})})
    update = jax.jit(make_update(Objective(c, STUDENT, head), optax.identity()))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, PARAMS, optax.EmptyState(), zero, zero)
    new, metrics = update(state, {}, batch, kernel(c, seed))
    return jax.tree.map(jnp.subtract, PARAMS, new.params), metrics


def one():
    from kdrl_jax.config.schedules import Constant

    return Constant(value=1.0)


def flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def close(a, b, rtol=1e-5):
    """Relative to the largest entry: single entries near 0 are differences of large sums."""
    a, b = flat(a), flat(b)
    np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max()))


ESTIMATORS = [("k2", "loss"), ("k1", "reward"), ("k3_forward", "loss"), ("full", "loss")]


@pytest.mark.parametrize(("estimator", "placement"), ESTIMATORS)
def test_another_teacher_changes_the_gradient(estimator, placement):
    c = config(kd={"estimator": estimator, "placement": placement})
    a, b = flat(gradient(c, seed=1)[0]), flat(gradient(c, seed=2)[0])
    assert jnp.abs(a - b).max() > 1e-2 * jnp.abs(a).max()


@pytest.mark.parametrize(("estimator", "placement"), ESTIMATORS)
def test_doubling_the_kd_coefficient_doubles_the_kd_gradient(estimator, placement):
    def total(coef):
        return flat(gradient(config(kd={"coef": coef, "estimator": estimator, "placement": placement}))[0])

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
    diagnose = jax.jit(make_diagnostics(Objective(c, STUDENT, HEAD)))
    found = diagnose(PARAMS, {}, only, None)
    assert float(found["rl/grad_norm"]) == 0.0
    assert float(found["kd/grad_norm"]) > 1e-3
    assert float(found["grad_cosine"]) == 0.0


@pytest.mark.parametrize(
    ("denominator", "rows", "estimator"),
    [("tokens", 2, "k2"), ("sequences", 8, "k2"), ("tokens", 8, "full"), ("sequences", 2, "full")],
)
def test_microbatches_do_not_change_the_gradient(denominator, rows, estimator):
    sections = {"rl": {"denominator": denominator}, "kd": {"denominator": denominator, "mask": "response"}}
    sections["kd"]["estimator"] = estimator
    whole, measured = gradient(config(**sections))
    # The sampler's gap is a rounding error of 0 here; how it is cut changes the rounding.
    measured.pop("sampler/logprob_gap")
    cut, measured_cut = gradient(config(**sections, train={"microbatch_rows": rows}))
    close(cut, whole)
    for name in measured:
        np.testing.assert_allclose(measured_cut[name], measured[name], rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("chunk", [1, 48, 10_000])
def test_head_chunks_and_remat_do_not_change_the_gradient(chunk):
    whole, _ = gradient(config(kd={"estimator": "full"}))
    cut, _ = gradient(
        config(kd={"estimator": "full"}, train={"remat": True}), head=dataclasses.replace(HEAD, chunk=chunk)
    )
    close(cut, whole)


def test_padding_and_prompts_do_not_leak():
    """Other pads change nothing; nor does a prompt token's own score (only what it conditions)."""
    c = config()
    whole, _ = gradient(c, make_batch(c))
    other, _ = gradient(c, make_batch(c, pad=7))
    close(other, whole)
    batch = make_batch(c)
    noise = jnp.where(batch.completion_mask_BT, 0.0, 100.0)
    disturbed = dataclasses.replace(batch, teacher_logprobs_BT=batch.teacher_logprobs_BT + noise)
    same, _ = gradient(c, disturbed)
    np.testing.assert_array_equal(flat(same), flat(whole))


@pytest.mark.parametrize(("estimator", "placement"), ESTIMATORS)
def test_a_teacher_equal_to_the_student_gives_nothing(estimator, placement):
    c = config(rl={"coef": 0.0}, kd={"estimator": estimator, "placement": placement})
    r = rollouts()
    lp, states = score_tokens(STUDENT, PARAMS, r.tokens_BT, r.prompt_lengths_B, HEAD, keep_states=True)
    full = estimator == "full"
    batch = make_batch_builder(c)(r, REWARDS, REWARDS >= 1, None, lp, states if full else None)
    update = jax.jit(make_update(Objective(c, STUDENT, HEAD), optax.identity()))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, PARAMS, optax.EmptyState(), zero, zero)
    _, metrics = update(state, {}, batch, STUDENT.bind(PARAMS).output_head() if full else None)
    assert abs(float(metrics["kd/reverse_kl"])) < 1e-6
    assert float(metrics["grad_norm"]) < 1e-5


def test_padded_columns_of_the_vocabulary_change_nothing():
    """A student with 4 more columns than the tokenizer: whatever they hold, the gradient is the same."""
    wide = make_model(dataclasses.replace(STUDENT.config, vocab_size=V + 4))

    def grads(fill):
        params = jax.tree.map(lambda x: x, PARAMS)
        params["head"] = jnp.pad(params["head"], ((0, 0), (0, 4)), constant_values=fill)
        params["embed"] = jnp.pad(params["embed"], ((0, 4), (0, 0)), constant_values=fill)
        c = config(kd={"estimator": "full"})
        objective = Objective(c, wide, HEAD)
        batch = make_batch(c)
        teacher = wider_head(c, 4, -fill)
        coefs = objective.coefs(jnp.zeros((), jnp.int32))
        grad = jax.grad(lambda p: objective.loss(p, batch, objective.weigh(batch), coefs, teacher)[0])
        return grad(params)

    a, b = grads(0.0), grads(50.0)
    close(
        {"head": b["head"][:, :V], "layers": b["layers"]}, {"head": a["head"][:, :V], "layers": a["layers"]}
    )
    assert (b["head"][:, V:] == 0).all()
    close({"h": a["head"][:, :V]}, {"h": gradient(config(kd={"estimator": "full"}))[0]["head"]})


def test_student_and_teacher_may_pad_their_vocabularies_differently():
    """4 and 9 more columns than the tokenizer: the same exact divergence as without."""
    c = config(rl={"coef": 0.0}, kd={"estimator": "full"})
    batch = make_batch(c)
    wide = make_model(dataclasses.replace(STUDENT.config, vocab_size=V + 4))
    params = {**PARAMS, "head": jnp.pad(PARAMS["head"], ((0, 0), (0, 4)), constant_values=3.0)}
    params["embed"] = jnp.pad(PARAMS["embed"], ((0, 4), (0, 0)))
    teacher = wider_head(c, 9, -5.0)
    found = [
        Objective(c, model, HEAD).sums(p, batch, Objective(c, model, HEAD).weigh(batch), k)[0]["kd"]
        for model, p, k in ((STUDENT, PARAMS, kernel(c)), (wide, params, teacher))
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_scoring_in_passes_is_scoring_at_once():
    r = rollouts()
    for rows in (2, 16):
        lp, states = score_tokens(
            TEACHER,
            teacher_params(),
            r.tokens_BT,
            r.prompt_lengths_B,
            HEAD,
            score_in_passes,
            rows_per_pass=rows,
            keep_states=True,
        )
        np.testing.assert_allclose(lp, teacher_scores(1, 0)[0], atol=1e-5)
        np.testing.assert_allclose(states, teacher_scores(1, 0)[1], atol=1e-5)


def test_minibatches_keep_every_row_once():
    batch = make_batch(config())
    parts = split(batch, 4)
    got = np.concatenate([np.asarray(p.tokens_BT) for p in parts])
    assert sorted(map(tuple, got)) == sorted(map(tuple, np.asarray(batch.tokens_BT)))


def test_old_logprobs_make_the_ratio():
    """With recorded old log-probabilities lower by log 1.1, every ratio is 1.1."""
    c = config(kd={"coef": 0.0})
    r = rollouts()
    lp, _ = score_tokens(STUDENT, PARAMS, r.tokens_BT, r.prompt_lengths_B, HEAD)
    fresh, _ = gradient(c, make_batch(c, old=lp))
    on_policy, _ = gradient(c, make_batch(c))
    stale, _ = gradient(c, make_batch(c, old=lp - np.log(1.1)))
    close(fresh, on_policy)
    close(stale, jax.tree.map(lambda g: 1.1 * g, on_policy))


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters():
    c = config()
    optimizer = optax.scale_by_adam()
    update = jax.jit(make_update(Objective(c, STUDENT, HEAD), optimizer))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, PARAMS, optimizer.init(PARAMS), zero, zero)
    good = make_batch(c)
    bad = dataclasses.replace(good, teacher_logprobs_BT=good.teacher_logprobs_BT.at[0].set(jnp.nan))
    skipped, metrics = update(state, {}, bad, None)
    assert int(metrics["skipped_updates"]) == int(metrics["skipped_in_a_row"]) == 1
    for a, b in zip(
        jax.tree.leaves((skipped.params, skipped.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    after, metrics = update(skipped, {}, good, None)
    assert int(after.step) == 2
    assert int(metrics["skipped_in_a_row"]) == 0
    assert int(metrics["skipped_updates"]) == 1
    assert jnp.abs(flat(after.params) - flat(state.params)).max() > 0


@pytest.mark.parametrize(
    ("mesh", "estimator"),
    [
        ({"fsdp": 8}, "k2"),
        ({"fsdp": 4, "tensor": 2}, "full"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "k2"),
    ],
    ids=str,
)
def test_meshes_give_the_same_gradient(mesh, estimator):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; tests/conftest.py asks for them")
    c = config(kd={"estimator": estimator}, train={"microbatch_rows": 8})
    whole, measured = gradient(c)
    measured.pop("sampler/logprob_gap")
    m = sharding.make_mesh(MeshConfig(**{"fsdp": 1, **mesh}), jax.devices()[:8])
    batch = jax.device_put(make_batch(c), sharding.rows(m))
    placed = jax.tree.map(
        lambda x, dims: jax.device_put(x, sharding.sharding(dims, x.shape, m)), PARAMS, STUDENT.dims
    )
    c1 = c.model_copy(update={"optimizer": c.optimizer.model_copy(update={"learning_rate": one()})})
    update = jax.jit(make_update(Objective(c1, STUDENT, HEAD), optax.identity()))
    zero = jax.device_put(jnp.zeros((), jnp.int32), sharding.replicated(m))
    with jax.set_mesh(m):
        head = kernel(c)
        new, metrics = update(TrainState(zero, placed, optax.EmptyState(), zero, zero), {}, batch, head)
    close(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, new.params), whole)
    for name in measured:
        np.testing.assert_allclose(metrics[name], measured[name], rtol=2e-5, atol=1e-6, err_msg=name)
