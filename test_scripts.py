"""Tests of the promise (the same trajectory, however a batch is sliced) and its edges.

    python -m pytest -q

Some tests let torchrun start this file: then it is worker(), one of several processes.
"""

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
from pytest import param
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import common
import train_accum
import train_basic
import train_manual

SCRIPTS = [train_basic, train_accum, train_manual]
README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
HANG = 900  # seconds, after which a process hangs, on any machine

parametrize = pytest.mark.parametrize
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
        command = [f"{script.__name__}.py", "--device=cpu", *map(str, flags)]
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


def scripts_agree(trained, cut, *flags, tolerance=1e-5):
    """Say whether the three scripts train the same weights, up to rounding."""
    basic, accum, manual = (trained(script, cut, *flags) for script in SCRIPTS)
    return torch.equal(basic, manual) and (accum - basic).abs().max() < tolerance


def weights(file):
    state = torch.load(file, map_location="cpu")
    return nn.utils.parameters_to_vector(state["model"].values())


def start(folder, *command):
    """Start a process; finish() must follow."""
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
    return out


def torchrun(folder, options, flags):
    """Start processes that run worker()."""
    command = [*TORCHRUN, *options.split(), __file__, *flags.split(), "--device=cpu"]
    return start(folder, *command)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Start what takes long; return {name: (process, its folder)}.

    These are the scripts, as a user starts them, and the README's torchrun command,
    with worker() as train_accum.py and a second try for the process that it kills.
    """
    started = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp("script")
        started[script] = start(folder, sys.executable, script.__file__), folder
    if os.name == "posix":
        folder = tmp_path_factory.mktemp("torchrun")
        line = re.search("^torchrun (.*)train_accum.py (.*)", README, re.MULTILINE)
        options = f"--max-restarts 1 {line[1]}"
        started["torchrun"] = torchrun(folder, options, line[2]), folder
    yield started
    for process, _ in started.values():
        process.terminate()
        process.communicate()


@pytest.fixture
def float64(monkeypatch):
    """Let the scripts compute in float64."""
    make_model, make_data = common.make_model, common.make_data
    monkeypatch.setattr(common, "make_model", lambda *n: make_model(*n).double())
    monkeypatch.setattr(
        common, "make_data", lambda n: [t.double() for t in make_data(n)]
    )


# ---- the promise
@parametrize("cut", [(8, 4), (1, 32), (32, 1), (7, 3), (400, 4)], ids=str)
@parametrize("rows", [1, 5, 31, 32, 33, 1000, 1001, 1037])
def test_the_cut_does_not_change_the_weights(float64, trained, rows, cut):
    flags = ["--rows", rows, "--epochs", 2, "--log-every", 0]
    assert scripts_agree(trained, cut, *flags, tolerance=1e-12)


@parametrize("device", ["cpu", param("auto", marks=gpu)])
def test_in_float32_the_cut_changes_rounding_only(trained, device):
    flags = ["--rows", 1037, "--epochs", 3, "--hidden", 16, "--device", device]
    assert scripts_agree(trained, (8, 4), *flags)


def test_uneven_micro_batches_without_a_length_make_the_same_steps():
    """With classes and AdamW, in models that were left in eval()."""
    X, y = torch.randn(77, 10).double(), torch.arange(77) % 5

    def train(script, *data):
        torch.manual_seed(0)
        model = nn.Linear(10, 5).double().eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        script.train_epoch(model, optimizer, *data, loss_fn=F.cross_entropy)
        assert model.training
        return model.weight

    def stream(*sizes):
        return zip(X.split(sizes), y.split(sizes))

    basic = train(train_basic, stream(32, 32, 13))
    accum = train(train_accum, stream(20, 2, 5, 5, 8, 8, 8, 8, 13), 4)
    assert torch.equal(basic, train(train_manual, X, y, torch.arange(77), 32))
    assert torch.allclose(basic, accum, rtol=0, atol=1e-13)


@parametrize("script", SCRIPTS)
def test_a_step_descends_the_mean_loss_of_its_rows(float64, trained, script):
    X, y = common.make_data(33)
    X1 = F.pad(X, (0, 1), value=1)  # the last weight is the bias
    torch.manual_seed(5)
    model = common.make_model(10, 1)
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    for rows in common.shuffled_indices(33, 5, 0).split(32):
        errors = X1[rows] @ expected - y[rows, 0]
        expected -= 0.01 * 2 * errors @ X1[rows] / len(rows)
    found = trained(script, (8, 4), "--rows", 33, "--epochs", 1, "--seed", 5)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)


def test_an_epoch_has_each_row_once_in_an_order_of_its_own():
    seeds = [(0, 0), (0, 1), (1, 0)]
    orders = [common.shuffled_indices(50, *seed).tolist() for seed in seeds]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3


@parametrize("rows, steps", [(1, 1), (64, 2), (65, 3)])
def test_an_epoch_has_a_step_for_each_32_rows_begun(run, rows, steps):
    for script in (train_basic, train_accum):
        first, *middle, last = run(script, "--rows", rows)
        assert f" per step, {steps} steps per epoch, " in first
        assert last.startswith(f"{10 * steps} optimizer steps, ")
        assert len(middle) == 10 * steps


def test_less_than_one_accumulation_step_is_refused():
    with pytest.raises(ValueError, match="accumulation_steps is 0"):
        train_accum.train_epoch(nn.Linear(1, 1), None, [], 0)


# ---- edits of main()
def dropout_model(*sizes):
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(10, 1))


def norm_model(*sizes):
    return nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 1))


SGD = torch.optim.SGD
momentum = functools.partial(SGD, momentum=0.9)


def faster_bias(parameters, lr):
    weight, bias = parameters
    return SGD([{"params": weight}, {"params": bias, "lr": 0.1}], lr=lr)


def test_a_model_and_an_optimizer_of_ones_own_keep_the_promise(trained, monkeypatch):
    monkeypatch.setattr(common, "make_model", norm_model)
    monkeypatch.setattr(torch.optim, "SGD", momentum)
    assert scripts_agree(trained, (8, 4))


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
    (momentum, "momentum is 0.9, was 0; take the old"),
    (torch.optim.AdamW, "optimizer is AdamW, was SGD;"),
    (faster_bias, "params is [0], was [0, 1]; other groups is"),
]


@parametrize("optimizer, said", EDITS)
def test_a_checkpoint_of_another_optimizer_is_refused(
    run, refused, tmp_path, monkeypatch, optimizer, said
):
    flags = ["--checkpoint", tmp_path / "run.pt"]
    run(train_basic, *flags)
    monkeypatch.setattr(torch.optim, "SGD", optimizer)
    assert f"run.pt: {said}" in refused(train_basic, *flags)


# ---- what is printed
STEP = re.compile(r"Epoch: (\d+), Step: (\d+), Loss: \d+\.\d{6}")
SIZES = [
    (train_basic, "32 x 1 per step, 32 steps"),
    (train_accum, "8 x 4 per step, 32 steps"),
    (train_manual, "16 x 1 per step, 63 steps"),
]


@parametrize("script, sizes", SIZES)
def test_a_script_runs_without_flags(started, script, sizes):
    process, _ = started[script]
    first, *middle, last = finish(process).splitlines()
    assert first.startswith(f"1000 rows, {sizes} per epoch, 0 of 10 epochs done; ")
    assert first.endswith(f", processes: 1, torch {torch.__version__}, seed 0")
    assert STEP.fullmatch(middle[100])
    closing = (
        r"\d+ optimizer steps, mean squared error 0\.0\d+, [\d.]+ s, [\d,]+ rows/s, "
    )
    assert re.match(closing + r"peak memory (\d+ MiB of the \w+|unknown)$", last)


def test_one_of_x_steps_is_printed_with_the_mean_loss_of_the_whole_step(float64, run):
    flags = ["--rows", 100, "--epochs", 1, "--log-every", 3]
    basic, accum = (run(script, *flags)[1:-1] for script in (train_basic, train_accum))
    assert basic == accum
    steps = [STEP.fullmatch(line)[2] for line in basic]
    assert steps == ["1", "4"]


@posix
def test_interrupts_and_closed_pipes_end_a_script_at_once(run, monkeypatch):
    calls = []
    monkeypatch.setattr(signal, "signal", lambda *call: calls.append(call))
    run(train_basic)
    assert calls == [(signal.SIGINT, signal.SIG_DFL), (signal.SIGPIPE, signal.SIG_DFL)]


WRONG = ["batch-size=0", "batch-size=1.5", "accumulation-steps=0", "rows=10000000000"]
WRONG += ["epochs=0", "hidden=-1", "seed=-1", "log-every=-1", "lr=0", "lr=nan", "lr=x"]
WRONG += ["device=tpu", "device=cuda:99"]


@parametrize("flag", WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_flag(refused, flag):
    name, _, _ = flag.partition("=")
    error = refused(train_accum, f"--{flag}")
    assert f"train_accum.py: error: argument --{name}: " in error


def test_each_weight_has_to_be_finite_to_be_written_and_may_be_large(tmp_path):
    file = tmp_path / "run.pt"
    parts = {"model": nn.Linear(1, 1)}
    weight, bias = parts["model"].parameters()
    weight.data.fill_(3e38)  # its square overflows
    common.save_checkpoint(file, parts, 1, {}, {})
    bias.data.fill_(torch.nan)
    with pytest.raises(SystemExit, match="epoch 2: a weight is not finite"):
        common.save_checkpoint(file, parts, 2, {}, {})
    assert torch.load(file)["epoch"] == 1


# ---- data
ROWS = np.random.default_rng(0).integers(-99, 99, (40, 4))
SCALES = [2**14, 1e-9, 0, 1]
TABLE = ROWS * SCALES + [1.7e18, 5, 0.1, 0]  # first column: time stamps in nanoseconds


def read(file):
    return common.get_data(common.argparse.Namespace(data=str(file)))


def test_each_kind_of_file_gives_the_same_standardised_columns(tmp_path):
    """The .csv looks as if it came from a spreadsheet."""
    style = {"header": '"a, b",2020_1,,"y"', "comments": "", "newline": "\r\n\r\n"}
    csv = tmp_path / "table.csv"
    np.savetxt(csv, TABLE, "%.17g", ",", encoding="utf-8-sig", **style)
    np.save(tmp_path / "table.npy", np.asfortranarray(TABLE))
    np.savez(tmp_path / "table.npz", X=TABLE[:, :-1], y=TABLE[:, -1])
    expected = (ROWS - ROWS.mean(axis=0)) / ROWS.std(axis=0)
    expected[:, 2] = 0  # a constant
    for file in tmp_path.iterdir():
        X, y, name, _ = read(file)
        assert np.allclose(torch.cat([X, y], dim=1), expected, atol=1e-4)
        assert "with numbers beyond 2**53 (16 digits of them are used)" in name
    assert read(csv)[2].startswith("40 rows under a header with numbers")


def test_the_closing_loss_is_the_mean_over_rows_and_targets(run, monkeypatch, tmp_path):
    def zeros(*sizes):
        return nn.Sequential(nn.Linear(2, 2), nn.Threshold(1e9, 0))

    data = tmp_path / "table.npz"
    np.savez(data, X=ROWS[:, :2], y=ROWS[:, 2:])
    monkeypatch.setattr(common, "make_model", zeros)
    last = run(train_accum, "--data", data)[-1]
    assert "share of the targets' variance left unexplained 1.000000," in last


TEXTS = [
    param("", "line 1 has no name", id="empty"),
    param("a,b\n1,2\n\n3,x\n", "line 4: could not convert", id="word"),
    param("a,b\n1,0,2\n", "line 2: the number of columns", id="comma"),
    param("a,b\n1,2\n3,nan\n", "row 2, column 2: nan is not", id="nan"),
    param("1,2\n-1e200,3\n", "row 2, column 1: -1e+200 is not", id="large"),
    param(",a,b\n0,1,2\n", "(index=False, header=False)", id="index"),
    param("0,1,2\n5,6,7\n", "(index=False, header=False)", id="numbered"),
    param("1,2\n3,2\n", "a target is the same in all rows", id="constant"),
]


@parametrize("text, said", TEXTS)
def test_a_text_that_is_no_table_is_refused_with_the_place(
    refused, tmp_path, text, said
):
    file = tmp_path / "table.csv"
    file.write_text(text)
    error = refused(train_basic, "--data", file)
    assert f"error: --data {file}: " in error
    assert said in error


ONES = np.ones((3, 2))
DATES = ONES.astype("datetime64[D]")
ARRAYS = [
    ({"X": ONES}, "y is not a file"),
    ({"X": ONES, "y": ONES[:, :0]}, "has no inputs and targets"),
    ({"X": DATES, "y": DATES}, "M8[D]"),
    ({"X": np.ones(3, "f4,f4"), "y": ONES}, "promote"),
    ({"X": [[None]], "y": [1]}, "Object arrays"),
]


@parametrize("arrays, said", ARRAYS)
def test_arrays_that_are_no_table_are_refused(refused, tmp_path, arrays, said):
    np.savez(tmp_path / "table.npz", **arrays)
    assert said in refused(train_basic, "--data", tmp_path / "table.npz")


def test_a_damaged_archive_is_refused(refused, tmp_path):
    file = tmp_path / "table.npz"
    np.savez_compressed(file, X=TABLE, y=ROWS)
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + b"damage" + whole[206:])
    assert f"error: --data {file}: " in refused(train_basic, "--data", file)


# ---- checkpoint
@posix
def test_after_a_kill_the_same_command_goes_on_to_the_same_weights(
    run, trained, tmp_path
):
    file = tmp_path / "run.pt"
    flags = ["--device=cpu", "--checkpoint", file, "--epochs"]
    process = start(tmp_path, sys.executable, train_accum.__file__, *flags, 5000)
    while not file.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    epochs = torch.load(file)["epoch"] + 1
    run(train_accum, *flags, epochs)
    whole = trained(train_accum, (8, 4), "--epochs", epochs)
    assert torch.equal(weights(file), whole)


def test_scripts_go_on_from_each_others_checkpoints(
    run, trained, monkeypatch, tmp_path
):
    """With Adam's state. A finished run takes no step."""
    monkeypatch.setattr(torch.optim, "SGD", torch.optim.Adam)
    monkeypatch.chdir(tmp_path)
    flags = ["--batch-size", 32, "--checkpoint", "run.pt", "--epochs"]
    run(train_basic, *flags, 1)
    run(train_accum, "--accumulation-steps", 1, *flags, 2)
    assert "0 optimizer steps" in run(train_basic, *flags, 2)[-1]
    run(train_manual, *flags, 3)
    whole = trained(train_basic, (8, 4), "--epochs", 3)
    assert torch.allclose(weights("run.pt"), whole, atol=1e-6)


def test_each_setting_that_differs_is_told_and_no_other(run, refused, tmp_path):
    file = tmp_path / "run.pt"
    run(train_basic, "--checkpoint", file)
    before = file.read_bytes()
    flags = ["--hidden=4", "--lr=0.1", "--batch-size=16", "--seed=1", "--rows=999"]
    error = refused(train_basic, "--checkpoint", file, *flags)
    assert f"{file}: model is Sequential( (0): Linear(in_features=10, out_f" in error
    assert (
        "; params is [0, 1, 2, 3], was [0, 1]; rows per step is 16, was 32; " in error
    )
    assert "; seed is 1, was 0; data is 999 rows, was 1000 rows; take" in error
    assert "; lr is 0.1, was 0.01; " in error
    assert file.read_bytes() == before


def test_a_checkpoint_of_other_data_is_refused(run, refused, tmp_path):
    data = tmp_path / "table.npy"
    flags = ["--data", data, "--checkpoint", tmp_path / "run.pt"]
    np.save(data, TABLE)
    run(train_basic, *flags)
    other_targets = np.c_[TABLE[:, :-1], TABLE[::-1, -1]]
    for other in (TABLE * 1024, TABLE[::-1], other_targets):
        np.save(data, other)
        assert "run.pt: data is 40 rows" in refused(train_basic, *flags)


class Code:
    def __reduce__(self):
        return open, ("opened", "w")  # a pickle may do this when it is loaded


FOREIGN = {
    "tensor": torch.ones(3),
    "other settings": {"settings": "none"},
    "another program's": {"settings": {"seed": 0}},
    "code": Code(),
}


@parametrize("content", FOREIGN.values(), ids=FOREIGN)
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


def test_a_checkpoint_is_replaced_when_it_is_written_whole(
    run, refused, tmp_path, monkeypatch
):
    file, link = tmp_path / "run.pt", tmp_path / "run.pt.notes.tmp"
    run(train_basic, "--checkpoint", file)
    os.link(file, link)  # the same bytes, for as long as none is written into them
    before = file.read_bytes()

    def full(descriptor):
        assert os.fstat(descriptor).st_size > 1000
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        error = refused(train_basic, "--checkpoint", file, "--epochs", 20)
    assert "No space left on device; what it held before is safe" in error
    assert file.read_bytes() == before
    run(train_basic, "--checkpoint", file, "--epochs", 20)
    assert sorted(os.listdir(tmp_path)) == ["run.pt", "run.pt.notes.tmp"]
    assert file.read_bytes() != link.read_bytes() == before


# ---- device and processes
DEVICES = [  # accelerators, processes, --device, what the second process gets
    (0, 1, "auto", "cpu"),
    (1, 1, "auto", "cuda:0"),
    (1, 2, "auto", "cpu"),
    (2, 2, "cuda", "cuda:1"),
]


@parametrize("count, processes, name, device", DEVICES)
def test_each_process_has_an_accelerator_or_all_have_the_cpu(
    monkeypatch, count, processes, name, device
):
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over, if there is one process
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for function, value in (
        ("distributed.is_torchelastic_launched", processes == 2),
        ("accelerator.device_count", count),
        ("accelerator.current_accelerator", torch.device("cuda")),
    ):
        monkeypatch.setattr(f"torch.{function}", lambda value=value: value)
    assert common.pick_device(name) == torch.device(device)


def test_several_processes_are_sent_to_train_accum(refused, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    assert "train_accum.py --batch-size 9 " in refused(train_basic, "--batch-size", 9)


def test_processes_with_other_flags_or_settings_are_refused(
    refused, monkeypatch, tmp_path
):
    def gather(everyone, mine):
        everyone[:] = [mine, mine | {"lr": 0.5, "log_every": 2}]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    error = refused(train_accum, "--checkpoint", tmp_path / "run.pt")
    assert "error: in process 1, lr is 0.5, in process 0 0.01; log_every is 2" in error
    assert os.listdir(tmp_path) == []


def worker():
    """Run train_accum.py as one process of several, and write down what it did.

    If it may restart, process 1 kills itself once, in its 40th step.
    """
    rank = os.environ["RANK"]
    restarts = os.environ["TORCHELASTIC_MAX_RESTARTS"]
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    train_epoch = train_accum.train_epoch
    seeds = []
    reductions = []

    def count(_, bucket):
        reductions.append(bucket.index())
        if len(reductions) == 40 and rank == "1" and restart < restarts:
            os.kill(os.getpid(), signal.SIGKILL)
        return allreduce_hook(None, bucket)

    def watched_epoch(model, *args, **options):
        if not seeds:
            model.register_comm_hook(None, count)
        seeds.append(torch.initial_seed())
        return train_epoch(model, *args, **options)

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
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--rows", 33, "--batch-size", 1, "--epochs"]
    first.mkdir()
    second.mkdir()
    run(train_accum, *flags, 1, "--checkpoint", first / "run.pt")
    options = f"--nnodes 2 --master-port {port} --node-rank"
    same = "--rows 33 --batch-size 1 --epochs 3 --checkpoint run.pt"
    zero = torchrun(first, f"{options} 0", same)
    one = torchrun(second, f"{options} 1", same)
    assert " 1 of 3 epochs done; cpu, processes: 2, " in finish(zero)
    assert finish(one) == ""
    assert os.listdir(second) == ["facts1.pt"]
    whole = trained(train_accum, (1, 4), "--rows", 33, "--epochs", 3)
    assert torch.allclose(weights(first / "run.pt"), whole, rtol=0, atol=1e-6)


# ---- README
INTRODUCTION, *SECTIONS = README.split("\n## ")
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORTER = {"Choosing sizes": ["--rows", 256, "--epochs", 1]}  # flags for measurements


def test_the_loop_to_copy_takes_the_same_steps_with_another_cut():
    block = BLOCK.search(INTRODUCTION)[2]
    whole = block.replace("batch_size=8", "batch_size=32").replace(
        "steps = 4", "steps = 1"
    )
    cut, uncut = {}, {}
    exec(block, cut)
    exec(whole, uncut)
    assert (cut["loader"].batch_size, uncut["loader"].batch_size) == (8, 32)
    assert torch.allclose(cut["model"].weight, uncut["model"].weight, rtol=0, atol=1e-5)
    assert sum(cut["losses"]) < 0.1


@posix
@parametrize("section", [section for section in SECTIONS if BLOCK.search(section)])
def test_every_block_of_the_readme_runs(section, run, started, tmp_path, monkeypatch):
    title = section.partition("\n")[0]
    if title == "Set-up":
        pytest.skip("its commands run the tests; .ci/run runs them")
    monkeypatch.chdir(tmp_path)
    for language, block in BLOCK.findall(section):
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
