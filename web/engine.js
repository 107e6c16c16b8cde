// DVMSR on this machine's processor: the network in WebAssembly (from kernels/wasm), fed with a
// picture's rows from top to bottom. For workers and for Node.

// A function that multiplies and adds at once, which is part of relaxed SIMD.
const RELAXED = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, // WebAssembly
  1, 5, 1, 96, 0, 1, 123, // the type of functions that return a vector
  3, 2, 1, 0, // a function of that type
  10, 19, 1, 17, 0, 65, 0, 253, 15, 65, 0, 253, 15, 65, 0, 253, 15, 253, 133, 2, 11,
);

/** The file with the network's fastest program here. The others' results differ by rounding. */
export function programFile() {
  return WebAssembly.validate(RELAXED) ? "dvmsr-relaxed.wasm" : "dvmsr.wasm";
}

/** A file of weights cannot be used; the message says why. */
export class WeightsError extends Error {}

// What the program's integers hold.
const MAX_SIZE = 2 ** 31 - 1;

const REQUIRED = ["scale", "channels", "rssbs", "vimms_per_rssb", "states", "expand", "conv_width"];

// The types of numbers in a file: their size in bytes, and how bytes become float32.
const TYPES = new Map([
  ["F64", [8, (bytes) => new Float32Array(new Float64Array(bytes))]],
  ["F32", [4, (bytes) => new Float32Array(bytes)]],
  ["F16", [2, (bytes) => Float32Array.from(new Uint16Array(bytes), float16)]],
  ["BF16", [2, (bytes) => bfloat16s(new Uint16Array(bytes))]],
]);

/**
 * Reads a .safetensors file.
 *
 * @param {ArrayBuffer} buffer the file's bytes
 * @returns {{metadata: Object<string, string>,
 *   tensors: Map<string, {shape: number[], data: Float32Array}>}} numbers of all floating-point
 *   types are converted to float32
 * @throws {WeightsError} it is damaged, or holds other types
 */
export function parseSafetensors(buffer) {
  const view = new DataView(buffer);
  const length = buffer.byteLength < 8 ? Infinity : Number(view.getBigUint64(0, true));
  if (8 + length > buffer.byteLength) throw new WeightsError("this is not a .safetensors file");
  const header = parseJson(new Uint8Array(buffer, 8, length));
  const { __metadata__: metadata = {}, ...entries } = header ?? {};
  if (!isObject(header) || !isObject(metadata)) {
    throw new WeightsError("the header of this .safetensors file is damaged");
  }
  const data = buffer.slice(8 + length);
  const tensors = new Map();
  let end = 0;
  for (const [name, entry] of Object.entries(entries)) {
    tensors.set(name, readTensor(data, name, entry));
    end = Math.max(end, entry.data_offsets[1]);
  }
  if (end < data.byteLength) throw new WeightsError("this .safetensors file has bytes left over");
  return { metadata, tensors };
}

function readTensor(bytes, name, entry) {
  const { dtype, shape, data_offsets: offsets } = entry ?? {};
  const isSize = (x) => Number.isSafeInteger(x) && x >= 0;
  if (![shape, offsets].every((x) => Array.isArray(x) && x.every(isSize)) || offsets.length !== 2) {
    throw new WeightsError(`${name}: its entry in the header is damaged`);
  }
  if (!TYPES.has(dtype)) throw new WeightsError(`${name} holds numbers of type ${dtype}`);
  const [size, convert] = TYPES.get(dtype);
  const [from, to] = offsets;
  const count = shape.reduce((product, x) => product * x, 1);
  if (to - from !== size * count) throw new WeightsError(`${name}: its entry in the header is damaged`);
  if (to > bytes.byteLength) throw new WeightsError(`the file is cut off: it ends before ${name}`);
  return { shape, data: convert(bytes.slice(from, to)) };
}

function float16(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
}

// The upper halves of float32s.
function bfloat16s(bits) {
  return new Float32Array(Uint32Array.from(bits, (x) => x << 16).buffer);
}

// The value, or undefined if this is not JSON.
function parseJson(bytes) {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    return undefined;
  }
}

function isObject(x) {
  return typeof x === "object" && x !== null && !Array.isArray(x);
}

/**
 * Enlarges pictures, one after the other, in memory that does not grow with their height.
 *
 * An engine can also be one of several stages, each of which takes in what the one before returns.
 */
export class Engine {
  #module;
  #config;
  #parameters;
  #stage;
  #program = null;
  #picture = null;

  /**
   * @param {WebAssembly.Module | BufferSource} wasm see `programFile`
   * @param {ArrayBuffer} weights a .safetensors file of this project
   * @param {number} stage which of the stages, from 0 on
   * @param {number} stages how many there are, at most as many as RSSBs
   * @returns {Promise<Engine>}
   * @throws {WeightsError} the weights cannot be used
   */
  static async create(wasm, weights, stage = 0, stages = 1) {
    const { config, parameters } = readWeights(weights);
    const [first, last] = [stage, stage + 1].map((i) => Math.floor((i * config.rssbs) / stages));
    const module = wasm instanceof WebAssembly.Module ? wasm : await WebAssembly.compile(wasm);
    return new Engine(module, config, parameters, { first, last });
  }

  /** For `create` only. */
  constructor(module, config, parameters, { first, last }) {
    this.#module = module;
    this.#config = config;
    this.#parameters = parameters;
    this.#stage = { first, last, head: first === 0, tail: last === config.rssbs };
    this.#load();
  }

  /** The upscaling factor. */
  get scale() {
    return this.#config.scale;
  }

  /**
   * Begins a picture. One that is unfinished is given up.
   *
   * @param {number} width
   * @param {number} height both in pixels
   * @throws {RangeError} they are not positive integers
   * @throws {Error} there is not enough memory
   */
  start(width, height) {
    this.#picture = null;
    for (const size of [width, height]) {
      if (!Number.isInteger(size) || size < 1 || size > MAX_SIZE) {
        throw new RangeError(`there is no picture of ${width} x ${height} pixels`);
      }
    }
    if (this.#program === null) this.#load();
    const bandRows = this.#call("start", width, this.#stage.first, this.#stage.last);
    this.#picture = { width, height, bandRows, received: 0 };
  }

  /**
   * Takes more rows of the picture.
   *
   * @param {Float32Array} rows RGB in [0, 1], row by row: any number of rows; or what the stage
   *   before has returned
   * @returns {Float32Array} the rows of the upscaled picture that are now finished, and were not
   *   before: all that remain, if the picture's last row has come. Values may lie slightly outside
   *   [0, 1]. Or what belongs to the next stage
   * @throws {RangeError} these are not whole rows, or more than the picture has
   * @throws {Error} no picture has been started
   */
  push(rows) {
    const picture = this.#started();
    const rowLength = this.#receivedLength();
    const count = rows.length / rowLength;
    if (!Number.isInteger(count)) {
      throw new RangeError(`${rows.length} numbers are not whole rows of ${rowLength}`);
    }
    if (picture.received + count > picture.height) {
      throw new RangeError(`the picture has only ${picture.height} rows`);
    }
    const before = this.#finished();
    picture.received += count;
    const finished = new Output(this.#finished() - before, this.#finishedLength());
    for (let first = 0; first < count; first += picture.bandRows) {
      const band = rows.subarray(first * rowLength, (first + picture.bandRows) * rowLength);
      this.#memory(this.#call("received"), band.length).set(band);
      this.#collect(finished, this.#call("push", band.length / rowLength));
    }
    if (picture.received === picture.height) {
      for (let i = 0; i < this.#rowsLate(); ++i) this.#collect(finished, this.#call("flush"));
      this.#picture = null;
    }
    return finished.rows;
  }

  // Each 3x3 convolution waits for the row below.
  #rowsLate() {
    const { first, last, head, tail } = this.#stage;
    return last - first + (head ? 1 : 0) + (tail ? 2 : 0);
  }

  // The number of the picture's rows that are finished.
  #finished() {
    const { height, received } = this.#picture;
    return received === height ? height : Math.max(received - this.#rowsLate(), 0);
  }

  // Numbers that come in for each row of the picture.
  #receivedLength() {
    return this.#stage.head ? this.#picture.width * 3 : this.#betweenLength();
  }

  // Numbers that go out for each row of the picture.
  #finishedLength() {
    return this.#stage.tail ? this.#picture.width * 3 * this.scale ** 2 : this.#betweenLength();
  }

  // A row's features, and those for the long skip connection.
  #betweenLength() {
    return this.#picture.width * 2 * this.#config.channels;
  }

  #collect(output, rows) {
    const { rowLength } = output;
    output.add(this.#memory(this.#call("finished"), rows * rowLength));
  }

  #started() {
    if (this.#picture === null) throw new Error("no picture has been started");
    return this.#picture;
  }

  #memory(at, count) {
    return new Float32Array(this.#program.memory.buffer, at, count);
  }

  // Calls a function of the program. If it fails, `start` begins with a new program.
  #call(name, ...values) {
    try {
      return this.#program[name](...values) >>> 0;
    } catch (error) {
      this.#program = this.#picture = null;
      throw new Error("there is not enough memory for this picture", { cause: error });
    }
  }

  #load() {
    this.#program = new WebAssembly.Instance(this.#module).exports;
    const { scale, channels, rssbs, vimms_per_rssb, states, conv_width } = this.#config;
    const count = this.#parameters.reduce((sum, x) => sum + x.length, 0);
    let at = this.#call("parameters", count);
    for (const x of this.#parameters) {
      this.#memory(at, x.length).set(x);
      at += x.byteLength;
    }
    const inner = innerChannels(this.#config), rank = deltaRank(this.#config);
    this.#call(
      "make_network", scale, channels, rssbs, vimms_per_rssb, inner, states, rank, conv_width,
    );
  }
}

// Rows that are finished in several steps.
class Output {
  #filled = 0;

  constructor(count, rowLength) {
    this.rowLength = rowLength;
    this.rows = new Float32Array(count * rowLength);
  }

  add(rows) {
    this.rows.set(rows, this.#filled);
    this.#filled += rows.length;
  }
}

/**
 * The configuration of a network.
 *
 * @param {ArrayBuffer} weights see `Engine.create`
 * @returns {{scale: number, rssbs: number}} and more
 * @throws {WeightsError} the weights cannot be used
 */
export function configOf(weights) {
  return readWeights(weights).config;
}

function readWeights(buffer) {
  const { metadata, tensors } = parseSafetensors(buffer);
  const config = readConfig(metadata);
  const parameters = [];
  for (const [name, shape] of parameterShapes(config)) {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw new WeightsError(`${name} is missing`);
    if (tensor.shape.join() !== shape.join()) {
      throw new WeightsError(`${name} has shape (${tensor.shape}), expected (${shape})`);
    }
    if (!tensor.data.every(Number.isFinite)) {
      throw new WeightsError(`${name} holds numbers that are not finite`);
    }
    tensors.delete(name);
    parameters.push(name.endsWith("A_log") ? tensor.data.map((x) => -Math.exp(x)) : tensor.data);
  }
  for (const name of tensors.keys()) throw new WeightsError(`${name} is not part of the network`);
  return { config, parameters };
}

function readConfig({ config: text }) {
  if (text === undefined) {
    throw new WeightsError("these are not weights of a DVMSR: the metadata has no configuration");
  }
  const config = parseJson(new TextEncoder().encode(text));
  const fits = (name) => Number.isInteger(config[name]) && config[name] >= 1;
  if (!isObject(config) || !REQUIRED.every(fits)) {
    throw new WeightsError("the configuration in the metadata is not that of a DVMSR");
  }
  if (config.bidirectional) {
    throw new WeightsError("a bidirectional network needs the whole picture at once");
  }
  return config;
}

const innerChannels = ({ channels, expand }) => channels * expand;
const deltaRank = ({ channels }) => Math.ceil(channels / 16);

// The names and shapes of the parameters, in the order of kernels/wasm/network.h.
function* parameterShapes(config) {
  const { scale, channels: c, rssbs, vimms_per_rssb: vimms, states: n, conv_width: taps } = config;
  const d = innerChannels(config);
  const rank = deltaRank(config);
  function* convolution(name, inputs, outputs) {
    yield [`${name}.kernel`, [3, 3, inputs, outputs]];
    yield [`${name}.bias`, [outputs]];
  }
  function* layerNorm(name) {
    yield [`${name}.scale`, [c]];
    yield [`${name}.bias`, [c]];
  }
  yield* convolution("conv_first", 3, c);
  yield* layerNorm("norm_first");
  for (let i = 0; i < rssbs; ++i) {
    for (let j = 0; j < vimms; ++j) {
      const vimm = `rssbs.${i}.vimms.${j}`;
      yield* layerNorm(`${vimm}.norm`);
      yield [`${vimm}.in_proj.kernel`, [c, 2 * d]];
      yield [`${vimm}.forward.conv.kernel`, [taps, d]];
      yield [`${vimm}.forward.conv.bias`, [d]];
      yield [`${vimm}.forward.x_proj.kernel`, [d, rank + 2 * n]];
      yield [`${vimm}.forward.dt_proj.kernel`, [rank, d]];
      yield [`${vimm}.forward.dt_bias`, [d]];
      yield [`${vimm}.forward.A_log`, [d, n]];
      yield [`${vimm}.forward.D`, [d]];
      yield [`${vimm}.out_proj.kernel`, [d, c]];
    }
    yield* convolution(`rssbs.${i}.conv`, c, c);
  }
  yield* layerNorm("norm_last");
  yield* convolution("conv_last", c, c);
  yield* convolution("reconstruct", c, 3 * scale ** 2);
}
