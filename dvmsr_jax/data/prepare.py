"""Pictures -> a folder of records, on all cores, in shards that an interruption leaves finished."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dvmsr_jax import bicubic
from dvmsr_jax.config import DataConfig
from dvmsr_jax.data import records
from dvmsr_jax.data.records import DataError, Records
from dvmsr_jax.data.sources import Source, find_sources
from dvmsr_jax.files import checksum, lock, replacing, write_json

PICTURES_PER_SHARD = 16
# Largest share of the pictures that may be left out because they cannot be read.
MAX_BAD = 0.01
_LOCK = "lock"


def load_records(config: DataConfig, scale: int) -> Records:
    """The prepared sub-images, prepared now if they are not there yet.

    Those of `config.prepared`, or else of a folder under `config.data_dir` that is named by the
    pictures' fingerprints.

    Raises:
        DataError: there are no pictures, or too few, or too many of them cannot be read, or they
            were prepared for other settings.
        images.ImageError: a folder is missing or holds no pictures.
    """
    side = records.hr_side(scale)
    if config.lr_crop * scale > side:
        raise DataError(
            f"data.lr_crop is {config.lr_crop}, at most {side // scale} fit the prepared sub-images"
        )
    if config.prepared is None:
        splits = find_sources(config)
        parent = config.data_dir.expanduser() / records.NAME
        apart = f"{config.val_images} apart"
        folder = parent / _key(splits["train"] + splits["val"], scale, apart)
        # By the folders: what is finished is still of use when pictures were mended or removed.
        folders = [str(path.expanduser().resolve()) for path in config.hr_dirs]
        sources = _hash(f"x{scale}", apart, *(folders or [config.dataset]))
        prepare(splits, scale, folder, parent / f".incomplete-{sources}")
    else:
        folder = config.prepared.expanduser()
        if config.hr_dirs:
            raise DataError("data.prepared and data.hr_dirs exclude each other; pass one of them")
        if config.dataset != DataConfig.dataset:
            raise DataError("data.prepared and data.dataset exclude each other; pass one of them")
        there = records.read_preparation(folder)["scale"]
        if there != scale:
            raise DataError(f"{folder}: was prepared for x{there}, the model is to be x{scale}")
    return records.open_records(folder)


def prepare(
    splits: dict[str, list[Source]], scale: int, folder: Path, unfinished: Path | None = None
) -> None:
    """Writes the pictures' sub-images as records; of "val" pictures, the middle one.

    The folder appears when it is complete. Until then finished shards are kept in `unfinished`, by
    default .incomplete-NAME beside it, to go on from there. The records do not depend on the number
    of cores. Does nothing if the folder holds them already.

    TFDS's `GeneratorBasedBuilder` would shuffle the records, for which it needs TensorFlow as soon
    as they exceed a gigabyte; Grain shuffles at reading, so they are written as they come.

    Raises:
        DataError: more than `MAX_BAD` of the pictures cannot be read (fewer are left out), or the
            folder holds something else.
        OSError: the disk is full, say.
    """
    if unfinished is None:
        unfinished = folder.absolute().with_name(f".incomplete-{folder.absolute().name}")
    shards = [shard for split in splits for shard in _shards(split, splits[split], scale)]
    with _claim(unfinished, folder) as needed:
        if not needed:
            there = records.read_preparation(folder)["shards"]
            if {name: info["key"] for name, info in there.items()} != {
                s.name: s.key for s in shards
            }:
                raise DataError(
                    f"{folder}: holds records of other pictures, or made with other settings; "
                    "remove it or choose another folder"
                )
            return
        infos = _write_shards(shards, scale, unfinished)
        sizes = {
            split: [(i["records"], i["bytes"]) for i in infos.values() if i["split"] == split]
            for split in splits
        }
        for split in splits:
            if not sum(count for count, _ in sizes[split]):
                raise DataError(f"none of the pictures for {split!r} can be read")
        records.write_metadata(unfinished, scale, sizes)
        write_json(unfinished / records.PREPARATION, {"scale": scale, "shards": infos})
        os.rename(unfinished, folder)
        for path in [folder / _LOCK, *(shard.info_path(folder) for shard in shards)]:
            path.unlink()


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds complete records."""
    return (folder / records.PREPARATION).exists()


@dataclass(frozen=True)
class _Shard:
    """Some pictures of a split, and the file that their records go to."""

    split: str
    name: str
    pictures: list[Source]
    key: str

    def info_path(self, folder: Path) -> Path:
        """Exists when the shard is finished."""
        return folder / f"{self.name}.json"

    def read_info(self, folder: Path) -> dict[str, Any] | None:
        """What was written, None if it was not finished, or is of other pictures, or lacks some.

        Those that could not be read may have been mended since.
        """
        try:
            info = json.loads(self.info_path(folder).read_text())
        except (FileNotFoundError, ValueError):
            return None
        whole = info["key"] == self.key and not info["left_out"] and (folder / self.name).exists()
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


def _write_shards(shards: list[_Shard], scale: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Writes those that are not there yet; what they hold, by name."""
    found = {shard.name: shard.read_info(folder) for shard in shards}
    kept = {name: info for name, info in found.items() if info is not None}
    known = {_LOCK, *kept, *(f"{name}.json" for name in kept)}
    for path in folder.iterdir():  # half-written, or of pictures that have changed since
        if path.name not in known:
            path.unlink()

    total = sum(len(shard.pictures) for shard in shards)
    done = sum(len(shard.pictures) for shard in shards if shard.name in kept)
    stop = threading.Event()
    # Threads suffice: decoding, resizing and copying run outside Python's lock.
    with (
        tqdm(total=total, initial=done, desc="preparing pictures", unit="picture") as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):

        def advance() -> bool:
            bar.update()
            return not stop.is_set()

        futures = {
            pool.submit(_write_shard, shard, scale, folder, advance): shard.name
            for shard in shards
            if shard.name not in kept
        }
        try:
            for future in as_completed(futures):
                info = kept[futures[future]] = future.result()
                for reason in info["left_out"]:
                    bar.write(f"left out: {reason}")
                _check_bad(kept, total)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return {shard.name: kept[shard.name] for shard in shards}


def _check_bad(infos: dict[str, dict[str, Any]], total: int) -> None:
    bad = [reason for info in infos.values() for reason in info["left_out"]]
    if len(bad) > MAX_BAD * total:
        raise DataError(
            f"{len(bad)} of {total} pictures cannot be used, more than {MAX_BAD:.0%}; mend or "
            "remove them, and the same command goes on:\n  " + "\n  ".join(bad)
        )


def _write_shard(
    shard: _Shard, scale: int, folder: Path, advance: Callable[[], bool]
) -> dict[str, Any]:
    """Writes a shard and what it holds.

    Raises CancelledError if `advance`, called for each picture, says stop.
    """
    pictures, left_out = [], []
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
                pictures.append(
                    {
                        "name": picture.name,
                        "lr_height": lr.shape[0],
                        "lr_width": lr.shape[1],
                        "records": len(squares),
                    }
                )
            if not advance():
                raise CancelledError
    info = {
        "key": shard.key,
        "split": shard.split,
        "records": sum(picture["records"] for picture in pictures),
        "bytes": (folder / shard.name).stat().st_size,
        "sha256": checksum(folder / shard.name),
        "pictures": pictures,
        "left_out": left_out,
    }
    write_json(shard.info_path(folder), info)
    return info


@contextlib.contextmanager
def _claim(unfinished: Path, finished: Path) -> Iterator[bool]:
    """Gives UNFINISHED to this process alone; waits for others that have it.

    Yields False if FINISHED is there, already or after the wait.
    """
    while not is_prepared(finished):
        if finished.is_file() or (finished.is_dir() and any(finished.iterdir())):
            raise DataError(
                f"{finished}: holds something else, or is a file; choose another folder"
            )
        unfinished.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context((unfinished / _LOCK).open("w"))
                if not lock(file, wait=False):
                    waiting = f"waiting for the process that prepares pictures in {unfinished}"
                    print(waiting, flush=True)
                    lock(file, wait=True)
                held = os.path.samestat(os.fstat(file.fileno()), os.stat(unfinished / _LOCK))
            except FileNotFoundError:
                held = False
            # Otherwise who had it has renamed the folder: look again.
            if held and not is_prepared(finished):
                yield True
                return
            if held:  # made in vain, just after that
                (unfinished / _LOCK).unlink()
    yield False
