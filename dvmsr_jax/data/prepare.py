"""Prepares pictures as a folder of records, on all cores, in shards that survive interruptions."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from dvmsr_jax import bicubic, cluster, parallel
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data import records
from dvmsr_jax.data.records import DataError, PictureInfo, Preparation, Records, ShardInfo
from dvmsr_jax.data.sources import Source, find_sources
from dvmsr_jax.errors import printable
from dvmsr_jax.files import appears, checksum, replacing, turn, write_json

PICTURES_PER_SHARD = 16
# File in a folder made by `load_records`: a hash of the source folders, or of the dataset's name.
_SOURCES = "sources"


def load_records(config: DataConfig, scale: int) -> Records:
    """Opens the prepared sub-images, and prepares them first if necessary.

    They are in `config.prepared` or, if that is None, in a folder under `config.data_dir` named by
    a hash of the pictures' fingerprints.

    Raises:
        DataError: there are no or too few pictures, too many of them cannot be read, or they were
            prepared with other settings.
        images.ImageError: a folder is missing or holds no pictures.
    """
    side = records.hr_side(scale)
    if config.lr_crop * scale > side:
        raise DataError(
            f"data.lr_crop is {config.lr_crop}, at most {side // scale} fit the prepared sub-images"
        )
    if config.zoom_out and config.lr_crop == side // scale:
        raise DataError(
            f"--data.zoom-out reduces sub-images to crops, so --data.lr-crop must be less than "
            f"their side of {side // scale} LR pixels"
        )
    if config.prepared is None:
        splits = find_sources(config)
        parent = config.data_dir.expanduser() / records.NAME
        apart = f"{config.val_images} apart"
        folder = parent / _key(splits["train"] + splits["val"], scale, apart)
        # Named by the folders, so that finished shards are reused once pictures are fixed or
        # removed.
        folders = [str(path.expanduser().resolve()) for path in config.hr_dirs]
        sources = _hash(f"x{scale}", apart, *(folders or [config.dataset]))
        unfinished = parent / f".incomplete-{sources}"
        prepare(splits, scale, folder, unfinished, max_unreadable=config.max_unreadable)
        _name_superseded(folder, sources)
    else:
        folder = config.prepared.expanduser()
        if config.hr_dirs:
            raise DataError("data.prepared and data.hr_dirs exclude each other; pass one of them")
        if config.dataset != DataConfig.dataset:
            raise DataError("data.prepared and data.dataset exclude each other; pass one of them")
        there = Preparation.read(folder).scale
        if there != scale:
            raise DataError(f"{folder}: was prepared for x{there}, but the model is for x{scale}")
    return records.open_records(folder)


def _name_superseded(folder: Path, sources: str) -> None:
    """Prints the other folders that were made with the same settings before pictures changed."""
    with contextlib.suppress(OSError):  # the folder may be read-only
        if not (folder / _SOURCES).exists():
            with replacing(folder / _SOURCES) as temporary:
                temporary.write_text(sources)
        older = [
            marker.parent
            for marker in sorted(folder.parent.glob(f"*/{_SOURCES}"))
            if marker.parent != folder and marker.read_text() == sources
        ]
        if older:
            size = sum(path.stat().st_size for parent in older for path in parent.rglob("*"))
            parallel.say(
                f"prepared before the pictures changed, {size / 1e9:.1f} GB, which you may delete "
                f"unless you use it with --data.prepared: {', '.join(map(str, older))}"
            )


def prepare(
    splits: dict[str, list[Source]],
    scale: int,
    folder: Path,
    unfinished: Path | None = None,
    *,
    max_unreadable: float = DataConfig.max_unreadable,
    ray: cluster.Where | None = None,
) -> None:
    """Writes the pictures' sub-images as records; of "val" pictures, only the middle sub-image.

    The folder appears only when it is complete. Until then, finished shards are kept in
    `unfinished`, by default .incomplete-NAME beside it, so that a later call can resume. All cores
    work on it, or those of a cluster at `ray`, whose machines must see the same files. The records
    do not depend on the number of cores. If the folder already contains them, nothing
    happens.

    TFDS's `GeneratorBasedBuilder` would shuffle the records, and needs TensorFlow to do so beyond a
    gigabyte. Grain shuffles when reading, so the records are written in order.

    Raises:
        DataError: a larger fraction of the pictures than `max_unreadable` cannot be read (a smaller
            one is left out), or the folder contains something else.
        OSError: for example, the disk is full.
    """
    if unfinished is None:
        unfinished = folder.absolute().with_name(f".incomplete-{folder.absolute().name}")
    shards = [shard for split in splits for shard in _shards(split, splits[split], scale)]
    if not is_prepared(folder):
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise DataError(
                f"{folder}: is a file, or contains something else; choose another folder"
            )
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with turn(unfinished.with_name(f"{unfinished.name}.lock")):
            if not is_prepared(folder):  # it may have appeared during the wait
                _make(shards, scale, folder, unfinished, max_unreadable, ray)
    there = Preparation.read(folder).shards
    if {name: info.key for name, info in there.items()} != {s.name: s.key for s in shards}:
        raise DataError(
            f"{folder}: holds records of other pictures, or made with other settings; remove it or "
            "choose another folder"
        )


def _make(
    shards: "list[_Shard]",
    scale: int,
    folder: Path,
    unfinished: Path,
    max_unreadable: float,
    ray: cluster.Where | None,
) -> None:
    unfinished.mkdir(exist_ok=True)
    infos = _write_shards(shards, scale, unfinished, max_unreadable, ray)
    preparation = Preparation(scale, infos)
    sizes = {
        split: [(info.records, info.bytes) for info in preparation.of_split(split).values()]
        for split in ("train", "val")
    }
    for split in sizes:
        if not sum(count for count, _ in sizes[split]):
            raise DataError(f"none of the pictures for {split!r} can be read")
    for name in infos:
        if not appears(unfinished / name):
            raise DataError(f"{unfinished / name}: has disappeared; run the same command again")
    records.write_metadata(unfinished, scale, sizes)
    preparation.write(unfinished)
    os.rename(unfinished, folder)
    for path in (shard.info_path(folder) for shard in shards):
        path.unlink()


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds complete records."""
    return (folder / records.PREPARATION).exists()


@dataclass(frozen=True)
class _Shard:
    """Some pictures of a split, and the file for their records."""

    split: str
    name: str
    pictures: list[Source]
    key: str

    def info_path(self, folder: Path) -> Path:
        """The file that marks a finished shard, and describes it."""
        return folder / f"{self.name}.json"

    def read_info(self, folder: Path) -> ShardInfo | None:
        """The finished shard's description; None if the shard must be written.

        A shard of other pictures must be written, and so must one with unreadable pictures, which
        may have been repaired in the meantime.
        """
        try:
            info = ShardInfo.from_json(json.loads(self.info_path(folder).read_text()))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        whole = info.key == self.key and not info.left_out and (folder / self.name).exists()
        return info if whole else None


def _shards(split: str, pictures: list[Source], scale: int) -> list[_Shard]:
    groups = [
        pictures[i : i + PICTURES_PER_SHARD] for i in range(0, len(pictures), PICTURES_PER_SHARD)
    ]
    return [
        _Shard(split, records.shard_name(split, i, len(groups)), group, _key(group, scale))
        for i, group in enumerate(groups)
    ]


def _key(pictures: list[Source], scale: int, *more: str) -> str:
    return _hash(f"x{scale} {records.hr_side(scale)}", *more, *(p.fingerprint for p in pictures))


def _hash(*parts: str) -> str:
    return hashlib.sha256(os.fsencode("\n".join(parts))).hexdigest()[:16]


def _write_shards(
    shards: list[_Shard],
    scale: int,
    folder: Path,
    max_unreadable: float,
    ray: cluster.Where | None,
) -> dict[str, ShardInfo]:
    """Writes the missing shards; returns the descriptions of all shards, by file name."""
    found = {shard.name: shard.read_info(folder) for shard in shards}
    kept = {name: info for name, info in found.items() if info is not None}
    known = {*kept, *(f"{name}.json" for name in kept)}
    for path in folder.iterdir():  # half-written, or of pictures that have changed
        if path.name not in known:
            path.unlink()

    total = sum(len(shard.pictures) for shard in shards)
    done = sum(len(shard.pictures) for shard in shards if shard.name in kept)
    missing = [shard for shard in shards if shard.name not in kept]
    with tqdm(total=total, initial=done, desc="preparing pictures", unit="picture") as bar:
        if ray is None:
            written = _on_threads(missing, scale, folder, bar)
        else:
            written = _on_cluster(missing, scale, folder, bar, ray)
        with contextlib.closing(written):
            for shard, info in written:
                kept[shard.name] = info
                for reason in info.left_out:
                    bar.write(printable(f"left out: {reason}"))
                _check_unreadable(kept, total, max_unreadable)
    return {shard.name: kept[shard.name] for shard in shards}


def _on_threads(
    shards: Sequence[_Shard], scale: int, folder: Path, bar: tqdm
) -> Generator[tuple[_Shard, ShardInfo], None, None]:
    """Writes the shards, and yields each with its description."""
    stop = threading.Event()

    def advance() -> bool:
        bar.update()
        return not stop.is_set()

    # Threads suffice: decoding, resizing and copying run outside Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            pool.submit(_write_shard, shard, scale, folder, advance): shard for shard in shards
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _on_cluster(
    shards: Sequence[_Shard], scale: int, folder: Path, bar: tqdm, ray: cluster.Where
) -> Generator[tuple[_Shard, ShardInfo], None, None]:
    """As `_on_threads`."""
    if not shards:
        return
    start = functools.partial(_start_worker, scale, folder, shards[0].pictures[0])
    batches = [[shard] for shard in shards]
    answers = cluster.spread(ray, start, batches, device="cpu", folder=folder)
    for shard, info in cluster.complete(answers, lambda shard: shard.name):
        bar.update(len(shard.pictures))
        yield shard, info


def _start_worker(
    scale: int, folder: Path, picture: Source, stopped: cluster.Stopped
) -> Callable[[_Shard, float], ShardInfo]:
    """Raises DataError if this machine does not have the pictures, of which one is given."""
    if not appears(Path(picture.name)):
        raise DataError(
            f"{picture.name}: {platform.node()} does not have this picture; name folders that all "
            "machines share"
        )
    return lambda shard, _: _write_shard(shard, scale, folder, lambda: not stopped())


def _check_unreadable(infos: dict[str, ShardInfo], total: int, at_most: float) -> None:
    bad = [reason for info in infos.values() for reason in info.left_out]
    if len(bad) > at_most * total:
        raise DataError(
            f"{len(bad)} of {total} pictures ({len(bad) / total:.1%}) cannot be read, more than "
            f"the {at_most:.1%} that may be left out. Fix or remove them, or raise "
            "--data.max-unreadable (--max-unreadable for `prepare`), and run the same command "
            "again:\n  " + "\n  ".join(bad)
        )


def _write_shard(shard: _Shard, scale: int, folder: Path, advance: Callable[[], bool]) -> ShardInfo:
    """Writes a shard and its description.

    Raises CancelledError when `advance`, which is called for each picture, returns False.
    """
    pictures: list[PictureInfo] = []
    left_out: list[str] = []
    with (
        replacing(folder / shard.name) as unfinished,
        contextlib.closing(records.ShardWriter(unfinished)) as writer,
    ):
        for picture in shard.pictures:
            try:
                hr = bicubic.modcrop(picture.load(), scale)
            except ValueError as error:
                reason = str(error)
                left_out.append(reason if picture.name in reason else f"{picture.name}: {reason}")
            else:
                lr = bicubic.downscale(hr, scale)
                squares = list(records.sub_images(lr, hr, records.hr_side(scale), scale))
                if shard.split == "val":
                    squares = [squares[len(squares) // 2]]
                for lr_square, hr_square in squares:
                    writer.write(lr_square, hr_square, picture.name)
                pictures.append(PictureInfo(picture.name, lr.shape[0], lr.shape[1], len(squares)))
            if not advance():
                raise CancelledError
    info = ShardInfo(
        key=shard.key,
        split=shard.split,
        records=sum(picture.records for picture in pictures),
        bytes=(folder / shard.name).stat().st_size,
        sha256=checksum(folder / shard.name),
        pictures=tuple(pictures),
        left_out=tuple(left_out),
    )
    write_json(shard.info_path(folder), asdict(info))
    return info
