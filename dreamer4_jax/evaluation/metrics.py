"""Frame, feature and symbol metrics, and bootstrap intervals. NumPy only; every function is vectorised.

Interval estimates are percentile bootstraps. A sample without spread (say 256 successes of 256) has an interval
without width: read it together with the number of episodes.
"""

from collections.abc import Iterator
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dreamer4_jax.config import UserError

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_RESAMPLE_ELEMENTS = 4_000_000  # indices drawn at once: bounds the memory of a bootstrap


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------------------------------
# Images


def as_float(frames: Any) -> np.ndarray:
    """uint8 frames as float64 in [0, 1]; floating frames as float64, unchanged."""
    x = np.asarray(frames)
    return x.astype(np.float64) / 255.0 if x.dtype == np.uint8 else x.astype(np.float64)


def _pair(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x), np.asarray(y)
    if a.shape != b.shape or a.ndim < 3:
        raise UserError(f"images of shapes {a.shape} and {b.shape}: expected two equal shapes [..., H, W, channels]")
    return a, b


def psnr(x: Float[np.ndarray, "*b H W C"], y: Float[np.ndarray, "*b H W C"]) -> Float[np.ndarray, "*b"]:
    """Peak signal-to-noise ratio of each image in dB: ``-10 log10(mean squared error)``, inf for equal images.

    Floating images are in [0, 1]; uint8 images are divided by 255.
    """
    a, b = _pair(x, y)
    error = np.square(as_float(a) - as_float(b)).mean(axis=(-3, -2, -1))
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(error)


def _band(size: int) -> Float[np.ndarray, "V size"]:
    """The 11-tap Gaussian (sigma 1.5) as a matrix: row i averages pixels i .. i+10 ("valid" positions)."""
    taps = np.exp(-0.5 * np.square((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / SSIM_SIGMA))
    out = np.zeros((size - SSIM_WINDOW + 1, size))
    for i in range(out.shape[0]):
        out[i, i : i + SSIM_WINDOW] = taps / taps.sum()
    return out


def ssim(x: Float[np.ndarray, "*b H W C"], y: Float[np.ndarray, "*b H W C"]) -> Float[np.ndarray, "*b"]:
    """Structural similarity of each image (Wang et al. 2004), mean over windows and channels.

    Gaussian 11 x 11 window with sigma 1.5 at every position that lies wholly inside the image, K1 = 0.01, K2 = 0.03,
    data range 1, variances with weights that sum to one. Floating images are in [0, 1]; uint8 ones are divided by 255.
    """
    a, b = _pair(x, y)
    *lead, height, width, channels = a.shape
    if min(height, width) < SSIM_WINDOW:
        raise UserError(f"images of {height} x {width} pixels: SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW}")
    rows, columns = _band(height), _band(width).T
    c1, c2 = 0.01**2, 0.03**2

    def blur(image: np.ndarray) -> np.ndarray:  # [n, C, H, W]; two small matrix products beat an 11-tap loop
        return rows @ image @ columns

    flat = (-1, height, width, channels)
    out = []
    for p, q in zip(_chunks(a.reshape(flat)), _chunks(b.reshape(flat)), strict=True):
        u, v = as_float(p).transpose(0, 3, 1, 2), as_float(q).transpose(0, 3, 1, 2)
        mu, mv = blur(u), blur(v)
        var_u, var_v, cov = blur(u * u) - mu * mu, blur(v * v) - mv * mv, blur(u * v) - mu * mv
        value = (2 * mu * mv + c1) * (2 * cov + c2) / ((mu * mu + mv * mv + c1) * (var_u + var_v + c2))
        out.append(value.mean(axis=(1, 2, 3)))
    return np.concatenate(out).reshape(lead) if out else np.zeros(lead)


def _chunks(images: np.ndarray, elements: int = 2_000_000) -> Iterator[np.ndarray]:
    size = max(1, elements // max(1, int(np.prod(images.shape[1:]))))
    for start in range(0, len(images), size):
        yield images[start : start + size]


# ---------------------------------------------------------------------------------------------------------------------
# Features


def frechet_distance(x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "m f"]) -> float:
    """Frechet distance of two feature sets taken as Gaussians: ``|mx-my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2))``.

    Unbiased covariances, float64. The trace of the root is the sum of the root eigenvalues of the symmetric
    ``Sx^(1/2) Sy Sx^(1/2)``, which has the eigenvalues of ``Sx Sy``, so no general matrix root is needed.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise UserError(f"features of shapes {a.shape} and {b.shape}: expected [n, f] and [m, f] with n, m >= 2")
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    product = root @ cov_b @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0.0, None)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))  # rounding alone can push equal sets below zero


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap


def _indices(n: int, strata: np.ndarray | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields index blocks [r, n]; each row draws as often from every stratum as the stratum has members."""
    rng = np.random.default_rng(seed)
    groups = [np.arange(n)] if strata is None else [np.flatnonzero(strata == s) for s in np.unique(strata)]
    block = max(1, min(resamples, _RESAMPLE_ELEMENTS // n))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        yield np.concatenate([g[rng.integers(0, len(g), (rows, len(g)))] for g in groups], axis=1)


def _check_bootstrap(values: np.ndarray, strata: Any, level: float, resamples: int) -> np.ndarray | None:
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise UserError(
            f"bootstrap values of shape {values.shape}: expected a non-empty vector without infinities and NaN"
        )
    if not 0 < level < 1 or resamples < 1:
        raise UserError(f"bootstrap level = {level!r}, resamples = {resamples!r}: want 0 < level < 1, resamples >= 1")
    if strata is None:
        return None
    groups = np.asarray(strata)
    if groups.shape != values.shape:
        raise UserError(f"bootstrap strata of shape {groups.shape}: expected one per value, {values.shape}")
    return groups


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_ci(
    values: Float[np.ndarray, " n"],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    strata: Any = None,
    units: Any = None,
) -> Interval:
    """Mean of `values` with its percentile bootstrap interval.

    Args:
        values: [n], independent of each other (episodes, run seeds), or by `units`; booleans count as 0 and 1.
        level: coverage aimed at.
        resamples: bootstrap samples.
        seed: of the resampling; the same arguments give the same interval.
        strata: [n] labels (e.g. the level of each episode); resampling then stays inside each label.
        units: [n] labels (e.g. the episode of each clip), instead: what has one label is drawn together. Where all have
            the same, each value is drawn by itself: the interval is then of this one unit.
    """
    x = np.asarray(values, np.float64)
    if units is not None:
        found = bootstrap_ratio_ci(x, np.ones(x.shape), level, resamples, seed, units=units)
        assert found is not None
        return found
    groups = _check_bootstrap(x, strata, level, resamples)
    means = np.concatenate([x[i].mean(axis=1) for i in _indices(len(x), groups, resamples, seed)])
    return Interval(float(x.mean()), *_percentiles(means, level))


def bootstrap_difference_ci(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    strata: Any = None,
    units: Any = None,
) -> Interval:
    """Paired: the mean of ``first - second`` with its interval. Entry i of both must be the same episode or clip."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape:
        raise UserError(f"paired bootstrap of shapes {a.shape} and {b.shape}: expected the same units in both")
    return bootstrap_ci(a - b, level, resamples, seed, strata=strata, units=units)


def bootstrap_ratio_ci(
    numerator: Float[np.ndarray, " n"],
    denominator: Float[np.ndarray, " n"],
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    units: Any = None,
) -> Interval | None:
    """``sum(numerator) / sum(denominator)`` with the interval over units; None if the denominator is all zero.

    For accuracies whose number of cases differs between clips: right tiles and counted tiles of each clip. Resamples
    that hold no case at all are left out. `units` as in `bootstrap_ci`.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    _check_bootstrap(a, b, level, resamples)
    _check_bootstrap(b, None, level, resamples)
    if not b.any():
        return None
    if units is not None:
        _check_bootstrap(a, units, level, resamples)
        _, first, place = np.unique(np.asarray(units), return_index=True, return_inverse=True)
    if units is not None and len(first) > 1:
        place = np.argsort(np.argsort(first))[place]  # in the order in which they come
        a, b = (np.bincount(place, x).astype(np.float64) for x in (a, b))
    tops, bottoms = [], []
    for i in _indices(len(a), None, resamples, seed):
        tops.append(a[i].sum(axis=1))
        bottoms.append(b[i].sum(axis=1))
    top, bottom = np.concatenate(tops), np.concatenate(bottoms)
    held = bottom > 0
    return Interval(float(a.sum() / b.sum()), *_percentiles(top[held] / bottom[held], level))


def wilson_ci(successes: int, trials: int, level: float = 0.95) -> Interval:
    """A proportion with its Wilson score interval, which has width also at 0 and at 1.

    ``(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4 n^2)) / (1 + z^2 / n)`` with p = successes / trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise UserError(
            f"wilson_ci: {successes} successes of {trials} trials: want 0 <= successes <= trials, trials >= 1"
        )
    p, z2 = successes / trials, NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = p + z2 / (2 * trials)
    half = float(np.sqrt(z2 * (p * (1 - p) / trials + z2 / (4 * trials**2))))
    scale = 1 + z2 / trials
    return Interval(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


# ---------------------------------------------------------------------------------------------------------------------
# Symbols: frames decoded to integers, one for each tile


def changed_tiles(
    true: Int[np.ndarray, "*b T rows columns"], last: Int[np.ndarray, "*b rows columns"]
) -> Bool[np.ndarray, "*b T rows columns"]:
    """Tiles in motion: the true symbol at t differs from the last context frame's *or* from the true one at t-1.

    The second half keeps tiles that return to their first symbol (an agent that steps back), which repeating the last
    context frame gets right; without it that baseline would score 0 by definition. At t = 0 both halves agree.
    """
    before = np.concatenate([last[..., None, :, :], true[..., :-1, :, :]], axis=-3)
    return (true != last[..., None, :, :]) | (true != before)


class SymbolCounts(NamedTuple):
    """Tile counts of each frame, int64 [..., T]; divide sums of counts, never means of ratios."""

    tiles: np.ndarray
    correct: np.ndarray
    repeat_correct: np.ndarray  # the last context frame repeated, on the same tiles
    changed: np.ndarray
    changed_correct: np.ndarray
    repeat_changed_correct: np.ndarray


def symbol_counts(
    true: Int[np.ndarray, "*b T rows columns"],
    predicted: Int[np.ndarray, "*b T rows columns"],
    last: Int[np.ndarray, "*b rows columns"],
) -> SymbolCounts:
    """Counts right tiles of a prediction and of repeating `last`, over all tiles and over `changed_tiles`."""
    a, b, c = np.asarray(true), np.asarray(predicted), np.asarray(last)
    if a.shape != b.shape or a.ndim < 3 or c.shape != (*a.shape[:-3], *a.shape[-2:]):
        raise UserError(
            f"symbols of shapes {a.shape} (true), {b.shape} (predicted), {c.shape} (last context frame): "
            "expected [..., T, rows, columns] twice and [..., rows, columns]"
        )
    right, repeat, moved = a == b, a == c[..., None, :, :], changed_tiles(a, c)

    def count(mask: np.ndarray) -> np.ndarray:
        return mask.sum(axis=(-2, -1), dtype=np.int64)

    return SymbolCounts(
        tiles=count(np.ones_like(right)),
        correct=count(right),
        repeat_correct=count(repeat),
        changed=count(moved),
        changed_correct=count(right & moved),
        repeat_changed_correct=count(repeat & moved),
    )


def symbol_accuracy(true: Int[np.ndarray, "*s"], predicted: Int[np.ndarray, "*s"]) -> float:
    """Share of equal symbols over all tiles of all frames."""
    a, b = np.asarray(true), np.asarray(predicted)
    if a.shape != b.shape or a.size == 0:
        raise UserError(f"symbols of shapes {a.shape} and {b.shape}: expected two equal, non-empty shapes")
    return float((a == b).mean())
