"""How much of the video needs actions before a world model can be steered (paper 4.3 and Fig 7)?

    python -m experiments.label_efficiency                       # two hours on one core
    python -m experiments.label_efficiency --size smoke          # under a minute once procgen is installed
    python -m experiments.label_efficiency --data data/coinrun   # on a dataset that is there

CoinRun is played at random by launch/record_procgen.sh, unless --data holds a dataset already: one half of the levels
looks one way, the other half another. One tokenizer; for each seed and share of labelled frames a dynamics model of
its own, trained on all of the video. A seed also decides which episodes are labelled. Held-out clips, of levels that
nobody trained on and one an episode, are generated at their true actions; the score is PSNR or SSIM, scaled so that 0
is the model without labels (which gets no actions) and 1 the one with all of them. For transfer only the first look is
labelled, and the other is scored. Intervals resample clips, the same for all models, and seeds.
"""

import argparse
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dreamer4_jax.config import ActionComponent, Config, UserError, override, preset
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.labels import labels_of
from dreamer4_jax.data.readers import Options
from dreamer4_jax.data.source import adopt, is_dataset
from dreamer4_jax.evaluation import bootstrap_ci, plots
from dreamer4_jax.evaluation.metrics import Interval
from dreamer4_jax.evaluation.rollouts import HeldOut, clip_starts, imagine_clips
from dreamer4_jax.evaluation.study import Call, Study, entry
from dreamer4_jax.runner import Run
from experiments.base import value

STUDY = Study(
    "label_efficiency",
    question="How much of the video needs actions before a world model can be steered?",
    claim="paper 4.3: of 2541 hours of Minecraft 10 labelled ones give 53 % of the PSNR and 75 % of the SSIM that all "
    "give, 100 hours 85 % and 100 %; Overworld actions alone 76 % and 80 % in the Nether and the End",
    seeds=(0, 1, 2),
)
SCORES = ("psnr", "ssim")
# Share of labelled hours, per cent -> per cent of what labels are worth (paper Fig 7).
PAPER = {
    "psnr": {0.0: 0, 100 * 10 / 2541: 53, 100 * 100 / 2541: 85, 100 * 1000 / 2541: 100, 100.0: 100},
    "ssim": {0.0: 0, 100 * 10 / 2541: 75, 100 * 100 / 2541: 100, 100 * 1000 / 2541: 100, 100.0: 100},
}
PAPER_TRANSFER = {"psnr": 76, "ssim": 80}
ONLY = "first look"  # the model that knows actions of the first look alone
NO_ACTIONS = "no actions"
K = 4

STACK = dict(layers=4, width=64, heads=4, head_dim=16, ffn=176, window=12, time_every=2, scan=False)
FIELDS: dict[str, Any] = {
    "data.chunk": 32,
    "evaluate.context": 8,
    "evaluate.frames": 16,
    "tokenizer.channels": 16,
    "tokenizer.pack": 4,
    "dynamics.transformer": {**STACK, "local_space": 2.5, "local_time": 3.0, "local_shift": 1},
    "dynamics.registers": 5,
    "dynamics.condition_spatial": True,
    "dynamics.input_floor": 0.1,
    "train.tokenizer": {"steps": 1500, "batch": 16, "length": 1, "lr": 3e-3},
    "train.dynamics": {"steps": 2500, "batch": 6, "length": 12, "lr": 6e-3, "optimizer": "muon", "warmup": 20,
                       "ema": 0.99, "decay": 0.4},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(
        looks=("bare", "blocks"), episodes=16, clips=3, shares=(0.0, 0.04, 1.0),
        fields={**FIELDS, "evaluate.context": 4, "evaluate.frames": 2, "dynamics.transformer.layers": 2,
                "dynamics.k_max": 4, "train.tokenizer.steps": 3, "train.dynamics.steps": 3,
                "train.dynamics.warmup": 1, "train.dynamics.batch": 4, "train.dynamics.length": 4},
    ),
    "laptop": dict(
        looks=("bare", "blocks"), episodes=160, clips=32, shares=(0.0, 0.004, 0.04, 0.4, 1.0), fields=FIELDS,
    ),
    # The preset `small`, on the game as it was published, and blocks.
    "tpu": dict(
        looks=("classic", "blocks"), episodes=20_000, clips=256, shares=(0.0, 0.004, 0.04, 0.4, 1.0),
        fields={"data.chunk": 96, "evaluate.context": 32, "evaluate.frames": 16, "train.tokenizer.steps": 20_000},
    ),
}  # fmt: skip


def dataset(call: Call) -> Path:
    """The dataset of --data; recorded and converted if it is not there."""
    size, path = SIZES[call.size], call.args.data or call.args.runs / "data" / f"coinrun-{call.size}"
    if is_dataset(str(path)):
        return path
    episodes, script = (
        path.with_name(f"{path.name}-episodes"),
        Path(__file__).parents[1] / "launch" / "record_procgen.sh",
    )
    for i, look in enumerate(size["looks"]):
        words = ["--look", look, "--episodes", size["episodes"], "--first", i * size["episodes"]]
        done = subprocess.run([str(script), "coinrun", str(episodes / look), *map(str, words)], check=False)
        if done.returncode:
            raise UserError(f"{script} failed; record with it yourself and name the converted dataset with --data")
    c = size["fields"]
    options = Options(actions=(ActionComponent("move", "categorical", 9),))
    convert(episodes, path, options=options, chunk=c["data.chunk"], holdout=0.2, shard_frames=16 * c["data.chunk"])
    return path


def settings(call: Call, data: Path) -> Config:
    """The config of a size. Its seed is that of the tokenizer, which all models share."""
    size = SIZES[call.size]
    start = preset("small" if call.size == "tpu" else "tiny")
    fields = {"name": f"label-efficiency-{call.size}", "data.source": str(data), "evaluate.clips": size["clips"]}
    return adopt(override(start, {**flat(size["fields"]), **fields}))


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Groups as dotted fields, so that what they do not name stays as it is."""
    return {
        name: v
        for key, given in fields.items()
        for name, v in (
            {f"{key}.{k}": x for k, x in given.items()} if isinstance(given, dict) else {key: given}
        ).items()
    }


def clips(run: Run, level: str, seed: int = 0) -> HeldOut:
    """Held-out clips of a level, one an episode, `evaluate.clips` at most."""
    frames, rng = run.collect(), np.random.default_rng(seed)
    starts = clip_starts(override(run.config, {"evaluate.clips": 1}), frames)
    episodes = frames.episodes("holdout")
    owner = np.searchsorted([e.start for e in episodes], starts, side="right") - 1
    found = [
        int(rng.choice(starts[owner == i])) for i, e in enumerate(episodes) if e.level == level and (owner == i).any()
    ]
    most = run.config.evaluate.clips
    if len(found) < 2:
        raise UserError(f"the held-out episodes of {level!r} have {len(found)} clips: record more episodes")
    chosen = rng.permutation(found)[:most]
    return HeldOut.at(run.config, frames, run.tokens(), chosen)


def variants(call: Call, looks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Model -> the fields that it differs in. None and all of the labels come first: one soon sees their worth."""
    shares = sorted(SIZES[call.size]["shares"], key=lambda share: share not in (0.0, 1.0))
    out = {f"{100 * share:g} %": {"data.labelled": share} for share in shares}
    return {**out, ONLY: {"data.labelled_levels": [looks[0]]}}


def measure(call: Call, run: Run, looks: Sequence[str], held: dict[str, HeldOut], seed: int) -> list[dict[str, Any]]:
    """Rows of one seed: each model on the clips of each look."""
    rows, tokenizer = [], run.model("tokenizer")

    def of_model(name: str, slug: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
        out = []
        model = run.variant(f"labelled-{slug}-seed{seed}", {"seed": seed, **fields})
        labels = labels_of(override(run.config, {"seed": seed, **fields}), run.collect())
        total = run.collect().frames("train")
        known = total if labels is None else int(labels.kept.sum())
        for look, clip in held.items():
            conditions = {name: clip.unlabelled() if not known else clip}
            if known == total:
                conditions[f"{name}, shuffled actions"] = clip.shuffled(seed)
            for condition, shown in conditions.items():
                scores = shown.score(imagine_clips(model, tokenizer, shown, K, seed))
                found = {m: getattr(scores, m).mean(1) for m in SCORES}
                out.append(
                    {
                        "seed": seed,
                        "model": condition,
                        "look": look,
                        "labelled_frames": known,
                        "frames": total,
                        **{m: bootstrap_ci(x) for m, x in found.items()},
                        "clips": {m: np.round(x, 4).tolist() for m, x in found.items()},
                    }
                )
        return out

    for name, fields in call.track(variants(call, looks).items(), f"seed {seed}"):
        slug = name.replace(" %", "").replace(" ", "-")
        rows += call.kept(f"seed{seed}-{slug}", partial(of_model, name, slug, fields))
    for look, clip in held.items():
        still = clip.score(clip.repeated())
        rows.append({"seed": seed, "model": "last frame repeated", "look": look,
                     **{m: bootstrap_ci(getattr(still, m).mean(1)) for m in SCORES}})  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]], model: str, score: str, looks: Sequence[str]) -> np.ndarray:
    """A model's scores [seeds, clips], of the looks one after another."""
    seeds = sorted({r["seed"] for r in rows})
    of = lambda seed, look: next(
        r["clips"][score] for r in rows if (r["seed"], r["model"], r["look"]) == (seed, model, look)
    )
    return np.asarray([[x for look in looks for x in of(seed, look)] for seed in seeds])


def scaled(mine: np.ndarray, none: np.ndarray, every: np.ndarray, *, resamples: int = 10_000) -> Interval:
    """``(mine - none) / (every - none)`` of the means over [seeds, clips], in per cent, with a 95 % interval.

    Seeds and clips are resampled, the same ones for all three. Resamples in which labels are worth nothing are left
    out.
    """
    rng, (seeds, count) = np.random.default_rng(0), mine.shape
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    by_clip = rng.multinomial(count, np.full(count, 1 / count), resamples) / count
    low, middle, high = (((by_seed @ x) * by_clip).sum(1) for x in (none, mine, every))
    some = high > low
    drawn = 100 * (middle[some] - low[some]) / (high[some] - low[some])
    worth = every.mean() - none.mean()
    ends = np.quantile(drawn, [0.025, 0.975]) if some.any() else (np.nan, np.nan)
    return Interval(float(100 * (mine.mean() - none.mean()) / worth), float(ends[0]), float(ends[1]))


def summarise(rows: list[dict[str, Any]], shares: Sequence[float], looks: Sequence[str]) -> dict[str, Any]:
    """What labels are worth, by share on all clips, and of one look's labels on the other."""
    names = {share: f"{100 * share:g} %" for share in shares}
    none, every = names[min(shares)], names[max(shares)]
    of = lambda model, score, where: table(rows, model, score, where)
    known = {r["model"]: r["labelled_frames"] / r["frames"] for r in rows if "frames" in r}
    worth = lambda model, score, where: scaled(*(of(m, score, where) for m in (model, none, every)))
    gain = lambda score, where: bootstrap_ci((of(every, score, where) - of(none, score, where)).mean(0))
    return {
        "by_share": [
            {"share_of_frames": known[name], **{m: worth(name, m, looks) for m in SCORES}} for name in names.values()
        ],
        "transfer": {m: worth(ONLY, m, looks[1:]) for m in SCORES},
        "labelled_look": {m: worth(ONLY, m, looks[:1]) for m in SCORES},
        "gain": {m: gain(m, looks) for m in SCORES},
        "shuffled": {m: worth(f"{every}, shuffled actions", m, looks) for m in SCORES},
    }


def draw(found: dict[str, Any]) -> Figure:
    """Worth of labels against their share, beside the paper's; and across looks."""
    figure, axes = plots.panels(
        ["PSNR gained by labels (%)", "SSIM gained by labels (%)", "Labels of another world (%)"], 4.2, 3.2
    )
    ours, theirs = plots.PALETTE[0], plots.PALETTE[1]
    zero = 0.1  # where 0 stands on the logarithmic axis
    for panel, score in zip(axes[:2], SCORES, strict=True):
        x = [max(zero, 100 * r["share_of_frames"]) for r in found["by_share"]]
        mean, low, high = (np.array([value(r[score], k) for r in found["by_share"]]) for k in ("mean", "low", "high"))
        bars = np.maximum(np.nan_to_num([mean - low, high - mean]), 0)
        panel.errorbar(x, mean, bars, color=ours, marker="o", capsize=2.5, label="CoinRun (ours)")
        paper = list(PAPER[score].values())
        shares = [max(zero, share) for share in PAPER[score]]
        panel.plot(shares, paper, color=theirs, marker="s", linestyle="--", label="Minecraft (paper)")
        panel.set_xscale("log")
        panel.set_xticks([zero, 0.4, 4, 40, 100], ["0", "0.4", "4", "40", "100"])
        panel.minorticks_off()
        panel.set_xlabel("labelled frames, % of the video")
    axes[0].legend(loc="best")
    last = axes[2]
    for i, score in enumerate(SCORES):
        t = found["transfer"][score]
        ends = np.maximum(np.nan_to_num([[value(t) - value(t, "low")], [value(t, "high") - value(t)]]), 0)
        last.bar(i - 0.2, value(t), 0.36, yerr=ends, color=ours, capsize=3)
        last.bar(i + 0.2, PAPER_TRANSFER[score], 0.36, color=theirs)
    last.set_xticks(range(2), ["PSNR", "SSIM"])
    last.axhline(0, color="black", linewidth=0.8)
    return figure


def finding(found: dict[str, Any], rows: Sequence[dict[str, Any]], looks: Sequence[str]) -> str:
    """The paragraph, from the numbers."""
    text = lambda i, digits=0, unit="": (
        f"{value(i):.{digits}f}{unit} [{value(i, 'low'):.{digits}f}, {value(i, 'high'):.{digits}f}]"
    )
    first = next(r for r in rows if r.get("labelled_frames"))
    parts = [
        f"With all actions known, clips imagined at K = {K} gain {text(found['gain']['psnr'], 2, ' dB')} of PSNR and "
        f"{text(found['gain']['ssim'], 4)} of SSIM over the model without any; at shuffled actions "
        f"{text(found['shuffled']['psnr'])} % of the PSNR gained is left."
    ]
    if any(value(found["gain"][m], "low") <= 0 for m in SCORES):
        parts.append("An interval of the gain holds 0: percentages of it mean little.")
    parts.append(
        "Of that gain: "
        + "; ".join(
            f"{100 * r['share_of_frames']:.2g} % of the frames labelled "
            f"({round(r['share_of_frames'] * first['frames'])}) {text(r['psnr'])} % of PSNR, "
            f"{text(r['ssim'])} % of SSIM"
            for r in found["by_share"][1:-1]
        )
        + "."
    )
    parts.append(
        f"With the actions of {looks[0]!r} alone, {text(found['transfer']['psnr'])} % of PSNR and "
        f"{text(found['transfer']['ssim'])} % of SSIM on {looks[1]!r}, whose actions were never labelled (on "
        f"{looks[0]!r} itself {text(found['labelled_look']['psnr'])} % and "
        f"{text(found['labelled_look']['ssim'])} %)."
    )
    return " ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--data", type=Path, help="a dataset of two levels, or where it goes (RUNS/data/coinrun-SIZE)"
        )

    call = STUDY.call(__doc__, argv, add=add)
    data = dataset(call)
    config = settings(call, data)
    run = call.run(config, "tokenizer")
    looks = sorted({e.level for e in run.collect().episodes("train")})
    if len(looks) != 2:
        raise UserError(f"--data {data}: has the levels {looks}; expected two, one of which goes without labels")
    held = {look: clips(run, look) for look in looks}
    rows = [row for seed in call.seeds for row in measure(call, run, looks, held, seed)]
    found = summarise(rows, SIZES[call.size]["shares"], looks)
    call.write(rows, finding=finding(found, rows, looks), figure=draw(found), summary=found, paper=PAPER,
               paper_transfer=PAPER_TRANSFER)  # fmt: skip


if __name__ == "__main__":
    entry(main)
