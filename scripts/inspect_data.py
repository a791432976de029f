"""Look at a data set before training on it: a report as one HTML page, and the same figures as JSON beside it.

    python scripts/inspect_data.py data.shards='shards/{00000..00099}.tar' output=report.html
    python scripts/inspect_data.py stage=2 data.folder=~/pictures output=report.html tokenizers='[smollm2_135m, ~/Llama-2-7b-hf]'

It shows counts, how often the run's steps go through the data, words and tokens of the captions and how they begin, image
sizes and aspects, how the samples fall into the aspect buckets, how many tokens would be padding, the paper's sets beside
this one, random samples and the worst cases. Besides every override of train.py (stage=, preset=, batch_size=, max_steps=,
data.resolution=, data.captions=, seed=, ...) it takes

  output=      the page, report.html by default; report.json lies beside it
  tokenizers=  names from configs/text_encoder, or folders with a tokenizer; by default the stage's own, which padding is
               measured with in any case
  samples=40   random samples on the page
  captions=20000  samples whose captions are read, for tokens, repetitions and first words; the rest is told from the index
  check=200    images that are decoded, to find such as do not, dark ones, and those of one colour
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.checks import split_list
from paradiffusion.compose import compose_train, split_options, text_encoder_named
from paradiffusion.curation.inspecting.inspect import InspectOptions
from paradiffusion.entry import run
from paradiffusion.errors import UserError


def main(arguments: list[str]) -> int:
    """Inspect and say where the page is."""
    asked, overrides = split_options(InspectOptions, arguments)
    output = asked.check_values()
    config = compose_train(overrides, tuple(InspectOptions.__dataclass_fields__))
    if config.data.streaming:
        raise UserError(
            "data.streaming=true reads shards without an index, which the report is made from; run scripts/index_shards.py "
            "first, and leave data.streaming out."
        )
    encoders = [config.text_encoder, *(text_encoder_named(name, "tokenizers", overrides) for name in split_list(asked.tokenizers))]

    from paradiffusion.atomic import write_atomic
    from paradiffusion.curation.inspecting.inspect import figures_json, inspect
    from paradiffusion.curation.inspecting.page import inspection_page
    from paradiffusion.data.index import TokenCounter
    from paradiffusion.data.plan import make_plan, open_index
    from paradiffusion.scenes.dataset import make_wanted
    from paradiffusion.text.families import count_tokens_with

    counters = {encoder.path or encoder.name: encoder for encoder in encoders}
    named = Counter(encoder.name for encoder in counters.values())
    counting = [  # before the data is read, which may take long
        TokenCounter(encoder.name if named[encoder.name] == 1 else place, count_tokens_with(encoder)) for place, encoder in counters.items()
    ]
    make_wanted(config.data)
    index = open_index(config.data)
    found = inspect(make_plan(index, config.data, config.batch_size, config.seed), counting, config, asked)
    write_atomic(output.with_suffix(".json"), figures_json(found))
    write_atomic(output, inspection_page(found))
    for note in found.notes:
        print(f"note: {note}")
    print(f"{output}: {found.counts['samples']:,} samples; the figures are in {output.with_suffix('.json').name}")
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
