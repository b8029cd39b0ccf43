"""Shortcut forcing against the enumeration of Eq 4 and the literal Eq 7 in float64."""

from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import DynamicsConfig
from dreamer4_jax.world import Dynamics, DynamicsOutput, shortcut
from tests import reference
from tests.small import config, drawn, latents, moves, nonzero

K_MAX = 8
CLOSE = dict(rtol=2e-5, atol=2e-5)

# ---------------------------------------------------------------------------------------------------------------------
# Eq 4, 6, 8


@pytest.mark.parametrize("k_max", [2, 8, 64])
def test_sample_tau_d_follows_eq_4(k_max):
    draws = 200_000
    tau, d = shortcut.sample_tau_d(jax.random.key(0), (draws // 100, 100), k_max)
    assert tau.dtype == d.dtype == jnp.float32 and tau.shape == d.shape == (draws // 100, 100)
    grid = {(t, s): p for t, s, p in reference.tau_d_grid(k_max)}
    counts = dict.fromkeys(grid, 0)
    for pair, n in zip(*np.unique(np.stack([np.ravel(tau), np.ravel(d)], -1), axis=0, return_counts=True), strict=True):
        counts[tuple(map(float, pair))] += n  # KeyError: off the grid
    chi = sum((counts[c] - draws * p) ** 2 / (draws * p) for c, p in grid.items())
    freedom = len(grid) - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of chi square


def test_sample_tau_d_within_a_part_of_the_ladder():
    tau, d = shortcut.sample_tau_d(jax.random.key(1), (4000,), 16, coarsest=1, finest=3)
    assert set(np.unique(d)) == {1 / 2, 1 / 4, 1 / 8}
    assert np.array_equal(np.round(tau / d), tau / d) and float((tau + d).max()) <= 1
    tau, d = shortcut.sample_tau_d(jax.random.key(1), (4000,), 16, coarsest=4)
    assert set(np.unique(d)) == {1 / 16} and len(np.unique(tau)) == 16


def test_ramp():
    tau = np.linspace(0, 1, 9)
    np.testing.assert_allclose(shortcut.ramp(tau), reference.ramp(tau))
    assert shortcut.ramp(0.0) == pytest.approx(0.1) and shortcut.ramp(1.0) == pytest.approx(1.0)


def test_add_noise():
    z1, z0, tau = latents(2, 3), latents(2, 3, 1), jnp.asarray([[0.0, 0.25, 0.875]] * 2)
    expected = (1 - np.asarray(tau))[..., None, None] * z0 + np.asarray(tau)[..., None, None] * z1
    np.testing.assert_allclose(shortcut.add_noise(z1, z0, tau), expected, rtol=1e-6, atol=1e-7)
    assert np.array_equal(shortcut.add_noise(z1, z0, tau)[:, 0], z0[:, 0])


@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_euler_steps_towards_the_truth_end_there_on_the_straight_line(steps):
    z0, z1 = latents(1, 1, 0), latents(1, 1, 1)
    z = z0
    for i in range(steps):
        z = shortcut.euler_step(z, z1, i / steps, 1 / steps)
        line = z0 + (z1 - z0) * (i + 1) / steps
        np.testing.assert_allclose(z, line, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(z, z1, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Eq 7 with a network that can be written in float64


def network(z, tau, d, w, xp=np):
    """Depends on all of its inputs, nonlinearly."""
    level, size = tau[..., None, None], d[..., None, None]
    return xp.tanh(w * z + 0.3 * z[..., ::-1] * level - 0.5 * size + 0.2 * level)


def test_bootstrap_target_is_the_literal_eq_7():
    rng = np.random.default_rng(0)
    z0, z1 = rng.standard_normal((2, 64, 5, 4, 3))
    choices = [(t, d) for t, d, _ in reference.tau_d_grid(K_MAX) if d > 1 / K_MAX]
    tau, d = np.moveaxis(np.array(choices)[rng.integers(0, len(choices), (64, 5))], -1, 0)
    f = partial(network, w=0.8)
    literal = reference.shortcut_errors(f, z0, z1, tau, d, 1 / K_MAX)
    z = (1 - tau)[..., None, None] * z0 + tau[..., None, None] * z1
    narrow = [jnp.asarray(x, jnp.float32) for x in (z, tau, d)]
    target = shortcut.bootstrap_target(partial(network, w=0.8, xp=jnp), *narrow)
    assert target.dtype == jnp.float32
    np.testing.assert_allclose((f(z, tau, d) - np.asarray(target)) ** 2, literal, rtol=1e-3, atol=1e-5)


@partial(jax.tree_util.register_dataclass, data_fields=["w"], meta_fields=["cfg", "calls", "context_level"])
@dataclass
class Fake:
    """The interface of `Dynamics` around `network`; records what it is called with."""

    cfg: SimpleNamespace
    w: jax.Array
    calls: list = field(default_factory=list)
    context_level: float = 0.75

    def __call__(self, z, tau, d, actions, *, task=None, segments=None):
        self.calls.append((z, tau, d, actions, segments))
        return DynamicsOutput(network(z, tau, d, self.w, jnp), None, None)


def fakes(**fields):
    cfg = SimpleNamespace(dynamics=DynamicsConfig(k_max=K_MAX, **fields))
    return Fake(cfg, jnp.float32(0.8)), Fake(cfg, jnp.float32(0.3))


def literal_errors(student, z1):
    """Per frame, from the inputs that the student was shown: float64 Eq 7 with teacher weight 0.3."""
    z, tau, d = (np.asarray(x, np.float64) for x in student.calls[0][:3])
    z0 = (z - tau[..., None, None] * z1) / (1 - tau)[..., None, None]
    f, teacher = partial(network, w=0.8), partial(network, w=0.3)
    return reference.shortcut_errors(f, z0, z1, tau, d, 1 / K_MAX, teacher).mean((-2, -1)), tau, d == 1 / K_MAX


@pytest.mark.parametrize("mix", ["rows", "frames"])
@pytest.mark.parametrize("ramp", ["both", "flow", "none"])
def test_loss_is_the_weighted_mean_of_eq_7(mix, ramp):
    """Peer mistake 9: the ramp weighs both branches."""
    student, teacher = fakes(mix=mix, ramp=ramp)
    z1 = latents(16, 5)
    loss, metrics, _ = shortcut.shortcut_forward(student, teacher, z1, moves(16, 5), jax.random.key(3))
    errors, tau, flow = literal_errors(student, np.asarray(z1, np.float64))
    assert flow.any() and (~flow).any()
    ramped = reference.ramp(tau)
    weight = {"both": ramped, "flow": np.where(flow, ramped, 1.0), "none": np.ones_like(tau)}[ramp]
    np.testing.assert_allclose(loss, (weight * errors).mean(), **CLOSE)
    np.testing.assert_allclose(metrics["flow"], errors[flow].mean(), **CLOSE)
    np.testing.assert_allclose(metrics["bootstrap"], errors[~flow].mean(), **CLOSE)


@pytest.mark.parametrize("mix", ["rows", "frames"])
def test_loss_in_velocities_is_the_literal_eq_3(mix):
    student, teacher = fakes(mix=mix, ramp="none", loss_space="v")
    z1 = latents(16, 5)
    loss, _, _ = shortcut.shortcut_forward(student, teacher, z1, moves(16, 5), jax.random.key(3))
    z, tau, d = (np.asarray(x, np.float64) for x in student.calls[0][:3])
    wide = lambda x: x[..., None, None]
    z0 = (z - wide(tau) * np.asarray(z1, np.float64)) / wide(1 - tau)
    velocity = lambda w: lambda x, t, s: (network(x, t, s, w) - x) / wide(1 - t)
    f, teach = velocity(0.8), velocity(0.3)
    first = teach(z, tau, d / 2)
    second = teach(z + first * wide(d) / 2, tau + d / 2, d / 2)
    target = np.where(wide(d) == 1 / K_MAX, np.asarray(z1, np.float64) - z0, (first + second) / 2)
    np.testing.assert_allclose(loss, ((f(z, tau, d) - target) ** 2).mean(), rtol=1e-4)


def test_velocity_prediction_leads_to_clean_tokens():
    """x = z~ + (1 - tau) v, with v what the same weights give as x."""
    z, tau, d = latents(2, 3), jnp.asarray([[0.0, 0.25, 0.5]] * 2), jnp.full((2, 3), 0.25)
    run = jax.jit(lambda model, *inputs: model(*inputs).z1)
    direct, velocity = (
        run(drawn(partial(Dynamics, config(**{"dynamics.prediction": name}))), z, tau, d, moves(2, 3))
        for name in ("x", "v")
    )
    expected = np.asarray(z, np.float64) + (1 - np.asarray(tau))[..., None, None] * np.asarray(direct)
    np.testing.assert_allclose(velocity, expected, rtol=1e-5, atol=1e-6)


def test_rows_mix_gives_each_row_one_branch():
    student, teacher = fakes(mix="rows", bootstrap_fraction=0.25)
    actions, segments = moves(16, 5), jnp.arange(80).reshape(16, 5)
    shortcut.shortcut_forward(student, teacher, latents(16, 5), actions, jax.random.key(0), segments=segments)
    d = np.asarray(student.calls[0][2])
    bootstrap = np.arange(16) % 4 == 0
    assert (d[bootstrap] > 1 / K_MAX).all() and (d[~bootstrap] == 1 / K_MAX).all()
    assert len(teacher.calls) == 2
    (_, tau, big, _, _), (_, tau1, d1, acted, seg), (_, tau2, d2, _, _) = student.calls[0], *teacher.calls
    assert np.array_equal(d1, big[::4] / 2) and np.array_equal(d2, d1)
    assert np.array_equal(tau1, tau[::4]) and np.array_equal(tau2, tau[::4] + d1)
    assert np.array_equal(acted.values["move"], actions.values["move"][::4]) and np.array_equal(seg, segments[::4])


def test_frames_mix_draws_eq_4_and_keeps_flow_frames_as_context_of_the_teacher():
    student, teacher = fakes(mix="frames")
    shortcut.shortcut_forward(student, teacher, latents(64, 8), moves(64, 8), jax.random.key(0))
    z, tau, d = student.calls[0][:3]
    shares = [float((np.asarray(d) == 2.0**-i).mean()) for i in range(4)]
    np.testing.assert_allclose(shares, 0.25, atol=0.1)
    flow = np.asarray(d) == 1 / K_MAX
    for seen in teacher.calls:
        for a, b in zip(seen[:3], (z, tau, d), strict=True):
            assert np.array_equal(np.asarray(a)[flow], np.asarray(b)[flow])
        assert np.array_equal(np.asarray(seen[2])[~flow], np.asarray(d)[~flow] / 2)


def test_diffusion_objective_has_no_bootstrap():
    student, teacher = fakes(objective="diffusion")
    z1 = latents(8, 5)
    loss, metrics, _ = shortcut.shortcut_forward(student, teacher, z1, moves(8, 5), jax.random.key(0))
    errors, tau, flow = literal_errors(student, np.asarray(z1, np.float64))
    assert flow.all() and not teacher.calls and set(metrics) == {"flow"}
    np.testing.assert_allclose(loss, (reference.ramp(tau) * errors).mean(), **CLOSE)


@pytest.mark.parametrize("mix", ["rows", "frames"])
def test_rows_restricts_the_loss_to_the_first_rows(mix):
    student, teacher = fakes(mix=mix)
    z1 = latents(8, 5)

    def loss(z1):
        student.calls.clear()
        return shortcut.shortcut_forward(student, teacher, z1, moves(8, 5), jax.random.key(5), rows=3)[0]

    value = loss(z1)
    errors, tau, flow = literal_errors(student, np.asarray(z1, np.float64))
    assert flow[:3].any() and (~flow[:3]).any()
    np.testing.assert_allclose(value, (reference.ramp(tau) * errors)[:3].mean(), **CLOSE)
    gradient = np.asarray(jax.grad(loss)(z1))
    assert not gradient[3:].any() and all(row.any() for row in gradient[:3])


def test_rows_without_the_loss_stand_at_the_context_level():
    """Peer mistake 5: noised to the level of their label, each with noise of its own."""
    student, teacher = fakes(mix="rows")
    z1, key = latents(8, 200), jax.random.key(3)
    shortcut.shortcut_forward(student, teacher, z1, moves(8, 200), key, rows=3)
    z, tau, d = (np.asarray(x) for x in student.calls[0][:3])
    assert (tau[3:] == 0.75).all() and (d[3:] == 1 / K_MAX).all() and len(np.unique(tau[:3])) > 1
    z0 = ((z - tau[..., None, None] * z1) / (1 - tau)[..., None, None])[3:]
    np.testing.assert_allclose([z0.mean(), z0.std()], [0, 1], atol=0.05)
    assert abs(np.corrcoef(z0.reshape(5, -1))[np.triu_indices(5, 1)]).max() < 0.2


def test_bootstrap_rows():
    cfg = DynamicsConfig(bootstrap_fraction=0.25)
    rows = lambda n, **fields: list(shortcut.bootstrap_rows(replace(cfg, **fields), n))
    assert [rows(n) for n in (2, 4, 16)] == [[0], [0], [0, 4, 8, 12]]
    assert rows(7) == [0, 3] and rows(10) == [0, 5]
    assert rows(2, bootstrap_fraction=0.9) == [0]  # one is left for flow
    assert rows(5, mix="frames") == [0, 1, 2, 3, 4]
    assert rows(5, objective="diffusion") == []


@pytest.mark.parametrize(
    "count,total,groups,expected",
    [
        (4, 16, 1, range(0, 16, 4)),  # alone: no row more than is needed
        (4, 16, 4, range(0, 16, 4)),  # one each
        (8, 64, 16, range(0, 64, 4)),  # the agent phase, half of whose rows carry the loss: one each instead of eight
        (16, 64, 64, range(64)),  # a row each: everybody's own instead of sixteen
        (1, 4, 2, range(0, 4, 2)),
        (2, 7, 3, range(0, 6, 3)),  # rows that the groups cannot share at all
    ],
)
def test_the_teacher_computes_rows_that_can_be_divided(count, total, groups, expected):
    stride = 4 if total != 7 else 3
    found = shortcut.teacher_rows(range(0, count * stride, stride), total, groups)
    assert found == expected and set(range(0, count * stride, stride)) <= set(found)


@pytest.mark.parametrize(
    "batch, rows, groups", [(16, 16, 1), (7, 7, 1), (16, 8, 1), (7, 3, 1), (16, 8, 8), (16, 8, 16)]
)
def test_the_target_of_a_bootstrap_row_is_its_own(batch, rows, groups, monkeypatch):
    """Whatever the stride: rows are picked for the teacher and its answers go back to the same rows, also where it
    computes more rows than are needed, for groups of devices that could not share them."""
    monkeypatch.setattr(shortcut, "batch_groups", lambda: groups)
    student, teacher = fakes(mix="rows", bootstrap_fraction=0.4)
    z1 = latents(batch, 5)
    loss, *_ = shortcut.shortcut_forward(student, teacher, z1, moves(batch, 5), jax.random.key(1), rows=rows)
    if groups > 1:
        assert teacher.calls[0][0].shape[0] % groups == 0
    errors, tau, flow = literal_errors(student, np.asarray(z1, np.float64))
    assert (~flow[:rows]).any() and flow[rows:].all()
    np.testing.assert_allclose(loss, (reference.ramp(tau) * errors)[:rows].mean(), **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the real model


def small(mix):
    shallow = {"dynamics.transformer.layers": 2, "dynamics.transformer.time_every": 2}
    cfg = config(**{"dynamics.mix": mix, **shallow})
    return drawn(lambda key: Dynamics(cfg, key))


@pytest.fixture(scope="module", params=["rows", "frames"])
def trained(request):
    """Gradients of model and teacher, their absolute values summed over eight keys."""
    model, teacher, z1, actions = small(request.param), small(request.param), latents(6, 4), moves(6, 4)

    @jax.jit
    def gradients(model, teacher, key):
        loss = lambda model, teacher: shortcut.shortcut_loss(model, teacher, z1, actions, key)[0]
        return jax.tree.map(jnp.abs, jax.grad(loss, (0, 1))(model, teacher))

    each = [gradients(model, teacher, key) for key in jax.random.split(jax.random.key(0), 8)]
    return jax.tree.map(lambda *x: sum(x), *each)


def test_every_step_size_and_level_is_trained(trained):
    """Peer mistake 8: every d in {1, 1/2, .., 1/k_max} receives a gradient, d = 1 too."""
    step, signal = (np.asarray(table[...]) for table in (trained[0].step, trained[0].signal))
    assert step.shape[0] == 4 and (step.max(1) > 0).all()
    assert signal.shape[0] == K_MAX and (signal.max(1) > 0).all()


def test_no_gradient_flows_into_the_teacher(trained):
    assert nonzero(trained[0].transformer) and not nonzero(trained[1])


def test_the_program_holds_no_gradient_of_the_teacher():
    """Peer mistake 9: with the online weights as teacher, the step costs what it costs with other weights."""
    model, z1, actions, key = small("rows"), latents(6, 4), moves(6, 4), jax.random.key(0)
    other = jax.tree.map(lambda x: x, model)

    def scans(teacher):
        loss = lambda m: shortcut.shortcut_loss(m, m if teacher is None else teacher, z1, actions, key)[0]
        equations = jax.make_jaxpr(jax.grad(loss))(model).eqns
        return [len(e.outvars) for e in equations if e.primitive.name == "scan"]

    # Student, two half steps of the teacher, student backwards; the teacher's scans keep nothing but their result.
    online = scans(None)
    assert online == scans(other) and len(online) == 4 and online[1:3] == [1, 1]
