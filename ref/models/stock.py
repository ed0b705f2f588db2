"""The stock pipeline of diffusers, with trained weights in it, drawn as training draws."""

from inspect import signature

import torch

from ref.models.hub import locate
from ref.models.load import ADAPTERS
from ref.models.lora import attach
from ref.schedule import time_grid


def load_pipeline(model: str, lora: str | None, device: str):
    """Any diffusers pipeline, in bfloat16 on a GPU, with a LoRA, or all weights, if such are given (models/lora.py).

    Raises OSError or ValueError in one line with the remedy.
    """
    pipe = locate(model).whole(torch.float32 if device == "cpu" else torch.bfloat16)
    if lora is not None:
        attach(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def drawing(pipe, shift: float | None = None, trained: bool = False, **given) -> dict:
    """The options of a call of the pipeline: those of `given` that are not None.

    shift     the noise levels are those of `time_grid` with this shift, for which the pipeline gets another scheduler
    trained   no guidance means training's default, not the pipeline's

    Raises ValueError for a shift where the pipeline takes no noise levels.
    """
    parameters, adapter = signature(pipe.__call__).parameters, ADAPTERS.get(type(pipe).__name__)
    if trained and adapter and given["guidance_scale"] is None:
        given["guidance_scale"] = adapter.default_guidance
    if shift is not None:
        if "sigmas" not in parameters or not hasattr(pipe.scheduler.config, "use_dynamic_shifting"):
            raise ValueError(f"{type(pipe).__name__} has no shifted time grid; leave --shift out")
        given["num_inference_steps"] = given["num_inference_steps"] or parameters["num_inference_steps"].default
        plain = dict(shift=1.0, use_dynamic_shifting=False)  # so that it takes the grid as it is
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **plain)
        given["sigmas"] = time_grid(given["num_inference_steps"], shift)[:-1].tolist()
    return {name: value for name, value in given.items() if value is not None}
