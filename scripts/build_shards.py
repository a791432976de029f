"""Make shards for training from images with captions.

    python scripts/build_shards.py input=~/pictures output=shards/mine                      # a.jpg with a.txt or a.json
    python scripts/build_shards.py input=list.csv output=shards/mine captions='{title: short, story: long}'
    python scripts/build_shards.py input=captions.json root=emoji.tgz output=shards/emoji captions='{label: short, tags: short}'
    python scripts/build_shards.py input=laion/ output=shards/web encode=webp quality=90 max_side=1024 near_duplicates=4

The same command goes on where it was stopped. The same input and options give the same bytes on any number of processes.
Train with data.shards=shards/mine (and data.val_shards=shards/mine/val).

input=       a folder of images, a table (.csv .tsv .jsonl .json .parquet), tars, or a folder of them; {0000..0099} and * work
output=      a new folder: 000000.tar, ... with an index beside each, val/, report.json, report.md; .build while it runs
format=      auto, folder, table, img2dataset, webdataset or imagefolder (datasets: metadata.csv with file_name)
captions=    '{column: kind, ...}': which column, text file's extension or JSON field (a.b inside an object) is which kind of
             caption: short, clean, long or a name of your own. Columns of one kind and values of a list are joined by ", ".
             Left out: caption, text, prompt, txt, alt, ... are short, long_caption, description, ... long
image=       the column of paths, http(s) addresses or embedded files; in tars the extension, such as edited.png
root=        what the paths are relative to (the table's folder), or a .zip, .tar or .tgz whose members they name
key=         the column that names the sample (the path, or the row). Of one key the first item stays
keep=        '[column, ...]': kept in each sample's JSON under "extra"
uncaptioned= drop or keep images without any caption that is left
min_words= max_words=                 captions outside are left out (1, no limit)
min_side= max_aspect= max_pixels=     images outside are dropped (64, 4, 100000000), before they are decoded
max_side=    longer images are made smaller (no limit)
background=  white, black or '#rrggbb' under what is transparent
encode=      keep (bytes as they are where they are upright RGB JPEG, PNG or WebP; else PNG, or JPEG for what was lossy),
             jpeg, webp or png; quality=95
             Colours of an embedded profile (Display P3, Adobe RGB, inks) are converted to sRGB; bytes that are kept keep
             theirs, and training converts them as it reads
duplicates=  drop or keep pictures with the same pixels as an earlier one
near_duplicates=  off, or up to how many bits of 64 their perceptual hashes may differ: 2 finds other encodings and sizes of one
             picture, 4 to 6 small edits too, and the more look-alikes among icons and drawings
val=         the share of samples, chosen by key, that goes to val/ (0); a split that the input tells goes first
samples_per_shard=1000  max_megabytes=100 (of one file)  max_unzipped_gigabytes=100 (of root= where it is a .tgz)
tokenizer=   a folder with a tokenizer, or a name from configs/text_encoder: counts the tokens of captions into the index
runner=      local, or ray: workers of a Ray cluster take chunk after chunk, and the folders are ones that all its machines see
             (docs/cluster.md); runner_options='{address: auto, workers: 8, cpus: 1}'
processes=   (all cores) threads= of each to download (16) timeout= seconds (10) retries= (2)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.compose import compose_options, text_encoder_named
from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Build, and print the report."""
    from paradiffusion.curation.building.build import as_markdown, build
    from paradiffusion.curation.building.build_options import BuildOptions
    from paradiffusion.data.index import TokenCounter

    options = compose_options(BuildOptions, arguments)
    options.check()
    counter = None
    if options.tokenizer:
        from paradiffusion.text.families import count_tokens_with

        encoder = text_encoder_named(options.tokenizer, "tokenizer")
        counter = TokenCounter(encoder.name, count_tokens_with(encoder))
    try:
        report = build(options, counter)
    except KeyboardInterrupt as interrupt:
        print("interrupted: nothing is lost, the same command goes on.", file=sys.stderr)
        return getattr(interrupt, "status", 130)
    print(as_markdown(report))
    return 0 if report.kept else 1


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
