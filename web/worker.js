// Enlarges one picture. Receives {file, module, weights, cores}; sends what Preview posts, then
// {result} with the PNG, or {failed} with the reason. It makes no requests.

import { WeightsError } from "./engine.js";
import { channelsOf, enlarge } from "./enlarging.js";
import { Pipeline } from "./pipeline.js";
import { PngWriter } from "./png.js";
import { Preview } from "./preview.js";
import { profileOf } from "./profile.js";
import { Pixels } from "./reading.js";

addEventListener("message", async ({ data }) => {
  try {
    postMessage({ result: await run(data) });
  } catch (error) {
    postMessage({ failed: reasonOf(error) });
  }
});

async function run({ file, module, weights, cores }) {
  const pixels = await Pixels.of(file);
  const channels = channelsOf(pixels);
  const count = pixels.opaque ? 1 : 2;
  const share = Math.max(1, Math.floor(cores / count));
  const pipelines = Array.from(
    { length: count },
    () => new Pipeline(module, weights, share, pixels.width, pixels.height),
  );
  const [width, height] = [pixels.width, pixels.height].map((size) => size * pipelines[0].scale);
  const png = new PngWriter(width, height, channels, await profileOf(file, channels));
  const preview = new Preview(width, height, pixels.opaque, postMessage.bind(globalThis));
  for await (const rows of enlarge(pixels, pipelines)) {
    if (!rows.length) continue;
    await preview.add(toRgba(rows, channels));
    await png.write(rows);
  }
  return png.finish();
}

function toRgba(pixels, channels) {
  const rgba = new Uint8ClampedArray((pixels.length / channels) * 4);
  const [green, blue] = channels > 2 ? [1, 2] : [0, 0];
  const alpha = channels % 2 ? null : channels - 1;
  for (let from = 0, to = 0; from < pixels.length; from += channels, to += 4) {
    rgba[to] = pixels[from];
    rgba[to + 1] = pixels[from + green];
    rgba[to + 2] = pixels[from + blue];
    rgba[to + 3] = alpha === null ? 255 : pixels[from + alpha];
  }
  return rgba;
}

function reasonOf(error) {
  if (error instanceof WeightsError) return `The weights cannot be used: ${error.message}.`;
  if (error instanceof RangeError || /memory/.test(error.message)) {
    return "There is not enough memory. Close other tabs, or try a smaller picture.";
  }
  if (error.name === "InvalidStateError") return "The picture is damaged or incomplete.";
  return `Unexpected: ${error.message}`;
}
