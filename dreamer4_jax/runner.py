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

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dreamer4_jax.agent.heads import PolicyHead
from dreamer4_jax.agent.model import WorldModelPolicy
from dreamer4_jax.config import UserError
from dreamer4_jax.data.labels import labels_of
from dreamer4_jax.data.pipeline import Loader
from dreamer4_jax.data.source import (
    is_dataset,
    labelled_part,
    missing_labels,
    skipped_episodes,
)
from dreamer4_jax.envs.collect import DataPolicy
from dreamer4_jax.envs.kinds import make
from dreamer4_jax.envs.minerl import HostedGame
from dreamer4_jax.evaluation import media
from dreamer4_jax.evaluation.blind import BlindPolicy, train_blind
from dreamer4_jax.evaluation.closed_loop import EvalResult, RandomPolicy, evaluate_policy
from dreamer4_jax.evaluation.minecraft import evaluate_minecraft, recorded_fit, to_text
from dreamer4_jax.evaluation.rollouts import HeldOut, clip_starts, imagine_clips, reconstruction, step_count, to_uint8
from dreamer4_jax.evaluation.summary import machine, write_report
from dreamer4_jax.inference import finished_path
from dreamer4_jax.parallel import processes
from dreamer4_jax.presets import BASELINES
from dreamer4_jax.stages import PHASES, Stages
from dreamer4_jax.training.loop import model_path
from dreamer4_jax.training.metrics import write_atomic
from dreamer4_jax.world import perceptual


class Run(Stages):
    """One run of one config, from recording to report."""

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
                models |= {other.title: self.model(name) for name, other in BASELINES.items()}
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
            for name, other in BASELINES.items():
                self._say(f"baseline: {other.title}")
                self.train(name)
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
        """Why phases 2 and 3 cannot be trained on the run's source, and "" where they can.

        What could not be evaluated, or trained later on, is refused: it is better known before anything is trained.
        """
        c, frames = self.config, self.collect()
        clip_starts(c, frames)
        if c.data.labelled == 0:
            return "data.labelled = 0: no actions are known"
        if c.env.kind == "none" and (lack := missing_labels(frames)):
            return lack
        for phase in (c.train.agent, c.train.imagination):
            share = c.agent.relevant_fraction
            Loader(frames, batch=phase.batch, length=phase.length, relevant_fraction=share, seed=c.seed)
        return ""

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

    def keep(self, out: Path, command: str) -> dict[str, Any]:
        """Writes the report, and what is worth keeping of an evaluated run: seed<N>.json, the numbers, and imagined
        clips, seed<N>.png and .webp. `command` says how it was made. Returns the numbers."""
        if not (self.dir / "evaluation" / "world_model.json").exists():
            raise UserError(f"{self.dir}: its world model has not been evaluated, so there is nothing to keep yet")
        measured, results = self.evaluate_world_model(), self._played()
        kept = {
            "command": command,
            "name": self.config.name,
            "seed": self.config.seed,
            "machine": machine(),
            "minutes": sum(self.costs().values()) / 60,
            "seconds": self.costs(),
            "targets": self.report()["targets"],
            "reconstruction": measured["reconstruction"],
            "conditions": measured["conditions"],
            "steps": measured["steps"],
            "policies": [r.summary() for r in results],
        }
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"seed{self.config.seed}.json"
        write_atomic(path, json.dumps(kept, indent=1) + "\n")
        arrays = measured["arrays"]
        context = arrays["clip_context"]
        real, imagined = (np.concatenate([context, arrays[f"clip_{n}"]], axis=1) for n in ("real", "imagined"))
        strip = media.filmstrip(real[0], imagined[0], context=context.shape[1])
        path.with_suffix(".png").write_bytes(strip)
        # Two clips below each other: [n, T, H, W, 3] -> [T, n H, W, 3].
        panels = {"real": np.concatenate(real[:2], axis=1), "imagined": np.concatenate(imagined[:2], axis=1)}
        path.with_suffix(".webp").write_bytes(media.video(panels, context=context.shape[1], scale=2))
        return kept

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


def _target_table(targets: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="targets")
    for head in ("", "target", "wanted", "measured"):
        table.add_column(head)
    for t in targets:
        table.add_row("met" if t["passed"] else "missed", t["name"], t["target"], str(t["value"]))
    return table
