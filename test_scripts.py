"""Tests of the promise (the same trajectory, however a batch is sliced) and its edges.

    python -m pytest -q

Some tests let torchrun start this file: then it is worker(), one of several processes.
"""

import contextlib
import copy
import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

import common
import train_accum
import train_basic
import train_manual

SCRIPTS = [train_basic, train_accum, train_manual]
README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
HANG = 900  # seconds, after which a process hangs, on any machine

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and torchrun")
gpu = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")

os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start
torch.set_num_threads(1)


# ---- helpers
@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a script's main() here and returns its lines."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(script, *flags):
        command = [f"{script.__name__}.py", "--device", "cpu", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refused(run, capsys):
    """Return a function like run() for what must not run; it returns the error."""

    def refused(script, *flags):
        with pytest.raises(SystemExit) as end:
            run(script, *flags)
        return capsys.readouterr().err + str(end.value.code)

    return refused


@pytest.fixture
def trained(run, tmp_path):
    """Return a function that gives the weights after a script's run, one vector.

    `cut` is the batch size and the accumulation steps. Scripts without the second get
    the product as batch size.
    """

    def trained(script, cut, *flags):
        batch_size, accumulation_steps = cut
        if script is train_accum:
            flags = ["--accumulation-steps", accumulation_steps, *flags]
        else:
            batch_size *= accumulation_steps
        file = tmp_path / "trained.pt"
        file.unlink(missing_ok=True)
        run(script, "--batch-size", batch_size, "--checkpoint", file, *flags)
        return weights(file)

    return trained


def weights(file):
    state = torch.load(file, map_location="cpu")
    return torch.cat([weight.flatten() for weight in state["model"].values()])


def start(folder, *command, **environment):
    """Start a process; finish() must follow."""
    return subprocess.Popen(
        [*map(str, command)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Return what a process printed, once it ended well."""
    try:
        out, err = process.communicate(timeout=HANG)
    finally:
        process.terminate()  # if the test is interrupted
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Start what takes long; return {name: (process, its folder)}.

    These are the scripts, as a user starts them, and the README's torchrun command,
    with worker() as train_accum.py and a second try for the process that it kills.
    """
    line = re.search("^torchrun .*train_accum.py .*", README, re.MULTILINE)[0]
    line = line.replace("torchrun", "--max-restarts 1")
    line = line.replace("train_accum.py", f"{__file__} --device cpu")
    commands = {script: [sys.executable, script.__file__] for script in SCRIPTS}
    if os.name == "posix":
        commands["torchrun"] = [*TORCHRUN, *line.split()]
    started = {}
    for name, command in commands.items():
        folder = tmp_path_factory.mktemp("started")
        started[name] = start(folder, *command, KILL="1"), folder
    yield started
    for process, _ in started.values():
        process.terminate()


@pytest.fixture
def float64(monkeypatch):
    """Let the scripts compute in float64."""
    make_model, make_data = common.make_model, common.make_data
    monkeypatch.setattr(common, "make_model", lambda *n: make_model(*n).double())
    monkeypatch.setattr(
        common, "make_data", lambda n: [t.double() for t in make_data(n)]
    )


# ---- the promise
@pytest.mark.parametrize("cut", [(8, 4), (1, 32), (32, 1), (7, 3), (400, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 31, 32, 33, 1000, 1001, 1037])
def test_the_cut_does_not_change_the_weights(float64, trained, rows, cut):
    flags = ["--rows", rows, "--epochs", 2, "--log-every", 0]
    basic, accum, manual = (trained(script, cut, *flags) for script in SCRIPTS)
    assert torch.equal(basic, manual)
    assert (accum - basic).abs().max() < 1e-12


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("auto", marks=gpu)])
def test_in_float32_the_cut_changes_rounding_only(trained, device, hidden):
    flags = ["--epochs", 3, "--rows", 1037, "--hidden", hidden, "--device", device]
    basic, accum, manual = (trained(script, (8, 4), *flags) for script in SCRIPTS)
    assert torch.equal(basic, manual)
    assert (accum - basic).abs().max() < 1e-5


def test_uneven_micro_batches_without_a_length_make_the_same_steps():
    """With classes and AdamW; a mode and gradients from before do no harm."""
    X, y = torch.randn(77, 10).double(), torch.arange(77) % 5
    untrained = nn.Linear(10, 5).double().eval()
    untrained.weight.grad = torch.ones(5, 10).double()

    def train(train_epoch, *data):
        model = copy.deepcopy(untrained)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        train_epoch(model, optimizer, *data, loss_fn=F.cross_entropy, log_every=0)
        assert model.training
        return model.weight

    def stream(*sizes):
        yield from zip(X.split(sizes), y.split(sizes))

    basic = train(train_basic.train_epoch, stream(32, 32, 13))
    accum = train(train_accum.train_epoch, stream(20, 2, 5, 5, 8, 8, 8, 8, 13), 4)
    manual = train(train_manual.train_epoch, X, y, torch.arange(77), 32)
    assert torch.equal(basic, manual)
    assert torch.allclose(basic, accum, rtol=0, atol=1e-13)


@each_script
def test_a_step_descends_the_mean_loss_of_its_rows(float64, trained, script):
    X, y = common.make_data(77)
    X1 = F.pad(X, (0, 1), value=1)  # the last weight is the bias
    torch.manual_seed(5)
    model = common.make_model(10, 1)
    expected = torch.cat([model.weight.T, model.bias[None]]).detach()
    for epoch in range(2):
        for rows in common.shuffled_indices(77, 5, epoch).split(32):
            slope = 2 * X1[rows].T @ (X1[rows] @ expected - y[rows]) / len(rows)
            expected -= 0.01 * slope
    found = trained(script, (8, 4), "--rows", 77, "--epochs", 2, "--seed", 5)
    assert torch.allclose(found, expected.flatten(), rtol=0, atol=1e-13)


def test_an_epoch_has_each_row_once_in_an_order_of_its_own():
    orders = [
        common.shuffled_indices(50, seed, epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    for i, order in enumerate(orders):
        assert sorted(order) == list(range(50))
        assert order not in orders[:i]


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (32, 1), (64, 2), (65, 3)])
def test_an_epoch_has_a_step_for_each_32_rows_begun(run, rows, steps):
    for script, size in zip(SCRIPTS, [32, 8, 32]):
        first, *middle, last = run(script, "--rows", rows, "--batch-size", size)
        assert f" per step, {steps} steps per epoch, " in first
        assert last.startswith(f"{10 * steps} optimizer steps, ")
        assert len(middle) == 10 * steps


def test_less_than_one_accumulation_step_is_refused():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="accumulation_steps is 0"):
        train_accum.train_epoch(model, optimizer, [], 0)


# ---- edits of main()
def dropout_model(n_inputs, n_targets, hidden):
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(n_inputs, n_targets))


def norm_model(n_inputs, n_targets, hidden):
    return nn.Sequential(nn.LayerNorm(n_inputs), nn.Linear(n_inputs, n_targets))


momentum = functools.partial(torch.optim.SGD, momentum=0.9)


def test_a_model_and_an_optimizer_of_ones_own_keep_the_promise(trained, monkeypatch):
    monkeypatch.setattr(common, "make_model", norm_model)
    monkeypatch.setattr(torch.optim, "SGD", momentum)
    basic, accum, manual = (trained(script, (8, 4)) for script in SCRIPTS)
    assert torch.equal(basic, manual)
    assert (accum - basic).abs().max() < 1e-5


def test_dropout_draws_the_same_in_both_scripts_and_after_going_on(
    run, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "make_model", dropout_model)
    file = tmp_path / "run.pt"
    for epochs in (2, 4):
        run(train_basic, "--epochs", epochs, "--checkpoint", file)
    manual = trained(train_manual, (8, 4), "--epochs", 4)
    assert torch.equal(weights(file), manual)


EDITS = [
    pytest.param(momentum, "momentum is 0.9, was 0; take the old", id="momentum"),
    pytest.param(torch.optim.AdamW, "optimizer is AdamW, was SGD;", id="AdamW"),
]


@pytest.mark.parametrize(("optimizer", "said"), EDITS)
def test_a_checkpoint_of_another_optimizer_is_refused(
    run, refused, tmp_path, monkeypatch, optimizer, said
):
    flags = ["--checkpoint", tmp_path / "run.pt"]
    run(train_basic, *flags)
    monkeypatch.setattr(torch.optim, "SGD", optimizer)
    assert f"run.pt: {said}" in refused(train_basic, *flags)


def test_a_checkpoint_of_another_learning_rate_for_some_weights_is_refused(
    run, refused, tmp_path, monkeypatch
):
    sgd = torch.optim.SGD

    def two_rates(parameters, lr):
        weight, bias = parameters
        return sgd([{"params": weight}, {"params": bias, "lr": rate}], lr=lr)

    monkeypatch.setattr(torch.optim, "SGD", two_rates)
    flags = ["--checkpoint", tmp_path / "run.pt"]
    rate = 0.1
    run(train_basic, *flags)
    rate = 0.2
    assert "other groups is [{'lr': 0.2" in refused(train_basic, *flags)


# ---- what is printed
STEP = re.compile(r"Epoch: (\d+), Step: (\d+), Loss: (\d+\.\d{6})")
SIZES = [
    pytest.param(train_basic, "32 x 1", 32, id="basic"),
    pytest.param(train_accum, "8 x 4", 32, id="accum"),
    pytest.param(train_manual, "16 x 1", 63, id="manual"),
]


@pytest.mark.parametrize(("script", "sizes", "steps"), SIZES)
def test_a_script_runs_without_flags(started, script, sizes, steps):
    process, _ = started[script]
    first, *middle, last = finish(process).splitlines()
    sizes = f"1000 rows, {sizes} per step, {steps} steps per epoch, 0 of 10 epochs done"
    assert first.startswith(sizes)
    assert first.endswith(f", processes: 1, torch {torch.__version__}, seed 0")
    assert STEP.fullmatch(middle[steps])[1] == "2"
    assert re.fullmatch(
        rf"{10 * steps} optimizer steps, mean squared error 0\.0\d+, [\d.]+ s, "
        r"[\d,]+ rows/s, peak memory (\d+ MiB of the \w+|unknown)",
        last,
    )


def test_one_of_x_steps_is_printed_with_the_mean_loss_of_the_whole_step(run):
    def printed(script):
        lines = run(script, "--rows", 100, "--epochs", 2, "--log-every", 3)
        return np.array([STEP.fullmatch(line).groups() for line in lines[1:-1]], float)

    basic = printed(train_basic)
    assert basic[:, :2].tolist() == [[1, 1], [1, 4], [2, 1], [2, 4]]
    assert np.allclose(basic, printed(train_accum), atol=1e-5)


@posix
def test_interrupts_and_closed_pipes_end_a_script_at_once(run, monkeypatch):
    calls = []
    monkeypatch.setattr(signal, "signal", lambda *call: calls.append(call))
    run(train_basic)
    assert calls == [(signal.SIGINT, signal.SIG_DFL), (signal.SIGPIPE, signal.SIG_DFL)]


WRONG = {
    "--batch-size": ["0", "1.5", ""],
    "--accumulation-steps": ["0"],
    "--rows": ["0", "10000000000"],
    "--epochs": ["0"],
    "--hidden": ["-1"],
    "--seed": ["-1"],
    "--log-every": ["-1"],
    "--lr": ["0", "nan", "inf", "x"],
    "--device": ["tpu", "cuda:99", "meta"],
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_flag(refused, flag):
    for value in WRONG[flag]:
        error = refused(train_accum, f"{flag}={value}")
        assert f"train_accum.py: error: argument {flag}: " in error


def test_data_of_two_kinds_are_refused(refused):
    assert "not allowed with" in refused(train_basic, "--data", "x", "--rows", 5)


@each_script
def test_weights_that_are_not_finite_are_not_written(refused, tmp_path, script):
    error = refused(script, "--lr", 1e4, "--checkpoint", tmp_path / "run.pt")
    assert "error: epoch 1: a weight is not finite; try a lower --lr" in error
    assert os.listdir(tmp_path) == []


def test_each_weight_has_to_be_finite_and_may_be_large(tmp_path):
    model = nn.Linear(1, 1)
    model.weight.data.fill_(3e38)  # its square overflows
    common.save_checkpoint(tmp_path / "run.pt", {"model": model}, 1, {}, {})
    model.bias.data.fill_(torch.nan)
    with pytest.raises(SystemExit, match="not finite"):
        common.save_checkpoint(tmp_path / "run.pt", {"model": model}, 2, {}, {})


# ---- data
ROWS = np.random.default_rng(0).integers(-99, 99, (40, 4))
SCALES = [2**14, 1e-9, 0, 1]
TABLE = ROWS * SCALES + [1.7e18, 5, 0.1, 0]  # first column: time stamps in nanoseconds


def read(file):
    return common.get_data(common.argparse.Namespace(data=str(file)))


@pytest.mark.parametrize("kind", ["csv", "npy", "npz"])
def test_each_kind_of_file_gives_the_same_standardised_columns(tmp_path, kind):
    file = tmp_path / f"table.{kind}"
    if kind == "csv":
        np.savetxt(file, TABLE, delimiter=",", fmt="%.17g")
    elif kind == "npy":
        np.save(file, np.asfortranarray(TABLE))
    else:
        np.savez(file, X=TABLE[:, :-1], y=TABLE[:, -1])
    X, y, name, scaling = read(file)
    expected = (ROWS - ROWS.mean(axis=0)) / ROWS.std(axis=0)
    expected[:, 2] = 0  # a constant
    assert np.allclose(torch.cat([X, y], dim=1), expected, atol=1e-4)
    assert np.allclose(scaling["mean"], TABLE.mean(axis=0))
    assert np.allclose(scaling["std"][[0, 3]], TABLE.std(axis=0)[[0, 3]])
    assert name.startswith("40 rows with numbers beyond 2**53 (16 digits")


def test_the_table_of_a_spreadsheet_is_read(tmp_path):
    file = tmp_path / "table.csv"
    text = '"a, b","2020_1"\n\n"1","2"\n"3","5"\n\n'
    file.write_text(text, encoding="utf-8-sig", newline="\r\n")
    X, y, name, _ = read(file)
    assert X.tolist() == y.tolist() == [[-1], [1]]
    assert name.startswith("2 rows under a header, checksum ")


def test_the_closing_loss_is_the_mean_over_rows_and_targets(run, tmp_path):
    data, file = tmp_path / "table.npz", tmp_path / "run.pt"
    np.savez(data, X=ROWS[:, :2], y=ROWS[:, 2:])
    last = run(train_accum, "--data", data, "--checkpoint", file)[-1]
    X, y, *_ = read(data)
    model = nn.Linear(2, 2)
    model.load_state_dict(torch.load(file)["model"])
    found = re.search(r"share of the targets' variance left unexplained (\S+),", last)
    loss = F.mse_loss(model(X), y).item()
    assert float(found[1]) == pytest.approx(loss, abs=2e-6)


TEXTS = [
    pytest.param("", "line 1 has no name", id="empty"),
    pytest.param("a,b\n", "shape (0, 2) has no inputs", id="header only"),
    pytest.param("1\n2\n", "shape (2, 1) has no inputs", id="one column"),
    pytest.param("a,b\n1,2\n\n3,x\n", "line 4: could not convert", id="word"),
    pytest.param("x,2\n3,4\n", "line 1: could not convert", id="mixed header"),
    pytest.param("a,b\n1,0,2\n", "line 2: the number of columns", id="comma"),
    pytest.param("a,b\n1,2\n3,nan\n", "row 2, column 2: nan is not", id="nan"),
    pytest.param("1,2\n-1e200,3\n", "row 2, column 1: -1e+200 is not", id="large"),
    pytest.param(",a,b\n0,1,2\n", "(index=False, header=False)", id="index"),
    pytest.param("0,1,2\n5,6,7\n", "(index=False, header=False)", id="numbered"),
    pytest.param("größe,x\n1,2\n", "utf-8", id="Latin-1"),
    pytest.param("1,2\n3,2\n", "a target is the same in all rows", id="constant"),
]


@pytest.mark.parametrize(("text", "said"), TEXTS)
def test_a_text_that_is_no_table_is_refused_with_the_place(
    refused, tmp_path, text, said
):
    file = tmp_path / "table.csv"
    file.write_text(text, encoding="latin-1")
    error = refused(train_basic, "--data", file)
    assert f"error: --data {file}: " in error
    assert said in error


ONES = np.ones((3, 2))
DATES = ONES.astype("datetime64[D]")
ARRAYS = [
    pytest.param({"X": ONES}, "y is not a file", id="no targets"),
    pytest.param({"X": ONES, "y": ONES[:, :0]}, "has no inputs", id="empty targets"),
    pytest.param({"X": ONES, "y": ONES * 1j}, "complex128", id="complex"),
    pytest.param({"X": DATES, "y": DATES}, "M8[D]", id="dates"),
    pytest.param({"X": np.ones(3, "f4,f4"), "y": ONES}, "promote", id="records"),
    pytest.param({"X": [[None]], "y": [1]}, "Object arrays", id="objects"),
]


@pytest.mark.parametrize(("arrays", "said"), ARRAYS)
def test_arrays_that_are_no_table_are_refused(refused, tmp_path, arrays, said):
    np.savez(tmp_path / "table.npz", **arrays)
    assert said in refused(train_basic, "--data", tmp_path / "table.npz")


def test_a_damaged_archive_is_refused(refused, tmp_path):
    file = tmp_path / "table.npz"
    np.savez_compressed(file, X=TABLE, y=ROWS)
    whole = file.read_bytes()
    for content in (b"", whole[:-7], whole[:200] + b"damage" + whole[206:]):
        file.write_bytes(content)
        assert f"error: --data {file}: " in refused(train_basic, "--data", file)


# ---- checkpoint
@posix
def test_after_a_kill_the_same_command_goes_on_to_the_same_weights(
    run, trained, tmp_path
):
    file = tmp_path / "run.pt"
    flags = ["--device", "cpu", "--hidden", 4, "--checkpoint", file, "--epochs"]
    process = start(tmp_path, sys.executable, train_accum.__file__, *flags, 2000)
    while not file.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    done = torch.load(file)["epoch"]
    first, *_ = run(train_accum, *flags, done + 1)
    assert f" {done} of {done + 1} epochs done" in first
    whole = trained(train_accum, (8, 4), "--hidden", 4, "--epochs", done + 1)
    assert torch.equal(weights(file), whole)


def test_scripts_go_on_from_each_others_checkpoints(
    run, trained, monkeypatch, tmp_path
):
    """With Adam's state; a finished run trains nothing."""
    monkeypatch.setattr(torch.optim, "SGD", torch.optim.Adam)
    monkeypatch.chdir(tmp_path)
    flags = ["--log-every", 0, "--checkpoint", "run.pt", "--epochs"]
    run(train_basic, *flags, 1)
    run(train_accum, *flags, 2)
    first, last = run(train_basic, *flags, 2)
    assert " 2 of 2 epochs done" in first
    assert last.startswith("0 optimizer steps")
    run(train_manual, *flags, 3, "--batch-size", 32)
    whole = trained(train_basic, (8, 4), "--epochs", 3)
    assert torch.allclose(weights("run.pt"), whole, atol=1e-6)


CHANGES = [
    pytest.param(["--lr", 0.1], "lr is 0.1, was 0.01;", id="lr"),
    pytest.param(["--seed", 1], "seed is 1, was 0;", id="seed"),
    pytest.param(["--batch-size", 16], "rows per step is 16, was 32;", id="batch"),
    pytest.param(["--rows", 999], "data is 999 rows, was 1000 rows;", id="rows"),
    pytest.param(["--hidden", 4], "model is Sequential( (0): Linear(", id="hidden"),
]


@pytest.mark.parametrize(("flags", "said"), CHANGES)
def test_a_checkpoint_of_another_setting_is_refused(
    run, refused, tmp_path, flags, said
):
    file = tmp_path / "run.pt"
    run(train_basic, "--checkpoint", file)
    before = file.read_bytes()
    error = refused(train_basic, "--checkpoint", file, *flags)
    assert f"error: --checkpoint {file}: {said}" in error
    assert file.read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(run, refused, tmp_path):
    data = tmp_path / "table.npy"
    flags = ["--data", data, "--checkpoint", tmp_path / "run.pt"]
    np.save(data, TABLE)
    run(train_basic, *flags)
    units, order, targets = TABLE * 1024, TABLE[::-1], TABLE.copy()
    targets[:2, -1] = targets[1::-1, -1]
    for other in (units, order, targets):
        np.save(data, other)
        assert "run.pt: data is 40 rows" in refused(train_basic, *flags)


class Code:
    def __reduce__(self):
        return open, ("opened", "w")  # a pickle may do this when it is loaded


FOREIGN = {
    "list": [1, 2],
    "tensor": torch.ones(3),
    "text": "settings",
    "other settings": {"settings": "none"},
    "another program's": {"settings": {"seed": 0}},
    "code": Code(),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_and_kept(refused, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "run.pt")
    before = pathlib.Path("run.pt").read_bytes()
    assert "run.pt: " in refused(train_basic, "--checkpoint", "run.pt")
    assert pathlib.Path("run.pt").read_bytes() == before
    assert os.listdir() == ["run.pt"]


def test_a_damaged_checkpoint_is_refused(run, refused, tmp_path):
    file = tmp_path / "run.pt"
    run(train_basic, "--checkpoint", file)
    whole = file.read_bytes()
    weight = torch.load(file)["model"]["weight"].numpy().tobytes()
    for content in (b"", whole[:-9], whole.replace(weight, bytes(40))):
        file.write_bytes(content)
        error = refused(train_basic, "--checkpoint", file)
        assert "run.pt: not a whole checkpoint of these scripts" in error


def test_a_missing_folder_is_refused_before_training(refused, tmp_path):
    error = refused(train_basic, "--checkpoint", tmp_path / "missing" / "run.pt")
    assert "run.pt: a folder that can be written to is needed" in error


def test_a_write_that_fails_half_way_keeps_the_old_checkpoint(
    run, refused, tmp_path, monkeypatch
):
    file = tmp_path / "run.pt"
    (tmp_path / "run.pt.notes.tmp").write_text("a user's")
    run(train_basic, "--checkpoint", file)
    before = file.read_bytes()

    def full(descriptor):
        assert os.fstat(descriptor).st_size > 1000
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = refused(train_basic, "--checkpoint", file, "--epochs", 20)
    assert "No space left on device; what it held before is safe" in error
    assert file.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["run.pt", "run.pt.notes.tmp", "run.pt.tmp"]


def test_a_checkpoint_is_replaced_and_not_written_in_place(run, tmp_path):
    file, link = tmp_path / "run.pt", tmp_path / "link.pt"
    run(train_basic, "--checkpoint", file)
    os.link(file, link)
    before = link.read_bytes()
    run(train_basic, "--checkpoint", file, "--epochs", 20)
    assert link.read_bytes() == before


# ---- device and processes
DEVICES = [  # accelerators, processes, --device, what the second process gets
    pytest.param(0, 1, "auto", "cpu", id="none"),
    pytest.param(1, 1, "auto", "cuda:0", id="one"),
    pytest.param(1, 2, "auto", "cpu", id="one for two"),
    pytest.param(2, 2, "auto", "cuda:1", id="two for two"),
    pytest.param(2, 2, "cuda", "cuda:1", id="name"),
    pytest.param(2, 1, "cuda:1", "cuda:1", id="number"),
]


@pytest.mark.parametrize(("count", "processes", "name", "device"), DEVICES)
def test_each_process_has_an_accelerator_or_all_have_the_cpu(
    monkeypatch, count, processes, name, device
):
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over, if there is one process
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for function, value in {
        "torch.distributed.is_torchelastic_launched": processes == 2,
        "torch.accelerator.device_count": count,
        "torch.accelerator.current_accelerator": torch.device("cuda"),
    }.items():
        monkeypatch.setattr(function, lambda value=value: value)
    assert common.pick_device(name) == torch.device(device)


@pytest.mark.parametrize("script", [train_basic, train_manual])
def test_several_processes_are_sent_to_train_accum(refused, monkeypatch, script):
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    assert "several: train_accum.py --batch-size 9 " in refused(
        script, "--batch-size=9"
    )


OTHERS = [
    pytest.param({"lr": 0.5}, "lr is 0.5, in process 0 0.01", id="setting"),
    pytest.param({"log_every": 2}, "log_every is 2, in process 0 1", id="flag"),
    pytest.param({"data": "x"}, "data is x, in process 0 1000 rows", id="data"),
]


@pytest.mark.parametrize(("other", "said"), OTHERS)
def test_processes_with_other_flags_or_data_are_refused(
    refused, monkeypatch, tmp_path, other, said
):
    def gather(everyone, mine):
        everyone[:] = [mine, mine | other]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    error = refused(train_accum, "--checkpoint", tmp_path / "run.pt")
    assert f"error: in process 1, {said}" in error
    assert os.listdir(tmp_path) == []


def worker():
    """Run train_accum.py as one process of several, and write down what it did.

    With KILL, process 1 kills itself in the second epoch of its first attempt.
    """
    rank = os.environ["RANK"]
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    train_epoch = train_accum.train_epoch
    seeds = []
    reductions = []

    def count(_, bucket):
        reductions.append(bucket.index())
        return allreduce_hook(None, bucket)

    def watched_epoch(model, *args, epoch, **options):
        if "KILL" in os.environ and rank == "1" and epoch == 1 and first_attempt:
            os.kill(os.getpid(), signal.SIGKILL)
        if not seeds:
            model.register_comm_hook(None, count)
        seeds.append(torch.initial_seed())
        return train_epoch(model, *args, epoch=epoch, **options)

    train_accum.train_epoch = watched_epoch
    train_accum.main()
    torch.save({"seeds": seeds, "reductions": len(reductions)}, f"facts{rank}.pt")


@posix
def test_a_killed_process_costs_its_epoch_at_most(started, trained):
    process, folder = started["torchrun"]
    *_, first, last = finish(process).splitlines()
    assert " 1 of 3 epochs done; cpu, processes: 2, " in first
    assert last.startswith("66 optimizer steps, ")
    whole = trained(train_accum, (8, 4), "--rows", 1037, "--epochs", 3)
    assert torch.allclose(weights(folder / "shared.pt"), whole, rtol=0, atol=1e-6)
    zero, one = (torch.load(folder / f"facts{rank}.pt") for rank in (0, 1))
    assert zero["reductions"] == one["reductions"] == 66  # one a step
    assert len({*zero["seeds"], *one["seeds"]}) == 4  # other masks of dropout


@posix
def test_two_machines_go_on_from_the_file_of_the_first(run, trained, tmp_path):
    """A micro-batch has a single row, so one of the shares is empty."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--rows", 33, "--batch-size", 1, "--checkpoint", "run.pt", "--epochs"]
    processes = []
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        options = ["--nnodes", 2, "--node-rank", rank, "--master-port", port]
        command = [*TORCHRUN, *options, __file__, *flags, 3, "--device", "cpu"]
        if rank == 0:
            with contextlib.chdir(folder):
                run(train_accum, *flags, 1)
        processes.append(start(folder, *command))
    out, silence = map(finish, processes)
    assert " 1 of 3 epochs done; cpu, processes: 2, " in out
    assert silence == ""
    assert os.listdir(tmp_path / "1") == ["facts1.pt"]
    whole = trained(train_accum, (1, 4), "--rows", 33, "--epochs", 3)
    assert torch.allclose(weights(tmp_path / "0/run.pt"), whole, rtol=0, atol=1e-6)


# ---- README
INTRODUCTION, *SECTIONS = README.split("\n## ")
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORTER = {"Choosing sizes": ["--rows", 256, "--epochs", 1]}  # flags for measurements


def test_the_loop_to_copy_takes_the_steps_of_train_basic():
    names = {}
    exec(BLOCK.search(INTRODUCTION)[2], names)
    torch.manual_seed(0)
    torch.randn(1001, 10)
    torch.randn(1001, 1)
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(names["loader"].dataset, batch_size=32, shuffle=True)
    for _ in range(10):
        train_basic.train_epoch(model, optimizer, loader, log_every=0)
    assert torch.allclose(model.weight, names["model"].weight, rtol=0, atol=1e-5)


@posix
@pytest.mark.parametrize("section", [s for s in SECTIONS if BLOCK.search(s)])
def test_every_block_of_the_readme_runs(section, run, started, tmp_path, monkeypatch):
    title, _, text = section.partition("\n")
    if title == "Set-up":
        pytest.skip("its commands run the tests; .ci/run runs them")
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCK.findall(text):
        if language == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            program, name, *flags = shlex.split(line)
            if program == "torchrun":
                process, folder = started["torchrun"]
                process.wait(HANG)
                shutil.copy(folder / flags[-1], tmp_path)
            elif name == "-c":
                exec(flags[0], {})
            else:
                script = sys.modules[name.removesuffix(".py")]
                run(script, *flags, *SHORTER.get(title, []))


if __name__ == "__main__":
    worker()
