"""The `plan` command: what it compiles, what it says, and what it tries."""

import json

import jax
import pytest
import yaml
from plan_programs import TPU

from kdrl_jax.config import Config, load_config
from kdrl_jax.main import main
from kdrl_jax.plan.fit import Planner, candidates, changed, mean_lengths
from kdrl_jax.plan.measure import _needed
from kdrl_jax.plan.shapes import PUBLISHED, Shapes, model_shapes
from kdrl_jax.plan.topology import make_topology

TREE = {
    "name": "planned",
    "student": {"path": "Qwen/Qwen3-0.6B", "compute_dtype": "bfloat16", "keep_layers": [0, 1]},
    "teacher": {"path": "Qwen/Qwen3-1.7B", "compute_dtype": "bfloat16", "keep_layers": [0, 1]},
    "data": {"train": [{"kind": "task", "task": "chain_sum"}], "max_prompt_tokens": 128},
    "rollout": {"group_size": 4, "max_new_tokens": 384},
    "kd": {"coef": 0.1},
    "train": {"num_steps": 10, "prompts_per_iteration": 4, "remat": "full"},
}


def tree(**sections):
    out = json.loads(json.dumps(TREE))
    for name, value in sections.items():
        out[name] = {**out.get(name, {}), **value}
    return out


def planner(topology, config, tmp_path, lines=None):
    chip, devices = make_topology(topology)
    kept = None if tmp_path is None else tmp_path / "kept"
    say = (lambda line: None) if lines is None else lines.append
    return Planner(topology, chip, devices, model_shapes(config), kept, say)


@pytest.fixture
def _no_cache():
    """What is compiled for devices that are not there cannot be read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@TPU
@pytest.mark.usefixtures("_no_cache")
def test_a_config_is_compiled_and_its_tables_are_kept(tmp_path):
    config = Config.model_validate(tree())
    found = planner("v5e:2x2", config, tmp_path).plan(config)
    assert [m.name for m in found.programs] == [
        "prefill",
        "decode",
        "score, teacher",
        "update",
        "diagnostics",
    ]
    assert found.fits
    assert found.slots == 4
    params = 4 * sum(x.size for x in jax.tree.leaves(_student(config).abstract())) / 4
    by_name = {m.name: m for m in found.programs}
    # Parameters and both moments in float32, over four chips, and the minibatch.
    assert 3 * params <= by_name["update"].arguments < 3.2 * params
    for m in found.programs:
        assert m.seconds > 0
        assert m.peak >= m.arguments + m.temporaries
        # Counted by the formula, and in the program: with padding, and layers computed again.
        assert 0 < m.model_flops < m.flops
        assert not m.notes, (m.name, m.notes)
    assert {c["kind"] for c in by_name["update"].collectives} >= {"all-gather"}
    again = planner("v5e:2x2", config, tmp_path).plan(config)
    assert all(m.compile_seconds == 0 for m in again.programs)
    assert [m.peak for m in again.programs] == [m.peak for m in found.programs]


def _student(config):
    from kdrl_jax.models.decoder import make_model

    return make_model(model_shapes(config).of_role["student"])


@TPU
@pytest.mark.usefixtures("_no_cache")
def test_what_does_not_fit_is_helped(tmp_path):
    """A wide model on one chip: rungs of the ladder are tried until one fits."""
    wide = {"path": "Qwen/Qwen2.5-7B", "compute_dtype": "bfloat16", "keep_layers": [0]}
    config = Config.model_validate(
        tree(student=wide, kd={"coef": 0}, train={"diagnostics_every": 0, "remat": "none"})
        | {"teacher": None}
    )
    one = planner("v5e:1x1", config, None)
    found = one.plan(config)
    assert not found.fits
    tried = list(one.remedies(config, found))
    assert any(plan.fits for _, plan in tried)
    assert not any(plan.fits for change, plan in tried if change == {"train.remat": "full"})


def test_candidates_are_changes_that_a_config_takes():
    config = Config.model_validate(tree(train={"remat": "none"}))
    plan = type("Plan", (), {"programs": [], "problem": "no slot", "num_chips": 4, "chip": None})()
    found = list(candidates(config, plan))
    assert {"mesh.tensor": 2} in found
    assert {"teacher.weights": "int8"} in found
    for change in found:
        ((key, value),) = change.items()
        section, _, name = key.rpartition(".")
        model = changed(config, change)
        for part in section.split("."):
            model = getattr(model, part)
        assert getattr(model, name) == value or value == {}


def test_lengths_are_half_of_the_longest_unless_told():
    config = Config.model_validate(tree())
    assert (mean_lengths(config).prompt, mean_lengths(config).completion) == (64, 192)
    told = Config.model_validate(tree(plan={"prompt_tokens": 10, "completion_tokens": 20}))
    assert (mean_lengths(told).prompt, mean_lengths(told).completion) == (10, 20)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_understood(name):
    config = Config.model_validate(tree() | {"student": {"path": name}, "teacher": {"path": name}})
    shapes = model_shapes(config)
    assert isinstance(shapes, Shapes)
    assert shapes.of_role["student"].vocab_size == shapes.num_tokens
    sizes = {"0.5B": 0.36, "0.6B": 0.44, "1.5B": 1.31, "1.7B": 1.41, "4B": 3.6, "7B": 6.5, "8B": 6.9}
    layers = shapes.of_role["student"]
    per_layer = layers.embed_dim * layers.head_dim * 2 * (layers.num_heads + layers.num_kv_heads)
    per_layer += 3 * layers.embed_dim * layers.mlp_dim
    expected = next(size for key, size in sizes.items() if name.endswith(key))
    assert per_layer * layers.num_layers / 1e9 == pytest.approx(expected, rel=0.03)


def test_the_compilers_refusal_says_how_much_it_wanted():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
    )
    assert _needed(message + "34.50G of 15.75G hbm.") == 34.5 * 2**30
    assert _needed("INTERNAL: something else") is None


def test_mistakes_are_one_line(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree()))
    for word, message in (
        ("plan.topology=v9:4x4", "unknown kind 'v9'; one of v4"),
        ("plan.topolgy=v5e:4x4", "did you mean plan.topology"),
    ):
        assert main(["plan", "--config", str(file), word, f"log.dir={tmp_path}/run"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert load_config(file, []).plan.topology == "v5e:4x4"
