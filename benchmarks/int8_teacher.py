"""How far a teacher in int8 is from the same teacher in floats: SmolLM2-135M-Instruct.

    python benchmarks/int8_teacher.py [COMPUTE_DTYPE [NUM_QUESTIONS]]

Needs the files that configs/smollm2_gsm8k_cpu.yaml tells how to fetch. Prints the exact KL(float || int8),
in nats per token, and the share of equal most likely tokens, both computing in COMPUTE_DTYPE (float32): on
random ids (as the self-check measures), on GSM8K's questions with their written answers, and on the float
model's own greedy answers to them.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from kdrl_jax import hosts, sharding
from kdrl_jax.config import load_config
from kdrl_jax.data.encoded import encode_completion
from kdrl_jax.data.prompts import load_eval_prompts
from kdrl_jax.evaluate import Agreement
from kdrl_jax.rollout.recorded import from_completions
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.self_check import MAX_POSITIONS
from kdrl_jax.setup import Setup, make_setup
from kdrl_jax.types import Params, Prompts, Rollouts

CONFIG = Path("configs/smollm2_gsm8k_cpu.yaml")
WHOLE_MODEL = ["student.keep_layers=null", "teacher.weights=int8"]
WITH_ANSWERS = "data.eval=[{kind: jsonl, path: data/gsm8k_test.jsonl, completion_field: answer}]"


def random_rows(setup: Setup, num_rows: int) -> Rollouts:
    rng = np.random.default_rng(0)
    starts = rng.integers(1, MAX_POSITIONS // 2 + 1, num_rows).astype(np.int32)
    tokens = rng.integers(0, setup.num_tokens, (num_rows, MAX_POSITIONS)).astype(np.int32)
    ended, zeros = np.zeros(num_rows, bool), np.zeros(tokens.shape, np.float32)
    rows = Rollouts(tokens, starts, MAX_POSITIONS - starts, ended, zeros)
    return jax.device_put(rows, sharding.rows(setup.mesh))


def written_answers(setup: Setup, prompts: Prompts) -> Rollouts:
    t = setup.tokenizer
    return from_completions(
        prompts,
        [encode_completion(t, text or "") for text in prompts.completions],
        max_new_tokens=setup.config.rollout.max_new_tokens,
        end_ids=t.end_ids,
        pad_id=t.pad_id,
        share=hosts.share(setup.mesh, len(prompts.questions)),
        mesh=setup.mesh,
    )


def greedy_answers(setup: Setup, params: Params, prompts: Prompts) -> Rollouts:
    engine = setup.engine(setup.student, len(prompts.questions), 1, SamplerSettings(greedy=True))
    return engine.generate(params, prompts, seed_key(0))


def main() -> None:
    dtype = sys.argv[1] if len(sys.argv) > 1 else "float32"
    num = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    types = [f"{role}.compute_dtype={dtype}" for role in ("student", "teacher")]
    config = load_config(CONFIG, [*WHOLE_MODEL, WITH_ANSWERS, *types])
    setup = make_setup(config)
    assert setup.teacher is not None
    params = setup.student_params(setup.init_trainable())
    prompts, _ = load_eval_prompts(
        config.data, setup.tokenizer, chat_template=config.tokenizer.chat_template, num_prompts=num
    )
    sums = Agreement(setup.head, setup.student, setup.teacher.model, setup.mesh)
    print(f"| rows, computed in {dtype} | tokens | KL(float, int8) | same top token |")
    print("| --- | --- | --- | --- |")
    for name, rollouts in (
        ("random ids", random_rows(setup, num)),
        ("written answers", written_answers(setup, prompts)),
        ("own greedy answers", greedy_answers(setup, params, prompts)),
    ):
        found = sums(params, setup.teacher.params, rollouts, num)
        kl, top, count = (x.sum() for x in (found.reverse_kl_B, found.same_top_B, found.tokens_B))
        print(f"| {name} | {int(count)} | {kl / count:.5f} | {top / count:.4f} |", flush=True)


if __name__ == "__main__":
    main()
