"""Reads the GGUF container of the language model with numpy alone."""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCK = 32  # weights that share one scale in Q4_1 and Q8_0
BLOCK_BYTES = {Q4_1: 20, Q8_0: 34}


class Gguf(NamedTuple):
    """Metadata and dequantised weights of one GGUF file."""

    metadata: dict[str, Any]
    weights: dict[str, numpy.ndarray]


class _Cursor:
    """Walks the little-endian header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = len(MAGIC)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.offset += length
        return self.data[self.offset - length : self.offset].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.scalar("I"), self.scalar("Q")
            if item in (STRING, ARRAY):
                return [self.value(item) for _ in range(count)]
            values = struct.unpack_from(f"<{count}{SCALARS[item]}", self.data, self.offset)
            self.offset += struct.calcsize(f"<{count}{SCALARS[item]}")
            return list(values)
        return self.scalar(SCALARS[kind])


def _dequantise(data: mmap.mmap, kind: int, offset: int, shape: tuple[int, ...]) -> numpy.ndarray:
    count = int(numpy.prod(shape))
    if kind == F32:
        return numpy.frombuffer(data, "<f4", count, offset).reshape(shape).copy()
    if kind == F16:
        return numpy.frombuffer(data, "<f2", count, offset).reshape(shape).astype(numpy.float32)
    if kind not in BLOCK_BYTES:
        raise ValueError(f"read_gguf: weights must be F32, F16, Q4_1 or Q8_0, got type {kind}")
    size = BLOCK_BYTES[kind]
    blocks = numpy.frombuffer(data, numpy.uint8, count // BLOCK * size, offset).reshape(-1, size)
    scale = blocks[:, :2].copy().view("<f2").astype(numpy.float32)
    if kind == Q8_0:
        return (blocks[:, 2:].view(numpy.int8) * scale).reshape(shape)
    least = blocks[:, 2:4].copy().view("<f2").astype(numpy.float32)
    packed = blocks[:, 4:]
    # The low nibbles hold the first sixteen weights of the block, the high ones the rest.
    steps = numpy.concatenate([packed & 15, packed >> 4], axis=1)
    return (steps * scale + least).reshape(shape)


def read_gguf(path: str | Path) -> Gguf:
    """Read a GGUF file's metadata and weights.

    Returns: metadata by key, and float32 arrays by tensor name in row-major shape.
    Raises: ValueError when the file is no GGUF version 2 or 3, or holds other quantisations than
    F32, F16, Q4_1 and Q8_0.
    Source: the GGUF specification of the ggml project.
    """
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"read_gguf: path must be a GGUF file, got {path}")
    cursor = _Cursor(data)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"read_gguf: GGUF version must be 2 or 3, got {version}")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = []
    for _ in range(tensor_count):
        name = cursor.string()
        # GGUF lists the fastest dimension first.
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
        entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.offset // alignment) * alignment
    weights = {name: _dequantise(data, kind, start + offset, shape) for name, shape, kind, offset in entries}
    return Gguf(metadata, weights)
