// The page: takes pictures, runs several at once, and shows one of them.

import { programFile } from "./engine.js";
import { Picture, PictureError, resultName } from "./picture.js";
import { DECODING } from "./reading.js";
import { Viewer } from "./viewer.js";

const CORES = navigator.hardwareConcurrency ?? 2;
const AT_ONCE = Math.max(1, CORES - 1); // pictures
const THUMB = 96; // pixels a side

const at = (id) => document.getElementById(id);
const pictures = [];
const items = new Map(); // picture -> its element in the list
let selected = null;
const viewer = new Viewer(at("stage"), at("canvas"), at("divider"), (percent) => {
  at("zoomed").textContent = `${percent} %`;
});

// The network and the weights

const network = compile();
const registry = fetched("weights.json").then((response) => response.json());
const weightsFiles = new Map(); // name -> promise of the contents
network.catch(report);
registry.then(listWeights, report);

async function compile() {
  const lacks = ["OffscreenCanvas", "CompressionStream", "createImageBitmap", "WebAssembly"];
  const bytes = await (await fetched(programFile())).arrayBuffer();
  if (lacks.some((name) => !(name in globalThis)) || !WebAssembly.validate(bytes)) {
    throw new PictureError(
      "This browser is too old: it lacks WebAssembly SIMD or something else that the page needs. " +
        "Current versions of Chrome, Edge, Firefox and Safari have it.",
    );
  }
  return WebAssembly.compile(bytes);
}

async function fetched(url) {
  const response = await fetch(url).catch(() => null);
  if (response?.ok) return response;
  throw new PictureError(
    navigator.onLine
      ? `${url} cannot be loaded. Reload the page.`
      : `${url} has not been loaded yet, and there is no network. Try again online.`,
  );
}

function loadWeights({ name, file }) {
  if (!weightsFiles.has(name)) {
    const contents = fetched(file).then((response) => response.arrayBuffer());
    contents.catch(() => weightsFiles.delete(name)); // so that it is tried again
    weightsFiles.set(name, contents);
  }
  return weightsFiles.get(name);
}

function listWeights(all) {
  for (const { name, scale, purpose } of all) {
    at("weights").append(new Option(`${scale}×, for ${purpose}`, name));
  }
  at("weights").disabled = false;
  loadWeights(all[0]).catch(() => {}); // before a picture needs it, which would report an error
}

async function chosenWeights() {
  const all = await registry;
  return all.find(({ name }) => name === at("weights").value) ?? all[0];
}

// Changes of the weights apply to the selected picture, too. A finished result is kept beside the
// new one.
at("weights").addEventListener("change", async () => {
  if (!selected) return;
  const replaced = selected;
  await add([replaced.file]);
  if (selected !== replaced && replaced.busy && pictures.includes(replaced)) remove(replaced);
});

// Pictures

async function add(files) {
  at("messages").replaceChildren();
  let first = true;
  for (const file of files) {
    try {
      const picture = await Picture.of(file, await chosenWeights(), changed);
      pictures.push(picture);
      list(picture);
      if (first) select(picture);
      first = false;
      startWaiting();
    } catch (error) {
      report(error, file.name);
    }
  }
}

function startWaiting() {
  let free = AT_ONCE - pictures.filter(({ state }) => state === "working").length;
  for (const picture of pictures) {
    if (free-- <= 0) return;
    if (picture.state === "waiting") start(picture);
    else free++;
  }
}

async function start(picture) {
  picture.state = "working";
  try {
    const [module, weights] = await Promise.all([network, loadWeights(picture.weights)]);
    const together = Math.min(pictures.filter(({ busy }) => busy).length, AT_ONCE);
    if (pictures.includes(picture)) picture.start(module, weights, Math.floor(CORES / together));
  } catch (error) {
    picture.fail(error.message);
  }
}

function remove(picture) {
  picture.stop();
  const place = pictures.indexOf(picture);
  const item = items.get(picture);
  const focused = item.contains(document.activeElement);
  pictures.splice(place, 1);
  items.delete(picture);
  item.remove();
  const next = pictures[Math.min(place, pictures.length - 1)] ?? null;
  if (picture === selected) select(next);
  if (focused) (next ? items.get(next).querySelector(".choose") : at("files")).focus();
  startWaiting();
}

function changed(picture) {
  if (!pictures.includes(picture)) return;
  describe(picture);
  if (picture === selected) {
    viewer.redraw();
    if (picture.state === "done") viewer.reveal();
    showFacts();
  }
  if (!picture.busy) {
    const name = picture.file.name;
    at("status").textContent =
      picture.state === "done" ? `${name} is finished.` : `${name} failed. ${picture.reason}`;
    startWaiting();
  }
}

function select(picture) {
  selected = picture;
  const focused = at("drop").contains(document.activeElement); // it is about to be hidden
  document.body.classList.toggle("empty", !picture);
  at("work").hidden = !picture;
  at("drop").hidden = Boolean(picture);
  viewer.show(picture);
  for (const [other, item] of items) {
    item.querySelector(".choose").setAttribute("aria-pressed", other === picture);
  }
  if (picture) {
    at("weights").value = picture.weights.name;
    showFacts();
    items.get(picture).scrollIntoView({ block: "nearest", inline: "nearest" });
    if (focused) items.get(picture).querySelector(".choose").focus();
  }
}

function showFacts() {
  const { width, height, scale, state, reason, url } = selected;
  at("facts").textContent =
    state === "failed"
      ? reason
      : `${width} × ${height} → ${width * scale} × ${height * scale} pixels`;
  at("facts").classList.toggle("failed", state === "failed");
  at("download").hidden = state !== "done";
  if (state !== "done") return;
  at("download").href = url;
  at("download").download = resultName(selected, pictures);
  at("download").textContent = `Download ${at("download").download}`;
}

// The list

function list(picture) {
  const item = at("item").content.firstElementChild.cloneNode(true);
  item.querySelector(".choose").addEventListener("click", () => select(picture));
  item.querySelector(".remove").addEventListener("click", () => remove(picture));
  item.querySelector(".name").textContent = picture.file.name;
  at("list").append(item);
  items.set(picture, item);
  describe(picture);
  drawThumb(picture, item.querySelector(".thumb"));
}

async function drawThumb({ file, width, height }, canvas) {
  const side = Math.min(width, height);
  const options = { ...DECODING, resizeQuality: "high" };
  if (width < height) options.resizeWidth = Math.min(THUMB, width);
  else options.resizeHeight = Math.min(THUMB, height);
  const bitmap = await createImageBitmap(file, options).catch(() => null);
  if (!bitmap) return;
  const shown = Math.min(THUMB, side);
  const [x, y] = [(bitmap.width - shown) / 2, (bitmap.height - shown) / 2];
  canvas.getContext("2d").drawImage(bitmap, x, y, shown, shown, 0, 0, THUMB, THUMB);
  bitmap.close();
}

function describe(picture) {
  const item = items.get(picture);
  const { state, busy, file, progress } = picture;
  item.dataset.state = state;
  item.querySelector(".state").textContent = {
    waiting: "waiting",
    working: `${Math.floor(progress * 100)} %${remaining(picture)}`,
    done: `${picture.scale}×, finished`,
    failed: "failed",
  }[state];
  item.querySelector("progress").hidden = !busy;
  item.querySelector("progress").value = progress;
  const remover = item.querySelector(".remove");
  remover.setAttribute("aria-label", `${busy ? "Cancel" : "Remove"} ${file.name}`);
  remover.title = busy ? "Cancel" : "Remove";
}

function remaining({ progress, started }) {
  if (progress < 0.02) return "";
  const seconds = ((performance.now() - started) / 1000) * (1 / progress - 1);
  if (seconds < 10) return "";
  return seconds < 90 ? `, ${Math.round(seconds / 5) * 5} s left` : `, ${Math.round(seconds / 60)} min left`;
}

// Messages

function report(error, name = "") {
  const line = document.createElement("p");
  const known = error instanceof PictureError;
  const text = known ? error.message : `Unexpected: ${error.message}`;
  line.textContent = name ? `${name}: ${text}` : text;
  at("messages").append(line);
}

// Ways in

at("files").addEventListener("change", () => {
  add([...at("files").files]);
  at("files").value = ""; // so that the same file can be chosen again
});
at("more").addEventListener("click", () => at("files").click());
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) add(files);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  add([...event.dataTransfer.files]);
});

for (const [id, act] of [
  ["out", () => viewer.zoomOut()],
  ["in", () => viewer.zoomIn()],
  ["fit", () => viewer.fit()],
  ["full", () => viewer.fullSize()],
]) {
  at(id).addEventListener("click", act);
}

addEventListener("beforeunload", (event) => {
  if (pictures.some(({ busy }) => busy)) event.preventDefault();
});

navigator.serviceWorker?.register("sw.js").catch(() => {}); // only offline use depends on it
