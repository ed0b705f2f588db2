"""What an iteration costs: `python -m ref.benchmark`."""

import sys
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Le
from tyro.conf import arg

from ref.benchmark.flow_grpo import text_encoders
from ref.benchmark.measure import benchmark, report
from ref.options import command
from ref.presets import LARGE, PRESETS
from ref.runs import Work, asked
from ref.scale.directory import write_json
from ref.scale.microbatch import fitted
from ref.scale.paths import refuse_unwritable
from ref.scale.signals import interruptible
from ref.settings import in_one_line


@in_one_line
class Benchmark(Work):
    """What an iteration costs, where its time goes, and how far that is from what the machine can do."""

    repeats: Annotated[int, Ge(3), Le(10**6)] = 9  # rounds that count
    warmup: Annotated[int, Ge(1), Le(10**6)] = 2  # rounds before them
    compare_flow_grpo: bool = False  # run Flow-GRPO's order of work beside ours
    threads: Annotated[int, Ge(1), Le(1024)] | None = None  # on the CPU (None: torch's)
    json_file: Annotated[Path | None, arg(name="json")] = None  # write all numbers here


def benchmark_as_asked(arguments: list[str] | None) -> None:
    given = asked(Benchmark, "ref.benchmark", arguments)
    if given.json_file:
        refuse_unwritable(given.json_file, "--json")
    if given.threads:
        torch.set_num_threads(given.threads)
    task = PRESETS[given.preset].task(given.encoder, given.options if given.preset in LARGE else None)
    # before the trial, which must not give away the memory that the text encoders take
    baseline = text_encoders(task.model) if given.compare_flow_grpo else None
    settings = fitted(task.model, task.prompts, given.settings)
    result = {"preset": given.preset} | benchmark(task, settings, given.repeats, given.warmup, baseline)
    print(report(result))
    if given.json_file:
        write_json(given.json_file, result)


def main(arguments: list[str] | None = None) -> int:
    return interruptible(command, benchmark_as_asked, arguments)


if __name__ == "__main__":
    sys.exit(main())
