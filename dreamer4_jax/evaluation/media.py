"""Pictures and videos of frames: grids, filmstrips, and side-by-side animations, as bytes (Pillow).

Frames are uint8 [..., H, W, 3] (or floating in [0, 1]) and are enlarged by whole factors without smoothing, so that
single pixels stay visible. Labels stand on a dark strip of their own and read on light and dark pages.
"""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from dreamer4_jax.config import UserError

STRIP = (32, 36, 42)
TEXT = (240, 243, 246)
MUTED = (150, 158, 168)
CONTEXT = (240, 180, 60)
WRONG = (255, 60, 110)
GAP = 6


@cache
def font(size: int) -> Any:
    return ImageFont.load_default(size)


def to_uint8(frames: Any) -> UInt8[np.ndarray, "*b H W 3"]:
    """Floating frames in [0, 1] rounded to uint8; uint8 frames as they are."""
    x = np.asarray(frames)
    if x.ndim < 3 or x.shape[-1] != 3:
        raise UserError(f"frames of shape {x.shape}: expected [..., H, W, 3]")
    if x.dtype == np.uint8:
        return x
    if not np.issubdtype(x.dtype, np.floating):
        raise UserError(f"frames of type {x.dtype}: expected uint8, or floating values in [0, 1]")
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Repeats every pixel of [..., H, W, 3] `scale` times in both directions."""
    return np.repeat(np.repeat(image, scale, axis=-3), scale, axis=-2)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()


def _outline(image: np.ndarray, wrong: np.ndarray, scale: int) -> np.ndarray:
    """Frames the tiles marked in `wrong` [rows, columns] of an enlarged image."""
    out = image.copy()
    rows, columns = wrong.shape
    height, width = image.shape[0] // rows, image.shape[1] // columns
    thick = max(1, scale // 2)
    for r, c in np.argwhere(wrong):
        tile = out[r * height : (r + 1) * height, c * width : (c + 1) * width]
        tile[:thick], tile[-thick:], tile[:, :thick], tile[:, -thick:] = WRONG, WRONG, WRONG, WRONG
    return out


def grid(rows: Mapping[str, Any], *, scale: int = 2, context: int = 0, columns: Sequence[str] = ()) -> bytes:
    """A PNG with one labelled row of frames for each entry: reconstructions, or a filmstrip.

    Args:
        rows: name -> frames [n, H, W, 3], as many in each.
        scale: enlargement.
        context: this many first columns are marked as real context (a filmstrip).
        columns: a label for each column, if any.
    """
    if not rows:
        raise UserError("grid: no rows given")
    frames = {name: to_uint8(value) for name, value in rows.items()}
    shapes = {name: value.shape for name, value in frames.items()}
    first = next(iter(shapes.values()))
    if any(s != first for s in shapes.values()) or len(first) != 4:
        raise UserError(f"grid rows of shapes {shapes}: expected equal shapes [n, H, W, 3]")
    n, height, width, _ = first
    height, width = height * scale, width * scale
    size, strip = 15, 24
    head = strip if columns or context else 0
    total = (n * (width + GAP) - GAP, head + len(frames) * (strip + height))
    image = Image.new("RGB", total, STRIP)
    draw = ImageDraw.Draw(image)
    for i in range(n if head else 0):
        marked = i < context
        label = "context" if marked and not columns else (columns[i] if i < len(columns) else f"+{i - context + 1}")
        x = i * (width + GAP) + width // 2
        draw.text((x, head // 2), label, CONTEXT if marked else MUTED, font=font(13), anchor="mm")
    for r, (name, value) in enumerate(frames.items()):
        y = head + r * (strip + height)
        draw.text((4, y + strip // 2), name, TEXT, font=font(size), anchor="lm")
        for i in range(n):
            image.paste(Image.fromarray(enlarge(value[i], scale)), (i * (width + GAP), y + strip))
    return _png(image)


def filmstrip(
    real: UInt8[np.ndarray, "T H W 3"], imagined: UInt8[np.ndarray, "T H W 3"], *, context: int, columns: int = 8
) -> bytes:
    """Real above imagined frames of one clip as PNG: the last context frame, then frames spread over the clip."""
    a, b = to_uint8(real), to_uint8(imagined)
    if not 0 < context < len(a):
        raise UserError(f"filmstrip context = {context}: must lie between 1 and the clip's {len(a) - 1} frames")
    chosen = np.unique(np.linspace(context, len(a) - 1, max(1, columns - 1)).round().astype(int))
    picks = np.concatenate([[context - 1], chosen])
    labels = ["context", *(f"+{i - context + 1}" for i in chosen)]
    return grid({"real": a[picks], "imagined": b[picks]}, context=1, columns=labels)


def video(
    panels: Mapping[str, Any],
    *,
    context: int = 0,
    fps: float = 5.0,
    scale: int = 4,
    wrong: Mapping[str, Bool[np.ndarray, "T rows columns"]] | None = None,
    form: Literal["webp", "gif"] = "webp",
) -> bytes:
    """An endless animation with the panels side by side under a strip that names them and counts the frames.

    Args:
        panels: name -> frames [T, H, W, 3], e.g. ``{"real": ..., "imagined": ...}``.
        context: this many first frames are the real context of the imagination; the strip says so.
        scale: enlargement, nearest.
        wrong: name -> tiles to outline (wrong symbols) in that panel.
        form: "webp" (lossless) or "gif".
    """
    clips = {name: to_uint8(value) for name, value in panels.items()}
    shapes = {name: value.shape for name, value in clips.items()}
    if not clips or len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 4:
        raise UserError(f"video panels of shapes {shapes}: expected equal shapes [T, H, W, 3]")
    length, height, width, _ = next(iter(shapes.values()))
    height, width = height * scale, width * scale
    strip = 28
    images = []
    for t in range(length):
        image = Image.new("RGB", (len(clips) * (width + GAP) - GAP, height + strip), STRIP)
        draw = ImageDraw.Draw(image)
        state, colour = ("context", CONTEXT) if t < context else (f"+{t - context + 1}", MUTED)
        for i, (name, clip) in enumerate(clips.items()):
            picture = enlarge(clip[t], scale)
            if wrong is not None and name in wrong:
                picture = _outline(picture, np.asarray(wrong[name][t], bool), scale)
            x = i * (width + GAP)
            image.paste(Image.fromarray(picture), (x, strip))
            draw.text((x + 8, strip // 2), name, TEXT, font=font(18), anchor="lm")
        draw.text((image.width - 8, strip // 2), state, colour, font=font(16), anchor="rm")
        images.append(image)
    durations = [round(1000 / fps)] * length
    durations[-1] += 1200  # rest on the last frame
    out = io.BytesIO()
    if form == "webp":
        images[0].save(
            out, format="WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, lossless=True
        )
    else:
        images[0].save(out, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return out.getvalue()
