"""The floors of the house: what each module may import, read from the source.

A module imports only from floors below its own or from its own package (the folder under
`kdrl_jax/` it lives in). Every import counts: those inside functions and under `TYPE_CHECKING` too.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Name under kdrl_jax -> floor. A package's floor is that of all its modules that have no row of their own.
FLOORS = {
    "paths": -1,  # below all, since a config may lie anywhere
    "config": 0,
    "preemption": 0,
    "signals": 0,
    "types": 0,
    "watch": 0,
    "objective": 1,
    "sharding": 1,
    "statistics": 1,
    "data": 2,  # tokenizers, chat templates, tasks and sources
    "hosts": 2,
    "colours": 1,
    "live_table": 1,
    "metrics": 2,
    "models": 2,
    "optim": 2,
    "profiling": 2,
    "progress": 2,
    "rewards": 2,
    "alarms": 2,
    "checkpoint": 3,
    "data.prompts": 3,
    "data.rows": 3,
    "pairing": 3,
    "rollout": 3,
    "scoring": 3,
    "batch": 4,
    "evaluate": 4,
    "record": 4,
    "rounds": 4,
    "frozen": 4,
    "self_check": 4,
    "setup": 4,
    "step": 4,
    "eval": 6,
    "runs": 3,
    "writers": 3,
    "export": 6,
    "plan": 6,
    "report": 6,
    "sample": 6,
    "train": 6,
    "before": 5,
    "held_out": 5,
    "logged": 5,
    "main": 7,
}

# Rooms in which new modules have no floor by default: each is to be placed by whoever adds it.
PLACED_ONE_BY_ONE = {
    "data": {  # beside tokenizer*
        "chat",
        "curriculum",
        "decontaminate",
        "encoded",
        "gym",
        "prompts",
        "rows",
        "sources",
        "stored",
        "tasks",
    },
}

# Nothing under the left name may import anything under the right ones.
FORBIDDEN = {
    "objective": ("flax", "kdrl_jax.config", "kdrl_jax.models"),
    "rewards": ("jax", "jaxlib", "numpy", "kdrl_jax.types"),
}

# Read by `main` alone. The workers that run reward functions are processes of their own, with an argv
# and an environment of their own: `rewards.process` makes them, and `rewards.worker` is their main.
PROCESS_STATE = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "sys.argv", "argparse")
PROCESS_STATE_READERS = {"main", "rewards.process", "rewards.worker"}
DISTRIBUTED = ("jax.distributed",)
DISTRIBUTED_CALLERS = {"main"}


def read_sources() -> dict[str, str]:
    """Dotted module name -> source, for the whole package."""
    sources = {}
    for path in sorted((ROOT / "kdrl_jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


SOURCES = read_sources()


def room(module: str) -> str:
    return module.removeprefix("kdrl_jax").removeprefix(".")


def floor(module: str) -> int | None:
    """The floor of a module of the package, or None if the table does not say."""
    name = room(module)
    if not name:
        return 0  # kdrl_jax/__init__.py: the version
    package, _, rest = name.partition(".")
    if package in PLACED_ONE_BY_ONE and rest:
        known = rest.startswith("tokenizer") or rest in PLACED_ONE_BY_ONE[package]
        if not known:
            return None
    return FLOORS.get(name, FLOORS.get(package))


def package_of(module: str, sources: Mapping[str, str]) -> str | None:
    """The folder under kdrl_jax that a module lives in; None for the modules beside the folders."""
    top = room(module).split(".")[0]
    is_folder = any(other.startswith(f"kdrl_jax.{top}.") for other in sources)
    return top if is_folder else None


def imported(module: str, tree: ast.AST, sources: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, wherever in it the import stands.

    `from a import b` gives a.b where that is a module of the package, and where `a` is not one.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # The folder is a module's parent, and a package (its __init__) itself.
                is_package = any(other.startswith(f"{module}.") for other in sources)
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, base if base in sources and inner not in sources else inner


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of attributes and imports, through whatever alias: `import os as o; o.environ`."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                top = alias.name.split(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            yield node.lineno, ".".join([aliases.get(inner.id, inner.id), *reversed(parts)])


def is_under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def violations(module: str, source: str, sources: Mapping[str, str]) -> list[str]:
    """One line for each import or use by which a module breaks the plan of the house."""
    tree = ast.parse(source)
    own, name = floor(module), room(module)
    if own is None:
        return [f"{module}: has no floor; give it a row in tests/test_floors.py and in the design"]
    found = []
    for line, target in imported(module, tree, sources):
        place = f"{module}:{line} imports {target}"
        found.extend(
            f"{place}: {package}/ must not"
            for package, names in FORBIDDEN.items()
            if is_under(name, (package,)) and is_under(target, names)
        )
        if not is_under(target, ("kdrl_jax",)):
            continue
        theirs = floor(target)
        same_package = package_of(module, sources) == package_of(target, sources) is not None
        if theirs is None:
            found.append(f"{place}, which has no floor")
        elif theirs >= own and not same_package and target != module:
            found.append(f"{place}: from floor {own}, floor {theirs} is not below")
    for names, allowed in ((PROCESS_STATE, PROCESS_STATE_READERS), (DISTRIBUTED, DISTRIBUTED_CALLERS)):
        if name not in allowed:
            lines = {(line, what) for line, what in used(tree) if is_under(what, names)}
            found.extend(f"{module}:{line} uses {what}, as only main may" for line, what in sorted(lines))
    return found


def test_the_house_stands():
    found = [line for module, source in SOURCES.items() for line in violations(module, source, SOURCES)]
    assert not found, "\n" + "\n".join(found)


def test_the_table_names_only_what_exists():
    stale = [name for name in FLOORS if f"kdrl_jax.{name}" not in SOURCES]
    readers = PROCESS_STATE_READERS | DISTRIBUTED_CALLERS
    stale += [name for name in readers if f"kdrl_jax.{name}" not in SOURCES]
    assert stale == []


PLANTED = {
    "upwards": ("kdrl_jax.scoring", "from kdrl_jax.train import train", "floor 3, floor 6"),
    "sideways": ("kdrl_jax.scoring", "import kdrl_jax.rollout.engine", "floor 3, floor 3"),
    "from the package": ("kdrl_jax.models.head", "from kdrl_jax import scoring", "floor 2, floor 3"),
    "relative": ("kdrl_jax.models.head", "from ..scoring import x", "floor 2, floor 3"),
    "relative module": ("kdrl_jax.models.head", "from .. import scoring", "floor 2, floor 3"),
    "from an __init__": ("kdrl_jax.models", "from ..scoring import x", "floor 2, floor 3"),
    "in a function": ("kdrl_jax.optim", "def f():\n    import kdrl_jax.step", "floor 2, floor 4"),
    "in a method's branch": (
        "kdrl_jax.optim",
        "class A:\n    def f(self):\n        if self:\n            from kdrl_jax.step import x",
        "floor 2, floor 4",
    ),
    "for types only": (
        "kdrl_jax.optim",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kdrl_jax.step import Objective",
        "floor 2, floor 4",
    ),
    "into a package's upper floor": ("kdrl_jax.metrics", "import kdrl_jax.data.prompts", "floor 2, floor 3"),
    "from the root": ("kdrl_jax", "from kdrl_jax.config import Config", "floor 0, floor 0"),
    "no floor": ("kdrl_jax.attic", "x = 1", "has no floor"),
    "no floor in data": ("kdrl_jax.data.attic", "x = 1", "has no floor"),
    "imports what has no floor": ("kdrl_jax.main", "import kdrl_jax.attic", "has no floor"),
    "objective and flax": ("kdrl_jax.objective.kl", "from flax import nnx", "objective/ must not"),
    "objective and config": ("kdrl_jax.objective.kl", "from kdrl_jax import config", "objective/ must not"),
    "objective and models": ("kdrl_jax.objective.kl", "import kdrl_jax.models", "objective/ must not"),
    "rewards and jax": ("kdrl_jax.rewards.pool", "def f():\n    from jax import numpy", "rewards/ must not"),
    "rewards and numpy": ("kdrl_jax.rewards.pool", "import numpy as np", "rewards/ must not"),
    "rewards through types": ("kdrl_jax.rewards.pool", "from kdrl_jax.types import x", "rewards/ must not"),
    "environment": ("kdrl_jax.train", "import os\nos.environ['A']", "as only main may"),
    "environment, renamed": ("kdrl_jax.train", "import os as o\no.environ.get('A')", "as only main may"),
    "environment, by name": ("kdrl_jax.train", "from os import environ", "as only main may"),
    "getenv": ("kdrl_jax.train", "import os\nx = os.getenv('A')", "as only main may"),
    "argv": ("kdrl_jax.train", "def f():\n    import sys\n    return sys.argv[1:]", "as only main may"),
    "argparse": ("kdrl_jax.train", "from argparse import ArgumentParser", "as only main may"),
    "distributed": ("kdrl_jax.setup", "import jax\njax.distributed.initialize()", "as only main may"),
    "distributed, by name": ("kdrl_jax.setup", "from jax import distributed as d", "as only main may"),
    "distributed in a worker": (
        "kdrl_jax.rewards.worker",
        "def f():\n    import jax\n    jax.distributed.initialize()",
        "uses jax.distributed",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_found(case):
    module, planted, message = PLANTED[case]
    before = SOURCES.get(module, "")
    sources = SOURCES | {module: f"{before}\n{planted}"}
    old = violations(module, before, SOURCES) if before else []
    added = [line for line in violations(module, sources[module], sources) if line not in old]
    assert any(message in line for line in added), added


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kdrl_jax.step", "from kdrl_jax import scoring, types"),
        ("kdrl_jax.data.sources", "from kdrl_jax.data.prompts import x"),
        ("kdrl_jax.models.head", "from . import decoder\nfrom .decoder import Model"),
        ("kdrl_jax.train", "from kdrl_jax import __version__"),
        ("kdrl_jax.rewards.process", "import os\nos.environ"),
        ("kdrl_jax.main", "import jax\njax.distributed.initialize()"),
        ("kdrl_jax.train", "import os\nos.path.join('a', 'b')"),
    ],
)
def test_what_is_allowed_is_not_reported(module, source):
    before = SOURCES[module]
    assert violations(module, f"{before}\n{source}", SOURCES) == violations(module, before, SOURCES)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env |= {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False
    )


def test_importing_everything_starts_no_backend():
    # No platform has this name, so that whatever starts a backend fails, however it does it.
    code = f"import importlib\nfor name in {list(SOURCES)}: importlib.import_module(name)\n"
    code += "from jax._src import xla_bridge\nassert not xla_bridge._backends, xla_bridge._backends\n"
    done = run_python(code, JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr[-2000:]
    control = run_python("import jax; jax.devices()", JAX_PLATFORMS="no_such_platform")
    assert control.returncode != 0
    assert "no_such_platform" in control.stderr


def test_rewards_load_without_jax_and_numpy():
    names = [name for name in SOURCES if is_under(name, ("kdrl_jax.rewards",))]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "loaded = {'jax', 'jaxlib', 'numpy', 'flax'} & set(sys.modules)\nassert not loaded, loaded"
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]
