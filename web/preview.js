// What the page shows of a result, made in the worker while the rows come.
//
// A large result cannot be held as pixels: 192 megapixels are 768 MB. The page gets an overview
// of at most OVERVIEW_PIXELS and, if that is smaller than the result, tiles of the full size, which
// are compressed: the page decodes those in sight when somebody zooms in.

const OVERVIEW_PIXELS = 4e6;
export const TILE = 512; // pixels a side

// The factor by which the overview of a result is smaller.
export function reductionOf(width, height) {
  let reduction = 1;
  while (Math.ceil(width / reduction) * Math.ceil(height / reduction) > OVERVIEW_PIXELS) {
    reduction++;
  }
  return reduction;
}

export class Preview {
  #width;
  #height;
  #opaque;
  #post;
  #reduction;
  #top = 0; // of the next rows, if the overview is not reduced
  #overview; // rows for the overview's next rows
  #tiles; // rows for the next tiles

  // `post` is called with {overview: {top, rows}}, rows in RGBA, and with
  // {tile: {column, row, blob}}, counted in tiles.
  constructor(width, height, opaque, post) {
    this.#width = width;
    this.#height = height;
    this.#opaque = opaque;
    this.#post = post;
    this.#reduction = reductionOf(width, height);
    if (this.#reduction > 1) {
      this.#overview = new Regrouped(width, height, this.#reduction);
      this.#tiles = new Regrouped(width, height, TILE);
    }
  }

  // Appends rows in RGBA.
  async add(rgba) {
    const count = rgba.length / (4 * this.#width);
    if (this.#reduction === 1) {
      this.#post({ overview: { top: this.#top, rows: rgba } }, [rgba.buffer]);
      this.#top += count;
      return;
    }
    for (const { top, rows } of this.#overview.add(rgba)) {
      const reduced = reduce(rows, this.#width, this.#reduction);
      this.#post({ overview: { top: top / this.#reduction, rows: reduced } }, [reduced.buffer]);
    }
    for (const { top, rows } of this.#tiles.add(rgba)) await this.#postTiles(top, rows);
  }

  async #postTiles(top, rows) {
    const height = rows.length / (4 * this.#width);
    const strip = new ImageData(rows, this.#width, height);
    for (let left = 0; left < this.#width; left += TILE) {
      const width = Math.min(TILE, this.#width - left);
      const canvas = new OffscreenCanvas(width, height);
      canvas.getContext("2d").putImageData(strip, -left, 0);
      const type = this.#opaque ? "image/jpeg" : "image/png";
      const blob = await canvas.convertToBlob({ type, quality: 0.95 });
      this.#post({ tile: { column: left / TILE, row: top / TILE, blob } });
    }
  }
}

// Regroups rows that arrive in any number.
class Regrouped {
  constructor(width, height, count) {
    this.stride = 4 * width;
    this.missing = height; // rows that have not arrived
    this.count = count;
    this.top = 0;
    this.held = new Uint8ClampedArray(count * this.stride);
    this.filled = 0;
  }

  // Yields groups of `count` rows; the picture's last one may have fewer.
  *add(rows) {
    this.missing -= rows.length / this.stride;
    for (let start = 0; start < rows.length; ) {
      const end = Math.min(rows.length, start + this.held.length - this.filled);
      this.held.set(rows.subarray(start, end), this.filled);
      this.filled += end - start;
      start = end;
      const last = this.missing === 0 && start === rows.length;
      if (this.filled === this.held.length || last) {
        yield { top: this.top, rows: this.held.slice(0, this.filled) };
        this.top += this.count;
        this.filled = 0;
      }
    }
  }
}

// One row: the means of squares of pixels, in which colours count by alpha.
function reduce(rgba, width, factor) {
  const rows = rgba.length / (4 * width);
  const columns = Math.ceil(width / factor);
  const reduced = new Uint8ClampedArray(4 * columns);
  for (let column = 0; column < columns; column++) {
    const end = Math.min((column + 1) * factor, width);
    let [r, g, b, a] = [0, 0, 0, 0];
    for (let y = 0; y < rows; y++) {
      for (let i = 4 * (y * width + column * factor); i < 4 * (y * width + end); i += 4) {
        const alpha = rgba[i + 3];
        r += rgba[i] * alpha;
        g += rgba[i + 1] * alpha;
        b += rgba[i + 2] * alpha;
        a += alpha;
      }
    }
    const pixels = rows * (end - column * factor);
    if (a) reduced.set([r / a, g / a, b / a, a / pixels], 4 * column);
  }
  return reduced;
}
