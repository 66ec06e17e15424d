// The tokens of one picture. `props.value` is what `inspect` of inspection.py returns, `props.edited` the decoded
// picture of changed tokens. Tokens change here; the server only decodes them, on the event 'tokens_changed'.

const root = element.querySelector(".vt-inspector");
const find = (selector) => root.querySelector(selector);
const canvas = (name) => find(`canvas[data-panel="${name}"]`);
const write = (name, text) => { find(`[data-text="${name}"]`).textContent = text; };

const HINTS = {
  look: "Point at a token to see what it looks at; click to hold on to it.",
  erase: "Click or drag over tokens: they become those of blank paper.",
  swap: "Click two tokens to exchange them.",
};
// One color per feature level, from fine to coarse; readable on emoji and in both themes.
const LEVEL_COLORS = ["#2f6bff", "#d6249f", "#00997a", "#7a3cff"];

let data = null;      // what is shown
let tokens = [];      // the tokens as edited
let past = [];        // earlier versions of `tokens`
let pictures = {};    // loaded images by name
let mode = "look";
let pointed = null;   // token under the pointer
let held = null;      // token held by a click
let dragging = false;

const active = () => pointed ?? held;
const changed = () => tokens.flatMap((token, cell) => (token === data.tokens[cell] ? [] : [cell]));

function loadImage(url) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.src = url;
  });
}

// -- drawing

function prepare(target) {
  const side = target.clientWidth;
  const scale = window.devicePixelRatio || 1;
  target.width = target.height = Math.round(side * scale);
  const context = target.getContext("2d");
  context.scale(scale, scale);
  context.imageSmoothingQuality = "high";
  return [context, side];
}

function drawGridLines(context, side) {
  context.strokeStyle = "rgba(120, 120, 120, .28)";
  context.lineWidth = 0.5;
  context.beginPath();
  for (let line = 1; line < data.grid; line++) {
    const at = (line * side) / data.grid;
    context.moveTo(at, 0); context.lineTo(at, side);
    context.moveTo(0, at); context.lineTo(side, at);
  }
  context.stroke();
}

function outline(context, side, cell, color, width = 2) {
  const size = side / data.grid;
  context.strokeStyle = color;
  context.lineWidth = width;
  context.strokeRect((cell % data.grid) * size, Math.floor(cell / data.grid) * size, size, size);
}

function drawPoints(context, side, cell) {
  const flat = data.points[cell];
  const size = side / data.grid;
  const center = [((cell % data.grid) + 0.5) * size, (Math.floor(cell / data.grid) + 0.5) * size];
  const places = [];
  for (let at = 0; at < flat.length; at += 3) {
    const level = Math.floor(at / 3 / data.points_per_level) % data.levels;
    places.push({ x: (flat[at] / data.units) * side, y: (flat[at + 1] / data.units) * side, weight: flat[at + 2], level });
  }
  const heaviest = Math.max(...places.map((place) => place.weight), 1);
  for (const { x, y, weight, level } of places) {
    const share = weight / heaviest;
    context.strokeStyle = context.fillStyle = LEVEL_COLORS[level % LEVEL_COLORS.length];
    context.globalAlpha = 0.5 * share;
    context.beginPath(); context.moveTo(...center); context.lineTo(x, y); context.lineWidth = 1; context.stroke();
    context.globalAlpha = share;
    context.beginPath(); context.arc(x, y, Math.max(side / 64, 4), 0, 2 * Math.PI); context.fill();
  }
  context.globalAlpha = 1;
}

function drawInput() {
  const [context, side] = prepare(canvas("input"));
  const cell = active();
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  context.globalAlpha = cell === null ? 1 : 0.42;
  context.drawImage(pictures.original, 0, 0, side, side);
  context.globalAlpha = 1;
  drawGridLines(context, side);
  if (cell !== null) {
    outline(context, side, cell, "#111");
    drawPoints(context, side, cell);
  }
}

function drawDecoded() {
  const [context, side] = prepare(canvas("decoded"));
  context.drawImage(pictures.edited ?? pictures.reconstruction, 0, 0, side, side);
  for (const cell of changed()) outline(context, side, cell, "rgba(214, 36, 159, .75)", 1);
  if (held !== null && mode === "swap") outline(context, side, held, "#2f6bff", 3);
  if (pointed !== null) outline(context, side, pointed, "#111");
}

// Weights as heat: a Gaussian around each place, from violet over orange to yellow.
function drawHeat(target, places) {
  const bins = 96;
  const heat = new Float32Array(bins * bins);
  const reach = 5;  // twice the variance of the Gaussian, in bins; also where it is cut off
  for (const [x, y, weight] of places) {
    const column = x * bins - 0.5, row = y * bins - 0.5;
    for (let r = Math.ceil(row - reach); r <= row + reach; r++) {
      for (let c = Math.ceil(column - reach); c <= column + reach; c++) {
        if (r < 0 || c < 0 || r >= bins || c >= bins) continue;
        heat[r * bins + c] += weight * Math.exp(-((r - row) ** 2 + (c - column) ** 2) / reach);
      }
    }
  }
  // The hottest percent saturates, so that a single spot does not darken the rest.
  const hot = Float32Array.from(heat).sort()[Math.floor(heat.length * 0.99)];
  const layer = document.createElement("canvas");
  layer.width = layer.height = bins;
  const pixels = new ImageData(bins, bins);
  heat.forEach((value, at) => {
    const level = Math.min(value / hot, 1);
    pixels.data.set([70 + 185 * Math.min(1, 1.7 * level), 10 + 215 * level ** 1.6, 140 * (1 - level) ** 1.5, 255 * Math.min(1, 1.6 * level)], 4 * at);
  });
  layer.getContext("2d").putImageData(pixels, 0, 0);
  const [context, side] = prepare(target);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  context.globalAlpha = 0.5;
  context.filter = "grayscale(1)";
  context.drawImage(pictures.original, 0, 0, side, side);
  context.filter = "none";
  context.globalAlpha = 1;
  context.drawImage(layer, 0, 0, side, side);
}

function drawHeatMaps() {
  const learned = data.points.flatMap((flat) => {
    const places = [];
    for (let at = 0; at < flat.length; at += 3) places.push([flat[at] / data.units, flat[at + 1] / data.units, flat[at + 2]]);
    return places;
  });
  const fixed = data.tokens.map((_, cell) => [((cell % data.grid) + 0.5) / data.grid, (Math.floor(cell / data.grid) + 0.5) / data.grid, 1]);
  drawHeat(canvas("heat"), learned);
  drawHeat(canvas("grid"), fixed);
}

function buildIds() {
  const ids = find(".vt-ids");
  ids.style.setProperty("--grid", data.grid);
  ids.replaceChildren(...tokens.map((_, cell) => {
    const button = document.createElement("button");
    button.dataset.cell = cell;
    button.tabIndex = cell === 0 ? 0 : -1;
    return button;
  }));
}

function showIds() {
  const cell = active();
  [...find(".vt-ids").children].forEach((button, at) => {
    button.textContent = tokens[at];
    // Neighboring ids are unrelated: the golden angle gives them unrelated hues.
    button.style.setProperty("--hue", (tokens[at] * 137.508) % 360);
    button.classList.toggle("vt-active", at === cell);
    button.classList.toggle("vt-changed", tokens[at] !== data.tokens[at]);
    button.classList.toggle("vt-same", cell !== null && at !== cell && tokens[at] === tokens[cell]);
  });
}

function showTexts() {
  const cell = active();
  const count = changed().length;
  write("token", cell === null ? "" : `row ${Math.floor(cell / data.grid) + 1}, column ${(cell % data.grid) + 1}`);
  write("ids", cell === null ? `${new Set(tokens).size} different` : `token ${tokens[cell]} of 0 to ${data.codebook - 1}`);
  write("decoded", count ? "After your edit" : "Reconstruction");
  write("quality", count ? `${count} of ${tokens.length} tokens changed` : `PSNR ${data.psnr.toFixed(1)} dB from ${tokens.length} tokens`);
  find(".vt-hint").textContent = HINTS[mode];
  find('[data-action="undo"]').disabled = !past.length;
  find('[data-action="reset"]').disabled = !count;
  root.querySelectorAll("[data-mode]").forEach((button) => button.setAttribute("aria-pressed", button.dataset.mode === mode));
}

function show() {
  if (!data) return;
  drawInput();
  drawDecoded();
  showIds();
  showTexts();
}

// -- editing

function commit(next) {
  past.push(tokens);
  tokens = next;
  show();
}

function decode() {
  if (changed().length) trigger("input", { tokens });
  else { pictures.edited = null; show(); }
}

function swap(cell) {
  if (held === null) { held = cell; show(); return; }
  const next = tokens.slice();
  [next[held], next[cell]] = [next[cell], next[held]];
  held = null;
  commit(next);
  decode();
}

function erase(cell) {
  if (tokens[cell] === data.blank[cell]) return;
  tokens = tokens.slice();
  tokens[cell] = data.blank[cell];
}

function press(cell) {
  if (mode === "swap") swap(cell);
  else if (mode === "look") { held = held === cell ? null : cell; show(); }
  else { past.push(tokens); dragging = true; erase(cell); show(); }
}

// -- pointer and keys

function cellAt(event) {
  const panel = event.target.closest("[data-cells]");
  if (!panel) return null;
  const box = panel.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * data.grid);
  const row = Math.floor(((event.clientY - box.top) / box.height) * data.grid);
  const inside = row >= 0 && column >= 0 && row < data.grid && column < data.grid;
  return inside ? row * data.grid + column : null;
}

// A fast pointer reports some of the cells on its way only.
function cellsBetween(from, to) {
  const [fromRow, toRow] = [from, to].map((cell) => Math.floor(cell / data.grid));
  const [fromColumn, toColumn] = [from, to].map((cell) => cell % data.grid);
  const steps = Math.max(Math.abs(toRow - fromRow), Math.abs(toColumn - fromColumn), 1);
  return Array.from({ length: steps + 1 }, (_, step) => {
    const share = step / steps;
    return Math.round(fromRow + share * (toRow - fromRow)) * data.grid + Math.round(fromColumn + share * (toColumn - fromColumn));
  });
}

root.addEventListener("pointermove", (event) => {
  if (!data) return;
  const cell = cellAt(event);
  if (cell === pointed) return;
  if (dragging && cell !== null) cellsBetween(pointed ?? cell, cell).forEach(erase);
  pointed = cell;
  show();
});
root.addEventListener("pointerleave", () => { pointed = null; show(); });
root.addEventListener("pointerdown", (event) => {
  if (!data) return;
  const cell = cellAt(event);
  if (cell === null) return;
  event.preventDefault();
  event.target.releasePointerCapture?.(event.pointerId);
  press(cell);
  // A finger does not hover: what it left must not look pointed at.
  if (event.pointerType === "touch") { pointed = null; show(); }
});
window.addEventListener("pointerup", () => {
  if (!dragging) return;
  dragging = false;
  if (past.at(-1) === tokens) past.pop();
  show();
  decode();
});
find(".vt-ids").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -data.grid, ArrowDown: data.grid }[event.key];
  const cell = Number(event.target.dataset.cell);
  const next = event.currentTarget.children[cell + step];
  if (next) {
    event.preventDefault();
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    pointed = cell + step;
    show();
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    press(cell);
    window.dispatchEvent(new Event("pointerup"));
  }
});
find(".vt-tools").addEventListener("click", (event) => {
  const { mode: chosen, action } = event.target.dataset;
  if (chosen) { mode = chosen; if (mode !== "look") held = null; }
  else if (action === "undo") { tokens = past.pop(); decode(); }
  else if (action === "reset") { commit(data.tokens); decode(); }
  show();
});
new ResizeObserver(() => { if (data && root.clientWidth) { drawHeatMaps(); show(); } }).observe(root);

// -- what the server sends

async function load() {
  data = null;
  root.toggleAttribute("data-empty", !props.value);
  if (!props.value) return;
  const value = props.value;
  const [original, reconstruction] = await Promise.all([value.original, value.reconstruction].map(loadImage));
  data = value;
  tokens = data.tokens;
  past = [];
  pictures = { original, reconstruction, edited: null };
  pointed = null;
  held = Math.floor(data.grid / 2) * data.grid + Math.floor(data.grid / 2);
  const used = LEVEL_COLORS.slice(0, data.levels);
  find('[data-text="legend"]').innerHTML = used.map((color) => `<i style="background:${color}"></i>`).join("") + " fine to coarse features; opacity is the weight";
  write("spread", `${Math.round(100 * data.spread)} % of the weight lies outside of the token's own cell. On a fixed grid it would be none.`);
  buildIds();
  drawHeatMaps();
  show();
}

watch("value", load);
watch("edited", async () => {
  if (!data || !props.edited) return;
  const image = await loadImage(props.edited);
  if (data && changed().length) { pictures.edited = image; show(); }
});
load();
