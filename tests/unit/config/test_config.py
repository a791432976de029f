"""From a command line to a checked configuration: what wins over what, and one sentence for every mistake."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
from commands import ROOT, Command, user_error
from omegaconf import OmegaConf

import sample
import train
from paradiffusion.compose import CONFIGS, compose_options, compose_sample, compose_train, groups, options
from paradiffusion.config import TrainConfig, keys_of
from paradiffusion.entry import run as enter
from paradiffusion.errors import UserError
from paradiffusion.scenes.dataset import DEFAULT_SIZES
from scripts.export import ExportOptions

AWKWARD = [
    "a \"red\", {blue} = 'x' ${oops}", "two\nlines\\", "'quoted'", '"', "[1, 2]", "", "123", "~+a=b", "  spaces  ", "é ✓",
]  # fmt: skip

# What YAML, Hydra or OmegaConf would make something else of.
TEXTS = [
    "1e45678",
    "2024_01_15",
    "true",
    "007",
    "v2 (lr=1e-4), cats",
    "it's",
    "a#b",
    "${oc.env:HOME}/x",
    "[ablation] lr",
    "\\\\${x}",
    "{a: b}",
    "~",
]

# (preset, stage) for which there is a preset_stage file.
STAGES = [tuple(name.rsplit("_", 1)) for name in options("preset_stage")]


@pytest.mark.parametrize(("preset", "stage"), STAGES)
@pytest.mark.parametrize("conditioning", options("conditioning"))
def test_every_stage_composes(preset: str, stage: str, conditioning: str) -> None:
    config = compose_train([f"preset={preset}", f"stage={stage}", f"conditioning={conditioning}", "data.shards=x"])
    assert (config.preset, config.stage, config.conditioning.name) == (preset, int(stage), conditioning)
    assert config.conditioning.mask_padding == (conditioning == "modern")
    assert config.train_text == {"1": "frozen", "2": "lora", "3": "adapter", "4": "adapter"}[stage]
    file = OmegaConf.to_container(OmegaConf.load(CONFIGS / "preset_stage" / f"{preset}_{stage}.yaml"))
    of_stage = OmegaConf.load(CONFIGS / "stage" / f"{stage}.yaml").data.captions
    assert isinstance(file, dict)
    # What the files say, and nothing besides: a default in the schema would be mixed in.
    assert config.data.captions == {**of_stage, **file.get("data", {}).get("captions", {})}
    assert config.max_steps == file["max_steps"] and config.optimizer.lr == file["optimizer"]["lr"]
    assert set(STAGES) >= {(preset, stage) for preset in options("preset") for stage in "123"}


@pytest.mark.parametrize("group", [g for g in groups() if g not in ("preset", "stage", "recipe")])
def test_every_option_of_every_group_composes(group: str) -> None:
    for name in options(group):
        own = ["data.shards=x"] if (group, name) == ("data", "shards") else []
        section = getattr(compose_train([f"{group}={name}", *own]), group)
        file = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
        # What the choice of world and of adapted layers comes from, and what is settled by the denoiser.
        for key in file.keys() - {"large", "lora_names", "refiner_width", "refiner_heads"}:
            if not OmegaConf.is_interpolation(file, key) and not OmegaConf.is_missing(file, key):
                assert getattr(section, str(key)) == file[key], f"{group}={name} does not set {key}"


@pytest.mark.parametrize("text", TEXTS)
def test_every_key_that_holds_a_text_takes_it_as_typed(text: str) -> None:
    config = compose_train([f"text_encoder.revision={text}", f"tracker.run_name={text}", f"run_dir={text}", f"codec.hub={text}"])
    found = (config.text_encoder.revision, config.tracker.run_name, config.run_dir, config.codec.hub)
    assert found == (text,) * 4
    if text != "~":  # of a folder, home
        assert compose_train([f"data.folder={text}"]).data.sources[0].folder == text
    assert compose_options(ExportOptions, [f"ckpt={text}", f"output={text}"]).output == text
    assert compose_sample(["ckpt=x", "prompt=y", f"output_dir={text}"]).output_dir == text


def test_the_large_world_is_one_key() -> None:
    small, large = compose_train(["stage=2"]).data, compose_train(["stage=2", "data.world=large"]).data
    assert (small.shards, small.resolution) == ("data/demo/big", 64)
    assert (large.shards, large.val_shards, large.resolution) == ("data/demo_large/big", "data/demo_large/val", 96)
    assert small.demo_sizes == DEFAULT_SIZES["small"] and large.demo_sizes == DEFAULT_SIZES["large"]
    own = compose_train(["data.world=large", "data.demo_folder=/mine", "data.demo_sizes={web: 8, val: 4}"]).data
    assert (own.shards, own.demo_sizes) == ("/mine/web", {"web": 8, "val": 4})


@pytest.mark.parametrize("name", options("recipe"))
def test_a_recipe_wins_over_preset_and_stage_and_not_over_the_command_line(name: str) -> None:
    file = OmegaConf.load(CONFIGS / "recipe" / f"{name}.yaml")
    config = OmegaConf.structured(compose_train([f"recipe={name}", "stage=2"]))
    assert config.recipe == name and OmegaConf.merge(config, file) == config, f"recipe={name} does not set all its keys"
    assert compose_train([f"recipe={name}", "stage=2", "batch_size=6"]).batch_size == 6


def test_lower_resolutions_must_lie_apart() -> None:
    for lower in ("[64]", "[96]", "[60]", "[32, 30]", "[0]"):
        with pytest.raises(UserError, match=r"data\.lower_resolutions=\[.*\] does not go with data\.resolution=64"):
            compose_train([f"data.lower_resolutions={lower}"])
    assert compose_train(["data.lower_resolutions=[48,32]"]).data.lower_resolutions == [48, 32]


def test_the_command_line_wins_over_everything() -> None:
    config = compose_train([])
    assert (config.preset, config.stage, config.run_dir, config.conditioning.name) == ("nano", 1, "runs/nano", "modern")
    config = compose_train(
        ["stage=2", "max_steps=7", "optimizer.lr=0.5", "data.shards=mine", "conditioning=paper", "sampler.steps=3",
         "lora.target_modules=[o_proj]", "text_encoder=tiny", "unet.arguments.layers_per_block=2", "max_steps=9"]
    )  # fmt: skip
    # Own shards are not validated on the built-in scenes.
    assert (config.data.shards, config.data.val_shards, config.data.demo) == ("mine", None, False)
    assert (config.max_steps, config.optimizer.lr, config.sampler.steps, config.conditioning.name) == (9, 0.5, 3, "paper")
    assert config.lora.target_modules == ["o_proj"] and config.text_encoder.name == "tiny"
    assert config.unet.arguments["layers_per_block"] == 2 and "block_out_channels" in config.unet.arguments
    assert config.optimizer.schedule == compose_train(["stage=2"]).optimizer.schedule
    assert compose_train(["data.demo_folder=/elsewhere", "stage=3"]).data.shards == "/elsewhere/small"


@pytest.mark.parametrize(
    ("encoder", "nano", "paper"),
    [
        ("t5_xxl", ["q", "v"], ["q", "k", "v", "o"]),
        ("clip_l", ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"]),
        ("qwen3_4b", ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_each_text_encoder_names_its_own_lora_layers(encoder: str, nano: list[str], paper: list[str]) -> None:
    chosen = ["stage=2", f"text_encoder={encoder}", "lora.rank=3"]
    assert compose_train(chosen).lora.target_modules == nano
    assert compose_train([*chosen, "preset=paper", "data.shards=mine"]).lora.target_modules == paper
    given = compose_train([*chosen, "lora.target_modules=[wi_0]"]).lora
    assert (given.target_modules, given.rank) == (["wi_0"], 3)


def test_the_last_of_two_values_wins_however_it_is_written() -> None:
    assert compose_train(["data.shards=[a.tar]", "data.shards=b"]).data.shards == "b"
    assert compose_train(["data.shards=b", "data.shards=[a.tar, b.tar]"]).data.shards == ["a.tar", "b.tar"]
    assert compose_train(["data.captions={clean: 1}", "data.captions.web=2"]).data.captions == {"clean": 1, "web": 2}
    # A dictionary given whole replaces, and a key adds.
    assert compose_train(["stage=2", "data.captions={clean: 1.0}"]).data.captions == {"clean": 1.0}
    before = compose_train(["stage=3"]).data.captions
    assert compose_train(["stage=3", "data.captions.web=0.5"]).data.captions == {**before, "web": 0.5}


@pytest.mark.parametrize(
    "path", ["'a' and 'b'", "/data/big/{00000..03299}.tar", "/a b/c=d, e.tar", "it's/(x)", "runs/a=b", "'/q/{0..1}.tar'", "C:\\shards"]
)
def test_paths_arrive_as_typed(path: str) -> None:
    config = compose_train([f"data.shards={path}", f"run_dir={path}", f"codec.path={path}"])
    expected = path.strip("'") if path.count("'") == 2 else path
    assert (config.data.shards, config.run_dir, config.codec.path) == (expected,) * 3


# What is typed, and what is said of it.
MISTAKES = {
    "stage=5": "stage=5 is unknown; choose one of 1, 2, 3, 4", "preset=huge": "preset=huge is unknown; choose one of .*nano",
    "tracker=mlflow": "choose one of jsonl, tensorboard, wandb", "sed=1": "the key sed is unknown; did you mean seed",
    "optimizr.lr=1": r"did you mean optimizer\.lr", "seed.x=1": r"the key seed\.x is unknown", "hydra.run.dir=x": "is unknown",
    "qqqqqqq=1": "the keys are preset, stage", "--stage=1": "expected key=value", "-m stage=1,2": "multirun",
    "launch=ddp": "is for the launcher; write `accelerate launch --config_file", "--config_file": "is for the launcher",
    "lora=8": r"lora=8 is not understood, since lora has keys of its own; set lora\.rank or", "seed=${nowhere}": "nowhere",
    "lora.target_modules=q_proj": r"lora\.target_modules: expected a list, such as \[a,b\]",
    "seed=abc": "seed: Value 'abc' .* Integer", "seed=1,2": "seed=1,2 names several values", "data.captions=3": r"data\.captions",
    "max_steps=0": "max_steps=0 is out of range; expected a number above 0", "micro_batch_size=0": "above 0",
    "ema_decay=1": "at least 0 and below 1", "spike_factor=nan": "above 1", "train_text=full": "frozen, lora, adapter",
    "precision=fp64": "fp32, bf16", "on_spike=panic": "stop, skip, rollback", "conditioning.layer_tap=first": "last, mean",
    "text_encoder.dtype=int8": "float32, bfloat16, float16", "conditioning.projection=mlp": "linear, refiner",
    "conditioning.max_tokens=0": "above 0", "conditioning.refiner_width=30": "multiple of twice",
    "unet.arguments={sample_size: 8}": r"refiner_width=null follows unet\.arguments\.cross_attention_dim, which is None",
    "conditioning.refiner_heads=0": "multiple of twice", "conditioning.refiner_kernel=4": "must be odd",
    "lora.target_modules=[]": r"such as \[q_proj,v_proj\]", "codec.factor=0": r"codec\.factor=0 .* above 0",
    "data.bucket_multiple=12": r"multiple of codec\.factor=8", "data.workers=-1": "at least 0",
    "data.caption_dropout=1.5": "expected 0 to 1", "data.max_aspect=0.5": "1 or more",
    "data.captions={short: 0}": "gives no caption kind a weight", "objective.prediction=x0": "epsilon, v_prediction, flow",
    "objective=paper objective.zero_terminal_snr=true": "use objective.prediction=v_prediction", "optimizer.lr=inf": "above 0",
    "optimizer.beta2=1": "below 1", "optimizer.schedule=step": "constant, cosine, linear", "data=shards": "shards",
    "sampler.solver=heun": "dpm, ddim, euler", "data.world=huge": "data.world=huge",
    "tracker.run_name=???": r"\?\?\? alone",
    "unet.arguments.dropout=0.1": r"unet\.arguments\.dropout=0\.1 would be drawn from torch's global generator",
}  # fmt: skip


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_one_sentence(typed: str) -> None:
    error = user_error(MISTAKES[typed], compose_train, [typed] if "{" in typed else typed.split())
    message = error
    assert "\n" not in message and message.endswith((".", "?")) and "Traceback" not in message


def test_prompts_arrive_exactly() -> None:
    for prompt in AWKWARD:
        config = compose_sample(["ckpt=x", f"prompt={prompt}", f"negative_prompt={prompt}"])
        assert config.prompt == config.negative_prompt == prompt
    assert compose_sample(["ckpt=x", "+prompt=a b"]).prompt == "a b"

    config = compose_sample(
        ["ckpt=runs/a, b", "prompt_file=it's {1}=c.txt", "output_dir=out (2)", "text_encoder.path=/a,b=c", "steps=5",
         "guidance=2.5", "height=null"]
    )  # fmt: skip
    assert (config.ckpt, config.prompt_file, config.output_dir) == ("runs/a, b", "it's {1}=c.txt", "out (2)")
    assert (config.text_encoder.path, config.steps, config.guidance, config.height) == ("/a,b=c", 5, 2.5, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prompt=a"], "ckpt= is missing"), (["ckpt=x"], "found neither"), (["ckpt=x", "prompt=null"], "found neither"),
        (["ckpt=x", "prompt=a", "prompt_file=b"], "found both"), (["ckpt=x", "prompt=a", "stesp=3"], "did you mean steps"),
        (["ckpt=x", "prompt=a", "height=-8"], "above 0"), (["ckpt=x", "a red circle"], "expected key=value"),
        (["ckpt=x", "prompt=a", "dtype=int4"], "float32, bfloat16, float16"),
    ],
)  # fmt: skip
def test_sample_mistakes_are_one_sentence(arguments: list[str], words: str) -> None:
    user_error(words, compose_sample, arguments)


def run(patch: pytest.MonkeyPatch, program: ModuleType, *arguments: str) -> int:
    """What the shell sees: the exit status of a program with these arguments."""
    patch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments])
    with pytest.raises(SystemExit) as leaving:
        enter(program.main, getattr(program, "help_text", lambda: program.__doc__))
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_output_that_nobody_reads_any_more() -> None:
    """`... | head`: no traceback, and a status that does not say that the work was done."""
    code = "from paradiffusion.entry import run; run(lambda _: [print('x' * 1000) for _ in range(3000)] and 0)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(60) == 141


def test_help_and_what_would_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, train, "--help") == 0
    text = capsys.readouterr().out
    assert "stage=1|2|3" in text and "preset=" in text and "optimizer.lr_lora" in text
    assert all(f"  {key}\n" in text + "\n" for key in keys_of(TrainConfig))
    assert run(monkeypatch, sample, "-h", "nonsense") == 0
    assert "prompt_file=" in capsys.readouterr().out
    assert run(monkeypatch, train, "--cfg", "stage=2", "seed=7") == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.stage == 2 and printed.seed == 7 and printed.data.shards == "data/demo/big"


PROGRAMS = ["train.py", "sample.py", *(f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.py")))]


@pytest.mark.parametrize("program", [one for one in PROGRAMS if not one.endswith("_demo.py")])
def test_a_mistake_ends_every_program_with_two_and_one_sentence(program: str, command: Command) -> None:
    done = command(program, "no_such_key=1")
    *usage, last = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and "error: " in last and "Traceback" not in done.stderr
    assert not usage or usage[0].startswith("usage: ")


@pytest.mark.parametrize(
    ("typed", "width", "heads"),
    [
        ("", 192, 4),
        ("preset=paper conditioning=modern", 1280, 20),
        ("preset=paper conditioning=modern unet=sdxl", 2048, 32),
        ("preset=paper conditioning=modern unet=pixart", 1152, 18),
        ("unet.arguments.cross_attention_dim=128", 128, 4),
        ("preset=paper conditioning=modern conditioning.refiner_width=512", 512, 8),
        ("preset=paper conditioning=modern conditioning.refiner_heads=10", 1280, 10),
        ("preset=paper conditioning.projection=refiner conditioning.refiner_width=null", 1280, 4),
        ("preset=paper", 256, 4),  # as the paper's arm and the official weights are described, which have none
    ],
)
def test_the_refiner_is_as_wide_as_the_text_that_the_denoiser_reads(typed: str, width: int, heads: int) -> None:
    found = compose_train([*typed.split(), "data.shards=unused"]).conditioning
    assert (found.refiner_width, found.refiner_heads) == (width, heads)
