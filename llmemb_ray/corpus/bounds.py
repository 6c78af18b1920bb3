"""How many bytes the values of a row take, and values taken out of their rows. Knows nothing of why.

Invariant: what stands inside lists, maps and structs counts for the row that holds it; taking a field out of a struct leaves its other fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]


def row_bytes(values: pa.Array) -> Ints:
    """int64 [N]: bytes of the text, bytes and numbers that each value is made of; nulls are 0."""
    type_ = values.type
    if isinstance(type_, pa.BaseExtensionType):
        return row_bytes(values.storage)
    if pa.types.is_dictionary(type_):
        sizes: Ints = np.append(row_bytes(values.dictionary), 0)
        return sizes[pc.fill_null(values.indices.cast(pa.int64()), len(values.dictionary)).to_numpy()]  # type: ignore[no-any-return]
    if pa.types.is_struct(type_):
        total = np.zeros(len(values), np.int64)
        for field in values.flatten():
            total += row_bytes(field)
        return total
    if pa.types.is_map(type_):
        return row_bytes(values.cast(pa.list_(pa.struct([type_.key_field, type_.item_field]))))
    if pa.types.is_nested(type_):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)
        width = fixed_width(type_.value_type)
        if width is not None:
            return lengths * width  # type: ignore[no-any-return]
        sums = np.concatenate([[0], np.cumsum(row_bytes(pc.list_flatten(values)))])
        ends = np.cumsum(lengths)
        return sums[ends] - sums[ends - lengths]  # type: ignore[no-any-return]
    width = fixed_width(type_)
    if width is not None:
        return np.full(len(values), width, np.int64)
    if type_ in (pa.string_view(), pa.binary_view()):
        values = values.cast(pa.large_binary())
    return pc.fill_null(pc.binary_length(values), 0).to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def fixed_width(type_: pa.DataType) -> int | None:
    """Bytes of a value of a type whose values all take as many, else None."""
    if pa.types.is_null(type_):
        return 0
    fixed = pa.types.is_primitive(type_) or pa.types.is_decimal(type_) or pa.types.is_fixed_size_binary(type_)
    return (type_.bit_width + 7) // 8 if fixed else None


def without(values: pa.Array, out: pa.BooleanArray, path: Sequence[str] = ()) -> pa.Array:
    """The values, those of the rows ``out`` null; with a ``path`` into a struct only that field of them. What is taken out takes no memory."""
    if not path:
        return values.take(pc.if_else(out, None, pa.array(np.arange(len(values)))))  # ``if_else`` of the values would keep their bytes.
    fields = [values.field(number) for number in range(values.type.num_fields)]
    place = values.type.get_field_index(path[0])
    fields[place] = without(fields[place], out, path[1:])
    return pa.StructArray.from_arrays(fields, fields=list(values.type), mask=values.is_null())
