"""Behavioural cloning without pixels: what can be had from the task text, one's own last actions and the clock.

An agent that does no better than this has learned to copy action sequences, not to look (a known trap of imitation:
a network that sees past actions can reach a low loss and act badly).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dreamer4_jax.agent.actions import Binary, Continuous, logits_size
from dreamer4_jax.config import ActionComponent, UserError

HISTORY = 4  # own actions that are remembered
CLOCK = 64  # steps counted apart; later ones, and those of an unseen start, share one entry
WORD_WIDTH = 16


@dataclass(frozen=True)
class BlindModel:
    """A trained blind policy: `params` of the network, and what is needed to rebuild its input."""

    params: Any
    components: tuple[ActionComponent, ...]
    clock_seen: int  # the most steps since an episode's start that occurred in training
    clock_late: int  # the clock entry of later steps: the shared one, if training filled it
    loss: float  # mean negative log-likelihood of the last tenth of the training


# ---------------------------------------------------------------------------------------------------------------------
# Network


def _classes(part: ActionComponent) -> bool:
    return part.kind in ("categorical", "mouse")


def _codes(part: ActionComponent, values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Remembered actions: classes as they are, and class `size` for none; keys and continuous values followed by a 1
    where there is none."""
    if _classes(part):
        return np.where(present, values, part.size).astype(np.int32)
    known = np.where(present[..., None], np.clip(values.astype(np.float32), -1, 1), 0)
    return np.concatenate([known, ~present[..., None]], axis=-1).astype(np.float32)


def _none(part: ActionComponent, *shape: int) -> np.ndarray:
    """Memories of no action."""
    like = np.zeros(shape, np.int32) if _classes(part) else np.zeros((*shape, part.size), np.float32)
    return _codes(part, like, np.zeros(shape, bool))


def _init(
    rng: np.random.Generator, words: int, vocab: int, parts: Sequence[ActionComponent], hidden: int
) -> dict[str, Any]:
    inputs = words * WORD_WIDTH + HISTORY * sum(p.size + 1 for p in parts) + CLOCK + 1
    outputs = logits_size(parts)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    return {
        "words": normal(vocab, WORD_WIDTH),
        "hidden": [
            {"w": normal(inputs, hidden, scale=(2.0 / inputs) ** 0.5), "b": zeros(hidden)},
            {"w": normal(hidden, hidden, scale=(2.0 / hidden) ** 0.5), "b": zeros(hidden)},
        ],
        "out": {"w": zeros(hidden, outputs), "b": zeros(outputs)},
    }


def _logits(
    params: dict[str, Any],
    tasks: Int[Array, "n words"],
    history: tuple[Array, ...],
    clock: Int[Array, " n"],
    parts: tuple[ActionComponent, ...],
) -> list[Float[Array, "n O"]]:
    """What describes the next action, by component; `history` as `_codes` gives it."""
    text = params["words"][tasks] * (tasks > 0)[..., None]  # 0 is padding
    past = [
        (jax.nn.one_hot(h, p.size + 1) if _classes(p) else h).reshape(len(h), -1)
        for h, p in zip(history, parts, strict=True)
    ]
    x = jnp.concatenate([text.reshape(len(tasks), -1), *past, jax.nn.one_hot(clock, CLOCK + 1)], axis=-1)
    for layer in params["hidden"]:
        x = jax.nn.silu(x @ layer["w"] + layer["b"])
    out = x @ params["out"]["w"] + params["out"]["b"]
    return jnp.split(out, np.cumsum([logits_size([p]) for p in parts])[:-1], axis=-1)


def _loss(part: ActionComponent, outputs: Float[Array, "n O"], target: Array) -> Array:
    """Mean negative log-likelihood of one component's actions."""
    if _classes(part):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, target).mean()
    found: Any = Binary(outputs) if part.kind == "binary" else Continuous.from_outputs(outputs)
    return -found.log_prob(target).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Training examples


def examples(
    batch: dict[str, Any], components: Sequence[ActionComponent], rows: Literal["relevant", "all"]
) -> dict[str, Any]:
    """Flat arrays of the decisions of a batch: frame t's task, past actions and clock, and the action that left it.

    A decision is used if the next frame belongs to the same episode and its action is known, and if all that the
    policy would remember at t lies inside the window (the episode's start, or `HISTORY` actions).
    """
    first = np.asarray(batch["is_first"], bool)
    b, t = first.shape
    keep_row = np.asarray(batch["relevant"], bool) if rows == "relevant" else np.ones(b, bool)
    frames = np.arange(t)
    start = np.maximum.accumulate(np.where(first, frames, -1), axis=1)  # -1: before the window
    age = frames - start
    known = start >= 0
    clock = np.where(known & (age < CLOCK), age, CLOCK)
    present = np.logical_and.reduce([np.asarray(batch["present"][c.name], bool) for c in components])
    usable = np.zeros((b, t), bool)
    usable[:, :-1] = ~first[:, 1:] & present[:, 1:]
    usable &= (known | (frames >= HISTORY - 1)) & keep_row[:, None]

    history, target = [], []
    for part in components:
        action = np.asarray(batch["actions"][part.name], np.float32 if part.kind == "continuous" else np.int32)
        shown = _codes(part, action, np.asarray(batch["present"][part.name], bool))
        past = _none(part, b, t, HISTORY)
        for lag in range(min(HISTORY, t)):
            # frame t - lag holds an action of this episode only if it came after the episode's first frame
            inside = (age > lag) | (~known & (frames >= lag))
            inside = inside.reshape(b, t, *(1,) * (shown.ndim - 2))
            past[:, lag:, lag] = np.where(inside[:, lag:], shown[:, : t - lag], past[:, lag:, lag])
        history.append(past[usable])
        target.append(np.concatenate([action[:, 1:], action[:, :1]], axis=1)[usable])
    return {
        "tasks": np.asarray(batch["task"], np.int32)[usable],
        "clock": clock[usable].astype(np.int32),
        "history": tuple(history),
        "target": tuple(target),
    }


def train_blind(
    batches: Iterable[dict[str, Any]],
    components: Sequence[ActionComponent],
    *,
    vocab: int,
    read: int = 64,
    steps: int = 1500,
    batch: int = 256,
    lr: float = 3e-3,
    hidden: int = 128,
    rows: Literal["relevant", "all"] = "relevant",
    seed: int = 0,
) -> BlindModel:
    """Clones the actions of `read` batches of the loader with an MLP that sees no pixels.

    Args:
        batches: loader batches (frames and latents are ignored).
        components: of the action space.
        vocab: size of the task vocabulary.
        rows: "relevant" clones rows that hold a reward, as the policy head does, and is the stronger baseline wherever
            part of the data is aimless; "all" clones everything.
    """
    parts = tuple(components)
    found = [examples(b, parts, rows) for _, b in zip(range(read), batches, strict=False)]
    if not found or not sum(len(f["clock"]) for f in found):
        raise UserError(
            f"blind policy: no usable decision in {len(found)} batches (rows = {rows!r}); the data holds no "
            + ("rewarded episode" if rows == "relevant" else "action")
        )
    data = jax.tree.map(lambda *x: np.concatenate(x), *found)
    count = len(data["clock"])
    if data["tasks"].max(initial=0) >= vocab:
        raise UserError(f"agent.task_vocab = {vocab}: the data holds word id {data['tasks'].max()}; it must be larger")
    rng = np.random.default_rng(seed)  # NumPy's: nothing to compile
    params = _init(rng, data["tasks"].shape[1], vocab, parts, hidden)
    optimizer = optax.adamw(optax.cosine_decay_schedule(lr, steps), weight_decay=1e-3)

    def loss_of(params: Any, b: dict[str, Any]) -> Array:
        logits = _logits(params, b["tasks"], b["history"], b["clock"], parts)
        terms = [_loss(part, z, y) for part, z, y in zip(parts, logits, b["target"], strict=True)]
        return jnp.stack(terms).sum()

    @jax.jit
    def fit(params: Any, data: dict[str, Any], order: Int[Array, "steps batch"]) -> tuple[Any, Array]:
        def step(carry: tuple[Any, Any], rows: Int[Array, " batch"]) -> tuple[tuple[Any, Any], Array]:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params, jax.tree.map(lambda x: x[rows], data))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), order)
        return params, losses

    params, losses = fit(params, data, rng.integers(0, count, (steps, batch), dtype=np.int32))
    early = data["clock"][data["clock"] < CLOCK]
    seen = int(early.max()) if len(early) else -1
    return BlindModel(
        params=params,
        components=parts,
        clock_seen=seen,
        clock_late=CLOCK if len(early) < count else seen,
        loss=float(np.asarray(losses)[-max(1, steps // 10) :].mean()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Acting


class BlindPolicy:
    """Plays a `BlindModel`: sampled by default, as the data was made by a stochastic policy; greedy on request."""

    def __init__(self, model: BlindModel, *, greedy: bool = False, seed: int = 0, name: str | None = None):
        self.name = name or ("blind (greedy)" if greedy else "blind")
        self._model = model
        self._greedy = greedy
        self._rng = np.random.default_rng(seed)
        self._network = jax.jit(partial(_logits, parts=model.components))
        self._history: list[np.ndarray] = []
        self._clock = np.zeros(0, np.int32)

    def reset(self, starting: np.ndarray) -> None:
        if len(self._clock) != len(starting):
            self._clock = np.zeros(len(starting), np.int32)
            self._history = [_none(p, len(starting), HISTORY) for p in self._model.components]
        self._clock[starting] = 0
        for past, part in zip(self._history, self._model.components, strict=True):
            past[starting] = _none(part, HISTORY)

    def act(self, images: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
        clock = np.where(self._clock <= self._model.clock_seen, self._clock, self._model.clock_late)
        logits = self._network(self._model.params, np.asarray(tasks, np.int32), tuple(self._history), clock)
        out = {}
        for i, part in enumerate(self._model.components):
            action = out[part.name] = self._choose(part, np.asarray(logits[i], np.float64))
            newest = _codes(part, action, np.ones(len(action), bool))
            self._history[i] = np.concatenate([newest[:, None], self._history[i][:, :-1]], axis=1)
        self._clock += 1
        return out

    def _choose(self, part: ActionComponent, outputs: Float[np.ndarray, "n O"]) -> np.ndarray:
        if part.kind == "continuous":
            normal = Continuous.from_outputs(jnp.asarray(outputs, jnp.float32))
            mean, deviation = np.asarray(normal.mean), np.exp(np.asarray(normal.log_std))
            noise = 0.0 if self._greedy else self._rng.standard_normal(mean.shape)
            return (mean + deviation * noise).astype(np.float32)
        if part.kind == "binary":
            threshold = 0.0 if self._greedy else self._rng.logistic(size=outputs.shape)
            return (outputs > threshold).astype(np.uint8)
        scores = outputs if self._greedy else outputs + self._rng.gumbel(size=outputs.shape)
        return scores.argmax(-1).astype(np.int32)
