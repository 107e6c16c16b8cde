// What the tests of web/engine.js need in Node, for scripts that begin with an import of this.

import fs from "node:fs";

export * from "../web/engine.js";
import { Engine, programFile } from "../web/engine.js";

export function fileBuffer(path) {
  const bytes = fs.readFileSync(path);
  return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
}

export async function makeEngine(weights, program = programFile(), ...stage) {
  const wasm = fs.readFileSync(new URL(`../web/${program}`, import.meta.url));
  return await Engine.create(wasm, fileBuffer(weights), ...stage);
}

/** The upscaled picture, from bands of these numbers of rows (again and again, until the end). */
export function upscale(engine, pixels, width, height, bands) {
  engine.start(width, height);
  const parts = [];
  for (let first = 0, i = 0; first < height; first += bands[i++ % bands.length]) {
    const last = Math.min(first + bands[i % bands.length], height);
    parts.push(engine.push(pixels.subarray(first * width * 3, last * width * 3)));
  }
  return Buffer.concat(parts.map((x) => Buffer.from(x.buffer)));
}

/** The message of the error that a function throws. */
export async function errorOf(action) {
  try {
    await action();
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
  return "no error";
}
