"""`dreamer4 export`: a run's sampler and policy as portable programs (`jax.export`), and the weights beside them.

A folder holds policy.jaxexport, start.jaxexport and step.jaxexport (readable by other versions of JAX for as long as
`jax.export` promises), weights.npz, manifest.json, and exported.py, which runs them without this package. Arrays and
programs alone: nothing is unpickled.
"""

import dataclasses
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dreamer4_jax import __version__, exported
from dreamer4_jax.agent.model import decide, empty_memory
from dreamer4_jax.config import UserError, to_dict
from dreamer4_jax.inference import World
from dreamer4_jax.world.dynamics import Actions
from dreamer4_jax.world.slots import Shown, StreamState, join_slots, step_slots

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    world: World,
    out: str | Path,
    *,
    context: int | None = None,
    greedy: bool = False,
    dtype: str | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Path:
    """Writes the folder, whole or not at all.

    Args:
      context: frames of context that a stream starts behind, agent.context by default.
      greedy: the policy takes its most probable action instead of drawing one.
      dtype: "float32" or "bfloat16" for the products, instead of the config's.
      platforms: that the programs can run on, of "cpu", "cuda" and "tpu".

    Raises:
      UserError: `out` exists, an unknown platform, or flatbuffers is not installed.
    """
    out = Path(out)
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("writing programs needs flatbuffers: pip install 'dreamer4_jax[export]'")
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another folder")
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"platform {name!r}: must be one of {', '.join(PLATFORMS)}")
    streams = world.streams(slots=1, context=context, dtype=dtype)
    weights, structure = jax.tree.flatten(streams.models)
    config = world.config
    t, words = config.tokenizer, config.agent.task_words
    image = jax.ShapeDtypeStruct((t.height, t.width, 3), jnp.uint8)
    task = jax.ShapeDtypeStruct((words,), jnp.int32)
    number = {name: jax.ShapeDtypeStruct((), name) for name in ("int32", "uint32", "bool")}
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    one = jax.tree.map(lambda x: x[0], streams.no_actions(1))

    # The policy. `decide` is what the closed-loop evaluation plays with.
    tokenizer, dynamics, _ = streams.models
    memory, of_memory = jax.tree.flatten(empty_memory(tokenizer, dynamics, 1))

    def policy(weights: Any, memory: Any, image: Array, task: Array, starting: Array, key: Array) -> Any:
        tokenizer, dynamics, heads = jax.tree.unflatten(structure, weights)
        held = jax.tree.unflatten(of_memory, memory)
        chosen, after = decide(
            tokenizer, dynamics, heads.policy, held, image[None], task[None], starting[None],
            jax.random.wrap_key_data(key), greedy=greedy,
        )  # fmt: skip
        return jax.tree.map(lambda x: x[0], chosen), jax.tree.leaves(after)

    # A stream of its own. Its key crosses as plain numbers.
    state, of_state = jax.tree.flatten(_plain(streams.empty()))

    def start(
        weights: Any, frames: Array, led: Any, present: Array, count: Array, task: Array, seed: Array
    ) -> tuple[Any, Any]:
        models = jax.tree.unflatten(structure, weights)
        there = {name: present[None] for name in led}
        actions = Actions({name: x[None] for name, x in led.items()}, there)
        fresh = _typed(jax.tree.unflatten(of_state, [jnp.zeros(x.shape, x.dtype) for x in state]))
        after, shown = join_slots(
            models, fresh, jnp.zeros(1, jnp.int32), frames[None], actions, count[None], task[None], seed[None]
        )
        return jax.tree.leaves(_plain(after)), _first(shown)

    def step(weights: Any, state: Any, action: Any, steps: Array) -> tuple[Any, Any]:
        models = jax.tree.unflatten(structure, weights)
        given = {name: x[None] for name, x in action.items()}
        before = _typed(jax.tree.unflatten(of_state, state))
        after, shown = step_slots(models, before, given, jnp.ones(1, bool), steps[None])
        return jax.tree.leaves(_plain(after)), _first(shown)

    total = streams.context
    video = jax.ShapeDtypeStruct((total, *image.shape), jnp.uint8)
    led = {name: jax.ShapeDtypeStruct((total, *x.shape), x.dtype) for name, x in one.items()}
    flags = jax.ShapeDtypeStruct((total,), jnp.bool_)
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "policy": (policy, (weights, memory, image, task, number["bool"], key)),
        "start": (start, (weights, video, led, flags, number["int32"], task, number["uint32"])),
        "step": (step, (weights, state, one, number["int32"])),
    }
    manifest = {
        "made_by": f"dreamer4_jax {__version__}, jax {jax.__version__}",
        "config": to_dict(config),
        "weights": [str(x.dtype) for x in weights],
        "memory": [[list(x.shape), str(x.dtype)] for x in memory],
        "actions": {name: [list(x.shape), str(x.dtype)] for name, x in one.items()},
        "context": total,
        "k_max": config.dynamics.k_max,
        "greedy": greedy,
        "platforms": list(platforms),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as draft:
        folder = Path(draft) / out.name
        folder.mkdir()
        for name, (function, arguments) in programs.items():
            made = jax.export.export(jax.jit(function), platforms=list(platforms))(*_shapes(arguments))
            (folder / f"{name}.jaxexport").write_bytes(made.serialize())
        buffer = io.BytesIO()
        np.savez(buffer, **{str(i): _storable(x) for i, x in enumerate(weights)})  # type: ignore[arg-type]
        (folder / "weights.npz").write_bytes(buffer.getvalue())
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.copyfile(exported.__file__, folder / "exported.py")
        folder.rename(out)
    return out


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _storable(x: Array) -> np.ndarray:
    """NumPy's file format knows no bfloat16: its bits, as numbers."""
    value = np.asarray(x)
    return value.view(np.uint16) if value.dtype == jnp.bfloat16 else value


def _plain(state: StreamState) -> StreamState:
    return _with_key(state, jax.random.key_data(state.key))


def _typed(state: StreamState) -> StreamState:
    return _with_key(state, jax.random.wrap_key_data(state.key))


def _with_key(state: StreamState, key: Array) -> StreamState:
    return dataclasses.replace(state, key=key)


def _first(shown: Shown) -> dict[str, Any]:
    """What a single stream shows, without the axis of slots."""
    names = ("frame", "reward", "cont", "value", "action", "greedy", "intention")
    return {name: jax.tree.map(lambda x: x[0], getattr(shown, name)) for name in names}
