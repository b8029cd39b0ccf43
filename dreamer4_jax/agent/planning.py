"""Search at inference over the transition oracle: best of N rollouts, the cross-entropy method, Gumbel MuZero.

A search plans in a model ``step(state, action, key) -> (state, seen)``. Its states have a read-out ``h`` for policy
and value heads, and the streams as first axis of every leaf; ``seen`` has ``reward`` and ``cont``. All searches are
pure, batched over streams and of static shape. `BranchingOracle` makes such a model of the world model; its docstring
says what a node costs. `SearchPolicy` plays in real environments with a search.

Budgets: a search imagines `frames` frames a decision, `dependent` of them one after the other; a frame costs K + 1
network passes (K denoising steps, one that writes the history and reads out).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dreamer4_jax.agent.actions import ActionDistribution, Binary, Categorical, Continuous
from dreamer4_jax.agent.branching import BranchingOracle, Real
from dreamer4_jax.agent.heads import PolicyHead, ValueHead
from dreamer4_jax.agent.model import Memory, WorldModelPolicy, see
from dreamer4_jax.config import UserError
from dreamer4_jax.world.oracle import TransitionOracle

SMOOTHING = 0.05  # share of the uniform distribution in what the cross-entropy method draws from


class Model(Protocol):
    """What is planned in. `start` is the state of every stream that a decision is made for."""

    def start(self) -> Any: ...

    def step(self, state: Any, action: dict[str, Array], key: Array) -> tuple[Any, Any]: ...


@partial(jax.tree_util.register_dataclass, data_fields=["action", "value"], meta_fields=[])
@dataclass(frozen=True)
class Plan:
    """Attributes:
    action: component -> [B, ...], to take now.
    value: [B], the discounted return that the search expects of it. Chosen as the largest of noisy estimates, it is
      too high on average, the more so the wider the search: compare it with the real return.
    """

    action: dict[str, Array]
    value: Float[Array, " B"]


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


def _rollouts(model: Model, state: Any, choose: Any, value: ValueHead, key: Array, horizon: int, gamma: float):
    """Actions [H, ...] and scores of one rollout from each state: discounted rewards, and the value at the end.

    `choose(t, h, key)` gives the actions of step t.
    """

    def step(carry, scanned):
        state, weight, score = carry
        t, k = scanned
        act, world = jax.random.split(k)
        action = choose(t, state.h, act)
        after, seen = model.step(state, action, world)
        return (after, weight * gamma * seen.cont, score + weight * seen.reward), action

    none = jnp.zeros(state.h.shape[0], jnp.float32)
    steps = (jnp.arange(horizon), jax.random.split(key, horizon))
    (state, weight, score), actions = jax.lax.scan(step, (state, none + 1.0, none), steps)
    return actions, score + weight * value.mean(state.h)


def _repeat(tree: Any, times: int) -> Any:
    """Every stream `times` times, side by side."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def _pick(actions: dict[str, Array], best: Int[Array, " B"]) -> dict[str, Array]:
    """Of actions [B, M, ...] the one of each stream's candidate."""
    return jax.tree.map(lambda x: x[jnp.arange(len(best)), best], actions)


@dataclass(frozen=True)
class BestOfN:
    """The first action of the best of `budget` rollouts of the policy. A budget of 1 is the policy itself.

    The score of a rollout is its discounted rewards and the value of its last state. In a world of chance the best
    rollout is a lucky one too.
    """

    budget: int
    horizon: int = 8
    gamma: float = 0.997

    @property
    def depth(self) -> int:
        return self.horizon

    @property
    def frames(self) -> int:
        return self.budget * self.horizon

    @property
    def dependent(self) -> int:
        return self.horizon

    def __call__(self, model: Model, policy: PolicyHead, value: ValueHead, key: Array) -> Plan:
        state = _repeat(model.start(), self.budget)
        choose = lambda t, h, k: policy.next(h).sample(k)
        actions, score = _rollouts(model, state, choose, value, key, self.horizon, self.gamma)
        score = score.reshape(-1, self.budget)
        first = jax.tree.map(lambda x: x[0].reshape(*score.shape, *x.shape[2:]), actions)
        return Plan(_pick(first, jnp.argmax(score, axis=1)), jnp.max(score, axis=1))


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy method over action sequences, for every kind of action; `budget` rollouts in `rounds` rounds.

    The first round draws its candidates from the policy; later ones a share `prior` of them, and the others from one
    independent distribution for each step, fitted to the `elite` best of the round before: frequencies (categorical,
    binary keys), mean and deviation (continuous). The action is the mode of the last fit's first step, its value the
    mean score of the last round's elite.
    """

    budget: int
    rounds: int = 2
    horizon: int = 8
    elite: float = 0.25
    prior: float = 0.25
    gamma: float = 0.997

    def __post_init__(self) -> None:
        if self.budget < 2 * self.rounds or self.budget % self.rounds:
            raise UserError(
                f"budget = {self.budget}: must be a multiple of the {self.rounds} rounds, at least two rollouts each"
            )

    @property
    def depth(self) -> int:
        return self.horizon

    @property
    def frames(self) -> int:
        return self.budget * self.horizon

    @property
    def dependent(self) -> int:
        return self.rounds * self.horizon

    def __call__(self, model: Model, policy: PolicyHead, value: ValueHead, key: Array) -> Plan:
        start = model.start()
        batch, count = start.h.shape[0], self.budget // self.rounds
        best = max(1, round(self.elite * count))
        state = _repeat(start, count)
        from_policy = jnp.tile(jnp.arange(count) < round(self.prior * count), batch)

        def rollouts(fit: ActionDistribution | None, key: Array):
            def choose(t, h, k):
                own, drawn = jax.random.split(k)
                mine = policy.next(h).sample(own)
                if fit is None:
                    return mine
                theirs = _repeat(jax.tree.map(lambda x: x[t], fit), count).sample(drawn)
                return jax.tree.map(
                    lambda x, y: jnp.where(from_policy.reshape(-1, *(1,) * (x.ndim - 1)), x, y), mine, theirs
                )

            actions, score = _rollouts(model, state, choose, value, key, self.horizon, self.gamma)
            top, which = jax.lax.top_k(score.reshape(batch, count), best)
            flat = which + count * jnp.arange(batch)[:, None]
            elite = jax.tree.map(lambda x: x[:, flat], actions)  # [H, B, elite, ...]
            return _fit(elite, policy.next(start.h)), jnp.mean(top, axis=1)

        keys = jax.random.split(key, self.rounds)
        fit, score = rollouts(None, keys[0])
        if self.rounds > 1:
            # The same program for every later round.
            fit, scores = jax.lax.scan(rollouts, fit, keys[1:])
            score = scores[-1]
        return Plan(jax.tree.map(lambda x: x[0], fit).mode(), score)


def _fit(actions: dict[str, Array], like: ActionDistribution) -> ActionDistribution:
    """The distributions [H, B, ...] of actions [H, B, samples, ...], of the kinds of `like`; never without support."""
    parts: dict[str, Any] = {}
    for name, part in like.parts.items():
        x = actions[name]
        match part:
            case Categorical(logits):
                classes = logits.shape[-1]
                share = jnp.mean(jax.nn.one_hot(x, classes), axis=2)
                parts[name] = Categorical(jnp.log((1.0 - SMOOTHING) * share + SMOOTHING / classes))
            case Binary():
                share = (1.0 - SMOOTHING) * jnp.mean(x.astype(jnp.float32), axis=2) + SMOOTHING / 2
                parts[name] = Binary(jnp.log(share) - jnp.log1p(-share))
            case Continuous():
                deviation = jnp.maximum(jnp.std(x, axis=2), SMOOTHING)
                parts[name] = Continuous(jnp.mean(x, axis=2), jnp.log(deviation))
    return ActionDistribution(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def _mctx() -> Any:
    try:
        import mctx
    except ImportError as error:
        raise UserError("tree search needs the package mctx: pip install 'dreamer4_jax[search]'") from error
    return mctx


@dataclass(frozen=True)
class GumbelMuZero:
    """Gumbel MuZero tree search of the `mctx` package, `budget` simulations; one categorical component.

    A node is one sample of the world model's next frame, drawn when it is first reached: in a world of chance the tree
    plans as if that sample were the only outcome. With a budget of 1 it draws its action from the policy.
    """

    budget: int
    depth: int = 8
    gamma: float = 0.997
    considered: int = 16

    @property
    def frames(self) -> int:
        return self.budget

    @property
    def dependent(self) -> int:
        return self.budget

    def __call__(self, model: Model, policy: PolicyHead, value: ValueHead, key: Array) -> Plan:
        mctx = _mctx()
        start = model.start()
        parts = policy.next(start.h).parts
        if len(parts) != 1 or not isinstance(next(iter(parts.values())), Categorical):
            raise UserError(
                f"actions = {sorted(parts)}: tree search takes one categorical component; use best of N or the "
                "cross-entropy method"
            )
        ((name, root),) = parts.items()

        def expand(_: Any, key: Array, action: Array, state: Any) -> tuple[Any, Any]:
            after, seen = model.step(state, {name: action.astype(jnp.int32)}, key)
            out = mctx.RecurrentFnOutput(
                reward=seen.reward,
                discount=self.gamma * seen.cont,
                prior_logits=policy.next(after.h).parts[name].logits,
                value=value.mean(after.h),
            )
            return out, after

        found = mctx.gumbel_muzero_policy(
            params=(),
            rng_key=key,
            root=mctx.RootFnOutput(prior_logits=root.logits, value=value.mean(start.h), embedding=start),
            recurrent_fn=expand,
            num_simulations=self.budget,
            max_depth=self.depth,
            max_num_considered_actions=min(self.considered, root.logits.shape[-1]),
        )
        q = found.search_tree.summary().qvalues
        action = found.action.astype(jnp.int32)
        return Plan({name: action}, jnp.take_along_axis(q, action[:, None], axis=1)[:, 0])


Search = BestOfN | CrossEntropy | GumbelMuZero


# ---------------------------------------------------------------------------------------------------------------------
# Acting


@partial(jax.jit, static_argnames=("search", "real"), donate_argnums=3)
def _act(
    oracle: TransitionOracle,
    policy: PolicyHead,
    value: ValueHead,
    memory: Memory,
    images: Array,
    tasks: Array,
    starting: Array,
    key: Array,
    *,
    search: Search,
    real: Real | None,
) -> tuple[Plan, Memory]:
    assert oracle.tokenizer is not None
    look, plan = jax.random.split(key)
    state, seen = see(oracle.tokenizer, oracle.dynamics, memory, images, tasks, starting, look)
    found = search(BranchingOracle(oracle, state, search.depth, real), policy, value, plan)
    return found, Memory(seen, state.cache, found.action)


class SearchPolicy(WorldModelPolicy):
    """Plays in E environments at once; every decision is a search from what has been seen.

    Attributes:
      believed: the value of the first decision of every episode, in the order in which episodes began.
    """

    def __init__(
        self,
        oracle: TransitionOracle,
        policy: PolicyHead,
        value: ValueHead,
        search: Search,
        *,
        seed: int = 0,
        name: str = "search",
        real: Any = None,
    ):
        if oracle.tokenizer is None:
            raise UserError("an oracle without a tokenizer sees no frames: search needs one that has it")
        super().__init__(oracle.tokenizer, oracle.dynamics, policy, seed=seed, name=name)
        self._oracle, self._policy, self._value, self._search, self._real = oracle, policy, value, search, real
        self.believed: list[float] = []
        self._fresh: dict[int, int] = {}  # stream -> episode whose first decision comes next

    def begin(self, stream: int, env: Any, seed: int) -> None:
        self._fresh[stream] = len(self.believed)
        self.believed.append(np.nan)
        if self._real is not None:
            self._real.roots[stream] = env

    def end(self, stream: int) -> None:
        """Nothing to do: the next episode of the stream begins with `begin`."""

    def _decide(self, images: np.ndarray, tasks: np.ndarray, starting: np.ndarray, key: Array) -> dict[str, Array]:
        if self._real is not None:
            self._real.restart()
        plan, self._memory = _act(
            self._oracle,
            self._policy,
            self._value,
            self._memory,
            images,
            tasks,
            starting,
            key,
            search=self._search,
            real=self._real,
        )
        if self._fresh:
            value = np.asarray(plan.value)
            for stream, episode in self._fresh.items():
                self.believed[episode] = float(value[stream])
            self._fresh.clear()
        return plan.action
