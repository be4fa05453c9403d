"""Batches cut by hand from shuffled row numbers, one optimizer step each.

    python train_manual.py
    python train_manual.py --data table.csv --batch-size 64 --epochs 100

A step is one optimizer.step(). Here each slice makes one step: its gradient is that of
the slice's mean loss.
"""

import time

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import common


def main(argv=None):
    args = common.parse_args(argv, __doc__, batch_size=16)
    X, y, scaling = common.get_data(args)
    dataset = TensorDataset(X, y)
    torch.manual_seed(args.seed)
    model = common.make_model(X.shape[1], args.hidden).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    loss_fn = F.mse_loss
    # anything with a state_dict() belongs here: scheduler, EMA, second optimizer, ...
    parts = {"model": model, "optimizer": optimizer}
    settings = common.get_settings(args, parts, dataset, X, y)
    first_epoch = common.load_checkpoint(args, settings, parts)
    common.print_start(args, dataset, first_epoch)
    start = time.perf_counter()
    for epoch in range(first_epoch, args.epochs):
        common.seed_epoch(args.seed, epoch)
        order = torch.randperm(len(dataset))
        for step, i in enumerate(range(0, len(dataset), args.batch_size)):
            rows = order[i : i + args.batch_size]
            optimizer.zero_grad()
            inputs, targets = dataset[rows]
            inputs, targets = inputs.to(args.device), targets.to(args.device)
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if args.log_every and step % args.log_every == 0:
                print(f"Epoch: {epoch + 1}, Step: {step + 1}, Loss: {loss:.6f}")
        # a scheduler that steps once per epoch belongs here, before the save
        common.save_checkpoint(args, settings, parts, epoch + 1, **scaling)
    common.print_end(args, parts["model"], dataset, loss_fn, start)
    return parts["model"]


if __name__ == "__main__":
    main()
