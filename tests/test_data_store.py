"""Datasets on disk: round trip, TFDS without TensorFlow, refusal of what does not fit, damage named by file."""

import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from dreamer4_jax.data.schema import DataError, chunks
from dreamer4_jax.data.store import DatasetSpec, open_dataset
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.data.writer import write_dataset, write_request
from tests.toy_env import COMPONENT, frame_action, toy_config, toy_episodes, write_toy_dataset

CHUNK = 16


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy"
    write_toy_dataset(path, chunk=CHUNK)
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_round_trip(original, cache_bytes):
    data = open_dataset(original, toy_config(), cache_bytes=cache_bytes)
    at = 0
    for seed in range(2):
        for arrays, metas in chunks(toy_episodes(30, seed=seed), CHUNK):
            stored = data.chunk("train", at)
            assert set(stored) == set(arrays)
            for name, value in arrays.items():
                assert stored[name].dtype == value.dtype
                np.testing.assert_array_equal(stored[name], value)
            assert data.segments("train", at) == metas
            window = data.window("train", at * CHUNK, CHUNK)
            np.testing.assert_array_equal(window["frames"], arrays["frames"])
            at += 1
    assert at == data.chunks("train") and sum(data.streams("train")) == data.frames("train") == at * CHUNK
    rewards = np.concatenate([data.chunk("train", i)["reward"] for i in range(at)])
    np.testing.assert_array_equal(data.rewarded("train"), rewards > 0)


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_windows_cross_chunks_but_not_streams(original, cache_bytes):
    data = open_dataset(original, cache_bytes=cache_bytes)
    window = data.window("train", CHUNK - 3, 7)
    whole = np.concatenate([data.chunk("train", 0)["frames"], data.chunk("train", 1)["frames"]])
    np.testing.assert_array_equal(window["frames"], whole[CHUNK - 3 : CHUNK + 4])
    border = data.streams("train")[0]
    with pytest.raises(DataError, match="cross two streams"):
        data.window("train", border - 2, 4)
    with pytest.raises(DataError, match="no frames"):
        data.window("train", data.frames("train") - 1, 2)
    with pytest.raises(DataError, match="no split 'test'; it has train, holdout"):
        data.frames("test")


def test_tfds_reads_it_without_tensorflow(original):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"source = tfds.builder_from_directory({str(original)!r}).as_data_source('train')\n"
        "e = source[1]\n"
        "print(len(source), e['frames'].shape, e['actions']['move'].dtype, e['present']['move'].dtype)\n"
        "print(int(e['frames'].sum()), 'tensorflow' in sys.modules or 'jax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    data = open_dataset(original)
    total = int(data.chunk("train", 1)["frames"].sum())
    assert out.splitlines()[-2:] == [
        f"{data.chunks('train')} ({CHUNK}, 16, 16, 3) int32 bool",
        f"{total} False",
    ]


def test_dataset_of_another_shape_is_refused(original):
    with pytest.raises(DataError, match="frames of 16 x 16.*wants tokenizer.height.*= 24 x 16"):
        open_dataset(original, toy_config(**{"tokenizer.height": 24, "tokenizer.latents": 8, "tokenizer.pack": 1,
                                             "tokenizer.latent_grid": False}))  # fmt: skip
    other = toy_config(actions=[{"name": "move", "kind": "categorical", "size": 7}])
    with pytest.raises(DataError, match=r"action space move: categorical\(5\), the config's .* move: categorical\(7\)"):
        open_dataset(original, other)
    with pytest.raises(DataError, match="tasks of 3 words.*agent.task_words = 5"):
        open_dataset(original, toy_config(**{"agent.task_words": 5}))


def shard(directory, split="train"):
    return sorted(directory.glob(f"dreamer4-{split}.array_record-*"))[-1]


def test_truncated_shard_is_named(copy):
    file = shard(copy)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=f"{file.name} is truncated"):
        open_dataset(copy, verify=False)


def test_missing_shard_is_named(copy):
    shard(copy, "holdout").unlink()
    with pytest.raises(DataError, match=r"dreamer4-holdout.array_record-00000-of-00001 is missing"):
        open_dataset(copy)


def test_damaged_shard_is_named_at_opening_or_reading(copy):
    file = shard(copy)
    content = bytearray(file.read_bytes())
    content[64:4096] = bytes(4032)
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file.name} is damaged"):
        open_dataset(copy)
    data = open_dataset(copy, verify=False)  # as with datasets too large to verify on opening
    with pytest.raises(DataError, match=file.name):
        for i in range(data.chunks("train")):
            data.chunk("train", i)


def test_manifest_troubles_are_named(copy, tmp_path):
    with pytest.raises(DataError, match="does not exist.*no dataset"):
        open_dataset(tmp_path / "nowhere")
    manifest = copy / "dataset.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "schema": 99}))
    with pytest.raises(DataError, match="schema version 99"):
        open_dataset(copy)
    manifest.write_text("{")
    with pytest.raises(DataError, match="dataset.json is damaged"):
        open_dataset(copy)
    manifest.unlink()
    with pytest.raises(DataError, match="unfinished recording"):
        open_dataset(copy)


def test_nothing_is_overwritten(original, copy, tmp_path):
    spec = DatasetSpec("frames", CHUNK, (16, 16), 3, (COMPONENT,))
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    with pytest.raises(DataError, match="another config.*spec.chunk is 16 there, 8 here"):
        write_dataset(copy, DatasetSpec("frames", 8, (16, 16), 3, (COMPONENT,)), {"train": [toy_episodes(5)]})
    assert before == {p.name: p.read_bytes() for p in copy.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        write_request(tmp_path / "mine", {"spec": spec.to_json()})


def encode(frames, is_first):
    """A stand-in tokenizer: 4 tokens of 3 channels, exact in float16."""
    assert frames.shape[0] == is_first.shape[0] == 4  # always called with batch_chunks chunks
    corners = frames[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    return corners.astype(np.float32) / 256


def test_stored_latents_are_eight_times_as_fine_as_in_bfloat16(original, tmp_path):
    latents = np.tanh(np.random.default_rng(0).standard_normal((8, CHUNK, 4, 3)) * 2).astype(np.float32)
    write_tokens(original, tmp_path / "tokens", lambda frames, first: latents, identity="a", batch_chunks=8)
    tokens = open_dataset(tmp_path / "tokens")
    stored = np.stack([tokens.chunk("train", i)["latents"] for i in range(8)]).astype(np.float32)
    rounded = latents.astype(ml_dtypes.bfloat16).astype(np.float32)
    errors = [np.abs(x - latents).max() for x in (stored, rounded)]
    assert 0 < errors[0] <= 2**-12 and 6 * errors[0] < errors[1] <= 2**-9


def test_tokens_round_trip_and_identity(original, tmp_path):
    manifest = write_tokens(original, tmp_path / "tokens", encode, identity="weights-a", batch_chunks=4)
    raw, tokens = open_dataset(original), open_dataset(tmp_path / "tokens", identity="weights-a")
    assert manifest["tokenizer"] == "weights-a" and tokens.spec.size == (4, 3)
    for split in raw.splits:
        assert raw.streams(split) == tokens.streams(split)
        for i in range(raw.chunks(split)):
            a, b = raw.chunk(split, i), tokens.chunk(split, i)
            assert b["latents"].dtype == np.float16 and "frames" not in b
            np.testing.assert_array_equal(b["latents"], (a["frames"][:, [0, 0, -1, -1], [0, -1, 0, -1]] / 256))
            np.testing.assert_array_equal(a["actions/move"], b["actions/move"])
            np.testing.assert_array_equal(frame_action(a["frames"])[a["present/move"]],
                                          b["actions/move"][b["present/move"]])  # fmt: skip
            assert raw.segments(split, i) == tokens.segments(split, i)
    with pytest.raises(DataError, match="written by tokenizer 'weights-a', this is 'weights-b'"):
        open_dataset(tmp_path / "tokens", identity="weights-b")
    with pytest.raises(DataError, match="tokenizer is 'weights-a' there, 'weights-b' here"):
        write_tokens(original, tmp_path / "tokens", encode, identity="weights-b", batch_chunks=4)
    with pytest.raises(DataError, match="not tokens"):
        open_dataset(original, identity="weights-a")
    with pytest.raises(DataError, match="4 tokens of 3 channels.*config's tokenizer"):
        open_dataset(tmp_path / "tokens", toy_config())


def test_interrupted_token_writing_resumes(original, tmp_path):
    calls = 0

    def failing(frames, is_first):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return encode(frames, is_first)

    with pytest.raises(KeyboardInterrupt):
        write_tokens(original, tmp_path / "tokens", failing, identity="a", batch_chunks=4)
    with pytest.raises(DataError, match="unfinished"):
        open_dataset(tmp_path / "tokens")
    write_tokens(original, tmp_path / "tokens", encode, identity="a", batch_chunks=4)
    write_tokens(original, tmp_path / "whole", encode, identity="a", batch_chunks=4)
    assert (tmp_path / "tokens/dataset.json").read_text() == (tmp_path / "whole/dataset.json").read_text()
    assert not list((tmp_path / "tokens").glob(".*.tmp"))


def test_bad_encoders_are_named(original, tmp_path):
    with pytest.raises(DataError, match="not finite"):
        write_tokens(original, tmp_path / "a", lambda f, _: np.full((*f.shape[:2], 2, 2), np.nan), identity="a")
    with pytest.raises(DataError, match=r"expected \[b, T, tokens, channels\]"):
        write_tokens(original, tmp_path / "b", lambda f, _: np.zeros(f.shape[:2]), identity="a")
