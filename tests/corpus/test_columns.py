"""Texts out of columns of any kind, the columns a job takes, and the row filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.corpus.bounds import row_bytes
from llmemb_ray.corpus.columns import Selection, column, filtered, id_values, without_views
from llmemb_ray.corpus.files import BadFile
from llmemb_ray.errors import ConfigError

WORDS = ["one", "naïve 数据 😀", None, "", " \t\n\u3000", "last"]
TEXTS = ["one", "naïve 数据 😀", None, None, None, "last"]
REASONS = {2: "null", 3: "empty", 4: "empty"}


def texts_of(selection: Selection, table: pa.Table) -> tuple[list[str | None], dict[int, str]]:
    texts, problems = selection.texts(table)
    return texts, {row: reason for row, (reason, _) in problems.items()}


KINDS = {
    "string": pa.array(WORDS, pa.string()),
    "large_string": pa.array(WORDS, pa.large_string()),
    "string_view": pa.array(WORDS, pa.string_view()),
    "binary": pa.array([None if word is None else word.encode() for word in WORDS], pa.binary()),
    "large_binary": pa.array([None if word is None else word.encode() for word in WORDS], pa.large_binary()),
    "binary_view": pa.array([None if word is None else word.encode() for word in WORDS], pa.binary_view()),
    "dictionary": pa.array(WORDS, pa.string()).dictionary_encode(),
    "dictionary of large_string": pa.array(WORDS, pa.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_text_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    table = pa.table({"text": KINDS[kind]})
    Selection(text="text").check(table.schema, {})
    assert texts_of(Selection(text="text"), table) == (TEXTS, REASONS)
    pq.write_table(table, tmp_path / "x.parquet")
    again = pq.read_table(tmp_path / "x.parquet", columns=["text"])
    assert texts_of(Selection(text="text"), again) == (TEXTS, REASONS)


def spoilt(kind: pa.DataType) -> pa.Array:
    """Bytes that are no UTF-8 in a column that says it is text."""
    data = pa.array([b"fine", b"caf\xe9", None, b"\xff\xfe"], pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, 4, data.buffers())


@pytest.mark.parametrize(
    "array",
    [pa.array([b"fine", b"caf\xe9", None, b"\xff\xfe"], pa.binary()), spoilt(pa.string()), spoilt(pa.large_string())],
    ids=["binary", "string", "large_string"],
)
@pytest.mark.parametrize("text", ["body", "about: {body}"])
def test_what_is_no_utf8_becomes_a_reject_that_says_where(array: pa.Array, text: str) -> None:
    texts, problems = Selection(text=text).texts(pa.table({"body": array}))
    assert [value is None for value in texts] == [False, True, True, True]
    assert problems[1] == ("undecodable", "column 'body': not UTF-8 at byte 3")
    assert problems[3] == ("undecodable", "column 'body': not UTF-8 at byte 0")
    assert problems[2][0] == "null"


def test_tables_without_views_can_be_taken_apart_by_rows() -> None:
    words = pa.array(["one", None, "three"], pa.string_view())
    nested = {"doc": pa.StructArray.from_arrays([words], ["body"]), "list": pa.ListArray.from_arrays(pa.array([0, 1, 1, 3], pa.int32()), words)}
    table = without_views(pa.table({"text": words, "data": words.cast(pa.binary_view())} | nested))
    assert table.take(pa.array([2])).to_pylist() == [{"text": "three", "data": b"three", "doc": {"body": "three"}, "list": [None, "three"]}]
    assert without_views(pa.table({"kind": pa.array(["x"]).dictionary_encode()})).schema.field("kind").type == pa.string()
    plain = pa.table({"text": ["x"], "kind": [["x"]]})
    assert without_views(plain) is plain


@pytest.mark.parametrize(
    ("value", "size", "kind"),
    [
        ([["ab", None], ["c"]], 3, pa.list_(pa.list_(pa.string()))),
        ([["ab", None], ["c"]], 3, pa.list_view(pa.large_list(pa.string_view()))),
        ([("k", b"vvv")], 4, pa.map_(pa.string(), pa.binary())),
        ({"a": "xyz", "b": [1, 2], "c": None}, 19, pa.struct([("a", pa.dictionary(pa.int8(), pa.string())), ("b", pa.list_(pa.int64())), ("c", pa.string())])),
        (["ab", "c"], 3, pa.list_(pa.string(), 2)),
        ('"ab"', 4, pa.json_()),
        ("ab", 2, pa.string()),
    ],
)
def test_bytes_of_values_count_all_that_is_in_them(value: Any, size: int, kind: pa.DataType) -> None:
    values = pa.array([value, None, value, value], kind).slice(1)
    assert row_bytes(values).tolist() == [0, size, size]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_invalid_utf8_in_a_dictionary(kind: pa.DataType) -> None:
    array = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 3], pa.int32()), spoilt(kind))
    texts, problems = Selection(text="text").texts(pa.table({"text": array}))
    assert texts == ["fine", None, "fine", None]
    assert {row: reason for row, (reason, _) in problems.items()} == {1: "undecodable", 3: "undecodable"}


def test_a_column_of_nothing_but_nulls_has_no_type_and_is_still_text() -> None:
    table = pa.table({"text": pa.nulls(3)})
    Selection(text="text").check(table.schema, {})
    assert texts_of(Selection(text="text"), table) == ([None] * 3, dict.fromkeys(range(3), "null"))


def test_fields_of_structs(tmp_path: Path) -> None:
    rows = [{"doc": {"body": {"en": "hello"}, "n": 1}}, {"doc": {"body": None, "n": 2}}, {"doc": None}]
    table = pa.Table.from_pylist(rows)
    selection = Selection(text="doc.body.en", keep=("doc.n",))
    assert selection.check(table.schema, {}) == {"doc.n": pa.int64()}
    pq.write_table(table, tmp_path / "x.parquet")
    read = pq.ParquetFile(tmp_path / "x.parquet").read(columns=selection.columns(table.schema, {}))
    assert texts_of(selection, read) == (["hello", None, None], {1: "null", 2: "null"})
    assert column(read, "doc.n").to_pylist() == [1, 2, None]


def test_a_column_whose_name_has_a_dot_goes_before_a_field() -> None:
    table = pa.table({"a.b": ["column"], "a": [{"b": "field"}]})
    assert texts_of(Selection(text="a.b"), table)[0] == ["column"]


def test_templates_fill_nulls_with_nothing_and_take_columns_that_are_not_text() -> None:
    table = pa.table(
        {
            "title": ["A", None, None, "D"],
            "text": ["one", "two", None, None],
            "year": pa.array([2020, None, None, 2023], pa.int16()),
            "rate": pa.array([0.5, 1.0, None, 2.0]),
            "fresh": [True, False, None, None],
        }
    )
    assert texts_of(Selection(text="{title} {text}"), table) == (["A one", "two", None, "D"], {2: "null"})
    assert texts_of(Selection(text="{{{title}}} ({year}, {rate}, {fresh})"), table)[0] == ["{A} (2020, 0.5, true)", "{} (, 1, false)", None, "{D} (2023, 2, )"]


def test_a_template_whose_columns_are_blank_is_empty() -> None:
    assert texts_of(Selection(text="{a} {b}"), pa.table({"a": [" "], "b": ["\n"]})) == ([None], {0: "empty"})


@pytest.mark.parametrize("template", ["{title", "title}", "{}", "{title!r}", "{title:>10}", "{title} {}", ""])
def test_a_template_that_cannot_be_filled_is_refused(template: str) -> None:
    if template == "title}":
        selection = Selection(text=template)
        with pytest.raises(BadFile, match=r"has no column 'title}'"):
            selection.check(pa.schema([("title", pa.string())]), {})
        return
    with pytest.raises(ConfigError, match=r"^text_column: "):
        Selection(text=template)


@pytest.mark.parametrize("name", ["embedding", "source_row", "id"])
def test_names_of_the_shards_own_columns_cannot_be_kept(name: str) -> None:
    with pytest.raises(ConfigError, match=f"keep_columns: '{name}' is a name that the shards use themselves"):
        Selection(text="text", keep=(name,))


SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("words", pa.list_(pa.string())),
        ("pairs", pa.map_(pa.string(), pa.string())),
        ("doc", pa.struct([("body", pa.string()), ("parts", pa.list_(pa.string()))])),
        ("n", pa.int64()),
        ("span", pa.month_day_nano_interval()),
        ("twice", pa.string()),
        ("twice", pa.string()),
    ]
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("body", "has no column 'body'; its columns are text, words, pairs, doc, n, span, twice"),
        ("doc.title", "has no column 'doc.title': struct<.*> has no field 'title'"),
        ("text.body", "has no column 'text.body': string has no field 'body'"),
        ("words", "column 'words' is list<.*>, a list and not one text; join its items into a text column first"),
        ("{words}", "column 'words' is list<.*>, a list and not one text; join"),
        ("pairs", "column 'pairs' is map<.*>, a list and not one text"),
        ("doc.parts", "column 'doc.parts' is list<.*>, a list and not one text"),
        ("doc", "column 'doc' is struct<.*>; name a field of it, such as doc.FIELD"),
        ("{doc}", "column 'doc' is struct<.*>; name a field of it, such as doc.FIELD"),
        ("n", "column 'n' is int64, not text; name a text column, or write it into a template such as '{n}'"),
        ("{text} {span}", "column 'span' is month_day_nano_interval, which cannot be written as text; leave it out of the template"),
        ("twice", "has 2 columns named 'twice'"),
        ("{text} {twice}", "has 2 columns named 'twice'"),
    ],
)
def test_a_column_that_gives_no_text_is_a_reason_that_says_what_to_do(text: str, reason: str) -> None:
    with pytest.raises(BadFile, match=reason.replace("{n}", r"\{n\}")):
        Selection(text=text).check(SCHEMA, {})


def test_missing_id_and_kept_columns_are_reasons_too() -> None:
    for selection in (Selection(text="text", id="key"), Selection(text="text", keep=("key",))):
        with pytest.raises(BadFile, match="has no column 'key'"):
            selection.check(SCHEMA, {})


def test_a_column_id_is_taken_where_no_other_is_named() -> None:
    schema = pa.schema([("id", pa.int64()), ("key", pa.string()), ("text", pa.string())])
    assert Selection(text="text").with_default_id(schema).id == "id"
    assert Selection(text="text", id="key").with_default_id(schema).id == "key"
    assert Selection(text="text").with_default_id(SCHEMA).id is None


def test_only_the_columns_of_the_job_are_read() -> None:
    schema = pa.schema([(name, pa.string()) for name in ("id", "title", "text", "lang", "other", "language")])
    selection = Selection(text="{title}: {text}", id="id", keep=("lang",), filter="language = 'en' AND year > 2000")
    assert set(selection.columns(schema, {"year": 2001})) == {"id", "title", "text", "lang", "language"}


def test_partition_columns_serve_as_text_id_and_kept() -> None:
    partitions: dict[str, Any] = {"year": 2024, "lang": "en"}
    selection = Selection(text="{lang}: {text}", id="year", keep=("lang",))
    assert selection.check(pa.schema([("text", pa.string())]), partitions) == {"year": pa.int64(), "lang": pa.string()}
    assert selection.columns(pa.schema([("text", pa.string())]), partitions) == ["text"]


def test_views_and_dictionaries_are_kept_as_their_values() -> None:
    schema = pa.schema([("text", pa.string()), ("a", pa.dictionary(pa.int8(), pa.string_view())), ("b", pa.binary_view())])
    assert Selection(text="text", keep=("a", "b")).check(schema, {}) == {"a": pa.string(), "b": pa.binary()}


# -- filter ------------------------------------------------------------------------------------------

ROWS = pa.table({"n": [1, 2, None, 4], "lang": ["en", "de", "en", None], "text": list("abcd")})


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("n > 1", ["b", "d"]),
        ("lang = 'en'", ["a", "c"]),
        ("lang = 'en' AND n IS NOT NULL OR n = 4", ["a", "d"]),
        ("true", ["a", "b", "c", "d"]),
        ("false", []),
        ("length(text) + n = 3", ["b"]),
    ],
)
def test_a_filter_keeps_rows_in_order(condition: str, kept: list[str]) -> None:
    assert filtered(ROWS, condition)["text"].to_pylist() == kept
    assert filtered(ROWS, condition).column_names == ROWS.column_names


@pytest.mark.parametrize("condition", ["no_such_column > 1", "n >", "n = 'x' AND (", "text + 1 > n"])
def test_a_bad_filter_is_refused_in_one_line(condition: str) -> None:
    with pytest.raises(ConfigError, match=r"^filter: ") as caught:
        filtered(ROWS, condition)
    assert repr(condition) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_filter_reaches_no_files(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("n\n1\n")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "secret.parquet")
    for source in (f"read_csv('{tmp_path}/secret.csv')", f"'{tmp_path}/secret.parquet'", f"read_text('{tmp_path}/secret.csv')", "glob('/*')"):
        with pytest.raises(ConfigError, match=r"^filter: "):
            filtered(ROWS, f"n IN (SELECT 1 FROM {source})")
    for condition in (f"true) TO '{tmp_path}/stolen' --", f"true; COPY corpus TO '{tmp_path}/stolen'; SELECT 0 AS __row WHERE true"):
        with pytest.raises(ConfigError, match=r"^filter: "):
            filtered(ROWS, condition)
    assert not (tmp_path / "stolen").exists()


def test_ids_that_are_no_utf8_are_written_out() -> None:
    assert id_values(pa.chunked_array([spoilt(pa.string())])) == ["fine", "caf\\xe9", None, "\\xff\\xfe"]
    assert id_values(pa.chunked_array([pa.array([1, None])])) == [1, None]
