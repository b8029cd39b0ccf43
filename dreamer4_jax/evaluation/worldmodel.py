"""Scores of imagined video against real video. Arrays in, numbers out: no model and no decoder is known here.

A clip is n real frames after a context, and the frames imagined from the same context with the same (or, as a
control, shuffled) actions. Intervals resample clips, since the frames of one clip are not independent; and where it is
known of which episode each clip is, episodes, since clips of one episode may overlap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation.metrics import (
    Interval,
    SymbolCounts,
    bootstrap_difference_ci,
    bootstrap_ratio_ci,
    psnr,
    ssim,
    symbol_counts,
)

PSNR_CAP = 60.0  # dB that an exactly equal frame counts in an average; rounding to uint8 alone leaves 59 dB


@dataclass(frozen=True)
class ClipScores:
    """Scores of every frame of every clip, [n, T]; index 0 is the first imagined frame (horizon 1)."""

    psnr: np.ndarray
    ssim: np.ndarray
    symbols: SymbolCounts | None
    valid: np.ndarray
    episodes: np.ndarray | None = None  # [n] labels

    @property
    def clips(self) -> int:
        return self.valid.shape[0]

    @property
    def frames(self) -> int:
        return self.valid.shape[1]

    def parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Each metric as (numerator, denominator) [n, T]; invalid frames are zero in both."""
        ones = self.valid.astype(np.float64)
        out = {"psnr": (self.psnr * ones, ones), "ssim": (self.ssim * ones, ones)}
        s = self.symbols
        if s is not None:
            out |= {
                "symbol_accuracy": (s.correct * ones, s.tiles * ones),
                "repeat_accuracy": (s.repeat_correct * ones, s.tiles * ones),
                "changed_accuracy": (s.changed_correct * ones, s.changed * ones),
                "repeat_changed_accuracy": (s.repeat_changed_correct * ones, s.changed * ones),
            }
        return out

    def summary(self, horizons: Sequence[int] = (1, 4, 8, 16), *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """The dictionary of `evaluate_clips`."""
        return {
            "clips": self.clips,
            "frames": self.frames,
            "average": self._interval(slice(None), level, seed),
            "horizons": [
                {"horizon": h, **self._interval(slice(h - 1, h), level, seed)} for h in horizons if h <= self.frames
            ],
        }

    def _interval(self, frames: slice, level: float, seed: int) -> dict[str, Any]:
        out: dict[str, Any] = {"scored_frames": int(self.valid[:, frames].sum())}
        for name, (top, bottom) in self.parts().items():
            right, of = top[:, frames].sum(1), bottom[:, frames].sum(1)
            out[name] = as_dict(bootstrap_ratio_ci(right, of, level, seed=seed, units=self.episodes))
        if self.symbols is not None:
            out["changed_tiles"] = int((self.symbols.changed * self.valid)[:, frames].sum())
        return out


def as_dict(interval: Interval | None) -> dict[str, float] | None:
    """``{"mean": , "low": , "high": }`` for JSON; None where nothing could be measured."""
    return None if interval is None else interval._asdict()


def score_clips(
    real: UInt8[np.ndarray, "n T H W 3"],
    imagined: UInt8[np.ndarray, "n T H W 3"],
    *,
    real_symbols: Int[np.ndarray, "n T rows columns"] | None = None,
    imagined_symbols: Int[np.ndarray, "n T rows columns"] | None = None,
    last_symbols: Int[np.ndarray, "n rows columns"] | None = None,
    valid: Bool[np.ndarray, "n T"] | None = None,
    episodes: np.ndarray | None = None,
) -> ClipScores:
    """Scores every imagined frame.

    Args:
        real, imagined: uint8, or floating in [0, 1]. Context frames are not part of them.
        real_symbols, imagined_symbols, last_symbols: decoded tiles of both and of the last context frame; all or none.
        valid: frames to count. Leave out frames after the end of the context's episode: nobody can foresee the next.
        episodes: [n], the episode of each clip, by any label.
    """
    a, b = np.asarray(real), np.asarray(imagined)
    if a.shape != b.shape or a.ndim != 5:
        raise UserError(f"clips of shapes {a.shape} (real) and {b.shape} (imagined): expected [n, T, H, W, 3] twice")
    keep = np.ones(a.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    if keep.shape != a.shape[:2]:
        raise UserError(f"valid of shape {keep.shape}: expected {a.shape[:2]}, one flag for each frame")
    if not keep.any():
        raise UserError("valid marks no frame: there is nothing to score; choose clips inside an episode")
    given = (real_symbols, imagined_symbols, last_symbols)
    if any(s is None for s in given) and any(s is not None for s in given):
        raise UserError("symbols: give real_symbols, imagined_symbols and last_symbols together, or none of them")
    counts = None
    if real_symbols is not None and imagined_symbols is not None and last_symbols is not None:
        if np.shape(real_symbols)[:2] != a.shape[:2]:
            raise UserError(f"real_symbols of shape {np.shape(real_symbols)}: expected {a.shape[:2]} in front")
        counts = symbol_counts(real_symbols, imagined_symbols, last_symbols)
    return ClipScores(np.minimum(psnr(a, b), PSNR_CAP), ssim(a, b), counts, keep, episodes)


def evaluate_clips(
    real: UInt8[np.ndarray, "n T H W 3"],
    imagined: UInt8[np.ndarray, "n T H W 3"],
    *,
    real_symbols: Int[np.ndarray, "n T rows columns"] | None = None,
    imagined_symbols: Int[np.ndarray, "n T rows columns"] | None = None,
    last_symbols: Int[np.ndarray, "n rows columns"] | None = None,
    valid: Bool[np.ndarray, "n T"] | None = None,
    horizons: Sequence[int] = (1, 4, 8, 16),
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of imagined clips (arguments as in `score_clips`), ready for JSON.

    Returns:
        ``{"clips", "frames", "average": M, "horizons": [{"horizon": h, **M}, ...]}``: over all frames, and at frame h
        alone. M holds ``scored_frames``, ``changed_tiles`` (counts) and ``psnr, ssim, symbol_accuracy,
        repeat_accuracy, changed_accuracy, repeat_changed_accuracy``, each ``{"mean", "low", "high"}`` or None. The
        ``repeat_`` figures are those of repeating the last context frame, on the same tiles.
    """
    scores = score_clips(
        real,
        imagined,
        real_symbols=real_symbols,
        imagined_symbols=imagined_symbols,
        last_symbols=last_symbols,
        valid=valid,
    )
    return scores.summary(horizons, level=level, seed=seed)


def step_table(
    scores: Mapping[int, ClipScores],
    milliseconds: Mapping[int, float] | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy against the number of sampling steps K, over all frames of the clips.

    Args:
        scores: for each K, the scores of the *same* clips (the difference to the largest K is paired by clip).
        milliseconds: for each K, the time of one frame.

    Returns:
        Rows in order of K: ``{"steps", "milliseconds", "psnr", "ssim", "symbol_accuracy", ...,
        "minus_largest": {"mean", "low", "high"}}``; the last is the symbol accuracy (without symbols: the PSNR)
        minus that of the largest K, None in the largest's own row.
    """
    if not scores:
        raise UserError("step_table: no scores given; measure at least one number of steps")
    reference = scores[max(scores)]
    key = "psnr" if reference.symbols is None else "symbol_accuracy"

    def per_clip(s: ClipScores) -> np.ndarray:
        top, bottom = (part.sum(axis=1) for part in s.parts()[key])
        return top[bottom > 0] / bottom[bottom > 0]

    counted = reference.parts()[key][1].sum(axis=1) > 0
    units = None if reference.episodes is None else reference.episodes[counted]

    rows = []
    for steps in sorted(scores):
        s = scores[steps]
        if s.valid.shape != reference.valid.shape or (s.valid != reference.valid).any():
            raise UserError(f"step_table: K = {steps} was scored on other frames than K = {max(scores)}")
        average = s.summary((), level=level, seed=seed)["average"]
        difference = bootstrap_difference_ci(per_clip(s), per_clip(reference), level, seed=seed, units=units)
        rows.append(
            {
                "steps": int(steps),
                "milliseconds": None if milliseconds is None else float(milliseconds[steps]),
                **average,
                "minus_largest": None if s is reference else as_dict(difference),
            }
        )
    return rows
