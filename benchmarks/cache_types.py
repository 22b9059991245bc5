"""What a smaller cache of keys and values changes: SmolLM2-135M-Instruct sampling at temperature 1.

    python benchmarks/cache_types.py [NUM_QUESTIONS]

Needs the files that configs/smollm2_gsm8k_cpu.yaml tells how to fetch. For each compute type and each
rollout.cache_dtype, prints what training would show as `sampler/logprob_gap` before its first update (mean
abs(sampler - trainer) log-probability of the sampled tokens), the largest gap, and the effective sample size
of the ratios as a share (`ratio/ess`), over 2 completions of each question.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from kdrl_jax.config import load_config
from kdrl_jax.data.prompts import load_eval_prompts
from kdrl_jax.frozen import LogprobScorer
from kdrl_jax.rollout.sampling import SamplerSettings, seed_key
from kdrl_jax.scoring.packer import pack_rollouts, pack_shape
from kdrl_jax.setup import make_setup

CONFIG = Path("configs/smollm2_gsm8k_cpu.yaml")


def main() -> None:
    num = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    print("| computed in | cache | mean gap | largest gap | ess | tokens |\n" + "| --- " * 6 + "|")
    for compute, caches in (("float32", ("float32", "bfloat16", "int8")), ("bfloat16", ("bfloat16", "int8"))):
        for cache in caches:
            words = ["student.keep_layers=null", f"rollout.cache_dtype={cache}"]
            words += [f"{role}.compute_dtype={compute}" for role in ("student", "teacher")]
            config = load_config(CONFIG, words)
            setup = make_setup(config)
            params = setup.student_params(setup.init_trainable())
            prompts, _ = load_eval_prompts(
                config.data, setup.tokenizer, chat_template=config.tokenizer.chat_template, num_prompts=num
            )
            engine = setup.engine(setup.student, num, 2, SamplerSettings())
            r = engine.generate(params, prompts, seed_key(0))
            shape = pack_shape(*r.tokens_BT.shape, setup.mesh, setup.student.attention)
            with jax.set_mesh(setup.mesh):
                packed = pack_rollouts(r, 2, shape, setup.mesh)
                scored = LogprobScorer(setup.student, setup.head, shape)(r, packed, params, 1.0)
            gap = np.asarray(scored - r.sampler_logprobs_BT)[np.asarray(r.completion_mask_BT)]
            ratio = np.exp(gap)
            ess = ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)
            cells = (compute, cache, f"{np.abs(gap).mean():.5f}", f"{np.abs(gap).max():.4f}")
            print(f"| {' | '.join(cells)} | {ess:.5f} | {len(gap)} |", flush=True)


if __name__ == "__main__":
    main()
