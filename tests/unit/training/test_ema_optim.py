"""The average, the optimiser's groups, the schedule, what the log says; and the launcher's other values, which are refused."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from commands import ROOT, user_error
from data_fixtures import half_unreadable
from safetensors.torch import load_file, save_file
from torch import nn
from training_runs import Weights, build_here, clipped

from paradiffusion.compose import compose_train
from paradiffusion.config import OPTIMIZERS, OptimizerConfig, TrackerConfig, TrainConfig
from paradiffusion.errors import UserError
from paradiffusion.training import optim
from paradiffusion.training.ema import Ema, OwnAverage
from paradiffusion.training.engine import Engine, WholeMasters, ZeroEngine, check_deepspeed_file, check_launch
from paradiffusion.training.log import Log, Meters, human_time, length_band, log_line
from paradiffusion.training.optim import Fp32Muon, MuonAdamW, build_optimizer, keeps_average, part_of, schedule, set_learning_rate


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, 2, generator=generator)) for name in ("a", "b")}


def average_of(followed: dict[str, nn.Parameter], decay: float, device: str | None = None) -> Ema:
    return Ema(WholeMasters(followed, main=True), decay, device)


def test_ema_warms_up_and_then_keeps_its_decay() -> None:
    followed = parameters()
    ema = average_of(followed, 0.3)
    expected = {name: p.detach().clone() for name, p in followed.items()}
    for step in range(6):
        decay = min(0.3, (1 + step) / (10 + step))
        assert (decay < 0.3) == (step < 3)
        with torch.no_grad():
            for name, p in followed.items():
                p += step + 1
                expected[name] = decay * expected[name] + (1 - decay) * p
        ema.update(step)
        for name in followed:
            torch.testing.assert_close(ema.full()[name], expected[name])


def test_ema_applied_restores_bit_for_bit_even_after_an_error() -> None:
    followed = parameters()
    ema = average_of(followed, 0.9)
    with torch.no_grad():
        for p in followed.values():
            p *= math.pi
    average = {name: tensor.clone() for name, tensor in ema.full().items()}
    before = {name: p.detach().clone() for name, p in followed.items()}
    with pytest.raises(RuntimeError), ema.applied():
        assert all(torch.equal(p, average[name]) for name, p in followed.items())
        assert not torch.equal(followed["a"], before["a"])
        raise RuntimeError
    assert all(torch.equal(p, before[name]) for name, p in followed.items())
    assert all(torch.equal(ema.full()[name], average[name]) for name in followed)


def test_ema_refuses_lower_precision_and_loads_by_name() -> None:
    with pytest.raises(AssertionError, match="fp32"):
        average_of({"a": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, 0.9)
    followed = {"a": nn.Parameter(torch.ones(2))}
    ema = average_of(followed, 0.9, "cpu")
    ema.load({"a": torch.tensor([2.0, 3.0]), "unused": torch.zeros(1)})
    assert ema.full()["a"].tolist() == [2.0, 3.0]
    with ema.applied():
        assert followed["a"].tolist() == [2.0, 3.0]


QUARTER = 0.1 + 0.45 * (1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("config", "most", "rates"),
    [
        ({"warmup_steps": 4}, 100, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1, 99: 1}),
        ({"schedule": "linear", "warmup_steps": 10, "final_lr": 0.2}, 110, {9: 1, 10: 1, 60: 0.6, 110: 0.2, 500: 0.2}),
        ({"schedule": "cosine", "final_lr": 0.1}, 100, {0: 1, 25: QUARTER, 50: 0.55, 100: 0.1, 200: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 5}, 5, {5: 1}),
        ({"schedule": "trapezoid", "decay": 0.2, "final_lr": 0.1, "warmup_steps": 10}, 110, {4: 0.5, 10: 1, 90: 1, 100: 0.55, 110: 0.1}),
    ],
)  # fmt: skip
def test_schedule(config: dict[str, Any], most: int, rates: dict[int, float]) -> None:
    assert {step: schedule(OptimizerConfig(**config), step, most) for step in rates} == pytest.approx(rates)


def test_groups_by_part_and_decay() -> None:
    matrix, vector = lambda: nn.Parameter(torch.zeros(2, 2)), lambda: nn.Parameter(torch.zeros(2))
    named = {
        "unet.conv_in.weight": nn.Parameter(torch.zeros(2, 2, 3, 3)),
        "unet.conv_in.bias": vector(),
        "unet.encoder_hid_proj.weight": matrix(),
        "unet.encoder_hid_proj.bias": vector(),
        "refiner.embed.weight": matrix(),
        "text_encoder.model.base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight": matrix(),
    }
    assert [part_of(name) for name in named] == ["unet", "unet", "conditioning", "conditioning", "conditioning", "lora"]
    config = OptimizerConfig(lr=1.0, lr_conditioning=2.0, lr_lora=3.0, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(named, config)
    found = {
        name: (group["part"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, p in named.items()
        if any(p is member for member in group["params"])
    }
    assert list(found.values()).count(("unet", 1.0, 0.1)) == 1 and found["unet.conv_in.bias"] == ("unet", 1.0, 0.0)
    assert found["refiner.embed.weight"] == found["unet.encoder_hid_proj.weight"] == ("conditioning", 2.0, 0.1)
    assert found["unet.encoder_hid_proj.bias"] == ("conditioning", 2.0, 0.0)
    assert sorted(found) == sorted(named) and ("lora", 3.0, 0.1) in found.values()
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["eps"] == 1e-6 and optimizer.defaults["fused"]
    assert not build_optimizer(named, OptimizerConfig(fused=False)).defaults["fused"]
    for factor in (0.5, 0.1):  # of the base rate, not of the last one
        set_learning_rate(optimizer, factor)
        assert {group["part"]: group["lr"] for group in optimizer.param_groups} == {
            "unet": factor, "conditioning": 2 * factor, "lora": 3 * factor,
        }  # fmt: skip


def test_muon_takes_the_matrices_and_leaves_the_rest_to_adamw() -> None:
    shapes = {
        "unet.conv_in.weight": (2, 2, 3, 3),
        "unet.attention.weight": (4, 4),
        "unet.attention.bias": (4,),
        "refiner.embed.weight": (4, 2),
        "text_encoder.model.q_proj.lora_A.default.weight": (2, 4),
    }
    generator = torch.Generator().manual_seed(0)
    named = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    optimizer = build_optimizer(named, OptimizerConfig(name="muon", lr=0.1, lr_conditioning=0.2, lr_lora=0.3))
    assert isinstance(optimizer, MuonAdamW)
    before = {name: p.detach().clone() for name, p in named.items()}
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in named.items()), "both members follow the schedule"
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in named.items())
    keys = {name: set(optimizer.state[p]) for name, p in named.items()}
    muon = {name for name, kept in keys.items() if kept == {"momentum_buffer"}}
    assert muon == {"unet.attention.weight", "refiner.embed.weight"}
    assert all(kept == {"step", "exp_avg", "exp_avg_sq"} for name, kept in keys.items() if name not in muon)
    optimizer.zero_grad()
    assert all(p.grad is None for p in named.values())


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_muon_is_the_same_where_a_processor_has_no_bfloat16(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "settled_precision", lambda _: "bf16" if has_bfloat16 else "fp32")
    generator = torch.Generator().manual_seed(0)
    start = {f"unet.{n}.weight": torch.randn(shape, generator=generator) for n, shape in enumerate([(24, 8), (8, 24), (16, 16)])}
    named = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    named["unet.bias"] = nn.Parameter(torch.zeros(2))
    config = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.1)
    optimizer = build_optimizer(named, config)
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    torchs = torch.optim.Muon(theirs.values(), lr=0.1, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    assert type(optimizer.members[0]) is (torch.optim.Muon if has_bfloat16 else Fp32Muon)
    for _ in range(3):
        for one, two in zip((named[name] for name in start), theirs.values(), strict=True):
            one.grad = two.grad = torch.randn(one.shape, generator=generator)
        optimizer.step()
        torchs.step()
    for name, value in start.items():
        moved, expected = named[name] - value, theirs[name] - value
        assert (moved - expected).norm() <= 0.02 * expected.norm(), name  # of which bfloat16 rounds
        assert torch.equal(named[name], theirs[name]) == has_bfloat16, name


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_muon_in_float32_is_exact_where_directions_differ_by_a_million(shape: tuple[int, int]) -> None:
    """As gradients are; bfloat16 is a sixth off there."""
    generator, least = torch.Generator().manual_seed(0), min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, least, generator=generator, dtype=torch.float64))[0] for side in shape)
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = ((left * torch.logspace(0, -6, least, dtype=torch.float64)) @ right.T).float()
    expected = parameter.grad.double() / parameter.grad.double().norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.775 * gram + 2.0315 * gram @ gram) @ expected
    settings = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    Fp32Muon([parameter], lr=1.0, **settings).step()
    moved = -parameter.detach().double() / (0.2 * math.sqrt(max(shape)))
    assert (moved - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_that_is_left_out_leaves_no_trace(name: str) -> None:
    followed = parameters() | {"bias": nn.Parameter(torch.ones(2))}
    engine = Engine.__new__(Engine)
    engine.optimizer = build_optimizer(followed, OptimizerConfig(name=name))
    for out in (False, True, False):
        for p in followed.values():
            p.grad = torch.full_like(p, math.nan if out else 0.5)
        kept = {key: p.detach().clone() for key, p in followed.items()}
        states = {id(p): {k: torch.as_tensor(v).clone() for k, v in s.items()} for p, s in engine.optimizer.state.items()}
        engine.update(torch.tensor(out))
        assert all(torch.equal(p, kept[key]) == out for key, p in followed.items())
        if out:
            for p, state in engine.optimizer.state.items():
                assert all(torch.equal(torch.as_tensor(v), states[id(p)][k]) for k, v in state.items())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw8bit"])  # which tests/gpu has
def test_every_optimizer_comes_back_to_the_bit_from_a_file(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package := OPTIMIZERS[name].path.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    rate = {"prodigy": 1.0, "adadelta": 1.0}.get(name, 1e-2)
    config = OptimizerConfig(name=name, lr=rate, lr_conditioning=rate, lr_lora=rate)

    def begin() -> Engine:
        engine, generator = Engine.__new__(Engine), torch.Generator().manual_seed(0)
        shapes = {"unet.a.weight": (128, 64), "unet.a.bias": (64,), "refiner.kernel": (8, 4, 3, 3), "unet.unused": (4,)}
        engine.parameters = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
        engine.optimizer, engine.accelerator = (build_optimizer(engine.parameters, config), SimpleNamespace(is_main_process=True))
        return engine

    @torch.compiler.set_stance("force_eager")  # torchao's kernels
    def go(engine: Engine, steps: range) -> Weights:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            set_learning_rate(engine.optimizer, 1 / (1 + step))
            for key, parameter in engine.parameters.items():
                if key != "unet.unused":
                    parameter.grad = parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        return {key: p.detach().clone() for key, p in engine.parameters.items()}

    whole, engine = begin(), begin()
    first, expected = go(begin(), range(1)), go(whole, range(10))
    weights = go(engine, range(7))
    if keeps_average(engine.optimizer):
        average = OwnAverage(WholeMasters(engine.parameters, main=True), engine.optimizer).full()
        assert all(torch.equal(p, weights[key]) for key, p in engine.parameters.items()), "the weights stay where they are"
    save_file(dict(engine.optimizer_state()), tmp_path / "state.safetensors")
    if keeps_average(engine.optimizer):
        engine.optimizer.eval()
        assert all(torch.equal(p, average[key]) for key, p in engine.parameters.items())
        assert not torch.equal(average["unet.a.weight"], weights["unet.a.weight"])
    again = begin()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for key, parameter in again.parameters.items():
            parameter.copy_(weights[key])
        again.load_optimizer(stored := load_file(tmp_path / "state.safetensors"))
        assert all(torch.equal(p, weights[key]) for key, p in again.parameters.items())
    found = go(again, range(7, 10))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert not torch.equal(expected["unet.a.weight"], first["unet.a.weight"])
    kept = sum(t.nbytes for key, t in stored.items() if key.endswith("/unet.a.weight") and not key.startswith("step/"))
    fewer = ("adafactor", "muon")  # of which the table has the most that a parameter's state may come to
    assert kept / (128 * 64) == pytest.approx(OPTIMIZERS[name].state, rel=0.3) or name in fewer
    assert kept / (128 * 64) <= 1.3 * OPTIMIZERS[name].state


def test_optimizers_that_cannot_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    user_error(r"optimizer.name=lbfgs .*adamw.*nadam.*prodigy", compose_train, ["optimizer.name=lbfgs"])
    differing = OptimizerConfig(name="prodigy", lr=1.0, lr_conditioning=0.5)
    named = {"unet.a": nn.Parameter(torch.ones(2)), "refiner.b": nn.Parameter(torch.ones(2))}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "prodigyopt", SimpleNamespace(Prodigy=None))
    user_error(r"prodigy finds one learning rate .*\[0.5, 1.0\]", build_optimizer, named, differing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    user_error("needs the package schedulefree, and it is not installed", build_optimizer, named, OptimizerConfig(name="sgd_schedulefree"))


def test_length_bands_and_times() -> None:
    bands = {0: "0-25", 25: "0-25", 26: "26-77", 77: "26-77", 78: "78-128", 200: "129-256", 257: "257+", 5000: "257+"}
    assert {words: length_band(words) for words in bands} == bands
    times = {0: "0s", 59.9: "59s", 60: "1m00s", 185: "3m05s", 3599: "59m59s", 3600: "1h00m", 7800: "2h10m", 90000: "25h00m"}
    assert {seconds: human_time(seconds) for seconds in times} == times


def test_summary_joins_processes_and_bins_and_the_log_line_says_it() -> None:
    meters = [Meters(), Meters()]
    for number, each in enumerate(meters):
        each.steps, each.samples, each.tokens, each.truncated = 2, 10, 100, number
        each.gradient, each.waited = 3.0, 1.0
    meters[0].errors = [(1.0, 0.1, 10), (3.0, 0.2, 100)]
    meters[1].errors = [(5.0, 0.6, 10), (7.0, 1.0, 300)]
    parts = [{**each.export(), "seconds": 4.0} for each in meters]
    json.dumps(parts)  # they travel between processes
    record = meters[0].summary(parts)
    assert record["loss"] == 4.0 and record["samples_per_second"] == 5.0 and record["tokens_per_second"] == 50.0
    assert record["data_wait"] == 0.25 and record["truncated"] == 0.05 and record["truncated_count"] == 1
    assert record["gradient_norm"] == 1.5 and record["seconds_per_step"] == 2.0
    bins = {key: value for key, value in record.items() if "/" in key}
    assert bins == {
        "loss_time/0.00-0.25": 2.0, "loss_time/0.50-0.75": 5.0, "loss_time/0.75-1.00": 7.0,
        "loss_words/0-25": 3.0, "loss_words/78-128": 3.0, "loss_words/257+": 7.0,
    }  # fmt: skip
    record |= {"learning_rate": 1e-4, "memory_gb": 1.25}
    line = log_line(TrainConfig(stage=2, max_steps=150), 60, record)
    for part in (
        "stage 2", "60/150", "loss 4.0000", "5.0 samples/s", "50 tokens/s", "data wait  25%", "truncated  5.0%", "grad 1.50",
        "lr 1.0e-04", "mem 1.2 GB", "left 3m00s",
    ):  # fmt: skip
        assert part in line
    assert "\n" not in line and "unreadable" not in line
    assert "unreadable 3" in log_line(TrainConfig(), 1, {**record, "bad_samples": 3})


def test_log_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=str(tmp_path / "run"), tracker=TrackerConfig())
    log = Log(tmp_path, config, {}, first_step=0)
    for step in (10, 20, 30):
        log.write(step, "train", {"loss": 1.0 / step, "note": "text"})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 31, "ki')  # killed here
    log = Log(tmp_path, config, {}, first_step=20)
    log.write(30, "validation", {"loss": 0.5})
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["kind"]) for r in records] == [(10, "train"), (20, "train"), (30, "validation")]


NAMES = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)


def test_contradictions_are_refused(tiny_arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_train([*tiny_arguments, "precision=fp32", "optimizer.max_grad_norm=2.0"])
    check_launch(config, 2)
    for name, value, said in (
        (NAMES[0], "fp16", "mixed_precision=fp16, and precision makes it no"),
        (NAMES[1], "4", "batch_size and micro_batch_size makes it 2"),
        (NAMES[2], "0.5", r"gradient_clipping=0\.5, and optimizer\.max_grad_norm makes it 2\.0"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
            patch.setenv(name, value)
            check_launch(config, 2)
    for name, value in zip(NAMES, ("no", "1", "1.0"), strict=True):  # what launchers always export
        monkeypatch.setenv(name, value)
    check_launch(compose_train([*tiny_arguments, "precision=bf16", "optimizer.max_grad_norm=0.5"]), 4)


@pytest.mark.parametrize(
    ("stage", "zero", "sentence"),
    [(3, {"offload_param": {"device": "nvme"}}, "offloads to nvme"), (2, {"offload_optimizer": {"device": "nvme"}}, "offloads to nvme"),
     (0, {}, "zero_stage=0; expected 1, 2 or 3")],
)  # fmt: skip
def test_ways_of_zero_whose_checkpoints_would_lack_weights_are_refused(stage: int, zero: dict[str, Any], sentence: str) -> None:
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=1)
    user_error(sentence, ZeroEngine, accelerator, nn.Linear(1, 1), TrainConfig(), 1)


def test_a_deepspeed_file_of_the_users_own(tiny_arguments: list[str], tmp_path: Path) -> None:
    config, path = compose_train(tiny_arguments), tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}))
    check_deepspeed_file(path, config, 1)
    for settings, said in (
        ('{"train_batch_size": 99}', "train_batch_size=99, and batch_size makes it 4"),
        ('{"gradient_accumulation_steps": 8}', "batch_size and micro_batch_size makes it 1"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled=True, and precision makes it fp32"),
        ('{"optimizer": {"type": "Adam"}}', "take optimizer out"),
        ('{"scheduler": {"type": "WarmupLR"}}', "optimizer.schedule"),
        ("{", "could not be read"),
    ):
        path.write_text(settings)
        user_error(said, check_deepspeed_file, path, config, 1)


def test_the_launch_configurations_leave_our_keys_alone() -> None:
    files = sorted((ROOT / "configs" / "launch").glob("*.yaml"))
    assert {path.stem for path in files} == {"one", "ddp", "zero2", "zero2_offload", "zero3", "two_nodes"}
    ours = {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size"}
    for settings in (yaml.safe_load(path.read_text()) for path in files):
        assert not ours & {**settings, **settings.get("deepspeed_config", {})}.keys()


def test_unreadable_samples_leave_the_mean_over_the_readable_ones(tiny_arguments: list[str], tmp_path: Path) -> None:
    bad = [f"data.shards={half_unreadable(tmp_path / 'bad')}", "data.max_bad_fraction=0.9"]
    found = []
    for micro in (4, 1):
        trainer = build_here([*tiny_arguments, *bad, f"run_dir={tmp_path / str(micro)}", f"micro_batch_size={micro}"])
        batches = trainer.loader()
        for _ in range(2):
            trainer.train_step(batches)
        share, taken = trainer.gradients(batches)
        found.append((float(share), clipped(trainer)))
        errors = torch.cat([losses.errors for _, _, losses in taken])
        weights = torch.cat([batch.weights for batch, _, _ in taken])
        assert 0 < weights.sum() < 4
        assert found[-1][0] == pytest.approx(float((errors * weights).sum() / weights.sum()), rel=1e-5)
    (loss, whole), (other, parts) = found
    assert loss == pytest.approx(other, rel=1e-5)
    for name, gradient in parts.items():
        assert float((gradient - whole[name]).norm()) <= 1e-4 * float(whole[name].norm()) + 1e-7, name


def test_what_the_launch_configuration_contradicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    said = "^the launch configuration says mixed_precision=bf16, and precision makes it no; .*accelerate's own default_config.yaml"
    user_error(said, check_launch, compose_train(["preset=nano", "precision=fp32"]), 1)
