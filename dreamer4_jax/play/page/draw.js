// Drawing: frames, outlined tiles, and the strips of what was measured frame by frame.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The picture in `bytes` (WebP), decoded by the browser. */
export const decode = (bytes) => createImageBitmap(new Blob([bytes], { type: "image/webp" }));

export function frame(canvas, bitmap) {
  if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
}

/** Outlines tiles, given by number in rows of `columns`. Each set has its colour and its dash, so that colour is not all. */
export function marks(canvas, [height, width], tile, sets) {
  const scale = 8;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const g = canvas.getContext("2d");
  const columns = Math.floor(width / tile), side = tile * scale;
  for (const { tiles, name, dash } of sets) {
    g.strokeStyle = colour(name);
    g.lineWidth = scale / 2 + 1;
    g.setLineDash(dash);
    for (const t of tiles) {
      g.strokeRect((t % columns) * side + g.lineWidth / 2, Math.floor(t / columns) * side + g.lineWidth / 2,
        side - g.lineWidth, side - g.lineWidth);
    }
  }
}

/** One bar per frame, the newest on the right; `ceiling` fills the height. Frames without a value leave a dot. */
export function strip(canvas, values, ceiling, name) {
  const ratio = Math.min(3, window.devicePixelRatio || 1);
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width) return;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  const step = 9, room = Math.floor((width - 8) / step);
  const shown = values.slice(-room);
  const top = Math.max(ceiling, ...shown.filter((v) => v !== null));
  shown.forEach((v, i) => {
    const x = 4 + i * step;
    if (v === null) {
      g.fillStyle = colour("--edge");
      g.fillRect(x + 2, height - 5, 2, 2);
      return;
    }
    const h = Math.max(2, (v / top) * (height - 8));
    g.fillStyle = v > 0 ? colour(name) : colour("--edge");
    g.fillRect(x, height - 4 - h, step - 3, h);
  });
}
