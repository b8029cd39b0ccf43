// The page of `dreamer4 play`: sends what the person does, draws what the world model answers.
// Every frame is acknowledged when it has been drawn; the server never has more than a few under way.

import * as draw from "/draw.js";

const $ = (id) => document.getElementById(id);
const KEEP = 256; // frames that the strips remember
const REPEAT = 250; // milliseconds after which what is held goes on
const PAGE_KEYS = {
  Space: () => $("run").click(), Period: () => $("step").click(), Backspace: () => $("rewind").click(),
  KeyR: () => $("reset").click(), KeyP: () => $("pilot").click(), KeyM: () => $("record").click(),
  KeyN: () => $("new").click(), BracketLeft: () => moveK(-1), BracketRight: () => moveK(1),
};

let socket = null;
let hello = null; // what the server said of the run
let state = { running: false, policy: false, k: 4, fps: 8, doubt: true, recording: false, rewindable: 0 };
let held = []; // numbers of the bindings that are down
let repeatTimer = 0;
let asked = {}; // slider -> { value, until }: what was set on it and the server has not said back yet
let pressed = 0; // when a key went down whose frame has not come yet
let shown = null; // header of the frame on the screen
let track = []; // per frame: { age, drift, seeds, residual }
let pads = [];
let drawing = Promise.resolve();

// ---------------------------------------------------------------------------------------------------------------------
// Connection

function connect() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  socket = new WebSocket(`${scheme}://${location.host}/play`, ["dreamer4", ...(token ? [`token.${token}`] : [])]);
  socket.binaryType = "arraybuffer";
  let opened = false;
  socket.onopen = () => { opened = true; status("wait", "waiting for the model"); };
  socket.onmessage = (event) => {
    // One after the other: pictures decode in their own time.
    drawing = drawing.then(() => (typeof event.data === "string" ? told(JSON.parse(event.data)) : received(event.data)));
  };
  socket.onclose = (event) => {
    status("off", "not connected");
    release();
    const why = event.reason || (opened ? "The connection was lost." : "The server refused the connection, or is not there.");
    banner(`${why} `, ["Connect again", connect]);
  };
  banner("");
}

const say = (t, fields = {}) => {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ t, ...fields }));
};

function told(message) {
  switch (message.t) {
    case "hello": return greet(message);
    case "state": return show(message);
    case "waiting": return status("wait", `all places are taken: you are number ${message.place} in the queue`);
    case "note": return toast(message.text);
  }
}

async function received(buffer) {
  const length = new DataView(buffer).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  const parts = header.parts.map((size) => new Uint8Array(buffer, (at += size) - size, size));
  switch (header.t) {
    case "frame": await frame(header, parts); say("ack", { n: header.n }); break;
    case "peek": if (+$("episode").value === header.episode && +$("frame").value === header.frame) {
      draw.frame($("preview"), await draw.decode(parts[0]));
    } break;
    case "film": film(header, parts[0]); break;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the server says

function greet(message) {
  hello = message;
  asked = {};
  $("title").textContent = hello.title;
  document.title = `${hello.title} · dreamer4`;
  status("on", `connected · ${hello.device}`);
  $("k").max = hello.ladder.length - 1;
  $("k-ticks").replaceChildren(...hello.ladder.map((k) => Object.assign(document.createElement("span"), { textContent: k || "auto" })));
  pads = hello.controls.map(padButton);
  $("pad").replaceChildren(...pads.map((p) => p.button));
  $("pad-note").textContent = hello.policy
    ? "Each press makes one frame; hold to go on. The bars are the policy's probabilities."
    : "Each press makes one frame; hold to go on.";
  $("pilot").hidden = !hello.policy;
  $("mind").hidden = !hello.policy;
  $("fresh").hidden = !hello.levels.length;
  $("recorded").hidden = !hello.episodes.length;
  $("real-absent").textContent = hello.levels.length
    ? "No real environment beside this start: the recorded episode could not be restored from its seed."
    : "This model learned from recorded video: there is no environment to compare it with.";
  $("level").replaceChildren(...hello.levels.map((name, i) => new Option(name, i)));
  $("episode").replaceChildren(...hello.episodes.map((e, i) =>
    new Option([`${i}`, e.mission, `${e.frames} frames`, e.policy].filter(Boolean).join(" · "), i)));
  show(hello.state);
}

function padButton(binding, id) {
  const button = document.createElement("button");
  button.type = "button";
  const part = (name, text) => {
    const span = document.createElement("span");
    span.className = name;
    span.textContent = text;
    button.append(span);
    return span;
  };
  const fill = part("fill", "");
  part("symbol", binding.symbol).setAttribute("aria-hidden", "true");
  part("label", binding.label);
  const keys = part("keys", "");
  for (const code of binding.keys) {
    const cap = document.createElement("kbd");
    cap.textContent = keyName(code);
    keys.append(cap);
  }
  const share = part("share", "");
  button.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    button.setPointerCapture(event.pointerId);
    hold(id, true);
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(end, () => hold(id, false));
  button.addEventListener("click", (event) => { if (!event.detail) { hold(id, true); hold(id, false); } }); // by keyboard
  button.addEventListener("contextmenu", (event) => event.preventDefault());
  return { button, fill, share, ...binding };
}

const keyName = (code) => ({ ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Comma: ",", Semicolon: ";" })[code]
  ?? code.replace(/^(Key|Digit)/, "");

/** What the buttons and sliders say. */
function show(s) {
  state = s;
  const mode = (id, on, icon, word) => {
    $(id).setAttribute("aria-pressed", on);
    $(id).querySelector("use").setAttribute("href", `#i-${icon}`);
    $(id).querySelector(".word").textContent = word;
  };
  mode("run", s.running, s.running ? "pause" : "run", s.running ? "Pause" : "Run");
  mode("pilot", s.policy, "policy", s.policy ? "Take over" : "Hand over");
  mode("record", s.recording, s.recording ? "stop" : "record", s.recording ? "Stop" : "Record");
  $("rewind").disabled = s.rewindable < 1;
  if (!pending("k", s.k)) {
    const rung = hello.ladder.indexOf(s.k);
    if (rung >= 0 && document.activeElement !== $("k")) $("k").value = rung;
    sayK(s.k);
  }
  if (!pending("fps", s.fps)) {
    if (document.activeElement !== $("fps")) $("fps").value = s.fps;
    $("fps-out").textContent = s.fps;
  }
  $("doubt").checked = s.doubt;
}

/** Whether the server has yet to hear of what was set: what it says until then is old, and would undo it. */
function pending(id, told) {
  const waits = asked[id] && asked[id].value !== told && performance.now() < asked[id].until;
  if (!waits) delete asked[id];
  return Boolean(waits);
}

function ask(id, value) {
  asked[id] = { value, until: performance.now() + 3000 };
}

async function frame(header, parts) {
  const [dream, real] = await Promise.all(parts.map(draw.decode));
  draw.frame($("dream"), dream);
  $("real-absent").hidden = Boolean(real);
  if (real) draw.frame($("real"), real);
  shown = header;
  show(header.state);
  $("mission-text").textContent = header.mission || "none";
  $("origin").textContent = header.title;
  $("dream-note").textContent = header.action
    ? `frame ${header.age} · ${{ you: "you", policy: "the policy", rewind: "back at" }[header.who]}: ${header.action}`
    : `frame ${header.age}`;
  badge("dream-badge", header.cont !== null && header.cont < 0.5 ? "expects the episode to end here" : "");
  badge("real-badge", header.real && header.real.ended ? `episode over: ${header.real.ended}` : "");
  $("real-note").textContent = real ? (header.real.reward ? `reward ${header.real.reward.toFixed(2)}` : "the same actions") : "";
  if (header.ms !== null) $("ms").textContent = `${header.ms.toFixed(0)} ms`;
  $("rate").textContent = header.fps === null ? "—" : header.fps.toFixed(1);
  if (pressed && header.who === "you") {
    $("latency").textContent = `${(performance.now() - pressed).toFixed(0)} ms`;
    pressed = 0;
  }
  expectations(header);
  remember(header);
  outline();
}

function expectations(header) {
  const text = (v, digits) => (v === null ? "—" : Math.abs(v) < 1e4 ? v.toFixed(digits) : v.toExponential(1));
  $("reward").textContent = text(header.reward, 2);
  $("value").textContent = text(header.value, 2);
  $("cont").textContent = header.cont === null ? "—" : `${(100 * header.cont).toFixed(0)} %`;
  if (!header.plan) return;
  for (const pad of pads) {
    const now = ["categorical", "binary"].includes(pad.kind) ? header.plan[pad.component][0][pad.index] : null;
    pad.fill.style.width = now === null ? "0" : `${100 * now}%`;
    pad.share.textContent = now === null ? "" : `${(100 * now).toFixed(0)} %`;
    pad.button.classList.toggle("taken", header.intent === pad.label);
  }
  const [name, offsets] = Object.entries(header.plan)[0];
  const kind = pads.find((p) => p.component === name).kind;
  $("plan").replaceChildren(...offsets.map((row, n) => {
    const item = document.createElement("li");
    const best = row.indexOf(Math.max(...row));
    const label = pads.find((p) => p.component === name && p.index === best)?.label ?? `${name} ${best}`;
    const cells = kind === "categorical" ? [label, `${(100 * row[best]).toFixed(0)} %`]
      : [row.map((v, i) => (v > 0.5 ? pads.find((p) => p.component === name && p.index === i)?.label : null))
        .filter(Boolean).join(", ") || "nothing", ""];
    for (const words of [n ? `+${n}` : "now", ...cells]) {
      const span = document.createElement("span");
      span.textContent = words;
      item.append(span);
    }
    return item;
  }));
}

const badge = (id, text) => { $(id).hidden = !text; $(id).textContent = text; };

function remember(header) {
  if (header.who === "start") track = [];
  else track = track.filter((t) => t.age < header.age);
  const r = header.real, d = header.doubt;
  track.push({
    age: header.age,
    drift: r ? (r.right === undefined ? Math.max(0, 1 - r.psnr / 60) : 1 - r.right) : null,
    seeds: d ? d.seeds : null,
    residual: d ? d.residual : null,
  });
  track = track.slice(-KEEP);
  const percent = (v, digits = 1) => `${(100 * v).toFixed(digits)} %`;
  $("drift-out").textContent = !r ? "no real environment"
    : r.right === undefined ? `${r.psnr} dB` : `${percent(1 - r.right)} of the tiles · ${r.psnr} dB`;
  $("seeds-out").textContent = d ? percent(d.seeds, 2) : state.doubt ? "from the next frame on" : "not measured";
  $("residual-out").textContent = d ? percent(d.residual, 2) : state.doubt ? "from the next frame on" : "not measured";
  strips();
}

function strips() {
  draw.strip($("drift"), track.map((t) => t.drift), 0.08, "--mark");
  draw.strip($("seeds"), track.map((t) => t.seeds), 0.005, "--doubt");
  draw.strip($("residual"), track.map((t) => t.residual), 0.005, "--dream");
}

function outline() {
  if (!shown) return;
  const wrong = $("mark-wrong").checked && shown.real?.wrong ? shown.real.wrong : [];
  const doubt = $("mark-doubt").checked && shown.doubt ? shown.doubt.tiles : [];
  const differs = { tiles: wrong, name: "--mark", dash: [] };
  draw.marks($("dream-marks"), hello.size, hello.tile, [differs, { tiles: doubt, name: "--doubt", dash: [12, 8] }]);
  draw.marks($("real-marks"), hello.size, hello.tile, shown.real ? [differs] : []);
}

function film(header, bytes) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
  link.download = `${hello.title}-${header.frames}-frames.mp4`;
  link.textContent = `${link.download} (${Math.ceil(bytes.length / 1024)} kB)`;
  toast("Recorded: ", link);
  link.click();
}

function status(tone, text) {
  $("connection").dataset.tone = tone;
  $("connection").textContent = text;
}

function banner(text, action) {
  $("banner").hidden = !text;
  $("banner").textContent = text;
  if (!action) return;
  const button = document.createElement("button");
  button.textContent = action[0];
  button.addEventListener("click", action[1]);
  $("banner").append(button);
}

let toastTimer = 0;
function toast(text, link) {
  $("toast").textContent = text;
  if (link) $("toast").append(link);
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, link ? 20000 : 8000);
}

// ---------------------------------------------------------------------------------------------------------------------
// What the person does

function hold(id, down) {
  const has = held.includes(id);
  if (has === down) return;
  held = down ? [...held, id].slice(-8) : held.filter((other) => other !== id);
  if (down) pressed = pressed || performance.now();
  pads.forEach((pad, i) => pad.button.classList.toggle("held", held.includes(i)));
  say("hold", { keys: held });
  if (down || !held.length) clearTimeout(repeatTimer);
  if (down) repeatTimer = setTimeout(() => say("repeat"), REPEAT);
}

function release() {
  if (!held.length) return;
  held = [];
  clearTimeout(repeatTimer);
  pads.forEach((pad) => pad.button.classList.remove("held"));
  say("hold", { keys: [] });
}

function moveK(by) {
  $("k").value = +$("k").value + by;
  $("k").dispatchEvent(new Event("input"));
}

/** K = 0: each frame takes the steps that it needs; those of the frame on the screen are told. */
function sayK(k) {
  const words = k || (shown?.passes ? `adaptive: took ${shown.passes}` : "adaptive");
  $("k-out").textContent = words;
  $("k").setAttribute("aria-valuetext", k ? `K = ${k}` : words);
}

const typing = (target) => target.closest("dialog, select, input:not([type=checkbox])");

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || typing(event.target)) return;
  const onButton = event.target.closest("button, a, [type=checkbox]") && ["Space", "Enter"].includes(event.code);
  if (onButton) return; // the browser's own way to press what has the focus
  const id = pads.findIndex((pad) => pad.keys.includes(event.code));
  if (id >= 0) {
    event.preventDefault();
    if (!event.repeat) hold(id, true);
  } else if (PAGE_KEYS[event.code]) {
    event.preventDefault();
    if (!event.repeat || event.code === "Backspace") PAGE_KEYS[event.code]();
  }
});
addEventListener("keyup", (event) => {
  const id = pads.findIndex((pad) => pad.keys.includes(event.code));
  if (id >= 0) hold(id, false);
});
addEventListener("blur", release);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    release();
    if (state.running) say("run", { on: false }); // nobody looks: the device is for the others
  }
});
addEventListener("resize", strips);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { strips(); outline(); });

$("run").addEventListener("click", () => say("run", { on: !state.running }));
$("step").addEventListener("click", () => { pressed = pressed || performance.now(); say("step"); });
$("rewind").addEventListener("click", () => say("rewind", { frames: 1 }));
$("reset").addEventListener("click", () => say("reset"));
$("record").addEventListener("click", () => say("record", { on: !state.recording }));
$("pilot").addEventListener("click", () => {
  say("pilot", { policy: !state.policy });
  say("run", { on: !state.policy }); // it plays at once, and stops when it hands back
});
$("k").addEventListener("input", () => {
  const k = hello.ladder[+$("k").value];
  sayK(k);
  ask("k", k);
  say("steps", { k });
});
$("fps").addEventListener("input", () => {
  $("fps-out").textContent = $("fps").value;
  ask("fps", +$("fps").value);
  say("rate", { fps: +$("fps").value });
});
$("doubt").addEventListener("change", () => say("doubt", { on: $("doubt").checked }));
$("mark-wrong").addEventListener("change", outline);
$("mark-doubt").addEventListener("change", outline);

$("new").addEventListener("click", () => {
  release();
  $("starts").showModal();
  if (hello.episodes.length) peek();
});
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 2 ** 20); });
$("begin-fresh").addEventListener("click", () => {
  const seed = Math.min(2 ** 30 - 1, Math.max(0, Math.floor(+$("seed").value) || 0));
  say("start_fresh", { level: +$("level").value, seed });
});
$("begin-recorded").addEventListener("click", () =>
  say("start_recorded", { episode: +$("episode").value, frame: +$("frame").value }));
$("episode").addEventListener("change", () => { $("frame").value = 0; peek(); });
$("frame").addEventListener("input", peek);

function peek() {
  const episode = +$("episode").value;
  $("frame").max = hello.episodes[episode].frames - 1;
  $("frame-out").textContent = $("frame").value;
  say("peek", { episode, frame: +$("frame").value });
}

connect();
