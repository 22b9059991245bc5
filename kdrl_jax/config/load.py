"""YAML files, `extends` and `section.key=value` overrides into a `Config`, with errors for people."""

import copy
import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kdrl_jax.config.schema import Config

RUN_CONFIG = "config.yaml"


class ConfigError(ValueError):
    """A mistake in the configuration: one line that names the key, the value and what to write."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int)) and key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{node.start_mark.name}:{line}: key '{key}' is given twice")
            seen.add(str(key) if not isinstance(key, int) else key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads a config file, what it extends, and the overrides.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Raises:
        ConfigError: with one line for the user.
    """
    path = Path(path)
    tree = _read(path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    return _validate(tree, source=str(path))


def load_run_config(run_dir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads the resolved config of an existing run; its directory stays the run's directory."""
    path = Path(run_dir) / RUN_CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{run_dir}: no {RUN_CONFIG} in this directory, so it is not a run; give a config file or a run"
        )
    return load_config(path, [*overrides, f"log.dir={_quote(str(run_dir))}"])


def save_config(config: Config, run_dir: str | os.PathLike[str]) -> None:
    """Writes the fully resolved config (defaults included) into the run directory, atomically."""
    target = Path(run_dir) / RUN_CONFIG
    partial = target.with_suffix(".tmp")
    partial.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    partial.replace(target)


def _nearest_file(path: Path) -> str:
    """ " (did you mean ...?)" from the same folder, or from `configs/`, or nothing."""
    folder = path.parent if path.parent.is_dir() else Path("configs")
    names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _quote(text: str) -> str:
    return yaml.safe_dump(text, default_flow_style=True, width=float("inf")).split("\n")[0]


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    where = path.resolve()
    if where in seen:
        chain = " -> ".join(p.name for p in (*seen, where))
        raise ConfigError(f"{path}: configs extend each other in a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        loader = _Loader(text)
        loader.name = str(path)
        tree = loader.get_single_data()
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be a config") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: not valid YAML: {' '.join(problem.split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, got {type(tree).__name__}")
    _resolve_runs(tree, path.parent)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends={parent!r}: expected the name of one config file")
    return _merge(_read(path.parent / parent, (*seen, where)), tree)


def _resolve_runs(tree: dict[str, Any], folder: Path) -> None:
    """`run: other.yaml` is relative to the file that says so; nothing else is rewritten."""
    for section in ("student", "teacher"):
        model = tree.get(section)
        if isinstance(model, dict) and isinstance(model.get("run"), str):
            beside = folder / model["run"]
            if beside.exists():
                model["run"] = os.path.normpath(beside)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings are merged, everything else is replaced.

    A mapping that names another `kind`, or another origin of a model, replaces the old one whole:
    settings of a linear schedule mean nothing to a cosine.
    """
    merged = copy.copy(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _changes_meaning(old, value):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _changes_meaning(old: dict[str, Any], new: dict[str, Any]) -> bool:
    if "kind" in new and new["kind"] != old.get("kind"):
        return True
    origins = ("path", "run", "architecture")
    return any(k in new and new[k] is not None and k not in old for k in origins) and any(
        k in old for k in origins
    )


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: write section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {problem}") from None
    new: Any = value
    for part in reversed(keys):
        new = {part: new}
    tree.update(_merge(tree, new))


def _validate(tree: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # A misspelt key shows twice, as unknown and as missing: the unknown one says what to mend.
        problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
        first = _describe(problems[0])
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {first}{more}") from None


def _describe(problem: Any) -> str:
    # Pydantic puts a union's tag into the location (data.train.0.jsonl.path); readers don't want it.
    loc = problem["loc"]
    keys = [k for i, k in enumerate(loc) if len(_members(_annotation_at(loc[:i]))) < 2]
    name = ".".join(str(k) for k in keys)
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        owner = _section_at(problem["loc"][:-1])
        valid = list(owner.model_fields) if owner else []
        near = difflib.get_close_matches(str(keys[-1]), valid, n=3, cutoff=0.5)
        prefix = ".".join(str(k) for k in keys[:-1])
        names = ", ".join(f"{prefix}.{n}" if prefix else n for n in (near or valid))
        return f"unknown key '{name}' (value {value!r}); {'did you mean' if near else 'valid here:'} {names}"
    if kind == "missing":
        return f"'{name}' is required and missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "union_tag_invalid":
        expected = str(problem["ctx"]["expected_tags"])
        return f"{name}.kind={problem['ctx']['tag']!r}: there is no such kind; valid here: {expected}"
    if kind == "union_tag_not_found":
        return f"{name}={value!r}: expected a mapping with a 'kind'"
    if kind == "value_error" and isinstance(value, (dict, BaseModel)):
        return f"{name}: {message}" if name else message
    return f"{name}={value!r}: {message}"


def _members(annotation: Any) -> dict[str, Any]:
    """Tag -> model class, for a union of tagged models (else empty)."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return {}
    members = {}
    for arg in typing.get_args(annotation):
        model = typing.get_args(arg)[0] if typing.get_origin(arg) is typing.Annotated else arg
        if isinstance(model, type) and issubclass(model, BaseModel):
            kind = model.model_fields.get("kind")
            tag = typing.get_args(kind.annotation)[0] if kind else model.__name__
            members[tag] = model
    return members


def _annotation_at(loc: tuple[Any, ...]) -> Any:
    """The annotation of the setting at a location, or None."""
    current: Any = Config
    for key in loc:
        while typing.get_origin(current) is typing.Annotated:
            current = typing.get_args(current)[0]
        members = _members(current)
        if len(members) == 1:  # Section | None
            current = next(iter(members.values()))
            members = {}
        if members:
            current = members.get(key)
        elif isinstance(key, int):
            args = typing.get_args(current)
            current = args[0] if args else None
        elif isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(key)
            current = field.annotation if field else None
        else:
            return None
    return current


def _section_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    annotation = _annotation_at(loc) if loc else Config
    members = _members(annotation)
    if len(members) == 1:
        annotation = next(iter(members.values()))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None
