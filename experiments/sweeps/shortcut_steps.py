"""Does more bootstrapping, or a finer ladder of step sizes, make the one-step world model better?

    dreamer4 sweep shortcut_steps                  # 9 trials of about 3 minutes each, one on every core
    dreamer4 sweep shortcut_steps --dry-run        # shows their commands
    dreamer4 sweep shortcut_steps --report         # the page again, also while it runs

Smoke size: it shows how a sweep is written and that it runs; models this small answer no question.
"""

from launch.algebra import chain, product, values
from launch.metric import Metric

EXPERIMENT = "quickstart"
SIZE = "smoke"
SWEEP = chain(
    # Half or a quarter of the rows on the bootstrap branch, and ladders from 1/2 to 1/8.
    product(values("dynamics.k_max", 2, 4, 8), values("dynamics.bootstrap_fraction", 0.25, 0.5)),
    # Without any: plain diffusion forcing, which has no reason to be good in one step.
    product(values("dynamics.objective", "diffusion"), values("dynamics.k_max", 2, 4, 8)),
)
# Tiles that changed, right after one sampling step for each frame.
METRIC = Metric("steps.models[name=shortcut forcing].rows[steps=1].changed_accuracy", "max")
