"""World-model scores on hand-made clips."""

import json

import numpy as np
import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation.worldmodel import PSNR_CAP, evaluate_clips, score_clips, step_table

N, T = 6, 4


def paint(symbols: np.ndarray) -> np.ndarray:
    """Tiles of 8 x 8 pixels: [..., 2, 2] -> uint8 [..., 16, 16, 3]."""
    grey = np.repeat(np.repeat(symbols * 80, 8, -2), 8, -1).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1)


def clips() -> tuple[np.ndarray, np.ndarray]:
    """An agent (1) that goes round the 2 x 2 room, one tile a frame; and the last context frame."""
    true = np.zeros((N, T, 2, 2), int)
    path = [(0, 1), (1, 1), (1, 0), (0, 0)]
    for t in range(T):
        true[:, t][:, path[t][0], path[t][1]] = 1
    last = np.zeros((N, 2, 2), int)
    last[:, 0, 0] = 1
    return true, last


def test_perfect_and_repeated_clips():
    true, last = clips()
    out = evaluate_clips(
        paint(true), paint(true), real_symbols=true, imagined_symbols=true, last_symbols=last, horizons=(1, 4, 9)
    )
    assert [h["horizon"] for h in out["horizons"]] == [1, 4]  # 9 lies outside
    for part in (out["average"], *out["horizons"]):
        assert part["symbol_accuracy"]["mean"] == part["changed_accuracy"]["mean"] == 1.0
        assert part["psnr"]["mean"] == PSNR_CAP and part["ssim"]["mean"] == pytest.approx(1.0)
    # frames 1 to 3 differ from the context in two tiles of four; in frame 4 the agent is back
    assert out["average"]["repeat_accuracy"]["mean"] == pytest.approx((2 + 2 + 2 + 4) / 16)
    assert out["horizons"][1]["repeat_accuracy"]["mean"] == 1.0
    # changed tiles by frame: 2, 3, 3, 2; repeating is right on the one it vacated twice, and on both at the end
    assert out["average"]["changed_tiles"] == N * 10
    assert out["average"]["repeat_changed_accuracy"]["mean"] == pytest.approx((0 + 1 + 1 + 2) / 10)
    json.dumps(out)


def test_repeating_the_last_frame_scores_as_its_own_baseline():
    true, last = clips()
    repeated = np.repeat(last[:, None], T, axis=1)
    out = evaluate_clips(paint(true), paint(repeated), real_symbols=true, imagined_symbols=repeated, last_symbols=last)[
        "average"
    ]
    assert (
        out["symbol_accuracy"] == out["repeat_accuracy"] and out["changed_accuracy"] == out["repeat_changed_accuracy"]
    )


def test_invalid_frames_do_not_count():
    true, last = clips()
    wrong = true.copy()
    wrong[:, 2:] = 2
    valid = np.ones((N, T), bool)
    valid[:, 2:] = False
    out = evaluate_clips(
        paint(true), paint(wrong), real_symbols=true, imagined_symbols=wrong, last_symbols=last, valid=valid
    )
    assert out["average"]["symbol_accuracy"]["mean"] == 1.0 and out["average"]["scored_frames"] == 2 * N
    assert out["horizons"][1]["symbol_accuracy"] is None and out["horizons"][1]["psnr"] is None
    with pytest.raises(UserError, match="marks no frame"):
        score_clips(paint(true), paint(true), valid=np.zeros((N, T), bool))


def test_without_symbols_only_images_are_scored():
    true, _ = clips()
    out = evaluate_clips(paint(true), paint(true))
    assert "symbol_accuracy" not in out["average"] and out["average"]["psnr"]["mean"] == PSNR_CAP
    with pytest.raises(UserError, match="together"):
        evaluate_clips(paint(true), paint(true), real_symbols=true)


def test_step_table():
    true, last = clips()
    scores = {}
    for steps, errors in ((4, 0), (1, 2), (2, 1)):
        wrong = true.copy()
        wrong[:errors, :, 0, 0] = 2  # one tile of four wrong in so many clips
        scores[steps] = score_clips(
            paint(true), paint(wrong), real_symbols=true, imagined_symbols=wrong, last_symbols=last
        )
    rows = step_table(scores, {1: 1.0, 2: 2.0, 4: 4.0})
    assert [r["steps"] for r in rows] == [1, 2, 4] and rows[1]["milliseconds"] == 2.0
    assert rows[0]["symbol_accuracy"]["mean"] == pytest.approx(1 - 2 / N / 4)
    assert rows[0]["minus_largest"]["mean"] == pytest.approx(-2 / N / 4) and rows[2]["minus_largest"] is None
    with pytest.raises(UserError, match="other frames"):
        step_table({1: scores[1], 2: score_clips(paint(true)[:3], paint(true)[:3])})
    json.dumps(rows)


def test_clips_of_one_episode_are_drawn_together():
    """Each of six clips three times, as of one episode: as much is known as from the six."""
    true, last = clips()
    made = true.copy()
    made[np.arange(0, N, 2), :2] = 2  # wrong in every second clip
    score = lambda true, made, last, **more: score_clips(
        paint(true), paint(made), real_symbols=true, imagined_symbols=made, last_symbols=last, **more
    )
    once, thrice = (true, made, last), tuple(np.repeat(x, 3, 0) for x in (true, made, last))
    labels = np.repeat([f"episode {i}" for i in range(N)], 3)
    right = {4: score(*thrice, episodes=labels), 8: score(thrice[0], thrice[0], thrice[2], episodes=labels)}
    alone = {4: score(*once), 8: score(once[0], once[0], once[2])}
    assert right[4].summary()["average"]["symbol_accuracy"] == pytest.approx(
        alone[4].summary()["average"]["symbol_accuracy"]
    )
    assert step_table(right)[0]["minus_largest"] == pytest.approx(step_table(alone)[0]["minus_largest"])
    width = lambda i: i["high"] - i["low"]
    as_if = score(*thrice).summary()["average"]["symbol_accuracy"]
    assert width(right[4].summary()["average"]["symbol_accuracy"]) > 1.4 * width(as_if)
