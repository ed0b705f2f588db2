"""Where a text-to-image pipeline comes from, and its prompts' embeddings.

`locate` accepts a diffusers folder, a hub id or one of the names in HUB, and turns what can go wrong on
the way (no such model, no access, no network) into one line with its remedy.

`PromptEmbeddings` runs the pipeline's own text encoders once per prompt. T5-XXL is larger than SD3.5-Medium
itself, so it is loaded alone, writes what it has to say to disk, and is gone before the transformer
arrives; when every prompt is on disk already it is not loaded at all. Each prompt is encoded alone, so its
embedding does not depend on its neighbours. A file's name is the SHA-256 of everything that decides its
content: the prompt, the pipeline, its text encoders, the number of T5 tokens, the precision.
"""

import gc
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

from ref.checkpoint import atomic_write

HUB = {"sd35_medium": "stabilityai/stable-diffusion-3.5-medium", "flux_dev": "black-forest-labs/FLUX.1-dev"}
CACHE = Path.home() / ".cache" / "ref" / "prompt_embeddings"


class OutOfMemory(OSError):
    """Memory ended; the message says where, and what to change."""


@contextmanager
def out_of_memory(where: str, remedy: str):
    """Turn running out of memory within this context into an `OutOfMemory` of one line."""
    try:
        yield
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError; the CPU's allocator, CUDA and cuBLAS have no class of their own
        signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
        if isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs):
            raise OutOfMemory(f"out of memory {where}; {remedy}") from error
        raise


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


class PromptEmbeddings:
    """prompts -> {"prompt_embeds": [B, L, E], "pooled_prompt_embeds": [B, P]}, read from a folder.

    source, folder   the pipeline, and where its embeddings are kept (many pipelines can share a folder)
    encode           (pipeline with text encoders, prompt, max_sequence_length) -> the two tensors of one prompt
    negative         add those of the empty prompt, with "negative_" before their names, for guidance
    keys             prompt -> hash, of the prompts added so far; a checkpoint can name them

    Tensors are read when asked for, so that a prompt set larger than the memory is no hindrance.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[object, str, int], tuple[Tensor, Tensor]],
        max_sequence_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        folder: Path | str | None = None,
        negative: bool = False,
    ):
        self.source, self.encode, self.max_sequence_length = source, encode, max_sequence_length
        self.dtype, self.device, self.negative = dtype, device, negative
        self.folder = CACHE if folder is None else Path(folder)
        self.keys: dict[str, str] = {}

    def key(self, prompt: str) -> str:
        """The content hash under which a prompt's embedding is kept."""
        parts = [prompt, self.source.pipeline, self.source.identity, self.max_sequence_length, str(self.dtype)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def path(self, prompt: str) -> Path:
        return self.folder / f"{self.key(prompt)}.safetensors"

    def add(self, prompts: Iterable[str]) -> None:
        """See to it that these prompts are on disk. Loads the text encoders only for those that are not.

        Of several processes on a machine one encodes and the others wait for it.
        """
        prompts = list(dict.fromkeys([*prompts, *([""] if self.negative else [])]))
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            missing = [p for p in prompts if not self.path(p).exists()]
            if missing:
                self.compute(missing)
        self.keys |= {p: self.key(p) for p in prompts}

    @torch.no_grad()
    def compute(self, prompts: list[str]) -> None:
        import diffusers

        pipeline = getattr(diffusers, self.source.pipeline)
        remedy = "encode the prompts on a larger GPU or on the CPU once: they stay in the cache"
        with out_of_memory("while encoding the prompts", remedy):
            with hub_errors(self.source.model):
                text = pipeline.from_pretrained(self.source.model, transformer=None, vae=None, dtype=self.dtype)
            text = text.to(self.device)
            for prompt in tqdm(prompts, "prompt embeddings", disable=len(prompts) < 20):
                embeds, pooled = self.encode(text, prompt, self.max_sequence_length)
                tensors = {"prompt_embeds": embeds[0].contiguous(), "pooled_prompt_embeds": pooled[0].contiguous()}
                content = to_bytes({name: value.cpu() for name, value in tensors.items()})
                atomic_write(self.path(prompt), lambda temporary: temporary.write_bytes(content))
        del text
        gc.collect()  # a pipeline holds itself in a circle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def read(self, prompt: str) -> dict[str, Tensor]:
        path = self.path(prompt)
        if not path.exists():
            raise ValueError(
                f"the prompt {prompt!r} has no embedding and the text encoders are not in memory any more; "
                "give it to load(prompts=...), or to model.encode.add([...]), which loads them again"
            )
        try:
            return load_file(path, device=str(self.device))
        except SafetensorError as error:
            raise OSError(f"{path} is damaged ({error}); delete it and start again") from error

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Raises ValueError for a prompt that was never added."""
        rows = {prompt: self.read(prompt) for prompt in dict.fromkeys(prompts)}
        names = ("prompt_embeds", "pooled_prompt_embeds")
        conditioning = {name: torch.stack([rows[p][name] for p in prompts]) for name in names}
        if self.negative:
            empty = self.read("")
            conditioning |= {f"negative_{n}": empty[n].expand(len(prompts), *empty[n].shape) for n in names}
        return conditioning
