"""Metrics against independent float64 references and closed forms."""

import numpy as np
import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation import metrics as m


def test_psnr_is_exact():
    x = np.zeros((2, 3, 16, 16, 3))
    y = x.copy()
    y[0] += 0.1  # mse 0.01: 20 dB
    y[1, :, :8] = 1.0  # mse 0.5
    out = m.psnr(x, y)
    np.testing.assert_allclose(out[0], 20.0, rtol=1e-12)
    np.testing.assert_allclose(out[1], -10 * np.log10(0.5), rtol=1e-12)
    assert np.isinf(m.psnr(x, x)).all()
    a, b = np.full((16, 16, 3), 10, np.uint8), np.full((16, 16, 3), 13, np.uint8)
    np.testing.assert_allclose(m.psnr(a, b), 20 * np.log10(255 / 3), rtol=1e-12)


def brute_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Straight from the definition: loops over windows and channels, one image [H, W, C]."""
    offset = np.arange(11) - 5
    w = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            for c in range(x.shape[2]):
                p, q = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
                cov = (w * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(values))


def test_ssim():
    rng = np.random.default_rng(0)
    x = rng.random((2, 2, 14, 17, 3))
    y = np.clip(x + rng.normal(0, 0.1, x.shape), 0, 1)
    np.testing.assert_allclose(m.ssim(x, x), 1.0, rtol=1e-12)
    want = [[brute_ssim(x[i, j], y[i, j]) for j in range(2)] for i in range(2)]
    np.testing.assert_allclose(m.ssim(x, y), want, rtol=1e-9)
    u = (x * 255).astype(np.uint8)
    np.testing.assert_allclose(m.ssim(u, (y * 255).astype(np.uint8)).shape, (2, 2))
    with pytest.raises(UserError, match="11 x 11"):
        m.ssim(np.zeros((8, 8, 3)), np.zeros((8, 8, 3)))
    with pytest.raises(UserError, match="equal shapes"):
        m.psnr(np.zeros((8, 8, 3)), np.zeros((9, 8, 3)))


def whiten(x: np.ndarray) -> np.ndarray:
    """Makes the sample mean exactly 0 and the sample covariance exactly I."""
    x = x - x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_of_diagonal_gaussians():
    rng = np.random.default_rng(1)
    f = 5
    s, t = rng.uniform(0.5, 3, f), rng.uniform(0.5, 3, f)  # standard deviations
    mu, nu = rng.normal(size=f), rng.normal(size=f)
    x, y = whiten(rng.normal(size=(50, f))) * s + mu, whiten(rng.normal(size=(70, f))) * t + nu
    want = np.sum((mu - nu) ** 2) + np.sum((s - t) ** 2)
    np.testing.assert_allclose(m.frechet_distance(x, y), want, rtol=1e-9)
    q, _ = np.linalg.qr(rng.normal(size=(f, f)))  # a rotation of both changes nothing
    np.testing.assert_allclose(m.frechet_distance(x @ q, y @ q), want, rtol=1e-9)
    assert m.frechet_distance(x, x) < 1e-9


def test_frechet_of_correlated_gaussians_and_few_samples():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    x, y = rng.normal(size=(300, 4)) @ a, rng.normal(size=(300, 4)) @ b
    eigenvalues = np.linalg.eigvals(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))  # the textbook form
    want = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.cov(x.T).trace() + np.cov(y.T).trace()
    want -= 2 * np.sqrt(eigenvalues.real).sum()
    np.testing.assert_allclose(m.frechet_distance(x, y), want, rtol=1e-8)
    few = rng.normal(size=(3, 8))  # singular covariance
    assert np.isfinite(m.frechet_distance(few, few + 1)) and abs(m.frechet_distance(few, few + 1) - 8) < 1e-6
    with pytest.raises(UserError, match="n, m >= 2"):
        m.frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))


def test_bootstrap_coverage():
    """Of 300 experiments with 60 coin flips each, about 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(3)
    held = 0
    for i in range(300):
        mean, low, high = m.bootstrap_ci(rng.random(60) < 0.4, resamples=500, seed=i)
        assert low <= mean <= high
        held += low <= 0.4 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_bootstrap_matches_the_normal_approximation():
    x = np.random.default_rng(4).normal(3, 2, 400)
    mean, low, high = m.bootstrap_ci(x)
    half = 1.96 * x.std() / np.sqrt(len(x))
    assert mean == pytest.approx(x.mean())
    assert low == pytest.approx(mean - half, abs=0.05 * half) and high == pytest.approx(mean + half, abs=0.05 * half)
    assert m.bootstrap_ci(x) == m.bootstrap_ci(x)
    assert m.bootstrap_ci(x, level=0.5).high < high


def test_strata_and_pairs_remove_what_they_hold_constant():
    group = np.repeat(["a", "b"], 50)
    x = np.where(group == "a", 0.0, 1.0)
    assert m.bootstrap_ci(x, strata=group) == (0.5, 0.5, 0.5)
    assert m.bootstrap_ci(x).low < 0.5
    noise = np.random.default_rng(5).normal(size=100)
    assert m.bootstrap_difference_ci(noise + 0.25, noise) == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_ratio():
    right, cases = np.array([1.0, 9.0, 0.0]), np.array([2.0, 10.0, 0.0])
    out = m.bootstrap_ratio_ci(right, cases)
    assert out is not None and out.mean == pytest.approx(10 / 12)  # not the mean of 0.5 and 0.9
    assert out.low == pytest.approx(0.5) and out.high == pytest.approx(0.9)
    assert m.bootstrap_ratio_ci(np.zeros(3), np.zeros(3)) is None
    for bad in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(UserError, match="bootstrap values"):
            m.bootstrap_ci(np.asarray(bad))


def test_changed_tiles_by_hand():
    """One row of three tiles: an agent (1) on the left steps right, then back; the right tile never changes."""
    last = np.array([[1, 0, 2]])
    true = np.array([[[0, 1, 2]], [[1, 0, 2]], [[1, 0, 2]]])
    changed = m.changed_tiles(true, last)
    np.testing.assert_array_equal(changed[:, 0], [[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    counts = m.symbol_counts(true, np.array([[[0, 1, 2]], [[0, 0, 2]], [[1, 0, 0]]]), last)
    np.testing.assert_array_equal(counts.tiles, [3, 3, 3])
    np.testing.assert_array_equal(counts.correct, [3, 2, 2])
    np.testing.assert_array_equal(counts.repeat_correct, [1, 3, 3])
    np.testing.assert_array_equal(counts.changed, [2, 2, 0])
    np.testing.assert_array_equal(counts.changed_correct, [2, 1, 0])
    np.testing.assert_array_equal(counts.repeat_changed_correct, [0, 2, 0])
    batched = m.symbol_counts(np.stack([true, true]), np.stack([true, true]), np.stack([last, last]))
    np.testing.assert_array_equal(batched.changed, [[2, 2, 0]] * 2)
    assert m.symbol_accuracy(true, true) == 1.0
    with pytest.raises(UserError, match="last context frame"):
        m.symbol_counts(true, true, true)


def test_units_are_drawn_as_a_whole():
    """Clips of one episode are one draw: ten copies of each of 8 values are worth 8 values, not 80."""
    values = np.random.default_rng(0).normal(size=8)
    copies, units = np.repeat(values, 10), np.repeat(np.arange(8), 10)
    alone = m.bootstrap_ci(values)
    together = m.bootstrap_ci(copies, units=units)
    np.testing.assert_allclose(together, alone, atol=1e-12)
    as_if = m.bootstrap_ci(copies)
    assert together.high - together.low > 2.5 * (as_if.high - as_if.low)
    mixed = np.random.default_rng(1).permutation(80)
    _, low, high = m.bootstrap_ci(copies[mixed], units=units[mixed])
    assert high - low == pytest.approx(alone.high - alone.low, rel=0.1)
    np.testing.assert_allclose(m.bootstrap_difference_ci(copies, 0 * copies, units=units), alone, atol=1e-12)
    names = np.asarray([f"episode {u}" for u in units])
    ratio = m.bootstrap_ratio_ci(copies + 5, np.ones(80), units=names)
    np.testing.assert_allclose(ratio, np.asarray(alone) + 5, atol=1e-12)
    assert m.bootstrap_ci(values, units=np.zeros(8)) == alone  # of one unit that there is
    with pytest.raises(UserError, match="strata"):
        m.bootstrap_ci(copies, units=units[:5])
