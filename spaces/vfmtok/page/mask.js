// Cells of an image to repaint. `props.picture` is the image, `props.value` the marked cells in raster order.

const root = element.querySelector(".vt-mask");
const clear = root.querySelector("[data-action=clear]");
const group = root.querySelector("[role=group]");
let marking = null;   // while the pointer is down: whether it marks or unmarks cells

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
  root.toggleAttribute("data-empty", !props.picture);
  if (props.picture) root.querySelector("img").src = props.picture;
  cells.forEach((button, cell) => button.setAttribute("aria-pressed", isMarked(cell)));
  const count = props.value.length;
  root.querySelector(".vt-hint").textContent = count ? `${count} of ${cells.length} tokens will be sampled anew.` : "Click or drag over the part to repaint.";
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
  if (cell === null) return;
  event.preventDefault();
  marking = !isMarked(cell);
  mark(cell, marking);
});
group.addEventListener("pointermove", (event) => {
  if (marking === null) return;
  for (const point of event.getCoalescedEvents()) {
    const cell = cellAt(point);
    if (cell !== null) mark(cell, marking);
  }
});
window.addEventListener("pointerup", () => { marking = null; });
group.addEventListener("keydown", (event) => {
  const cell = Number(event.target.dataset.cell);
  const next = cells[cell + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -props.grid, ArrowDown: props.grid }[event.key]];
  if (next) {
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  } else if (event.key === "Enter" || event.key === " ") mark(cell, !isMarked(cell));
  else return;
  event.preventDefault();
});
clear.addEventListener("click", () => { props.value = []; show(); });
watch(["value", "picture"], show);
show();
