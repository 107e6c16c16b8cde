"""How crops reach the training step: cut by the host, or on the devices."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, UInt8

from dvmsr_jax.config import DataConfig
from dvmsr_jax.data.batches import batches, cut, load_cache, plans, plans_with_lr


@dataclass(frozen=True)
class Feed(abc.ABC):
    """Inputs for the training steps, and the function that turns a step's input into crops.

    `targets`, if given, are pictures of HR's size, which are cropped too, as "target".
    """

    records: Sequence[dict[str, Any]]
    config: DataConfig
    scale: int
    targets: Sequence[UInt8[np.ndarray, "H W 3"]] | None = None

    @abc.abstractmethod
    def inputs(
        self, *, seed: int, start: int, stop: int, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[dict[str, np.ndarray]]:
        """The inputs of steps `start` to `stop - 1`; the arguments are those of `data.batches`."""

    @abc.abstractmethod
    def load_cache(self) -> dict[str, np.ndarray]:
        """Arrays that `crops` needs on each device."""

    @abc.abstractmethod
    def crops(
        self, cache: Mapping[str, Array], step_input: Mapping[str, Array]
    ) -> Mapping[str, UInt8[Array, "b _ _ 3"] | Bool[Array, " b"]]:
        """The crops {"lr", "hr"[, "target", "zoomed"]} of an input; traced as part of the step."""


class _HostFeed(Feed):
    """The host reads and cuts: an input is a batch of crops."""

    def inputs(self, *, seed, start, stop, shard=(0, 1)):
        return batches(
            self.records,
            self.config,
            scale=self.scale,
            seed=seed,
            start=start,
            stop=stop,
            shard=shard,
            targets=self.targets,
        )

    def load_cache(self):
        return {}

    def crops(self, cache, step_input):
        return step_input


class _DeviceFeed(Feed):
    """Each device cuts from its copy of all sub-images: an input is a plan.

    Degraded and zoomed LR crops come from the host, with the plan.
    """

    def inputs(self, *, seed, start, stop, shard=(0, 1)):
        span = {"seed": seed, "start": start, "stop": stop, "shard": shard}
        if self.config.lr_is_stored:
            return plans(self.records, self.config, **span)
        return plans_with_lr(self.records, self.config, scale=self.scale, **span)

    def load_cache(self):
        return load_cache(self.records, self.config, self.targets)

    def crops(self, cache, step_input):
        return cut(cache, step_input, self.config.lr_crop, self.scale)


def make_feed(
    records: Sequence[dict[str, Any]],
    config: DataConfig,
    *,
    scale: int,
    targets: Sequence[UInt8[np.ndarray, "H W 3"]] | None = None,
) -> Feed:
    """Creates the kind of feed that `config.cache` names."""
    kind = _DeviceFeed if config.cache == "device" else _HostFeed
    return kind(records, config, scale, targets)
