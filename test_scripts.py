"""Tests of the promise (the same steps, however a batch is sliced) and of what users see; torchrun runs worker()."""

import atexit
import contextlib
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
import train_accum
import train_basic
import train_manual

HERE = pathlib.Path(__file__).parent
SCRIPTS = {"train_basic.py": train_basic, "train_accum.py": train_accum, "train_manual.py": train_manual}
WINDOW = {"train_basic.py": [32], "train_accum.py": [8, 4], "train_manual.py": [32]}  # sizes for steps of 32 rows
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SHARED = [(rows, 8, 4) for rows in (1, 2, 7, 33, 1037)] + [(rows, 2, 3) for rows in (1, 2, 7, 33)]
FLAGS = ["--rows", "1001", "--epochs", "3", "--device", "cpu"]
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals, rm, torchrun (pytorch/pytorch#148283)")
accelerator = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
KINDS = {  # hidden units, dropout, largest difference, options
    "float64": (0, 0, 1e-12, {"dtype": torch.float64}),
    "float32": (0, 0, 1e-5, {}),
    "hidden": (16, 0, 1e-5, {}),
    "classes": (16, 0, 1e-12, {"dtype": torch.float64, "loss_fn": F.cross_entropy, "optimizer": torch.optim.AdamW}),
    "dropout": (16, 0.5, math.inf, {}),  # other masks in train_accum.py
}
torch.set_num_threads(1)  # the other cores are for the processes that some tests start
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHON_COLORS="0")  # each uses one; plain messages
ROWS, CUTS = [1, 5, 31, 32, 33, 997, 1000, 1001, 1037], [(8, 4), (1, 32), (32, 1), (7, 3), (400, 4)]
CASES = [(rows, cut, "float64", "cpu") for rows in ROWS for cut in CUTS if rows < 1000 or cut != (1, 32)]
CASES += [(1001, (8, 4), kind, "cpu") for kind in KINDS]
CASES += [pytest.param(1001, (8, 4), kind, "auto", marks=accelerator) for kind in ("float32", "hidden", "dropout")]
CLOSING = re.compile(r"(\d+) optimizer steps, (\D+) (\d\.\d{6}), [\d.]+ s, [\d,]+ rows/s, peak memory (\d+ MiB|unk).+")
WRONG = """batch-size=0 batch-size=1.5 batch-size= accumulation-steps=0 rows=0 rows=10000000000 epochs=0 hidden=-1
seed=-1 seed=4294967296 log-every=-1 lr=nan lr=inf lr=0 lr=x device=meta device=cuda:99 device=tpu"""
PLAIN, SCALE = np.random.default_rng(0).integers(-99, 99, (40, 4)) * [1, 0, 1, 1], np.array([2.0**14, 1, 1e-6, 10])
TABLE = PLAIN * SCALE + [1.7e18, 0.1, 5, 5]  # time stamps in nanoseconds, a constant, and two ordinary columns


def starter():
    """Give a function that starts a command in a folder; what still runs at the end is ended, children included."""
    processes = []

    def start(folder, *command):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*map(str, command)], cwd=folder, start_new_session=True, **streams))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM) if os.name == "posix" else process.kill()  # torchrun passes it on
        process.communicate(timeout=900)


start, start_early = pytest.fixture(starter), pytest.fixture(starter, scope="module")


@pytest.fixture(scope="module", autouse=True)
def launches(request, start_early, tmp_path_factory):
    """Start torchrun, which takes long, before the first test; return each launch's machines, {folder: process}."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill of the tests ends these, too
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    commands = [("killed", "--nproc-per-node 2 --max-restarts 1")]
    commands += [("two", f"--nnodes 2 --node-rank {i} --nproc-per-node {2 - i} --master-port {port}") for i in (0, 1)]
    launches = {"killed": {}, "two": {}}
    for name, options in commands if any("several_processes" in item.name for item in request.session.items) else []:
        folder = tmp_path_factory.mktemp(name)
        launches[name][folder] = start_early(folder, *TORCHRUN, *options.split(), __file__, name)
    return launches


def finish(process):
    """Return what a process printed, once it ended well; the time limit is for one that hangs."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, f"{process.returncode}\n{out[-500:]}\n{err[-3000:]}"
    return out


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a script's main() in this process, and returns its lines and its error text."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(script, *flags, device="cpu", fails=False):
        monkeypatch.setattr(sys, "argv", [script, "--device", device, *map(str, flags)])
        with pytest.raises(SystemExit) if fails else contextlib.nullcontext() as end:
            SCRIPTS[script].main()
        out, err = capsys.readouterr()
        return out.splitlines(), err or (end.value.code if fails else "")

    return run


def trained(script, X, y, *sizes, model=None, dtype=torch.float32, optimizer=torch.optim.SGD, **options):
    """Return the weights, one vector, after a script's train(); sizes: batch_size and accumulation_steps."""
    X, y = (part.to(dtype) if part.is_floating_point() else part for part in (X, y))
    model = (model or common.make_model(X.shape[1], y.shape[1])).to(dtype)
    options = {"epochs": range(2), "log_every": 0, **dict(zip(["batch_size", "accumulation_steps"], sizes)), **options}
    SCRIPTS[script].train(model, optimizer(model.parameters(), lr=0.01), X, y, **options)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def weights(file):
    return torch.cat([tensor.flatten() for tensor in torch.load(file)["model"].values()])


def steps_printed(lines):
    """Return the numbers in the lines of a run's steps, a row a step: epoch, step, steps, loss, micro-batches, rows."""
    form = re.compile(r"Epoch: (\d+), Step: (\d+)/(\d+), Loss: (\d+\.\d{6})(?:, Micro-batches: (\d+), Rows: (\d+))?")
    return np.array([form.fullmatch(line).groups(0) for line in lines[1:-1]], float)


# ---- the promise
@pytest.mark.parametrize(("rows", "cut", "kind", "device"), CASES, ids=str)
def test_same_weights_however_a_step_is_cut(rows, cut, kind, device):
    (hidden, dropout, tolerance, options), X = KINDS[kind], common.make_data(rows)[0]
    y = torch.arange(rows) % 5 if kind == "classes" else X[:, :5].abs()
    window, steps, results = math.prod(cut), [], []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    for script, sizes in zip(SCRIPTS, [[window], cut, [window]]):
        model = nn.Sequential(nn.Dropout(dropout), common.make_model(10, 5, hidden)).to(common.pick_device(device))
        results.append(trained(script, X, y, *sizes, model=model, **options))
    hook.remove()
    basic, accum, manual = results
    assert len(steps) == 3 * 2 * math.ceil(rows / window)
    assert torch.equal(basic, manual) and (accum - basic).abs().max() <= tolerance


def test_a_step_descends_the_mean_loss_of_its_rows_each_used_once_an_epoch(monkeypatch):
    def uneven(dataset, sampler, **_):  # and without a length
        return (dataset[rows] for rows in torch.cat(sampler).split([20, 2, 5, 5, 8, 8, 8, 8, 13]))

    monkeypatch.setattr(train_accum, "DataLoader", uneven)
    orders = [common.shuffled_indices(77, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(77)) != order for order in orders) and len(set(map(tuple, orders))) == 4
    X, y = common.make_data(77)
    X1, y1 = torch.cat([X, torch.ones(77, 1)], dim=1).double(), y.flatten().double()
    expected = nn.utils.parameters_to_vector(torch.manual_seed(9) and nn.Linear(10, 1).double().parameters())
    for rows in torch.tensor(orders[2]).split(32) + torch.tensor(orders[3]).split(32):
        expected = expected - 0.01 * 2 * X1[rows].T @ (X1[rows] @ expected - y1[rows]) / len(rows)
    for script in SCRIPTS:
        model = common.make_model(10, 1, seed=9).eval()
        model(X).sum().backward()  # what a caller left does no harm
        vector = trained(script, X, y, *WINDOW[script], model=model, dtype=torch.float64, seed=1, epochs=range(2))
        assert model.training and torch.allclose(vector, expected, atol=1e-13, rtol=0)


def test_saved_activations_shrink_with_the_micro_batch():
    def peak(script, *sizes):
        live, peaks = weakref.WeakSet(), []

        def save(tensor):
            live.add(saved := tensor.detach())
            peaks.append(sum(each.nbytes for each in live))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved):
            trained(script, *common.make_data(1024), *sizes, model=common.make_model(10, 1, 64), epochs=[0])
        return max(peaks)

    assert peak("train_accum.py", 32, 32) < 0.06 * peak("train_basic.py", 1024)


# ---- what is printed
@pytest.mark.parametrize(("script", "cut", "steps"), [*zip(SCRIPTS, ["32 x 1", "8 x 4", "16 x 1"], [32, 32, 63])])
def test_a_run_without_flags(run, tmp_path, monkeypatch, script, cut, steps):
    """With the default device, whatever it is here, and variables that another launch left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "1", "WORLD_SIZE": "2"})
    lines, err = run(script, device="auto")
    assert lines[0].startswith(f"1000 rows, {cut} per step, {steps} steps per epoch, 0 of 10 epochs done; ")
    assert lines[0].endswith(f", processes: 1, torch {torch.__version__}, seed 0")
    assert len(steps_printed(lines)) == 10 * steps and err == "" and os.listdir(tmp_path) == []
    found = CLOSING.fullmatch(lines[-1])
    assert found[1] == str(10 * steps) and 0.008 < float(found[3]) < 0.012  # the noise's variance is 0.01


def test_the_first_of_every_x_steps_of_an_epoch_is_printed_with_the_mean_loss_of_its_rows(run):
    flags = ("--rows", 100, "--epochs", 2, "--log-every", 3, "--batch-size")
    basic, accum, manual = (steps_printed(run(s, *flags, WINDOW[s][0])[0]) for s in SCRIPTS)
    assert basic[:, :3].tolist() == [[1, 1, 4], [1, 4, 4], [2, 1, 4], [2, 4, 4]]
    assert np.array_equal(basic, manual) and np.allclose(basic[:, :4], accum[:, :4], atol=1e-5)
    assert accum[:, 4:].tolist() == [[4, 32], [1, 4], [4, 32], [1, 4]]


def test_what_cannot_run_is_refused_by_name(run, monkeypatch):
    for flag in WRONG.split():
        out, err = run("train_accum.py", f"--{flag}", fails=True)
        assert out == [] and f"train_accum.py: error: argument --{flag.split('=')[0]}: " in err
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "2")
    for script in ("train_basic.py", "train_manual.py"):
        assert "train_accum.py --batch-size 24 --accumulation-steps 1" in run(script, "--batch-size", 24, fails=True)[1]


def test_a_run_that_cannot_go_on_says_what_to_change_and_writes_no_checkpoint(run, tmp_path, capsys):
    file = tmp_path / "run.pt"
    for script in SCRIPTS:
        _, err = run(script, "--lr", 10, "--checkpoint", file, fails=True)
        assert err == "error: epoch 1: the weights are not finite; try --lr 1" and not file.exists()
    _, err = run("train_basic.py", "--batch-size", 1000, "--lr", 1e4, "--checkpoint", file, fails=True)
    assert f"epoch {torch.load(file)['epoch'] + 1}: the weights" in err and weights(file).square().sum().isfinite()
    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        sys.excepthook(type(error), error, None)  # as a script has set it
        assert "half the --batch-size, twice the --accumulation-steps and the same" in capsys.readouterr().err
    sys.excepthook(ValueError, ValueError("a bug"), None)
    assert capsys.readouterr().err == "ValueError: a bug\n"


# ---- data
def test_every_kind_of_file_gives_the_same_standardised_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "\n".join(",".join(map(repr, row)) for row in TABLE.tolist())
    excel = '"a","b, c","","target"\n' + re.sub(r"[^,\n]+", r'"\g<0>"', rows)
    pathlib.Path("rows.csv").write_text(rows, encoding="utf-8-sig")
    pathlib.Path("names.csv").write_text(f"a,b,c,target\n{rows}\n")
    pathlib.Path("excel.csv").write_text(excel.replace("\n", "\n\n"), encoding="utf-8-sig", newline="\r\n")
    np.save("rows.npy", TABLE)
    np.save("columns.npy", np.asfortranarray(TABLE))
    np.savez("one target.npz", X=TABLE[:, :3], y=TABLE[:, 3], other=1)
    np.savez("two targets.npz", X=TABLE[:, :2], y=TABLE[:, 2:])
    deviation = PLAIN.std(axis=0) + np.array([0, 1, 0, 0])
    for file in os.listdir():
        X, y, _, mean, std = common.load_data(file)
        assert X.dtype == y.dtype == torch.float32 and X.is_contiguous() and y.shape == (40, 1 + ("two" in file))
        assert np.allclose(torch.cat([X, y], dim=1), (PLAIN - PLAIN.mean(axis=0)) / deviation, atol=1e-6)
        assert np.allclose(mean, TABLE.mean(axis=0)) and np.allclose(std, deviation * SCALE)


NO_TABLES = [
    ("1\n2\n", "is not a table"),
    ("age,b\n1,2\n\n3,x\n", "line 4: could not convert string 'x' to float64 in column 2 (b) "),
    ("x,2\n3,4\n", "line 1: could not convert string 'x' to float64 in column 1 "),
    ("a,b\n1,2\n3,4,5\n", "line 3: the number of columns changed from 2 to 3"),
    ("a,b\n1,2\n3,nan\n", "row 2, column 2 (b): nan is not"),
    ("1,2\n-1e200,3\n", "row 2, column 1: -1e+200 is not"),
    ("a,b\n1,000,2\n", "line 1 has 2 columns, the others have 3"),
    ("a;b\n1,5;2,5\n", "commas between"),
    (",a,b\n0,1,2\n", "leave out the index (pandas: index=False)"),
    ("0,1,2\n5,6,7\n", "line 1 numbers the columns; leave it out (pandas: header=False)"),
    ("größe,x\n1,2\n", "utf-8"),
    (np.ones((3, 2)) * 1j, "complex128"),
    (np.ones((3, 2, 2)), "shape (3, 2, 2) is not a table"),
    (np.array([[None, 1]]), "Object arrays cannot be loaded"),
    ({"X": np.ones((3, 2))}, "y is not a file"),
]


@pytest.mark.parametrize(("content", "said"), NO_TABLES, ids=range(len(NO_TABLES)))
def test_a_file_that_is_no_table_is_refused_with_the_place(tmp_path, run, content, said):
    file = tmp_path / {str: "t.csv", dict: "t.npz"}.get(type(content), "t.npy")
    if isinstance(content, str):
        file.write_text(content, encoding="latin-1")
    else:
        np.savez(file, **content) if isinstance(content, dict) else np.save(file, content)
    _, err = run("train_basic.py", "--data", file, fails=True)
    assert f"train_basic.py: error: argument --data: {file}: " in err and said in err
    file.write_bytes(file.read_bytes()[:-7])  # damaged, as by a broken download
    if file.suffix != ".csv":
        assert f"argument --data: {file}: " in run("train_basic.py", "--data", file, fails=True)[1]


# ---- checkpoint
@posix
@pytest.mark.parametrize(("script", "ending"), [*zip(SCRIPTS, ["SIGKILL", "SIGINT", "SIGPIPE"])])
def test_ended_at_any_moment_the_same_command_goes_on_to_the_same_weights(tmp_path, start, run, script, ending):
    file = tmp_path / "run.pt"  # the endings: a kill, Ctrl-C, `| head`
    flags = ("--hidden", 4, "--seed", 3, "--batch-size", WINDOW[script][0], "--checkpoint", file, "--epochs")
    process = start(tmp_path, sys.executable, HERE / script, "--device", "cpu", "--log-every", 30, *flags, 1000)
    while not file.exists() and process.poll() is None:
        time.sleep(np.random.uniform(0, 0.1))
    process.stdout.close() if ending == "SIGPIPE" else process.send_signal(signal.Signals[ending])
    assert (process.wait(timeout=900), process.stderr.read()) == (-signal.Signals[ending], "")
    epochs = torch.load(file)["epoch"] + 1
    (tmp_path / "run.pt.999999.tmp").write_bytes(b"left by a run that was killed")
    assert f" {epochs - 1} of {epochs} epochs done" in run(script, *flags, epochs)[0][0]
    options = {"model": common.make_model(10, 1, hidden=4, seed=3), "seed": 3, "epochs": range(epochs)}
    expected = trained(script, *common.make_data(1000), *WINDOW[script], **options)
    assert torch.equal(weights(file), expected) and os.listdir(tmp_path) == ["run.pt"]


def test_scripts_go_on_from_each_others_checkpoints_with_the_same_settings_only(tmp_path, run, monkeypatch):
    """The optimizer's state, here momentum, included; a finished run trains nothing."""
    monkeypatch.setattr(torch.optim, "SGD", torch.optim.Adam)
    file, data = tmp_path / "run.pt", tmp_path / "t.csv"
    np.savetxt(data, TABLE, delimiter=",", header="a,b,c,target", comments="")
    flags = ("--data", data, "--log-every", 0, "--checkpoint", file, "--epochs")
    for epochs, script in enumerate([*SCRIPTS, "train_basic.py"], 1):
        (opening, closing), _ = run(script, *flags, epochs, "--batch-size", WINDOW[script][0])
        assert "40 rows under a header" in opening and f" {epochs - 1} of {epochs} epochs done" in opening
        assert closing.startswith("2 optimizer steps")
    (X, y, _, mean, _), vector = common.load_data(str(data)), weights(file)
    expected = trained("train_basic.py", X, y, 32, optimizer=torch.optim.Adam, epochs=range(4))
    assert (vector - expected).abs().max() < 1e-6
    state, before = torch.load(file), file.read_bytes()
    assert torch.equal(state["mean"], mean) and state["torch"] == torch.__version__

    found = CLOSING.fullmatch(run("train_basic.py", *flags, 3)[0][1])
    assert found[1] == "0" and found[2].startswith("share of the targets' variance")
    assert float(found[3]) == pytest.approx(F.mse_loss(X @ vector[:3] + vector[3], y[:, 0]).item(), abs=2e-6)
    _, err = run("train_basic.py", *flags, 5, *"--lr 0.1 --seed 1 --batch-size 16 --hidden 4".split(), fails=True)
    changed = "rows per step is 16, was 32; --lr is 0.1, was 0.01; --seed is 1, was 0; --hidden is 4, was 0"
    assert err == f"error: --checkpoint {file}: {changed}; take the old values, or another file"
    for other in (1024 * TABLE, TABLE[[0, 2, 1, *range(3, 40)]]):  # units, which standardising hides; order
        np.savetxt(data, other, delimiter=",")
        assert re.search("40 rows with checksum .{8}, was 40 rows", run("train_basic.py", *flags, 5, fails=True)[1])
    assert file.read_bytes() == before


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path, run, monkeypatch):
    def full(descriptor):
        assert os.fstat(descriptor).st_size > 1000 and pathlib.Path("run.pt").read_bytes() == whole
        raise OSError(28, "No space left on device")

    Bomb = type("Bomb", (), {"__reduce__": lambda _: (open, ("bomb", "w"))})  # loaded, it would write a file
    monkeypatch.chdir(tmp_path)
    run("train_basic.py", "--epochs", 1, "--checkpoint", "run.pt")
    whole, weight = pathlib.Path("run.pt").read_bytes(), torch.load("run.pt")["model"]["weight"].numpy().tobytes()
    objects, pieces = (Bomb(), [1, 2], {"model": {}}), (b"", b"hello\n", whole[:-100], whole.replace(weight, bytes(40)))
    for content in (*objects, *pieces):
        file = tmp_path / f"{len(os.listdir())}.pt"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        before, (out, err) = file.read_bytes(), run("train_basic.py", "--checkpoint", file, fails=True)
        assert out == [] and err.startswith(f"error: --checkpoint {file}: is not a whole checkpoint")
        assert file.read_bytes() == before
    for path in (".", "missing/run.pt"):
        out, err = run("train_basic.py", "--checkpoint", path, fails=True)
        assert out == [] and "error: --checkpoint " in err
    monkeypatch.setattr(os, "fsync", full)
    _, err = run("train_basic.py", "--checkpoint", "run.pt", fails=True)
    assert err.endswith("run.pt: No space left on device; what it held before is safe")
    assert pathlib.Path("run.pt").read_bytes() == whole and len(os.listdir()) == 8  # no bomb


# ---- device and processes
def test_each_process_gets_a_device_of_its_own_or_all_get_the_cpu(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})  # or left over
    for case in """0 0 auto cpu, 1 0 auto cuda:0, 1 2 auto cpu, 2 2 auto cuda:1, 2 2 cuda cuda:1, 2 0 cuda cuda:0,
            2 0 cuda:1 cuda:1, 2 2 cpu cpu""".split(","):
        accelerators, processes, name, picked = case.split()
        device = torch.device("cuda") if accelerators != "0" else None
        monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda n=processes: n == "2")
        monkeypatch.setattr("torch.accelerator.device_count", lambda n=accelerators: int(n))
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available, device=device: device)
        assert common.pick_device(name) == torch.device(picked)


def worker(launch):
    """What each process of a launch does; the one to be killed ends itself in epoch 2 of the first attempt."""
    rank, reductions, result, tasks = os.environ["RANK"], [], {}, "/proc/self/task"
    atexit.register(lambda: torch.save([result, os.path.exists(tasks) and len(os.listdir(tasks))], f"{rank}.pt"))
    if (launch, rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("killed", "1", "0"):
        reduce, calls = common.all_reduce_mean, iter([True] * 40)
        common.all_reduce_mean = lambda loss: reduce(loss) if next(calls, False) else os.kill(os.getpid(), 9)
    sys.argv = ["train_accum.py", *FLAGS, "--checkpoint", "run.pt"]
    train_accum.main()
    result["undisturbed"] = trained("train_accum.py", *common.make_data(1001), 8, 4, epochs=range(3))

    class Counting(nn.parallel.DistributedDataParallel):
        def __init__(self, model):
            super().__init__(model)
            self.register_comm_hook(None, lambda _, bucket: reductions.append(1) or allreduce_hook(None, bucket))

    train_accum.DistributedDataParallel = Counting
    for rows, *sizes in SHARED:
        vector = trained("train_accum.py", *common.make_data(rows), *sizes, dtype=torch.float64)
        result[rows, *sizes] = vector, len(reductions)
        reductions.clear()


@posix
@pytest.mark.parametrize(("launch", "processes", "first"), [("killed", 2, 1), ("two", 3, 0)])
def test_same_weights_in_several_processes(launches, run, launch, processes, first):
    """On two machines, which share no disk; and on one, where a killed process costs its epoch at most."""
    (folder, *others), (out, *silent) = launches[launch], map(finish, launches[launch].values())
    lines, alone = out[out.rindex("1001 rows") :].splitlines(), run("train_accum.py", *FLAGS)[0]  # of the last attempt
    assert f" {first} of 3 epochs done; cpu, processes: {processes}, " in lines[0] and not any(silent)
    assert np.allclose(steps_printed(lines), steps_printed(alone)[32 * first :], atol=2e-6)
    assert CLOSING.fullmatch(lines[-1])[3] == CLOSING.fullmatch(alone[-1])[3]
    result, threads = torch.load(folder / "0.pt")
    assert threads in (1, False)  # the group's are gone; torchrun limits the others to 1
    assert torch.equal(weights(folder / "run.pt"), result["undisturbed"])
    assert not any((other / "run.pt").exists() for other in others)
    for rows, *sizes in SHARED:
        vector, reductions = result[rows, *sizes]
        assert reductions == 2 * math.ceil(rows / math.prod(sizes))  # one a step
        expected = trained("train_basic.py", *common.make_data(rows), math.prod(sizes), dtype=torch.float64)
        assert (vector - expected).abs().max() <= 1e-12


# ---- README
INTRO, *SECTIONS = (HERE / "README.md").read_text(encoding="utf-8").split("\n## ")


def test_the_loop_to_copy_takes_the_steps_of_train_basic_in_a_small_cnn(monkeypatch):
    monkeypatch.setattr(common, "shuffled_indices", lambda rows, *_: torch.arange(rows))
    loop = re.search(r"^```python\n(.*?)^```", INTRO, flags=re.DOTALL | re.MULTILINE)[1]
    X, y = common.make_data(517)[0].double().view(517, 1, 2, 5), torch.arange(517) % 5
    basic, copy = (nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).double() for _ in "12")
    copy.load_state_dict(basic.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (basic, copy)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=51) for optimizer in optimizers]
    optimizers[0].register_step_post_hook(lambda *_: schedulers[0].step())
    train_basic.train(basic, optimizers[0], X, y, loss_fn=F.cross_entropy, batch_size=32, epochs=range(3), log_every=0)
    names = {"model": copy, "optimizer": optimizers[1], "scheduler": schedulers[1], "loss_fn": F.cross_entropy}
    names["loader"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=8)
    exec(loop, {**names, "accumulation_steps": 4, "device": "cpu", "epochs": 3})
    assert all(torch.allclose(*pair, rtol=0, atol=1e-12) for pair in zip(basic.parameters(), copy.parameters()))


@posix
@pytest.mark.parametrize("section", [text for text in SECTIONS if "```" in text])
def test_every_block_of_the_readme_runs(section, start, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, "README.md", "exec"), {})
        for line in block.splitlines() if language == "sh" else []:
            if "--rows 32768" in line:  # a measurement: here it only has to run
                line = f"python {re.search('train_accum[^&]+', line)[0]} --epochs 1 --rows 256"
            first, *words = shlex.split(line.replace(".py ", ".py --device cpu "))
            if first == "python" and words[0] in SCRIPTS:
                run(*words)  # in this process
                continue
            program = {"python": [sys.executable], "torchrun": TORCHRUN}.get(first, [first])
            finish(start(tmp_path, *program, *[HERE / word if word in SCRIPTS else word for word in words]))


if __name__ == "__main__":
    worker(sys.argv[1])
