"""The features of a memory as one SQL statement, for DuckDB 2 and Spark 3.5 or newer."""

from __future__ import annotations

from collections.abc import Collection

from torchrec_exfm.das.ids import Dialect
from torchrec_exfm.das.join import LARGEST, Query, quote, quote_table
from torchrec_exfm.das.memory_format import DAY_SECONDS, MemoryFormat
from torchrec_exfm.das.schema import KEYS
from torchrec_exfm.das.store import TeacherStore

__all__ = ["events_sql", "memory_sql"]

# By dialect: the last value that is not null; a map from a list of times to ages; an empty list
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
    """Return one SELECT of a teacher's outputs in a store as events, for :func:`memory_sql`.

    Columns are those of ``KEYS``, ``example_id``, ``event_seconds`` and ``value``: a task's output
    or, with ``embeddings``, the bytes of the embedding. Rows, times and arguments are as for
    :func:`store_events`. Errors and ``outputs``, the name of a table, are as for :func:`join_sql`.
    """
    task = store.tasks[0] if task is None else task
    query = Query.check(store, teacher, [task], snapshot, exclude, None, embeddings)
    value = "embedding" if embeddings else quote(f"output_{task}")
    return f"""SELECT {", ".join(KEYS)}, example_id, event_seconds, {value} AS value
FROM (
{query.winners_sql(outputs, as_events=True)}
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
    """Return one SELECT of the examples with a memory's features of their keys at their times.

    Columns are those of the examples, then for each key ``NAME_KEY_count`` (0 without events),
    ``_mean``, ``_last``, ``_decayed_mean`` and ``_days_since`` (null without events). With
    sequences there are also ``_values`` and ``_ages_days``, lists with the newest event first. They
    equal :class:`MemoryFeatures` up to rounding. With a width above 1 values are bytes, as of
    embeddings, and there are no means and no ``_last``.

    Events of one second are in order of ``example_id``. Rows without a key, a time or a finite
    value are no events. The number of examples stays the same; their order may change.

    ``events`` is the name of a table of keys, ids, times and values, such as :func:`events_sql` or
    a table of labels. ``examples`` is that of a table of keys and times, which may be the same. The
    other arguments are names of their columns. Dialects differ in their functions for lists.

    Raises:
        ValueError: for an unknown dialect, and for a name that is empty or not printable.

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
    time = f"CAST(floor(source.{quote(event_seconds)}) AS BIGINT)"
    tables, columns, joins = [], ["source.*"], [f"FROM {quote_table(examples)} AS source"]
    for place, (name, key) in enumerate(zip(format.key_names, format.keys, strict=True)):
        memory, names = f"_memory_{place}", [f"key_{i}" for i in range(len(key))]
        keys, parts = ", ".join(names), [*(f"source.{quote(column)}" for column in key), time]
        columns_at = [*zip(parts, [*names, "seconds"], strict=True)]
        keyed = ", ".join(f"{part} AS {column}" for part, column in columns_at)
        is_keyed = " AND ".join(f"{part} IS NOT NULL" for part in parts)
        states = _states(format, keys)
        latest = ", ".join(f"{last_value.format(state)} OVER known AS {state}" for state in states)
        tables.append(f"""{memory} AS (
  SELECT {keys}, asked AS seconds, {latest}
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
    SELECT DISTINCT {keyed}, 2 * {time}, {", ".join(["NULL"] * len(states))}
    FROM {quote_table(examples)} AS source WHERE {is_keyed}
  ) AS moment
  WINDOW known AS (PARTITION BY {keys} ORDER BY instant, number ROWS UNBOUNDED PRECEDING)
)""")
        matches = " AND ".join(f"{memory}.{column} = {part}" for part, column in columns_at)
        joins.append(f"LEFT JOIN {memory} ON {matches}")  # rows of events have null seconds
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
    """Return a key's state after each of its events, as window functions over the events.

    Weights relative to a single time would overflow. So time is cut into spans of 600 half-lives H,
    and an event of time s weighs 2^((s - m) / H), with the middle m of its span. A second set of
    spans begins half a span later. Of the two, the sums of the span count in whose second half the
    event is: events before that span weigh less than 2^-300 of it.
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
