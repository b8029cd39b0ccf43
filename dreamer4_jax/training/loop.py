"""The training loop, one for every phase: resumable, interruptible, and it never keeps a bad update.

Everything random or ordered in a phase is a function of (config, seed, step): the step's key, its batch, its
schedule. So a run that was interrupted and resumed is bit for bit the run that was not.
"""

import json
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamer4_jax.config import Config, ConfigError, UserError, complete, to_dict
from dreamer4_jax.parallel import processes
from dreamer4_jax.parallel.mesh import make_mesh
from dreamer4_jax.parallel.sharding import Rules, batch_shardings, check_rows
from dreamer4_jax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    first_difference,
    load_model,
    save_model,
)
from dreamer4_jax.training.exclusive import exclusive
from dreamer4_jax.training.interruption import Interrupted, Stop
from dreamer4_jax.training.metrics import EVAL, TIME, Ledger, MetricsWriter, NoWriter, ProgressBar, write_atomic
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.state import Batch, Metrics, Phase, TrainState, abstract_state, init_state, make_train_step

MAX_SHAPES = 2  # short and long batches; each shape compiles its own step


class DivergenceError(UserError):
    """A loss, gradient or parameter became NaN or infinite. No checkpoint holds that update."""


@dataclass(frozen=True)
class PhaseResult:
    """What a phase leaves behind. `state` is None if the phase had been finished by an earlier process."""

    ema: Any
    steps: int
    seconds: float  # of wall-clock, all resumes together
    finished: bool
    evaluation: dict[str, float] = field(default_factory=dict)
    state: TrainState | None = None


def model_path(run_dir: str | Path, phase: str) -> Path:
    """Where a finished phase leaves its EMA model, for `checkpoint.load_model`."""
    return Path(run_dir) / "checkpoints" / phase / "model"


def steps_path(run_dir: str | Path, phase: str) -> Path:
    """Where a phase keeps its training state, for `checkpoint.Checkpointer`."""
    return Path(run_dir) / "checkpoints" / phase / "steps"


def open_run(run_dir: str | Path, config: Config, resume: bool = False) -> Path:
    """Makes a run directory, or checks that an existing one belongs to `config`; overwrites nothing.

    With `resume`, a directory that is new or empty is a run that starts now, so that a job which is restarted
    whenever it is preempted needs one command only. The launcher's `logs` may be there before the run is.
    """
    with processes.main_first("open_run"):
        # To the other processes a run that begins looks like one that is resumed.
        return _open_run(run_dir, config, resume or not processes.is_main())


def _open_run(run_dir: str | Path, config: Config, resume: bool) -> Path:
    path, text = Path(run_dir), json.dumps(to_dict(config), indent=2) + "\n"
    if path.exists() and not path.is_dir():
        raise UserError(f"run directory {path}: is a file; choose another path")
    recorded = path / "config.json"
    # Of a process that was killed at this place, a draft may be left.
    draft = recorded.name + ".part"
    if not path.is_dir() or all(entry.name in ("logs", draft) for entry in path.iterdir()):
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(recorded, text)
        except OSError as error:
            raise UserError(f"run directory {path}: cannot be written ({error.strerror}); choose another") from error
        return path
    if not recorded.exists():
        raise UserError(f"run directory {path}: not empty, and no run (no config.json); choose another path")
    try:
        theirs = complete(json.loads(recorded.read_text()))
    except ValueError as error:
        raise UserError(f"{recorded}: damaged ({error}); restore it or choose another run directory") from error
    if found := first_difference(theirs, to_dict(config)):
        name, there, here = found
        raise UserError(
            f"run directory {path} belongs to another config: {name} is {there!r} there and {here!r} here; "
            "choose another run directory, or the config it was made with"
        )
    if not resume:
        raise UserError(f"run directory {path}: holds a run already; add --resume to go on with it, or choose another")
    return path


def _signature(batch: Batch) -> tuple:
    return tuple((jax.tree_util.keystr(p), np.shape(x), np.result_type(x).str) for p, x in _paths(batch))


def _paths(batch: Batch) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(batch)[0]


def _frames(batch: Batch) -> int:
    """B * T: leaves are [B, T, ...], save a few that are [B]."""
    return max(int(np.prod(np.shape(x)[:2])) for x in jax.tree.leaves(batch))


def _check(cfg: Any, at: str) -> None:
    for name in ("steps", "log_every", "save_every"):
        if getattr(cfg, name) < 1:
            raise ConfigError(f"{at}.{name} = {getattr(cfg, name)!r}: must be at least 1")
    if not cfg.lr > 0:
        raise ConfigError(f"{at}.lr = {cfg.lr!r}: must be positive")


class _Run:
    """The moving parts of one `run_phase` call."""

    def __init__(self, phase: Phase, config: Config, run_dir: Path, seed: int, mesh: Mesh, rules: Rules):
        self.phase, self.cfg, self.config = phase, phase.config, to_dict(config)
        self.run_dir, self.optimizer = run_dir, make_optimizer(phase.config)
        self.mesh, self.rules = mesh, rules
        self.ledger = Ledger(run_dir, phase.name)
        self.checkpoints = Checkpointer(steps_path(run_dir, phase.name))
        phase_key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(phase.name.encode()))
        self.init_key, run_key = jax.random.split(phase_key)
        self.run_key = processes.spread(run_key, NamedSharding(mesh, PartitionSpec()))
        self.shapes: set[tuple] = set()
        self.part = processes.part(mesh)
        self.stops = processes.Agreement(mesh)

    @cached_property
    def frozen(self) -> Any:
        """What the loss reads and nothing trains, on the devices; a phase that is finished does not ask for it."""
        frozen = self.phase.frozen  # once: a property may make it anew, or hold NumPy arrays
        return processes.spread(frozen, self.rules.shardings(frozen, self.mesh))

    def start(self, at: int | None) -> TrainState:
        """The restored state of step `at`, or a new one; and the step that updates it."""
        with self.ledger.time("setup"):
            abstract = abstract_state(self.phase, self.optimizer)
            shardings = self.rules.shardings(abstract, self.mesh)
            self.train_step = make_train_step(self.phase, self.optimizer, shardings)
            if at is None:
                # Born where it stays: no device ever holds the whole of a state that is split.
                base = self.phase.start_from
                base = processes.spread(base, self.rules.shardings(base, self.mesh))
                make = jax.jit(partial(init_state, self.phase, self.optimizer), out_shardings=shardings)
                return make(processes.spread(self.init_key, NamedSharding(self.mesh, PartitionSpec())), base)
            placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
            state, meta = self.checkpoints.restore(placed, step=at, config=self.config)
            if meta.get("frozen", "") != self.phase.identity:
                raise CheckpointError(
                    f"checkpoint {self.checkpoints.path(at)} was trained with other frozen weights: "
                    f"{meta.get('frozen') or 'none'} there and {self.phase.identity or 'none'} here; restore those, or "
                    "choose another run directory"
                )
            return state

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Dispatches one update; returns before it is computed."""
        signature = _signature(batch)
        new = signature not in self.shapes
        if new and len(self.shapes) == MAX_SHAPES:
            raise ValueError(
                f"phase {self.phase.name}: a third shape of batches, which would compile the step again; at most "
                f"{MAX_SHAPES} (short and long) are foreseen: {signature}"
            )
        self.shapes.add(signature)
        on_devices = processes.place(batch, batch_shardings(batch, self.mesh, self.part[1]))
        # Once compiled, a step must not move anything between host and device behind our back.
        guard = nullcontext() if new else jax.transfer_guard("disallow")
        with self.ledger.time("compile" if new else "train"), guard, jax.set_mesh(self.mesh):
            return self.train_step(state, self.frozen, on_devices, self.run_key)

    def save(self, state: TrainState, step: int) -> Path:
        """Starts a checkpoint of a state that is known to be finite."""
        with self.ledger.time("save"):
            meta = {"config": self.config, "phase": self.phase.name, "seconds": round(self.ledger.total, 3)}
            meta["frozen"] = self.phase.identity
            self.checkpoints.save(step, state, meta)
        self.save_ledger()
        return self.checkpoints.path(step)

    def save_ledger(self) -> None:
        """Of the main process: the others spend their time with it."""
        if processes.is_main():
            self.ledger.save()

    def require_finite(self, step: int, metrics: Metrics) -> None:
        """Waits for the update that makes `step`, and raises if it was not applied."""
        if bool(jax.device_get(metrics["finite"])):
            return
        values = {name: float(v) for name, v in jax.device_get(metrics).items() if name != "finite"}
        terms = [f"{n.removeprefix('loss/')} = {v}" for n, v in values.items() if n.startswith("loss/")]
        bad = [t for t in terms if t.endswith(("nan", "inf"))]
        self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        kept = (
            f"the last good checkpoint is {self.checkpoints.path(last)}"
            if last is not None
            else "no checkpoint was saved yet"
        )
        what = f"loss terms {', '.join(bad)}" if bad else f"gradient norm {values['grad_norm']}, or the new parameters"
        raise DivergenceError(
            f"{self.phase.name}: not finite at step {step}: {what} (all terms: {', '.join(terms)}). The update was "
            f"not applied; {kept}. Try a lower train.{self.phase.name}.lr (now {self.cfg.lr}) or "
            f"train.{self.phase.name}.clip (now {self.cfg.clip})"
        )


def run_phase(
    phase: Phase,
    *,
    config: Config,
    run_dir: str | Path,
    seed: int,
    resume: bool = False,
    progress: bool = True,
    stop_after: int | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> PhaseResult:
    """Trains `phase` to its last step, or finds that it is finished, and returns the EMA model.

    Args:
      config: the whole config of the run; recorded in every checkpoint and compared on resume.
      run_dir: as `open_run` returned it.
      seed: of initialisation and of every step's key.
      resume: go on from the phase's newest checkpoint if there is one; a finished phase is not run again.
      progress: show a progress bar (on a terminal only).
      stop_after: save and return once this many steps are made, ``finished`` being False if more are left.
      mesh: the devices to train on (by default the first one alone, or all if there are several processes). The
        result is the same on any, up to rounding.
      rules: how parameters are split over the mesh.

    Raises:
      Interrupted: after SIGTERM or Ctrl-C, everything saved.
      DivergenceError: NaN or infinity; the last good checkpoint is named and intact.
      CheckpointError: a checkpoint is damaged or of another config, or there is one and `resume` is False.
      UserError: another process trains in the directory, or the disk is full.
    """
    run_dir = Path(run_dir)
    _check(phase.config, f"train.{phase.name}")
    if mesh is None:
        mesh = make_mesh(devices=jax.devices() if jax.process_count() > 1 else jax.local_devices()[:1])
    for rows in phase.config.rows:
        check_rows(rows, mesh, f"train.{phase.name}: rows of a batch")
    exported = model_path(run_dir, phase.name)
    with Checkpointer(exported, read_only=True) as reader:
        finished = reader.latest_step() is not None
    # What is finished may be read by many.
    with exclusive(run_dir) if processes.is_main() and not finished else nullcontext():
        run = _Run(phase, config, run_dir, seed, mesh, rules or Rules())
        at = run.checkpoints.latest_step()
        if (finished or at is not None) and not resume:
            raise CheckpointError(f"{exported.parent} holds checkpoints already; add --resume to go on with them")
        if finished:
            ema, meta = load_model(exported, jax.eval_shape(phase.init, run.init_key), config=run.config)
            return PhaseResult(ema, meta["step"], run.ledger.total, True, meta["evaluation"])
        last = min(phase.config.steps, stop_after if stop_after is not None else phase.config.steps)
        try:
            with Stop() as stop, run.checkpoints:
                return _train(run, at, last, stop, progress)
        finally:
            run.save_ledger()


def _train(run: _Run, at: int | None, last: int, stop: Stop, progress: bool) -> PhaseResult:
    """Steps `at` to `last`. The metrics of a step are read while the next one is being computed."""
    phase, cfg, ledger, done = run.phase, run.cfg, run.ledger, at or 0
    batches = phase.batches(done, run.part)
    try:
        if done < last:  # a phase may lack its evaluation alone
            with ledger.time("data"):
                batch = _next(phase, batches, done)
        state = run.start(at)
        main = processes.is_main()
        with (
            MetricsWriter(run.run_dir, phase.name, done) if main else NoWriter() as writer,
            ProgressBar(phase.name, cfg.steps, done, progress and main) as bar,
        ):
            ledger.add("lost", writer.lost_s)
            report = _Reporter(run, writer, bar)
            pending: tuple[int, Metrics, int] | None = None
            # Any process may be told to stop; all have to do it at the same step.
            stopping = run.stops.soon(stop.requested)
            saved = at
            while done < last and not stopping:
                state, metrics = run.step(state, batch)
                done += 1
                late, pending = pending, (done, metrics, _frames(batch))
                if done < last:
                    with ledger.time("data"):
                        batch = _next(phase, batches, done)
                if late:
                    report(*late)
                stopping = run.stops.soon(stop.requested)
                if done % cfg.save_every == 0:
                    report(*pending)
                    pending, saved = None, done
                    run.save(state, done)
            if pending:
                report(*pending)
            if saved != done:
                run.save(state, done)
            run.checkpoints.wait()
            stop.requested = run.stops.now(stop.requested)
            stop.from_now(Interrupted(phase.name, done, run.checkpoints.path(done)))
            if done < cfg.steps:
                return PhaseResult(state.ema, done, ledger.total, False, {}, state)
            return _finish(run, state, writer)
    finally:
        # Pipelines with worker threads and generators have a close; plain iterators need none.
        if callable(close := getattr(batches, "close", None)):
            close()


def _next(phase: Phase, batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(f"{phase.name}: the data ended before step {step} of {phase.config.steps}") from None


class _Reporter:
    """Called once per step, one step late: checks that it was finite, and logs it if it is due."""

    def __init__(self, run: _Run, writer: MetricsWriter | NoWriter, bar: ProgressBar):
        self.run, self.writer, self.bar = run, writer, bar
        self._frames, self._steps = 0, 0
        self._since, self._waited = time.perf_counter(), run.ledger.seconds.get("data", 0.0)

    def __call__(self, step: int, metrics: Metrics, frames: int) -> None:
        with self.run.ledger.time("train"):
            self.run.require_finite(step, metrics)
        self._steps, self._frames = self._steps + 1, self._frames + frames
        cfg = self.run.cfg
        if step == 1 or step % cfg.log_every == 0 or step == cfg.steps:
            values = {k: v for k, v in jax.device_get(metrics).items() if k != "finite"}
            speed = self._speed()
            self.writer.write(step, values | speed)
            rates = f"{speed[TIME + 'steps_per_s']:.3g} steps/s  {speed[TIME + 'frames_per_s']:.3g} frames/s"
            self.bar.update(step, f"loss {float(values['loss']):.4g}  {rates}")
        else:
            self.bar.update(step)

    def _speed(self) -> dict[str, float]:
        """Since the last logged step: steps and frames a second, and the share of the time spent waiting for data."""
        now, waited = time.perf_counter(), self.run.ledger.seconds.get("data", 0.0)
        seconds = max(now - self._since, 1e-9)
        values = {
            TIME + "steps_per_s": self._steps / seconds,
            TIME + "frames_per_s": self._frames / seconds,
            TIME + "data_wait": (waited - self._waited) / seconds,
        }
        self._since, self._waited, self._steps, self._frames = now, waited, 0, 0
        return values


def _finish(run: _Run, state: TrainState, writer: MetricsWriter | NoWriter) -> PhaseResult:
    """Scores the EMA model and exports it. The export comes last: it marks the phase as finished."""
    phase, steps = run.phase, run.cfg.steps
    with run.ledger.time("evaluate"):
        scores = {name: float(value) for name, value in phase.evaluate(state.ema, steps).items()}
    if scores:
        writer.write(steps, {EVAL + name: value for name, value in scores.items()})
    with run.ledger.time("save"):
        run.checkpoints.wait()
        meta = {"config": run.config, "phase": phase.name, "step": steps, "evaluation": scores}
        meta["frozen"] = phase.identity
        save_model(model_path(run.run_dir, phase.name), state.ema, meta)
    run.save_ledger()
    return PhaseResult(state.ema, steps, run.ledger.total, True, scores, state)
