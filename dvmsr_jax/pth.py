"""Reads the tensors of a PyTorch checkpoint without PyTorch and without trusting the file.

A `.pth` is a zip archive: `data.pkl`, a pickle that describes the tensors, and `data/N`, their
bytes. An ordinary unpickler runs whatever code the file names. This one knows three names, none of
which runs anything: the ordered dictionary, the tensor, and the storage's type. Nor does it take
more memory than the file is large, whatever the file claims.
"""

import io
import math
import pickle
import pickletools
import zipfile
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


class PthError(UserError):
    """The file is damaged, or names something other than tensors and plain containers."""


def read_pth(path: Path) -> Any:
    """The file's contents: dictionaries, lists and plain values, with tensors as NumPy arrays.

    Raises:
        PthError: the file is not a PyTorch zip archive, is truncated or damaged, or names
            any class other than a tensor's. Nothing of it has been executed.
        OSError: the file cannot be read.
    """
    file = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            return _read(archive, len(file))
    except zipfile.BadZipFile:
        raise PthError(
            f"{path}: not a PyTorch checkpoint, or a truncated one (torch.save has written zip "
            "archives since version 1.6)"
        ) from None
    except PthError as error:
        raise PthError(f"{path}: {error}") from None
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise PthError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def _read(archive: zipfile.ZipFile, file_size: int) -> Any:
    members = archive.infolist()
    pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PthError("a zip archive, but not one written by torch.save")
    # torch.save does not compress, so what unpacks to more than the file is made to exhaust memory.
    sizes = [max(member.file_size, member.compress_size) for member in members]
    if any(member.compress_type for member in members) or sum(sizes) > file_size:
        raise PthError("a compressed archive, which torch.save does not write")
    folder = pickles[0].removesuffix("data.pkl")
    order = folder + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise PthError("its tensors are not little-endian")

    instructions = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(instructions):
        # The unpickler allocates whatever a later protocol's lengths, or a memo's index, claim.
        if opcode.proto > 2 or ("PUT" in opcode.name and (argument or 0) > len(instructions)):
            raise PthError(f"refused, torch.save does not write such a {opcode.name}")
    return _Unpickler(instructions, archive, folder, file_size).load()


class _Dict(dict):
    """Stands in for collections.OrderedDict."""

    def __init__(self):
        super().__init__()

    def __setstate__(self, state):
        """Passes over what torch notes in a state_dict's attributes: versions of its modules."""


class _Rebuild:
    """Stands in for torch._utils._rebuild_tensor_v2, up to `budget` bytes of tensors."""

    def __init__(self, budget: int):
        self._budget = budget

    def __setstate__(self, state):
        raise PthError("refused, it sets a function's attributes")

    def __call__(self, storage, offset, shape, strides, *_):
        if not isinstance(storage, np.ndarray):
            raise PthError("a tensor without a storage")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(x) is int and x >= 0 for x in numbers):
            raise PthError("a tensor of impossible shape")
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        # Strides of 0 would make a tensor of any size out of one number.
        self._budget -= math.prod(shape) * storage.itemsize
        if (0 not in shape and last >= storage.size) or self._budget < 0:
            raise PthError("a tensor larger than its storage")
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


class _Unpickler(pickle.Unpickler):
    def __init__(self, instructions: bytes, archive: zipfile.ZipFile, folder: str, budget: int):
        super().__init__(io.BytesIO(instructions))
        self._archive, self._folder = archive, folder
        self._rebuild = _Rebuild(budget)
        self._storages: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild
        if module == "torch" and name in _STORAGES:
            return name
        raise PthError(
            f"refused, it names {module}.{name}; only tensors and plain containers are read (save "
            "the model's state_dict() alone)"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or storage_type not in _STORAGES or not isinstance(key, str):
            raise PthError("an unknown kind of storage")
        if key not in self._storages:
            self._storages[key] = self._archive.read(f"{self._folder}data/{key}")
        storage = np.frombuffer(self._storages[key], _STORAGES[storage_type])
        if storage.size != size:
            raise PthError(f"storage {key} holds {storage.size} numbers instead of {size}")
        return storage
