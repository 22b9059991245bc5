"""Optimizers: what each one's update is, what its state holds and where, and that nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdrl_jax import sharding
from kdrl_jax.config import Config, MeshConfig, OptimizerConfig
from kdrl_jax.models import adapters
from kdrl_jax.models.block import Holding, LoRA
from kdrl_jax.models.decoder import DecoderConfig, make_model
from kdrl_jax.optim import make_optimizer, opt_state_shardings
from kdrl_jax.optim.adafactor import scale_by_adafactor
from kdrl_jax.optim.bfloat16 import round_stochastically, scale_by_adam_bf16
from kdrl_jax.optim.layouts import layout, layouts
from kdrl_jax.setup.parameters import abstract_params

KINDS = ("adamw", "adamw_bf16", "adafactor", "muon")
# Every kind of parameter: biases, norms of heads, a head of its own; rows != columns, and (q) rows = columns.
SHAPE = DecoderConfig(24, 16, 20, 2, 4, 2, 4, qkv_bias=True, qk_norm=True)
MODEL = make_model(SHAPE)
PARAMS = MODEL.init(jax.random.key(0))
ALONE = make_model(DecoderConfig(24, 16, 20, 1, 4, 2, 4, qkv_bias=True, qk_norm=True))


def gradients(seed=1, scale=1.0):
    """Like PARAMS; the second layer's are a hundred times as large."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(PARAMS))))
    drawn = jax.tree.map(lambda x: scale * jax.random.normal(next(keys), x.shape), PARAMS)
    by_layer = jnp.array([1.0, 100.0])
    drawn["layers"] = jax.tree.map(lambda x: x * by_layer.reshape(2, *[1] * (x.ndim - 1)), drawn["layers"])
    return drawn


def one_layer(tree, i):
    return {**tree, "layers": jax.tree.map(lambda x: x[i : i + 1], tree["layers"])}


def scaling(kind, dims=MODEL.dims, min_factored=8):
    """The optimizer alone; Adafactor with matrices of a test's size factored."""
    if kind == "adafactor":
        return scale_by_adafactor(layouts(dims), min_factored)
    return make_optimizer(OptimizerConfig(kind=kind, max_grad_norm=None), dims)


def after(optimizer, params, gradients):
    """The last of several updates, and the state."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
    return updates, state


def flat(tree):
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b, check=np.testing.assert_array_equal):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        check(x, b[name], err_msg=name)


near = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dims", "stacked", "groups"),
    [
        ("D", False, ((0,),)),
        ("V D", False, ((0,), (1,))),
        ("L D", True, ((1,),)),
        ("L H", True, ((1,),)),
        ("L N H", True, ((1, 2),)),
        ("L D N H", True, ((1,), (2, 3))),
        ("L N H D", True, ((1, 2), (3,))),
        ("L D R", True, ((1,), (2,))),
        ("L R K H", True, ((1,), (2, 3))),
    ],
)
def test_letters_say_what_is_a_matrix(dims, stacked, groups):
    assert (layout(dims).stacked, layout(dims).groups) == (stacked, groups)


def test_no_other_dims_are_guessed_at():
    with pytest.raises(ValueError, match="'L N D F' describe neither a matrix nor a vector"):
        layout("L N D F")


def test_adamw_is_what_it_was():
    """The chain as it stood before there was a choice."""
    config = OptimizerConfig(b1=0.8, weight_decay=0.1)
    before = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(
            0.1,
            mask=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: not path[-1].key.endswith(("norm", "bias")), params
            ),
        ),
    )
    given = [gradients(1), gradients(2)]
    assert OptimizerConfig().kind == "adamw"
    ours = after(make_optimizer(config, MODEL.dims), PARAMS, given)
    assert jax.tree.structure(ours) == jax.tree.structure(after(before, PARAMS, given))
    assert_same(ours, after(before, PARAMS, given))


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_a_layer_is_updated_as_if_it_were_alone(kind):
    given = [gradients(1), gradients(2)]
    both, _ = after(scaling(kind), PARAMS, given)
    for i in range(2):
        own, _ = after(scaling(kind, ALONE.dims), one_layer(PARAMS, i), [one_layer(g, i) for g in given])
        assert_same(one_layer(both, i), own, near)
    # Its gradients' size is its own affair: one is a hundred times the other.
    norms = [np.linalg.norm(both["layers"]["mlp"]["up"][i]) for i in range(2)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=0.2)


def matrices(tree):
    """(name, layer, matrix) of every layer's matrices, folded."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree["layers"]):
        name = path[-1].key
        read = 2 if name == "o" else 1
        if name in ("q", "k", "v", "o", "gate", "up", "down"):
            for i, layer in enumerate(x):
                yield name, i, layer.reshape(int(np.prod(layer.shape[:read])), -1)


def test_adafactor_is_the_papers_on_each_matrix():
    """Algorithm 4 written out: means over rows and columns, decay 1 - t^-0.8, clipped at RMS 1."""
    given = [gradients(1), gradients(2), gradients(3, 5.0)]
    updates, state = after(scaling("adafactor"), PARAMS, given)
    folded = [list(matrices(g)) for g in given]
    clipped = 0
    for at, (name, i, ours) in enumerate(matrices(updates)):
        rows, columns = np.zeros(ours.shape[0]), np.zeros(ours.shape[1])
        for t, each in enumerate(folded, 1):
            g = np.asarray(each[at][2], np.float64)
            decay = 1 - t**-0.8
            rows = decay * rows + (1 - decay) * np.mean(g**2 + 1e-30, 1)
            columns = decay * columns + (1 - decay) * np.mean(g**2 + 1e-30, 0)
            u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
            size = np.sqrt(np.mean(u**2))
            u = u / max(1.0, size)
        clipped += size > 1
        np.testing.assert_allclose(ours, u, rtol=1e-4, atol=1e-6, err_msg=f"{name} {i}")
    assert clipped > 0
    assert state.v_row["layers"]["attn"]["q"].shape == (2, 16)
    assert {x.shape for x in jax.tree.leaves(state.v["layers"]["mlp"])} == {(1,)}
    assert state.v["layers"]["attn"]["q_bias"].shape == (2, 16)  # a vector of heads is no matrix of heads


def newton_schulz(g):
    """The post's, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / np.linalg.norm(g)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def test_muon_is_the_posts_on_each_matrix():
    given = [gradients(1), gradients(2), gradients(3)]
    updates, _ = after(scaling("muon"), PARAMS, given)
    folded = [list(matrices(g)) for g in given]
    for at, (name, i, ours) in enumerate(matrices(updates)):
        momentum = 0.0
        for each in folded:
            g = np.asarray(each[at][2], np.float64)
            momentum = 0.95 * momentum + g
        expected = newton_schulz(g + 0.95 * momentum)
        scale = 0.2 * np.sqrt(max(ours.shape))
        np.testing.assert_allclose(ours, scale * expected, rtol=1e-3, atol=1e-4, err_msg=f"{name} {i}")
        # Newton-Schulz ends near 1, not at it (the post: within about 0.3).
        singular = np.linalg.svd(ours / scale, compute_uv=False)
        assert 0.5 < singular.min() < singular.max() < 1.3
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(ours))), 0.2, rtol=0.2)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 1), (4, 1, 2)])
def test_layers_are_dealt_out_for_muon(sizes):
    """More layers than devices of `fsdp` and `tensor`, or fewer, and no number of them that divides."""
    model = make_model(dataclasses.replace(SHAPE, num_layers=5))
    params = model.init(jax.random.key(0))
    optimizer = scaling("muon", model.dims)
    expected, _ = after(optimizer, params, [params])
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: np.prod(sizes)]
    )
    place = jax.tree.map(lambda x: x.sharding, abstract_params(model, mesh, jnp.float32))
    placed = jax.device_put(params, place)
    state = optimizer.init(placed)
    with jax.set_mesh(mesh):
        update = jax.jit(optimizer.update, out_shardings=(place, None)).lower(placed, state, placed).compile()
    assert_same(update(placed, state, placed)[0], expected, near)
    if data == 1:
        # No device ever holds all layers of a matrix.
        assert " all-to-all" in update.as_text()
        assert " all-gather" not in update.as_text()


def test_muon_leaves_the_rest_to_adam():
    given = [gradients(1), gradients(2)]
    (ours, state), (adam, _) = (after(scaling(kind), PARAMS, given) for kind in ("muon", "adamw"))
    ours, adam = flat(ours), flat(adam)
    weights = {
        n for n in ours if n.endswith(tuple(f"['{w}']" for w in ("q", "k", "v", "o", "gate", "up", "down")))
    }
    assert len(weights) == 7
    for name in ours:
        assert np.array_equal(ours[name], adam[name]) == (name not in weights), name
    held = flat(state)
    assert not any(".nu[" in name and "['mlp']" in name for name in held)  # one moment for Muon's own
    assert any(".trace[" in name and "['mlp']" in name for name in held)
    assert any(".nu[" in name and "embed" in name for name in held)


def test_rounding_at_random_is_right_on_average():
    x = jnp.array([1.0, 1.001, -1.003, 3e-5, -7e-31, 0.0, np.inf, np.nan], jnp.float32)
    bits = jnp.arange(0x10000, dtype=jnp.uint32)  # each of them once
    rounded = jax.vmap(lambda b: round_stochastically(x, b))(bits).astype(jnp.float32)
    mean = np.mean(np.asarray(rounded, np.float64), 0)
    np.testing.assert_allclose(mean[:6], x[:6], rtol=1e-6)
    assert np.isinf(mean[6])
    assert np.isnan(rounded[:, 7]).all()
    assert (np.asarray(rounded)[:, 0] == 1).all()  # what bfloat16 has stays as it is
    assert len(np.unique(np.asarray(rounded)[:, 1])) == 2  # its two neighbours, and no other
    assert np.abs(np.asarray(x[1].astype(jnp.bfloat16), np.float32) - 1.001) > 9e-4


def rounded_adam(b1, b2):
    """What one would do first: Adam with moments cast to bfloat16."""
    adam = optax.scale_by_adam(b1, b2)

    def cast(state, dtype):
        moments = (optax.tree.cast(x, dtype) for x in (state.mu, state.nu))
        return optax.ScaleByAdamState(state.count, *moments)

    def update(grads, state, params=None):
        updates, new = adam.update(grads, cast(state, jnp.float32))
        return updates, cast(new, jnp.bfloat16)

    return optax.GradientTransformation(lambda p: cast(adam.init(p), jnp.bfloat16), update)


@functools.cache
def second_moments(which):
    """Second moments of 4,096 elements, their mean at each step and the last ones: gradients near 1, then
    near 0.1."""
    b1, b2, n, steps = 0.9, 0.999, 4096, 1500
    optimizer = {
        "float32": optax.scale_by_adam(b1, b2),
        "ours": scale_by_adam_bf16(b1, b2, 1e-8),
        "nearest": rounded_adam(b1, b2),
    }[which]
    start = {"w": jnp.zeros(n)}

    def step(state, i):
        size = jnp.where(i < steps, 1.0, 0.1)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (n,))
        _, state = optimizer.update({"w": size * (1 + 0.2 * noise)}, state)
        return state, jnp.mean(state.nu["w"].astype(jnp.float32))

    state, means = jax.jit(lambda: jax.lax.scan(step, optimizer.init(start), jnp.arange(2 * steps)))()
    return np.asarray(means), np.asarray(state.nu["w"], np.float32)


def test_the_second_moment_moves_by_less_than_bfloat16_can_say():
    exact, ours, nearest = (second_moments(w)[0] for w in ("float32", "ours", "nearest"))
    up, down = 1499, 2999
    assert exact[up] > 0.75
    assert nearest[up] < 0.7 * exact[up]  # stuck on its way up
    assert nearest[down] > 0.9 * nearest[up] > 2 * exact[down]  # and never falls
    np.testing.assert_allclose(ours[20:], exact[20:], rtol=0.005)
    # Nor is an element's chance the same at each update, which would be wrong for each and right on average.
    each, wanted = (second_moments(w)[1] for w in ("ours", "float32"))
    assert np.sqrt(np.mean(np.square(each / wanted - 1))) < 0.1


def trained(optimizer, steps=600):
    """Losses of a noisy regression by a small network."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (8, 32)) / 3, "b": jax.random.normal(keys[1], (32, 1)) / 6}

    def loss(params, i):
        x = jax.random.normal(jax.random.fold_in(keys[2], i), (64, 8))
        y = jnp.sin(x.sum(1, keepdims=True))
        return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)

    def step(carry, i):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, i)
        updates, state = optimizer.update(grads, state, params)
        return (jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates), state), value

    return np.asarray(
        jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps)))()[1]
    )


def test_training_with_moments_in_bfloat16_is_training():
    exact, ours = (trained(o) for o in (optax.scale_by_adam(0.9, 0.95), scale_by_adam_bf16(0.9, 0.95, 1e-8)))
    assert exact[-50:].mean() < 0.6 * exact[:50].mean()
    assert np.abs(ours - exact).max() > 0
    windows = [x.reshape(12, 50).mean(1) for x in (ours, exact)]
    np.testing.assert_allclose(*windows, rtol=0.05)


def mesh_of(fsdp, tensor):
    return sharding.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor])


def placed(model, mesh, kind, dtype=jnp.float32, factored=None):
    """Abstract parameters, an optimizer, and its state's shardings."""
    abstract = abstract_params(model, mesh, dtype)
    optimizer = make_optimizer(OptimizerConfig(kind=kind), model.dims)
    if factored:
        optimizer = scale_by_adafactor(layouts(model.dims), factored)
    shardings = opt_state_shardings(optimizer, abstract, model.dims, sharding.replicated(mesh))
    return abstract, optimizer, shardings


def test_random_bits_are_the_same_on_every_mesh():
    states = []
    for sizes in ((1, 1), (4, 2), (8, 1)):
        mesh = mesh_of(*sizes)
        abstract, _, _ = placed(MODEL, mesh, "adamw_bf16")
        optimizer = scaling("adamw_bf16")
        place = jax.tree.map(lambda x: x.sharding, abstract)
        params, grads = (jax.device_put(x, place) for x in (PARAMS, gradients()))
        state = optimizer.init(params)
        for _ in range(2):
            _, state = jax.jit(optimizer.update)(grads, state, params)
        states.append(jax.device_get(state))
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])
    # Two elements of one gradient are not rounded together, nor two parameters.
    once = scale_by_adam_bf16(0.9, 0.95, 1e-8)
    same = {"a": jnp.full((64,), 1.001), "b": jnp.full((64,), 1.001)}
    nu = once.update(same, once.init(same))[1].nu
    assert len(np.unique(np.asarray(nu["a"], np.float32))) == 2
    assert (np.asarray(nu["a"]) != np.asarray(nu["b"])).any()


GOOD = {
    "name": "t",
    "student": {"path": "x"},
    "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
    "train": {"num_steps": 10},
}


@pytest.mark.parametrize("name", ["b1", *(pytest.param(x, marks=pytest.mark.slow) for x in ("b2", "eps"))])
def test_adafactor_refuses_adams_settings(name):
    with pytest.raises(ValueError, match=rf"optimizer\.{name}=0\.5 is Adam's; optimizer\.kind=adafactor"):
        Config.model_validate({**GOOD, "optimizer": {"kind": "adafactor", name: 0.5}})
    for kind in ("adamw", "adamw_bf16", "muon"):
        Config.model_validate({**GOOD, "optimizer": {"kind": kind, name: 0.5}})
        # And these read it.
        plain, other = (
            after(make_optimizer(OptimizerConfig(kind=kind, **c), MODEL.dims), PARAMS, [gradients(), PARAMS])[
                0
            ]
            for c in ({}, {name: 0.5})
        )
        assert any((a != b).any() for a, b in zip(flat(plain).values(), flat(other).values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_clips_and_decays(kind):
    """Decay is added to matrices after all else; the clip sees all parameters at once, before."""
    plain, decayed, clipped = (
        after(make_optimizer(OptimizerConfig(kind=kind, **c), MODEL.dims), PARAMS, [gradients()] * 2)[0]
        for c in (
            {"max_grad_norm": None},
            {"max_grad_norm": None, "weight_decay": 0.5},
            {"max_grad_norm": 1e-9},
        )
    )
    for name, x in flat(plain).items():
        bare = "norm" in name.rpartition("[")[2] or "bias" in name
        np.testing.assert_allclose(
            flat(decayed)[name], x + (0 if bare else 0.5) * flat(PARAMS)[name], rtol=1e-5, atol=1e-6
        )
    assert any((a != b).any() for a, b in zip(flat(plain).values(), flat(clipped).values(), strict=True))


def test_muon_is_not_for_adapters():
    with pytest.raises(ValueError, match=r"optimizer\.kind=muon is for the layers' matrices"):
        Config.model_validate(
            {**GOOD, "student": {"path": "x", "lora": {"rank": 2}}, "optimizer": {"kind": "muon"}}
        )


@pytest.mark.parametrize("kind", ["adamw_bf16", "adafactor"])
def test_adapters_are_trained_by_the_others(kind):
    lora = LoRA(2, 4.0, ("q", "o", "down"))
    model = make_model(SHAPE, holding=Holding(lora=lora))
    top, dims = (adapters.split(tree)[0] for tree in (model.init(jax.random.key(0)), model.dims))
    ones = jax.tree.map(jnp.ones_like, top)
    updates, _ = after(make_optimizer(OptimizerConfig(kind=kind), dims), top, [ones])
    assert jax.tree.structure(updates) == jax.tree.structure(top)
    np.testing.assert_allclose(np.concatenate([x.ravel() for x in flat(updates).values()]), 1.0, rtol=1e-2)
