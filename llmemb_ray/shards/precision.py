"""The precision of vectors as they are written: float32, float16, int8 codes or one bit a dimension; and back.

Invariant: codes mean the same in the whole run, because their calibration is made once; readers get float32
vectors through ``Precision.decode`` and never compare codes. Names and bit layout are those of
sentence-transformers' ``quantize_embeddings`` (6.2): for the same ranges its codes are ours.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.errors import NotFound, OutputError
from llmemb_ray.representation.space import digest
from llmemb_ray.shards.schema import embedding_type, raw_values
from llmemb_ray.storage import Storage

Dtype = Literal["float32", "float16", "int8", "ubinary"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)

PATH = "_llmemb/calibration.json"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What codes are measured against: statistics of each dimension over a sample of vectors.

    low, high:    float32 [D]  least and largest value: the ends of the int8 codes
    mean:         float32 [D]  threshold of centred bits
    below, above: float32 [D]  mean of the values up to the mean, and above it: what a centred bit stands for
    """

    low: Floats
    high: Floats
    mean: Floats
    below: Floats
    above: Floats
    rows: int
    """Vectors in the sample."""
    space: str
    """Digest of the vector space that it was measured in."""

    @classmethod
    def measure(cls, vectors_ND: Floats, space: str) -> Calibration:
        """From a sample of float vectors. Raises ValueError for an empty one."""
        if not len(vectors_ND):
            raise ValueError("no vectors to calibrate with")
        mean = vectors_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        over = vectors_ND > mean
        count = over.sum(axis=0)
        above = np.where(count > 0, np.where(over, vectors_ND, 0).sum(axis=0, dtype=np.float64) / np.maximum(count, 1), mean)
        rest = len(vectors_ND) - count
        below = np.where(rest > 0, np.where(over, 0, vectors_ND).sum(axis=0, dtype=np.float64) / np.maximum(rest, 1), mean)
        return cls(
            low=vectors_ND.min(axis=0),
            high=vectors_ND.max(axis=0),
            mean=mean,
            below=below.astype(np.float32),
            above=above.astype(np.float32),
            rows=len(vectors_ND),
            space=space,
        )

    _ARRAYS = ("low", "high", "mean", "below", "above")

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in self._ARRAYS} | {"rows": self.rows, "space": self.space}

    @classmethod
    def from_dict(cls, data: dict[str, Any], origin: str) -> Calibration:
        try:
            arrays = {name: np.asarray(data[name], np.float32) for name in cls._ARRAYS}
            return cls(**arrays, rows=int(data["rows"]), space=str(data["space"]))
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{origin} is no calibration of this version: {error}") from error

    @cached_property
    def digest(self) -> str:
        return digest(self.to_dict())

    @cached_property
    def steps(self) -> Floats:
        """float32 [D]: width of one int8 code; 0 where the dimension never varied."""
        return ((self.high - self.low) / np.float32(255)).astype(np.float32)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes, origin: str) -> Calibration:
        """Raises OutputError naming ``origin``."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise OutputError(f"{origin} is not JSON: {error}") from error
        return cls.from_dict(data, origin)

    def save(self, storage: Storage) -> None:
        storage.put(PATH, self.to_json().encode())

    @classmethod
    def load(cls, storage: Storage) -> Calibration | None:
        """The calibration in a run's OUT; None where there is none. Raises OutputError for a broken one."""
        try:
            data = storage.read(PATH)
        except NotFound:
            return None
        return cls.from_json(data, storage.display(PATH))


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a run writes its vectors, and reads them back.

    centre:     bits are taken against the calibration's mean, not against zero
    normalized: the vectors put in have norm 1, and so have those read back from codes
    """

    dtype: Dtype
    dimension: int
    normalized: bool
    centre: bool = False
    calibration: Calibration | None = None

    @staticmethod
    def calibrates(dtype: str, centre: bool) -> bool:
        """Whether vectors of this kind need a calibration."""
        return dtype == "int8" or (dtype == "ubinary" and centre)

    @property
    def quantised(self) -> bool:
        return self.dtype in ("int8", "ubinary")

    @property
    def arrow_type(self) -> pa.DataType:
        return embedding_type(self.dimension, self.dtype)

    @property
    def metadata(self) -> dict[str, Any]:
        """What stands in each shard beside its run key: with it a shard can be decoded alone."""
        if self.calibration is None:
            return {"dtype": self.dtype}
        ends = (self.calibration.low, self.calibration.high) if self.dtype == "int8" else (self.calibration.below, self.calibration.above)
        data = base64.b64encode(np.stack(ends).astype("<f4").tobytes()).decode()
        return {"dtype": self.dtype, "calibration": self.calibration.digest, "ranges_float32": data}

    def encode(self, vectors_ND: Floats) -> tuple[npt.NDArray[Any], int]:
        """(values as they are stored, how many of them lay outside the ranges by more than a code's own error)."""
        clipped = 0
        values: npt.NDArray[Any]
        if self.dtype == "int8":
            calibration = self._calibration
            half = calibration.steps / 2
            clipped = int(np.count_nonzero(vectors_ND < calibration.low - half) + np.count_nonzero(vectors_ND > calibration.high + half))
            steps_from_low = np.floor((vectors_ND - calibration.low) / np.where(calibration.steps > 0, calibration.steps, np.float32(1)))
            values = (np.clip(steps_from_low, 0, 255) - 128).astype(np.int8)
        elif self.dtype == "ubinary":
            threshold = self._calibration.mean if self.centre else np.float32(0)
            values = np.packbits(vectors_ND > threshold, axis=1)
        else:
            values = vectors_ND.astype(self.dtype)
        return values, clipped

    def decode(self, column: pa.ChunkedArray | pa.Array) -> Floats:
        """float32 [N, D] of an ``embedding`` column; what codes stand for, with norm 1 again where the vectors had it."""
        codes = raw_values(column)
        if not self.quantised:
            floats: Floats = codes.astype(np.float32, copy=False)
            return floats
        if self.dtype == "int8":
            calibration = self._calibration
            # A code is the whole steps above the low end: what became it lies half a step further up, in the middle.
            middle = np.minimum(codes.astype(np.float32) + np.float32(128.5), np.float32(255))
            vectors = middle * calibration.steps + calibration.low
        else:
            bits = np.unpackbits(codes, axis=1, count=self.dimension).astype(np.bool_)
            if self.centre:
                vectors = np.where(bits, self._calibration.above, self._calibration.below)
            else:
                vectors = np.where(bits, np.float32(1), np.float32(-1)) / np.float32(np.sqrt(self.dimension))
        if self.normalized:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        result: Floats = vectors.astype(np.float32, copy=False)
        return result

    @property
    def _calibration(self) -> Calibration:
        if self.calibration is None:
            raise OutputError(f"the run's vectors are {self.dtype} codes, and {PATH} is not there to read them with")
        return self.calibration
