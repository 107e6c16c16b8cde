"""Reads the tensors of a PyTorch checkpoint without PyTorch and without trusting the file.

A `.pth` is a zip archive: `data.pkl`, a pickle that describes the tensors, and `data/N`, their
bytes. An ordinary unpickler runs whatever code the file names. This one executes only the
instructions that torch.save writes, and accepts three kinds of names: the ordered dictionary, the
tensor, and types of storage. Its time and memory are limited by the actual size of the file.
"""

import enum
import io
import math
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dvmsr_jax import files
from dvmsr_jax.errors import UserError

# Far more than a DVMSR needs.
MAX_BYTES = 2**30
_MAX_PICKLE = 2**22

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
}


class PthError(UserError):
    """The file is damaged, or contains something other than tensors and plain containers."""


def read_pth(path: Path) -> Any:
    """The file's contents: dictionaries, lists and plain values, with tensors as NumPy arrays.

    Raises:
        PthError: the file is not a PyTorch zip archive, is truncated or damaged, or names any class
            other than a tensor's. Nothing in it has been executed.
        OSError: the file cannot be read, is not a regular file, or is larger than MAX_BYTES.
    """
    size = files.regular_size(path, at_most=MAX_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            return _read(archive, size)
    except zipfile.BadZipFile:
        raise PthError(
            f"{path}: not a PyTorch checkpoint, or a truncated one (torch.save has written zip "
            "archives since version 1.6)"
        ) from None
    except PthError as error:
        raise PthError(f"{path}: {printable(str(error))}") from None
    except Exception as error:  # a damaged archive or pickle can fail in any way
        reason = printable(f"{type(error).__name__}: {error}")
        raise PthError(f"{path}: damaged ({reason})") from error


def printable(text: str) -> str:
    """One line for the terminal from text that contains parts of a file; shortened if very long."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:1000])
    return shown if len(text) <= 1000 else f"{shown}..."


def _read(archive: zipfile.ZipFile, file_size: int) -> Any:
    members = archive.infolist()
    pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise PthError("a zip archive, but not one written by torch.save")
    # torch.save does not compress; an archive that unpacks to more than its size is an attack.
    sizes = [max(member.file_size, member.compress_size) for member in members]
    if any(member.compress_type for member in members) or sum(sizes) > file_size:
        raise PthError("a compressed archive, which torch.save does not write")
    folder = pickles[0].removesuffix("data.pkl")
    order = folder + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise PthError("its tensors are not little-endian")

    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE:
        raise PthError("refused, its data.pkl is too large to describe a model's tensors")
    return _Machine(archive, folder, file_size).run(archive.read(pickles[0]))


class _Global(enum.Enum):
    """The functions and classes that a pickle may name, besides the storages' types."""

    ORDERED_DICT = ("collections", "OrderedDict")
    REBUILD = ("torch._utils", "_rebuild_tensor_v2")


class _Storage(NamedTuple):
    """Contiguous numbers, which tensors are views of."""

    numbers: np.ndarray


class _Machine:
    """Executes the instructions that torch.save writes, up to `budget` bytes of tensors."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, budget: int):
        self._archive, self._folder, self._budget = archive, folder, budget
        self._storages: dict[str, bytes] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """The value that the program returns."""
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise AssertionError("genops raises an error for programs that do not stop")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode[-1]))))
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                self._update(self._pop(2))
            case "SETITEMS":
                self._update(self._pop_to_mark())
            case "GLOBAL":
                stack.append(_find(*argument.split(" ", 1)))
            case "REDUCE":
                stack.append(self._call(*self._pop(2)))
            case "BUILD":  # torch keeps versions of modules in a state_dict's attributes
                self._pop(1)
                if type(stack[-1]) is not dict:
                    raise PthError("refused, it sets attributes of a non-dictionary")
            case "BINPERSID":
                stack.append(self._storage(*self._pop(1)))
            case _:
                raise PthError(f"refused, torch.save does not write {opcode} instructions")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise PthError("damaged, its pickle takes more from the stack than it holds")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise PthError("damaged, it appends to a non-list")
        self._stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        if type(self._stack[-1]) is not dict:
            raise PthError("damaged, it sets items of a non-dictionary")
        # Keys of other types can take forever to hash, or be nested too deeply for it.
        if not all(type(key) is str for key in keys):
            raise PthError("refused, a dictionary has keys that are not strings")
        self._stack[-1].update(zip(keys, values, strict=True))

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(arguments) is tuple:
            if function is _Global.ORDERED_DICT and not arguments:
                return {}
            if function is _Global.REBUILD and len(arguments) >= 4:
                return self._tensor(*arguments[:4])
        raise PthError("refused, it calls functions that torch.save does not write")

    def _storage(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5:
            raise PthError("an unknown kind of storage")
        kind, dtype, key, _, size = pid
        if [type(kind), type(key)] != [str, str] or kind != "storage":
            raise PthError("an unknown kind of storage")
        if not isinstance(dtype, np.dtype) or type(size) is not int:
            raise PthError("an unknown kind of storage")
        if key not in self._storages:
            self._storages[key] = self._archive.read(f"{self._folder}data/{key}")
        numbers = np.frombuffer(self._storages[key], dtype)
        if numbers.size != size:
            raise PthError(f"storage {key} holds {numbers.size} numbers instead of {size}")
        return _Storage(numbers)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        if not isinstance(storage, _Storage):
            raise PthError("a tensor without a storage")
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            raise PthError("a tensor of impossible shape")
        # Products of numbers with a million digits, or of a million numbers, would take forever.
        places = (offset, *shape, *strides)
        if len(shape) > 32 or not all(type(x) is int and 0 <= x < 2**63 for x in places):
            raise PthError("a tensor of impossible shape")
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        # Strides of 0 could make a tensor of any size out of one number.
        numbers = storage.numbers
        self._budget -= math.prod(shape) * numbers.itemsize
        if (0 not in shape and last >= numbers.size) or self._budget < 0:
            raise PthError("a tensor larger than its storage")
        steps = [stride * numbers.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)


def _find(module: str, name: str) -> _Global | np.dtype:
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    try:
        return _Global((module, name))
    except ValueError:
        raise PthError(
            f"refused, it names {module}.{name}; only tensors and plain containers are read (save "
            "the model's state_dict() alone)"
        ) from None
