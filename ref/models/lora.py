"""Trained weights put into a pipeline of diffusers: a LoRA in either form that is in use, or all weights.

| in the folder                                        | is                                      | as written by       |
|------------------------------------------------------|-----------------------------------------|---------------------|
| pytorch_lora_weights.safetensors, or a lone one      | a LoRA, `transformer.….lora_A.weight`    | diffusers, ref.train |
| adapter_model.safetensors + adapter_config.json      | a LoRA, `base_model.model.….lora_A.weight` | PEFT, Flow-GRPO   |
| diffusion_pytorch_model*.safetensors + config.json   | all weights of the transformer           | ref.train --lora-rank 0 |

diffusers passes over keys that it does not know in silence, and the base model is then taken for the tuned one. Here
every layer of the file must have a layer of the network to sit on, before, and hold the file's numbers, afterwards.
"""

import json
import re
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ref.models.hub import hub_errors, quiet
from ref.scale.textfiles import read_json

DIFFUSERS, PEFT, CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
HALF = re.compile(r"(.+)\.(?:lora_([AB])|lora\.(down|up)|lora_(down|up))(?:\.default)?\.weight")


def attach(pipe, source: str) -> None:
    """Put the weights of a folder, a .safetensors file or a hub repository into the pipeline.

    Raises OSError or ValueError in one line that names the file: no such weights, of another architecture or size,
    of a kind that diffusers would leave out (DoRA, biases, whole modules), damaged.
    """
    file = find(source)
    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if network is None:
        raise ValueError(f"{type(pipe).__name__} has neither transformer nor unet; --lora cannot be put into it")
    if file.name.startswith("diffusion_pytorch_model"):
        return replace(pipe, network, file.parent)
    with hub_errors(str(file.parent), remedy="fetch the file again"), safe_open(file, "pt") as stream:
        names, written = list(stream.keys()), json.loads((stream.metadata() or {}).get("lora_adapter_metadata", "{}"))
    part = "transformer" if network is getattr(pipe, "transformer", None) else "unet"
    same_class(file, written.get(f"{part}.auto_mapping"), network)
    if dropped := [name for name in names if "dora" in name or "lora_magnitude" in name]:
        raise ValueError(
            f"{file} is a DoRA: {dropped[0]} would be left out; save it as a LoRA, or merge it into the model"
        )
    if names and all(name.startswith("base_model.model.") for name in names):
        config = peft_config(file, network)
        state = {name.removeprefix("base_model.model."): value for name, value in load_file(file).items()}
        layers = halves(file, state)
        fit(file, network, layers)
        for nowhere in ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save"):
            config.pop(nowhere, None)
        with quiet(), hub_errors(str(file.parent), remedy="train the LoRA on this model"):
            network.load_lora_adapter(state, prefix=None, metadata=config | {"target_modules": list(layers)})
        return arrived(file, network, layers)
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA; leave --lora out")
    with quiet(), hub_errors(str(file.parent), remedy="give a LoRA in diffusers' or PEFT's form"):
        found = pipe.lora_state_dict(file.parent, weight_name=file.name)
        state = found[0] if isinstance(found, tuple) else found
    groups: dict[str, dict] = {}
    for name, value in state.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = value
    foreign = [group for group in groups if getattr(pipe, group, None) is None]
    if foreign or not groups:
        name = next((name for name in names if name.partition(".")[0] in foreign), names[0] if names else "nothing")
        raise ValueError(
            f"{file} is no LoRA of {type(pipe).__name__}: it holds {name}; give one in diffusers' or PEFT's form, made for this model"
        )
    layers = {group: halves(file, state) for group, state in groups.items()}
    if part in layers:
        fit(file, network, layers[part])
    with quiet(), hub_errors(str(file.parent), remedy="train the LoRA on this model"):
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    for group, own in layers.items():
        arrived(file, getattr(pipe, group), own, exact=group == part)


def find(source: str) -> Path:
    """The file of weights that `source` means."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no .safetensors file; save the LoRA as one")
        return path
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise FileNotFoundError(f"there is no folder or file {source}; --lora is one, or a hub id")
        from huggingface_hub import snapshot_download

        with hub_errors(source):  # the small files first: a whole pipeline is not fetched to be refused
            path = Path(snapshot_download(source, allow_patterns=["*.json"], ignore_patterns=["*/*"]))
            if not (path / "model_index.json").exists():
                weights = ["*.safetensors", "*.json"]
                path = Path(snapshot_download(source, allow_patterns=weights, ignore_patterns=["*/*"]))
    if (path / "model_index.json").exists():
        raise ValueError(f"{source} is a whole pipeline; give it as --model, and leave --lora out")
    for name in (DIFFUSERS, PEFT):
        if (path / name).exists():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    whole = [file for file in found if file.name.startswith("diffusion_pytorch_model")]
    if whole or len(found) == 1:
        return (whole or found)[0]
    if found:
        raise ValueError(f"{source} holds {len(found)} .safetensors files; give one of them, such as {found[0]}")
    deeper = next((file for file in sorted(path.glob("*/*.safetensors"))), None)
    remedy = f"did you mean {deeper.parent}?" if deeper else "give the folder weights/ of a run"
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.ckpt", "*.pth") for file in path.glob(pattern)]
    pickled = f", but {pickles[0]}, which can run code when it is read" if pickles and not deeper else ""
    raise FileNotFoundError(f"{source} holds no .safetensors file{pickled}; {remedy}")


def halves(file: Path, state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{layer: {"A": [rank, in], "B": [out, rank]}} of a LoRA's tensors. Raises ValueError for any other tensor."""
    layers: dict[str, dict] = {}
    for name, value in state.items():
        found = HALF.fullmatch(name)
        if not found:
            raise ValueError(f"{file} holds {name}, which is no half of a LoRA and would be left out; save it without")
        half = found[2] or ("A" if "down" in found.groups() else "B")
        layers.setdefault(found[1], {})[half] = value
    for name, own in layers.items():
        if own.keys() != {"A", "B"} or own["A"].shape[0] != own["B"].shape[1]:
            raise ValueError(f"{file}: the halves of {name} do not belong together; fetch the file again")
        if not all(half.isfinite().all() for half in own.values()):
            raise ValueError(f"{file}: {name} holds a NaN or infinite value; give another LoRA")
    return layers


def fit(file: Path, network: nn.Module, layers: dict[str, dict[str, Tensor]]) -> None:
    """Raise ValueError unless every layer of the file has one of its size in the network."""
    modules, kind = dict(network.named_modules()), type(network).__name__
    missing = [name for name in layers if getattr(modules.get(name), "weight", None) is None]
    if missing:
        raise ValueError(
            f"{file} is a LoRA of another model: {len(missing)} of its {len(layers)} layers are not in {kind}, "
            f"{missing[0]} among them; give its own base model as --model"
        )
    for name, own in layers.items():
        weight = modules[name].weight
        wanted, got = tuple(weight.shape[:2]), (own["B"].shape[0], own["A"].shape[1])
        if wanted != got:
            raise ValueError(
                f"{file} is a LoRA of another model: {name} is {got[1]} -> {got[0]} there, {wanted[1]} -> {wanted[0]} in this "
                f"{kind}; give its own base model as --model"
            )


def peft_config(file: Path, network: nn.Module) -> dict:
    """PEFT's configuration beside the file, as LoraConfig takes it: alpha, which scales the LoRA, is in it alone."""
    from peft import LoraConfig

    beside = file.with_name(CONFIG)
    if not beside.exists():
        raise FileNotFoundError(f"{file} has no {CONFIG} beside it, and without its lora_alpha no scale; copy it there")
    config = read_json(beside)
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{beside} is of a {config['peft_type']}, not a LoRA; only LoRAs can be put into a pipeline")
    same_class(beside, config.get("auto_mapping"), network)
    if config.get("init_lora_weights") in ("pissa", "olora", "loftq", "corda"):
        raise ValueError(
            f"{beside}: {config['init_lora_weights']} moves the base weights too; convert it to a plain LoRA"
        )
    for name, usable in (("r", lambda v: isinstance(v, int)), ("lora_alpha", lambda v: isinstance(v, int | float))):
        if not usable(config.get(name)) or config[name] <= 0:
            raise ValueError(f"{beside}: {name} must be a number above 0, got {config.get(name)!r}; fetch it again")
    known = {field.name for field in fields(LoraConfig) if field.init}
    return {name: value for name, value in config.items() if name in known and name != "auto_mapping"}


def same_class(file: Path, mapping: dict | None, network: nn.Module) -> None:
    """Raise ValueError where PEFT's note of the network's class says another one; older files have none."""
    kind = (mapping or {}).get("base_model_class", type(network).__name__)
    if kind != type(network).__name__:
        raise ValueError(f"{file} is of a {kind}, not a {type(network).__name__}; give its own base model as --model")


def arrived(file: Path, network: nn.Module, layers: dict, exact: bool = True) -> None:
    """Raise ValueError unless every layer of the file was loaded, of the network's own with the file's numbers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    loaded = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    count = len(loaded)
    if exact:
        count = sum(name in loaded and holds(loaded[name], own) for name, own in layers.items())
    if count < len(layers):
        raise ValueError(
            f"{file}: {count} of {len(layers)} layers were loaded; give a LoRA in diffusers' or PEFT's form"
        )


def holds(module, own: dict[str, Tensor]) -> bool:
    """Whether one of the module's adapters is this one."""
    return any(
        all(
            torch.equal(side[name].weight.detach().cpu(), value.to(side[name].weight.dtype))
            for side, value in ((module.lora_A, own["A"]), (module.lora_B, own["B"]))
        )
        for name in module.lora_A
    )


def replace(pipe, network: nn.Module, folder: Path) -> None:
    """Put the folder's network, all of its weights, in the place of the pipeline's."""
    kind, part = type(network), "transformer" if network is getattr(pipe, "transformer", None) else "unet"
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds all weights of a network, but no config.json; copy it there")
    config = read_json(folder / "config.json")
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"{folder} holds all weights of a {config.get('_class_name')}, not of a {kind.__name__}; give its own base model as --model")  # fmt: skip
    with quiet(), hub_errors(str(folder), remedy="fetch the folder again"):
        tuned, report = kind.from_pretrained(folder, dtype=network.dtype, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"it lacks the weight {min(report['missing_keys'])}")
    for name, value in network.config.items():
        if not name.startswith("_") and tuned.config.get(name) != value:
            raise ValueError(
                f"{folder} holds all weights of another model: its {name} is {tuned.config.get(name)}, not {value}; "
                "give its own base model as --model"
            )
    pipe.register_modules(**{part: tuned})
