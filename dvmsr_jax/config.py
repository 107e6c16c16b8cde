"""Every setting of a model and of a training run, as frozen dataclasses; `configs/` fills them."""

import dataclasses
import math
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dvmsr_jax.errors import UserError
from kernels.selective_scan import Implementation


@dataclass(frozen=True)
class ModelConfig:
    """What the weights belong to. The defaults are the paper's student."""

    scale: Literal[2, 3, 4] = 4
    """Upscaling factor."""
    channels: int = 60
    """Width c of the residual stream."""
    rssbs: int = 4
    """Number of RSSBs (residual state-space blocks)."""
    vimms_per_rssb: int = 2
    """ViMMs (Vision-Mamba modules) in each RSSB."""
    states: int = 16
    """Scan states n of each inner channel."""
    expand: int = 2
    """Inner channels d of a ViMM, as a multiple of c."""
    conv_width: int = 4
    """Taps of the ViMM's causal convolution."""
    bidirectional: bool = False
    """Scan the tokens in both directions, as Vision Mamba does; the published DVMSR does not."""
    drop_path: float = 0.1
    """Chance of dropping the last ViMM's input in training; it grows linearly from 0 over depth."""

    @property
    def inner_channels(self) -> int:
        """Width d of a ViMM's scan."""
        return self.expand * self.channels

    @property
    def delta_rank(self) -> int:
        """Rank of the projection that makes delta, as Mamba's code has it: c / 16, rounded up."""
        return math.ceil(self.channels / 16)

    @property
    def vimms(self) -> int:
        """Number of ViMMs in all."""
        return self.rssbs * self.vimms_per_rssb


@dataclass(frozen=True)
class Compute:
    """How a network is computed. Changes time and memory, and the result by rounding only."""

    scan: Implementation = "auto"
    """Implementation of the selective scan; see kernels/selective_scan."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of convolutions and projections. Parameters, norms, residuals and the scan's state are
    float32 always: activations grow to some 1,600, where bfloat16 has steps of 8."""

    @property
    def products(self) -> Literal["highest"] | None:
        """JAX's precision of products of this type. Its default rounds float32's factors: on GPUs
        to TensorFloat-32, on TPUs to bfloat16."""
        return "highest" if self.precision == "float32" else None


@dataclass(frozen=True)
class DataConfig:
    """Where the training pictures come from and how batches are cut from them."""

    hr_dirs: tuple[Path, ...] = ()
    """Folders of high-resolution pictures, searched recursively. None: `dataset`."""
    dataset: Literal["div2k", "df2k"] = "div2k"
    """Pictures to download, without `hr_dirs` and `prepared`. div2k: DIV2K (4 GB). df2k: DIV2K and
    Flickr2K, as in the paper; its archive also contains low-resolution pictures."""
    data_dir: Path = Path("~/tensorflow_datasets")
    """Where pictures are downloaded to and prepared, once."""
    prepared: Path | None = None
    """A folder made by `python -m dvmsr_jax.data prepare`, instead of `hr_dirs`."""
    val_images: int = 20
    """Pictures kept apart from training for validation, if they are prepared now."""
    lr_crop: int = 64
    """Side of the square low-resolution training crops, in pixels."""
    batch_size: int = 128
    """Crops a step, over all devices."""
    workers: int = 2
    """Threads that load and augment ahead of the training step."""
    cache: Literal["none", "device"] = "none"
    """none: stream crops from disk. device: keep all sub-images in device memory and crop there."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam, its learning rate over time, and the average of the weights."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["halving", "cosine"] = "halving"
    """halving: the paper's, at 50, 80, 90 and 95% of the steps. cosine: to zero at the end."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises from zero."""
    b1: float = 0.9
    """Adam's decay of the gradient's mean."""
    b2: float = 0.99
    """Adam's decay of its square's."""
    clip: float = 1.0
    """Largest global norm of a gradient; larger ones are scaled down to it. 0: no clipping."""
    accumulate: int = 1
    """Parts of a batch that follow one another, to save memory; the result is that of the whole."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average, which validation and export use."""


@dataclass(frozen=True)
class DistillConfig:
    """The student phase's second loss: L1 between student and teacher."""

    teacher: Path | None = None
    """Teacher checkpoint. None: the teacher phase's under the same workdir."""
    weight: float = 1.0
    """Factor lambda of the distillation loss."""
    level: Literal["output", "mid"] = "output"
    """output: compare the pictures. mid: compare the outputs of `rssbs`, projected to fit."""
    rssbs: tuple[tuple[int, int], ...] = ()
    """For level mid: (student's, teacher's) RSSBs to pair, counted from 0. None: evenly."""
    targets: Literal["online", "precomputed"] = "online"
    """For level output. online: run the teacher on each batch. precomputed: crop its outputs for
    the whole sub-images, which `python -m dvmsr_jax.training distill` makes once."""
    self_ensemble: bool = False
    """For level output: average the teacher over the eight flips and turns, a better one."""


@dataclass(frozen=True)
class TrainConfig:
    """One training phase."""

    phase: Literal["teacher", "student"] = "student"
    """teacher: L1 to the HR pictures. student: the same plus distillation."""
    workdir: Path = Path("runs/dvmsr")
    """Checkpoints, metrics and samples go to WORKDIR/PHASE."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    steps: int = 500_000
    """Optimizer steps; learning-rate milestones scale with it."""
    seed: int = 0
    """Seed of the initial weights, the batches and drop-path."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = field(default_factory=Compute)
    remat: bool = False
    """Keep no activations inside RSSBs, but compute them again in the backward pass."""
    log_every: int = 100
    """Steps between lines of metrics."""
    val_every: int = 5_000
    """Steps between validations, each with a checkpoint."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, besides the best by validation."""


@dataclass(frozen=True)
class Cluster:
    """The processes of a run on several machines. Those of SLURM and Open MPI 4, one for each
    GPU, and of a TPU pod are found without these."""

    coordinator_address: str | None = None
    """HOST:PORT of the first process, the same for all."""
    num_processes: int | None = None
    """How many there are. 1, alone: this one, whatever surrounds it."""
    process_id: int | None = None
    """Which one this is, from 0."""
    timeout: int = 300
    """Seconds to wait for the others."""


# What a run's numbers have to lie within: from the first up, and below the second.
_LIMITS = {
    "steps": (1, math.inf),
    "seed": (0, 2**32),
    "log_every": (1, math.inf),
    "val_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "keep_checkpoints": (1, math.inf),
    "data.val_images": (1, math.inf),
    "data.lr_crop": (1, math.inf),
    "data.batch_size": (1, math.inf),
    "data.workers": (0, math.inf),
    "optim.learning_rate": (0, math.inf),
    "optim.warmup": (0, 1),
    "optim.b1": (0, 1),
    "optim.b2": (0, 1),
    "optim.clip": (0, math.inf),
    "optim.accumulate": (1, math.inf),
    "optim.ema_decay": (0, 1),
    "distill.weight": (0, math.inf),
}


# Options that other options leave without a use: (level, which they are for, their names).
_OF_LEVEL = (("output", ("targets", "self_ensemble")), ("mid", ("rssbs",)))


def check(config: TrainConfig) -> None:
    """Raises UserError, naming them, if options are out of range or exclude each other."""
    check_model(config.model)
    problems = []
    for name, (low, high) in _LIMITS.items():
        value = operator.attrgetter(name)(config)
        if not low <= value < high:
            below = "" if high == math.inf else f" and below {high}"
            problems.append(f"{name} is {value}, expected from {low} up{below}")
    if config.phase == "teacher":
        problems += [
            f"--distill.{field.name.replace('_', '-')} is for --phase=student only"
            for field in dataclasses.fields(DistillConfig)
            if getattr(config.distill, field.name) != field.default
        ]
    for level, names in _OF_LEVEL:
        for name in names:
            given = getattr(config.distill, name) != getattr(DistillConfig, name)
            if given and config.distill.level != level:
                problems.append(f"distill.{name} is for distill.level={level} only")
    if problems:
        raise UserError("; ".join(problems))


def check_model(config: ModelConfig) -> None:
    """Raises UserError, naming what is wrong, if there is no such model.

    Of any types, because a configuration may come from a file.
    """
    sizes = dataclasses.asdict(config)
    bidirectional, drop_path = sizes.pop("bidirectional"), sizes.pop("drop_path")
    problems = [
        f"{name} is {size!r}, not a whole number from 1 up"
        for name, size in sizes.items()
        if type(size) is not int or size < 1
    ]
    if not problems and config.scale not in (2, 3, 4):
        problems.append(f"scale is {config.scale!r}, not 2, 3 or 4")
    if type(bidirectional) is not bool:
        problems.append(f"bidirectional is {bidirectional!r}, not true or false")
    if not isinstance(drop_path, int | float) or not 0 <= drop_path < 1:
        problems.append(f"drop_path is {drop_path!r}, not within [0, 1)")
    if problems:
        raise UserError("there is no such model: " + "; ".join(problems))
