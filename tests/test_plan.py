"""The `plan` command: what it compiles, what it says, and what it tries."""

import json

import jax
import pytest
import yaml
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from plan_programs import TPU

from kdrl_jax.config import Config, load_config
from kdrl_jax.main import main
from kdrl_jax.plan import tables
from kdrl_jax.plan.abstract import abstract_head
from kdrl_jax.plan.chips import CHIPS
from kdrl_jax.plan.fit import Plan, Planner, candidates, changed, mean_lengths
from kdrl_jax.plan.logged import logged_names, lower_logged
from kdrl_jax.plan.measure import _measured, _needed, _too_large
from kdrl_jax.plan.programs import UPDATE, Lengths, Planned, RunPrograms, bytes_on_chip
from kdrl_jax.plan.shapes import PUBLISHED, Ids, Shapes, model_shapes
from kdrl_jax.plan.topology import make_topology
from kdrl_jax.plan.walk import NOTHING
from kdrl_jax.rollout.engine import Stopped
from kdrl_jax.scoring.packer import config_pack_shape
from kdrl_jax.setup import abstract_setup, check_mesh

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
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    reset_cache()


@TPU
@pytest.mark.slow
@pytest.mark.usefixtures("_no_cache")
def test_a_config_is_compiled_and_its_tables_are_kept(tmp_path):
    config = Config.model_validate(tree())
    found = planner("v5e:2x2", config, tmp_path).plan(config)
    assert [m.name for m in found.programs] == [
        "relay",
        "prefill",
        "decode",
        "score, teacher",
        "update",
        "diagnostics",
        "log, teacher",
        "log, student",
        "log, tokens",
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
        assert 0 < m.model_flops < m.flops or m.name == "relay"
        assert not m.notes, (m.name, m.notes)
    assert {c["kind"] for c in by_name["update"].collectives} >= {"all-gather"}
    # All that is sharded goes to all four chips once, in bfloat16.
    relayed = sum(c["bytes"] for c in by_name["relay"].collectives)
    assert relayed == pytest.approx(4 * params / 2, rel=0.02)
    again = planner("v5e:2x2", config, tmp_path).plan(config)
    assert all(m.compile_seconds == 0 for m in again.programs)
    assert [m.peak for m in again.programs] == [m.peak for m in found.programs]


def _student(config):
    from kdrl_jax.models.decoder import make_model

    return make_model(model_shapes(config).of_role["student"])


@TPU
@pytest.mark.slow
@pytest.mark.usefixtures("_no_cache")
def test_what_does_not_fit_is_helped(tmp_path):
    """A vocabulary too large for one chip: changes are tried until one fits."""
    wide = {"path": "Qwen/Qwen2.5-7B", "compute_dtype": "bfloat16", "keep_layers": [0]}
    config = Config.model_validate(
        tree(student=wide, kd={"coef": 0}, train={"diagnostics_every": 0, "remat": "none"})
        | {"teacher": None}
    )
    one = planner("v5e:1x1", config, None)
    found = one.plan(config)
    assert not found.fits
    lines = []
    one.say = lines.append
    tried = list(one.remedies(config, found))
    assert any(plan.fits for _, plan in tried)
    assert all(": v5e:1x1: compiling " in line and line.startswith("trying ") for line in lines)
    # Of what has no room, nothing is compiled after the first program that has none.
    for _, plan in tried:
        assert plan.fits or plan.problem or [m.name for m in plan.too_large] == [plan.programs[-1].name]


@TPU
@pytest.mark.slow
@pytest.mark.usefixtures("_no_cache")
def test_an_update_that_has_no_room_is_computed_again():
    """All that a layer computes is more than a chip has; recomputed, it fits, and that is tried first."""
    config = Config.model_validate(
        tree(
            rollout={"max_new_tokens": 3968},
            student={"keep_layers": list(range(28))},
            kd={"coef": 0},
            train={"diagnostics_every": 0, "remat": "none", "microbatch_rows": 4},
        )
        | {"teacher": None}
    )
    one = planner("v5e:2x2", config, None)
    found = one.plan(config)
    assert [m.name for m in found.too_large] == ["update"]
    change, tried = next(one.remedies(config, found))
    assert (change, tried.fits) == ({"train.remat": "full"}, True)
    assert tried.programs[0].name == "update"


def test_candidates_are_changes_that_a_config_takes():
    config = Config.model_validate(tree(train={"remat": "none"}))
    plan = Plan("v5e:2x2", CHIPS["v5e"], 4, 0, [], "no slot")
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
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(16.96G) exceeds available HBM (15.75G)."
    )
    assert _needed(message) == 16.96 * 2**30
    assert _needed("RESOURCE_EXHAUSTED: in other words") == float("inf")
    assert _needed("INTERNAL: something else") is None


@pytest.mark.parametrize("needed", [17e9, float("inf")])
def test_a_program_that_the_compiler_refuses_leaves_gaps_in_the_tables(needed):
    planned = Planned("update", UPDATE, None, 1e9, 1.0, NOTHING, 1e12)
    refused = _measured(planned, _too_large(planned, needed, 3.0))
    plan = Plan("v5e:2x2", CHIPS["v5e"], 4, 8, [refused])
    assert not plan.fits
    lines = tables.summary(plan, Lengths(1, 1))
    assert lines[-2] == ("slots on each device: 8; no time is estimated, since the compiler refuses update")
    shown = str([lines, tables.program_rows(plan), tables.comparison_rows([plan])])
    assert "nan" not in shown
    assert "inf" not in shown
    assert json.loads(tables.as_json([plan]))[0]["programs"][0]["seconds"] is None


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


def programs(config, kind="v5e", devices=4, memory=None, lengths=None):
    """Of a config, lowered for no chip that needs a compiler: shapes and sizes alone."""
    mesh = check_mesh(config, jax.devices()[:devices])
    setup = abstract_setup(config, mesh, model_shapes(config).of_role, Ids(1000))
    return RunPrograms(setup, memory or 0.9 * CHIPS[kind].memory, lengths or mean_lengths(config))


def test_what_lives_besides_a_program_is_counted_once():
    config = Config.model_validate(tree(kd={"coef": 0.1, "estimator": "full"}, train={"num_minibatches": 2}))
    run = programs(config)
    student, optimizer, teacher = (run.held[name] for name in ("student", "optimizer", "teacher"))
    assert optimizer == pytest.approx(2 * student, rel=1e-3)
    states = run.minibatch.teacher.states[0]
    assert run.states == states.size * 2 / 4 > 0
    planned = {p.name: p for p in run.lower()}
    assert list(planned) == run.names()
    assert planned["prefill"].resident == student + optimizer + teacher
    # The student's and the teacher's states of both minibatches; less what the program gives itself.
    assert planned["score, student"].resident == optimizer + teacher + 2 * run.states
    assert planned["score, teacher"].resident == student + optimizer + run.states
    head = bytes_on_chip(run.heads)
    assert planned["update"].resident == pytest.approx(teacher - head + run.states)
    assert planned["diagnostics"].resident == pytest.approx(optimizer + teacher - head + run.states)
    assert planned["score, student"].runs == planned["score, teacher"].runs == planned["update"].runs == 2


@pytest.mark.parametrize(("teachers", "park"), [(1, "never"), (2, "always")])
def test_tokens_of_logged_rollouts_are_planned(teachers, park):
    """What `train` compiles in its first iteration beside the update, with what lies there meanwhile."""
    settings = tree(
        kd={"coef": 0.1, "estimator": "full"},
        train={"park_frozen": park, "num_minibatches": 2},
        log={"rollouts_every": 8, "rollouts_rows": 8},
    )
    if teachers == 2:
        settings |= {"teacher": None, "teachers": dict.fromkeys("ab", TREE["teacher"])}
        settings["kd"]["mixture"] = {"a": 1.0, "b": 1.0}
    run = programs(Config.model_validate(settings))
    found = list(lower_logged(run))
    assert [p.name for p in found] == logged_names(run)
    *of_models, tokens = found
    assert [p.name for p in of_models] == [f"log, {role}" for role in (*run.setup.teachers, "student")]
    assert {(p.phase, p.runs) for p in found} == {("log", 2 / 8)}
    scored = 2 * run.states
    width = next(iter(run.setup.teachers.values())).model.config.embed_dim
    shape = config_pack_shape(run.setup.config, run.setup.mesh, 8)
    states = shape.num_rows * shape.length * width * 2 / 4
    held = run.held
    for number, planned in enumerate(of_models[:-1]):
        role = list(run.setup.teachers)[number]
        others = sum(size for name, size in held.items() if name != role)
        assert planned.resident == pytest.approx(others + scored + number * states)
    frozen = sum(held[role] for role in run.setup.teachers)
    heads = bytes_on_chip({role: abstract_head(t, run.setup.mesh) for role, t in run.setup.teachers.items()})
    besides = 0 if park == "always" else frozen - heads
    assert tokens.resident == pytest.approx(held["optimizer"] + scored + besides)
    assert all(p.model_flops > 0 for p in found)
    assert not logged_names(programs(Config.model_validate(tree(log={"rollouts_tokens": False}))))


def test_heads_of_parked_teachers_stay():
    config = Config.model_validate(
        tree(kd={"coef": 0.1, "estimator": "full"}, train={"park_frozen": "always", "park_optimizer": True})
    )
    run = programs(config)
    planned = {p.name: p for p in run.lower()}
    assert list(planned) == run.names()
    heads = bytes_on_chip(run.heads)
    assert heads > 0
    assert planned["prefill"].resident == run.held["student"] + heads
    assert planned["update"].resident == 0


def test_a_student_that_is_its_own_reference_is_counted_once():
    lora = {"student": TREE["student"] | {"lora": {}}}
    config = Config.model_validate(tree(ref={"coef": 0.1}) | lora)
    run = programs(config)
    assert run.held["reference"] == 0
    assert run.held["frozen weights of the student"] > 0
    planned = {p.name: p for p in run.lower()}
    assert list(planned) == run.names()
    assert planned["score, reference"].resident == pytest.approx(
        run.held["student"] + run.held["optimizer"] + run.held["teacher"]
    )


def test_passes_are_those_of_lengths_spread_about_their_mean():
    """All of the longest fill a row each; of half as long, spread, those that fit together share one."""
    config = Config.model_validate(
        tree(
            data={"max_prompt_tokens": 1024},
            rollout={"max_new_tokens": 7168, "group_size": 8},
            train={"prompts_per_iteration": 16, "attention": "splash"},
        )
    )
    longest = programs(config, memory=2**50, lengths=Lengths(1024, 7168)).work
    assert (longest.passes, longest.scored) == (128 / 4, 128 * 7168)
    half = programs(config, memory=2**50, lengths=Lengths(512, 3584)).work
    assert half.scored == pytest.approx(128 * 3584)
    assert min(half.sequences) < 520
    assert max(half.sequences) > 7600
    assert 0.9 < half.tokens / (half.passes * 4 * 8192) <= 1


@TPU
@pytest.mark.slow
@pytest.mark.usefixtures("_no_cache")
def test_a_slice_that_does_not_go_with_a_config_is_a_row_of_the_comparison(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(tree(train={"diagnostics_every": 0})))
    words = [
        "plan.topology=[v5e:2x4, v5e:2x2]",
        "plan.search=false",
        f"log.dir={tmp_path}/run",
        "cache_dir=null",
    ]
    assert main(["plan", "--config", str(file), *words]) == 1
    out = capsys.readouterr().out
    assert "train.prompts_per_iteration=4 does not divide over 8 devices" in " ".join(out.split())
    found = json.loads((tmp_path / "run" / "plan" / "plan.json").read_text())
    assert [plan["fits"] for plan in found] == [False, True]
    page = (tmp_path / "run" / "plan" / "plan.md").read_text()
    assert page.count("## Programs, on each chip") == 1
    assert "| v5e:2x4 | 8 | no |" in page


@TPU
@pytest.mark.usefixtures("_no_cache")
def test_plan_ends_between_two_programs(tmp_path):
    config = Config.model_validate(tree())
    lines = []
    one = planner("v5e:2x2", config, tmp_path, lines)
    one.should_stop = lambda: len(lines) == 2
    with pytest.raises(Stopped):
        one.plan(config)
    assert len(lines) == len(list((tmp_path / "kept").iterdir())) == 2


def test_models_that_are_trained_first_are_planned_from_their_configs():
    shapes = model_shapes(load_config("configs/quickstart.yaml", []))
    student = load_config("configs/quickstart_student.yaml", []).student.architecture
    assert shapes.of_role["student"].num_layers == student.num_hidden_layers
    assert set(shapes.of_role) == {"student", "teacher"}


@pytest.mark.slow
def test_each_rung_of_remat_holds_less():
    small = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    held = {}
    for rung in ("none", "elementwise", "mlp", "products", "full"):
        config = Config.model_validate(
            tree(train={"remat": rung, "diagnostics_every": 0, "microbatch_rows": 4})
            | {
                "student": {"architecture": small},
                "teacher": {"architecture": small},
                "tokenizer": {"kind": "char"},
            }
        )
        (update,) = programs(config, devices=1).lower(["update"])
        held[rung] = update.lowered.compile().memory_analysis().temp_size_in_bytes
    sizes = list(held.values())
    assert sizes == sorted(sizes, reverse=True)
    assert held["full"] < 0.5 * held["none"]
