"""Reads the tensors of a PyTorch checkpoint without PyTorch and without trusting the file.

A `.pth` is a zip archive: `data.pkl`, a pickle that describes the tensors, and `data/N`, their
bytes. An ordinary unpickler runs whatever code the file names. This one knows three names, none of which
runs anything: the ordered dictionary, the tensor, and the storage's type.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dvmsr_jax.errors import UserError

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
}


class UnsafeFileError(UserError):
    """The file names something other than tensors and plain containers, or is damaged."""


def read_pth(path: Path) -> Any:
    """The file's contents: dictionaries, lists and plain values, with tensors as NumPy arrays.

    Raises:
        UnsafeFileError: the file is not a PyTorch zip archive, is truncated or damaged, or names
            any class other than a tensor's. Nothing of it has been executed.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UnsafeFileError(f"{path}: a zip archive, but not one written by torch.save")
            folder = pickles[0].removesuffix("data.pkl")
            order = folder + "byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise UnsafeFileError(f"{path}: its tensors are not little-endian")
            return _Unpickler(archive, folder, path).load()
    except zipfile.BadZipFile:
        raise UnsafeFileError(
            f"{path}: not a PyTorch checkpoint, or a truncated one (torch.save has written zip "
            "archives since version 1.6)"
        ) from None
    except (OSError, MemoryError, UnsafeFileError):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UnsafeFileError(f"{path}: damaged ({type(error).__name__}: {error})") from error


class _Rebuild:
    """Stands in for torch._utils._rebuild_tensor_v2. Without attributes, so nothing can be set."""

    __slots__ = ()

    def __call__(self, storage, offset, shape, strides, *_):
        if not isinstance(storage, np.ndarray):
            raise UnsafeFileError("a tensor without a storage")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(x) is int and x >= 0 for x in numbers):
            raise UnsafeFileError("a tensor of impossible shape")
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        if 0 not in shape and last >= storage.size:
            raise UnsafeFileError("a tensor larger than its storage")
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps).copy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str, path: Path):
        super().__init__(io.BytesIO(archive.read(folder + "data.pkl")))
        self._archive, self._folder, self._path = archive, folder, path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in _STORAGES:
            return name
        raise UnsafeFileError(
            f"{self._path}: refused, it names {module}.{name}; only tensors and plain containers "
            "are read (save the model's state_dict() alone)"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or storage_type not in _STORAGES or not isinstance(key, str):
            raise UnsafeFileError("an unknown kind of storage")
        storage = np.frombuffer(
            self._archive.read(f"{self._folder}data/{key}"), _STORAGES[storage_type]
        )
        if storage.size != size:
            raise UnsafeFileError(f"storage {key} holds {storage.size} numbers instead of {size}")
        return storage
