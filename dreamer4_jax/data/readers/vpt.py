"""OpenAI VPT contractor recordings: NAME.mp4 at 20 frames a second beside NAME.jsonl, one line a frame.

Line t holds the input given at frame t, so its action leads to frame t + 1. Actions are 23 keys, each for itself, and
the mouse as one of 121 foveated classes (the paper's action space). Nothing is dropped: a frame without input has the
null action. What is known to be wrong with the recordings is mended:

- In some the attack button is down from the first line, until it is pressed anew.
- The scroll wheel was not recorded: a change of the selected hotbar slot counts as its key.
- The mouse pointer is not in the video: it is drawn while a GUI is open.
- Line and frame counts differ by a few; the longer one is cut. More than 2 % apart is a bad recording.

Rewards are the events of `vpt_events`: the task of a frame is the one whose event comes next, and it is rewarded with 1
at the event's frame.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data.readers import frames
from dreamer4_jax.data.readers.actions import ActionSpace
from dreamer4_jax.data.readers.base import Entry, Options, Part, Reader, assemble, files, readable, reading, stack
from dreamer4_jax.data.readers.vpt_events import TASKS, events
from dreamer4_jax.data.schema import DataError, Episode

# Minecraft's names of the recorded keys, in the order of the binary component.
_KEYBOARD = {
    "key.keyboard.escape": "ESC",
    "key.keyboard.s": "back",
    "key.keyboard.q": "drop",
    "key.keyboard.w": "forward",
    **{f"key.keyboard.{i}": f"hotbar.{i}" for i in range(1, 10)},
    "key.keyboard.e": "inventory",
    "key.keyboard.space": "jump",
    "key.keyboard.a": "left",
    "key.keyboard.d": "right",
    "key.keyboard.left.shift": "sneak",
    "key.keyboard.left.control": "sprint",
    "key.keyboard.f": "swapHands",
}
_BUTTONS = {0: "attack", 1: "use", 2: "pickItem"}
KEYS = (*_KEYBOARD.values(), *_BUTTONS.values())
DEGREES = 360.0 / 2400.0  # of the camera for a pixel of the mouse
HEIGHT = 720  # pixels in which the recorder gives the pointer's place
TOLERANCE = 0.02
COMPONENTS = (ActionComponent("keys", "binary", len(KEYS)), ActionComponent("mouse", "mouse", 121))

# The pointer, 16 x 16 in a video of 360 lines: an arrow, white (2) with a black rim (1), drawn by us.
_ARROW = (
    "1...............", "11..............", "121.............", "1221............", "12221...........",
    "122221..........", "1222221.........", "12222221........", "122222221.......", "1222222221......",
    "12222211111.....", "1221221.........", "121.1221........", "11..1221........", "1....1221.......",
    ".....111........",
)  # fmt: skip


def _arrow() -> tuple[np.ndarray, np.ndarray]:
    """(shown, shade) [16, 16]."""
    code = np.asarray([[{".": 0, "1": 1, "2": 2}[c] for c in row] for row in _ARROW])
    return code > 0, np.where(code == 2, 255, 0).astype(np.uint8)


def draw_pointer(frame: np.ndarray, x: float, y: float) -> np.ndarray:
    """A copy of a frame with the pointer's tip at (x, y), given in pixels of a picture of 720 lines."""
    shown, shade = _arrow()
    scale = frame.shape[0] / HEIGHT
    left, top = int(x * scale), int(y * scale)
    out = frame.copy()
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(frame.shape[0], top + 16), min(frame.shape[1], left + 16)
    if y1 <= y0 or x1 <= x0:
        return out
    cut = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    out[y0:y1, x0:x1][shown[cut]] = shade[cut][shown[cut]][:, None]
    return out


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a recording. A half line at the end, where the recorder was cut off, is left out."""
    out: list[dict[str, Any]] = []
    text = path.read_text().splitlines()
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            out.append(json.loads(line))
        except ValueError as error:
            if number == len(text):
                break
            raise DataError(f"{path.name}: line {number} is no JSON ({error})") from None
    return out


def keys_and_mouse(lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(keys uint8 [T, 23], mouse degrees float64 [T, 2] as dx, dy) of the lines of a recording, mended."""
    keys = np.zeros((len(lines), len(KEYS)), np.uint8)
    mouse = np.zeros((len(lines), 2))
    place = {name: i for i, name in enumerate(KEYS)}
    stuck, slot = False, None
    for t, line in enumerate(lines):
        device = line["mouse"]
        pressed = {_KEYBOARD[key] for key in line["keyboard"]["keys"] if key in _KEYBOARD}
        buttons, fresh = set(device["buttons"]), device.get("newButtons", [])
        stuck = list(fresh) == [0] if t == 0 else stuck and 0 not in fresh
        pressed |= {_BUTTONS[b] for b in buttons if b in _BUTTONS and not (b == 0 and stuck)}
        now = line.get("hotbar")
        if slot is not None and now is not None and now != slot:
            pressed.add(f"hotbar.{int(now) + 1}")
        slot = slot if now is None else now
        keys[t, [place[name] for name in pressed]] = 1
        mouse[t] = float(device["dx"]) * DEGREES, float(device["dy"]) * DEGREES
    # Jumps of more than half a turn come from the pointer being caught again.
    mouse[np.abs(mouse).max(1) > 180] = 0.0
    return keys, mouse


def tasks_and_rewards(lines: list[dict[str, Any]], found: list[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(task int32 [T], 0 behind the last event; reward float32 [T]) of the events of a recording."""
    task, reward = np.zeros(len(lines), np.int32), np.zeros(len(lines), np.float32)
    begin = 0
    for frame, name in found:
        if frame >= begin:  # of several events of one frame, the first
            task[begin : frame + 1], reward[frame], begin = TASKS.index(name) + 1, 1.0, frame + 1
    return task, reward


class VptReader(Reader):
    format = "vpt"
    tasks = tuple(TASKS)
    decided = True
    fps = 20.0

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        super().__init__(source, options, space)
        self._files = {p.stem if self.path.is_file() else str(p.relative_to(self.path).with_suffix("")): p
                       for p in files(self.path, (".mp4",))}  # fmt: skip
        if not self._files:
            raise DataError(f"{source}: holds no .mp4 recordings")
        frames.needs("av", "reading video")
        self.space = ActionSpace(COMPONENTS)

    @classmethod
    def claims(cls, source: str) -> bool:
        for path in files(Path(source), (".mp4",)):
            lines = path.with_suffix(".jsonl")
            if lines.exists():
                with lines.open(errors="replace") as file:
                    first = file.readline()
                return '"mouse"' in first and '"keyboard"' in first and '"newButtons"' in first
        return False

    def files(self) -> list[Path]:
        lines = (path.with_suffix(".jsonl") for path in self._files.values())
        return [*self._files.values(), *(path for path in lines if path.exists())]

    def entries(self) -> list[Entry]:
        return [Entry(key, next(readable([key], self._frames), 0)) for key in self._files]

    def _frames(self, key: str) -> int:
        with reading(key):
            return frames.count(self._files[key])

    def read(self, key: str, part: Part) -> Episode:
        from dreamer4_jax.agent.actions import mu_law_mouse  # it imports JAX: only where a mouse is encoded

        with reading(key):
            path = self._files[key]
            lines = read_lines(path.with_suffix(".jsonl"))
            said = self._frames(key)
            if not lines:
                raise DataError(f"{path.with_suffix('.jsonl').name} is empty")
            if said and abs(len(lines) - said) > max(2, TOLERANCE * said):
                raise DataError(f"has {said} frames and {len(lines)} lines: they are not of one recording")
            total = min(len(lines), said or len(lines))
            stop = None if part.stop is None or part.stop >= total else part.stop
            pictures, shapes = [], [0, 0]
            for i, frame in enumerate(frames.decode(path, lambda x: x, part.start, stop), part.start):
                if i == total:
                    break
                shapes[:] = frame.shape[:2]
                if lines[i].get("isGuiOpen"):
                    frame = draw_pointer(frame, float(lines[i]["mouse"]["x"]), float(lines[i]["mouse"]["y"]))
                pictures.append(part.fit(frame))
            if stop is None:  # a header may promise a frame or two too many
                total = part.start + len(pictures)
            lines = lines[:total]
            keys, mouse = keys_and_mouse(lines)
            found = events(line.get("stats") or {} for line in lines)
            task, reward = tasks_and_rewards(lines, found)
            episode = assemble(
                stack(iter(pictures)),
                self.space,
                {"keys": keys, "mouse": mu_law_mouse.encode(mouse[:, 0], mouse[:, 1])},
                alignment="taken",
                total=total,
                part=part,
                task=task[:, None],
                meta={"source": key, "size": shapes, "events": {n: sum(e == n for _, e in found) for _, n in found}},
            )
            # Counts are read with the frame: rewards are where they belong, and are not moved with the actions.
            episode.reward[1:] = reward[part.start + 1 : part.start + len(episode)]
            return episode


READER = VptReader
