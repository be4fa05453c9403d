"""Batches cut by hand from shuffled row numbers, one optimizer step each.

    python train_manual.py
    python train_manual.py --data table.csv --batch-size 64 --epochs 100

A step is one optimizer.step(). Here each slice makes one step: its gradient is that of the slice's mean loss.
"""

import torch
import torch.nn.functional as F

import common


def train(model, optimizer, X, y, *, loss_fn=F.mse_loss, batch_size, epochs=range(10), seed=0, log_every=1):
    """Train `model` in place on inputs X (rows, ...) and targets y (rows, ...).

    An epoch has ceil(rows / batch_size) steps. `loss_fn` is a loss of torch.nn.functional, `epochs` an iterable of
    epoch numbers, from 0 on. The first of every `log_every` steps of an epoch is printed; 0 prints none.
    """
    device = next(model.parameters()).device
    model.train()
    for epoch in epochs:
        indices = common.shuffled_indices(len(X), seed, epoch).split(batch_size)
        for step, rows in enumerate(indices):
            inputs, targets = X[rows].to(device), y[rows].to(device)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if log_every and step % log_every == 0:
                print(f"Epoch: {epoch + 1}, Step: {step + 1}/{len(indices)}, Loss: {loss.item():.6f}")


def main():
    args = common.parse_args(__doc__, batch_size=16)
    X, y = args.data[:2] if args.data else common.make_data(args.rows)
    model = common.make_model(X.shape[1], y.shape[1], args.hidden, args.seed).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    epochs = common.epochs_to_train(args, model, optimizer, X, y)
    train(model, optimizer, X, y, batch_size=args.batch_size, epochs=epochs, seed=args.seed, log_every=args.log_every)


if __name__ == "__main__":
    main()
