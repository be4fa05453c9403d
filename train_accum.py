"""Gradient accumulation: several micro-batches, one optimizer step.

These commands take the same steps:

    python train_accum.py
    python train_accum.py --batch-size 1 --accumulation-steps 32
    torchrun --nproc-per-node 2 train_accum.py  # processes: two share the work

A step is one optimizer.step(). Here several micro-batches make one step: each adds the
gradient of (sum of its losses) / (number of targets in the step). Together that is the
gradient of the step's mean loss, even if the last micro-batch is short.

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
    rank, world_size = common.join_processes(args)  # processes
    X, y, scaling = common.get_data(args)
    dataset = TensorDataset(X, y)
    torch.manual_seed(args.seed)
    model = common.make_model(X.shape[1], args.hidden).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    loss_fn = F.mse_loss
    count = torch.numel  # count(targets) is what this loss's mean divides by
    # anything with a state_dict() belongs here: scheduler, EMA, second optimizer, ...
    parts = {"model": model, "optimizer": optimizer}
    settings = common.get_settings(args, parts, dataset, X, y)
    first_epoch = common.load_checkpoint(args, settings, parts)
    common.print_start(args, dataset, first_epoch)
    start = time.perf_counter()
    for epoch in range(first_epoch, args.epochs):
        if world_size > 1:  # processes: wrapped anew, as after resuming: the same bits
            model = DistributedDataParallel(parts["model"])  # processes
        common.seed_epoch(args.seed, epoch)
        batches = torch.randperm(len(dataset)).split(args.batch_size)
        batches = [rows[rank::world_size] for rows in batches]  # processes: own share
        if rank > 0:  # processes: the same order for all, but dropout masks of its own
            common.seed_epoch(args.seed, epoch, rank)  # processes
        # batch_size=None fetches dataset[rows], a whole batch; wrap a Dataset of single
        # items in common.Batches
        loader = iter(DataLoader(dataset, batch_size=None, sampler=batches))
        step = 0
        while micro_batches := list(islice(loader, args.accumulation_steps)):
            n_targets = sum(count(targets) for _, targets in micro_batches)
            # processes: DistributedDataParallel averages, so divide by the mean number
            n_targets = common.mean_over_processes(n_targets)  # processes
            losses = []
            optimizer.zero_grad()
            for i, (inputs, targets) in enumerate(micro_batches):
                if world_size > 1:  # processes: reduce once per step, as with no_sync()
                    last = i + 1 == len(micro_batches)  # processes
                    model.require_backward_grad_sync = last  # processes
                inputs, targets = inputs.to(args.device), targets.to(args.device)
                loss = loss_fn(model(inputs), targets, reduction="sum") / n_targets
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            if args.log_every and step % args.log_every == 0:
                step_loss = sum(losses)
                step_loss = common.mean_over_processes(step_loss)  # processes
                print(f"Epoch: {epoch + 1}, Step: {step + 1}, Loss: {step_loss:.6f}")
            step += 1
        # a scheduler that steps once per epoch belongs here, before the save
        common.save_checkpoint(args, settings, parts, epoch + 1, **scaling)
    common.print_end(args, parts["model"], dataset, loss_fn, start, count=count)
    return parts["model"]


if __name__ == "__main__":
    main()
