"""Make the indexes of shards that others wrote, so that training reads them exactly and resumably.

    python scripts/index_shards.py shards='/data/web/{00000..00099}.tar'
    python scripts/index_shards.py shards='s3://bucket/{00000..00099}.tar' output=indexes tokenizer=llama2_7b

The same command goes on where it was stopped: indexes that are there and fit their shards are kept.

shards=      tars: a folder, a glob, a range {00000..00099}.tar, or a URL of them (s3://, gs://, https://, ...)
output=      a folder for the indexes (train with data.index_dir=...), needed for remote shards; else beside the shards
tokenizer=   a name from configs/text_encoder or a folder with a tokenizer: counts the tokens of captions too
processes=   how many work at a time (all cores)
retries=     further tries after an error of a remote store that may pass (5)
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.checks import not_negative, positive
from paradiffusion.compose import compose_options, text_encoder_named
from paradiffusion.config import option
from paradiffusion.entry import run
from paradiffusion.errors import UserError
from paradiffusion.stopping import Stopped


@dataclass
class IndexOptions:
    """The keys of the command line."""

    shards: str | None = None
    output: str | None = None
    tokenizer: str | None = None
    processes: int | None = option(None, accepts=positive)
    retries: int = option(5, accepts=not_negative)

    def check(self) -> None:
        if not self.shards:
            raise UserError("shards= is missing; name tars, such as shards='/data/web/{00000..00099}.tar'.")
        if self.output and Path(self.output).expanduser().is_file():
            raise UserError(f"output={self.output} is a file; name a folder for the indexes.")


def main(arguments: list[str]) -> int:
    """Index, and print the report; 1 when a shard could not be indexed."""
    asked = compose_options(IndexOptions, arguments)
    asked.check()
    signal.signal(signal.SIGTERM, interrupt)

    from paradiffusion.curation.indexing import check_names, describe_indexes
    from paradiffusion.data.index import build_indexes
    from paradiffusion.data.remote import RemotePath, Storage
    from paradiffusion.data.shards import expand_shards

    output = Path(asked.output).expanduser() if asked.output else None
    storage = Storage(retries=asked.retries, index_dir=asked.output)
    shards = expand_shards(str(asked.shards), "shards", storage)
    if output is None and any(isinstance(shard, RemotePath) for shard in shards):
        raise UserError("output= is missing; name a local folder for the indexes, since nothing is written to a store.")
    if output is not None:
        check_names(shards)
    counter = None
    if asked.tokenizer:
        from paradiffusion.data.index import TokenCounter
        from paradiffusion.text.families import count_tokens_with

        encoder = text_encoder_named(asked.tokenizer, "tokenizer")
        counter = TokenCounter(encoder.name, count_tokens_with(encoder))
    lines, failed = describe_indexes(build_indexes(shards, counter, output, asked.processes))
    print("\n".join(lines))
    if output is not None:
        print(f"train with data.index_dir={output}")
    return 1 if failed else 0


def interrupt(number: int, frame: object) -> None:
    """A scheduler's SIGTERM ends the work as Ctrl-C does."""
    raise Stopped(128 + number)


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
