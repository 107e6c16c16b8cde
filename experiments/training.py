"""Training runs as tasks: a configuration, a seed, and the scores at the end."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvmsr_jax import checkpoint, evaluation, registry
from dvmsr_jax.config import NetworkConfig, TrainConfig
from dvmsr_jax.cost import cost
from dvmsr_jax.errors import UserError
from dvmsr_jax.inference import make_upscaler
from dvmsr_jax.model import parameter_count
from dvmsr_jax.pretrained import load_weights
from dvmsr_jax.training import report
from dvmsr_jax.training.loop import TrainingError, train
from experiments import networks  # also lets all of its networks be trained
from experiments.tasks import Facts, Place, Task, described, read_result

# Floating-point operations a second of a training step on two cores of an AMD EPYC with AVX2, for
# estimates.
RATE = 40e9
# Seconds of a training run besides its steps: compilation, validation, scores.
OVERHEAD = 20.0
# The size for which papers state the cost of x4 networks.
COST_SIZE = 256


@dataclass(frozen=True)
class Training(Task):
    """A training run."""

    name: str
    config: TrainConfig
    """Everything but the folders, the seed, and what the following fields decide."""
    seed: int = 0
    teacher: "Training | None" = None
    """The run whose outcome is the teacher, unless `config` has weights with a name for it."""
    tuned_by: "Best | None" = None
    """Its learning rate is used."""

    kind = "training"

    @property
    def needs(self) -> tuple[Task, ...]:
        """See Task."""
        return tuple(task for task in (self.teacher, self.tuned_by) if task is not None)

    @property
    def facts(self) -> Facts:
        """See Task."""
        fields = checkpoint.flat(described(self.config)) | {"seed": self.seed}
        named = self.config.distill.teacher
        facts = {"config": fields, "needs": [task.id for task in self.needs]}
        if named is not None:
            facts["teacher"] = registry.NAMED[str(named)].sha256
        return facts

    def seconds(self) -> float:
        """See Task."""
        return OVERHEAD + self.operations() / RATE

    def operations(self) -> int:
        """Floating-point operations: of three forward passes a step, and of its teacher's."""
        config, crop = self.config, self.config.data.lr_crop
        operations = 3 * flops(config.model, crop)
        if self.teacher is not None:
            operations += flops(self.teacher.config.model, crop)
        elif config.distill.teacher is not None:
            passes = 8 if config.distill.self_ensemble else 1
            # All weights with a name belong to the paper's student, or to one for another scale.
            operations += passes * flops(TrainConfig().model, crop)
        return config.steps * config.data.batch_size * operations

    def run(self, place: Place) -> Facts:
        """Trains and scores. A run that diverges has no scores."""
        config = self.resolved(place)
        try:
            directory = train(config)
        except TrainingError as error:
            return {"diverged": str(error).partition(";")[0]}  # the rest names local files
        lines = report.read_metrics(directory / "metrics.jsonl")
        weights = load_weights(directory)
        model = weights.model()
        costs = cost(weights.config, COST_SIZE, COST_SIZE)
        facts = checkpoint.load_facts(directory)
        source = facts.pop("sources")["data"]
        return {
            "config": checkpoint.flat(facts),
            "data": source,
            "scores": _last(lines, "val_psnr_y", directory) | score(model, place),
            "curve": [[x["step"], round(x["val_psnr_y"], 4)] for x in lines if "val_psnr_y" in x],
            "parameters": parameter_count(model),
            **costs._asdict(),
            "training_seconds": round(_seconds(lines), 1),
        }

    def resolved(self, place: Place) -> TrainConfig:
        """The configuration of the run."""
        config = self.config
        paths = {name: getattr(place.data, name) for name in ("hr_dirs", "data_dir", "prepared")}
        paths |= {"dataset": place.data.dataset, "val_images": place.data.val_images}
        distill, optim = config.distill, config.optim
        if self.teacher is not None:
            distill = dataclasses.replace(distill, teacher=self.teacher.weights(place))
        if self.tuned_by is not None:
            rate = self.tuned_by.choice(place).config.optim.learning_rate
            optim = dataclasses.replace(optim, learning_rate=rate)
        return dataclasses.replace(
            config,
            workdir=place.work / self.id,
            seed=self.seed,
            data=dataclasses.replace(config.data, **paths),
            distill=distill,
            optim=optim,
        )

    def weights(self, place: Place) -> Path:
        """Where its weights are.

        Raises:
            UserError: they are not here, although the result may be.
        """
        directory = checkpoint.phase_directory(self.resolved(place))
        if not (directory / "checkpoints").is_dir():
            raise UserError(
                f"{directory}: the weights of {self} are needed, but only its result is here; "
                f"train it again by removing {place.results / self.id}.json"
            )
        return directory

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Best(Task):
    """The best by validation among training runs that differ in their learning rate."""

    name: str
    candidates: tuple[Training, ...]

    kind = "best"

    @property
    def needs(self) -> tuple[Task, ...]:
        """See Task."""
        return self.candidates

    @property
    def facts(self) -> Facts:
        """See Task."""
        return {"candidates": [candidate.id for candidate in self.candidates]}

    def seconds(self) -> float:
        """See Task."""
        return 0.0

    def choice(self, place: Place) -> Training:
        """The best candidate.

        Raises:
            UserError: all of them diverged.
        """
        scores = {}
        for candidate in self.candidates:
            result = read_result(candidate, place)
            if "scores" in result:
                scores[candidate] = result["scores"]["validation"]["psnr_y"]
        if not scores:
            raise UserError(f"{self.name}: every learning rate diverged; try lower ones")
        return max(scores, key=scores.__getitem__)

    def run(self, place: Place) -> Facts:
        """The best candidate's result."""
        chosen = self.choice(place)
        return {"chosen": chosen.id, **read_result(chosen, place)}

    def weights(self, place: Place) -> Path:
        """See Training."""
        return self.choice(place).weights(place)


@functools.cache
def flops(config: NetworkConfig, side: int) -> int:
    """Floating-point operations of upscaling a square picture."""
    costs = cost(config, side, side)
    return 2 * costs.macs + costs.scan_flops


def score(model: networks.Network, place: Place) -> dict[str, dict[str, float]]:
    """PSNR-Y and SSIM-Y on each benchmark."""
    upscale, scale = make_upscaler(model), model.config.scale
    scores = {}
    for name, benchmark in evaluation.find_benchmarks(place.benchmarks, scale).items():
        means, _ = evaluation.evaluate(upscale, benchmark, scale, name=name)
        scores[name] = {metric: round(means[metric], 5) for metric in ("psnr_y", "ssim_y")}
    return scores


def _last(lines: list[dict[str, Any]], key: str, directory: Path) -> dict[str, dict[str, float]]:
    values = [line[key] for line in lines if key in line]
    if not values:
        raise UserError(f"{directory / 'metrics.jsonl'}: has no validation; remove {directory}")
    return {"validation": {"psnr_y": round(values[-1], 5)}}


def _seconds(lines: list[dict[str, Any]]) -> float:
    """The time that the steps took, without validation and interruptions."""
    total, before = 0.0, 0
    for line in lines:
        if "steps_per_second" in line:
            total += (line["step"] - before) / line["steps_per_second"]
            before = line["step"]
    return total
