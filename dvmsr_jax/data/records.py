"""Prepared records: aligned sub-images, as a TFDS dataset in ArrayRecord files.

Their folder also contains PREPARATION, which lists the pictures in each shard (file of records).
"""

import bisect
import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from tensorflow_datasets.proto import tf_example_pb2

from dvmsr_jax.errors import UserError
from dvmsr_jax.files import write_json

# Side of a stored HR sub-image, before rounding down to a multiple of the scale. Larger than the
# paper's 256x256 crops, so that their position varies, but small enough to be read for a single
# crop.
SUB_IMAGE = 320
NAME = "sr_sub_images"
PREPARATION = "preparation.json"


class DataError(UserError):
    """Training data are missing or unusable; the message names them and says what to do."""


@dataclass(frozen=True)
class PictureInfo:
    """A picture that records were cut from: its path, LR size and number of records."""

    name: str
    lr_height: int
    lr_width: int
    records: int

    @classmethod
    def from_json(cls, stored: Any) -> "PictureInfo":
        """The inverse of `asdict`. Raises ValueError if `stored` is something else."""
        match stored:
            case {
                "name": str(name),
                "lr_height": int(height),
                "lr_width": int(width),
                "records": int(records),
            }:
                return cls(name, height, width, records)
        raise ValueError("its description of a picture is invalid")


@dataclass(frozen=True)
class ShardInfo:
    """A file of records: their number, its size, and the pictures they were cut from, in order."""

    key: str
    """A hash of the pictures' fingerprints and of the sizes of the sub-images."""
    split: str
    records: int
    bytes: int
    sha256: str
    pictures: tuple[PictureInfo, ...]
    left_out: tuple[str, ...]
    """A line for each picture that could not be read, with its name."""

    @classmethod
    def from_json(cls, stored: Any) -> "ShardInfo":
        """The inverse of `asdict`. Raises ValueError if `stored` is something else."""
        match stored:
            case {
                "key": str(key),
                "split": str(split),
                "records": int(records),
                "bytes": int(size),
                "sha256": str(sha256),
                "pictures": list(pictures),
                "left_out": list(left_out),
            } if all(isinstance(line, str) for line in left_out):
                infos = tuple(map(PictureInfo.from_json, pictures))
                return cls(key, split, records, size, sha256, infos, tuple(left_out))
        raise ValueError("its description of a file of records is invalid")


@dataclass(frozen=True)
class Preparation:
    """The content of PREPARATION: how a folder of records was made; shards by file name."""

    scale: int
    shards: dict[str, ShardInfo]

    @classmethod
    def read(cls, folder: Path) -> "Preparation":
        """Raises DataError if there are no prepared records, or PREPARATION is damaged."""
        try:
            match json.loads((folder / PREPARATION).read_text()):
                case {"scale": int(scale), "shards": dict(shards)}:
                    infos = {name: ShardInfo.from_json(shard) for name, shard in shards.items()}
                    return cls(scale, infos)
            raise ValueError(f"{PREPARATION} was not written by `prepare`")
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{folder}: holds no prepared records ({PREPARATION}: {error}); make them with\n"
                f"  dvmsr data prepare --hr-dirs DIR [DIR ...] --out {folder}"
            ) from error

    def write(self, folder: Path) -> None:
        """Writes what `read` returns."""
        write_json(folder / PREPARATION, asdict(self))

    def of_split(self, split: str) -> dict[str, ShardInfo]:
        """The shards of "train" or "val"."""
        return {name: shard for name, shard in self.shards.items() if shard.split == split}


class Records(NamedTuple):
    """Random-access sequences of sub-images, and their folder.

    Each is {"hr": (S, S, 3) uint8, "lr": (S / scale, S / scale, 3) uint8, "name": bytes}, where S
    is hr_side(scale), and the name is the picture's path.
    """

    train: Sequence[dict[str, Any]]
    val: Sequence[dict[str, Any]]
    folder: Path


class SubImages(Sequence[dict[str, Any]]):
    """Records, read from disk on use.

    `source` contains the serialized records; `shards` are its files and their numbers of records.
    """

    # Not Sequence[bytes]: the tests' type checks would read from the files.
    def __init__(self, source: Sequence[Any] | ArrayRecordDataSource, shards: Mapping[Path, int]):
        self._source = source
        self._paths = list(shards)
        self._stops = list(itertools.accumulate(shards.values()))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self._source[index]
        except RuntimeError as error:
            path = self._paths[bisect.bisect(self._stops, index)]
            raise DataError(
                f"{path}: cannot be read ({error}); to find all damage, run\n"
                f"  dvmsr data check {path.parent}"
            ) from error
        return _decode(record)


def hr_side(scale: int) -> int:
    """Side of the stored HR sub-images."""
    return SUB_IMAGE // scale * scale


def sub_images(
    lr: UInt8[np.ndarray, "h w 3"], hr: UInt8[np.ndarray, "H W 3"], side: int, scale: int
) -> Iterator[tuple[UInt8[np.ndarray, "_ _ 3"], UInt8[np.ndarray, "_ _ 3"]]]:
    """(LR, HR) squares of `side` HR pixels that cover the picture, overlapping as needed.

    Smaller pictures are extended by reflection.
    """
    lr_side = side // scale
    pad = [(0, max(lr_side - size, 0)) for size in lr.shape[:2]]
    lr = np.pad(lr, (*pad, (0, 0)), "symmetric")
    hr = np.pad(hr, (*((0, after * scale) for _, after in pad), (0, 0)), "symmetric")

    def offsets(size):
        count = math.ceil(size / lr_side)
        return np.linspace(0, size - lr_side, count).round().astype(int)

    for y in offsets(lr.shape[0]):
        for x in offsets(lr.shape[1]):
            yield (
                lr[y : y + lr_side, x : x + lr_side],
                hr[y * scale : y * scale + side, x * scale : x * scale + side],
            )


def _features(scale: int) -> tfds.features.FeaturesDict:
    def square(side):
        # Raw bytes: decoding PNG would take several times longer than everything else.
        return tfds.features.Tensor(
            shape=(side, side, 3), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )

    side = hr_side(scale)
    return tfds.features.FeaturesDict(
        {"lr": square(side // scale), "hr": square(side), "name": tfds.features.Text()}
    )


class ShardWriter:
    """Writes records to one file of a split. Raises OSError if the disk is full."""

    def __init__(self, path: Path):
        # Compression would halve the size of photographs, but triple the time to read them.
        self._writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")

    def write(
        self, lr: UInt8[np.ndarray, "h w 3"], hr: UInt8[np.ndarray, "H W 3"], name: str
    ) -> None:
        """Appends a record."""
        values = {"hr": hr.tobytes(), "lr": lr.tobytes(), "name": os.fsencode(name)}
        example = tf_example_pb2.Example()
        for key, value in values.items():
            example.features.feature[key].bytes_list.value.append(value)
        # TFDS's own `serialize_example` writes the fields in a different order in every process.
        record = example.SerializeToString(deterministic=True)
        with _as_os_error():
            self._writer.write(record)

    def close(self) -> None:
        """Completes the file."""
        with _as_os_error():
            self._writer.close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def open_shard(path: Path) -> SubImages:
    """The records in one file."""
    source = ArrayRecordDataSource(os.fspath(path))
    return SubImages(source, {path: len(source)})


def _decode(record: bytes) -> dict[str, Any]:
    """{"hr", "lr", "name"} of a serialized tf.train.Example, without copying the pixels.

    protobuf's own parser copies them twice, which takes longer than reading the record.
    """
    (features,) = _messages(memoryview(record))
    values: dict[str, Any] = {}
    for entry in _messages(features):
        key, feature = _messages(entry)
        (bytes_list,) = _messages(feature)
        (values[bytes(key).decode()],) = _messages(bytes_list)
    for name in ("lr", "hr"):
        pixels = np.frombuffer(values[name], np.uint8)
        side = math.isqrt(len(pixels) // 3)
        values[name] = pixels.reshape(side, side, 3)
    return values | {"name": bytes(values["name"])}


def _messages(message: memoryview) -> Iterator[memoryview]:
    """The fields of a protobuf message that consists of strings and messages only."""
    position = 0
    while position < len(message):
        position += 1  # the field's number and kind
        length, shift, more = 0, 0, True
        while more:
            length |= (message[position] & 0x7F) << shift
            more = message[position] >= 0x80
            position, shift = position + 1, shift + 7
        yield message[position : position + length]
        position += length


def shard_name(split: str, index: int, count: int) -> str:
    """TFDS's name for a file of a split."""
    return f"{NAME}-{split}.array_record-{index:05}-of-{count:05}"


def write_metadata(folder: Path, scale: int, shards: dict[str, list[tuple[int, int]]]) -> None:
    """Makes a folder of shards a TFDS dataset; `shards` are (records, bytes), by split."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=NAME, filetype_suffix="array_record"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(scale),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[records for records, _ in sizes],
                num_bytes=sum(size for _, size in sizes),
                filename_template=template.replace(split=split),
            )
            for split, sizes in shards.items()
        ],
        filename_template=template,
        check_data=False,
        description="Aligned low- and high-resolution sub-images.",
    )


def identity(folder: Path) -> str:
    """12 hex digits that identify the content of a folder of records.

    They depend on the pictures, their order, which of them were read and which were held out for
    validation, and on the scale, but not on the location of the folder and the pictures.

    Raises:
        DataError: it is not a folder of prepared records.
    """
    preparation = Preparation.read(folder)
    # A shard's key covers all its pictures, including those left out. Only the names in their paths
    # are the same everywhere.
    contents = [
        (
            shard.split,
            shard.key,
            [(Path(picture.name).name, picture.records) for picture in shard.pictures],
        )
        for shard in preparation.shards.values()
    ]
    text = json.dumps([preparation.scale, contents])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe_change(folder: Path, before: str) -> str:
    """Describes how the pictures in a folder of records differ from those of an earlier one.

    The earlier folder, whose identity is `before`, is searched for beside the folder. Pictures are
    compared by name and size.
    """
    now = Preparation.read(folder)
    earlier = None
    for path in folder.absolute().parent.iterdir():
        with contextlib.suppress(DataError):
            if (path / PREPARATION).exists() and identity(path) == before:
                earlier = Preparation.read(path)
                break
    if earlier is None:
        count = sum(len(shard.pictures) for shard in now.shards.values())
        return f"{count:,} pictures now; the earlier folder is no longer beside {folder}"
    if earlier.scale != now.scale:
        return f"prepared for x{earlier.scale} there, for x{now.scale} now"

    def pictures(preparation: Preparation, form: Callable[[ShardInfo, PictureInfo], Any]):
        shards = preparation.shards.values()
        return collections.Counter(form(s, picture) for s in shards for picture in s.pictures)

    def more(a: Preparation, b: Preparation, form: Callable[[ShardInfo, PictureInfo], Any]) -> int:
        return (pictures(a, form) - pictures(b, form)).total()

    def name(shard, picture):
        return Path(picture.name).name

    def use(shard, picture):
        return name(shard, picture), shard.split

    def size(shard, picture):
        return name(shard, picture), picture.lr_height, picture.lr_width

    added, removed = more(now, earlier, name), more(earlier, now, name)
    counts = {
        "added": added,
        "removed": removed,
        "of other sizes": more(now, earlier, size) - added,
        "moved between training and validation": more(now, earlier, use) - added,
    }
    changes = [f"{count:,} {what}" for what, count in counts.items() if count]
    return "pictures: " + (", ".join(changes) or "the same names and sizes, with other contents")


def read_counts(folder: Path) -> dict[str, int]:
    """Record counts by split, from TFDS's metadata. Raises DataError if that is damaged."""
    return {split: info.num_examples for split, info in _builder(folder).info.splits.items()}


def open_records(folder: Path) -> Records:
    """Opens a folder of prepared records.

    Raises:
        DataError: it is not one, or some of its files are missing or damaged.
    """
    preparation = Preparation.read(folder)
    for name, shard in preparation.shards.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != shard.bytes:
            fault = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
            raise DataError(f"{path}: {fault}; remove the folder and prepare it again")
    builder = _builder(folder)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    train, val = (
        SubImages(
            builder.as_data_source(split, deserialize_method=raw),
            {folder / name: s.records for name, s in preparation.of_split(split).items()},
        )
        for split in ("train", "val")
    )
    return Records(train, val, folder)


def _builder(folder: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # damaged metadata can fail in any way
        raise DataError(
            f"{folder}: TFDS cannot read it ({type(error).__name__}: {error}); remove the folder "
            "and prepare it again"
        ) from error
