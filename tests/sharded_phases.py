"""One update of every phase on a mesh of eight devices against the same on one; prints the differences as JSON.

JAX_NUM_CPU_DEVICES=8 python -m tests.sharded_phases DATA_DIR PHASE gradients[,parameters] MESH...
JAX_NUM_CPU_DEVICES=8 python -m tests.sharded_phases DATA_DIR imagination exchanged HORIZON...
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from dreamer4_jax.agent.model import Agent
from dreamer4_jax.config import override
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.parallel import MeshSpec, Rules, make_mesh
from dreamer4_jax.parallel.hlo import Module, costs
from dreamer4_jax.parallel.sharding import batch_shardings
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.phases import AgentPhase, DynamicsPhase, ImaginationPhase, TokenizerPhase
from dreamer4_jax.training.state import abstract_state, init_state, make_train_step
from dreamer4_jax.world import Dynamics, perceptual
from tests import small, small_vgg
from tests.toy_env import toy_config

NET = dict(layers=2, time_every=2, width=16, heads=2, kv_heads=2, head_dim=8, ffn=24, window=4)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FLAT = dict(NET, layers=1, time_every=0)
PHASE = {"steps": 2, "batch": 8, "length": 4, "warmup": 1, "optimizer": "muon", "lr": 0.01}


def config():
    return toy_config(
        **{
            "tokenizer.channels": 2,
            "tokenizer.pack": 1,
            "tokenizer.encoder": FLAT,
            "tokenizer.decoder": FLAT,
            "dynamics": {"transformer": NET, "registers": 0, "k_max": 4},
            "agent.hidden": 8,
            "agent.bins": 7,
            "agent.mtp": 1,
            "agent.context": 3,
            "agent.horizon": 2,
            "agent.sample_steps": 2,
            **{f"train.{p}": PHASE for p in ("tokenizer", "dynamics", "agent", "imagination")},
        }
    )


def phases(data: Path):
    frames, tokens = open_dataset(data / "frames"), open_dataset(data / "tokens", identity="shown")
    cfg = config()
    agent = small.drawn(lambda key: Agent(cfg, Dynamics(cfg, key), key))
    return {
        "tokenizer": TokenizerPhase(cfg, frames),
        "perceptual": TokenizerPhase(cfg, frames, distance=small_vgg.small_net()),
        "dynamics": DynamicsPhase(cfg, tokens),
        "agent": AgentPhase(cfg, tokens, agent.dynamics),
        "imagination": ImaginationPhase(cfg, tokens, agent),
    }


def update(phase, optimizer, mesh, rules):
    """(metrics, new parameters, the share of the state's bytes that a device holds)."""
    batch, key = next(phase.batches(0)), jax.random.key(1)
    shardings = rules.shardings(abstract_state(phase, optimizer), mesh)
    state = jax.device_put(init_state(phase, optimizer, jax.random.key(0)), shardings)
    leaves = jax.tree.leaves(state)
    share = sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(x.nbytes for x in leaves)
    frozen = jax.device_put(phase.frozen, rules.shardings(phase.frozen, mesh))
    with jax.set_mesh(mesh):
        step = make_train_step(phase, optimizer, shardings).__wrapped__
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=QUICK)
        placed = jax.device_put(batch, batch_shardings(batch, mesh))
        state, metrics = step(state, frozen, placed, key)
    return jax.device_get(metrics), jax.device_get(jax.tree.leaves(state.model)), share


def differences(phase, mesh, rules, of) -> dict[str, float]:
    """Largest difference of the loss and of the gradients or updated parameters to those of one device."""
    alone = make_mesh(devices=jax.devices()[:1])
    out = {}
    # With plain descent at rate 1 the updated parameters tell the gradients.
    optimizers = {"gradients": optax.sgd(1.0), "parameters": make_optimizer(phase.config)}
    for name in of:
        optimizer = optimizers[name]
        here, ours, share = update(phase, optimizer, mesh, rules)
        there, theirs, _ = update(phase, optimizer, alone, rules)
        out["loss"] = max(float(abs(here[k] - there[k])) for k in there if k.startswith("loss"))
        out[name] = max(float(np.max(np.abs(a - b))) for a, b in zip(ours, theirs, strict=True))
        out["share"] = share
    return out


def exchanged(data: Path, horizon: int) -> int:
    """Bytes that the devices of a mesh of eight exchange in a step of imagination, every pass of a loop counted."""
    cfg, tokens = override(config(), {"agent.horizon": horizon}), open_dataset(data / "tokens", identity="shown")
    phase = ImaginationPhase(cfg, tokens, small.drawn(lambda key: Agent(cfg, Dynamics(cfg, key), key)))
    optimizer, mesh, rules, batch = (
        optax.sgd(1.0),
        make_mesh(MeshSpec(data=8)),
        Rules(min_size=0),
        next(phase.batches(0)),
    )
    shardings = rules.shardings(abstract_state(phase, optimizer), mesh)
    state = jax.device_put(init_state(phase, optimizer, jax.random.key(0)), shardings)
    frozen = jax.device_put(phase.frozen, rules.shardings(phase.frozen, mesh))
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, batch_shardings(batch, mesh))
        step = make_train_step(phase, optimizer, shardings).lower(state, frozen, placed, jax.random.key(1))
        text = step.compile(QUICK).as_text()
    found = costs(Module.parse(text), trips=cfg.agent.sample_steps, scope_of=str)
    return sum(at.bytes for at in found.collectives.values())


if __name__ == "__main__":
    perceptual.BLOCKS = small_vgg.BLOCKS
    directory, name, of, *meshes = sys.argv[1:]
    if of == "exchanged":
        print(json.dumps({horizon: exchanged(Path(directory), int(horizon)) for horizon in meshes}))
        sys.exit()
    phase, rules = phases(Path(directory))[name], Rules(min_size=0)
    found = {text: differences(phase, make_mesh(MeshSpec.parse(text)), rules, of.split(",")) for text in meshes}
    print(json.dumps(found))
