/** The tab that turns an image into tokens to edit. */

import { announce, attempt, download, element, paint, showTab } from "./page.js";
import { centerSquare, psnr } from "./pixels.js";

const MAX_PIXELS = 40e6;

/** The pixels of an image file over white, upright. */
async function readPixels(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name || "This"} cannot be read as an image.`);
  });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error("Images of up to 40 million pixels can be read.");
  if (Math.max(width, height) > 100 * Math.min(width, height)) throw new Error("The image is too narrow: crop it first.");
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, width, height);
}

export function setUpEdit(computer, info) {
  const columns = Math.ceil(Math.sqrt(info.num_image_tokens));
  const cells = element("cells");
  const caption = element("token-word").textContent;
  let image = null; // its RGBA data, its name, and its own tokens
  let tokens = [];
  let earlier = []; // tokens before each change, for undo
  let first = null; // the token that waits for the one to swap with
  let decoding = null; // what decode promised, until it is done

  const tool = () => document.querySelector("[name=tool]:checked").value;
  const isErased = (index) => tokens[index] === info.blank_tokens[index] && image.tokens[index] !== tokens[index];

  function buildCells() {
    cells.style.setProperty("--columns", columns);
    const rows = Array.from({ length: Math.ceil(info.num_image_tokens / columns) }, (_, row) => {
      const line = document.createElement("div");
      line.setAttribute("role", "row");
      const length = Math.min(columns, info.num_image_tokens - row * columns);
      for (let column = 0; column < length; column++) {
        const cell = Object.assign(document.createElement("button"), { type: "button", tabIndex: -1 });
        cell.setAttribute("role", "gridcell");
        cell.dataset.index = row * columns + column;
        line.append(cell);
      }
      return line;
    });
    cells.replaceChildren(...rows);
    cells.querySelector("button").tabIndex = 0;
  }

  const cellOf = (index) => cells.querySelector(`[data-index="${index}"]`);

  function describe(index) {
    const place = `row ${Math.floor(index / columns) + 1}, column ${(index % columns) + 1}`;
    const was = tokens[index] === image.tokens[index] ? "" : `, was ${image.tokens[index]}`;
    return `Token ${tokens[index]} in ${place}${isErased(index) ? ", erased" : was}`;
  }

  function show() {
    for (const cell of cells.querySelectorAll("button")) {
      const index = Number(cell.dataset.index);
      cell.setAttribute("aria-label", describe(index));
      cell.classList.toggle("changed", tokens[index] !== image.tokens[index]);
      cell.classList.toggle("erased", isErased(index));
      cell.classList.toggle("first", index === first);
    }
    const changed = tokens.filter((token, index) => token !== image.tokens[index]).length;
    element("edit-count").textContent = tokens.length;
    element("changed").textContent = changed;
    element("distinct").textContent = new Set(tokens).size;
    element("undo").disabled = earlier.length === 0;
    element("restore").disabled = changed === 0;
    element("save-edited").disabled = false;
  }

  /** Show what the tokens decode to. Of the changes during a decode, the next one takes the newest alone. */
  function decode() {
    decoding ??= decodeNewest().finally(() => (decoding = null));
    return decoding;
  }

  async function decodeNewest() {
    let decoded;
    do {
      decoded = tokens;
      const { rgba } = await computer.request("decode", { tokens });
      paint(element("edited"), rgba, `Reconstruction of ${image.name}`);
      if (decoded === image.tokens) showQuality(psnr(image.rgba, rgba));
    } while (decoded !== tokens);
  }

  function showQuality(decibels) {
    element("quality").textContent = Number.isFinite(decibels) ? `${decibels.toFixed(1)} dB` : "equal";
  }

  function change(newTokens) {
    earlier.push(tokens);
    tokens = newTokens;
    show();
    return attempt(decode);
  }

  /** What a click on a token does; a token that erases already is restored. */
  function press(index) {
    if (tool() === "erase") {
      const replacement = isErased(index) ? image.tokens[index] : info.blank_tokens[index];
      change(tokens.with(index, replacement));
    } else if (first === null || first === index) {
      first = first === null ? index : null;
      show();
    } else {
      const swapped = tokens.with(index, tokens[first]).with(first, tokens[index]);
      first = null;
      change(swapped);
    }
    announce(describe(index));
  }

  /** Show an image with its tokens, and their reconstruction. */
  async function open(rgba, ownTokens, name) {
    image = { rgba, name, tokens: ownTokens };
    [tokens, earlier, first] = [ownTokens, [], null];
    element("edit-veil").hidden = true;
    cells.hidden = false;
    paint(element("original"), rgba, name);
    element("quality").textContent = "–";
    show();
    await decode();
  }

  function openFile(file) {
    if (!file) return;
    showTab("edit");
    attempt(async () => {
      announce("Encoding the image.");
      const { data } = centerSquare(await readPixels(file), info.image_size);
      const encoding = computer.request("encode", { data });
      // Until then the caption may show the encoder's download.
      const { tokens: own } = await encoding.finally(() => (element("token-word").textContent = caption));
      await open(data, own, file.name || "pasted image");
      announce(`${image.name} has ${tokens.length} tokens.`);
    });
  }

  cells.addEventListener("click", ({ target }) => {
    if (target.dataset.index) press(Number(target.dataset.index));
  });
  cells.addEventListener("focusin", ({ target }) => {
    for (const cell of cells.querySelectorAll("[tabindex='0']")) cell.tabIndex = -1;
    target.tabIndex = 0;
    element("token-word").textContent = describe(Number(target.dataset.index));
  });
  cells.addEventListener("pointerover", ({ target }) => {
    if (target.dataset.index) element("token-word").textContent = describe(Number(target.dataset.index));
  });
  cells.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const next = step && cellOf(Number(event.target.dataset.index) + step);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
  element("undo").addEventListener("click", () => {
    tokens = earlier.pop();
    show();
    attempt(decode);
  });
  element("restore").addEventListener("click", () => change(image.tokens));
  element("save-edited").addEventListener("click", () => download(element("edited"), "reconstruction.png"));
  element("file").addEventListener("change", ({ target }) => {
    openFile(target.files[0]);
    target.value = ""; // so that choosing the same file again is a change
  });
  addEventListener("paste", ({ clipboardData }) => {
    openFile([...clipboardData.files].find((file) => file.type.startsWith("image/")));
  });
  for (const type of ["dragover", "drop"]) addEventListener(type, (event) => event.preventDefault());
  addEventListener("drop", ({ dataTransfer }) => openFile(dataTransfer.files[0]));
  for (const [type, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    element("drop").addEventListener(type, () => element("drop").classList.toggle("over", over));
  }

  buildCells();
  cells.hidden = true;
  return { open };
}
