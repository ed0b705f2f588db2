"""The saved LoRA works in the stock pipeline as its model card says."""

import pytest
import torch

from ref.presets import PRESETS
from ref.train import main

from ..small import LARGE_SETTINGS, PRESET, TRAINING, options
from ..tools import flags, refusal


@pytest.mark.parametrize("kind", PRESET)
def test_the_saved_lora_and_its_card_work_in_the_stock_pipeline(kind, world, tmp_path, capsys):
    """The command itself. Its LoRA, loaded as its card says, moves stock diffusers' images."""
    from diffusers import DiffusionPipeline

    command = ["--preset", PRESET[kind], "--method", "pec", "--encoder", f"dino={world / 'dino'}", "--output-dir"]
    arguments = [*command, str(tmp_path), *flags(options(world, kind)), *flags(LARGE_SETTINGS)]
    arguments += ["--ema-every", "1"]  # in two iterations the averages are to be of something
    assert main([*arguments, "--log-with", "tensorboard"]) == 0
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        return pipe(TRAINING[0], height=32, width=32, num_inference_steps=2, generator=seed, output_type="pt").images

    pipe = DiffusionPipeline.from_pretrained(world / kind)
    base = draw(pipe)
    card = (tmp_path / "weights" / "README.md").read_text()
    assert f"base_model: {world / kind}" in card and "| weight | `0.05` |" in card
    assert f"| ema | `{PRESETS[PRESET[kind]].settings.ema}` |" in card
    assert all(f"]({name})" in card and (tmp_path / "weights" / name).exists() for name in ("before.png", "after.png"))
    [line] = [line for line in card.splitlines() if "load_lora_weights" in line]
    exec(line, {"pipe": pipe})
    assert (draw(pipe) - base).abs().max() > 1e-3

    assert main([*arguments, "--resume", "--micro-batch", "2"]) == 0  # finished: nothing is trained again
    assert "holds a run with reward = " in refusal(main, [*arguments, "--resume", "--reward", "jpeg"], capsys)
