"""Plays Minecraft for another process: ``python minerl_host.py`` in the Python that has MineRL 1.0.

MineRL wants a NumPy that JAX no longer takes, so the game and the model cannot share an interpreter. This file is run
as it is by MineRL's own Python: it imports nothing of dreamer4_jax, keeps to old syntax, and imports MineRL alone.

Requests come on the standard input, answers go to the standard output: each is a line of JSON, an answer followed by
the `bytes` of its picture. Whatever the game prints goes to the standard error.

    {"op": "make", "settings": {...}}   -> {} or {"missing": "why MineRL cannot be imported"}
    {"op": "reset", "seed": 3}          -> {"shape": [360, 640, 3], "bytes": 691200, "inventory": {...},
    {"op": "step", "action": {...}}         "statistics": {"mine_block:oak_log": 2.0, ...}, "gui": false, "done": false}
    {"op": "close"}                     -> {}
"""

import json
import os
import sys

STATISTICS = ("mine_block", "craft_item", "use_item", "pickup")


def leaves(tree):
    """(name, value) of the values above 0 in nested dictionaries."""
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from leaves(value)
        elif float(value) > 0:
            yield name, float(value)


def answer(observation, info, done):
    """The header and the picture of a step."""
    import numpy as np

    picture = np.ascontiguousarray(observation["pov"], dtype=np.uint8)
    statistics = {}
    for kind in STATISTICS:
        for name, value in leaves(observation.get(kind, {})):
            statistics[kind + ":" + name] = value
    for name, value in leaves(observation.get("full_stats", {})):
        statistics["custom:" + name] = value
    header = {
        "shape": list(picture.shape),
        "bytes": picture.nbytes,
        "inventory": dict(leaves(observation.get("inventory", {}))),
        "statistics": statistics,
        "gui": bool(info.get("isGuiOpen", False)),
        "done": bool(done),
    }
    return header, picture.tobytes()


def serve(source, sink):
    """Answers requests until the other side closes."""
    game = None
    for line in source:
        request = json.loads(line)
        header, payload = {}, b""
        if request["op"] == "make":
            try:
                from minerl.herobraine.env_specs.human_survival_specs import HumanSurvival
            except ImportError as error:
                header = {"missing": str(error)}
            else:
                game = HumanSurvival(**request["settings"]).make()
        elif request["op"] == "reset":
            game.seed(request["seed"])
            header, payload = answer(game.reset(), {}, False)
        elif request["op"] == "step":
            action = game.action_space.noop()
            action.update(request["action"])
            observation, _, done, info = game.step(action)
            header, payload = answer(observation, info, done)
        else:
            if game is not None:
                game.close()
        sink.write((json.dumps(header) + "\n").encode() + payload)
        sink.flush()
        if request["op"] == "close":
            return


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, where "minerl" is another module
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
