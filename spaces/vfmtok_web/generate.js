/** The tab that generates. */

import { alertVisitor, announce, attempt, download, element, paint, showTab } from "./page.js";

const MAX_SEED = 2 ** 32 - 1;
const MAX_EARLIER = 24;

/** How a value of a slider reads. */
const WORDS = {
  temperature: (value) => value,
  top_k: (value) => (value === "0" ? "off" : value),
  top_p: (value) => (value === "1" ? "off" : value),
  guidance: (value) => (value === "1" ? "off" : value),
};

export function setUpGenerate(computer, info, link, edit) {
  const form = element("settings");
  const field = (name) => form.elements.namedItem(name);
  const canvas = element("canvas");
  const numTokens = info.num_image_tokens;
  const columns = Math.round(Math.sqrt(numTokens));
  let shown = null; // the image on the canvas: its tokens, RGBA data and name

  const className = (label) => info.generator.id2label[label]?.split(",")[0] ?? `class ${label}`;

  function fillForm() {
    const options = Array.from({ length: info.generator.num_classes }, (_, label) => new Option(className(label), label));
    field("label").replaceChildren(...options);
    const { temperature, top_k, top_p, guidance_scale } = info.sampling;
    field("top_k").max = info.codebook_size;
    field("guidance").max = Math.max(5, 2 * guidance_scale);
    const values = { temperature, top_k, top_p, guidance: Math.max(guidance_scale, 1) };
    for (const [name, value] of Object.entries(values)) field(name).value = link.get(name) ?? value;
    if (/^\d+$/.test(link.get("seed"))) field("seed").value = Math.min(Number(link.get("seed")), MAX_SEED);
    const wanted = link.get("label");
    // A class may be named by another's number.
    const label = options.find((option) => option.value === wanted) ?? options.find((option) => option.text === wanted);
    if (label) label.selected = true;
    else if (wanted) alertVisitor(`The link asks for the class “${wanted}”, which this model does not have.`);
    showValues();
  }

  function showValues() {
    for (const [name, word] of Object.entries(WORDS)) {
      form.querySelector(`[data-of=${name}]`).textContent = word(field(name).value);
      field(name).setAttribute("aria-valuetext", word(field(name).value));
    }
  }

  function settings() {
    const number = (name) => Number(field(name).value);
    const { do_sample, guidance_interval, guidance_scale_pow = null } = info.sampling;
    return {
      label: number("label"),
      seed: number("seed"),
      temperature: number("temperature"),
      topK: number("top_k"),
      topP: number("top_p"),
      doSample: do_sample,
      guidance: { scale: number("guidance"), interval: guidance_interval, power: guidance_scale_pow },
    };
  }

  function settingsLink() {
    const address = new URL(location.href);
    const values = {};
    for (const name of ["label", "seed", ...Object.keys(WORDS)]) values[name] = field(name).value;
    if (link.has("compute")) values.compute = link.get("compute");
    address.search = new URLSearchParams(values);
    return address.href;
  }

  function setBusy(busy) {
    element("draw").disabled = busy;
    element("stop").disabled = !busy;
    element("save").disabled = element("edit-this").disabled = busy || !shown;
    for (const button of element("earlier").querySelectorAll("button")) button.disabled = busy;
  }

  function showNumbers(count, seconds) {
    element("progress").value = count / numTokens;
    element("count").textContent = `${count} / ${numTokens}`;
    element("speed").textContent = seconds > 0 ? Math.round(count / seconds) : "–";
    element("seconds").textContent = seconds.toFixed(2);
  }

  async function draw() {
    const asked = settings();
    const name = `${className(asked.label)} ${asked.seed}`;
    history.replaceState(null, "", settingsLink());
    shown = null;
    setBusy(true);
    element("veil").hidden = true;
    showNumbers(0, 0);
    element("passes").textContent = asked.guidance.scale > 1 ? 2 : 1;
    announce(`Generating ${name}.`);
    let rgba = null;
    const answer = await attempt(() =>
      computer.request("generate", { settings: asked, pictureEvery: columns }, (news) => {
        showNumbers(news.count, news.seconds);
        if (!news.rgba) return;
        rgba = news.rgba;
        paint(canvas, rgba, `${name}, ${news.count} of ${numTokens} tokens`);
      }),
    );
    if (answer && !answer.stopped) {
      shown = { name, rgba, tokens: answer.tokens };
      paint(canvas, rgba, name);
      remember(shown);
      announce(`${name} is ready.`);
    } else {
      announce(answer ? "Stopped." : "");
    }
    setBusy(false);
  }

  function remember(image) {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", title: image.name });
    const small = document.createElement("canvas");
    paint(small, image.rgba, image.name);
    button.append(small);
    button.addEventListener("click", () => {
      shown = image;
      element("veil").hidden = true;
      paint(canvas, image.rgba, image.name);
      setBusy(false);
    });
    item.append(button);
    element("earlier").prepend(item);
    element("earlier").children[MAX_EARLIER]?.remove();
    element("earlier-section").hidden = false;
  }

  form.addEventListener("input", showValues);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  element("stop").addEventListener("click", () => computer.stop());
  element("dice").addEventListener("click", () => {
    [field("seed").value] = crypto.getRandomValues(new Uint32Array(1));
  });
  element("link").addEventListener("click", async () => {
    history.replaceState(null, "", settingsLink());
    // Pages that came over plain http have no clipboard; the address bar has the link.
    const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
    element("link").textContent = copied ? "Copied" : "The link is in the address bar";
    announce(element("link").textContent);
    setTimeout(() => (element("link").textContent = "Copy a link to these settings"), 2000);
  });
  element("save").addEventListener("click", () => download(canvas, `${shown.name.replaceAll(/\W+/g, "-")}.png`));
  element("edit-this").addEventListener("click", () => {
    showTab("edit");
    attempt(() => edit.open(shown.rgba, shown.tokens, shown.name));
  });

  fillForm();
  form.querySelector("details").open = matchMedia("(min-width: 761px)").matches;
  setBusy(false);
  element("loading").textContent = "Press Generate.";
  element("download").hidden = true;
}
