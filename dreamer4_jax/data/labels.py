"""Which training frames keep their actions, where only a part of the video is labelled (paper 4.3).

Episodes are put in an order by a hash of the seed and of their meta data, and labelled in that order up to the frame at
which the share is reached. So the share is of frames, exact to one of them; what is labelled at a share is labelled at
every larger one; and it is the same whatever the number of processes, and for frames and their tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from dreamer4_jax.config import Config
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import Arrays, Dataset


@dataclass(frozen=True)
class Labels:
    """Attributes:
    kept: which frames of the split keep their actions, if they have any.
    of: frames of the levels that may be labelled.
    fps: frames of a second, if the dataset knows.
    """

    kept: Bool[np.ndarray, " frames"]
    of: int
    fps: float | None = None

    def apply(self, arrays: Arrays, start: int) -> None:
        """Takes the actions of unlabelled frames from a window that begins at frame `start`, in place: they are not
        present, and their values are those of no action."""
        for name, present in arrays.items():
            group, _, leaf = name.partition("/")
            if group == "present":
                kept = self.kept[start : start + len(present)]
                present &= kept
                arrays[f"actions/{leaf}"][~kept] = 0

    def __str__(self) -> str:
        labelled, total = int(self.kept.sum()), len(self.kept)
        hours = f"; {labelled / self.fps / 3600:.3g} of {total / self.fps / 3600:.3g} hours" if self.fps else ""
        return f"{100 * labelled / total:.3g} % of the training frames ({labelled} of {total}{hours})"


def choose(dataset: Dataset, share: float, *, seed: int, levels: Sequence[str] = (), split: str = "train") -> Labels:
    """Labels `share` of the frames of `levels` (by default of all frames) of a split.

    Raises:
        DataError: a level that no episode is of.
    """
    episodes, total = dataset.episodes(split), dataset.frames(split)
    known = {e.level for e in episodes}
    if missing := [level for level in levels if level not in known]:
        raise DataError(
            f"data.labelled_levels: dataset {dataset.directory} has no level {missing[0]!r}; it has "
            f"{', '.join(repr(level) for level in sorted(known)[:20])}"
        )
    ends = [*(e.start for e in episodes[1:]), total]
    parts = [(e, end) for e, end in zip(episodes, ends, strict=True) if not levels or e.level in levels]
    parts.sort(key=lambda part: (hashlib.sha256(f"{seed}:{part[0].key}".encode()).digest(), part[0].start))
    of = sum(end - e.start for e, end in parts)
    left, kept = round(share * of), np.zeros(total, np.bool_)
    for episode, end in parts:
        taken = min(left, end - episode.start)
        kept[episode.start : episode.start + taken] = True
        left -= taken
    return Labels(kept, of, dataset.manifest.get("fps"))


def labels_of(config: Config, dataset: Dataset) -> Labels | None:
    """What a config's `data.labelled` and `data.labelled_levels` say of a dataset; None: all actions are kept."""
    d = config.data
    if d.labelled == 1.0 and not d.labelled_levels:
        return None
    return choose(dataset, d.labelled, seed=config.seed, levels=d.labelled_levels)
