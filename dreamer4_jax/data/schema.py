"""One episode schema, and fixed-length chunks of a stream of episodes. For people: docs/data.md.

Alignment: index t holds frame t, the action that led to frame t, and the reward received with frame t. The first frame
of an episode has no action (``present`` is False) and reward 0; the frame after the last action is stored.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from dreamer4_jax.config import ActionComponent, UserError

SCHEMA_VERSION = 1


class DataError(UserError):
    """A dataset, shard or episode that cannot be used as it stands."""


def action_array(component: ActionComponent, frames: int) -> np.ndarray:
    """Zero actions of one component for `frames` frames: the base value of frames without an action."""
    if component.kind in ("categorical", "mouse"):
        return np.zeros(frames, np.int32)
    return np.zeros((frames, component.size), np.uint8 if component.kind == "binary" else np.float32)


@dataclass(frozen=True)
class Episode:
    """One episode of T frames, in the alignment of the module's docstring."""

    frames: UInt8[np.ndarray, "T H W 3"]
    actions: dict[str, np.ndarray]  # int32 [T] (categorical, mouse), uint8 [T, A] (binary), float32 [T, A] (continuous)
    present: dict[str, Bool[np.ndarray, " T"]]
    reward: Float[np.ndarray, " T"]
    is_terminal: bool  # the last frame ended the episode by success or failure; False: it was cut by a limit
    task: Int[np.ndarray, " words"]  # or [T, words], where the task changes within the episode
    meta: dict[str, Any] = field(default_factory=dict)  # JSON values, such as level, policy, seed, mission

    def __len__(self) -> int:
        return len(self.frames)

    def validate(self, components: tuple[ActionComponent, ...]) -> "Episode":
        """Returns the episode itself, or raises `DataError` naming the first thing that breaks the schema."""
        t = len(self.frames)
        _check(self.frames.dtype == np.uint8 and self.frames.ndim == 4 and self.frames.shape[-1] == 3, "frames",
               self.frames, "uint8 [T, H, W, 3]")  # fmt: skip
        _check(t > 0, "frames", self.frames, "at least one frame")
        _check(self.reward.dtype == np.float32 and self.reward.shape == (t,), "reward", self.reward, f"float32 [{t}]")
        if not np.isfinite(self.reward).all() or self.reward[0] != 0:
            raise DataError(
                f"episode: reward = {self.reward[:4]}...: must be finite, and 0 with the first frame "
                "(the reward at index t is the one received with frame t)"
            )
        per_frame = self.task.ndim == 2 and len(self.task) == t
        _check(self.task.dtype == np.int32 and (self.task.ndim == 1 or per_frame), "task", self.task,
               f"int32 [words] or [{t}, words]")  # fmt: skip
        names = {part.name for part in components}
        for what, given in (("actions", self.actions), ("present", self.present)):
            if set(given) != names:
                raise DataError(f"episode: {what} has components {sorted(given)}, the config has {sorted(names)}")
        for part in components:
            value, like = self.actions[part.name], action_array(part, t)
            at = f"actions[{part.name!r}]"
            _check(value.dtype == like.dtype and value.shape == like.shape, at, value, f"{like.dtype} {[*like.shape]}")
            shown = self.present[part.name]
            _check(shown.dtype == np.bool_ and shown.shape == (t,), f"present[{part.name!r}]", shown, f"bool [{t}]")
            if shown[0]:
                raise DataError(
                    f"episode: present[{part.name!r}][0] is True: no action led to the first frame. "
                    "The action taken at frame t belongs to index t + 1"
                )
            top = {"categorical": part.size, "mouse": part.size, "binary": 2}.get(part.kind)
            if top is not None and (value.min() < 0 or value.max() >= top):
                raise DataError(f"episode: {at} holds {value.min()} .. {value.max()}: must be in [0, {top})")
            if part.kind == "continuous" and not np.isfinite(value).all():
                raise DataError(f"episode: {at} holds values that are not finite")
        return self

    def part(self, start: int, stop: int | None = None) -> "Episode":
        """Frames start .. stop - 1 as an episode of their own: nothing led to the first of them."""
        cut = slice(start, len(self) if stop is None else min(stop, len(self)))
        if start == 0 and cut.stop == len(self):
            return self
        present = {name: value[cut].copy() for name, value in self.present.items()}
        reward = self.reward[cut].copy()
        for value in present.values():
            value[:1] = False
        reward[:1] = 0
        return replace(
            self,
            frames=self.frames[cut],
            actions={name: value[cut] for name, value in self.actions.items()},
            present=present,
            reward=reward,
            is_terminal=self.is_terminal and cut.stop == len(self),
            task=self.task if self.task.ndim == 1 else self.task[cut],
            meta={**self.meta, "from": start},
        )

    def every(self, n: int, components: tuple[ActionComponent, ...]) -> "Episode":
        """Every n-th frame, and the last one, as where an action is repeated until the episode ends. Over the frames
        between, rewards add up and keys count if pressed in any of them; of a categorical or continuous action the last
        one stands, and a mouse moves by the sum of its movements. The task is the one that was rewarded, if any was.

        A kept frame has an action where all the frames up to it have one.
        """
        if n == 1:
            return self
        keep = np.unique([*range(0, len(self), n), len(self) - 1])
        # What led to each kept frame.
        groups = [np.arange(max(0, k - n + 1), k + 1) if k % n == 0 else np.arange(k - k % n + 1, k + 1)
                  for k in keep.tolist()]  # fmt: skip
        reward = np.asarray([self.reward[g].sum() for g in groups], np.float32)
        present = {k: np.asarray([v[g].all() for g in groups], np.bool_) for k, v in self.present.items()}
        actions = {k: v[keep] for k, v in self.actions.items()}
        for c in components:
            if c.kind == "binary":
                actions[c.name] = np.stack([self.actions[c.name][g].max(0) for g in groups])
            elif c.kind == "mouse":
                actions[c.name] = np.asarray([_summed_mouse(self.actions[c.name][g]) for g in groups], np.int32)
        task = self.task
        if task.ndim == 2:
            task = task[[next((i for i in g[::-1].tolist() if self.reward[i]), int(g[-1])) for g in groups]]
        return replace(self, frames=self.frames[keep], actions=actions, present=present, reward=reward, task=task)


def _summed_mouse(ids: Int[np.ndarray, " n"]) -> int:
    from dreamer4_jax.agent.actions import mu_law_mouse  # it imports JAX, which a recording process does not need

    dx, dy = mu_law_mouse.decode(ids)
    return int(mu_law_mouse.encode(dx.sum(), dy.sum()))


def _check(ok: bool, name: str, value: np.ndarray, want: str) -> None:
    if not ok:
        raise DataError(f"episode: {name} is {value.dtype} {[*value.shape]}: expected {want}")


def episode_key(meta: Mapping[str, Any]) -> str:
    """A hash of an episode's meta data, by which it is known in whatever pieces and order it is stored."""
    own = {name: value for name, value in meta.items() if name not in ("start", "offset", "from")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


def segments(is_first: Bool[np.ndarray, "*batch T"]) -> Int[np.ndarray, "*batch T"]:
    """Segment number of each frame; attention over time never crosses from one to another."""
    return np.cumsum(is_first, axis=-1, dtype=np.int32)


def _arrays(episode: Episode) -> dict[str, np.ndarray]:
    """The episode as flat per-frame arrays, keyed as in storage."""
    t = len(episode)
    first, last, terminal = (np.zeros(t, np.bool_) for _ in range(3))
    first[0], last[-1], terminal[-1] = True, True, episode.is_terminal
    out = {
        "frames": episode.frames,
        "reward": episode.reward,
        "is_first": first,
        "is_last": last,
        "is_terminal": terminal,
        "task": np.broadcast_to(episode.task, (t, episode.task.shape[-1])),
    }
    for name, value in episode.actions.items():
        out[f"actions/{name}"] = value
        out[f"present/{name}"] = episode.present[name]
    return out


def chunks(episodes: Iterable[Episode], length: int) -> Iterator[tuple[dict[str, np.ndarray], list[dict[str, Any]]]]:
    """Cuts a stream of consecutive episodes into chunks of `length` frames.

    An episode may go on in the next chunk: its frames there have ``is_first`` False. Frames left over at the end of the
    stream, fewer than a chunk, are dropped.

    Yields:
        (arrays [length, ...] keyed as in storage, the meta data of each segment of the chunk with its ``start``).
    """
    pieces: list[dict[str, np.ndarray]] = []
    metas: list[dict[str, Any]] = []
    filled = 0
    for episode in episodes:
        arrays, at = _arrays(episode), 0
        while at < len(episode):
            take = min(length - filled, len(episode) - at)
            pieces.append({k: v[at : at + take] for k, v in arrays.items()})
            metas.append({**episode.meta, "start": filled, "offset": at})
            filled, at = filled + take, at + take
            if filled == length:
                yield {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}, metas
                pieces, metas, filled = [], [], 0
