"""DLPack capsules, made and read with ctypes, so that memory which claims to be a GPU's can cross a border."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST = 1, 2, 3
PLAIN, VERSIONED = b"dltensor", b"dltensor_versioned"
READ_ONLY = 1
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
BFLOAT16 = 4


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a capsule says; strides in elements, None where dense."""

    address: int
    device: tuple[int, int]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    read_only: bool


_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_api.PyCapsule_IsValid.restype = ctypes.c_int
_api.PyCapsule_IsValid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_exported: dict[int, tuple[Any, ...]] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _forget(managed: int) -> None:
    _exported.pop(managed, None)


def capsule_of(layout: Layout, owner: object) -> object:
    """A plain capsule; `owner` lives until the consumer deletes it, or someone releases it."""
    count = len(layout.shape)
    shape = (ctypes.c_int64 * count)(*layout.shape)
    strides = (ctypes.c_int64 * count)(*(layout.strides or dense(layout.shape)))
    tensor = Tensor(layout.address, Device(*layout.device), count, _data_type(layout.dtype), shape, strides, 0)
    managed = Managed(tensor, None, ctypes.cast(_forget, ctypes.c_void_p))
    _exported[ctypes.addressof(managed)] = (managed, shape, strides, owner)
    return _api.PyCapsule_New(ctypes.addressof(managed), PLAIN, None)


def release(capsule: object) -> bool:
    """Let go of what a capsule of `capsule_of` holds that no one consumed; False for anyone else's."""
    ours = bool(_api.PyCapsule_IsValid(capsule, PLAIN))
    return ours and _exported.pop(_api.PyCapsule_GetPointer(capsule, PLAIN), None) is not None


def layout_of(capsule: object) -> Layout:
    """What a capsule says that no one has consumed yet."""
    if _api.PyCapsule_IsValid(capsule, VERSIONED):
        versioned = ManagedVersioned.from_address(_api.PyCapsule_GetPointer(capsule, VERSIONED))
        tensor, read_only = versioned.tensor, bool(versioned.flags & READ_ONLY)
    elif _api.PyCapsule_IsValid(capsule, PLAIN):
        tensor, read_only = Managed.from_address(_api.PyCapsule_GetPointer(capsule, PLAIN)).tensor, False
    else:
        raise BufferError("Invalid DLPack capsule")
    return Layout(
        int(tensor.data or 0) + tensor.byte_offset,
        (tensor.device.type, tensor.device.id),
        tuple(tensor.shape[: tensor.ndim]),
        tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        _dtype(tensor.dtype),
        read_only,
    )


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a row-major array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _data_type(dtype: np.dtype[Any]) -> DataType:
    code = BFLOAT16 if dtype.name == "bfloat16" else CODES[dtype.kind]
    return DataType(code, dtype.itemsize * 8, 1)


def _dtype(data_type: DataType) -> np.dtype[Any]:
    if data_type.code == BFLOAT16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    kind = {code: kind for kind, code in CODES.items()}[data_type.code]
    return np.dtype(f"{kind}{data_type.bits // 8}")
