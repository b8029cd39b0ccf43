"""What the experiment on labels makes of its scores."""

import numpy as np
import pytest

from experiments import label_efficiency as study


def rows(worth, *, seeds=3, clips=40, noise=0.3):
    """Scores of clips that differ much among each other, and by `worth` per cent of 2 dB between models."""
    rng, out = np.random.default_rng(0), []
    base = {look: rng.normal(18, 3, clips) for look in ("a", "b")}
    for seed in range(seeds):
        for model, (share, percent) in worth.items():
            for look, own in base.items():
                score = own + 2 * percent / 100 + rng.normal(0, noise, clips)
                known = {"labelled_frames": round(1000 * share), "frames": 1000}
                found = {"psnr": score.tolist(), "ssim": (score / 40).tolist()}
                out.append({"seed": seed, "model": model, "look": look, **known, "clips": found})
    return out


WORTH = {
    "0 %": (0.0, 0), "4 %": (0.04, 60), "100 %": (1.0, 100),
    "100 %, shuffled actions": (1.0, -50), study.ONLY: (0.5, 80),
}  # fmt: skip


def test_gains_are_scaled_between_no_labels_and_all():
    found = study.summarise(rows(WORTH), (0.0, 0.04, 1.0), ["a", "b"])
    first, some, last = found["by_share"]
    assert first["psnr"] == (0, 0, 0) and last["psnr"] == pytest.approx((100, 100, 100))
    assert some["share_of_frames"] == 0.04
    for score in study.SCORES:
        assert some[score].low < 60 < some[score].high and some[score].high - some[score].low < 20
        assert abs(found["transfer"][score].mean - 80) < 8 and abs(found["shuffled"][score].mean + 50) < 15
    assert found["gain"]["psnr"].low < 2 < found["gain"]["psnr"].high
    text = study.finding(found, rows(WORTH), ["a", "b"])
    assert "4 % of the frames labelled (40)" in text and "holds 0" not in text
    assert study.draw(found).axes


def test_resampling_is_paired_by_clip_and_over_seeds():
    """Clips differ by 3 dB, models by a tenth of that: only a paired interval sees it. Seeds that differ widen it."""
    narrow = study.scaled(*(study.table(rows(WORTH), m, "psnr", ["a", "b"]) for m in ("4 %", "0 %", "100 %")))
    assert narrow.high - narrow.low < 15
    mine, none, every = (study.table(rows(WORTH), m, "psnr", ["a"]) for m in ("4 %", "0 %", "100 %"))
    apart = mine + np.array([[-1.0], [0.0], [1.0]])
    wide = study.scaled(apart, none, every)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_where_labels_are_worth_nothing_it_is_said():
    nothing = {name: (share, 0) for name, (share, _) in WORTH.items()}
    found = study.summarise(rows(nothing), (0.0, 0.04, 1.0), ["a", "b"])
    assert "An interval of the gain holds 0" in study.finding(found, rows(nothing), ["a", "b"])


def test_groups_of_fields_leave_what_they_do_not_name():
    flat = study.flat({"a": 1, "b.c": {"d": 2, "e": 3}})
    assert flat == {"a": 1, "b.c.d": 2, "b.c.e": 3}
