"""Mining from settings to triples: read pairs, embed, search, choose, write.

Invariant: each step is kept under OUT before the next begins, and a block of queries is done when its file of triples is there: the same
command continues. Queries, positives and corpus are in one space, whose representation stands in OUT/llmemb.json. Memory holds one block.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.config import EmbedSettings, MineSettings, parse_actors
from llmemb_ray.corpus.columns import id_values
from llmemb_ray.embedders.beside import representation_of
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import NotFound, OutputError, RunMismatch
from llmemb_ray.mining import equality, negatives, pairs, positives, triples
from llmemb_ray.mining.equality import Standing
from llmemb_ray.mining.negatives import Eligible, Rules
from llmemb_ray.mining.pairs import Bad
from llmemb_ray.mining.positives import Known
from llmemb_ray.pipeline import job, planning
from llmemb_ray.representation.representation import FILE_NAME, Representation
from llmemb_ray.representation.space import differences
from llmemb_ray.search import exact
from llmemb_ray.shards.run import Run, read_groups
from llmemb_ray.storage import Storage, absolute, redact
from llmemb_ray.written import command_line, given_settings

RECORD = "mining.json"
PLAN, PAIRS, POSITIVES, STANDING = "_mine/plan.json", "_mine/pairs.json", "_mine/positives.json", "_mine/standing.parquet"
QUERIES_RUN, POSITIVES_RUN, CORPUS_RUN = "runs/queries", "runs/positives", "runs/corpus"

FORMAT = 1

NO_VECTOR = "no vector"

Say = Callable[[str], None]
Floats = npt.NDArray[np.float32]
Search = Callable[..., pa.Table]


@dataclass(frozen=True, kw_only=True)
class Mined:
    """What was mined; stands in OUT/mining.json."""

    out: str
    counts: dict[str, Any]
    """rows, queries, rejected, rejects_by_reason, positives, positives_missing, positives_without_vector, candidates, eligible, triples, negatives, short,
    dropped; removed: candidates by reason"""
    space: str
    """Digest of queries and positives; that of the corpus too, but for the form of queries."""
    model: str
    representation: dict[str, Any]
    corpus_run: str
    corpus_run_key: str
    queries: list[str]
    """Files, in the order of query_file."""
    settings: dict[str, Any]
    versions: dict[str, str]
    command: str
    seconds: float
    """Of the command that finished."""
    finished: float
    """Unix time."""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        counts = self.counts
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts["rejects_by_reason"].items()))
        rejected = f", {counts['rejected']:,} rejected ({reasons}; rows in {self.out}/{pairs.REJECTS})" if counts["rejected"] else ""
        yield f"{counts['rows']:,} rows read = {counts['queries']:,} queries with {counts['positives']:,} positives{rejected}"
        if counts["positives_missing"]:
            yield f"{counts['positives_missing']:,} ids of positives are not in the corpus"
        if counts["positives_without_vector"]:
            yield f"{counts['positives_without_vector']:,} positives could not be embedded and have no triple"
        yield f"{counts['candidates']:,} candidates looked at, {counts['eligible']:,} of them eligible"
        removed = counts["removed"]
        told = [f"{removed[reason]:,} by {reason}" for reason in negatives.REASONS if removed.get(reason)]
        if told:
            yield f"removed: {', '.join(told)}"
        short = f", {counts['short']:,} of them with fewer than asked for" if counts["short"] else ""
        dropped = f"; {counts['dropped']:,} left out for too few (keep_short keeps them)" if counts["dropped"] else ""
        yield f"{counts['triples']:,} triples with {counts['negatives']:,} negatives{short}{dropped}"
        yield f"{self.out}/{triples.DIRECTORY} holds the triples, {self.out}/{RECORD} the accounts"


def mine(settings: MineSettings, *, say: Say = lambda line: None) -> Mined:
    """Mines hard negatives into ``settings.out``; continues where it was stopped, and is done at once where it was finished.

    Raises ConfigError, InputError, ModelError, OutputError (RunMismatch for another space), or what the embedding job raises.
    """
    started = time.monotonic()
    settings = settings.model_copy(update={"out": settings.out.rstrip("/")})
    output = Storage(absolute(settings.out), settings.access)
    asked = representation_of(settings.model_copy(update={"role": "document" if settings.symmetric else "query"}))
    spec = settle(settings, asked)
    files = pairs.files_of(settings)
    given = _corpus_run(settings, spec)
    _settle_plan(settings, spec, files, given, output)
    on_cluster = parse_actors(settings.actors) != (0, 0)
    written = _pairs(settings, files, output, say)
    output.put(FILE_NAME, json.dumps(spec.representation.to_dict(), indent=2, ensure_ascii=False).encode())
    with _cluster(settings) if on_cluster else contextlib.nullcontext():
        corpus = given or _embed(settings, CORPUS_RUN, settings.corpus, spec, text_column=settings.text_column, id_column=settings.id_column)
        found = _positives(written, corpus, output)
        queries = _embed(
            settings, QUERIES_RUN, [f"{settings.out}/{pairs.DIRECTORY}"], spec, text_column="anchor", id_column="id", role="query", max_reject_rate=1
        )
        reused = {"reuse": corpus.url} if _same_vectors(corpus, queries) else {}
        of_positives = _embed(
            settings, POSITIVES_RUN, [f"{settings.out}/{positives.DIRECTORY}"], spec, id_column="id", dedup="exact", max_reject_rate=1, **reused
        )
        done = triples.written(output)
        waiting = [name for name in written.parts if name not in done]
        if waiting:
            known = positives.known(output, written.parts)
            standing = _standing(corpus, known, output, on_cluster=on_cluster)
            block = _Block(settings, corpus, queries, of_positives, known, standing, output, search=_search(on_cluster))
            for number, name in enumerate(waiting, len(written.parts) - len(waiting) + 1):
                block.mine(name)
                say(f"{number:,} of {len(written.parts):,} blocks of queries are mined")
    sums = triples.added(list(triples.counts_of(output, written.parts)))
    reasons = Counter(written.reasons) + Counter({positives.NOT_IN_CORPUS: found["rejected"], NO_VECTOR: sums.pop("without_vector", 0)})
    counts = {"rows": written.rows, "queries": written.rows - reasons.total(), "rejected": reasons.total(), "rejects_by_reason": dict(reasons)}
    counts |= {"positives_missing": found["missing"]} | sums
    made = Mined(
        out=redact(settings.out),
        counts=counts,
        space=spec.space.digest,
        model=redact(settings.model),
        representation=spec.representation.to_dict(),
        corpus_run=corpus.url,
        corpus_run_key=corpus.plan.run_key,
        queries=written.files,
        settings=given_settings(settings),
        versions=planning.versions(),
        command=command_line(settings, "mine"),
        seconds=round(time.monotonic() - started, 2),
        finished=time.time(),
    )
    output.put(RECORD, json.dumps(made.to_dict(), indent=1, ensure_ascii=False).encode())
    return made


# -- what stands in OUT ----------------------------------------------------------------------------


def _corpus_run(settings: MineSettings, spec: EmbedderSpec) -> Run | None:
    """The run that stands for the corpus. Raises OutputError if it is of no use, RunMismatch with each field in which its space differs."""
    if settings.corpus_run is None:
        return None
    run = Run(Storage(absolute(settings.corpus_run), settings.access))
    changed = [
        f"  {name}: that run has {there!r}, asked for now {here!r}"
        for name, here, there in differences(_of_documents(spec.space.to_dict()), _of_documents(run.plan.space))
    ]
    if run.plan.role != "document":
        changed.append(f"  role: that run has {run.plan.role!r}, a corpus is embedded as 'document'")
    if changed:
        raise RunMismatch(f"corpus_run: {run.url} is in another vector space; repeat its settings, or give the files with corpus:\n" + "\n".join(changed))
    if run.plan.chunked:
        raise OutputError(f"corpus_run: {run.url} has a vector for each chunk of a text; embed the chunks as rows of their own, or with chunk_pool mean")
    if run.plan.dtype == "ubinary":
        raise OutputError(f"corpus_run: {run.url} holds bits, whose scores cannot be compared with those of positives; name a run of another dtype")
    if run.receipt is None:
        raise OutputError(f"corpus_run: the run in {run.url} is not finished; finish it first, with the embed command that began it")
    return run


def _of_documents(space: dict[str, Any]) -> dict[str, Any]:
    """What of a space decides the vectors of documents."""
    return space | {"representation": {name: value for name, value in space["representation"].items() if name != "query"}}


def _settle_plan(settings: MineSettings, spec: EmbedderSpec, files: Sequence[str], corpus: Run | None, output: Storage) -> None:
    """Keeps what is asked for, or compares it with what OUT was begun with. Raises RunMismatch."""
    columns = ("query_column", "positive_column", "positive_id_column", "query_id_column", "block_queries")
    of_corpus = (
        {"run_key": corpus.plan.run_key}
        if corpus
        else {"files": [redact(url) for url in settings.corpus], "text_column": settings.text_column, "id_column": settings.id_column}
    )
    vectors = {
        "space": spec.space.to_dict(),
        "queries": [pairs.version(url, settings.access) for url in files],
        "qrels": pairs.version(absolute(settings.qrels), settings.access) if settings.qrels else None,
        "corpus": of_corpus,
    } | {name: getattr(settings, name) for name in columns}
    mining = {name: getattr(settings, name) for name in (*Rules.__dataclass_fields__, "top_k", "negatives", "keep_short")}
    asked = json.loads(json.dumps({"format": FORMAT, "vectors": vectors, "mining": mining}))
    try:
        there = json.loads(output.read(PLAN))
    except NotFound:
        foreign = output.list()
        if foreign:
            raise OutputError(f"out: {output.url} is not empty ({foreign[0].path} …) and holds nothing that mine began; choose another out") from None
        there = None
    if there is not None:
        changed = [f"  {name}: there {theirs!r}, asked for now {ours!r}" for name, ours, theirs in differences(asked, there)]
        same_vectors = asked["vectors"] == there["vectors"]
        if changed and not (same_vectors and settings.overwrite):
            way_out = "name another out, or replace the triples with overwrite" if same_vectors else "name another out"
            if not same_vectors and asked["vectors"]["space"] == there["vectors"]["space"]:
                way_out += f"; with corpus_run {settings.corpus_run or f'{output.url}/{CORPUS_RUN}'} its corpus is not embedded again"
            raise RunMismatch(f"out: {output.url} was mined with other settings; {way_out}:\n" + "\n".join(changed))
        if not changed:
            return
        output.delete([RECORD])
        output.delete_tree(triples.DIRECTORY)
    output.put(PLAN, json.dumps(asked, indent=1, ensure_ascii=False).encode())


def _pairs(settings: MineSettings, files: Sequence[str], output: Storage, say: Say) -> pairs.Written:
    if output.exists(PAIRS):
        return pairs.Written(**json.loads(output.read(PAIRS)))
    output.delete_tree(pairs.DIRECTORY)
    written = pairs.write(settings, files, output)
    output.put(PAIRS, json.dumps(asdict(written), indent=1, ensure_ascii=False).encode())
    say(f"{written.pairs:,} of {written.rows:,} rows are queries with a positive")
    return written


def _positives(written: pairs.Written, corpus: Run, output: Storage) -> dict[str, int]:
    if output.exists(POSITIVES):
        return json.loads(output.read(POSITIVES))  # type: ignore[no-any-return]
    counts = positives.write(output, written.parts, corpus, by_id=written.by_id)
    output.put(POSITIVES, json.dumps(counts).encode())
    return counts


def _standing(corpus: Run, known: Known, output: Storage, *, on_cluster: bool) -> Standing:
    if output.exists(STANDING):
        return Standing.of(positives.read(output, STANDING))
    standing = equality.look(corpus, known.texts, on_cluster=on_cluster)
    output.put(STANDING, parquet.to_bytes(standing.table()))
    return standing


def _embed(settings: MineSettings, name: str, files: Sequence[str], spec: EmbedderSpec, **more: Any) -> Run:
    """The finished run of some texts in the space of OUT/llmemb.json."""
    described = {*Representation.__dataclass_fields__, "prompt", "demo", "instruction", "clean", "representation", "role", "overwrite"}
    taken = (settings.model_fields_set & EmbedSettings.model_fields.keys()) - described - {"text_column", "id_column"}
    values = {field: getattr(settings, field) for field in taken}
    values |= {"input": list(files), "output": f"{settings.out}/{name}", "representation": f"{settings.out}/{FILE_NAME}"} | more
    job.run(EmbedSettings.make(values))
    run = Run(Storage(absolute(f"{settings.out}/{name}"), settings.access))
    if run.plan.space != json.loads(json.dumps(spec.space.to_dict())):
        raise RunMismatch(f"{run.url} is in another vector space than {settings.out}/{FILE_NAME}; delete it and run the command again")
    return run


def _same_vectors(corpus: Run, queries: Run) -> bool:
    """Whether vectors of the corpus can stand among those of the positives as they are."""
    engine = ("backend", "compute_dtype", "quantization")
    same = all(corpus.plan.engine[name] == queries.plan.engine[name] for name in engine)
    return same and corpus.plan.space == queries.plan.space and corpus.plan.dtype == "float32" and corpus.plan.corpus["chunk_tokens"] is None


@contextlib.contextmanager
def _cluster(settings: MineSettings) -> Iterator[None]:
    """One Ray for all that mining does."""
    from llmemb_ray.connection import connected

    with connected(settings.ray_address):
        yield


def _search(on_cluster: bool) -> Search:
    if not on_cluster:
        return exact.search_table
    from llmemb_ray.search import cluster

    return cluster.search_table


# -- one block -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The rows found for one query, best first: K of them."""

    scores: npt.NDArray[np.float64]
    files: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    ids: list[Any]


@dataclass(kw_only=True)
class _Triple:
    """One being made. order: the eligible places as they are taken; chosen: places taken and their texts."""

    pair: Mapping[str, Any]
    positive: Mapping[str, Any]
    score: float
    found: _Found
    eligible: Eligible
    order: npt.NDArray[np.int64]
    looked: int
    chosen: dict[int, str]
    seen: set[str]


class _Block:
    """Mines one part after the other."""

    def __init__(
        self, settings: MineSettings, corpus: Run, queries: Run, of_positives: Run, known: Known, standing: Standing, output: Storage, *, search: Search
    ) -> None:
        self._settings, self._rules = settings, Rules.of(settings)
        self._corpus, self._queries, self._positives = corpus, queries, of_positives
        self._known, self._standing, self._output, self._search = known, standing, output, search

    def mine(self, name: str) -> None:
        """Writes the triples of a part."""
        rows = positives.read(self._output, f"{pairs.DIRECTORY}/{name}").to_pylist()
        asked_of: dict[int, list[dict[str, Any]]] = {}
        for table in positives.part(self._output, name):
            for row in table.to_pylist():
                asked_of.setdefault(row["pair"], []).append(row)
        queries, made = _vectors(self._queries, name, len(rows))
        of_positives, there = _vectors(self._positives, name, sum(map(len, asked_of.values())))
        numbers = [number for number in range(len(rows)) if made[number] and any(there[row["id"]] for row in asked_of.get(number, []))]
        without = [rows[number] for number in sorted(asked_of.keys() - set(numbers))]
        if without:
            detail = f"query or positives could not be embedded; see {self._queries.url}/{pairs.REJECTS} and {self._positives.url}/{pairs.REJECTS}"
            bad = [Bad(**{field: row[field] for field in ("query_file", "query_row", "query_id")}, reason=NO_VECTOR, detail=detail) for row in without]
            pairs.write_rejects(self._output, f"vectors-{name}", bad)
        found = self._find(queries[numbers]) if numbers else []
        started = [
            self._begin(rows[number], place, row, hits, queries[number], of_positives[row["id"]])
            for number, hits in zip(numbers, found, strict=True)
            for place, row in enumerate(asked_of[number])
            if there[row["id"]]
        ]
        self._fill(started)
        lost = sum(not there[row["id"]] for number in numbers for row in asked_of[number])
        counts: dict[str, Any] = {
            "positives": len(started),
            "positives_without_vector": lost,
            "without_vector": len(without),
            "candidates": sum(len(one.found.scores) for one in started),
        }
        removed: Counter[str] = sum((one.eligible.removed for one in started), Counter())
        kept = []
        counts |= {"eligible": sum(len(one.order) for one in started), "triples": 0, "negatives": 0, "short": 0, "dropped": 0}
        for one in started:
            short = len(one.chosen) < self._settings.negatives
            if short and not self._settings.keep_short:
                counts["dropped"] += 1
                continue
            kept.append(_row(one))
            counts["triples"] += 1
            counts["short"] += short
            counts["negatives"] += len(one.chosen)
        triples.write(self._output, name, kept, counts | {"removed": dict(removed)})

    def _find(self, queries_QD: Floats) -> list[_Found]:
        table = self._search(self._corpus, queries_QD, top_k=self._settings.top_k)
        edges = np.searchsorted(table["query"].to_numpy(), np.arange(len(queries_QD) + 1))
        scores, files, rows = (table[name].to_numpy() for name in ("score", "source_file", "source_row"))
        keys = self._standing.keys_at(equality.places(files, rows))
        ids = id_values(table["id"]) if "id" in table.column_names else [None] * table.num_rows
        parts = (slice(first, last) for first, last in itertools.pairwise(edges.tolist()))
        return [_Found(scores=scores[part], files=files[part], rows=rows[part], keys=keys[part], ids=ids[part]) for part in parts]

    def _begin(self, pair: Mapping[str, Any], place: int, positive: Mapping[str, Any], found: _Found, query_D: Floats, positive_D: Floats) -> _Triple:
        anchor = equality.key(pair["anchor"])
        score = float((query_D.astype(np.float64) * positive_D).sum())
        own, same = found.keys == anchor, np.isin(found.keys, self._known.of(anchor))
        eligible = negatives.eligible(found.scores, own_K=own, positives_K=same, positive_score=score, rules=self._rules)
        order = negatives.preference(eligible.places, self._rules, row=(pair["query_file"], pair["query_row"], place))
        seen = {equality.normal(pair["anchor"]), equality.normal(positive["text"])}
        return _Triple(pair=pair, positive=positive, score=score, found=found, eligible=eligible, order=order, looked=0, chosen={}, seen=seen)

    def _fill(self, started: Sequence[_Triple]) -> None:
        """Takes negatives in their order until there are enough; of rows whose texts are the same, the first."""
        wanted = self._settings.negatives
        texts: dict[tuple[int, int], str] = {}
        while True:
            waiting = [(one, one.order[one.looked : one.looked + wanted - len(one.chosen)].tolist()) for one in started if len(one.chosen) < wanted]
            waiting = [(one, places) for one, places in waiting if places]
            if not waiting:
                return
            needed = {(int(one.found.files[place]), int(one.found.rows[place])) for one, places in waiting for place in places}
            texts |= positives.texts_at(self._corpus, needed - texts.keys())
            for one, places in waiting:
                one.looked += len(places)
                for place in places:
                    text = texts[int(one.found.files[place]), int(one.found.rows[place])]
                    normal = equality.normal(text)
                    if normal in one.seen:
                        one.eligible.removed[negatives.DUPLICATE] += 1
                    else:
                        one.seen.add(normal)
                        one.chosen[place] = text


def _row(one: _Triple) -> dict[str, Any]:
    places = sorted(one.chosen)
    found = one.found
    return {
        "anchor": one.pair["anchor"],
        "positive": one.positive["text"],
        "negative": [one.chosen[place] for place in places],
        "positive_score": one.score,
        "negative_scores": found.scores[places].tolist(),
        "negative_ranks": one.eligible.ranks[places].tolist(),
        "query_file": one.pair["query_file"],
        "query_row": one.pair["query_row"],
        "query_id": one.pair["query_id"],
        "positive_id": one.positive["positive_id"],
        "negative_ids": [None if found.ids[place] is None else str(found.ids[place]) for place in places],
        "negative_files": found.files[places].tolist(),
        "negative_rows": found.rows[places].tolist(),
    }


def _vectors(run: Run, name: str, count: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(float32 [count, D], which of them are there) of the file ``name`` of a run's input, by the places in it."""
    vectors, there = np.zeros((count, run.plan.dimension), np.float32), np.zeros(count, np.bool_)
    index = next((file.index for file in run.plan.files if posixpath.basename(file.url) == name), None)
    for commit in run.commits:
        if commit.file == index and commit.shard is not None:
            for table in read_groups(run.storage, commit.shard, ["id", "embedding"]):
                rows = table["id"].to_numpy()
                vectors[rows], there[rows] = run.precision.decode(table["embedding"]), True
    return vectors, there
