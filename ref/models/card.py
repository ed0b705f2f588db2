"""The model card beside the saved weights: what they are, how they were trained, how to load them."""

from pathlib import Path

LORA = """pipe = DiffusionPipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{folder}")"""
WEIGHTS = """transformer = {transformer}.from_pretrained("{folder}", dtype=torch.bfloat16)
pipe = DiffusionPipeline.from_pretrained("{base}", transformer=transformer, dtype=torch.bfloat16).to("cuda")"""


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def model_card(model, base: str, description: dict, result: dict, folder: Path) -> str:
    """Markdown with the hub's front matter.

    model, base   the adapter that was trained, and the folder or hub id of its base model
    description   what run.json holds
    result        "base" and "final" of `presets.Task.evaluate`
    """
    load = (LORA if model.has_lora else WEIGHTS).format(
        base=base, folder=folder, transformer=type(model.transformer).__name__
    )
    if not model.has_lora:
        load = f"from diffusers import {type(model.transformer).__name__}\n\n{load}"
    settings = [(k, f"`{v}`") for k, v in description["settings"].items()]
    given = description | (description.get("options") or {})
    options = [(k, f"`{v}`") for k, v in given.items() if k not in ("settings", "options") and v is not None]
    numbers = [(k, f"{result['base'][k]:.4g}", f"{result['final'][k]:.4g}") for k in result["final"]]
    return f"""---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags:
- {"lora" if model.has_lora else "full-fine-tuning"}
- reinforcement-learning
- perceptual-entropy
---

# {base}, fine-tuned with {description["method"]}

Trained with the reference implementation of *When Policy Entropy Constraint Fails: Preserving Diversity in
Flow-based RLHF via Perceptual Entropy* (arXiv 2605.12112). The base model's licence applies to these weights.

```python
import torch
from diffusers import DiffusionPipeline
{load}
image = pipe("a tabby cat asleep on a stack of old atlases").images[0]
```

## Evaluation

ODE samples of the same prompts and noise, before and after.

![base model](before.png)
![fine-tuned](after.png)

{table(("", "base", "fine-tuned"), numbers)}

## Training

{table(("what", "value"), options)}

{table(("setting", "value"), settings)}
"""
