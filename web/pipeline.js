// The network as a chain of workers, each with some of its layers, so that several bands of a picture
// are under way at once. They share no memory: each sends what it has computed to the next.

import { configOf } from "./engine.js";

/** Enlarges one picture. */
export class Pipeline {
  #workers = []; // held, so that browsers do not collect them
  #input;
  #waiting = []; // for the rows of a band: {resolve, reject}
  #failure = null;

  /**
   * @param {WebAssembly.Module} module see `programFile`
   * @param {ArrayBuffer} weights a .safetensors file of this project
   * @param {number} cores for this picture: there are no more workers than these, or than RSSBs
   * @param {number} width of the picture
   * @param {number} height both in pixels
   * @throws {WeightsError} the weights cannot be used
   */
  constructor(module, weights, cores, width, height) {
    const { scale, rssbs } = configOf(weights);
    this.scale = scale;
    this.stages = Math.min(cores, rssbs);
    const links = Array.from({ length: this.stages + 1 }, () => new MessageChannel());
    for (let stage = 0; stage < this.stages; stage++) {
      const worker = new Worker(new URL("stage.js", import.meta.url), { type: "module" });
      worker.onerror = (event) => {
        event.preventDefault();
        this.#fail("the browser stopped the work");
      };
      const [from, to] = [links[stage].port2, links[stage + 1].port1];
      const about = { module, weights, stage, stages: this.stages, width, height, from, to };
      worker.postMessage(about, [from, to]);
      this.#workers.push(worker);
    }
    this.#input = links[0].port1;
    links[this.stages].port2.onmessage = ({ data: { rows, failed } }) => {
      if (failed) this.#fail(failed);
      else this.#waiting.shift().resolve(rows);
    };
  }

  /**
   * Takes more rows of the picture, as `Engine.push` does, and does not wait for those before.
   *
   * @param {Float32Array} rows which are then no longer usable here
   * @returns {Promise<Float32Array>} the rows of the upscaled picture that are then finished
   */
  push(rows) {
    const finished = new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
    finished.catch(() => {}); // if there is nobody left to wait for it
    if (this.#failure === null) this.#input.postMessage({ rows }, [rows.buffer]);
    else this.#fail(this.#failure);
    return finished;
  }

  #fail(reason) {
    this.#failure = reason;
    for (const { reject } of this.#waiting.splice(0)) reject(new Error(reason));
  }
}
