"""Rows of Parquet files, a row group at a time and only the columns that are wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from paradiffusion.curation.building.rows import Row, check_names
from paradiffusion.errors import UserError

_ROWS_AT_ONCE: Final = 1000


def read_schema(path: Path) -> Any:
    """The schema. Raises UserError for what is no Parquet file, and for two columns of one name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no Parquet file that can be read ({str(error).splitlines()[0]}).") from None
    check_names(path, schema.names)
    return schema


def byte_columns(path: Path) -> list[str]:
    """Columns that may hold files: binary, or an object with "bytes" as ``datasets`` writes images."""
    import pyarrow as pa

    found = []
    for column in read_schema(path):
        kind = column.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or "bytes" in _fields_of(kind):
            found.append(column.name)
    return found


def parquet_rows(path: Path, wanted: Collection[str] | None, cells: str | None) -> Iterator[Row]:
    """The rows with the ``wanted`` columns (None: all). Of ``cells``, the column of the images themselves, only their paths
    are read here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = read_schema(path)
    columns = [name for name in schema.names if name != cells and (wanted is None or name in wanted)]
    columns += [f"{cells}.path"] if cells and "path" in _fields_of(schema.field(cells).type) else []
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows, within = file.metadata.row_group(group).num_rows, 0
                if not columns:
                    for within in range(rows):
                        yield Row(number + within, f"row {number + within + 1}", {}, cell=(group, within))
                    number += rows
                    continue
                batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
                for batch in batches:
                    for fields in _plain_times(batch).to_pylist():
                        yield Row(number, f"row {number + 1}", fields, cell=(group, within))
                        number, within = number + 1, within + 1
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is a damaged Parquet file ({str(error).splitlines()[0]}); fetch it again.") from None
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path} holds a value that is none of its column's type ({error}); write it anew.") from None


def _fields_of(kind: Any) -> list[str]:
    import pyarrow as pa

    return [kind.field(number).name for number in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _plain_times(batch: Any) -> Any:
    """``batch`` with times as text (of UTC) and durations as numbers: Python's types have no nanoseconds, and not all zones."""
    import pyarrow as pa

    columns = []
    for column in batch.columns:
        kind = column.type
        if pa.types.is_timestamp(kind):
            column = column.cast(pa.timestamp(kind.unit)).cast(pa.string())
        elif pa.types.is_time(kind) or pa.types.is_date(kind):
            column = column.cast(pa.string())
        elif pa.types.is_duration(kind):
            column = column.cast(pa.int64())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
