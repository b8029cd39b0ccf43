"""`dreamer4 data`: convert what people have into a dataset, look at a dataset, encode a dataset once."""

import argparse
import sys
from pathlib import Path
from typing import Any

from dreamer4_jax.config import UserError

FORMATS = ("gymnasium", "lerobot", "minari", "rlds", "vpt", "npz", "video")  # those of data.readers, which imports more

CONVERT = """\
examples:
  dreamer4 data convert my-videos data/mine                        # a folder of mp4, labelled or not
  dreamer4 data convert my-videos data/mine --size 128x128 --fit crop --every 2
  dreamer4 data convert ~/vpt data/vpt --size 384x640 --fit pad --chunk 256 --workers 16
  dreamer4 data convert gym:CarRacing-v3 data/cars --episodes 50
What each format is, and how its frames, actions and rewards are aligned: docs/data.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands below `dreamer4 data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    sub = commands.add_parser(
        "convert",
        help="any source as a dataset to train on",
        epilog=CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("source", help="a folder, a file, or gym:ID")
    sub.add_argument("dest", help="directory of the new dataset")
    sub.add_argument("--format", default="", choices=FORMATS, help="format of the source (detected)")
    sub.add_argument("--size", default="64x64", help="HEIGHTxWIDTH, or native: as they are (64x64)")
    sub.add_argument("--fit", default="stretch", choices=("stretch", "crop", "pad"), help="how frames become that size")
    sub.add_argument("--chunk", type=int, default=64, help="frames of a record, the longest window at least (64)")
    sub.add_argument("--every", type=int, default=1, help="take every n-th frame (1)")
    sub.add_argument("--holdout", type=float, default=0.05, help="share that is never trained on (0.05)")
    sub.add_argument("--alignment", default="", choices=("taken", "led"),
                     help="a row's action was taken at its frame, or led to it (the format's usual)")  # fmt: skip
    sub.add_argument("--actions", default="", metavar="SPEC",
                     help="components, as move:categorical:7,keys:binary:4 (inferred from the values)")  # fmt: skip
    sub.add_argument("--like", metavar="DATASET", help="take components and ranges of a dataset, to mix the two")
    sub.add_argument("--camera", default="", help="which picture, where there are several")
    sub.add_argument("--episodes", type=int, default=100, help="of a live environment (100)")
    sub.add_argument("--steps", type=int, default=1000, help="the most of a live episode (1000)")
    sub.add_argument("--seed", type=int, default=0, help="of the order of episodes, and of live ones (0)")
    sub.add_argument("--workers", type=int, default=2, help="processes (2)")
    sub.add_argument("--quiet", action="store_true", help="no progress output")
    sub.set_defaults(data_function=_convert)

    sub = commands.add_parser("inspect", help="a dataset's frames, actions, lengths, labels, and what looks wrong")
    sub.add_argument("dataset", help="directory of a dataset")
    sub.add_argument("--out", help="picture to write (DATASET/inspect.png)")
    sub.set_defaults(data_function=_inspect)

    sub = commands.add_parser("tokenize", help="encode every frame of a dataset once with a trained tokenizer")
    sub.add_argument("model", help="a run directory, or the directory of its tokenizer's model")
    sub.add_argument("dataset", help="directory of a dataset of frames")
    sub.add_argument("--out", help="directory of the tokens (RUN/data/tokens, where the run looks for them)")
    sub.add_argument("--quiet", action="store_true", help="no progress output")
    sub.set_defaults(data_function=_tokenize)


def _size(text: str) -> tuple[int, int] | None:
    if text == "native":
        return None
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise UserError(f"--size {text!r}: expected HEIGHTxWIDTH, such as 64x64, or native") from None
    return height, width


def _convert(args: argparse.Namespace) -> None:
    from dreamer4_jax.data.convert import convert
    from dreamer4_jax.data.readers import Options
    from dreamer4_jax.data.readers.actions import parse_components

    options = Options(
        alignment=args.alignment,
        actions=parse_components(args.actions),
        camera=args.camera,
        episodes=args.episodes,
        steps=args.steps,
        seed=args.seed,
    )
    manifest = convert(
        args.source,
        args.dest,
        format=args.format,
        options=options,
        like=args.like,
        size=_size(args.size),
        how=args.fit,
        chunk=args.chunk,
        every=args.every,
        holdout=args.holdout,
        seed=args.seed,
        workers=args.workers,
        progress=not args.quiet,
    )
    print(summary(manifest))
    for bad in manifest["skipped"][:10]:
        print(f"  left out: {bad['reason']}", file=sys.stderr)
    if len(manifest["skipped"]) > 10:
        print(f"  and {len(manifest['skipped']) - 10} more, see {args.dest}/dataset.json", file=sys.stderr)


def summary(manifest: dict[str, Any]) -> str:
    """What a conversion made, in a line."""
    stats, spec = manifest["statistics"], manifest["spec"]
    actions = ", ".join(
        f"{a['name']} ({a['kind']} {a['size']}, {100 * stats['present'][a['name']] / max(1, stats['frames']):.0f} %)"
        for a in spec["actions"]
    )
    return (
        f"{stats['frames']:,} frames of {spec['size'][0]} x {spec['size'][1]} in {stats['episodes']:,} pieces of "
        f"{manifest['request']['source']['episodes']:,} episodes; actions: {actions}; {stats['rewarded']:,} rewarded "
        f"frames; {len(manifest['skipped'])} left out"
    )


def _inspect(args: argparse.Namespace) -> None:
    from rich.console import Console

    from dreamer4_jax.data.inspect import inspect, picture, table

    found = inspect(args.dataset)
    Console().print(table(found))
    out = Path(args.out or Path(args.dataset) / "inspect.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(picture(found))
    print(out)


def _tokenize(args: argparse.Namespace) -> None:
    from dreamer4_jax.inference import load_tokenizer
    from dreamer4_jax.parallel.processes import choose_platform
    from dreamer4_jax.stages import encode_dataset

    choose_platform()

    tokenizer, run = load_tokenizer(Path(args.model))
    if not (args.out or run):
        raise UserError("--out: say where the tokens go; only a run directory has a place for them")
    out = Path(args.out or f"{run}/data/tokens")
    manifest = encode_dataset(tokenizer, Path(args.dataset), out, progress=not args.quiet)
    tokens, channels = manifest["spec"]["size"]
    print(f"{out}: {tokens} tokens of {channels} channels a frame, by tokenizer {manifest['tokenizer']}")


def main(args: argparse.Namespace) -> None:
    """Runs the command."""
    args.data_function(args)
