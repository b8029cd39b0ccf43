"""A BabyAI room as a graph: every place and direction that the agent can have in it, and where each move leads.

Objects stay where they are: the moves are turning left, turning right and walking. So a room is a finite, deterministic
Markov decision process whose states can be read off the frames, tile by tile.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dreamer4_jax.envs.symbols import SymbolDecoder
from dreamer4_jax.evaluation.graph import Mdp
from dreamer4_jax.evaluation.simulator import clone
from dreamer4_jax.evaluation.transitions import query
from dreamer4_jax.world.oracle import TransitionOracle

MOVES = ("turn left", "turn right", "walk")  # classes 0, 1, 2 of minigrid's actions
KINDS = ("turn", "walk", "bump", "arrive")  # of edges: see `Room.kinds`
STREAMS = 256  # asked at once


@dataclass(frozen=True)
class Room:
    """Attributes:
    level, mission: of the episode.
    task: int32 [words].
    frames: uint8 [S, H, W, 3] of the states, `symbols` int [S, rows, cols] what stands on their tiles.
    place: int [S, 3], column, row and direction of the agent.
    true: the process, [S, 3]: reward 1 where the mission is done, after which nothing follows.
    """

    level: str
    mission: str
    task: Int[np.ndarray, " words"]
    frames: UInt8[np.ndarray, "S H W 3"]
    symbols: Int[np.ndarray, "S rows cols"]
    place: Int[np.ndarray, "S 3"]
    true: Mdp

    @property
    def states(self) -> int:
        return len(self.frames)

    @property
    def kinds(self) -> Int[np.ndarray, "S 3"]:
        """Kind of each edge: a turn, a step forward, a step against something, or the one that does the mission; -1
        where the episode has ended."""
        out = np.zeros((self.states, len(MOVES)), int)
        after = self.true.transition[:, 2].argmax(-1)
        out[:, 2] = np.where(after == np.arange(self.states), KINDS.index("bump"), KINDS.index("walk"))
        out[self.true.reward > 0] = KINDS.index("arrive")
        out[self.true.terminal] = -1
        return out


def explore(env: gymnasium.Env, level: str, seed: int, decoder: SymbolDecoder) -> Room:
    """Every state of the episode that `seed` begins, found breadth first in copies of the environment.

    Raises:
      ValueError: two states have the same picture.
    """
    observation, info = env.reset(seed=seed)
    inner: Any = env.unwrapped
    inner.max_steps = 10**6  # a walk through the room takes longer than an episode
    pose = lambda e: (*(int(x) for x in e.unwrapped.agent_pos), int(e.unwrapped.agent_dir))
    number = {pose(env): 0}
    frames, edges = [observation["image"]], []
    waiting = deque([(0, env)])
    while waiting:
        state, here = waiting.popleft()
        for move in range(len(MOVES)):
            there = clone(here, 0)
            observation, reward, ended, _, _ = there.step(move)
            at = number.setdefault(pose(there), len(number))
            if at == len(frames):
                frames.append(observation["image"])
                if not ended:
                    waiting.append((at, there))
            edges.append((state, move, at, float(ended and float(reward) > 0), float(not ended)))
    shape = (len(frames), len(MOVES), len(frames))
    p, cont, reward_of = np.zeros(shape), np.zeros(shape), np.zeros(shape[:2])
    for state, move, at, gain, goes_on in edges:
        p[state, move, at], cont[state, move, at], reward_of[state, move] = 1.0, goes_on, gain
    symbols = decoder.decode(np.stack(frames))
    if len(np.unique(symbols.reshape(len(symbols), -1), axis=0)) < len(symbols):
        raise ValueError(f"level {level}, seed {seed}: two states look the same")
    return Room(
        level,
        info["mission"],
        observation["task"],
        np.stack(frames),
        symbols,
        np.asarray(list(number)),
        Mdp(p, reward_of, cont),
    )


def ask(oracle: TransitionOracle, room: Room, decoder: SymbolDecoder, *, samples: int, seed: int) -> dict[str, Any]:
    """Samples the oracle `samples` times from every state in which the episode goes on, with each move; the state's
    frame is all that it sees. Arguments of `graph.from_samples`; a frame that shows no state counts as state S."""
    assert oracle.tokenizer is not None
    (component,) = oracle.dynamics.cfg.actions
    pieces = [room.frames[i : i + STREAMS] for i in range(0, room.states, STREAMS)]
    filled = [np.resize(x, (STREAMS, *x.shape[1:])) for x in pieces]  # one program serves all
    latents = np.concatenate([np.asarray(_encode(oracle, jnp.asarray(x))) for x in filled])
    inner = np.flatnonzero(~room.true.terminal)
    state, move = (x.reshape(-1) for x in np.meshgrid(np.repeat(inner, samples), np.arange(len(MOVES)), indexing="ij"))
    known = {picture.tobytes(): i for i, picture in enumerate(room.symbols)}
    out: dict[str, list[np.ndarray]] = {"after": [], "reward": [], "cont": []}
    for start in range(0, len(state), STREAMS):
        piece = np.resize(np.arange(start, min(start + STREAMS, len(state))), STREAMS)
        one = np.zeros((STREAMS, 1), np.int32)
        context = [latents[state[piece]], one, one.astype(bool), np.tile(room.task, (STREAMS, 1)), one]
        chosen = {component.name: move[piece].astype(np.int32)}
        key = jax.random.fold_in(jax.random.key(seed), start)
        frame, reward, cont = map(np.asarray, query(oracle, context, chosen, key))
        real = slice(0, min(STREAMS, len(state) - start))
        shown = decoder.decode(frame[real])
        out["after"].append(np.asarray([known.get(picture.tobytes(), room.states) for picture in shown]))
        out["reward"].append(reward[real])
        out["cont"].append(cont[real])
    return {"state": state, "action": move, **{name: np.concatenate(values) for name, values in out.items()}}


@jax.jit
def _encode(oracle: TransitionOracle, frames: UInt8[Array, "S H W 3"]) -> Float[Array, "S 1 N C"]:
    assert oracle.tokenizer is not None
    return oracle.tokenizer.encode(frames[:, None])
