"""The full-vocabulary divergences against their definitions, written once more as plain loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_jax.objective.divergence import KINDS, SUPPORTS, Divergence, divergence, mixture

V = 6
MASKED = -1e30
ALL = [Divergence(kind, beta=0.3, skew=0.2) for kind in KINDS]
CUT = [dataclasses.replace(d, top_k=k, support=s) for d in ALL for k in (1, 3) for s in SUPPORTS]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed, scale=1.5):
    """Student and teacher logits [V]."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return [scale * jax.random.normal(k, (V,), jnp.float64) for k in keys]


def of_logits(d, student, teacher):
    return divergence(d, jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))


def softmax(logits):
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def blend(share, p, q):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def defined(d, student, teacher):
    """The divergence of two lists of logits as the papers write it, in probabilities."""
    s, t = softmax(list(student)), softmax(list(teacher))
    if d.top_k is not None:
        order = sorted(range(len(s)), key=lambda i: -(s if d.support == "student" else t)[i])
        top = order[: d.top_k]
        s, t = ([x[i] for i in top] + [sum(x[i] for i in order[d.top_k :])] for x in (s, t))
    return {
        "reverse_kl": lambda: kl(s, t),
        "forward_kl": lambda: kl(t, s),
        "jsd": lambda: d.beta * kl(t, blend(d.beta, t, s)) + (1 - d.beta) * kl(s, blend(d.beta, t, s)),
        "skew_reverse_kl": lambda: kl(s, blend(1 - d.skew, t, s)),
        "skew_forward_kl": lambda: kl(t, blend(d.skew, t, s)),
    }[d.kind]()


def slope(f, x, eps=1e-5):
    """Central differences of a function of a list."""
    at = np.eye(len(x)) * eps
    return np.array([(f(x + e) - f(x - e)) / (2 * eps) for e in at])


def name(d):
    return "-".join(str(x) for x in dataclasses.astuple(d))


@pytest.mark.parametrize("d", ALL + CUT, ids=name)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_the_definitions(d, seed):
    student, teacher = draw(seed)
    value, grad = jax.value_and_grad(lambda s: of_logits(d, s, teacher))(student)
    np.testing.assert_allclose(value, defined(d, student, teacher), rtol=1e-12)
    wanted = slope(lambda s: defined(d, s, np.asarray(teacher)), np.asarray(student))
    np.testing.assert_allclose(grad, wanted, atol=1e-9)
    # JSD and skew are bounded and small; none of these tests is about zeros.
    assert np.abs(wanted).max() > 1e-2


@pytest.mark.parametrize("d", ALL + CUT, ids=name)
def test_only_the_student_has_a_gradient(d):
    student, teacher = draw(0)
    assert (jax.grad(lambda t: of_logits(d, student, t))(teacher) == 0).all()


@pytest.mark.parametrize("d", ALL, ids=name)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("k", [V - 1, V, V + 5])
def test_a_bucket_per_token_is_the_full_divergence(d, support, k):
    """V - 1 tokens and a tail of one; V tokens and a tail of nothing."""
    student, teacher = draw(4)
    cut = dataclasses.replace(d, top_k=k, support=support)
    full, wanted = (jax.value_and_grad(lambda s, d=d: of_logits(d, s, teacher))(student) for d in (d, cut))
    np.testing.assert_allclose(full[0], wanted[0], rtol=1e-12)
    np.testing.assert_allclose(full[1], wanted[1], atol=1e-12)


@pytest.mark.parametrize("d", ALL + CUT, ids=name)
def test_zero_at_equality_and_only_there(d):
    student, teacher = draw(5)
    value, grad = jax.value_and_grad(lambda s: of_logits(d, s, student))(student)
    np.testing.assert_allclose(value, 0, atol=1e-15)
    np.testing.assert_allclose(grad, 0, atol=1e-14)
    for seed in range(20):
        a, b = draw(100 + seed, scale=0.3)
        assert float(of_logits(d, a, b)) > 1e-6
    assert float(of_logits(d, student, teacher)) > 1e-3


@pytest.mark.parametrize("support", SUPPORTS)
def test_without_the_tail_bucket_the_sum_goes_negative(support):
    """Why the bucket is there: the top tokens alone are no divergence."""
    student, teacher = jnp.log(jnp.array([0.3, 0.3, 0.4])), jnp.log(jnp.array([0.5, 0.4, 0.1]))
    alone = sum(math.exp(student[i]) * float(student[i] - teacher[i]) for i in (0, 1))
    assert alone < -0.1
    d = Divergence(top_k=2, support=support)
    assert float(divergence(d, student, teacher)) > 0.1


def test_the_tail_knows_nothing_of_how_its_mass_is_spread():
    d = Divergence(top_k=1)
    student = jnp.log(jnp.array([0.6, 0.1, 0.3]))
    teacher = jnp.log(jnp.array([0.6, 0.3, 0.1]))
    np.testing.assert_allclose(divergence(d, student, teacher), 0, atol=1e-15)
    assert float(divergence(Divergence(), student, teacher)) > 0.1


def test_tokens_tied_at_the_threshold_keep_their_buckets():
    student = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2]))
    teacher = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    cut = divergence(Divergence(top_k=2), student, teacher)
    np.testing.assert_allclose(cut, divergence(Divergence(), student, teacher), rtol=1e-12)


@pytest.mark.parametrize("d", ALL + CUT, ids=name)
@pytest.mark.parametrize("x64", [True, False])
def test_padding_of_the_vocabulary_counts_nothing(d, x64):
    """Columns masked as the head masks them: same value, and a gradient of exactly 0 there."""
    logits = draw(6)
    with jax.enable_x64(x64):
        student, teacher = (x.astype(jnp.float64 if x64 else jnp.float32) for x in logits)
        wide = [jnp.pad(x, (0, 3), constant_values=MASKED) for x in (student, teacher)]
        value, grad = jax.value_and_grad(lambda s: of_logits(d, s, wide[1]))(wide[0])
        plain, plain_grad = jax.value_and_grad(lambda s: of_logits(d, s, teacher))(student)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    np.testing.assert_allclose(grad[:V], plain_grad, atol=1e-6)
    assert (grad[V:] == 0).all()


def test_more_tokens_kept_than_there_are():
    student, teacher = (jnp.pad(x, (0, 3), constant_values=MASKED) for x in draw(6))
    cut = of_logits(Divergence(top_k=V + 1), student, teacher)
    np.testing.assert_allclose(cut, of_logits(Divergence(), student, teacher), rtol=1e-12)


@pytest.mark.parametrize("d", ALL + CUT, ids=name)
def test_a_teacher_certain_of_something_else_is_finite(d):
    """Log-probability -50 at the student's favourite, in float32."""
    with jax.enable_x64(False):
        student, teacher = jnp.zeros(V).at[0].set(30.0), jnp.zeros(V).at[0].set(-50.0)
        value, grad = jax.value_and_grad(lambda s: of_logits(d, s, teacher))(student)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert float(value) > 0.05


def test_a_tail_too_small_for_a_complement_keeps_its_digits():
    """Mass 1e-12 outside the top token, float32: 1 - mass has no digits left there."""
    with jax.enable_x64(False):
        student = jnp.array([0.0, -28.0, -28.5], jnp.float32)
        teacher = jnp.array([0.0, -2.0, -2.5], jnp.float32)
        d = Divergence("forward_kl", top_k=1)
        value, grad = jax.value_and_grad(lambda s: of_logits(d, s, teacher))(student)
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    np.testing.assert_allclose(value, defined(d, student, teacher), rtol=1e-5)
    np.testing.assert_allclose(grad, slope(lambda s: defined(d, s, teacher), student), rtol=1e-4)


logits = st.lists(st.floats(-200, 200, width=32), min_size=V, max_size=V)


@settings(max_examples=150, deadline=None)
@given(logits, logits, st.sampled_from(ALL + CUT))
def test_finite_and_not_negative_on_extreme_logits(student, teacher, d):
    with jax.enable_x64(False):
        student, teacher = jnp.array(student, jnp.float32), jnp.array(teacher, jnp.float32)
        value, grad = jax.value_and_grad(lambda s: of_logits(d, s, teacher))(student)
    assert np.isfinite(value)
    assert float(value) >= -1e-4  # float32 rounding of terms up to 400
    assert np.isfinite(grad).all()


def test_leading_dimensions_are_states():
    d = Divergence("jsd", top_k=2)
    pairs = [draw(s) for s in range(6)]
    student, teacher = (jnp.stack([p[i] for p in pairs]).reshape(2, 3, V) for i in (0, 1))
    found = of_logits(d, student, teacher)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found.ravel(), [of_logits(d, *p) for p in pairs], rtol=1e-12)


def test_jsd_lies_between_the_two_kls():
    """Per unit of beta (or 1 - beta) the ends are the forward (or the reverse) KL, as GKD states."""
    student, teacher = draw(7)
    e = 1e-6
    for beta, kind in ((e, "forward_kl"), (1 - e, "reverse_kl")):
        grads = [
            jax.grad(lambda s, d=d: of_logits(d, s, teacher))(student)
            for d in (Divergence("jsd", beta=beta), Divergence(kind))
        ]
        np.testing.assert_allclose(grads[0] / e, grads[1], atol=1e-4)


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ({"kind": "kl"}, "'kl'; use one of reverse_kl"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"skew": 1.0}, "skew=1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"support": "both"}, "'both'; use student or teacher"),
    ],
)
def test_settings_that_mean_nothing_are_refused(field, match):
    with pytest.raises(ValueError, match=match):
        Divergence(**field)


def test_settings_travel_through_jit_without_being_traced():
    student, teacher = draw(8)
    found = jax.jit(of_logits)(Divergence("jsd", top_k=2), student, teacher)
    np.testing.assert_allclose(found, of_logits(Divergence("jsd", top_k=2), student, teacher), rtol=1e-12)


def test_mixture_is_the_log_of_the_mixed_probabilities():
    """Per row its own weights; also of sampled tokens alone."""
    logps = [jax.nn.log_softmax(jax.random.normal(jax.random.key(k), (2, 3, V))) for k in range(3)]
    weights = jnp.array([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    found = mixture(logps, weights)
    wanted = np.log(np.einsum("bk,kbtv->btv", weights, np.exp(np.stack(logps))))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_allclose(jnp.exp(found).sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(mixture([x[..., 0] for x in logps], weights), wanted[..., 0], rtol=1e-12)
    np.testing.assert_allclose(mixture([x[0] for x in logps], weights[0]), wanted[0], rtol=1e-12)


def test_a_teacher_of_weight_zero_counts_nothing():
    one = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (V,)))
    for other in (jnp.zeros(V), jnp.full(V, MASKED), jnp.full(V, -500.0)):
        np.testing.assert_allclose(mixture([other, one], jnp.array([0.0, 1.0])), one, rtol=1e-12)
    masked = jnp.pad(one, (0, 2), constant_values=MASKED)
    found = mixture([masked, masked], jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(found, masked, rtol=1e-12)
    value, grad = jax.value_and_grad(lambda s: divergence(Divergence(), s, found))(masked)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    assert jnp.isfinite(grad).all()
    assert (jax.grad(lambda x: mixture([x, one], jnp.array([0.5, 0.5])).sum())(one) == 0).all()
