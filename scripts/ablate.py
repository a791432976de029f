"""Compare settings of training: each is trained with several seeds and evaluated, and one table says what differs.

    python scripts/ablate.py study=configs/ablations/nano.yaml
    python scripts/ablate.py study=configs/ablations/paper.yaml preset=paper launch=configs/launch/zero2.yaml print=true \\
        stage1.data.shards='/data/web/{00000..29999}.tar' stage2.data.shards='/data/big/{00000..03299}.tar' \\
        stage3.data.shards='/data/small/{00000..00003}.tar'

A study is a YAML file; configs/ablations/nano.yaml explains its keys. Stages that settings have in common are trained once.
The same command again goes on where it stopped, whatever ended it; what is finished is not repeated. After a change of
the study, runs that are as before stay, and others are made anew in folders of their own.

study=              the YAML file
output=             its folder (default runs/ablations/<name of the study>): trained/, evaluated/, logs/, and report.html,
                    report.md and report.json, which are written again after each evaluation
only=[a,b]          these settings, and the baseline; seeds=[0,1,2] in place of the study's
launch=             a file of configs/launch: every command is started by `accelerate launch`;
                    launch_arguments=[--num_processes,4] go to it as well
keep_going=true     go on after a failure with what does not depend on it; the status is then 1 at the end
print=no            true or shell: print the commands that are left as a script, and run nothing; json: all as JSON lines;
                    slurm: a script that submits what can start now through scripts/slurm.sh
results=            a file of results, a line of JSON a run: those in it are not made again, and new ones are added. From it alone
                    table=true makes the table
table=false         true: write the report of what is finished, and run nothing
stageN.key=value    an override of train.py in stage N of every setting; any other key=value in all stages. A setting's own
                    overrides go first.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Read the study, then print or run it."""
    from paradiffusion.compose import compose_options, compose_train
    from paradiffusion.config import TrainConfig
    from paradiffusion.evaluation.ablation import AblateOptions, ablate, split
    from paradiffusion.evaluation.evaluate_options import EvaluateOptions
    from paradiffusion.evaluation.offered_scores import check_possible, make_scores, offers
    from paradiffusion.evaluation.suites.load import load_suite

    own, extra = split(arguments)
    options = compose_options(AblateOptions, own)
    options.check()

    def check(evaluate: list[str], runs: bool) -> None:
        asked = compose_options(EvaluateOptions, evaluate)
        asked.check()
        chosen = []
        for name in asked.suites() if runs else ():  # not once the training is done
            path = asked.suite_paths().get(name)
            suite = load_suite(name, path, asked.count, asked.allow_other, asked.of_suite())
            made = make_scores(asked, offers(asked, suite, None, "cpu", "checkpoint"))
            # What needs a model to draw with will have one.
            chosen.append([score for score in made if score.name != "counterfactual"])
        check_possible(asked, chosen)

    def compose(overrides: list[str]) -> TrainConfig:
        return compose_train(overrides, beside=AblateOptions.keys())

    return ablate(options, extra, compose, check, arguments)


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
