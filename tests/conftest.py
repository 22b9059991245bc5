"""Eight CPU devices for the tests of sharding, and programs that are compiled quickly, and once."""

import atexit
import gc
import logging
import os
import shutil
import signal
import tempfile
import threading

import pytest

# All before jax starts. Most of a test's time is compiling, of programs that run once, and tiny: they need
# not become fast (an eighth of the time, and no products rounded together), and tests share what is compiled.

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
given = os.environ.get("XLA_FLAGS", "").split()
missing = [flag for flag in FLAGS if not any(x.startswith(flag.partition("=")[0]) for x in given)]
os.environ["XLA_FLAGS"] = " ".join(given + missing)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Set where pytest starts; the processes of xdist inherit it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kdrl_jax_test_cache_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# What `main` sets before libtpu compiles, and that processes of tests may load it side by side.
for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# No test waits for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _signals_mean_what_they_meant():
    """Whatever a test calls, a command too: what follows in this process hears signals as before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture(autouse=True)
def _logging_is_free():
    """An exception that a signal raises inside of logging leaves its lock held by this thread, and the first
    other thread that logs, far from here, waits for ever."""
    yield
    free: list[bool] = []

    def take():
        free.append(logging._lock.acquire(timeout=10))
        if free[0]:
            logging._lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert free == [True], "this thread holds logging's lock"


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Those of one file are hardly those of the next, and all of them together hold gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
