// Writes PNG (https://www.w3.org/TR/png-3) row by row, as dvmsr_jax/pictures/png.py does.
//
// A canvas cannot: it would have to hold the whole picture, and no browser's holds 192 megapixels.

const COLOUR_TYPES = { 1: 0, 2: 4, 3: 2, 4: 6 }; // by number of channels
const CHUNK = 2 ** 18; // approximate bytes of a chunk

export class PngWriter {
  #chunks;
  #channels;
  #stride;
  #above;
  #compressor = new CompressionStream("deflate");
  #input = this.#compressor.writable.getWriter();
  #drained;

  // `channels`: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha; 8 bits each. `profile` is a
  // compressed ICC profile, or null.
  constructor(width, height, channels, profile) {
    this.#channels = channels;
    this.#stride = width * channels;
    this.#above = new Uint8Array(this.#stride);
    const header = new DataView(new ArrayBuffer(13));
    header.setUint32(0, width);
    header.setUint32(4, height);
    header.setUint8(8, 8);
    header.setUint8(9, COLOUR_TYPES[channels]);
    this.#chunks = [Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10)];
    this.#chunks.push(chunk("IHDR", [new Uint8Array(header.buffer)]));
    if (profile) {
      this.#chunks.push(chunk("iCCP", [new TextEncoder().encode("ICC profile\0\0"), profile]));
    }
    this.#drained = this.#drain();
    this.#drained.catch(() => {}); // write() and finish() report it
  }

  // Appends rows. The promise resolves when the compressor has taken them.
  async write(rows) {
    const filtered = filterRows(this.#above, rows, this.#stride, this.#channels);
    this.#above = rows.subarray(rows.length - this.#stride);
    await this.#input.write(filtered);
  }

  // The file, after the last row.
  async finish() {
    await this.#input.close();
    await this.#drained;
    this.#chunks.push(chunk("IEND", []));
    return new Blob(this.#chunks, { type: "image/png" });
  }

  async #drain() {
    let pending = [];
    let size = 0;
    const flush = () => {
      // Browsers can keep a Blob outside the worker's memory, even on disk.
      if (size) this.#chunks.push(new Blob([chunk("IDAT", pending)]));
      pending = [];
      size = 0;
    };
    const output = this.#compressor.readable.getReader();
    for (let { value, done } = await output.read(); !done; ) {
      pending.push(value);
      size += value.length;
      if (size >= CHUNK) flush();
      ({ value, done } = await output.read());
    }
    flush();
  }
}

// Encodes each row as its filter's number and the differences from that filter's prediction. For
// each row, the filter with the smallest sum of absolute differences is chosen, as the standard
// recommends, from four of the five.
function filterRows(above, rows, stride, step) {
  const count = rows.length / stride;
  const filtered = new Uint8Array(count * (stride + 1));
  const candidates = [0, 1, 2, 4].map((number) => ({ number, line: new Uint8Array(stride) }));
  const [none, sub, up, paeth] = candidates.map(({ line }) => line);
  for (let row = 0; row < count; row++) {
    const here = rows.subarray(row * stride, (row + 1) * stride);
    const costs = [0, 0, 0, 0];
    for (let i = 0; i < stride; i++) {
      const value = here[i];
      const left = i < step ? 0 : here[i - step];
      const corner = i < step ? 0 : above[i - step];
      // Paeth's prediction is the neighbour nearest to left + above - corner.
      const fromLeft = Math.abs(above[i] - corner);
      const fromUp = Math.abs(left - corner);
      const fromCorner = Math.abs(left + above[i] - 2 * corner);
      let nearest = fromUp <= fromCorner ? above[i] : corner;
      if (fromLeft <= fromUp && fromLeft <= fromCorner) nearest = left;
      none[i] = value;
      sub[i] = value - left;
      up[i] = value - above[i];
      paeth[i] = value - nearest;
      costs[0] += magnitude(none[i]);
      costs[1] += magnitude(sub[i]);
      costs[2] += magnitude(up[i]);
      costs[3] += magnitude(paeth[i]);
    }
    const best = candidates[costs.indexOf(Math.min(...costs))];
    filtered[row * (stride + 1)] = best.number;
    filtered.set(best.line, row * (stride + 1) + 1);
    above = here;
  }
  return filtered;
}

function magnitude(byte) {
  return byte < 128 ? byte : 256 - byte;
}

function chunk(kind, parts) {
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  const bytes = new Uint8Array(length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, length);
  bytes.set(new TextEncoder().encode(kind), 4);
  let end = 8;
  for (const part of parts) {
    bytes.set(part, end);
    end += part.length;
  }
  view.setUint32(end, crc32(bytes.subarray(4, end)));
  return bytes;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}
