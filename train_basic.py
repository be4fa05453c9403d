"""One DataLoader batch, one optimizer step.

    python train_basic.py
    python train_basic.py --data table.csv --batch-size 64 --epochs 100

A step is one optimizer.step(). Here each batch makes one step: its gradient is that of
the batch's mean loss.
"""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import common


def train_epoch(model, optimizer, loader, *, loss_fn=F.mse_loss, epoch=0, log_every=1):
    """Train `model` in place for one epoch, and return the number of steps.

    `loader` yields batches (inputs, targets). `loss_fn` is called as
    loss_fn(outputs, targets). Of every `log_every` steps the first is printed; 0
    prints none.
    """
    device = next(model.parameters()).device
    model.train()
    step = 0
    for inputs, targets in loader:
        inputs, targets = inputs.to(device), targets.to(device)
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        if log_every and step % log_every == 0:
            print(f"Epoch: {epoch + 1}, Step: {step + 1}, Loss: {loss:.6f}")
        step += 1
    return step


def main():
    args = common.parse_args(__doc__, batch_size=32)
    X, y, data, scaling = common.get_data(args)
    torch.manual_seed(args.seed)
    model = common.make_model(X.shape[1], y.shape[1], args.hidden).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    parts = {"model": model, "optimizer": optimizer}  # a scheduler belongs here, too
    settings = common.get_settings(args, model, optimizer, data)
    first_epoch = common.load_checkpoint(args.checkpoint, settings, parts)
    started = common.print_start(args, data, len(X), first_epoch)
    steps = 0
    for epoch in range(first_epoch, args.epochs):
        # dropout draws the same again if a run goes on from here
        torch.manual_seed(hash((args.seed, epoch)))
        indices = common.shuffled_indices(len(X), args.seed, epoch)
        loader = DataLoader(
            TensorDataset(X, y),
            sampler=indices.split(args.batch_size),
            batch_size=None,  # the sampler yields whole batches
            generator=torch.Generator(),  # leaves torch's own to dropout
        )
        steps += train_epoch(
            model,
            optimizer,
            loader,
            epoch=epoch,
            log_every=args.log_every,
        )
        common.save_checkpoint(args.checkpoint, parts, epoch + 1, settings, scaling)
    common.print_end(args, model, X, y, first_epoch, steps, started)


if __name__ == "__main__":
    main()
