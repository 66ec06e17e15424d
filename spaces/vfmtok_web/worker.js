/**
 * All computation, outside the page's main thread. Requests are `{ id, type, ... }`; each is answered by any number of
 * `{ id, event, ... }` and a last one, `{ id, done: true, ... }` or `{ id, error }`.
 */

import { generateTokens } from "./generation.js";
import { Models } from "./models.js";
import { toPixelValues, toRgba } from "./pixels.js";

const MODELS = new URL("models/", import.meta.url).href;
const MAX_THREADS = 4;
const SECONDS_BETWEEN_BREAKS = 0.05;

let models;
let stopped = false;

/** The provider to compute with: the GPU where the browser has one, unless the visitor wants the CPU. */
async function chooseProvider(wanted) {
  const adapter = wanted === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? "webgpu" : "wasm";
}

async function start({ provider: wanted }, send) {
  const response = await fetch(`${MODELS}export.json`).catch(() => null);
  if (!response?.ok) throw new Error("models/export.json could not be fetched: export the page again.");
  const info = await response.json();
  const provider = await chooseProvider(wanted);
  const ort = await import(`./onnxruntime/ort.${provider}.min.mjs`);
  ort.env.logLevel = "error";
  // Without the headers of cross-origin isolation browsers share no memory between threads.
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  ort.env.wasm.numThreads = threads;
  models = new Models(ort, provider, MODELS, info, (name, received, size) => send("download", { name, received, size }));
  const ready = info.generator ? ["decode_step", "decoder"] : ["decoder", "encoder"];
  for (const name of ready) await models.session(name);
  return { info, provider, threads };
}

/** Lets messages in, such as the one that stops: without a break promises alone keep a worker busy. */
function takeBreak() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

async function generate({ settings, pictureEvery }, send) {
  const { info } = models;
  const sizes = {
    numClasses: info.generator.num_classes,
    conditionPositions: info.generator.condition_positions,
    numTokens: info.num_image_tokens,
  };
  const newSequence = await models.newSequence();
  const tokens = [];
  let drawing = 0; // milliseconds of drawing tokens, without pictures and breaks
  let sincePicture = 0; // those since the last picture
  let decoding = 0; // milliseconds that it took to decode
  let started = performance.now();
  for await (const token of generateTokens(newSequence, sizes, settings)) {
    tokens.push(token);
    const whole = tokens.length === sizes.numTokens;
    const elapsed = performance.now() - started;
    // Pictures take at most as long as tokens.
    const picture = whole || (tokens.length % pictureEvery === 0 && sincePicture + elapsed >= decoding);
    if (!picture && elapsed < 1000 * SECONDS_BETWEEN_BREAKS) continue;
    drawing += elapsed;
    sincePicture += elapsed;
    const news = { count: tokens.length, seconds: drawing / 1000 };
    if (picture) {
      const before = performance.now();
      news.rgba = await decodeOnPaper(tokens);
      decoding = performance.now() - before;
      sincePicture = 0;
    }
    send("tokens", news);
    await takeBreak();
    if (stopped && !whole) return { stopped: true, tokens };
    started = performance.now();
  }
  return { stopped: false, tokens };
}

/** The picture of the first tokens, where those not drawn yet are a white picture's. */
async function decodeOnPaper(tokens) {
  return toRgba(await models.decode([...tokens, ...models.info.blank_tokens.slice(tokens.length)]));
}

async function encode({ data }) {
  return { tokens: await models.encode(toPixelValues(data)) };
}

async function decode({ tokens }) {
  return { rgba: await decodeOnPaper(tokens) };
}

const HANDLERS = { start, generate, encode, decode };
let last = Promise.resolve();

self.onmessage = ({ data: { id, type, ...request } }) => {
  if (type === "stop") {
    stopped = true;
    return;
  }
  if (type === "generate") stopped = false; // here, as it may be stopped while it waits for its turn
  const send = (event, content) => self.postMessage({ id, event, ...content });
  last = last
    .then(() => HANDLERS[type](request, send))
    .then((result) => self.postMessage({ id, done: true, ...result }))
    .catch((error) => self.postMessage({ id, error: error.message ?? String(error) }));
};
