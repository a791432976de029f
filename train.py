"""Train one stage: `python train.py stage=1`, or `accelerate launch train.py stage=2`; the same command again resumes.

Every key of configs/train.yaml and its groups can be overridden; `python train.py --cfg stage=2` prints what would run.
"""

from __future__ import annotations

from paradiffusion.entry import run


def main(arguments: list[str]) -> int:
    """Compose and check the configuration, then train; models are loaded only after every override was accepted."""
    from paradiffusion.compose import compose_train

    config = compose_train(arguments)
    if "--cfg" in arguments:
        from paradiffusion.compose import as_yaml

        print(as_yaml(config))
        return 0
    from paradiffusion.scenes.alignment import SceneScorer
    from paradiffusion.scenes.dataset import make_wanted
    from paradiffusion.training.trainer import train

    make_wanted(config.data)
    if config.preflight:
        from paradiffusion.training.engine import make_accelerator
        from paradiffusion.training.preflight import preflight

        preflight(config, make_accelerator(config))
        return 0
    return train(config, SceneScorer())


def help_text() -> str:
    """Groups with their options, and keys."""
    from paradiffusion.compose import help_train

    return f"{__doc__}\n{help_train()}"


if __name__ == "__main__":
    run(main, help_text)
