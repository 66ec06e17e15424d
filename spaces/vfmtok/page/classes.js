// A radio group of classes. `props.value` is the chosen class; arrow keys move the choice.

const radios = () => [...element.querySelectorAll("[role=radio]")];

function show() {
  const chosen = radios().find((radio) => radio.dataset.value === props.value);
  const stop = chosen && !chosen.hidden ? chosen : radios().find((radio) => !radio.hidden);
  radios().forEach((radio) => {
    radio.setAttribute("aria-checked", radio === chosen);
    radio.tabIndex = radio === stop ? 0 : -1;
  });
}

function choose(radio) {
  props.value = radio.dataset.value;
  show();
  radio.focus();
}

element.addEventListener("click", (event) => {
  const radio = event.target.closest("[role=radio]");
  if (radio) choose(radio);
});
element.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  const radio = event.target.closest("[role=radio]");
  if (!step || !radio) return;
  event.preventDefault();
  const shown = radios().filter((other) => !other.hidden);
  choose(shown[(shown.indexOf(radio) + step + shown.length) % shown.length]);
});
element.addEventListener("input", (event) => {
  const text = event.target.value.trim().toLowerCase();
  radios().forEach((radio) => { radio.hidden = !radio.dataset.names.includes(text); });
  show();
});
watch("value", show);
show();
