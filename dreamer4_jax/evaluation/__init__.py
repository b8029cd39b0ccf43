"""Evaluation: frame, symbol and feature metrics, closed-loop success, charts, videos and the report of a run.

`report`, `plots` and `media` are imported by name: they alone need matplotlib and Pillow.
"""

from dreamer4_jax.evaluation.blind import BlindModel, BlindPolicy, train_blind
from dreamer4_jax.evaluation.closed_loop import (
    EvalResult,
    Policy,
    RandomPolicy,
    ScriptedPolicy,
    compare,
    evaluate_policy,
)
from dreamer4_jax.evaluation.metrics import (
    Interval,
    bootstrap_ci,
    bootstrap_difference_ci,
    bootstrap_ratio_ci,
    frechet_distance,
    psnr,
    ssim,
    symbol_accuracy,
    symbol_counts,
    wilson_ci,
)
from dreamer4_jax.evaluation.worldmodel import ClipScores, evaluate_clips, score_clips, step_table

__all__ = [
    "BlindModel",
    "BlindPolicy",
    "ClipScores",
    "EvalResult",
    "Interval",
    "Policy",
    "RandomPolicy",
    "ScriptedPolicy",
    "bootstrap_ci",
    "bootstrap_difference_ci",
    "bootstrap_ratio_ci",
    "compare",
    "evaluate_clips",
    "evaluate_policy",
    "frechet_distance",
    "psnr",
    "score_clips",
    "ssim",
    "step_table",
    "symbol_accuracy",
    "symbol_counts",
    "train_blind",
    "wilson_ci",
]
