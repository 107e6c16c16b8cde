"""Fine-tuning: the parameters that a run takes from given weights instead of random ones."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from dvmsr_jax.config import ModelConfig, TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import Weights, parameter_shapes
from dvmsr_jax.pretrained import load_weights, training_facts

# A field of the network on which no parameter's shape or meaning depends.
_FREE = "drop_path"


class Initial(NamedTuple):
    """The start of a run of fine-tuning."""

    taken: Mapping[str, Array | np.ndarray]
    """The parameters that the run starts from, by name; the others start at random."""
    new: tuple[str, ...]
    """The names of the others."""
    identity: str
    """Of the weights that they were taken from: see `Weights.identity`."""
    lineage: tuple[dict[str, Any], ...]
    """The weights that the run descends from, oldest first: "file", "identity" and, where they
    are known, the facts of their training."""

    def __str__(self) -> str:
        names = f"; new ones: {', '.join(self.new)}" if self.new else ""
        return f"{self.lineage[-1]['file']}: {len(self.taken)} parameter arrays{names}"


def load_initial(config: TrainConfig) -> Initial | None:
    """The start that `config.init` names.

    Raises:
        UserError: the weights cannot be read, or `take` refuses them.
    """
    if config.init is None:
        return None
    weights = load_weights(config.init)
    try:
        taken = take(config.model, weights, partial=config.init_partial)
    except ValueError as error:
        raise UserError(f"--init {config.init}: {error}") from error
    identity = weights.identity()
    facts = training_facts(config.init) or {}
    lineage = facts.pop("lineage", [])
    return Initial(
        taken=taken,
        new=tuple(name for name in parameter_shapes(config.model) if name not in taken),
        identity=identity,
        lineage=(*lineage, {"file": Path(config.init).name, "identity": identity, **facts}),
    )


def take(model: ModelConfig, weights: Weights, *, partial: bool) -> dict[str, Array | np.ndarray]:
    """The parameters with which a network like `model` starts from `weights`, by name.

    Those whose names and shapes agree: all of them, and for another scale all but those of the last
    convolution, "reconstruct".

    Raises:
        ValueError: the networks differ in more than the scale and `partial` is false, or no
            parameter fits.
    """
    theirs, ours = dataclasses.asdict(weights.config), dataclasses.asdict(model)
    differing = [name for name in ours if name != _FREE and theirs[name] != ours[name]]
    if differing not in ([], ["scale"]) and not partial:
        differences = ", ".join(f"{name} {theirs[name]}, not {ours[name]}" for name in differing)
        raise ValueError(
            f"the weights are of another network ({differences}); --init-partial takes the "
            "parameters that fit"
        )
    shapes = parameter_shapes(model)
    taken = {name: x for name, x in weights.parameters.items() if shapes.get(name) == x.shape}
    if not taken:
        raise ValueError("none of the parameters fits the network")
    return taken
