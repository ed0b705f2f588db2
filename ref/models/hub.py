"""Where a text-to-image pipeline comes from, and what can go wrong on the way.

`locate` accepts a diffusers folder, a hub id or one of the names in HUB, and turns what can go wrong on
the way (no such model, no access, no network) into one line with its remedy.
"""

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ref.options import near
from ref.scale.memory import ended
from ref.scale.shown import SHOWN
from ref.scale.textfiles import read_json

HUB = {"sd35_medium": "stabilityai/stable-diffusion-3.5-medium", "flux_dev": "black-forest-labs/FLUX.1-dev"}


@contextmanager
def hub_errors(model: str, part: str = ".", remedy: str = "the folder must be a whole diffusers pipeline"):
    """Turn what the hub's client and the loading libraries raise within this context into an OSError of one line.

    What the client says of its attempts, ten lines in half a minute where there is no network, is left out.

    part     of a folder: where damaged files are looked for, since libraries seldom name them
    remedy   for a folder that is not what it should be
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    page = f"https://huggingface.co/{model}"
    login = f"accept its licence at {page} and log in with `hf auth login`"
    try:
        yield
    except GatedRepoError as error:
        raise OSError(f"no access to {model}, which is gated: {login}") from error
    except RepositoryNotFoundError as error:
        raise OSError(f"{model} is neither a folder nor a public model of the hub; if it is gated, {login}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        if answer is not None:
            remedy = login if answer.status_code in (401, 403) else "try again later, or give a downloaded folder"
            raise OSError(f"the hub refused {model} (HTTP {answer.status_code}): {remedy}") from error
        raise OSError(
            f"{model} is neither a folder nor in the hub's local cache, and {page} cannot be reached; "
            f"where there is a network: hf download {model} --local-dir FOLDER, then give FOLDER"
        ) from error
    except Exception as error:  # of a folder that is wrong in some way libraries raise whatever comes
        if ended(error) or getattr(error, "errno", None) is not None:  # memory's or the system's end, a full disk
            raise
        reason = damaged(Path(model) / part) if Path(model).is_dir() else None
        if reason is None:
            reason = re.sub(r"\s+", " ", str(error) if str(error).strip() else type(error).__name__)
            reason = f"cannot load {Path(model) / part}: {reason.split('. ')[0][:300]}"
        raise OSError(f"{reason}; {remedy}") from error
    finally:
        logging.set_verbosity(before)


@contextmanager
def quiet():
    """Without what diffusers and transformers warn of while loading: 440 lines on a text tower that is not asked for."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before, bars = (diffusers.get_verbosity(), transformers.get_verbosity()), transformers.is_progress_bar_enabled()
    if SHOWN.get() is None:
        transformers.disable_progress_bar()
        diffusers.disable_progress_bar()
    diffusers.set_verbosity(diffusers.CRITICAL)
    transformers.set_verbosity(transformers.CRITICAL)
    try:
        yield
    finally:
        diffusers.set_verbosity(before[0])
        transformers.set_verbosity(before[1])
        if bars:
            transformers.enable_progress_bar()
            diffusers.enable_progress_bar()


def damaged(folder: Path) -> str | None:
    """The first file in the folder that is not what its name says, and why; None: all are whole."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(file for file in folder.glob("*") if file.is_file()):
        try:
            with file.open("rb") as stream:
                if stream.read(30).startswith(b"version https://git-lfs"):
                    return f"{file} is git-lfs's pointer to a file (git lfs pull fetches it)"
            if file.suffix == ".json":
                read_json(file, dict | list)
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except SafetensorError as error:
            return f"{file} is damaged ({error})"
        except (OSError, ValueError) as error:
            return str(error).split(";")[0]
    return None


@dataclass(frozen=True)
class Source:
    """A pipeline found."""

    model: str  # folder or hub id, as `from_pretrained` takes it
    pipeline: str  # name of its diffusers class
    identity: str  # of its text encoders: a hub commit, or a digest of local files
    parts: dict[str, tuple] = field(default_factory=dict)  # of its index: name -> (library, class), some of them None

    def component(self, cls, name: str, **options):
        """One part of the pipeline, from its subfolder."""
        from diffusers import ModelMixin
        from transformers import PreTrainedModel

        with quiet(), hub_errors(self.model, name):  # missing weights are refused here, not warned of
            if not issubclass(cls, ModelMixin | PreTrainedModel):
                return cls.from_pretrained(self.model, subfolder=name, **options)
            network, report = cls.from_pretrained(self.model, subfolder=name, output_loading_info=True, **options)
            if report["missing_keys"]:  # the libraries draw them at random
                raise ValueError(f"it lacks the weight {min(report['missing_keys'])}")
            return network

    def whole(self, dtype, **without):
        """The pipeline, its networks checked by `component`; `without` names parts that are None."""
        import diffusers
        import transformers

        found = dict(without)
        for name, (library, kind) in self.parts.items():
            cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind or "", None)
            if name not in without and isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin | transformers.PreTrainedModel):  # fmt: skip
                found[name] = self.component(cls, name, dtype=dtype)
        with quiet(), hub_errors(self.model):
            return diffusers.DiffusionPipeline.from_pretrained(self.model, dtype=dtype, **found)

    def config(self, cls, name: str) -> dict:
        """A part's configuration, without its weights."""
        with hub_errors(self.model, name):
            return cls.load_config(self.model, subfolder=name)


def digest(folder: Path) -> str:
    """SHA-256 over size, first and last MiB of every file of the folder's tokenizers and text encoders.

    It is the same for a copy of the folder, and another after retraining.
    """
    total = hashlib.sha256()
    for file in sorted(
        f for pattern in ("text_encoder*/*", "tokenizer*/*") for f in folder.glob(pattern) if f.is_file()
    ):
        size = file.stat().st_size
        total.update(f"{file.relative_to(folder)} {size}\n".encode())
        with open(file, "rb") as stream:
            total.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            total.update(stream.read())
    return total.hexdigest()


def locate(model: str | Path) -> Source:
    """Find a pipeline: a folder, a hub id `owner/name`, or a key of HUB.

    Raises OSError with the remedy when there is none, when it is gated, and when the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    model = HUB.get(str(model), str(model))
    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.exists():
            trained = (folder / "config.json").exists() or any(folder.glob("*lora*.safetensors"))
            remedy = "; give its base model here, and it as ref.evaluate's --lora" if trained else ""
            raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json{remedy}")
        identity = digest(folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        with hub_errors(model):
            index = Path(hf_hub_download(model, "model_index.json"))
        identity = f"{model}@{index.parent.name}"  # the cache names a snapshot's folder by its commit
    else:
        raise FileNotFoundError(
            f"there is no folder {model}; {near(model, HUB)}a model is a folder, a hub id or {', '.join(HUB)}"
        )
    contents = read_json(index)
    pipeline = contents.get("_class_name")
    if not isinstance(pipeline, str):
        raise ValueError(f"{index} names no pipeline (_class_name); fetch the file again")
    parts = {name: tuple(value) for name, value in contents.items() if isinstance(value, list) and len(value) == 2}
    if folder.is_dir():  # the headers of all its files, before the first is loaded
        for part in parts:
            if reason := damaged(folder / part):
                raise OSError(f"{reason}; fetch the file again")
    return Source(model, pipeline, identity, parts)
