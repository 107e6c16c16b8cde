"""Fine-tuning: the parameters that a run takes from given weights instead of random ones."""

import dataclasses

from jaxtyping import Array

from dvmsr_jax.config import ModelConfig, TrainConfig
from dvmsr_jax.errors import UserError
from dvmsr_jax.model import Weights, parameter_shapes
from dvmsr_jax.pretrained import load_weights

# Fields that no parameter's shape or meaning depends on.
_IRRELEVANT = frozenset(["drop_path"])


def load_initial(config: TrainConfig) -> Weights | None:
    """The weights named by `config.init`.

    Raises:
        UserError: they cannot be read, or `take` refuses them.
    """
    if config.init is None:
        return None
    weights = load_weights(config.init)
    take(config.model, weights, partial=config.init_partial)
    return weights


def take(model: ModelConfig, weights: Weights, *, partial: bool) -> dict[str, Array]:
    """The parameters with which a network like `model` starts from `weights`, by name.

    All of them, or all but the last convolution for another scale. With `partial`, those whose
    names and shapes agree.

    Raises:
        UserError: another field differs and `partial` is false, or nothing agrees.
    """
    differing = {
        name: (theirs, ours)
        for name, ours in dataclasses.asdict(model).items()
        if name not in _IRRELEVANT and (theirs := getattr(weights.config, name)) != ours
    }
    if differing.keys() - {"scale"} and not partial:
        differences = ", ".join(
            f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in differing.items()
        )
        raise UserError(
            f"--init: the weights are of another network: {differences}; --init-partial takes the "
            "parameters that fit"
        )
    shapes = parameter_shapes(model)
    taken = {
        name: x
        for name, x in weights.parameters.items()
        if shapes.get(name) == x.shape
        and not (name.startswith("reconstruct.") and "scale" in differing)
    }
    if not taken:
        raise UserError("--init: none of the weights' parameters fits the network")
    return taken


def describe(model: ModelConfig, taken: dict[str, Array]) -> str:
    """A line that says which parameters start new."""
    new = [name for name in parameter_shapes(model) if name not in taken]
    names = f"; new: {', '.join(new)}" if new else ""
    return f"{len(taken)} of {len(taken) + len(new)} parameter arrays are taken from --init{names}"
