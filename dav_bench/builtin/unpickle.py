"""Unpickles the tensors and plain containers of a torch checkpoint without running any of its code.

Published checkpoints are pickles, and a pickle can name any function and have it called.  torch's own
`weights_only` mode refuses those that hold a configuration object.  This reader loads them all: a name in
the file is never imported.  Tensors and containers are rebuilt by the few classes below; every other class
becomes an `Inert` placeholder that only remembers what it was given.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DICTS = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "lightning_fabric.utilities.data.AttributeDict",
}
_SETS = {"builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"}


# what torch's pickles are written with; no opcode for extension codes, buffers or persistent ids in text
_OPCODES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES
    EMPTY_DICT EMPTY_LIST EMPTY_TUPLE EMPTY_SET TUPLE TUPLE1 TUPLE2 TUPLE3 FROZENSET
    APPEND APPENDS SETITEM SETITEMS ADDITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD BINPERSID
"""


class _Sealed(type):
    """Type of every class a pickle can reach: a BUILD opcode aimed at the class itself changes nothing."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError("the file tries to alter a class")


class Inert(metaclass=_Sealed):
    """Stands for an object of a class that is not loaded."""

    __slots__ = ("args", "items", "state")
    type_name = "?"
    args: Any
    items: list[Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.items, self.state = (args, kwargs), [], None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        self.items.extend(items)

    add = append

    def __repr__(self) -> str:
        return f"<{self.type_name}, not loaded>"


class _Dict(dict[Any, Any], metaclass=_Sealed):
    """An ordered or default dictionary; attributes such as `_metadata` are dropped."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        super().__init__(*[a for a in args if isinstance(a, list | tuple | dict)][:1])

    def __setstate__(self, state: Any) -> None:
        pass


class _Set(set[Any], metaclass=_Sealed):
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _StorageType(metaclass=_Sealed):
    """The class a persistent id names: only its dtype matters."""

    __slots__ = ()
    dtype = torch.float32


class _Held(metaclass=_Sealed):
    """A storage or a tensor while the pickle is read, out of reach of its opcodes."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: Any) -> None:
        pass


class _Tensor(metaclass=_Sealed):
    """Takes the place of torch's `_rebuild_tensor_v2`: a view of a storage, checked against its size."""

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        ints = [offset, *size, *stride]
        if not isinstance(storage, _Held) or not all(type(n) is int and n >= 0 for n in ints):
            raise pickle.UnpicklingError("a tensor is not made of a storage and whole numbers")
        flat = storage.tensor
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else -1
        if flat.ndim != 1 or last >= len(flat) or math.prod(size) > len(flat):
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return _Held(flat.as_strided(size, stride, flat.storage_offset() + offset))


class _Parameter(metaclass=_Sealed):
    """Takes the place of torch's `_rebuild_parameter`."""

    def __new__(cls, data: Any, *rest: Any) -> Any:
        return data


class _Unpickler(pickle.Unpickler):
    """Resolves names to the classes of this module and storages to the members of one archive."""

    def __init__(self, file: Any, archive: _Archive) -> None:
        super().__init__(file, encoding="utf-8")
        self.archive = archive
        self.seen: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.seen:
            self.seen[full] = self._stand_in(full, module, name)
        return self.seen[full]

    @staticmethod
    def _stand_in(full: str, module: str, name: str) -> type:
        # classes made here live for one file, so that nothing one file does can reach another
        if full in _DICTS:
            return _Sealed("Dict", (_Dict,), {"__slots__": ()})
        if full in _SETS:
            return _Sealed("Set", (_Set,), {"__slots__": ()})
        if module == "torch" and name in _DTYPES:
            return _Sealed(name, (_StorageType,), {"__slots__": (), "dtype": _DTYPES[name]})
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return _Sealed("Tensor", (_Tensor,), {})
        if full == "torch._utils._rebuild_parameter":
            return _Sealed("Parameter", (_Parameter,), {})
        return _Sealed("Inert", (Inert,), {"__slots__": (), "type_name": full})

    def persistent_load(self, pid: Any) -> _Held:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id is no storage")
        kind, key, count = pid[1], pid[2], pid[4]
        if not (isinstance(kind, _Sealed) and issubclass(kind, _StorageType)):
            raise pickle.UnpicklingError("a storage has a type that is not known here")
        if not isinstance(key, str):  # it only ever looks up a member of the archive
            raise pickle.UnpicklingError("a storage has no name")
        if type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage has no size")
        return _Held(self.archive.storage(key, kind.dtype, count))


class _Archive:
    """The zip container of `torch.save`: members are stored uncompressed, so tensors are mapped, not read."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            self.members = {m.filename: m for m in archive.infolist()}
        roots = [name[: -len("data.pkl")] for name in self.members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise pickle.UnpicklingError("the archive holds no data.pkl")
        self.root = roots[0]
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.cache: dict[str, Tensor] = {}
        if self.root + "byteorder" in self.members and self.read("byteorder") != b"little":
            raise pickle.UnpicklingError("the file was written on a big-endian machine")

    def span(self, name: str) -> tuple[int, int]:
        """First byte of a member in the file, and the byte after its last."""
        member = self.members.get(self.root + name)
        if member is None:
            raise pickle.UnpicklingError(f"{name} is missing")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise pickle.UnpicklingError(f"{name} is compressed or encrypted")
        # the local header repeats the name and may pad differently from the directory
        name_size, extra_size = struct.unpack_from("<HH", self.map, member.header_offset + 26)
        start = member.header_offset + 30 + name_size + extra_size
        if start + member.file_size > len(self.map):
            raise pickle.UnpicklingError(f"{name} reaches beyond the file")
        return start, start + member.file_size

    def read(self, name: str) -> bytes:
        start, end = self.span(name)
        return self.map[start:end]

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """(count,) view of one member; pages are read when they are used."""
        if key not in self.cache:
            start, end = self.span(f"data/{key}")
            self.cache[key] = self.bytes[start:end]
        raw = self.cache[key]
        if count * dtype.itemsize != len(raw):
            raise pickle.UnpicklingError(f"storage {key} has another size than it says")
        if count and raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype) if count else torch.empty(0, dtype=dtype)


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """The content in plain dictionaries, lists, tuples, sets and tensors; `done` keeps shared ones shared."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _Held):
        return value.tensor
    if isinstance(value, dict):
        out = done[id(value)] = {}
        out.update((key, _plain(v, done)) for key, v in dict.items(value))
        return out
    if isinstance(value, list):
        items: list[Any] = []
        done[id(value)] = items
        items.extend(_plain(v, done) for v in value)
        return items
    if isinstance(value, tuple):
        return tuple(_plain(v, done) for v in value)
    return set(value) if isinstance(value, set) else value


def unpickle(path: Path) -> Any:
    """What `torch.save` wrote to a zip file; raises some exception if it is anything else."""
    if not zipfile.is_zipfile(path):
        raise pickle.UnpicklingError(
            "not torch's zip format (torch.save since 1.6); older files are not read"
        )
    archive = _Archive(path)
    data = archive.read("data.pkl")
    known = set(_OPCODES.split())
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in known:
            raise pickle.UnpicklingError(f"the opcode {opcode.name} has no place in a checkpoint")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(
            data
        ):  # else the unpickler allocates that much
            raise pickle.UnpicklingError("the pickle numbers more objects than it can hold")
    return _plain(_Unpickler(io.BytesIO(data), archive).load(), {})
