"""Where a text-to-image pipeline comes from, and what can go wrong on the way.

`locate` accepts a diffusers folder, a hub id or one of the names in HUB, and turns what can go wrong on
the way (no such model, no access, no network) into one line with its remedy.
"""

import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HUB = {"sd35_medium": "stabilityai/stable-diffusion-3.5-medium", "flux_dev": "black-forest-labs/FLUX.1-dev"}


@contextmanager
def hub_errors(model: str):
    """Turn what the hub's client raises within this context into an OSError of one line."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

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
    except OSError as error:  # diffusers, about files that are missing: several lines, the first says which
        if error.errno is not None:  # the system's own, a full disk for example
            raise
        reason = re.sub(r"\s+", " ", str(error)).split(". ")[0]
        raise OSError(f"cannot load {model}: {reason}; the folder must be a whole diffusers pipeline") from error


@dataclass(frozen=True)
class Source:
    """A pipeline found."""

    model: str  # folder or hub id, as `from_pretrained` takes it
    pipeline: str  # name of its diffusers class
    identity: str  # of its text encoders: a hub commit, or a digest of local files

    def component(self, cls, name: str, **options):
        """One part of the pipeline, from its subfolder."""
        with hub_errors(self.model):
            return cls.from_pretrained(self.model, subfolder=name, **options)

    def config(self, cls, name: str) -> dict:
        """A part's configuration, without its weights."""
        with hub_errors(self.model):
            return cls.load_config(self.model, subfolder=name)


def digest(folder: Path) -> str:
    """SHA-256 over size, first and last MiB of every file of the folder's tokenizers and text encoders.

    It is the same for a copy of the folder, and another after retraining.
    """
    total = hashlib.sha256()
    for file in sorted(f for pattern in ("text_encoder*/*", "tokenizer*/*") for f in folder.glob(pattern)):
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
            raise FileNotFoundError(f"{folder} is no diffusers pipeline: it has no model_index.json")
        identity = digest(folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        with hub_errors(model):
            index = Path(hf_hub_download(model, "model_index.json"))
        identity = f"{model}@{index.parent.name}"  # the cache names a snapshot's folder by its commit
    else:
        raise FileNotFoundError(f"there is no folder {model}; a model is a folder, a hub id or {', '.join(HUB)}")
    return Source(model, json.loads(index.read_text())["_class_name"], identity)
