"""Reads and converts weights: checkpoint directories, `.safetensors`, the authors' `.pth`."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dvmsr_jax import checkpoint, files, pth, registry
from dvmsr_jax.config import Compute, ModelConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import DVMSR, Network, Weights, named_parameters, read_config


class PretrainedError(UserError):
    """A weights file cannot be used; the message names it and the reason."""


def load_model(source: str | os.PathLike[str], *, compute: Compute = Compute()) -> DVMSR:
    """The network with the weights of `load_weights`.

    Raises:
        PretrainedError: as `load_weights`, or they belong to another network.
        ScanError: the scan that `compute` names cannot run here.
    """
    model = load_weights(source).model(compute)
    if not isinstance(model, DVMSR):
        raise PretrainedError(f"{source}: holds a {type(model).__name__}, not a DVMSR")
    return model


def load_weights(source: str | os.PathLike[str]) -> Weights:
    """Reads weights by their name (see `registry`), or from a checkpoint directory (the averaged
    ones), `.safetensors` or `.pth` file.

    Raises:
        PretrainedError: the path does not exist, is none of the three, is damaged or unsafe, or its
            weights do not fit their network or are not finite.
        UserError: as `registry.find`.
    """
    path = registry.find(source)
    try:
        return _read(path)
    except (checkpoint.CheckpointError, pth.PthError) as error:
        raise PretrainedError(str(error)) from error
    except (
        OSError,
        ValueError,
        TypeError,
        RecursionError,  # deeply nested JSON
        safetensors.SafetensorError,
    ) as error:
        reason = pth.printable(str(error))
        raise PretrainedError(reason if str(path) in reason else f"{path}: {reason}") from error


def load_config(source: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of the network that `load_model` loads.

    It does not start JAX: processes of a cluster must have found each other before they do.

    Raises PretrainedError, as `load_model`.
    """
    path = registry.find(source)
    try:
        config = checkpoint.load_config(path) if path.is_dir() else load_weights(path).config
    except checkpoint.CheckpointError as error:
        raise PretrainedError(str(error)) from error
    if not isinstance(config, ModelConfig):
        raise PretrainedError(f"{source}: holds another network, not a DVMSR")
    return config


def save_safetensors(model: Network, path: Path, training: dict[str, Any] | None = None) -> None:
    """Writes the weights as float32, with the configuration in the metadata.

    `training`, a description of how they were trained, is added to the metadata.
    """
    metadata = {"format": "dvmsr_jax", "config": json.dumps(dataclasses.asdict(model.config))}
    if training is not None:
        metadata["training"] = json.dumps(training)
    arrays = {name: np.asarray(x, np.float32) for name, x in named_parameters(model).items()}
    with files.replacing(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays, metadata))


def training_facts(source: str | os.PathLike[str]) -> dict[str, Any] | None:
    """How the weights that `load_weights` returns were trained.

    Returns:
        "step", the number of steps taken, and the configuration's fields by names like
        "optim.schedule", without those that do not affect the result, such as paths. None if the
        file does not contain them.

    Raises:
        CheckpointError, PretrainedError: it cannot be read.
        UserError: as `registry.find`.
    """
    path = registry.find(source)
    if path.is_dir():
        return checkpoint.flat(checkpoint.load_facts(path))
    if path.suffix != ".safetensors":
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get("training", "null"))
    except (ValueError, safetensors.SafetensorError) as error:
        raise PretrainedError(f"{path}: {error}") from error


def _read(path: Path) -> Weights:
    if not path.exists():
        names = ", ".join(registry.NAMED)
        raise PretrainedError(f"{path}: no such file or directory, nor a name of weights ({names})")
    if path.is_dir():
        return checkpoint.load_weights(path)
    files.regular_size(path, at_most=pth.MAX_BYTES)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return _from_published(pth.read_pth(path), path)
    raise PretrainedError(
        f"{path}: expected a checkpoint directory, a .safetensors file or a published .pth file"
    )


def _read_safetensors(path: Path) -> Weights:
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if "config" not in metadata:
            raise PretrainedError(
                f"{path}: has no DVMSR configuration in its metadata; write it with dvmsr convert"
            )
        parameters = {}
        for name in file.keys():  # noqa: SIM118
            kind = file.get_slice(name).get_dtype()
            if kind not in ("F64", "F32", "F16", "BF16"):
                raise PretrainedError(f"{path}: {name} holds numbers of type {kind}")
            parameters[name] = file.get_tensor(name)
    return Weights.from_file(read_config(json.loads(metadata["config"])), parameters)


# The published code's names -> ours. PyTorch has output channels first, Flax last: the order of all
# axes is reversed, except for the two spatial axes of a 2-d convolution.

_MIXER = r"layers\.(\d+)\.residual_group\.blocks\.(\d+)\."
_PUBLISHED_NAMES = [
    (r"conv_first\.(\w+)", r"conv_first.\1"),
    (r"patch_embed\.norm\.(\w+)", r"norm_first.\1"),
    (_MIXER + r"mixer\.(A_log|D)", r"rssbs.\1.vimms.\2.forward.\3"),
    (_MIXER + r"mixer\.conv1d\.(\w+)", r"rssbs.\1.vimms.\2.forward.conv.\3"),
    (_MIXER + r"mixer\.dt_proj\.bias", r"rssbs.\1.vimms.\2.forward.dt_bias"),
    (_MIXER + r"mixer\.(x_proj|dt_proj)\.(\w+)", r"rssbs.\1.vimms.\2.forward.\3.\4"),
    (_MIXER + r"mixer\.(in_proj|out_proj)\.(\w+)", r"rssbs.\1.vimms.\2.\3.\4"),
    (_MIXER + r"norm\.(\w+)", r"rssbs.\1.vimms.\2.norm.\3"),
    (r"layers\.(\d+)\.conv\.(\w+)", r"rssbs.\1.conv.\2"),
    (r"norm_f\.(\w+)", r"norm_last.\1"),
    (r"conv_after_body\.(\w+)", r"conv_last.\1"),
    (r"upsample\.0\.(\w+)", r"reconstruct.\1"),
]


def _from_published(contents: Any, path: Path) -> Weights:
    """Converts names and layouts, and infers the configuration from the shapes."""
    if isinstance(contents, dict):
        contents = contents.get("params_ema", contents.get("params", contents))
    if not isinstance(contents, dict) or not all(
        isinstance(x, np.ndarray) for x in contents.values()
    ):
        raise PretrainedError(f"{path}: does not hold a dictionary of tensors")
    parameters = {}
    for name, tensor in contents.items():
        for pattern, template in _PUBLISHED_NAMES:
            if match := re.fullmatch(pattern, name):
                ours = match.expand(template)
                break
        else:
            problem = pth.printable(f"holds {name}, which is not part of a DVMSR")
            raise PretrainedError(f"{path}: {problem}")
        if ours.endswith(".weight"):
            kind = "scale" if ".norm." in ours or ours.startswith("norm_") else "kernel"
            ours = ours.removesuffix("weight") + kind
            if tensor.ndim == 3 and tensor.shape[1] == 1:  # the causal convolution, (d, 1, width)
                tensor = tensor[:, 0]
            tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
        parameters[ours] = tensor
    return Weights.from_file(_published_config(parameters, path), parameters)


def _published_config(parameters: dict[str, np.ndarray], path: Path) -> ModelConfig:
    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in parameters:
            problem = "is missing"
        elif len(parameters[name].shape) != axes or 0 in parameters[name].shape:
            problem = f"has shape {parameters[name].shape}"
        else:
            return parameters[name].shape
        raise PretrainedError(f"{path}: the weights do not fit the model: {name} {problem}")

    channels = shape("conv_first.kernel", 4)[-1]
    inner, states = shape("rssbs.0.vimms.0.forward.A_log", 2)
    return ModelConfig(
        scale=round((shape("reconstruct.bias", 1)[0] / 3) ** 0.5),
        channels=channels,
        rssbs=len({name.split(".")[1] for name in parameters if name.startswith("rssbs")}),
        vimms_per_rssb=len(
            {name.split(".")[3] for name in parameters if name.startswith("rssbs.0.vimms")}
        ),
        states=states,
        expand=inner // channels,
        conv_width=shape("rssbs.0.vimms.0.forward.conv.kernel", 2)[0],
    )


def convert(source: Path, target: Path) -> None:
    """Converts weights into a `.safetensors` file that contains their configuration.

    "training" in its metadata is the result of `training_facts`.

    Args:
        source: a name, a checkpoint directory, a .safetensors file or a published .pth file.
        target: the .safetensors file to write; an existing one is not overwritten.
    """
    if target.suffix != ".safetensors":
        raise PretrainedError(f"{target}: the output's name must end in .safetensors")
    if target.exists():
        raise PretrainedError(f"{target}: already exists; remove it or choose another name")
    # Pinned, because a run may write another checkpoint in the meantime.
    weights = checkpoint.find_step(source) if source.is_dir() else source
    save_safetensors(load_model(weights), target, training_facts(weights))
    print(f"{source} -> {target}")
