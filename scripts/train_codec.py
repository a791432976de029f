"""Train the small KL autoencoder of preset=nano on drawn scenes, and write it in the diffusers layout.

The scenes are drawn on the fly from the training sets (web, big, and small at half size), so nothing needs to be on
disk. A small codec learns this in minutes on two cores:

    python scripts/train_codec.py --output data/nano_codec

The shipped one went on from there with its decoder alone (its latents told the shapes already), 34 minutes on one core:

    python scripts/train_codec.py --init CODEC --output data/nano_codec --decoder-only --objects 3 --lr 1e-3 --steps 6800
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paradiffusion.randomness import seed_from
from paradiffusion.scenes.dataset import draw, make_scene
from paradiffusion.scenes.judge import score
from paradiffusion.scenes.world import Scene, SceneObject, places

BASE = 64  # pixels; scenes of the double-sized set are brought to it with antialiasing, as the image pipeline does
LARGE = 96  # canvas of the large world, whose cells are as large and whose background patterns are wider
LARGE_SHARE = 0.4  # of the pictures are a BASE x BASE window of a LARGE canvas with an object in each cell
POOL = {"web": 0.5, "big": 0.25, "small": 0.25}  # "val" is only measured on
MEASURED = 200
CROWDED = 0.5  # share of the pictures that get an object in every cell


def build(latent_channels: int) -> Any:
    """1.6 M parameters, factor 8. No attention: one latent sees its surroundings through convolutions alone."""
    codec: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,  # of many channels each: narrow groups take the absolute colour away
        sample_size=BASE,
        mid_block_add_attention=False,
    )
    # Each residual block starts as the identity, which lets the picture through from the first step on.
    # The posterior starts narrow (standard deviation 0.1): at the usual 1 its noise drowns the objects for a long time.
    with torch.no_grad():
        for module in codec.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
        codec.quant_conv.weight[latent_channels:] *= 0.1
        codec.quant_conv.bias[latent_channels:] = -4.6
    return codec


def picture(scene: Scene) -> np.ndarray:
    """The drawn scene at base 64, uint8 [H, W, 3]."""
    image = draw(scene)
    shorter = {1.0: BASE, 5 / 3: BASE * 3 // 4, 3 / 5: BASE * 3 // 4}[scene.width / scene.height]
    factor = shorter / min(image.size)
    if factor != 1:
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    return np.asarray(image)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Pictures of one size to float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def crowd(scene: Scene, name: str, seed: int) -> Scene:
    """The scene with an object in every cell: several times as much to learn from in one picture."""
    taken = {item.place: item for item in scene.objects}
    for number in range(40):
        if len(taken) == len(places(scene.grid)):
            break
        other = make_scene(name, seed, number)
        if (other.width, other.height, other.grid) == (scene.width, scene.height, scene.grid):
            for item in other.objects:
                taken.setdefault(item.place, item)
    return replace(scene, objects=tuple(taken.values()))


def window(scene: Scene, name: str, seed: int) -> np.ndarray:
    """A BASE x BASE window, at whole latents, of a LARGE canvas with nine objects: uint8 [BASE, BASE, 3]."""
    rng = np.random.default_rng(seed_from("codec window", seed))
    cell, objects, number = BASE // 2, list[SceneObject](), 0
    while len(objects) < 9:
        other, number = make_scene(name, seed, number), number + 1
        if (other.width, other.height) == (BASE, BASE):
            objects += other.objects
    moved = []
    for place, item in enumerate(objects[:9]):
        row, column = divmod(place, 3)
        moved.append(replace(item, cx=item.cx % cell + column * cell, cy=item.cy % cell + row * cell))
    image = np.asarray(draw(replace(scene, width=LARGE, height=LARGE, objects=tuple(moved))))
    y, x = rng.integers(0, (LARGE - BASE) // 8 + 1, 2) * 8
    return image[y : y + BASE, x : x + BASE]


def batches(size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches, each of one canvas shape; a function of the seed."""
    waiting: dict[tuple[int, int], list[np.ndarray]] = {}
    rng = np.random.default_rng(seed_from("codec batches", seed))
    names, weights = list(POOL), list(POOL.values())
    number = 0
    while True:
        name = names[rng.choice(len(names), p=weights)]
        scene = make_scene(name, seed_from("codec", seed) % 2**31, number)
        draws = rng.random(2)
        if draws[0] < LARGE_SHARE:
            image = window(scene, "big", seed_from("codec window", seed, number) % 2**31)
        elif draws[1] < CROWDED:
            image = picture(crowd(scene, name, seed_from("codec crowd", seed, number) % 2**31))
        else:
            image = picture(scene)
        number += 1
        group = waiting.setdefault(image.shape[:2], [])
        group.append(image)
        if len(group) == size:
            yield to_tensor(waiting.pop(image.shape[:2]))


def reconstruction_loss(output: Tensor, images: Tensor, edge_weight: float, object_weight: float) -> Tensor:
    """L1 + MSE with more weight on what is not background, and L1 of both finite differences.

    Objects cover a twelfth of a picture: unweighted, L1 is content with the background alone for a long time.
    """
    ground = images.flatten(2).median(dim=2).values[:, :, None, None]
    weight = 1 + object_weight * ((images - ground).abs().amax(1, keepdim=True) > 0.3)
    weight = weight / weight.mean()
    error = output - images
    edges = sum(((weight * error).diff(dim=axis).abs().mean() for axis in (2, 3)), torch.zeros(()))
    return (weight * (error.abs() + 2 * error**2)).mean() + edge_weight * edges


def train(codec: Any, options: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine decay to zero, in bfloat16 (--fp32 where a CPU emulates it)."""
    if options.decoder_only:
        for part in (codec.encoder, codec.quant_conv):
            part.requires_grad_(False)
    trained = [parameter for parameter in codec.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = min(100, options.steps // 10 + 1)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + float(np.cos(np.pi * step / max(options.steps, 1))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(seed_from("codec noise", options.seed))
    source = batches(options.batch_size, options.seed)
    mean_loss = 0.0
    with tqdm(range(options.steps), desc="training the codec", unit="step", mininterval=2) as bar:
        for step in bar:
            images = next(source).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=not options.fp32):
                posterior = codec.encode(images).latent_dist
                output = codec.decode(posterior.sample(generator=generator)).sample.float()
            rec = reconstruction_loss(output, images, options.edges, options.objects)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            (rec + options.kl * kl).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            mean_loss = rec.item() if step == 0 else 0.98 * mean_loss + 0.02 * rec.item()
            if step % 20 == 0:
                noise = (0.5 * logvar).exp().mean().item()
                bar.set_postfix(rec=f"{mean_loss:.4f}", kl=f"{kl.item():.2f}", noise=f"{noise:.2f}")


@torch.no_grad()
def whiten(codec: Any, channels: int, power: float) -> Any:
    """The codec whose latents are the ``channels`` largest principal components of this one's, each divided by its standard
    deviation to the ``power``. The maps are folded into the convolutions beside the latents: it draws what it drew before.

    A denoiser's loss counts a channel by its variance. In latents as they are trained two thirds of it are the brightness of the
    background, and shapes lie in channels that noise covers at nearly all times.
    """
    width = codec.config.latent_channels
    source = batches(8, 1)
    values = torch.cat([codec.encode(next(source)).latent_dist.mean.transpose(0, 1).flatten(1) for _ in range(100)], dim=1)
    variances, directions = (part.flip(-1)[..., :channels] for part in torch.linalg.eigh(values.cov()))
    scale = variances ** (-power / 2)
    scale = scale / (variances * scale**2).mean().sqrt()
    to_new, to_old = (directions * scale).T, directions / scale
    into, out_of = codec.quant_conv, codec.post_quant_conv
    # Zeros that pad the decoder's first convolution mean the same latents as before.
    origin = -torch.linalg.solve(out_of.weight[:, :, 0, 0], out_of.bias)
    state = codec.state_dict()
    last, first = state["encoder.conv_out.weight"], state["decoder.conv_in.weight"]
    to_mean = to_new @ into.weight[:width, :, 0, 0]
    narrow = torch.full((channels,), -9.0)  # the logarithm of the posterior's variance
    state |= {
        "encoder.conv_out.weight": torch.cat([torch.einsum("ko,ocij->kcij", to_mean, last), torch.zeros(channels, *last.shape[1:])]),
        "encoder.conv_out.bias": torch.cat(
            [to_mean @ state["encoder.conv_out.bias"] + to_new @ (into.bias[:width] - origin), narrow]
        ),
        "quant_conv.weight": torch.eye(2 * channels)[:, :, None, None],
        "quant_conv.bias": torch.zeros(2 * channels),
        "post_quant_conv.weight": torch.eye(channels)[:, :, None, None],
        "post_quant_conv.bias": torch.zeros(channels),
        "decoder.conv_in.weight": torch.einsum("ocij,ck->okij", first, out_of.weight[:, :, 0, 0] @ to_old),
    }  # fmt: skip
    whitened = build(channels)
    whitened.load_state_dict(state)
    whitened.register_to_config(latents_mean=[round(v, 3) for v in (to_new @ (values.mean(1) - origin)).tolist()])
    return whitened


@torch.no_grad()
def measure(codec: Any) -> dict[str, float | list[float]]:
    """Latent statistics and reconstruction quality on held-out scenes, beside the scores of the true pictures."""
    latents, errors, noise = [], [], []
    found = {"true": np.zeros(4), "reconstructed": np.zeros(4)}
    for number in range(MEASURED):
        scene = make_scene("val", 0, number)
        image = picture(scene)
        posterior = codec.encode(to_tensor([image])).latent_dist
        latents.append(posterior.mean[0].flatten(1))
        noise.append(posterior.std.mean().item())
        output = codec.decode(posterior.mean).sample[0]
        pixels = ((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        errors.append(float(((pixels.astype(np.float64) - image) ** 2).mean()))
        for name, shown in (("true", image), ("reconstructed", pixels)):
            s = score(scene, shown)
            found[name] += (s.colour_at_place, s.shape, s.objects, s.background)
    values = torch.cat(latents, dim=1)
    values -= torch.tensor(codec.config.get("latents_mean") or 0.0).view(-1, 1)
    report: dict[str, float | list[float]] = {
        "std": values.std().item(),
        "channel_std": [round(v, 3) for v in values.std(dim=1).tolist()],
        "channel_mean": [round(v, 3) for v in values.mean(dim=1).tolist()],
        "posterior_noise": float(np.mean(noise)),
        "psnr": 10 * float(np.log10(255**2 / np.mean(errors))),
        "rmse": float(np.sqrt(np.mean(errors)) / 255),
    }
    for name, (colour, shape, objects, background) in found.items():
        report[f"{name}_colour_at_place"] = colour / objects
        report[f"{name}_shape"] = shape / objects
        report[f"{name}_background"] = background / MEASURED
    return report


def save(codec: Any, folder: Path, report: dict[str, float | list[float]]) -> None:
    """Write the diffusers layout: weights as bfloat16, and in config.json the scaling factor and the measured error."""
    codec.register_to_config(scaling_factor=round(1 / float(report["std"]), 4))  # type: ignore[arg-type]
    codec.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # the folder of --init, on this machine
    keys = ("psnr", "rmse", "reconstructed_colour_at_place", "reconstructed_shape")
    # A leading underscore keeps diffusers from taking it for an argument.
    config["_reconstruction"] = {key: round(float(report[key]), 4) for key in keys}  # type: ignore[arg-type]
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/nano_codec"), help="folder for the weights")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--kl", type=float, default=2e-5, help="weight of the mean KL divergence per latent value")
    parser.add_argument("--latent-channels", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, default=None, help="go on from the weights in this folder")
    parser.add_argument("--edges", type=float, default=0.5, help="weight of the loss of finite differences")
    parser.add_argument("--objects", type=float, default=1.0, help="extra weight of pixels that are not background")
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder, so that models on its latents stay as they are")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    parser.add_argument("--fp32", action="store_true", help="train in float32 instead of bfloat16")
    parser.add_argument("--whiten", type=int, default=0, help="principal components that the latents of --init become first")
    parser.add_argument("--power", type=float, default=0.75, help="of --whiten: 0 keeps the components' spread, 1 makes all equal")
    options = parser.parse_args()
    if min(options.steps + 1, options.batch_size, options.latent_channels) < 1:
        parser.error("--batch-size and --latent-channels must be at least 1, --steps at least 0; give larger numbers.")
    if options.whiten and options.init is None:
        parser.error("--whiten needs a trained codec; name its folder by --init.")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(seed_from("codec weights", options.seed))
    codec = build(options.latent_channels) if options.init is None else AutoencoderKL.from_pretrained(options.init).float()
    if options.whiten:
        codec = whiten(codec, options.whiten, options.power)
    train(codec.to(memory_format=torch.channels_last), options)
    codec.eval()
    codec.to(torch.bfloat16).float()  # measure what is stored
    report = measure(codec)
    save(codec, options.output, report)
    for key, value in report.items():
        print(f"{key}: {value if isinstance(value, list) else f'{value:.4f}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
