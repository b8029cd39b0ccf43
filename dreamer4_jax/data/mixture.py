"""Several datasets as one, each with a weight: of the rows of training batches it has exactly that share."""

from collections.abc import Sequence
from typing import Any

from dreamer4_jax.data import statistics
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import CACHE_BYTES, Dataset


def _ranges(a: Dataset, b: Dataset) -> list[tuple[str, Any, Any]]:
    """Continuous components whose stored values mean different ones: (name, range in a, range in b)."""
    out = []
    for c in a.spec.actions:
        usual = {"low": [-1.0] * c.size, "high": [1.0] * c.size}
        ours, theirs = (d.manifest.get("ranges", {}).get(c.name, usual) for d in (a, b))
        known = all(d.manifest.get("statistics", {}).get("present", {}).get(c.name, 1) for d in (a, b))
        if c.kind == "continuous" and known and ours != theirs:
            text = lambda r: f"{r['low']} .. {r['high']}"
            out.append((c.name, text(ours), text(theirs)))
    return out


def mix(datasets: Sequence[Dataset], weights: Sequence[float] = (), *, cache_bytes: int = CACHE_BYTES) -> Dataset:
    """The datasets' streams one after another, as one dataset; nothing is copied.

    Args:
        weights: shares of the rows that a `pipeline.Loader` draws from each dataset, up to a common factor. Without
            them every window is drawn once an epoch, whichever dataset it is of.
    """
    first = datasets[0]
    tasks: list[str] = []
    for data in datasets:
        if data.spec != first.spec:
            name = next(n for n, v in data.spec.to_json().items() if v != first.spec.to_json()[n])
            theirs, ours = data.spec.to_json()[name], first.spec.to_json()[name]
            raise DataError(
                f"datasets {first.directory} and {data.directory} cannot be mixed: {name} is {ours} and {theirs}; "
                "convert them with the same options"
            )
        if data.manifest.get("tokenizer") != first.manifest.get("tokenizer"):
            raise DataError(
                f"datasets {first.directory} and {data.directory} cannot be mixed: their tokens are of two tokenizers"
            )
        for name, ours, theirs in _ranges(first, data):
            raise DataError(
                f"datasets {first.directory} and {data.directory} cannot be mixed: -1 .. 1 of action {name!r} is "
                f"{ours} in one and {theirs} in the other; convert the second with --like {first.directory}"
            )
        named = list(data.manifest.get("tasks", ()))
        if named and tasks and named != tasks:
            raise DataError(
                f"dataset {data.directory} has the tasks {named}, one that it is mixed with {tasks}: the same number "
                "would mean two things"
            )
        tasks = tasks or named
    splits = {
        split: [
            {**shard, "file": str(data.directory.absolute() / shard["file"])}
            for data in datasets
            for shard in data.manifest["splits"][split]
        ]
        for split in first.splits
    }
    manifest = {
        **first.manifest,
        "splits": splits,
        "tasks": tasks,
        "skipped": [bad for d in datasets for bad in d.manifest.get("skipped", ())],
    }
    counted = [d.manifest.get("statistics", {}) for d in datasets]
    manifest["statistics"] = statistics.merge(counted) if all("present" in s for s in counted) else {}
    if weights:
        if len(weights) != len(datasets) or not all(w > 0 for w in weights):
            raise DataError(f"weights {[*weights]} for {len(datasets)} datasets: expected one above 0 for each")
        manifest["mixture"] = {
            "weights": [float(w) for w in weights],
            "streams": {split: [len(d.manifest["splits"][split]) for d in datasets] for split in first.splits},
        }
    return Dataset(first.directory, manifest, cache_bytes=cache_bytes)
