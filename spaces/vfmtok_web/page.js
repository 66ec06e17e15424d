/** What the tabs share. */

export const element = (id) => document.getElementById(id);

/** Show an error above the page; an empty text hides it. */
export function alertVisitor(text) {
  element("alert").textContent = text;
  element("alert").hidden = !text;
}

/** Have screen readers read a text. */
export function announce(text) {
  element("news").textContent = text;
}

/** Run what a visitor asked for; what goes wrong is said on the page. */
export async function attempt(action) {
  alertVisitor("");
  try {
    return await action();
  } catch (error) {
    alertVisitor(error.message);
    return undefined;
  }
}

/** Show square RGBA data in a canvas, with a description. */
export function paint(canvas, rgba, description) {
  const side = Math.sqrt(rgba.length / 4);
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(rgba), side, side), 0, 0);
  canvas.setAttribute("aria-label", description);
}

/** Save what a canvas shows as a PNG file. */
export function download(canvas, name) {
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}

export function showTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const selected = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
    element(tab.getAttribute("aria-controls")).hidden = !selected;
  }
}
