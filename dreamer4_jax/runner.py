"""An experiment from recording to report: all phases of one config in one run directory, each stage resumable.

A run directory holds config.json, metrics.jsonl, tb/, checkpoints/<phase>/, data/ (recorded frames and their tokens),
evaluation/ (one JSON per policy and measurement), media, results.json and report.html. Every stage is skipped if its
result is already complete, so running the same command again with --resume goes on where the last one stopped.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dreamer4_jax.agent.heads import PolicyHead
from dreamer4_jax.agent.model import WorldModelPolicy
from dreamer4_jax.config import Config, ConfigError, UserError, override
from dreamer4_jax.data.labels import labels_of
from dreamer4_jax.data.mixture import mix
from dreamer4_jax.data.pipeline import Loader
from dreamer4_jax.data.source import (
    convert_source,
    is_dataset,
    labelled_part,
    missing_labels,
    open_also,
    skipped_episodes,
)
from dreamer4_jax.data.store import Dataset, open_dataset
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.envs.collect import DataPolicy, check_config, collect
from dreamer4_jax.envs.kinds import make
from dreamer4_jax.envs.minerl import HostedGame
from dreamer4_jax.evaluation import media
from dreamer4_jax.evaluation.blind import BlindPolicy, train_blind
from dreamer4_jax.evaluation.closed_loop import EvalResult, RandomPolicy, evaluate_policy
from dreamer4_jax.evaluation.minecraft import evaluate_minecraft, recorded_fit, to_text
from dreamer4_jax.evaluation.rollouts import HeldOut, clip_starts, imagine_clips, reconstruction, step_count, to_uint8
from dreamer4_jax.evaluation.summary import write_report
from dreamer4_jax.inference import finished_path, load_phase, read_config
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.parallel import MeshSpec, common_divisor, make_mesh, processes
from dreamer4_jax.parallel.bucket import on_disk
from dreamer4_jax.parallel.sharding import check_rows
from dreamer4_jax.training.checkpoint import checksum
from dreamer4_jax.training.loop import model_path, open_run, run_phase
from dreamer4_jax.training.metrics import read_ledger, write_atomic
from dreamer4_jax.training.phases import AgentPhase, DynamicsPhase, ImaginationPhase, TokenizerPhase
from dreamer4_jax.world import perceptual
from dreamer4_jax.world.dynamics import Dynamics
from dreamer4_jax.world.tokenizer import Tokenizer

PHASES = ("tokenizer", "dynamics", "agent", "imagination")
NEEDS = {"dynamics": PHASES[:1], "diffusion": PHASES[:1], "agent": PHASES[:2], "imagination": ("tokenizer", "agent")}


class Run:
    """One run of one config. Each method is a stage that needs the ones before it.

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
    def reopen(cls, directory: str | Path) -> "Run":
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
        if name in (*PHASES, "diffusion"):
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
        if name == "diffusion":
            plain = override(self.config, {"dynamics.objective": "diffusion"})
            return DynamicsPhase(plain, self.tokens(), name="diffusion")
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
    # Evaluation

    def held_out(self) -> HeldOut:
        """Held-out clips: frames, actions and their tokens, each inside one episode."""
        tokens = self.tokens()
        return HeldOut.sample(self.config, self.collect(), tokens, seed=self.config.seed)

    def evaluate_world_model(self) -> dict[str, Any]:
        """Reconstruction, imagined clips at the true and at shuffled actions, accuracy against step count."""

        def measure() -> dict[str, Any]:
            held, tokenizer = self.held_out(), self.model("tokenizer")
            models = {"shortcut forcing": self.model("dynamics")}
            if self.config.evaluate.diffusion_baseline:
                models["diffusion forcing"] = self.model("diffusion")
            tuned = self.model("agent").dynamics if model_path(self.dir, "agent").is_dir() else None
            networks = perceptual.measures(self.config.tokenizer.perceptual)
            pictures = reconstruction(tokenizer, held, networks)
            clips = step_count(self.config, models, tokenizer, held, finetuned=tuned)
            arrays = {f"reconstruction_{k}": v for k, v in pictures.pop("shown").items()}
            arrays |= {f"clip_{k}": v for k, v in clips.pop("shown").items()}
            return {"reconstruction": pictures, **clips, "arrays": arrays}

        return self._measured("world_model", measure)

    def policies(self) -> dict[str, Callable[[], Any]]:
        """Every policy of the closed-loop table, by name; made when asked for."""
        c, seed = self.config, self.config.seed
        if c.env.kind == "none":
            return {}
        return {
            "random": lambda: RandomPolicy(c.actions, seed=seed),
            "data": lambda: DataPolicy(c),
            "blind": self._blind,
            **self.trained_policies(),
        }

    def trained_policies(self) -> dict[str, Callable[[], Any]]:
        """Those of them that phases 2 and 3 train."""
        seed = self.config.seed

        def world_model(name: str, policy: Callable[[], PolicyHead], greedy: bool) -> Callable[[], Any]:
            return lambda: WorldModelPolicy(
                self.model("tokenizer"), self.model("agent").dynamics, policy(), seed=seed, greedy=greedy, name=name
            )

        def cloned() -> PolicyHead:
            return self.model("agent").policy

        def imagined() -> PolicyHead:
            return self.model("imagination").policy

        return {
            "phase 2 (cloning)": world_model("phase 2 (cloning)", cloned, False),
            "phase 2, greedy": world_model("phase 2, greedy", cloned, True),
            "phase 3 (imagination)": world_model("phase 3 (imagination)", imagined, False),
            "phase 3, greedy": world_model("phase 3, greedy", imagined, True),
        }

    def _blind(self) -> BlindPolicy:
        c = self.config
        loader = Loader(
            self.tokens(),
            batch=32,
            length=c.train.agent.length,
            relevant_fraction=c.agent.relevant_fraction,
            labels=labels_of(c, self.tokens()),
            seed=c.seed,
        )
        model = train_blind(loader.iterate(), c.actions, vocab=c.agent.task_vocab, seed=c.seed)
        return BlindPolicy(model, seed=c.seed, name="blind")

    def make_env(self, level: str) -> Any:
        c = self.config
        if c.env.kind == "none":
            raise UserError(f"{self.dir}: was trained on {c.data.source}; there is no environment to play in")
        return make(c.env, level, height=c.tokenizer.height, width=c.tokenizer.width, words=c.agent.task_words)

    def evaluate_policy(self, name: str, *, levels: Sequence[str] = ()) -> EvalResult:
        """Plays one policy's episodes in the real environment, or reads what an earlier call measured.

        Args:
          levels: other levels than the config's, e.g. ones that were held out; nothing of these is kept.
        """
        path = self._result_path(name)
        if not levels and path.exists():
            return EvalResult.from_json(json.loads(path.read_text()))
        c = self.config.evaluate
        with self._timed("evaluate"):
            policy = self.policies()[name]()  # a missing model is found before a bar is shown
            with self._bar(f"playing {name}", c.episodes) as advance:
                result = evaluate_policy(
                    policy,
                    self.make_env,
                    levels or self.config.env.levels,
                    episodes=c.episodes,
                    envs=c.envs,
                    seed=self.config.seed + 1_000_003,
                    progress=advance,
                )
        if not levels:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(result.to_json()))
        return result

    def evaluate_minecraft(
        self, names: Sequence[str], *, python: str, episodes: int, streams: int, minutes: float
    ) -> list[dict[str, Any]]:
        """Plays in MineRL's Minecraft; the results go to evaluation/minecraft.json.

        Args:
          names: of `trained_policies`; none: those of phases 2 and 3, sampled, as far as they are trained.
          python: the one that has MineRL.
        """
        if not minutes > 0:
            raise UserError(f"--minutes {minutes}: must be above 0")
        known = self.trained_policies()
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"unknown policy {unknown[0]!r}: choose from {', '.join(map(repr, known))}")
        fit = recorded_fit(self.config, self.raw_dir)
        HostedGame(python).close()  # whether there is a game is better known before models are loaded
        if not names:
            phases = {"agent": "phase 2 (cloning)", "imagination": "phase 3 (imagination)"}
            names = [name for phase, name in phases.items() if model_path(self.dir, phase).is_dir()]
            finished_path(self.dir, "agent")
        results = []
        for name in names:
            policy = known[name]()
            with self._bar(f"playing {name}", episodes) as advance:
                results.append(
                    evaluate_minecraft(
                        policy,
                        lambda: HostedGame(python),
                        fit,
                        episodes=episodes,
                        streams=streams,
                        minutes=minutes,
                        seed=self.config.seed + 1_000_003,
                        progress=advance,
                    )
                )
        (self.dir / "evaluation").mkdir(exist_ok=True)
        write_atomic(self.dir / "evaluation" / "minecraft.json", to_text(results))
        return results

    def generate(self, out: Path, *, steps: int, clips: int) -> None:
        """Writes held-out clips, real beside imagined at the true actions, as one animated picture."""
        k_max = self.config.dynamics.k_max
        if steps < 1 or steps & (steps - 1) or steps > k_max:
            raise UserError(f"--steps {steps}: must be a power of two up to dynamics.k_max = {k_max}")
        held = self.held_out()
        if not 1 <= clips <= len(held.frames):
            raise UserError(f"--clips {clips}: must be from 1 to evaluate.clips = {len(held.frames)}")
        video = to_uint8(imagine_clips(self.model("dynamics"), self.model("tokenizer"), held, steps, self.config.seed))
        real = held.frames[:clips]
        dream = np.concatenate([real[:, : held.context], video[:clips]], axis=1)
        # Clips below each other: [n, T, H, W, 3] -> [T, n H, W, 3].
        panels = {
            name: np.concatenate(list(x), axis=1) for name, x in (("real", real), (f"imagined, K = {steps}", dream))
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(media.video(panels, context=held.context, form="gif" if out.suffix == ".gif" else "webp"))

    # -----------------------------------------------------------------------------------------------------------------
    # Everything

    def all(self) -> dict[str, Any]:
        """Every stage, then the report. Returns the results that the report shows.

        Of several processes all train, and the main one alone records, encodes and evaluates.
        """
        began = time.perf_counter()
        obstacle = self.obstacle()
        for name in PHASES[:2] if obstacle else PHASES:
            self._say(f"{name}: {getattr(self.config.train, name).steps} steps")
            self.train(name)
        if obstacle:
            self._say(f"agent and imagination are skipped: {obstacle}")
        if self.config.evaluate.diffusion_baseline:
            self._say("diffusion-forcing baseline")
            self.train("diffusion")
        data = self._evaluate() if processes.is_main() else {}
        processes.barrier("evaluated")
        if self.progress:
            self.console.print(_target_table(data["targets"]))
        self._say(f"finished in {(time.perf_counter() - began) / 60:.1f} minutes: {self.dir / 'report.html'}")
        return data

    def _evaluate(self) -> dict[str, Any]:
        self._say("evaluating the world model")
        self.evaluate_world_model()
        for name in self.policies():
            self.evaluate_policy(name)
        return self.report()

    def obstacle(self) -> str:
        """Why phases 2 and 3 cannot be trained on the run's source, and "" where they can."""
        if self.config.data.labelled == 0:
            return "data.labelled = 0: no actions are known"
        if self.config.env.kind != "none":
            return ""
        frames = self.collect()
        clip_starts(self.config, frames)  # whether it can be evaluated is better known before it is trained
        return missing_labels(frames)

    def report(self) -> dict[str, Any]:
        """Writes report.html and results.json from whatever the run has so far."""
        return write_report(
            self.dir,
            self.config,
            world_model=self.evaluate_world_model()
            if (self.dir / "evaluation" / "world_model.json").exists()
            else None,
            results=self._played(),
            costs=self.costs(),
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        """What people must know of a run on data of their own."""
        if not is_dataset(str(self.raw_dir)):
            return []
        labelled = labelled_part(self.config, self.collect())
        if self.config.env.kind != "none":
            return labelled
        reason = missing_labels(self.collect())
        played = "There is no environment to play in, so nothing was measured in closed loop."
        skipped = f"Phases 2 and 3 are skipped: {reason}." if reason else played
        return [skipped, *labelled, *skipped_episodes(self.collect())]

    def _played(self) -> list[EvalResult]:
        """Results of the policies that have been played, in the order of the table."""
        return [self.evaluate_policy(name) for name in self.policies() if self._result_path(name).exists()]

    def _result_path(self, name: str) -> Path:
        return self.dir / "evaluation" / f"{name.replace(' ', '_').replace(',', '')}.json"

    # -----------------------------------------------------------------------------------------------------------------
    # Helpers

    @contextmanager
    def _bar(self, text: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A progress bar with rate and time left; yields its callback (done, total)."""
        columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.progress) as bar:
            task = bar.add_task(text, total=total)
            yield lambda done, total: bar.update(task, completed=done)

    def _say(self, text: str) -> None:
        if self.progress:
            self.console.print(f"[bold]{text}[/bold]")

    def _measured(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs a measurement once and keeps it: JSON beside an npz of its arrays."""
        path, arrays = self.dir / "evaluation" / f"{name}.json", self.dir / "evaluation" / f"{name}.npz"
        if path.exists():
            out = json.loads(path.read_text())
            with np.load(arrays) as stored:
                out["arrays"] = dict(stored)
            return out
        with self._timed(f"evaluate_{name}"):
            out = measure()
        path.parent.mkdir(exist_ok=True)
        kept = out.pop("arrays")
        np.savez_compressed(arrays, **kept)
        write_atomic(path, json.dumps(out))
        return out | {"arrays": kept}

    def _timed(self, stage: str) -> "_Stage":
        return _Stage(self.dir / "stages.json", stage)

    def costs(self) -> dict[str, float]:
        """Seconds of every stage and phase, all resumes together."""
        path = self.dir / "stages.json"
        stages = json.loads(path.read_text()) if path.exists() else {}
        return stages | {name: sum(entry.values()) for name, entry in read_ledger(self.dir).items()}


def _target_table(targets: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="targets")
    for head in ("", "target", "wanted", "measured"):
        table.add_column(head)
    for t in targets:
        table.add_row("met" if t["passed"] else "missed", t["name"], t["target"], str(t["value"]))
    return table


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
