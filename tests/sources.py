"""Sources in the formats that people have, of the environment whose frame shows its last action (`toy_env`)."""

import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dreamer4_jax.data.schema import Episode
from tests.toy_env import ACTIONS, END, ShowAction, reward_of


@dataclass(frozen=True)
class Played:
    """T + 1 frames, and the T actions and rewards between them."""

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminal: bool


def play(count: int = 3, *, seed: int = 0, size: int = 16, steps: int = 9) -> list[Played]:
    """Episodes of random actions, the first always long enough to be told from a shift."""
    env, rng, out = ShowAction(size, steps=steps), np.random.default_rng(seed), []
    for i in range(count):
        observation, _ = env.reset(seed=i)
        frames, actions, rewards, over = [observation["image"]], [], [], False
        while not over:
            actions.append(int(rng.integers(END if len(actions) < steps - 2 else ACTIONS)))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            frames.append(observation["image"])
            rewards.append(reward)
            over = terminated or truncated
        out.append(Played(np.stack(frames), np.asarray(actions), np.asarray(rewards, np.float32), bool(terminated)))
    return out


def shown(frames: np.ndarray) -> np.ndarray:
    """The action each frame shows, -1 at the start; forgives what a video codec does to colours."""
    return np.round(frames[..., 4:12, 4:12, 0].mean((-2, -1)) / 40).astype(int) - 1


def check_aligned(episode: Episode, played: Played, name: str = "action") -> None:
    """Frame t, the action that led to it, the reward that came with it."""
    actions, present = episode.actions[name], episode.present[name]
    assert len(episode) == len(played.frames)
    np.testing.assert_array_equal(shown(episode.frames), shown(played.frames))
    np.testing.assert_array_equal(present, np.arange(len(episode)) > 0)
    np.testing.assert_array_equal(actions[1:], shown(episode.frames)[1:])
    np.testing.assert_array_equal(episode.reward[1:], [reward_of(a) for a in shown(episode.frames)[1:]])
    assert episode.reward[0] == 0 and episode.is_terminal == played.terminal
    assert played.rewards.any() and len(set(actions.tolist())) > 2


def rows_of(played: Played) -> tuple[np.ndarray, np.ndarray]:
    """Actions and rewards as formats with as many rows as frames have them: the last row leads nowhere."""
    return np.append(played.actions, 0), np.append(played.rewards, 0).astype(np.float32)


def png(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, format="PNG")
    return out.getvalue()


def write_video(path: Path, frames: np.ndarray, *, fps: int = 20, faststart: bool = False) -> None:
    """H.264 with almost no loss. `faststart` puts the index first, so that a file cut off can still be opened."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "8", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_npz(folder: Path, episodes: list[Played]) -> None:
    """As Crafter's recorder and Dreamer's replay have them: row t led to frame t."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, e in enumerate(episodes):
        np.savez_compressed(
            folder / f"ep{i}.npz",
            image=e.frames,
            action=np.concatenate([[0], e.actions]),
            reward=np.concatenate([[0], e.rewards]).astype(np.float32),
            is_terminal=np.arange(len(e.frames)) == (len(e.frames) - 1 if e.terminal else -1),
        )


def write_labelled_videos(folder: Path, episodes: list[Played], suffix: str) -> None:
    """Videos beside labels; row t is what was done at frame t."""
    for i, e in enumerate(episodes):
        path = folder / f"clip{i}.mp4"
        write_video(path, e.frames)
        actions, rewards = rows_of(e)
        if suffix == "npy":
            np.save(path.with_suffix(".npy"), actions)
        elif suffix == "csv":
            lines = [f"{t},{a},{r}" for t, (a, r) in enumerate(zip(actions, rewards, strict=True))]
            path.with_suffix(".csv").write_text("\n".join(["frame,action,reward", *lines]) + "\n")
        else:
            rows = [
                {"action": int(a), "reward": float(r), "task": f"task {i}"}
                for a, r in zip(actions, rewards, strict=True)
            ]
            rows[-1]["done"] = e.terminal
            path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_lerobot(folder: Path, episodes: list[Played], version: str) -> None:
    """LeRobot v2.1 or v3.0 as the format's documentation lays it out, with the one camera observation.images.top."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, fps = episodes[0].frames.shape[1:], 20
    features = {
        "observation.images.top": {"dtype": "video", "shape": [*size], "names": ["height", "width", "channels"]},
        "action": {"dtype": "int64", "shape": [1], "names": None},
        **{n: {"dtype": d, "shape": [1], "names": None}
           for n, d in (("next.reward", "float32"), ("next.done", "bool"), ("timestamp", "float32"),
                        ("frame_index", "int64"), ("episode_index", "int64"), ("index", "int64"),
                        ("task_index", "int64"))},
    }  # fmt: skip
    v3 = version.startswith("v3")
    info = {
        "codebase_version": version,
        "fps": fps,
        "chunks_size": 1000,
        "total_episodes": len(episodes),
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    tables, entries, at = [], [], 0
    for i, e in enumerate(episodes):
        t = len(e.frames)
        actions, rewards = rows_of(e)
        tables.append(
            pa.table(
                {
                    "action": pa.array(actions, pa.int64()),
                    "next.reward": pa.array(rewards, pa.float32()),
                    "next.done": [*[False] * (t - 1), e.terminal],
                    "timestamp": pa.array(np.arange(t) / fps, pa.float32()),
                    "frame_index": np.arange(t),
                    "episode_index": np.full(t, i),
                    "index": at + np.arange(t),
                    "task_index": np.full(t, i % 2),
                }
            )
        )
        entry = {"episode_index": i, "tasks": [f"task {i % 2}"], "length": t}
        if v3:
            span = (at / fps, (at + t) / fps)
            entry |= {"dataset_from_index": at, "dataset_to_index": at + t, "data/chunk_index": 0, "data/file_index": 0}
            video = "videos/observation.images.top"
            entry |= {f"{video}/chunk_index": 0, f"{video}/file_index": 0, f"{video}/from_timestamp": span[0],
                      f"{video}/to_timestamp": span[1], "stats/action/max": [4.0]}  # fmt: skip
        else:
            write_video(folder / f"videos/chunk-000/observation.images.top/episode_{i:06d}.mp4", e.frames)
        entries.append(entry)
        at += t
    if v3:
        write_video(
            folder / "videos/observation.images.top/chunk-000/file-000.mp4",
            np.concatenate([e.frames for e in episodes]),
        )
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(entries), folder / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(
            pa.table({"task_index": [0, 1], "__index_level_0__": ["task 0", "task 1"]}), folder / "meta/tasks.parquet"
        )
        (folder / "data/chunk-000").mkdir(parents=True)
        pq.write_table(pa.concat_tables(tables), folder / "data/chunk-000/file-000.parquet")
        return
    (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    tasks = [{"task_index": i, "task": f"task {i}"} for i in range(2)]
    (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    (folder / "data/chunk-000").mkdir(parents=True)
    for i, table in enumerate(tables):
        pq.write_table(table, folder / f"data/chunk-000/episode_{i:06d}.parquet")


def write_rlds(folder: Path, episodes: list[Played], form: str) -> Path:
    """RLDS in TFDS's layout, by its own serialiser and meta data; `form` is array_record or tfrecord.

    TFDS cannot write TFRecord without TensorFlow: that file is framed here (its checksums are zero, nobody reads them).
    """
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(
                {
                    "observation": tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(None, None, 3)),
                            "state": tfds.features.Tensor(shape=(2,), dtype=np.float32),
                        }
                    ),
                    "action": tfds.features.Scalar(dtype=np.int32),
                    "reward": tfds.features.Scalar(dtype=np.float32),
                    "is_first": tfds.features.Scalar(dtype=np.bool_),
                    "is_last": tfds.features.Scalar(dtype=np.bool_),
                    "is_terminal": tfds.features.Scalar(dtype=np.bool_),
                    "language_instruction": tfds.features.Text(),
                }
            )
        }
    )  # fmt: skip
    folder.mkdir(parents=True)
    serializer, records = ExampleSerializer(features.get_serialized_info()), []
    for i, e in enumerate(episodes):
        actions, rewards = rows_of(e)
        last = len(e.frames) - 1
        steps = [
            {
                "observation": {"image": io.BytesIO(png(frame)), "state": np.zeros(2, np.float32)},
                "action": actions[t],
                "reward": rewards[t],
                "is_first": t == 0,
                "is_last": t == last,
                "is_terminal": t == last and e.terminal,
                "language_instruction": f"task {i % 2}",
            }
            for t, frame in enumerate(e.frames)
        ]
        records.append(serializer.get_tf_example(features.encode_example({"steps": steps})).SerializeToString())
    path = folder / f"toy-train.{form}-00000-of-00001"
    if form == "tfrecord":
        path.write_bytes(b"".join(struct.pack("<Q", len(r)) + bytes(4) + r + bytes(4) for r in records))
    else:
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name="toy", split="train", filetype_suffix=form)
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[len(records)], num_bytes=path.stat().st_size, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=features, split_infos=[split], check_data=False,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )  # fmt: skip
    return folder


def write_minari(root: Path, episodes: list[Played], form: str, monkeypatch) -> Path:
    """A dataset by Minari's own collector, from the environment itself, replaying the actions."""
    import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    env = minari.DataCollector(ShowAction(16), data_format=form, jpeg_encoding=False)
    for i, e in enumerate(episodes):
        env.reset(seed=i)
        for action in e.actions:
            env.step(int(action))
    env.create_dataset("toy/show-v0", algorithm_name="random", author="x", author_email="x@x.x", code_permalink="x")
    env.close()
    return root / "toy/show-v0"
