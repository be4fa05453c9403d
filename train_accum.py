"""Several micro-batches, one optimizer step: a large batch in the memory of a small one.

    python train_accum.py
    python train_accum.py --batch-size 1 --accumulation-steps 32      # the same steps, cut finer
    torchrun --nproc-per-node 2 train_accum.py                        # the same steps, shared by two processes

A step is one optimizer.step(). Here several micro-batches make one step: each adds the gradient of its summed loss,
divided by the number of targets in all of them together. That is the gradient of their mean loss, also if one is short.
Lines marked "processes" do nothing without torchrun.
"""

import math
from itertools import islice

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import common


def train(
    model, optimizer, X, y, *, loss_fn=F.mse_loss, batch_size, accumulation_steps, epochs=range(10), seed=0, log_every=1
):
    """Train `model` in place on inputs X (rows, ...) and targets y (rows, ...).

    An epoch has ceil(rows / batch_size / accumulation_steps) steps; all sizes count the rows of all processes together.
    `loss_fn` is a loss of torch.nn.functional whose mean divides by targets.numel(), `epochs` an iterable of numbers,
    from 0 on. The first of every `log_every` steps of an epoch is printed; 0 prints none.
    """
    device = next(model.parameters()).device
    rank, world_size = common.init_process_group(device)  # processes
    model = DistributedDataParallel(model) if world_size > 1 else model  # processes
    model.train()
    for epoch in epochs:
        indices = common.shuffled_indices(len(X), seed, epoch).split(batch_size)
        # index tensors as sampler fetch whole batches; a generator of its own leaves the global one to the model
        loader = DataLoader(TensorDataset(X, y), sampler=indices, batch_size=None, generator=torch.Generator())
        step, batches = 0, iter(loader)
        while micro_batches := list(islice(batches, accumulation_steps)):
            n_targets = sum(targets.numel() for _, targets in micro_batches)
            scale = world_size / n_targets  # DistributedDataParallel takes the mean over the processes
            step_loss = 0
            optimizer.zero_grad()
            for i, (inputs, targets) in enumerate(micro_batches, start=1):
                if world_size > 1:  # processes: this one's rows, maybe none; gradients are reduced in the last backward
                    inputs, targets = inputs[rank::world_size], targets[rank::world_size]
                    model.require_backward_grad_sync = i == len(micro_batches)  # the switch behind no_sync()
                inputs, targets = inputs.to(device), targets.to(device)
                loss = loss_fn(model(inputs), targets, reduction="sum") * scale
                loss.backward()
                step_loss += loss.detach()
            optimizer.step()
            if log_every and step % log_every == 0:
                print(
                    f"Epoch: {epoch + 1}, Step: {step + 1}/{math.ceil(len(indices) / accumulation_steps)}, "
                    f"Loss: {common.all_reduce_mean(step_loss).item():.6f}, "
                    f"Micro-batches: {len(micro_batches)}, Rows: {sum(len(targets) for _, targets in micro_batches)}"
                )
            step += 1


def main():
    args = common.parse_args(__doc__, batch_size=8, accumulation_steps=4)
    X, y = args.data[:2] if args.data else common.make_data(args.rows)
    model = common.make_model(X.shape[1], y.shape[1], args.hidden, args.seed).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    epochs = common.epochs_to_train(args, model, optimizer, X, y)
    sizes = {"batch_size": args.batch_size, "accumulation_steps": args.accumulation_steps}
    train(model, optimizer, X, y, **sizes, epochs=epochs, seed=args.seed, log_every=args.log_every)


if __name__ == "__main__":
    main()
