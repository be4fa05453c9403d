"""Tests of the promise: the same trajectory, however a batch is sliced.

    python -m pytest -q

The judge is train_in_numpy(): what a script prints and saves is compared with it.
Some tests let torchrun start this file: then it is worker(), one of several processes.
"""

import contextlib
import io
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_equal
from pytest import param
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import common
import train_accum
import train_basic
import train_manual

SCRIPTS = [train_basic, train_accum, train_manual]
HANG = 900  # seconds, after which a process hangs, on any machine

parametrize = pytest.mark.parametrize
each_script = parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals or torchrun")

os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start
torch.set_num_threads(1)


# ---- the judge
def make_table(rows):
    """Return the synthetic data: ten inputs, and their sum with noise as target."""
    table = np.random.default_rng(0).normal(0, [1] * 10 + [0.1], (rows, 11))
    table[:, -1] = table.sum(axis=1)
    return table


def train_in_numpy(table, rows_per_step, epochs, lr, seed):
    """Train the linear model by its formulas, in float64.

    Return the weights (the bias is the last), the steps [(epoch, step, loss)], and the
    loss of all rows at the end.
    """
    std = table.std(axis=0)
    table = (table - table.mean(axis=0)) / np.where(std == 0, 1, std)
    X, y = np.c_[table[:, :-1], np.ones(len(table))], table[:, -1]
    torch.manual_seed(seed)
    model = nn.Linear(X.shape[1] - 1, 1).double()
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    steps = []
    for epoch in range(epochs):
        mixed = np.random.SeedSequence((seed, epoch)).generate_state(1)
        torch.manual_seed(int(mixed[0]))
        order = torch.randperm(len(X)).numpy()
        for step, start in enumerate(range(0, len(X), rows_per_step)):
            rows = order[start : start + rows_per_step]
            errors = X[rows] @ weights - y[rows]
            steps.append((epoch + 1, step + 1, np.mean(errors**2)))
            weights = weights - lr * 2 * errors @ X[rows] / len(rows)
    return weights, steps, np.mean((X @ weights - y) ** 2)


def compare(
    lines,
    file,
    table,
    *,
    batch_size,
    accumulation_steps=1,
    epochs=10,
    lr=0.01,
    seed=0,
    log_every=1,
    done=0,
    processes=1,
):
    """Compare the lines that a run printed and the file it wrote with the judge.

    `done` epochs were finished before the run. Without a file, `file` is None.
    """
    rows_per_step = batch_size * accumulation_steps
    weights, steps, loss = train_in_numpy(table, rows_per_step, epochs, lr, seed)
    first, *middle, last = lines
    assert first == (
        f"{len(table)} rows, {batch_size} x {accumulation_steps} per step, "
        f"{len(steps) // epochs} steps per epoch, {done} of {epochs} epochs done; cpu, "
        f"processes: {processes}, torch {torch.__version__}, seed {seed}"
    )
    assert_close(
        [read_step(line) for line in middle],
        [
            step
            for step in steps
            if step[0] > done and log_every > 0 and (step[1] - 1) % log_every == 0
        ],
        2e-5,
    )
    assert_close(read_last(last), loss, 2e-5)
    if file is not None:
        assert torch.load(file)["epoch"] == epochs
        assert_close(file_weights(file), weights, 1e-5)


def read_step(line):
    """Return (epoch, step, loss) of a printed line."""
    match = re.fullmatch(r"Epoch: (\d+), Step: (\d+), Loss: (\d+\.\d{6})", line)
    assert match, f"no line of a step: {line}"
    return int(match[1]), int(match[2]), float(match[3])


def read_last(line):
    """Return the loss in the last printed line."""
    pattern = r"Loss of all rows: (\d+\.\d{6}), \d+\.\d{3} s, peak memory "
    match = re.fullmatch(pattern + r"(\d{3,4} MiB of the process|unknown)", line)
    assert match, f"no last line: {line}"
    return float(match[1])


def file_weights(file):
    """Return the weights in a checkpoint, as one vector."""
    state = torch.load(file, map_location="cpu")
    return nn.utils.parameters_to_vector(state["model"].values()).numpy()


def assert_close(found, expected, tolerance):
    assert_allclose(found, expected, rtol=0, atol=tolerance)


# ---- helpers
@pytest.fixture
def run(capsys):
    """Return a function that runs a script's main() here and returns its lines."""

    def run(script, *flags):
        script.main([str(flag) for flag in (*flags, "--device=cpu")])
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def judged(run, tmp_path):
    """Return a function that runs a script and compares all it does with the judge.

    Its options are the flags. A script without --accumulation-steps gets the product.
    """

    def judged(script, table=None, done=0, **options):
        sizes = {"batch_size": 8, "accumulation_steps": 4, "epochs": 2, "lr": 0.05}
        options = sizes | {"seed": 0, "log_every": 1} | options
        if script.__name__ != "train_accum":
            options["batch_size"] *= options.pop("accumulation_steps")
        file = tmp_path / "judged.pt"
        flags = [
            f"--{name}={value}".replace("_", "-") for name, value in options.items()
        ]
        lines = run(script, "--checkpoint", file, *flags)
        if table is None:
            table = make_table(options.pop("rows", 1000))
        options.pop("data", None)
        compare(lines, file, table, done=done, **options)
        return lines

    return judged


@pytest.fixture
def refused(run, capsys):
    """Return a function like run() for what must not run; it returns the error."""

    def refused(script, *flags):
        with pytest.raises(SystemExit) as end:
            run(script, *flags)
        error = capsys.readouterr().err + str(end.value.code)
        assert "error: " in error
        return error

    return refused


def edited(script, *edits):
    """Return a copy of a script in which old lines are replaced with new ones."""
    text = pathlib.Path(script.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, f"{script.__name__} has no {old!r} to edit"
        text = text.replace(old, new)
    module = types.ModuleType(script.__name__)
    exec(text, module.__dict__)
    return module


def start(folder, *command):
    """Start a process; finish() or a kill must follow."""
    return subprocess.Popen(
        [*map(str, command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Return what a process printed, once it ended well."""
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    return [line for line in out.splitlines() if not line.startswith("[Gloo]")]


# ---- the promise
SIZES = [(train_basic, 32, 1), (train_accum, 8, 4), (train_manual, 16, 1)]


@parametrize("script, batch_size, accumulation_steps", SIZES)
def test_a_script_runs_without_flags(script, batch_size, accumulation_steps, tmp_path):
    process = start(tmp_path, sys.executable, script.__file__)
    lines = finish(process)
    lines[0] = re.sub("; .*, processes", "; cpu, processes", lines[0])  # or a GPU
    lines[-1] = lines[-1].replace("of the device", "of the process")
    table = make_table(1000)
    sizes = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
    compare(lines, None, table, **sizes)
    assert os.listdir(tmp_path) == []


@each_script
@parametrize("rows", [1, 2, 31, 32, 33, 1037])
@parametrize("cut", [(8, 4), (1, 32), (32, 1), (7, 3), (400, 4)], ids=str)
def test_each_cut_takes_the_steps_of_the_judge(judged, script, rows, cut):
    batch_size, accumulation_steps = cut
    judged(
        script, rows=rows, batch_size=batch_size, accumulation_steps=accumulation_steps
    )


@each_script
@parametrize("log_every", [0, 3])
def test_seed_rate_and_lines_are_those_of_the_flags(judged, script, log_every):
    judged(script, rows=300, seed=7, lr=0.002, epochs=3, log_every=log_every)


def test_a_script_goes_on_from_the_file_of_another(judged):
    judged(train_basic, epochs=1)
    judged(train_accum, epochs=2, done=1)
    judged(train_manual, epochs=4, done=2)
    judged(train_basic, epochs=4, done=4)


@each_script
def test_a_hidden_layer_has_relu_units(run, script, tmp_path):
    file = tmp_path / "run.pt"
    last = run(script, "--hidden=3", "--rows=100", "--checkpoint", file)[-1]
    state = torch.load(file)["model"]
    w0, b0, w1, b1 = (weights.double().numpy() for weights in state.values())
    table = make_table(100)
    table = (table - table.mean(axis=0)) / table.std(axis=0)
    outputs = np.maximum(0, table[:, :-1] @ w0.T + b0) @ w1.T + b1
    assert b0.shape == (3,)
    assert_close(read_last(last), np.mean((outputs - table[:, -1:]) ** 2), 2e-5)
