"""Tests of the promise: the same steps, however a batch is split.

    python -m pytest -q             # all of them
    python -m pytest -q -k smoke    # each script, as a user starts it

The judge is train_plainly(), a loop over whole batches: its steps, losses and weights
are compared with those of the scripts, and of copies with the README's recipes.
"""

import contextlib
import io
import json
import math
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
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_equal
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
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
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, links or torchrun")

torch.set_num_threads(1)


DATASET = "Your own Dataset"
TENSORS = "Your own tensors or table, and a prediction"
SCHEDULE = "Clipping, warm-up and a schedule"
VALIDATION = "Validation, the best model, stopping early"
SAVES = "Saving within an epoch"
PENALTY = "A second term in the loss"
FREEZING = "Freezing and unfreezing"


# ---- the judge
def make_table(rows):
    """Return the synthetic data: ten inputs, and their sum with noise as target."""
    table = np.random.default_rng(0).normal(0, [1] * 10 + [0.1], (rows, 11))
    table[:, -1] = table.sum(axis=1)
    return table


def standardise(table):
    """Return inputs and targets, float32, and the mean and deviation of the columns."""
    mean = table.mean(axis=0)
    std = table.std(axis=0)
    std[std == 0] = 1
    table = torch.tensor((table - mean) / std).float()
    return table[:, :-1], table[:, -1:], mean, std


def train_plainly(
    model,
    X,
    y,
    loss_fn=F.mse_loss,
    *,
    rows_per_step=32,
    epochs=2,
    lr=0.05,
    seed=0,
    recipes=(),
):
    """Train with whole batches, and what the README's recipes do.

    Return the steps (epoch, step, loss), and the weights after each of them.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    total = epochs * math.ceil(len(X) / rows_per_step)
    top = 0.1 * total - 1  # the step with the highest rate of the schedule
    steps = []
    weights = []
    for epoch in range(epochs):
        torch.manual_seed(seed_of(seed, epoch))
        for step, rows in enumerate(torch.randperm(len(X)).split(rows_per_step)):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in recipes):
                outputs = model(X[rows])
            loss = loss_fn(outputs.float(), y[rows])
            if PENALTY in recipes:
                loss += 0.01 * sum(weight.abs().sum() for weight in model.parameters())
            loss.backward()
            if FREEZING in recipes and epoch < 2:
                model[0].zero_grad()
            if SCHEDULE in recipes:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                low, part = lr / 25, len(steps) / top
                if len(steps) > top:
                    low, part = lr / 25e4, (total - 1 - len(steps)) / (total - 1 - top)
                rate = low + (lr - low) * (1 - math.cos(math.pi * part)) / 2
                optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            steps.append((epoch + 1, step + 1, loss.item()))
            weights.append(weights_of(model))
    return steps, weights


def seed_of(seed, epoch):
    """Return the number that seeds an epoch, in a single process and in rank 0."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def judge(text, file, table, *, done=0, log_every=1, offset=0, **sizes):
    """Compare what a run printed, and the file it wrote, with the judge.

    `done` epochs were finished before the run. `file` is None if there is none. The
    run's table had an `offset`, which must not matter.
    """
    X, y, mean, std = standardise(table)
    torch.manual_seed(sizes.get("seed", 0))
    model = nn.Linear(X.shape[1], 1)
    expected, weights = train_plainly(model, X, y, **sizes)
    printed = [row for row in expected if row[0] > done and log_every > 0]
    printed = [row for row in printed if (row[1] - 1) % log_every == 0]
    steps, loss = read(text)
    assert_close(steps, np.reshape(printed, (-1, 3)), 2e-5)
    assert_close(loss, F.mse_loss(model(X), y).item(), 2e-5)
    if file is not None:
        state = torch.load(file)
        assert state["epoch"] == sizes.get("epochs", 2)
        assert_close(weights_in(state["model"]), weights[-1])
        assert_close((state["mean"].numpy() - offset - mean) / std, 0)
        assert_close(state["std"].numpy() / std, 1)


def read(text):
    """Return the steps (epoch, step, loss) and the last loss that a run printed."""
    steps = re.findall(r"Epoch: (\d+), Step: (\d+), Loss: ([\d.]+)", text)
    [loss] = re.findall(r"Loss of all rows: ([\d.]+)", text)
    return np.array(steps, dtype=float).reshape(-1, 3), float(loss)


def weights_in(state):
    """Return the weights of a model's state_dict() as one vector."""
    return nn.utils.parameters_to_vector(state.values()).numpy()


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def read_weights(file):
    return weights_in(torch.load(file)["model"])


def assert_close(found, expected, tolerance=1e-5):
    assert_allclose(found, expected, rtol=0, atol=tolerance)


# ---- helpers
# All flags are given, so that a changed default fails only where a script has no flags.
FLAGS = ["--hidden=0", "--epochs=2", "--lr=0.05", "--seed=0", "--log-every=1"]
FLAGS += ["--device=cpu", "--batch-size=32"]
SPLIT_FLAGS = [*FLAGS, "--batch-size=8", "--accumulation-steps=4"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.pt"


@pytest.fixture
def run(capsys):
    """Return a function that runs a script's main() here and returns what it prints."""

    def run(script, *flags):
        accum = script.__name__ == "train_accum"
        script.main([*(SPLIT_FLAGS if accum else FLAGS), *map(str, flags)])
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
def resumed(run, tmp_path, monkeypatch):
    """Return a function that runs a script as a whole, and killed after each epoch.

    It checks that this changes no bit, and returns what the file holds.
    """
    save_checkpoint = common.save_checkpoint

    def save_and_die(*args, **more):
        save_checkpoint(*args, **more)
        raise KeyboardInterrupt

    def resumed(script, *flags, tolerance=0):
        file = tmp_path / f"{script.__name__}.pt"
        killed = tmp_path / f"{script.__name__}.killed.pt"
        flags = ["--epochs=3", *flags, "--checkpoint"]
        steps, loss = read(run(script, *flags, file))
        state = torch.load(file)
        with monkeypatch.context() as patch:
            patch.setattr(common, "save_checkpoint", save_and_die)
            for _ in range(state["epoch"] - 1):
                with pytest.raises(KeyboardInterrupt):
                    run(script, *flags, killed)
        text = run(script, *flags, killed)
        assert_close(read(text)[0], steps, tolerance)
        assert_close(read(text)[1], loss, tolerance)
        if tolerance == 0:
            assert_equal(plain(torch.load(killed)), plain(state))
        assert_close(read_weights(killed), read_weights(file), tolerance)
        return state

    return resumed


def plain(state):
    """Return a checkpoint with lists for tensors."""
    return json.loads(json.dumps(state, default=torch.Tensor.tolist))


def edited(script, *edits):
    """Return a copy of a script in which old lines are replaced with new ones."""
    text = pathlib.Path(script.__file__).read_text(encoding="utf-8")
    copied = types.ModuleType(script.__name__)
    exec(replaced(text, *edits), copied.__dict__)
    return copied


def replaced(text, *edits):
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def start(folder, *command):
    """Start a Python process; finish() must follow."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
def test_smoke_each_script_runs_without_flags(tmp_path):
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


def test_the_lines_of_a_run_come_at_once(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", output)
    train_accum.main([*SPLIT_FLAGS, "--rows=7", "--epochs=1"])
    first, step, last = output.buffer.getvalue().decode().splitlines()
    assert first == (
        "7 rows, 8 x 4 per step, 1 steps per epoch, 0 of 1 epochs done; cpu, "
        f"processes: 1, torch {torch.__version__}, seed 0"
    )
    assert re.fullmatch(r"Epoch: 1, Step: 1, Loss: \d\.\d{6}", step)
    end = r"Loss of all rows: \d\.\d{6}, \d+\.\d{3} s, peak memory "
    assert re.fullmatch(end + r"(\d+ MiB of the process|unknown)", last)


SPLITS = [(train_accum, 8, 4), (train_accum, 1, 32), (train_accum, 7, 3)]
SPLITS += [(script, size, 1) for script in SCRIPTS for size in (5, 32, 400)]


@parametrize("rows", [1, 2, 31, 32, 33, 1037])
@parametrize("script, size, steps", SPLITS)
def test_each_split_takes_the_steps_of_the_judge(run, file, script, size, steps, rows):
    log_every = rows % 4
    flags = [f"--rows={rows}", f"--checkpoint={file}", f"--batch-size={size}"]
    flags += ["--seed=7", "--lr=0.04", "--epochs=3", f"--log-every={log_every}"]
    if script is train_accum:
        flags += [f"--accumulation-steps={steps}"]
    sizes = {"rows_per_step": size * steps, "epochs": 3, "lr": 0.04, "seed": 7}
    text = run(script, *flags)
    judge(text, file, make_table(rows), log_every=log_every, **sizes)


@posix
def test_a_script_resumes_from_the_file_of_another(run, file):
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


def most_tensors_kept(train, *arguments):
    """Return the largest number of tensors that were kept at once for backward()."""
    kept = weakref.WeakSet()
    numbers = []

    def keep(tensor):
        def get():
            return tensor

        kept.add(get)
        numbers.append(len(kept))
        return get

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda get: get()):
        train(*arguments)
    return max(numbers)


def test_accumulation_keeps_the_tensors_of_a_single_micro_batch(run):
    one = most_tensors_kept(run, train_accum, "--hidden=3", "--accumulation-steps=1")
    many = most_tensors_kept(run, train_accum, "--hidden=3", "--accumulation-steps=9")
    assert one == many


def test_mean_loss_is_exact_and_leaves_each_layer_in_its_mode():
    model = nn.Sequential(nn.BatchNorm1d(10).eval(), nn.Dropout(), nn.Linear(10, 1))
    X, y, _, _ = standardise(make_table(70))
    dataset = torch.utils.data.TensorDataset(X, y)
    args = types.SimpleNamespace(batch_size=30, device=torch.device("cpu"))
    loss = common.mean_loss(args, {"model": model}, dataset, F.mse_loss)
    assert [layer.training for layer in model] == [False, True, True]
    assert_close(loss, F.mse_loss(model.eval()(X), y).item())
    args.device = torch.device("meta")
    with pytest.raises(RuntimeError, match="item"):  # the rest was done on the device
        common.mean_loss(args, {"model": model.to("meta")}, dataset, F.mse_loss)


# ---- edits, as users make them in a copy
MODEL = "common.make_model(X.shape[1], args.hidden)"
OPTIMIZER = "torch.optim.SGD(model.parameters(), lr=args.lr)"
ADAMW = (OPTIMIZER, "torch.optim.AdamW(model.parameters(), lr=args.lr)")
TENSOR_RATE = (OPTIMIZER, OPTIMIZER.replace("args.lr", "torch.tensor(args.lr)"))
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


DROPOUT = with_layer("torch.nn.Dropout(0.5)")
FROZEN = with_layer("torch.nn.BatchNorm1d(10).eval()")
YOUR_OWN = [
    with_layer("torch.nn.LayerNorm(10)"),
    ADAMW,
    (PARTS, PARTS + MORE_PARTS),
    (STEP, STEP + MORE_STEPS),
]
COPIES = {
    "as it is": ([], "--hidden=0"),
    "three hidden units": ([], "--hidden=3"),
    "a frozen layer": ([FROZEN], "--hidden=0"),
    "dropout": ([DROPOUT], "--hidden=0"),
    "all of your own": (YOUR_OWN, "--hidden=0"),
}


@parametrize("edits, flag", COPIES.values(), ids=COPIES.keys())
def test_a_copy_takes_the_same_steps_and_resumes(resumed, edits, flag):
    states = [
        resumed(edited(script, *edits), "--rows=1037", flag) for script in SCRIPTS
    ]
    basic, accum, manual = (weights_in(state["model"]) for state in states)
    if DROPOUT in edits:  # with masks of their own
        assert np.abs(manual - basic).max() > 1e-3
    else:
        assert_equal(manual, basic)
        assert_close(accum, basic)
    for state in states:
        assert state["model"].get("0.num_batches_tracked", 0) == 0


class Numbers(torch.utils.data.Dataset):
    """Random inputs, drawn here or by a DataLoader's worker."""

    def __len__(self):
        return 32

    def __getitem__(self, rows):
        inputs = torch.rand(len(rows), 10) + np.random.rand() + random.random()
        return inputs, torch.zeros(len(rows), 1)


@posix
@parametrize("workers", [0, 1])
def test_random_numbers_of_a_loader_are_the_same_again(resumed, workers):
    loader = ("(dataset, batch_size", f"(Numbers(), num_workers={workers}, batch_size")
    script = edited(train_basic, loader)
    script.Numbers = Numbers
    resumed(script, "--rows=32")


def test_an_epoch_has_random_numbers_of_its_own_and_the_same_again():
    numbers = []
    for where in [(0, 1), (0, 1, 0), (1, 0), (0, 2), (0, 1, 1), (0, 2, 1)]:
        common.seed_epoch(*where)
        numbers.append((torch.rand(1).item(), np.random.rand(), random.random()))
    first, again, *others = map(set, numbers)
    assert first == again
    assert len(set.union(first, *others)) == 5 * 3


def test_without_the_marked_lines_it_is_the_same_for_one_process(run, tmp_path):
    text = pathlib.Path(train_accum.__file__).read_text(encoding="utf-8")
    marked = [(f"{line}\n", "") for line in text.splitlines() if "# processes" in line]
    file, file_without = tmp_path / "run.pt", tmp_path / "without.pt"
    run(edited(train_accum, DROPOUT), "--rows=1037", "--checkpoint", file)
    script = edited(train_accum, *marked, DROPOUT)
    run(script, "--rows=1037", "--checkpoint", file_without)
    assert_equal(read_weights(file_without), read_weights(file))
    assert not {"rank", "world_size"} & set(script.main.__code__.co_varnames)


def test_main_runs_in_a_thread_of_a_notebook_and_returns_the_model(file):
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    with contextlib.redirect_stdout(io.StringIO()), ThreadPoolExecutor() as pool:
        for script, flags in zip(SCRIPTS, [FLAGS, SPLIT_FLAGS, FLAGS]):
            flags = [*flags, f"--checkpoint={file}"]
            model = pool.submit(script.main, flags).result()
            assert_equal(weights_of(model), read_weights(file))
            assert not model.training
        [call] = re.findall(r"`(train_accum\.main\([^`]*\))`", README)
        assert not eval(call).training
    assert handlers == [signal.getsignal(number) for number in signal.valid_signals()]


# ---- data
# the first column is time stamps in nanoseconds, the third a constant
SHIFTED = np.random.default_rng(0).integers(-99, 99, (40, 4)) * [2.0**30, 1e-9, 0, 1]
OFFSET = np.array([1.7e18, 5, 0.1, 0])
TABLE = SHIFTED + OFFSET
FORMS = [("a.csv.gz", '\n"a, b",2020-1,c,"y"'), ("a.csv", ""), ("A.NPY", None)]
FORMS += [("a.csv", "inf,trt,nan,y"), pytest.param("pipe", "a,b,c,d", marks=posix)]


@parametrize("name, header", FORMS)
def test_a_file_of_any_form_is_the_same_table(run, file, name, header):
    data = file.with_name(name)
    if header is None:
        with data.open("wb") as numpy_file:
            np.save(numpy_file, TABLE)
    else:  # as a spreadsheet writes it: marked as UTF-8, with quotes
        style = {"header": header, "comments": "", "encoding": "utf-8-sig"}
        np.savetxt(data, TABLE, '"%+.17e"', ",", "\r\n", **style)
    if name == "pipe":
        content = data.read_bytes()
        data.unlink()
        os.mkfifo(data)
        threading.Thread(target=data.write_bytes, args=[content]).start()
    text = run(train_basic, "--data", data, "--checkpoint", file)
    judge(text, file, SHIFTED, offset=OFFSET)
    assert ("line 1 is a header" in text) == bool(header)
    assert ("line 1 is a row of numbers" in text) == (header == "")


# ---- what is refused
class Code:
    def __reduce__(self):
        return open, ("opened", "w")  # a pickle may do this when it is loaded


def cut_off(content):
    return content[:-9]


def without_weights(content):
    """Overwrite the weights in a checkpoint with zeros."""
    weights = torch.load(io.BytesIO(content))["model"]["weight"].numpy().tobytes()
    return content.replace(weights, bytes(len(weights)))


def marked_as_folder(content):
    """Set a bit in the archive's index, so that torch skips a weight."""
    place = content.rfind(b"archive/data/0") - 8
    return content[:place] + b"\x10" + content[place + 1 :]


TOO_FEW = "rows of 2 or more numbers are needed"
NO_FLOAT = "could not convert string"
NO_NUMBER = "column 2: a number is nan, infinite or too large"
FOREIGN = "error: --checkpoint .*run.pt: damaged, or not from here"
FOLDER_FAULT = "error: --checkpoint .*/run.pt: cannot write to its folder: "
REFUSED = [
    # a file, or flags and edits of a run before, or what changes its checkpoint;
    # flags; what the error says
    *[
        (None, f"{flag}={value}", f"argument {flag}: .*{value}")
        for value, flags in {
            "0": "--batch-size --accumulation-steps --rows --epochs --lr",
            "-1": "--hidden --seed --log-every",
            "1.5": "--batch-size",
            "nan": "--lr",
            "x": "--lr",
            "tpu": "--device",
        }.items()
        for flag in flags.split()
    ],
    (None, "--batch=4", "unrecognized arguments: --batch=4"),
    (
        None,
        "--data=t.csv --rows=9",
        "argument --rows: not allowed with argument --data",
    ),
    (None, "--device=cuda:2", "cuda:2 is not here, only cpu, cuda:0, cuda:1$"),
    (None, "--lr=1e30", "error: epoch 1: a weight is not finite; try a lower --lr"),
    (None, "--data=t.csv", "error: --data t.csv: .*not found"),
    ("", "--data=t.csv", rf"{TOO_FEW}, not \(0, 1\)$"),
    ("a\n1\n2\n", "--data=t.csv", rf"{TOO_FEW}, not \(2, 1\)$"),
    (
        "a,b\n1,2\n3,x\n",
        "--data=t.csv",
        f"{NO_FLOAT} 'x' to float64 at row 1, column 2",
    ),
    ("a,1\n1,2\n", "--data=t.csv", f"{NO_FLOAT} 'a' to float64 at row 0, column 1"),
    ("a,b\n1,2\n3,nan\n", "--data=t.csv", f"error: --data t.csv: {NO_NUMBER}"),
    ("a,b\n1,2\n3,2\n", "--data=t.csv", "the last column, the target, is the same"),
    (",a,b\n0,1,2\n1,3,4\n", "--data=t.csv", "a column has no name"),
    ("a,b\n0,1,2\n1,3,4\n", "--data=t.csv", "a column has no name"),
    (np.ones(3), "--data=t.npy", rf"{TOO_FEW}, not \(3,\)$"),
    (np.ones((3, 2)) * 1j, "--data=t.npy", r"dtype\('complex128'\)"),
    (None, "--checkpoint=missing/run.pt", FOLDER_FAULT),
    (None, "--checkpoint=/proc/run.pt", FOLDER_FAULT),
    (cut_off, "", FOREIGN),
    (without_weights, "", FOREIGN),
    (marked_as_folder, "", FOREIGN),
    (torch.ones(3), "", FOREIGN),
    ({"settings": {}, "epoch": 1}, "", FOREIGN),
    ({"settings": "x"}, "", FOREIGN),
    ({"settings": "x", "epoch": "y"}, "", FOREIGN),
    (Code(), "", FOREIGN),
    ({"settings": "x", "epoch": 0}, "", "^-x$"),
    (["--lr=0.1"], "", r"^\+'lr': 0.05,$"),
    (["--seed=1"], "", "^-'seed': 1}$"),
    (["--batch-size=9"], "", r"^\+'rows per step': 32,$"),
    (["--rows=999"], "", r"^-{'data': \['torch.float32 \(999, 10\), crc32 "),
    ([("parts, X, y)", "parts, X, -y)")], "", r"^-'torch.float32 \(1000, 1\), crc32 "),
    (["--hidden=1"], "", r"^-'  \(1\): ReLU\(\)',$"),
    ([ADAMW], "", r"^\+'optimizer': {'class': 'SGD',$"),
    ([TENSOR_RATE], "", "^-'lr': 0.0500000"),
    ([(PARTS, PARTS + MORE_PARTS)], "", "^-'scheduler': {'T_max': 2,$"),
    (["--epochs=3"], "", "error: 3 epochs are done, more than --epochs"),
]


@parametrize("content, flags, said", REFUSED)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_what_must_not_run_is_refused(
    run, refused, tmp_path, monkeypatch, content, flags, said
):
    """It is said in a line or line by line, before anything is loaded or changed."""
    monkeypatch.chdir(tmp_path)
    if isinstance(content, str):
        pathlib.Path("t.csv").write_text(content)
    elif isinstance(content, np.ndarray):
        np.save("t.npy", content)
    elif isinstance(content, list):
        flags_before = [change for change in content if isinstance(change, str)]
        edits = [change for change in content if isinstance(change, tuple)]
        run(edited(train_accum, *edits), "--checkpoint=run.pt", *flags_before)
    elif callable(content):
        run(train_accum, "--checkpoint=run.pt")
        changed = content(pathlib.Path("run.pt").read_bytes())
        pathlib.Path("run.pt").write_bytes(changed)
    elif content is not None:
        torch.save(content, "run.pt")
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.delattr(nn.Module, "load_state_dict")
    monkeypatch.delattr(torch.optim.Optimizer, "load_state_dict")
    believe_in(2, monkeypatch)
    error = refused(train_accum, *flags.split() or ["--checkpoint=run.pt"])
    assert re.search(said, error, re.MULTILINE)
    first, *others = error.splitlines()
    if not first.startswith("usage: "):
        assert first.startswith("error: ")
        assert {line[0] for line in others} <= {"-", "+"}
    if flags in ("--data=t.csv", "--data=t.npy"):
        assert first.startswith(f"error: {flags.replace('=', ' ')}: ")
    assert "weights_only" not in error
    assert files == {file: file.read_bytes() for file in tmp_path.iterdir()}


@parametrize("name", ["seed", "data", "epoch", "settings", "mean"])
def test_a_part_cannot_have_the_name_of_something_else(run, file, name):
    script = edited(train_basic, (PARTS, PARTS + f"    parts['{name}'] = optimizer\n"))
    with pytest.raises(TypeError, match=name):
        run(script, "--checkpoint", file)
    assert not file.exists()


def test_data_of_any_type_are_compared():
    numbers = torch.arange(2.0).bfloat16()
    texts = {common.describe(data) for data in (numbers, numbers.flip(0), *numbers)}
    assert len(texts) == 4


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
    names = set()

    def fsync(descriptor):
        assert file.read_bytes() == before
        sizes.append(os.fstat(descriptor).st_size)
        names.update(os.listdir(file.parent))
        if len(sizes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    save(file, nn.Linear(9, 1), epochs=1)
    before = file.read_bytes()
    assert sizes == [file.stat().st_size]
    with pytest.raises(KeyboardInterrupt):
        save(file, nn.Linear(99, 1), epochs=2)
    assert os.listdir(file.parent) == ["run.pt"]
    assert torch.load(file)["epoch"] == 1
    assert len(names) == 3  # another temporary file in each run


@posix
@parametrize("size", [100, 5000])  # torch and Python report it in other ways
def test_a_full_disk_is_reported_and_leaves_what_was_there(run, refused, file, size):
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
    assert "is the disk full" in error
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["run.pt"]


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
        said = "epoch 2 is not saved .* a state_dict"
    with pytest.raises(SystemExit, match=said):
        save(file, model, epochs=2, optimizer=optimizer)
    assert torch.load(file)["epoch"] == 1
    assert os.listdir(file.parent) == ["run.pt"]


def test_a_file_from_a_gpu_is_loaded_without_one(run, file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run(train_basic, "--epochs=1", "--checkpoint", file)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(file)
    text = run(train_basic, "--checkpoint", file)
    judge(text, file, make_table(1000), done=1)


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
    """Let torch see N GPUs."""
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


@pytest.fixture
def trains_on_a_device(run, monkeypatch):
    """Return a function that trains on another device, of which numbers are not read.

    PyTorch refuses to mix the two: whatever is not moved there is an error.
    """

    def trains_on_a_device(script, *flags):
        saved = []
        with monkeypatch.context() as patch:
            patch.setattr(common, "pick_device", lambda name: torch.device("meta"))
            patch.setattr(common, "mean_loss", lambda *args: 1.0)
            patch.setattr(common, "print_end", lambda *args: None)
            patch.setattr(
                common, "save_checkpoint", lambda *args, **_: saved.append(args)
            )
            run(script, "--rows=199", "--log-every=0", *flags)
        for _, settings, parts, _ in saved:
            assert "meta" not in settings
            assert {weight.device.type for weight in parts["model"].parameters()} == {
                "meta"
            }

    return trains_on_a_device


@each_script
@parametrize("edits", [[], [*YOUR_OWN[2:], TENSOR_RATE]], ids=["as it is", "your own"])
def test_each_script_trains_on_a_device(trains_on_a_device, script, edits):
    trains_on_a_device(edited(script, *edits))


# ---- processes
def worker(processes, edits):
    """Run train_accum.py as one process of several; return what it did and printed.

    If it may restart, process 1 kills itself once, in its 40th step.
    """
    rank = int(os.environ["RANK"])
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    may_restart = restarts < int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    facts = {"rows": 0, "reductions": 0, "wrapped": 0, "seeds": set()}
    facts |= {"prefix": None, "error": None}

    def count_rows(_, inputs):
        facts["rows"] += len(inputs[0])
        numpy_seed = int(np.random.get_state()[1][1])
        facts["seeds"].add((torch.initial_seed(), numpy_seed, random.getstate()[1][1]))

    def count_reductions(_, bucket):
        facts["reductions"] += 1
        if may_restart and rank == 1 and facts["reductions"] == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return allreduce_hook(None, bucket)

    def watched(model):
        facts["wrapped"] += 1
        model = DistributedDataParallel(model)
        model.register_forward_pre_hook(count_rows)
        model.register_comm_hook(None, count_reductions)
        return model

    class PrefixStore(torch.distributed.PrefixStore):
        def __init__(self, prefix, store):
            facts["prefix"] = prefix
            super().__init__(prefix, store)

    script = edited(train_accum, *edits)
    script.DistributedDataParallel = watched
    torch.distributed.PrefixStore = PrefixStore
    folder, *flags = processes[rank]
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            flags = [*SPLIT_FLAGS, "--checkpoint=run.pt", *flags]
            facts["model"] = str(script.main(flags))
        except SystemExit as end:
            facts["error"] = end.code
    facts["printed"] = out.getvalue()
    torch.distributed.destroy_process_group()
    # a thread that outlives its process group can abort the process
    tasks = pathlib.Path("/proc/self/task")
    facts["threads"] = len(os.listdir(tasks)) if tasks.exists() else 1
    return facts


def run_processes(*processes, machines=1, max_restarts=0, edits=()):
    """Start a process for each (folder, *flags), as torchrun does.

    Return what worker() returns. They are copies of a process that has imported torch,
    which saves seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_scripts", "torch._dynamo"])

    def launch(machine):
        config = LaunchConfig(
            min_nodes=machines,
            max_nodes=machines,
            nproc_per_node=len(processes) // machines,
            run_id="test",
            rdzv_backend="static",
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_configs={"rank": machine, "timeout": HANG},
            max_restarts=max_restarts,
            start_method="forkserver",
        )
        return elastic_launch(config, worker)(processes, edits)

    with ThreadPoolExecutor() as pool:
        facts = {}
        for results in pool.map(launch, range(machines)):
            facts |= results
    return [facts[rank] for rank in range(len(processes))]


@posix
def test_three_processes_share_each_batch(file):
    process = [file.parent, "--rows=100", "--batch-size=7", "--accumulation-steps=3"]
    facts = run_processes(process, process, process)
    judge(facts[0]["printed"], file, make_table(100), rows_per_step=21)
    assert sum(fact["rows"] for fact in facts) == 2 * 100
    assert [fact["reductions"] for fact in facts] == [2 * 5] * 3  # one a step
    assert [fact["wrapped"] for fact in facts] == [2] * 3  # anew, as after resuming
    for seeds in zip(*set.union(*(fact["seeds"] for fact in facts))):
        assert len(set(seeds)) == 2 * 3  # of torch, of numpy and of random
    assert {seed for seed, _, _ in facts[0]["seeds"]} == {seed_of(0, 0), seed_of(0, 1)}
    assert [fact["printed"] for fact in facts[1:]] == ["", ""]
    assert {fact["model"] for fact in facts} == {str(nn.Linear(10, 1))}
    assert {fact["prefix"] for fact in facts} == {"0"}
    assert {fact["threads"] for fact in facts} == {1}


@posix
def test_two_machines_resume_from_the_file_of_the_first(run, tmp_path):
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
    assert zero["prefix"] is one["prefix"] is None  # each counts its own restarts
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
    process = [file.parent, "--rows=1037", "--epochs=3"]
    facts = run_processes(process, process, max_restarts=1)
    judge(facts[0]["printed"], file, make_table(1037), epochs=3, done=1)
    assert sum(fact["rows"] for fact in facts) == 2 * 1037
    assert [fact["reductions"] for fact in facts] == [2 * 33] * 2  # one a step
    assert len(set.union(*(fact["seeds"] for fact in facts))) == 2 * 2  # other masks
    assert {fact["prefix"] for fact in facts} == {"1"}
    assert {fact["threads"] for fact in facts} == {1}


def test_scripts_for_one_process_refuse_several(run, refused, file, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")  # left over, without torchrun
    judge(run(train_accum, "--checkpoint", file), file, make_table(1000))
    for script in (train_basic, train_manual):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        assert "error: this script is for one process" in refused(script)
        monkeypatch.setenv("WORLD_SIZE", "1")
        run(script)
        monkeypatch.setenv("WORLD_SIZE", "2")


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
    split, whole = {}, {}
    exec(block, split)
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
    assert_close(weights_of(split["model"]), weights_of(model))
    assert_close(float(capsys.readouterr().out.split()[-1]), loss.item())


def test_the_loop_to_copy_keeps_little_and_survives_a_step_of_padding():
    """No micro-batch is too short for a BatchNorm, either."""
    kept = set()
    for steps in (1, 9):
        edits = [
            (LINEAR, NORM),
            ("range(10)", "range(1)"),
            ("steps = 4", f"steps = {steps}"),
        ]
        kept.add(most_tensors_kept(exec, replaced(LOOP, *edits), {}))
    assert len(kept) == 1
    names = {}
    exec(replaced(LOOP, *CLASSES, *PADDING, ("y[::3] = -100", "y[:] = -100")), names)
    assert np.isfinite(weights_of(names["model"])).all()


def recipe(title):
    """Return the edits (old, new) of a recipe's diff."""
    [diff] = [block for kind, block in SECTIONS[title] if kind == "diff"]
    edits = []
    for change in diff.split("@@\n"):
        lines = [line or " " for line in change.splitlines()]
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        edits.append((old, new))
    return edits


def images(rows):
    """Return the items of the README's own Dataset."""
    items = torch.arange(rows)
    return (items / rows).view(-1, 1, 1, 1).expand(-1, 3, 8, 8), items % 10


TOGETHER = [SCHEDULE, VALIDATION, SAVES, PENALTY]
RECIPES = [[VALIDATION], ["bf16"], [FREEZING]]
RECIPES += [TOGETHER, [DATASET, *TOGETHER], [TENSORS, *TOGETHER]]
SEVERAL = "torch.arange(1650).view(165, 10) % 7 / 7"
SMALLER = {  # 65 rows for training, so the last step has a single one; two saves
    DATASET: [("return 1000", "return 165"), ("/ 1000", "/ 165")],
    TENSORS: [("192_000).view(1000", "165 * 192).view(165")],
    SAVES: [("10 * args.batch_size", "2 * args.batch_size")],
}
SMALLER[DATASET] += [(", num_workers=2", "")]
SMALLER[TENSORS] += [
    ("torch.arange(1000) // 100", SEVERAL),
    ("cross_entropy", "mse_loss"),
]


def first_model(recipes):
    """Return the data, the loss and the first model of a script with some recipes."""
    if DATASET in recipes:
        items = torch.arange(165)
        X = (items / 165).view(165, 1, 1, 1).expand(165, 3, 8, 8)
        model = nn.Sequential(nn.Flatten(1), nn.Linear(192, 10))
        return X, items % 10, F.cross_entropy, model
    if TENSORS in recipes:
        X = torch.linspace(-1, 1, 165 * 192).view(165, 3, 8, 8)
        model = nn.Sequential(nn.Flatten(1), nn.Linear(192, 10))
        return X, eval(SEVERAL), F.mse_loss, model
    X, y, _, _ = standardise(make_table(165))
    if FREEZING in recipes:
        model = nn.Sequential(nn.Linear(10, 3), nn.ReLU(), nn.Linear(3, 1))
        return X, y, F.mse_loss, model
    return X, y, F.mse_loss, nn.Linear(10, 1)


def validate(model, saved, loss_fn, X, y):
    """Return the number of the best weights, and of those at which training stops."""
    losses = []
    for weights in saved:
        nn.utils.vector_to_parameters(torch.tensor(weights), model.parameters())
        losses.append(loss_fn(model(X), y).item())
        best = int(np.argmin(losses))
        if len(losses) == best + 6:  # five without a better one
            break
    return best, len(losses) - 1


@parametrize("recipes", RECIPES, ids="+".join)
def test_recipes_take_the_steps_of_a_plain_loop(
    run, resumed, trains_on_a_device, monkeypatch, tmp_path, recipes
):
    """Also after kills, with whole batches, and over two processes."""
    monkeypatch.chdir(tmp_path)
    edits = [
        edit for title in recipes for edit in recipe(title) + SMALLER.get(title, [])
    ]
    script = edited(train_accum, *edits)
    sizes = {"epochs": 5, "lr": 0.05}
    if recipes == [VALIDATION]:  # such a rate that it soon gets worse
        sizes = {"epochs": 12, "lr": 0.46}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    flags += ["--rows=165", "--checkpoint=run.pt"]
    flags += ["--hidden=3"] if FREEZING in recipes else []
    tolerance = 1e-3 if "bf16" in recipes else 1e-5

    torch.manual_seed(0)
    training = torch.arange(165)
    if VALIDATION in recipes:
        validation, training = torch.randperm(165).split([100, 65])
    X, y, loss_fn, model = first_model(recipes)
    data = X[training], y[training], loss_fn
    steps, weights = train_plainly(model, *data, recipes=recipes, **sizes)
    last_step = max(step for _, step, _ in steps)
    every = 2 if SAVES in recipes else last_step
    saved = [
        vector
        for (_, step, _), vector in zip(steps, weights)
        if step % every == 0 or step == last_step
    ]
    last = len(saved) - 1
    if VALIDATION in recipes:
        best, last = validate(model, saved, loss_fn, X[validation], y[validation])

    if "bf16" not in recipes:
        trains_on_a_device(script, *flags)
    state = resumed(script, *flags)
    assert state["epoch"] == last + 1
    assert ("rows between saves: 64" in state["settings"]) == (SAVES in recipes)
    assert_close(weights_in(state["model"]), saved[last], tolerance)
    run(script, *flags, "--batch-size=32", "--accumulation-steps=1")
    assert_close(read_weights("run.pt"), saved[last], tolerance)
    if os.name == "posix":
        os.remove("run.pt")
        run_processes((tmp_path, *flags), (tmp_path, *flags), edits=edits)
        assert_close(read_weights("run.pt"), saved[last], tolerance)
    if VALIDATION in recipes:
        [code] = re.findall(r"`(model\.load_state_dict\([^`]*\))`", README)
        exec(code)
        assert_close(weights_of(model), saved[best])


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


def test_the_recipe_for_out_of_memory(run, resumed, file, trains_on_a_device):
    edits = [*recipe("Out of memory"), (MODEL, "SmallMemory(10, 1)")]
    script = edited(train_basic, *edits)
    script.SmallMemory = SmallMemory
    text = run(script, "--rows=1037", "--checkpoint", file)
    judge(text, file, make_table(1037))
    resumed(script, "--rows=1037", tolerance=1e-5)
    trains_on_a_device(edited(train_basic, *recipe("Out of memory")))


def test_the_flags_of_each_command_are_right():
    texts = [block for blocks in SECTIONS.values() for _, block in blocks]
    commands = re.findall(r"(train_\w+)\.py (--.*)", "".join(texts))
    assert len(commands) >= 6
    for script, flags in commands:
        assert (FOLDER / f"{script}.py").exists()
        common.parse_args(shlex.split(flags), "", batch_size=8, accumulation_steps=4)


@posix
@parametrize("title", ["Proof", "Your own tensors or table, and a prediction"])
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
