"""What libraries' documented default loops apply at an epoch's last window: README.md, "Proof", has the figures."""

import itertools
import tempfile

import accelerate
import keras
import lightning
import torch
import transformers
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset


class Net(torch.nn.Linear):
    def forward(self, x, labels=None):
        out = super().forward(x)
        return out if labels is None else {"loss": mse_loss(out, labels), "logits": out}


class Recorder(torch.optim.SGD):
    """Keep the weights and the gradient of every step."""

    def step(self, closure=None):
        loss, parts = closure and closure(), self.param_groups[0]["params"]
        self.log.append([torch.cat([p.flatten() for p in ps]).detach() for ps in (parts, [p.grad for p in parts])])
        super().step()
        return loss


def by_accelerate(model, optimizer, loader):
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, t in loader:
        with accelerator.accumulate(model):
            accelerator.backward(mse_loss(model(x), t))
            optimizer.step()
            optimizer.zero_grad()


def by_lightning(model, optimizer, loader):
    module = lightning.LightningModule()
    module.model, module.configure_optimizers = model, lambda: optimizer
    module.training_step = lambda batch: mse_loss(model(batch[0]), batch[1])
    lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=4,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
    ).fit(module, loader)


def by_transformers(model, optimizer, loader, loss_func=None):
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        gradient_accumulation_steps=4,
        max_grad_norm=0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=[{"x": x, "labels": t} for x, t in loader.dataset],
        optimizers=(optimizer, transformers.get_constant_schedule(optimizer)),
        compute_loss_func=loss_func,
    )
    trainer._get_train_sampler = SequentialSampler
    trainer.train()


def by_transformers_num_items(model, optimizer, loader):
    by_transformers(
        model,
        optimizer,
        loader,
        lambda out, labels, num_items_in_batch: mse_loss(out, labels, reduction="sum") / num_items_in_batch,
    )


def steps_by_keras(X, y):
    """Return how many batches of four epochs each changed the weights."""
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01, gradient_accumulation_steps=4), "mse")
    seen = [model.get_weights()[0]]
    log = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(model.get_weights()[0]))
    model.fit(X.numpy(), y.numpy(), 8, epochs=4, shuffle=False, callbacks=[log])
    changed, n = [(a != b).any() for a, b in itertools.pairwise(seen)], len(seen) // 4
    return [sum(changed[i : i + n]) for i in range(0, 4 * n, n)]


for rows in 1000, 1001, 1037:
    draw, last = torch.Generator().manual_seed(0), (rows - 1) // 32
    X, w, e = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((rows, 10), (10, 1), (rows, 1)))
    y = X @ w + 0.1 * e
    for way in by_accelerate, by_lightning, by_transformers, by_transformers_num_items:
        torch.manual_seed(1)
        model = Net(10, 1).double()
        optimizer = Recorder(model.parameters(), lr=0.01)
        optimizer.log = []
        way(model, optimizer, DataLoader(TensorDataset(X, y), batch_size=8))
        weights, gradient = optimizer.log[last]
        torch.nn.utils.vector_to_parameters(weights, model.parameters())
        exact = torch.autograd.grad(mse_loss(model(X[32 * last :]), y[32 * last :]), model.parameters())
        exact = torch.cat([g.flatten() for g in exact])
        print(rows, way.__name__, f"{gradient @ exact / (exact @ exact):.2f}")
    print(rows, "by_keras, steps in each epoch:", *steps_by_keras(X, y), "of", last + 1)
