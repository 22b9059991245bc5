"""Seconds of a training step and of its parts, beside TRL's, in one run.

    python benchmarks/update.py [--trl PYTHON] [--rounds 4] [--only NAME ...] [--peak TFLOP/S]

The workload of `workload.py`: a step samples 8 completions of at most 512 tokens for each of 16 prompts of 64
(about 23,000 tokens at temperature 1), rewards them with the share of odd tokens, and makes one AdamW update
in float32. `grpo` is this code's loop with RL alone, `kdrl` with distillation from a teacher of the student's
size (k2 at the sampled tokens) besides, `kdrl, full` with the exact divergence over the vocabulary, and `trl`
is TRL's GRPOTrainer in the environment of PYTHON (trl, datasets, torch), with microbatches of 16 rows. Each
is a process of its own that makes one step to warm up; then they take turns, one step each, and the table
holds medians.

On CPUs this code has one device per core, as mesh.cpu_devices makes them; `grpo, one device` has one for all.
Optimising is everything between the last token sampled and the new parameters, but for what the verifiers
take: packing, the teacher, and the update.

`model FLOPs` are those of the formula in `kdrl_jax/plan/model_flops.py` for the tokens that were trained on
(no padding, nothing computed again, each prompt once for every completion); over the time they give the last
column's share of the speed of a large product of this device, measured here (on a GPU: model-FLOPs
utilisation against what it is sold with, by --peak).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import (
    GROUP,
    HEAD,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    NEW,
    PROMPTS,
    VOCABULARY,
    WIDE,
    WIDTH,
    Process,
    call,
    measured_speeds,
    write_model,
)

Step = Callable[[], dict[str, Any]]
VARIANTS = {
    "grpo": {"kd": {"coef": 0}},
    "grpo, one device": {"kd": {"coef": 0}, "mesh": {"cpu_devices": 1}},
    "kdrl": {"kd": {"coef": 0.01}},
    "kdrl, full": {"kd": {"coef": 0.01, "estimator": "full"}},
}


def odd_share(question: str, completion: str, answer: str) -> float:
    """The reward: which share of a completion's words has an odd token id."""
    words = completion.split()
    return sum(int(word[1:]) % 2 == 0 for word in words if word[0] == "t") / max(1, len(words))


def write_questions(path: Path, num: int) -> None:
    import numpy as np

    drawn = np.random.default_rng(1).integers(0, VOCABULARY - 3, (num, WIDTH))
    rows = [{"question": " ".join(f"t{i}" for i in row), "answer": "none"} for row in drawn]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(folder: Path, variant: str, parent: Path) -> Step:
    """One iteration of `train` at a time."""
    import jax
    from rich.console import Console

    from kdrl_jax.config import Config
    from kdrl_jax.setup import make_setup
    from kdrl_jax.train import Run

    sections = VARIANTS[variant]
    cores = len(os.sched_getaffinity(0))
    tree: dict[str, Any] = {
        "name": "update",
        "student": {"path": str(folder)},
        "teacher": {"path": str(folder)},
        "tokenizer": {"chat_template": "none"},
        "data": {"train": [{"kind": "jsonl", "path": str(folder / "questions.jsonl")}]},
        "rollout": {"group_size": GROUP, "max_new_tokens": NEW},
        "reward": {"verifier": "update:odd_share"},
        "train": {"num_steps": 10_000, "prompts_per_iteration": PROMPTS, "diagnostics_every": 0},
        "mesh": {"cpu_devices": cores},
        "checkpoint": {"every": 0},
        "log": {"dir": str(parent / "run"), "rollouts_every": 0},
    } | sections
    tree["data"]["max_prompt_tokens"] = WIDTH
    if tree["kd"]["coef"] == 0:
        del tree["teacher"]
    config = Config.model_validate(tree)
    jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    jax.config.update("jax_default_matmul_precision", "float32")
    run = Run(make_setup(config), Console(quiet=True), lambda: False, False, config.run_dir)

    def step() -> dict[str, Any]:
        run.iteration()
        row = json.loads((Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
        return {
            "tokens": round(row["completion/length_mean"] * PROMPTS * GROUP),
            "rollout": row["time/rollout"],
            "reward": row["time/reward"],
            "optimise": row["time/teacher"] + row["time/update"],
            "teacher": row["time/teacher"],
            "padding": row["padding_frac"],
        }

    return step


def trl(folder: Path, parent: Path) -> None:
    """TRL's trainer, which is let on at each line that comes in."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    class Timed(GRPOTrainer):
        generating = 0.0
        tokens = 0

        def _generate_and_score_completions(self, *args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            out = super()._generate_and_score_completions(*args, **options)
            Timed.generating += time.perf_counter() - start
            Timed.tokens += int(out["completion_mask"].sum())
            return out

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            Timed.generating, Timed.tokens = 0.0, 0
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            optimise = time.perf_counter() - self.start - Timed.generating
            answer({"tokens": Timed.tokens, "rollout": Timed.generating, "reward": 0.0, "optimise": optimise})

    def rewards(completion_ids: Any, **_: Any) -> list[float]:
        return [sum(i % 2 for i in ids) / max(1, len(ids)) for ids in completion_ids]

    config = GRPOConfig(
        output_dir=str(parent / "trl"),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=PROMPTS * GROUP // 16,
        num_generations=GROUP,
        max_completion_length=NEW,
        learning_rate=1e-6,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        max_steps=10_000,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["question"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[InTurn()],
    )
    trainer.train()


STDOUT = os.dup(1)


def answer(measured: dict[str, Any]) -> None:
    os.write(STDOUT, (json.dumps(measured) + "\n").encode())


def work(name: str, folder: Path) -> None:
    """The process of one that is measured: one line in asks for a step, one line out answers."""
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stdout(sys.stderr):
        if name == "trl":
            trl(folder, Path(parent))
            return
        step = ours(folder, name, Path(parent))
        for _ in sys.stdin:
            answer(step())


def model_flops(tokens: float) -> float:
    """Of one update on so many completion tokens of the usual spread, without any prompt twice."""
    from kdrl_jax.models.decoder_config import DecoderConfig
    from kdrl_jax.plan.model_flops import keys_seen, training_flops

    config = DecoderConfig(VOCABULARY, WIDE, MLP, LAYERS, HEADS, KV_HEADS, HEAD)
    mean = round(tokens / (PROMPTS * GROUP))
    # Longer completions than the mean see more: for a geometric spread, its mean more of them.
    seen = keys_seen(config, WIDTH, WIDTH + 2 * mean)
    return training_flops(config, tokens + PROMPTS * WIDTH, tokens, seen)


def print_share(tokens: float, seconds: float, peak: float | None) -> None:
    speed = peak * 1e12 if peak else measured_speeds()[1]
    flops = model_flops(tokens)
    print(
        f"\ngrpo: {flops / 1e9:.0f} GFLOP of the model in {seconds:.2f} s of optimising: "
        f"{flops / seconds / 1e9:.0f} GFLOP/s, {flops / seconds / speed:.0%} of {speed / 1e9:.0f} GFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    has_trl = all(importlib.util.find_spec(name) for name in ("torch", "trl", "datasets"))
    parser.add_argument("--trl", metavar="PYTHON", default=sys.executable if has_trl else None)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--peak", type=float, metavar="TFLOP/S", help="of the device, for the last line")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.model)
        return
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    pythons = dict.fromkeys(args.only, sys.executable) | ({"trl": args.trl} if args.trl else {})
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        call(write_model, folder)
        write_questions(folder / "questions.jsonl", 4096)
        processes = []
        for name, python in pythons.items():
            processes.append(Process(name, python, __file__, folder))
            processes[-1].round(0)  # one after the other: no one warms up while another is timed
        runs: dict[str, list[dict[str, Any]]] = {p.name: [] for p in processes}
        for number in range(1, args.rounds + 1):
            for process in processes:
                runs[process.name].append(process.round(number))
                print(
                    f"round {number}: {process.name}: {runs[process.name][-1]}", file=sys.stderr, flush=True
                )
        for process in processes:
            process.close()
    columns = (
        "| | tokens | rollout, s | optimise, s | of it teacher | step, s | optimise, tokens/s | padding |"
    )
    print(columns + "\n" + "| --- " * 8 + "|")
    middle = {}
    for name, rows in runs.items():
        for row in rows:
            row["step"] = row["rollout"] + row["reward"] + row["optimise"]
            row["speed"] = row["tokens"] / row["optimise"]
            row["step speed"] = row["tokens"] / row["step"]
        keys = {key for row in rows for key in row}
        m = middle[name] = {key: statistics.median(row[key] for row in rows) for key in keys}
        cells = [name, f"{m['tokens']:.0f}", *(f"{m[key]:.2f}" for key in ("rollout", "optimise"))]
        cells += [f"{m['teacher']:.2f}" if "teacher" in m else "", f"{m['step']:.2f}", f"{m['speed']:.0f}"]
        print(
            f"| {' | '.join(cells)} | {m['padding']:.1%} |"
            if "padding" in m
            else f"| {' | '.join(cells)} | |"
        )
    for name in ("trl", "grpo, one device"):
        if name in middle and "grpo" in middle:
            ratios = [middle["grpo"][key] / middle[name][key] for key in ("speed", "step speed")]
            print(
                f"\ngrpo is {ratios[0]:.2f} times as fast as {name} in optimising, {ratios[1]:.2f} in a step"
            )
    for name in ("kdrl", "kdrl, full"):
        if name in middle and "grpo" in middle:
            ratio = middle["grpo"]["step speed"] / middle[name]["step speed"]
            print(f"\na step of {name} takes {ratio:.2f} times one of grpo, per token")
    if "grpo" in middle:
        call(print_share, middle["grpo"]["tokens"], middle["grpo"]["optimise"], args.peak)


if __name__ == "__main__":
    main()
