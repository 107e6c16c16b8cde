"""Scores the weights during training, on the validation pictures."""

import jax
import numpy as np
from jaxtyping import UInt8

from dvmsr_jax import bicubic, data, images, metrics
from dvmsr_jax.config import TrainConfig
from dvmsr_jax.inference import upscale_pixels
from dvmsr_jax.model import Weights


class Validator:
    """Upscales and scores the validation sub-images, on one device.

    LR is degraded with the same preset as in training, so that checkpoints are ranked by the task
    that they are trained for.
    """

    def __init__(
        self,
        config: TrainConfig,
        records: data.Records,
        teacher: Weights | None,
        start: Weights | None = None,
    ):
        """`start`: the weights that training starts from, unless they are random."""
        self._config = config
        self._records = data.validation_pictures(records.val, config.data, config.model.scale)
        self._forward = jax.jit(self._upscale, static_argnums=1)
        bicubics = [bicubic.upscale(record["lr"], config.model.scale) for record in self._records]
        self._first_bicubic = bicubics[0]
        self.fixed_scores = {"bicubic": self._mean_psnr_y(bicubics)}
        """PSNR-Y of bicubic and, if there are any, of start and teacher, which do not change."""
        if start is not None:
            self.fixed_scores["start"] = self._mean_psnr_y(self._results(start))
        if teacher is not None:
            results = self._results(teacher, config.distill.self_ensemble)
            self.fixed_scores["teacher"] = self._mean_psnr_y(results)

    def __call__(self, weights: Weights) -> tuple[float, UInt8[np.ndarray, "H W 3"]]:
        """Returns (mean PSNR-Y, a sample picture bicubic | ours | HR)."""
        results = self._results(weights)
        panels = {"bicubic": self._first_bicubic, "ours": results[0], "HR": self._records[0]["hr"]}
        return self._mean_psnr_y(results), images.side_by_side(panels)

    def describe(self, step: int, psnr_y: float) -> str:
        """A line for the terminal."""
        others = [f"{name} {x:.2f}" for name, x in self.fixed_scores.items()]
        return f"step {step}: PSNR-Y {psnr_y:.2f} dB ({', '.join(others)})"

    def _results(self, weights: Weights, ensemble: bool = False) -> list[np.ndarray]:
        # Through the host, so that the arrays are no longer spread over a mesh.
        weights = jax.tree.map(np.asarray, weights)
        return [
            np.asarray(self._forward(weights, ensemble, record["lr"])) for record in self._records
        ]

    def _upscale(self, weights, ensemble, lr):
        model = weights.model(self._config.compute)
        return upscale_pixels(model, lr[None], self_ensemble=ensemble)[0]

    def _mean_psnr_y(self, results):
        scale = self._config.model.scale
        pairs = zip(results, self._records, strict=True)
        return float(np.mean([metrics.psnr_y(sr, record["hr"], scale) for sr, record in pairs]))
