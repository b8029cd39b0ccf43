"""Data of one's own in a run: `data.source` names a dataset, or anything that a reader knows, to be converted."""

from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.config import Config, override, to_dict
from dreamer4_jax.data import readers
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.labels import labels_of
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import MANIFEST, Dataset, open_dataset
from dreamer4_jax.parallel.bucket import readable


def is_dataset(source: str) -> bool:
    """Whether a source needs no conversion."""
    return bool(source) and (Path(source) / MANIFEST).is_file()


def adopt(config: Config) -> Config:
    """The config with all that its source decides: action components, tasks, no environment; and a name of its own."""
    if config.data.also:
        config = override(config, {"data.also": [_place(p) for p in config.data.also]})
    also, source = open_also(config), config.data.source
    if not source:
        return config
    if not source.startswith("gym:"):
        source = _place(source)
    if is_dataset(source):
        dataset = open_dataset(source, verify=False)
        actions, words = dataset.spec.actions, dataset.spec.words
        tasks = len(dataset.manifest.get("tasks", ()))
    else:
        reader = readers.open_source(source)
        actions, words, tasks = reader.space.components, 1, len(reader.tasks)
    tasks = max([tasks, *(len(data.manifest.get("tasks", ())) for data in also)])
    values: dict[str, Any] = {
        "name": f"{config.name}-{readers.component_name(Path(source).stem)}",
        "data.source": source,
        "env.kind": "none",
        "env.levels": [],
        "actions": [to_dict(part) for part in actions],
        "agent.task_words": words,
        "agent.task_vocab": max(config.agent.task_vocab, tasks + 1),
    }
    return override(config, values)


def _place(source: str) -> str:
    """Where a source lies on this machine."""
    return str(readable(Path(source).expanduser() if source.startswith("~") else source).absolute())


def open_also(config: Config) -> list[Dataset]:
    """The datasets that the run's own is mixed with (`data.also`)."""
    for source in config.data.also:
        if not is_dataset(source):
            raise DataError(f"data.also: {source} is no dataset; make one of it with `dreamer4 data convert`")
    return [open_dataset(source) for source in config.data.also]


def convert_source(config: Config, out: Path, *, progress: bool) -> dict[str, Any]:
    """Converts the config's source at the size and with the chunks of the config; returns the manifest."""
    t, d = config.tokenizer, config.data
    return convert(
        d.source,
        out,
        size=(t.height, t.width),
        chunk=d.chunk,
        holdout=d.holdout,
        shard_frames=d.chunk * d.chunks_per_shard,
        seed=config.seed,
        workers=max(1, d.workers),
        progress=progress,
    )


def missing_labels(dataset: Dataset) -> str:
    """What phases 2 and 3 lack in a dataset, or ""."""
    lacks = []
    present = dataset.manifest.get("statistics", {}).get("present")
    if present is not None and not any(present.values()):
        lacks.append("actions")
    if not np.any(dataset.rewarded("train")):
        lacks.append("rewards above 0")
    return f"the data has no {' and no '.join(lacks)}" if lacks else ""


def labelled_part(config: Config, dataset: Dataset) -> list[str]:
    """A sentence on how much of the data is labelled, if it is a part only."""
    labels = labels_of(config, dataset)
    return [] if labels is None else [f"The actions of {labels} are known, the rest is unlabelled video."]


def skipped_episodes(dataset: Dataset) -> list[str]:
    """A sentence on the episodes that could not be converted, if there are any."""
    bad = dataset.manifest.get("skipped", [])
    if not bad:
        return []
    return [f"{len(bad)} episodes of the source were left out, the first because {bad[0]['reason']}."]
