"""Tests of the promise (the same trajectory, however a batch is sliced) and of what users see.

Run under torchrun, this file is also the worker of the tests with several processes.
"""

import contextlib
import functools
import math
import os
import pathlib
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
import train_accum
import train_basic
import train_manual

HERE = pathlib.Path(__file__).parent
SCRIPTS = {"train_basic.py": train_basic, "train_accum.py": train_accum, "train_manual.py": train_manual}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launch(*command, cwd, **options):
    """Start a script (or another command) as a user would, with its output as text."""
    if command[0] in SCRIPTS:
        command = (sys.executable, HERE / command[0], *command[1:])
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=pipe, stderr=pipe, text=True, **options)


def finish(process, status=0):
    """Return a process's output and error text, after its exit status was checked."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == status, (process.returncode, out[-500:], err)
    assert "Traceback" not in err and "Warning" not in err
    return out, err


def run(script, *flags, monkeypatch, capsys, status=0):
    """Run a script's command line in this process; return its output and error lines."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit) as end:
            common.main(SCRIPTS[script].train)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert status == 0 or end.value.code == status
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


@pytest.fixture
def command_line(monkeypatch, capsys):
    return lambda script, *flags, status=0: run(script, *flags, monkeypatch=monkeypatch, capsys=capsys, status=status)


def trained(script, rows=1000, dtype=torch.float64, hidden=0, **sizes):
    """Return the weights, one vector, after a script's train() on synthetic rows."""
    X, y = common.make_data(rows)
    model = common.make_model(10, 1, hidden).to(dtype)
    options = {"epochs": 3, "log_every": 0, **sizes}
    SCRIPTS[script].train(model, X.to(dtype), y.to(dtype), **options)
    assert all(p.grad is None for p in model.parameters())  # no gradient is left for the next epoch
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def weights(file):
    """Return the weights, one vector, in a checkpoint read with torch.load's defaults."""
    return torch.cat([tensor.flatten() for tensor in torch.load(file)["model"].values()])


# ---- the promise


ROWS = [1, 5, 31, 32, 33, 997, 1000, 1001, 1037]
CUTS = [(8, 4), (1, 32), (32, 1), (7, 3), (400, 4)]  # batch_size, accumulation_steps


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_same_weights_however_a_window_is_cut(rows, cut):
    batch_size, accumulation_steps = cut
    window = batch_size * accumulation_steps
    steps = []
    with contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_post_hook(lambda *_: steps.append(1)).remove)
        basic = trained("train_basic.py", rows, batch_size=window)
        manual = trained("train_manual.py", rows, batch_size=window)
        accum = trained("train_accum.py", rows, batch_size=batch_size, accumulation_steps=accumulation_steps)
    assert len(steps) == 3 * 3 * math.ceil(rows / window)
    assert torch.equal(basic, manual)
    assert (accum - basic).abs().max() <= 1e-12


def test_same_weights_in_float32_and_with_a_hidden_layer():
    for hidden in 0, 16:
        options = {"rows": 1001, "dtype": torch.float32, "hidden": hidden}
        basic = trained("train_basic.py", batch_size=32, **options)
        assert torch.equal(basic, trained("train_manual.py", batch_size=32, **options))
        assert (basic - trained("train_accum.py", **options)).abs().max() <= 1e-6


def test_the_reference_is_the_gradient_of_the_window_mean():
    """One step on all rows against the closed form of linear regression's gradient, 2 X'(Xw - y) / rows."""
    X, y = (part.double() for part in common.make_data(37))
    model = common.make_model(10, 1).double()
    start = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    X1 = torch.cat([X, torch.ones(37, 1)], dim=1)
    expected = start - 0.01 * 2 * X1.T @ (X1 @ start - y.flatten()) / 37
    for script in SCRIPTS:
        assert torch.allclose(trained(script, 37, batch_size=50, epochs=1), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_row_is_used_once_an_epoch_in_an_order_that_changes(script):
    seen = []
    model = nn.Linear(1, 1)
    model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].flatten().tolist()))
    X = torch.arange(103.0).unsqueeze(1)
    SCRIPTS[script].train(model, X, X, batch_size=4, epochs=2, lr=1e-9, log_every=0)
    first, second = seen[:103], seen[103:]
    assert sorted(first) == sorted(second) == list(range(103))
    assert first != second and first != sorted(first)


def test_gradients_that_a_caller_left_are_not_used():
    X, y = common.make_data(20)
    models = [common.make_model(10, 1) for _ in range(2)]
    models[0](X).sum().backward()
    first, second = (train_basic.train(model, X, y, epochs=1, log_every=0) for model in models)
    assert torch.equal(first.weight, second.weight)


def test_saved_activations_shrink_with_the_micro_batch():
    def peak(script, **sizes):
        live = most = 0

        class Saved:
            def __init__(self, tensor):
                nonlocal live, most
                self.tensor, self.size = tensor, tensor.nbytes
                live += self.size
                most = max(most, live)

            def __del__(self):
                nonlocal live
                live -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            trained(script, 1024, hidden=64, epochs=1, **sizes)
        return most

    whole = peak("train_basic.py", batch_size=1024)
    assert peak("train_accum.py", batch_size=32, accumulation_steps=32) < 0.06 * whole


# ---- what is printed


LOSS = re.compile(r"Loss: (\d+\.\d{6})")
CLOSING = re.compile(
    r"(\d+) optimizer steps, (\d+) micro-batches, last epoch's mean loss (\S+), \S+ s, [\d,]+ rows/s, "
    r"peak memory \d+ MiB of the process"
)


def test_default_runs_as_a_user_sees_them(tmp_path, command_line):
    processes = {script: launch(script, cwd=tmp_path) for script in SCRIPTS}
    outputs = {
        script: [finish(process)[0].splitlines(), command_line(script)[0]] for script, process in processes.items()
    }
    for script, steps, micro_batches in [
        ("train_basic.py", 32, 32), ("train_accum.py", 32, 125), ("train_manual.py", 63, 63)
    ]:  # fmt: skip
        first, second = outputs[script]
        assert first[:-1] == second[:-1]  # the same command prints the same losses
        opening, *lines, closing = first
        for fact in ("1000 rows", f"{steps} steps", "10 epochs", "cpu", f"torch {torch.__version__}", "seed 0"):
            assert fact in opening
        assert len(lines) == 10 * steps
        losses = [float(LOSS.search(line)[1]) for line in lines]
        assert lines[0].startswith(f"Epoch: 1/10, Step: 1/{steps}, Loss: ") and losses[0] > 1
        found = CLOSING.fullmatch(closing)
        assert found and (int(found[1]), int(found[2])) == (10 * steps, 10 * micro_batches)
        assert 0.008 < float(found[3]) < 0.012  # the noise's variance is 0.01
        # the last epoch's mean, from its steps: all but the last have as many rows
        last, tail = losses[-steps:], 1000 - (steps - 1) * (16 if steps == 63 else 32)
        mean = (sum(last[:-1]) * (1000 - tail) / (steps - 1) + last[-1] * tail) / 1000
        assert float(found[3]) == pytest.approx(mean, abs=2e-6)
    assert outputs["train_accum.py"][0][32].endswith("Micro-batches: 1, Rows: 8")  # the short tail
    assert list(tmp_path.iterdir()) == []


def test_log_every_counts_steps_over_all_epochs(command_line):
    out, _ = command_line("train_basic.py", "--rows", 100, "--log-every", 7)  # 4 steps an epoch
    assert [line.split(", Loss")[0] for line in out[1:-1]][:2] == ["Epoch: 2/10, Step: 3/4", "Epoch: 4/10, Step: 2/4"]
    out, _ = command_line("train_basic.py", "--rows", 100, "--log-every", 0)
    assert len(out) == 2


def test_targets_that_do_not_fit_the_inputs_are_refused():
    X, y = common.make_data(20)
    for script in SCRIPTS.values():
        for targets in (y.flatten(), y[:19]):  # the first would be broadcast against the outputs
            with pytest.raises(ValueError, match=r"y must be of shape \(20, targets\)"):
                script.train(common.make_model(10, 1), X, targets)


def test_help_says_what_each_flag_does(command_line, capsys):
    with pytest.raises(SystemExit):
        command_line("train_accum.py", "--help")
    text = capsys.readouterr().out
    for flag in "data rows hidden batch-size accumulation-steps epochs lr seed device log-every checkpoint".split():
        assert f"--{flag} " in text
    assert "(default: 8)" in text


def test_head_and_a_full_disk_end_quietly(tmp_path):
    head = launch("train_accum.py", "--epochs", 500, cwd=tmp_path)
    full = launch("sh", "-c", f"exec {sys.executable} {HERE / 'train_basic.py'} > /dev/full", cwd=tmp_path)
    head.stdout.readline()
    head.stdout.close()
    assert head.wait(timeout=60) == 141 and head.stderr.read() == ""
    _, err = finish(full, status=1)
    assert err == "train_basic.py: error: standard output: No space left on device\n"


def test_a_loss_that_is_not_finite_ends_the_run(command_line):
    for script in SCRIPTS:
        _, err = command_line(script, "--lr", 10, "--log-every", 0, status=1)
        assert err == [f"{script}: error: epoch 1: the loss is not finite at --lr 10; try --lr 1"]
    X, y = common.make_data(20)
    for scale, lr in (1e15, 1e30), (1e25, 1e-30):  # a finite loss, weights that are not; and the other way round
        with pytest.raises(FloatingPointError):
            train_basic.train(common.make_model(10, 1), X, y * scale, epochs=1, lr=lr, log_every=0)


# ---- data


def table(rows=40, columns=4):
    """Return a float64 table whose last column depends on the others."""
    values = np.random.default_rng(0).normal(size=(rows, columns)) * 10 ** np.arange(columns) + 5
    values[:, -1] += values[:, :-1].sum(axis=1)
    return values


@pytest.mark.parametrize(
    "kind", ["plain", "header", "quotes", "bom", "excel", "blank lines", "npy", "fortran", "npz", "npz 2"]
)
def test_every_kind_of_file_gives_the_same_standardised_columns(tmp_path, kind):
    values = table()
    text = "\n".join(",".join(map(repr, map(float, row))) for row in values)
    target = 2 if kind == "npz 2" else 1
    if kind == "npy" or kind == "fortran":
        path = tmp_path / "t.npy"
        np.save(path, np.asfortranarray(values) if kind == "fortran" else values)
    elif kind.startswith("npz"):
        path = tmp_path / "t.npz"
        np.savez(path, X=values[:, :-target], y=values[:, -target:] if target > 1 else values[:, -1], other=1)
    else:
        path = tmp_path / "t.CSV"
        if kind == "quotes":
            text = "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in text.split("\n"))
        header = {"header": "a,b,,target\n", "bom": "\ufeff", "excel": '\ufeff"a","b, c","d","e"\n'}.get(kind, "")
        text = (header + text).replace("\n", {"excel": "\r\n", "blank lines": "\n\n"}.get(kind, "\n"))
        path.write_bytes(text.encode())
    X, y, scale = common.load_data(str(path))
    expected = (values - values.mean(axis=0)) / values.std(axis=0)
    assert X.dtype == y.dtype == torch.float32 and X.is_contiguous() and y.shape == (40, target)
    assert np.allclose(torch.cat([X, y], dim=1), expected, atol=1e-6)
    assert np.allclose(scale["mean"], values.mean(axis=0)) and np.allclose(scale["std"], values.std(axis=0))


def test_a_constant_column_becomes_zeros(tmp_path):
    values = table()
    values[:, 1] = 0.1  # its mean, computed, is not quite 0.1
    np.save(tmp_path / "t.npy", values)
    X, _, _ = common.load_data(str(tmp_path / "t.npy"))
    assert torch.equal(X[:, 1], torch.zeros(40)) and X[:, 0].abs().max() > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_loss_comes_down_to_the_least_squares_floor(tmp_path, command_line, script):
    values = np.random.default_rng(1).normal(size=(220, 11)) @ np.random.default_rng(2).normal(size=(11, 11))
    values[:, -1] += 3 * np.random.default_rng(3).normal(size=220)
    np.savetxt(tmp_path / "t.csv", values, delimiter=",", header="a,b,c,d,e,f,g,h,i,j,target", comments="")
    scaled = (values - values.mean(axis=0)) / values.std(axis=0)
    floor = np.linalg.lstsq(scaled[:, :-1], scaled[:, -1])[1][0] / 220
    out, _ = command_line(script, "--data", tmp_path / "t.csv", "--epochs", 400, "--log-every", 0)
    loss = float(CLOSING.fullmatch(out[-1])[3])
    assert 0.99 * floor < loss < 1.05 * floor


CSV_FAULTS = {
    "": "holds nothing",
    "a,b\n": "holds nothing",
    "1,2\n\n3,x\n": "line 3: could not convert string 'x' to float64, column 2",
    "1,2\n3,\n": "line 2: could not convert string '' to float64, column 2",
    "x,2\n3,4\n": "line 1: could not convert string 'x' to float64, column 1",
    "a,b\n1,2\n3,4,5\n": "line 3: the number of columns changed from 2 to 3",
    "a,b\n1,2\n3,nan\n": "row 2 (without header), column 2: nan is not",
    "1,2\n3,-inf\n": "row 2 (without header), column 2: -inf is not",
    "1,1e999\n3,4\n": "row 1 (without header), column 2: inf is not",
    "1,1e308\n3,-1e308\n": "column 2: values too large or too small",
    "1\n2\n": "only one column",
    "a,b\n1,000,2\n": "line 1 has 2 cells, the others have 3",
    "1;2\n3;4\n": "line 2: could not convert string '3;4'",
    "1,2\n\x00,3": "line 2: could not convert",
}


@pytest.mark.parametrize("text", CSV_FAULTS, ids=repr)
def test_a_bad_csv_is_told_in_one_line(tmp_path, command_line, text):
    file = tmp_path / "t.csv"
    file.write_text(text)
    out, err = command_line("train_basic.py", "--data", file, status=2)
    assert out == [] and len(err) == 1
    assert err[0].startswith(f"train_basic.py: error: --data {file}: ") and CSV_FAULTS[text] in err[0]


class Bomb:
    """An object whose unpickling would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def bad_arrays(folder):
    """Write files that are no tables; return what is said of each."""
    X, y = np.ones((3, 2)), np.arange(3.0)
    arrays = {
        "scalar": (np.float64(1), "shape ()"),
        "vector": (y, "shape (3,)"),
        "cube": (np.ones((2, 2, 2)), "shape (2, 2, 2)"),
        "complex": (X * 1j, "complex128"),
        "text": (np.array([["a", "b"]]), "<U1"),
        "objects": (np.array([[Bomb(folder / "bomb"), 1]], dtype=object), "objects are never read"),
        "no-rows": (np.ones((0, 3)), "nothing"),
        "no-columns": (np.ones((3, 0)), "nothing"),
        "hole": (np.array([[1, 2], [3, np.nan]]), "row 2 (without header), column 2"),
        "one-column": (np.ones((3, 1)), "only one column"),
    }
    for name, (array, _) in arrays.items():
        np.save(folder / f"{name}.npy", array)
    pairs = {
        "no-y": ({"X": X}, "arrays X and y"),
        "lengths": ({"X": X, "y": np.ones(4)}, "different numbers of rows"),
        "cube-y": ({"X": X, "y": np.ones((3, 1, 1))}, "y holds float64 of shape (3, 1, 1)"),
        "flat-X": ({"X": y, "y": y}, "X holds float64 of shape (3,)"),
        "object-y": ({"X": X, "y": np.array([1, None, 2])}, "objects are never read"),
        "inf-y": ({"X": X, "y": np.array([1, np.inf, 2])}, "y row 2"),
    }
    for name, (parts, _) in pairs.items():
        np.savez(folder / f"{name}.npz", **parts)
    whole = (folder / "no-y.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:-20])
    (folder / "cut.npy").write_bytes((folder / "cube.npy").read_bytes()[:-8])
    (folder / "noise.npy").write_bytes(random.Random(0).randbytes(999))
    (folder / "latin.csv").write_bytes("größe,x\n1,2\n".encode("latin-1"))
    (folder / "folder.csv").mkdir()
    (folder / "table.txt").write_text("1,2\n")
    return {
        **{f"{name}.npy": said for name, (_, said) in arrays.items()},
        **{f"{name}.npz": said for name, (_, said) in pairs.items()},
        **dict.fromkeys(["cut.npz", "cut.npy", "noise.npy"], "is not a whole"),
        "latin.csv": "is not UTF-8 text",
        "folder.csv": "Is a directory",
        "missing.csv": "No such file",
        "table.txt": "must end in .csv, .npy, .npz",
    }


def test_files_that_are_no_tables_are_told_in_one_line(tmp_path, command_line):
    for name, said in bad_arrays(tmp_path).items():
        out, err = command_line("train_accum.py", "--data", tmp_path / name, status=2)
        assert out == [] and len(err) == 1 and said in err[0]
        assert err[0].startswith(f"train_accum.py: error: --data {tmp_path / name}: ")
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    "flags",
    [
        *(f"--{size} {value}" for size in ("batch-size", "epochs", "rows") for value in ("0", "-1", "1.5", "x")),
        *("--accumulation-steps 0", "--hidden -1", "--log-every -1", "--seed -1", "--seed 4294967296", "--seed 1.5"),
        *(f"--lr {value}" for value in ("nan", "inf", "0", "-1", "x")),
        *(f"--device {value}" for value in ("meta", "cuda:99", "tpu", "CPU")),
        *("--data x.csv --rows 5", "--batch 4", "--batch-size="),
    ],
)
def test_bad_flags_are_told_in_one_line(command_line, flags):
    out, err = command_line("train_accum.py", *flags.split(), status=2)
    assert out == [] and len(err) == 1 and err[0].startswith("train_accum.py: error: ")
    assert flags.split()[0].split("=")[0].replace("--data", "--rows") in err[0]


def test_too_much_memory_is_told_in_one_line(command_line, monkeypatch):
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 85899345880 bytes.")
    for error in (MemoryError(), torch.OutOfMemoryError(), allocator):
        monkeypatch.setattr(common, "make_data", lambda rows, error=error: (_ for _ in ()).throw(error))
        _, err = command_line("train_basic.py", status=1)
        assert err == ["train_basic.py: error: out of memory; lower --batch-size, --hidden or --rows"]


# ---- checkpoint


def steps_of(script):
    """Return the flags that make a script's window 32 rows."""
    return ("--batch-size", 8, "--accumulation-steps", 4) if script == "train_accum.py" else ("--batch-size", 32)


def test_killed_at_any_moment_the_same_command_ends_with_the_same_weights(tmp_path, command_line):
    flags = {script: ("--rows", 500, "--epochs", 300, "--log-every", 0, *steps_of(script)) for script in SCRIPTS}
    files = {script: tmp_path / script / "run.pt" for script in SCRIPTS}
    processes = {}
    for script, file in files.items():
        file.parent.mkdir()
        processes[script] = launch(script, *flags[script], "--checkpoint", "run.pt", cwd=file.parent)
    while not all(file.exists() for file in files.values()):
        time.sleep(0.01)
    for process in processes.values():
        time.sleep(random.uniform(0, 0.1))
        process.kill()
    for script, file in files.items():
        processes[script].communicate()
        assert 1 <= torch.load(file)["epoch"] <= 300
        (file.parent / "run.pt.999999.tmp").write_bytes(b"left by a process that was killed")
        out, _ = command_line(script, *flags[script], "--checkpoint", file)
        assert "of the epochs" in out[0]
        sizes = {} if script == "train_accum.py" else {"batch_size": 32}
        expected = trained(script, 500, torch.float32, epochs=300, **sizes)
        assert torch.equal(weights(file), expected)
        assert os.listdir(file.parent) == ["run.pt"]


def test_the_optimizers_state_goes_on_too(tmp_path, command_line, monkeypatch):
    monkeypatch.setattr(torch.optim, "SGD", functools.partial(torch.optim.SGD, momentum=0.9))
    file = tmp_path / "run.pt"
    for epochs in (1, 3):
        command_line("train_basic.py", "--epochs", epochs, "--checkpoint", file)
    assert torch.equal(weights(file), trained("train_basic.py", dtype=torch.float32))


def test_what_a_checkpoint_holds(tmp_path, command_line):
    values = table(100)
    np.savetxt(tmp_path / "t.csv", values, delimiter=",")
    file = tmp_path / "run.pt"
    command_line("train_manual.py", "--data", tmp_path / "t.csv", "--hidden", 3, "--epochs", 2, "--checkpoint", file)
    state = torch.load(file)
    assert state["epoch"] == 2 and state["torch"] == torch.__version__ and type(state["torch"]) is str
    assert {"rows per step": 16, "--lr": 0.01, "--seed": 0, "--hidden": 3}.items() <= state["settings"].items()
    assert np.allclose(state["mean"], values.mean(axis=0)) and np.allclose(state["std"], values.std(axis=0))
    model = common.make_model(3, 1, hidden=3)
    model.load_state_dict(state["model"])
    torch.optim.SGD(model.parameters()).load_state_dict(state["optimizer"])


def test_scripts_go_on_from_each_others_checkpoints(tmp_path, command_line):
    file = tmp_path / "run.pt"
    for epochs, script in enumerate(["train_basic.py", "train_accum.py", "train_manual.py", "train_basic.py"], 1):
        out, _ = command_line(script, *steps_of(script), "--epochs", epochs, "--log-every", 0, "--checkpoint", file)
        assert out[-1].startswith("32 optimizer steps")
        assert epochs == 1 or f"{file} has {epochs - 1} of the epochs" in out[0]
    expected = trained("train_basic.py", dtype=torch.float32, batch_size=32, epochs=4)
    assert (weights(file) - expected).abs().max() < 1e-6
    before = file.read_bytes()
    (tmp_path / "run.pt.77777.tmp").write_bytes(b"")
    out, _ = command_line("train_basic.py", "--epochs", 3, "--checkpoint", file)
    assert out[-1] == f"nothing to train: {file} has 4 epochs; a larger --epochs goes on"
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["run.pt"]


def test_a_changed_setting_is_told_with_both_values(tmp_path, command_line):
    file = tmp_path / "run.pt"
    command_line("train_basic.py", "--epochs", 1, "--checkpoint", file)
    before = file.read_bytes()
    changed = ("--lr", 0.1, "--seed", 1, "--batch-size", 16, "--hidden", 4, "--rows", 999)
    _, err = command_line("train_basic.py", *changed, "--checkpoint", file, status=2)
    assert len(err) == 1 and err[0].startswith(f"train_basic.py: error: --checkpoint {file}: ")
    for difference in ("rows per step is 16", "--lr is 0.1", "--seed is 1", "--hidden is 4", "data is 999 x 10 + 1"):
        assert f"{difference}, the checkpoint has " in err[0]
    assert file.read_bytes() == before
    np.save(tmp_path / "t.npy", common.make_data(1000)[0].flip(0))
    state = torch.load(file)
    state["settings"]["data"] = "1000 x 9 + 1"
    torch.save(state, file)
    _, err = command_line("train_basic.py", "--data", tmp_path / "t.npy", "--checkpoint", file, status=2)
    assert "data checksum is " in err[0] and "--lr" not in err[0]
    del state["settings"]["--lr"]
    torch.save(state, file)
    _, err = command_line("train_basic.py", "--checkpoint", file, status=2)
    assert "not a whole checkpoint" in err[0]


def test_files_that_are_no_checkpoints_are_told_in_one_line_and_kept(tmp_path, command_line):
    file = tmp_path / "run.pt"
    command_line("train_basic.py", "--epochs", 1, "--checkpoint", file)
    state, whole = torch.load(file), file.read_bytes()
    contents = {
        "empty": b"",
        "cut": whole[:-100],
        "half": whole[: len(whole) // 2],
        "altered": whole.replace(state["model"]["weight"].numpy().tobytes(), np.ones(10, np.float32).tobytes()),
        "text": b"hello\n",
        "pickle": pickle.dumps({"epoch": 1}),
        "code": pickle.dumps(Bomb(tmp_path / "bomb")),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save(Bomb(tmp_path / "bomb"), tmp_path / "torch-code")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"model": {}}, tmp_path / "alien")
    torch.save({**state, "model": {"weight": torch.ones(2, 2)}}, tmp_path / "shape")
    torch.save({**state, "epoch": "two"}, tmp_path / "word")
    for name in [*contents, "torch-code", "list", "alien", "shape", "word"]:
        path = tmp_path / name
        before = path.read_bytes()
        out, err = command_line("train_basic.py", "--checkpoint", path, status=2)
        assert out == [] and len(err) == 1 and "whole checkpoint" in err[0], (name, out, err)
        assert err[0].startswith(f"train_basic.py: error: --checkpoint {path}: ") and path.read_bytes() == before
    assert not (tmp_path / "bomb").exists()
    for path in (tmp_path, tmp_path / "missing" / "run.pt", file / "run.pt", tmp_path / ("x" * 250)):
        out, err = command_line("train_basic.py", "--checkpoint", path, status=2)
        assert out == [] and len(err) == 1 and str(path) in err[0] and err[0].endswith("is needed")


def test_a_checkpoint_is_on_disk_before_it_takes_the_old_ones_place(tmp_path, command_line, monkeypatch):
    file = tmp_path / "run.pt"
    command_line("train_basic.py", "--epochs", 1, "--checkpoint", file)
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    with open(file, "rb") as old:
        before = old.read()
        command_line("train_basic.py", "--epochs", 2, "--checkpoint", file)
        old.seek(0)
        assert old.read() == before  # never written into
    assert calls == ["fsync", "replace"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, command_line):
    file = tmp_path / "run.pt"
    command_line("train_basic.py", "--epochs", 1, "--hidden", 500, "--checkpoint", file)
    before = file.read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, limits[1]))
    try:
        _, err = command_line("train_basic.py", "--hidden", 500, "--checkpoint", file, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(err) == 1 and err[0].endswith(f"--checkpoint {file}: File too large; what it held before is safe")
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["run.pt"]


def test_a_loss_that_is_not_finite_never_reaches_the_checkpoint(tmp_path, command_line):
    file = tmp_path / "run.pt"
    flags = ("--batch-size", 1000, "--lr", 1e9, "--log-every", 0, "--checkpoint", file)
    _, err = command_line("train_basic.py", *flags, status=1)
    epoch = torch.load(file)["epoch"]
    assert f"epoch {epoch + 1}: the loss is not finite at --lr 1e+09" in err[0] and weights(file).isfinite().all()


def test_an_interrupt_says_what_is_safe(tmp_path):
    cases = [(signal.SIGTERM, 143, "run.pt"), (signal.SIGINT, 130, None)]
    processes = []
    for _, _, file in cases:
        flags = ("--checkpoint", file) if file else ()
        processes.append(launch("train_accum.py", "--epochs", 2000, *flags, cwd=tmp_path))
    for process, (number, status, file) in zip(processes, cases):
        while "Epoch: 3/" not in process.stdout.readline():
            pass
        process.send_signal(number)
        _, err = finish(process, status)
        said = "no epoch is kept; --checkpoint FILE keeps each"
        if file:
            epoch = torch.load(tmp_path / file)["epoch"]
            said = f"epoch {epoch} of 2000 is safe in {tmp_path / file}; the same command goes on"
        assert err == f"train_accum.py: interrupted; {said}\n"
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_live_runs_temporary_file_is_left_alone(tmp_path, command_line, monkeypatch):
    stale, live = tmp_path / "run.pt.111.tmp", tmp_path / "run.pt.222.tmp"
    stale.touch()
    with open(live, "wb") as held:
        common.lock(held)
        command_line("train_basic.py", "--epochs", 1, "--checkpoint", tmp_path / "run.pt")
        assert live.exists() and not stale.exists()
    command_line("train_basic.py", "--epochs", 1, "--checkpoint", tmp_path / "run.pt")
    assert os.listdir(tmp_path) == ["run.pt"]
    with open(tmp_path / "run.pt.2024-notes.tmp", "w"):  # a user's own
        command_line("train_basic.py", "--epochs", 1, "--checkpoint", tmp_path / "run.pt")
    os.remove(tmp_path / "run.pt.2024-notes.tmp")

    real = os.replace

    def replace(source, target):  # as if another run took it for a stale one while it was written
        monkeypatch.setattr(os, "replace", real)
        os.remove(source)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    common.write_checkpoint(str(tmp_path / "run.pt"), {"epoch": 5})
    assert torch.load(tmp_path / "run.pt") == {"epoch": 5} and os.listdir(tmp_path) == ["run.pt"]


# ---- processes


SHARED = [(rows, (8, 4)) for rows in (1, 2, 7, 33, 1000, 1001, 1037)] + [(rows, (2, 3)) for rows in (1, 2, 7, 33)]


def worker(file):
    """Train in every process of a torchrun launch; the first one saves weights and counts in `file`."""
    reductions = []

    class Counting(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            super().__init__(module)
            self.register_comm_hook(None, self.reduce)

        @staticmethod
        def reduce(_, bucket):
            reductions.append(1)
            return allreduce_hook(None, bucket)

    train_accum.DistributedDataParallel = Counting
    result = {}
    for rows, (batch_size, accumulation_steps) in SHARED:
        sizes = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
        reductions.clear()
        vector = trained("train_accum.py", rows, torch.float32, **sizes)
        result[rows, batch_size] = vector, len(reductions)
    dist.destroy_process_group()
    result["threads"] = len(os.listdir("/proc/self/task"))
    if common.processes()[0] == 0:
        torch.save(result, file)


def test_same_weights_in_several_processes_for_one_reduction_a_step(tmp_path):
    for process in [
        launch(*TORCHRUN, "--nproc-per-node", count, HERE / "test_scripts.py", f"{count}.pt", cwd=tmp_path)
        for count in (2, 3)
    ]:
        finish(process)
    for count in (2, 3):
        result = torch.load(tmp_path / f"{count}.pt")
        assert result.pop("threads") == 1
        for (rows, batch_size), (vector, reductions) in result.items():
            sizes = {"batch_size": batch_size, "accumulation_steps": 4 if batch_size == 8 else 3}
            window = math.prod(sizes.values())
            assert reductions == 3 * math.ceil(rows / window)
            for alone in (
                trained("train_accum.py", rows, torch.float32, **sizes),
                trained("train_basic.py", rows, torch.float32, batch_size=window),
            ):
                assert (vector - alone).abs().max() <= 1e-6


def test_bad_input_is_told_once(tmp_path):
    """A file that is missing; and processes whose flags differ, which would train apart from each other."""
    missing = (*TORCHRUN, "--nproc-per-node", 2, HERE / "train_accum.py", "--data", "missing.csv")
    each = f"exec {sys.executable} {HERE / 'train_accum.py'} --seed $RANK"
    differing = (*TORCHRUN, "--nproc-per-node", 2, "--no-python", "sh", "-c", each)
    processes = [launch(*missing, cwd=tmp_path), launch(*differing, cwd=tmp_path)]
    for process, said in zip(processes, ["missing.csv: No such file", "the processes differ in --seed; "]):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1 and err.count("train_accum.py: error: ") == 1
        assert f"train_accum.py: error: --data {said}" in err or f"train_accum.py: error: {said}" in err


@pytest.mark.parametrize("script", ["train_basic.py", "train_manual.py"])
def test_single_process_lessons_name_the_command_for_several(command_line, monkeypatch, script):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, err = command_line(script, "--batch-size", 24, status=2)
    assert len(err) == 1 and "train_accum.py --batch-size 24 --accumulation-steps 1" in err[0]


def test_a_killed_worker_costs_at_most_its_epoch(tmp_path, command_line):
    flags = ("--rows", 1001, "--epochs", 10)
    shared = (*TORCHRUN, "--nproc-per-node", 2, "--max-restarts", 2, HERE / "train_accum.py", *flags)
    processes = []
    for folder in ("undisturbed", "killed"):
        (tmp_path / folder).mkdir()
        processes.append(launch(*shared, "--checkpoint", "run.pt", cwd=tmp_path / folder))
    undisturbed, killed = processes
    while "Epoch: 4/" not in killed.stdout.readline():
        pass
    agent = f"/proc/{killed.pid}/task/{killed.pid}/children"
    os.kill(int(pathlib.Path(agent).read_text().split()[-1]), signal.SIGKILL)
    out, err = killed.communicate(timeout=100)
    assert killed.returncode == 0, err
    assert re.search(r"run.pt has [3-9] of the epochs", out) and "Epoch: 10/10" in out

    several, (alone, _) = finish(undisturbed)[0].splitlines(), command_line("train_accum.py", *flags)
    assert torch.equal(weights(tmp_path / "killed" / "run.pt"), weights(tmp_path / "undisturbed" / "run.pt"))
    assert "2 processes on cpu" in several[0] and "1 process on cpu" in alone[0]
    assert len(several) == len(alone) == 322  # one voice
    for line, expected in zip(several[1:-1], alone[1:-1]):
        assert float(LOSS.search(line)[1]) == pytest.approx(float(LOSS.search(expected)[1]), abs=2e-6)
        assert LOSS.sub("", line) == LOSS.sub("", expected)
    assert CLOSING.fullmatch(several[-1]).groups()[:2] == CLOSING.fullmatch(alone[-1]).groups()[:2]


def test_two_machines_need_no_shared_disk(tmp_path, command_line):
    flags = ("--rows", 1001, "--checkpoint")
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    command_line("train_accum.py", "--epochs", 1, *flags, tmp_path / "0" / "run.pt")
    port, machines = random.randrange(20000, 30000), []
    for node in range(2):
        place = ("--nnodes", 2, "--nproc-per-node", 1, "--node-rank", node)
        address = ("--master-addr", "127.0.0.1", "--master-port", port)
        script = (HERE / "train_accum.py", "--epochs", 2, *flags, "run.pt")
        machines.append(launch(*TORCHRUN, *place, *address, *script, cwd=tmp_path / str(node)))
    outputs = [finish(machine)[0] for machine in machines]
    assert "2 processes" in outputs[0] and "has 1 of the epochs" in outputs[0] and outputs[1] == ""
    assert os.listdir(tmp_path / "0") == ["run.pt"] and os.listdir(tmp_path / "1") == []
    expected = trained("train_accum.py", 1001, torch.float32, epochs=2)
    assert (weights(tmp_path / "0" / "run.pt") - expected).abs().max() <= 1e-6


# ---- README


def blocks(language):
    """Return the README's code blocks in a language, in order."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_every_block_of_the_readme_runs(tmp_path, monkeypatch):
    for path in [*HERE.glob("*.py"), HERE / "requirements.txt"]:
        (tmp_path / path.name).symlink_to(path)
    setup, proof, peers, sizes, data, scaling, machines = blocks("sh")
    assert setup.count("\n") == 2 and "pytest" in setup  # run by .ci/run: this test is part of it
    assert ".ci/peers.py" in peers  # needs other packages
    assert "--nnodes 2" in machines  # needs two machines: test_two_machines_need_no_shared_disk plays them
    bin_folder = pathlib.Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    running = [launch("sh", "-ec", block, cwd=tmp_path, env=environment) for block in (proof, sizes, data, scaling)]
    for process in running:
        out, _ = finish(process)
        assert "peak memory" in out
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), session)


def test_the_readme_shows_what_is_printed(command_line):
    out, _ = command_line("train_accum.py")
    shown = next(block for block in blocks("text") if "Epoch: " in block).splitlines()
    assert shown[:2] == [out[0].replace(torch.__version__, "2.13.0+cpu"), out[1]] and shown[3] == out[-2]
    assert re.sub(r"[\d.,]+ s, .*", "", shown[4]) == re.sub(r"[\d.,]+ s, .*", "", out[-1])
    flags = set(re.findall(r"`?(--[a-z-]+)", (HERE / "README.md").read_text(encoding="utf-8")))
    assert {"--data", "--rows", "--hidden", "--batch-size", "--log-every", "--checkpoint"} <= flags


if __name__ == "__main__":
    worker(sys.argv[1])
