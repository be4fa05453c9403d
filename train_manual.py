"""Batches cut by hand from shuffled row numbers, one optimizer step each.

    python train_manual.py
    python train_manual.py --data table.csv --batch-size 64 --epochs 100

A step is one optimizer.step(). Here each slice makes one step: its gradient is that of
the slice's mean loss.
"""

import torch
import torch.nn.functional as F

import common


def train_epoch(
    model,
    optimizer,
    X,
    y,
    indices,
    batch_size,
    *,
    loss_fn=F.mse_loss,
    epoch=0,
    log_every=1,
):
    """Train `model` in place for one epoch, and return the number of steps.

    `indices` are the rows of inputs X (rows, ...) and targets y (rows, ...), in their
    order. `loss_fn` is called as loss_fn(outputs, targets). Of every `log_every` steps
    the first is printed; 0 prints none.
    """
    device = next(model.parameters()).device
    model.train()
    step = 0
    for i in range(0, len(indices), batch_size):
        rows = indices[i : i + batch_size]
        inputs, targets = X[rows].to(device), y[rows].to(device)
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        if log_every and step % log_every == 0:
            print(f"Epoch: {epoch + 1}, Step: {step + 1}, Loss: {loss:.6f}")
        step += 1
    return step


def main():
    args = common.parse_args(__doc__, batch_size=16)
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
        steps += train_epoch(
            model,
            optimizer,
            X,
            y,
            indices,
            args.batch_size,
            epoch=epoch,
            log_every=args.log_every,
        )
        common.save_checkpoint(args.checkpoint, parts, epoch + 1, settings, scaling)
    common.print_end(args, model, X, y, first_epoch, steps, started)


if __name__ == "__main__":
    main()
