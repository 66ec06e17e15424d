/** The exported models: fetched once and kept by the browser, and run by onnxruntime-web. */

const CACHE = "vfmtok-models";

/** SHA-256 of a buffer in hexadecimal digits. */
async function digest(buffer) {
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Where the browser keeps models: null on pages that are not secure (neither https nor localhost), or if it refuses. */
const openCache = () => globalThis.caches?.open(CACHE).catch(() => null) ?? null;

/** The address of a part's file. Its digest is part of it, so that a new export is fetched anew. */
const addressOf = (base, { file, sha256 }) => new URL(`${file}?sha256=${sha256}`, base).href;

/** Read a response's body and report progress after each chunk. */
async function readBody(response, onProgress) {
  const pieces = [];
  let received = 0;
  for (let reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Blob(pieces).arrayBuffer();
    pieces.push(value);
    received += value.length;
    onProgress(received);
  }
}

/** A part's file, out of the browser's cache if it is there. Only secure pages can compute its digest. */
async function fetchFile(base, part, onProgress) {
  const { file, sha256 } = part;
  const cache = await openCache();
  const address = addressOf(base, part);
  const kept = await cache?.match(address);
  if (kept) return kept.arrayBuffer();
  const response = await fetch(address).catch(() => null);
  if (!response?.ok) throw new Error(`${file} could not be fetched (${response?.status ?? "no connection"}).`);
  const buffer = await readBody(response, onProgress);
  if (globalThis.crypto?.subtle && (await digest(buffer)) !== sha256) {
    throw new Error(`${file} is damaged: its content is not the one that was exported. Export or upload it again.`);
  }
  await cache?.put(address, new Response(buffer)).catch(() => null); // a full disk costs the next visit a download
  return buffer;
}

/** Drop what earlier exports left in the cache. */
async function dropOldFiles(base, parts) {
  const cache = await openCache();
  const current = new Set(Object.values(parts).map((part) => addressOf(base, part)));
  for (const request of (await cache?.keys()) ?? []) {
    if (request.url.startsWith(base) && !current.has(request.url)) await cache.delete(request);
  }
}

export class Models {
  /**
   * @param {object} ort the onnxruntime-web module.
   * @param {"webgpu" | "wasm"} provider what computes.
   * @param {string} base address of the folder of models.
   * @param {object} info its export.json.
   * @param {(name: string, received: number, size: number) => void} onProgress of downloads.
   */
  constructor(ort, provider, base, info, onProgress) {
    this.ort = ort;
    this.provider = provider;
    this.base = base;
    this.info = info;
    this.onProgress = onProgress;
    this.sessions = {};
    dropOldFiles(base, info.parts);
  }

  /** The session of a part, fetched at its first use. */
  session(name) {
    this.sessions[name] ??= this.#open(name).catch((error) => {
      delete this.sessions[name]; // the next use tries again
      throw error;
    });
    return this.sessions[name];
  }

  async #open(name) {
    const part = this.info.parts[name];
    const buffer = await fetchFile(this.base, part, (received) => this.onProgress(name, received, part.size));
    const options = { executionProviders: [this.provider] };
    // The keys and values that one step leaves for the next need not leave the GPU.
    const kept = part.outputs.filter((output) => output.endsWith("_out"));
    if (this.provider === "webgpu") {
      options.preferredOutputLocation = Object.fromEntries(kept.map((output) => [output, "gpu-buffer"]));
    }
    try {
      return await this.ort.InferenceSession.create(buffer, options);
    } catch (error) {
      const advice = this.provider === "webgpu" ? " Add ?compute=cpu to the address to run on the CPU." : "";
      throw new Error(`${part.file} could not be opened: ${error.message}${advice}`);
    }
  }

  #int64(values, shape = [1, values.length]) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }

  /** Image tokens of `(3, side, side)` pixel values. */
  async encode(pixelValues) {
    const side = this.info.image_size;
    const session = await this.session("encoder");
    const input = new this.ort.Tensor("float32", pixelValues, [1, 3, side, side]);
    const { image_tokens } = await session.run({ pixel_values: input });
    return Array.from(image_tokens.data, Number);
  }

  /** `(3, side, side)` pixel values of image tokens. */
  async decode(tokens) {
    const session = await this.session("decoder");
    const { reconstruction } = await session.run({ image_tokens: this.#int64(tokens) });
    return reconstruction.data;
  }

  /** What generateTokens needs to begin sequences. */
  async newSequence() {
    const session = await this.session("decode_step");
    const { ort } = this;
    const { cache_shape } = this.info.generator;
    const shape = cache_shape.map((size) => (size === "batch" ? 1 : size));
    const zeros = () => new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b)), shape);
    // A model of random order also asks where each token lies: here in raster order.
    const order = Array.from({ length: this.info.num_image_tokens }, (_, position) => position);
    const constant = session.inputNames.includes("orders") ? { orders: this.#int64(order) } : {};

    return (label) => {
      let position = 0;
      let states = { keys: zeros(), values: zeros() };
      const release = () => Object.values(states).forEach((tensor) => tensor.dispose());
      const next = async (token) => {
        const { logits, keys_out, values_out } = await session.run({
          class_labels: this.#int64([label], [1]),
          image_tokens: this.#int64([token], [1]),
          position: this.#int64([position++], []),
          ...states,
          ...constant,
        });
        release();
        states = { keys: keys_out, values: values_out };
        return logits.data;
      };
      return { next, release };
    };
  }
}
