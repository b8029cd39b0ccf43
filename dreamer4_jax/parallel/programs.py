"""The programs of a config as ahead-of-time compilation needs them: functions and the shapes of their arguments.

Every phase's training step at its short and long batches, one generated frame, and whatever sharding each argument has
on a mesh. Nothing is computed or allocated.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamer4_jax.agent.model import Agent
from dreamer4_jax.config import Config, ConfigError, PhaseConfig
from dreamer4_jax.parallel.sharding import Rules, batch_shardings, cache_shardings
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.phases import AgentPhase, DynamicsPhase, ImaginationPhase, TokenizerPhase
from dreamer4_jax.training.state import TrainState, init_state, make_train_step
from dreamer4_jax.world import perceptual
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.precision import cast_once
from dreamer4_jax.world.shortcut import next_frame

PHASES = ("tokenizer", "dynamics", "agent", "imagination")
PROGRAMS = (*PHASES, "generate")


@dataclass(frozen=True)
class Program:
    """One jitted function and the abstract arguments that it is compiled for.

    Attributes:
      name: "dynamics T=64".
      function: already jitted, with its donated arguments.
      arguments: trees of `jax.ShapeDtypeStruct`; on a mesh each has its sharding.
      kinds: what the arguments are, in their order, each the name of one kind or a function from the argument to
        {kind: tree}.
      frames: of video that one call trains on or makes.
      rows: sequences of one call.
      trips: of loops whose length the program takes as a value (the sampler's steps); None where there are none.
      passes: how often one call reads all of its arguments, at least.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kinds: tuple[str | Callable[[Any], Mapping[str, Any]], ...]
    frames: int
    rows: int
    trips: int | None = None
    passes: int = 1

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of the arguments that one device holds, by kind."""
        out: dict[str, int] = {}
        for kind, argument in zip(self.kinds, self.arguments, strict=True):
            parts = {kind: argument} if isinstance(kind, str) else kind(argument)
            for name, tree in parts.items():
                out[name] = out.get(name, 0) + sum(map(_device_bytes, jax.tree.leaves(tree)))
        return out


def _device_bytes(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = jnp.dtype(leaf.dtype).itemsize
    for n in shape:
        size *= n
    return size


def _state_kinds(state: TrainState) -> dict[str, Any]:
    return {"parameters": state.model, "optimiser": state.opt_state, "EMA": state.ema}


def abstract_batch(config: Config, phase: str, rows: int, frames: int) -> dict[str, Any]:
    """Shapes of a batch of a phase: what the data pipeline would deliver."""
    t, wide = config.tokenizer, (rows, frames)

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if phase == "tokenizer":
        return {"frames": of((*wide, t.height, t.width, 3), jnp.uint8), "is_first": of(wide, jnp.bool_)}
    actions = abstract_actions(config, rows, frames)
    batch: dict[str, Any] = {
        "latents": of((*wide, t.tokens, t.token_channels), jnp.float32),
        "actions": actions.values,
        "present": actions.present,
        "is_first": of(wide, jnp.bool_),
    }
    if phase != "dynamics":
        batch |= {"is_last": of(wide, jnp.bool_), "task": of((*wide, config.agent.task_words), jnp.int32)}
    if phase == "agent":
        batch |= {
            "is_terminal": of(wide, jnp.bool_),
            "reward": of(wide, jnp.float32),
            "relevant": of((rows,), jnp.bool_),
        }
    return batch


def abstract_actions(config: Config, rows: int, frames: int) -> Actions:
    """Shapes of the actions of a batch."""
    values: dict[str, Any] = {}
    for part in config.actions:
        wide = (rows, frames) if part.kind in ("categorical", "mouse") else (rows, frames, part.size)
        values[part.name] = jax.ShapeDtypeStruct(wide, jnp.float32 if part.kind == "continuous" else jnp.int32)
    present: dict[str, Any] = {name: jax.ShapeDtypeStruct((rows, frames), jnp.bool_) for name in values}
    return Actions(values, present)


def _phase(config: Config, name: str, key: Any) -> Any:
    """A phase without a dataset; what it starts from is drawn, which costs nothing under `jax.eval_shape`."""
    none: Any = None
    match name:
        case "tokenizer":
            return TokenizerPhase(config, none, distance=perceptual.zeros(config.tokenizer.perceptual))
        case "dynamics":
            return DynamicsPhase(config, none)
        case "agent":
            return AgentPhase(config, none, Dynamics(config, key))
        case "imagination":
            return ImaginationPhase(config, none, Agent(config, Dynamics(config, key), key))
    raise ConfigError(f"unknown phase {name!r}: choose one of {', '.join(PHASES)}")


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def training_step(
    config: Config, phase: str, *, rows: int, frames: int, mesh: Mesh | None = None, rules: Rules | None = None
) -> Program:
    """The update of one phase for batches of `rows` x `frames`, sharded as `training.run_phase` shards it."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = abstract_batch(config, phase, rows, frames)
    # Some of what the step closes over is abstract here: only names and configs of the phase are read.
    made = _phase_of_shapes(config, phase)
    optimizer = make_optimizer(made.config)
    state, frozen = jax.eval_shape(
        lambda k: (init_state(_phase(config, phase, k), optimizer, k), _phase(config, phase, k).frozen), key
    )
    shardings = None
    if mesh is not None:
        rules = rules or Rules()
        shardings = rules.shardings(state, mesh)
        state, frozen = _placed(state, shardings), _placed(frozen, rules.shardings(frozen, mesh))
        batch = _placed(batch, batch_shardings(batch, mesh))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    return Program(
        name=f"{phase} T={frames}",
        function=make_train_step(made, optimizer, shardings),
        arguments=(state, frozen, batch, key),
        kinds=(_state_kinds, "frozen models", "batch", "batch"),
        frames=rows * frames,
        rows=rows,
        trips=config.agent.sample_steps if phase == "imagination" else None,
    )


def _phase_of_shapes(config: Config, name: str) -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    if name == "tokenizer":
        distance = jax.eval_shape(lambda: perceptual.zeros(config.tokenizer.perceptual))
        return TokenizerPhase(config, None, distance=distance)  # type: ignore[arg-type]
    if name == "agent":
        return AgentPhase(config, None, jax.eval_shape(lambda k: Dynamics(config, k), key))  # type: ignore[arg-type]
    if name == "imagination":
        agent = jax.eval_shape(lambda k: Agent(config, Dynamics(config, k), k), key)
        return ImaginationPhase(config, None, agent)  # type: ignore[arg-type]
    return _phase(config, name, key)


def generated_frame(config: Config, *, rows: int = 1, steps: int = 4, mesh: Mesh | None = None) -> Program:
    """One frame of `rows` streams behind a full cache, in `steps` passes; the first also writes the frame before it.

    Weights are in the compute dtype: they are cast once, not per frame.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    model, cache = jax.eval_shape(lambda k: (cast_once(Dynamics(config, k)), Dynamics(config, k).init_cache(rows)), key)
    actions, k = abstract_actions(config, rows, 1), jax.ShapeDtypeStruct((), jnp.int32)
    t = config.tokenizer
    last = jax.ShapeDtypeStruct((rows, 1, t.tokens, t.token_channels), jnp.float32)
    if mesh is not None:
        whole = NamedSharding(mesh, PartitionSpec())
        model = _placed(model, Rules().shardings(model, mesh))
        cache = _placed(cache, cache_shardings(cache, mesh))
        actions, last = (_placed(x, batch_shardings(x, mesh)) for x in (actions, last))
        key, k = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in (key, k))

    def frame(model: Dynamics, cache: Any, last: Any, led: Actions, actions: Actions, key: Any, k: Any) -> Any:
        write, noise = jax.random.split(key)
        return next_frame(model, cache, last, led, actions, (write, noise), steps=k)

    return Program(
        name=f"generate K={steps}",
        function=jax.jit(frame, donate_argnums=1),
        arguments=(model, cache, last, actions, actions, key, k),
        kinds=("parameters", "cache", *("batch",) * 5),
        frames=rows,
        rows=rows,
        trips=steps - 1,
        passes=steps,
    )


def programs(
    config: Config, names: tuple[str, ...] = PROGRAMS, *, mesh: Mesh, rows: int | None = None, steps: int = 4
) -> Iterator[Program]:
    """The named programs of a config on a mesh, each at all lengths of its batches.

    Args:
      rows: of every batch, instead of the config's.
      steps: K of "generate".
    """
    for name in names:
        if name == "generate":
            yield generated_frame(config, steps=steps, mesh=mesh)
            continue
        phase: PhaseConfig = getattr(config.train, name)
        lengths = (phase.length, phase.long_length)
        for count, length in zip(phase.rows, lengths, strict=False):
            yield training_step(config, name, rows=rows or count, frames=length, mesh=mesh)
