"""What test_strategies.py starts under torchrun: gloo's threads still have tensors to drop when the command is done."""

import sys

import torch
import torch.distributed as dist

from vertebra import cli

dist.init_process_group("gloo")
for _ in range(400):
    dist.all_reduce(torch.ones(20000), async_op=True)
sys.argv = ["vertebra", "recipes"]
cli.main()
