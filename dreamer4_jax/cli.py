"""The `dreamer4` command.

Every command takes an experiment (a file in experiments/) or a preset, and dotted overrides such as
`train.dynamics.steps=2000`. Mistakes end with one message and exit code 2, an interruption that was saved with 42.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreamer4_jax.config import Config, ConfigError, UserError, override, parse_overrides, preset
from dreamer4_jax.presets import PRESETS

if TYPE_CHECKING:
    from dreamer4_jax.runner import Run

PHASES = ("tokenizer", "dynamics", "agent", "imagination")
BASELINES = ("diffusion", "diffusion_v")  # those of presets, for runs with evaluate.diffusion_baseline


def experiments() -> list[str]:
    """Names of the experiments that can be run: modules of experiments/ with a `config` function."""
    import experiments as package

    return sorted(
        p.stem
        for p in Path(package.__path__[0]).glob("*.py")
        if p.stem != "__init__" and "\ndef config(" in p.read_text()
    )


def resolve(name: str, size: str, seed: int, overrides: Sequence[str]) -> Config:
    """The config of an experiment or preset, with overrides."""
    if name in PRESETS:
        if size != "quick":
            raise ConfigError(f"--{size}: preset {name!r} has one size; sizes belong to experiments")
        config = override(preset(name), {"seed": seed})
    elif name in experiments():
        config = importlib.import_module(f"experiments.{name}").config(size, seed)
    else:
        raise ConfigError(
            f"unknown experiment or preset {name!r}: choose one of {', '.join([*experiments(), *PRESETS])}"
        )
    config = override(config, parse_overrides(list(overrides)))
    if config.data.source or config.data.also:
        from dreamer4_jax.data.source import adopt

        config = adopt(config)
    return config


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_const", const="smoke", dest="size", help="tiny: shows that it runs")
    size.add_argument("--full", action="store_const", const="full", dest="size", help="the longer version")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, training and evaluation (0)")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="dotted config fields, e.g. train.dynamics.steps=2000"
    )
    parser.set_defaults(size="quick")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", metavar="DIR", help="run directory, a path or gs://bucket/... (runs/<name>-seed<seed>)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run directory if it holds a run")
    parser.add_argument("--data", metavar="DIR", help="a recorded dataset to use instead of recording one")
    parser.add_argument("--quiet", action="store_true", help="no progress output")
    parser.add_argument(
        "--mesh", metavar="SIZES", help="devices to train on, e.g. data=4,ctx=2 (as many as divide the batches)"
    )


def _directory(config: Config, args: argparse.Namespace) -> Path:
    from dreamer4_jax.parallel.bucket import on_disk

    return on_disk(args.run or f"runs/{config.name}-seed{config.seed}")


def _open(config: Config, args: argparse.Namespace) -> "Run":
    from dreamer4_jax.parallel import MeshSpec, start

    mesh = MeshSpec.parse(args.mesh) if args.mesh else None
    start()
    from dreamer4_jax.runner import Run

    return Run(
        config, _directory(config, args), resume=args.resume, progress=not args.quiet, data_dir=args.data, mesh=mesh
    )


def _reopen(directory: str) -> "Run":
    from dreamer4_jax.parallel.processes import choose_platform
    from dreamer4_jax.runner import Run

    choose_platform()
    return Run.reopen(directory)


def _cmd_run(args: argparse.Namespace) -> None:
    """all phases of an experiment, then its report"""
    _open(resolve(args.experiment, args.size, args.seed, args.overrides), args).all()


def _cmd_collect(args: argparse.Namespace) -> int:
    """record episodes of an environment by a scripted or trained policy, or by the mixture of an experiment"""
    from dreamer4_jax.collect_cli import main

    names = [*experiments(), *PRESETS]
    return main(args, names, lambda: resolve(args.environment, args.size, args.seed, args.overrides))


def _cmd_train(args: argparse.Namespace) -> None:
    """one phase; the phases before it must be finished in the same run directory"""
    from dreamer4_jax.stages import require_models

    config = resolve(args.experiment, args.size, args.seed, args.overrides)
    require_models(_directory(config, args), args.phase)  # before the run directory is made
    _open(config, args).train(args.phase)


def _cmd_evaluate(args: argparse.Namespace) -> None:
    """play a run's policies in the real environment and measure its world model"""
    run = _reopen(args.run)
    if args.env == "minerl":
        from rich.console import Console

        from dreamer4_jax.evaluation.minecraft import table

        results = run.evaluate_minecraft(
            args.policy or (),
            python=args.minerl_python or sys.executable,
            episodes=1000 if args.episodes is None else args.episodes,
            streams=1 if args.streams is None else args.streams,
            minutes=60.0 if args.minutes is None else args.minutes,
        )
        console = Console()
        if not console.is_terminal:
            console.width = 200  # a file or a pipe has no edge
        console.print(table(results))
        return
    for name in ("minerl_python", "episodes", "minutes", "streams"):
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is of --env minerl; how the run's own environment is played is "
                "evaluate.episodes and evaluate.envs of its config"
            )
    names = args.policy or list(run.policies())
    unknown = [name for name in names if name not in run.policies()]
    if unknown:
        raise UserError(f"unknown policy {unknown[0]!r}: choose from {', '.join(map(repr, run.policies()))}")
    if not args.policy:
        run.evaluate_world_model()
    for name in names:
        summary = run.evaluate_policy(name, levels=args.levels.split(",") if args.levels else ()).summary()
        known = ((key, summary[key]) for key in ("success", "return") if summary[key])
        found = "  ".join(f"{key} {i['mean']:.3f} [{i['low']:.3f}, {i['high']:.3f}]" for key, i in known)
        print(f"{name:24s} {found}  episodes {summary['episodes']}")
    run.report()


def _cmd_generate(args: argparse.Namespace) -> None:
    """imagine held-out clips at their true actions and write them beside the real ones"""
    run = _reopen(args.run)
    out = Path(args.out or run.dir / "media" / f"generated_k{args.steps}.webp")
    run.generate(out, steps=args.steps, clips=args.clips)
    print(out)


def _cmd_play(args: argparse.Namespace) -> int:
    """a page in the browser on which people play in a run's world model"""
    from dreamer4_jax.play.command import main

    return main(args, _reopen)


def _cmd_report(args: argparse.Namespace) -> None:
    """write report.html and results.json of a run, finished or not; of `experiments`: the page of all their results"""
    if args.run == "experiments":
        if args.keep:
            raise UserError(f"--keep {args.keep}: is for a run; the results of experiments are kept already")
        from dreamer4_jax.evaluation.study_page import write_page

        print(write_page())
        return
    run = _reopen(args.run)
    if args.keep:
        run.keep(Path(args.keep), f"dreamer4 report {args.run} --keep {args.keep}")
    else:
        run.report()
    print(run.dir / "report.html")


def _cmd_bench(args: argparse.Namespace) -> None:
    """training and generation speed against this machine's matmul rate; `generate`: the sampler of every preset;
    `data`: what the input pipeline delivers against what training takes"""
    from dreamer4_jax.parallel.processes import choose_platform

    choose_platform()
    if args.part == "data":
        from dreamer4_jax import bench_data

        source = [f"data.source={args.data}"] if args.data else []  # it decides the actions
        config = resolve(args.experiment, "quick", 0, [*args.overrides, *source])
        return bench_data.main(
            config, phases=args.phases, readers=args.readers, seconds=args.seconds, data=args.data, out=args.out
        )
    if args.part != "generate":
        from dreamer4_jax.bench import main

        return main(args.out)
    from dreamer4_jax import bench_generate

    names = tuple(filter(None, args.presets.split(","))) or bench_generate.DEFAULT
    try:
        batches = tuple(int(n) for n in args.batch.split(","))
    except ValueError as error:
        raise ConfigError(f"--batch {args.batch}: must be numbers, separated by commas") from error
    accelerators = tuple(filter(None, args.aot.split(",")))
    bench_generate.main(names, steps=args.steps, batches=batches, accelerators=accelerators, out=args.out)


def _cmd_export(args: argparse.Namespace) -> None:
    """a run's sampler and policy as portable programs that need JAX, and not this package"""
    from dreamer4_jax.export import export
    from dreamer4_jax.inference import load_world
    from dreamer4_jax.parallel.bucket import on_disk
    from dreamer4_jax.parallel.processes import choose_platform

    choose_platform()
    world = load_world(on_disk(args.run), phase=args.phase)
    platforms = tuple(filter(None, args.platforms.split(",")))
    print(export(world, args.out, greedy=args.greedy, dtype=args.dtype, platforms=platforms))


def _cmd_aot(args: argparse.Namespace) -> int:
    """compile a config for a TPU that need not be there: does it fit, and how fast might it be"""
    from dreamer4_jax.aot_cli import main

    return main(args, resolve(args.experiment, args.size, args.seed, args.overrides))


def _cmd_sweep(args: argparse.Namespace) -> None:
    """many runs of an experiment, a list or a search; resumable, and a page that compares them"""
    from launch.sweep_cli import main

    main(args)


def _cmd_launch(args: argparse.Namespace) -> int:
    """an experiment on several processes, or on TPUs in the cloud; started again when it is interrupted"""
    from launch.cli import main

    return main(args)


def _cmd_data(args: argparse.Namespace) -> None:
    """convert videos and datasets into one to train on, inspect it, encode it once"""
    from dreamer4_jax.data_cli import main

    main(args)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from dreamer4_jax import aot_cli, collect_cli, data_cli
    from dreamer4_jax.play.command import add_arguments as add_play_arguments
    from launch.cli import add_arguments

    top = argparse.ArgumentParser(prog="dreamer4", description="Dreamer 4 in JAX: world models and agents inside them.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    for name, function in (("run", _cmd_run), ("train", _cmd_train)):
        sub = add(name, function)
        if name == "train":
            sub.add_argument("phase", choices=(*PHASES, *BASELINES))
            sub.add_argument("--experiment", default="quickstart", help="experiment or preset (quickstart)")
        else:
            sub.add_argument("experiment", help="a file of experiments/ or a preset")
        _run_arguments(sub)
        _config_arguments(sub)

    sub = add("collect", _cmd_collect)
    collect_cli.add_arguments(sub)
    _config_arguments(sub)

    sub = add("evaluate", _cmd_evaluate)
    sub.add_argument("run", help="run directory")
    sub.add_argument("--policy", action="append", help="only this policy (may be repeated)")
    sub.add_argument("--levels", help="other levels than the run's, separated by commas; not kept in the report")
    sub.add_argument("--env", choices=["minerl"], help="instead of the run's: Minecraft, for runs on VPT recordings")
    sub.add_argument("--minerl-python", metavar="PATH", help="the Python that has MineRL (this one)")
    sub.add_argument("--episodes", type=int, help="of minerl (1000, as the paper)")
    sub.add_argument("--minutes", type=float, help="of an episode of minerl (60)")
    sub.add_argument("--streams", type=int, help="games of minerl side by side (1)")
    sub = add("generate", _cmd_generate)
    sub.add_argument("run", help="run directory")
    sub.add_argument("--steps", type=int, default=4, help="sampling steps K per frame (4)")
    sub.add_argument("--clips", type=int, default=4, help="held-out clips (4)")
    sub.add_argument("--out", help="file to write (<run>/media/...)")
    data_cli.add_arguments(add("data", _cmd_data))
    add_play_arguments(add("play", _cmd_play))
    sub = add("report", _cmd_report)
    sub.add_argument("run", help="run directory, or `experiments`")
    sub.add_argument("--keep", metavar="DIR", help="of a finished run: its numbers and imagined clips, as seed<N>.*")
    sub = add("bench", _cmd_bench)
    sub.add_argument(
        "part", nargs="?", choices=["reference", "generate", "data"], default="reference", help="(reference)"
    )
    sub.add_argument("--presets", default="", help="of generate, by commas (reference,tiny,small,base)")
    sub.add_argument("--steps", type=int, default=4, help="of generate: K (4)")
    sub.add_argument("--batch", default="1", help="of generate: streams side by side, by commas (1)")
    sub.add_argument("--aot", default="", metavar="TPUS", help="of generate: also estimate for these, e.g. v5e-1,v6e-1")
    sub.add_argument("--experiment", default="quickstart", help="of data: experiment or preset (quickstart)")
    sub.add_argument("--data", metavar="DIR", help="of data: a dataset to read (made up)")
    sub.add_argument("--phases", default="tokenizer,dynamics", help="of data, by commas (tokenizer,dynamics)")
    sub.add_argument("--readers", default="1,2", help="of data: threads that read ahead, by commas (1,2)")
    sub.add_argument("--seconds", type=float, default=3.0, help="of data: how long each is read (3)")
    sub.add_argument("--out", help="also write the figures to this JSON file")
    sub.set_defaults(overrides=[])  # field=value, of data
    sub = add("export", _cmd_export)
    sub.add_argument("run", help="run directory")
    sub.add_argument("--out", required=True, help="folder to make")
    sub.add_argument("--phase", choices=["agent", "imagination"], help="whose policy (the latest that is finished)")
    sub.add_argument("--greedy", action="store_true", help="the policy takes its most probable action")
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the products, instead of the config's")
    sub.add_argument("--platforms", default="cpu,cuda,tpu", help="to run on, by commas (cpu,cuda,tpu)")
    sub = add("aot", _cmd_aot)
    sub.add_argument("experiment", help="a file of experiments/ or a preset")
    _config_arguments(sub)
    aot_cli.add_arguments(sub)
    sub = add("launch", _cmd_launch)
    sub.add_argument("experiment", help="a file of experiments/ or a preset")
    _config_arguments(sub)
    add_arguments(sub)
    from launch import sweep_cli  # light: it imports nothing before it is run

    sweep_cli.add_arguments(add("sweep", _cmd_sweep))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    # argparse takes the overrides only where the first of them stands; those after an option are left over.
    if rest and not (hasattr(args, "overrides") and all("=" in item for item in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return args.function(args) or 0  # most return nothing
    except UserError as error:
        print(f"dreamer4: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        # training.Interrupted, without importing jax for a mere --help.
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"dreamer4: {error}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
