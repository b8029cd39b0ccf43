"""The frame of an experiment: its options, its results as JSON with intervals, its figure.

An experiment is a module of experiments/ that names its question, computes rows and draws one figure::

    STUDY = Study("coin", question="Is the coin fair?", claim="heads in half of the throws", seeds=(0, 1, 2))

    def main(argv=None):
        call = STUDY.call(__doc__, argv)
        throws = SIZES[call.size]
        rows = [{"seed": s, "heads": wilson_ci(heads(s, throws), throws)} for s in call.track(call.seeds)]
        call.write(rows, finding=f"...", figure=draw(rows))

    if __name__ == "__main__":
        entry(main)

Results of the laptop size are committed: ``experiments/results/<name>/<name>.json`` and ``.png`` beside it, from which
`dreamer4 report experiments` makes one page (`study_page`).
"""

import argparse
import atexit
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from dreamer4_jax.config import Config, UserError
from dreamer4_jax.evaluation import plots
from dreamer4_jax.evaluation.report import plain
from dreamer4_jax.training.metrics import write_atomic

if TYPE_CHECKING:
    from dreamer4_jax.runner import Run

SIZES = ("smoke", "laptop", "tpu")
RESULTS = Path("experiments/results")
ROOT = Path(__file__).parents[2]  # of a checkout
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "minigrid")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Study:
    """What an experiment asks.

    Attributes:
      name: of its module and of its results.
      question: one sentence, the headline on the page.
      claim: what the paper, or theory, leads one to expect.
      seeds: by default.
      packages: further packages whose versions matter.
    """

    name: str
    question: str
    claim: str
    seeds: tuple[int, ...] = (0,)
    packages: tuple[str, ...] = ()

    def call(
        self,
        doc: str | None,
        argv: Sequence[str] | None = None,
        *,
        add: Callable[[argparse.ArgumentParser], Any] | None = None,
    ) -> "Call":
        """Reads the command line and starts JAX. `doc`: the module's docstring; `add` adds options of its own.

        Without `argv` this is a command, whose process is its own, and the smoke size compiles in haste.
        """
        parser = argparse.ArgumentParser(
            prog=f"python -m experiments.{self.name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--size", choices=SIZES, default="laptop", help="how much is computed (laptop)")
        seeds = " ".join(map(str, self.seeds))
        parser.add_argument("--seeds", type=int, nargs="+", help=f"seeds ({seeds}; of the smoke size the first alone)")
        parser.add_argument("--out", type=Path, help=f"directory of the results ({RESULTS / self.name})")
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="where its trainings are kept (runs)")
        if add:
            add(parser)
        alone, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
        args = parser.parse_args(argv)
        args.seeds = args.seeds or self.seeds[: 1 if args.size == "smoke" else None]
        if len(set(args.seeds)) < len(args.seeds):
            parser.error(f"--seeds {' '.join(map(str, args.seeds))}: a seed stands there twice")
        if args.size == "smoke" and alone:
            _compile_fast()
        from dreamer4_jax.parallel import start

        start()
        # The committed results are those of the laptop size; others lie elsewhere unless --out says so.
        default = {"smoke": args.runs / "smoke" / self.name, "laptop": RESULTS / self.name}
        out = args.out or default.get(args.size, RESULTS / f"{self.name}-{args.size}")
        command = shlex.join(["python", "-m", f"experiments.{self.name}", *argv])
        return Call(self, args.size, tuple(args.seeds), out, command, args)


@dataclass
class Call:
    """One call of an experiment. `args` holds the options that it added itself."""

    study: Study
    size: str
    seeds: tuple[int, ...]
    out: Path
    command: str
    args: argparse.Namespace
    console: Console = field(default_factory=lambda: Console(stderr=True))
    began: float = field(default_factory=time.perf_counter)
    commit: str | None = field(default_factory=lambda: commit())  # of the code at the start
    before: float = 0.0  # seconds that what was kept had taken

    @cached_property
    def code(self) -> str | None:
        """Of the library and of this experiment, for what is kept."""
        return code(self.study.name)

    def say(self, text: str) -> None:
        self.console.print(f"[bold]{text}[/bold]", highlight=False)

    def track(self, items: Iterable[Item], text: str = "") -> Iterator[Item]:
        """The items, behind a progress bar; in a log, a line for each."""
        done, text = list(items), text or self.study.name
        if self.console.is_terminal:
            yield from track(done, text, console=self.console)
            return
        began = time.perf_counter()
        for i, item in enumerate(done, 1):
            yield item
            spent = (time.perf_counter() - began) / 60
            left = spent / i * (len(done) - i)
            self.say(f"{text}: {i} of {len(done)} in {spent:.1f} minutes, about {left:.1f} to go")

    def kept(self, key: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, as JSON, and kept under --runs: neither a call that goes on after an interruption nor
        one that joins the seeds of other calls computes it again.

        It is taken only if the library and this experiment are as they were, to the letter, and so are the options.
        """
        path = self.args.runs / "kept" / f"{self.study.name}-{self.size}" / f"{key}.json"
        options = {k: str(v) for k, v in sorted(vars(self.args).items()) if k not in ("seeds", "out", "runs")}
        stamp = {"code": self.code, "options": options}
        if self.code and path.exists():
            found = json.loads(path.read_text())
            if {name: found.get(name) for name in stamp} == stamp:
                self.before += found["seconds"]
                return found["value"]
        began = time.perf_counter()
        value = json.loads(json.dumps(plain(compute())))
        if self.code:
            path.parent.mkdir(parents=True, exist_ok=True)
            tree = stamp | {"seconds": round(time.perf_counter() - began, 1), "value": value}
            write_atomic(path, json.dumps(tree) + "\n")
        return value

    def run(self, config: Config, *phases: str) -> "Run":
        """The run of a config, in a directory of its own under --runs, with `phases` trained or found finished."""
        from dreamer4_jax.runner import Run

        run = Run(config, self.args.runs / f"{config.name}-seed{config.seed}", resume=True)
        for phase in phases:
            run.train(phase)
        return run

    def write(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        finding: str,
        figure: Figure,
        **more: Any,
    ) -> Path:
        """Writes ``<name>.png`` and ``<name>.json``; returns the path of the latter.

        Args:
          rows: what was measured, intervals as `Interval` or ``{"mean", "low", "high"}``.
          finding: one paragraph on what was found, also where it contradicts the claim.
          more: further entries of the JSON.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        picture = self.out / f"{self.study.name}.png"
        draft = picture.with_name(picture.name + ".part")
        draft.write_bytes(plots.to_png(figure))
        draft.replace(picture)
        from dreamer4_jax.evaluation.summary import machine

        tree = {
            "name": self.study.name,
            "question": self.study.question,
            "claim": self.study.claim,
            "finding": finding,
            "size": self.size,
            "command": self.command,
            "seeds": list(self.seeds),
            "commit": self.commit,
            "machine": machine(),
            "versions": versions((*PACKAGES, *self.study.packages)),
            "seconds": round(time.perf_counter() - self.began + self.before, 1),
            "figure": picture.name,
            **more,
            "rows": [dict(row) for row in rows],
        }
        path = self.out / f"{self.study.name}.json"
        write_atomic(path, json.dumps(plain(tree), indent=1) + "\n")
        self.say(f"{path}\n{finding}")
        return path


def _compile_fast() -> None:
    """For the smoke size, most of which is compiling and of which nothing is measured: without optimising, and equal
    programs once. It holds for the whole process, which must not have computed anything."""
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()  # unoptimised, they take two thirds of the compiler's time
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        kept = tempfile.TemporaryDirectory()
        atexit.register(kept.cleanup)
        jax.config.update("jax_compilation_cache_dir", kept.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def commit() -> str | None:
    """The commit of the code that runs, marked where files of it were changed since; None outside a checkout."""
    try:
        # Results and text may change, code may not.
        changed = _git(ROOT, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
        return _git(ROOT, "rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def code(study: str, root: Path = ROOT) -> str | None:
    """Names the code of the library and of one experiment by its content; None where it was changed since the last
    commit, or is not tracked."""
    where = ("dreamer4_jax", *(f"experiments/{name}.py" for name in (study, "base", "quickstart")))
    try:
        tracked, changed = _git(root, "ls-files", "-s", "--", *where), _git(root, "status", "--porcelain", "--", *where)
    except (OSError, subprocess.CalledProcessError):
        return None
    return hashlib.sha256(tracked.encode()).hexdigest()[:16] if tracked and not changed else None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by name."""
    return {name: importlib.metadata.version(name) for name in packages}


def entry(main: Callable[[], Any]) -> None:
    """Runs an experiment's `main`; what the user can mend ends with one message and exit code 2. Interrupted while it
    trains, it has saved, ends with the code of `training.Interrupted`, and the same command goes on there."""
    from dreamer4_jax.training import Interrupted

    try:
        main()
    except UserError as error:
        print(f"dreamer4: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as error:
        told = f"{error.phase} was interrupted after step {error.step} and saved to {error.checkpoint}"
        print(f"dreamer4: {told}; the same command goes on from there", file=sys.stderr)
        sys.exit(Interrupted.exit_code)


def studies() -> list[str]:
    """Names of the experiments with a question: modules of experiments/ that define `STUDY`."""
    import experiments as package

    return sorted(p.stem for p in Path(package.__path__[0]).glob("*.py") if "\nSTUDY = " in p.read_text())


def load(results: str | Path = RESULTS) -> list[dict[str, Any]]:
    """What every experiment has written under `results`, by name; "directory" says where."""
    found = []
    for path in sorted(Path(results).glob("*/*.json")):
        try:
            tree = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); make it again or remove it") from error
        if isinstance(tree, dict) and {"question", "finding", "rows"} <= set(tree):
            found.append({**tree, "directory": path.parent})
    return found
