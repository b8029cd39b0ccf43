"""Training: one loop for every phase, its state, optimisers, checkpoints and metrics."""

from dreamer4_jax.training.checkpoint import Checkpointer, CheckpointError, load_meta, load_model, save_model
from dreamer4_jax.training.loop import (
    DivergenceError,
    Interrupted,
    PhaseResult,
    model_path,
    open_run,
    run_phase,
    steps_path,
)
from dreamer4_jax.training.metrics import MetricsWriter, read_ledger, read_metrics
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.state import Phase, TrainState, abstract_state, init_state, make_train_step

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "DivergenceError",
    "Interrupted",
    "MetricsWriter",
    "Phase",
    "PhaseResult",
    "TrainState",
    "abstract_state",
    "init_state",
    "load_meta",
    "load_model",
    "make_optimizer",
    "make_train_step",
    "model_path",
    "open_run",
    "read_ledger",
    "read_metrics",
    "run_phase",
    "save_model",
    "steps_path",
]
