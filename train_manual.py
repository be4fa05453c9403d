"""Batches cut by hand from a shuffled index, one optimizer step each.

    python train_manual.py
    python train_manual.py --data table.csv --batch-size 64 --epochs 100

A step is one optimizer.step(), and its window the rows whose mean loss it descends: here, a slice.
"""

import math

import common  # before torch, so that Ctrl-C is quiet while torch loads
import torch
from torch import nn


def train(model, X, y, run=None, *, batch_size=16, epochs=10, lr=0.01, seed=0, log_every=1):
    """Train `model` in place on inputs X (rows, n) and targets y (rows, t), and return it.

    A step takes `batch_size` rows, the last of an epoch what is left: ceil(rows / batch_size) steps an epoch.
    Every `log_every`th step is printed, none if 0. `run` is for the command line.
    Raises FloatingPointError at the end of an epoch whose loss or weights are not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss_fn = nn.MSELoss()
    steps = math.ceil(len(X) / batch_size)
    epochs_done = common.start(run, model, optimizer, X, y)

    for epoch in range(epochs_done, epochs):
        order = common.row_order(len(X), seed, epoch)
        epoch_loss = torch.zeros((), dtype=y.dtype, device=device)
        for step, first in enumerate(range(0, len(X), batch_size), 1):
            rows = order[first : first + batch_size]  # the last slice is shorter
            inputs, targets = X[rows].to(device), y[rows].to(device)
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            epoch_loss.add_(loss.detach(), alpha=len(targets) / len(X))
            if log_every and (epoch * steps + step) % log_every == 0:
                print(f"Epoch: {epoch + 1}/{epochs}, Step: {step}/{steps}, Loss: {loss.item():.6f}")
        common.end_epoch(run, model, optimizer, epoch + 1, epoch_loss)
    return model


if __name__ == "__main__":
    common.main(train)
