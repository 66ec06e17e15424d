/** The start of the page. */

import { Computer } from "./computer.js";
import { setUpEdit } from "./edit.js";
import { setUpGenerate } from "./generate.js";
import { alertVisitor, announce, element, showTab } from "./page.js";

function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => showTab(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      const next = step && tabs.at((index + step) % tabs.length);
      if (!next || next.hidden) return;
      showTab(next.getAttribute("aria-controls"));
      next.focus();
    });
  }
}

function showFacts({ image_size, num_image_tokens, codebook_size, generator, name }) {
  const facts = [
    name,
    `${image_size} × ${image_size} pixels`,
    `${num_image_tokens} tokens an image`,
    `codebook of ${codebook_size.toLocaleString("en")}`,
    generator && `${generator.num_classes.toLocaleString("en")} classes`,
  ];
  const items = facts.filter(Boolean).map((fact) => Object.assign(document.createElement("li"), { textContent: fact }));
  element("facts").replaceChildren(...items);
}

/** Show the device, and a link to the other one. */
function showMachine(provider, threads) {
  const onGpu = provider === "webgpu";
  const place = onGpu ? "GPU (WebGPU)" : `CPU (WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"})`;
  element("machine").textContent = `It runs on the ${place}. `;
  if (navigator.gpu && (onGpu || location.search.includes("compute=cpu"))) {
    const [href, textContent] = onGpu ? ["?compute=cpu", "Run on the CPU instead"] : ["?", "Run on the GPU instead"];
    element("machine").append(Object.assign(document.createElement("a"), { href, textContent }));
  } else if (!crossOriginIsolated) {
    element("machine").append("The server did not send the headers that multithreading needs.");
  }
}

function downloadText({ name, received, size }) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  return `Fetching ${name.replace("_", " ")}: ${megabytes(received)} of ${megabytes(size)} MB`;
}

function showDownload(news) {
  element("download").value = news.received / news.size;
  element("loading").textContent = downloadText(news);
}

async function start() {
  setUpTabs();
  if (typeof WebAssembly !== "object") {
    throw new Error("This page needs WebAssembly, which this browser does not have. Use a current browser.");
  }
  const link = new URLSearchParams(location.search);
  const computer = new Computer(showDownload);
  const provider = link.get("compute") === "cpu" ? "wasm" : undefined;
  const started = await computer.request("start", { provider });
  // What is fetched later is the encoder, for the other tab.
  computer.onDownload = (news) => (element("token-word").textContent = downloadText(news));
  showFacts(started.info);
  showMachine(started.provider, started.threads);
  const edit = setUpEdit(computer, started.info);
  if (started.info.generator) {
    setUpGenerate(computer, started.info, link, edit);
  } else {
    element("generate-tab").hidden = true;
    showTab("edit");
  }
  announce("The model is ready.");
}

start().catch((error) => {
  element("loading").textContent = "The model could not be loaded.";
  element("download").hidden = true;
  alertVisitor(error.message);
});
