"""From YAML and overrides to a Config, and one clear line for every mistake."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kdrl_jax.config import Config, ConfigError, load_config, load_run_config, save_config
from kdrl_jax.config.errors import setting_names
from kdrl_jax.config.estimators import REFUSED
from kdrl_jax.config.load import _Dumper, differences
from kdrl_jax.config.schedules import Constant, Cosine, Linear, Piecewise

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG_FILES = sorted(p for p in CONFIGS.rglob("*.y*ml"))
RUNNABLE = [p for p in CONFIG_FILES if "base" not in p.name]

ARCHITECTURE = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GOOD: dict[str, Any] = {
    "name": "good",
    "student": {"architecture": ARCHITECTURE},
    "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
    "train": {"num_steps": 10},
}
FULL: dict[str, Any] = GOOD | {
    "seed": 3,
    "teacher": {"path": "teacher.gguf", "keep_layers": ["0-3", 7], "compute_dtype": "bfloat16"},
    "tokenizer": {"kind": "file", "path": "2020-01-01"},
    "data": {
        "train": [
            {"kind": "task", "task": "word_sum", "weight": 3},
            {"kind": "jsonl", "path": "1e5", "first": 4},
        ],
        "eval": [{"kind": "jsonl", "path": "~"}],
        "prompt_template": "Q: {question}\n\tzwei Zeilen – \u2028 'x' \"y\": #z\n",
    },
    "reward": {"shaping": {"format": 0.1, "1.5": -2}},
    "rl": {"coef": {"kind": "piecewise", "values": {0: 1, 5: 0.5}}},
    "kd": {
        "coef": {"kind": "max_linear", "a": 5e-3, "b": 5e-5, "c": 1e-3, "warmup_steps": 2},
        "mask": "group",
    },
    "optimizer": {"learning_rate": {"kind": "exponential", "start": 1e-22, "rate": 0.5, "steps": 7}},
    "eval": {"every": 5, "agreement": True},
    "log": {"dir": "some dir/ü: 'x'"},
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write(tmp_path / "good.yaml", GOOD)


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else yaml.dump(tree, Dumper=_Dumper))
    return path


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


# ---- The files in configs/


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_loads(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path)
    assert load_config(tmp_path / "config.yaml") == config
    for model in (config.student, config.teacher):
        if model is not None and model.run is not None and model.run.endswith(("yaml", "yml")):
            assert Path(model.run) in [Path(os.path.normpath(p)) for p in CONFIG_FILES]


@pytest.mark.parametrize("path", sorted((CONFIGS / "paper").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_setting_of_the_paper_says_whose_it_is(path):
    """Confirmed, ours, or of memory alone."""
    marked = ("# paper", "# ours", "# memory alone")
    whose = None
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith(("#", "extends:", "name:", "plan:")):
            continue
        if not line.startswith(" "):
            whose = None
        if line.split(" #")[0].rstrip().endswith(":"):  # a section, whose mark is that of its entries
            whose = whose or ("marked" if any(mark in line for mark in marked) else None)
            continue
        assert whose or any(mark in line for mark in marked), line


def test_the_papers_runs_differ_in_what_they_are_named_for():
    runs = {p.stem: load_config(p) for p in (CONFIGS / "paper").glob("*.yaml") if p in RUNNABLE}
    assert len(runs) == 7
    base = runs["kdrl"].model_dump()
    for name, config in runs.items():
        differ = {key.partition(".")[0] for key, _, _ in differences(base, config.model_dump())}
        assert differ <= {"name", "rl", "kd", "teacher", "train", "plan"}, name
        assert ("train" in differ) == (name == "kdrl_anneal_v5p"), name
        assert ("teacher" in differ) == (name == "grpo")
    masks = {name: config.kd.mask for name, config in runs.items() if config.kd.mask != "none"}
    assert masks == {"kdrl_mask_response": "response", "kdrl_mask_group": "group"}


def test_every_base_is_extended_and_cannot_stand_alone():
    trees = {p: yaml.safe_load(p.read_text()) for p in CONFIG_FILES}
    extended = {
        (p.parent / parent).resolve()
        for p, tree in trees.items()
        for parent in np.atleast_1d(tree.get("extends", [])).tolist()
    }
    bases = [p for p in CONFIG_FILES if p not in RUNNABLE]
    assert RUNNABLE
    for base in bases:
        assert base.resolve() in extended, f"nothing extends {base}"
        with pytest.raises(ConfigError):
            load_config(base)


# ---- Files, extends and overrides


def test_defaults_and_overrides(good):
    assert load_config(good).rollout.group_size == 8
    config = load_config(good, ["rollout.group_size=4", "kd.max_abs_logratio=2", "seed=7", "seed = 8"])
    assert (config.rollout.group_size, config.kd.max_abs_logratio, config.seed) == (4, 2.0, 8)
    assert config.run_dir == "runs/good"
    assert load_config(good, ["log.dir=elsewhere"]).run_dir == "elsewhere"
    assert load_config(good, ["data.prompt_template='{question}=?'"]).data.prompt_template == "{question}=?"
    assert load_config(good, ["optimizer={b1: 0.5}"]).optimizer.b1 == 0.5
    assert load_config(good, ["optimizer.max_grad_norm=null"]).optimizer.max_grad_norm is None


def test_extends_is_nested_and_relative_to_the_file(tmp_path, good, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    write(tmp_path / "sub/middle.yaml", {"extends": "../good.yaml", "seed": 1, "rl": {"clip_low": 0.1}})
    top = write(tmp_path / "top.yaml", {"extends": "sub/middle.yaml", "seed": 2, "rl": {"clip_high": 0.3}})
    config = load_config(top)
    clips = [config.rl.clip_low, config.rl.clip_high]
    assert (config.name, config.seed, clips) == ("good", 2, [Constant(value=0.1), Constant(value=0.3)])


def test_extends_a_list_later_ones_over_earlier(tmp_path, good):
    """How a recipe and a setting of one's own are put together."""
    write(
        tmp_path / "a.yaml",
        {"seed": 1, "rl": {"coef": 2, "loss": "cispo"}, "kd": {"estimator": "top_k", "top_k": 3}},
    )
    write(tmp_path / "b.yaml", {"seed": 2, "rl": {"coef": 3}, "student": {"path": "b"}})
    top = write(
        tmp_path / "top.yaml", {"extends": ["good.yaml", "a.yaml", "b.yaml"], "kd": {"mask": "group"}}
    )
    config = load_config(top)
    assert (config.seed, config.rl.coef, config.rl.loss) == (2, Constant(value=3), "cispo")
    assert (config.kd.top_k, config.kd.mask, config.student.path) == (3, "group", "b")
    assert config.student.architecture is None


def test_run_is_relative_to_the_file_that_names_it(tmp_path, good):
    write(tmp_path / "sub/teacher.yaml", GOOD)
    write(tmp_path / "sub/base.yaml", {"extends": "../good.yaml", "teacher": {"run": "teacher.yaml"}})
    top = write(tmp_path / "top.yaml", {"extends": "sub/base.yaml", "student": {"run": "runs/elsewhere"}})
    config = load_config(top)
    assert config.teacher is not None
    assert config.teacher.run == str(tmp_path / "sub/teacher.yaml")
    assert config.student.run == "runs/elsewhere"  # not there yet: relative to the working directory


def test_extends_in_a_circle(tmp_path):
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    assert "circle: a.yaml -> b.yaml -> a.yaml" in message_of(tmp_path / "a.yaml")
    own = write(tmp_path / "own.yaml", {"extends": "own.yaml"})
    assert "circle" in message_of(own)


def test_merging(tmp_path, good):
    """Mappings merge; another kind, or another origin of a model, replaces the mapping whole."""
    base = FULL | {"kd": {"coef": {"kind": "linear", "start": 1, "end": 0, "steps": 4}, "mask": "group"}}
    path = write(tmp_path / "base.yaml", base)

    def load(*overrides):
        return load_config(path, overrides)

    assert load("kd.coef.end=0.5").kd.coef == Linear(kind="linear", start=1, end=0.5, steps=4)
    assert load("kd.coef={kind: linear, steps: 9}").kd.coef == Linear(kind="linear", start=1, end=0, steps=9)
    cosine = load("kd.coef={kind: cosine, start: 2, steps: 3}").kd
    assert (cosine.coef, cosine.mask) == (Cosine(kind="cosine", start=2, steps=3), "group")
    assert "'kd.coef.start' is required" in message_of(path, "kd.coef.kind=cosine")
    assert load("kd.coef=2").kd.coef == Constant(value=2)
    assert load("kd.coef=2", "kd.coef.value=3").kd.coef == Constant(value=3)
    assert len(load("data.train=[{kind: task, task: chain_sum}]").data.train) == 1
    by_step = load("rl.coef.values={0: 0, 3: 1}").rl.coef
    assert by_step == Piecewise(kind="piecewise", values={0: 0.0, 3: 1.0})
    assert load('rl.coef={"kind": "piecewise", "values": {"0": 0, "3": 1}}').rl.coef == by_step

    teacher = load("teacher.run=runs/t").teacher
    assert teacher is not None
    assert (teacher.run, teacher.path, teacher.keep_layers) == ("runs/t", None, None)
    teacher = load("teacher.path=other.gguf").teacher
    assert teacher is not None
    assert (teacher.path, teacher.keep_layers) == ("other.gguf", ("0-3", 7))
    assert load("teacher=null", "kd.coef=0", "eval.agreement=false").teacher is None
    assert load("student.path=s").student.architecture is None


def test_a_resolved_config_takes_the_same_overrides(tmp_path):
    """It spells out every origin of a model, two of them as null."""
    save_config(load_config(write(tmp_path / "full.yaml", FULL)), tmp_path)
    config = load_run_config(tmp_path, ["teacher.run=runs/t", "student.path=s"])
    assert config.teacher is not None
    assert (config.teacher.run, config.teacher.path) == ("runs/t", None)
    assert (config.student.path, config.student.architecture) == ("s", None)


@pytest.mark.parametrize("tree", [GOOD, FULL, *(GOOD | {"name": n} for n in ("1e5", "0x10", "yes", "1_0"))])
def test_a_saved_run_loads_as_itself(tree, tmp_path):
    run = tmp_path / "a 'run': with # \n two lines"
    run.mkdir()
    config = Config.model_validate(tree | {"log": {"dir": str(run)}})
    save_config(config, run)
    assert load_run_config(run) == config
    assert [p.name for p in run.iterdir()] == ["config.yaml"]
    # The directory may have been moved, and stays the run's.
    moved = run.rename(tmp_path / "moved")
    assert load_run_config(moved, ["seed=5"]).run_dir == str(moved)
    with pytest.raises(ConfigError, match="not a run"):
        load_run_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5e-3", 5e-3), ("1E5", 1e5), ("-2.5e+1", -25.0), (".5", 0.5), ("3.", 3.0), ("7", 7.0)],
)
def test_numbers_are_read_as_people_write_them(text, value, good):
    assert load_config(good, [f"kd.coef={text}", "teacher.path=t"]).kd.coef == Constant(value=value)


def test_text_is_no_number(good):
    assert "kd.coef='1e5': expected a number" in message_of(good, "kd.coef='1e5'")
    assert load_config(good, ["name='1e5'"]).name == "1e5"
    assert "name=100000.0: expected text" in message_of(good, "name=1e5")
    assert "kd.coef='.inf': expected a number" in message_of(good, "kd.coef=.inf")


def test_yaml_merge_keys_work(tmp_path, good):
    text = "extends: good.yaml\nrl: &rl {clip_low: 0.1}\nkd: {coef: 0}\nteacher: {<<: {path: t}}\n"
    config = load_config(write(tmp_path / "merge.yaml", text))
    assert config.teacher is not None
    assert config.teacher.path == "t"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("seed: 1\nname: a\nseed: 2\n", 3, "key 'seed' is given twice"),
        ("rl:\n  coef: 1\n  coef: 1\n", 3, "key 'coef' is given twice"),
        ("seed: [1\n", 2, "not valid YAML"),
        ("seed: 1\n\tname: a\n", 2, "not valid YAML"),
        ("a: 1\n--- \nb: 2\n", 2, "not valid YAML"),
        ("x: !!python/object:os.system ls\n", 1, "not valid YAML"),
        ("x: 2020-99-99\n", 0, "not valid YAML"),
        ("x: !!bool maybe\n", 0, "not valid YAML"),
        ("{[1]: 2}\n", 1, "not valid YAML"),
        ("- a\n- b\n", 0, "a config is a mapping of sections, got ['a', 'b']"),
        ("extends: [1]\n", 0, "extends=[1]: expected a config file, or a list of them"),
        ("extends: {a: b}\n", 0, "extends={'a': 'b'}: expected a config file, or a list of them"),
        ('extends: "a\\0b"\n', 0, "cannot be read"),
        ("x: " + "[" * 5000, 0, "nested too deeply"),
        ("", 0, "is required and missing"),
    ],
)
def test_unreadable_files(text, line, problem, tmp_path):
    path = write(tmp_path / "bad.yaml", text)
    message = message_of(path)
    assert problem in message
    assert f"bad.yaml:{line}: " in message or not line


def test_a_misspelt_file_is_answered_with_the_near_one(tmp_path, good, monkeypatch):
    assert f"did you mean {good}?" in message_of(tmp_path / "godo.yaml")
    child = write(tmp_path / "child.yaml", {"extends": "godo.yaml"})
    assert "(extended by child.yaml); did you mean" in message_of(child)
    monkeypatch.chdir(CONFIGS.parent)
    assert "did you mean configs/quickstart.yaml?" in message_of(Path("config/quickstrat.yaml"))
    assert "cannot be read: Is a directory" in message_of(write(tmp_path / "e.yaml", {"extends": "."}))


# ---- Mistakes in settings


def config_with(key: str, folder: Path) -> Path:
    """A config in which a setting's section can be given: a model is a path or an architecture."""
    role = key.partition(".")[0]
    other: dict[str, Any] = {"reference": {"path": "r"}, "ref": {"coef": 1}} if role == "reference" else {}
    if key.startswith(("teacher.arch", "reference.arch")):
        other |= {role: {"architecture": ARCHITECTURE}}
    return write(folder / "full.yaml", FULL | other)


ALL_SETTINGS = list(setting_names(Config))


def test_a_misspelt_key_is_answered_with_the_near_one(tmp_path):
    assert len(ALL_SETTINGS) > 80
    for key in ALL_SETTINGS:
        message = message_of(config_with(key, tmp_path), f"{key}x=3")
        assert f"unknown key '{key}x' (value 3); did you mean " in message
        assert key in message.partition("did you mean ")[2]


def test_every_setting_refuses_a_bad_type(tmp_path):
    for key in ALL_SETTINGS:
        message = message_of(config_with(key, tmp_path), f"{key}=[[]]")
        assert f"full.yaml: {key}=[[]]: " in message or f"full.yaml: {key}.0=[]: " in message
        assert "Input" not in message  # pydantic's words
        assert "instance" not in message


BAD_VALUES = [
    # override, what the message says
    ("rlx.coef=1", "unknown key 'rlx' (value {'coef': 1}); did you mean rl"),
    ("learning_rate=1", "unknown key 'learning_rate' (value 1); did you mean optimizer.learning_rate"),
    ("kd.temperature=1", "did you mean rollout.temperature, eval.temperature"),
    ("kd.qqq=1", "unknown key 'kd.qqq' (value 1); valid here: kd.coef, kd.estimator,"),
    ("kd.coef={kind: linear, stepz: 1}", "unknown key 'kd.coef.stepz' (value 1); did you mean kd.coef.steps"),
    ("kd.coef={kind: linear, start: 1, end: 1}", "'kd.coef.steps' is required and missing"),
    ("kd.coef={kind: linera}", "kd.coef.kind='linera': did you mean linear? valid here: constant, linear,"),
    ("kd.coef=[1]", "kd.coef=[1]: expected a number or a mapping with a 'kind'"),
    ("kd.coef=true", "kd.coef=true: expected a number or a mapping with a 'kind'"),
    ("kd.coef={kind: null}", "kd.coef={'kind': None}: 'kind' is missing; valid here: constant, linear"),
    ("data.train=[{kind: jsonl, path: a, fist: 1}]", "did you mean data.train.0.first"),
    ("data.train=[{kind: jsonl}]", "'data.train.0.path' is required and missing"),
    ("data.train=[{task: chain_sum}]", "data.train.0={'task': 'chain_sum'}: 'kind' is missing"),
    ("data.train=[{kind: tsk}]", "data.train.0.kind='tsk': did you mean task? valid here: jsonl, parquet,"),
    ("data.train=[{kind: hub}]", "'data.train.0.name' is required and missing"),
    ("data.train=[{kind: hub, mapping: gsm9k}]", "data.train.0.mapping='gsm9k': did you mean gsm8k?"),
    ("data.train=[{kind: hub, mapping: gsm8k, path: a}]", "unknown key 'data.train.0.path'"),
    ("data.train=[]", "data.train=[]: expected a list of at least 1"),
    ("data.train=3", "data.train=3: expected a list"),
    ("data=null", "data=null: expected a section of settings (a mapping)"),
    ("optimizer=3", "optimizer=3: expected a section of settings (a mapping)"),
    ("train={}", "train.num_stepz"),
    ("train.num_steps=true", "train.num_steps=true: expected a whole number"),
    ("train.num_steps='12'", "train.num_steps='12': expected a whole number"),
    ("train.num_steps=1.5", "train.num_steps=1.5: expected a whole number"),
    ("train.num_steps=0", "train.num_steps=0: must be at least 1"),
    ("seed=-1", "seed=-1: must be at least 0"),
    ("seed=4294967296", "seed=4294967296: must be below 4294967296"),
    ("rl.clip_low=x", "rl.clip_low='x': expected a number"),
    ("optimizer.b1=2", "optimizer.b1=2: must be below 1"),
    ("optimizer.eps=0", "optimizer.eps=0: must be above 0"),
    ("kd.coef={value: !!float .nan}", "kd.coef.value=nan: expected a finite number"),
    ("eval.greedy=1", "eval.greedy=1: expected true or false"),
    ("kd.mask=respnse", "kd.mask='respnse': did you mean response? valid here: none, response, group"),
    ("name=a/b", "name='a/b': write letters, digits"),
    ('name="a\\n"', r"name='a\n': write letters, digits"),
    ("name=2020-01-01", "name=2020-01-01: expected text"),
    ("name=", "name=null: expected text"),
    ("reward.shaping={format: x}", "reward.shaping.format='x': expected a number"),
    ("reward.shaping={1: 1}", "reward.shaping.1=1: expected text"),
    ("rl={1: 1}", "rl.1=1: names of settings are text"),
    ("teacher={path: t, keep_layers: [0-9, 1-x]}", "teacher.keep_layers.1='1-x': write an index (3) or a"),
    ("teacher={path: t, keep_layers: [-1]}", "teacher.keep_layers.0=-1: write an index (3) or a range"),
    ("teacher={path: t, keep_layers: [0-99999]}", "teacher.keep_layers.0='0-99999': write an index"),
    ("rl.coef={kind: piecewise, values: {x: 1}}", "rl.coef.values.x='x': expected a whole number"),
]


@pytest.mark.parametrize(("override", "expected"), BAD_VALUES, ids=[o for o, _ in BAD_VALUES])
def test_bad_values(override, expected, good):
    if override == "train={}":
        # An unknown key comes before a missing one, for it is the one to mend.
        good = write(good, GOOD | {"train": {"num_stepz": 3}})
    message = message_of(good, override)
    assert expected in message
    assert len(message) < 400 + len(str(good))


def test_how_many_more_mistakes_there_are(good):
    assert message_of(good, "seed=x").endswith("expected a whole number")
    assert message_of(good, "seed=x", "name=1", "rl.coef=x").endswith("(and 2 more)")


def test_missing_required(tmp_path):
    for key in GOOD:
        path = write(tmp_path / "bad.yaml", {k: v for k, v in GOOD.items() if k != key})
        assert f"bad.yaml: '{key}' is required and missing" in message_of(path)


DATASET = ("rollout.source=dataset", "rollout.group_size=1", "rl.coef=0", "sft.coef=1")
TEACHER = ("teacher.path=t",)
TWO = "teachers={a: {path: x}, b: {path: y}}"
NAMED = "data.train=[{kind: task, task: chain_sum, teacher: a}]"
ODD_HEADS = "student.architecture.num_attention_heads=3"
GROWING = "rollout.length_limit={kind: linear, start: 10, end: 128, steps: 3}"
CONTRADICTIONS = [
    # overrides, what the message says
    (["rl.coef=0"], "good.yaml: rl.coef, kd.coef and sft.coef are all 0: nothing would be trained"),
    (["kd.coef=1"], "good.yaml: kd.coef is not 0 but there is no teacher; add a teacher section"),
    (["eval.agreement=true"], "good.yaml: eval.agreement=true compares with a teacher, and there is none"),
    ([*DATASET, "rl.coef=1"], "rl.coef must be 0 with rollout.source=dataset"),
    ([*DATASET, "kd.coef=1", "teacher.path=t"], "with rollout.source=dataset use kd.estimator=full"),
    ([*DATASET, "kd.mask=group"], "kd.mask=group needs verified completions"),
    ([*DATASET, "rollout.group_size=2"], "rollout.group_size=2 with rollout.source=dataset"),
    (["sft.coef=1"], "sft.coef is not 0, but rollout.source=student has no completions to imitate"),
    (["rollout.group_size=1"], "rollout.group_size=1 leaves no group to compare rewards in"),
    (["eval.every=5"], "eval.every=5 but data.eval names no source"),
    (["optimizer.learning_rate=-1e-6"], "optimizer.learning_rate reaches -1e-06: below 0"),
    (["optimizer.b2=1"], "optimizer.b2=1"),
    (["reward.time_limit_s=1e6"], "reward.time_limit_s=1000000.0"),
    (["checkpoint.keep_best=2", "data.eval=[]", "eval.every=0"], "checkpoint.keep_best=2 ranks by held-out"),
    (
        [
            "rl.resample_rounds=2",
            "kd.coef=1",
            *TEACHER,
            "train.prompts_per_iteration=5",
            "train.num_minibatches=10",
        ],
        "train.num_minibatches=10 is one for each group, and rl.resample_rounds",
    ),
    (["train.num_minibatches=5"], "128 rows (prompts_per_iteration x group_size) do not divide into"),
    (["train.num_minibatches=4"], "train.num_steps=10 ends inside an iteration of 4 updates"),
    (["train.pack_length=200"], "train.pack_length=200 has no room for the longest row: data.max_prompt_tok"),
    (
        ["train.share_prompts=always", "train.attention=splash"],
        "train.share_prompts=always with train.attention=splash, which sees one run of tokens alone",
    ),
    ([ODD_HEADS], "student.architecture.num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
    (["student.architecture.hidden_size=9"], "student.architecture.hidden_size=9 is not a multiple of"),
    (["student.architecture=null"], "student: give exactly one of path, run and architecture; got none"),
    (["teacher={path: a, run: b}"], "teacher: give exactly one of path, run and architecture; got ['path'"),
    (["student.sha256=ab"], "student.sha256=ab checks a file, so it needs path"),
    (["teacher={run: a, keep_layers: [1]}"], "teacher.keep_layers=[1] cuts a model that is read from path"),
    (["teacher={path: a, keep_layers: [3, 1-2]}"], "teacher.keep_layers=[3, '1-2']: name at least one"),
    (["teacher={path: a, keep_layers: []}"], "teacher.keep_layers=[]: name at least one layer"),
    (["tokenizer.kind=file"], "tokenizer.kind=file with path=null; path goes with kind=file"),
    (["tokenizer.path=p"], "tokenizer.kind=model with path=p; path goes with kind=file"),
    (
        ["data.train=[{kind: task, task: chain_sum, min_terms: 5}]"],
        "data.train.0.min_terms=5 is above max_terms=4",
    ),
    (["data.prompt_template=hi"], "data.prompt_template='hi' does not hold '{question}'"),
    (["data.decontaminate={}"], "data.decontaminate={ngram: 13} compares with data.eval, which names no"),
    (
        ["data.eval=[{kind: task, task: word_sum}, {kind: task, task: chain_sum, weight: 2}]"],
        "data.eval.1.weight=2.0, but held-out questions are taken from their sources in turn; remove it",
    ),
    (
        ["data.curriculum={skip_solved: 0, skip_unsolved: 0}"],
        "data.curriculum.skip_solved=0 and skip_unsolved=0",
    ),
    ([*DATASET, "data.curriculum={}"], "data.curriculum needs verified completions, not rollout.source=data"),
    (
        ["data.train=[{kind: hub, mapping: bigmath, solve_rate: [0.9, 0.1]}]"],
        "data.train.0.solve_rate=[0.9, 0.1]: write [least, most]",
    ),
    (["kd.max_abs_logratio=2", "kd.estimator=full"], "max_abs_logratio=2.0 bounds k1, k2 and score_f"),
    (["kd.bound=tanh"], "kd.bound=tanh says how max_abs_logratio bounds, which is not set"),
    (["kd.top_k=3"], "kd.top_k=3 is read by nothing with kd.estimator=k2"),
    (["kd.jsd_beta=0.3", "kd.estimator=full"], "kd.jsd_beta=0.3 is read by nothing"),
    (["kd.extrapolation=2"], "kd.extrapolation=2.0, but kd.coef is 0"),
    ([TWO, "kd.mixture={a: 1, b: 1}"], "kd.mixture weighs teachers, but kd.coef is 0"),
    (
        ["rl.resample_rounds=1", "rl.coef=0", "kd.coef=1", *TEACHER],
        "replaces groups for RL, but rl.coef is 0",
    ),
    (["rollout.importance_cap=2", "rl.coef=0", "kd.coef=1", "kd.estimator=full", *TEACHER], "there are none"),
    (["reward.overlong_buffer=2", "rl.coef=0", "kd.coef=1", *TEACHER], "is a reward, but rl.coef is 0"),
    (
        ["rl.anchor_share=0.5", "kd.coef=1", "kd.estimator=k1", "kd.placement=reward", *TEACHER],
        "kd.placement=reward with rl.anchor_share=0.5: the anchored ratio",
    ),
    (["kd.divergence=jsd"], "kd.divergence=jsd is over the vocabulary, but kd.estimator=k2 looks at sampled"),
    (
        ["kd.estimator=full", "kd.extrapolation=2", "kd.coef=1", *TEACHER],
        "kd.estimator=full with an extrapolated teacher",
    ),
    (
        ["kd.estimator=k3_forward", "kd.extrapolation=2", "kd.coef=1", *TEACHER],
        "kd.estimator=k3_forward with an extrapolated",
    ),
    (["rl.anchor_share=0.5"], "rl.anchor_share=0.5 but there is no teacher; add a teacher section"),
    (["rl.anchor_share=0.5", "rl.loss=cispo", *TEACHER], "changes the ratio of rl.loss=ppo, not cispo"),
    (
        ["rl.anchor_share=0.5", "rl.coef=0", "kd.coef=1", *TEACHER],
        "changes the policy term, but rl.coef is 0",
    ),
    (["rl.loss=gspo"], "set rl.denominator=sequences, not tokens"),
    (["rl.loss=reinforce", "train.num_epochs=2"], "rl.loss=reinforce has no ratio"),
    (["reference={path: r}"], "reference is given, but ref.coef is 0 and kd.extrapolation is 1"),
    (
        ["reference={path: r, lora: {}}", "ref.coef=1"],
        "reference.lora is set, but a reference is not trained",
    ),
    (["rollout.temperature=0"], "rollout.temperature reaches 0, but must stay above 0"),
    (
        ["rollout.temperature={value: 1, warmup_steps: 3}"],
        "reaches 0, but must stay above 0; a warmup starts",
    ),
    (["rollout.temperature={kind: linear, start: 1, end: -1, steps: 3}"], "rollout.temperature reaches -1"),
    (["rl.clip_low=1"], "rl.clip_low reaches 1, but must stay between 0 and 1"),
    (["rl.clip_high={kind: exponential, start: 1, rate: 0.5, steps: 3}"], "rl.clip_high reaches 0"),
    (["reward.overlong_buffer=500"], "reward.overlong_buffer=500 is above rollout.max_new_tokens=128"),
    (
        ["reward.overlong_buffer=20", GROWING],
        "reward.overlong_buffer=20 is above rollout.length_limit at its lowest=10",
    ),
    (["rollout.length_limit=500"], "must stay between 1 and rollout.max_new_tokens=128"),
    (["rollout.length_limit=0"], "rollout.length_limit goes from 0 to 0, but must stay between 1"),
    ([*DATASET, "rollout.length_limit=5"], "rollout.length_limit="),
    (
        ["rollout.stop=['x']", "kd.coef=1", "kd.end_token=false", *TEACHER],
        "kd.end_token=false leaves out the last token",
    ),
    (["rollout.stop=['x', '']"], "rollout.stop holds an empty text"),
    (["eval.min_new_tokens=129"], "eval.min_new_tokens=129 is above rollout.max_new_tokens=128"),
    (
        [*DATASET, "data.eval=[]", "rollout.cache_dtype=int8"],
        "rollout.cache_dtype=int8, but rollout.source=dataset samples",
    ),
    ([*DATASET, "ref.coef=1"], "ref.coef is an expectation over the student's own samples"),
    ([*DATASET, "rollout.importance_cap=2"], "rollout.importance_cap=2.0 weighs terms at sampled tokens"),
    ([*DATASET, "kd.group_weight=failure_rate"], "kd.group_weight=failure_rate needs verified completions"),
    (["rollout.source=teacher", "rl.coef=0", "sft.coef=1"], "needs one teacher, and there are 0"),
    (["rollout.source=teacher", "sft.coef=1", *TEACHER], "rl.coef must be 0 with rollout.source=teacher"),
    ([*TEACHER, TWO], "teacher and teachers are both given; name all of them in teachers"),
    ([TWO, "kd.coef=1"], "there are 2 teachers (a, b): give each source of data.train"),
    ([TWO, "kd.coef=1", "kd.mixture={a: 1}"], "kd.mixture weighs a, but teachers are a, b"),
    ([TWO, NAMED, "kd.coef=1", "kd.mixture={a: 1, b: 1}"], "kd.mixture lets all teachers score every row"),
    ([NAMED], "data names teacher 'a', which is none of teachers (none)"),
    (["teachers={a.b: {path: x}}"], "teachers: name 'a.b': write letters, digits"),
    (
        [TWO, "kd.coef=1", "kd.mixture={a: 1, b: 1}", "kd.teacher_entropy_scale=1"],
        "kd.teacher_entropy_scale=1.0 needs one teacher per row, but kd.mixture has several",
    ),
    ([TWO, NAMED, "eval.agreement=true"], "eval.agreement=true compares with one teacher"),
    (["mesh.tensor=0"], "mesh.tensor=0; a size is at least 1, or -1"),
    (["mesh.data=-1"], "mesh: only one axis may be -1, got data=-1, fsdp=-1, tensor=1"),
    (["kd.coef={kind: exponential, start: 1, rate: 0, steps: 1}"], "kd.coef.rate=0.0: an exponential"),
    (["kd.coef={kind: piecewise, values: {}}"], "kd.coef.values={}: steps must start at 0 and increase"),
    (["kd.coef={kind: piecewise, values: {1: 1}}"], "kd.coef.values={1: 1.0}: steps must start at 0"),
    (["kd.coef={kind: piecewise, values: {0: 1, 5: 1, 3: 1}}"], "steps must start at 0 and increase"),
    *(
        (
            [f"kd.estimator={e}", f"kd.placement={p}"],
            f"good.yaml: kd.estimator={e} with kd.placement={p}: {why}",
        )
        for (e, p), why in REFUSED.items()
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), CONTRADICTIONS)
def test_contradictions(overrides, expected, good):
    assert expected in message_of(good, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        DATASET,
        [*DATASET, "kd.coef=1", "teacher.path=t", "kd.estimator=full"],
        ["rollout.group_size=1", "rl.coef=0", "kd.coef=1", "teacher.path=t"],
        ["kd.coef=1", "teacher.path=t", "kd.estimator=k1", "kd.placement=reward"],
        ["train.num_minibatches=2", "train.microbatch_rows=16"],
        ["student.architecture.hidden_size=9", "student.architecture.head_dim=4"],
        ["mesh={data: -1, fsdp: 2}"],
        [TWO, NAMED, "kd.coef=1"],
        [TWO, "kd.coef=1", "kd.mixture={a: 1, b: 3}", "kd.estimator=full", "kd.divergence=jsd"],
        ["rollout.source=teacher", "rl.coef=0", "sft.coef=1", *TEACHER],
        ["rl.loss=gspo", "rl.denominator=sequences", "train.num_epochs=2", "ref.coef=0.1"],
        ["rl.anchor_share=0.5", *TEACHER],
        ["rl.anchor_share=0.5", "kd.max_abs_logratio=3", *TEACHER],
        ["rl.loss=cispo", "rl.clip_low=1.0"],
        [TWO, "eval.every=0"],
        ["rl.resample_rounds=2", "kd.coef=1", "train.num_minibatches=2", *TEACHER],
        ["rollout.temperature={kind: linear, start: 1, end: 0.1, steps: 3}"],
        ["reward.overlong_buffer=10", GROWING],
        ["rollout.stop=['x']", "eval.min_new_tokens=128", "rollout.slots_per_device=3"],
    ],
)
def test_neighbours_of_contradictions_load(overrides, good):
    load_config(good, overrides)
