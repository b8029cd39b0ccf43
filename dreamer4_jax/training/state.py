"""The state of a training phase, and the jitted step that every phase shares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dreamer4_jax.config import PhaseConfig
from dreamer4_jax.training import optim

Batch = dict[str, Any]
Metrics = dict[str, Array]
Part = tuple[int, int]  # (index, count): a block of a batch's rows, of how many blocks
ALONE: Part = (0, 1)


class Phase(Protocol):
    """What one phase of training supplies; the loop does the rest."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> PhaseConfig: ...

    @property
    def frozen(self) -> Any:
        """Arrays that the loss reads and nothing trains (a pytree, or None)."""

    @property
    def identity(self) -> str:
        """Names those of the frozen arrays that come from outside the run, as their name and checksum do; "" if none
        do. They are in no checkpoint: to resume with others is refused."""

    @property
    def terms(self) -> Sequence[str]:
        """Names of the loss terms."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Factors of the normalised loss terms; 1 for those that are not named."""

    def init(self, key: Array, base: Any = None) -> Any:
        """The trainable model: a pytree whose leaves are all float32 parameters. `base` is what `start_from` returned,
        wherever it has been put since."""

    @property
    def start_from(self) -> Any:
        """Arrays of an earlier phase that the model starts from (a pytree, or None)."""

    def loss(self, model: Any, ema: Any, frozen: Any, batch: Batch, key: Array) -> tuple[Metrics, Metrics]:
        """({name of a loss term: scalar}, metrics): of every batch all `terms`, and no others."""

    def batches(self, start: int, part: Part = ALONE) -> Iterator[Batch]:
        """This part of the batches of step `start`, `start` + 1, ...; the same step always gets the same batch."""

    def evaluate(self, ema: Any, step: int) -> dict[str, float]:
        """Scores of the finished model."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and therefore everything that a checkpoint holds."""

    step: Int[Array, ""]  # updates made
    model: Any
    opt_state: Any
    ema: Any  # exponential moving average of the model; what sampling and evaluation use
    norms: dict[str, Any]  # the loss normaliser's


def init_state(phase: Phase, optimizer: optax.GradientTransformation, key: Array, base: Any = None) -> TrainState:
    """The state before the first update.

    The model is copied: its buffers are donated to the first step, and `phase.init` may hand over arrays that
    somebody else still holds, such as a prior that `phase.frozen` keeps.
    """

    def copy(tree: Any) -> Any:
        # An explicit dtype also drops weak types, which would compile the second step anew.
        return jax.tree.map(lambda x: jnp.array(x, dtype=x.dtype, copy=True), tree)

    model = copy(phase.init(key, phase.start_from if base is None else base))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        model=model,
        # A copy as well: an optimiser may start several moments from one buffer, which cannot be donated twice.
        opt_state=copy(jax.jit(optimizer.init)(model)),
        ema=copy(model),
        norms=optim.init_norms(phase.terms if phase.config.normalize_losses else ()),
    )


def abstract_state(phase: Phase, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes and dtypes of `init_state`, with nothing computed or allocated."""
    return jax.eval_shape(lambda key: init_state(phase, optimizer, key), jax.random.key(0))


def ema_decay(limit: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """``min(limit, (1 + step) / (10 + step))``: early on the average follows the model, not its initial values."""
    s = step.astype(jnp.float32)
    return jnp.minimum(jnp.float32(limit), (1.0 + s) / (10.0 + s))


def _scalars(kind: str, values: Metrics) -> Metrics:
    for name, value in values.items():
        if jnp.shape(value) != ():
            raise ValueError(f"{kind} {name!r} of the loss has shape {jnp.shape(value)}; it must be a scalar")
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def make_train_step(
    phase: Phase, optimizer: optax.GradientTransformation, shardings: Any = None
) -> Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]:
    """The jitted step ``(state, frozen, batch, run_key) -> (state, metrics)``; `state` is donated.

    The loss terms are divided by their running root mean square, weighted, summed and differentiated; the step's
    randomness is ``fold_in(run_key, state.step)``. Where the loss, a gradient or a new parameter is not finite, the
    returned state is the old one, step number included, and ``metrics["finite"]`` is False.

    `shardings`, a tree like the state's, is where the new state goes; by default the compiler decides.

    Metrics: "loss" (the sum that is differentiated), "loss/<term>" (raw), "scaled/<term>" (normalised), "grad_norm"
    (before clipping), "lr", "finite" and the phase's own.
    """
    cfg = phase.config
    schedule = optim.wsd_schedule(cfg)

    def total(model: Any, state: TrainState, frozen: Any, batch: Batch, key: Array) -> tuple[Array, tuple]:
        with jax.named_scope("loss"):
            terms, metrics = phase.loss(model, state.ema, frozen, batch, key)
        terms = _scalars("term", terms)
        if terms.keys() != set(phase.terms):
            raise ValueError(
                f"phase {phase.name}: its loss has the terms {sorted(terms)}, it names {sorted(phase.terms)}"
            )
        scaled, norms = optim.normalize(state.norms, terms) if cfg.normalize_losses else (terms, state.norms)
        weighted = [phase.weights.get(name, 1.0) * value for name, value in scaled.items()]
        return jnp.sum(jnp.stack(weighted)), (terms, scaled, norms, _scalars("metric", metrics))

    def step(state: TrainState, frozen: Any, batch: Batch, run_key: Array) -> tuple[TrainState, Metrics]:
        key, rate = jax.random.fold_in(run_key, state.step), schedule(state.step)
        (loss, (terms, scaled, norms, metrics)), grads = jax.value_and_grad(total, has_aux=True)(
            state.model, state, frozen, batch, key
        )
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
            model = optax.apply_updates(state.model, updates)
            decay = ema_decay(cfg.ema, state.step)
            ema = jax.tree.map(lambda e, m: decay * e + (1.0 - decay) * m, state.ema, model)
        grad_norm = optax.tree.norm(grads)
        watched = [loss, grad_norm, optax.tree.norm(model), *jax.tree.leaves(norms["mean_square"])]
        finite = jnp.all(jnp.isfinite(jnp.stack(watched)))
        new = TrainState(state.step + 1, model, opt_state, ema, norms)
        state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        out: Metrics = {"loss": loss, "grad_norm": grad_norm, "lr": rate, "finite": finite}
        out |= {f"loss/{name}": value for name, value in terms.items()}
        if cfg.normalize_losses:
            out |= {f"scaled/{name}": value for name, value in scaled.items()}
        if clash := sorted(out.keys() & metrics.keys()):
            raise ValueError(f"phase {phase.name}: the loop itself reports the metrics {clash}; rename the phase's")
        return state, out | metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
