"""A stage's models as each process holds them before the first step: FOLDER, then the arguments of train.py. Writes FOLDER/RANK.safetensors
with all weights, gathered where they are cut, and FOLDER/RANK.json with bytes: of weights held at once while they were cut (under
ZeRO-3), or made before they come from the main process (else), of all weights, and of the largest one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file

from paradiffusion.compose import compose_train
from paradiffusion.scenes.dataset import make_wanted
from paradiffusion.training import engine
from paradiffusion.training import trainer as module
from paradiffusion.training.folder import stage_folder
from paradiffusion.training.trainer import Trainer


def build(arguments: list[str], held: list[int]) -> Trainer:
    """The stage; ``held`` gets the bytes that its weights take off the meta device whenever one is sent to the others."""
    import deepspeed

    config = compose_train(arguments)
    make_wanted(config.data)
    accelerator = engine.make_accelerator(config)
    stage_folder(config).mkdir(parents=True, exist_ok=True)
    cut, send = engine.cut, deepspeed.comm.broadcast

    def watched(joint: torch.nn.Module, *given: Any) -> None:
        def sent(*arguments: Any, **more: Any) -> Any:
            pieces = [getattr(p, "ds_tensor", None) for p in joint.parameters()]
            values = [p.data for p in joint.parameters() if not p.is_meta] + [t for t in pieces if t is not None]
            held.append(sum(value.nbytes for value in values))
            return send(*arguments, **more)

        deepspeed.comm.broadcast = sent
        cut(joint, *given)
        deepspeed.comm.broadcast = send

    def brought(joint: torch.nn.Module, device: torch.device) -> None:
        held.append(sum(p.nbytes for n, p in joint.named_parameters() if not (p.is_meta or n.startswith("text_encoder."))))
        bring(joint, device)

    bring, module.bring = module.bring, brought
    engine.cut = watched
    return Trainer(config, accelerator)


def main(folder: Path, arguments: list[str]) -> None:
    import deepspeed

    held: list[int] = []
    trainer = build(arguments, held)
    found = {}
    for name, parameter in trainer.joint.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    sizes = [value.nbytes for value in found.values()]
    found |= {name: buffer.clone() for name, buffer in trainer.joint.named_buffers()}
    save_file(found, folder / f"{trainer.rank}.safetensors")
    bytes_ = {"held": max(held), "all": sum(sizes), "largest": max(sizes)}
    (folder / f"{trainer.rank}.json").write_text(json.dumps(bytes_))
    trainer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
