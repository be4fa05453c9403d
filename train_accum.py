"""Gradient accumulation: several micro-batches, one optimizer step.

    python train_accum.py
    python train_accum.py --batch-size 1 --accumulation-steps 32
    torchrun --nproc-per-node 2 train_accum.py  # processes: two share the work

A step is one optimizer.step(). Here several micro-batches make one step: each adds the
gradient of (sum of its losses) / (number of targets in the step). Together that is the
gradient of the step's mean loss, also if the last micro-batch is short.

These commands all take the same steps.
For one process, the lines marked "# processes" can be deleted.
"""

import time
from itertools import islice

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel  # processes
from torch.utils.data import DataLoader, TensorDataset

import common


def main(argv=None):
    args = common.parse_args(argv, __doc__, batch_size=8, accumulation_steps=4)
    rank, world_size = common.init_process_group(args)  # processes
    X, y, scaling = common.get_data(args)
    torch.manual_seed(args.seed)
    model = common.make_model(X.shape[1], args.hidden).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    loss_fn = F.mse_loss
    # whatever has a state belongs here: a scheduler, an EMA, a second optimizer, ...
    parts = {"model": model, "optimizer": optimizer}
    settings = common.get_settings(args, parts, X, y)
    first_epoch = common.load_checkpoint(args, settings, parts)
    model = DistributedDataParallel(model) if world_size > 1 else model  # processes
    common.print_start(args, len(X), first_epoch)
    start = time.perf_counter()
    for epoch in range(first_epoch, args.epochs):
        common.seed_epoch(args.seed, epoch)
        batches = torch.randperm(len(X)).split(args.batch_size)
        batches = [rows[rank::world_size] for rows in batches]  # processes: its share
        # processes: each has its own dropout masks, process 0 those of a single process
        if rank > 0:  # processes
            torch.manual_seed(torch.initial_seed() + rank)  # processes
        # batch_size=None: a whole batch at once, faster than row by row
        loader = iter(DataLoader(TensorDataset(X, y), batch_size=None, sampler=batches))
        step = 0
        while micro_batches := list(islice(loader, args.accumulation_steps)):
            n_targets = sum(targets.numel() for _, targets in micro_batches)
            # processes: DistributedDataParallel averages, so divide by the mean number
            n_targets = common.all_reduce_mean(n_targets)  # processes
            losses = []
            optimizer.zero_grad()
            for i, (inputs, targets) in enumerate(micro_batches):
                if world_size > 1:  # processes: the last micro-batch reduces gradients
                    last = i + 1 == len(micro_batches)  # processes
                    model.require_backward_grad_sync = last  # processes
                inputs, targets = inputs.to(args.device), targets.to(args.device)
                loss = loss_fn(model(inputs), targets, reduction="sum") / n_targets
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            if args.log_every and step % args.log_every == 0:
                step_loss = sum(losses)
                step_loss = common.all_reduce_mean(step_loss)  # processes
                print(f"Epoch: {epoch + 1}, Step: {step + 1}, Loss: {step_loss:.6f}")
            step += 1
        # ends the epoch: a scheduler.step() after it would be lost when going on
        common.save_checkpoint(args, settings, parts, epoch + 1, **scaling)
    common.print_end(args, parts, X, y, loss_fn, start)
    return parts["model"]


if __name__ == "__main__":
    common.init_program()
    main()
