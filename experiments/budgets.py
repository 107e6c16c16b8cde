"""How much a study may cost: the configuration that its variants start from, and their number."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dvmsr_jax.config import DataConfig, ModelConfig, NetworkConfig, OptimConfig, TrainConfig
from experiments.training import Training

# The seed of teachers, so that no student starts from its teacher's initial weights.
TEACHER_SEED = 1_000

Item = TypeVar("Item")


@dataclass(frozen=True)
class Budget:
    """A scale for all studies."""

    name: str
    purpose: str
    base: TrainConfig
    """The paper's student, trained without a teacher."""
    rates: tuple[float, ...]
    """Learning rates among which those of unlike networks are chosen."""
    pixels: int
    """Largest number of LR pixels of a picture that is timed."""
    batch_pixels: int
    """The same for a batch of several."""
    seeds: int = 2
    claim_seeds: int = 3
    """Seeds where a claim hangs on a small difference."""
    tiny: bool = False
    """Whether networks, pictures and lists of variants are cut to the smallest that work."""

    def some(self, items: Mapping[str, Item]) -> dict[str, Item]:
        """The variants that are run: all of them, or if `tiny` the first two."""
        return dict(list(items.items())[: 2 if self.tiny else None])

    def network(self, config: NetworkConfig) -> NetworkConfig:
        """The network that is run in place of this one."""
        if not self.tiny:
            return config
        small: dict[str, Any] = {
            "channels": 12,
            "rssbs": 1,
            "vimms_per_rssb": 1,
            "depth": 1,
            "states": 2,
        }
        fields = {field.name for field in dataclasses.fields(config)}
        return dataclasses.replace(config, **{k: x for k, x in small.items() if k in fields})

    def dvmsr(self, **fields: Any) -> TrainConfig:
        """The base with fields of its network replaced."""
        return self.of(dataclasses.replace(self.base.model, **fields))

    def of(self, network: NetworkConfig, **fields: Any) -> TrainConfig:
        """The base with another network and these fields."""
        return dataclasses.replace(self.base, model=self.network(network), **fields)

    def trainings(self, variants: Mapping[str, TrainConfig], seeds: int) -> list[Training]:
        """Runs of each variant with seeds 0, 1, ..."""
        return [
            Training(name, config, seed)
            for name, config in self.some(variants).items()
            for seed in range(seeds)
        ]


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(
            "smoke",
            "seconds, to check that everything works",
            TrainConfig(
                phase="teacher",
                model=ModelConfig(drop_path=0.0),
                data=DataConfig(lr_crop=16, batch_size=2, val_images=1, workers=0),
                optim=OptimConfig(learning_rate=1e-3, schedule="cosine"),
                steps=2,
                log_every=1,
                val_every=2,
                checkpoint_every=1,
            ),
            rates=(1e-3, 2e-3),
            pixels=2**10,
            batch_pixels=2**10,
            seeds=1,
            claim_seeds=1,
            tiny=True,
        ),
        Budget(
            "cpu",
            "what was run: a night on two cores",
            TrainConfig(
                phase="teacher",
                model=ModelConfig(drop_path=0.0),
                data=DataConfig(lr_crop=32, batch_size=4),
                optim=OptimConfig(
                    learning_rate=2e-3, schedule="cosine", warmup=0.05, ema_decay=0.99
                ),
                steps=700,
                log_every=25,
                val_every=175,
                checkpoint_every=50,
                keep_checkpoints=1,
            ),
            rates=(5e-4, 1e-3, 2e-3),
            pixels=2**22,
            batch_pixels=2**20,
        ),
        Budget(
            "paper",
            "the paper's schedule: 500,000 steps of 128 crops; never run",
            TrainConfig(phase="teacher"),
            rates=(1e-4, 2e-4, 4e-4),
            pixels=2**26,
            batch_pixels=2**26,
        ),
    )
}
