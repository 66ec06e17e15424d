/** The page's side of the worker: requests as promises. */

export class Computer {
  /** @param {(news: {name: string, received: number, size: number}) => void} onDownload hears how downloads go. */
  constructor(onDownload) {
    this.waiting = new Map();
    this.onDownload = onDownload;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data }) => this.#receive(data);
    this.worker.onerror = () => this.#failAll(new Error("The page's worker could not be started: reload the page."));
    this.count = 0;
  }

  /** Ask for something. `onEvent` hears what comes before the answer. */
  request(type, content = {}, onEvent = () => {}) {
    const id = this.count++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onEvent });
      this.worker.postMessage({ id, type, ...content });
    });
  }

  /** End the generation in progress; its request is answered with the tokens so far. */
  stop() {
    this.worker.postMessage({ type: "stop" });
  }

  #receive({ id, event, done, error, ...content }) {
    if (event === "download") return this.onDownload(content);
    const { resolve, reject, onEvent } = this.waiting.get(id);
    if (event) return onEvent(content);
    this.waiting.delete(id);
    return done ? resolve(content) : reject(new Error(error));
  }

  #failAll(error) {
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }
}
