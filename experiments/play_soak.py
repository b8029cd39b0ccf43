"""Does the browser demo stay flat? Clients that join, play and leave for thousands of frames, at the real command.

    python -m experiments.play_soak RUN --frames 10000 --clients 8 --out experiments/results/play/soak.json

Starts `dreamer4 play RUN` as a process of its own. Each client connects, starts a fresh or a recorded episode, plays
step by step or hands over to the policy, at a random K, for 10 to 80 frames, leaves (every third without a farewell),
and comes again. Measured of the server: its resident memory (Linux), what JAX compiled after it said that it was ready,
and frames a second; of the clients: from a step that was asked for to its frame. Ctrl-C ends it early.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dreamer4_jax.play import protocol
from dreamer4_jax.training.metrics import write_atomic


class Tally:
    """What all clients together have seen."""

    def __init__(self, wanted: int):
        self.wanted, self.frames, self.joins = wanted, 0, 0
        self.latency: list[float] = []
        self.memory: list[tuple[int, float]] = []  # (frames, MiB)

    def stop(self) -> None:
        """Ends it early; what has been measured is reported."""
        self.wanted = self.frames


def resident(pid: int) -> float:
    """MiB that the process has in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    if found is None:
        raise RuntimeError(f"process {pid} has ended")
    return int(found[1]) / 1024


async def client(number: int, port: int, tally: Tally, seed: int) -> None:
    """Joins, plays and leaves until all frames have been made."""
    from websockets.asyncio.client import connect

    rng = random.Random(f"{seed} {number}")
    while tally.frames < tally.wanted:
        tally.joins += 1
        async with connect(
            f"ws://127.0.0.1:{port}/play",
            origin=f"http://127.0.0.1:{port}",  # type: ignore[arg-type]
            subprotocols=["dreamer4"],  # type: ignore[list-item]
            max_size=None,
        ) as socket:

            async def say(t: str, socket: Any = socket, **fields: Any) -> None:
                await socket.send(json.dumps({"t": t, **fields}))

            async def frame(socket: Any = socket, say: Any = say) -> dict[str, Any]:
                while True:
                    data = await asyncio.wait_for(socket.recv(), 120)
                    if isinstance(data, bytes):
                        header, _ = protocol.unpack(data)
                        if header["t"] == "frame":
                            await say("ack", n=header["n"])
                            return header

            hello: dict[str, Any] = {"t": ""}
            while hello["t"] != "hello":  # it may have to wait for the slot of one who has just left
                hello = json.loads(await asyncio.wait_for(socket.recv(), 120))
            await frame()
            if hello["episodes"] and rng.random() < 0.5:
                episode = rng.randrange(len(hello["episodes"]))
                await say("start_recorded", episode=episode, frame=rng.randrange(hello["episodes"][episode]["frames"]))
            else:
                await say("start_fresh", level=rng.randrange(len(hello["levels"])), seed=rng.randrange(2**20))
            await frame()
            await say("steps", k=rng.choice(hello["ladder"]))
            await say("pilot", policy=rng.random() < 0.3)
            await say("doubt", on=rng.random() < 0.3)
            for i in range(rng.randrange(10, 80)):
                if i % 10 == 9:
                    await say("rewind", frames=rng.randrange(1, 4))
                    await frame()
                begun = time.perf_counter()
                await say("step")
                await frame()
                tally.latency.append(time.perf_counter() - begun)
                tally.frames += 1
                if tally.frames >= tally.wanted:
                    break
            if tally.joins % 3 == 0:
                socket.transport.abort()  # gone without a word


async def watch(pid: int, tally: Tally, progress: bool) -> None:
    """Notes the server's memory, and shows how far it is."""
    columns = (TextColumn("soak"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("soak", total=tally.wanted)
        while tally.frames < tally.wanted:
            await asyncio.sleep(2.0)
            tally.memory.append((tally.frames, resident(pid)))
            bar.update(task, completed=tally.frames)


def slope(points: list[tuple[int, float]]) -> float:
    """MiB for each thousand frames, by least squares over the second half of the points."""
    late = points[len(points) // 2 :]
    frames, memory = [p[0] / 1000 for p in late], [p[1] for p in late]
    return statistics.linear_regression(frames, memory).slope


def soak(run: str, *, frames: int, clients: int, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    """Plays `frames` frames with `clients` clients at once; returns what was measured."""
    command = [sys.executable, "-m", "dreamer4_jax.cli", "play", run, "--port", "0", "--slots", str(clients)]
    server = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
    )
    assert server.stderr is not None
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(server.stderr,), daemon=True)
    reader.start()
    try:
        while not (found := re.search(r"play at.*http://[^:]*:(\d+)/", "".join(lines))):
            if server.poll() is not None:
                raise RuntimeError(f"`{' '.join(command)}` ended before it was ready: {''.join(lines[-5:])}")
            time.sleep(0.2)
        port, ready = int(found[1]), len(lines)

        async def everything() -> Tally:
            tally = Tally(frames)
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, tally.stop)
            watching = asyncio.create_task(watch(server.pid, tally, progress))
            await asyncio.gather(*(client(i, port, tally, seed) for i in range(clients)))
            await watching
            return tally

        begun = time.perf_counter()
        tally = asyncio.run(everything())
        seconds = time.perf_counter() - begun
    finally:
        server.terminate()
        server.wait(30)
    memory = [m for _, m in tally.memory]
    cuts = statistics.quantiles(tally.latency, n=100)
    return {
        "run": Path(run).name,
        "clients": clients,
        "frames": tally.frames,
        "joins": tally.joins,
        "seconds": round(seconds, 1),
        "frames_per_second": round(tally.frames / seconds, 2),
        "step_to_frame_ms": {"median": round(1000 * cuts[49], 1), "p95": round(1000 * cuts[94], 1)},
        "compiled_after_ready": sum("Compiling" in line for line in lines[ready:]),
        "memory_mib": {
            "first": round(memory[0], 1),
            "half": round(memory[len(memory) // 2], 1),
            "last": round(memory[-1], 1),
            "most": round(max(memory), 1),
            "per_1000_frames_in_the_second_half": round(slope(tally.memory), 2),
        },
        "seed": seed,
        "cores": os.cpu_count(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    result = soak(args.run, frames=args.frames, clients=args.clients, seed=args.seed)
    print(json.dumps(result, indent=1))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(args.out), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
