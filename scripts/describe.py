"""What a stage is and costs, before anything is trained: parameters, TFLOP, memory for each launch, disk and time.

    python scripts/describe.py preset=paper stage=2 gpu=24
    python scripts/describe.py preset=paper stage=1 gpus=32 device=a100 mfu=0.45 format=json

No weights and no data are needed. Besides every override of train.py it takes
  gpu=24       GiB of memory of one GPU: says what fits, and which key to change where it does not
  gpus=8       of the launch configurations for several GPUs
  device=h100  whose peak the time is estimated with; mfu=0.4 is the share of it that is reached
  price=2.5    of one GPU-hour, in any money: says what the stage costs
  format=text  or json
  beside=paper the same stage with another conditioning, in a table beside this one
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Print the description of one stage."""
    import json

    from paradiffusion.budget.describe import Question, as_text, describe, parse_question, side_by_side
    from paradiffusion.compose import compose_train

    question, overrides = parse_question(arguments)
    sides = [overrides]
    if question.beside:
        rest = [one for one in overrides if not one.startswith("conditioning=")]
        sides.append([*rest, f"conditioning={question.beside}"])
    for side in sides:  # refuses what is wrong before models are built
        compose_train(side, tuple(Question.__dataclass_fields__))
    described = [describe(side, question) for side in sides]
    if question.format == "json":
        document = described[0].as_json()
        if question.beside:
            document["beside"] = described[1].as_json()
        print(json.dumps(document, indent=1))
        return 0
    print(as_text(described[0]))
    if question.beside:
        print("\n" + side_by_side(described))
    return 0


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
