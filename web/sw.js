// Service worker: what has been loaded once is there without a network.
//
// With a network, files come from there, so that a new version of the page is seen at once.

const CACHE = "dvmsr";
const FILES = [
  "./",
  "dvmsr.wasm",
  "dvmsr-relaxed.wasm",
  "engine.js",
  "enlarging.js",
  "icon.svg",
  "page.js",
  "picture.js",
  "pipeline.js",
  "png.js",
  "preview.js",
  "profile.js",
  "reading.js",
  "stage.js",
  "style.css",
  "viewer.js",
  "worker.js",
  "weights.json",
];

addEventListener("install", (event) => event.waitUntil(keepAll()));
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method === "GET" && new URL(request.url).origin === location.origin) {
    event.respondWith(load(request));
  }
});

// The page's files, and the weights that are chosen at first.
async function keepAll() {
  const cache = await caches.open(CACHE);
  await cache.addAll(FILES);
  const [{ file }] = await (await cache.match("weights.json")).json();
  await cache.add(file);
  await skipWaiting();
}

async function load(request) {
  let response;
  try {
    response = await fetch(request, { cache: "no-cache" }); // asks whether it has changed
  } catch (error) {
    const kept = await caches.match(request, { cacheName: CACHE, ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
  if (response.ok) await keep(request, response.clone()).catch(() => {}); // storage may be full
  return response;
}

async function keep(request, response) {
  const cache = await caches.open(CACHE);
  await cache.put(request, response);
}
