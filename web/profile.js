// ICC profiles. The network reads and writes a picture's own numbers, whatever their colour space,
// so its profile belongs in the result too.

// The profile of a PNG, JPEG or WebP with these many channels, compressed as PNG wants it; null if
// there is none that fits.
export async function profileOf(file, channels) {
  if (!(await keepsNumbers())) return null; // the browser has converted them to sRGB
  const bytes = new Uint8Array(await file.arrayBuffer());
  const profile = (await inPng(bytes)) ?? inJpeg(bytes) ?? inWebp(bytes);
  if (!profile || profile.length < 128) return null;
  const fits = text(profile, 16, 20) === (channels > 2 ? "RGB " : "GRAY");
  return fits && text(profile, 36, 40) === "acsp" ? through(CompressionStream, profile) : null;
}

// A grey pixel of value 128 with a gamma of 1, which is 188 in sRGB.
const LINEAR_GREY =
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAABGdBTUEAAYagMeiWXwAAAApJREFUeNpjaAAAAIIAgdpF" +
  "CDsAAAAASUVORK5CYII=";

// Whether the browser decodes without converting to sRGB if asked to.
async function keepsNumbers() {
  const bytes = Uint8Array.from(atob(LINEAR_GREY), (c) => c.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" });
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, 1, 1).data[0] === 128;
}

async function inPng(bytes) {
  if (text(bytes, 1, 4) !== "PNG") return null;
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 8 + view.getUint32(at);
    const kind = text(bytes, at + 4, at + 8);
    if (kind === "iCCP") {
      const compressed = bytes.indexOf(0, at + 8) + 2; // after its name and the method
      return through(DecompressionStream, bytes.subarray(compressed, end)).catch(() => null);
    }
    if (kind === "IDAT") return null;
    at = end + 4;
  }
  return null;
}

function inJpeg(bytes) {
  if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return null;
  const parts = [];
  for (let at = 2; bytes[at] === 0xff && bytes[at + 1] !== 0xda; ) {
    const end = at + 2 + bytes[at + 2] * 256 + bytes[at + 3];
    if (bytes[at + 1] === 0xe2 && text(bytes, at + 4, at + 15) === "ICC_PROFILE") {
      parts[bytes[at + 16]] = bytes.subarray(at + 18, end); // numbered from 1
    }
    at = end;
  }
  const numbered = Array.from(parts).slice(1);
  return numbered.length && numbered.every(Boolean) ? joined(numbered) : null;
}

function inWebp(bytes) {
  if (text(bytes, 0, 4) !== "RIFF" || text(bytes, 8, 12) !== "WEBP") return null;
  const view = new DataView(bytes.buffer);
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    if (text(bytes, at, at + 4) === "ICCP") return bytes.subarray(at + 8, at + 8 + size);
    at += 8 + size + (size % 2);
  }
  return null;
}

async function through(Stream, bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new Stream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let end = 0;
  for (const part of parts) {
    bytes.set(part, end);
    end += part.length;
  }
  return bytes;
}

function text(bytes, start, end) {
  return String.fromCharCode(...bytes.subarray(start, end));
}
