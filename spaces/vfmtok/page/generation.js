// "Inside" and "Inpaint" below an image open it in the tab of that name.
element.addEventListener("click", (event) => {
  const { inside, inpaint, label } = event.target.closest("button")?.dataset ?? {};
  if (inside) trigger("inside", { index: Number(inside) });
  if (inpaint) trigger("inpaint", { index: Number(inpaint), label });
});
