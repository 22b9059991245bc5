"""Tables, resolved configs and pictures from the records; the marked places of README.md and docs/lab.md."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.lab import pictures, tables
from benchmarks.lab.jobs import Job
from benchmarks.lab.protocol import CONFIGS, TEACHERS, Models
from benchmarks.lab.records import Record
from benchmarks.lab.runner import Lab
from kdrl_jax.config import load_config, save_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "lab.md")


def write_summary(lab: Lab) -> list[Path]:
    """Everything that the records are enough for.

    Returns:
        What was written.

    Raises:
        LookupError: the reported runs are not whole.
    """
    out = lab.records.out
    found = blocks(lab)
    written = [out / "tables.md"]
    written[0].write_text("\n\n".join(f"## {name}\n\n{text}" for name, text in found.items()) + "\n")
    written += _write_configs(lab)
    written += pictures.draw(lab, out)
    for path in DOCUMENTS:
        if path.exists():
            path.write_text(fill(path.read_text(), found))
            written.append(path)
    return written


def blocks(lab: Lab) -> dict[str, str]:
    """Name -> table, in Markdown."""
    new_kinds, plan = lab.protocol.new_kinds, lab.plan
    models = {name: _known(lab.model_record(name), name) for name in Models.model_fields}
    found = {"models": tables.models_table(models, new_kinds)}
    for teacher in TEACHERS:
        runs = records_of(plan.finals(teacher), lab.record)
        found |= {
            f"methods, {teacher} teacher": tables.methods_table(runs, new_kinds, teacher),
            f"differences, {teacher} teacher": tables.differences_table(runs, new_kinds),
            f"speed, {teacher} teacher": tables.speed_table(runs),
        }
    for teacher in TEACHERS:
        trials = {
            method: plan.trials(method, teacher if part.has_teacher else None)
            for method, part in lab.protocol.methods.items()
        }
        found[f"trials, {teacher} teacher"] = tables.trials_table(records_of(trials, lab.record))
    for name, part in lab.protocol.ablations.items():
        for teacher in part.teachers:
            variants = records_of(plan.ablation(name, teacher), lab.record)
            found[f"{name}, {teacher} teacher"] = tables.ablation_table(variants, new_kinds, teacher)
    return found


def records_of(
    jobs: Mapping[str, list[Job]], read: Callable[[Job], Record | None]
) -> dict[str, list[Record]]:
    """Raises LookupError: one has not run."""
    return {name: [_known(read(job), job.name) for job in each] for name, each in jobs.items()}


def fill(text: str, found: Mapping[str, str]) -> str:
    """A document with the tables put between `<!-- lab: NAME -->` and `<!-- end -->`.

    Raises:
        LookupError: it asks for a table that there is none of.
    """

    def table(match: re.Match[str]) -> str:
        if match[1] not in found:
            raise LookupError(f"no table {match[1]!r} in the lab; there are {', '.join(found)}")
        return f"<!-- lab: {match[1]} -->\n{found[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- lab: ([^>]*?) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def _known(record: Record | None, name: str) -> Record:
    if record is None:
        raise LookupError(f"{name} has not run; python -m benchmarks.lab runs what is missing")
    return record


def _write_configs(lab: Lab) -> list[Path]:
    """The resolved config of each method with what was chosen for it, as its first seed had it."""
    written = []
    names = {name: Path(name) for name in Models.model_fields}
    for teacher in TEACHERS:
        for method, jobs in lab.plan.finals(teacher).items():
            job = jobs[0]
            folder = lab.records.out / "configs" / (job.teacher or "no_teacher") / method
            folder.mkdir(parents=True, exist_ok=True)
            config = load_config(CONFIGS / f"{method}.yaml", job.overrides(names))
            save_config(config, folder)
            written.append(folder / "config.yaml")
    return list(dict.fromkeys(written))
