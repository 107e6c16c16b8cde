// A stage of a Pipeline. Receives, once, what it is, and the ports from the stage before and to the
// next one; then {rows} or {failed} from there.

import { Engine } from "./engine.js";

addEventListener("message", ({ data }) => begin(data), { once: true });

async function begin({ module, weights, stage, stages, width, height, from, to }) {
  const fail = (error) => to.postMessage({ failed: error.message });
  try {
    const engine = await Engine.create(module, weights, stage, stages);
    engine.start(width, height);
    from.onmessage = ({ data }) => {
      if (data.failed) return to.postMessage(data);
      try {
        const rows = engine.push(data.rows);
        to.postMessage({ rows }, [rows.buffer]);
      } catch (error) {
        fail(error);
      }
    };
  } catch (error) {
    fail(error);
  }
}
