"""Data, tokens and models of one run, recorded, encoded and trained as they are asked for, each once.

Of several processes all train, and the main one alone records and encodes.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console

from dreamer4_jax.config import Config, ConfigError, UserError, override
from dreamer4_jax.data.mixture import mix
from dreamer4_jax.data.source import convert_source, is_dataset, open_also
from dreamer4_jax.data.store import Dataset, open_dataset
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.envs.collect import check_config, collect
from dreamer4_jax.inference import finished_path, load_phase, read_config
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.parallel import MeshSpec, common_divisor, make_mesh, processes
from dreamer4_jax.parallel.bucket import on_disk
from dreamer4_jax.parallel.sharding import check_rows
from dreamer4_jax.presets import BASELINES
from dreamer4_jax.training.checkpoint import checksum
from dreamer4_jax.training.loop import model_path, open_run, run_phase
from dreamer4_jax.training.metrics import read_ledger, write_atomic
from dreamer4_jax.training.phases import AgentPhase, DynamicsPhase, ImaginationPhase, TokenizerPhase
from dreamer4_jax.world import perceptual
from dreamer4_jax.world.dynamics import Dynamics
from dreamer4_jax.world.tokenizer import Tokenizer

PHASES = ("tokenizer", "dynamics", "agent", "imagination")
NEEDS = {
    "dynamics": PHASES[:1],
    **dict.fromkeys(BASELINES, PHASES[:1]),
    "agent": PHASES[:2],
    "imagination": ("tokenizer", "agent"),
}


class Stages:
    """Recording, tokens and training of one config in one run directory. Each method is a stage that makes what it
    needs, or finds it.

    Args:
      config: the experiment.
      run_dir: made if missing; refused if it belongs to another config, or if it is in use and `resume` is False.
      data_dir: recorded dataset to use instead of recording one into the run directory.
      mesh: the devices to train on; by default as many as every phase's batch can be divided among. The results are
        the same on any, up to rounding.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        *,
        resume: bool = False,
        progress: bool = True,
        data_dir: str | Path | None = None,
        mesh: MeshSpec | None = None,
    ):
        self.config = config
        phases = [getattr(config.train, name) for name in PHASES]
        rows = [n for phase in phases for n in phase.rows]
        if mesh is None and jax.process_count() == 1:
            self.mesh = make_mesh(devices=jax.devices()[: common_divisor(rows, jax.device_count())])
        else:
            self.mesh = make_mesh(mesh)
        for name, phase in zip(PHASES, phases, strict=True):
            for n in phase.rows:
                check_rows(n, self.mesh, f"train.{name}: rows of a batch")
        self._models: dict[str, Any] = {}
        self._datasets: dict[str, Dataset] = {}
        # What can be known to be wrong is found before the run directory is made.
        if config.data.source and data_dir:
            raise UserError(f"--data {data_dir} and data.source = {config.data.source!r}: give one of them")
        if is_dataset(config.data.source):
            data_dir = config.data.source
        self._also = open_also(config)
        if data_dir:
            self._datasets["frames"] = self._mixed([open_dataset(data_dir, config), *self._also])
        elif not config.data.source and not (Path(run_dir) / "config.json").exists():
            check_config(config)
        if not (Path(run_dir) / "config.json").exists():
            perceptual.require(config.tokenizer.perceptual)
        self.dir = open_run(run_dir, config, resume)
        self.resume, self.progress = resume, progress and processes.is_main()
        with processes.main_first("recording"):
            self.raw_dir = self._recording(data_dir)
        self.console = Console(stderr=True)

    @classmethod
    def reopen(cls, directory: str | Path) -> Self:
        """An existing run, with the config it was made with."""
        path = on_disk(str(directory))
        return cls(read_config(path), path, resume=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Data

    def _recording(self, data_dir: str | Path | None) -> Path:
        """The recorded dataset of this run; one that was given from outside is noted, to be found again later."""
        own, note = self.dir / "data" / "frames", self.dir / "data.json"
        given = Path(data_dir).absolute() if data_dir else None
        if note.exists():
            noted = Path(json.loads(note.read_text())["directory"])
            if given is not None and given != noted:
                raise UserError(
                    f"--data {data_dir}: the run {self.dir} was made with {noted}; use that, or another run"
                )
            return noted
        if given is None or given == own.absolute():
            return own
        if own.exists():
            raise UserError(f"--data {data_dir}: the run {self.dir} has its own recording, {own}; choose another run")
        write_atomic(note, json.dumps({"directory": str(given)}))
        return given

    def collect(self) -> Dataset:
        """Records episodes with the scripted policies of the config, or converts its source, unless a dataset was
        given."""
        if "frames" not in self._datasets:
            if self.raw_dir == self.dir / "data" / "frames":
                with processes.main_first("collect"):
                    if processes.is_main():
                        with self._timed("collect"):
                            self._record()
            self._datasets["frames"] = self._mixed([open_dataset(self.raw_dir, self.config), *self._also])
        return self._datasets["frames"]

    def _mixed(self, datasets: Sequence[Dataset]) -> Dataset:
        """The run's own dataset, and those that the config adds to it."""
        return mix(datasets, self.config.data.weights) if len(datasets) > 1 else datasets[0]

    def _record(self) -> None:
        if self.config.data.source:
            convert_source(self.config, self.raw_dir, progress=self.progress)
        else:
            collect(self.config, self.raw_dir, seed=self.config.seed, progress=self.progress)

    def tokens(self) -> Dataset:
        """Encodes every frame once with the trained tokenizer."""
        if "latents" not in self._datasets:
            tokenizer = self.model("tokenizer")
            self.collect()
            identity, out = checksum(tokenizer), self.dir / "data" / "tokens"
            raw = [self.raw_dir, *(data.directory for data in self._also)]
            outs = [out.with_name(f"tokens-{i}") if i else out for i in range(len(raw))]
            with processes.main_first("tokens"):
                if processes.is_main():
                    with self._timed("tokens"):
                        for frames, tokens in zip(raw, outs, strict=True):
                            encode_dataset(tokenizer, frames, tokens, progress=self.progress)
            self._datasets["latents"] = self._mixed([open_dataset(o, self.config, identity=identity) for o in outs])
        return self._datasets["latents"]

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def train(self, name: str) -> Any:
        """Trains one phase (or finds it finished) and returns its EMA model."""
        if name not in self._models:
            require_models(self.dir, name)
            self._models[name] = self._trained(self._phase(name))
        return self._models[name]

    def variant(self, name: str, overrides: Mapping[str, Any]) -> Dynamics:
        """A dynamics model beside the run's own, trained as phase 1b is and on the same tokens, from a config that
        differs in `overrides`: fields of `dynamics` and `train.dynamics`, `data.labelled`, `data.labelled_levels`, and
        the seed. Kept under checkpoints/<name>.

        Raises:
          ConfigError: a field of something else, on which the tokens may depend.
        """
        for field in overrides:
            if not field.startswith(("dynamics.", "train.dynamics.", "data.labelled")) and field != "seed":
                raise ConfigError(
                    f"variant {name!r}: {field} is none of dynamics.*, train.dynamics.*, data.labelled* and seed"
                )
        if name in (*PHASES, *BASELINES):
            raise ConfigError(f"variant {name!r}: is a phase of the run itself; choose another name")
        if name not in self._models:
            phase = DynamicsPhase(override(self.config, dict(overrides)), self.tokens(), name=name)
            self._models[name] = self._trained(phase)
        return self._models[name]

    def _trained(self, phase: Any) -> Any:
        result = run_phase(
            phase,
            config=phase.full,
            run_dir=self.dir,
            seed=phase.full.seed,
            resume=self.resume or model_path(self.dir, phase.name).is_dir(),
            progress=self.progress,
            mesh=self.mesh,
        )
        # Where the models are evaluated, and where later phases take them from.
        return processes.whole(result.ema, self.mesh)

    def _phase(self, name: str) -> Any:
        if name == "tokenizer":
            return TokenizerPhase(self.config, self.collect())
        if name == "dynamics":
            return DynamicsPhase(self.config, self.tokens())
        if name in BASELINES:
            return DynamicsPhase(override(self.config, BASELINES[name].fields), self.tokens(), name=name)
        if name == "agent":
            return AgentPhase(self.config, self.tokens(), self.model("dynamics"))
        if name == "imagination":
            return ImaginationPhase(self.config, self.tokens(), self.model("agent"))
        raise UserError(f"unknown phase {name!r}: choose one of {', '.join(PHASES)}")

    def model(self, name: str) -> Any:
        """The EMA model of a finished phase."""
        if name not in self._models:
            self._models[name] = load_phase(self.dir, self.config, name)
        return self._models[name]

    # -----------------------------------------------------------------------------------------------------------------
    # Costs

    def _timed(self, stage: str) -> "_Stage":
        return _Stage(self.dir / "stages.json", stage)

    def costs(self) -> dict[str, float]:
        """Seconds of every stage and phase, all resumes together."""
        path = self.dir / "stages.json"
        stages = json.loads(path.read_text()) if path.exists() else {}
        return stages | {name: sum(entry.values()) for name, entry in read_ledger(self.dir).items()}


class _Stage:
    """Adds the seconds of a block to a JSON of stages."""

    def __init__(self, path: Path, name: str):
        self._path, self._name, self._began = path, name, 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and issubclass(kind, UserError):
            return  # a refusal costs nothing, and leaves no file
        costs = json.loads(self._path.read_text()) if self._path.exists() else {}
        costs[self._name] = costs.get(self._name, 0.0) + time.perf_counter() - self._began
        write_atomic(self._path, json.dumps(costs))


def encode_dataset(tokenizer: Tokenizer, raw: Path, out: Path, *, progress: bool) -> dict[str, Any]:
    """Encodes every frame of a dataset once (`data.tokens`); returns the manifest."""
    size, wanted = open_dataset(raw).spec.size, (tokenizer.cfg.height, tokenizer.cfg.width)
    if size != wanted:
        raise UserError(f"dataset {raw} holds frames of {size[0]} x {size[1]}, the tokenizer takes {wanted}")
    encode = jax.jit(lambda m, x, first: m.encode(x, segments=first_of_segment(first)))
    return write_tokens(
        raw, out, lambda x, first: encode(tokenizer, x, first), identity=checksum(tokenizer), progress=progress
    )


def require_models(run_dir: Path, phase: str) -> None:
    """Raises `CheckpointError` if a phase that `phase` builds on is not finished in the run directory."""
    for name in NEEDS.get(phase, ()):
        finished_path(run_dir, name)
