"""Plays procgen games at random, mostly forwards, and writes .npz episodes, one a file, as docs/data.md has them.

Run by record_procgen.sh in an environment of its own (procgen wants NumPy below 2): it imports nothing of the package.

Every episode plays a level that no other plays: those that a conversion holds out are levels nobody trains on. An
episode is a function of (game, look, level, seed, steps): any number of workers, and any interruption, leaves the same
files, and the same command again makes what is missing. procgen.json lists them with seeds and checksums.

In place of an episode's last frame the game shows the next level. So the action that ended an episode led to a frame
that is not kept; it is dropped, and what it earned stands with the last frame there is.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

GAMES = (
    "bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja "
    "plunder starpilot"
).split()
LOOKS: dict[str, dict[str, bool]] = {
    "classic": {},
    "bare": {"use_backgrounds": False, "restrict_themes": True},  # one theme before black
    "blocks": {"use_backgrounds": False, "restrict_themes": True, "use_monochrome_assets": True},  # plain rectangles
}
MOVES, BUTTONS = 9, 15  # left, stay, right x down, none, up; then D, A, W, S, Q, E, which only some games have
BUTTON_GAMES = {"bossfight", "caveflyer", "dodgeball", "fruitbot", "ninja", "plunder", "starpilot"}
# Where the way leads to the right: mostly right, often with a jump, and back often enough to teach it.
FORWARD = {7: 0.34, 8: 0.28, 1: 0.13, 2: 0.09, 4: 0.08, 5: 0.08}
FORWARD_GAMES = {"coinrun", "ninja"}
HOLD = 8  # an action is held for 1 .. HOLD steps
AIMLESS = 0.2  # share of the episodes in which every action is equally likely
STRIDE = 7919  # between the level seeds of episodes: neighbours look alike


@dataclass(frozen=True)
class Request:
    """What a directory holds."""

    game: str
    look: str
    mode: str
    episodes: int
    first: int
    steps: int
    seed: int
    version: str

    @property
    def actions(self) -> int:
        return BUTTONS if self.game in BUTTON_GAMES else MOVES

    def level(self, number: int) -> int:
        """Level seed of an episode, below 2^31."""
        return (self.first + number) * STRIDE % (2**31 - 1)

    def file(self, number: int) -> str:
        return f"{self.game}-{self.look}-{self.first + number:07d}.npz"


class Player:
    """Holds an action for some steps, then draws another."""

    def __init__(self, request: Request, rng: np.random.Generator):
        self.rng, self.left, self.action = rng, 0, 0
        self.weights = np.full(request.actions, 1 / request.actions)
        self.name = "aimless"
        if request.game in FORWARD_GAMES and rng.random() >= AIMLESS:
            self.name = "forward"
            self.weights = np.asarray([FORWARD.get(a, 0.0) for a in range(request.actions)])

    def __call__(self) -> int:
        if not self.left:
            self.left = int(self.rng.integers(1, HOLD + 1))
            self.action = int(self.rng.choice(len(self.weights), p=self.weights))
        self.left -= 1
        return self.action


def play(request: Request, number: int) -> dict[str, Any]:
    """The arrays of one episode."""
    from procgen import ProcgenGym3Env

    level = request.level(number)
    env = ProcgenGym3Env(
        num=1, env_name=request.game, start_level=level, num_levels=1, rand_seed=level, num_threads=0,
        distribution_mode=request.mode, **LOOKS[request.look],
    )  # fmt: skip
    player = Player(request, np.random.default_rng([request.seed, level]))
    frames, actions, rewards, terminal = [env.observe()[1]["rgb"][0].copy()], [0], [0.0], False
    while len(frames) <= request.steps and not terminal:
        action = player()
        env.act(np.asarray([action], np.int32))
        reward, observation, first = env.observe()
        if first[0]:
            terminal = True
            rewards[-1] += float(reward[0])
        else:
            frames.append(observation["rgb"][0].copy())
            actions.append(action)
            rewards.append(float(reward[0]))
    env.close()
    reward = np.asarray(rewards, np.float32)
    reward[0] = 0.0  # nothing led to the first frame; an episode of one step loses what it earned
    return {
        "frames": np.stack(frames),
        "actions/move": np.asarray(actions, np.int64),
        "reward": reward,
        "is_terminal": np.asarray(terminal),
        "level": np.asarray(f"{request.game}-{request.look}"),
        "policy": np.asarray(player.name),
    }


def record(job: tuple[Request, int, str]) -> dict[str, Any]:
    """Worker: makes one file, whole or not at all, unless it is there; returns its entry in procgen.json."""
    request, number, directory = job
    path = Path(directory) / request.file(number)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.npz")
        try:
            np.savez_compressed(draft, **play(request, number))
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    with np.load(path, allow_pickle=False) as file:
        entry = {
            "file": path.name,
            "level_seed": request.level(number),
            "policy": str(file["policy"]),
            "frames": len(file["reward"]),
            "return": round(float(file["reward"].sum()), 3),
            "is_terminal": bool(file["is_terminal"]),
        }
    with path.open("rb") as stream:
        return {**entry, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write(path: Path, tree: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    draft.write_text(json.dumps(tree, indent=1) + "\n")
    os.replace(draft, path)


def claim(directory: Path, request: Request) -> None:
    """Makes the directory, or checks that it is of the same request; ends with a message and code 2 if it is not."""
    path, wanted = directory / "procgen.json", asdict(request)
    if path.exists():
        found = json.loads(path.read_text())["request"]
        if differ := [f"{k} is {found.get(k)!r} there, {v!r} here" for k, v in wanted.items() if found.get(k) != v]:
            fail(f"{directory} holds another recording ({'; '.join(differ)}): choose another directory")
    elif directory.exists() and any(directory.iterdir()):
        fail(f"{directory} is not empty and holds no recording of procgen: choose another directory")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        write(path, {"request": wanted, "complete": False})


def fail(text: str) -> None:
    print(f"record_procgen: {text}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    from importlib.metadata import version

    from rich.progress import track

    parser = argparse.ArgumentParser(prog="launch/record_procgen.sh", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("game", choices=GAMES)
    parser.add_argument("directory", type=Path, help="where the episodes go; new, or of the same command")
    parser.add_argument("--episodes", type=int, default=1000, help="how many, each of a level of its own (1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first level (0)")
    parser.add_argument("--steps", type=int, default=256, help="the most of an episode (256)")
    parser.add_argument("--look", choices=LOOKS, default="classic", help="themes and backgrounds (classic)")
    parser.add_argument(
        "--mode", choices=("easy", "hard"), default="easy", help="procgen's distribution of levels (easy)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the actions (0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    args = parser.parse_args()
    for name, least in (("episodes", 1), ("first", 0), ("steps", 1), ("seed", 0), ("workers", 1)):
        if getattr(args, name) < least:
            fail(f"--{name} {getattr(args, name)}: must be at least {least}")
    request = Request(args.game, args.look, args.mode, args.episodes, args.first, args.steps, args.seed,
                      version("procgen2"))  # fmt: skip
    claim(args.directory, request)
    jobs = [(request, i, str(args.directory)) for i in range(args.episodes)]
    show = lambda found: list(track(found, f"recording {args.game}", total=len(jobs)))
    if args.workers == 1:
        entries = show(map(record, jobs))
    else:
        with multiprocessing.get_context("spawn").Pool(min(args.workers, len(jobs))) as pool:
            entries = show(pool.imap(record, jobs, chunksize=4))
    frames, wins = sum(e["frames"] for e in entries), sum(e["return"] > 0 for e in entries)
    write(
        args.directory / "procgen.json",
        {"request": asdict(request), "complete": True, "actions": request.actions, "frames": frames,
         "episodes": entries},
    )  # fmt: skip
    print(f"{args.directory}: {len(entries)} episodes, {frames} frames, {wins} with a reward")


if __name__ == "__main__":
    main()
