"""Time and memory of upscaling as tasks."""

import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dvmsr_jax.config import Compute, NetworkConfig
from dvmsr_jax.cost import cost
from dvmsr_jax.inference import make_streamer
from dvmsr_jax.model import DVMSR, build, parameter_count
from dvmsr_jax.rgb import RgbUpscale
from dvmsr_jax.training.step import memory_of
from experiments.tasks import Facts, Place, Task, described
from experiments.training import RATE, flops

Mode = Literal["whole", "bands", "onnx"]
Platform = Literal["cpu", "gpu"]

# Repetitions go on until they have taken this long, and there are at least MIN_REPEATS.
SECONDS, MIN_REPEATS = 2.0, 3


@dataclass(frozen=True)
class Timing(Task):
    """Upscales random pictures with random weights, of a given size and number at once."""

    name: str
    model: NetworkConfig
    side: int
    batch: int = 1
    compute: Compute = Compute()
    mode: Mode = "whole"
    """whole: all pictures at once. bands: in bands of rows, one picture after the other. onnx: the
    same on ONNX Runtime."""
    platform: Platform = "cpu"

    kind = "timing"

    @property
    def facts(self) -> Facts:
        """See Task."""
        networks = {"model": described(self.model), "compute": described(self.compute)}
        size = {"side": self.side, "batch": self.batch}
        return networks | size | {"mode": self.mode, "platform": self.platform}

    @property
    def possible(self) -> bool:
        """See Task."""
        needed = ("onnx", "onnxruntime") if self.mode == "onnx" else ()
        there = all(importlib.util.find_spec(package) for package in needed)
        return there and jax.default_backend() == self.platform

    def seconds(self) -> float:
        """See Task."""
        once = self.batch * flops(self.model, self.side) / RATE
        return (MIN_REPEATS + 1) * once + SECONDS + 5  # and compilation

    def run(self, place: Place) -> Facts:
        """Measures. Memory is XLA's count for a whole picture: arguments, results, temporaries."""
        del place
        shape = (self.batch, self.side, self.side, 3)
        images = np.random.default_rng(0).random(shape, np.float32)
        model = nnx.jit(lambda: build(self.model, compute=self.compute, rngs=nnx.Rngs(0)))()
        if self.mode != "whole":
            assert isinstance(model, DVMSR)
            stream = make_streamer(model) if self.mode == "bands" else on_onnx_runtime(model)
            memory = None

            def once() -> None:
                for image in images:
                    for _ in stream(image):
                        pass
        else:
            graph, parameters = nnx.split(model)
            run = jax.jit(lambda parameters, images: nnx.merge(graph, parameters)(images))
            program = run.lower(parameters, images).compile()
            memory = memory_of(program)

            def once() -> None:
                jax.block_until_ready(program(parameters, jnp.asarray(images)))

        once()
        seconds: list[float] = []
        while len(seconds) < MIN_REPEATS or sum(seconds) < SECONDS:
            begin = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - begin)
        costs = cost(self.model, self.side, self.side)
        return {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "repeats": len(seconds),
            "memory": memory,
            "parameters": parameter_count(model),
            **{name: self.batch * value for name, value in costs._asdict().items()},
        }


def on_onnx_runtime(model: DVMSR) -> RgbUpscale:
    """Upscales in bands, on ONNX Runtime."""
    from dvmsr_jax.onnx import network, upscaler  # need packages that may be missing

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(network.streaming_model(model).SerializeToString())
        return upscaler.make_streamer(upscaler.open_model(path))
