"""State in one SQLite file, for one hub.

One thread owns the connection; the hub's loop awaits it. The file is locked for as long as
the hub runs (the lock ends with the process, however it ends), a change is on disk before it is
answered (WAL, ``synchronous=FULL``), and a file that cannot be read is never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from steerscope.hub.storage.documents import (
    EMPTY,
    MAX_REQUESTS,
    MICROSECONDS,
    REQUEST_SECONDS,
    Answered,
    Change,
    RulesDocument,
    Snapshot,
    StaleStateError,
    StateError,
    decode_answered,
    decode_document,
    decode_rules,
    encode,
    number,
)

APPLICATION_ID = 0x53544545
"""``STEE``, in the file's header: it is ours."""

MIGRATIONS = (
    """
    CREATE TABLE state (mark TEXT NOT NULL);
    CREATE TABLE policies (
        name TEXT PRIMARY KEY, document BLOB NOT NULL, sha256 BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE answers (
        request_id TEXT PRIMARY KEY, at INTEGER NOT NULL, answer BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX answers_by_time ON answers (at);
    """,
    """
    CREATE TABLE rules (
        id INTEGER PRIMARY KEY CHECK (id = 1), document BLOB NOT NULL, sha256 BLOB NOT NULL
    );
    """,
)
"""Step ``i`` leads from schema version ``i`` to ``i + 1``. Only ever append."""

BUSY_SECONDS = 1.0

Result = TypeVar("Result")


class SqliteStorage:
    """A ``PolicyStorage`` in the file ``path``, which is made if it is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "steerscope-sqlite")
        self._connection: sqlite3.Connection | None = None

    @property
    def place(self) -> str:
        return f"sqlite {self._path}"

    async def open(self) -> None:
        await self._run(self._open)

    async def load(self, unless: str = "") -> Snapshot | None:
        return await self._run(lambda: self._load(unless))

    async def commit(self, base: Snapshot, change: Change) -> None:
        await self._run(lambda: self._commit(base, change))

    async def answered(self, request_id: str, since: int) -> Answered | None:
        return await self._run(lambda: self._answered(request_id, since))

    async def changes(self, seconds: float) -> None:
        await asyncio.sleep(seconds)  # the file is locked: nobody else can

    async def close(self) -> None:
        await self._run(self._close)
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._told, work)

    def _told(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except sqlite3.Error as error:
            raise StateError(f"{self.place}: {error}") from None

    @property
    def _file(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StateError(f"{self.place}: not open")
        return self._connection

    def _open(self) -> None:
        self._make_file()
        self._connection = sqlite3.connect(
            self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(self._connection)
        except BaseException as error:
            self._close()
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise StateError(f"{self.place}: another hub uses this file") from None
            raise

    def _make_file(self) -> None:
        """Only the owner may read what steers the model."""
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StateError(f"{self.place}: {error.strerror or error}") from None

    def _prepare(self, file: sqlite3.Connection) -> None:
        file.execute("PRAGMA locking_mode = EXCLUSIVE")
        file.execute("PRAGMA trusted_schema = OFF")
        with self._transaction(file):
            self._check(file)
        # Only now that it is known to be ours may its journal mode change.
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = FULL")
        with self._transaction(file):
            self._migrate(file)

    def _check(self, file: sqlite3.Connection) -> None:
        """Raise ``StateError`` unless the file is empty, or ours and whole."""
        tables = _number(file, "SELECT count(*) FROM sqlite_schema")
        if tables and _number(file, "PRAGMA application_id") != APPLICATION_ID:
            raise StateError(f"{self.place}: this is a database of something else")
        version = _number(file, "PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise StateError(
                f"{self.place}: schema version {version} is of a newer Steerscope "
                f"(this one knows up to {len(MIGRATIONS)})"
            )
        (verdict,) = file.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise StateError(f"{self.place}: the file is damaged: {verdict}")

    def _migrate(self, file: sqlite3.Connection) -> None:
        version = _number(file, "PRAGMA user_version")
        for step in MIGRATIONS[version:]:
            for statement in step.split(";"):
                file.execute(statement)
        file.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        file.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        if not version:
            file.execute("INSERT INTO state VALUES (?)", (EMPTY.mark,))

    def _load(self, unless: str) -> Snapshot | None:
        mark = self._mark()
        if mark == unless:
            return None
        rows = self._file.execute("SELECT name, document, sha256 FROM policies")
        documents = {}
        for name, payload, digest in rows:
            self._check_whole(payload, digest, f"policy {name!r:.80} is")
            documents[name] = decode_document(name, payload, self.place)
        return Snapshot(mark=mark, documents=MappingProxyType(documents), rules=self._rules())

    def _rules(self) -> RulesDocument | None:
        row = self._file.execute("SELECT document, sha256 FROM rules").fetchone()
        if row is None:
            return None
        payload, digest = row
        self._check_whole(payload, digest, "the rules are")
        return decode_rules(payload, self.place)

    def _check_whole(self, payload: object, digest: object, what: str) -> None:
        if not isinstance(payload, bytes) or hashlib.sha256(payload).digest() != digest:
            raise StateError(f"{self.place}: {what} damaged")

    def _mark(self) -> str:
        rows = self._file.execute("SELECT mark FROM state").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], str):
            raise StateError(f"{self.place}: the file is damaged: it has no mark")
        number(rows[0][0])
        mark: str = rows[0][0]
        return mark

    def _commit(self, base: Snapshot, change: Change) -> None:
        file = self._file
        with self._transaction(file):
            if self._mark() != base.mark:
                raise StaleStateError(f"{self.place}: the state has changed")
            file.execute("UPDATE state SET mark = ?", (change.mark,))
            file.executemany("DELETE FROM policies WHERE name = ?", [(n,) for n in change.drop])
            for document in change.put:
                payload = encode(document)
                named = (document.name, payload, hashlib.sha256(payload).digest())
                file.execute("INSERT OR REPLACE INTO policies VALUES (?, ?, ?)", named)
            if change.rules is not None:
                payload = encode(change.rules)
                row = (payload, hashlib.sha256(payload).digest())
                file.execute("INSERT OR REPLACE INTO rules VALUES (1, ?, ?)", row)
            if (answer := change.answered) is not None:
                self._keep(file, answer)

    def _keep(self, file: sqlite3.Connection, answer: Answered) -> None:
        row = (answer.request_id, answer.at, encode(answer))
        file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)
        oldest = answer.at - REQUEST_SECONDS * MICROSECONDS
        file.execute("DELETE FROM answers WHERE at < ?", (oldest,))
        file.execute(
            "DELETE FROM answers WHERE request_id IN "
            "(SELECT request_id FROM answers ORDER BY at DESC LIMIT -1 OFFSET ?)",
            (MAX_REQUESTS,),
        )

    def _answered(self, request_id: str, since: int) -> Answered | None:
        sql = "SELECT answer FROM answers WHERE request_id = ? AND at >= ?"
        row = self._file.execute(sql, (request_id, since)).fetchone()
        return None if row is None else decode_answered(row[0], self.place)

    @contextlib.contextmanager
    def _transaction(self, file: sqlite3.Connection) -> Iterator[None]:
        file.execute("BEGIN IMMEDIATE")
        try:
            yield
            file.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have done so already
                file.execute("ROLLBACK")
            raise

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _number(file: sqlite3.Connection, sql: str) -> int:
    value: int = file.execute(sql).fetchone()[0]
    return value
