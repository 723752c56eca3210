"""A world of one rank, without a process group."""

import torch

from sidestack.infra.distributed import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")
