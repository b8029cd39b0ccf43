"""Data of which a part is labelled: how much, which frames, and that the actions of the others reach nothing."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import ConfigError, override
from dreamer4_jax.data.labels import choose, labels_of
from dreamer4_jax.data.pipeline import Loader
from dreamer4_jax.data.schema import DataError, episode_key
from dreamer4_jax.data.store import DatasetSpec, open_dataset
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.data.writer import write_dataset
from dreamer4_jax.training.phases import DynamicsPhase
from dreamer4_jax.world import Dynamics
from tests import small
from tests.toy_env import ACTIONS, COMPONENT, toy_config, toy_episodes

CHUNK, LEVELS = 8, ("left", "far right")


def episodes(seed):
    """Of two levels, by turns; each with meta data of its own."""
    return [
        replace(e, meta={"level": LEVELS[i % 2], "seed": [seed, i]}) for i, e in enumerate(toy_episodes(12, seed=seed))
    ]


def write(path, change=lambda episode: episode):
    spec = DatasetSpec("frames", CHUNK, (16, 16), 3, (COMPONENT,))
    streams = [[change(e) for e in episodes(seed)] for seed in range(3)]
    write_dataset(path, spec, {"train": streams[:2], "holdout": streams[2:]})
    return open_dataset(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "toy")


def test_the_manifest_lists_the_episodes(data):
    want, at = [], 0
    for seed, frames in zip(range(2), data.streams("train"), strict=True):
        start = at
        for e in episodes(seed):
            if start < at + frames:  # what is left over behind the last whole chunk is not stored
                want.append((start, e.meta["level"]))
            start += len(e)
        at += frames
    found = data.episodes("train")
    assert [(e.start, e.level) for e in found] == want
    assert len({e.key for e in found}) == len(found)
    first = np.concatenate([data.chunk("train", i)["is_first"] for i in range(data.chunks("train"))])
    assert [e.start for e in found] == np.flatnonzero(first).tolist()


def test_manifests_that_list_no_episodes_are_read_through(data):
    older = json.loads(json.dumps(data.manifest))
    for entry in older["splits"]["train"]:
        del entry["episodes"]
    assert type(data)(data.directory, older).episodes("train") == data.episodes("train")


@pytest.mark.parametrize("levels", [(), LEVELS[1:]])
def test_the_share_is_of_frames_and_grows_by_nested_sets(data, levels):
    ends = [*(e.start for e in data.episodes("train")[1:]), data.frames("train")]
    mine = np.zeros(data.frames("train"), bool)
    for e, end in zip(data.episodes("train"), ends, strict=True):
        mine[e.start : end] = not levels or e.level in levels
    before = np.zeros_like(mine)
    for share in (0.0, 0.004, 0.04, 0.1, 0.4, 0.77, 1.0):
        labels = choose(data, share, seed=0, levels=levels)
        assert labels.of == mine.sum() and labels.kept.sum() == round(share * mine.sum())
        assert (before <= labels.kept).all() and (labels.kept <= mine).all()
        before = labels.kept
    assert (before == mine).all()
    half, other = choose(data, 0.5, seed=0, levels=levels), choose(data, 0.5, seed=1, levels=levels)
    assert (half.kept != other.kept).any()
    # Whole episodes, but for the one at which the share is reached; and all over the data, not its beginning.
    cut = [e for e, end in zip(data.episodes("train"), ends, strict=True) if 0 < half.kept[e.start : end].mean() < 1]
    assert len(cut) <= 1 and half.kept[len(mine) // 2 :].any()
    assert f"({half.kept.sum()} of {len(mine)})" in str(half)


def test_hours_are_told_where_the_rate_is_known(data):
    labels = replace(choose(data, 0.5, seed=0), fps=0.1)
    hours = labels.kept.sum() / 360
    assert f"; {hours:.3g} of {len(labels.kept) / 360:.3g} hours" in str(labels)


def test_what_the_config_says(data):
    base = toy_config()
    assert labels_of(base, data) is None
    some = labels_of(override(base, {"data.labelled_levels": "left"}), data)
    assert 0 < some.kept.sum() == some.of < data.frames("train")
    with pytest.raises(DataError, match="labelled_levels: .* has no level 'right'; it has 'far right', 'left'"):
        labels_of(override(base, {"data.labelled_levels": "right"}), data)
    with pytest.raises(ConfigError, match=r"data.labelled = 1.5: must be in \[0, 1\]"):
        override(base, {"data.labelled": 1.5})


def test_labelled_and_unlabelled_frames_mix_in_a_batch(data):
    labels = choose(data, 0.5, seed=0)
    plain, partly = (Loader(data, batch=6, length=20, seed=0, labels=x) for x in (None, labels))
    mixed = 0
    for step in range(6):
        a, b = plain.batch(step), partly.batch(step)
        kept = np.stack([labels.kept[i : i + 20] for i in a["id"]])
        mixed += int((kept.any(1) & ~kept.all(1)).sum())
        np.testing.assert_array_equal(b["present"]["move"], a["present"]["move"] & kept)
        np.testing.assert_array_equal(b["actions"]["move"], np.where(kept, a["actions"]["move"], 0))
        for name in ("frames", "reward", "is_first", "task", "id"):
            np.testing.assert_array_equal(a[name], b[name])
    assert mixed, "some rows hold frames of both kinds"


def test_the_actions_of_unlabelled_frames_reach_no_batch(data, tmp_path):
    """Another recording, whose actions differ in every frame that is not labelled, gives the same batches."""
    ends = [*(e.start for e in data.episodes("train")[1:]), data.frames("train")]
    labels = choose(data, 0.3, seed=0)
    kept = {e.key: labels.kept[e.start : end] for e, end in zip(data.episodes("train"), ends, strict=True)}

    def change(episode):
        own = kept.get(episode_key(episode.meta))
        moved = (episode.actions["move"] + 1) % ACTIONS
        if own is None or len(own) < len(episode):
            return episode  # held out, or the last of its stream
        return replace(episode, actions={"move": np.where(own, episode.actions["move"], moved).astype(np.int32)})

    other = write(tmp_path / "other", change)
    raw = [
        np.concatenate([d.chunk("train", i)["actions/move"] for i in range(d.chunks("train"))]) for d in (data, other)
    ]
    assert (raw[0] != raw[1]).mean() > 0.5
    for step in range(8):
        a, b = (Loader(d, batch=4, length=12, seed=0, labels=choose(d, 0.3, seed=0)).batch(step) for d in (data, other))
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_without_labels_no_action_is_learned_from(data, tmp_path):
    """The gradient of what embeds actions is exactly zero where no frame is labelled; of a part, where no class is."""
    net = dict(layers=2, time_every=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, window=4)
    fields = {
        "tokenizer.channels": 2,
        "tokenizer.pack": 1,
        "dynamics": {"transformer": net, "registers": 0, "k_max": 4},
        "train.dynamics": {"steps": 2, "batch": 6, "length": 6, "warmup": 1},
    }
    write_tokens(data.directory, tmp_path / "tokens", lambda x, _: np.zeros((*x.shape[:2], 4, 2)), identity="zeros")
    tokens = open_dataset(tmp_path / "tokens", identity="zeros")
    model = small.drawn(lambda key: Dynamics(toy_config(**fields), key))
    phase = DynamicsPhase(toy_config(**fields), tokens)
    slope = jax.jit(jax.grad(lambda m, batch: phase.loss(m, m, None, batch, jax.random.key(0))[0]["dynamics"]))
    for share, wanted in ((0.0, {0}), (0.2, set(range(1, ACTIONS))), (1.0, {ACTIONS})):
        batches = DynamicsPhase(toy_config(**fields, **{"data.labelled": share}), tokens).batches(0)
        shown = lambda batch: np.unique(batch["actions"]["move"][batch["present"]["move"]])
        batch = next(b for b in batches if len(shown(b)) in wanted)
        of = slope(model, jax.tree.map(jnp.asarray, batch)).actions
        moved = (np.asarray(of.tables["move"][...]) != 0).any(-1)
        assert moved.tolist() == [a in shown(batch) for a in range(ACTIONS)]
        assert (np.asarray(of.base[...]) != 0).any(), "every frame has the base embedding"
