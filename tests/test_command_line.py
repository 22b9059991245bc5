"""Mistakes end the command with status 2, one line and nothing written; no input ends it otherwise."""

import copy
import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdrl_jax.config import (
    COMMANDS,
    Config,
    ConfigError,
    ExportOptions,
    SampleOptions,
    load_config,
    read_options,
    save_config,
)
from kdrl_jax.config.load import _Dumper
from kdrl_jax.main import explain, main
from kdrl_jax.types import TrainingError

GOOD: dict[str, Any] = {
    "name": "good",
    "seed": 1,
    "student": {
        "architecture": {
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    },
    "teacher": {"path": "no-such-folder", "keep_layers": ["0-3", 7]},
    "data": {
        "train": [{"kind": "task", "task": "chain_sum"}, {"kind": "jsonl", "path": "a.jsonl"}],
        "eval": [{"kind": "jsonl", "path": "b.jsonl"}],
    },
    "rl": {"coef": {"kind": "piecewise", "values": {0: 1.0, 5: 0.5}}},
    "kd": {"coef": {"kind": "max_linear", "a": 5e-3, "b": 5e-5, "c": 1e-3}},
    "reward": {"shaping": {"format": 0.1}},
    "train": {"num_steps": 10},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that the command lines below name."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "good.yaml").write_text(yaml.safe_dump(GOOD))
    (files / "broken.yaml").write_text("name: [good\n")
    (files / "list.yaml").write_text("- 1\n")
    (files / "circle.yaml").write_text("extends: circle.yaml\n")
    (files / "orphan.yaml").write_text("extends: gone.yaml\n")
    (files / "twice.yaml").write_text("name: a\nname: b\n")
    (files / "latin.yaml").write_bytes(b"name: \xfcber\n")
    (files / "model.gguf").write_bytes(b"GGUL\0\xff")
    (files / "broken_run").mkdir()
    (files / "broken_run/config.yaml").write_text("name: good\nseed: x\n")
    return files


# The first word is a file in the folder; the rest goes to the command as it is.
BAD_INVOCATIONS = [
    # the file, or what stands in for one
    ["god.yaml"],
    ["gone/good.yaml"],
    ["broken.yaml"],
    ["list.yaml"],
    ["circle.yaml"],
    ["orphan.yaml"],
    ["twice.yaml"],
    ["latin.yaml"],
    ["."],  # a directory that is no run
    ["broken_run"],
    ["a\nb.yaml"],
    ["a\0b.yaml"],
    ["x" * 300 + ".yaml"],
    # the command
    ["good.yaml", "trian"],
    ["good.yaml", "deploy"],
    ["good.yaml", "train", "eval"],
    ["good.yaml", ""],
    # the overrides
    ["good.yaml", "kd.coef"],
    ["good.yaml", "=3"],
    ["good.yaml", "kd.=3"],
    ["good.yaml", "kd..coef=3"],
    ["good.yaml", "seed=[1"],
    ["good.yaml", "seed={a: 1, a: 2}"],
    ["good.yaml", "seed=!!int x"],
    ["good.yaml", "seed=1\n2"],
    ["good.yaml", "seed=2020-13-01"],
    ["good.yaml", "seed=" + "[" * 3000],
    ["good.yaml", "sead=3"],
    ["good.yaml", "kd.coef.a.b=3"],
    ["good.yaml", "optimizer=3"],
    ["good.yaml", "optimizer.learning_rate=fast"],
    ["good.yaml", "data.train.0.path=x"],
    ["good.yaml", "student="],
    ["good.yaml", "teacher=null"],
    ["good.yaml", "train.num_minibatches=3"],
    ["good.yaml", "kd.estimator=k1"],
    ["good.yaml", "name=../up"],
    ["good.yaml", "eval", "kd.mask=respons"],
    ["good.yaml", "report", "log.dirr=x"],
    # the commands with options of their own
    ["good.yaml", "sample"],
    ["good.yaml", "sample", "promt=x"],
    ["good.yaml", "sample", "prompt"],
    ["good.yaml", "sample", "what is 1.5 + 2?"],
    ["good.yaml", "sample", "=3"],
    ["good.yaml", "sample", "prompt=\udcff"],
    ["good.yaml", "sample", "prompt=x", "out=y"],
    ["good.yaml", "sample", "prompt=x", "sead=3"],
    ["good.yaml", "sample", "prompt=x", "seed=x"],
    ["good.yaml", "sample", "prompt=x", "kd.coeff=3"],
    ["good.yaml", "sample", "prompt=x", "model=techer"],
    ["good.yaml", "sample", "prompt=x", "greedy=perhaps"],
    ["good.yaml", "sample", "prompt=x", "greedy=" + "[" * 3000],
    ["good.yaml", "sample", "prompt=x", "step=-1"],
    ["good.yaml", "sample", "prompt=x", "step=3"],  # not a run
    ["good.yaml", "sample", "prompt=x", "model=teacher"],  # no-such-folder
    [".", "sample", "prompt=x"],
    ["good.yaml", "export"],
    ["good.yaml", "export", "out="],
    ["good.yaml", "export", "out=a\0b"],
    ["good.yaml", "export", "out=~nobody-of-this-name/a"],
    ["~nobody-of-this-name/good.yaml"],
    ["good.yaml", "export", "out=x", "step=3"],
    ["good.yaml", "export", "out=x", "dtype=float8"],
    ["good.yaml", "export", "out=x", "max_shard_gib=0"],
    ["good.yaml", "export", "out=x", "max_shard_gib=.inf"],
    ["god.yaml", "export", "out=x"],
    [".", "export", "out=x"],
    ["model.gguf", "export", "out=x"],
    ["model.gguf"],
]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TimeoutError("no answer"), 1),
        (OSError(28, "No space left on device"), 1),
        (PermissionError("not yours"), 2),
        (OSError("Forbidden: https://storage.googleapis.com/storage/v1/b/mine, 403"), 2),
        (FileNotFoundError("no such file"), 2),
        (ValueError("wrong"), 2),
        (TrainingError("NaN"), 1),
    ],
)
def test_only_a_mistake_has_the_status_after_which_nothing_is_tried_again(error, status):
    said = explain(error)
    assert said is not None
    assert said[1] == status


def one_line(argv: list[str], cwd: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a mistaken command prints, after checking that it is one line, status 2 and no more."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert list(cwd.iterdir()) == []
    return err


@pytest.mark.parametrize("words", BAD_INVOCATIONS, ids=[" ".join(w)[:40] for w in BAD_INVOCATIONS])
def test_a_mistake_is_one_line_and_writes_nothing(words, folder, tmp_path, monkeypatch, capsys):
    before = sorted(folder.rglob("*"))
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    one_line(["--config", str(folder / words[0]), *words[1:]], cwd, capsys)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "argv", [[], ["train"], ["--config"], ["--confg", "a.yaml"], ["--config", "a", "-x"]]
)
def test_so_is_a_mistake_in_the_options(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        one_line(argv, tmp_path, capsys)
    except SystemExit as ended:
        pytest.fail(f"left main with status {ended.code} after: {capsys.readouterr().err}")


def test_a_near_miss_is_named(folder, tmp_path, capsys):
    def said(*words: str) -> str:
        assert main(["--config", str(folder / "good.yaml"), *words]) == 2
        return capsys.readouterr().err

    assert "did you mean prompt" in said("sample", "promt=x")
    assert "did you mean seed" in said("sample", "prompt=x", "sead=3")
    assert "'out' is required" in said("export", "dtype=float32")
    assert "options here: out=, dtype=" in said("export", "zzz=3")
    assert "did you mean sample" in said("smaple")
    assert all(name in said("deploy") for name in COMMANDS)


PROMPTS = ["a: [b=c", "{x: 1}", "1e5", "yes", "", " x ", "- a\n- b\n", "null", "seed=3", "é\u2028'\"", "-"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_is_taken_as_it_is(prompt):
    words = ["kd.coef=3", f"prompt={prompt}", "greedy=true", "seed=7", "name=x", "data.prompt_template=p=q"]
    options, overrides = read_options("sample", SampleOptions, words)
    assert options == SampleOptions(prompt=prompt, greedy=True)
    assert overrides == ["kd.coef=3", "seed=7", "name=x", "data.prompt_template=p=q"]
    assert read_options("export", ExportOptions, [f"out=x{prompt}", "max_shard_gib=1e-3"])[0] == (
        ExportOptions(out=f"x{prompt}", max_shard_gib=0.001)
    )


def test_no_option_hides_a_setting():
    for kind in filter(None, COMMANDS.values()):
        assert not set(kind.model_fields) & set(Config.model_fields)


# ---- Fuzz: whatever is written into a config, it loads or is answered with one line

KEYS = st.sampled_from(["kind", "coef", "path", "extends", "value", "x", "", "a.b", "\n", "0", "config"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**40])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["linear", "cosine", "1e5", "0-3", "9-1", "jsonl", "task", "k1", "{question}", "\u2028"]
    )
    | st.dates()
    | st.binary(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.integers(-1, 3) | st.none(), inner, max_size=3)
    ),
    max_leaves=5,
)
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["delete", "replace", "insert"]), st.integers(0, 10_000), KEYS, VALUES),
    min_size=1,
    max_size=3,
)
RESOLVED = Config.model_validate(GOOD).model_dump(mode="json")


def containers_and_keys(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree, as (the mapping or list it is in, its key or index)."""
    found = []
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], (dict, list)):
            found.extend(containers_and_keys(tree[key]))
    return found


def mutate(tree: dict[str, Any], mutations: list[tuple[str, int, Any, Any]]) -> None:
    for what, where, key, value in mutations:
        places = containers_and_keys(tree)
        if not places:
            return
        container, old_key = places[where % len(places)]
        if what == "delete":
            del container[old_key]
        elif what == "replace" or isinstance(container, list):
            container[old_key] = value
        else:
            container[key] = value


def loads_or_is_answered(path: Path, *overrides: str) -> None:
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert message.isprintable()
        return
    run = path.parent / "run"
    run.mkdir(exist_ok=True)
    save_config(config, run)
    assert load_config(run / "config.yaml") == config


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.yaml"


@settings(max_examples=400, deadline=None)
@given(st.booleans(), MUTATIONS)
@example(False, [("replace", 0, "", datetime.date(2020, 1, 1))])
def test_a_mutated_config_loads_or_is_answered(fuzzed, resolved, mutations):
    tree = copy.deepcopy(RESOLVED if resolved else GOOD)
    mutate(tree, mutations)
    fuzzed.write_text(yaml.dump(tree, Dumper=_Dumper), encoding="utf-8")
    loads_or_is_answered(fuzzed)


YAML_TEXT = st.text(alphabet="ab01:{}[]-,?&*!|>'\"%@`#~.=<\\ \n\te", max_size=24)


@settings(max_examples=300, deadline=None)
@given(YAML_TEXT, st.sampled_from(["", "seed=", "kd.coef=", "teacher.keep_layers=", "rl."]))
@example("!!timestamp x", "seed=")
@example("!!int ''", "seed=")
@example("&a [*a]", "kd.coef=")
@example("&a {<<: *a}", "kd.coef=")
@example("=", "seed=")
def test_any_text_loads_or_is_answered(fuzzed, text, prefix):
    fuzzed.write_text(yaml.safe_dump(GOOD))
    loads_or_is_answered(fuzzed, prefix + text)
    fuzzed.write_text(f"name: a\n{text}", encoding="utf-8")
    loads_or_is_answered(fuzzed)
