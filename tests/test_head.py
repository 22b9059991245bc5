"""The vocabulary head in passes, against the plain computation over [B, N, V]."""

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdrl_jax import sharding
from kdrl_jax.config import MeshConfig
from kdrl_jax.models.head import Head
from kdrl_jax.objective.divergence import Divergence, divergence
from kdrl_jax.scoring import (
    HeadSettings,
    TeacherSide,
    head_loss,
    score_predictors,
)

B, N, D, NUM_TOKENS, COLUMNS = 8, 6, 16, 21, 24
SETTINGS = HeadSettings(num_tokens=NUM_TOKENS, chunk=24)  # two passes of 3 tokens of each row
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def make_head(dim, columns, *, tied, softcap=None):
    kernel = normal(columns, dim) if tied else normal(dim, columns)
    return Head(kernel, None, tied=tied, softcap=softcap)


def make_int8_head(dim, columns):
    kernel = jnp.asarray(RNG.integers(-127, 128, (columns, dim)), jnp.int8)
    return Head(kernel, jnp.asarray(RNG.uniform(0.01, 0.03, columns), jnp.float32), tied=True, softcap=2.0)


STATES, TARGETS = normal(B, N, D), jnp.asarray(RNG.integers(0, NUM_TOKENS, (B, N)))
TEMPERATURE = jnp.asarray(RNG.uniform(0.6, 2.0, B), jnp.float32)
INPUTS = {
    "advantage": normal(B),
    "old": normal(B, N) - 3.0,
    "rl": jnp.asarray(RNG.uniform(size=(B, N)) / (B * N), jnp.float32),
    "kd": jnp.asarray(RNG.uniform(size=(B, N)) / (B * N), jnp.float32),
    "coef": jnp.asarray(0.7),
}
# Teachers pad their vocabularies otherwise than the student, and each other.
TEACHER_STATES = (normal(B, N, 12), normal(B, N, 8))
TEACHER_HEADS = (make_head(12, 28, tied=False), make_int8_head(8, COLUMNS))
WEIGHTS = jnp.asarray(RNG.uniform(0.1, 0.9, B), jnp.float32).at[:2].set(jnp.array([0.0, 1.0]))
ONE = TeacherSide(TEACHER_STATES[:1], TEACHER_HEADS[:1])
TWO = TeacherSide(TEACHER_STATES, TEACHER_HEADS, jnp.stack([WEIGHTS, 1 - WEIGHTS], axis=1))


@dataclasses.dataclass(frozen=True)
class Case:
    head: Head
    teacher: TeacherSide | None = None
    divergence: Divergence | None = None
    states: jax.Array = dataclasses.field(default_factory=lambda: STATES)


CASES = {
    "alone": Case(make_head(D, COLUMNS, tied=True)),
    "metrics": Case(make_head(D, COLUMNS, tied=True), ONE),
    "untied": Case(make_head(D, COLUMNS, tied=False), ONE, Divergence("reverse_kl")),
    "wide": Case(make_head(D, 40, tied=True, softcap=3.0), ONE, Divergence("jsd", beta=0.3)),
    "two": Case(make_head(D, COLUMNS, tied=False, softcap=3.0), TWO, Divergence("reverse_kl")),
    "top_k": Case(make_head(D, NUM_TOKENS, tied=True), TWO, Divergence("forward_kl", top_k=4)),
    # A width that 8 devices do not divide.
    "odd": Case(make_head(12, COLUMNS, tied=True), ONE, Divergence("reverse_kl"), TEACHER_STATES[0] + 0.5),
}


def kdrl_like(scores, x):
    """Clipped policy loss, divergence and an entropy bonus, each a weighted sum; and sums for metrics."""
    ratio = jnp.exp(scores.logprobs - x["old"])
    a = x["advantage"][:, None]
    loss = jnp.sum(x["rl"] * -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a))
    loss -= 0.1 * jnp.sum(x["rl"] * scores.entropy)
    sums = {"entropy": jnp.sum(x["rl"] * scores.entropy)}
    if scores.divergence is not None:
        loss += x["coef"] * jnp.sum(x["kd"] * scores.divergence)
    if scores.reverse_kl is not None:
        sums |= {"kl": jnp.sum(x["kd"] * scores.reverse_kl), "same": jnp.sum(x["kd"] * scores.same_top)}
        sums |= {"mass": jnp.sum(x["kd"] * scores.teacher_mass)}
    return loss, sums


def gspo_like(scores, x):
    """A ratio of whole sequences, so no sum over tokens; every score that has a gradient enters."""
    ratio = jnp.exp(jnp.mean(scores.logprobs - x["old"], axis=1) / 4)
    loss = -jnp.mean(jnp.clip(ratio, 0.5, 2.0) * x["advantage"]) - 0.1 * jnp.mean(scores.entropy**2)
    return loss if scores.divergence is None else loss + jnp.mean(scores.divergence**2)


# ---- The plain computation


def plain_logp(states, head, columns=NUM_TOKENS):
    kernel = head.kernel.T if head.tied else head.kernel
    if head.scale_V is not None:
        kernel = kernel * head.scale_V
    logits = jnp.einsum("bnd,dv->bnv", states, kernel[:, :columns])
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    return jax.nn.log_softmax(logits / TEMPERATURE[:, None, None])


def plain_scores(states, head, teacher=None, asked=None):
    """As `score_predictors`, the simplest way: over real tokens alone, all at once."""
    logp = plain_logp(states, head)
    out = {
        "logprobs": jnp.take_along_axis(logp, TARGETS[..., None], -1)[..., 0],
        "entropy": -jnp.sum(jnp.exp(logp) * logp, -1),
    } | dict.fromkeys(("divergence", "reverse_kl", "same_top", "teacher_mass"))
    if teacher is not None:
        probs = [jnp.exp(plain_logp(s, h)) for s, h in zip(teacher.states, teacher.heads, strict=True)]
        weights = jnp.ones((B, 1)) if teacher.weights_BK is None else teacher.weights_BK
        q = sum(weights[:, k, None, None] * p for k, p in enumerate(probs))
        top = logp.argmax(-1)
        out["reverse_kl"] = jax.lax.stop_gradient(jnp.sum(jnp.exp(logp) * (logp - jnp.log(q)), -1))
        out["same_top"] = top == q.argmax(-1)
        out["teacher_mass"] = jnp.take_along_axis(q, top[..., None], -1)[..., 0]
        if asked is not None:
            out["divergence"] = divergence(asked, logp, jnp.log(q))
    return types.SimpleNamespace(**out)


def with_kernel(case, kernel):
    return dataclasses.replace(case.head, kernel=kernel)


@functools.cache
def plain(name, loss, has_aux):
    """The loss (with its sums), and its gradients in states and kernel."""
    case = CASES[name]

    def of(states, kernel):
        return loss(plain_scores(states, with_kernel(case, kernel), case.teacher, case.divergence), INPUTS)

    return gradients(of, case.states, case.head.kernel, has_aux=has_aux)


# ---- The two ways


def fused(case, settings=SETTINGS, token_loss=kdrl_like, **options):
    """(states, kernel, ...) -> loss and sums, as `head_loss` computes them."""

    def of(states, kernel, teacher=case.teacher, inputs=INPUTS, temperature=TEMPERATURE):
        head = with_kernel(case, kernel)
        rest = (TARGETS, temperature, inputs, token_loss, settings, teacher, case.divergence)
        return head_loss(states, head, *rest, **options)

    return of


def recomputed(case, settings=SETTINGS, loss=gspo_like, **options):
    def of(states, kernel, teacher=case.teacher):
        head = with_kernel(case, kernel)
        rest = (TARGETS, TEMPERATURE, settings, teacher, case.divergence)
        return loss(score_predictors(states, head, *rest, **options), INPUTS)

    return of


def gradients(of, *args, has_aux=True):
    return jax.jit(jax.value_and_grad(of, argnums=(0, 1), has_aux=has_aux))(*args)


def close(got, expected, rtol=1e-5):
    """Relative to the largest entry: single entries near 0 are differences of large sums."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.abs(b).max()))


# One token of each row, all rows' passes even, and all at once; the others have a smaller last pass.
@pytest.mark.parametrize(
    ("name", "chunk"), [*((name, 24) for name in CASES), ("two", 1), ("two", 56), ("two", 1000)]
)
def test_both_ways_are_the_plain_one(name, chunk):
    case, settings = CASES[name], dataclasses.replace(SETTINGS, chunk=chunk)
    expected = plain(name, kdrl_like, True)
    close(gradients(fused(case, settings), case.states, case.head.kernel), expected)
    close(jax.jit(fused(case, settings))(case.states, case.head.kernel), expected[0])
    close(
        gradients(recomputed(case, settings), case.states, case.head.kernel, has_aux=False),
        plain(name, gspo_like, False),
    )


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_plain_ones(name):
    case = CASES[name]
    got = jax.jit(recomputed(case, loss=lambda scores, _: scores))(case.states, case.head.kernel)
    expected = plain_scores(case.states, case.head, case.teacher, case.divergence)
    for field in dataclasses.fields(got):
        close(getattr(got, field.name), getattr(expected, field.name))
    if name == "two":
        assert 0 < np.asarray(got.same_top).mean() < 1


MESHES = [(1, 8, 1), (2, 4, 1), (8, 1, 1), (4, 1, 2), (1, 4, 2), (2, 2, 2), (1, 2, 4), (2, 1, 4), (1, 1, 8)]


def on_mesh(shape):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; tests/conftest.py asks for them")
    data, fsdp, tensor = shape
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[:8])


def place(case, mesh):
    """States, kernel and teacher where training has them."""
    rows = sharding.rows(mesh)

    def put(head):
        place = sharding.sharding(head.dims, head.kernel.shape, mesh)
        return dataclasses.replace(head, kernel=jax.device_put(head.kernel, place))

    teacher = TeacherSide(
        jax.device_put(case.teacher.states, rows),
        tuple(map(put, case.teacher.heads)),
        jax.device_put(case.teacher.weights_BK, rows),
    )
    return jax.device_put(case.states, rows), put(case.head).kernel, teacher


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *(("two", mesh) for mesh in MESHES),
        *(("wide", mesh) for mesh in ((2, 2, 2), (1, 2, 4))),
        ("odd", (1, 8, 1)),
        ("top_k", (2, 2, 2)),  # 21 columns over 2
    ],
    ids=str,
)
def test_meshes_give_the_same_gradient(name, mesh):
    """Rows over 1 to 8 devices, the vocabulary over 1 to 8, heads of other widths; passes on each."""
    case, mesh = CASES[name], on_mesh(mesh)
    settings = dataclasses.replace(SETTINGS, chunk=4)
    args = place(case, mesh)
    with jax.set_mesh(mesh):
        got = gradients(fused(case, settings), *args)
        scored = gradients(recomputed(case, settings), *args, has_aux=False)
    close(got, plain(name, kdrl_like, True))
    close(scored, plain(name, gspo_like, False))
    for _, (in_states, in_kernel) in (got, scored):
        assert in_states.sharding.is_equivalent_to(args[0].sharding, 3)
        assert in_kernel.sharding.is_equivalent_to(args[1].sharding, 2)


def collectives(hlo):
    """(is in a loop's body, operation, elements of its largest array) of each."""
    bodies, where, found = set(re.findall(r"body=%?([\w.\-]+)", hlo)), None, []
    assert bodies
    for line in hlo.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            where = start[1]
        kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
        if m := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", m[1])]
            found.append((where in bodies, m[2], max(sizes, default=1)))
    return found


@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 1, 4), (1, 8, 1)], ids=str)
@pytest.mark.parametrize("way", [fused, recomputed])
def test_kernels_travel_once_and_never_in_the_loop(way, mesh):
    case, settings = CASES["two"], dataclasses.replace(SETTINGS, chunk=1)
    m = on_mesh(mesh)
    args = place(case, m)
    of = jax.jit(jax.value_and_grad(way(case, settings), argnums=(0, 1), has_aux=way is fused))
    with jax.set_mesh(m):
        found = collectives(of.lower(*args).compile().as_text())
    data, fsdp, tensor = mesh
    rows = B // (data * fsdp)
    # A pass of one token a row: nothing larger than its states travels, so no logits and no kernel, and
    # only to be summed: no device needs another's columns.
    in_loop = [(kind, size) for inside, kind, size in found if inside]
    assert {kind for kind, _ in in_loop} == ({"all-reduce"} if tensor > 1 else set())
    assert max((size for _, size in in_loop), default=0) <= rows * D < rows * COLUMNS
    kernel = D * COLUMNS // tensor
    outside = [(kind, size) for inside, kind, size in found if not inside]
    # The gradient is summed once over fsdp (each keeps its part) and once over data, for each part of
    # the vocabulary alone.
    sums = [(kind, size) for kind, size in outside if kind != "all-gather" and size > rows * D]
    kinds = [kind for kind, _ in sums]  # a permutation cuts the teacher's columns as the student's
    assert set(kinds) <= {"reduce-scatter", "all-reduce", "collective-permute"}
    assert kinds.count("reduce-scatter") <= 1
    assert kinds.count("all-reduce") <= 1
    assert {"reduce-scatter", "all-reduce"} & set(kinds)
    # No device ever has more columns than its own, and gathers each head at most once a way.
    gathers = [size for kind, size in outside if kind == "all-gather"]
    assert max([*gathers, *(size for _, size in sums)]) <= kernel
    assert len(gathers) <= 3 * (1 if way is fused else 2)


def test_bfloat16_is_close_to_float32():
    case = CASES["untied"]
    low = STATES.astype(jnp.bfloat16)
    teacher = TeacherSide(tuple(s.astype(jnp.bfloat16) for s in ONE.states), ONE.heads)
    (loss, sums), grads = gradients(fused(case), low, case.head.kernel, teacher)
    expected = plain("untied", kdrl_like, True)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    assert loss.dtype == sums["kl"].dtype == jnp.float32
    close(((loss, sums), grads), expected, rtol=0.03)
    scored = gradients(recomputed(case), low, case.head.kernel, teacher, has_aux=False)
    assert [g.dtype for g in scored[1]] == [jnp.bfloat16, jnp.float32]
    close(scored, plain("untied", gspo_like, False), rtol=0.03)


# ---- What it must not do


def equations(jaxpr):
    """(equation, how often it runs) of a jaxpr and all within."""
    for eqn in jaxpr.eqns:
        yield eqn, 1
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from ((e, times * n) for e, n in equations(inner))


def largest(of, *args):
    """Elements of the largest array that is computed."""
    jaxpr = jax.make_jaxpr(of)(*args).jaxpr
    return max(math.prod(v.aval.shape) for eqn, _ in equations(jaxpr) for v in eqn.outvars)


def work(of, *args):
    """Operations of all matrix products."""
    total = 0
    for eqn, times in equations(jax.make_jaxpr(of)(*args).jaxpr):
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            size = math.prod(left[i] for i in summed) * math.prod(eqn.outvars[0].aval.shape)
            total += 2 * times * size
    return total


def grad_of(of, has_aux=True):
    return jax.grad(of, argnums=(0, 1), has_aux=has_aux)


@pytest.mark.parametrize("way", [fused, recomputed])
def test_products_are_taken_in_the_compute_type_and_the_kernel_cast_once(way):
    """All products in bfloat16 summed in float32, and the float32 kernel not cast in each pass again."""
    case = CASES["untied"]
    states = STATES.astype(jnp.bfloat16)
    theirs = (dataclasses.replace(ONE.heads[0], kernel=ONE.heads[0].kernel.astype(jnp.bfloat16)),)
    teacher = TeacherSide((ONE.states[0].astype(jnp.bfloat16),), theirs)
    of = grad_of(way(case), has_aux=way is fused)
    found = list(equations(jax.make_jaxpr(of)(states, case.head.kernel, teacher).jaxpr))
    products = [e for e, _ in found if e.primitive.name == "dot_general"]
    assert len(products) >= 4
    for e in products:
        assert {v.aval.dtype for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
        assert e.outvars[0].aval.dtype == jnp.float32
    casts = [
        times
        for e, times in found
        if e.primitive.name == "convert_element_type" and e.invars[0].aval.shape == case.head.kernel.shape
    ]
    assert sum(casts) == (1 if way is fused else 2)


def test_no_array_is_as_large_as_all_logits():
    case = CASES["two"]
    all_logits = B * N * NUM_TOKENS
    for of in (fused(case), grad_of(fused(case)), recomputed(case), grad_of(recomputed(case), False)):
        assert largest(of, STATES, case.head.kernel) < all_logits
    assert largest(lambda s: plain_scores(s, case.head).logprobs, STATES) >= all_logits


def test_work_is_that_of_the_products_needed():
    """In products of all states and one kernel: 1 forward, 1 each for the gradients of states and kernel,
    1 more where the logits are computed again; teachers one each time."""
    one = 2 * B * N * D * COLUMNS
    args = STATES, CASES["alone"].head.kernel
    for options, less in (({}, 0), ({"train_head": False}, 1)):
        way, again = (f(CASES["alone"], **options) for f in (fused, recomputed))
        assert work(way, *args) == work(again, *args) == one
        assert work(grad_of(way), *args) == (3 - less) * one
        assert work(grad_of(again, False), *args) == (4 - less) * one
    teacher = 2 * B * N * 12 * 28
    args = STATES, CASES["untied"].head.kernel
    assert work(grad_of(fused(CASES["untied"])), *args) == 3 * one + teacher
    assert work(grad_of(recomputed(CASES["untied"]), False), *args) == 4 * one + 2 * teacher


def test_a_frozen_head_has_no_gradient():
    case = CASES["two"]
    for way, loss in ((fused, kdrl_like), (recomputed, gspo_like)):
        has_aux = way is fused
        _, (in_states, in_kernel) = gradients(
            way(case, train_head=False), STATES, case.head.kernel, has_aux=has_aux
        )
        close(in_states, plain("two", loss, has_aux)[1][0])
        assert not np.asarray(in_kernel).any()


def test_only_the_loss_has_a_gradient_and_only_in_states_and_kernel():
    case = CASES["two"]

    def loss(teacher, inputs, temperature):
        return fused(case)(STATES, case.head.kernel, teacher, inputs, temperature)[0]

    floats = dataclasses.replace(TWO, heads=())

    def with_heads(x):
        return dataclasses.replace(x, heads=TWO.heads)

    grads = jax.grad(lambda t, *rest: loss(with_heads(t), *rest), argnums=(0, 1, 2))(
        floats, INPUTS, TEMPERATURE
    )
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
    of_sum = jax.grad(lambda s: fused(case)(s, case.head.kernel)[1]["entropy"])(STATES)
    assert not np.asarray(of_sum).any()
    metric = fused(case, token_loss=lambda scores, x: (jnp.sum(scores.reverse_kl), {}))
    again = recomputed(case, loss=lambda scores, x: jnp.sum(scores.reverse_kl))
    for of in (lambda s: metric(s, case.head.kernel)[0], lambda s: again(s, case.head.kernel)):
        assert not np.asarray(jax.grad(of)(STATES)).any()
    # The backward pass scales by what comes after.
    (value, _), (in_states, in_kernel) = plain("two", kdrl_like, True)
    squared = jax.grad(lambda s, k: fused(case)(s, k)[0] ** 2, argnums=(0, 1))(STATES, case.head.kernel)
    close(squared, (2 * value * in_states, 2 * value * in_kernel))


def test_another_temperature_is_the_same_program():
    case = CASES["two"]
    of = jax.jit(lambda t: fused(case)(STATES, case.head.kernel, temperature=t)[0])
    losses = [float(of(jnp.full(B, t))) for t in (0.5, 1.0, 2.0)]
    assert len(set(losses)) == 3
    assert of._cache_size() == 1


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_a_teacher_of_weight_0_counts_nothing(kind):
    """Whatever it says; and a row without any teacher is finite, so that its weight of 0 takes it out."""
    case = dataclasses.replace(CASES["two"], divergence=Divergence(kind))
    only = jnp.stack([jnp.ones(B), jnp.zeros(B)], axis=1)
    one = dataclasses.replace(case, teacher=dataclasses.replace(ONE, weights_BK=None))
    mixed = TeacherSide((TWO.states[0], 1e4 * TWO.states[1]), TWO.heads, only)
    args = STATES, case.head.kernel
    expected = gradients(fused(one), *args)
    close(gradients(fused(case), *args, mixed), expected)
    none = dataclasses.replace(mixed, weights_BK=only.at[0].set(0.0))
    inputs = INPUTS | {"kd": INPUTS["kd"].at[0].set(0.0)}
    close(
        gradients(lambda s, k: fused(case)(s, k, none, inputs), *args),
        gradients(lambda s, k: fused(one)(s, k, inputs=inputs), *args),
    )


def test_what_does_not_fit_is_refused():
    two, alone = CASES["two"], CASES["alone"]
    args = STATES, two.head.kernel
    with pytest.raises(ValueError, match="needs a teacher"):
        fused(dataclasses.replace(alone, divergence=Divergence()))(STATES, alone.head.kernel)
    with pytest.raises(ValueError, match="2 teachers without weights"):
        fused(two)(*args, dataclasses.replace(TWO, weights_BK=None))
    with pytest.raises(ValueError, match=r"inputs\['old'\] has shape \(8, 5\); give arrays of 8 rows"):
        fused(two)(*args, inputs=INPUTS | {"old": INPUTS["old"][:, 1:]})
    head = make_int8_head(D, COLUMNS)
    with pytest.raises(ValueError, match="int8 head cannot be trained"):
        score_predictors(STATES, head, TARGETS, TEMPERATURE, SETTINGS)
    score_predictors(STATES, head, TARGETS, TEMPERATURE, SETTINGS, train_head=False)


# ---- Lists


def test_only_so_many_tokens_of_a_row_are_looked_at():
    """Others are in no sum and in no gradient, and slices of them alone are not computed."""
    case = CASES["untied"]
    counts = jnp.array([0, 1, 2, 0, 3, 3, 1, 2])
    counted = jnp.arange(N) < counts[:, None]
    inputs = INPUTS | {name: INPUTS[name] * counted for name in ("rl", "kd")}

    def value(states, counts_B):
        return fused(case, counts_B=counts_B)(states, case.head.kernel, inputs=inputs)[0]

    few, every = (jax.jit(jax.value_and_grad(value))(STATES, c) for c in (counts, None))
    np.testing.assert_allclose(few[0], every[0], rtol=1e-5)
    np.testing.assert_allclose(few[1], every[1], atol=1e-6)
    noise = STATES.at[:, 3:].set(jnp.nan)  # the second slice
    assert np.isfinite(jax.jit(value)(noise, counts))
    assert not np.isfinite(jax.jit(value)(noise, None))
