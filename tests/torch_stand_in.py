"""Stand-in for the storages of torch, which is too large for the tests: classes with the same names and protocol."""

from __future__ import annotations

import types
from typing import Any

import numpy as np


class Device:
    """Device of a storage."""

    def __init__(self, kind: str) -> None:
        self.type = kind

    def __repr__(self) -> str:
        return self.type


class UntypedStorage:
    """Bytes of one or more tensors."""

    def __init__(self, size: int = 0, contents: Any = None, device: str = "cpu") -> None:
        self.contents = np.zeros(size, np.uint8) if contents is None else contents
        self.device = Device(device)

    def data_ptr(self) -> int:
        return int(self.contents.__array_interface__["data"][0])

    def nbytes(self) -> int:
        return int(self.contents.nbytes)


class TypedStorage:
    """Storage with a type. Each pickle of a tensor creates another one."""

    def __init__(self, *, wrap_storage: UntypedStorage, dtype: str, _internal: bool) -> None:
        self._untyped_storage = wrap_storage
        self.dtype = dtype

    def __reduce__(self) -> Any:
        raise AssertionError("the storage would be copied into the pickle")


class Tensor:
    """Tensor: a part of a storage."""

    def __init__(self, storage: UntypedStorage, dtype: str, offset: int, count: int) -> None:
        self.storage, self.dtype, self.offset, self.count = storage, dtype, offset, count

    def set_(self, storage: UntypedStorage) -> Tensor:
        return Tensor(storage, self.dtype, 0, storage.nbytes())

    def numpy(self) -> Any:
        return np.frombuffer(self.storage.contents, self.dtype)[self.offset : self.offset + self.count]

    def untyped_storage(self) -> UntypedStorage:
        return self.storage

    def __reduce_ex__(self, protocol: object) -> Any:
        storage = TypedStorage(wrap_storage=self.storage, dtype=self.dtype, _internal=True)
        return rebuild_tensor, (storage, self.offset, self.count)


def rebuild_tensor(storage: TypedStorage, offset: int, count: int) -> Tensor:
    """Create a tensor as torch._utils._rebuild_tensor_v2 does."""
    return Tensor(storage._untyped_storage, storage.dtype, offset, count)


def empty(size: int, dtype: str) -> Tensor:
    """Create a tensor."""
    return Tensor(UntypedStorage(size), dtype, 0, size)


def frombuffer(buffer: Any, dtype: str) -> Tensor:
    """Create a tensor over a buffer."""
    contents = np.frombuffer(buffer, dtype)
    assert contents.flags.writeable
    return Tensor(UntypedStorage(contents=contents), dtype, 0, contents.size)


def module() -> types.ModuleType:
    """Return a module to be used as `torch`."""
    torch: Any = types.ModuleType("torch")
    for one in (UntypedStorage, TypedStorage, Tensor, rebuild_tensor, empty, frombuffer):
        setattr(torch, one.__name__, one)
        one.__module__ = "torch"
    torch.storage = torch
    torch.dtype, torch.uint8 = str, "uint8"
    result: types.ModuleType = torch
    return result
