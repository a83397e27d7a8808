"""The format of the teacher store: what a row says, and how the columns lie on disk.

One row is what one snapshot of one teacher said of one example:

| column | type | |
|---|---|---|
| ``example_id`` | int64 | not negative |
| ``output_TASK`` | float32 | for each task: a logit, or a prediction in the task's units |
| ``event_time`` | timestamp | of the example |
| ``teacher`` | string | partition |
| ``window`` | int64 | partition: event time in epoch seconds // ``window_seconds`` |
| ``snapshot`` | int64 | version of the teacher, from 0 |
| ``trained_through`` | timestamp | the last event time that the snapshot was trained on |
| ``logged`` | boolean | said in the teacher's own training forward, before its update |
| ``scored_at`` | timestamp | when it was computed, by the clock on the wall |
| ``user_id``, ``item_id``, ``category_id`` | int64, may be null | keys, to gather past outputs by |
| ``embedding`` | list of float32, may be null | the teacher's embedding of the example |

Timestamps are in UTC, of microseconds. The table's description holds the rest as JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
from deltalake import ColumnProperties, WriterProperties

from torchrec_exfm.das.arrays import Floats

__all__ = ["FORMAT_VERSION", "KEYS", "PARTITION", "TIMESTAMP", "StoreFormat", "check_name"]

FORMAT_VERSION = 1
PARTITION = ("teacher", "window")
KEYS = ("user_id", "item_id", "category_id")
OPTIONAL = (*KEYS, "embedding")
Resolution: TypeAlias = Literal["bfloat16", "float32"]

TIMESTAMP = pa.timestamp("us", "UTC")


@dataclass(frozen=True, kw_only=True)
class StoreFormat:
    """What is fixed when a store is made: the arguments of ``TeacherStore.create``.

    Raises:
        ValueError: for a wrong value.
    """

    tasks: tuple[str, ...] = ("label",)
    window_seconds: int = 86_400
    resolution: Resolution = "bfloat16"

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks should be names without repeats; received {self.tasks}")
        for task in self.tasks:
            check_name("a task", task)
        if not isinstance(self.window_seconds, int) or self.window_seconds < 1:
            raise ValueError(
                f"window_seconds should be a whole number from 1; received {self.window_seconds!r}"
            )
        if self.resolution not in get_args(Resolution):
            raise ValueError(
                f"resolution should be one of {get_args(Resolution)}; received {self.resolution!r}"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the columns of the outputs."""
        return tuple(f"output_{task}" for task in self.tasks)

    def to_json(self) -> str:
        """The table's description."""
        return json.dumps({"torchrec_exfm": {"format_version": FORMAT_VERSION, **asdict(self)}})

    @classmethod
    def from_json(cls, text: str | None) -> StoreFormat:
        """From the table's description.

        Raises:
            ValueError: if it is not one, or of another version of the format.
        """
        try:
            fields: dict[str, Any] = json.loads(text or "")["torchrec_exfm"]
            version = fields.pop("format_version")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("is a Delta table, but not a teacher store") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"is of format version {version}, and this version of torchrec_exfm reads version "
                f"{FORMAT_VERSION}: upgrade torchrec_exfm, or choose another store"
            )
        try:
            return cls(**{**fields, "tasks": tuple(fields["tasks"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"has a description that is damaged ({error})") from None

    def schema(self) -> pa.Schema:
        """The columns, partition columns included."""
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
            **dict.fromkeys(OPTIONAL, pa.int64()),
            "embedding": pa.list_(pa.field("element", pa.float32())),
        }
        fields = columns.items()
        return pa.schema([pa.field(name, kind, name in OPTIONAL) for name, kind in fields])

    def writer_properties(self) -> WriterProperties:
        """Encodings that fit rows sorted by id: differences, and bytes of equal weight together."""
        differences = ColumnProperties(dictionary_enabled=False, encoding="DELTA_BINARY_PACKED")
        split = ColumnProperties(dictionary_enabled=False, encoding="BYTE_STREAM_SPLIT")
        return WriterProperties(
            compression="ZSTD",
            compression_level=3,
            column_properties={
                "example_id": differences,
                "event_time": differences,
                **dict.fromkeys(self.outputs, split),
            },
        )

    def round(self, values: Floats) -> Floats:
        """The values at the store's resolution, to the nearest, ties to even."""
        if self.resolution == "float32":
            return values
        bits = values.astype(np.float32, copy=False).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        finite: Floats = np.where(np.isfinite(values), rounded.view(np.float32), values)
        return finite


def check_name(what: str, name: object) -> str:
    """The name of a task or teacher, fit for a column and a folder; a ValueError if it is not."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(
            f"{what} should be named with letters, digits, '_', '-' and '.', starting with none of "
            f"the last two, at most 100; received {name!r}"
        )
    return name
