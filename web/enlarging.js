// Enlarges pictures of all kinds with a network for RGB, as dvmsr_jax/pictures/upscaler.py does.

// As in dvmsr_jax/rgb.py: pixels and rows of a band.
const BAND_PIXELS = 8192;
const MAX_BAND_ROWS = 16;

const VALUES = Float32Array.from({ length: 256 }, (_, byte) => byte / 255);
const LUMA = [0.299, 0.587, 0.114].map(Math.fround); // ITU-R BT.601
const { fround } = Math;

// The number of channels of a result: 1 is grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
export function channelsOf({ grey, opaque }) {
  return (grey ? 1 : 3) + (opaque ? 0 : 1);
}

// Yields the enlarged rows from top to bottom, in Uint8ClampedArrays of any number of rows.
//
// `pixels` is a Pixels. `pipelines` are two for a picture with alpha, otherwise one.
export async function* enlarge(pixels, pipelines) {
  yield* (pixels.opaque ? enlargeOpaque : enlargeTransparent)(pixels, pipelines);
}

async function* enlargeOpaque(pixels, pipelines) {
  for await (const [rows] of outputs(pixels, pipelines, [onBlack])) {
    const colours = pixels.grey ? luma(rows) : rows;
    const bytes = new Uint8ClampedArray(colours.length); // rounds halves to even, and clamps
    for (let i = 0; i < bytes.length; i++) bytes[i] = fround(colours[i] * 255);
    yield bytes;
  }
}

// Enlarges the picture blended with black, and blended with white. Alpha follows from the
// difference of the two results, and the colour from alpha.
async function* enlargeTransparent(pixels, pipelines) {
  const { scale } = pipelines[0];
  const width = pixels.width * scale;
  const colours = pixels.grey ? 1 : 3;
  const alpha = new Uint8Array(pixels.width * pixels.height);
  const keepAlpha = (rgba, first) => {
    const start = first * pixels.width;
    for (let i = 0; i < rgba.length / 4; i++) alpha[start + i] = rgba[4 * i + 3];
  };
  let top = 0;
  for await (const both of outputs(pixels, pipelines, [onBlack, onWhite], keepAlpha)) {
    const [black, white] = both.map((rows) => (pixels.grey ? luma(rows) : rows));
    const count = black.length / (width * colours);
    const bytes = new Uint8ClampedArray(width * count * (colours + 1));
    let bounds, boundsRow;
    for (let row = 0, from = 0, to = 0; row < count; row++) {
      const source = Math.floor((top + row) / scale);
      if (source !== boundsRow) {
        bounds = alphaBounds(alpha, pixels, source);
        boundsRow = source;
      }
      for (let x = 0; x < width; x++, from += colours) {
        let difference = 0;
        for (let c = 0; c < colours; c++) {
          difference = fround(difference + fround(clip(white[from + c]) - clip(black[from + c])));
        }
        const column = Math.floor(x / scale);
        let coverage = fround(1 - fround(difference / colours));
        coverage = Math.max(coverage, VALUES[bounds.lowest[column]]);
        coverage = Math.min(coverage, VALUES[bounds.highest[column]]);
        for (let c = 0; c < colours; c++) {
          const colour = coverage > 0 ? fround(clip(black[from + c]) / coverage) : 0;
          bytes[to++] = fround(colour * 255);
        }
        bytes[to++] = fround(coverage * 255);
      }
    }
    top += count;
    yield bytes;
  }
}

// Yields the pipelines' finished rows, an array for each. `views` makes each one's input of a pixel's
// value and alpha; `seen` is called with each band's RGBA and the index of its first row.
async function* outputs(pixels, pipelines, views, seen = () => {}) {
  const { width, height } = pixels;
  const count = Math.min(MAX_BAND_ROWS, Math.max(1, Math.floor(BAND_PIXELS / width)));
  const underWay = []; // so many bands that no stage has to wait
  for (let first = 0; first < height; first += count) {
    const rgba = await pixels.read(first, Math.min(count, height - first));
    seen(rgba, first);
    const pushed = pipelines.map((pipeline, i) => pipeline.push(rgbRows(rgba, views[i])));
    underWay.push(Promise.all(pushed));
    if (underWay.length > pipelines[0].stages) yield await underWay.shift();
  }
  yield* underWay;
}

const onBlack = (value, alpha) => fround(value * alpha);
const onWhite = (value, alpha) => fround(fround(value * alpha) + fround(1 - alpha));

function rgbRows(rgba, view) {
  const rows = new Float32Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    const alpha = VALUES[rgba[from + 3]];
    for (let c = 0; c < 3; c++) rows[to++] = view(VALUES[rgba[from + c]], alpha);
  }
  return rows;
}

function luma(rows) {
  const grey = new Float32Array(rows.length / 3);
  for (let i = 0; i < grey.length; i++) {
    grey[i] = rows[3 * i] * LUMA[0] + rows[3 * i + 1] * LUMA[1] + rows[3 * i + 2] * LUMA[2];
  }
  return grey;
}

function clip(value) {
  return Math.min(Math.max(value, 0), 1);
}

// The lowest and highest alpha around each pixel of a row: opaque and clear areas stay exactly
// that, and alpha does not overshoot at edges.
function alphaBounds(alpha, { width, height }, row) {
  const lowest = new Uint8Array(width).fill(255);
  const highest = new Uint8Array(width);
  for (let y = Math.max(row - 1, 0); y <= Math.min(row + 1, height - 1); y++) {
    for (let x = 0; x < width; x++) {
      for (let near = Math.max(x - 1, 0); near <= Math.min(x + 1, width - 1); near++) {
        const value = alpha[y * width + near];
        if (value < lowest[x]) lowest[x] = value;
        if (value > highest[x]) highest[x] = value;
      }
    }
  }
  return { lowest, highest };
}
