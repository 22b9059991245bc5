"""A teacher in int8: how it is rounded, that it computes what its weights say, and runs that use it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import GOLDEN
from test_lora import adapted, assert_near
from test_models import loaded, opened
from test_pairing import model_folder, parts, run_config
from test_train import SHAPE, config_file, metrics, run

from kdrl_jax import sharding
from kdrl_jax.config import MeshConfig, load_config
from kdrl_jax.models.block import READS_AND_WRITES, Holding
from kdrl_jax.models.decoder import make_model
from kdrl_jax.models.quantize import quantize
from kdrl_jax.self_check import limit_of, self_check, self_divergence
from kdrl_jax.setup import abstract_params, make_setup
from kdrl_jax.types import TrainingError

INT8 = Holding(int8=True)
# Dimensions that a product sums over, layers left out: what is not here is summed over the first.
SUMMED = {"o": (0, 1), "embed": (1,)}


# What `test_rounding_is_within_half_a_scale` holds, on a leaf that is there in floats; compiled, as always.
rounded_at_once = jax.jit(quantize, static_argnums=1)


def matrices(params):
    """(dotted path, leaf) of all that is held in int8."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name in (*READS_AND_WRITES, "embed", "head"):
            yield ".".join(key.key for key in path), np.asarray(leaf, np.float32)


def at(params, path):
    for key in path.split("."):
        params = params[key]
    return np.asarray(params)


def dequantized(params):
    """The same model in floats: every int8 leaf times its scales."""
    out = {}
    for name, value in params.items():
        if isinstance(value, dict):
            out[name] = dequantized(value)
        elif f"{name}_scale" in params:
            # Scales lack the dimensions that are summed over; o alone lacks two.
            scale = np.asarray(params[f"{name}_scale"])
            axes = SUMMED.get(name, (0,))
            stacked = name in READS_AND_WRITES
            out[name] = np.asarray(value, np.float32) * np.expand_dims(
                scale, tuple(a + stacked for a in axes)
            )
        elif not name.endswith("_scale"):
            out[name] = value
    return out


def in_int8(source, mesh=None):
    """An int8 model's parameters, as they stream from the file."""
    mesh = mesh or sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return source.load(abstract_params(make_model(source.config, holding=INT8), mesh, jnp.float32))


def test_rounding_is_within_half_a_scale():
    weight = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32) * [1.0, 1e-6, 1e4, 1.0]
    weight[:, :, 3] = 0
    rounded, scale = quantize(jnp.asarray(weight, jnp.float32), (0, 1))
    assert rounded.dtype == jnp.int8
    assert scale.shape == (4,)
    assert (np.abs(np.asarray(rounded)).max((0, 1)) == [127, 127, 127, 0]).all()
    error = np.abs(np.asarray(rounded, np.float64) * np.asarray(scale, np.float64) - weight)
    assert (error <= 0.5 * (1 + 1e-5) * np.asarray(scale)).all()
    assert (error[:, :, :3].max((0, 1)) > 0.3 * np.asarray(scale)[:3]).all()
    assert scale[3] > 0  # a channel of zeros has a scale, and stays zero
    assert (error[:, :, 3] == 0).all()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3"])
def test_what_streams_from_a_file_is_the_float_leaf_rounded(name):
    """Stacked, embedding and head leaves; tied (bfloat16 on disk) and untied; on a mesh of eight too."""
    source = opened(GOLDEN / name)
    floats, rounded = loaded(source), in_int8(source)
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    abstract = abstract_params(make_model(source.config, holding=INT8), mesh, jnp.float32)
    on_mesh = in_int8(source, mesh)
    assert jax.tree.structure(rounded) == jax.tree.structure(abstract)
    jax.tree.map(lambda x, s: x.sharding == s.sharding or pytest.fail(str(x.sharding)), on_mesh, abstract)
    found = dict(matrices(floats))
    assert len(found) == 7 + (1 if source.config.tie_embeddings else 2)
    for path, weight in found.items():
        name = path.rpartition(".")[2]
        axes = SUMMED.get(name, (0,))
        layers = [(i, x) for i, x in enumerate(weight)] if name in READS_AND_WRITES else [(..., weight)]
        for i, layer in layers:
            expected, scale = rounded_at_once(layer, axes)
            for params in (rounded, on_mesh):
                np.testing.assert_array_equal(at(params, path)[i], expected, err_msg=path)
                np.testing.assert_array_equal(at(params, f"{path}_scale")[i], scale, err_msg=path)
    for path in ("final_norm", "layers.attn_norm"):
        np.testing.assert_array_equal(at(rounded, path), at(floats, path))


@pytest.mark.parametrize("name", ["qwen2", "llama_tied", "gemma2"])
def test_int8_computes_what_its_weights_say(name):
    """In one pass, in prefill and in decoding: the logits of the same weights in floats."""
    source = opened(GOLDEN / name)
    params = in_int8(source)
    int8, plain = make_model(source.config, holding=INT8), make_model(source.config)
    floats = dequantized(params)
    assert jax.tree.structure(floats) == jax.tree.structure(loaded(source))
    tokens = np.load(GOLDEN / name / "golden.npz")["tokens"]
    expected = adapted(plain, floats, tokens)
    assert np.abs(adapted(plain, loaded(source), tokens) - expected).max() > 1e-3 * np.abs(expected).max()
    assert_near(adapted(int8, params, tokens), expected, 3e-5)
    prompt = tokens.shape[1] - 1
    assert_near(adapted(int8, params, tokens, prompt), expected[:, prompt - 1 :], 3e-5)


def test_scales_are_not_rounded_to_bfloat16():
    """A scale is the same for all that a channel multiplies, so that its rounding would not average out."""
    source = opened(GOLDEN / "llama")
    c = dataclasses.replace(source.config, num_layers=1)
    params = in_int8(source)
    decoder = make_model(c, jnp.bfloat16, INT8)
    layer = {k: v[0] for k, v in params["layers"]["mlp"].items()}
    x = jnp.eye(c.embed_dim, dtype=jnp.bfloat16)

    class Slice:
        holding, read = INT8, staticmethod(lambda name: layer[name])

    y = type(decoder.bind(params).layers.mlp).times(Slice(), "up", x)
    expected = np.asarray(layer["up"], np.float32) * np.asarray(layer["up_scale"])
    np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.bfloat16))


@pytest.mark.parametrize("estimator", ["k2", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_learns_from_an_int8_teacher(tmp_path, estimator):
    """On eight devices; its divergence is near that of the teacher in floats, and is not the same."""
    first = []
    for weights in ("float", "int8"):
        teacher = {"architecture": {**SHAPE, "hidden_size": 32}, "weights": weights}
        sections = {"teacher": teacher, "kd": {"coef": 1.0, "estimator": estimator}, "seed": 1}
        sections |= {
            "train": {"num_steps": 1, "diagnostics_every": 0},
            "eval": {"every": 0, "num_samples": 0},
        }
        _, done = run(tmp_path, weights, **sections)
        assert done
        first.append(metrics(tmp_path / weights)[0])
    key = "kd/reverse_kl_exact" if estimator == "full" else "kd/reverse_kl"
    plain, rounded = (row[key] for row in first)
    assert plain != rounded
    assert abs(plain - rounded) < 0.02 * max(abs(plain), 0.1)
    assert abs(first[0]["kd/loss"] / first[1]["kd/loss"] - 1) < 0.05
    assert first[1]["skipped_updates"] == 0
    assert all(np.isfinite(v) for v in first[1].values() if v is not None)


def test_a_random_teacher_is_rounded_too(tmp_path):
    teacher = {"architecture": {**SHAPE, "family": "qwen3"}, "weights": "int8"}
    path = config_file(tmp_path, student={"architecture": {**SHAPE, "family": "qwen3"}}, teacher=teacher)
    setup = make_setup(load_config(path))
    student = setup.student_params(setup.init_trainable())
    for name, weight in matrices(student):
        stacked = name.startswith("layers.")
        axes = tuple(a + stacked for a in SUMMED.get(name.rpartition(".")[2], (0,)))
        expected, scale = rounded_at_once(weight, axes)
        np.testing.assert_array_equal(at(setup.teacher.params, name), expected)
        np.testing.assert_array_equal(at(setup.teacher.params, f"{name}_scale"), scale)


def test_only_a_teacher_is_rounded_and_only_a_student_adapted(tmp_path):
    path = config_file(tmp_path)
    for override, wanted in {
        "student.weights=int8": "student.weights=int8 cannot be trained",
        "teacher.lora={rank: 2}": "teacher.lora is set, but a teacher is not trained",
        "student.lora={targets: [qq]}": "student.lora.targets",
        "student.lora={targets: []}": "student.lora.targets",
        "student.lora={rank: 0}": "student.lora.rank",
        "teacher.weights=int4": "int8",
    }.items():
        with pytest.raises(ValueError, match=re.escape(wanted)) as error:
            load_config(path, [override])
        assert "\n" not in str(error.value)


def test_the_self_check_knows_of_int8(tmp_path):
    """The teacher is the student's own model, but rounded: near it, and no nearer than rounding is."""
    path = model_folder(tmp_path / "model")
    setup = make_setup(run_config(tmp_path, path, path, "teacher.weights=int8"))
    assert limit_of(setup.config) > 100 * limit_of(make_setup(run_config(tmp_path, path, path)).config)
    kl = self_divergence(*parts(setup))
    assert 1e-6 < kl < limit_of(setup.config)
    assert "self-check: student = teacher" in str(self_check(*parts(setup)))
    teacher = setup.teacher
    scales = teacher.params["layers"]["mlp"]["down_scale"]
    wrong = {**teacher.params["layers"]["mlp"], "down_scale": scales * 4}
    params = {**teacher.params, "layers": {**teacher.params["layers"], "mlp": wrong}}
    damaged = dataclasses.replace(setup, teachers={"teacher": dataclasses.replace(teacher, params=params)})
    with pytest.raises(TrainingError, match="float32 and int8 in float32"):
        self_check(*parts(damaged))
