// "Inside" below an image opens it in the tab of that name.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-inside]");
  if (button) trigger("input", { index: Number(button.dataset.inside) });
});
