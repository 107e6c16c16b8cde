// Reads a picture's pixels in strips of rows.

// The file's own numbers: without conversion to sRGB, and not multiplied by alpha. Pictures are
// upright by default; older browsers refuse the option that says so.
export const DECODING = {
  premultiplyAlpha: "none",
  colorSpaceConversion: "none",
};

export class Pixels {
  // Decodes a file. Rejects if it is no picture, or a damaged one.
  static async of(file) {
    const bitmap = await createImageBitmap(file, DECODING);
    let read = canvasReader(bitmap);
    let kind = await kindOf(bitmap, read);
    const exact = kind.opaque ? null : webglReader(bitmap);
    if (exact) {
      read = exact;
      kind = await kindOf(bitmap, read);
    }
    return new Pixels(bitmap, read, kind);
  }

  constructor(bitmap, read, { opaque, grey }) {
    this.width = bitmap.width;
    this.height = bitmap.height;
    this.opaque = opaque;
    this.grey = grey;
    this.read = read; // (first row, count) -> promise of their RGBA, not multiplied by alpha
  }
}

const SCANNED_PIXELS = 2 ** 20;

async function kindOf(bitmap, read) {
  let opaque = true;
  let grey = true;
  const step = Math.max(1, Math.floor(SCANNED_PIXELS / bitmap.width));
  for (let first = 0; first < bitmap.height && (opaque || grey); first += step) {
    const rgba = await read(first, Math.min(step, bitmap.height - first));
    for (let i = 0; i < rgba.length && (opaque || grey); i += 4) {
      opaque &&= rgba[i + 3] === 255;
      grey &&= rgba[i] === rgba[i + 1] && rgba[i] === rgba[i + 2];
    }
  }
  return { opaque, grey };
}

function canvasReader(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, 1);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return async (first, count) => {
    if (canvas.height !== count) canvas.height = count;
    context.globalCompositeOperation = "copy";
    context.drawImage(bitmap, 0, -first);
    return context.getImageData(0, 0, bitmap.width, count).data;
  };
}

// A 2D canvas holds colours multiplied by alpha, in 8 bits, so that those of transparent pixels are
// rounded. A texture holds them as they are. Null if there is no WebGL, or the picture is too wide.
function webglReader(bitmap) {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl");
  if (!gl || bitmap.width > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  const { width } = bitmap;
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  return async (first, count) => {
    const strip = await createImageBitmap(bitmap, 0, first, width, count, DECODING);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, strip);
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
    strip.close();
    const rgba = new Uint8Array(width * count * 4);
    gl.readPixels(0, 0, width, count, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
    return rgba;
  };
}
