"""Full fine-tuning on several GPUs: each process keeps a part of every weight, gradient and moment (FSDP2).

    accelerate launch --num_processes 8 -m ref.train --preset flux_dev --lora-rank 0 --micro-batch 1 ...

With P processes a GPU holds 16 / P bytes a weight in place of 16: float32 weight, gradient, AdamW's two
moments. A block of the transformer is put together when its forward or backward pass begins and given up
when it ends; its gradient is summed over the processes on its way back to the parts. Optimiser, averages and
clipping work on the parts. A checkpoint holds whole tensors, so a run may go on with another number of
processes.

LoRA needs none of this: what it trains is small, and `processes.sum_gradients` sums it.
"""

import torch
from torch import nn

from ref.scale.processes import processes


def shard(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Spread a diffusers transformer over all processes, in place, and move it to `device` block by block.

    Blocks are put together in `dtype`. Inputs are left alone: FLUX's and SD3's time is float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [m for m in network.modules() if type(m).__name__ in network._no_split_modules]
    for module in [*blocks, network]:
        # also the root gives up its weights: left together they would outlive an `assign` to the parts
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean: a process's loss is its share of the mean
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
