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
    loss: float  # mean cross-entropy of the last tenth of the training


# ---------------------------------------------------------------------------------------------------------------------
# Network


def _init(rng: np.random.Generator, words: int, vocab: int, sizes: Sequence[int], hidden: int) -> dict[str, Any]:
    inputs = words * WORD_WIDTH + HISTORY * sum(s + 1 for s in sizes) + CLOCK + 1

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
        "out": {"w": zeros(hidden, sum(sizes)), "b": zeros(sum(sizes))},
    }


def _logits(
    params: dict[str, Any],
    tasks: Int[Array, "n words"],
    history: tuple[Int[Array, "n history"], ...],
    clock: Int[Array, " n"],
    sizes: tuple[int, ...],
) -> list[Float[Array, "n A"]]:
    """Class `size` of a component's history stands for "no action"."""
    text = params["words"][tasks] * (tasks > 0)[..., None]  # 0 is padding
    past = [jax.nn.one_hot(h, s + 1).reshape(len(h), -1) for h, s in zip(history, sizes, strict=True)]
    x = jnp.concatenate([text.reshape(len(tasks), -1), *past, jax.nn.one_hot(clock, CLOCK + 1)], axis=-1)
    for layer in params["hidden"]:
        x = jax.nn.silu(x @ layer["w"] + layer["b"])
    out = x @ params["out"]["w"] + params["out"]["b"]
    return jnp.split(out, np.cumsum(sizes)[:-1], axis=-1)


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
        action = np.asarray(batch["actions"][part.name], np.int32)
        shown = np.where(np.asarray(batch["present"][part.name], bool), action, part.size)
        past = np.full((b, t, HISTORY), part.size, np.int32)
        for lag in range(min(HISTORY, t)):
            # frame t - lag holds an action of this episode only if it came after the episode's first frame
            inside = (age > lag) | (~known & (frames >= lag))
            past[:, lag:, lag] = np.where(inside[:, lag:], shown[:, : t - lag], part.size)
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
        components: of the action space; categorical and mouse ones.
        vocab: size of the task vocabulary.
        rows: "relevant" clones rows that hold a reward, as the policy head does, and is the stronger baseline wherever
            part of the data is aimless; "all" clones everything.
    """
    parts = tuple(components)
    for part in parts:
        if part.kind not in ("categorical", "mouse"):
            raise UserError(f"blind policy: component {part.name!r} is {part.kind}; it can clone categorical and mouse")
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
    sizes = tuple(p.size for p in parts)
    rng = np.random.default_rng(seed)  # NumPy's: nothing to compile
    params = _init(rng, data["tasks"].shape[1], vocab, sizes, hidden)
    optimizer = optax.adamw(optax.cosine_decay_schedule(lr, steps), weight_decay=1e-3)

    def loss_of(params: Any, b: dict[str, Any]) -> Array:
        logits = _logits(params, b["tasks"], b["history"], b["clock"], sizes)
        terms = [
            optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
            for z, y in zip(logits, b["target"], strict=True)
        ]
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
        self._sizes = tuple(p.size for p in model.components)
        self._greedy = greedy
        self._rng = np.random.default_rng(seed)
        self._network = jax.jit(partial(_logits, sizes=self._sizes))
        self._history: list[np.ndarray] = []
        self._clock = np.zeros(0, np.int32)

    def reset(self, starting: np.ndarray) -> None:
        if len(self._clock) != len(starting):
            self._clock = np.zeros(len(starting), np.int32)
            self._history = [np.full((len(starting), HISTORY), s, np.int32) for s in self._sizes]
        self._clock[starting] = 0
        for past, size in zip(self._history, self._sizes, strict=True):
            past[starting] = size

    def act(self, images: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
        clock = np.where(self._clock <= self._model.clock_seen, self._clock, self._model.clock_late)
        logits = self._network(self._model.params, np.asarray(tasks, np.int32), tuple(self._history), clock)
        out = {}
        for i, part in enumerate(self._model.components):
            scores = np.asarray(logits[i], np.float64)
            if not self._greedy:
                scores = scores + self._rng.gumbel(size=scores.shape)
            action = scores.argmax(-1).astype(np.int32)
            self._history[i] = np.concatenate([action[:, None], self._history[i][:, :-1]], axis=1)
            out[part.name] = action
        self._clock += 1
        return out
