"""The four phases: what each loss reaches, and that the one loop runs, stops and resumes them."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.agent.heads import PolicyHead
from dreamer4_jax.agent.model import Agent
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.training import loop, open_run, read_metrics, run_phase, state
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.phases import (
    AgentPhase,
    DynamicsPhase,
    ImaginationPhase,
    TokenizerPhase,
    batch_actions,
    separate_images,
)
from dreamer4_jax.world import Dynamics
from dreamer4_jax.world.shortcut import shortcut_forward
from tests import small
from tests.toy_env import COMPONENT, frame_action, frame_step, toy_config, write_toy_dataset

NET = dict(layers=2, time_every=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, window=4)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FLAT = dict(NET, layers=1, time_every=0)
PHASE = {"steps": 2, "batch": 4, "length": 4, "long_length": 8, "long_every": 2, "warmup": 1, "log_every": 1}


@cache
def config(**overrides):
    """Short batches of 4 x 4 frames and, every other step, long ones of 2 x 8."""
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
            "train.dynamics.image_fraction": 0.3,
            "train.agent.batch": 8,
            **overrides,
        }
    )


def encode(frames, is_first):
    """Tokens that show what a frame shows: its action and its step."""
    shown = np.stack([frame_action(frames) / 4, frame_step(frames) / 9], -1)
    return np.broadcast_to(shown[..., None, :], (*shown.shape[:-1], 4, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(frames, tokens) of the toy environment."""
    directory = tmp_path_factory.mktemp("data")
    write_toy_dataset(directory / "frames")
    write_tokens(directory / "frames", directory / "tokens", encode, identity="shown")
    return open_dataset(directory / "frames"), open_dataset(directory / "tokens", identity="shown")


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """One step for all phases of a kind and config, compiled without optimisation: compiling is all the cost here."""
    steps = {}

    def make_train_step(phase, optimizer, shardings):
        step = state.make_train_step(phase, optimizer, shardings).__wrapped__
        quick = jax.jit(step, donate_argnums=0, compiler_options=QUICK)
        return steps.setdefault((type(phase), phase.full), quick)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_train_step)
        yield


def agent(seed=0) -> Agent:
    cfg = config()
    return small.drawn(lambda key: Agent(cfg, Dynamics(cfg, key), key), seed)


def phases(data):
    frames, tokens = data
    cfg = config()
    made = {
        "tokenizer": TokenizerPhase(cfg, frames),
        "dynamics": DynamicsPhase(cfg, tokens),
        "agent": AgentPhase(cfg, tokens, agent().dynamics),
        "imagination": ImaginationPhase(cfg, tokens, agent()),
    }
    return {name: quick_init(phase) for name, phase in made.items()}


def quick_init(phase):
    """The phase with parameters drawn in NumPy; those that it takes over stay what they are."""
    if phase.name != "imagination":
        drawn = small.drawn(phase.init, 5)
        phase.init = lambda key, base=None: drawn
    return phase


# ---------------------------------------------------------------------------------------------------------------------
# Running


# Each shape compiles a step, which is all the cost: most long batches, and the tokenizer, which tests/test_runner.py
# trains as well, are left to the slow tests. Long batches of the dynamics are in the test of exact resume below.
@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("tokenizer", marks=pytest.mark.slow), "agent", "imagination"])
def test_a_phase_runs_with_short_and_long_batches(data, tmp_path, name, long):
    phase = phases(data)[name]
    if not long:
        phase.full = config(**{f"train.{name}.long_length": 0})
    run_dir = open_run(tmp_path / "run", phase.full)
    result = run_phase(phase, config=phase.full, run_dir=run_dir, seed=0, progress=False)
    assert result.finished and result.steps == 2
    lines = [m for m in read_metrics(run_dir) if m.get("phase", name) == name and "loss" in m]
    terms = {
        "tokenizer": {"reconstruction"},
        "agent": {"dynamics", "policy", "reward", "continue"},
        "imagination": {"policy", "value"},
    }[name]
    assert len(lines) == 2
    for line in lines:
        assert {k.removeprefix("loss/") for k in line if k.startswith("loss/")} == terms
        assert all(np.isfinite(line[f"loss/{t}"]) for t in terms)
    if name == "imagination":  # what it is built on still stands: nothing of it was donated or trained
        for mine, theirs in zip(jax.tree.leaves(phase.agent), jax.tree.leaves(agent()), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_dynamics_n_and_resume_and_n_are_2n_bit_for_bit(data, tmp_path):
    """Peer mistakes 10 and 20, data order included: the batches that a resumed run asks for are the ones it missed."""
    cfg = config(**{"train.dynamics.steps": 4})
    seen = {"whole": [], "parts": []}

    def train(name, **options):
        phase = quick_init(DynamicsPhase(cfg, data[1]))
        batches = phase.batches
        phase.batches = lambda start, part: (seen[name].append(b["latents"]) or b for b in batches(start, part))
        run_dir = open_run(tmp_path / name, cfg, resume=True)
        return run_phase(phase, config=cfg, run_dir=run_dir, seed=0, progress=False, **options)

    whole = train("whole")
    assert not train("parts", stop_after=2).finished
    parts = train("parts", resume=True)
    assert whole.finished and parts.finished
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(parts.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(seen["whole"]) == len(seen["parts"]) == 4
    for a, b in zip(seen["whole"], seen["parts"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert [b.shape[:2] for b in seen["whole"]] == [(4, 4), (2, 8)] * 2


@pytest.mark.parametrize("name", ["tokenizer", "dynamics", "agent", "imagination"])
def test_the_batches_of_a_phase_are_a_function_of_the_step(data, name):
    phase = phases(data)[name]
    whole = phase.batches(0)
    first = [next(whole) for _ in range(5)]
    again = next(phase.batches(4))
    for a, b in zip(jax.tree.leaves(first[4]), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(jax.tree.leaves(first[0])[0], jax.tree.leaves(first[2])[0])


# ---------------------------------------------------------------------------------------------------------------------
# Phase 1b: separate images


def test_separate_images_are_start_frames_that_see_nothing_else():
    cfg = config()
    model = small.drawn(lambda key: Dynamics(cfg, key))
    frames, value = 3, jnp.asarray([[1, 3, 2], [0, 4, 1]], jnp.int32)
    present = jnp.ones((2, frames), bool)
    batch = {"actions": {"move": value}, "present": {"move": present}}
    actions, segments = separate_images(
        jax.random.key(0), batch_actions(batch), jnp.zeros((2, frames), jnp.int32), fraction=1.0
    )
    assert not np.any(actions.present["move"])
    z = small.latents(2, frames, channels=2)
    tau, d = jnp.full((2, frames), 0.5), jnp.full((2, frames), 0.25)

    def predict(z, move):
        return model(z, tau, d, replace(actions, values={"move": move}), segments=segments).z1

    sees = small.dependencies(predict, z, value).reshape(2, frames, 4, 2, frames, 4).any((2, 5))
    np.testing.assert_array_equal(sees, np.eye(2 * frames, dtype=bool).reshape(2, frames, 2, frames))
    run = jax.jit(predict, compiler_options=QUICK)
    np.testing.assert_array_equal(run(z, value), run(z, (value + 1) % 5))


def test_the_share_of_rows_that_are_images_and_the_rows_left_alone():
    segments = first_of_segment(jnp.asarray(np.tile([[1, 0, 1, 0]], (4000, 1)), bool))
    batch = {"actions": {"move": jnp.zeros((4000, 4), jnp.int32)}, "present": {"move": jnp.ones((4000, 4), bool)}}
    actions, after = separate_images(jax.random.key(0), batch_actions(batch), segments, 0.3)
    image = ~np.asarray(actions.present["move"]).all(1)
    assert abs(image.mean() - 0.3) < 0.04
    np.testing.assert_array_equal(np.asarray(actions.present["move"]).any(1), ~image)  # whole rows
    np.testing.assert_array_equal(after[~image], segments[~image])
    assert (np.diff(np.asarray(after)[image], axis=1) != 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Phase 2


def agent_batch(data, rows=8):
    """A batch with both kinds of rows, uniform ones first, as the phase orders them."""
    batch = next(phases(data)["agent"].batches(0))
    np.testing.assert_array_equal(batch["relevant"], np.sort(batch["relevant"]))
    assert batch["relevant"].sum() == rows // 2 and batch["reward"][batch["relevant"]].any()
    return batch


def test_uniform_rows_stand_first_and_rows_stay_whole(data):
    phase = phases(data)["agent"]
    batches = phase.batches(0)
    for _ in range(4):  # short and long
        batch = next(batches)
        rows = len(batch["relevant"])
        assert batch["relevant"].sum() == rows // 2 and not batch["relevant"][: rows // 2].any()
        shown = batch["latents"][..., 0, 0] * 4  # the action that led to the frame
        led = np.where(batch["present"]["move"], batch["actions"]["move"], -1)
        np.testing.assert_allclose(shown, led, atol=0.01)
        np.testing.assert_array_equal(batch["reward"], led == 2)


def test_the_dynamics_loss_never_falls_on_relevant_rows_even_where_the_share_does_not_divide(data):
    """Long batches of 5 rows, half relevant: two or three of them are uniform, by turns."""
    cfg = config(**{"train.agent.batch": 10, "agent.relevant_fraction": 0.5})
    phase = AgentPhase(cfg, data[1], agent().dynamics)
    taken = []

    def spy(model, teacher, latents, *args, rows, **kwargs):
        taken.append(rows)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dreamer4_jax.training.phases.shortcut_forward", spy)
        batches = phase.batches(0)
        for _ in range(6):
            batch = next(batches)
            with pytest.raises(StopIteration):
                phase.loss(agent(), agent(), None, batch, jax.random.key(0))
            uniform = int((~batch["relevant"]).sum())
            assert uniform - 1 <= taken[-1] <= uniform
    assert set(taken) == {5, 2}


def test_which_rows_each_loss_of_phase_2_reads(data):
    """Dynamics: uniform rows; cloning: relevant rows; reward and continue: all (paper section 4.1)."""
    phase, batch, model = phases(data)["agent"], agent_batch(data), agent()
    names = ("dynamics", "policy", "reward", "continue")

    @partial(jax.jit, compiler_options=QUICK)
    def pull(weight, latents):
        def loss(x):
            terms, _ = phase.loss(model, agent(1), None, {**batch, "latents": x}, jax.random.key(4))
            return jnp.stack([terms[n] for n in names])

        return jax.vjp(loss, latents)[1](weight)[0]

    latents = jnp.asarray(batch["latents"], jnp.float32)
    rows = {
        name: (np.asarray(pull(np.eye(4, dtype=np.float32)[i], latents)) != 0).any((1, 2, 3))
        for i, name in enumerate(names)
    }
    np.testing.assert_array_equal(rows["dynamics"], ~batch["relevant"])
    np.testing.assert_array_equal(rows["policy"], batch["relevant"])
    assert rows["reward"].all() and rows["continue"].all()


def test_the_weights_of_phase_2_reach_the_loss(data):
    """agent.dynamics_weight scales the normalised dynamics term of the sum, agent.event_weight the targets of heads."""
    cfg = config(**{"agent.dynamics_weight": 0.25, "agent.event_weight": 7.0})
    phase, batch = AgentPhase(cfg, data[1], agent().dynamics), agent_batch(data)
    phase.init = lambda key, base=None: agent()
    assert phase.weights == {"dynamics": 0.25}
    optimizer = make_optimizer(phase.config)
    start = state.init_state(phase, optimizer, jax.random.key(0))
    _, metrics = state.make_train_step(phase, optimizer)(start, None, batch, jax.random.key(0))
    others = sum(float(metrics[f"scaled/{name}"]) for name in ("policy", "reward", "continue"))
    np.testing.assert_allclose(metrics["loss"], 0.25 * float(metrics["scaled/dynamics"]) + others, rtol=1e-5)

    plain = AgentPhase(config(), data[1], agent().dynamics)
    terms = [jax.jit(p.loss)(agent(), agent(), None, batch, jax.random.key(0))[0] for p in (phase, plain)]
    assert np.asarray(batch["reward"]).any() and float(terms[0]["reward"]) != float(terms[1]["reward"])


def test_cloning_never_sees_the_action_that_it_predicts_and_reward_does(data):
    """Peer mistakes 11 and 18: the action stored at t + 1 changes nothing in what is read out up to frame t, and the
    reward that came with frame t + 1 is read from the action that led there."""
    batch, model = agent_batch(data), agent()
    batch["is_first"] = np.zeros_like(batch["is_first"])  # one episode a row, every action known
    present = {"move": np.ones_like(batch["present"]["move"])}

    @partial(jax.jit, compiler_options=QUICK)
    def read(moves):
        actions = batch_actions({"actions": {"move": moves}, "present": present})
        segments = first_of_segment(batch["is_first"])
        task = batch["task"]
        key = jax.random.key(0)
        _, _, h = shortcut_forward(
            model.dynamics,
            model.dynamics,
            jnp.asarray(batch["latents"], jnp.float32),
            actions,
            key,
            task=task,
            segments=segments,
        )
        return model.policy.next(h).parts["move"].logits, model.reward.mean(h)

    moves = batch["actions"]["move"]
    policy, reward = (np.asarray(x) for x in read(moves))
    for t in range(3):
        changed = moves.copy()
        changed[:, t + 1] = (changed[:, t + 1] + 1) % COMPONENT.size
        policy_after, reward_after = (np.asarray(x) for x in read(changed))
        np.testing.assert_array_equal(policy[:, : t + 1], policy_after[:, : t + 1])
        np.testing.assert_array_equal(reward[:, : t + 1], reward_after[:, : t + 1])
        assert (policy[:, t + 1] != policy_after[:, t + 1]).any(-1).all()
        assert (reward[:, t + 1] != reward_after[:, t + 1]).all()


def test_phase_3_starts_from_the_cloned_policy(data):
    phase = phases(data)["imagination"]
    model = phase.init(jax.random.key(0))
    assert isinstance(model.policy, PolicyHead)
    for mine, prior in zip(jax.tree.leaves(model.policy), jax.tree.leaves(phase.frozen["prior"]), strict=True):
        np.testing.assert_array_equal(mine, prior)
    assert set(phase.frozen) == {"dynamics", "reward", "cont", "prior"}
    assert float(jnp.abs(model.value.mean(jnp.ones((2, 16)))).max()) == 0  # a new value head knows nothing
