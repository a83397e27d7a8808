"""The format of the teacher store: its columns and their encodings.

One row holds the outputs of one snapshot of one teacher for one example:

| column | type | |
|---|---|---|
| ``example_id`` | int64 | not negative |
| ``output_TASK`` | float32, may be null | for each task: a logit, or a prediction in its units |
| ``event_time`` | timestamp | of the example |
| ``teacher`` | string | partition |
| ``window`` | int64 | partition: event time in epoch seconds // ``window_seconds`` |
| ``snapshot`` | int64 | version of the teacher, from 0 |
| ``trained_through`` | timestamp | the last event time that the snapshot was trained on |
| ``logged`` | boolean | computed in the teacher's own training forward, before its update |
| ``scored_at`` | timestamp | when the output was computed (wall clock) |
| ``user_id``, ``item_id``, ``category_id`` | int64, may be null | keys, to gather past outputs by |
| ``embedding`` | binary, may be null | the teacher's, in the bytes of ``embeddings``; optional |

Timestamps are in UTC, of microseconds. The table's description holds the rest as JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
from deltalake import ColumnProperties, WriterProperties

from torchrec_exfm.das.arrays import (
    Floats,
    Ints,
    Mask,
    as_int,
    as_int64,
    as_second,
    column_names,
    utc,
)
from torchrec_exfm.das.embeddings import embedding_bytes
from torchrec_exfm.das.rules import absent

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
PARTITION = ("teacher", "window")
MAX_TASKS = 1_000
KEYS = ("user_id", "item_id", "category_id")
OPTIONAL = (*KEYS, "embedding")
Resolution: TypeAlias = Literal["bfloat16", "float32"]
EmbeddingResolution: TypeAlias = Literal["float16", "int8", "int4"]

TIMESTAMP = pa.timestamp("us", "UTC")
SNAPSHOTS = pa.schema(
    [
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("trained_through", TIMESTAMP, nullable=False),
        pa.field("published_at", TIMESTAMP, nullable=False),
        pa.field("checkpoint", pa.string()),
    ]
)
# Times as epoch microseconds. Cast to SNAPSHOTS first: files may hold timestamps of other units.
SNAPSHOT_NUMBERS = pa.schema(
    [f.with_type(pa.int64()) if f.type == TIMESTAMP else f for f in SNAPSHOTS]
)


@dataclass(frozen=True)
class StoreFormat:
    """The properties that are fixed when a store is created: see ``TeacherStore.create``.

    Raises:
        ValueError: for a wrong value.
    """

    tasks: tuple[str, ...] = ("label",)
    window_seconds: int = 86_400
    resolution: Resolution = "bfloat16"
    embedding_width: int = 0
    embedding_resolution: EmbeddingResolution = "float16"

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks should be names without repeats; received {self.tasks}")
        if len(self.tasks) > MAX_TASKS:
            raise ValueError(
                f"tasks should be at most {MAX_TASKS}: each is a column; received {len(self.tasks)}"
            )
        for task in self.tasks:
            check_name("a task", task)
        for name, least in (("window_seconds", 1), ("embedding_width", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} should be a whole number from {least}; received {value!r}"
                )
        kinds = {"resolution": Resolution, "embedding_resolution": EmbeddingResolution}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ValueError(f"{name} should be one of {get_args(kind)}; received {value!r}")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the columns of outputs."""
        return output_columns(self.tasks)

    def chosen(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """Return tasks as a tuple, all for None; a ValueError for unknown or repeated ones."""
        names = self.tasks if tasks is None else (tasks,) if isinstance(tasks, str) else (*tasks,)
        if not names or not {*names} <= {*self.tasks} or len({*names}) < len(names):
            raise ValueError(
                f"tasks should be of the store's, {self.tasks}, each at most once; received {names}"
            )
        return names

    @property
    def embedding_bytes(self) -> int:
        """W, the bytes of an embedding; a ValueError if the store has no embeddings."""
        if not (width := self.embedding_width):
            raise ValueError(
                "embeddings should be of a store with an embedding_width; it is 0: make another"
            )
        return embedding_bytes(width, self.embedding_resolution)

    def joined(
        self,
        outputs: Tensor,
        embeddings: Tensor | None,
        rows: int,
        tasks: Sequence[str] | None = None,
    ) -> Tensor:
        """Check outputs (B, T), and embeddings (B, E) if any; return them as one (B, T + E)."""
        import torch  # here, as the host's reader runs without it

        parts = {"outputs": (outputs, len(self.chosen(tasks)))}
        if embeddings is not None and self.embedding_bytes:
            parts["embeddings"] = embeddings, self.embedding_width
        for name, (values, width) in parts.items():
            if values.dim() < 1 or len(values) != rows or values.numel() != rows * width:
                raise ValueError(
                    f"{name} should be of shape {(rows, width)} (examples, the store's width); "
                    f"received {tuple(values.shape)}: are they of all the examples asked for?"
                )
        return torch.cat([v.detach().reshape(rows, width) for v, width in parts.values()], 1)

    def to_json(self) -> str:
        """Return the format as JSON: the table's description."""
        fields = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({"torchrec_exfm": {**fields, "digest": _digest(fields)}})

    @classmethod
    def from_json(cls, text: str | None) -> StoreFormat:
        """Read the format from the table's description.

        Raises:
            ValueError: if it is no such description, is damaged, or is of another version.
        """
        try:
            fields: dict[str, Any] = json.loads(text or "")["torchrec_exfm"]
            digest, version = fields.pop("digest", None), fields["format_version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError("is a Delta table, but not a teacher store") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"is of format version {version}, and this version of torchrec_exfm reads version "
                f"{FORMAT_VERSION}: upgrade torchrec_exfm, or choose another store"
            )
        if digest not in (None, _digest(fields)):
            raise ValueError("has a description that is damaged: it is not what was written")
        del fields["format_version"]
        try:
            return cls(**{**fields, "tasks": tuple(fields["tasks"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"has a description that is damaged ({error})") from None

    def schema(self) -> pa.Schema:
        """Return the Arrow schema, partition columns included."""
        columns = {
            "example_id": pa.int64(),
            **dict.fromkeys(self.outputs, pa.float32()),
            "event_time": TIMESTAMP,
            "snapshot": pa.int64(),
            "trained_through": TIMESTAMP,
            "logged": pa.bool_(),
            "scored_at": TIMESTAMP,
            "teacher": pa.string(),
            "window": pa.int64(),
            **dict.fromkeys(KEYS, pa.int64()),
        }
        if self.embedding_width:
            columns["embedding"] = pa.binary(self.embedding_bytes)  # Delta drops the length
        optional = {*OPTIONAL, *self.outputs}
        return pa.schema([pa.field(name, kind, name in optional) for name, kind in columns.items()])

    def writer_properties(self) -> WriterProperties:
        """Return encodings that fit rows sorted by id, and that Spark 3.5 reads with its defaults.

        Ids and times are stored as differences; bfloat16 has so few values that a dictionary fits.
        """
        differences = ColumnProperties(dictionary_enabled=False, encoding="DELTA_BINARY_PACKED")
        plain = ColumnProperties(dictionary_enabled=False, encoding="PLAIN")
        distinct = ColumnProperties(dictionary_enabled=True)
        strings = ColumnProperties(dictionary_enabled=False, encoding="DELTA_LENGTH_BYTE_ARRAY")
        values = distinct if self.resolution == "bfloat16" else plain
        return WriterProperties(
            compression="ZSTD",
            compression_level=9,
            column_properties={
                "example_id": differences,
                "event_time": differences,
                **dict.fromkeys(self.outputs, values),
                "embedding": strings,
            },
        )

    def round(self, values: Floats) -> Floats:
        """Round values to the store's resolution: to nearest, ties to even."""
        if self.resolution == "float32":
            return values
        # on the bits, as numpy has no bfloat16; those of a NaN must not be rounded
        bits = values.astype(np.float32, copy=False).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        finite: Floats = np.where(np.isfinite(values), rounded.view(np.float32), values)
        return finite

    def alike(self, one: Floats, other: Floats) -> Mask:
        """Return where outputs (n, T) are equal up to rounding, of the arithmetic and of the store.

        |one - other| <= step |other| + 2^-16 median |other|, with a step of 2^-7 for bfloat16,
        which is the largest distance of two neighbours, and of 2^-14 for float32.
        """
        step = 2.0 ** (-7 if self.resolution == "bfloat16" else -14)
        size = np.where(absent(other), 0, np.abs(other))
        # the second summand lets outputs near 0 differ by what the usual ones are rounded by
        typical = np.median(size, axis=0) if len(size) else 0.0
        alike: Mask = np.abs(one - other) <= step * size + 2.0**-16 * typical
        return alike | (absent(one) & absent(other))


def _digest(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def output_columns(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns that hold the outputs of tasks."""
    return tuple(f"output_{task}" for task in tasks)


def check_key_names(names: Any) -> None:
    """Raise a ValueError unless the names are among ``KEYS``, each at most once."""
    if not {*names} <= {*KEYS} or len({*names}) < len(names):
        raise ValueError(f"keys should be among {KEYS}, each at most once; received {names}")


def as_keys(keys: Mapping[str, Any] | None, rows: int) -> dict[str, Ints]:
    """Convert keys (whole numbers (rows,) by name) to int64; {} for None.

    Raises:
        TypeError: for another dtype.
        ValueError: for other names, another shape, or nulls.
    """
    keys = {} if keys is None else keys
    names = column_names(keys)
    check_key_names(type(keys).__name__ if names is None else names)
    return {name: as_int64(name, keys[name], rows) for name in names or ()}


def check_same_keys(keys: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the keys of a batch have the same names as those before."""
    if keys.keys() != before.keys():
        raise ValueError(
            "keys should have the same names in every batch, or come with none; received "
            f"{[*keys]} after {[*before]}: pass -2^63 where an example has none"
        )


def check_name(role: str, name: object) -> str:
    """Return the name of a task or teacher; a ValueError unless it fits a column and a folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(
            f"{role} should be named with letters, digits, '_', '-' and '.', at most 100 in all, "
            f"the first not '-' or '.'; received {name!r}"
        )
    return name


@dataclass(frozen=True)
class Snapshot:
    """A published version of a teacher, with the last event time it was trained through.

    Args:
        teacher: name of the teacher.
        version: a whole number from 0, higher for newer; :func:`publish` counts from 1.
        trained_through_seconds: the last event time that it was trained on, in epoch seconds, or a
            datetime (in UTC where it has no time zone). It is rounded down, as event times are:
            the teacher may know the labels of all examples up to the end of that second.

    Raises:
        TypeError: for a time of another type.
        ValueError: for a wrong name, a version or time out of range.
    """

    teacher: str
    version: int
    trained_through_seconds: int

    def __post_init__(self) -> None:
        check_name("a teacher", self.teacher)
        version = as_int(self.version)
        if isinstance(self.version, bool) or not 0 <= version < 2**40:
            raise ValueError(f"version should be an int in [0, 2^40); received {self.version!r}")
        through = as_second("trained_through_seconds", self.trained_through_seconds)
        # plain ints, whichever type came in; the class is frozen
        object.__setattr__(self, "version", version)
        object.__setattr__(self, "trained_through_seconds", through)

    def __str__(self) -> str:
        through = utc(self.trained_through_seconds)
        return f"{self.teacher} version {self.version}, trained through {through}"
