"""Several micro-batches, one optimizer step: large batches in the memory of small ones.

    python train_accum.py
    python train_accum.py --batch-size 1 --accumulation-steps 32
    torchrun --nproc-per-node 2 train_accum.py

A step is one optimizer.step(). Here several micro-batches make one step: each adds the
gradient of its summed loss, divided by the number of targets in all of them together.
That is the gradient of their mean loss, also if the last one is short.

All three commands take the same steps: the second cuts them finer, the third shares
them between two processes. Lines marked "processes" do nothing without torchrun.
"""

from itertools import islice

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import common


def train_epoch(
    model,
    optimizer,
    loader,
    accumulation_steps,
    *,
    loss_fn=F.mse_loss,
    epoch=0,
    log_every=1,
):
    """Train `model` in place for one epoch, and return the number of steps.

    `loader` yields micro-batches (inputs, targets), of any sizes. `loss_fn` is called
    as loss_fn(outputs, targets, reduction="sum"), and fits if its mean divides by
    targets.numel(): not with ignored targets, class weights or soft labels. Of every
    `log_every` steps the first is printed; 0 prints none.

    With a DistributedDataParallel model, each process's loader yields this process's
    rows, in equally many micro-batches, and each micro-batch uses every parameter.
    Raises ValueError if accumulation_steps is below 1.
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps is {accumulation_steps}, not 1 or more")
    device = next(model.parameters()).device
    model.train()
    step = 0
    batches = iter(loader)
    while micro_batches := list(islice(batches, accumulation_steps)):
        n_targets = sum(targets.numel() for _, targets in micro_batches)
        n_targets = common.all_reduce_mean(n_targets)  # processes
        losses = []
        optimizer.zero_grad()
        for i, (inputs, targets) in enumerate(micro_batches, 1):
            if isinstance(model, DistributedDataParallel):  # processes
                model.require_backward_grad_sync = i == len(micro_batches)
            inputs, targets = inputs.to(device), targets.to(device)
            loss = loss_fn(model(inputs), targets, reduction="sum") / n_targets
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        if log_every and step % log_every == 0:
            loss = common.all_reduce_mean(sum(losses))  # processes
            print(f"Epoch: {epoch + 1}, Step: {step + 1}, Loss: {loss:.6f}")
        step += 1
    return step


def main():
    args = common.parse_args(__doc__, batch_size=8, accumulation_steps=4)
    rank, world_size = common.init_process_group(args)  # processes
    X, y, data, scaling = common.get_data(args)
    torch.manual_seed(args.seed)
    model = common.make_model(X.shape[1], y.shape[1], args.hidden).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    parts = {"model": model, "optimizer": optimizer}  # a scheduler belongs here, too
    settings = common.get_settings(args, model, optimizer, data)
    first_epoch = common.load_checkpoint(args.checkpoint, settings, parts)
    started = common.print_start(args, data, len(X), first_epoch, world_size)
    if world_size > 1:  # processes
        model = DistributedDataParallel(model)
    steps = 0
    for epoch in range(first_epoch, args.epochs):
        # dropout draws the same again if a run goes on from here
        torch.manual_seed(hash((args.seed, epoch)) + rank)  # processes
        indices = common.shuffled_indices(len(X), args.seed, epoch)
        loader = DataLoader(
            TensorDataset(X, y),
            # processes: each has its share of every micro-batch
            sampler=[b[rank::world_size] for b in indices.split(args.batch_size)],
            batch_size=None,  # the sampler yields whole batches
            generator=torch.Generator(),  # leaves torch's own to dropout
        )
        steps += train_epoch(
            model,
            optimizer,
            loader,
            args.accumulation_steps,
            epoch=epoch,
            log_every=args.log_every,
        )
        common.save_checkpoint(args.checkpoint, parts, epoch + 1, settings, scaling)
    common.print_end(args, model, X, y, first_epoch, steps, started)


if __name__ == "__main__":
    main()
