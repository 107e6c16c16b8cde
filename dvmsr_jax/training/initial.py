"""Fine-tuning: the parameters that a run takes from given weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from dvmsr_jax.config import NetworkConfig, TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import Weights, parameter_shapes
from dvmsr_jax.pretrained import load_weights, training_facts

# The one field of the network that does not affect its parameters' shapes or meaning.
_FREE = "drop_path"


class Initial(NamedTuple):
    """What a fine-tuning run starts from."""

    taken: Mapping[str, Array | np.ndarray]
    """The given parameters, by name."""
    new: tuple[str, ...]
    """Names of the other parameters, which start at random."""
    identity: str
    """`Weights.identity` of the given weights."""
    lineage: tuple[dict[str, Any], ...]
    """The given weights and their predecessors, oldest first: "file", "identity" and, if known,
    how they were trained."""

    def __str__(self) -> str:
        names = f"; new ones: {', '.join(self.new)}" if self.new else ""
        return f"{self.lineage[-1]['file']}: {len(self.taken)} parameter arrays{names}"


def load_initial(config: TrainConfig) -> Initial | None:
    """Reads the weights that `config.init` names; None if it names none.

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


def take(model: NetworkConfig, weights: Weights, *, partial: bool) -> dict[str, Array | np.ndarray]:
    """The parameters, by name, that a network with the configuration `model` takes from `weights`.

    These are all parameters or, if the scales differ, all but the last convolution, "reconstruct".
    With `partial`, parameters with other names or shapes are left out.

    Raises:
        ValueError: the networks differ in more than the scale and `partial` is false, or no
            parameter fits.
    """
    theirs, ours = dataclasses.asdict(weights.config), dataclasses.asdict(model)
    differing = [name for name in ours if name != _FREE and theirs.get(name) != ours[name]]
    if differing not in ([], ["scale"]) and not partial:
        differences = ", ".join(
            f"{name} {theirs.get(name)}, not {ours[name]}" for name in differing
        )
        raise ValueError(
            f"the weights belong to another network ({differences}); --init-partial takes the "
            "parameters that fit"
        )
    shapes = parameter_shapes(model)
    taken = {name: x for name, x in weights.parameters.items() if shapes.get(name) == x.shape}
    if not taken:
        raise ValueError("none of the parameters fit the network")
    return taken
