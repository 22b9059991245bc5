"""What the TPU compiler expects of a chip, beside what the chip's pages say, on any CPU host with libtpu.

    pip install 'jax[tpu]'
    python benchmarks/compiler_estimates.py [v4 v5e v5p v6e v7x]

A product of two matrices of 16,384 x 16,384, and an addition of 1 to one of them: the compiler's estimated
cycles at the clock of `kdrl_jax.plan.chips`, as a share of the peak and of the memory's bandwidth. The plan
believes the first and not the second: memory-bound additions are known to come near the bandwidth.
"""

import argparse
import os

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kdrl_jax.plan.chips import CHIPS
from kdrl_jax.plan.hlo import parse
from kdrl_jax.plan.topology import make_topology

SIZE = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("chips", nargs="*", default=list(CHIPS))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    columns = ["chip", "type", "product, of the peak", "addition, of the bandwidth"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for kind in args.chips:
        chip, devices = make_topology(f"{kind}:{'x'.join('1' * CHIPS[kind].dims)}")
        for dtype, peak in ((jnp.bfloat16, chip.flops), (jnp.int8, chip.int8_ops)):
            x = jax.ShapeDtypeStruct((SIZE, SIZE), dtype, sharding=SingleDeviceSharding(devices[0]))
            seconds = []
            for f in (lambda x: x @ x, lambda x: x + 1):
                program = parse(jax.jit(f).lower(x).compile().as_text())
                seconds.append(sum(i.cycles for i in program.entry) / chip.clock)
            product = 2 * SIZE**3 / peak / seconds[0]
            addition = 2 * SIZE**2 * x.dtype.itemsize / chip.bandwidth / seconds[1]
            print(f"| {kind} | {x.dtype} | {product:.0%} | {addition:.0%} |", flush=True)


if __name__ == "__main__":
    main()
