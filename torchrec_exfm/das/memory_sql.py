"""The features of a memory as one text of SQL, for DuckDB 2 and Spark 3.5 or newer."""

from __future__ import annotations

from collections.abc import Collection

from torchrec_exfm.das.ids import Dialect
from torchrec_exfm.das.join import LARGEST, Wanted, quote, quote_table
from torchrec_exfm.das.memory_format import DAY_SECONDS, MemoryFormat
from torchrec_exfm.das.schema import KEYS
from torchrec_exfm.das.store import TeacherStore

__all__ = ["events_sql", "memory_sql"]

# in each dialect: the last that is not null; a list of times as ages; an empty list
_DIALECTS = {
    "duckdb": ("last_value({} IGNORE NULLS)", "list_transform({}, lambda _t: {})", "[]"),
    "spark": ("last_value({}) IGNORE NULLS", "transform({}, _t -> {})", "array()"),
}


def events_sql(
    store: TeacherStore,
    teacher: str,
    *,
    task: str | None = None,
    embeddings: bool = False,
    snapshot: int | None = None,
    exclude: Collection[int] = (),
    outputs: str = "outputs",
) -> str:
    """Return one SELECT of what a store holds of a teacher as events, for :func:`memory_sql`.

    Columns: those of ``KEYS``, ``example_id``, ``event_seconds`` and ``value``, a task's output or,
    with ``embeddings``, bytes. Rows, times and arguments are as for :func:`store_events`, errors
    and ``outputs``, the name of a table, as for :func:`join_sql`.
    """
    task = store.tasks[0] if task is None else task
    wanted = Wanted.from_arguments(store, teacher, [task], snapshot, exclude, None, embeddings)
    value = "embedding" if embeddings else quote(f"output_{task}")
    return f"""SELECT {", ".join(KEYS)}, example_id, event_seconds, {value} AS value
FROM (
{wanted.winners_sql(outputs, as_events=True)}
) AS won WHERE {value} IS NOT NULL"""


def memory_sql(
    format: MemoryFormat,
    *,
    dialect: Dialect,
    events: str = "events",
    examples: str = "examples",
    example_id: str = "example_id",
    event_seconds: str = "event_seconds",
    value: str = "value",
) -> str:
    """Return one SELECT: examples with what a memory knows of their keys before their time.

    Columns: those of the examples, then for each key ``NAME_KEY_count`` (0 without an event),
    ``_mean``, ``_last``, ``_decayed_mean``, ``_days_since`` (null) and, for sequences, ``_values``
    and ``_ages_days`` (lists, the last first), as in :class:`MemoryFeatures` up to rounding. For a
    width of more than 1 values are bytes, as of embeddings: without the means and ``_last``. Events
    of one second are in order of ``example_id``; without a key, a time or a finite value they are
    none. Examples keep their number, not their order.

    ``events`` is the name of a table of keys, ids, times and values, as of :func:`events_sql` or of
    labels, ``examples`` that of one of keys and times, maybe the same; the others are names of
    their columns. Dialects differ in their words for lists.

    Raises:
        ValueError: for another dialect, and for names that can't be read.

    Example:
        >>> import duckdb
        >>> rows = "(1, 7, 100, 0.5), (2, 8, 100, -2.0), (3, 7, 160, 1.5), (4, 7, 170, 0.0)"
        >>> rows = duckdb.sql(f"FROM (VALUES {rows}) t(example_id, user_id, event_seconds, value)")
        >>> format = MemoryFormat(name="l", keys=[["user_id"]])
        >>> text = memory_sql(format, dialect="duckdb", events="rows", examples="rows")
        >>> duckdb.sql(f"SELECT l_user_id_mean FROM ({text}) ORDER BY example_id").fetchall()
        [(None,), (None,), (0.5,), (1.0,)]
    """
    if dialect not in _DIALECTS:
        raise ValueError(f"dialect should be one of {(*_DIALECTS,)}; received {dialect!r}")
    last_value, transform, empty = _DIALECTS[dialect]
    vector, is_vector = f"source.{quote(value)}", f"source.{quote(value)} IS NOT NULL"
    if format.width == 1:  # a float32, as in MemoryEvents
        is_vector = f"abs(CAST({vector} AS DOUBLE)) <= {LARGEST}"
        vector = f"CAST(CAST({vector} AS FLOAT) AS DOUBLE)"
    half = max(int(min(300 * format.half_life_seconds, 2.0**40)), 1)
    middle, later_middle = (
        f"CAST(floor((seconds + {shift}) / {2 * half}) AS BIGINT) * {2 * half} + {half - shift}"
        for shift in (0, half)
    )
    at = f"CAST(floor(source.{quote(event_seconds)}) AS BIGINT)"
    tables, columns, joins = [], ["source.*"], [f"FROM {quote_table(examples)} AS source"]
    for place, (name, key) in enumerate(zip(format.key_names, format.keys, strict=True)):
        memory, names = f"_memory_{place}", [f"key_{i}" for i in range(len(key))]
        keys, parts = ", ".join(names), [*(f"source.{quote(column)}" for column in key), at]
        columns_at = [*zip(parts, [*names, "seconds"], strict=True)]
        keyed = ", ".join(f"{part} AS {column}" for part, column in columns_at)
        is_keyed = " AND ".join(f"{part} IS NOT NULL" for part in parts)
        states = _states(format, keys)
        known = ", ".join(f"{last_value.format(state)} OVER known AS {state}" for state in states)
        tables.append(f"""{memory} AS (
  SELECT {keys}, asked AS seconds, {known}
  FROM (
    SELECT {keys}, NULL AS asked, 2 * (seconds + {format.delay_seconds}) + 1 AS instant,
      {", ".join(f"{text} AS {state}" for state, text in states.items())}
    FROM (
      SELECT *, {middle} AS middle, {later_middle} AS later_middle,
        row_number() OVER (PARTITION BY {keys} ORDER BY seconds, example_id, vector) AS place
      FROM (
        SELECT {keyed}, source.{quote(example_id)} AS example_id, {vector} AS vector
        FROM {quote_table(events)} AS source WHERE {is_keyed} AND {is_vector}
      ) AS dated
    ) AS event
    UNION ALL
    SELECT DISTINCT {keyed}, 2 * {at}, {", ".join(["NULL"] * len(states))}
    FROM {quote_table(examples)} AS source WHERE {is_keyed}
  ) AS moment
  WINDOW known AS (PARTITION BY {keys} ORDER BY instant, number ROWS UNBOUNDED PRECEDING)
)""")
        matches = " AND ".join(f"{memory}.{column} = {part}" for part, column in columns_at)
        joins.append(f"LEFT JOIN {memory} ON {matches}")  # an event's own seconds are null
        age = f"({memory}.seconds - {{}}) / {DAY_SECONDS}"
        features = {"count": f"coalesce({memory}.number, 0)"}
        if format.width == 1:
            features |= {n: f"{memory}.{n}_value" for n in ("mean", "last", "decayed_mean")}
        features["days_since"] = age.format(f"{memory}.last_seconds")
        if format.length:
            ages = transform.format(f"{memory}.times", age.format("_t"))
            features["values"] = f"coalesce({memory}.vectors, {empty})"
            features["ages_days"] = f"coalesce({ages}, {empty})"
        start = f"{format.name}_{name}_"
        columns += [f"{text} AS {quote(start + n)}" for n, text in features.items()]
    return f"WITH {', '.join(tables)}\nSELECT {', '.join(columns)}\n{' '.join(joins)}"


def _states(format: MemoryFormat, keys: str) -> dict[str, str]:
    """Return what is known of a key after each of its events, by window functions over them.

    Weights as of one time would overflow. So they are 2^((s - m) / H) with the middle m of a span
    of 600 half-lives, and again with spans that begin half a span later; the sums count of the span
    in whose second half the event is: what is before that span weighs less than 2^-300 of it.
    """
    so_far = f"OVER (PARTITION BY {keys}{{}} ORDER BY place ROWS UNBOUNDED PRECEDING)"
    states = {"number": "place", "last_seconds": "seconds"}
    if format.width == 1:
        decayed = []
        for middle in ("middle", "later_middle"):
            exponent = f"(seconds - {middle}) / CAST('{format.half_life_seconds}' AS DOUBLE)"
            weight, over = f"power(CAST(2 AS DOUBLE), {exponent})", so_far.format(f", {middle}")
            decayed.append(f"sum({weight} * vector) {over} / sum({weight}) {over}")
        states |= {"mean_value": f"avg(vector) {so_far.format('')}", "last_value": "vector"}
        case = "CASE WHEN seconds >= middle THEN {} ELSE {} END".format(*decayed)
        states["decayed_mean_value"] = case
    if format.length:
        rows = f"ROWS BETWEEN CURRENT ROW AND {format.length - 1} FOLLOWING"
        latest = f"OVER (PARTITION BY {keys} ORDER BY place DESC {rows})"
        states["vectors"] = f"array_agg(vector) {latest}"
        states["times"] = f"array_agg(seconds) {latest}"
    return states
