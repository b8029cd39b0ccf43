"""Settings of every test: the CPU, one device, and reproducible hypothesis examples.

One device, because eight virtual ones share the same cores and made single-device steps 20 to 30 % slower. A test of
several devices starts its own process, with ``JAX_NUM_CPU_DEVICES=8`` in its environment.

No persistent compilation cache, although it made a rerun's compilation two to three times faster where it was tried:
on other processors XLA rejects its own CPU entries with an error for each, or dies of an illegal instruction
(jax-ml/jax issue 38445). Whoever knows their machine sets ``JAX_COMPILATION_CACHE_DIR``, which JAX reads itself.
"""

import os

# Before JAX is imported, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")  # the command line would take one for each core
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import HealthCheck, settings

# Compiling makes the first example slow, whatever the example; derandomised, so that a failure is everybody's failure.
settings.register_profile(
    "dreamer4", deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dreamer4")


def pytest_configure(config):
    """The default tests compile much and compute little: without optimising, compiling takes a fifth of the time and
    they a third. ``JAX_DISABLE_MOST_OPTIMIZATIONS=0`` tests the programs that users run, as the slow tests do."""
    if "not slow" in config.option.markexpr and os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
        # Unoptimised, these take two thirds of the compiler's time.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
