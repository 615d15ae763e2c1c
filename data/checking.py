"""Read all of a mix, records and pictures, and collect what is wrong, how long samples are, and what
padding costs.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.catalog import CatalogError, Dataset, annotation_path
from data.conversation import IGNORED, IMAGE_ID, TEMPLATES, ConversationError, encode_many, remembering
from data.findings import KINDS, Finding
from data.inspection import Picture, broken, defects, paths_of, picture
from data.records import Pairs, Record, RecordError, stream
from data.spool import Findings, Seen, Spool, repeated

BATCH = 512  # records encoded together
AT_ONCE = 16  # pictures that a thread takes at a time
WAITING = 32  # of those on their way to the threads
HINTS = 50  # missing pictures for which a file of a like name is looked for: its folder may be long
SHOWN = 12  # samples kept for the report
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What samples are measured with; no tokenizer: lengths are not."""

    tokenizer: Any = None
    template: str = "v1"
    max_length: int = 2048
    patches: int = 576
    pictures: bool = True
    workers: int = 4


@dataclass
class FileReport:
    """What one annotation file holds."""

    name: str
    path: str
    expected: int
    exact: bool
    records: int = 0
    with_pictures: int = 0
    pictures: int = 0  # different files
    turns: int = 0
    supervised: int = 0  # tokens
    tokens: int = 0  # patches included
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """All of a check; `lengths` are tokens with patches, `signed` words, negative for text only."""

    options: Options
    root: Path
    files: list[FileReport] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    lengths: array[int] = field(default_factory=lambda: array("i"))
    signed: array[int] = field(default_factory=lambda: array("i"))
    sides: Counter[int] = field(default_factory=Counter)  # pictures by their longer side, in steps of 64
    samples: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """Findings that keep a record, or an answer of it, from being trained on."""
        return sum(count for kind, count in self.findings.counts.items() if KINDS[kind].lost)


class _Checker:
    def __init__(self, report: Report, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self.report, self.pool, self.progress = report, pool, progress
        self.options = report.options
        self.template = TEMPLATES[report.options.template]
        self.specials: list[str] = []
        self.memory = None
        if report.options.tokenizer is not None:
            self.memory = remembering(report.options.tokenizer, report.options.template)
            self.specials = [str(token) for token in report.options.tokenizer.all_special_tokens]
        self.seen = Seen()  # pictures, by the hash of their path
        self.bad, self.bad_at = array("Q"), array("Q")  # those with defects, and where these are kept
        self.defects = Spool()
        self.twice: list[str] = []  # fields of the record being read that stand in it twice
        self.chunk: list[str] = []
        self.waiting: deque[tuple[list[str], Future[list[Picture]]]] = deque()

    def file(self, dataset: Dataset) -> None:
        """Check one annotation file."""
        file = FileReport(dataset.name, dataset.annotation, dataset.rows, dataset.exact)
        self.report.files.append(file)
        try:
            path = annotation_path(self.report.root, dataset.annotation)
        except CatalogError as error:
            self.tell(file, "file-missing", -1, "", str(error))
            return
        file.path = str(path)
        size = path.stat().st_size
        # Who shows which picture: a picture's defects are known after its record has passed.
        shows, shown_by = array("Q"), array("I")
        ids, talks = array("Q"), array("Q")
        try:
            for batch in _batches(self.read(file, path)):
                self.batch(file, path, batch, shows, shown_by, ids, talks)
                self.progress(dataset.name, batch[-1].end, size)
        except RecordError as error:
            self.tell(file, "file-torn", -1, "", str(error))
        else:
            if not file.records:
                self.tell(file, "file-empty", -1, "", "")
        self.send(path)
        self.settle(0)
        self.pictures(file, path, shows, shown_by)
        self.repeats(file, "duplicate-id", ids)
        self.repeats(file, "duplicate-record", talks)
        off = abs(file.records - file.expected)
        if file.expected and off > (0 if file.exact else 0.02 * file.expected):
            self.tell(file, "rows", -1, "", f"{file.records:,} records, the catalog says {file.expected:,}")

    def read(self, file: FileReport, path: Path) -> Iterator[Record]:
        """The records of a file, with what their decoding shows."""
        self.twice.clear()  # a file cut short may have left some
        for record in stream(path, made=self.fields):
            if self.twice:
                name = str(record.value.get("id", "")) if isinstance(record.value, dict) else ""
                self.tell(file, "field-twice", record.number, name, ", ".join(sorted(set(self.twice))))
                self.twice.clear()
            yield record

    def fields(self, pairs: Pairs) -> dict[str, Any]:
        """A JSON object of its fields."""
        whole = dict(pairs)
        if len(whole) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice += [name for name in whole if names.count(name) > 1]
        return whole

    def batch(
        self,
        file: FileReport,
        path: Path,
        batch: list[Record],
        shows: array[int],
        shown_by: array[int],
        ids: array[int],
        talks: array[int],
    ) -> None:
        sound: list[Record] = []
        for record in batch:
            file.records += 1
            value = record.value
            name = str(value.get("id", "")) if isinstance(value, dict) else ""
            ids.append(_hash(name) if name else _hash(f"\0{record.number}"))
            if fault := broken(value, self.template):
                talks.append(_hash(f"\0{record.number}"))
                self.tell(file, fault[0], record.number, name, fault[1])
                continue
            talks.append(_hash("\0".join([*paths_of(value), *(t["value"] for t in value["conversations"])])))
            file.turns += len(value["conversations"])
            lost = False
            for kind, detail in defects(value, self.template, self.specials):
                self.tell(file, kind, record.number, name, detail)
                lost = lost or (KINDS[kind].lost and kind != "leading-answer")
            paths = paths_of(value)
            file.with_pictures += bool(paths)
            if self.options.pictures:
                for each in paths:
                    shows.append(_hash(each))
                    shown_by.append(record.number)
                    self.look(file, path, each, shows[-1])
            if not lost:
                sound.append(record)
        if self.options.tokenizer is not None:
            self.measure(file, sound)
        if len(self.report.samples) < SHOWN * len(self.report.files) and sound:
            self.report.samples.append((file.name, sound[len(sound) // 2].value))

    def measure(self, file: FileReport, records: list[Record]) -> None:
        """Lengths and learnt shares under the tokenizer."""
        asked = [(record.value["conversations"], bool(paths_of(record.value))) for record in records]
        patches, longest = self.options.patches, self.options.max_length
        encoded = encode_many(asked, self.options.tokenizer, self.options.template, self.memory)
        for record, outcome in zip(records, encoded, strict=True):
            name = str(record.value.get("id", ""))
            if isinstance(outcome, ConversationError):
                self.tell(file, "encoding", record.number, name, str(outcome))
                continue
            images = outcome.input_ids.count(IMAGE_ID)
            length = len(outcome.input_ids) + images * (patches - 1)
            if length > longest:
                first = next((at for at, label in enumerate(outcome.labels) if label != IGNORED), 0)
                before = first + outcome.input_ids[:first].count(IMAGE_ID) * (patches - 1)
                kind = "over-long" if before < longest else "question-too-long"
                self.tell(file, kind, record.number, name, f"{length} tokens")
            length = min(length, longest)
            file.tokens += length
            file.supervised += sum(label != IGNORED for label in outcome.labels)
            words = sum(len(turn["value"].split()) for turn in record.value["conversations"])
            self.report.lengths.append(length)
            self.report.signed.append(max(1, words) if images else -max(1, words))

    def look(self, file: FileReport, path: Path, image: str, key: int) -> None:
        """Have a picture checked, if it was not yet."""
        if self.seen.new(key):
            file.pictures += 1
            self.chunk.append(image)
            if len(self.chunk) == AT_ONCE:
                self.send(path)

    def send(self, path: Path) -> None:
        """Give the threads what has come together."""
        root, beside, hint, chunk = self.report.root, path.parent, len(self.bad) < HINTS, self.chunk
        if chunk:
            looked = self.pool.submit(lambda: [picture(root, beside, image, hint) for image in chunk])
            self.waiting.append((chunk, looked))
            self.chunk = []
        if len(self.waiting) >= WAITING:
            self.settle(WAITING // 2)

    def settle(self, most: int) -> None:
        """Take in the oldest results until at most that many are open."""
        while len(self.waiting) > most:
            images, looked = self.waiting.popleft()
            for image, seen in zip(images, looked.result(), strict=True):
                if seen.width:
                    self.report.sides[max(seen.width, seen.height) // 64 * 64] += 1
                if seen.defects:
                    self.bad.append(_hash(image))
                    self.bad_at.append(self.defects.put(seen.defects))

    def pictures(self, file: FileReport, path: Path, shows: array[int], shown_by: array[int]) -> None:
        """Tell each record that shows a picture with a defect."""
        if not self.bad or not shows:
            return
        bad = np.array(self.bad, dtype=np.uint64)
        order = np.argsort(bad)
        keys = np.frombuffer(shows, dtype=np.uint64)
        at = np.searchsorted(bad, keys, sorter=order).clip(max=len(bad) - 1)
        for place in np.flatnonzero(bad[order[at]] == keys).tolist():
            for kind, detail in self.defects.get(self.bad_at[int(order[at[place]])]):
                self.tell(file, kind, shown_by[place], "", detail)

    def repeats(self, file: FileReport, kind: str, keys: array[int]) -> None:
        """Tell each record whose key occurred before."""
        for at, first in repeated(np.array(keys, dtype=np.uint64)):
            self.tell(file, kind, at, "", f"as record {first}")

    def tell(self, file: FileReport, kind: str, record: int, id: str, detail: str) -> None:
        file.kinds[kind] += 1
        self.report.findings.append(Finding(kind, file.path, record, id, detail))


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Records by the batch; what was read before a fault in the file comes before the fault."""
    batch: list[Record] = []
    fault: RecordError | None = None
    while fault is None:
        try:
            batch.append(next(records))
        except StopIteration:
            break
        except RecordError as error:
            fault = error
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
    if fault:
        raise fault


def check(root: Path, datasets: list[Dataset], options: Options, progress: Progress) -> Report:
    """Check the data sets under a root; `progress` is told file, bytes read, bytes of it."""
    report = Report(options, root)
    with ThreadPoolExecutor(max(1, options.workers), thread_name_prefix="check") as pool:
        checker = _Checker(report, pool, progress)
        for dataset in datasets:
            checker.file(dataset)
    return report


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
