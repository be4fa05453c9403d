"""Several micro-batches, one optimizer step: a large batch in the memory of a small one.

    python train_accum.py
    python train_accum.py --batch-size 1 --accumulation-steps 32      # the same steps, cut finer
    torchrun --nproc-per-node 2 train_accum.py                        # the same steps, shared by two processes

A step is one optimizer.step(), and its window the rows whose mean loss it descends: here, the rows of
several micro-batches. Each adds its sum of losses, divided by the size of the whole window, so that a short
tail needs no special case. Lines marked "processes" do nothing without torchrun.
"""

import math

import common  # before torch, so that Ctrl-C is quiet while torch loads
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset


def train(model, X, y, run=None, *, batch_size=8, accumulation_steps=4, epochs=10, lr=0.01, seed=0, log_every=1):
    """Train `model` in place on inputs X (rows, n) and targets y (rows, t), and return it.

    A step takes `batch_size * accumulation_steps` rows, the last of an epoch what is left, and computes
    `batch_size` of them at a time; both count the rows of all processes together.
    Every `log_every`th step is printed, none if 0. `run` is for the command line.
    Raises FloatingPointError at the end of an epoch whose loss or weights are not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss_fn = nn.MSELoss(reduction="sum")
    window = batch_size * accumulation_steps
    steps = math.ceil(len(X) / window)
    epochs_done = common.start(run, model, optimizer, X, y)
    rank, world_size = common.processes()
    replica = DistributedDataParallel(model) if world_size > 1 else model  # processes

    for epoch in range(epochs_done, epochs):
        order = common.row_order(len(X), seed, epoch)
        windows = (order[first : first + window] for first in range(0, len(X), window))
        loader = DataLoader(TensorDataset(X, y), sampler=windows, batch_size=None)  # whole windows, not row by row
        epoch_loss = torch.zeros((), dtype=y.dtype, device=device)
        for step, (all_inputs, all_targets) in enumerate(loader, 1):
            micro_batches = list(zip(all_inputs.split(batch_size), all_targets.split(batch_size)))
            divisor = all_targets.numel() / world_size  # DistributedDataParallel averages over the processes
            window_loss = 0
            for i, (inputs, targets) in enumerate(micro_batches, 1):
                if world_size > 1:  # processes: my rows, maybe none; gradients are reduced in the last backward only
                    inputs, targets = inputs[rank::world_size], targets[rank::world_size]
                    replica.require_backward_grad_sync = i == len(micro_batches)  # the switch behind no_sync()
                inputs, targets = inputs.to(device), targets.to(device)
                loss = loss_fn(replica(inputs), targets) / divisor
                loss.backward()
                window_loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            epoch_loss.add_(window_loss, alpha=len(all_targets) / len(X))
            if log_every and (epoch * steps + step) % log_every == 0:
                print(
                    f"Epoch: {epoch + 1}/{epochs}, Step: {step}/{steps}, "
                    f"Loss: {common.mean_over_processes(window_loss).item():.6f}, "
                    f"Micro-batches: {len(micro_batches)}, Rows: {len(all_targets)}"
                )
        common.end_epoch(run, model, optimizer, epoch + 1, epoch_loss)
    return model


if __name__ == "__main__":
    common.main(train)
