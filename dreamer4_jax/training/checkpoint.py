"""Checkpoints: asynchronous, atomic, arrays and JSON only.

A checkpoint is an orbax step directory with two items: `state`, the arrays under their path in the tree, and `meta`,
a JSON object with the config, its fingerprint, the step (which is also the position in the data, as batches are a
function of the step) and the shape and dtype of every array. Everything is compared before an array is read, so a
checkpoint of another config or another model is refused by name instead of failing inside the reader.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from dreamer4_jax.config import UserError, complete
from dreamer4_jax.parallel.processes import is_main

_ITEMS = ("state", "meta")
_SEAL = "files.json"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another config or model."""


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short hash of a config's JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def checksum(model: Any) -> str:
    """Identity of a model's weights: SHA-256 over its arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def first_difference(a: Any, b: Any, at: str = "") -> tuple[str, Any, Any] | None:
    """The first field, in the order of `a`, at which two nested JSON values differ: (dotted name, of a, of b)."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in [*a, *(n for n in b if n not in a)]:
            if name not in a or name not in b:
                return f"{at}.{name}".lstrip("."), a.get(name, "(absent)"), b.get(name, "(absent)")
            if found := first_difference(a[name], b[name], f"{at}.{name}".lstrip(".")):
                return found
        return None
    return None if a == b else (at, a, b)


def _flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf}: names in the file that don't depend on the classes that held the arrays."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _describe(flat: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flat.items()}


class Checkpointer:
    """The checkpoints of one directory, the newest `keep` of them; a context manager that waits for open saves.

    Args:
      directory: where the step directories lie; made by the first save.
      keep: older ones are deleted once a newer one is complete.
      read_only: never creates, cleans up or deletes anything.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False):
        self.directory = Path(directory).absolute()
        self._read_only = read_only
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, create=not read_only, cleanup_tmp_directories=not read_only
        )
        self._open: ocp.CheckpointManager | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._open is None:
            self._open = ocp.CheckpointManager(self.directory, options=self._options, item_names=_ITEMS)
        return self._open

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def path(self, step: int) -> Path:
        """The directory of the checkpoint of `step`."""
        return self.directory / str(step)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step() if self.directory.is_dir() else None

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts saving the arrays of `state`, to be complete at the next save or `wait`.

        The arrays are copied before this returns, so they may be donated afterwards. An interrupted save leaves the
        earlier checkpoints as they were: a step directory gets its name when everything in it is written.
        """
        self.wait()
        flat = _flatten(state)
        meta = {**meta, "step": step, "arrays": _describe(flat)}
        if "config" in meta:
            meta["fingerprint"] = fingerprint(meta["config"])
        args = ocp.args.Composite(state=ocp.args.StandardSave(flat), meta=ocp.args.JsonSave(meta))
        try:
            saved = self._manager.save(step, args=args, force=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot write checkpoint {self.path(step)}: {error}") from error
        if not saved:
            raise CheckpointError(f"checkpoint {self.path(step)} was not written: orbax skipped it")

    def wait(self) -> None:
        """Blocks until every started save is complete; a failure of one of them is raised here."""
        if self._open is None or self._read_only:
            return
        try:
            self._open.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot write a checkpoint to {self.directory}: {error}") from error
        step = self._open.latest_step()
        if step is not None and is_main() and not (self.path(step) / _SEAL).exists():
            _seal(self.path(step))

    def close(self) -> None:
        """Waits, then releases the directory."""
        if self._open is not None:
            try:
                self.wait()
            finally:
                self._open.close()
                self._open = None

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The JSON of a checkpoint (the newest by default)."""
        step = self._require(step)
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)
        except Exception as error:  # orbax raises anything, bare Exception included, for damaged files
            raise self._damaged(step, error) from error

    def restore(
        self, abstract: Any, *, step: int | None = None, config: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint (the newest by default) into the structure of `abstract`.

        Args:
          abstract: a tree of arrays or `jax.ShapeDtypeStruct`; shardings given there decide where the arrays go, on
            any topology. Without one an array goes to the default device.
          config: what the checkpoint's config must equal, field for field; any subset of its sections.

        Returns:
          The tree and the checkpoint's JSON.

        Raises:
          CheckpointError: nothing there, damaged, of another config, or of another structure.
        """
        step = self._require(step)
        _check_seal(self.path(step))
        meta = self.meta(step)
        recorded = complete(meta.get("config", {}))
        for section, expected in (config or {}).items():
            wanted = complete({section: expected})[section]
            if found := first_difference(recorded.get(section, "(absent)"), wanted, section):
                name, theirs, ours = found
                raise CheckpointError(
                    f"checkpoint {self.path(step)} belongs to another config: {name} is {theirs!r} there and "
                    f"{ours!r} here; use the config it was made with, or another run directory"
                )
        flat = _flatten(abstract)
        if found := first_difference(meta.get("arrays", {}), _describe(flat)):
            name, theirs, ours = found
            raise CheckpointError(
                f"checkpoint {self.path(step)} holds another model: array {name} is {theirs} there and {ours} here"
            )
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default)
            for name, x in flat.items()
        }
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
        except Exception as error:  # as above
            raise self._damaged(step, error) from error
        return jax.tree.unflatten(jax.tree.structure(abstract), [restored.state[name] for name in flat]), meta

    def _require(self, step: int | None) -> int:
        found = self.latest_step()
        if found is None:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        if step is not None and step not in self._manager.all_steps():
            raise CheckpointError(f"no checkpoint {self.path(step)}; the newest there is of step {found}")
        return found if step is None else step

    def _damaged(self, step: int, error: Exception) -> CheckpointError:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return CheckpointError(f"checkpoint {self.path(step)} is damaged and cannot be read ({reason}); {_REMEDY}")


_REMEDY = "remove that directory to go on from an earlier checkpoint, if there is one beside it"


def _sizes(directory: Path) -> dict[str, int]:
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != _SEAL)
    return {str(p.relative_to(directory)): p.stat().st_size for p in files}


def _seal(directory: Path) -> None:
    """Writes down the size of every file, so that a truncated one is found without asking the array reader."""
    draft = directory / f"{_SEAL}.part"
    draft.write_text(json.dumps(_sizes(directory), indent=0))
    draft.replace(directory / _SEAL)


def _check_seal(directory: Path) -> None:
    """A checkpoint whose process died before sealing it is complete all the same, and passes."""
    seal = directory / _SEAL
    if not seal.is_file():
        return
    try:
        expected = json.loads(seal.read_text())
    except ValueError as error:
        raise CheckpointError(f"checkpoint file {seal} is damaged ({error}); {_REMEDY}") from error
    actual = _sizes(directory)
    for name, size in expected.items():
        if actual.get(name) != size:
            state = "missing" if name not in actual else f"{actual[name]} bytes long instead of {size}"
            raise CheckpointError(f"checkpoint {directory} is damaged: {directory / name} is {state}; {_REMEDY}")


def save_model(path: str | Path, model: Any, meta: Mapping[str, Any]) -> None:
    """Writes a model alone (the EMA weights, for inference) to `path`, atomically; waits until it is complete.

    `meta` should hold "config" and "step". A model that is already there is an error, never overwritten.
    """
    with Checkpointer(path, keep=1) as target:
        if target.latest_step() is not None:
            raise CheckpointError(f"{path} already holds a model; choose another path")
        target.save(int(meta.get("step", 0)), model, meta)


def load_model(
    path: str | Path, abstract: Any, *, config: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_model` wrote, as `Checkpointer.restore` does: (model, meta)."""
    with Checkpointer(path, read_only=True) as source:
        return source.restore(abstract, config=config)


def load_meta(path: str | Path) -> dict[str, Any]:
    """The JSON that `save_model` wrote: enough to build the abstract model that `load_model` asks for."""
    with Checkpointer(path, read_only=True) as source:
        return source.meta()
