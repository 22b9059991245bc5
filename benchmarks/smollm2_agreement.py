"""Says whether a run of configs/smollm2_gsm8k_cpu.yaml keeps its promises.

    python benchmarks/smollm2_agreement.py [RUN_DIR]

On the teacher's greedy answers to held-out GSM8K questions, by step 30: reverse KL at most 0.45 times its
start, same-top-token share at least twice its start; and at least 5 steps with groups of unequal rewards.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2_gsm8k_cpu")
    evals = [json.loads(p.read_text()) for p in sorted((run / "eval").glob("step_*.json"))]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    print("| step | KL, nats | x start | same top token | x start |\n| --- | --- | --- | --- | --- |")
    first = evals[0]
    for e in evals:
        kl, top = e["teacher_reverse_kl"], e["teacher_top_agreement"]
        print(
            f"| {e['step']} | {kl:.3f} | {kl / first['teacher_reverse_kl']:.3f} | {top:.3f} | "
            f"{top / first['teacher_top_agreement']:.2f} |"
        )
    mixed = [s["step"] for s in steps if s["reward/mixed_groups_frac"] > 0]
    norms = {s["step"]: s["rl/grad_norm"] for s in steps if s.get("rl/grad_norm")}
    repeated = [s["completion/repeated_4gram_frac"] for s in steps]
    lengths = [s["completion/length_mean"] for s in steps]
    print(f"steps with groups of unequal rewards: {len(mixed)} ({mixed})")
    print(f"RL gradient norms where measured and not 0: { ({k: round(v, 3) for k, v in norms.items()}) }")
    print(f"repeated 4-grams: first {repeated[0]:.3f}, largest {max(repeated):.3f}, last {repeated[-1]:.3f}")
    print(f"completion length: first {lengths[0]:.1f}, last {lengths[-1]:.1f}")
    holds = (
        evals[-1]["teacher_reverse_kl"] <= 0.45 * first["teacher_reverse_kl"]
        and evals[-1]["teacher_top_agreement"] >= 2 * first["teacher_top_agreement"]
        and len(mixed) >= 5
    )
    print("pass" if holds else "SHORT")


if __name__ == "__main__":
    main()
