"""Tables, resolved configs and pictures from the records; the marked places of README.md and docs/lab.md."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.lab import pictures, tables
from benchmarks.lab.jobs import Job
from benchmarks.lab.protocol import CONFIGS, TEACHERS, Models, Teacher
from benchmarks.lab.records import Record
from benchmarks.lab.runner import Lab
from kdrl_jax.config import load_config, save_config

ROOT = CONFIGS.parents[1]
RESULTS = ROOT / "results" / "lab"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "lab.md")


def write_summary(lab: Lab) -> tuple[list[Path], list[str]]:
    """Everything that the records are enough for. Documents are filled from `results/lab` alone.

    Returns:
        What was written, and what is missing of the rest.
    """
    out = lab.records.out
    found, missing = blocks(lab)
    written = [out / "tables.md"]
    out.mkdir(parents=True, exist_ok=True)
    written[0].write_text(as_page(found))
    for draw in (_write_configs, pictures.curves, pictures.results, pictures.training, pictures.coefficients):
        try:
            written += draw(lab)
        except LookupError as error:
            missing.append(str(error))
    for path in DOCUMENTS if out.resolve() == RESULTS else ():
        path.write_text(fill(path.read_text(), found))
        written.append(path)
    return written, missing


def as_page(found: Mapping[str, str]) -> str:
    """results/lab/tables.md."""
    return "\n\n".join(f"## {name}\n\n{text}" for name, text in found.items()) + "\n"


def blocks(lab: Lab) -> tuple[dict[str, str], list[str]]:
    """Name -> table, in Markdown, and why others are missing."""
    found: dict[str, str] = {}
    missing: list[str] = []
    for name, table in _makers(lab).items():
        try:
            found[name] = table()
        except LookupError as error:
            missing.append(f"{name}: {error}")
    return found, missing


def _makers(lab: Lab) -> dict[str, Callable[[], str]]:
    new_kinds = lab.protocol.new_kinds

    def models() -> dict[str, Record]:
        return {name: lab.known_model(name) for name in Models.model_fields}

    makers: dict[str, Callable[[], str]] = {
        "models": lambda: tables.models_table(models(), new_kinds),
        "summary": lambda: tables.summary_table({t: lab.finals(t) for t in TEACHERS}, models(), new_kinds),
    }
    for teacher in TEACHERS:
        makers |= _beside(lab, teacher)
    for name, part in lab.protocol.ablations.items():
        for teacher in part.teachers:
            makers[f"{name}, {teacher} teacher"] = functools.partial(_ablation, lab, name, teacher)
    return makers | {"made with": lambda: tables.made_with_table(map(lab.plan.known, all_jobs(lab)))}


def _beside(lab: Lab, teacher: Teacher) -> dict[str, Callable[[], str]]:
    new_kinds, methods = lab.protocol.new_kinds, lab.protocol.methods
    return {
        f"methods, {teacher} teacher": lambda: tables.methods_table(lab.finals(teacher), new_kinds, teacher),
        f"differences, {teacher} teacher": lambda: tables.differences_table(lab.finals(teacher), new_kinds),
        f"speed, {teacher} teacher": lambda: tables.speed_table(lab.finals(teacher)),
        f"trials, {teacher} teacher": lambda: tables.trials_table(
            lab.known({method: lab.plan.trials(method, teacher) for method in methods})
        ),
    }


def _ablation(lab: Lab, name: str, teacher: Teacher) -> str:
    """Its variants beside the method as it was reported, and the two that KDRL is made of: with the same
    changes, if that was asked for too."""
    ablations, seeds = lab.protocol.ablations, lab.protocol.ablation_seeds
    part, variants = ablations[name], lab.known(lab.plan.ablation(name, teacher))

    def reported(method: str) -> tables.Runs:
        records = [lab.plan.known(j) for j in lab.plan.finals_of(method, teacher) if j.seed in seeds]
        return dict.fromkeys(variants, records)

    def alike(method: str) -> tables.Runs | None:
        for other, its in ablations.items():
            shared = teacher in its.teachers or not lab.protocol.methods[method].has_teacher
            if its.method == method and its.variants == part.variants and shared:
                return lab.known(lab.plan.ablation(other, teacher))
        return None

    against = {f"{tables.NAMES[part.method]} above": reported(part.method)}
    for method in ("grpo", "kd_rkl"):
        if method != part.method:
            same = alike(method)
            against[f"{tables.NAMES[method]}{' likewise' if same else ''}"] = same or reported(method)
    return tables.ablation_table(variants, against, lab.protocol.new_kinds, teacher)


def all_jobs(lab: Lab) -> list[Job]:
    """Every run of the lab. Raises LookupError: trials are missing."""
    return list(dict.fromkeys([*lab.plan.all_trials(), *lab.plan.all_finals(), *lab.plan.all_ablations()]))


def fill(text: str, found: Mapping[str, str]) -> str:
    """A document with the tables put between `<!-- lab: NAME -->` and `<!-- end -->`; those that are missing
    leave their places empty."""

    def table(match: re.Match[str]) -> str:
        content = f"{found[match[1]]}\n" if match[1] in found else ""
        return f"<!-- lab: {match[1]} -->\n{content}<!-- end -->"

    return re.sub(r"<!-- lab: ([^>]*?) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def _write_configs(lab: Lab) -> list[Path]:
    """The config of each method with what was chosen for it, as its first seed was run: but where it lies,
    and with the configs of its models in the place of what was trained from them. Run by itself, it trains
    those with its own seed first, and not with the lab's."""
    files = lab.protocol.models.model_dump()
    models = {name: Path("configs", "lab", file) for name, file in files.items()}
    written = []
    for teacher in TEACHERS:
        for method, jobs in lab.plan.finals(teacher).items():
            folder = lab.records.out / "configs" / (jobs[0].teacher or "no_teacher") / method
            folder.mkdir(parents=True, exist_ok=True)
            save_config(load_config(CONFIGS / f"{method}.yaml", jobs[0].overrides(models)), folder)
            written.append(folder / "config.yaml")
    return list(dict.fromkeys(written))
