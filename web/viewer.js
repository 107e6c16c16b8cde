// Shows a picture before and after, with a divider between them; zooms and pans.
//
// Positions are in pixels of the result, zoom in CSS pixels for each of them.

import { TILE } from "./preview.js";
import { DECODING } from "./reading.js";

const MAX_ZOOM = 16; // screen pixels for a pixel of the result
const MAX_FITTED_ZOOM = 2; // the same, where small pictures are fitted
const STEP = 1.25; // of a zoom key or button
const PAN = 64; // CSS pixels of an arrow key
const TILES_KEPT = 96; // decoded, 1 MB each
const GLIDE = 700; // milliseconds

const CHEQUERS = chequers();

function chequers() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 2;
  const context = canvas.getContext("2d");
  context.fillStyle = "#c8c8c8";
  context.fillRect(0, 0, 2, 2);
  context.fillStyle = "#9c9c9c";
  context.fillRect(0, 0, 1, 1);
  context.fillRect(1, 1, 1, 1);
  return canvas;
}

export class Viewer {
  #stage;
  #canvas;
  #divider;
  #zoomed;
  #picture = null;
  #before = null; // ImageBitmap
  #decoded = new Map(); // tiles' keys -> ImageBitmap, the latest used last; null while decoding
  #zoom = 1;
  #x = 0; // of the centre of the stage
  #y = 0;
  #fitted = true;
  #split = 0; // part of the visible picture's width that shows it before
  #moved = false; // somebody has moved the divider
  #frame = 0;
  #pointers = new Map();

  // `stage` contains `canvas`, and `divider` with the role of a slider; `zoomed` is called with the
  // zoom in per cent.
  constructor(stage, canvas, divider, zoomed) {
    this.#stage = stage;
    this.#canvas = canvas;
    this.#divider = divider;
    this.#zoomed = zoomed;
    new ResizeObserver(() => this.#resize()).observe(stage);
    this.#listen();
  }

  // Shows another picture, or none.
  async show(picture) {
    if (picture === this.#picture) return;
    this.#picture = picture;
    this.#before?.close();
    this.#before = null;
    this.#forgetTiles();
    this.#moved = false;
    this.#split = picture?.state === "done" ? 0.5 : 0;
    this.fit();
    if (!picture) return;
    const before = await createImageBitmap(picture.file, DECODING).catch(() => null);
    if (picture !== this.#picture) return before?.close();
    this.#before = before;
    this.redraw();
  }

  // To be called when the picture has changed.
  redraw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  // Moves the divider to the middle, unless somebody has moved it: the picture is done.
  reveal() {
    if (this.#moved) return;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const start = performance.now();
    const picture = this.#picture;
    const step = (now) => {
      if (this.#moved || picture !== this.#picture) return;
      const part = still ? 1 : Math.min(Math.max((now - start) / GLIDE, 0), 1);
      this.#split = 0.5 * (1 - (1 - part) ** 3);
      this.redraw();
      if (part < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  fit() {
    this.#fitted = true;
    if (this.#picture) {
      const [width, height] = this.#size();
      const { clientWidth, clientHeight } = this.#stage;
      this.#zoom = Math.min(
        clientWidth / width,
        clientHeight / height,
        MAX_FITTED_ZOOM / devicePixelRatio,
      );
      this.#x = width / 2;
      this.#y = height / 2;
    }
    this.redraw();
  }

  // One pixel of the result on one of the screen.
  fullSize() {
    this.#zoomTo(1 / devicePixelRatio);
  }

  zoomIn() {
    this.#zoomTo(this.#zoom * STEP);
  }

  zoomOut() {
    this.#zoomTo(this.#zoom / STEP);
  }

  #size() {
    const { width, height, scale } = this.#picture;
    return [width * scale, height * scale];
  }

  // Where the visible part of the picture starts and ends, from the left of the stage.
  #visible() {
    const { clientWidth } = this.#stage;
    const start = clientWidth / 2 - this.#x * this.#zoom;
    const end = start + this.#size()[0] * this.#zoom;
    return [Math.max(start, 0), Math.min(end, clientWidth)];
  }

  // Zooms so that the point at (x, y) from the centre of the stage stays there.
  #zoomTo(zoom, x = 0, y = 0) {
    if (!this.#picture) return;
    const [width, height] = this.#size();
    const { clientWidth, clientHeight } = this.#stage;
    const least = Math.min(clientWidth / width, clientHeight / height, 1 / devicePixelRatio) / 2;
    zoom = Math.min(Math.max(zoom, least), MAX_ZOOM / devicePixelRatio);
    this.#x += x / this.#zoom - x / zoom;
    this.#y += y / this.#zoom - y / zoom;
    this.#zoom = zoom;
    this.#pan(0, 0);
  }

  #pan(x, y) {
    if (!this.#picture) return;
    const [width, height] = this.#size();
    this.#x = Math.min(Math.max(this.#x - x / this.#zoom, 0), width);
    this.#y = Math.min(Math.max(this.#y - y / this.#zoom, 0), height);
    this.#fitted = false;
    this.redraw();
  }

  #moveDivider(split) {
    if (this.#picture?.state !== "done") return;
    this.#moved = true;
    this.#split = Math.min(Math.max(split, 0), 1);
    this.redraw();
  }

  #resize() {
    const { clientWidth, clientHeight } = this.#stage;
    this.#canvas.width = Math.round(clientWidth * devicePixelRatio);
    this.#canvas.height = Math.round(clientHeight * devicePixelRatio);
    if (this.#fitted) this.fit();
    else this.redraw();
  }

  #draw() {
    const context = this.#canvas.getContext("2d");
    const { width: w, height: h } = this.#canvas;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, w, h);
    const picture = this.#picture;
    const done = picture?.state === "done";
    this.#divider.hidden = !done;
    if (!picture) return;
    const [width, height] = this.#size();
    const zoom = this.#zoom * devicePixelRatio;
    const left = w / 2 - this.#x * zoom;
    const top = h / 2 - this.#y * zoom;
    const area = (x0, y0, x1, y1, paint) => {
      context.save();
      context.beginPath();
      context.rect(x0, y0, x1 - x0, y1 - y0);
      context.clip();
      context.translate(left, top);
      context.scale(zoom, zoom);
      context.imageSmoothingQuality = "high";
      paint();
      context.restore();
    };
    const [first, last] = this.#visible();
    const split = (first + this.#split * (last - first)) * devicePixelRatio;
    const end = done ? height : picture.rowsDone * picture.reduction;
    const edge = top + Math.min(end, height) * zoom;
    const before = () => this.#before && context.drawImage(this.#before, 0, 0, width, height);
    area(0, 0, w, h, () => this.#drawChequers(context, width, height));
    area(0, 0, split, h, before);
    area(split, edge, w, h, before);
    area(split, 0, w, edge, () => {
      if (!picture.overview) return;
      const { reduction, overview } = picture;
      context.drawImage(overview, 0, 0, overview.width * reduction, overview.height * reduction);
      if (zoom * reduction > 1) this.#drawTiles(context, w, h, left, top, zoom);
    });
    if (picture.state === "working") {
      context.fillStyle = getComputedStyle(this.#stage).getPropertyValue("--edge");
      context.fillRect(left, edge, width * zoom, Math.max(1, devicePixelRatio));
    }
    this.#placeDivider(split, Math.max(top, 0), Math.max(h - top - height * zoom, 0));
    this.#zoomed(Math.round(zoom * 100));
  }

  // Under transparent pixels.
  #drawChequers(context, width, height) {
    const pattern = context.createPattern(CHEQUERS, "repeat");
    pattern.setTransform(new DOMMatrix().scale(8 / this.#zoom));
    context.imageSmoothingEnabled = false;
    context.fillStyle = pattern;
    context.fillRect(0, 0, width, height);
  }

  #drawTiles(context, w, h, left, top, zoom) {
    const range = (offset, size) => [
      Math.max(0, Math.floor(-offset / zoom / TILE)),
      Math.floor((size - offset) / zoom / TILE),
    ];
    const [firstColumn, lastColumn] = range(left, w);
    const [firstRow, lastRow] = range(top, h);
    for (let row = firstRow; row <= lastRow; row++) {
      for (let column = firstColumn; column <= lastColumn; column++) {
        const tile = this.#tile(`${column} ${row}`);
        if (!tile) continue;
        context.clearRect(column * TILE, row * TILE, tile.width, tile.height);
        context.drawImage(tile, column * TILE, row * TILE);
      }
    }
  }

  #tile(key) {
    const blob = this.#picture.tiles.get(key);
    const tile = this.#decoded.get(key);
    if (!blob || tile === null) return null;
    this.#decoded.delete(key);
    this.#decoded.set(key, tile ?? null);
    if (tile) return tile;
    for (const [old, bitmap] of this.#decoded) {
      if (this.#decoded.size <= TILES_KEPT) break;
      bitmap?.close();
      this.#decoded.delete(old);
    }
    createImageBitmap(blob).then((bitmap) => {
      if (this.#picture?.tiles.get(key) !== blob) return bitmap.close();
      this.#decoded.set(key, bitmap);
      this.redraw();
    });
    return null;
  }

  #forgetTiles() {
    for (const bitmap of this.#decoded.values()) bitmap?.close();
    this.#decoded.clear();
  }

  // Distances from the stage's left, top and bottom, in pixels of the screen.
  #placeDivider(left, top, bottom) {
    const percent = Math.round(this.#split * 100);
    for (const [side, distance] of Object.entries({ left, top, bottom })) {
      this.#divider.style[side] = `${distance / devicePixelRatio}px`;
    }
    this.#divider.setAttribute("aria-valuenow", percent);
    this.#divider.setAttribute("aria-valuetext", `${percent} % before, ${100 - percent} % after`);
  }

  #listen() {
    const stage = this.#stage;
    const fromCentre = ({ clientX, clientY }) => {
      const box = stage.getBoundingClientRect();
      return [clientX - box.left - box.width / 2, clientY - box.top - box.height / 2];
    };
    this.#divider.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      this.#divider.setPointerCapture(event.pointerId);
    });
    this.#divider.addEventListener("pointermove", (event) => {
      if (!this.#divider.hasPointerCapture(event.pointerId)) return;
      const [first, last] = this.#visible();
      const x = event.clientX - stage.getBoundingClientRect().left;
      this.#moveDivider((x - first) / Math.max(last - first, 1));
    });
    this.#divider.addEventListener("keydown", (event) => {
      const split = {
        ArrowLeft: this.#split - 0.02,
        ArrowRight: this.#split + 0.02,
        PageDown: this.#split - 0.1,
        PageUp: this.#split + 0.1,
        Home: 0,
        End: 1,
      }[event.key];
      if (split === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      this.#moveDivider(split);
    });

    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      this.#pointers.set(event.pointerId, fromCentre(event));
    });
    stage.addEventListener("pointermove", (event) => {
      const old = this.#pointers.get(event.pointerId);
      if (!old) return;
      const here = fromCentre(event);
      const other = [...this.#pointers].find(([id]) => id !== event.pointerId)?.[1];
      this.#pointers.set(event.pointerId, here);
      if (!other) {
        this.#pan(here[0] - old[0], here[1] - old[1]);
        return;
      }
      const distance = (a, b) => Math.max(Math.hypot(a[0] - b[0], a[1] - b[1]), 1);
      const middle = [(here[0] + other[0]) / 2, (here[1] + other[1]) / 2];
      this.#pan((here[0] - old[0]) / 2, (here[1] - old[1]) / 2);
      this.#zoomTo((this.#zoom * distance(here, other)) / distance(old, other), ...middle);
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      stage.addEventListener(kind, ({ pointerId }) => this.#pointers.delete(pointerId));
    }
    stage.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 20 : 1;
        this.#zoomTo(this.#zoom * 1.0015 ** (-event.deltaY * lines), ...fromCentre(event));
      },
      { passive: false },
    );
    stage.addEventListener("dblclick", (event) => {
      const full = 1 / devicePixelRatio;
      if (this.#fitted) this.#zoomTo(full, ...fromCentre(event));
      else this.fit();
    });
    stage.addEventListener("keydown", (event) => {
      const act = {
        "+": () => this.zoomIn(),
        "=": () => this.zoomIn(),
        "-": () => this.zoomOut(),
        0: () => this.fit(),
        1: () => this.fullSize(),
        ArrowLeft: () => this.#pan(PAN, 0),
        ArrowRight: () => this.#pan(-PAN, 0),
        ArrowUp: () => this.#pan(0, PAN),
        ArrowDown: () => this.#pan(0, -PAN),
      }[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act();
    });
  }
}
