"""The lab: its protocol, its arithmetic, and that every number that is told comes from results/lab."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.lab import summary
from benchmarks.lab.jobs import ROLES, Job, decisive, frozen, thawed, words
from benchmarks.lab.measures import measures, reached
from benchmarks.lab.pictures import COLOURS
from benchmarks.lab.plan import Plan, running_scores, score
from benchmarks.lab.processes import JobError
from benchmarks.lab.protocol import CONFIGS, TEACHERS, Models, Protocol, Teacher, read_protocol
from benchmarks.lab.runner import Lab
from benchmarks.lab.statistics import difference_of, mean_of
from benchmarks.lab.tables import (
    NAMES,
    ablation_table,
    differences_table,
    methods_table,
    models_table,
    speed_table,
    summary_table,
    trials_table,
)
from kdrl_jax.config import Config, load_config, load_run_config
from kdrl_jax.config.data import TaskSourceConfig
from kdrl_jax.config.schedules import Piecewise
from kdrl_jax.data.tasks import task_row

RESULTS = summary.RESULTS
PROTOCOL = read_protocol()
MODELS = tuple(Models.model_fields)


def changed(**settings: Any) -> Protocol:
    """The protocol with other values, checked again."""
    return Protocol.model_validate(PROTOCOL.model_dump() | settings)


class TestProtocol:
    def test_every_method_has_a_config_and_the_same_budget(self) -> None:
        budgets = set()
        for method, part in PROTOCOL.methods.items():
            config = load_config(CONFIGS / f"{method}.yaml")
            assert (config.teacher is not None) == part.has_teacher
            assert config.student.run == str(CONFIGS / "student.yaml")
            assert config.train.updates_per_iteration == 1
            budgets.add(
                (config.train.num_steps, config.train.prompts_per_iteration * config.rollout.group_size)
            )
        assert budgets == {(120, 256)}

    def test_more_trials_for_one_method_are_refused(self) -> None:
        methods = PROTOCOL.model_dump()["methods"]
        methods["kdrl"]["grid"] += ({"kd.coef": 0.5},)
        with pytest.raises(ValueError, match="as many trials as the others"):
            changed(methods=methods)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"trial_seed": 1}, "trial_seed=1 must not be among"),
            ({"ablation_seeds": [4]}, r"ablation_seeds=\[4\] must"),
            ({"new_kinds": ["nope"]}, r"new_kinds=\['nope'\] are no labels"),
            (
                {"ablations": {"x": {"method": "none", "teachers": ["strong"], "variants": {}}}},
                "is of 'none': there are",
            ),
        ],
    )
    def test_contradictions(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            changed(**settings)

    def test_enough_seeds_and_names_for_all(self) -> None:
        assert len(PROTOCOL.seeds.strong) >= 5
        assert len(PROTOCOL.seeds.imperfect) >= 3
        assert set(PROTOCOL.methods) == set(NAMES) == set(COLOURS)

    def test_test_questions_are_not_those_of_validation(self) -> None:
        """And the new kind is never trained on, by anybody."""
        tested = load_config(CONFIGS / "kdrl.yaml", words(frozen(PROTOCOL.test))).data.eval
        for name in (*PROTOCOL.methods, *MODELS):
            data = load_config(CONFIGS / f"{name}.yaml").data
            assert {source.split for source in data.train} == {"train"}  # type: ignore[union-attr]
            assert {source.split for source in data.eval} == {"validation"}  # type: ignore[union-attr]
            known = set().union(*map(forms, data.train))
            for source in tested:
                assert source.split == "test"  # type: ignore[union-attr]
                if source.label in PROTOCOL.new_kinds:  # type: ignore[union-attr]
                    assert not forms(source) & known
                else:
                    assert forms(source) <= known

    def test_there_are_enough_test_questions_of_each_kind(self) -> None:
        for source in load_config(CONFIGS / "kdrl.yaml", words(frozen(PROTOCOL.test))).data.eval:
            assert isinstance(source, TaskSourceConfig)
            questions = {task_row(source, i).question for i in range(source.size)}
            assert len(questions) >= PROTOCOL.test["eval.num_prompts"] / len(PROTOCOL.test["data.eval"])


def forms(source: Any) -> set[tuple[int, int]]:
    """How many terms questions can have, and how many of them are taken away."""
    terms = range(source.min_terms, source.max_terms + 1)
    return {(t, m) for t in terms for m in range(source.minuses[0], source.minuses[1] + 1)}


class TestJobs:
    JOB = Job("kdrl", "strong", 3, frozen({"optimizer.learning_rate.start": 5e-4, "kd.coef": 0.3}))

    def test_name(self) -> None:
        assert self.JOB.name == "strong/kdrl/kd.coef=0.3,rate=0.0005/seed_3"
        assert Job("grpo", None, 1, ()).name == "no_teacher/grpo/as it is/seed_1"

    def test_all_runs_can_be_configured_and_told_apart(self) -> None:
        """Their settings reach the config, and no two runs have the same or the same name."""
        plan = Plan(PROTOCOL, scored)
        jobs = {*plan.all_trials(), *plan.all_finals(), *plan.all_ablations()}
        assert len({job.name for job in jobs}) == len(jobs)
        assert not any(set(job.name) & set('<>:"|?*\\') for job in jobs)  # nowhere a file's name
        configs = set()
        for job in jobs:
            config = job.config()
            assert config.seed == job.seed
            assert (config.teacher.run if config.teacher else None) == job.teacher
            configs.add(json.dumps(decisive(config), sort_keys=True))
        assert len(configs) == len(jobs)
        switch = frozen(PROTOCOL.methods["kd_then_rl"].points[0])
        coef = Job("kd_then_rl", "strong", 1, switch).config().rl.coef
        assert coef == Piecewise(kind="piecewise", values={0: 0.0, 30: 1.0})

    def test_decisive_settings(self) -> None:
        """Where models and the run lie does not matter; what a model is called, and any setting, does."""
        here = decisive(load_config(CONFIGS / "kdrl.yaml", self.JOB.overrides(ROLES)))
        there = {name: Path("/somewhere") / name for name in ROLES}
        assert decisive(load_config(CONFIGS / "kdrl.yaml", [*self.JOB.overrides(there), "log.dir=x"])) == here
        swapped = ROLES | {"strong": Path("imperfect")}
        for others in (self.JOB.overrides(swapped), [*self.JOB.overrides(ROLES), "optimizer.b1=0.8"]):
            assert decisive(load_config(CONFIGS / "kdrl.yaml", others)) != here


class TestLab:
    """Which records count."""

    @pytest.fixture
    def lab(self, tmp_path: Path) -> Lab:
        lab = Lab(PROTOCOL, tmp_path / "runs", tmp_path / "out", 1, print)
        for name in MODELS:
            config = load_config(CONFIGS / f"{name}.yaml", [f"seed={PROTOCOL.model_seed}"])
            record = {"config": decisive(config), "test_settings": PROTOCOL.test, "fingerprint": name * 2}
            lab.records.write(f"models/{name}", record)
        return lab

    JOB = Job("kdrl", "strong", 1, frozen({"kd.coef": 0.3}), frozen(PROTOCOL.test), ("strong",))

    def written(self, lab: Lab, **others: Any) -> dict[str, Any] | None:
        record = {
            "config": decisive(self.JOB.config()), "test_settings": PROTOCOL.test,
            "to_teacher": {"strong": {}},
            "models": {"student": "studentstudent", "strong": "strongstrong"},
        }  # fmt: skip
        path = lab.records.path(f"runs/{self.JOB.name}")
        lab.records.write(f"runs/{self.JOB.name}", record | others)
        os.utime(path, ns=(0, time.monotonic_ns()))
        return lab.record(self.JOB)

    def test_one_of_the_same_settings_and_models(self, lab: Lab) -> None:
        assert lab.record(self.JOB) is None
        assert self.written(lab) is not None

    def test_one_of_before_a_setting_was_added(self, lab: Lab) -> None:
        config = decisive(self.JOB.config())
        del config["train"]["spike_sigmas"]
        assert self.written(lab, config=config) is not None

    def test_others_do_not_count(self, lab: Lab) -> None:
        config = decisive(self.JOB.config())
        config["optimizer"]["b1"] = 0.8
        assert self.written(lab, config=config) is None
        assert self.written(lab, test_settings=PROTOCOL.test | {"eval.num_samples": 4}) is None
        assert self.written(lab, models={"student": "another", "strong": "strongstrong"}) is None
        assert self.written(lab, to_teacher={}) is None
        assert self.written(lab) is not None

    def test_none_counts_without_its_models(self, lab: Lab) -> None:
        lab.records.path("models/strong").unlink()
        assert self.written(lab) is None


def record_of(job: Job, accuracy: float) -> dict[str, Any]:
    """A made-up record, for what is done with records."""
    values = [0.1, 0.2, accuracy, accuracy, accuracy]
    part = {
        "greedy/accuracy": accuracy, "sampled/accuracy": accuracy, "sampled/pass@8": 1.0,
        "sampled/length_mean": 20.0,
    }  # fmt: skip
    return {
        "method": job.method,
        "settings": thawed(job.settings),
        "validation": {"step": [0, 10, 20, 30, 40], "sampled/accuracy": values},
        "tokens": [100 * (i + 1) for i in range(40)],
        "test": dict.fromkeys([source["label"] for source in PROTOCOL.test["data.eval"]], part),
        "to_teacher": {"strong": {"teacher_reverse_kl": accuracy / 2}},
    }


def scored(job: Job) -> dict[str, Any]:
    """GRPO is best at 5e-4, all others at 1e-3, and with a coefficient of 0.5."""
    settings = thawed(job.settings)
    rate = settings["optimizer.learning_rate.start"]
    best = 5e-4 if job.method == "grpo" else 1e-3
    accuracy = 0.5 - 0.1 * abs(np.log(rate / best))
    return record_of(job, accuracy + (0.05 if settings.get("kd.coef") == 0.5 else 0))


class TestPlan:
    def test_the_best_trial_is_chosen(self) -> None:
        plan = Plan(PROTOCOL, scored)
        assert thawed(plan.chosen("grpo", "strong")) == {"optimizer.learning_rate.start": 5e-4}
        assert thawed(plan.chosen("kd_rkl", "strong")) == {"optimizer.learning_rate.start": 1e-3}
        chosen = thawed(plan.chosen("kdrl", "strong"))
        assert chosen == {"kd.coef": 0.5, "optimizer.learning_rate.start": 1e-3}

    def test_a_missing_trial_stops(self) -> None:
        with pytest.raises(LookupError, match="has not run"):
            Plan(PROTOCOL, lambda job: None).finals("strong")

    def test_runs_without_a_teacher_are_shared(self) -> None:
        plan = Plan(PROTOCOL, scored)
        strong, imperfect = plan.finals("strong")["grpo"], plan.finals("imperfect")["grpo"]
        assert imperfect == strong[: len(imperfect)]
        assert [job.compared_with for job in strong] == [TEACHERS] * 3 + [("strong",)] * 2
        assert not set(plan.finals("strong")["kdrl"]) & set(plan.finals("imperfect")["kdrl"])

    def test_an_ablation_shares_the_reported_runs(self) -> None:
        """Its variant without changes is the method itself."""
        plan = Plan(PROTOCOL, scored)
        variants = plan.ablation("estimator of KDRL", "imperfect")
        assert set(variants["k2"]) <= set(plan.finals("imperfect")["kdrl"])
        assert not set(variants["whole vocabulary"]) & set(plan.finals("imperfect")["kdrl"])

    def test_score_is_the_mean_of_the_last_three(self) -> None:
        record = {"validation": {"sampled/accuracy": [1.0, 0.2, 0.3, 0.7]}}
        assert running_scores(record) == pytest.approx([1.0, 0.6, 0.5, 0.4])
        assert score(record) == pytest.approx(0.4)


class TestArithmetic:
    def test_mean_and_interval(self) -> None:
        """t(0.975, 2) = 4.302653; of 1, 2, 3: deviation 1, error 1 / sqrt 3."""
        found = mean_of([1.0, 2.0, 3.0])
        assert found.value == 2
        assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
        assert np.isnan(mean_of([4.0]).half)
        with pytest.raises(ValueError, match="no values"):
            mean_of([])

    def test_differences_are_paired(self) -> None:
        found = difference_of([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
        assert found == (0.5, 0.0)
        with pytest.raises(ValueError, match="zip"):
            difference_of([1.0], [])

    def test_intervals_cover(self) -> None:
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(2000):
            found = mean_of(rng.normal(3, 2, size=5).tolist())
            hits += abs(found.value - 3) <= found.half
        assert abs(hits / 2000 - 0.95) < 0.02

    def test_measures_tell_kinds_apart(self) -> None:
        record = record_of(Job("grpo", None, 1, ()), 0.5)
        new = PROTOCOL.new_kinds[0]
        record["test"][new] = {
            "greedy/accuracy": 0.25, "sampled/accuracy": 0.125, "sampled/pass@8": 0.5,
            "sampled/length_mean": 99.0,
        }  # fmt: skip
        found = measures(record, PROTOCOL.new_kinds)
        assert found == {
            "avg@8": 50, "greedy": 50, "pass@8": 100, "avg@8 new": 12.5, "greedy new": 25, "pass@8 new": 50,
            "length": 20,
        }  # fmt: skip

    def test_reached(self) -> None:
        """Means of the last three validations of 0.1, 0.2, 0.5, 0.5, 0.5: 0.1, 0.15, 0.267, 0.4, 0.5."""
        record = record_of(Job("grpo", None, 1, ()), 0.5)
        assert reached(record, 0.1) == (0, 0)
        assert reached(record, 0.15) == (10, 1000)
        assert reached(record, 0.26) == (20, 2000)
        assert reached(record, 0.5) == (40, 4000)
        assert reached(record, 0.6) is None


class TestTables:
    def runs(self) -> dict[str, list[dict[str, Any]]]:
        jobs = {m: [Job(m, None, seed, ()) for seed in (1, 2, 3)] for m in ("grpo", "kd_rkl", "kdrl")}
        found = {"grpo": (0.4, 0.5, 0.6), "kd_rkl": (0.3, 0.4, 0.5), "kdrl": (0.5, 0.6, 0.7)}
        return {m: [record_of(j, a) for j, a in zip(jobs[m], found[m], strict=True)] for m in jobs}

    def test_differences(self) -> None:
        table = differences_table(self.runs(), PROTOCOL.new_kinds)
        ten, twenty = "**+10.0 ± 0.0**", "**+20.0 ± 0.0**"
        assert f"| KDRL | {ten} | {ten} | {ten} | {twenty} | {twenty} | {twenty} |  |" in table
        assert f"| GRPO |  |  |  | {ten} | {ten} | {ten} | {ten.replace('+', '-')} |" in table

    def test_methods(self) -> None:
        """Of 0.5, 0.6, 0.7: t(0.975, 2) / sqrt 3 = 2.484 deviations of 0.1, for the KL of half as much."""
        table = methods_table(self.runs(), PROTOCOL.new_kinds, "strong")
        accuracy = "60.0 ± 24.8"
        row = [accuracy, accuracy, "100.0 ± 0.0", accuracy, accuracy, "100.0 ± 0.0", "20.0 ± 0.0"]
        assert f"| KDRL | {' | '.join(row)} | 0.300 ± 0.124 |" in table

    def test_ablation(self) -> None:
        """Differences are paired with the same variant of what it is compared with."""
        runs, kinds = self.runs(), PROTOCOL.new_kinds
        variants = {"0.1": runs["kdrl"], "0.5": runs["grpo"]}
        against = {
            "A": {"0.1": runs["grpo"], "0.5": runs["grpo"]},
            "B": {"0.1": runs["kd_rkl"], "0.5": runs["kdrl"]},
        }
        head, _, first, second = ablation_table(variants, against, kinds, "strong").splitlines()
        assert head.endswith("| KL to the teacher | minus A | minus B |")
        sixty, ten = "60.0 ± 24.8", "10.0 ± 0.0"
        assert first == (
            f"| 0.1 | {sixty} | {sixty} | {sixty} | 0.300 ± 0.124 | **+{ten}** | **+20.0 ± 0.0** |"
        )
        assert second.endswith(f"| 0.250 ± 0.124 | +0.0 ± 0.0 | **-{ten}** |")

    def test_a_best_value_at_an_edge_is_said_so(self) -> None:
        """Of three or more; of schedules by what they differ in."""

        def table(method: str, *settings: dict[str, Any]) -> str:
            jobs = [Job(method, None, 7, frozen(each)) for each in settings]
            return trials_table({method: [record_of(job, 0.5 - i / 10) for i, job in enumerate(jobs)]})

        rates = [{"optimizer.learning_rate.start": rate} for rate in (2e-3, 1e-3, 4e-3)]
        assert "edge" not in table("grpo", *rates)
        assert "**rate 0.004: 50.0** (at the edge: rate)" in table("grpo", *reversed(rates))
        assert "edge" not in table("kdrl", {"kd.coef": 0.1}, {"kd.coef": 0.5})
        for method, where in (("kdrl_anneal", "kd.coef"), ("kd_then_rl", "switch")):
            points = PROTOCOL.methods[method].points[:3]
            assert f"(at the edge: {where})" in table(method, *points)
            assert "edge" not in table(method, points[1], points[0], points[2])

    def test_one_seed_has_no_interval(self) -> None:
        one = {method: records[:1] for method, records in self.runs().items()}
        assert "| KDRL | +10.0 | +10.0 |" in differences_table(one, PROTOCOL.new_kinds)
        assert "| 0.250 |" in methods_table(one, PROTOCOL.new_kinds, "strong")

    def test_models(self) -> None:
        student = record_of(Job("sft", None, 1, ()), 0.25)
        table = models_table({"student": student}, PROTOCOL.new_kinds)
        assert "| student | 25.0 | 25.0 | 100.0 | 25.0 | 25.0 | 100.0 | 20.0 | 0.125 |  |" in table

    def test_summary(self) -> None:
        models = {name: record_of(Job("sft", None, 1, ()), 0.25) for name in MODELS}
        table = summary_table({"strong": self.runs()}, models, PROTOCOL.new_kinds)
        assert "| *the student before* | 25.0 | 25.0 |" in table
        assert "| GRPO | 50.0 ± 24.8 | 50.0 ± 24.8 |" in table

    def test_speed(self) -> None:
        """Seeds that never get there count with the whole budget of 40 updates, 4,000 tokens."""
        runs = self.runs()
        assert "| KDRL | 3 of 3 | 40 | 4 |" in speed_table(runs)
        assert "| KD-RKL | 0 of 3 | ≥ 40 | ≥ 4 |" in speed_table(runs)
        runs["kdrl"][0]["validation"]["sampled/accuracy"][2] = 0.9
        assert "| KDRL | 3 of 3 | 33 | 3 |" in speed_table(runs)

    def test_trials(self) -> None:
        records = [record_of(Job("kdrl", "strong", 7, frozen({"kd.coef": c})), a) for c, a in
                   ((0.1, 0.2), (0.5, 0.5), (2.5, 0.5))]  # fmt: skip
        table = trials_table({"kdrl": records})
        assert "| KDRL | kd.coef 0.1: 20.0; **kd.coef 0.5: 50.0**; kd.coef 2.5: 50.0 |" in table
        assert "**kd.coef 2.5: 50.0** (at the edge: kd.coef);" in trials_table(
            {"kdrl": [*records[:1], *records[:0:-1]]}
        )

    def test_filling_documents(self) -> None:
        text = "a\n<!-- lab: models -->\nold\n<!-- end -->\nb\n"
        filled = summary.fill(text, {"models": "| new |"})
        assert filled == "a\n<!-- lab: models -->\n| new |\n<!-- end -->\nb\n"
        assert summary.fill(filled, {"models": "| new |"}) == filled
        empty = "a\n<!-- lab: models -->\n<!-- end -->\nb\n"
        assert summary.fill(filled, {}) == empty
        assert summary.fill(empty, {"models": "| new |"}) == filled


WHOLE = (RESULTS / "tables.md").exists() and "## made with" in (RESULTS / "tables.md").read_text()


@pytest.mark.skipif(not WHOLE, reason="results/lab is not whole")
class TestResults:
    """What is told of the lab, from its records."""

    @pytest.fixture(scope="class")
    def lab(self) -> Lab:
        return Lab(PROTOCOL, Path("nowhere"), RESULTS, 1, print)

    @pytest.fixture(scope="class")
    def blocks(self, lab: Lab) -> dict[str, str]:
        found, missing = summary.blocks(lab)
        assert not missing
        return found

    def test_every_table_follows_from_the_records(self, blocks: dict[str, str]) -> None:
        assert (RESULTS / "tables.md").read_text() == summary.as_page(blocks)
        for path in summary.DOCUMENTS:
            text = path.read_text()
            assert summary.fill(text, blocks) == text, f"{path}: run python -m benchmarks.lab --summarise"

    @pytest.mark.parametrize("teacher", TEACHERS)
    def test_ablations_are_compared_with_the_same_change(
        self, lab: Lab, blocks: dict[str, str], teacher: Teacher
    ) -> None:
        """By way of the settings that the records themselves have."""

        def of(method: str, **kd: Any) -> list[float]:
            found = {}
            for path in (RESULTS / "runs").rglob("*.json"):
                record = json.loads(path.read_text())
                settings = {k: v for k, v in record["settings"].items() if k == "kd.estimator" or "end" in k}
                mine = record["method"] == method and record["teacher"] in (teacher, None)
                if mine and record["seed"] in PROTOCOL.ablation_seeds and settings == kd:
                    found[record["seed"]] = measures(record, PROTOCOL.new_kinds)["avg@8"]
            assert len(found) == len(PROTOCOL.ablation_seeds)
            return [found[seed] for seed in sorted(found)]

        def row(block: str, variant: str) -> list[str]:
            (line,) = (x for x in blocks[block].splitlines() if x.startswith(f"| {variant} |"))
            return [cell.strip(" *") for cell in line.split("|")]

        full, stays = {"kd.estimator": "full"}, {"optimizer.learning_rate.end": 5e-4}
        apart = difference_of(of("kdrl", **full), of("kd_rkl", **full))
        found = row(f"estimator of KDRL, {teacher} teacher", "whole vocabulary")
        assert found[-2] == f"{apart.value:+.1f} ± {apart.half:.1f}"
        apart = difference_of(of("kdrl", **stays), of("grpo", **stays))
        found = row(f"rate of KDRL, {teacher} teacher", "stays at 5e-4")
        assert found[-3] == f"{apart.value:+.1f} ± {apart.half:.1f}"

    def test_documents_show_them(self, blocks: dict[str, str]) -> None:
        readme, page = (path.read_text() for path in summary.DOCUMENTS)
        assert f"<!-- lab: summary -->\n{blocks['summary']}\n" in readme
        for name, table in blocks.items():
            assert name == "summary" or f"<!-- lab: {name} -->\n{table}\n<!-- end -->" in page, name

    def test_no_record_is_left_over(self, lab: Lab) -> None:
        known = {lab.records.path(f"runs/{job.name}") for job in summary.all_jobs(lab)}
        assert set((RESULTS / "runs").rglob("*.json")) == known

    def test_models_lie_in_their_ranges(self, lab: Lab) -> None:
        found = {name: measures(lab.known_model(name), PROTOCOL.new_kinds) for name in MODELS}
        for key in ("avg@8", "greedy"):
            assert found["strong"][key] >= 95
            assert 70 <= found["imperfect"][key] <= 85
            assert 15 <= found["student"][key] <= 45

    @pytest.mark.parametrize("teacher", TEACHERS)
    @pytest.mark.parametrize("method", ["grpo", "kd_rkl"])
    def test_reward_and_teacher_each_improve_on_the_student(
        self, lab: Lab, method: str, teacher: Teacher
    ) -> None:
        before = measures(lab.known_model("student"), PROTOCOL.new_kinds)["avg@8"]
        for record in lab.finals(teacher)[method]:
            assert measures(record, PROTOCOL.new_kinds)["avg@8"] > before

    def test_configs_are_those_of_the_records(self, lab: Lab) -> None:
        for teacher in TEACHERS:
            for method, jobs in lab.plan.finals(teacher).items():
                folder = RESULTS / "configs" / (jobs[0].teacher or "no_teacher") / method
                saved = decisive(load_run_config(folder))
                assert saved == decisive(Config.model_validate(lab.plan.known(jobs[0])["config"]))


SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
TASK = {"kind": "task", "task": "chain_sum", "min_terms": 3, "max_terms": 3, "minuses": [0, 1]}
SMALL: dict[str, Any] = {
    "tokenizer": {"kind": "char"},
    "data": {"train": [TASK], "eval": [TASK | {"split": "validation"}], "max_prompt_tokens": 8},
    "rollout": {"max_new_tokens": 8, "decode_chunk": 8, "group_size": 4},
    "reward": {"num_workers": 1},
    "optimizer": {"learning_rate": {"kind": "constant", "value": 1e-3}},
    "train": {"num_steps": 2, "prompts_per_iteration": 4, "diagnostics_every": 0},
    "eval": {"every": 1, "num_prompts": 4, "num_samples": 4},
    "checkpoint": {"every": 0},
}
BOTH: dict[str, Any] = {"student": {"run": "student.yaml"}, "teacher": {"run": "strong.yaml"}}


def small_protocol() -> Protocol:
    """Three methods, one seed, one ablation."""
    two = [{"optimizer.learning_rate.value": 1e-3}, {"optimizer.learning_rate.value": 2e-3}]
    kinds = [
        TASK | {"split": "test", "label": "old"},
        TASK | {"split": "test", "label": "new", "min_terms": 4, "max_terms": 4, "minuses": [2, 2]},
    ]
    return changed(
        seeds={"strong": [1], "imperfect": [1]},
        methods={
            "grpo": {"has_teacher": False, "grid": two},
            "kd_rkl": {"grid": two},
            "kdrl": {"grid": [{"kd.coef": 0.5}, {"kd.coef": 1.0}]},
        },
        ablation_seeds=[1],
        ablations={
            "coefficient of KDRL": {
                "method": "kdrl",
                "teachers": ["strong", "imperfect"],
                "variants": {"2": {"kd.coef": 2.0}, "4": {"kd.coef": 4.0}},
            }
        },
        new_kinds=["new"],
        test={"data.eval": kinds, "eval.num_prompts": 8, "eval.num_samples": 8, "eval.agreement": True},
    )


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs/lab of tiny runs, in the place of the real ones."""
    monkeypatch.setenv("XLA_FLAGS", "")  # runs of one device
    configs = tmp_path / "configs" / "lab"
    configs.mkdir(parents=True)
    sft = {"student": {"architecture": SHAPE}, "sft": {"coef": 1}, "rl": {"coef": 0}}
    sft["rollout"] = SMALL["rollout"] | {"source": "dataset", "group_size": 1}
    trees = {
        **{name: SMALL | sft | {"name": name} for name in MODELS},
        "grpo": SMALL | {"name": "grpo", "student": BOTH["student"]},
        "kd_rkl": SMALL | BOTH | {"name": "kd_rkl", "rl": {"coef": 0}, "kd": {"coef": 1}},
        "kdrl": SMALL | BOTH | {"name": "kdrl", "kd": {"coef": 1}},
    }
    for name, tree in trees.items():
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for module in ("jobs", "runner", "protocol", "summary"):
        monkeypatch.setattr(f"benchmarks.lab.{module}.CONFIGS", configs)
    return tmp_path


@pytest.mark.slow
def test_a_small_lab_runs_stops_and_goes_on(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages with real runs. What has a record is not run again; what has another setting is; a lab that
    is ended in the middle of runs leaves none of them running."""
    said: list[str] = []

    def lab(protocol: Protocol) -> Lab:
        return Lab(protocol, small / "runs", small / "out", 2, said.append)

    first = lab(small_protocol())
    models, trials = 3, 2 + 2 * 2 + 2 * 2
    original = first._run_job

    def until_two_trials_are_done(job: Job, core: int | None) -> float:
        if sum(line.startswith("trials") for line in said) >= 2:
            raise KeyboardInterrupt
        return original(job, core)

    monkeypatch.setattr(first, "_run_job", until_two_trials_are_done)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert not first._processes._at_work
    assert models + 2 <= len(said) <= models + 3
    records = len(list((small / "out" / "runs").rglob("*.json")))
    assert records == len(said) - models

    said.clear()
    second = lab(small_protocol())
    second.run()
    reported, ablations = 1 + 2 + 2, 2 * 2
    assert len(said) == models + trials - records + reported + ablations
    written, missing = summary.write_summary(second)
    assert all(path.exists() for path in written)
    assert not missing
    assert {path.suffix for path in written} == {".md", ".png", ".yaml"}
    kept = {path.relative_to(small / "runs").parts[0] for path in (small / "runs").rglob("metrics.jsonl")}
    assert kept == {"models"}

    # Models that are gone are trained again, to the same bits; a seed more is all that runs beside.
    said.clear()
    shutil.rmtree(small / "runs")
    more = small_protocol().model_dump() | {"seeds": {"strong": [1, 2], "imperfect": [1]}}
    third = lab(Protocol.model_validate(more))
    third.run()
    assert len(said) == models + 3
    config = small / "configs" / "lab" / "kd_rkl.yaml"
    config.write_text(config.read_text().replace("num_steps: 2", "num_steps: 3"))
    _, missing = summary.write_summary(lab(small_protocol()))
    assert any("strong/kd_rkl" in line for line in missing)


@pytest.mark.slow
def test_a_model_that_comes_out_otherwise_is_refused(small: Path) -> None:
    lab = Lab(small_protocol(), small / "runs", small / "out", 2, print)
    lab._train_model("strong", None)
    record = lab.model_record("strong")
    assert record is not None
    lab.records.write("models/strong", record | {"fingerprint": "another"})
    shutil.rmtree(small / "runs")
    with pytest.raises(ValueError, match="strong was trained anew and is another model"):
        lab._train_model("strong", None)


def test_a_run_that_fails_says_where_to_look(small: Path) -> None:
    lab = Lab(small_protocol(), small / "runs", small / "out", 1, print)
    (small / "configs" / "lab" / "strong.yaml").write_text("name: strong\nstudent: {path: nowhere.gguf}\n")
    with pytest.raises(JobError, match=r"models/strong: ended with status 2: error: .*strong\.txt\)"):
        lab._processes.run(["--config", str(small / "configs/lab/strong.yaml")], lab.models["strong"], None)
    lab._processes.stop()
    with pytest.raises(JobError, match="not begun"):
        lab._processes.run([], lab.models["strong"], None)
