"""Shortcuts as pointer jumping: error of a jump of size d, what it inherits from jumps half as long, depth and work.

    python -m experiments.pointer_jumping                # 5 minutes on 2 cores, after `make quickstart` (else 10 more)
    python -m experiments.pointer_jumping --size smoke   # under a minute

List ranking by pointer jumping doubles every element's pointer: after log2 n rounds each points to the end of a list of
n, a walk that takes n rounds. A shortcut model learns jumps of size d = 2^-k from two of size d/2. Measured on the
first frame after held-out contexts (runs/quickstart-seed<N>): from states of the finest path, one jump of d against two
of d/2 and against the path. Depth and work are read off the compiled programs (`dreamer4_jax.parallel.chains`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from dreamer4_jax.evaluation import bootstrap_ci, plots
from dreamer4_jax.evaluation.metrics import bootstrap_ratio_ci
from dreamer4_jax.evaluation.study import Study, entry
from dreamer4_jax.parallel.chains import depth, in_scope
from dreamer4_jax.parallel.hlo import Module
from dreamer4_jax.runner import Run
from dreamer4_jax.world import Actions, shortcut
from dreamer4_jax.world.shortcut import euler_step
from experiments import base

STUDY = Study(
    "pointer_jumping",
    question="Is a shortcut model pointer jumping along the denoising path, and how does a jump's error build up?",
    claim="a jump of d inherits the error of its two halves and adds its own; depth per frame falls from K_max to 1, "
    "as that of list ranking falls from n to log2 n",
)
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(clips=4, frames=2, lengths=(2, 4)),
    "laptop": dict(clips=128, frames=16, lengths=(2, 4, 8, 16)),
    "tpu": dict(clips=512, frames=16, lengths=(2, 4, 8, 16, 32, 64)),
}


@jax.jit
def start(model, z, actions, key):
    """The history of a clip's context, and the noise of the frame after it."""
    cut = jax.tree.map(lambda x: x[:, : z.shape[1]], actions)
    history, noise = jax.random.split(key)
    cache, _ = shortcut.observe(model, model.init_cache(z.shape[0]), z, cut, history)
    return cache, jax.random.normal(noise, (z.shape[0], 1, *z.shape[2:]), jnp.float32)


@jax.jit
def jump(model, cache, action, z, tau, d):
    """One step of size d from signal level tau."""
    wide = lambda x: jnp.full(z.shape[:2], x, jnp.float32)
    return euler_step(z, model(z, wide(tau), wide(d), action, cache=cache).z1, tau, d)


def errors(run: Run, clips: int) -> list[dict[str, Any]]:
    """For each level the root-mean-square of: one jump minus two halves (own), two halves minus the finest path
    (inherited), one jump minus the path (all)."""
    held, model, seed = base.held_out(run, clips), run.model("dynamics"), run.config.seed
    tree = lambda x: jax.tree.map(jnp.asarray, x)
    actions = Actions(tree(held.actions), tree(held.present))
    cache, noise = start(model, jnp.asarray(held.latents[:, : held.context]), actions, jax.random.key(seed))
    now = jax.tree.map(lambda x: x[:, held.context : held.context + 1], actions)
    step = lambda z, tau, d: jump(model, cache, now, z, jnp.float32(tau), jnp.float32(d))
    k_max = model.k_max
    path = [noise]
    for i in range(k_max):
        path.append(step(path[-1], i / k_max, 1 / k_max))
    norm = lambda x: np.mean(np.square(np.asarray(x, np.float64)), axis=(1, 2, 3))  # per clip
    rows = []
    for level in range(k_max.bit_length() - 1):
        d, stride = 2.0**-level, k_max >> level
        own, inherited, total, moved = (np.zeros(clips) for _ in range(4))
        for i in range(0, k_max, stride):
            tau, z = i / k_max, path[i]
            one = step(z, tau, d)
            two = step(step(z, tau, d / 2), tau + d / 2, d / 2)
            own += norm(one - two)
            inherited += norm(two - path[i + stride])
            total += norm(one - path[i + stride])
            moved += norm(path[i + stride] - z)
        root = lambda x: bootstrap_ci(np.sqrt(x * stride / k_max))  # noqa: B023
        rows.append(
            {
                "seed": seed,
                "level": level,
                "d": d,
                "own": root(own),
                "inherited": root(inherited),
                "total": root(total),
                "share_inherited": bootstrap_ratio_ci(inherited, own + inherited),
                "relative": bootstrap_ratio_ci(total, moved),
                "per_clip": np.sqrt(total * stride / k_max),
            }
        )
    return rows


def inheritance(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How the error of level k follows that of level k + 1, over the clips: ratio, and rank correlation."""
    found = []
    for coarse, fine in zip(rows, rows[1:], strict=False):
        rho = float(stats.spearmanr(coarse["per_clip"], fine["per_clip"]).statistic)
        n = len(coarse["per_clip"])
        half = 1.96 / np.sqrt(max(n - 3, 1))  # Fisher's transformation
        low, high = (float(np.tanh(np.arctanh(np.clip(rho, -0.999, 0.999)) + s * half)) for s in (-1, 1))
        found.append(
            {
                "seed": coarse["seed"],
                "from_level": fine["level"],
                "to_level": coarse["level"],
                "growth": bootstrap_ratio_ci(coarse["per_clip"], fine["per_clip"]),
                "correlation": {"mean": rho, "low": low, "high": high},
            }
        )
    return found


def depths(run: Run, frames: int, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Chain and work of list ranking over n elements, and of a clip of `frames` frames in K steps each."""
    rows = []

    def walk(rank, after, n):
        def body(i, carry):
            at, count = carry
            with jax.named_scope("follow"):
                return after[at], count + 1

        return jax.lax.fori_loop(0, n, body, (jnp.int32(0), rank[0]))

    def pointer_jumping(rank, after, n):
        def body(i, carry):
            rank, after = carry
            with jax.named_scope("follow"):
                return rank + rank[after], after[after]

        return jax.lax.fori_loop(0, n.bit_length() - 1, body, (rank, after))

    def followed(at):
        return at.opcode in ("gather", "dynamic-slice") and "/follow/" in at.attributes

    for n in lengths:
        array = jax.ShapeDtypeStruct((n,), jnp.int32)
        for name, f, per_round in (("list: walk", walk, 1), ("list: pointer jumping", pointer_jumping, n)):
            text = jax.jit(partial(f, n=n)).lower(array, array).compile().as_text()
            found = depth(Module.parse(text or ""), followed)
            rows.append({"program": name, "n": n, "depth": found.chain, "work": found.chain * per_round})
    model = run.model("dynamics")
    held = base.held_out(run, 1)
    z = jnp.asarray(held.latents[:, :1])
    tree = lambda x: jax.tree.map(lambda leaf: jnp.asarray(leaf[:, : 1 + frames]), x)
    actions = Actions(tree(held.actions), tree(held.present))
    for k in [2**i for i in range(model.k_max.bit_length())]:
        for name, length in (("a frame", 1), ("a clip", frames)):
            cut = jax.tree.map(lambda x: x[:, : 1 + length], actions)  # noqa: B023
            sample = jax.jit(partial(shortcut.generate, steps=k))
            text = sample.lower(model, z, cut, jax.random.key(0)).compile().as_text()
            found = depth(Module.parse(text or ""), in_scope("flow"))
            rows.append({"program": name, "n": k, "depth": found.chain, "work": found.work, "frames": length})
    return rows


def draw(levels: list[dict[str, Any]], follows: list[dict[str, Any]], programs: list[dict[str, Any]]) -> Figure:
    """Errors by level, growth from level to level, and depth against n."""
    figure, (error, growth, deep) = plots.panels(
        ["Error of a jump (RMS of latents)", "Error against that of half the jump", "Depth: operations in a row"],
        width=4.8,
        height=3.4,
    )
    power = lambda v, _: f"1/{round(1 / v)}" if v < 1 else f"{v:g}"
    names = {"total": "one jump against the path", "inherited": "two halves against it", "own": "one against two"}
    first = [r for r in levels if r["seed"] == levels[0]["seed"]]
    x, ends = [r["d"] for r in first], []
    for (key, name), colour in zip(names.items(), plots.PALETTE, strict=False):
        mean, low, high = (np.array([getattr(r[key], k) for r in first]) for k in ("mean", "low", "high"))
        error.errorbar(x, mean, np.maximum([mean - low, high - mean], 0), marker="o", capsize=2.5, color=colour)
        ends.append((name, float(mean[0]), colour))
    for at in (error, growth):
        at.set_xscale("log", base=2)
        at.set_xticks(x)
        at.xaxis.set_major_formatter(power)
        at.set_xlabel("size d of the jump")
    error.set_ylim(0)
    plots.label_ends(error, ends)
    line = [r for r in follows if r["seed"] == first[0]["seed"]]
    where = [2.0 ** -r["to_level"] for r in line]
    mean, low, high = (np.array([getattr(r["growth"], k) for r in line]) for k in ("mean", "low", "high"))
    growth.errorbar(
        where, mean, np.maximum([mean - low, high - mean], 0), marker="o", capsize=2.5, color=plots.PALETTE[0]
    )
    growth.axhline(1, color=plots.PALETTE[-1], linestyle="--")
    growth.set_ylim(0)
    plots.label_ends(growth, [("ratio", float(mean[0]), plots.PALETTE[0]), ("no growth", 1.0, plots.PALETTE[-1])])
    ends = []
    for name, colour in zip(dict.fromkeys(r["program"] for r in programs), plots.PALETTE, strict=False):
        line = [r for r in programs if r["program"] == name]
        style = "--" if name.startswith("list") else "-"
        deep.plot([r["n"] for r in line], [r["depth"] for r in line], style, marker="o", color=colour)
        label = name if name.startswith("list") else f"{name} ({line[0]['frames']} frames)".replace("(1 frames)", "")
        ends.append((label.strip(), line[-1]["depth"], colour))
    deep.set_xscale("log", base=2)
    deep.set_yscale("log", base=2)
    for axis in (deep.xaxis, deep.yaxis):
        axis.set_major_formatter(lambda v, _: f"{v:g}")
    deep.set_xlabel("n elements, or K steps a frame")
    plots.label_ends(deep, ends)
    return figure


def finding(levels: list[dict[str, Any]], follows: list[dict[str, Any]], programs: list[dict[str, Any]]) -> str:
    """What the numbers of the first seed say."""
    seed = levels[0]["seed"]
    levels, follows = ([r for r in rows if r["seed"] == seed] for rows in (levels, follows))
    coarse, text = levels[0], lambda i: f"{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]"
    growths = ", ".join(f"{r['growth'].mean:.2f} (to d = 1/{2 ** r['to_level']})" for r in reversed(follows))
    correlated = ", ".join(f"{r['correlation']['mean']:.2f}" for r in reversed(follows))
    by = {(r["program"], r["n"]): r for r in programs}
    k = max(n for name, n in by if name == "a frame")
    n = max(n for name, n in by if name == "list: walk")
    clip = by["a clip", 1]
    share = coarse["share_inherited"]
    return (
        f"A whole jump (d = 1) misses the finest path by an RMS of {text(coarse['total'])} in latents of (-1, 1); two "
        f"halves miss it by {text(coarse['inherited'])}, and one jump differs from two halves by "
        f"{text(coarse['own'])}: of the summed squares {100 * share.mean:.0f} % [{100 * share.low:.0f}, "
        f"{100 * share.high:.0f}] are inherited. From level to level the error grows by {growths} times; its rank "
        f"correlation between levels, over clips, is {correlated}. Read off the compiled programs, a frame takes "
        f"{by['a frame', k]['depth']} passes in a row at K = {k} and {by['a frame', 1]['depth']} at K = 1, a clip of "
        f"{clip['frames']} frames {by['a clip', k]['depth']} and {clip['depth']}; ranking a list of {n} takes "
        f"{by['list: walk', n]['depth']} rounds by walking and {by['list: pointer jumping', n]['depth']} by pointer "
        "jumping. What carries over: levels are built as doubled pointers are, each from two of the level below, and "
        "a jump then replaces a path. What does not: pointer jumping is exact and pays log2 n rounds at every query, "
        "with n log2 n work; a shortcut is approximate, its log2 K_max rounds of composition are paid once, in "
        "training, and a query then takes one pass, less work as well as less depth. And the doubling is along the "
        "denoising path alone: frames stay sequential in time, so a clip is never less deep than it has frames."
    )


def main(argv: Sequence[str] | None = None) -> None:
    call = STUDY.call(__doc__, argv)
    size, levels, follows = SIZES[call.size], [], []
    for seed in call.seeds:
        found = errors(base.trained(call, seed, "tokenizer", "dynamics"), size["clips"])
        levels += found
        follows += inheritance(found)
    programs = depths(base.trained(call, call.seeds[0]), size["frames"], size["lengths"])
    figure = draw(levels, follows, programs)
    rows = [{k: v for k, v in row.items() if k != "per_clip"} for row in levels]
    call.write([*rows, *follows, *programs], finding=finding(levels, follows, programs), figure=figure)


if __name__ == "__main__":
    entry(main)
