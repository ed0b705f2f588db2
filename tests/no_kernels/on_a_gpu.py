"""What the tests run on the GPU without kernels, in a process of its own: python -m tests.no_kernels.on_a_gpu WORLD PART ...

Prints what each part found as JSON on its last line. WORLD is the fixture of that name. Numbers mean nothing here.
"""

import ctypes
import gc
import json
import linecache
import os
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from ref import evaluate, grpo, sampling
from ref.benchmark.memory import conditioning_of
from ref.methods import METHODS
from ref.models.shapes import shaped
from ref.presets import LARGE, PRESETS
from ref.scale.memory import OutOfMemory, out_of_memory
from ref.scale.microbatch import fits, fitted, largest
from ref.scale.weights import trainable
from ref.train import run

from ..small import LARGE_SETTINGS, PRESET, pipeline

GPU = ctypes.CDLL(None)  # gpu.c, preloaded
GPU.gpu_used.restype = ctypes.c_size_t
GIB = 2**30
ALL = 79 * GIB


def limit(size: int) -> None:
    GPU.gpu_limit(ctypes.c_size_t(size))


class Operators(TorchDispatchMode):
    """The operators of every pass of a model: names, and shapes and types of their tensors; and those on the CPU."""

    def __init__(self):
        super().__init__()
        self.passes, self.on_cpu = [], Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if self.passes and str(operator) not in ("aten.detach.default", "aten.alias.default"):
            self.passes[-1].append((str(operator), [(list(t.shape), str(t.dtype)) for t in tensors]))
            if any(t.ndim and t.device.type == "cpu" for t in tensors):
                self.on_cpu[str(operator)] += 1
        return operator(*arguments, **options or {})


def same_operators(task) -> dict:
    """A rollout's pass beside an update's, at the same shapes."""
    model, found = task.model, {}
    conditioning = {name: value.expand(3, *value.shape[1:]) for name, value in model.encode(task.prompts[:1]).items()}
    x, sigma = torch.zeros(3, *model.latent_shape, device="cuda"), torch.tensor(0.5)
    with Operators() as seen:
        for gradients in (False, True):
            seen.passes.append([])
            with torch.set_grad_enabled(gradients):
                v = model.velocity(x, sigma, conditioning)
    rollout, update = seen.passes
    found["operators"] = len(rollout)
    found["other"] = [a for a, b in zip(rollout, update) if a != b] + [len(rollout) - len(update)] * (
        len(rollout) != len(update)
    )
    found["attention"] = sorted({name for name, _ in rollout if "attention" in name})
    found["on_cpu"] = dict(seen.on_cpu)
    assert v.requires_grad and v.device.type == "cuda"
    return found


def waits(loop) -> dict:
    """Where an iteration waits for the GPU: function of ref/, and how far its line is indented."""
    seen = Counter()

    def shown(message, *_, **__):
        frame = sys._getframe(1)
        while frame:
            code = frame.f_code
            if f"{os.sep}ref{os.sep}" in code.co_filename:
                line = linecache.getline(code.co_filename, frame.f_lineno)
                seen[f"{code.co_name} {len(line) - len(line.lstrip())} {line.strip()}"] += 1
                if code.co_name in ("velocity", "rollout", "update", "decode"):
                    return
            frame = frame.f_back

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(loop)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(seen)


def loop(world: Path) -> dict:
    """Every method on both architectures in bfloat16; a trial that fails; memory's end in every phase."""
    found = {}
    for kind, preset in PRESET.items():
        settings = replace(PRESETS[preset].settings, **LARGE_SETTINGS | dict(iterations=1, group_size=3, ema_every=1))
        task = PRESETS[preset].task(f"pickscore={world / 'clip'}", pipeline(world, kind))
        gc.collect(), gc.freeze()  # the trials' collections look at what is made from here on, not at all of torch
        own, here = found.setdefault(kind, {}), task.model
        own |= same_operators(task)
        own["devices"] = sorted(
            {p.device.type for p in here.parameters()} | {p.device.type for p in task.encoder.parameters()}
        )
        own["dtype"] = str(here.dtype)

        def of(method, task=task, settings=settings):
            state = grpo.start(task.model, settings)
            return grpo.train(
                task.model, task.prompts, task.reward, task.encoder, METHODS[method](clip=1e-4), settings, state
            )

        own["methods"] = {method: next(of(method)).metrics["peak_gib"] for method in METHODS}
        own["waits"] = waits(of("pec"))
        own["ends"] = {phase: ending(task, of, owner, name) for phase, (owner, name) in PHASES(task).items()}
        own["trial"] = trial(task, settings)
    return found


def PHASES(task) -> dict:  # what is called in each phase of an iteration
    return {
        "encode": (type(task.model.encode), "__call__"), "sample": (sampling, "rollout"), "decode": (type(task.model), "decode"),
        "reward": (type(task.reward), "forward"), "features": (type(task.encoder), "embed_images"), "update": (grpo, "update"),
        "backward": (torch.Tensor, "backward"), "step": (torch.optim.AdamW, "step"),
    }  # fmt: skip


def ending(task, of, owner, name: str) -> str:
    """What is said when the GPU is full from this call on."""
    original, held = getattr(owner, name), []

    def full(*arguments, **options):
        torch.cuda.empty_cache()
        limit(GPU.gpu_used())
        for size in (2**24, 2**21, 2**18, 2**15, 2**12, 2**9):  # what is left in the allocator's blocks
            try:
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                pass
        return original(*arguments, **options)

    setattr(owner, name, full)
    try:
        with out_of_memory("while training", "give a smaller --micro-batch"):
            next(of("pec"))
        return "no end"
    except OutOfMemory as error:
        return str(error)
    finally:
        setattr(owner, name, original)
        held.clear()
        limit(ALL)
        for weight in trainable(task.model).values():
            weight.grad = None


def trial(task, settings) -> dict:
    """Bytes that are allocated before and after trials of which some fail, with and without checkpointing."""
    model, found = task.model, {}
    conditioning = model.encode(task.prompts[:1])
    wide = replace(settings, groups=512, group_size=256, updates=1, micro_batch=0)
    for checkpointing in (False, True):
        (
            model.transformer.enable_gradient_checkpointing
            if checkpointing
            else model.transformer.disable_gradient_checkpointing
        )()
        fits(model, conditioning, 1)  # workspaces
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        limit(GPU.gpu_used() + 5 * GIB)
        trials = {True: [], False: []}  # by whether they fit: what is allocated after each; some end on the way back

        def tried(n, trials=trials):
            enough = fits(model, conditioning, n)
            trials[enough].append(torch.cuda.memory_allocated())
            return enough

        found_by_trial, micro_batch = largest(tried, 2**17), fitted(model, task.prompts, wide).micro_batch
        limit(GPU.gpu_used() + 2 * 2**20)
        try:
            fitted(model, task.prompts, wide)
            said = ""
        except OutOfMemory as error:
            said = str(error)
        limit(ALL)
        found[str(checkpointing)] = dict(before=before, fit=trials[True], failed=trials[False], largest=found_by_trial,
                                         micro_batch=micro_batch, said=said)  # fmt: skip
    model.transformer.disable_gradient_checkpointing()
    return found


def whole(world: Path) -> dict:
    """A run with its trial, resumed; its weights in the stock pipeline; the small world; a default device."""
    found, folder = {}, Path(tempfile.mkdtemp(dir=world))
    settings = replace(PRESETS["sd35_medium"].settings, **LARGE_SETTINGS | dict(iterations=1, micro_batch=0))
    options = pipeline(world, "sd3")
    given = dict(encoder=f"pickscore={world / 'clip'}", options=options, progress=False)
    run("sd35_medium", "flow_grpo_kl", folder / "run", settings=settings, **given)
    torch.set_default_device("cuda")
    result = run(
        "sd35_medium", "flow_grpo_kl", folder / "run", settings=replace(settings, iterations=2), resume=True, **given
    )
    torch.set_default_device("cpu")
    found["iterations"] = len(result["history"])
    found["phases"] = [name for name in result["history"][-1] if name.startswith(("seconds_", "peak"))]
    row = ["--model", world / "sd3", "--lora", folder / "run" / "weights", "--prompts", world / "evaluation.jsonl",
           "--images-per-prompt", 2, "--rewards", "jpeg", f"pickscore={world / 'clip'}", "--steps", 2,
           "--encoders", f"dino={world / 'dino'}", "--output", folder / "row.csv"]  # fmt: skip
    try:
        found["evaluated"] = evaluate.main([str(a) for a in row])
    except Exception as error:
        found["evaluated"] = repr(error)
    small = run(
        "mixture",
        "pec",
        folder / "mixture",
        1.0,
        settings=replace(PRESETS["mixture"].settings, iterations=1),
        progress=False,
    )
    found["small"] = [name for name in small["history"][-1] if name.startswith("peak")]
    return found


def ranks(world: Path) -> dict:
    """One of two processes, each with a GPU; gloo stands in for NCCL, whose library needs a real one."""
    join, found = torch.distributed.init_process_group, {}
    asked = []
    torch.distributed.init_process_group = lambda backend=None, **k: (asked.append(backend), join("gloo", **k))[1]
    folder, large = Path(os.environ["FOLDER"]), PRESETS["flux_dev"].settings
    options = dict(encoder=f"pickscore={world / 'clip'}", options=pipeline(world, "flux"))
    for preset, settings, given, port in (
        ("mixture", PRESETS["mixture"].settings, {}, "MASTER_PORT"),
        ("flux_dev", replace(large, **LARGE_SETTINGS), options, "NEXT_PORT"),
    ):
        os.environ["MASTER_PORT"] = os.environ[port]
        result = run(preset, "pec", folder / preset, settings=replace(settings, iterations=1), progress=False, **given)
        found[preset] = dict(backend=asked[-1], device=torch.cuda.current_device(), iterations=len(result["history"]))
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    return found | {"joined": len(asked)}


def full_size(world: Path) -> dict:
    """GiB that torch's allocator reserves for the variants of --memory: empty weights, moments, averages, gradients,
    PickScore's 3.7 GiB, and one update's pass. What the VAE takes to decode is not in it."""
    found = {}
    torch.backends.cuda.enable_cudnn_sdp(False)
    variants = [(name, memory, *PRESETS[name].within(memory, PRESETS[name].options, PRESETS[name].settings))
                for name in LARGE for memory in PRESETS[name].variants]  # fmt: skip
    shape = lambda variant: (variant[2].model, variant[2].height, variant[2].lora_rank)  # noqa: E731
    for of_one_shape, alike in groupby(sorted(variants, key=shape), shape):
        model = shaped(*of_one_shape).to_empty(device="cuda")
        for name, memory, options, settings in alike:
            found[f"{name} {memory}"] = dict(reserved=reserved(model, options, settings) / GIB, memory=memory)
        del model
        gc.collect()
    return found


def reserved(model, options, settings) -> int:
    model.guidance_scale = model.default_guidance if options.guidance_scale is None else options.guidance_scale
    checkpointing = "enable" if options.gradient_checkpointing else "disable"
    getattr(model.transformer, f"{checkpointing}_gradient_checkpointing")()
    weights = list(trainable(model).values())
    held = [torch.empty_like(w) for w in weights for _ in range(2 + bool(settings.ema))]
    held.append(torch.empty(int(3.7 * GIB), dtype=torch.uint8, device="cuda"))
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    n = settings.micro_batch
    with torch.device("cuda"):
        conditioning, x = conditioning_of(model, n, options.max_sequence_length), torch.empty(n, *model.latent_shape)
    model.velocity(x, torch.tensor(0.5), conditioning).sum().backward()
    peak = torch.cuda.max_memory_reserved()
    for weight in weights:
        weight.grad = None
    del held, conditioning, x
    torch.cuda.empty_cache()
    return peak


if __name__ == "__main__":
    torch.backends.cudnn.enabled = False  # its library wants a real GPU
    found = {part: globals()[part](Path(sys.argv[1])) for part in sys.argv[2:]}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)
