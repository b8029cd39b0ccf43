"""Small Markov decision processes as tables: estimated from samples, compared edge by edge, solved. NumPy float64.

S states, A actions. A row of `transition` that is all zero has no outgoing edges: the state is terminal, and worth 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Mdp:
    """Attributes:
    transition: [S, A, S], probability of arriving in each state.
    reward: [S, A], expected reward of the step.
    cont: [S, A, S], probability that the episode goes on after arriving.
    """

    transition: Float[np.ndarray, "S A S"]
    reward: Float[np.ndarray, "S A"]
    cont: Float[np.ndarray, "S A S"]

    @property
    def terminal(self) -> Bool[np.ndarray, " S"]:
        """States without outgoing edges."""
        return self.transition.sum((1, 2)) == 0

    def q(self, value: Float[np.ndarray, " S"], gamma: float) -> Float[np.ndarray, "S A"]:
        """``r(s, a) + gamma sum_s' p(s' | s, a) c(s, a, s') V(s')``."""
        return self.reward + gamma * np.einsum("sat,sat,t->sa", self.transition, self.cont, value)


def from_table(
    table: Mapping[int, Mapping[int, Sequence[tuple[float, int, float, bool]]]], group: Int[np.ndarray, " raw"]
) -> Mdp:
    """The process of a gymnasium table, ``state -> action -> [(probability, next state, reward, ended)]``.

    Args:
      group: class of each state of the table. States of one class must have equal outgoing edges, class by class.
    """
    states, actions = int(group.max()) + 1, len(table[0])
    shape = (states, actions, states)
    p, ended, reward = np.zeros(shape), np.zeros(shape), np.zeros(shape[:2])
    seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for s, rows in table.items():
        row, gain, stop = np.zeros(shape[1:]), np.zeros(actions), np.zeros(shape[1:])
        for a, edges in rows.items():
            # An episode that has ended has no edges; gymnasium's table lets it stay where it is.
            if all(to == s and last for _, to, _, last in edges):
                continue
            for probability, to, r, last in edges:
                row[a, group[to]] += probability
                gain[a] += probability * r
                stop[a, group[to]] += probability * last
        c = int(group[s])
        if c in seen and not all(np.allclose(x, y) for x, y in zip(seen[c], (row, gain), strict=True)):
            raise ValueError(f"state {s}: has other edges than the states before it in class {c}")
        seen[c] = (row, gain)
        p[c], reward[c], ended[c] = row, gain, stop
    return Mdp(p, reward, 1.0 - np.divide(ended, p, out=np.zeros(shape), where=p > 0))


def from_samples(
    state: Int[np.ndarray, " n"],
    action: Int[np.ndarray, " n"],
    after: Int[np.ndarray, " n"],
    reward: Float[np.ndarray, " n"],
    cont: Float[np.ndarray, " n"],
    *,
    states: int,
    actions: int,
) -> tuple[Mdp, Int[np.ndarray, "S A"]]:
    """Frequencies and means of sampled steps, and the number of samples of each (state, action)."""
    count, going = np.zeros((states, actions, states)), np.zeros((states, actions, states))
    total = np.zeros((states, actions))
    np.add.at(count, (state, action, after), 1.0)
    np.add.at(going, (state, action, after), cont)
    np.add.at(total, (state, action), reward)
    n = count.sum(-1)
    part = lambda x, by: np.divide(x, by, out=np.zeros_like(x), where=by > 0)
    return Mdp(part(count, n[..., None]), part(total, n), part(going, count)), n.astype(np.int64)


def widen(mdp: Mdp, extra: int) -> Mdp:
    """The same process with `extra` further states, which nothing leads to or from."""
    parts = (mdp.transition, mdp.reward, mdp.cont)
    return Mdp(*(np.pad(x, [(0, 0 if axis == 1 else extra) for axis in range(x.ndim)]) for x in parts))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def edges(mdp: Mdp, least: float) -> Bool[np.ndarray, "S A S"]:
    """Transitions with at least the probability `least` (and more than none)."""
    return (mdp.transition >= least) & (mdp.transition > 0)


def precision_recall(true: Bool[np.ndarray, "..."], found: Bool[np.ndarray, "..."]) -> dict[str, Any]:
    """Edges found, invented and missed; precision = found / (found + invented), recall = found / (found + missed)."""
    hit, extra, lost = (int(x.sum()) for x in (true & found, ~true & found, true & ~found))
    share = lambda rest: hit / (hit + rest) if hit + rest else 1.0
    return {"found": hit, "invented": extra, "missed": lost, "precision": share(extra), "recall": share(lost)}


def total_variation(p: Float[np.ndarray, "*b S"], q: Float[np.ndarray, "*b S"]) -> Float[np.ndarray, "*b"]:
    """``1/2 sum_s |p(s) - q(s)|``: the largest difference in the probability of any event."""
    return 0.5 * np.abs(p - q).sum(-1)


def sampling_floor(
    p: Float[np.ndarray, "*b S"], n: Int[np.ndarray, "*b"], *, draws: int = 200, seed: int = 0
) -> Float[np.ndarray, "..."]:
    """Total variation between `p` and frequencies of `n` draws from it: what a perfect model would show.

    Never 0 where there are several outcomes (``1 / sqrt(2 pi n)`` on average for two equal ones): show it beside.

    Returns:
      [draws, *b], repetitions.
    """
    rng = np.random.default_rng(seed)
    shape = p.shape[:-1]
    flat, counts = p.reshape(-1, p.shape[-1]), np.broadcast_to(n, shape).reshape(-1)
    out = np.zeros((draws, len(flat)))
    for i, (row, k) in enumerate(zip(flat, counts, strict=True)):
        if k and row.sum():
            out[:, i] = total_variation(rng.multinomial(k, row / row.sum(), draws) / k, row)
    return out.reshape(draws, *shape)


# ---------------------------------------------------------------------------------------------------------------------
# Solution


def value_iteration(
    mdp: Mdp, gamma: float, *, tolerance: float = 1e-10
) -> tuple[Float[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """Optimal values and a greedy policy (the lowest of equal actions), ``V(s) = max_a q(s, a)`` to within `tolerance`.

    Raises:
      ValueError: gamma is not in [0, 1); the iteration need not converge.
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma = {gamma}: must be in [0, 1) for value iteration to converge")
    value = np.zeros(len(mdp.reward))
    while True:
        q = mdp.q(value, gamma)
        after = q.max(-1)
        # The contraction bounds the distance to the fixed point by gamma / (1 - gamma) of the last change.
        if gamma * np.abs(after - value).max() <= tolerance * (1 - gamma):
            # Rounding must not choose between equal actions.
            return after, (q >= after[:, None] - 1e-9).argmax(-1)
        value = after


def policy_value(mdp: Mdp, policy: Int[np.ndarray, " S"], gamma: float) -> Float[np.ndarray, " S"]:
    """Exact values of a deterministic policy: ``(I - gamma P_pi C_pi) V = r_pi``."""
    each = np.arange(len(policy))
    move = mdp.transition[each, policy] * mdp.cont[each, policy]
    return np.linalg.solve(np.eye(len(policy)) - gamma * move, mdp.reward[each, policy])


def return_within(mdp: Mdp, policy: Int[np.ndarray, " S"], steps: int) -> Float[np.ndarray, " S"]:
    """Expected undiscounted return of a deterministic policy over `steps` steps from every state."""
    each = np.arange(len(policy))
    value = np.zeros(len(policy))
    for _ in range(steps):
        value = mdp.q(value, 1.0)[each, policy]
    return value
