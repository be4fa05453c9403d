"""Tests of the promise: the same trajectory, however a batch is sliced.

    python -m pytest -q

The judge is train_in_numpy(): what a script prints and saves is compared with it.
Some tests let torchrun start this file: then it is worker(), one of several processes.
"""

import contextlib
import io
import os
import pathlib
import random
import re
import shlex
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

torch.set_num_threads(1)


# ---- the judge
def make_table(rows):
    """Return the synthetic data: ten inputs, and their sum with noise as target."""
    table = np.random.default_rng(0).normal(0, [1] * 10 + [0.1], (rows, 11))
    table[:, -1] = table.sum(axis=1)
    return table


def standardise(table):
    """Return inputs, with a column of ones for the bias, and targets."""
    std = table.std(axis=0)
    table = (table - table.mean(axis=0)) / np.where(std == 0, 1, std)
    return np.c_[table[:, :-1], np.ones(len(table))], table[:, -1]


def train_in_numpy(table, rows_per_step, epochs, lr, seed):
    """Train the linear model by its formulas, in float64.

    Return the weights (the bias is the last), the steps [(epoch, step, loss)], and the
    loss of all rows at the end.
    """
    X, y = standardise(table)
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


def judge(
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
    expected = [
        step
        for step in steps
        if step[0] > done and log_every > 0 and (step[1] - 1) % log_every == 0
    ]
    assert_close([read_step(line) for line in middle], expected, 2e-5)
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
    match = re.fullmatch(pattern + r"(\d+ MiB of the process|unknown)", line)
    assert match, f"no last line: {line}"
    return float(match[1])


def file_weights(file):
    """Return the weights in a checkpoint, as one vector."""
    state = torch.load(file, map_location="cpu")
    return nn.utils.parameters_to_vector(state["model"].values()).numpy()


def assert_close(found, expected, tolerance):
    assert_allclose(found, expected, rtol=0, atol=tolerance)


# ---- helpers
# All are given, so that only test_a_script_runs_without_flags depends on a default.
FLAGS = ["--hidden=0", "--epochs=10", "--lr=0.01", "--seed=0", "--log-every=1"]
FLAGS += ["--device=cpu"]
SIZES = {
    "train_basic": ["--batch-size=32"],
    "train_accum": ["--batch-size=8", "--accumulation-steps=4"],
    "train_manual": ["--batch-size=32"],
}


@pytest.fixture
def run(capsys):
    """Return a function that runs a script's main() here and returns its lines."""

    def run(script, *flags):
        script.main([*FLAGS, *SIZES[script.__name__], *map(str, flags)])
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def judged(run, tmp_path):
    """Return a function that runs a script and compares all it does with the judge.

    Its options are flags. A script without --accumulation-steps gets the product.
    """

    def judged(script, rows=100, cut=(8, 4), done=0, **options):
        options = {"epochs": 2, "lr": 0.05, "seed": 0, "log_every": 1} | options
        batch_size, accumulation_steps = cut
        if script.__name__ == "train_accum":
            sizes = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
        else:
            sizes = {"batch_size": batch_size * accumulation_steps}
        file = tmp_path / "judged.pt"
        flags = [
            f"--{name.replace('_', '-')}={value}"
            for name, value in (sizes | options).items()
        ]
        lines = run(script, f"--rows={rows}", f"--checkpoint={file}", *flags)
        judge(lines, file, make_table(rows), done=done, **sizes, **options)

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
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Return what a process printed, once it ended well."""
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    return out.splitlines()


# ---- the promise
DEFAULTS = [(train_basic, 32, 1), (train_accum, 8, 4), (train_manual, 16, 1)]


@parametrize("script, batch_size, accumulation_steps", DEFAULTS)
def test_a_script_runs_without_flags(script, batch_size, accumulation_steps, tmp_path):
    process = start(tmp_path, sys.executable, script.__file__)
    lines = finish(process)
    lines[0] = re.sub("; .*, processes", "; cpu, processes", lines[0])  # or a GPU
    lines[-1] = lines[-1].replace("of the device", "of the process")
    table = make_table(1000)
    sizes = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
    judge(lines, None, table, **sizes)
    assert os.listdir(tmp_path) == []


@each_script
@parametrize("rows", [1, 2, 31, 32, 33, 1037])
@parametrize("cut", [(8, 4), (1, 32), (32, 1), (7, 3), (400, 4)], ids=str)
def test_each_cut_takes_the_steps_of_the_judge(judged, script, rows, cut):
    judged(script, rows, cut)


@each_script
@parametrize("log_every", [0, 3])
def test_seed_rate_and_lines_are_those_of_the_flags(judged, script, log_every):
    judged(script, rows=300, seed=7, lr=0.002, epochs=3, log_every=log_every)


def test_an_epoch_has_random_numbers_of_its_own_and_the_same_again():
    numbers = []
    for seed, epoch in [(0, 1), (0, 1), (1, 0), (0, 2)]:
        common.seed_epoch(seed, epoch)
        numbers.append((torch.rand(1).item(), np.random.rand(), random.random()))
    first, again, *others = map(set, numbers)
    assert first == again
    assert first.isdisjoint(set.union(*others))


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
    X, y = standardise(make_table(100))
    outputs = np.maximum(0, X[:, :-1] @ w0.T + b0) @ w1[0] + b1
    assert b0.shape == (3,)
    assert_close(read_last(last), np.mean((outputs - y) ** 2), 2e-5)


# ---- data
# the first column is time stamps in nanoseconds, the third a constant
OFFSETS = [1.7e18, 5, 0.1, 0]
SHIFTED = np.random.default_rng(0).integers(-99, 99, (40, 4)) * [2**14, 1e-9, 0, 1]
TABLE = SHIFTED + OFFSETS


def write_spreadsheet(file):
    """Write the table as a spreadsheet does: marked as UTF-8, names, \\r\\n."""
    style = {"header": '"a, b",2020_1,,"y"', "comments": "", "newline": "\r\n\r\n"}
    np.savetxt(file, TABLE, '"%.17g"', ",", encoding="utf-8-sig", **style)


@parametrize("name", ["a.csv", "a.csv.gz", "a.csv.bz2", "a.csv.xz", "a.npy", "A.NPY"])
def test_a_file_of_any_form_is_the_same_table(run, tmp_path, name):
    """The judge has the numbers without their offsets, which must not matter."""
    data, file = tmp_path / name, tmp_path / "run.pt"
    plain = tmp_path / "plain.csv"
    write_spreadsheet(plain)
    lines = run(train_basic, "--data", plain, "--checkpoint", file, "--epochs=1")
    assert lines[0] == f"{plain}: line 1 is a header"
    judge(lines[1:], file, SHIFTED, batch_size=32, epochs=1)
    if "csv" in name:
        write_spreadsheet(data)
    else:
        with data.open("wb") as numpy_file:
            np.save(numpy_file, np.asfortranarray(TABLE))
    lines = run(train_basic, "--data", data, "--checkpoint", file, "--epochs=2")
    judge(lines[-4:], file, SHIFTED, batch_size=32, epochs=2, done=1)
    state = torch.load(file)
    std = SHIFTED.std(axis=0)
    std[2] = 1  # the constant is shifted only
    assert_close((state["mean"].numpy() - TABLE.mean(axis=0)) / std, 0, 1e-3)
    assert_close(state["std"].numpy() / std, 1, 1e-6)


def test_a_table_without_a_header_keeps_its_first_row(run, tmp_path):
    data = tmp_path / "table.csv"
    np.savetxt(data, SHIFTED, delimiter=",")
    remark, *lines = run(train_basic, "--data", data)
    assert remark == f"{data}: line 1 is a row of numbers"
    judge(lines, None, SHIFTED, batch_size=32)


ONES = np.ones((3, 2))
NO_TABLES = [  # what is in the file, and what the message must say
    (b"", "line 1 is empty"),
    (b"\na,b\n1,2\n", "line 1 is empty"),
    (
        b"a,b\n1,2\n\n3,x\n",
        "line 4: could not convert string to float: 'x'; needed: ",
    ),
    (b"a,1\n1,2\n", "line 1: could not convert string to float: 'a'"),
    (b"a,b\n1,0,2\n", "line 2: 3 columns, not 2; needed: "),
    (b"a;b\n1;2\n", "line 2: could not convert string to float: '1;2'; needed: "),
    (b"a;b\n1,5;2,5\n", "line 2: 3 columns, not 1; needed: a .npy of numbers, or"),
    (b"1,2\n1_0,2\n", "line 2: could not convert to numbers: ['1_0', '2']"),
    (b"1,2\n1,0#2\n", "line 2: could not convert string to float: '0#2'"),
    (b"a,b\n1,2\n3,nan\n", "row 2, column 2: nan is not below 1e150"),
    (b"a,b\n-inf,2\n", "row 1, column 1: -inf is not below 1e150"),
    (b"a,b\n1,2\n3,2e200\n", "row 2, column 2: 2e+200 is not below 1e150"),
    (b"a,b\n1,2e-200\n3,4e-200\n", "the target is the same in all rows"),
    (b",a,b\n0,1,2\n", "index=False in pandas, row.names=FALSE in R"),
    (b"1,2\n3,2\n", "the target is the same in all rows"),
    (b"a,b\n", "an array of shape (0, 2) is no table"),
    (b"a\n1\n", "an array of shape (1, 1) is no table"),
    ("a,b\n1,2\n".encode("utf-16"), "can't decode byte 0xff"),
    (np.ones(3), "an array of shape (3,) is no table"),
    (ONES[:0], "an array of shape (0, 2) is no table"),
    (ONES.astype("M8[D]"), "dtype('<M8[D]')"),
    (ONES.astype(complex), "dtype('complex128')"),
    (ONES.astype(str), "dtype('<U32')"),
    (ONES.astype(object), "Object arrays cannot be loaded"),
]


@parametrize("content, said", NO_TABLES)
def test_what_is_no_table_is_refused_with_the_place(refused, tmp_path, content, said):
    if isinstance(content, bytes):
        data = tmp_path / "table.csv"
        data.write_bytes(content)
    else:
        data = tmp_path / "table.npy"
        np.save(data, content)
    error = refused(train_basic, "--data", data)
    assert f"error: --data {data}: " in error
    assert said in error


@parametrize(
    "name, said", [("a.gz", "gzipped"), ("a.npy", "magic"), ("b", "No such file")]
)
def test_a_file_of_another_kind_than_its_name_is_refused(refused, tmp_path, name, said):
    (tmp_path / "a.gz").write_bytes(b"a,b\n1,2\n")
    (tmp_path / "a.npy").write_bytes(b"a,b\n1,2\n")
    assert said in refused(train_basic, "--data", tmp_path / name)


# ---- flags and messages
WRONG_FLAGS = [
    ("--batch-size=0", "argument --batch-size: 0 is not from 1 to 2147483647"),
    ("--batch-size=1.5", "argument --batch-size: invalid whole_number value: '1.5'"),
    ("--accumulation-steps=0", "argument --accumulation-steps: 0 is not from 1"),
    ("--rows=0", "argument --rows: 0 is not from 1"),
    ("--rows=2147483648", "argument --rows: 2147483648 is not from 1 to 2147483647"),
    ("--epochs=0", "argument --epochs: 0 is not from 1"),
    ("--hidden=-1", "argument --hidden: -1 is not from 0"),
    ("--seed=-1", "argument --seed: -1 is not from 0"),
    ("--log-every=-1", "argument --log-every: -1 is not from 0"),
    ("--lr=0", "argument --lr: 0 is not above 0"),
    ("--lr=nan", "argument --lr: nan is not above 0"),
    ("--lr=inf", "argument --lr: inf is not above 0"),
    ("--lr=x", "argument --lr: invalid learning_rate value: 'x'"),
    ("--batch=4", "unrecognized arguments: --batch=4"),
    ("--data=", "a file needs a name"),
    ("--checkpoint=", "a file needs a name"),
    ("--data=table.csv --rows=9", "argument --rows: not allowed with argument --data"),
    ("--device=tpu", "argument --device: tpu is not here"),
    ("--device=cuda:99", "argument --device: cuda:99 is not here"),
    ("--checkpoint=missing/run.pt", "a folder that can be written to is needed"),
    ("--checkpoint=.", ": Is a directory"),
    ("--data=http://127.0.0.1/table.csv", "No such file or directory"),
    ("--lr=1e30", "error: epoch 1: a weight is not finite; try a lower --lr"),
]


@parametrize("flags, said", WRONG_FLAGS)
def test_a_wrong_flag_is_refused(refused, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(train_accum, *flags.split())
    assert os.listdir() == []


def test_only_train_accum_has_accumulation_steps(refused):
    for script in (train_basic, train_manual):
        assert "unrecognized arguments" in refused(script, "--accumulation-steps=2")


@posix
@parametrize("script, name", list(zip(SCRIPTS, ["SIGINT", "SIGPIPE", "SIGINT"])))
def test_lines_come_at_once_and_signals_end_a_program(tmp_path, script, name):
    flags = ["--epochs=5000"]
    if name == "SIGINT":
        flags += ["--log-every=0"]  # too few lines to fill a buffer
    process = start(tmp_path, sys.executable, script.__file__, *flags)
    assert " rows, " in process.stdout.readline()
    if name == "SIGINT":
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(HANG) == -getattr(signal, name)
    process.stderr.close()


def test_main_runs_in_a_thread_with_another_stdout():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for script in SCRIPTS:
            thread = threading.Thread(target=script.main, args=[["--log-every=0"]])
            thread.start()
            thread.join()
    assert out.getvalue().count("Loss of all rows: 0.0") == 3


def test_a_notebook_keeps_its_output_and_signals():
    with contextlib.redirect_stdout(io.StringIO()):
        common.init_program()
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_peak_memory_is_what_the_system_counts():
    resource = pytest.importorskip("resource")
    peak = re.match(r"(\d+) MiB", common.peak_memory(torch.device("cpu")))
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peak is None or 100 < int(peak[1]) < 1.1 * counted


# ---- edits, as users make them in a copy
MODEL = "common.make_model(X.shape[1], args.hidden)"
NORM = "torch.nn.Sequential(torch.nn.LayerNorm(10), torch.nn.Linear(10, 1))"
DROPOUT = "torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(10, 1))"
FROZEN = "torch.nn.Sequential(torch.nn.BatchNorm1d(10).eval(), torch.nn.Linear(10, 1))"
OPTIMIZER = "torch.optim.SGD(model.parameters(), lr=args.lr)"
ADAMW = "torch.optim.AdamW(model.parameters(), lr=args.lr)"
PARTS = '    parts = {"model": model, "optimizer": optimizer}'
STEP = "            optimizer.step()\n"


def with_schedule(schedule, change=""):
    """Return the edits that add a schedule, and what `change` does before each step."""
    return [
        (PARTS, f"    scheduler = torch.optim.lr_scheduler.{schedule}\n{PARTS}"),
        (PARTS, PARTS.replace("}", ', "scheduler": scheduler}')),
        (STEP, f"{change}{STEP}            scheduler.step()\n"),
    ]


def resumed_is_whole(run, folder, script, *flags):
    """Check that a stop after two of four epochs changes no bit.

    Return the weights, and the loss in the last line.
    """
    whole, halves = folder / "whole.pt", folder / "halves.pt"
    for file in (whole, halves):
        file.unlink(missing_ok=True)
    lines = run(script, "--epochs=4", "--checkpoint", whole, *flags)
    run(script, "--epochs=2", "--checkpoint", halves, *flags)
    more_lines = run(script, "--epochs=4", "--checkpoint", halves, *flags)
    _, *more_steps, _ = more_lines
    assert lines[1:-1][len(lines) - len(more_lines) :] == more_steps
    assert_equal(file_weights(halves), file_weights(whole))
    return file_weights(whole), read_last(lines[-1])


def test_all_of_ones_own_takes_the_same_steps_and_goes_on(run, tmp_path):
    clip = "            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n"
    own = [(MODEL, NORM), (OPTIMIZER, ADAMW)]
    own += with_schedule("CosineAnnealingLR(optimizer, T_max=132)", clip)
    basic, accum, manual = (
        resumed_is_whole(run, tmp_path, edited(script, *own), "--rows=1037")[0]
        for script in SCRIPTS
    )
    assert_equal(manual, basic)
    assert_close(accum, basic, 1e-5)


@each_script
def test_dropout_draws_the_same_masks_after_going_on(run, tmp_path, script):
    """The last line's loss is without dropout."""
    script = edited(script, (MODEL, DROPOUT))
    weights, loss = resumed_is_whole(run, tmp_path, script)
    X, y = standardise(make_table(1000))
    assert_close(loss, np.mean((X @ weights - y) ** 2), 2e-5)


@each_script
def test_a_frozen_layer_stays_frozen(run, tmp_path, script):
    file = tmp_path / "run.pt"
    run(edited(script, (MODEL, FROZEN)), "--checkpoint", file)
    state = torch.load(file)["model"]
    assert_equal(state["0.running_mean"].numpy(), np.zeros(10))
    assert_equal(state["0.num_batches_tracked"].item(), 0)


def test_without_the_marked_lines_it_is_a_script_for_one_process(judged):
    text = pathlib.Path(train_accum.__file__).read_text(encoding="utf-8")
    marked = [line for line in text.splitlines() if "# processes" in line]
    script = edited(train_accum, *((f"{line}\n", "") for line in marked))
    judged(script, rows=1037)
    assert not {"rank", "world_size"} & set(script.main.__code__.co_varnames)
    assert not hasattr(script, "DistributedDataParallel")


IMAGES = "torch.linspace(-1, 1, 77 * 16).view(77, 1, 4, 4)"
LAYERS = "torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(16, 5))"
OWN_DATA = [  # targets, loss function
    ("torch.arange(77) % 5", "torch.nn.functional.cross_entropy"),
    ("torch.arange(77 * 5).view(77, 5) % 7 / 7", "torch.nn.functional.mse_loss"),
]


@parametrize("targets, loss_fn", OWN_DATA)
def test_data_of_ones_own_take_a_line_each(run, tmp_path, targets, loss_fn):
    edits = [
        ("common.get_data(args)", f"{IMAGES}, {targets}, {{'checksum': 1}}"),
        (MODEL, LAYERS),
        ("F.mse_loss", loss_fn),
    ]
    basic, loss = resumed_is_whole(run, tmp_path, edited(train_basic, *edits))
    accum, _ = resumed_is_whole(run, tmp_path, edited(train_accum, *edits))
    assert_close(accum, basic, 1e-5)
    model = eval(LAYERS)
    nn.utils.vector_to_parameters(torch.from_numpy(basic), model.parameters())
    expected = eval(loss_fn)(model(eval(IMAGES)), eval(targets))
    assert_close(loss, expected.item(), 2e-5)


class Numbers(torch.utils.data.Dataset):
    """Random inputs, drawn by a DataLoader's workers."""

    def __getitem__(self, rows):
        return torch.rand(len(rows), 10), torch.zeros(len(rows), 1)


@posix
def test_workers_draw_other_numbers_in_each_epoch_and_the_same_after_going_on(
    run, tmp_path
):
    loader = "TensorDataset(X, y), batch_size=None"
    script = edited(
        train_basic,
        (loader, "Numbers(), num_workers=1, batch_size=None"),
        (STEP, f"{STEP}            print(inputs.sum())\n"),
    )
    script.Numbers = Numbers
    resumed_is_whole(run, tmp_path, script, "--rows=32")
    numbers = run(script, "--rows=32", "--log-every=0")[1:-1]
    assert len(set(numbers)) == 10  # as many as epochs


# ---- checkpoint
def contents(folder):
    """Return the bytes of all files in a folder."""
    return {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}


@posix
def test_after_a_kill_the_same_command_goes_on(run, tmp_path):
    file = tmp_path / "run.pt"
    flags = ["--rows=100", f"--checkpoint={file}"]
    long = [*FLAGS, *SIZES["train_accum"], *flags, "--epochs=9999"]
    process = start(tmp_path, sys.executable, train_accum.__file__, *long)
    while not file.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    done = torch.load(file)["epoch"]
    lines = run(train_accum, f"--epochs={done + 2}", *flags)
    sizes = {"batch_size": 8, "accumulation_steps": 4}
    judge(lines, file, make_table(100), epochs=done + 2, done=done, **sizes)


def test_a_file_is_replaced_once_it_is_whole_on_the_disk(run, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    file, old, link = (tmp_path / name for name in ("real/run.pt", "old", "link.pt"))
    link.symlink_to(file)
    run(train_basic, "--epochs=1", "--checkpoint", link)
    before = file.read_bytes()
    os.link(file, old)  # the same bytes, for as long as none is written into them
    sizes = []

    def fsync(descriptor):
        assert file.read_bytes() == before
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    run(train_basic, "--epochs=2", "--checkpoint", link)
    assert sizes == [file.stat().st_size]
    assert old.read_bytes() == before
    assert file.read_bytes() != before
    assert link.is_symlink()
    assert os.listdir(tmp_path / "real") == ["run.pt"]


@parametrize("size", [100, 5000])  # torch and Python tell it in other ways
@parametrize("first", [True, False])
@posix
def test_a_full_disk_is_told_and_leaves_what_was_there(
    refused, run, tmp_path, first, size
):
    resource = pytest.importorskip("resource")
    flags = ["--hidden=999", "--checkpoint", tmp_path / "run.pt"]
    if not first:
        run(train_basic, "--epochs=1", *flags)
    before = contents(tmp_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        error = refused(train_basic, "--epochs=2", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert f"run.pt: epoch {1 if first else 2} is not saved: [Errno 27]" in error
    assert contents(tmp_path) == before


def test_two_runs_on_one_file_do_not_share_a_temporary_one(run, tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    weights = []

    def run_another(descriptor):
        monkeypatch.undo()
        run(train_basic, "--epochs=1", "--checkpoint", file)
        weights.append(file_weights(file))

    monkeypatch.setattr(os, "fsync", run_another)
    run(train_basic, "--epochs=1", "--checkpoint", file)
    assert_equal(file_weights(file), weights[0])
    assert os.listdir(tmp_path) == ["run.pt"]


def test_every_weight_has_to_be_finite(tmp_path):
    parts = {"model": nn.Linear(9, 1)}
    args = types.SimpleNamespace(checkpoint=tmp_path / "run.pt")
    weight = parts["model"].weight.data.fill_(3e38)  # its square overflows
    common.save_checkpoint(args, "", {}, 1, parts)
    weight[0, 0] = torch.nan
    with pytest.raises(SystemExit, match="epoch 2: a weight is not finite"):
        common.save_checkpoint(args, "", {}, 2, parts)
    assert torch.load(args.checkpoint)["epoch"] == 1


GROUPS = """torch.optim.SGD(
        [{"params": model.weight}, {"params": model.bias, "lr": 0.5}], lr=args.lr
    )"""
COSINE = with_schedule("CosineAnnealingLR(optimizer, T_max=args.epochs)")
FREEZE = [(PARTS, f"    model.bias.requires_grad = False\n{PARTS}")]
DOUBLE = [(MODEL, f"{MODEL}.double()"), ("(X, y)", "(X.double(), y.double())")]
DOUBLE += [("parts, X, y,", "parts, X.double(), y.double(),")]
SWAPPED = [("model.parameters()", "list(model.parameters())[::-1]")]
TENSOR_LR = [("lr=args.lr", "lr=torch.tensor(args.lr)")]
EVAL = [(PARTS, f"    model.eval()\n{PARTS}")]
MOMENTUM = [("args.lr)", "args.lr, momentum=0.9)")]
CHANGES = [  # edits and flags of the second run, and what is told of the first
    param([], "--lr=0.1", "-'lr': 0.01,", "+'lr': 0.1,", id="rate"),
    param([], "--seed=1", "-'seed': 0,", "+'seed': 1,", id="seed"),
    param([], "--rows=999", "-{'data': '1000 ro", "+{'data': '999 ro", id="data"),
    param([], "--hidden=4", "-'model': ['Linear", "+'  (1): ReLU()", id="model"),
    param([], "--batch-size=9", "-'rows per step': 32", "+'rows per step': 9"),
    param([(OPTIMIZER, ADAMW)], "", "'class': 'SGD',", "'class': 'AdamW',", id="AdamW"),
    param([(OPTIMIZER, GROUPS)], "", "-'params': [0, 1]", "+'lr': 0.5,", id="groups"),
    param(MOMENTUM, "", "-'momentum': 0,", "+'momentum': 0.9,", id="momentum"),
    param(FREEZE, "", "torch.float32 (1, 10)', 'b", "(1, 10)']", id="freeze"),
    param(DOUBLE, "", "'weight torch.float32 (", "'weight torch.float64 (", id="dtype"),
    param(SWAPPED, "", "-'weights': [['weight', 'b", "+'weights': [['bias', 'w"),
    param(TENSOR_LR, "--lr=0.01004", "", "+'lr': 0.010040000081062317", id="tensor"),
    param(EVAL, "", "'in eval()': [],", "'in eval()': [''],", id="eval"),
    param(COSINE, "", "+'initial_lr': 0.01,", "+'scheduler': {'T_max': 10,"),
]


@pytest.fixture
def nothing_loads(monkeypatch):
    """Let it be an error to load anything into a model, optimizer or schedule."""
    monkeypatch.delattr(nn.Module, "load_state_dict")
    monkeypatch.delattr(torch.optim.Optimizer, "load_state_dict")


@parametrize("edits, flags, old, new", CHANGES)
def test_each_change_of_a_setting_is_told_and_refused(
    run, refused, nothing_loads, tmp_path, edits, flags, old, new
):
    file = f"--checkpoint={tmp_path / 'run.pt'}"
    run(train_basic, file)
    before = contents(tmp_path)
    error = refused(edited(train_basic, *edits), file, *flags.split())
    told = re.sub("(?m)^([-+]) *", r"\1", error)
    assert "its settings (-) are not those of this run (+)" in error
    assert old in told
    assert new in told
    assert contents(tmp_path) == before
    if edits:  # and the other way round
        run(edited(train_basic, *edits), f"{file}.edited")
        assert "(-) are not" in refused(train_basic, f"{file}.edited")


def test_a_schedule_made_for_fewer_epochs_is_refused(run, refused, tmp_path):
    file = f"--checkpoint={tmp_path / 'run.pt'}"
    script = edited(train_basic, *COSINE)
    run(script, file)
    error = refused(script, file, "--epochs=20")
    assert re.search(r"\n-.*'T_max': 10,\n\+.*'T_max': 20,$", error)


def test_fewer_epochs_than_are_done_are_refused(run, refused, tmp_path):
    file = f"--checkpoint={tmp_path / 'run.pt'}"
    run(train_basic, file)
    error = refused(train_basic, file, "--epochs=9")
    assert "run.pt: 10 epochs are done; raise --epochs" in error


OTHER_TARGETS = np.c_[TABLE[:, :-1], TABLE[::-1, -1]]


@parametrize("other", [TABLE * 1024, TABLE[::-1], OTHER_TARGETS])
def test_other_numbers_in_the_data_are_refused(run, refused, tmp_path, other):
    data = tmp_path / "table.npy"
    flags = [f"--data={data}", f"--checkpoint={tmp_path / 'run.pt'}"]
    np.save(data, TABLE)
    run(train_basic, *flags)
    np.save(data, other)
    assert "+{'data': '40 rows, crc32 " in refused(train_basic, *flags)


NUMPY_NUMBERS = [
    [("lr=args.lr", "lr=np.float64(args.lr)")],
    with_schedule("LambdaLR(optimizer, np.cos)"),
]


@parametrize("edits", NUMPY_NUMBERS)
def test_numbers_of_numpy_are_refused_at_the_first_save(refused, tmp_path, edits):
    script = edited(train_basic, *edits)
    script.np = np
    error = refused(script, "--checkpoint", tmp_path / "run.pt")
    assert "epoch 1 is not saved: torch.load would refuse it." in error
    assert os.listdir(tmp_path) == []


class Code:
    def __reduce__(self):
        return open, ("opened", "w")  # a pickle may do this when it is loaded


FOREIGN = [
    param(torch.ones(3), "(TypeError)", id="tensor"),
    param({"weights": 1}, "(KeyError)", id="no settings"),
    param({"settings": {"lr": 0.1}, "epoch": 1}, "(AttributeError)", id="of old"),
    param(Code(), "(UnpicklingError)", id="code"),
]


@parametrize("content, said", FOREIGN)
def test_a_foreign_file_is_refused_and_kept(
    refused, tmp_path, monkeypatch, content, said
):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "run.pt")
    before = contents(tmp_path)
    error = refused(train_basic, "--checkpoint=run.pt")
    assert "run.pt: damaged, or of another program" in error
    assert said in error
    assert "weights_only" not in error
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_is_refused(run, refused, tmp_path):
    file = tmp_path / "run.pt"
    run(train_basic, "--checkpoint", file)
    whole = file.read_bytes()
    weight = torch.load(file)["model"]["weight"].numpy().tobytes()
    for content in (b"", whole[:-9], whole.replace(weight, bytes(40))):
        file.write_bytes(content)
        error = refused(train_basic, "--checkpoint", file)
        assert "run.pt: damaged, or of another program" in error


# ---- device and processes
DEVICES = [  # accelerators, processes, --device, what the second process gets
    (0, 1, "auto", "cpu"),
    (1, 1, "auto", "cuda:0"),
    (1, 1, "cpu", "cpu"),
    (1, 2, "auto", "cpu"),
    (2, 2, "auto", "cuda:1"),
    (2, 2, "cuda", "cuda:1"),
    (2, 1, "cuda:1", "cuda:1"),
]


@pytest.fixture
def accelerators(monkeypatch):
    """Return a function that makes believe in so many GPUs and processes."""

    def accelerators(count, processes):
        monkeypatch.setenv("LOCAL_RANK", "1")  # left over, if there is one process
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("WORLD_SIZE", "2")
        device = torch.device("cuda") if count > 0 else None
        launched, accelerator = "is_torchelastic_launched", torch.accelerator
        monkeypatch.setattr(torch.distributed, launched, lambda: processes > 1)
        monkeypatch.setattr(accelerator, "device_count", lambda: count)
        monkeypatch.setattr(accelerator, "current_accelerator", lambda **_: device)

    return accelerators


@parametrize("count, processes, name, device", DEVICES)
def test_each_process_has_an_accelerator_or_all_have_the_cpu(
    accelerators, count, processes, name, device
):
    accelerators(count, processes)
    assert common.pick_device(name) == torch.device(device)


@parametrize("count, seen", [(0, "no GPU, only cpu"), (2, "cpu, cuda:0, cuda:1")])
def test_a_missing_device_is_told_with_those_that_are_here(
    accelerators, refused, count, seen
):
    accelerators(count, 1)
    error = refused(train_basic, "--device=cuda:7")
    assert f"cuda:7 is not here; torch {torch.__version__} sees {seen}\n" in error


def test_scripts_for_one_process_refuse_several(accelerators, refused):
    accelerators(0, 2)
    for script in (train_basic, train_manual):
        assert "train_accum.py for several" in refused(script)


def test_processes_with_other_flags_or_settings_are_refused(
    refused, monkeypatch, tmp_path
):
    def gather(everyone, mine):
        other = mine.replace("0.01", "0.5").replace("'epochs': 10", "'epochs': 9")
        everyone[:] = [mine, other]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    error = refused(train_accum, "--checkpoint", tmp_path / "run.pt")
    assert "error: process 0 (-) and process 1 (+) differ:" in error
    told = re.sub("(?m)^([-+]) *", r"\1", error)
    for line in ("-'epochs': 10,", "+'epochs': 9,", "-'lr': 0.01,", "+'lr': 0.5,"):
        assert line in told
    assert os.listdir(tmp_path) == []


def worker():
    """Run train_accum.py as one process of several, and write down what it did.

    If it may restart, process 1 kills itself once, in its 40th step.
    """
    rank = os.environ["RANK"]
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    may_restart = restarts < int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    reductions = []
    seeds = []

    def reduce(_, bucket):
        reductions.append(bucket.index())
        if may_restart and rank == "1" and len(reductions) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return allreduce_hook(None, bucket)

    def watched(model):
        model = DistributedDataParallel(model)
        model.register_comm_hook(None, reduce)
        model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        return model

    train_accum.DistributedDataParallel = watched
    common.init_program()
    train_accum.main()
    torch.save({"seeds": set(seeds), "reductions": len(reductions)}, f"facts{rank}.pt")


def torchrun(folder, options, flags):
    """Start processes that run worker()."""
    program = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    flags = [*FLAGS, *SIZES["train_accum"], *flags.split(), "--checkpoint=run.pt"]
    return start(folder, *program, __file__, *flags)


def finish_torchrun(process):
    """Return the lines of train_accum.py, without what PyTorch 2.9 prints in pieces."""
    ours = re.compile(r"\d+ rows, |Epoch: |Loss of all rows: ")
    return [line for line in finish(process) if ours.match(line)]


@posix
def test_a_killed_process_costs_its_epoch_at_most(tmp_path):
    options = "--nproc-per-node 2 --max-restarts 1"
    process = torchrun(tmp_path, options, "--rows=1037 --epochs=3")
    lines = finish_torchrun(process)
    restart = [" rows, " in line for line in lines].index(True, 1)
    sizes = {"batch_size": 8, "accumulation_steps": 4, "epochs": 3, "processes": 2}
    file = tmp_path / "run.pt"
    judge(lines[restart:], file, make_table(1037), done=1, **sizes)
    steps = [read_step(line) for line in lines[1:restart]]
    _, expected, _ = train_in_numpy(make_table(1037), 32, 3, 0.01, 0)
    assert 33 <= len(steps) <= 40
    assert_close(steps, expected[: len(steps)], 2e-5)
    zero, one = (torch.load(tmp_path / f"facts{rank}.pt") for rank in (0, 1))
    assert zero["reductions"] == one["reductions"] == 66  # one a step
    assert len(zero["seeds"] | one["seeds"]) == 4  # other masks of dropout


@posix
def test_two_machines_go_on_from_the_file_of_the_first(run, tmp_path):
    """A micro-batch has a single row, so one of the shares is empty."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    file = first / "run.pt"
    run(train_accum, "--rows=33", "--batch-size=1", "--epochs=1", "--checkpoint", file)
    options = f"--nnodes 2 --master-port {port} --node-rank"
    flags = "--rows=33 --batch-size=1 --epochs=3"
    machines = [
        torchrun(first, f"{options} 0", flags),
        torchrun(second, f"{options} 1", flags),
    ]
    lines, nothing = map(finish_torchrun, machines)
    sizes = {"batch_size": 1, "accumulation_steps": 4, "epochs": 3, "processes": 2}
    judge(lines, file, make_table(33), done=1, **sizes)
    assert nothing == []
    assert os.listdir(second) == ["facts1.pt"]


# ---- README
README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
INTRODUCTION, *SECTIONS = README.split("\n## ")
BLOCK = re.compile(r"^```(python|sh|diff)\n(.*?)^```", re.MULTILINE | re.DOTALL)
[(_, LOOP)] = BLOCK.findall(INTRODUCTION)
DIFFS = [block for kind, block in BLOCK.findall(README) if kind == "diff"]
TITLES = [section.partition("\n")[0] for section in SECTIONS if BLOCK.search(section)]

N_TARGETS = "sum(targets.numel() for _, targets in micro_batches)"
LABELS = "y = torch.arange(1001) % 5"
CLASSES = [
    ("F.mse_loss", "torch.nn.functional.cross_entropy"),
    ("torch.nn.Linear(10, 1)", "torch.nn.Linear(10, 5)"),
]
LOOPS = [
    param([], id="as it is"),
    param([("F.mse_loss", "F.l1_loss")], id="another loss"),
    param([("optimizer = ", f"{LABELS}\noptimizer = "), *CLASSES], id="classes"),
    param(
        [
            ("optimizer = ", f"{LABELS}; y[::3] = -100\noptimizer = "),
            (N_TARGETS, re.search("# with padding: (.*)", LOOP)[1]),
            *CLASSES,
        ],
        id="padding",
    ),
    param(
        [
            (
                "DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True)",
                "zip(X.split(8), y.split(8))",
            )
        ],
        id="another loader",
    ),
]


@parametrize("edits", LOOPS)
def test_the_loop_to_copy_takes_the_steps_of_whole_batches(edits):
    """Whole batches have the loss function's own mean."""
    block = LOOP.replace("range(10)", "range(1)")
    for old, new in edits:
        assert old in block
        block = block.replace(old, new)
    cut, whole = {}, {}
    exec(block, cut)
    block = re.sub(
        r"batch_size=8|split\(8\)", lambda size: size[0].replace("8", "32"), block
    )
    block = block.replace("steps = 4", "steps = 1")
    block = block.replace("optimizer.step()", "optimizer.step(); model.zero_grad()")
    exec(block.replace(', reduction="sum") / n_targets', ")"), whole)
    assert_close(cut["model"].weight.detach(), whole["model"].weight.detach(), 1e-5)
    assert_close(sum(cut["losses"]), sum(whole["losses"]), 1e-5)


@parametrize("diff", DIFFS)
def test_an_edit_of_the_readme_keeps_the_promise(run, tmp_path, diff):
    edits = []
    for change in diff.split("@@\n"):
        lines = change.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        edits.append((old, new))
    script = edited(train_accum, *edits)
    cut, whole = tmp_path / "cut.pt", tmp_path / "whole.pt"
    run(script, "--checkpoint", cut)
    run(script, "--checkpoint", whole, "--batch-size=32", "--accumulation-steps=1")
    tolerance = 1e-2 if "bfloat16" in diff else 1e-5
    assert_close(file_weights(cut), file_weights(whole), tolerance)


@posix
@parametrize("title", [title for title in TITLES if title != "Set-up"])
def test_the_commands_and_blocks_of_the_readme_run(run, tmp_path, monkeypatch, title):
    """Set-up's commands are the tests; .ci/run runs them."""
    monkeypatch.chdir(tmp_path)
    section = next(section for section in SECTIONS if section.startswith(title))
    for kind, block in BLOCK.findall(section):
        if kind == "python":
            exec(block, {})
        for line in block.splitlines() if kind == "sh" else []:
            program, *words = shlex.split(line)
            if "-c" in words:
                exec(words[-1], {})
            elif program == "python":
                run(sys.modules[words[0].removesuffix(".py")], *words[1:])
            else:
                words[words.index("train_accum.py")] = train_accum.__file__
                finish(
                    start(
                        tmp_path, sys.executable, "-m", "torch.distributed.run", *words
                    )
                )


if __name__ == "__main__":
    worker()
