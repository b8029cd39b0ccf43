"""Films of what was played: dream and real environment side by side, as mp4 in memory."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from dreamer4_jax.evaluation.media import GAP, MUTED, STRIP, TEXT, enlarge, font

MAX_FRAMES, MAX_BYTES = 3000, 64 * 2**20  # of one recording, as it is kept until it is encoded
HEAD = 28  # pixels of the line above the pictures


class Film:
    """Frames of a recording, bounded in number and in memory."""

    def __init__(self, title: str, fps: float):
        self.title, self.fps = title, fps
        self._bytes = 0
        self._shots: list[tuple[np.ndarray, np.ndarray | None, str]] = []

    def __len__(self) -> int:
        return len(self._shots)

    @property
    def full(self) -> bool:
        return len(self._shots) >= MAX_FRAMES or self._bytes >= MAX_BYTES

    def add(self, dream: UInt8[np.ndarray, "H W 3"], real: UInt8[np.ndarray, "H W 3"] | None, caption: str) -> None:
        """One more frame; `real` is None where there is no real environment."""
        self._shots.append((dream, real, caption))
        self._bytes += dream.nbytes + (0 if real is None else real.nbytes)

    def mp4(self) -> bytes:
        """H.264 in an mp4 that browsers play. The real panel is there if any frame has one."""
        import av

        if not self._shots:
            raise ValueError("a film needs at least one frame")
        both = any(real is not None for _, real, _ in self._shots)
        out = io.BytesIO()
        with av.open(out, mode="w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=max(1, round(self.fps)))
            first = self._picture(*self._shots[0], both)
            stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], "yuv420p"
            stream.options = {"crf": "18", "preset": "veryfast"}
            for shot in self._shots:
                frame = av.VideoFrame.from_ndarray(self._picture(*shot, both), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return out.getvalue()

    def _picture(self, dream: np.ndarray, real: np.ndarray | None, caption: str, both: bool) -> np.ndarray:
        height, width, _ = dream.shape
        scale = max(1, 256 // max(height, width))
        panels: Sequence[tuple[str, np.ndarray | None]] = [("dream", dream)] + ([("real", real)] if both else [])
        wide = width * scale
        image = Image.new("RGB", (len(panels) * (wide + GAP) - GAP, height * scale + HEAD), STRIP)
        draw = ImageDraw.Draw(image)
        for i, (name, picture) in enumerate(panels):
            x = i * (wide + GAP)
            draw.text((x + 8, HEAD // 2), name, TEXT, font=font(15), anchor="lm")
            if picture is not None:
                image.paste(Image.fromarray(enlarge(picture, scale)), (x, HEAD))
        draw.text((image.width - 8, HEAD // 2), caption, MUTED, font=font(13), anchor="rm")
        pixels = np.asarray(image)
        # 4:2:0 wants even sides.
        return np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
