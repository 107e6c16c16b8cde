"""Every setting of a model and of a training run, as frozen dataclasses; `configs/` fills them."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from dvmsr_jax.errors import UserError
from dvmsr_jax.kernels.selective_scan import Implementation


@dataclass(frozen=True)
class Within:
    """Marks a numeric field with its range: at least `low`, and less than `below`."""

    low: int | float
    below: int | float = math.inf


@dataclass(frozen=True)
class ForLevel:
    """Marks a field of DistillConfig that applies to this level only."""

    level: str


class Effect(enum.Enum):
    """Marks a field with what depends on it. Fields inside it inherit the mark by default."""

    RESULT = "the result"
    """The default: it can change during a run only with --allow-changes."""
    SHAPES = "the shapes of the weights"
    """It cannot change during a run."""
    NOTHING = "nothing but speed, or where files are"
    """It can change during a run."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network that weights belong to, of any kind; `model.NETWORKS` lists the kinds.

    Each kind but DVMSR has a field `network`, its name in files.
    """

    scale: Literal[2, 3, 4] = 4
    """Upscaling factor."""
    channels: Annotated[int, Within(1)] = 60
    """Width c of the residual stream."""

    def __post_init__(self) -> None:
        # From a file, the values may be of any type.
        if problems := list(_problems(self)):
            raise UserError("there is no such model: " + "; ".join(problems))

    @property
    def blocks(self) -> int:
        """Number of residual blocks, whose outputs are among the network's features."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModelConfig(NetworkConfig):
    """A DVMSR. The defaults are the paper's student."""

    rssbs: Annotated[int, Within(1)] = 4
    """Number of RSSBs (residual state-space blocks)."""
    vimms_per_rssb: Annotated[int, Within(1)] = 2
    """ViMMs (Vision-Mamba modules) in each RSSB."""
    states: Annotated[int, Within(1)] = 16
    """Scan states n of each inner channel."""
    expand: Annotated[int, Within(1)] = 2
    """Inner channels d of a ViMM, as a multiple of c."""
    conv_width: Annotated[int, Within(1)] = 4
    """Taps of the ViMM's causal convolution."""
    bidirectional: bool = False
    """Scan the tokens in both directions, as Vision Mamba does; the published DVMSR does not."""
    drop_path: Annotated[float, Within(0, 1), Effect.RESULT] = 0.1
    """Chance of dropping the last ViMM's input in training; it grows linearly from 0 over depth."""

    @property
    def blocks(self) -> int:
        """See NetworkConfig."""
        return self.rssbs

    @property
    def inner_channels(self) -> int:
        """Width d of a ViMM's scan."""
        return self.expand * self.channels

    @property
    def delta_rank(self) -> int:
        """Rank of the projection that makes delta, as in Mamba's code: c / 16, rounded up."""
        return math.ceil(self.channels / 16)

    @property
    def vimms(self) -> int:
        """Total number of ViMMs."""
        return self.rssbs * self.vimms_per_rssb


@dataclass(frozen=True)
class Compute:
    """How a network is computed. It affects time and memory, and the result only by rounding."""

    scan: Annotated[Implementation, Effect.NOTHING] = "auto"
    """Implementation of the selective scan; see kernels/selective_scan. With auto, inference on
    CPUs also uses kernels/vimm and kernels/conv3x3."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of convolutions and projections. Parameters, norms, residuals and the scan's state are
    always float32: activations reach about 1,600, where bfloat16 has steps of 8."""

    @property
    def may_be_native(self) -> bool:
        """Whether whole layers may be computed in C++, where that is possible."""
        return self.scan == "auto"

    @property
    def products(self) -> Literal["highest"] | None:
        """JAX's precision of products of this type. Its default rounds float32's factors: on GPUs
        to TensorFloat-32, on TPUs to bfloat16."""
        return "highest" if self.precision == "float32" else None


@dataclass(frozen=True)
class DataConfig:
    """Where the training pictures come from and how batches are cut from them."""

    # Checkpoints identify the pictures by their content, under "sources"; paths do not matter.
    hr_dirs: Annotated[tuple[Path, ...], Effect.NOTHING] = ()
    """Folders of high-resolution pictures, searched recursively. None: download `dataset`."""
    dataset: Annotated[Literal["div2k", "df2k"], Effect.NOTHING] = "div2k"
    """Pictures to download, without `hr_dirs` or `prepared`. div2k: DIV2K (4 GB). df2k: DIV2K and
    Flickr2K, as in the paper; its archive also contains low-resolution pictures."""
    data_dir: Annotated[Path, Effect.NOTHING] = Path("~/tensorflow_datasets")
    """Where pictures are downloaded to and prepared, once."""
    prepared: Annotated[Path | None, Effect.NOTHING] = None
    """A folder made by `dvmsr data prepare`, instead of `hr_dirs`."""
    val_images: Annotated[int, Within(1), Effect.NOTHING] = 20
    """Pictures held out for validation; without effect if `prepared` is given."""
    max_unreadable: Annotated[float, Within(0, 1), Effect.NOTHING] = 0.01
    """Largest share of the pictures that may be skipped because they cannot be read."""
    lr_crop: Annotated[int, Within(1)] = 64
    """Side of the square low-resolution training crops, in pixels."""
    batch_size: Annotated[int, Within(1)] = 128
    """Crops per step, over all devices."""
    workers: Annotated[int, Within(0), Effect.NOTHING] = 2
    """Threads that load and augment crops ahead of the training step."""
    cache: Annotated[Literal["none", "device"], Effect.NOTHING] = "none"
    """none: stream crops from disk. device: keep all sub-images in device memory and crop there.
    Either way, degraded and zoomed crops are made by the host, from disk."""
    degradation: Literal["clean", "mild", "real"] = "clean"
    """How LR crops are made. clean: bicubic. mild: most with slight blur, noise or JPEG. real:
    more and stronger, as in Real-ESRGAN and DASR. Validation pictures are degraded, too."""
    zoom_in: Annotated[float, Within(0, 1)] = 0.0
    """For --phase=student: the share of crops zoomed in on. These are cut from the HR picture as if
    it were LR. Zoomed crops are not degraded, and only distilled, because they have no HR."""
    zoom_out: Annotated[float, Within(0, 1)] = 0.0
    """For --phase=student: the share of crops zoomed out. These are whole sub-images, reduced to a
    crop's size. Smaller crops zoom out further."""

    def __post_init__(self) -> None:
        check_fields(self, "--data.")
        if self.zoom_in + self.zoom_out > 1:
            raise UserError(
                f"--data.zoom-in {self.zoom_in} and --data.zoom-out {self.zoom_out} are shares of "
                "the same crops; their sum must be at most 1"
            )

    @property
    def zooms(self) -> bool:
        """Whether some crops are zoomed."""
        return self.zoom_in > 0 or self.zoom_out > 0

    @property
    def lr_is_stored(self) -> bool:
        """Whether every LR crop is a part of the record's LR."""
        return self.degradation == "clean" and not self.zooms


@dataclass(frozen=True)
class OptimConfig:
    """Adam, its learning rate over time, and the average of the weights."""

    learning_rate: Annotated[float, Within(0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["halving", "cosine"] = "halving"
    """halving: the paper's, at 50, 80, 90 and 95% of the steps. cosine: to zero at the end."""
    warmup: Annotated[float, Within(0, 1)] = 0.0
    """Share of the steps in which the learning rate rises from zero."""
    b1: Annotated[float, Within(0, 1)] = 0.9
    """Adam's decay of the gradient's mean."""
    b2: Annotated[float, Within(0, 1)] = 0.99
    """Adam's decay of the squared gradient's mean."""
    clip: Annotated[float, Within(0)] = 1.0
    """Largest global norm of a gradient; larger ones are scaled down to it. 0: no clipping."""
    accumulate: Annotated[int, Within(1), Effect.NOTHING] = 1
    """Parts in which a batch is processed one by one, to save memory; the result is the same."""
    ema_decay: Annotated[float, Within(0, 1)] = 0.999
    """Decay of the weights' moving average, which validation and export use."""

    def __post_init__(self) -> None:
        check_fields(self, "--optim.")


@dataclass(frozen=True)
class DistillConfig:
    """The student phase's second loss: L1 between student and teacher."""

    teacher: Annotated[Path | None, Effect.NOTHING] = None
    """The teacher's weights, given as for --init. None: the teacher phase's in the same workdir."""
    weight: Annotated[float, Within(0)] = 1.0
    """Factor lambda of the distillation loss."""
    level: Annotated[Literal["output", "mid"], Effect.SHAPES] = "output"
    """output: compare the pictures. mid: compare the outputs of `rssbs`, projected to fit."""
    rssbs: Annotated[tuple[tuple[int, int], ...], ForLevel("mid"), Effect.SHAPES] = ()
    """For level mid: pairs of (student's, teacher's) RSSBs, counted from 0. None: spread evenly."""
    targets: Annotated[Literal["online", "precomputed"], ForLevel("output")] = "online"
    """For level output. online: run the teacher on each batch. precomputed: crop its outputs for
    whole sub-images, computed once by `dvmsr data distill`."""
    self_ensemble: Annotated[bool, ForLevel("output")] = False
    """For level output: average the teacher over the eight flips and rotations: better targets."""

    def __post_init__(self) -> None:
        check_fields(self, "--distill.")
        for name, (_, *marks) in _annotations(DistillConfig).items():
            for mark in marks:
                if isinstance(mark, ForLevel) and mark.level != self.level and self._given(name):
                    raise UserError(
                        f"--distill.{_option(name)} is for --distill.level={mark.level} only"
                    )

    def given(self) -> list[str]:
        """The options that differ from their defaults."""
        names = _annotations(DistillConfig)
        return [f"--distill.{_option(name)}" for name in names if self._given(name)]

    def _given(self, name: str) -> bool:
        return getattr(self, name) != getattr(DistillConfig, name)


@dataclass(frozen=True)
class LossConfig:
    """The loss between the upscaled crops and their HR pictures."""

    pixel: Literal["l1", "charbonnier", "l2"] = "l1"
    """l1: the paper's. charbonnier: L1, smooth near zero (about 1e-3). l2: mean squared error."""
    fft_weight: Annotated[float, Within(0)] = 0.0
    """Weight of the L1 between their two-dimensional Fourier transforms; SAFMN uses 0.05."""

    def __post_init__(self) -> None:
        check_fields(self, "--loss.")


@dataclass(frozen=True)
class TrainConfig:
    """One training phase."""

    phase: Annotated[Literal["teacher", "student"], Effect.SHAPES] = "student"
    """teacher: the loss against the HR pictures. student: the same plus distillation."""
    workdir: Annotated[Path, Effect.NOTHING] = Path("runs/dvmsr")
    """Folder for checkpoints, metrics and samples, which go to WORKDIR/PHASE."""
    model: Annotated[NetworkConfig, Effect.SHAPES] = field(default_factory=ModelConfig)
    # Checkpoints identify the weights by their content, under "sources"; paths do not matter.
    init: Annotated[Path | None, Effect.NOTHING] = None
    """Weights to start from instead of random ones: a name, a checkpoint directory, a .safetensors
    or a .pth file. For another scale, the last convolution starts at random."""
    init_partial: Annotated[bool, Effect.NOTHING] = False
    """If the weights for --init have another depth or width, use the parameters that fit."""
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    steps: Annotated[int, Within(1)] = 500_000
    """Optimizer steps; learning-rate milestones scale with it."""
    seed: Annotated[int, Within(0, 2**32)] = 0
    """Seed of the initial weights, the batches and drop-path."""
    compute: Annotated[Compute, tyro.conf.arg(name="")] = field(default_factory=Compute)
    remat: Annotated[bool, Effect.NOTHING] = False
    """Recompute the activations inside RSSBs in the backward pass instead of keeping them."""
    log_every: Annotated[int, Within(1), Effect.NOTHING] = 100
    """Steps between lines of metrics."""
    val_every: Annotated[int, Within(1), Effect.NOTHING] = 5_000
    """Steps between validations, each with a checkpoint."""
    checkpoint_every: Annotated[int, Within(1), Effect.NOTHING] = 5_000
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Within(1), Effect.NOTHING] = 3
    """Number of newest checkpoints to keep, besides the best by validation."""

    def __post_init__(self) -> None:
        check_fields(self, "--")
        if self.phase == "teacher" and (given := self.distill.given()):
            raise UserError(f"{', '.join(given)}: for --phase=student only")
        if self.init_partial and self.init is None:
            raise UserError("--init-partial is for --init only")
        if self.distill.targets == "precomputed" and self.data.degradation != "clean":
            raise UserError(
                "--distill.targets=precomputed is for clean crops only; with "
                f"--data.degradation={self.data.degradation}, use --distill.targets=online"
            )
        if self.data.zooms and (self.phase == "teacher" or self.distill.targets == "precomputed"):
            raise UserError(
                "--data.zoom-in and --data.zoom-out are for --phase=student with "
                "--distill.targets=online only, because zoomed crops have no other target"
            )


@dataclass(frozen=True)
class Cluster:
    """The processes of a run on several machines. Not needed under SLURM or Open MPI 4, with one
    process per GPU, or on a TPU pod: there, the processes are found automatically."""

    coordinator_address: str | None = None
    """HOST:PORT of the first process; the same for all."""
    num_processes: int | None = None
    """Number of processes. 1, given alone: only this one, regardless of the environment."""
    process_id: int | None = None
    """Number of this process, from 0."""
    timeout: int = 300
    """Seconds to wait for the other processes."""


def check_fields(config: Any, prefix: str) -> None:
    """Raises UserError if a field has the wrong type or is out of range.

    The message names options, with `prefix`. Only numbers, booleans and choices are checked.
    """
    if problems := list(_problems(config, lambda name: prefix + _option(name))):
        raise UserError("; ".join(problems))


def effects(config: Any, inherited: Effect = Effect.RESULT, prefix: str = "") -> dict[str, Effect]:
    """What depends on each field of a configuration, by names like "optim.schedule"."""
    found: dict[str, Effect] = {}
    for name, (_, *marks) in _annotations(config.__class__).items():
        effect = next((mark for mark in marks if isinstance(mark, Effect)), inherited)
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            found |= effects(value, effect, f"{prefix}{name}.")
        else:
            found[prefix + name] = effect
    return found


def _problems(config: Any, label: Callable[[str], str] = str) -> Iterator[str]:
    for name, (kind, *marks) in _annotations(config.__class__).items():
        value = getattr(config, name)
        limits = next((mark for mark in marks if isinstance(mark, Within)), Within(-math.inf))
        if not _allowed(value, kind, limits):
            yield f"{label(name)} is {value!r}, not {_expected(kind, limits)}"


def _allowed(value: Any, kind: Any, limits: Within) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is bool:
        return type(value) is bool
    if kind is int or kind is float:
        right = type(value) is int or (kind is float and isinstance(value, float))
        return right and limits.low <= value < limits.below
    return True


def _expected(kind: Any, limits: Within) -> str:
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}"
    if kind is bool:
        return "true or false"
    if limits.below < math.inf:
        return f"within [{limits.low}, {limits.below})"
    return f"a {'whole ' if kind is int else ''}number from {limits.low} up"


@functools.cache
def _annotations(config: Any) -> dict[str, tuple[Any, ...]]:
    """For each field, its type and the marks beside it."""
    hints = get_type_hints(config, include_extras=True)
    names = [field.name for field in dataclasses.fields(config)]
    return {
        name: get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        for name in names
    }


def _option(name: str) -> str:
    return name.replace("_", "-")
