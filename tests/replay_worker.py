"""One process of a job that records or replays, as the tests start it; see `tests/job.py`.

replay_worker.py CONFIG RECORDED.npz OUT.npz COORDINATOR NUM PROCESS DEVICES UPDATES
"""

import sys

import jax
import numpy as np


def main(config_file, recorded_file, out, coordinator, num, process, devices, updates):
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(num) > 1:
        jax.distributed.initialize(coordinator, int(num), int(process))
    import replay

    from kdrl_jax.config import load_config

    with replay.open_run(load_config(config_file), sgd=True) as run:
        recorded = replay.record(run)
        given = dict(np.load(recorded_file)) if recorded_file != "-" else recorded
        losses, params = replay.replay(run, given, int(updates))
    if int(process) == 0:
        arrays = {f"recorded/{name}": x for name, x in recorded.items()}
        np.savez(out, losses=losses, **arrays, **{f"params/{name}": x for name, x in params.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
