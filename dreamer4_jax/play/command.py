"""`dreamer4 play`: from a run directory to a page in the browser."""

import argparse
import logging
import socket
from collections.abc import Callable
from typing import Any

from dreamer4_jax.config import UserError

EXTRA = "the browser demo needs the packages of its extra: pip install 'dreamer4_jax[play]' (make installs them)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dreamer4 play`."""
    parser.add_argument("run", metavar="CHECKPOINT", help="run directory, finished at least to its dynamics phase")
    parser.add_argument("--slots", type=int, default=4, help="people who can play at once (4); more wait in a queue")
    parser.add_argument("--port", type=int, default=8765, help="port of the page (8765; 0: any free one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (127.0.0.1; others need --remote)")
    parser.add_argument("--remote", action="store_true", help="allow other machines, who need the printed token")


def make_engine(run: Any, *, slots: int) -> Any:
    """The engine of a run, compiled and ready."""
    import jax

    from dreamer4_jax.data.schema import DataError
    from dreamer4_jax.data.store import open_dataset
    from dreamer4_jax.play.catalogue import Catalogue
    from dreamer4_jax.play.controls import controls
    from dreamer4_jax.play.engine import Engine
    from dreamer4_jax.play.world import compare_frames, open_world

    config = run.config
    world = open_world(run.dir, slots=slots)
    world.warm_up()
    try:
        data = open_dataset(run.raw_dir, config)
    except DataError as error:
        logging.getLogger("dreamer4.play").warning("no recorded episodes to begin from: %s", error)
        data = None
    make_env = None if config.env.kind == "none" else run.make_env
    catalogue = Catalogue(config, data, make_env, context=config.dynamics.transformer.window)
    about = {
        "title": run.dir.name,
        "device": str(jax.devices()[0].device_kind),
        "size": [config.tokenizer.height, config.tokenizer.width],
        "tile": config.env.tile if config.env.kind == "babyai" else config.tokenizer.patch,
        "mtp": config.agent.mtp,
    }
    return Engine(world, catalogue, controls(config), compare_frames(config), about=about)


def main(args: argparse.Namespace, open_run: Callable[[str], Any]) -> int:
    """Serves the page of a run until Ctrl-C; returns the exit code."""
    from rich.console import Console

    try:
        from dreamer4_jax.play.server import check_address, make_app, serve
    except ImportError as error:
        raise UserError(f"{EXTRA}; {error}") from error

    if args.slots < 1:
        raise UserError(f"--slots {args.slots}: must be at least 1")
    guard = check_address(args.host, args.port, args.remote)
    run, console = open_run(args.run), Console(stderr=True)
    with console.status(f"compiling the model of {run.dir} for {args.slots} players"):
        engine = make_engine(run, slots=args.slots)

    def ready(port: int) -> None:
        host = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
        host = f"[{host}]" if ":" in host else host
        token = f"/#token={guard.token}" if guard.token else "/"
        console.print(f"[bold]play at[/bold] http://{host}:{port}{token}   (Ctrl-C ends it)", soft_wrap=True)

    try:
        serve(make_app(engine, guard), args.host, args.port, ready=ready)
    except KeyboardInterrupt:  # the way to end it; the server has closed every session by now
        console.print("ended")
    if engine.error is not None:
        raise engine.error
    return 0
