"""What an iteration costs, where its time goes, and how far that is from what the machine can do.

    python -m ref.benchmark --preset letters --json letters.json
    python -m ref.benchmark --preset sd35_medium --memory 80          # and every other option of ref.train
    python -m ref.benchmark --preset flux_dev --compare-flow-grpo     # see flow_grpo.py

**Alternation.** A machine's speed drifts, so Flow-GRPO, PEC and PCVAE take turns, one iteration each, on the
same model in the same process; each round another goes first. Numbers are medians and quartiles. On a CPU with one thread
seconds are of computing: those of the clock, had the machine nothing else to do.

**Ratio.** seconds(PEC) / seconds(Flow-GRPO), round by round. Our loop logs feature diversity for every method;
Flow-GRPO as published has no encoder, so the time of its features is taken off. This is the stricter ratio.

**Utilisation.** FLOPs that the transformer needs (forward in the rollout; forward and backward in the update;
without what gradient checkpointing computes twice) per second of the whole phase, divided by the rate of a large
matrix product in the same precision, measured in every round too. FLOPs are counted on the real modules for one
sample; attention's backward is counted as flash attention does it, which computes the scores again.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, quantiles
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ref.benchmark.flow_grpo import against
from ref.grpo import calibrate_on, start, train
from ref.methods import METHODS
from ref.presets import Task
from ref.scale import checkpoint
from ref.scale.stopwatch import Stopwatch
from ref.scale.weights import trainable
from ref.settings import Settings

COMPARED = ("flow_grpo", "pec", "pcvae")
aten = torch.ops.aten
ATTENTION_ON_CPU = {  # which torch's own counter leaves out
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad, q, k, v
    ),
}


def flops(model, conditioning: dict[str, Tensor], backward: bool = False) -> int:
    """FLOPs of the velocity of one sample; with `backward` also of its gradient by the trainable weights.

    Compiled blocks are counted uncompiled: the counter cannot look into them.
    """
    x = torch.zeros(1, *model.latent_shape, device=next(iter(conditioning.values())).device)
    sigma, weights = torch.tensor(0.5), list(trainable(model).values())
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter,
        torch.set_grad_enabled(backward),
    ):
        velocity = model.velocity(x, sigma, conditioning)
        if backward:
            torch.autograd.grad(velocity.sum(), weights, allow_unused=True)
    again = backward and getattr(getattr(model, "transformer", None), "is_gradient_checkpointing", False)
    return counter.get_total_flops() - (flops(model, conditioning) if again else 0)


def expected_passes(settings: Settings) -> tuple[float, float]:
    """Evaluations of the velocity for an image in an iteration: (drawn, trained), with guidance each is two passes.

    The mean over the places of a random window. Groups without a spread are not trained on: this is the most.
    """
    N, S, K = settings.steps, settings.trainable_steps, settings.group_size
    drawn = float(N)
    if settings.window is not None:
        S, drawn = settings.window, 0.0
        places = settings.trainable_steps - S + 1
        for before in range(places):
            after = N - before - S
            shared = before / K if settings.same_noise else before
            drawn += (shared + S + min(settings.tail_steps or after, after)) / places
    return drawn, S * (settings.best_and_worst or K) / K


def phase_flops(settings: Settings, forward: int, both: int) -> dict[str, int]:
    """FLOPs of the phases of an iteration, all G K samples."""
    images, (drawn, trained) = settings.groups * settings.group_size, expected_passes(settings)
    return {"sample": round(images * drawn * forward), "update": round(images * trained * both)}


class Passes:
    """Counts a network's passes by a hook: samples times branches of guidance, "forward" alone and "trained"."""

    def __init__(self, model):
        self.count = {"forward": 0, "trained": 0}
        network = getattr(model, "transformer", None) or model.residual  # of the toy in the plane
        self.hook = network.register_forward_pre_hook(self.add, with_kwargs=True)

    def add(self, module, inputs, named) -> None:
        x = named["hidden_states"] if "hidden_states" in named else inputs[0]
        self.count["trained" if torch.is_grad_enabled() else "forward"] += len(x)

    def since(self, images: int) -> dict[str, float]:
        """Passes for each of so many images since it was last asked."""
        found, self.count = self.count, {"forward": 0, "trained": 0}
        return {name: n / images for name, n in found.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product, the median of five."""
    n, seconds = 8192 if device.type == "cuda" else 1024, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        lap = Stopwatch(device)
        a @ a
        lap("matmul")
        seconds.append(lap.seconds["seconds_matmul"])
    return 2 * n**3 / median(seconds[1:])


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def rounds(task: Task, settings: Settings, methods: tuple[str, ...], repeats: int, warmup: int) -> list[dict]:
    """For each round, what the methods' iterations took, {method: seconds and memory}; and the matmul rate."""
    model, state = task.model, start(task.model, settings)
    calibrate_on(state, task.prompts, task.encoder, settings)
    endless = dataclasses.replace(settings, iterations=10**9)
    runs = {
        m: train(model, task.prompts, task.reward, task.encoder, METHODS[m](clip=settings.clip), endless, state)
        for m in methods
    }
    device, dtype = next(model.parameters()).device, getattr(model, "dtype", torch.float32)
    measured, counter = [], Passes(model)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, patch.object(Stopwatch, "clock", staticmethod(clock)):
        for n in range(-warmup, repeats):
            row = {"matmul": matmul_rate(device, dtype)}
            for m in methods[n % len(methods) :] + methods[: n % len(methods)]:
                next(runs[m])
                began = clock()
                checkpoint.save(Path(folder), checkpoint.snapshot(state.state_dict()))
                row[m] = {k: v for k, v in state.metrics.items() if k.startswith(("seconds", "peak"))}
                row[m]["passes"] = counter.since(settings.groups * settings.group_size)
                row[m]["seconds_checkpoint"] = clock() - began
            measured += [row] if n >= 0 else []
    counter.hook.remove()
    return measured


def benchmark(
    task: Task, settings: Settings, repeats: int = 9, warmup: int = 2, baseline: Callable | None = None
) -> dict:
    """Everything of the module's docstring, ready for JSON. Seconds, images a second, GiB, FLOPs.

    baseline: the text encoders (`flow_grpo.text_encoders`) with which Flow-GRPO's order of work is to be run, if at all.
    """
    if repeats < 3 or warmup < 1:
        raise ValueError(f"repeats must be at least 3 and warmup at least 1, got {repeats} and {warmup}")
    model = task.model
    conditioning = model.encode(task.prompts[:1])
    forward, both = flops(model, conditioning), flops(model, conditioning, backward=True)
    measured = rounds(task, settings, COMPARED, repeats, warmup)
    phases = {
        m: {
            key.removeprefix("seconds_"): spread([row[m][key] for row in measured])
            for key in measured[0][m]
            if key.startswith("seconds")
        }
        for m in COMPARED
    }
    work = phase_flops(settings, forward, both)
    alone = [row["flow_grpo"]["seconds"] - row["flow_grpo"]["seconds_features"] for row in measured]
    gpu = "peak_gib" in measured[0]["pec"]
    peak = max(row[m]["peak_gib"] for row in measured for m in COMPARED) if gpu else most_resident()
    result = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "settings": dataclasses.asdict(settings),
        "repeats": repeats,
        "phases": phases,
        "images_per_second": spread(
            [settings.groups * settings.group_size / row["pec"]["seconds"] for row in measured]
        ),
        "passes": {name: mean(row["pec"]["passes"][name] for row in measured) for name in ("forward", "trained")},
        "peak_gib": peak,
        "matmul_tflops": spread([row["matmul"] / 1e12 for row in measured]),
        "flops": {"forward": forward, "forward_and_backward": both, **work},
        "utilisation": {
            phase: spread([n / row["pec"][f"seconds_{phase}"] / row["matmul"] for row in measured])
            for phase, n in work.items()
        },
        "ratio": {
            m: spread([row[m]["seconds"] / base for row, base in zip(measured, alone)]) for m in ("pec", "pcvae")
        },
    }
    if baseline:
        result["flow_grpo"] = against(task, settings, METHODS["pec"](clip=settings.clip), repeats, baseline)
        result["flow_grpo"]["ratio"] = spread(result["flow_grpo"]["ratio"])
    return result


def scaling(changed: dict, base: dict, phase: str) -> tuple[float, float, float, float]:
    """How many times as long a phase takes in one result as in another: by its FLOPs, by the clock, and from .. to.

    phase: sample, update, or seconds for the whole iteration. The last two are of the quartiles at their worst.
    """
    phases = ("sample", "update") if phase == "seconds" else (phase,)
    work = [sum(result["flops"][name] for name in phases) for result in (changed, base)]
    a, b = (result["phases"]["flow_grpo"][phase] for result in (changed, base))
    return work[0] / work[1], a["median"] / b["median"], a["low"] / b["high"], a["high"] / b["low"]


def most_resident() -> float:
    """The process's largest resident memory so far in GiB, which holds libraries and imports too."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil  # which accelerate needs too

        return psutil.Process().memory_info().peak_wset / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def report(result: dict) -> str:
    """The numbers of `benchmark` as text."""
    form = lambda s, scale=1.0: f"{s['median'] * scale:9.2f} ({s['low'] * scale:.2f} .. {s['high'] * scale:.2f})"  # noqa: E731
    s = result["settings"]
    lines = [f"{result['device']}; medians (quartiles) of {result['repeats']} rounds"]
    lines.append(
        f"{s['groups']} prompts x {s['group_size']} samples, {s['steps']} steps, micro-batch {s['micro_batch']}"
    )
    for method, phases in result["phases"].items():
        lines.append(f"\n{method}, milliseconds")
        lines += [f"  {'iteration' if name == 'seconds' else name:<12}{form(s, 1e3)}" for name, s in phases.items()]
    lines.append(f"\nimages a second {form(result['images_per_second'])}")
    lines.append("passes an image  " + " + ".join(f"{n:.2f} {name}" for name, n in result["passes"].items()))
    lines.append(f"peak memory     {result['peak_gib']:9.2f} GiB")
    lines.append(f"matmul, TFLOP/s {form(result['matmul_tflops'])}")
    lines += [f"use in {name:<8} {form(s, 100)} %" for name, s in result["utilisation"].items()]
    lines += [f"{name:<5} / Flow-GRPO {form(s)}" for name, s in result["ratio"].items()]
    if "flow_grpo" in result:
        lines.append(
            f"\nFlow-GRPO's order of work / ours {form(result['flow_grpo']['ratio'])}; largest differences, relative:"
        )
        lines += [f"  {name:<12} {value:.1e}" for name, value in result["flow_grpo"]["difference"].items()]
    return "\n".join(lines)
