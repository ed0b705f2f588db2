"""What training costs: seconds, FLOPs, memory; measured where it can be, computed where it cannot.

measure    `python -m ref.benchmark`: an iteration's phases, utilisation, what PEC and PCVAE cost
flow_grpo  the baseline beside it: Flow-GRPO's order of work
savers     `python -m ref.benchmark.savers`: passes, seconds and exactness of what saves passes
on_paper   `python -m ref.benchmark.on_paper`: FLOPs of the large presets, from shapes
memory     `python -m ref.benchmark.memory`: GPU memory of the large presets, from shapes
on_a_gpu   `python -m ref.benchmark.on_a_gpu`: the large presets at full size on a real GPU, with random weights
figures    pictures of all this, for notebook 08
"""
