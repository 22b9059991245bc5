"""Adapters: what they compute, what an update changes, and whole runs that train them.

The oracle is one line of numpy: W + alpha / rank * A B, summed over the rank alone.
"""

import contextlib
import functools
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import packed
import plain_cache
import pytest
import yaml
from make_golden import GOLDEN
from rich.console import Console
from test_models import loaded, opened
from test_step import HEAD, PARAMS, STUDENT, T, config, flat, make_batch, minibatch, one
from test_train import SHAPE, TREE, assert_same_run, metrics, run

from kdrl_jax import sharding
from kdrl_jax.config import EvalOptions, MeshConfig, load_config, load_run_config
from kdrl_jax.eval import evaluate
from kdrl_jax.metrics import read_json
from kdrl_jax.models import adapters
from kdrl_jax.models.block import READS_AND_WRITES, Holding, LoRA
from kdrl_jax.models.decoder import make_model
from kdrl_jax.models.head import head_logits
from kdrl_jax.optim import make_optimizer
from kdrl_jax.rollout.sampling import seed_key
from kdrl_jax.setup import abstract_params, make_setup, record_models
from kdrl_jax.setup.parameters import recorded_step
from kdrl_jax.step import Objective, make_update
from kdrl_jax.train import train
from kdrl_jax.types import TrainState

ALL = tuple(READS_AND_WRITES)


def drawn(model, scale=0.05):
    """Adapters of which none is 0."""
    zeros, _ = adapters.split(model.init(jax.random.key(3)))
    leaves, tree = jax.tree.flatten(zeros)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    return tree.unflatten([scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def merged_by_hand(base, top, lora):
    """The formula, in float64, weight by weight and layer by layer."""
    out = {}
    for name, value in base.items():
        if isinstance(value, dict):
            out[name] = merged_by_hand(value, top.get(name, {}), lora)
        elif f"{name}_lora_a" in top:
            a, b = (np.asarray(top[f"{name}_lora_{x}"], np.float64) for x in "ab")
            product = np.stack([np.tensordot(x, y, axes=1) for x, y in zip(a, b, strict=True)])
            out[name] = (np.asarray(value, np.float64) + lora.alpha / lora.rank * product).astype(np.float32)
        else:
            out[name] = value
    return out


def adapted(model, params, tokens, prompt=None):
    """Logits of a model with adapters, at all positions, or (given a prompt's length) at its last one and
    at the next, which is decoded."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(program(model.config, model.holding, prompt)(params, tokens))


@functools.cache
def program(config, holding, prompt):
    """What `adapted` computes, compiled; tests of one model share it."""
    model = make_model(config, holding=holding)

    def logits(decoder, hidden):
        return head_logits(hidden, decoder.output_head(), num_tokens=config.vocab_size, temperature=1.0)

    @jax.jit
    def compute(params, tokens):
        decoder = model.bind(params)
        if prompt is None:
            return logits(decoder, decoder.hidden(tokens))
        rows = len(tokens)
        last, cache = plain_cache.prefill(decoder, tokens[:, :prompt], jnp.full(rows, prompt), prompt + 1)
        after, _ = plain_cache.decode(decoder, tokens[:, prompt], jnp.full(rows, prompt), cache)
        return logits(decoder, jnp.stack([last, after], axis=1))

    return compute


def assert_near(ours, theirs, rtol=1e-5):
    """Relative to the largest entry."""
    np.testing.assert_allclose(ours, theirs, atol=rtol * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("qwen2", ALL),
        ("qwen2", ("q", "o", "down")),
        ("llama_tied", ALL),
        ("gemma2", ALL),
        ("gemma3", ALL),
        ("qwen3", ("k", "up")),
    ],
)
def test_adapters_compute_what_merged_weights_do(name, targets):
    """They begin as no change; whatever they hold, in one pass, in prefill and in decoding."""
    source, lora = opened(GOLDEN / name), LoRA(rank=3, alpha=7.0, targets=targets)
    base, model = loaded(source), make_model(source.config, holding=Holding(lora=lora))
    tokens = np.load(GOLDEN / name / "golden.npz")["tokens"]
    plain = adapted(make_model(source.config), base, tokens)
    first, rest = adapters.split(model.init(jax.random.key(0)))
    assert jax.tree.structure(rest) == jax.tree.structure(base)
    assert sum(x.size for x in jax.tree.leaves(first)) > 0
    zeros = {name: x for half in first["layers"].values() for name, x in half.items() if name.endswith("_b")}
    assert not any(np.asarray(x).any() for x in zeros.values())
    assert zeros
    # Another program, which may round otherwise.
    assert_near(adapted(model, adapters.overlay(base, first), tokens), plain, 1e-6)

    top = drawn(model)
    by_hand = merged_by_hand(base, top, lora)
    whole = adapters.overlay(base, top)
    merged = adapters.merge(adapters.overlay(base, top), lora)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    jax.tree.map(assert_near, merged, by_hand)
    expected = adapted(make_model(source.config), by_hand, tokens)
    assert np.abs(expected - plain).max() > 1e-2 * np.abs(plain).max()
    assert_near(adapted(model, whole, tokens), expected, 3e-5)
    if targets == ALL:
        prompt = tokens.shape[1] - 1
        assert_near(adapted(model, whole, tokens, prompt), expected[:, prompt - 1 :], 3e-5)


def test_split_and_overlay_are_inverse():
    lora = LoRA(2, 4.0, ("q", "down"))
    params = make_model(STUDENT.config, holding=Holding(lora=lora)).init(jax.random.key(0))
    top, rest = adapters.split(params)
    names = {"attn": {"q_lora_a", "q_lora_b"}, "mlp": {"down_lora_a", "down_lora_b"}}
    assert {k: set(v) for k, v in top["layers"].items()} == names
    assert set(top) == {"layers"}
    joined = adapters.overlay(rest, top)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))
    # The random weights are those of the model without adapters, and an adapter is none of them again.
    jax.tree.map(np.testing.assert_array_equal, rest, PARAMS)
    a = np.asarray(top["layers"]["attn"]["q_lora_a"])
    assert not any(np.isin(a, x).any() for x in map(np.asarray, jax.tree.leaves(PARAMS)))
    assert adapters.split(PARAMS) == ({}, PARAMS)
    assert adapters.overlay({}, PARAMS) == PARAMS


def test_small_adapters_survive_merging_into_bfloat16_weights():
    lora = LoRA(2, 4.0, ALL)
    model = make_model(STUDENT.config, holding=Holding(lora=lora))
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    top = drawn(model, 1e-3)
    merged = adapters.merge(adapters.overlay(base, top), lora, jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    jax.tree.map(assert_near, merged, merged_by_hand(wide, top, lora))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("float32")}


# The update. Weights are sharded over `fsdp` and `tensor`, adapters by the same rules.
LORA = LoRA(rank=4, alpha=6.0, targets=ALL)
MODEL = make_model(STUDENT.config, holding=Holding(lora=LORA))
MESH = {"fsdp": 4, "tensor": 2}


def updated(model, frozen, trained, c, optimizer, mesh=None):
    """(the state before, the state after, metrics) of one compiled update with the state donated."""
    shape = packed.shape_for(16, T, length=2 * T, rows_per_pass=8)
    mini = minibatch(c, make_batch(c), shape=shape)
    places = None
    if mesh is not None:
        mini = jax.tree.map(lambda x: jax.device_put(x, sharding.rows(mesh) if x.ndim > 1 else None), mini)
        places = jax.tree.map(lambda x: x.sharding, trained)
    opt_state = jax.jit(optimizer.init)(trained)
    copies = jax.tree.map(jnp.copy, (trained, opt_state))
    state = TrainState.first(*copies)
    update = jax.jit(make_update(Objective(c, model, HEAD, shape), optimizer), donate_argnums=0)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        new, measured = update(state, frozen, mini, ())
    if places is not None:
        jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), new.params, places
        )
    return state, new, measured


def test_the_gradient_is_that_of_the_merged_weights():
    """By the chain rule, so that alpha / rank and every transpose are right; on eight devices too."""
    c = config(kd={"estimator": "k2"})
    c = c.model_copy(update={"optimizer": c.optimizer.model_copy(update={"learning_rate": one()})})
    top = drawn(MODEL)
    sgd = optax.identity()
    whole, pull = jax.vjp(lambda top: adapters.merge(adapters.overlay(PARAMS, top), LORA), top)
    _, new, _ = updated(STUDENT, {}, whole, c, sgd)
    of_whole = jax.tree.map(jnp.subtract, whole, new.params)
    [expected] = pull(of_whole)
    _, new, measured = updated(MODEL, PARAMS, top, c, sgd)
    grads = jax.tree.map(jnp.subtract, top, new.params)
    jax.tree.map(lambda a, b: assert_near(a, b, 1e-4), grads, expected)
    assert_near(flat(grads), flat(expected), 2e-5)
    np.testing.assert_allclose(measured["grad_norm"], optax.global_norm(expected), rtol=1e-5)
    # One half of every adapter is multiplied by the other: a wrong scale could not hide.
    wrong = LoRA(LORA.rank, 2 * LORA.alpha, ALL)
    _, pull = jax.vjp(lambda top: adapters.merge(adapters.overlay(PARAMS, top), wrong), top)
    [other] = pull(of_whole)
    assert np.abs(flat(other) - flat(expected)).max() > 0.5 * np.abs(flat(expected)).max()

    mesh = sharding.make_mesh(MeshConfig(**MESH), jax.devices()[:8])
    place = jax.tree.map(lambda x: x.sharding, abstract_params(MODEL, mesh, jnp.float32))
    over_top, over_rest = adapters.split(place)
    placed = jax.device_put(top, over_top)
    shapes = {k: v.addressable_shards[0].data.shape for k, v in placed["layers"]["attn"].items()}
    d, n, h, r = 16 // 4, 4 // 2, 8, LORA.rank
    assert shapes["q_lora_a"] == (2, d, r)
    assert shapes["q_lora_b"] == (2, r, n, h)
    assert shapes["o_lora_a"] == (2, n, h, r)
    assert shapes["o_lora_b"] == (2, r, d)
    _, new, on_mesh = updated(MODEL, jax.device_put(PARAMS, over_rest), placed, c, sgd, mesh)
    assert_near(flat(jax.device_get(jax.tree.map(jnp.subtract, placed, new.params))), flat(expected), 2e-5)
    np.testing.assert_allclose(on_mesh["loss"], measured["loss"], rtol=1e-5)


def test_an_update_trains_the_adapters_alone():
    c = config(kd={"estimator": "k2"}, optimizer={"weight_decay": 0.1})
    before = jax.tree.map(np.array, PARAMS)
    frozen = jax.tree.map(jnp.copy, PARAMS)
    top = drawn(MODEL)
    old, new, _ = updated(MODEL, frozen, top, c, make_optimizer(c.optimizer, adapters.split(MODEL.dims)[0]))
    assert all(x.is_deleted() for x in jax.tree.leaves(old.params))  # donated
    jax.tree.map(np.testing.assert_array_equal, frozen, before)  # and these are not
    assert jax.tree.structure(new.params) == jax.tree.structure(top)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(top), strict=True))
    sizes = [x.size for x in jax.tree.leaves(new.opt_state) if x.ndim]
    assert sum(sizes) == 2 * sum(x.size for x in jax.tree.leaves(top))  # two moments


# Whole runs: random weights (of the run's seed), on eight devices.
STUDENT_LORA = {"architecture": {**SHAPE, "family": "qwen3"}, "lora": {"rank": 2, "alpha": 4.0}}
SECTIONS = {
    "student": STUDENT_LORA,
    "optimizer": {"learning_rate": 3e-2},
    "eval": {"every": 0, "num_samples": 0},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    _, done = run(folder, "run", **SECTIONS)
    assert done
    return folder / "run"


def saved_adapters(run_dir):
    [newest] = sorted((run_dir / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))[-1:]
    return ocp.StandardCheckpointer().restore(newest / "params")


def weights_by_hand(run_dir):
    """What a run's student computes with, from its seed and what is in its checkpoint."""
    c = load_run_config(run_dir)
    model = make_setup(c).student
    lora = LoRA(c.student.lora.rank, c.student.lora.alpha, c.student.lora.targets)
    base = make_model(model.config).init(seed_key(c.seed))
    return merged_by_hand(base, saved_adapters(run_dir), lora), base


def test_a_checkpoint_holds_adapters_alone(trained):
    saved = saved_adapters(trained)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(saved)]
    assert len(paths) == 2 * len(ALL)
    assert all("_lora_" in path for path in paths)
    assert {x.dtype for x in jax.tree.leaves(saved)} == {np.dtype("float32")}
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(saved))
    rows = metrics(trained)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    # The sampler and the trainer compute with the same adapters.
    assert max(row["sampler/logprob_gap"] for row in rows) < 1e-4
    assert rows[0]["skipped_updates"] == 0


@pytest.mark.slow
def test_stopped_and_resumed_is_bitwise_the_same(tmp_path, trained):
    log = tmp_path / "run" / "metrics.jsonl"

    def after_two_steps():
        return log.exists() and log.read_text().count("\n") >= 2

    _, done = run(tmp_path, "run", should_stop=after_two_steps, **SECTIONS)
    assert not done
    assert 0 < len(metrics(tmp_path / "run")) < 4
    assert train(load_run_config(tmp_path / "run"), Console(quiet=True), lambda: False)
    assert_same_run(tmp_path / "run", trained)


def test_other_adapters_do_not_fit_a_checkpoint(trained):
    for override in ("student.lora.rank=3", "student.lora=null", "student.lora.targets=[q]"):
        config = load_run_config(trained, [override, "train.num_steps=6"])
        with pytest.raises(ValueError, match="does not fit"):
            train(config, Console(quiet=True), lambda: False, accept_changes=True)


def test_eval_takes_the_trained_adapters(trained):
    console = Console(file=io.StringIO())
    assert evaluate(load_run_config(trained), EvalOptions(), console, lambda: False, is_run=True)
    (file,) = (trained / "eval").glob("eval_*.json")
    (found,) = json.loads(file.read_text())["evaluations"].values()
    last = json.loads((trained / "eval" / "step_000004.json").read_text())
    assert found == last
    first = json.loads((trained / "eval" / "step_000000.json").read_text())
    assert found["teacher_reverse_kl"] != first["teacher_reverse_kl"]


@pytest.mark.slow
def test_other_runs_begin_from_merged_weights(tmp_path, trained):
    """As student, as teacher (in int8 and bfloat16 too) and as what further adapters are trained on;
    the base is of the seed of the run that trained, not of the one that goes on."""
    expected, base = weights_by_hand(trained)
    moved = flat(jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), expected, base))
    assert moved.max() > 1e-2
    tree = {**TREE, **SECTIONS, "seed": 5, "student": {"run": str(trained)}, "teacher": {"run": str(trained)}}
    tree |= {"train": {**TREE["train"], "num_steps": 1}, "eval": {"num_prompts": 8, "num_samples": 0}}
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(tree))

    def setup_of(*overrides):
        return make_setup(load_config(tmp_path / "next.yaml", [f"log.dir={tmp_path / 'run'}", *overrides]))

    plain = setup_of()
    for params in (plain.teacher.params, plain.student_params(plain.init_trainable())):
        assert jax.tree.structure(params) == jax.tree.structure(base)
        jax.tree.map(assert_near, params, expected)
    further = setup_of("student.lora={rank: 1}", "teacher.weights=int8")
    jax.tree.map(assert_near, further.frozen, expected)
    teacher = further.teacher.params["layers"]["attn"]
    back = np.asarray(teacher["o"]) * np.asarray(teacher["o_scale"])[:, None, None]
    np.testing.assert_allclose(
        back, expected["layers"]["attn"]["o"], atol=0.51 * float(teacher["o_scale"].max())
    )
    half = setup_of("teacher.compute_dtype=bfloat16").teacher.params
    jax.tree.map(lambda x, y: assert_near(np.asarray(x, np.float32), y, 2**-8), half, expected)

    # What was computed in bfloat16 goes on unrounded: the adapters, and the weights as they were read.
    shutil.copytree(trained, tmp_path / "half")
    settings = tmp_path / "half" / "config.yaml"
    tree = yaml.safe_load(settings.read_text())
    tree["student"]["compute_dtype"] = "bfloat16"
    settings.write_text(yaml.safe_dump(tree))
    found = setup_of(f"student.run={tmp_path / 'half'}").init_trainable()
    jax.tree.map(assert_near, found, expected)

    # Student and teacher are one model: the self-check says so, or the run would stop.
    config, out = plain.config, io.StringIO()
    assert train(config, Console(file=out), lambda: False)
    assert "self-check: student = teacher" in out.getvalue()
    assert abs(metrics(tmp_path / "run")[0]["kd/reverse_kl"]) < 1e-6


def test_a_model_of_another_run_stays_the_one_that_was_begun_with(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "base")
    tree = {**TREE, **SECTIONS, "student": {"run": str(tmp_path / "base"), "lora": {"rank": 1}}}
    del tree["teacher"]
    tree |= {"kd": {"coef": 0.0}, "eval": {}, "log": {"dir": str(tmp_path / "run")}, "name": "further"}
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "next.yaml")
    (tmp_path / "run").mkdir()
    setup = make_setup(config)
    record_models(config, setup.run_steps)
    before = setup.frozen
    checkpoints = tmp_path / "base" / "checkpoints"
    # Other weights, of a run that has gone on.
    shutil.copytree(checkpoints / "2", checkpoints / "5")
    jax.tree.map(np.testing.assert_array_equal, make_setup(config).frozen, before)
    shutil.rmtree(checkpoints / "4")
    with pytest.raises(
        ValueError, match=r"was begun with step 4 of .* as its student, .* there are 2, 5; put"
    ):
        make_setup(config)
    # Another run that takes its place (--accept-changes) is begun with at its own newest.
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    other = load_config(tmp_path / "next.yaml", [f"student.run={tmp_path / 'other'}"])
    record_models(other, make_setup(other).run_steps)
    assert read_json(tmp_path / "run" / "models.json")["student"] == {
        "run": str(tmp_path / "other"),
        "step": 5,
    }
    # By another name it is the same run.
    other = load_config(tmp_path / "next.yaml", [f"student.run={tmp_path / 'base' / '..' / 'other'}"])
    assert recorded_step(other, "student") == 5
    (tmp_path / "run" / "models.json").unlink()
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), make_setup(config).frozen, before)
    assert any(jax.tree.leaves(changed))
