"""Prompts' embeddings, computed once and kept on disk.

The pipeline's own text encoders run once per prompt. T5-XXL is larger than SD3.5-Medium itself, so it is
loaded alone, writes what it has to say to disk, and is gone before the transformer arrives; when every prompt
is on disk already it is not loaded at all. Each prompt is encoded alone, so its embedding does not depend on
its neighbours. A file's name is the SHA-256 of everything that decides its content: the prompt, the pipeline,
its text encoders, the number of T5 tokens, the precision.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from ref.models.hub import Source
from ref.scale.checkpoint import atomic_write
from ref.scale.memory import out_of_memory
from ref.scale.shown import bar

NAMES = ("prompt_embeds", "pooled_prompt_embeds")


def default_folder() -> Path:
    """Where embeddings are kept unless told otherwise. Raises OSError for a user without a home."""
    try:
        return Path.home() / ".cache" / "ref" / "prompt_embeddings"
    except RuntimeError as error:
        raise OSError("there is no home folder for the prompts' embeddings; set HOME or give --cache-dir") from error


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
        self.folder = default_folder() if folder is None else Path(folder)
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
        if any(not self.path(p).exists() for p in prompts):  # else nothing is written: a cache may be read-only
            lock = self.locked()
            try:
                missing = [p for p in prompts if not self.path(p).exists()]
                if missing:
                    self.compute(missing)
            finally:
                lock.release()
        self.keys |= {p: self.key(p) for p in prompts}

    def locked(self) -> FileLock:
        """The folder, made where it was missing, for this process alone. Raises OSError where it cannot be written."""
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"cannot write to {self.folder}: {reason}; give another --cache-dir") from error
        return lock

    @torch.no_grad()
    def compute(self, prompts: list[str]) -> None:
        remedy = "encode the prompts on a larger GPU or on the CPU once: they stay in the cache"
        with out_of_memory("while encoding the prompts", remedy):
            text = self.source.whole(self.dtype, transformer=None, vae=None).to(self.device)
            for prompt in bar(prompts, "prompt embeddings"):
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
            tensors = load_file(path, device=str(self.device))
            return {name: tensors[name] for name in NAMES}
        except (SafetensorError, KeyError) as error:
            raise OSError(f"{path} is damaged ({error}); delete it and start again") from error

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Raises ValueError for a prompt that was never added."""
        rows = {prompt: self.read(prompt) for prompt in dict.fromkeys(prompts)}
        conditioning = {name: torch.stack([rows[p][name] for p in prompts]) for name in NAMES}
        if self.negative:
            empty = self.read("")
            conditioning |= {f"negative_{n}": empty[n].expand(len(prompts), *empty[n].shape) for n in NAMES}
        return conditioning
