"""YAML files, `extends` and `section.key=value` overrides into a `Config`, with errors for people."""

import copy
import difflib
import os
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kdrl_jax.config.errors import ConfigError, describe, show
from kdrl_jax.config.schema import Config
from kdrl_jax.paths import absolute, as_path, is_remote, join, write_whole

RUN_CONFIG = "config.yaml"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # SafeLoader says what is wrong with it
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {show(key)} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would otherwise read as a number (the name '1e5')."""


_FLOAT = "tag:yaml.org,2002:float"
for _yaml in (_Loader, _Dumper):
    _yaml.yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0] != _FLOAT]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _yaml.add_implicit_resolver(
        _FLOAT,
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
        list("-+0123456789."),
    )


def load_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), fixed: dict[str, Any] | None = None
) -> Config:
    """Reads a config file, what it extends, and the overrides.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.
        fixed: a tree of settings that the caller decides, over all others.

    Raises:
        ConfigError: with one line for the user.
    """
    return _load(as_path(path), overrides, fixed or {})


def load_run_config(run_dir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads the resolved config of an existing run; its directory stays the run's directory."""
    path = as_path(run_dir) / RUN_CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{run_dir}: no {RUN_CONFIG} in this directory, so it is not a run; give a config file or a run"
        )
    for override in overrides:
        if override.partition("=")[0].strip() == "log.dir":
            raise ConfigError(f"override {override!r}: a run goes on where it is, in {run_dir}")
    return _load(path, overrides, {"log": {"dir": str(run_dir)}})


def config_for_model(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """A config around one model's files, for commands that train nothing (eval, sample, export).

    The student is the model; sampling stops after 256 tokens. What a config cannot do without (data,
    steps) is filled in with values that these commands do not read. Everything else is the default.

    Args:
        path: a Hugging Face folder or a .gguf file.
    """
    tree = {
        "name": "model",
        "student": {"path": str(path)},
        "data": {"train": [{"kind": "task", "task": "chain_sum"}]},
        "rollout": {"max_new_tokens": 256},
        "train": {"num_steps": 1},
    }
    return _build(str(path), lambda: tree, overrides, {})


def save_config(config: Config, run_dir: str | os.PathLike[str]) -> None:
    """Writes the fully resolved config (defaults included) into the run directory, atomically."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
    write_whole(as_path(run_dir) / RUN_CONFIG, text)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Settings that differ between two dumped configs, as (dotted key, before, now)."""
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, a, b))
    return found


def _load(path: Path, overrides: Sequence[str], fixed: dict[str, Any]) -> Config:
    return _build(str(path), lambda: _read(path, seen=()), overrides, fixed)


def _build(
    where: str, read: Callable[[], dict[str, Any]], overrides: Sequence[str], fixed: dict[str, Any]
) -> Config:
    try:
        tree = read()
        for override in overrides:
            tree = _merge(tree, _parse_override(override))
        return Config.model_validate(_merge(tree, fixed))
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error, Config)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply to be a config") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        where = absolute(path)
        if where in seen:
            chain = " -> ".join(p.name for p in (*seen, where))
            raise ConfigError(f"{path}: configs extend each other in a circle: {chain}")
        text = path.read_text("utf-8")
    except FileNotFoundError:
        child = f" (extended by {seen[-1].name})" if seen else ""
        raise ConfigError(f"{path}: no such config file{child}{_nearest_file(path)}") from None
    except ConfigError:
        raise
    # ValueError: not UTF-8, or a name that no file can have. RuntimeError: links in a circle.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    tree = parse_yaml(text, str(path), is_file=True)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, got {show(tree)}")
    _resolve_runs(tree, path.parent)
    parents = tree.pop("extends", None)
    if parents is None:
        return tree
    if isinstance(parents, str):
        parents = [parents]
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{path}: extends={show(parents)}: expected a config file, or a list of them")
    merged: dict[str, Any] = {}
    for parent in parents:  # later ones over earlier ones, and the file itself over all
        merged = _merge(merged, _read(join(path.parent, parent), (*seen, where)))
    return _merge(merged, tree)


def parse_yaml(text: str, source: str, is_file: bool = False) -> Any:
    """The YAML value of a text.

    Raises:
        ConfigError: naming the source, and the line if it is a file.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise
    # Beside YAMLError, all that explicit tags (`!!int x`) and impossible dates make PyYAML raise.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark and is_file else source
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: not valid YAML: {' '.join(problem.split())}") from None


def _nearest_file(path: Path) -> str:
    """`; did you mean ...?` from the same folder, or from `configs/`, or nothing."""
    folder = path.parent if path.parent.is_dir() else Path("configs")
    names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _resolve_runs(tree: dict[str, Any], folder: Path) -> None:
    """`run: other.yaml` is relative to the file that says so; nothing else is rewritten."""
    several = tree.get("teachers")
    models = [tree.get(section) for section in ("student", "teacher", "reference")]
    models += several.values() if isinstance(several, dict) else []
    for model in models:
        if isinstance(model, dict) and isinstance(model.get("run"), str):
            beside = join(folder, model["run"])
            if beside.exists():
                model["run"] = str(beside) if is_remote(beside) else os.path.normpath(beside)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings are merged, everything else is replaced.

    A mapping that names another `kind`, or another origin of a model, replaces the old one whole:
    settings of a linear schedule mean nothing to a cosine. So does one by step, as a piecewise schedule's
    `values`: its entries are no settings of their own.
    """
    merged = copy.copy(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _changes_meaning(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _changes_meaning(old: dict[Any, Any], new: dict[Any, Any]) -> bool:
    if any(str(key).isdigit() for key in new):  # JSON has no other keys than text
        return True
    if "kind" in new and new["kind"] != old.get("kind"):
        return True
    # A resolved config names all origins, two of them with null.
    before, now = (
        {k for k in ("path", "run", "architecture") if model.get(k) is not None} for model in (old, new)
    )
    return bool(before and now - before)


def _parse_override(override: str) -> dict[str, Any]:
    """`a.b=1` as `{a: {b: 1}}`."""
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {show(override)}: write section.key=value")
    value = parse_yaml(text, f"override {show(override)}")
    for part in reversed(keys):
        value = {part: value}
    return value
