"""Let people compare pictures blindly: two of one prompt beside each other, and which follows the text better, which looks
better. The paper's own evidence is of this kind.

    python scripts/vote.py action=serve study=votes raters=[anna,ben] \\
        sets='{ours: runs/nano/stage3/evaluation/paraprompts, other: pictures/other}' suite=paraprompts
    python scripts/vote.py action=serve study=votes                  # goes on with it, after any end
    python scripts/vote.py action=results study=votes                # while it runs, too
    python scripts/vote.py action=export study=votes output=votes.csv

study= is a folder for everything about one study. It is fixed when it begins: who sees which pair, when, and on which side.

serve: prints an address for each rater, with a token of their own, and serves until Ctrl-C. Each vote is on disk before it
    is acknowledged; closing the tab, reloading, or ending the server in any way loses none.
    sets=              two or more, by name: folders of evaluations (scripts/evaluate.py), or folders of pictures named
                       after the prompts. A missing or broken picture loses against one that is there; two tie
    suite= suite_path= count=   the prompts; not needed where a set is an evaluation. count= of them, spread evenly
    raters=            names, such as [anna,ben]
    ask=               separately (default): each question in a round of its own, appeal without the text; or together:
                       one after the other on one screen, the text dimmed for appeal
    questions=         of faithfulness and appeal (default both), or your own: '{name: text}'
    without_text=      questions that are asked without showing the prompt (default [appeal])
    repeats=           how many raters see each pair (default 2, or 1 for a single rater)
    pairs_per_rater=   at most about so many pairs for each (default: all that fall to them), from every two sets alike
    retest=            pairs that each rater sees a second time, for their agreement with themselves (0)
    images_per_prompt= how many pictures of each prompt are compared, the first with the first and so on (1)
    title=             at the top of the page (default "Which picture?"); seed= of all that is drawn by
                       lot (default: another in each study, so that no rater can compute the sides)
    host= port=        where to listen: 127.0.0.1 (this machine only; 0.0.0.0 for all) and 8766 (0: any free one)
    hosts=             names that others open this machine under, such as [votes.lab.example]; addresses always hold
tokens: prints the addresses again; host= and port= as above.
results: win, tie and loss rates and Davidson (Bradley-Terry with ties) strengths with 95 % intervals by bootstrap over
    prompts, tables by category and length band, agreement of raters, bias to a side: results.html, results.md, results.json.
    output=            folder to write to (default: the study's); seed= of the bootstrap (0)
export: a CSV row for each vote. output= the file (default <study>/votes.csv)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Do what ``action=`` names."""
    from paradiffusion.compose import compose_options
    from paradiffusion.evaluation.votes.vote_actions import VoteOptions, run_action
    from paradiffusion.evaluation.votes.vote_study import STUDY

    options = compose_options(VoteOptions, arguments)
    options.given = [argument.partition("=")[0] for argument in arguments]
    options.check()
    suite = None
    if options.suite and not (Path(str(options.study)).expanduser() / STUDY).exists():
        from paradiffusion.evaluation.suites.load import load_suite

        suite = load_suite(options.suite, options.suite_path)
    return run_action(options, suite)


if __name__ == "__main__":
    run(main, lambda: __doc__ or "")
