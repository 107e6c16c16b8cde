"""Upscales pictures on ONNX Runtime; needs no JAX, unless it exports the weights itself."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from dvmsr_jax.errors import UserError
from dvmsr_jax.onnx.protocol import NEXT, SUFFIX
from dvmsr_jax.pictures.upscaler import PictureUpscaler
from dvmsr_jax.registry import default_for
from dvmsr_jax.rgb import RgbUpscale, RgbView, rows_of_band, self_ensembled

if TYPE_CHECKING:
    import onnxruntime


class OnnxUpscaler(PictureUpscaler):
    """Enlarges pictures of all kinds with a model in ONNX Runtime, on the CPU.

    It may be used from several threads at once.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        scale: int | float | None = None,
        self_ensemble: bool = False,
    ):
        """Loads a model.

        Args:
            model: an .onnx file made by `dvmsr export`, not a plain one. Or weights, given as
                for `Upscaler`, which are exported in memory; this imports JAX and onnx.
            scale: see `Upscaler`.
            self_ensemble: see `Upscaler`.

        Raises:
            UserError: ONNX Runtime is not installed, the file or the weights cannot be used, or
                `scale` is out of range.
        """
        session = open_model(default_for(scale) if model is None else model)
        upscale = make_streamer(session)
        if self_ensemble:
            upscale = self_ensembled(upscale)
        model_scale = _number(session, "scale")
        super().__init__(upscale, model_scale, scale=scale, holds_result=self_ensemble)


def open_model(source: str | os.PathLike[str]) -> "onnxruntime.InferenceSession":
    """Opens an .onnx file, or other weights, as `OnnxUpscaler` does; it raises the same errors."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError('onnxruntime is not installed: pip install "dvmsr-jax[onnx]"') from error
    path = Path(source).expanduser()
    model: str | bytes = str(path)
    if path.suffix != SUFFIX:
        from dvmsr_jax.export import to_onnx  # imports JAX

        model = to_onnx(source)
    elif not path.exists():
        raise UserError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    threads = os.environ.get("NPROC", "")
    options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0  # as XLA; 0: all
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: ONNX Runtime cannot load it ({reason})") from error
    graph = session.get_modelmeta().custom_metadata_map.get("graph")
    if graph == "plain":
        raise UserError(f"{source}: takes whole pictures only; export it without --plain")
    if graph != "streaming":
        raise UserError(f"{source}: was not made by dvmsr export")
    return session


def make_streamer(
    session: "onnxruntime.InferenceSession", *, band_rows: int | None = None
) -> RgbUpscale:
    """`inference.make_streamer` for an exported model; see `protocol.BANDS`."""
    scale, rows_late = _number(session, "scale"), _number(session, "rows_late")
    _, _, _, *carried_inputs = session.get_inputs()
    names = [output.name for output in session.get_outputs()]

    def stream(
        image: Float[np.ndarray, "h w 3"] | Float[RgbView, "h w 3"],
    ) -> Iterator[Float[np.ndarray, "rows ws 3"]]:
        h, w, _ = image.shape
        count = band_rows or rows_of_band(w)
        carried = {
            x.name: np.zeros([w if size == "width" else size for size in x.shape], np.float32)
            for x in carried_inputs
        }
        height = np.array([h])
        for first in range(0, h + rows_late, count):
            rows = np.asarray(image[first : first + count], np.float32)
            beyond = min(first + count, h + rows_late) - first - len(rows)
            rows = np.pad(rows, ((0, beyond), (0, 0), (0, 0))).transpose(2, 0, 1)[None]
            inputs = {"rows": rows, "first": np.array([first]), "height": height, **carried}
            results = dict(zip(names, session.run(None, inputs), strict=True))
            carried = {name: results[name + NEXT] for name in carried}
            place = first - rows_late  # of the first row of the result
            if place + rows.shape[2] > 0:
                yield results["upscaled"][0, :, max(-place, 0) * scale :].transpose(1, 2, 0)

    return stream


def _number(session: "onnxruntime.InferenceSession", name: str) -> int:
    return int(session.get_modelmeta().custom_metadata_map[name])
