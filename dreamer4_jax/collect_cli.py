"""`dreamer4 collect`: records an environment by a policy, or the mixture of policies of an experiment's config."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from dreamer4_jax.config import Config, UserError, override, parse_overrides

EXAMPLES = """\
examples:
  dreamer4 collect crafter --policy expert --episodes 100 --workers 8 --out data/crafter
  dreamer4 collect BabyAI-GoToLocal-v0,BabyAI-PickupLoc-v0 --policy noisy --episodes 1000 --out data/babyai
  dreamer4 collect ALE/Breakout-v5 --size 96x96 --episodes 50 --out data/breakout env.max_steps=2000
  dreamer4 collect ViZDoom/health_gathering --policy runs/doom --episodes 20 --out data/played
  dreamer4 collect quickstart --out data/babyai          # data.frames of the mixture that its config names
The environments, what they need and what their experts do: docs/environments.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dreamer4 collect`, but for those of a config."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "environment", metavar="ENV", help="a kind of environment, its levels, an experiment or a preset"
    )
    parser.add_argument("--out", required=True, help="directory of the new dataset")
    parser.add_argument("--policy", help="random, expert, noisy (the expert, with random bursts), or a run directory "
                        "(random; of an experiment the mixture in its config)")  # fmt: skip
    parser.add_argument("--episodes", type=int, help="how many (100; of an experiment as many as fill data.frames)")
    parser.add_argument("--workers", type=int, help="processes (2); the data is the same for any number")
    parser.add_argument(
        "--size", default="", metavar="HxW", dest="pixels", help="pixels of a frame (64x64; an experiment has its own)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress output")


def _size(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    try:
        height, width = (int(n) for n in text.lower().split("x"))
    except ValueError as error:
        raise UserError(f"--size {text!r}: expected HEIGHTxWIDTH, as 64x64") from error
    if min(height, width) < 1:
        raise UserError(f"--size {text}: must be positive")
    return height, width


def _record(args: argparse.Namespace, names: Sequence[str], resolve: Callable[[], Config]) -> dict[str, Any]:
    size = _size(args.pixels)
    if args.environment in names:
        config = resolve()
        if size:
            raise UserError(
                f"--size {args.pixels}: {args.environment} has a size of its own, tokenizer.height and .width"
            )
        if args.policy is None and args.episodes is None:
            from dreamer4_jax.envs.collect import collect

            if args.workers is not None:
                config = override(config, {"data.workers": args.workers})
            return collect(config, args.out, seed=config.seed, progress=not args.quiet)
    else:
        from dreamer4_jax.envs import kinds
        from dreamer4_jax.envs.episodes import recording_config

        try:
            kind, levels = kinds.find(args.environment)
        except UserError as error:
            raise UserError(f"{error}; or an experiment or a preset: {', '.join(names)}") from None
        config = recording_config(kind, levels, policy=args.policy or "random", size=size)
        config = override(config, {"seed": args.seed, **parse_overrides(list(args.overrides))})
    from dreamer4_jax.envs.episodes import collect_episodes

    return collect_episodes(
        config,
        args.out,
        policy=args.policy or "random",
        episodes=100 if args.episodes is None else args.episodes,
        seed=config.seed,
        workers=2 if args.workers is None else args.workers,
        progress=not args.quiet,
    )


def main(args: argparse.Namespace, names: Sequence[str], resolve: Callable[[], Config]) -> int:
    """Records, and prints what was recorded; returns the exit code.

    Args:
        names: of the experiments and presets. If ENV is one of these, `resolve` makes its config.
    """
    try:
        manifest = _record(args, names, resolve)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on with what is whole in {args.out}")
        return 130
    for level, policies in manifest["statistics"].items():
        print(level, policies)
    if dropped := manifest["dropped"]:
        print(f"{len(dropped)} episodes dropped, in which the expert failed; the first: {dropped[0]['error']}")
    return 0
