"""Tests of the promise: the same trajectory, however a batch is sliced.

    python -m pytest -q

The judge is train_in_numpy(): the steps, losses and weights of a script are compared
with it. A recipe of the README is compared with a plain loop over whole batches.
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
import types
import weakref
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_equal
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import common
import train_accum
import train_basic
import train_manual

SCRIPTS = [train_basic, train_accum, train_manual]
FOLDER = pathlib.Path(__file__).parent
HANG = 900  # seconds: a process that takes longer hangs, on any machine

parametrize = pytest.mark.parametrize
each_script = parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
posix = pytest.mark.skipif(os.name != "posix", reason="signals, links or torchrun")

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


def train_in_numpy(table, rows_per_step=32, epochs=2, lr=0.05, seed=0):
    """Train the linear model by its formulas, in float64.

    Return the steps (epoch, step, loss), the weights (the bias is the last), and the
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
    return np.array(steps), weights, np.mean((X @ weights - y) ** 2)


def judge(text, file, table, *, done=0, log_every=1, **sizes):
    """Compare what a run printed, and the file it wrote, with the judge.

    `done` epochs were finished before the run. `file` is None if there is none.
    """
    expected_steps, weights, expected_loss = train_in_numpy(table, **sizes)
    printed = [row for row in expected_steps if row[0] > done and log_every > 0]
    printed = [row for row in printed if (row[1] - 1) % log_every == 0]
    steps, loss = read(text)
    assert_close(steps, np.reshape(printed, (-1, 3)), 2e-5)
    assert_close(loss, expected_loss, 2e-5)
    if file is not None:
        assert torch.load(file)["epoch"] == sizes.get("epochs", 2)
        assert_close(read_weights(file), weights)


def read(text):
    """Return the steps (epoch, step, loss) and the last loss that a run printed."""
    steps = re.findall(r"Epoch: (\d+), Step: (\d+), Loss: ([\d.]+)", text)
    [loss] = re.findall(r"Loss of all rows: ([\d.]+)", text)
    return np.array(steps, dtype=float).reshape(-1, 3), float(loss)


def read_weights(file):
    """Return the model's weights in a checkpoint, as one vector."""
    weights = torch.load(file)["model"].values()
    return nn.utils.parameters_to_vector(weights).numpy()


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def assert_close(found, expected, tolerance=1e-5):
    assert_allclose(found, expected, rtol=0, atol=tolerance)


# ---- helpers
# All flags are given, so that a changed default fails only where a script has no flags.
FLAGS = ["--hidden=0", "--epochs=2", "--lr=0.05", "--seed=0", "--log-every=1"]
FLAGS += ["--device=cpu", "--batch-size=32"]
CUT_FLAGS = [*FLAGS, "--batch-size=8", "--accumulation-steps=4"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.pt"


@pytest.fixture
def run(capsys):
    """Return a function that runs a script's main() here and returns what it prints."""

    def run(script, *flags):
        cut = script.__name__ == "train_accum"
        script.main([*(CUT_FLAGS if cut else FLAGS), *map(str, flags)])
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


@pytest.fixture
def goes_on(run, tmp_path, monkeypatch):
    """Return a function that runs a script as a whole, and killed after each epoch.

    It checks that this changes no bit, and returns the file and the last loss.
    """
    save_checkpoint = common.save_checkpoint

    def save_and_die(*args, **more):
        save_checkpoint(*args, **more)
        raise KeyboardInterrupt

    def goes_on(script, *flags, tolerance=0):
        file = tmp_path / f"{script.__name__}.pt"
        killed = tmp_path / f"{script.__name__}.killed.pt"
        flags = ["--epochs=3", *flags, "--checkpoint"]
        steps, loss = read(run(script, *flags, file))
        with monkeypatch.context() as patch:
            patch.setattr(common, "save_checkpoint", save_and_die)
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    run(script, *flags, killed)
        text = run(script, *flags, killed)  # and what was printed before
        assert_close(read(text)[0], steps, tolerance)
        states = [torch.load(killed), torch.load(file)]
        assert states[0].pop("settings") == states[1].pop("settings")
        torch.testing.assert_close(*states, rtol=0, atol=tolerance)
        return file, loss

    return goes_on


def edited(script, *edits):
    """Return a copy of a script in which old lines are replaced with new ones."""
    text = pathlib.Path(script.__file__).read_text(encoding="utf-8")
    copy = types.ModuleType(script.__name__)
    exec(replaced(text, *edits), copy.__dict__)
    return copy


def replaced(text, *edits):
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def start(folder, *command):
    """Start a Python process; finish() or a signal must follow."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        # A script's lines come at once by its own doing.
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


# ---- the promise
def test_each_script_runs_without_flags(tmp_path):
    processes = [start(tmp_path, script.__file__) for script in SCRIPTS]
    for process, size in zip(processes, [32, 8 * 4, 16]):
        sizes = {"rows_per_step": size, "epochs": 10, "lr": 0.01, "log_every": 10}
        judge(finish(process), None, make_table(1000), **sizes)
    assert os.listdir(tmp_path) == []


@each_script
def test_help_of_each_script(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert script.__doc__ in text
    assert ("--accumulation-steps" in text) == (script is train_accum)


def test_the_lines_of_a_run(run):
    first, step, last = run(train_accum, "--rows=7", "--epochs=1").splitlines()
    assert first == (
        "7 rows, 8 x 4 per step, 1 steps per epoch, 0 of 1 epochs done; cpu, "
        f"processes: 1, torch {torch.__version__}, seed 0"
    )
    assert re.fullmatch(r"Epoch: 1, Step: 1, Loss: \d\.\d{6}", step)
    end = r"Loss of all rows: \d\.\d{6}, \d+\.\d{3} s, peak memory "
    assert re.fullmatch(end + r"(\d+ MiB of the process|unknown)", last)


CUTS = [(train_accum, 8, 4), (train_accum, 1, 32), (train_accum, 7, 3)]
CUTS += [(script, size, 1) for script in SCRIPTS for size in (5, 32, 400)]


@parametrize("rows", [1, 2, 31, 32, 33, 1037])
@parametrize("script, size, steps", CUTS)
def test_each_cut_takes_the_steps_of_the_judge(run, file, script, size, steps, rows):
    flags = [f"--rows={rows}", f"--checkpoint={file}", f"--batch-size={size}"]
    if script is train_accum:
        flags += [f"--accumulation-steps={steps}"]
    judge(run(script, *flags), file, make_table(rows), rows_per_step=size * steps)


@each_script
@parametrize("log_every", [0, 3])
def test_seed_rate_and_lines_are_those_of_the_flags(run, file, script, log_every):
    flags = [f"--log-every={log_every}", "--rows=300", f"--checkpoint={file}"]
    text = run(script, *flags, "--seed=7", "--lr=0.002", "--epochs=3")
    sizes = {"seed": 7, "lr": 0.002, "epochs": 3}
    judge(text, file, make_table(300), log_every=log_every, **sizes)


@posix
def test_a_script_goes_on_from_the_file_of_another(run, file):
    link = file.with_name("link.pt")
    link.symlink_to(file)
    flags = ["--rows=100", f"--checkpoint={link}"]
    for done, script in enumerate([train_basic, train_accum, train_manual]):
        text = run(script, *flags, f"--epochs={done + 1}")
        judge(text, file, make_table(100), epochs=done + 1, done=done)
    text = run(train_basic, *flags, "--epochs=3")
    judge(text, file, make_table(100), epochs=3, done=3)
    assert link.is_symlink()


@each_script
def test_no_more_rows_than_the_batch_size_are_computed_at_once(run, script):
    rows = []
    watch = nn.modules.module.register_module_forward_pre_hook
    with watch(lambda _, inputs: rows.append(len(inputs[0]))):
        run(script, "--rows=100", "--batch-size=30", "--epochs=1")
    assert rows == [30, 30, 30, 10] * 2  # in training, and for the last line


# ---- edits, as users make them in a copy
MODEL = "common.make_model(X.shape[1], args.hidden)"
OPTIMIZER = "torch.optim.SGD(model.parameters(), lr=args.lr)"
ADAMW = (OPTIMIZER, "torch.optim.AdamW(model.parameters(), lr=args.lr)")
PARTS = '    parts = {"model": model, "optimizer": optimizer}\n'
STEP = "            optimizer.step()\n"
MORE_PARTS = """
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    parts |= {"scheduler": scheduler, "ema": torch.optim.swa_utils.AveragedModel(model)}
"""
MORE_STEPS = """
            scheduler.step()
            parts["ema"].update_parameters(model)
"""


def with_layer(layer):
    return (MODEL, f"torch.nn.Sequential({layer}, torch.nn.Linear(10, 1))")


FROZEN = with_layer("torch.nn.BatchNorm1d(10).eval()")
ONES_OWN = [
    with_layer("torch.nn.LayerNorm(10)"),
    ADAMW,
    (PARTS, PARTS + MORE_PARTS),
    (STEP, STEP + MORE_STEPS),
]
COPIES = {
    "as it is": ([], "--hidden=0"),
    "three hidden units": ([], "--hidden=3"),
    "a frozen layer": ([FROZEN], "--hidden=0"),
    "all of one's own": (ONES_OWN, "--hidden=0"),
}


@parametrize("edits, flag", COPIES.values(), ids=COPIES.keys())
def test_a_copy_takes_the_same_steps_and_goes_on(goes_on, edits, flag):
    weights = []
    for script in SCRIPTS:
        file, _ = goes_on(edited(script, *edits), "--rows=1037", flag)
        weights.append(read_weights(file))
        assert torch.load(file)["model"].get("0.num_batches_tracked", 0) == 0
    basic, accum, manual = weights
    assert_equal(manual, basic)
    assert_close(accum, basic)


@parametrize("hidden", [1, 3])
def test_a_hidden_layer_has_so_many_relu_units(hidden):
    layers = nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    assert str(common.make_model(10, hidden)) == str(nn.Sequential(*layers))


@each_script
def test_dropout_draws_the_same_masks_after_going_on(goes_on, script):
    script = edited(script, with_layer("torch.nn.Dropout(0.5)"))
    file, loss = goes_on(script, "--rows=300")
    X, y = standardise(make_table(300))
    assert_close(loss, np.mean((X @ read_weights(file) - y) ** 2))  # without dropout
    _, weights, _ = train_in_numpy(make_table(300), epochs=3)
    assert np.abs(read_weights(file) - weights).max() > 1e-3


class Numbers(torch.utils.data.Dataset):
    """Random inputs, drawn here or by a DataLoader's worker."""

    def __getitem__(self, rows):
        inputs = torch.rand(len(rows), 10) + np.random.rand() + random.random()
        return inputs, torch.zeros(len(rows), 1)


@posix
@parametrize("workers", [0, 1])
def test_random_numbers_of_a_loader_are_the_same_again(goes_on, workers):
    loader = ("(dataset, batch_size", f"(Numbers(), num_workers={workers}, batch_size")
    script = edited(train_basic, loader)
    script.Numbers = Numbers
    goes_on(script, "--rows=32")


def test_an_epoch_has_random_numbers_of_its_own_and_the_same_again():
    numbers = []
    for seed, epoch in [(0, 1), (0, 1), (1, 0), (0, 2)]:
        common.seed_epoch(seed, epoch)
        numbers.append((torch.rand(1).item(), np.random.rand(), random.random()))
    first, again, *others = map(set, numbers)
    assert first == again
    assert first.isdisjoint(set.union(*others))


def test_without_the_marked_lines_it_is_the_same_for_one_process(run, tmp_path):
    text = pathlib.Path(train_accum.__file__).read_text(encoding="utf-8")
    marked = [(f"{line}\n", "") for line in text.splitlines() if "# processes" in line]
    dropout = with_layer("torch.nn.Dropout(0.5)")
    file, file_without = tmp_path / "run.pt", tmp_path / "without.pt"
    run(edited(train_accum, dropout), "--rows=1037", "--checkpoint", file)
    script = edited(train_accum, *marked, dropout)
    run(script, "--rows=1037", "--checkpoint", file_without)
    assert_equal(read_weights(file_without), read_weights(file))
    assert not {"rank", "world_size"} & set(script.main.__code__.co_varnames)


def test_main_runs_in_a_notebook_and_in_a_thread_and_returns_the_model(file):
    with contextlib.redirect_stdout(io.StringIO()), ThreadPoolExecutor() as pool:
        for script, flags in zip(SCRIPTS, [FLAGS, CUT_FLAGS, FLAGS]):
            flags = [*flags, f"--checkpoint={file}"]
            model = pool.submit(script.main, flags).result()
            assert_equal(weights_of(model), read_weights(file))
            assert not model.training


# ---- data
# the first column is time stamps in nanoseconds, the third a constant
SHIFTED = np.random.default_rng(0).integers(-99, 99, (40, 4)) * [2.0**30, 1e-9, 0, 1]
TABLE = SHIFTED + np.array([1.7e18, 5, 0.1, 0])
FORMS = [("a.csv.gz", '"a, b",2020-1,c,"y"'), ("a.csv", ""), ("A.NPY", None)]


@parametrize("name, header", FORMS)
def test_a_file_of_any_form_is_the_same_table(run, file, name, header):
    """The judge has the numbers without their offsets, which must not matter."""
    data = file.with_name(name)
    if header is None:
        with data.open("wb") as numpy_file:
            np.save(numpy_file, TABLE)
    else:  # as a spreadsheet writes it: marked as UTF-8, with quotes
        style = {"header": header, "comments": "", "encoding": "utf-8-sig"}
        np.savetxt(data, TABLE, '"%.17g"', ",", "\r\n", **style)
    text = run(train_basic, "--data", data, "--checkpoint", file)
    judge(text, file, SHIFTED)
    assert ("line 1 is a header" in text) == bool(header)
    assert ("line 1 is a row of numbers" in text) == (header == "")
    state = torch.load(file)
    std = np.where(SHIFTED.std(axis=0) == 0, 1, SHIFTED.std(axis=0))
    assert_close((state["mean"].numpy() - TABLE.mean(axis=0)) / std, np.zeros(4))
    assert_close(state["std"].numpy() / std, np.ones(4))


NO_TABLES = [  # what is in the file, and what the error says
    ("", "rows of 2 or more numbers are needed, not (0, 1)"),
    ("a\n1\n2\n", "rows of 2 or more numbers are needed, not (2, 1)"),
    ("a,b\n1,2\n3,x\n", "could not convert string 'x' to float64 at row 1, column 2"),
    ("a,1\n1,2\n", "could not convert string 'a' to float64 at row 0, column 1"),
    ("a,b\n1,2\n3,nan\n", "column 2: a number is nan, infinite or too large"),
    ("a,b\n1,2\n3,2\n", "the last column, the target, is the same in all rows"),
    (",a,b\n0,1,2\n1,3,4\n", "a column has no name"),
    ("a,b\n0,1,2\n1,3,4\n", "a column has no name"),
    (np.ones(3), "rows of 2 or more numbers are needed, not (3,)"),
    (np.ones((3, 2), dtype=complex), "dtype('complex128')"),
    (None, "not found"),
]


@parametrize("content, said", NO_TABLES)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_what_is_no_table_is_refused(refused, tmp_path, content, said):
    data = tmp_path / "table.csv"
    if isinstance(content, str):
        data.write_text(content)
    elif content is not None:
        data = tmp_path / "table.npy"
        np.save(data, content)
    error = refused(train_basic, "--data", data)
    assert error.startswith(f"error: --data {data}: ")
    assert said in error


# ---- flags and program
WRONG_FLAGS = {  # value: flags
    "0": ["--batch-size", "--accumulation-steps", "--rows", "--epochs", "--lr"],
    "-1": ["--hidden", "--seed", "--log-every"],
    "1.5": ["--batch-size"],
    "nan": ["--lr"],
    "x": ["--lr"],
    "tpu": ["--device"],
}


@parametrize("value, flags", WRONG_FLAGS.items())
def test_a_wrong_flag_is_told_with_its_name_and_value(refused, value, flags):
    for flag in flags:
        error = refused(train_accum, f"{flag}={value}")
        assert f"argument {flag}: " in error
        assert value in error


OTHER_ENDS = [
    ("--batch=4", "unrecognized arguments: --batch=4"),
    ("--data=a.csv --rows=9", "argument --rows: not allowed with argument --data"),
    ("--checkpoint=missing/run.pt", "missing/run.pt: cannot write to its folder: "),
    ("--lr=1e30", "error: epoch 1: a weight is not finite; try a lower --lr"),
]


@parametrize("flags, said", OTHER_ENDS)
def test_an_impossible_run_is_refused(refused, tmp_path, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(train_accum, *flags.split())
    assert os.listdir() == []


@posix
def test_lines_come_at_once_and_signals_end_each_script(tmp_path):
    """No step is printed: the lines are too few to fill a buffer."""
    processes = [
        start(tmp_path, script.__file__, "--epochs=5000", "--log-every=0")
        for script in SCRIPTS
    ]
    for process in processes:
        assert " rows, " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=HANG)
        assert error.endswith("KeyboardInterrupt\n")


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


def test_a_file_is_replaced_once_it_is_whole_on_the_disk(file, monkeypatch):
    save(file, nn.Linear(9, 1))
    before = file.read_bytes()
    sizes = []

    def fsync(descriptor):
        assert file.read_bytes() == before
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    save(file, nn.Linear(99, 1), epochs=2)
    assert sizes == [file.stat().st_size]
    assert torch.load(file)["epoch"] == 2
    assert os.listdir(file.parent) == ["run.pt"]


@posix
@parametrize("size", [100, 5000])  # torch and Python report it in other ways
def test_a_full_disk_is_told_and_leaves_what_was_there(run, refused, file, size):
    resource = pytest.importorskip("resource")
    flags = ["--hidden=999", "--lr=0.001", f"--checkpoint={file}"]
    run(train_basic, *flags)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        error = refused(train_basic, "--epochs=3", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{file}: epoch 3 is not saved (" in error
    assert "the disk is full" in error
    assert os.listdir(file.parent) == ["run.pt"]
    assert file.read_bytes() == before


@parametrize("fault", [np.float64(0.1), lambda: 0.1, "a weight"])
def test_what_cannot_be_used_again_is_not_saved(file, fault):
    model = nn.Linear(9, 1)
    model.weight.data.fill_(3e38)  # finite, but the sum would overflow
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save(file, model, optimizer=optimizer)
    if fault == "a weight":
        model.weight.data[0, 8] = torch.nan
        said = "epoch 2: a weight is not finite"
    else:
        optimizer.param_groups[0]["lr"] = fault
        said = "epoch 2 is not saved .*a state_dict"
    with pytest.raises(SystemExit, match=said):
        save(file, model, epochs=2, optimizer=optimizer)
    assert torch.load(file)["epoch"] == 1


class Code:
    def __reduce__(self):
        return open, ("opened", "w")  # a pickle may do this when it is loaded


@parametrize("content", ["cut off", torch.ones(3), {"settings": {}}, Code()])
def test_a_foreign_file_is_refused_and_kept(run, refused, file, monkeypatch, content):
    monkeypatch.chdir(file.parent)
    if content == "cut off":
        run(train_basic, "--checkpoint", file)
        file.write_bytes(file.read_bytes()[:-9])
    else:
        torch.save(content, file)
    before = file.read_bytes()
    error = refused(train_basic, "--checkpoint=run.pt")
    assert "run.pt: damaged, or not from here" in error
    assert "weights_only" not in error
    assert file.read_bytes() == before
    assert os.listdir() == ["run.pt"]


CHANGES = [  # an edit and a flag of the first run, and a line of the second one's error
    ([], "--lr=0.1", "+'lr': 0.05,"),
    ([], "--seed=1", "-'seed': 1}"),
    ([], "--batch-size=9", "+'rows per step': 32,"),
    ([], "--rows=999", "-{'data': ['torch.float32 (999, 10), crc32 "),
    ([], "--hidden=1", "-'  (1): ReLU()',"),
    ([ADAMW], "--lr=0.05", "+'optimizer': {'class': 'SGD',"),
    ([(PARTS, PARTS + MORE_PARTS)], "--lr=0.05", "-'scheduler': {'T_max': 2,"),
    ([], "--epochs=3", "error: 3 epochs are done, more than --epochs"),
]


@parametrize("edits, flag, line", CHANGES)
def test_other_settings_are_refused(run, refused, monkeypatch, file, edits, flag, line):
    """They are told line by line, before anything is loaded."""
    run(edited(train_basic, *edits), "--checkpoint", file, flag)
    before = file.read_bytes()
    monkeypatch.delattr(nn.Module, "load_state_dict")
    monkeypatch.delattr(torch.optim.Optimizer, "load_state_dict")
    lines = refused(train_basic, "--checkpoint", file).splitlines()
    assert any(told.startswith(line) for told in lines)
    assert {told[0] for told in lines[1:]} <= {"-", "+"}
    assert file.read_bytes() == before


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


def believe_in(count, monkeypatch):
    """Let torch see so many GPUs."""
    device = torch.device("cuda") if count > 0 else None
    accelerator = torch.accelerator
    monkeypatch.setattr(accelerator, "device_count", lambda: count)
    monkeypatch.setattr(accelerator, "current_accelerator", lambda **_: device)


@parametrize("count, processes, name, device", DEVICES)
def test_a_process_picks_its_device(monkeypatch, count, processes, name, device):
    believe_in(count, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over, if there is one process
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if processes > 1:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert common.pick_device(name) == torch.device(device)


def test_a_device_that_is_not_there_is_told_with_those_that_are(monkeypatch, refused):
    believe_in(2, monkeypatch)
    error = refused(train_basic, "--device=cuda:2")
    assert "cuda:2 is not here, only cpu, cuda:0, cuda:1\n" in error


# ---- processes
def worker(environment, folder, flags, edits):
    """Run train_accum.py as one process of several; return what it did and printed.

    If it may restart, process 1 kills itself once, in its 40th step.
    """
    os.environ.update(environment)
    os.chdir(folder)
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    may_restart = restarts < int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    facts = {"rows": 0, "reductions": 0, "seeds": set(), "error": None}

    def count_rows(_, inputs):
        facts["rows"] += len(inputs[0])
        facts["seeds"].add(torch.initial_seed())

    def count_reductions(_, bucket):
        facts["reductions"] += 1
        if may_restart and os.environ["RANK"] == "1" and facts["reductions"] == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return allreduce_hook(None, bucket)

    def watched(model):
        model = DistributedDataParallel(model)
        model.register_forward_pre_hook(count_rows)
        model.register_comm_hook(None, count_reductions)
        return model

    script = edited(train_accum, *edits)
    script.DistributedDataParallel = watched
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            flags = [*CUT_FLAGS, "--checkpoint=run.pt", *flags]
            facts["model"] = str(script.main(flags))
        except SystemExit as end:
            facts["error"] = end.code
    facts["printed"] = out.getvalue()
    return facts


def run_processes(*processes, machines=1, edits=()):
    """Start a process for each (folder, *flags); return what worker() does.

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
            environment = {  # as from torchrun
                "RANK": str(rank),
                "WORLD_SIZE": str(len(processes)),
                "LOCAL_RANK": str(rank % local_size),
                "LOCAL_WORLD_SIZE": str(local_size),
                "GROUP_WORLD_SIZE": str(machines),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_RESTART_COUNT": str(rank // local_size),  # its machine's
                "TORCHELASTIC_MAX_RESTARTS": "0",
            }
            futures.append(pool.submit(worker, environment, folder, flags, edits))
        return [future.result(HANG) for future in futures]


@posix
def test_three_processes_share_each_batch(file):
    process = [file.parent, "--rows=100", "--batch-size=7", "--accumulation-steps=3"]
    facts = run_processes(process, process, process)
    judge(facts[0]["printed"], file, make_table(100), rows_per_step=21)
    assert sum(fact["rows"] for fact in facts) == 2 * 100
    assert [fact["reductions"] for fact in facts] == [2 * 5] * 3  # one a step
    assert len(set.union(*(fact["seeds"] for fact in facts))) == 2 * 3
    assert [fact["printed"] for fact in facts[1:]] == ["", ""]
    assert {fact["model"] for fact in facts} == {str(nn.Linear(10, 1))}


@posix
def test_two_machines_go_on_from_the_file_of_the_first(run, tmp_path):
    """A micro-batch has a single row, so one of the shares is empty."""
    machines = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        data = folder / f"{name}.npy"
        np.save(data, make_table(33))
        machines.append([folder, f"--data={data}", "--batch-size=1"])
    file = tmp_path / "first" / "run.pt"
    run(train_accum, *machines[0][1:], "--epochs=1", "--checkpoint", file)
    zero, one = run_processes(*machines, machines=2)
    judge(zero["printed"], file, make_table(33), rows_per_step=4, done=1)
    assert zero["rows"] + one["rows"] == 33
    assert os.listdir(tmp_path / "second") == ["second.npy"]


UNLIKE = [  # flags of two processes, and a line of their error
    ("--log-every=1", "--log-every=2", "+'log_every': 2,"),
    ("--batch-size=8", "--batch-size=9", "+'batch_size': 9,"),
    ("--data=0.npy", "--data=1.npy", "+'torch.float32 (9, 1), crc32 "),
    ("--checkpoint=0.npy", "--lr=0.05", "0.npy: damaged, or not from here"),
]


@posix
@parametrize("first, second, line", UNLIKE)
def test_processes_that_must_not_train_end_alike(tmp_path, first, second, line):
    table = np.random.default_rng(0).random((9, 3))
    np.save(tmp_path / "0.npy", table)
    table[[7, 8]] = table[[8, 7]]
    np.save(tmp_path / "1.npy", table)
    zero, one = run_processes((tmp_path, first), (tmp_path, second))
    assert zero["error"] == one["error"]
    assert line in one["error"]
    assert sorted(os.listdir(tmp_path)) == ["0.npy", "1.npy"]


@posix
def test_a_killed_process_costs_its_epoch_at_most(file):
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    flags = ["--rows=1037", "--epochs=3"]
    finish(start(file.parent, *command, __file__, *flags))
    zero, one = (torch.load(file.with_name(f"facts{rank}.pt")) for rank in (0, 1))
    judge(zero["printed"], file, make_table(1037), epochs=3, done=1)
    assert zero["rows"] + one["rows"] == 2 * 1037
    assert zero["reductions"] == one["reductions"] == 2 * 33  # one a step
    assert len(zero["seeds"] | one["seeds"]) == 2 * 2  # other masks of dropout
    # a thread that outlives its process group can abort the process
    assert zero["threads"] == one["threads"] == 1


@parametrize("script", [train_basic, train_manual])
def test_scripts_for_one_process_refuse_several(run, refused, monkeypatch, script):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    run(script)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "error: this script is for one process" in refused(script)


# ---- README
README = (FOLDER / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = {  # title: [(kind, block)]
    section.partition("\n")[0]: BLOCK.findall(section)
    for section in re.split("^#+ ", README, flags=re.MULTILINE)
}
LOOP = next(block for blocks in SECTIONS.values() for kind, block in blocks)
LOADER = "DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True)"
OTHER_LOADER = "list(zip(X.split(8), y.split(8)))"
LINEAR = "torch.nn.Linear(10, 1)"
NORM = "torch.nn.Sequential(torch.nn.BatchNorm1d(10), torch.nn.Linear(10, 1))"
CLASSES = [
    ("optimizer = ", "y = torch.arange(1037) % 5\noptimizer = "),
    ("F.mse_loss", "F.cross_entropy"),
    (LINEAR, "torch.nn.Linear(10, 5)"),
]
PADDING = [
    ("% 5", "% 5; y[::3] = -100"),
    ("n_targets = sum(targets.numel() for _, targets in micro_batches)", ""),
    ("# with padding: ", "n_targets = "),
]
LOOPS = {  # edits, and the loss function
    "as it is": ([], F.mse_loss),
    "another loss": ([("F.mse_loss", "F.l1_loss")], F.l1_loss),
    "another loader": ([(LOADER, OTHER_LOADER)], F.mse_loss),
    "classes": (CLASSES, F.cross_entropy),
    "padding": ([*CLASSES, *PADDING], F.cross_entropy),
    "a frozen layer": ([(LINEAR, NORM.replace("(10),", "(10).eval(),"))], F.mse_loss),
}


@parametrize("edits, loss_fn", LOOPS.values(), ids=LOOPS.keys())
def test_the_loop_to_copy_takes_the_steps_of_whole_batches(capsys, edits, loss_fn):
    block = replaced(LOOP, *edits)
    cut, whole = {}, {}
    exec(block, cut)
    setup, _, _ = block.partition("for epoch")
    exec(setup, whole)
    model, optimizer = whole["model"], whole["optimizer"]
    loader = OTHER_LOADER if OTHER_LOADER in block else LOADER
    loader = eval(loader.replace("8", "32"), whole)
    for _ in range(10):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
    assert_close(weights_of(cut["model"]), weights_of(model))
    assert_close(float(capsys.readouterr().out.split()[-1]), loss.item())


def test_no_micro_batch_of_the_loop_to_copy_is_too_short_for_a_batch_norm():
    exec(replaced(LOOP, (LINEAR, NORM)), {})


def recipe(title):
    """Return the edits (old, new) of a recipe's diff."""
    [diff] = [block for kind, block in SECTIONS[title] if kind == "diff"]
    edits = []
    for change in diff.split("@@\n"):
        lines = change.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        edits.append((old, new))
    return edits


def plain_data(rows):
    """Return the scripts' inputs and targets."""
    return common.get_data(types.SimpleNamespace(data=None, rows=rows))[:2]


def train_plainly(
    X,
    y,
    *layers,
    width=1,
    loss_fn=F.mse_loss,
    max_norm=np.inf,
    steps=10**9,
    penalty=0,
    lr=0.05,
    epochs=3,
    bf16=False,
):
    """Train with whole batches of 32 rows; return a linear model behind some layers.

    `max_norm` is of the gradient, `steps` of a cosine schedule.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Linear(X[0].numel(), width))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        common.seed_epoch(0, epoch)
        for rows in torch.randperm(len(X)).split(32):
            optimizer.zero_grad()
            norm = sum(weight.abs().sum() for weight in model.parameters())
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = model(X[rows])
            loss = loss_fn(outputs.float(), y[rows]) + penalty * norm
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            scheduler.step()
    return model


OWN = [  # targets, loss function
    ("torch.arange(1000) // 100", "F.cross_entropy"),
    ("torch.arange(10_000).view(1000, 10) % 7 / 7", "F.mse_loss"),
]


@parametrize("targets, loss_fn", OWN, ids=["classes", "several targets"])
def test_the_recipe_for_data_of_ones_own(goes_on, targets, loss_fn):
    edits = [(OWN[0][0], targets), (OWN[0][1], loss_fn)]
    script = edited(train_accum, *recipe("Your own model, data and classes"), *edits)
    file, loss = goes_on(script)
    X = torch.linspace(-1, 1, 64_000).view(1000, 1, 8, 8)
    y, loss_fn = eval(targets), eval(loss_fn)
    model = train_plainly(X, y, nn.Flatten(1), width=10, loss_fn=loss_fn)
    assert_close(read_weights(file), weights_of(model))
    assert_close(loss, loss_fn(model(X), y).item())


def test_the_recipe_for_clipping_and_a_schedule(goes_on):
    script = edited(train_accum, *recipe("Clipping and a schedule"))
    file, _ = goes_on(script, "--rows=1037")
    model = train_plainly(*plain_data(1037), max_norm=1.0, steps=3 * 33)
    assert_close(read_weights(file), weights_of(model))
    assert_close(torch.load(file)["optimizer"]["param_groups"][0]["lr"], 0)


def test_the_recipe_for_bf16(goes_on):
    file, _ = goes_on(edited(train_accum, *recipe("bf16")))
    model = train_plainly(*plain_data(1000), bf16=True)
    assert_close(read_weights(file), weights_of(model), 1e-3)
    exact = train_plainly(*plain_data(1000))
    assert np.abs(read_weights(file) - weights_of(exact)).max() > 1e-4


class SmallMemory(nn.Linear):
    """A layer whose memory runs out for more than three rows, in two of three times."""

    calls = 0
    kept = None  # what the last failed backward pass needs

    def forward(self, inputs):
        assert self.kept is None or self.kept() is None, "a failed attempt is kept"
        inputs = inputs.clone()
        outputs = super().forward(inputs)
        if len(inputs) > 3:
            self.calls += 1
            if self.calls % 3 == 1:
                raise torch.OutOfMemoryError
            if self.calls % 3 == 2:
                self.kept = weakref.ref(inputs)
                outputs.register_hook(self.fail)
        return outputs

    def fail(self, gradient):
        raise torch.OutOfMemoryError


def test_the_recipe_for_out_of_memory(run, goes_on, file):
    edits = [*recipe("Out of memory"), (MODEL, "SmallMemory(10, 1)")]
    script = edited(train_basic, *edits)
    script.SmallMemory = SmallMemory
    text = run(script, "--rows=1037", "--checkpoint", file)
    judge(text, file, make_table(1037))
    goes_on(script, "--rows=1037", tolerance=1e-5)


class Awake(nn.Identity):
    """A layer that must be in train() while it trains."""

    def forward(self, inputs):
        assert self.training or not torch.is_grad_enabled()
        return inputs


def test_the_recipe_for_validation_and_keeping_the_best(goes_on):
    """The rate is so high that the second of three epochs is the best."""
    layers = with_layer("torch.nn.BatchNorm1d(10).eval(), Awake()")
    edits = [*recipe("Validation, and keeping the best"), layers]
    script = edited(train_accum, *edits)
    script.Awake = Awake
    file, _ = goes_on(script, "--rows=220", "--lr=0.48")
    X, y = plain_data(220)
    validated = []
    for epochs in (1, 2, 3):
        layers = nn.BatchNorm1d(10).eval(), Awake()
        model = train_plainly(X[:-100], y[:-100], *layers, lr=0.48, epochs=epochs)
        loss = F.mse_loss(model(X[-100:]), y[-100:]).item()
        validated.append((loss, epochs, weights_of(model)))
    best_loss, epochs, best_weights = min(validated)
    assert epochs == 2
    state = torch.load(file)
    assert_close(state["best"].pop("loss").item(), best_loss)
    model.load_state_dict(state["best"])
    assert_close(weights_of(model), best_weights)
    assert state["model"]["0.num_batches_tracked"] == 0


@posix
def test_the_recipe_for_a_second_term(goes_on, tmp_path):
    edits = recipe("A second term in the loss")
    file, _ = goes_on(edited(train_accum, *edits), "--rows=300")
    model = train_plainly(*plain_data(300), penalty=0.01)
    assert_close(read_weights(file), weights_of(model))
    process = (tmp_path, "--rows=300", "--epochs=3", "--checkpoint=shared.pt")
    run_processes(process, process, edits=edits)
    assert_close(read_weights(tmp_path / "shared.pt"), weights_of(model))


def test_the_flags_of_each_command_are_right():
    texts = [block for blocks in SECTIONS.values() for _, block in blocks]
    commands = re.findall(r"(train_\w+)\.py (--.*)", "".join(texts))
    assert len(commands) >= 6
    for script, flags in commands:
        assert (FOLDER / f"{script}.py").exists()
        common.parse_args(shlex.split(flags), "", batch_size=8, accumulation_steps=4)


@posix
@parametrize("title", ["Proof", "Your own table, and a prediction"])
def test_the_commands_and_blocks_of_a_section_run(tmp_path, monkeypatch, title):
    monkeypatch.chdir(tmp_path)
    for kind, block in SECTIONS[title]:
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
                process = start(tmp_path, "-m", "torch.distributed.run", *words)
                assert "processes: 2" in finish(process)


if __name__ == "__main__":
    facts = worker({}, ".", sys.argv[1:], edits=())
    atexit.unregister(torch.distributed.destroy_process_group)
    torch.distributed.destroy_process_group()
    tasks = pathlib.Path("/proc/self/task")
    facts["threads"] = len(os.listdir(tasks)) if tasks.exists() else 1
    torch.save(facts, f"facts{os.environ['RANK']}.pt")
