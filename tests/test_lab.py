"""The lab: its protocol, its arithmetic, and that every number that is told comes from results/lab."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.lab import summary
from benchmarks.lab.jobs import Job, digest, frozen
from benchmarks.lab.measures import measures, reached
from benchmarks.lab.plan import Plan, score
from benchmarks.lab.protocol import CONFIGS, TEACHERS, Protocol, read_protocol
from benchmarks.lab.runner import Lab
from benchmarks.lab.statistics import difference_of, mean_of
from benchmarks.lab.tables import differences_table, speed_table, trials_table
from kdrl_jax.config import load_config
from kdrl_jax.config.load import parse_yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "lab"
PROTOCOL = read_protocol()


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
            budgets.add(
                (config.train.num_steps, config.train.prompts_per_iteration * config.rollout.group_size)
            )
            assert config.train.updates_per_iteration == 1
        assert len(budgets) == 1

    def test_every_method_has_as_many_trials(self) -> None:
        plan = Plan(PROTOCOL, lambda job: record_of(job, 0.5))
        for teacher in TEACHERS:
            counts = {
                len(plan.trials(method, teacher if part.has_teacher else None))
                for method, part in PROTOCOL.methods.items()
            }
            assert len(counts) == 1

    def test_more_trials_for_one_are_refused(self) -> None:
        methods = PROTOCOL.model_dump()["methods"]
        methods["kdrl"]["grid"] += ({"kd.coef": 0.5},)
        with pytest.raises(ValueError, match="as many trials as the others"):
            changed(methods=methods)

    def test_trials_have_a_seed_of_their_own(self) -> None:
        with pytest.raises(ValueError, match="trial_seed=1 must not be among"):
            changed(trial_seed=1)

    def test_enough_seeds(self) -> None:
        assert len(PROTOCOL.seeds.strong) >= 5
        assert len(PROTOCOL.seeds.imperfect) >= 3

    def test_test_questions_are_not_those_of_validation(self) -> None:
        """And the new kind is never trained on."""
        config = load_config(CONFIGS / "grpo.yaml")
        assert {s.split for s in config.data.train} == {"train"}  # type: ignore[union-attr]
        assert {s.split for s in config.data.eval} == {"validation"}  # type: ignore[union-attr]
        assert {s["split"] for s in PROTOCOL.test["data.eval"]} == {"test"}

        def forms(source: Any) -> set[tuple[int, int]]:
            terms = range(source.min_terms, source.max_terms + 1)
            return {(t, m) for t in terms for m in range(source.minuses[0], source.minuses[1] + 1)}

        known = set().union(*map(forms, config.data.train))
        for source in load_config(CONFIGS / "kdrl.yaml", evaluation_of(PROTOCOL)).data.eval:
            if source.label in PROTOCOL.new_kinds:  # type: ignore[union-attr]
                assert not forms(source) & known
            else:
                assert forms(source) <= known


def evaluation_of(protocol: Protocol) -> list[str]:
    """The overrides of an evaluation."""
    return [f"{key}={json.dumps(value)}" for key, value in protocol.test.items()]


class TestJobs:
    JOB = Job("kdrl", "strong", 3, frozen({"optimizer.learning_rate.value": 5e-4, "kd.coef": 0.3}))

    def test_name(self) -> None:
        assert self.JOB.name == "strong/kdrl/kd.coef=0.3,rate=0.0005/seed_3"
        alone = Job("grpo", None, 1, ())
        assert alone.name == "no_teacher/grpo/as it is/seed_1"

    def test_names_tell_all_runs_apart(self) -> None:
        plan = Plan(PROTOCOL, lambda job: record_of(job, 0.5))
        jobs = {*plan.first_trials(), *plan.later_trials(), *plan.all_finals(), *plan.all_ablations()}
        assert len({job.name for job in jobs}) == len(jobs)

    def test_digest_sees_everything_that_decides(self) -> None:
        base = digest(self.JOB, PROTOCOL)
        assert digest(dataclasses.replace(self.JOB), PROTOCOL) == base
        others = [
            dataclasses.replace(self.JOB, seed=4),
            dataclasses.replace(self.JOB, settings=frozen({"kd.coef": 0.4})),
            dataclasses.replace(self.JOB, test=frozen(PROTOCOL.test), compared_with=("strong",)),
        ]
        found = {digest(job, PROTOCOL) for job in others}
        assert len(found) == len(others)
        assert base not in found
        # The models that it starts from count as well.
        assert digest(self.JOB, changed(model_seed=7)) != base
        models = PROTOCOL.models.model_dump() | {"strong": "imperfect.yaml"}
        assert digest(self.JOB, changed(models=models)) != base


def record_of(job: Job, accuracy: float) -> dict[str, Any]:
    """A made-up record, for what is done with records."""
    values = [0.1, 0.2, accuracy, accuracy, accuracy]
    kinds = [s["label"] for s in PROTOCOL.test["data.eval"]]
    part = {
        "greedy/accuracy": accuracy, "sampled/accuracy": accuracy, "sampled/pass@8": 1.0,
        "sampled/length_mean": 20.0,
    }  # fmt: skip
    return {
        "method": job.method,
        "settings": {key: json.loads(value) for key, value in job.settings},
        "validation": {"step": [0, 10, 20, 30, 40], "sampled/accuracy": values},
        "tokens": [100 * (i + 1) for i in range(40)],
        "test": dict.fromkeys(kinds, part),
    }


class TestPlan:
    def scores(self, job: Job) -> dict[str, Any]:
        """GRPO is best at 4e-4, all others at 8e-4, and with a coefficient of 0.3."""
        settings = {key: json.loads(value) for key, value in job.settings}
        rate = settings["optimizer.learning_rate.value"]
        best = 4e-4 if job.method == "grpo" else 8e-4
        accuracy = 0.9 - 0.1 * abs(np.log(rate / best))
        return record_of(job, accuracy + (0.05 if settings.get("kd.coef") == 0.3 else 0))

    def test_the_best_trial_is_chosen(self) -> None:
        plan = Plan(PROTOCOL, self.scores)
        assert dict(plan.chosen("grpo", "strong")) == {"optimizer.learning_rate.value": "0.0004"}
        assert dict(plan.chosen("kd_rkl", "strong")) == {"optimizer.learning_rate.value": "0.0008"}
        # At the rate of GRPO.
        assert dict(plan.chosen("kdrl", "strong")) == {
            "kd.coef": "0.3", "optimizer.learning_rate.value": "0.0004",
        }  # fmt: skip

    def test_a_missing_trial_stops(self) -> None:
        plan = Plan(PROTOCOL, lambda job: None)
        with pytest.raises(LookupError, match="has not run"):
            plan.finals("strong")

    def test_runs_without_a_teacher_are_shared(self) -> None:
        plan = Plan(PROTOCOL, self.scores)
        strong, imperfect = plan.finals("strong")["grpo"], plan.finals("imperfect")["grpo"]
        assert imperfect == strong[: len(imperfect)]
        assert [job.compared_with for job in strong] == [TEACHERS] * 3 + [("strong",)] * 2
        assert not set(plan.finals("strong")["kdrl"]) & set(plan.finals("imperfect")["kdrl"])

    def test_an_ablation_shares_the_reported_runs(self) -> None:
        """Its variant without changes is the method itself."""
        plan = Plan(PROTOCOL, self.scores)
        variants = plan.ablation("estimator of KDRL", "imperfect")
        assert set(variants["k2"]) <= set(plan.finals("imperfect")["kdrl"])
        assert not set(variants["whole vocabulary"]) & set(plan.finals("imperfect")["kdrl"])

    def test_score_is_the_mean_of_the_last_three(self) -> None:
        record = {"validation": {"sampled/accuracy": [1.0, 0.2, 0.3, 0.7]}}
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
        record = record_of(Job("grpo", None, 1, ()), 0.5)
        assert reached(record, 0.15) == (10, 1000)
        assert reached(record, 0.5) == (20, 2000)
        assert reached(record, 0.1) == (0, 0)
        assert reached(record, 0.6) is None


class TestTables:
    def runs(self) -> dict[str, list[dict[str, Any]]]:
        jobs = {m: [Job(m, None, seed, ()) for seed in (1, 2, 3)] for m in ("grpo", "kd_rkl", "kdrl")}
        found = {"grpo": (0.4, 0.5, 0.6), "kd_rkl": (0.3, 0.4, 0.5), "kdrl": (0.5, 0.6, 0.7)}
        return {m: [record_of(j, a) for j, a in zip(jobs[m], found[m], strict=True)] for m in jobs}

    def test_differences(self) -> None:
        table = differences_table(self.runs(), PROTOCOL.new_kinds)
        assert "| KDRL | **+10.0 ± 0.0** | **+10.0 ± 0.0** | **+20.0 ± 0.0** | **+20.0 ± 0.0** |" in table
        assert "| GRPO |  |  | **+10.0 ± 0.0** | **+10.0 ± 0.0** |" in table

    def test_speed(self) -> None:
        table = speed_table(self.runs())
        assert "| KDRL | 3 of 3 | 20 | 2 |" in table
        assert "| KD-RKL | 0 of 3 | – | – |" in table

    def test_trials(self) -> None:
        job = Job("kdrl", "strong", 0, frozen({"kd.coef": 0.3}))
        table = trials_table({"kdrl": [record_of(job, 0.5), record_of(job, 0.5), record_of(job, 0.2)]})
        assert "| KDRL | **kd.coef 0.3: 50.0**; kd.coef 0.3: 50.0; kd.coef 0.3: 20.0 |" in table

    def test_filling_documents(self) -> None:
        text = "a\n<!-- lab: models -->\nold\n<!-- end -->\nb\n"
        filled = summary.fill(text, {"models": "| new |"})
        assert filled == "a\n<!-- lab: models -->\n| new |\n<!-- end -->\nb\n"
        assert summary.fill(filled, {"models": "| new |"}) == filled
        with pytest.raises(LookupError, match="no table 'models'"):
            summary.fill(text, {})


@pytest.mark.skipif(not RESULTS.is_dir(), reason="results/lab is not there")
class TestResults:
    """What is told of the lab, from its records."""

    @pytest.fixture(scope="class")
    def lab(self) -> Lab:
        return Lab(PROTOCOL, Path("nowhere"), RESULTS, 1, print)

    def test_every_table_follows_from_the_records(self, lab: Lab) -> None:
        found = summary.blocks(lab)
        for path in (*summary.DOCUMENTS, RESULTS / "tables.md"):
            text = path.read_text()
            assert summary.fill(text, found) == text, f"{path}: run python -m benchmarks.lab --summarise"
        for name, table in found.items():
            assert f"## {name}\n\n{table}\n" in (RESULTS / "tables.md").read_text()
        assert "<!-- lab: " in (ROOT / "README.md").read_text()

    def test_models_lie_in_their_ranges(self, lab: Lab) -> None:
        found = {}
        for name in ("student", "strong", "imperfect"):
            record = lab.model_record(name)
            assert record is not None
            found[name] = measures(record, PROTOCOL.new_kinds)
        for key in ("avg@8", "greedy"):
            assert found["strong"][key] >= 95
            assert 70 <= found["imperfect"][key] <= 85
            assert 15 <= found["student"][key] <= 45

    @pytest.mark.parametrize("teacher", TEACHERS)
    @pytest.mark.parametrize("method", ["grpo", "kd_rkl"])
    def test_reward_and_teacher_each_improve_on_the_student(
        self, lab: Lab, method: str, teacher: str
    ) -> None:
        student = lab.model_record("student")
        assert student is not None
        before = measures(student, PROTOCOL.new_kinds)["avg@8"]
        for job in lab.plan.finals(teacher)[method]:
            record = lab.record(job)
            assert record is not None
            assert measures(record, PROTOCOL.new_kinds)["avg@8"] > before

    def test_configs_are_those_that_were_run(self, lab: Lab) -> None:
        for teacher in TEACHERS:
            for method, jobs in lab.plan.finals(teacher).items():
                path = RESULTS / "configs" / (jobs[0].teacher or "no_teacher") / method / "config.yaml"
                names = {name: Path(name) for name in TINY_MODELS}
                config = load_config(CONFIGS / f"{method}.yaml", jobs[0].overrides(names))
                assert parse_yaml(path.read_text(), str(path), is_file=True) == config.model_dump(mode="json")


TINY_MODELS = ("student", "strong", "imperfect")


@pytest.mark.slow
def test_a_small_lab_runs_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages with real runs; what has a record is not run again; another setting is."""
    monkeypatch.setenv("XLA_FLAGS", "")  # runs of one device
    configs = tmp_path / "configs" / "lab"
    configs.mkdir(parents=True)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    task = {"kind": "task", "task": "chain_sum", "min_terms": 3, "max_terms": 3, "minuses": [0, 1]}
    base = {
        "tokenizer": {"kind": "char"},
        "data": {"train": [task], "eval": [task | {"split": "validation"}], "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8, "decode_chunk": 8, "group_size": 4},
        "reward": {"num_workers": 1},
        "optimizer": {"learning_rate": {"kind": "constant", "value": 1e-3}},
        "train": {"num_steps": 2, "prompts_per_iteration": 4, "diagnostics_every": 0},
        "eval": {"every": 1, "num_prompts": 4, "num_samples": 4},
        "checkpoint": {"every": 0},
    }
    sft = {"student": {"architecture": shape}, "sft": {"coef": 1}, "rl": {"coef": 0}}
    sft["rollout"] = base["rollout"] | {"source": "dataset", "group_size": 1}  # type: ignore[operator]
    with_teacher = {"student": {"run": "student.yaml"}, "teacher": {"run": "strong.yaml"}}
    trees = {
        **{name: base | sft | {"name": name} for name in TINY_MODELS},
        "grpo": base | {"name": "grpo", "student": {"run": "student.yaml"}},
        "kd_rkl": base | with_teacher | {"name": "kd_rkl", "rl": {"coef": 0}, "kd": {"coef": 1}},
        "kdrl": base | with_teacher | {"name": "kdrl", "kd": {"coef": 1}},
    }
    for name, tree in trees.items():
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    for module in ("jobs", "runner", "summary", "protocol"):
        monkeypatch.setattr(f"benchmarks.lab.{module}.CONFIGS", configs)
    monkeypatch.setattr("benchmarks.lab.summary.DOCUMENTS", ())
    two = [{"optimizer.learning_rate.value": 1e-3}, {"optimizer.learning_rate.value": 2e-3}]
    kinds = [
        task | {"split": "test", "label": "old"},
        task | {"split": "test", "label": "new", "minuses": [2, 2]},
    ]
    protocol = changed(
        seeds={"strong": [1], "imperfect": [1]},
        methods={
            "grpo": {"has_teacher": False, "grid": two},
            "kd_rkl": {"grid": two},
            "kdrl": {"at_best_of": "grpo", "grid": [{"kd.coef": 0.5}, {"kd.coef": 1.0}]},
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
        test={"data.eval": kinds, "eval.num_prompts": 4, "eval.num_samples": 8, "eval.agreement": True},
    )
    said: list[str] = []
    lab = Lab(protocol, tmp_path / "runs", tmp_path / "out", 2, said.append)
    monkeypatch.setattr(Plan, "all_ablations", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lab.run()
    done = len(said)
    monkeypatch.undo()
    monkeypatch.setenv("XLA_FLAGS", "")
    for module in ("jobs", "runner", "summary", "protocol"):
        monkeypatch.setattr(f"benchmarks.lab.{module}.CONFIGS", configs)
    monkeypatch.setattr("benchmarks.lab.summary.DOCUMENTS", ())
    lab.run()
    # Models 3 (looked at each time), rates 2 + 2 * 2, coefficients 2 * 2, reported 1 + 2 + 2, ablation 2 * 2.
    assert (done, len(said)) == (3 + 6 + 4 + 5, 18 + 3 + 4)
    lab.run()
    assert len(said) == 25 + 3
    written = summary.write_summary(lab)
    assert all(path.exists() for path in written)
    assert {path.suffix for path in written} == {".md", ".png", ".yaml"}
    assert len(list((tmp_path / "out" / "runs").rglob("seed_*.json"))) == 6 + 4 + 5 + 4
    assert [path.name for path in (tmp_path / "runs").iterdir() if any(path.rglob("metrics.jsonl"))] == [
        "models"
    ]
