"""Every recipe of configs/recipes trains, on tiny models, with the terms that its name promises."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from tiny_runs import SHAPE

from kdrl_jax.config import load_config
from kdrl_jax.train import train

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "recipes"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem != "base")
TINY = {
    "student": {"architecture": SHAPE},
    "teacher": {"architecture": {**SHAPE, "hidden_size": 32}},
    "data": {
        "train": [{"kind": "task", "task": "chain_sum", "max_terms": 2, "max_value": 3}],
        "eval": [],
        "max_prompt_tokens": 4,
    },
    "rollout": {"max_new_tokens": 12},
    "reward": {"num_workers": 1},
    "train": {"num_steps": 4, "prompts_per_iteration": 8, "diagnostics_every": 4},
    "eval": {"every": 0},
    "checkpoint": {"every": 0},
    "mesh": {"data": 1, "fsdp": 8},
}
TERMS = {
    "sft": {"sft"},
    "seq_kd": {"sft"},
    "kd_rkl": {"kd"},
    "gkd": {"kd"},
    "exopd": {"kd"},
    **{name: {"rl"} for name in ("grpo", "dapo", "dr_grpo", "rloo", "gspo", "cispo", "trrd")},
    **{name: {"rl", "kd"} for name in ("kdrl", "kdrl_anneal", "kdrl_mask_response", "kdrl_mask_group")},
    "kd_all_wrong": {"rl", "kd"},
    "kd_then_rl": {"kd"},  # at first
}


def test_every_recipe_is_expected_and_described():
    assert set(RECIPES) == set(TERMS)
    readme = (ROOT / "README.md").read_text()
    for name in RECIPES:
        text = (FOLDER / f"{name}.yaml").read_text()
        head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        assert "=" in head, f"{name}: no equation"
        assert re.search(r"arXiv\s*#?\s*\d{4}\.\d{5}", head) or name in ("sft", "kd_all_wrong"), name
        assert f"configs/recipes/{name}.yaml" in readme, f"{name} is not in README's table"


# The others differ from these in what `test_step` tests: they are trained by -m slow.
OFTEN = {"kdrl", "kdrl_mask_response", "grpo", "kd_rkl", "seq_kd", "sft", "trrd"}


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_a_recipe_trains(name, tmp_path):
    tree = {"extends": [str(FOLDER / f"{name}.yaml")], "log": {"dir": str(tmp_path / "run")}} | TINY
    if yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).get("teacher", 0) is None:
        del tree["teacher"]
    if "rl" in TERMS[name]:
        # Right answers are rare from random weights; lengths tell completions apart.
        tree["reward"] = {**TINY["reward"], "overlong_buffer": 10}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert train(load_config(path), Console(quiet=True), lambda: False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert {t for t in ("rl", "kd", "ref", "entropy", "sft") if row[f"{t}/coef"]} == TERMS[name], row
        assert np.isfinite(row["loss"])
        assert row["skipped_updates"] == 0
    assert any(row["grad_norm"] > 0 for row in rows)
