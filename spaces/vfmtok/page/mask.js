// Cells of an image to repaint. `props.picture` is the image, `props.value` the marked cells in raster order.

const root = element.querySelector(".vt-mask");
const clear = root.querySelector("[data-action=clear]");
const group = root.querySelector("[role=group]");
let picture = null;   // the one whose cells are marked
let marking = null;   // during a drag: whether it marks or unmarks cells

const cells = Array.from({ length: props.grid ** 2 }, (_, cell) => {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.cell = cell;
  button.tabIndex = cell === 0 ? 0 : -1;
  button.setAttribute("aria-label", `Row ${Math.floor(cell / props.grid) + 1}, column ${(cell % props.grid) + 1}`);
  return button;
});
group.style.setProperty("--grid", props.grid);
group.replaceChildren(...cells);

const isMarked = (cell) => props.value.includes(cell);

function show() {
  if (props.picture !== picture) {   // gradio may send the same one again
    picture = props.picture;
    props.value = [];
    root.toggleAttribute("data-empty", !picture);
    if (picture) root.querySelector("img").src = picture;
  }
  cells.forEach((button, cell) => button.setAttribute("aria-pressed", isMarked(cell)));
  const count = props.value.length;
  root.querySelector(".vt-hint").textContent = count ? `${count} of ${cells.length} tokens will be regenerated.` : "Click or drag over the part to repaint, or use the arrow keys and Space.";
  clear.disabled = !count;
}

function mark(cell, marked) {
  if (isMarked(cell) === marked) return;
  props.value = marked ? [...props.value, cell].sort((a, b) => a - b) : props.value.filter((other) => other !== cell);
  show();
}

function cellAt(event) {
  const cell = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-cell]")?.dataset.cell;
  return cell === undefined ? null : Number(cell);
}

group.addEventListener("pointerdown", (event) => {
  const cell = cellAt(event);
  if (cell === null || event.button !== 0) return;
  event.preventDefault();
  marking = !isMarked(cell);
  mark(cell, marking);
});
group.addEventListener("pointermove", (event) => {
  if (!event.buttons) marking = null;   // released outside of the window
  if (marking === null) return;
  for (const point of event.getCoalescedEvents?.() ?? [event]) {   // only in secure contexts
    const cell = cellAt(point);
    if (cell !== null) mark(cell, marking);
  }
});
for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, () => { marking = null; });
// Keys and assistive technology click without a pointer.
group.addEventListener("click", (event) => {
  const cell = event.target.dataset.cell;
  if (event.detail === 0 && cell !== undefined) mark(Number(cell), !isMarked(Number(cell)));
});
group.addEventListener("keydown", (event) => {
  const cell = Number(event.target.dataset.cell);
  const next = cells[cell + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -props.grid, ArrowDown: props.grid }[event.key]];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
clear.addEventListener("click", () => {
  props.value = [];
  show();
  cells.find((button) => button.tabIndex === 0).focus();   // a disabled button loses the focus
});
watch(["value", "picture"], show);
show();
