"""Held-out clips through the models: reconstructions, and imagined video at every number of sampling steps."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dreamer4_jax.config import Config, UserError
from dreamer4_jax.data.store import Dataset
from dreamer4_jax.envs.kinds import Decoder, decoder
from dreamer4_jax.evaluation.metrics import bootstrap_ci, psnr, ssim
from dreamer4_jax.evaluation.worldmodel import PSNR_CAP, ClipScores, score_clips, step_table
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.perceptual import Distance, measure
from dreamer4_jax.world.shortcut import generate
from dreamer4_jax.world.tokenizer import Tokenizer

FINETUNED = "after phase 2, true actions"  # the condition's name
REPEATED = "the last frame repeated"
COMPARED = 128  # frames of which perceptual distances are measured
SHOWN_STEPS = 4  # the paper's K: what clips, controls and targets are shown at


@dataclass(frozen=True)
class HeldOut:
    """n clips of context + future frames, each inside one held-out episode."""

    frames: UInt8[np.ndarray, "n T H W 3"]
    latents: Float[np.ndarray, "n T N C"]
    actions: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    context: int
    decoder: Decoder | None  # None: no symbols are known, pictures alone are compared
    episodes: np.ndarray | None = None  # [n], a label of the episode that each is of

    @classmethod
    def sample(cls, config: Config, frames: Dataset, tokens: Dataset, *, seed: int) -> "HeldOut":
        """Draws `evaluate.clips` distinct windows of the held-out split in which no other episode begins.

        So only episodes of at least context + future frames are seen: short successes are not among them.
        """
        found = clip_starts(config, frames)
        return cls.at(
            config, frames, tokens, np.random.default_rng(seed).choice(found, config.evaluate.clips, replace=False)
        )

    @classmethod
    def at(cls, config: Config, frames: Dataset, tokens: Dataset, starts: Int[np.ndarray, " n"]) -> "HeldOut":
        """The clips that begin at `starts`, which are of `clip_starts`."""
        e, chosen = config.evaluate, np.sort(starts)
        length = e.context + e.frames
        raw = [frames.window("holdout", int(s), length) for s in chosen]
        coded = [tokens.window("holdout", int(s), length) for s in chosen]
        names = [part.name for part in config.actions]
        listed = frames.episodes("holdout")
        of = np.searchsorted([x.start for x in listed], chosen, side="right") - 1
        return cls(
            frames=np.stack([w["frames"] for w in raw]),
            latents=np.stack([w["latents"] for w in coded]).astype(np.float32),
            actions={n: np.stack([w[f"actions/{n}"] for w in raw]) for n in names},
            present={n: np.stack([w[f"present/{n}"] for w in raw]) for n in names},
            context=e.context,
            decoder=decoder(config),
            episodes=np.asarray([listed[i].key for i in of]),
        )

    def score(self, imagined: Float[np.ndarray, "n T H W 3"]) -> ClipScores:
        """Scores the frames after the context."""
        video = to_uint8(imagined)
        if self.decoder is None:
            return score_clips(self.frames[:, self.context :], video, episodes=self.episodes)
        symbols = self.decoder.decode(self.frames)
        return score_clips(
            self.frames[:, self.context :],
            video,
            real_symbols=symbols[:, self.context :],
            imagined_symbols=self.decoder.decode(video),
            last_symbols=symbols[:, self.context - 1],
            episodes=self.episodes,
        )

    def unlabelled(self) -> "HeldOut":
        """The same clips, no action of which is known."""
        return replace(self, present={n: np.zeros_like(p) for n, p in self.present.items()})

    def shuffled(self, seed: int) -> "HeldOut":
        """The same clips with each one's actions taken from another: a model that ignores actions would not notice."""
        roll = np.roll(np.random.default_rng(seed).permutation(len(self.frames)), 1)
        order = np.empty_like(roll)
        order[np.roll(roll, -1)] = roll  # one cycle through all clips: none keeps its own
        actions = {n: a[order] for n, a in self.actions.items()}
        return replace(self, actions=actions)

    @property
    def labelled(self) -> bool:
        """Whether any of the clips' frames has an action."""
        return any(p.any() for p in self.present.values())

    def repeated(self) -> Float[np.ndarray, "n T H W 3"]:
        """The last context frame in place of every frame after it, in [0, 1]: what a model must beat."""
        last = self.frames[:, self.context - 1 : self.context].astype(np.float32) / 255
        return np.repeat(last, self.frames.shape[1] - self.context, axis=1)


def clip_starts(config: Config, frames: Dataset) -> Int[np.ndarray, " n"]:
    """First frames of the held-out windows of `evaluate.context` + `evaluate.frames` inside one episode."""
    e = config.evaluate
    length, at, starts = e.context + e.frames, 0, []
    for stream in frames.streams("holdout"):
        if stream >= length:
            first = frames.window("holdout", at, stream)["is_first"]
            # An episode that begins with the window itself is inside.
            inside = np.lib.stride_tricks.sliding_window_view(first[1:], length - 1).sum(-1) == 0
            starts.append(at + np.flatnonzero(inside))
        at += stream
    found = np.concatenate(starts) if starts else np.zeros(0, int)
    if len(found) < e.clips:
        raise UserError(
            f"evaluate.clips = {e.clips}: the held-out split has {len(found)} windows of {length} frames inside "
            "one episode; give more data, raise data.holdout or env.max_steps, or shorten evaluate.frames"
        )
    return found


def to_uint8(video: Any) -> UInt8[np.ndarray, "n T H W 3"]:
    """Frames in [0, 1] to bytes."""
    return np.round(np.clip(np.asarray(video, np.float32), 0, 1) * 255).astype(np.uint8)


@jax.jit
def _decode(tokenizer: Tokenizer, z: Array) -> Array:
    return tokenizer.decode(z)


@jax.jit
def _generate(dynamics: Dynamics, context: Array, actions: Actions, key: Array, steps: Int[Array, ""]) -> Array:
    return generate(dynamics, context, actions, key, steps=steps)


def _arguments(model: Dynamics, clips: HeldOut, steps: int, seed: int) -> tuple[Any, ...]:
    actions, present = (jax.tree.map(jnp.asarray, x) for x in (clips.actions, clips.present))
    context = jnp.asarray(clips.latents[:, : clips.context])
    return model, context, Actions(actions, present), jax.random.key(seed), jnp.int32(steps)


def imagine_clips(
    model: Dynamics, tokenizer: Tokenizer, clips: HeldOut, steps: int, seed: int
) -> Float[np.ndarray, "n T H W 3"]:
    """The frames after the context, imagined at the clips' actions with K = `steps`."""
    return _video(tokenizer, clips, _generate(*_arguments(model, clips, steps, seed)))


def _video(tokenizer: Tokenizer, clips: HeldOut, z: Array) -> Float[np.ndarray, "n T H W 3"]:
    """Decodes imagined tokens behind their context, which a decoder with time layers sees; returns what follows it."""
    whole = jnp.concatenate([jnp.asarray(clips.latents[:, : clips.context]), z], axis=1)
    return np.asarray(_decode(tokenizer, whole))[:, clips.context :]


def reconstruction(
    tokenizer: Tokenizer, held: HeldOut, networks: Mapping[str, Distance] = MappingProxyType({}), *, shown: int = 6
) -> dict[str, Any]:
    """PSNR, SSIM and, where there are any, symbol accuracy of the held-out frames decoded from their tokens, with 95 %
    intervals over episodes; under "perceptual" the distances in `networks`, by their names, of a part of the frames."""
    video = to_uint8(_decode(tokenizer, held.latents))
    scores = {"psnr": np.minimum(psnr(held.frames, video), PSNR_CAP), "ssim": ssim(held.frames, video)}
    if held.decoder is not None:
        symbols = held.decoder.decode(video) == held.decoder.decode(held.frames)
        scores["symbol_accuracy"] = symbols.mean((-2, -1))
    pick = np.linspace(0, len(video) - 1, shown).astype(int)
    over = lambda values: bootstrap_ci(values, units=held.episodes)._asdict()
    intervals = {name: over(np.asarray(v).mean(1)) for name, v in scores.items()}
    if networks:
        intervals["perceptual"] = {n: over(v) for n, v in distances(networks, held.frames, video).items()}
    return {
        **intervals,
        "frames": int(np.prod(video.shape[:2])),
        "shown": {"real": held.frames[pick, -1], "reconstructed": video[pick, -1]},
    }


def distances(
    networks: Mapping[str, Distance], frames: UInt8[np.ndarray, "n T H W 3"], video: UInt8[np.ndarray, "n T H W 3"]
) -> dict[str, Float[np.ndarray, " n"]]:
    """The mean perceptual distance of each clip to its reconstruction, over frames at even distances, for each network.

    Of all clips together about `COMPARED` frames: a network of this size takes 50 ms for a pair on a CPU's core.
    """
    clips, length = video.shape[:2]
    at = np.linspace(0, length - 1, min(length, max(1, COMPARED // clips))).astype(int)
    real, made = (x[:, at].reshape(-1, *x.shape[2:]) for x in (frames, video))
    return {name: measure(net, real, made).reshape(clips, -1).mean(1) for name, net in networks.items()}


def step_count(
    config: Config,
    models: Mapping[str, Dynamics],
    tokenizer: Tokenizer,
    held: HeldOut,
    *,
    finetuned: Dynamics | None = None,
    shown: int = 6,
) -> dict[str, Any]:
    """Imagined clips at the true actions for K = 1, 2, 4, .., k_max, and a control with shuffled actions.

    Args:
      finetuned: the dynamics after phase 2, measured at one K as another condition: it is the one that imagination
        training rolls out, and its heads' losses could have spoiled it.

    Returns:
      {"steps": {"models": [..], "device"}, "conditions": [..], "steps_shown": K}, and under "shown" frames of the first
      clips of the first model: "context", "real" and "imagined" uint8 [n, T, H, W, 3].
    """
    ladder = [2**i for i in range(config.dynamics.k_max.bit_length())]
    frames = held.frames.shape[1] - held.context

    def imagine(model: Dynamics, clips: HeldOut, steps: int) -> tuple[np.ndarray, float]:
        if steps == ladder[0]:
            imagine_clips(model, tokenizer, clips, steps, config.seed)  # compiles; every K uses this program
        began = time.perf_counter()
        z = jax.block_until_ready(_generate(*_arguments(model, clips, steps, config.seed)))
        spent = time.perf_counter() - began
        return _video(tokenizer, clips, z), 1000 * spent / (frames * len(clips.frames))

    out: dict[str, Any] = {"models": []}
    control = min(SHOWN_STEPS, config.dynamics.k_max)
    kept: dict[str, np.ndarray] = {}
    conditions = []
    for name, model in models.items():
        scores, milliseconds = {}, {}
        for steps in ladder:
            video, milliseconds[steps] = imagine(model, held, steps)
            scores[steps] = held.score(video)
            if steps == control:
                kept[name] = video
        out["models"].append({"name": name, "rows": step_table(scores, milliseconds)})
        conditions.append({"name": f"{name}, true actions", **scores[control].summary()})
        if held.labelled:
            wrong, _ = imagine(model, held.shuffled(config.seed), control)
            conditions.append({"name": f"{name}, shuffled actions", **held.score(wrong).summary()})
    if finetuned is not None:
        video = imagine_clips(finetuned, tokenizer, held, control, config.seed)
        conditions.append({"name": FINETUNED, **held.score(video).summary()})
    if held.decoder is None:  # symbols bring this baseline along
        conditions.append({"name": REPEATED, **held.score(held.repeated()).summary()})
    first = next(iter(models))
    return {
        "steps": {**out, "device": f"{jax.devices()[0].device_kind}, batch {len(held.frames)}"},
        "conditions": conditions,
        "shown": {
            "context": held.frames[:shown, : held.context],
            "real": held.frames[:shown, held.context :],
            "imagined": to_uint8(kept[first][:shown]),
        },
        "steps_shown": control,
    }
