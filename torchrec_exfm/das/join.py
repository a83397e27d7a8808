"""Join of examples with teacher outputs, as one SQL statement for DuckDB and Spark."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torchrec_exfm.das.arrays import MAX_SECONDS, MICROSECONDS, check_duration, utc
from torchrec_exfm.das.choice import check_names, choose_versions
from torchrec_exfm.das.schema import KEYS
from torchrec_exfm.das.store import TeacherStore

__all__ = ["data_files", "join_sql"]

WINNERS = "_winners"  # a table of the statement: the row that counts, of each example
LARGEST = 3.4028234663852886e38  # of float32; both engines sort NaN above it
# Text literals take the type of the timestamps that they are compared with, with a zone or without.
_FIRST, _LAST = (f"'{utc(seconds)}'" for seconds in (0, MAX_SECONDS))


def join_sql(
    store: TeacherStore,
    teachers: str | Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    snapshot: int | Mapping[str, int] | None = None,
    exclude: Collection[int] | Mapping[str, Collection[int]] = (),
    max_age_seconds: float | None = None,
    embeddings: bool = False,
    examples: str = "examples",
    outputs: str = "outputs",
    example_id: str = "example_id",
    event_seconds: str = "event_seconds",
    event_time: str | None = None,
) -> str:
    """Return one SELECT that joins examples with outputs, for DuckDB 2 and Spark 3.5 or newer.

    It finds the rows that :class:`TeacherLookup` finds: in the window of the example's event time,
    among rows that break no rule of the store. Of several rows the newest snapshot's counts, then
    one logged in training, then the one scored last.

    Columns are those of the examples, then for each teacher ``TEACHER_TASK`` for each task,
    ``TEACHER_snapshot`` (the version), ``TEACHER_age_seconds`` (event time - trained-through; 0 for
    logged outputs) and, if asked for, ``TEACHER_embedding`` (bytes). They are null where there is
    no output. The number of examples stays the same; their order may change.

    Args:
        store: the store; its tasks and the length of its windows are part of the text.
        teachers: one name or several.
        tasks: some of the store's tasks; None: all.
        snapshot: a pinned version, for all teachers or by name; None: the newest counts.
        exclude: versions to ignore, for all teachers or by name.
        max_age_seconds: treat older outputs as absent; None: no limit.
        embeddings: include the bytes of the embeddings.
        examples: name of the table of examples, within a catalog if need be (``a.b.c``).
        outputs: name of the table of outputs: the Delta table ``outputs`` in the store's folder, or
            a view of :func:`data_files`.
        example_id: column of the examples' ids.
        event_seconds: column of their event times in epoch seconds.
        event_time: column of their timestamps, used instead of ``event_seconds``. Timestamps
            without a time zone are in that of the engine's session.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for a wrong value; for a task or a teacher that the store lacks; for column
            names that differ in upper and lower case only.

    Example:
        >>> import duckdb, tempfile
        >>> from torchrec_exfm.das import Snapshot, TeacherStore
        >>> store = TeacherStore.create(tempfile.mkdtemp())
        >>> _ = store.write(Snapshot("fm", 1, 1_000), [7, 8], [0.5, -2.0], [5_000, 6_000])
        >>> _ = store.refresh()
        >>> engine = duckdb.connect()
        >>> _ = engine.read_parquet(data_files(store), hive_partitioning=True).to_view("outputs")
        >>> _ = engine.sql("SELECT 8 AS example_id, 6000 AS event_seconds").to_view("examples")
        >>> engine.sql(join_sql(store, "fm")).fetchall()
        [(8, 6000, -2.0, 1, 5000.0)]
    """
    query = Query.check(store, teachers, tasks, snapshot, exclude, max_age_seconds, embeddings)
    winners = query.winners_sql(outputs)
    joined = query.joined_sql(examples, example_id, event_seconds, event_time)
    return f"WITH {WINNERS} AS (\n{winners}\n)\n{joined}"


def data_files(
    store: TeacherStore,
    teachers: str | Sequence[str] | None = None,
    first_seconds: int = 0,
    last_seconds: int = MAX_SECONDS,
) -> list[str]:
    """Return the Parquet files with a store's outputs for events between two times, inclusive.

    Don't read other files in the store's folder: they are no longer part of the table. ``teacher``
    and ``window`` are in the paths (Hive partitions).

    Args:
        store: the store, at its current commit.
        teachers: one name or several; None: all.
        first_seconds: the first event time, epoch seconds.
        last_seconds: the last event time, epoch seconds.
    """
    names = {teachers} if isinstance(teachers, str) else teachers
    first_window, last_window = (
        second // store.format.window_seconds for second in (first_seconds, last_seconds)
    )
    return sorted(
        f"{store.table.url}/{file.path}"
        for file in store.table.files()
        if (names is None or file.partition[0] in names)
        and first_window <= file.partition[1] <= last_window
    )


@dataclass(frozen=True)
class Query:
    """The selection of outputs and rows: the checked arguments of ``join_sql``."""

    window_seconds: int
    teachers: tuple[str, ...]
    tasks: tuple[str, ...]
    snapshot: dict[str, int | None]
    exclude: dict[str, tuple[int, ...]]
    max_age_seconds: float | None
    embeddings: bool

    @classmethod
    def check(
        cls,
        store: TeacherStore,
        teachers: str | Sequence[str],
        tasks: Sequence[str] | None,
        snapshot: int | Mapping[str, int] | None,
        exclude: Collection[int] | Mapping[str, Collection[int]],
        max_age_seconds: float | None,
        embeddings: bool,
    ) -> Query:
        """Check the arguments of ``join_sql``, with its errors."""
        names = (teachers,) if isinstance(teachers, str) else tuple(teachers)
        chosen = store.tasks if tasks is None else tuple(tasks)
        check_names("teachers", names, store.teachers() or names)
        check_names("tasks", chosen, store.tasks)
        pinned, excluded = choose_versions("the join", names, snapshot, exclude)
        if max_age_seconds is not None:
            check_duration("max_age_seconds", max_age_seconds)
        embeddings = embeddings and store.format.embedding_bytes > 0  # raises without embeddings
        query = cls(
            store.format.window_seconds,
            names,
            chosen,
            pinned,
            excluded,
            None if max_age_seconds is None else float(max_age_seconds),
            embeddings,
        )
        columns = [name for teacher in names for name in query.columns(teacher)]
        if len({name.lower() for name in columns}) < len(columns):
            raise ValueError(
                "columns should differ by more than upper and lower case, which SQL takes for the "
                f"same; received {columns}: join fewer teachers or tasks at once"
            )
        return query

    def columns(self, teacher: str) -> dict[str, str]:
        """Return a teacher's columns: the name in the result, and that among the winners."""
        columns = {f"{teacher}_{task}": f"output_{task}" for task in self.tasks}
        columns[f"{teacher}_snapshot"] = "snapshot"
        columns[f"{teacher}_age_seconds"] = "age_seconds"
        if self.embeddings:
            columns[f"{teacher}_embedding"] = "embedding"
        return columns

    def rules(self) -> dict[str, str]:
        """Return the rules of ``rules.broken_rules``: a text, and in SQL what breaks the rule."""
        infinite = [f"abs({quote(f'output_{task}')}) > {LARGEST}" for task in self.tasks]
        time, length = _microseconds(_FIRST, "event_time"), self.window_seconds * MICROSECONDS
        window = f"floor({time} / {length})"
        return {
            "have a negative example id": "example_id < 0",
            "have an output that is NaN or infinite": " OR ".join(infinite),
            f"have an event time outside of [0, {MAX_SECONDS:,}) seconds": (
                f"event_time < {_FIRST} OR event_time >= {_LAST}"
            ),
            "leak: their teacher was trained through their own event time": (
                "trained_through >= date_trunc('second', event_time) AND NOT logged"
            ),
            "lie outside of their window": f"{window} <> `window`",
        }

    def winners_sql(self, outputs: str, as_events: bool = False) -> str:
        """Return a SELECT of the row that counts, for each example, teacher and window.

        With ``as_events`` it has keys too, and in ``event_seconds`` the time from which the output
        is known.
        """
        tasks = [quote(f"output_{task}") for task in self.tasks]
        columns = ["teacher", "`window`", "example_id", "snapshot", "age_seconds", *tasks]
        columns += ["embedding"] if self.embeddings else []
        if as_events:
            since = _microseconds(_FIRST, "greatest(event_time, trained_through)")
            columns += [*KEYS, f"CAST(floor({since} / {MICROSECONDS}) AS BIGINT) AS event_seconds"]
        broken = " OR ".join(f"({condition})" for condition in self.rules().values())
        eligible = " OR ".join(f"({self._eligible(teacher)})" for teacher in self.teachers)
        age = f"{_microseconds('trained_through', 'event_time')} / 1e6"
        return f"""SELECT {", ".join(columns)}
FROM (
  SELECT *, CAST(CASE WHEN logged THEN 0 ELSE {age} END AS FLOAT) AS age_seconds,
    row_number() OVER (
      PARTITION BY teacher, `window`, example_id
      ORDER BY snapshot DESC, logged DESC, scored_at DESC
    ) AS place
  FROM {outputs_source(outputs)}
  WHERE ({eligible})
    AND NOT coalesce({broken}, FALSE)
) AS ranked
WHERE place = 1"""

    def _eligible(self, teacher: str) -> str:
        conditions = [f"teacher = '{teacher}'"]
        if (version := self.snapshot[teacher]) is not None:
            conditions.append(f"snapshot = {version}")
        if excluded := self.exclude[teacher]:
            conditions.append(f"snapshot NOT IN ({', '.join(map(str, excluded))})")
        return " AND ".join(conditions)

    def joined_sql(
        self, examples: str, example_id: str, event_seconds: str, event_time: str | None
    ) -> str:
        """Return a SELECT of the examples joined with the winners of each teacher."""
        columns, joins = ["example.*"], []
        for number, teacher in enumerate(self.teachers):
            won = f"teacher_{number}"
            conditions = [
                f"{won}.teacher = '{teacher}'",
                f"{won}.example_id = example.{quote(example_id)}",
            ]
            first = f"{won}.`window` * {self.window_seconds}"
            if event_time is None:
                window = f"floor(example.{quote(event_seconds)} / {self.window_seconds})"
                conditions.append(f"{won}.`window` = CAST({window} AS BIGINT)")
            else:
                time = f"example.{quote(event_time)}"
                conditions.append(f"{time} >= to_timestamp({first})")
                conditions.append(f"{time} < to_timestamp({first} + {self.window_seconds})")
            if self.max_age_seconds is not None:
                conditions.append(f"{won}.age_seconds <= CAST('{self.max_age_seconds}' AS FLOAT)")
            joins.append(f"LEFT JOIN {WINNERS} AS {won}\n  ON " + "\n  AND ".join(conditions))
            columns += [
                f"{won}.{quote(stored)} AS {quote(name)}"
                for name, stored in self.columns(teacher).items()
            ]
        listed = ",\n  ".join(columns)
        return f"SELECT {listed}\nFROM {quote_table(examples)} AS example\n" + "\n".join(joins)


def _microseconds(start: str, end: str) -> str:
    """Return an expression for the microseconds between two times.

    Spark reads MICROSECOND as a unit; DuckDB reads it as a column, which holds the unit's name.
    """
    return f"datediff(MICROSECOND, {start}, {end})"


def outputs_source(outputs: str) -> str:
    """Return the table of outputs with the column that :func:`_microseconds` needs."""
    return f"(SELECT *, 'microsecond' AS microsecond FROM {quote_table(outputs)}) AS stored"


def quote(name: str) -> str:
    """Return a name in backticks, which both engines take; raise if it is not printable."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(
            f"a table or column should have a name that can be read; received {name!r}"
        )
    return "`" + name.replace("`", "``") + "`"


def quote_table(name: str) -> str:
    """Return the quoted name of a table, which may be within a catalog and a schema."""
    return ".".join(map(quote, name.split(".")))
