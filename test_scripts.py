"""Tests of the promise: the same trajectory, however a batch is sliced.

    python -m pytest -q

The judge is train_in_numpy(): the steps, losses and weights of a script are compared
with it. Two processes of train_accum.py are started as worker(), which counts what each
of them does.
"""

import atexit
import contextlib
import io
import multiprocessing
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
import types
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_equal
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

    Return the steps [(epoch, step, loss)], the weights (the bias is the last), and the
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
    return steps, weights, np.mean((X @ weights - y) ** 2)


def judge(
    text,
    file,
    table,
    rows_per_step=32,
    epochs=2,
    lr=0.05,
    seed=0,
    log_every=1,
    done=0,
):
    """Compare what a run printed, and the file it wrote, with the judge.

    `done` epochs were finished before the run. `file` is None if there is none.
    """
    expected = train_in_numpy(table, rows_per_step, epochs, lr, seed)
    expected_steps, expected_weights, expected_loss = expected
    expected_steps = [
        step
        for step in expected_steps
        if step[0] > done and log_every > 0 and (step[1] - 1) % log_every == 0
    ]
    steps, loss = read(text)
    assert_close(steps, np.reshape(expected_steps, (-1, 3)), 2e-5)
    assert_close(loss, expected_loss, 2e-5)
    if file is not None:
        assert torch.load(file)["epoch"] == epochs
        assert_close(read_weights(file), expected_weights, 1e-5)


def read(text):
    """Return the steps (epoch, step, loss) and the last loss that a run printed."""
    steps = re.findall(r"Epoch: (\d+), Step: (\d+), Loss: ([\d.]+)", text)
    [loss] = re.findall(r"Loss of all rows: ([\d.]+)", text)
    return np.array(steps, dtype=float).reshape(-1, 3), float(loss)


def read_weights(file):
    """Return the model's weights in a checkpoint, as one vector."""
    weights = torch.load(file, map_location="cpu")["model"].values()
    return nn.utils.parameters_to_vector(weights).numpy()


def assert_close(found, expected, tolerance):
    assert_allclose(found, expected, rtol=0, atol=tolerance)


# ---- helpers
# All are given, so that a changed default fails in few tests: those without flags.
FLAGS = ["--hidden=0", "--epochs=2", "--lr=0.05", "--seed=0", "--log-every=1"]
FLAGS += ["--device=cpu"]
SIZES = {
    "train_basic": ["--batch-size=32"],
    "train_accum": ["--batch-size=8", "--accumulation-steps=4"],
    "train_manual": ["--batch-size=32"],
}


@pytest.fixture
def run(capsys):
    """Return a function that runs a script's main() here and returns what it prints."""

    def run(script, *flags):
        script.main([*FLAGS, *SIZES[script.__name__], *map(str, flags)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(run, capsys):
    """Return a function like run() for what must not run; it returns the error."""

    def refused(script, *flags):
        with pytest.raises(SystemExit) as end:
            run(script, *flags)
        assert end.value.code != 0
        return capsys.readouterr().err + str(end.value.code)

    return refused


def edited(script, *edits):
    """Return a copy of a script in which old lines are replaced with new ones."""
    text = pathlib.Path(script.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, f"{script.__name__} has no {old!r} to edit"
        text = text.replace(old, new)
    copy = types.ModuleType(script.__name__)
    exec(text, copy.__dict__)
    return copy


def start(folder, *command):
    """Start a process; finish() or a kill must follow."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
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
    return out


def contents(folder):
    """Return the bytes of all files in a folder."""
    return {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}


# ---- the promise
def test_each_script_runs_without_flags(tmp_path):
    processes = [start(tmp_path, script.__file__) for script in SCRIPTS]
    for process, rows_per_step in zip(processes, [32, 8 * 4, 16]):
        sizes = {"rows_per_step": rows_per_step, "epochs": 10, "log_every": 10}
        judge(finish(process), None, make_table(1000), lr=0.01, **sizes)
    assert os.listdir(tmp_path) == []


@each_script
def test_a_script_has_help(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert script.__doc__ in text
    assert "rows of synthetic data (default: 1000)" in text


def test_the_lines_of_a_run(run):
    first, step, last = run(train_accum, "--rows=7", "--epochs=1").splitlines()
    assert first == (
        "7 rows, 8 x 4 per step, 1 steps per epoch, 0 of 1 epochs done; cpu, "
        f"processes: 1, torch {torch.__version__}, seed 0"
    )
    number = r"\d+\.\d{6}"
    assert re.fullmatch(f"Epoch: 1, Step: 1, Loss: {number}", step)
    memory = r"(\d+ MiB of the process|unknown)"
    end = f"Loss of all rows: {number}, " + r"\d+\.\d{3} s, peak memory " + memory
    assert re.fullmatch(end, last)


CUTS = [(train_accum, cut) for cut in [(8, 4), (1, 32), (32, 1), (7, 3), (400, 4)]]
CUTS += [
    (script, (size, 1))
    for script in (train_basic, train_manual)
    for size in (1, 32, 50)
]


@parametrize("rows", [1, 2, 31, 32, 33, 1037])
@parametrize("script, cut", CUTS)
def test_each_cut_takes_the_steps_of_the_judge(run, tmp_path, script, cut, rows):
    file = tmp_path / "run.pt"
    flags = [f"--rows={rows}", f"--checkpoint={file}", f"--batch-size={cut[0]}"]
    if script is train_accum:
        flags += [f"--accumulation-steps={cut[1]}"]
    judge(run(script, *flags), file, make_table(rows), cut[0] * cut[1])


@each_script
@parametrize("log_every", [0, 3])
def test_seed_rate_and_lines_are_those_of_the_flags(run, tmp_path, script, log_every):
    file = tmp_path / "run.pt"
    flags = ["--seed=7", "--lr=0.002", "--epochs=3", f"--log-every={log_every}"]
    text = run(script, *flags, "--rows=300", "--checkpoint", file)
    judge(text, file, make_table(300), 32, 3, lr=0.002, seed=7, log_every=log_every)


@parametrize("hidden", [1, 3])
def test_a_hidden_layer_has_so_many_relu_units(run, tmp_path, hidden):
    for script in SCRIPTS:
        file = tmp_path / script.__name__
        flags = [f"--hidden={hidden}", "--rows=100", f"--checkpoint={file}"]
        _, loss = read(run(script, *flags))
        state = torch.load(file)["model"].values()
        w0, b0, w1, b1 = (weights.double().numpy() for weights in state)
        X, y = standardise(make_table(100))
        outputs = np.maximum(0, X[:, :-1] @ w0.T + b0) @ w1[0] + b1
        assert b0.shape == (hidden,)
        assert_close(loss, np.mean((outputs - y) ** 2), 2e-5)
        assert_close(read_weights(file), read_weights(tmp_path / "train_basic"), 1e-6)


def test_a_script_goes_on_from_the_file_of_another(run, tmp_path):
    file = tmp_path / "run.pt"
    for done, script in enumerate([train_basic, train_accum, train_manual]):
        flags = ["--rows=100", f"--epochs={done + 1}", f"--checkpoint={file}"]
        text = run(script, *flags)
        judge(text, file, make_table(100), epochs=done + 1, done=done)
    judge(run(script, *flags), file, make_table(100), epochs=3, done=3)


@each_script
def test_each_epoch_ends_with_a_file(run, tmp_path, monkeypatch, script):
    """The next epoch begins with its seed: then the file has the weights so far."""
    file = tmp_path / "run.pt"
    seed_epoch = common.seed_epoch
    seen = []

    def look_and_seed(seed, epoch):
        if epoch > 0:
            _, weights, _ = train_in_numpy(make_table(100), 32, epoch, 0.05, 0)
            assert_close(read_weights(file), weights, 1e-5)
        seen.append(epoch)
        seed_epoch(seed, epoch)

    monkeypatch.setattr(common, "seed_epoch", look_and_seed)
    run(script, "--rows=100", "--epochs=3", "--checkpoint", file)
    assert seen == [0, 1, 2]
    assert torch.load(file)["epoch"] == 3


def test_an_epoch_has_random_numbers_of_its_own_and_the_same_again():
    numbers = []
    for seed, epoch in [(0, 1), (0, 1), (1, 0), (0, 2)]:
        common.seed_epoch(seed, epoch)
        numbers.append((torch.rand(1).item(), np.random.rand(), random.random()))
    first, again, *others = map(set, numbers)
    assert first == again
    assert first.isdisjoint(set.union(*others))


# ---- edits, as users make them in a copy
MODEL = "common.make_model(X.shape[1], args.hidden)"
OPTIMIZER = "torch.optim.SGD(model.parameters(), lr=args.lr)"
PARTS = '{"model": model, "optimizer": optimizer}\n'
STEP = "            optimizer.step()\n"


def with_model(layers):
    return (MODEL, f"torch.nn.Sequential({layers}, torch.nn.Linear(10, 1))")


DROPOUT = [with_model("torch.nn.Dropout(0.5)")]
FROZEN = [with_model("torch.nn.BatchNorm1d(10).eval()")]
ALL_OF_ONES_OWN = [
    with_model("torch.nn.LayerNorm(10)"),
    (OPTIMIZER, "torch.optim.AdamW(model.parameters(), lr=args.lr)"),
    (
        PARTS,
        PARTS + "    ema = torch.optim.swa_utils.AveragedModel(model)\n"
        "    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 132)\n"
        '    parts |= {"ema": ema, "scheduler": scheduler}\n',
    ),
    (
        STEP,
        "            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n"
        + STEP
        + "            scheduler.step()\n"
        "            ema.update_parameters(parts['model'])\n",
    ),
]


def goes_on(run, folder, script, *flags):
    """Check that a stop after two of four epochs changes no bit.

    Return the weights, and the last loss.
    """
    whole, halves = folder / "whole.pt", folder / "halves.pt"
    for file in (whole, halves):
        file.unlink(missing_ok=True)
    steps, loss = read(run(script, "--epochs=4", "--checkpoint", whole, *flags))
    run(script, "--epochs=2", "--checkpoint", halves, *flags)
    more, _ = read(run(script, "--epochs=4", "--checkpoint", halves, *flags))
    assert_equal(more, steps[len(steps) // 2 :])
    states = [torch.load(file) for file in (halves, whole)]
    assert states[0].pop("settings") == states[1].pop("settings")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    return read_weights(whole), loss


@parametrize("edits", [FROZEN, ALL_OF_ONES_OWN], ids=["frozen", "all of one's own"])
def test_a_copy_takes_the_same_steps_and_goes_on(run, tmp_path, edits):
    basic, accum, manual = (
        goes_on(run, tmp_path, edited(script, *edits), "--rows=1037")[0]
        for script in SCRIPTS
    )
    assert_equal(manual, basic)
    assert_close(accum, basic, 1e-5)


@each_script
def test_a_frozen_layer_stays_frozen(run, tmp_path, script):
    file = tmp_path / "run.pt"
    run(edited(script, *FROZEN), "--checkpoint", file)
    state = torch.load(file)["model"]
    assert_equal(state["0.running_mean"].numpy(), np.zeros(10))


@each_script
def test_dropout_draws_the_same_masks_after_going_on(run, tmp_path, script):
    """The last loss is without dropout."""
    weights, loss = goes_on(run, tmp_path, edited(script, *DROPOUT), "--rows=300")
    X, y = standardise(make_table(300))
    assert_close(loss, np.mean((X @ weights - y) ** 2), 2e-5)
    _, whole_weights, _ = train_in_numpy(make_table(300), 32, 4, 0.05, 0)
    assert np.abs(weights - whole_weights).max() > 1e-3


class Numbers(torch.utils.data.Dataset):
    """Random inputs, drawn by a DataLoader's workers."""

    def __getitem__(self, rows):
        return torch.rand(len(rows), 10), torch.zeros(len(rows), 1)


@posix
def test_workers_draw_other_numbers_in_each_epoch_and_the_same_after_going_on(
    run, tmp_path
):
    loader = "DataLoader(TensorDataset(X, y), "
    edit = (loader, "DataLoader(Numbers(), num_workers=1, ")
    script = edited(
        train_basic, edit, (STEP, f"{STEP}            print(inputs.sum())\n")
    )
    script.Numbers = Numbers
    goes_on(run, tmp_path, script, "--rows=32")
    numbers = re.findall(r"tensor\(.*\)", run(script, "--rows=32", "--epochs=4"))
    assert len(set(numbers)) == 4


def test_without_the_marked_lines_it_is_a_script_for_one_process(run, tmp_path):
    file = tmp_path / "run.pt"
    text = pathlib.Path(train_accum.__file__).read_text(encoding="utf-8")
    marked = [line for line in text.splitlines() if "# processes" in line]
    script = edited(train_accum, *((f"{line}\n", "") for line in marked))
    text = run(script, "--rows=1037", "--checkpoint", file)
    judge(text, file, make_table(1037))
    assert not {"rank", "world_size"} & set(script.main.__code__.co_varnames)
    assert not hasattr(script, "DistributedDataParallel")


IMAGES = "torch.linspace(-1, 1, 77 * 16).view(77, 1, 4, 4)"
LAYERS = "torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(16, 5))"
OWN_DATA = [  # targets, loss function
    ("torch.arange(77) % 5", "torch.nn.functional.cross_entropy"),
    ("torch.arange(77 * 5).view(77, 5) % 7 / 7", "torch.nn.functional.mse_loss"),
]


@parametrize("targets, loss_fn", OWN_DATA, ids=["classes", "several targets"])
def test_data_of_ones_own_take_a_line(run, tmp_path, targets, loss_fn):
    edits = [
        ("common.get_data(args)", f"{IMAGES}, {targets}, {{}}"),
        (MODEL, LAYERS),
        ("F.mse_loss", loss_fn),
    ]
    basic, loss = goes_on(run, tmp_path, edited(train_basic, *edits))
    accum, _ = goes_on(run, tmp_path, edited(train_accum, *edits))
    assert_close(accum, basic, 1e-5)
    model = eval(LAYERS)
    nn.utils.vector_to_parameters(torch.from_numpy(basic), model.parameters())
    expected = eval(loss_fn)(model(eval(IMAGES)), eval(targets))
    assert_close(loss, expected.item(), 2e-5)


def test_main_returns_the_model_for_a_notebook(capsys):
    for script in SCRIPTS:
        model = script.main([*FLAGS, *SIZES[script.__name__]])
        _, loss = read(capsys.readouterr().out)
        X, y = standardise(make_table(1000))
        outputs = model(torch.from_numpy(X[:, :-1]).float()).detach().numpy()
        assert_close(loss, np.mean((outputs[:, 0] - y) ** 2), 2e-5)
        assert not model.training


# ---- data
# the first column is time stamps in nanoseconds, the third a constant
SHIFTED = np.random.default_rng(0).integers(-99, 99, (40, 4)) * [2.0**30, 1e-9, 0, 1]
TABLE = SHIFTED + np.array([1.7e18, 5, 0.1, 0])


def write_spreadsheet(file):
    """Write the table as a spreadsheet does: marked as UTF-8, names, \\r\\n."""
    style = {"header": '"a, b",2020-1,c,"y"', "comments": "", "newline": "\r\n"}
    np.savetxt(file, TABLE, '"%.17g"', ",", encoding="utf-8-sig", **style)


@parametrize("name", ["a.csv", "a.csv.gz", "a.csv.bz2", "a.csv.xz", "a.npy", "A.NPY"])
def test_a_file_of_any_form_is_the_same_table(run, tmp_path, name):
    """The judge has the numbers without their offsets, which must not matter."""
    data, file = tmp_path / name, tmp_path / "run.pt"
    if "csv" in name:
        write_spreadsheet(data)
    else:
        with data.open("wb") as numpy_file:
            np.save(numpy_file, TABLE)
    text = run(train_basic, "--data", data, "--checkpoint", file)
    judge(text, file, SHIFTED)
    assert text.startswith(f"{data}: line 1 is a header\n") == ("csv" in name)
    state = torch.load(file)
    std = SHIFTED.std(axis=0)
    std[2] = 1  # the constant is shifted only
    assert_close((state["mean"].numpy() - TABLE.mean(axis=0)) / std, 0, 1e-6)
    assert_close(state["std"].numpy() / std, 1, 1e-6)


def test_a_table_without_a_header_keeps_its_first_row(run, tmp_path):
    data = tmp_path / "table.csv"
    np.savetxt(data, SHIFTED, delimiter=",")
    text = run(train_basic, "--data", data)
    assert text.startswith(f"{data}: line 1 is a row of numbers\n")
    judge(text, None, SHIFTED)


NO_TABLES = [  # what is in the file, and what the error says
    ("", "rows of 2 or more numbers are needed, not (0, 1)"),
    ("a\n1\n2\n", "rows of 2 or more numbers are needed, not (2, 1)"),
    ("a,b\n1,2\n3,x\n", "could not convert string 'x' to float64 at row 1, column 2"),
    ("a,1\n1,2\n", "could not convert string 'a' to float64 at row 0, column 1"),
    ("a,b\n1,2\n3,nan\n", "column 2: a number is nan, infinite or too large"),
    ("a,b\n-inf,2\n3,4\n", "column 1: a number is nan, infinite or too large"),
    ("a,b\n1,2\n3,2\n", "the last column, the target, is the same in all rows"),
    (",a,b\n0,1,2\n1,3,4\n", "a column has no name"),
    ("a,b\n0,1,2\n1,3,4\n", "a column has no name"),
    (np.ones(3), "rows of 2 or more numbers are needed, not (3,)"),
    (np.ones((3, 2), dtype=complex), "dtype('complex128')"),
    (np.ones((3, 2), dtype=str), "dtype('<U1')"),
    (np.ones((3, 2), dtype=object), "allow_pickle"),
]


@parametrize("content, said", NO_TABLES)
def test_what_is_no_table_is_refused(refused, tmp_path, content, said):
    if isinstance(content, str):
        data = tmp_path / "table.csv"
        data.write_text(content)
    else:
        data = tmp_path / "table.npy"
        np.save(data, content)
    error = refused(train_basic, "--data", data)
    assert error.startswith(f"error: --data {data}: ")
    assert said in error


def test_a_table_that_is_not_there_is_refused(refused):
    assert "--data missing.csv: " in refused(train_basic, "--data=missing.csv")


# ---- flags and program
WRONG_FLAGS = [
    ("--batch-size=0", "argument --batch-size: 0 is below 1"),
    ("--batch-size=1.5", "argument --batch-size: invalid integer value: '1.5'"),
    ("--accumulation-steps=0", "argument --accumulation-steps: 0 is below 1"),
    ("--rows=0", "argument --rows: 0 is below 1"),
    ("--epochs=0", "argument --epochs: 0 is below 1"),
    ("--hidden=-1", "argument --hidden: -1 is below 0"),
    ("--seed=-1", "argument --seed: -1 is below 0"),
    ("--log-every=-1", "argument --log-every: -1 is below 0"),
    ("--lr=0", "argument --lr: 0 is not above 0"),
    ("--lr=nan", "argument --lr: nan is not above 0"),
    ("--lr=x", "argument --lr: invalid number value: 'x'"),
    ("--batch=4", "unrecognized arguments: --batch=4"),
    ("--device=tpu", "argument --device: tpu is not here, only cpu"),
    ("--data=table.csv --rows=9", "argument --rows: not allowed with argument --data"),
]


@parametrize("flags, said", WRONG_FLAGS)
def test_a_wrong_flag_is_refused(refused, flags, said):
    assert said in refused(train_accum, *flags.split())


def test_only_train_accum_has_accumulation_steps(refused):
    for script in (train_basic, train_manual):
        assert "unrecognized arguments" in refused(script, "--accumulation-steps=2")


@posix
def test_lines_come_at_once_and_signals_end_each_script(tmp_path):
    """Where no step is printed, the lines are too few to fill a buffer."""
    signals = [signal.SIGINT, signal.SIGPIPE, signal.SIGINT]
    flags = [["--log-every=0"], ["--log-every=1"], ["--log-every=0"]]
    processes = [
        start(tmp_path, script.__file__, "--epochs=9999", *more)
        for script, more in zip(SCRIPTS, flags)
    ]
    for process, number in zip(processes, signals):
        assert " rows, " in process.stdout.readline()
        if number == signal.SIGINT:
            process.send_signal(number)
            assert process.stdout.read() == ""
        process.stdout.close()  # `| head` does, too
        assert process.stderr.read() == ""
        assert process.wait(HANG) == -number
        process.stderr.close()


def test_main_runs_in_a_thread_with_another_stdout():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        common.init_program()  # leaves a notebook's signals
        for script in SCRIPTS:
            thread = threading.Thread(target=script.main, args=[FLAGS])
            thread.start()
            thread.join()
    assert out.getvalue().count("Loss of all rows: 0.0") == 3
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL


def test_peak_memory_is_what_the_system_counts():
    resource = pytest.importorskip("resource")
    peak = re.match(r"(\d+) MiB", common.peak_memory(torch.device("cpu")))
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert peak is None or 100 < int(peak[1]) < 1.1 * counted


# ---- checkpoint
def save(file, model, epochs=1, **parts):
    """Save a model and other parts."""
    args = types.SimpleNamespace(checkpoint=str(file))
    common.save_checkpoint(args, "settings", {"model": model, **parts}, epochs)


def test_a_file_is_replaced_once_it_is_whole_on_the_disk(tmp_path, monkeypatch):
    file, old = tmp_path / "run.pt", tmp_path / "old.pt"
    save(file, nn.Linear(9, 1))
    before = file.read_bytes()
    os.link(file, old)  # the same bytes, for as long as none is written into them
    sizes = []

    def fsync(descriptor):
        assert file.read_bytes() == before
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    save(file, nn.Linear(99, 1), epochs=2)
    assert sizes == [file.stat().st_size]
    assert old.read_bytes() == before
    assert torch.load(file)["epoch"] == 2
    assert sorted(os.listdir(tmp_path)) == ["old.pt", "run.pt"]


def test_a_link_stays_a_link(run, tmp_path):
    file, link = tmp_path / "run.pt", tmp_path / "link.pt"
    link.symlink_to(file)
    run(train_basic, "--checkpoint", link)
    assert link.is_symlink()
    assert torch.load(file)["epoch"] == 2


@posix
@parametrize("size", [100, 5000])  # torch and Python tell it in other ways
def test_a_full_disk_is_told_and_leaves_what_was_there(run, refused, tmp_path, size):
    resource = pytest.importorskip("resource")
    file = tmp_path / "run.pt"
    flags = ["--hidden=999", "--lr=0.001", f"--checkpoint={file}"]
    run(train_basic, *flags)
    before = file.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        error = refused(train_basic, "--epochs=3", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert (
        f"error: --checkpoint {file}: epoch 3 is not saved; is the disk full? " in error
    )
    assert file.read_bytes() == before


def test_a_folder_that_is_not_there_is_told_before_the_training(refused, capsys):
    error = refused(train_basic, "--checkpoint=missing/run.pt", "--log-every=1")
    assert "run.pt: there is no such folder" in error
    assert capsys.readouterr().out == ""


def test_every_weight_has_to_be_finite(tmp_path):
    file, model = tmp_path / "run.pt", nn.Linear(9, 1)
    model.weight.data.fill_(3e38)  # the sum would overflow
    save(file, model)
    model.weight.data[0, 8] = torch.nan
    with pytest.raises(SystemExit, match="error: epoch 2: a weight is not finite"):
        save(file, model, epochs=2)
    assert torch.load(file)["epoch"] == 1


def test_a_diverged_run_ends_with_an_error(refused, tmp_path):
    flags = ["--lr=1e30", "--checkpoint", tmp_path / "run.pt"]
    for script in SCRIPTS:
        assert "epoch 1: a weight is not finite" in refused(script, *flags)
    assert os.listdir(tmp_path) == []


@parametrize("rate", [np.float64(0.1), lambda: 0.1], ids=["NumPy's", "a function"])
def test_what_cannot_be_loaded_again_is_refused_at_the_first_save(tmp_path, rate):
    file, model = tmp_path / "run.pt", nn.Linear(9, 1)
    save(file, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(SystemExit, match="epoch 2 is not saved: a state_dict"):
        save(file, model, epochs=2, optimizer=optimizer)
    assert torch.load(file)["epoch"] == 1


class Code:
    def __reduce__(self):
        return open, ("opened", "w")  # a pickle may do this when it is loaded


FOREIGN = {
    "a tensor": torch.ones(3),
    "no settings": {"weights": 1},
    "other settings": {"settings": {"lr": 0.1}, "epoch": 1},
    "code": Code(),
}


@parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_file_is_refused_and_kept(refused, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "run.pt")
    before = contents(tmp_path)
    error = refused(train_basic, "--checkpoint=run.pt")
    assert "run.pt: damaged, or not from here" in error
    assert "weights_only" not in error
    assert contents(tmp_path) == before


def test_a_cut_off_file_is_refused_and_kept(run, refused, tmp_path):
    file = tmp_path / "run.pt"
    run(train_basic, "--checkpoint", file)
    for content in (b"", file.read_bytes()[:-9]):
        file.write_bytes(content)
        error = refused(train_basic, "--checkpoint", file)
        assert "run.pt: damaged, or not from here" in error
        assert file.read_bytes() == content


COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)"
ADAMW = (OPTIMIZER, "torch.optim.AdamW(model.parameters(), lr=args.lr)")
SCHEDULE = (PARTS, PARTS.replace("}", f', "scheduler": {COSINE}}}'))
CHANGES = {  # an edit and a flag of the second run, and what is told of the first
    "rate": ([], "--lr=0.1", "'lr': 0.05", "'lr': 0.1"),
    "seed": ([], "--seed=1", "'seed': 0", "'seed': 1"),
    "rows per step": (
        [],
        "--batch-size=9",
        "'rows per step': 32",
        "'rows per step': 9",
    ),
    "data": ([], "--rows=999", "(1000, 10), crc32 ", "(999, 10), crc32 "),
    "model": ([], "--hidden=1", "Linear(in_features=10, out_features=1", "ReLU()"),
    "optimizer": ([ADAMW], "--lr=0.05", "'class': 'SGD'", "'class': 'AdamW'"),
    "schedule": ([SCHEDULE], "--epochs=3", "", "'T_max': 3"),
}


@parametrize("edits, flag, old, new", CHANGES.values(), ids=CHANGES.keys())
def test_other_settings_are_told_line_by_line_and_nothing_is_loaded(
    run, refused, monkeypatch, tmp_path, edits, flag, old, new
):
    file = f"--checkpoint={tmp_path / 'run.pt'}"
    run(train_basic, file)
    before = contents(tmp_path)
    monkeypatch.delattr(nn.Module, "load_state_dict")
    monkeypatch.delattr(torch.optim.Optimizer, "load_state_dict")
    first, *lines = refused(edited(train_basic, *edits), file, flag).splitlines()
    assert first == "error: settings of --checkpoint (-) and this run (+) differ:"
    assert {line[0] for line in lines} <= {"-", "+"}
    assert old in "\n".join(line for line in lines if line[0] == "-")
    assert new in "\n".join(line for line in lines if line[0] == "+")
    assert contents(tmp_path) == before


@parametrize("done, epochs", [(2, 1), (2, 2), (2, 3)])
def test_fewer_epochs_than_are_done_are_refused(run, refused, tmp_path, done, epochs):
    file = f"--checkpoint={tmp_path / 'run.pt'}"
    run(train_basic, file, f"--epochs={done}")
    if epochs < done:
        error = refused(train_basic, file, f"--epochs={epochs}")
        assert "2 epochs are done, more than --epochs" in error
    else:
        run(train_basic, file, f"--epochs={epochs}")


def test_settings_have_the_data_to_the_last_row_and_no_tensor_of_a_state():
    args = types.SimpleNamespace(seed=0, batch_size=8, accumulation_steps=4)
    model = nn.Linear(9, 1)
    X = torch.rand(50, 9)
    rate = torch.tensor(0.1)
    settings = []
    for data, lr in [(X, rate), (X + 0, 2 * rate), (X.flip(0), rate), (X[:49], rate)]:
        parts = {"model": model, "optimizer": torch.optim.Adagrad([X], lr=lr)}
        settings.append(common.get_settings(args, parts, data))
    first, same, *others = settings
    assert first == same
    assert len({first, *others}) == 3


# ---- device
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
        if processes > 1:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        device = torch.device("cuda") if count > 0 else None
        accelerator = torch.accelerator
        monkeypatch.setattr(accelerator, "device_count", lambda: count)
        monkeypatch.setattr(accelerator, "current_accelerator", lambda **_: device)

    return accelerators


@parametrize("count, processes, name, device", DEVICES)
def test_each_process_has_an_accelerator_or_all_have_the_cpu(
    accelerators, count, processes, name, device
):
    accelerators(count, processes)
    assert common.pick_device(name) == torch.device(device)


def test_a_device_that_is_not_there_is_told_with_those_that_are(accelerators, refused):
    accelerators(2, 1)
    error = refused(train_basic, "--device=cuda:7")
    assert "cuda:7 is not here, only cpu, cuda:0, cuda:1" in error


@each_script
def test_no_more_rows_than_the_batch_size_are_computed_at_once(run, script):
    rows = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[0]))
    )
    with hook:
        run(script, "--rows=100", "--batch-size=30", "--epochs=1")
    assert rows == [30, 30, 30, 10] * 2  # in training, and for the last line


# ---- processes
def worker(flags):
    """Run train_accum.py as one process of several, and return what it did.

    If it may restart, process 1 kills itself once, in its 40th step.
    """
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    may_restart = restarts < int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    rows, seeds, reductions = [], set(), []

    def count_rows(_, inputs):
        rows.append(len(inputs[0]))
        seeds.add(torch.initial_seed())

    def count_reductions(_, bucket):
        reductions.append(bucket.index())
        if may_restart and os.environ["RANK"] == "1" and len(reductions) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return allreduce_hook(None, bucket)

    def watched(model):
        model = DistributedDataParallel(model)
        model.register_forward_pre_hook(count_rows)
        model.register_comm_hook(None, count_reductions)
        return model

    train_accum.DistributedDataParallel = watched
    train_accum.main([*FLAGS, *SIZES["train_accum"], "--checkpoint=run.pt", *flags])
    atexit.unregister(torch.distributed.destroy_process_group)
    torch.distributed.destroy_process_group()
    tasks = pathlib.Path("/proc/self/task")
    threads = len(os.listdir(tasks)) if tasks.exists() else 1
    return {
        "rows": sum(rows),
        "seeds": seeds,
        "reductions": len(reductions),
        "threads": threads,
    }


def be_started(environment, folder, flags):
    """Be a process of torchrun; return what it did and printed, and its error."""
    os.environ.update(environment)
    os.chdir(folder)
    facts = {"error": None}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            facts |= worker(flags)
        except SystemExit as end:
            facts["error"] = end.code
    return facts | {"printed": out.getvalue()}


def run_processes(*processes, machines=1):
    """Start processes, each a (folder, *flags), and return what be_started() does.

    They are copies of a process that has imported torch, which saves seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    local_size = len(processes) // machines
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_scripts", "torch._dynamo"])
    with ProcessPoolExecutor(len(processes), context, max_tasks_per_child=1) as pool:
        futures = []
        for rank, (folder, *flags) in enumerate(processes):
            environment = {
                "RANK": rank,
                "WORLD_SIZE": len(processes),
                "LOCAL_RANK": rank % local_size,
                "LOCAL_WORLD_SIZE": local_size,
                "GROUP_WORLD_SIZE": machines,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_RESTART_COUNT": rank // local_size,  # of a machine
                "TORCHELASTIC_MAX_RESTARTS": 0,
            }
            environment = {name: str(value) for name, value in environment.items()}
            futures.append(pool.submit(be_started, environment, folder, flags))
        return [future.result(HANG) for future in futures]


@posix
def test_three_processes_share_each_batch(tmp_path):
    process = (tmp_path, "--rows=100", "--batch-size=7", "--accumulation-steps=3")
    facts = run_processes(process, process, process)
    judge(facts[0]["printed"], tmp_path / "run.pt", make_table(100), 21)
    assert sum(fact["rows"] for fact in facts) == 2 * 100
    assert [fact["reductions"] for fact in facts] == [2 * 5] * 3  # one a step
    assert len(set.union(*(fact["seeds"] for fact in facts))) == 2 * 3
    assert [fact["printed"] for fact in facts[1:]] == ["", ""]


@posix
def test_two_machines_go_on_from_the_file_of_the_first(run, tmp_path):
    """A micro-batch has a single row, so one of the shares is empty."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    flags = ["--rows=33", "--batch-size=1"]
    run(train_accum, *flags, "--epochs=1", f"--checkpoint={first / 'run.pt'}")
    facts = run_processes((first, *flags), (second, *flags), machines=2)
    judge(facts[0]["printed"], first / "run.pt", make_table(33), 4, done=1)
    assert sum(fact["rows"] for fact in facts) == 33
    assert os.listdir(second) == []


UNLIKE = {  # flags of two processes, and a line of the error
    "lines": (["--log-every=1"], ["--log-every=2"], "+'log_every': 2,"),
    "cut": (["--batch-size=8"], ["--batch-size=9"], "+'batch_size': 9,"),
    "data": (["--data=0.npy"], ["--data=1.npy"], "-'torch.float32 (9, 1), crc32 "),
}


@posix
@parametrize("first, second, line", UNLIKE.values(), ids=UNLIKE.keys())
def test_processes_that_are_started_unlike_end_alike(tmp_path, first, second, line):
    table = np.random.default_rng(0).random((9, 3))
    np.save(tmp_path / "0.npy", table)
    table[8, 2] = 2
    np.save(tmp_path / "1.npy", table)
    before = contents(tmp_path)
    zero, one = run_processes((tmp_path, *first), (tmp_path, *second))
    assert zero["error"] == one["error"]
    assert "error: settings of process 0 (-) and process 1 (+) differ:" in one["error"]
    assert f"\n{line}" in one["error"]
    assert contents(tmp_path) == before


@posix
def test_all_processes_end_alike_if_the_file_is_foreign(tmp_path):
    torch.save(torch.ones(3), tmp_path / "run.pt")
    zero, one = run_processes((tmp_path,), (tmp_path,))
    assert zero["error"] == one["error"]
    assert "run.pt: damaged, or not from here" in one["error"]


@posix
def test_a_killed_process_costs_its_epoch_at_most(tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    flags = ["--rows=1037", "--epochs=3", "--lr=0.01"]
    steps, loss = read(finish(start(tmp_path, *command, __file__, *flags)))
    expected, weights, last_loss = train_in_numpy(make_table(1037), 32, 3, 0.01, 0)
    restart = len(steps) - 2 * 33
    assert 33 <= restart <= 40
    assert_close(steps[:restart], expected[:restart], 2e-5)
    assert_close(steps[restart:], expected[33:], 2e-5)
    assert_close(loss, last_loss, 2e-5)
    assert_close(read_weights(tmp_path / "run.pt"), weights, 1e-5)
    zero, one = (torch.load(tmp_path / f"facts{rank}.pt") for rank in (0, 1))
    assert zero["rows"] + one["rows"] == 2 * 1037
    assert zero["reductions"] == one["reductions"] == 2 * 33
    # a thread that outlives its process group can abort the process
    assert zero["threads"] == one["threads"] == 1


@parametrize("script", [train_basic, train_manual])
def test_scripts_for_one_process_refuse_several(run, refused, monkeypatch, script):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    run(script)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "error: this script is for one process" in refused(script)


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
    pytest.param([], id="as it is"),
    pytest.param([("F.mse_loss", "F.l1_loss")], id="another loss"),
    pytest.param([("optimizer = ", f"{LABELS}\noptimizer = "), *CLASSES], id="classes"),
    pytest.param(
        [
            ("optimizer = ", f"{LABELS}; y[::3] = -100\noptimizer = "),
            (N_TARGETS, re.search("# with padding: (.*)", LOOP)[1]),
            *CLASSES,
        ],
        id="padding",
    ),
    pytest.param(
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
    assert_close(read_weights(cut), read_weights(whole), tolerance)


@posix
@parametrize("title", [title for title in TITLES if title != "Set-up"])
def test_the_commands_and_blocks_of_the_readme_run(tmp_path, monkeypatch, title):
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
                sys.modules[words[0].removesuffix(".py")].main(words[1:])
            else:
                words[words.index("train_accum.py")] = train_accum.__file__
                finish(start(tmp_path, "-m", "torch.distributed.run", *words))


if __name__ == "__main__":
    torch.save(worker(sys.argv[1:]), f"facts{os.environ['RANK']}.pt")
