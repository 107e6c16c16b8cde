"""Tasks that measure given weights rather than train them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dvmsr_jax import evaluation, registry
from dvmsr_jax.evaluation import Benchmark, Example
from dvmsr_jax.model import Network
from dvmsr_jax.pretrained import load_weights
from experiments.tasks import Facts, Place, Task
from experiments.training import Best, Training

Source = str | Training | Best
"""Weights: their name, or the runs that they come from."""


@dataclass(frozen=True)
class Probe(Task):
    """A task on weights that have a name (see `dvmsr_jax.registry`) or that a run has trained."""

    name: str
    source: Source

    @property
    def needs(self) -> tuple[Task, ...]:
        """See Task."""
        return () if isinstance(self.source, str) else (self.source,)

    @property
    def facts(self) -> Facts:
        """See Task."""
        if isinstance(self.source, str):
            return {"weights": self.source, "sha256": registry.NAMED[self.source].sha256}
        return {"weights": self.source.id}

    def load(self, place: Place) -> Network:
        """The network. Raises UserError if its weights are not here."""
        if isinstance(self.source, str):
            return load_weights(Path(self.source)).model()
        return load_weights(self.source.weights(place)).model()


def pictures(place: Place, scale: int) -> dict[str, Benchmark]:
    """The test pictures, by benchmark: those of --benchmarks, or scikit-image's photographs."""
    if place.benchmarks:
        return evaluation.find_benchmarks(place.benchmarks, scale)
    return {"samples": evaluation.sample_benchmark(scale)}


def all_pictures(place: Place, scale: int) -> Iterator[Example]:
    """The pictures of all benchmarks, one after the other."""
    for benchmark in pictures(place, scale).values():
        yield from benchmark
