"""Independent NumPy float64 references, written from the paper's equations and never from our code.

Everything is a plain loop or one line of algebra, slow and easy to check by eye. Signal level ``tau`` runs from 0
(noise) to 1 (data); ``d`` is the step size.
"""

from collections.abc import Callable

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Shortcut forcing


def tau_d_grid(k_max: int) -> list[tuple[float, float, float]]:
    """Eq 4: every (tau, d, probability). 1/d is uniform over {1, 2, 4, ..., k_max}, tau over {0, d, ..., 1 - d}."""
    ks = []
    k = 1
    while k <= k_max:
        ks.append(k)
        k *= 2
    return [(i / k, 1.0 / k, 1.0 / len(ks) / k) for k in ks for i in range(k)]


def _expand(level: np.ndarray, like: np.ndarray) -> np.ndarray:
    level = np.asarray(level, np.float64)
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))


def shortcut_errors(
    f: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    z0: np.ndarray,
    z1: np.ndarray,
    tau: np.ndarray,
    d: np.ndarray,
    d_min: float,
    teacher: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Eq 6 and 7, literally, before the sum over entries and before the ramp: the squared error of every entry of z1.

    Args:
        f: (z, tau, d) -> prediction of clean data; z [..., entries], tau and d of the leading shape of z.
        z0, z1: noise and data. tau, d: arrays of any leading shape of z1 (for example [B, T] for z1 [B, T, N, C]).
        d_min: 1 / K_max; entries with d == d_min take the flow branch, the others the bootstrap branch.
        teacher: predicts the two half steps (default `f`). Where d == d_min it is asked for d_min, as there is no
            smaller step, and its answer is dropped: with `f` mixing frames, use rows of one branch.
    """
    teacher = teacher or f
    z0, z1 = np.asarray(z0, np.float64), np.asarray(z1, np.float64)
    tau, d = np.asarray(tau, np.float64), np.asarray(d, np.float64)
    t, step = _expand(tau, z1), _expand(d, z1)
    z = (1 - t) * z0 + t * z1
    z1_hat = np.asarray(f(z, tau, d), np.float64)
    flow = (z1_hat - z1) ** 2

    half = np.maximum(d / 2, d_min)
    b1 = (teacher(z, tau, half) - z) / (1 - t)
    z_mid = z + b1 * step / 2
    b2 = (teacher(z_mid, tau + d / 2, half) - z_mid) / (1 - (t + step / 2))
    bootstrap = (1 - t) ** 2 * ((z1_hat - z) / (1 - t) - (b1 + b2) / 2) ** 2
    return np.where(np.isclose(step, d_min, rtol=1e-9), flow, bootstrap)


def ramp(tau: np.ndarray) -> np.ndarray:
    """Eq 8: w(tau) = 0.9 tau + 0.1."""
    return 0.9 * np.asarray(tau, np.float64) + 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Agent


def lambda_returns(reward: np.ndarray, value: np.ndarray, cont: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Eq 10 for one sequence: reward [T], cont [T] of the steps t -> t+1, value [T+1]; explicit recursion, [T]."""

    def at(t: int) -> float:
        if t == len(reward):
            return float(value[t])
        return float(reward[t]) + gamma * float(cont[t]) * ((1 - lam) * float(value[t + 1]) + lam * at(t + 1))

    return np.array([at(t) for t in range(len(reward))], np.float64)


def pmpo(
    logp: np.ndarray,
    kl: np.ndarray,
    advantage: np.ndarray,
    alpha: float = 0.5,
    beta: float = 0.3,
) -> float:
    """Eq 11 over all states: D+ = {A >= 0}, D- = {A < 0}, each averaged on its own; an empty set adds nothing."""
    accepted, rejected, divergence = [], [], []
    for lp, k, a in zip(np.ravel(logp), np.ravel(kl), np.ravel(advantage), strict=True):
        (accepted if a >= 0 else rejected).append(float(lp))
        divergence.append(float(k))
    loss = 0.0
    if rejected:
        loss += (1 - alpha) / len(rejected) * sum(rejected)
    if accepted:
        loss -= alpha / len(accepted) * sum(accepted)
    if divergence:
        loss += beta / len(divergence) * sum(divergence)
    return loss


def _flat(*arrays: np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(map(float, row)) for row in zip(*(np.ravel(a) for a in arrays), strict=True)]


def reinforce(logp: np.ndarray, kl: np.ndarray, advantage: np.ndarray, beta: float, rms: bool = False) -> float:
    """-mean A ln pi + beta mean KL; with `rms`, A is divided by the root of the mean of its squares."""
    advantage = np.asarray(advantage, np.float64)
    if rms:
        advantage = advantage / np.sqrt(np.mean(advantage**2))
    rows = _flat(logp, kl, advantage)
    return sum(-a * lp + beta * k for lp, k, a in rows) / len(rows)


def ppo(logp: np.ndarray, kl: np.ndarray, advantage: np.ndarray, old: np.ndarray, clip: float, beta: float) -> float:
    """Schulman et al. 2017, Eq 7, as a loss: the lower of r A and r A with r held within [1 - clip, 1 + clip]."""
    rows = _flat(logp, kl, advantage, old)
    total = 0.0
    for lp, k, a, lp_old in rows:
        ratio = np.exp(lp - lp_old)
        held = min(max(ratio, 1 - clip), 1 + clip)
        total += -min(ratio * a, held * a) + beta * k
    return total / len(rows)


def awr(logp: np.ndarray, kl: np.ndarray, advantage: np.ndarray, temperature: float, top: float, beta: float) -> float:
    """Peng et al. 2019: regression on the taken actions, weighted by exp(A / temperature), at most `top`."""
    rows = _flat(logp, kl, advantage)
    return sum(-min(np.exp(a / temperature), top) * lp + beta * k for lp, k, a in rows) / len(rows)


def filtered_bc(logp: np.ndarray, kl: np.ndarray, total: np.ndarray, share: float, beta: float) -> float:
    """Cloning of the rollouts [T, B] whose total [B] is among the best share n: mean of -ln pi over their states."""
    kept = sorted(range(len(total)), key=lambda b: -total[b])[: int(np.ceil(share * len(total)))]
    return float(-np.mean([logp[t, b] for b in kept for t in range(len(logp))]) + beta * np.mean(kl))


def symexp(x: np.ndarray) -> np.ndarray:
    """sign(x) (exp(|x|) - 1)."""
    x = np.asarray(x, np.float64)
    return np.sign(x) * (np.exp(np.abs(x)) - 1)


def symexp_bins(n: int, limit: float = 20.0) -> np.ndarray:
    """symexp of n evenly spaced points of [-limit, limit]."""
    return symexp(np.linspace(-limit, limit, n))


def twohot(x: float, bins: np.ndarray) -> np.ndarray:
    """Weights of one number over sorted bins: its two neighbours share it, linear in raw space; clipped at the ends."""
    out = np.zeros(len(bins), np.float64)
    if x <= bins[0]:
        out[0] = 1.0
    elif x >= bins[-1]:
        out[-1] = 1.0
    else:
        upper = next(i for i in range(len(bins)) if bins[i] > x)
        width = bins[upper] - bins[upper - 1]
        out[upper - 1] = (bins[upper] - x) / width
        out[upper] = (x - bins[upper - 1]) / width
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Transformer


def rope_1d(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Rotary embedding of x [..., L, K] at positions [L]: channel i < K/2 and channel i + K/2 turn together by
    position * base ** (-2 i / K)."""
    x = np.asarray(x, np.float64)
    k = x.shape[-1]
    out = np.empty_like(x)
    for row, position in enumerate(positions):
        for i in range(k // 2):
            angle = float(position) * base ** (-2.0 * i / k)
            a, b = x[..., row, i], x[..., row, i + k // 2]
            out[..., row, i] = a * np.cos(angle) - b * np.sin(angle)
            out[..., row, i + k // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def rope_2d(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, base: float) -> np.ndarray:
    """Axial rotary embedding of x [..., L, K]: the first K/2 channels by `rows` [L], the rest by `columns` [L], each
    half as `rope_1d` of its own width."""
    half = x.shape[-1] // 2
    return np.concatenate([rope_1d(x[..., :half], rows, base), rope_1d(x[..., half:], columns, base)], axis=-1)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    softcap: float | None = None,
    bias: np.ndarray | float = 0.0,
    scale: float | None = None,
) -> np.ndarray:
    """Multi-head attention with grouped keys and values.

    q [..., L, H, K]; k, v [..., S, G, K]; query head h reads key/value head h // (H / G); mask bool, broadcast to
    [..., L, S], True where query may see key (each query must see one); logits q k / sqrt(K) (or * scale) + bias
    [..., H, L, S], then softcap * tanh(logits / softcap); [..., L, H, K].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, groups = q.shape[-2], k.shape[-2]
    out = np.empty((*q.shape[:-1], v.shape[-1]), np.float64)
    bias = np.broadcast_to(bias, np.broadcast_shapes(np.shape(bias), (heads, q.shape[-3], k.shape[-3])))
    for h in range(heads):
        g = h // (heads // groups)
        logits = q[..., :, h, :] @ np.swapaxes(k[..., :, g, :], -1, -2)
        logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale) + bias[..., h, :, :]
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        if mask is not None:
            logits = np.where(mask, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[..., :, h, :] = weights @ v[..., :, g, :]
    return out


def rms_norm(x: np.ndarray, scale: np.ndarray | float = 1.0, eps: float = 1e-6) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """(silu(x gate) * (x up)) down, with silu(a) = a / (1 + exp(-a)); x [..., D], gate and up [D, F], down [F, D]."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    a = x @ gate
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down
