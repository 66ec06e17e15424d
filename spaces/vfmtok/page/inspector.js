// The tokens of one image. `props.value` is the result of `inspect` in inspection.py, and `props.edited` is the decoded
// image of changed tokens. Tokens change here; the event `input` asks the server to decode them.

const root = element.querySelector(".vt-inspector");
const find = (selector) => root.querySelector(selector);
const canvas = (name) => find(`canvas[data-panel="${name}"]`);
const write = (name, text) => { find(`[data-text="${name}"]`).textContent = text; };

const HINTS = {
  look: "Point at a token to see what it looks at; click to pin it.",
  erase: "Click or drag over tokens to replace them with blank ones.",
  swap: "Click two tokens to swap them.",
};

let data = null;      // what is shown
let tokens = [];      // the tokens as edited
let past = [];        // earlier versions of `tokens`
let pictures = {};    // loaded images by name
let mode = "look";
let pointed = null;   // token under the pointer
let held = null;      // token pinned by a click
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
    context.strokeStyle = context.fillStyle = data.colors[level % data.colors.length];
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

// Locations of a token as [x, y, weight], with the image's side as unit.
function locationsOf(cell) {
  const flat = data.points[cell];
  return Array.from({ length: flat.length / 3 }, (_, place) => [
    flat[3 * place] / data.units, flat[3 * place + 1] / data.units, flat[3 * place + 2],
  ]);
}

const centerOf = (cell) => [((cell % data.grid) + 0.5) / data.grid, (Math.floor(cell / data.grid) + 0.5) / data.grid];

// From the center of each cell to the weighted mean of the token's locations.
function drawArrows() {
  const [context, side] = prepare(canvas("arrows"));
  context.fillStyle = "#fff";
  context.fillRect(0, 0, side, side);
  context.globalAlpha = 0.35;
  context.drawImage(pictures.original, 0, 0, side, side);
  context.globalAlpha = 1;
  context.strokeStyle = context.fillStyle = "#1d4ed8";
  data.tokens.forEach((_, cell) => {
    const places = locationsOf(cell);
    const total = places.reduce((sum, [, , weight]) => sum + weight, 0) || 1;
    const mean = [0, 1].map((axis) => places.reduce((sum, place) => sum + place[axis] * place[2], 0) / total);
    const [from, to] = [centerOf(cell), mean].map(([x, y]) => [x * side, y * side]);
    context.beginPath(); context.moveTo(...from); context.lineTo(...to); context.lineWidth = 1.5; context.stroke();
    context.beginPath(); context.arc(...to, Math.max(side / 120, 2), 0, 2 * Math.PI); context.fill();
  });
}

// All locations relative to the center of their token's cell, summed up as heat; 5 x 5 cells are shown.
function drawOffsets() {
  const bins = 100, cells = 5, reach = 6;  // reach: twice the variance of a Gaussian in bins, and its cut-off
  const heat = new Float32Array(bins * bins);
  data.tokens.forEach((_, cell) => {
    const center = centerOf(cell);
    for (const [x, y, weight] of locationsOf(cell)) {
      const [column, row] = [x - center[0], y - center[1]].map((offset) => ((offset * data.grid) / cells + 0.5) * bins - 0.5);
      for (let r = Math.max(Math.ceil(row - reach), 0); r <= Math.min(row + reach, bins - 1); r++) {
        for (let c = Math.max(Math.ceil(column - reach), 0); c <= Math.min(column + reach, bins - 1); c++) {
          heat[r * bins + c] += weight * Math.exp(-((r - row) ** 2 + (c - column) ** 2) / reach);
        }
      }
    }
  });
  const hottest = Math.max(...heat) || 1;
  const layer = document.createElement("canvas");
  layer.width = layer.height = bins;
  const pixels = new ImageData(bins, bins);
  heat.forEach((value, at) => {
    const level = Math.sqrt(value / hottest);  // the square root shows the tail
    pixels.data.set([255 - 226 * level, 255 - 177 * level, 255 - 39 * level, 255], 4 * at);
  });
  layer.getContext("2d").putImageData(pixels, 0, 0);
  const [context, side] = prepare(canvas("offsets"));
  context.drawImage(layer, 0, 0, side, side);
  context.strokeStyle = "rgba(120, 120, 120, .28)";
  context.lineWidth = 0.5;
  for (let line = 1; line < cells; line++) {
    context.beginPath();
    context.moveTo((line * side) / cells, 0); context.lineTo((line * side) / cells, side);
    context.moveTo(0, (line * side) / cells); context.lineTo(side, (line * side) / cells);
    context.stroke();
  }
  context.strokeStyle = "#111";
  context.lineWidth = 2;
  context.strokeRect((2 * side) / cells, (2 * side) / cells, side / cells, side / cells);
}

function drawOverviews() {
  drawArrows();
  drawOffsets();
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
  write("ids", cell === null ? `${new Set(tokens).size} different tokens` : `token ${tokens[cell]} of 0 to ${data.codebook - 1}`);
  write("decoded", count ? "Decoded after your edit" : "Reconstruction");
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

// A fast pointer skips cells on its way.
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
  // A finger does not hover, so nothing stays highlighted after a touch.
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
new ResizeObserver(() => { if (data && root.clientWidth) { drawOverviews(); show(); } }).observe(root);

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
  const used = Array.from({ length: data.levels }, (_, level) => data.colors[level % data.colors.length]);
  find('[data-text="legend"]').innerHTML = used.map((color) => `<i style="background:${color}"></i>`).join("") + " fine to coarse features; opacity is the attention weight";
  write("spread", `${Math.round(100 * data.spread)} % of the attention weight is outside of the token's own cell.`);
  buildIds();
  drawOverviews();
  show();
}

watch("value", load);
watch("edited", async () => {
  if (!data || !props.edited) return;
  const image = await loadImage(props.edited);
  if (data && changed().length) { pictures.edited = image; show(); }
});
load();
