// Answers each line of its input with the time of upscaling a picture in web/engine.js, on one
// thread: node web_engine.mjs WEIGHTS PROGRAM WIDTH HEIGHT. benchmarks/web_engine.py runs it.

import fs from "node:fs";
import readline from "node:readline";
import { Engine } from "../web/engine.js";

const [weights, program, width, height] = process.argv.slice(2);
const wasm = fs.readFileSync(new URL(`../web/${program}`, import.meta.url));
const { buffer, byteOffset, byteLength } = fs.readFileSync(weights);
const engine = await Engine.create(wasm, buffer.slice(byteOffset, byteOffset + byteLength));
const pixels = Float32Array.from({ length: width * height * 3 }, Math.random);
for await (const _ of readline.createInterface({ input: process.stdin })) {
  const cpu = process.cpuUsage();
  const start = performance.now();
  engine.start(Number(width), Number(height));
  engine.push(pixels);
  const wall = (performance.now() - start) / 1e3;
  const { user, system } = process.cpuUsage(cpu);
  console.log(JSON.stringify([wall, (user + system) / 1e6]));
}
