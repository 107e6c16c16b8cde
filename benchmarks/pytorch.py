"""Other models, in PyTorch, for comparison. PyTorch itself is optional."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks import machine
from dvmsr_jax.errors import UserError


class TorchModel(NamedTuple):
    """A class of PyTorch models that upscale (b, 3, h, w), float32."""

    place: str
    """FILE.py:CLASS; the class is instantiated without arguments."""
    device: Literal["cpu", "cuda"]


def load_class(model: TorchModel) -> Callable[[], Any]:
    """Imports the class. Raises UserError if the file, the class or PyTorch is missing or fails."""
    file, _, name = model.place.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{model.place}: expected FILE.py:CLASS, with an existing file")
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{model.place}: needs PyTorch, which is not installed (pip install torch)")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{model.place}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).parent))  # for imports from the same folder
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:  # whatever the file does
        raise UserError(f"{model.place}: cannot be imported ({error})") from error


def make_upscale(
    model: TorchModel, build: Callable[[], Any]
) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
    """Builds the model, for whole images (h, w, 3). Raises UserError if it fails, now or later."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # float32, like ours

    def upscale(image: np.ndarray) -> Iterator[np.ndarray]:
        batch = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
        try:
            with torch.no_grad():
                yield network(torch.from_numpy(batch).to(model.device)).cpu().numpy()
        except Exception as error:  # whatever the model does
            raise UserError(f"{model.place}: fails on {batch.shape} ({error})") from error

    try:
        network = build().eval().to(model.device)
    except Exception as error:
        raise UserError(f"{model.place}: cannot be built without arguments ({error})") from error
    return upscale


def peak_memory(model: TorchModel) -> int | None:
    """Like `machine.peak_memory`; on a GPU, of PyTorch."""
    if model.device == "cpu":
        return machine.peak_memory()
    import torch

    return torch.cuda.max_memory_allocated()
