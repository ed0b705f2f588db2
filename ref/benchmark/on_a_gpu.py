"""The large presets at full size on a real GPU, with random weights: nothing is downloaded, ten minutes at most.

    python -m ref.benchmark.on_a_gpu                      # sd35_medium, flux_dev, flux_dev_720
    python -m ref.benchmark.on_a_gpu --model outputs/tiny/sd3 sd35_medium      # a rehearsal, on the CPU too

Two iterations of Flow-GRPO with one group of two micro-batches, those of `--memory` for this card; the second is reported:
the largest distance of the first update's ratios from 1, which must be 0, peak memory beside the table of presets.py, seconds
of each phase, and the share of the rate of a large matrix product that the transformer's FLOPs make of rollout and update.
Reward and phi are sums of pixels, so PickScore's 3.7 GiB and its time come on top. Exit code 1 where a ratio is not 1
or memory ends; what has been measured by then is printed and written.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from tyro.conf import Positional, arg

from ref.benchmark.measure import flops, matmul_rate, phase_flops
from ref.benchmark.memory import conditioning_of
from ref.grpo import calibrate_on, start, train
from ref.methods import METHODS
from ref.models.load import load
from ref.models.shapes import shaped
from ref.options import Options, Pipeline, command, read
from ref.presets import LARGE, PRESETS
from ref.scale.directory import write_json
from ref.scale.memory import OutOfMemory, forget, out_of_memory
from ref.scale.paths import refuse_unwritable
from ref.scale.signals import interruptible
from ref.settings import Settings, in_one_line

PROMPTS = ["a red fox in the snow", "two tall ships"]


@in_one_line
class OnAGPU(Options):
    """The large presets at full size on this machine's GPU, with random weights."""

    presets: Positional[list[str]] = Field(default_factory=list)  # (none: sd35_medium, flux_dev and flux_dev_720)
    model: Path | None = None  # a small pipeline's folder in its place, with 64-pixel images: a rehearsal
    json_file: Annotated[Path | None, arg(name="json")] = None  # write all numbers here, after each preset


def fitting(name: str, device: torch.device) -> tuple[Pipeline, Settings] | None:
    """Options and settings of the largest variant that the GPU holds, None where none does; one group, one update."""
    preset = PRESETS[name]
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 80e9
    held = [memory for memory in preset.variants if total > 0.92 * memory * 1e9]
    if not held:
        return None
    options, settings = preset.within(max(held), preset.options, preset.settings)
    size = dict(
        groups=1, updates=1, group_size=max(2, 2 * settings.micro_batch), iterations=2, best_and_worst=None, ema_every=1
    )
    return options, replace(settings, **size)


def random(options: Pipeline, device: torch.device):
    """The architecture with random weights on the device; its prompts' embeddings are noise."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # as models.load
    model = shaped(options.model, options.height, options.lora_rank, targets=options.lora_targets).to_empty(
        device=device
    )
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02)
    model.guidance_scale = model.default_guidance if options.guidance_scale is None else options.guidance_scale
    model.shift, model.decode_batch = options.shift or 3.0, options.decode_batch
    if options.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()

    def encode(prompts: list[str]) -> dict[str, torch.Tensor]:
        with torch.device(device):
            given = conditioning_of(model, len(prompts), options.max_sequence_length)
        return {name: torch.zeros_like(value) for name, value in given.items()}

    model.encode = encode
    return model


def measured(model, settings: Settings, device: torch.device) -> dict:
    """The second iteration's numbers."""
    method, state = METHODS["flow_grpo"](clip=settings.clip), start(model, settings)
    brightness = lambda images, prompts: images.flatten(1).mean(1)  # noqa: E731
    phi = lambda images: images.mean((2, 3))  # noqa: E731
    calibrate_on(state, PROMPTS, phi, settings)
    for trained in train(model, PROMPTS, brightness, phi, method, settings, state):
        metrics = trained.metrics
    conditioning = model.encode(PROMPTS[:1])
    work = phase_flops(settings, flops(model, conditioning), flops(model, conditioning, backward=True))
    rate = matmul_rate(device, model.dtype)
    kept = {name: value for name, value in metrics.items() if name.startswith(("seconds", "peak", "ratio_error"))}
    return kept | {"use_" + phase: n / metrics[f"seconds_{phase}"] / rate for phase, n in work.items()} | {"rate": rate}


def report(name: str, settings: Settings, row: dict) -> str:
    phases = ", ".join(f"{key.removeprefix('seconds_')} {row[key]:.2f}" for key in row if key.startswith("seconds_"))
    peak = f", peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
    return (
        f"{name}: ratio off by {row['ratio_error']:g}{peak}; {settings.group_size} samples, micro-batch "
        f"{settings.micro_batch}, {row['seconds']:.2f} s ({phases}); of {row['rate'] / 1e12:.2f} TFLOP/s rollout uses "
        f"{row['use_sample']:.0%}, update {row['use_update']:.0%}"
    )


def measure_as_asked(arguments: list[str] | None) -> None:
    given = read(OnAGPU, "ref.benchmark.on_a_gpu", arguments)
    if unknown := set(given.presets) - set(LARGE):
        raise ValueError(f"unknown preset {min(unknown)}; choose of {', '.join(LARGE)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.model:
        raise ValueError("there is no GPU; rehearse with --model FOLDER (python -m ref.models.tiny makes some)")
    if given.json_file:
        refuse_unwritable(given.json_file, "--json")
    rows = {}
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", flush=True)
    for name in given.presets or ["sd35_medium", "flux_dev", "flux_dev_720"]:
        found = fitting(name, device)
        if found is None:
            print(f"{name}: no variant for this card's memory", flush=True)
            continue
        options, settings = found
        try:
            with out_of_memory(
                f"with micro-batch {settings.micro_batch}", "the table of presets.py asks too much here"
            ):
                if given.model:
                    settings = replace(settings, group_size=4, micro_batch=2)
                    model = load(given.model, PROMPTS, 64, 64, device=device, max_sequence_length=16, lora_rank=4)
                else:
                    model = random(options, device)
                rows[name] = measured(model, settings, device)
            print(report(name, settings, rows[name]), flush=True)
        except OutOfMemory as error:
            rows[name] = {"error": str(error)}
            print(f"{name}: {error}", flush=True)
        model = None
        forget(device)
        if given.json_file:
            write_json(given.json_file, rows)
    if off := [name for name, row in rows.items() if row.get("ratio_error", True)]:
        raise SystemExit(f"error: no first update with ratio 1 with {', '.join(off)}")


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, measure_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
