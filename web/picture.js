// One picture of the page's list: its file, its worker and its result.

import { reductionOf } from "./preview.js";

export const MAX_PIXELS = 50e6;
export const MAX_SIDE = 16_384;

export class PictureError extends Error {}

// A worker that has loaded its modules before a picture needs them.
let spare = makeWorker();

function makeWorker() {
  const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onerror = () => {
    if (worker === spare) spare = null;
  };
  return worker;
}

export class Picture {
  state = "waiting"; // then "working", and "done" or "failed"
  reason = ""; // of a failure
  overview = null; // canvas with the result, or a smaller copy of it; its upper part while working
  tiles = new Map(); // "column row" -> Blob, if the overview is smaller than the result
  rowsDone = 0; // of the overview
  started = 0; // time in milliseconds
  url = ""; // of the result
  #worker = null;
  #changed;

  // Checks the file without decoding its pixels. Throws PictureError, whose message is for people.
  //
  // `weights` is an entry of weights.json; `changed` is called after each change.
  static async of(file, weights, changed) {
    if (file.type === "image/svg+xml") {
      throw new PictureError("It is an SVG, which is sharp at any size.");
    }
    const image = new Image();
    image.src = URL.createObjectURL(file);
    try {
      await new Promise((resolve, reject) => {
        image.onload = resolve;
        image.onerror = reject;
      });
      const { naturalWidth: width, naturalHeight: height } = image;
      if (!width || !height) throw new PictureError("It has no size in pixels.");
      if (width * height > MAX_PIXELS || Math.max(width, height) > MAX_SIDE) {
        throw new PictureError(
          `It is too large: ${width} × ${height} pixels. At most 50 megapixels, and ` +
            "16,384 pixels a side, can be enlarged here.",
        );
      }
      return new Picture(file, width, height, weights, changed);
    } catch (error) {
      if (error instanceof PictureError) throw error;
      throw new PictureError(
        /\.(heic|heif)$/i.test(file.name)
          ? "This browser cannot read HEIC. Save the picture as JPEG first."
          : "It is not a picture that this browser can read.",
      );
    } finally {
      URL.revokeObjectURL(image.src);
    }
  }

  constructor(file, width, height, weights, changed) {
    Object.assign(this, { file, width, height, weights });
    this.#changed = changed;
  }

  get scale() {
    return this.weights.scale;
  }

  get reduction() {
    return reductionOf(this.width * this.scale, this.height * this.scale);
  }

  // From 0 to 1.
  get progress() {
    return this.overview ? this.rowsDone / this.overview.height : 0;
  }

  get busy() {
    return this.state === "waiting" || this.state === "working";
  }

  // Starts the worker with the compiled module, the contents of the weights' file, and the number of
  // cores that it may use.
  start(module, weights, cores) {
    this.overview = new OffscreenCanvas(
      Math.ceil((this.width * this.scale) / this.reduction),
      Math.ceil((this.height * this.scale) / this.reduction),
    );
    this.state = "working";
    this.started = performance.now();
    this.#worker = spare ?? makeWorker();
    spare = null; // until a picture has ended: the next worker's start would slow down this one's
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = () => this.fail("The browser stopped the work. Reload the page.");
    this.#worker.postMessage({ file: this.file, module, weights, cores });
    this.#changed(this);
  }

  fail(reason) {
    this.stop();
    this.state = "failed";
    this.reason = reason;
    this.#changed(this);
  }

  // Ends the worker at once, and frees the result.
  stop() {
    this.#endWorker();
    URL.revokeObjectURL(this.url);
    this.url = "";
  }

  #endWorker() {
    this.#worker?.terminate();
    this.#worker = null;
    spare ??= makeWorker();
  }

  #receive({ overview, tile, result, failed }) {
    if (overview) {
      const { width } = this.overview;
      const rows = new ImageData(overview.rows, width);
      this.overview.getContext("2d").putImageData(rows, 0, overview.top);
      this.rowsDone = overview.top + rows.height;
    }
    if (tile) this.tiles.set(`${tile.column} ${tile.row}`, tile.blob);
    if (result) {
      this.#endWorker();
      this.url = URL.createObjectURL(result);
      this.state = "done";
    }
    if (failed) this.fail(failed);
    else this.#changed(this);
  }
}

// The name of a picture's result, as upscale.py gives it: photo_x4.png, or photo_jpg_x4.png if
// another of the pictures is, say, photo.png.
export function resultName(picture, pictures) {
  const { name } = picture.file;
  const stem = stemOf(name);
  const namesake = pictures.some(
    ({ file }) =>
      file.name.toLowerCase() !== name.toLowerCase() &&
      stemOf(file.name).toLowerCase() === stem.toLowerCase(),
  );
  const long = namesake ? stem + name.slice(stem.length).replaceAll(".", "_") : stem;
  return `${long}_x${picture.scale}.png`;
}

function stemOf(name) {
  const dot = name.lastIndexOf(".");
  return dot > 0 ? name.slice(0, dot) : name;
}
