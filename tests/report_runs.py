"""Files of runs that never were, for tests of the report."""

import base64
import gzip
import json
import re

from rich.console import Console
from tiny_runs import TREE

from kdrl_jax.config import load_config, save_config
from kdrl_jax.metrics import write_json, write_jsonl
from kdrl_jax.report.page import report_page
from kdrl_jax.report.reading import group_runs, read_runs

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b> {{DATA}} <!--"


def tokens(text, kl):
    return {
        "texts": [*text, ""],
        "names": {str(len(text)): "<end>"},
        "logprobs": [-0.1 * (i % 5) for i in range(len(text) + 1)],
        "teacher_logprobs": [-0.2] * (len(text) + 1),
        "reverse_kl": [kl * (i % 3) for i in range(len(text) + 1)],
        "teacher_top": [[["<", 0.7, 0.5], [letter, 0.2, 0.4]] for letter in [*text, "<end>"]],
        "teacher_rank": [0 if letter == "<" else 1 for letter in [*text, "<end>"]],
    }


def rollouts(step, groups=4, text=HOSTILE):
    rows = []
    for g in range(groups):
        for sample in range(4):
            right = sample < g
            said = f"{text} {g}.{sample}"
            rows.append(
                {"step": step, "question": f"{g}+{step}?", "answer": "4", "source": "sums", "sample": sample}
                | {"completion": said, "reward": float(right), "correct": right, "scores": {"numeric": 1.0}}
                | {"error": None, "finish": "length" if sample == 3 else "end", "advantage": 0.5 - sample / 3}
                | {"tokens": tokens(said, 0.1 + 0.4 * (sample == 2))}
            )
    return rows


def make_run(folder, name, steps=40, seed=0, every=10, of=None, overrides=(), text=HOSTILE):
    """A run's files, without a run."""
    run = folder / name
    run.mkdir(parents=True)
    path = folder / "config_in.json"
    path.write_text(json.dumps(TREE))
    settings = [f"log.dir={run}", f"seed={seed}", f"train.num_steps={of or steps}", *overrides]
    save_config(load_config(path, settings), run)
    rows = [
        {
            "step": s,
            "loss": 1 / (s + 1),
            "reward/mean": s / steps + 0.01 * seed,
            "reward/solved_frac": s / steps,
        }
        | {"kd/reverse_kl": 2 / (s + 1), "kd/reverse_kl_exact": 2.1 / (s + 1), "entropy": 0.5, "lr": 1e-3}
        | {"kd/coef": max(1 - 0.1 * s, 0.5), "rl/coef": 1.0, "ref/coef": 0.0, "grad_norm": 1.0 + s % 3}
        | {"completion/length_mean": 20 + s % 7, "completion/truncated_frac": 0.1, "tokens_per_second": 900}
        | {f"time/{k}": 0.1 for k in ("rollout", "reward", "teacher", "update", "diagnostics")}
        | ({"rl/grad_norm": 0.5, "kd/grad_norm": 0.7, "grad_cosine": None} if s % 10 == 0 else {})
        for s in range(steps)
    ]
    write_jsonl(run / "metrics.jsonl", rows)
    write_jsonl(run / "alarms.jsonl", [{"step": 5, "name": "entropy_collapse", "says": HOSTILE}])
    write_jsonl(run / "changes.jsonl", [{"step": 7, "key": "eval.every", "was": 2, "is": 3}])
    for step in range(0, steps + 1, every):
        found = {"step": step, "num_prompts": 64, "greedy/accuracy": step / steps, "greedy/length_mean": 20.0}
        # The older files have no intervals.
        found |= {"greedy/accuracy_ci": [step / steps - 0.05, step / steps + 0.05]} if step else {}
        write_json(run / "eval" / f"step_{step:06d}.json", found)
        if step < steps:
            write_jsonl(run / "rollouts" / f"step_{step:06d}.jsonl", rollouts(step, text=text))
    write_json(run / "eval" / "teacher.json", {"num_prompts": 64, "greedy/accuracy": 0.9})
    return run


def unpacked(html, name):
    held = re.search(rf'id="{name}">([^<]*)</script>', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(held)))


def page_of(run, *others):
    """The report's page without its picture, which takes seconds to draw."""
    page = run.parent / f"{run.name}.html"
    page.write_text(report_page(group_runs(read_runs([run, *others])), lambda *_: None))
    return page


def quiet():
    return Console(quiet=True)
