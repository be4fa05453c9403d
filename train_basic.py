"""One DataLoader batch, one optimizer step.

    python train_basic.py
    python train_basic.py --data table.csv --batch-size 64 --epochs 100

A step is one optimizer.step(). Here each batch makes one step: its gradient is that of
the batch's mean loss.
"""

import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import common


def main(argv=None):
    args = common.parse_args(argv, __doc__, batch_size=32)
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
        batches = torch.randperm(len(dataset)).split(args.batch_size)
        # batch_size=None fetches dataset[rows], a whole batch; wrap a Dataset of single
        # items in common.Batches
        loader = DataLoader(dataset, batch_size=None, sampler=batches)
        for step, (inputs, targets) in enumerate(loader):
            optimizer.zero_grad()
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
