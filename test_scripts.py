"""Tests of the promise: the same steps, however a batch is split.

    python -m pytest -q             # all of them
    python -m pytest -q -k smoke    # each script, as a user starts it

The judge is train_plainly(), a loop over whole batches: its steps, losses and weights
are compared with those of the scripts, and of copies with the README's recipes.
"""

import argparse
import contextlib
import copy
import inspect
import io
import json
import multiprocessing
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_equal
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import common
import train_accum
import train_basic
import train_manual

SCRIPTS = [train_basic, train_accum, train_manual]

parametrize = pytest.mark.parametrize
each_script = parametrize("script", SCRIPTS)
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, links or torchrun")
# what is saved there can only be loaded with a map_location, on any machine
on_a_gpu = mock.patch("torch.serialization.location_tag", lambda storage: "cuda:99")

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in processes started from here

# So that a changed default fails only where a script has no flags.
FLAGS = "--hidden=0 --epochs=2 --lr=0.05 --seed=0 --log-every=1 --device=cpu"
FLAGS += " --checkpoint=run.pt --batch-size=32"
SPLIT = "--batch-size=8 --accumulation-steps=4"

README = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = {  # title: [(kind, block)]
    section.partition("\n")[0]: BLOCK.findall(section)
    for section in re.split("^#+ ", README, flags=re.MULTILINE)
}
LOOP = BLOCK.search(README)[2]
(_, ONE_LINERS), (_, SHELL) = SECTIONS["One-line changes"]

MODEL_AND_LOSS = "Your own model and loss"
TENSORS = "Your own tensors or table, and a prediction"
DATASET = "Your own Dataset, random augmentation"
SCHEDULE = "Clipping, warm-up and a schedule"
VALIDATION = "Validation, the best model, stopping early"
SAVES = "Saving within an epoch"
TERM = "a second term"
WHOLE = "A loss over the whole step"


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


def sizes_in(flags):
    """Return the numbers in FLAGS and then in some flags; the last of a name counts."""
    flags = f"--rows=1000 --accumulation-steps=1 {FLAGS} {flags}".replace("-", "_")
    found = re.findall(r"__(\w+)=([\d.]+)", flags)
    return types.SimpleNamespace(**{name: json.loads(text) for name, text in found})


def train_plainly(model, fetch, y, sizes, loss_fn=F.mse_loss, recipes=()):
    """Train with whole batches, and what the README's recipes do.

    `fetch(saves, rows)` returns inputs: their augmentation may depend on the saves.
    Return the steps to print (epoch, step, loss), and the model after each save.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.lr)
    rows_per_step = sizes.batch_size * sizes.accumulation_steps
    steps_per_epoch = len(y.split(rows_per_step))
    steps_per_save = 10 if SAVES in recipes else steps_per_epoch
    if SCHEDULE in recipes:
        total = sizes.epochs * steps_per_epoch
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, sizes.lr, total, pct_start=0.1, cycle_momentum=False
        )
    steps = []
    saved = []
    for epoch in range(1, sizes.epochs + 1):
        torch.manual_seed(seed_of(sizes.seed, epoch - 1))
        order = torch.randperm(len(y)).split(rows_per_step)
        iter(DataLoader(order))  # draws a random number, as in the scripts
        for step, rows in enumerate(order, start=1):
            optimizer.zero_grad()
            inputs = fetch(len(saved), rows)
            if WHOLE in recipes:  # reseeds, for dropout
                torch.manual_seed(torch.randint(2**62, ()).item())
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in recipes):
                outputs = model(inputs)
            loss = loss_fn(outputs.float(), y[rows])
            if TERM in recipes:
                loss += 0.01 * sum(weight.abs().sum() for weight in model.parameters())
            loss.backward()
            if SCHEDULE in recipes:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if SCHEDULE in recipes:
                scheduler.step()
            if sizes.log_every and (step - 1) % sizes.log_every == 0:
                steps.append((epoch, step, loss.item()))
            if step % steps_per_save == 0 or step == steps_per_epoch:
                saved.append(copy.deepcopy(model))
    return steps, saved


def seed_of(*numbers):
    """Return the number that seeds an epoch in a process, or an item in an epoch."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def judge(text, flags="", table=None, offset=0, done=0, file="run.pt"):
    """Compare what a run printed, and its file, with the judge.

    `done` epochs came before; an `offset` of the table must not matter.
    """
    sizes = sizes_in(flags)
    X, y, mean, std = standardise(make_table(sizes.rows) if table is None else table)
    torch.manual_seed(sizes.seed)
    model = nn.Linear(X.shape[1], 1)
    expected, _ = train_plainly(model, lambda _, rows: X[rows], y, sizes)
    steps, loss = read(text)
    assert_close(steps, [step for step in expected if step[0] > done], 2e-5)
    assert_close(loss, F.mse_loss(model(X), y).item(), 2e-5)
    if file is not None:
        state = torch.load(file, "cpu")
        assert state["epoch"] == sizes.epochs
        assert_close(weights_in(state), weights_of(model))
        assert_close((state["mean"].numpy() - offset - mean) / std, 0)
        assert_close(state["std"].numpy() / std, 1)


def read(text):
    """Return the steps (epoch, step, loss) and the last loss that a run printed."""
    steps = re.findall(r"Epoch: (\d+), Step: (\d+), Loss: ([\d.]+)", text)
    [loss] = re.findall(r"Loss of all rows: ([\d.]+)", text)
    return np.array(steps, dtype=float), float(loss)


def weights_of(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def weights_in(state):
    """Return the model's weights in a checkpoint, as one vector."""
    return nn.utils.parameters_to_vector(state["model"].values()).numpy()


def assert_close(found, expected, tolerance=1e-5):
    assert_allclose(found, expected, rtol=0, atol=tolerance)


# ---- helpers
@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Run each test in an empty folder."""
    monkeypatch.chdir(tmp_path)


def main(script, flags=""):
    """Run a script's main() here and return the model."""
    split = SPLIT if script.__name__ == "train_accum" else ""
    return script.main(f"{FLAGS} {split} {flags}".split())


def run(script, flags=""):
    """Run a script's main() here and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(script, flags)
    return out.getvalue()


def resume(script, flags):
    """Check that a run killed after each epoch ends the same; return its checkpoint."""
    save_checkpoint = common.save_checkpoint

    def save_and_die(*args, **more):
        save_checkpoint(*args, **more)
        raise KeyboardInterrupt

    flags = f"--epochs=3 {flags}"
    whole = read(run(script, flags))
    state = torch.load("run.pt")
    os.remove("run.pt")
    killed = mock.patch("common.save_checkpoint", save_and_die)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for _ in range(state["epoch"] - 1):
            with killed, pytest.raises(KeyboardInterrupt):
                main(script, flags)
        main(script, flags)
    assert_equal(read(out.getvalue()), whole)
    lists = json.JSONEncoder(default=torch.Tensor.tolist).encode
    assert lists(torch.load("run.pt")) == lists(state)
    os.remove("run.pt")
    return state


def edited(script, *edits):
    """Return a copy of a script in which old lines are replaced with new ones."""
    copied = types.ModuleType(script.__name__)
    exec(replaced(inspect.getsource(script), *edits), copied.__dict__)
    return copied


def replaced(text, *edits):
    for old, new in edits:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def start(*command):
    """Return what a Python process prints; 900 seconds mean that it hangs."""
    return subprocess.check_output([sys.executable, *command], text=True, timeout=900)


# ---- the promise
def test_smoke_each_script_runs_without_flags():
    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(start, [script.__file__ for script in SCRIPTS]))
    for text, size in zip(texts, [32, 8 * 4, 16]):
        flags = f"--epochs=10 --lr=0.01 --log-every=10 --batch-size={size}"
        judge(text, flags, file=None)
    assert files() == {}


@each_script
def test_help_of_each_script(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert script.__doc__ in text
    assert ("--accumulation-steps" in text) == (script is train_accum)


def test_the_lines_of_a_run_come_at_once(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr("sys.stdout", output)
    np.savetxt("表.csv", make_table(7), delimiter=",")
    main(train_accum, "--data=表.csv --epochs=1")
    expected = (
        r"\\u8868.csv: line 1 is a row of numbers\n"
        "7 rows, 8 x 4 per step, 1 steps per epoch, 0 of 1 epochs done; cpu, "
        rf"processes: 1, torch {re.escape(torch.__version__)}, seed 0\n"
        r"Epoch: 1, Step: 1, Loss: \d\.\d{6}\n"
        r"Loss of all rows: \d\.\d{6}, \d+\.\d{3} s, peak memory "
        r"(\d+ MiB of the process|unknown)\n"
    )
    assert re.fullmatch(expected, output.buffer.getvalue().decode())


SPLITS = [(train_accum, 8, 4), (train_accum, 1, 32), (train_accum, 7, 3)]
SPLITS += [(script, size, 1) for script in SCRIPTS for size in (5, 32, 400)]


@parametrize("rows", [1, 2, 31, 32, 33, 1037])
@parametrize("script, size, steps", SPLITS)
def test_each_split_takes_the_steps_of_the_judge(script, size, steps, rows):
    flags = f"--seed=7 --lr=0.04 --epochs=3 --log-every={rows % 4} --rows={rows}"
    flags += f" --batch-size={size}"
    if script is train_accum:
        flags += f" --accumulation-steps={steps}"
    judge(run(script, flags), flags)


@posix
@on_a_gpu
def test_a_script_resumes_from_the_file_of_another_without_its_gpu():
    os.symlink("run.pt", "link.pt")
    for done, script in enumerate([*SCRIPTS, train_basic]):
        flags = f"--rows=100 --checkpoint=link.pt --epochs={min(done + 1, 3)}"
        judge(run(script, flags), flags, done=done)
    assert os.path.islink("link.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load("run.pt")


@each_script
@mock.patch("common.mean_over_processes", side_effect=float)
def test_no_more_rows_than_the_batch_size_at_once(means, monkeypatch, script):
    fetched, computed, firsts = [], [], []

    def fetch(dataset, rows):
        fetched.append(len(rows))
        return tuple(tensor[rows] for tensor in dataset.tensors)

    def watch(layer, inputs):
        computed.append(len(inputs[0]))
        firsts.append(layer.weight.grad is None)

    monkeypatch.setattr(TensorDataset, "__getitem__", fetch)
    with register_module_forward_pre_hook(watch):
        run(script, "--rows=100 --batch-size=30 --epochs=2 --log-every=0")
    assert fetched == computed == [30, 30, 30, 10] * 3  # also for the last line
    counts = sum(firsts), means.call_count  # no gradient of the step before is left
    assert counts == ((2, 4) if script is train_accum else (8, 2))


def most_tensors_kept(train, *arguments):
    """Return the largest number of tensors that were kept at once for backward()."""
    kept = weakref.WeakSet()
    numbers = []

    def keep(tensor):
        tensor = tensor.detach()  # a new object each time
        kept.add(tensor)
        numbers.append(len(kept))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train(*arguments)
    return max(numbers)


def test_accumulation_keeps_the_tensors_of_a_single_micro_batch():
    """Also in the README's loop. The judge's batches have their size."""
    model, sizes = nn.Linear(10, 1), sizes_in("--batch-size=8")
    most = most_tensors_kept(train_plainly, model, lambda _, i: X[i], Y[:80], sizes)
    assert most_tensors_kept(exec, LOOP, {}) == most
    assert most_tensors_kept(run, train_accum) == most


def test_mean_loss_is_exact_and_changes_nothing():
    """With class weights and padding; the last row, a batch of its own, is padding."""
    model = nn.Sequential(nn.Dropout(), nn.Linear(9, 5).eval())
    outputs = []
    model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    X, y = torch.randn(61, 9), torch.arange(61) % 6 - 1
    weight = torch.arange(1.0, 6)
    loss_fn = nn.CrossEntropyLoss(weight, ignore_index=-1)

    def count(targets):
        return weight[targets[targets >= 0]].sum()

    args = types.SimpleNamespace(batch_size=4, device="cpu")
    before = torch.get_rng_state()
    with mock.patch("common.DataLoader", wraps=DataLoader) as loader:
        loss = common.mean_loss(args, model, TensorDataset(X, y), loss_fn, count, 1)
    assert loader.call_args.kwargs["num_workers"] == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert [layer.training for layer in model] == [True, False]
    assert not any(part.requires_grad or part.is_inference() for part in outputs)
    assert_close(loss, loss_fn(model.eval()(X), y).item())


@parametrize("rows", [[3, 0], []])
def test_batches_of_single_items_can_be_dicts_and_empty(rows):
    items, _ = torch.utils.data.random_split(torch.arange(9), [5, 4])
    batches = common.Batches(items, lambda items: {"x": torch.stack(items)})
    index = torch.tensor(rows, dtype=int)
    assert batches[index]["x"].tolist() == [items[i] for i in rows]


# ---- edits, as users make them in a copy
LINEAR = "torch.nn.Linear(10, 1)"
FROZEN = "torch.nn.Sequential(torch.nn.BatchNorm1d(10).eval(), torch.nn.Linear(10, 1))"
MODEL = "common.make_model(X.shape[1], args.hidden)"
OPTIMIZER = "torch.optim.SGD(model.parameters(), lr=args.lr)"
ADAMW = (OPTIMIZER, "torch.optim.AdamW(model.parameters(), lr=torch.tensor(args.lr))")
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
SCHEDULER_AND_EMA = (PARTS, PARTS + MORE_PARTS)
EPOCH = "    for epoch in range(first_epoch, args.epochs):\n"
FREEZE = f"""
        for weight in parts["model"][0].parameters():
            {re.search("(.*)  # freezing", ONE_LINERS)[1]}
"""
DROPOUT = (MODEL, "torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(10, 1))")
COPIES = {
    "as it is": [],
    "a frozen layer": [(MODEL, FROZEN)],
    "freezing": [(MODEL, MODEL.replace("args.hidden", "3")), (EPOCH, EPOCH + FREEZE)],
    "dropout": [DROPOUT],
    "all of your own": [
        (MODEL, "torch.nn.Sequential(torch.nn.LayerNorm(10), torch.nn.Linear(10, 1))"),
        ADAMW,
        SCHEDULER_AND_EMA,
        (STEP, STEP + MORE_STEPS),
    ],
}


@parametrize("edits", COPIES.values(), ids=COPIES)
def test_a_copy_takes_the_same_steps_and_resumes(edits):
    scripts = [edited(script, *edits) for script in SCRIPTS]
    marked = re.findall(".*# processes.*\n", inspect.getsource(train_accum))
    scripts.append(edited(train_accum, *((line, "") for line in marked), *edits))
    assert not {"rank", "world_size"} & set(scripts[-1].main.__code__.co_varnames)
    states = [resume(script, "--rows=237") for script in scripts]
    basic, accum, manual, unmarked = map(weights_in, states)
    assert_equal(unmarked, accum)
    if DROPOUT in edits:  # with masks of their own
        assert np.abs(manual - basic).max() > 1e-3
    else:
        assert_equal(manual, basic)
        assert_close(accum, basic)
    for script in scripts:
        run_on_a_device(script, "--rows=237")


def test_a_flag_of_your_own_may_be_zero():
    flag = '    add("--lr"'
    copied = edited(common, (flag, f'    add("--warmup", 0, "steps")\n{flag}'))
    assert copied.parse_args([], "", batch_size=1).warmup == 0


class Numbers(torch.utils.data.Dataset):
    """Random inputs, drawn here or by a DataLoader's worker."""

    def __getitem__(self, rows):
        inputs = torch.rand(len(rows), 10) + np.random.rand() + random.random()
        return inputs, torch.zeros(len(rows), 1)


@posix
@parametrize("workers", [0, 1])
def test_random_numbers_of_a_loader_are_the_same_again(workers):
    loader = ("(dataset, batch_size", f"(Numbers(), num_workers={workers}, batch_size")
    script = edited(train_basic, loader)
    script.Numbers = Numbers
    resume(script, "--rows=32")


def test_an_epoch_has_random_numbers_of_its_own_and_the_same_again():
    numbers = set()
    with mock.patch("torch.cuda.manual_seed_all") as seed_gpus:
        for where in [(0, 1), (0, 1, 0), (1, 0), (0, 2), (0, 1, 1), (0, 2, 1)]:
            common.seed_epoch(*where)
            numbers |= {torch.rand(1).item(), np.random.rand(), random.random()}
    seed_gpus.assert_called_with(seed_of(*where))
    assert len(numbers) == 5 * 3  # the first two are the same


def test_main_runs_in_a_thread_of_a_notebook_and_returns_the_model():
    with mock.patch("signal.signal") as set_handler, ThreadPoolExecutor() as pool:
        for script in SCRIPTS:
            model = pool.submit(main, script).result()
            assert_equal(weights_of(model), weights_in(torch.load("run.pt")))
            assert not model.training
        [call] = re.findall(r"`(train_accum\.main\([^`]*\))`", README)
        assert not eval(call).training
    set_handler.assert_not_called()


# ---- data
# the first column is time stamps in nanoseconds, the third a constant
SHIFTED = np.random.default_rng(0).integers(-99, 99, (40, 4)) * [2.0**30, 1e-9, 0, 1]
OFFSET = np.array([1.7e18, 5, 0.1, 0])
FORMS = [("a.csv.gz", '\n"a, b",2020-1,c,"y"'), ("a.csv", ""), ("A.NPY", None)]
FORMS += [("a.csv", "inf,trt,nan,y"), pytest.param("pipe", "a,b,c,d", marks=posix)]


@parametrize("name, header", FORMS)
def test_a_file_of_any_form_is_the_same_table(name, header):
    data = pathlib.Path(name)
    table = SHIFTED + OFFSET
    if header is None:
        with data.open("wb") as file:
            np.save(file, table)
    else:  # as a spreadsheet writes it: marked as UTF-8, with quotes
        style = {"comments": "", "encoding": "utf-8-sig"}
        np.savetxt(data, table, '"%+.17e"', ",", "\r\n", header, **style)
    with ThreadPoolExecutor() as pool:
        if name == "pipe":
            content = data.read_bytes()
            data.unlink()
            os.mkfifo(data)
            pool.submit(data.write_bytes, content)
        text = run(train_basic, f"--data={name}")
    judge(text, table=SHIFTED, offset=OFFSET)
    if name == "a.csv.gz":
        with pytest.raises(SystemExit, match=NO_FILE):
            run(train_basic, "--data=a.csv")  # another name
    assert ("line 1 is a header" in text) == bool(header)
    assert ("line 1 is a row of numbers" in text) == (header == "")


# ---- what is refused
class Code:
    def __reduce__(self):
        return open, ("opened", "w")  # a pickle may do this when it is loaded


def without_weights(content):
    """Overwrite the weights in a checkpoint with zeros."""
    weights = weights_in(torch.load("run.pt"))[:-1].tobytes()  # no bias
    return content.replace(weights, bytes(len(weights)))


def marked_as_folder(content):
    """Set a bit in the archive's index, so that torch skips a weight."""
    place = content.rfind(b"archive/data/0") - 8
    return content[:place] + b"\x10" + content[place + 1 :]


NO_FILE = r"\[(Errno 2\] No such file|WinError \d{1,3}\])"  # not from the network
NO_FOLDER = r"^error: --checkpoint .*[/\\]run.pt: cannot write to its folder: [A-Z]"
WRONG_FLAGS = {
    "--batch-size=0": "argument --batch-size: 0 is below 1$",
    "--accumulation-steps=0": "argument --accumulation-steps: 0 is below 1$",
    "--rows=0": "argument --rows: 0 is below 1$",
    "--epochs=0": "argument --epochs: 0 is below 1$",
    "--hidden=-1": "argument --hidden: -1 is below 0$",
    "--seed=-1": "argument --seed: -1 is below 0$",
    "--log-every=-1": "argument --log-every: -1 is below 0$",
    "--lr=0": "argument --lr: 0.0 is not above 0$",
    "--lr=nan": "argument --lr: nan is not above 0$",
    "--lr=x": "argument --lr: .*'x'$",
    "--batch-size=1.5": "argument --batch-size: .*'1.5'$",
    "--device=tpu": "argument --device: tpu is not here, only cpu, cuda:0, cuda:1$",
    "--batch=4": "unrecognized arguments: --batch=4",
    "--data=t.csv --rows=9": "argument --rows: not allowed with argument --data",
    "--lr=1e30": "^error: epoch 1: a weight is not finite; try a lower --lr",
    "--data=http://127.0.0.1:9/t.csv": f"^error: --data http:.*{NO_FILE}",
    "--checkpoint=.": "damaged, or not from here",
    "--checkpoint=none/run.pt": NO_FOLDER,
    "--checkpoint=/proc/run.pt": NO_FOLDER,
}
TOO_FEW = "rows of 2 or more numbers are needed, not"
NO_TABLES = {
    "": rf"{TOO_FEW} \(0, 1\)$",
    "a\n1\n2\n": rf"{TOO_FEW} \(2, 1\)$",
    "a,b\n1,2\n3,x\n": "could not convert string 'x' to float64 at row 1, column 2",
    "a,1\n1,2\n": "could not convert string 'a' to float64 at row 0, column 1",
    "a,b\n1,2\n3,nan\n": "column 2: a number is nan, infinite or too large",
    "a,b\n1,2\n3,2\n": "the last column, the target, is the same in all rows",
    ",a,b\n0,1,2\n1,3,4\n": "a column has no name; leave out the row names",
    "a,b\n0,1,2\n1,3,4\n": "a column has no name",
}
FOREIGN = [lambda content: content[:-9], without_weights, marked_as_folder]
FOREIGN += [torch.ones(3), Code(), {"settings": "x"}]
FOREIGN += [{"settings": {}, "epoch": 1}, {"settings": "x", "epoch": "y"}]
DAMAGED = r"^error: --checkpoint .*[/\\]run.pt: damaged, or not from here \(\w+\)$"
BAD_DATA = "^error: --data t.csv: "
# a file, edits of an earlier run, or what damages its file; flags; the error
REFUSED = [(None, flags, said) for flags, said in WRONG_FLAGS.items()]
REFUSED += [(text, "--data=t.csv", BAD_DATA + said) for text, said in NO_TABLES.items()]
REFUSED += [(content, "", DAMAGED) for content in FOREIGN]
REFUSED += [
    (np.array([[Code()]]), "--data=t.npy", "^error: --data t.npy: .*allow_pickle"),
    (np.ones(3), "--data=t.npy", rf"^error: --data t.npy: {TOO_FEW} \(3,\)$"),
    (np.eye(2) * 1j, "--data=t.npy", r"^error: --data t.npy: .*dtype\('complex128'\)"),
    ({"settings": "x", "epoch": 0}, "", "^-x$"),
    ([], "--lr=0.1", r"^\+'lr': 0.1,$"),
    ([], "--seed=1", r"^\+'seed': 1}$"),
    ([], "--batch-size=9", "^-'rows per step': 32,$"),
    ([], "--rows=999", r"^\+{'data'.*2 \(999, 10\), crc32 (.|\n)*^-'rows': 1000,$"),
    ([("t, X, y)", "t, X, -y)")], "", r"^-'torch.float32 \(1000, 1\), crc32 "),
    ([], "--hidden=1", r"^\+'  \(1\): ReLU\(\)',$"),
    ([ADAMW], "", r"^\+.*'optimizer': {'class': 'SGD',$(.|\n)*^-'lr': 0.0500000"),
    ([SCHEDULER_AND_EMA], "", "^-'scheduler': {'T_max': 2,$"),
    ([], "--epochs=1", "^error: 2 epochs are done, more than --epochs"),
]


def files():
    return {path: path.read_bytes() for path in pathlib.Path().iterdir()}


@parametrize("content, flags, said", REFUSED)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_what_must_not_run_is_refused(capsys, monkeypatch, content, flags, said):
    """The error is one line, after a usage or before a diff; nothing is changed."""
    if isinstance(content, str):
        pathlib.Path("t.csv").write_text(content)
    elif isinstance(content, np.ndarray):
        np.save("t.npy", content)
    elif isinstance(content, list):
        run(edited(train_accum, *content))
    elif callable(content):
        run(train_accum)
        file = pathlib.Path("run.pt")
        file.write_bytes(content(file.read_bytes()))
    elif content is not None:
        torch.save(content, "run.pt")
    before = files()
    monkeypatch.delattr("torch.nn.Module.load_state_dict")
    monkeypatch.delattr("torch.optim.Optimizer.load_state_dict")
    with believe_in(2), pytest.raises(SystemExit) as end:
        run(train_accum, flags)
    error = capsys.readouterr().err + str(end.value)
    assert re.search(said, error, re.MULTILINE)
    assert re.fullmatch(r"usage: (.|\n)*\n2|error: .*(\n[-+].*)*", error)
    assert files() == before


@parametrize("name", ["epoch", "settings", "mean"])
def test_a_part_cannot_have_the_name_of_something_else(name):
    script = edited(train_basic, (PARTS, PARTS + f"    parts['{name}'] = optimizer\n"))
    with pytest.raises(TypeError, match=name):
        run(script)
    assert files() == {}


def test_data_of_any_type_are_compared_to_the_end():
    data = (torch.arange(100_000) % 2).bfloat16()
    other = torch.cat([data[:-2], data[-2:].flip(0)])
    texts = [common.describe(tensor) for tensor in (data, other, data[:1], data[0])]
    assert len(set(texts)) == 4
    with mock.patch("torch.Tensor.cpu", lambda tensor: tensor.flip(0)):
        assert common.describe(data.flip(0)) == texts[0]


@mock.patch("torch.accelerator.max_memory_allocated", lambda device: 3 * 2**20)
def test_peak_memory_is_what_the_system_or_the_device_counts():
    np.ones(2**25)  # 256 MiB, freed at once
    status = pathlib.Path("/proc/self/status")
    for device in ("cpu", "mps"):
        text = common.peak_memory(torch.device(device))
        if status.exists() and "VmHWM" in status.read_text():
            [peak] = re.findall(r"^(\d+) MiB of the process$", text)
            resource = pytest.importorskip("resource")
            counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            assert 0.9 * counted < int(peak) < 1.1 * counted
        else:
            assert text == "unknown"
    assert common.peak_memory(torch.device("cuda")) == "3 MiB of the device"


CLEAR_REFS = pathlib.Path("/proc/self/clear_refs")  # Linux: 5 resets the peak


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="no peak to reset")
def test_loading_takes_no_more_than_the_table_and_half_a_copy():
    np.save("table.npy", make_table(2**20))  # 88 MiB
    peaks = []
    for rows, path in [(1, None), (2**20, None), (0, "table.npy")]:
        CLEAR_REFS.write_text("5")
        common.get_data(types.SimpleNamespace(rows=rows, data=path))
        peaks.append(int(common.peak_memory(torch.device("cpu")).split()[0]))
    assert max(peaks) - peaks[0] < 1.75 * 88, peaks


# ---- checkpoint
def save(model, epochs=1, **parts):
    args = types.SimpleNamespace(checkpoint="run.pt")
    common.seed_epoch(0, 0)  # which no temporary name depends on
    common.save_checkpoint(args, "settings", {"model": model, **parts}, epochs)


def test_a_file_is_replaced_once_it_is_whole_on_the_disk(monkeypatch):
    model = nn.Linear(99, 1)
    save(model)
    before = files()
    written = {}

    def fsync(descriptor):
        [(path, content)] = files().items() - before.items()  # what is new
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        written[path] = content
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        save(model, epochs=2)
    assert files() == before
    with mock.patch("torch.load", wraps=torch.load) as load:
        save(model, epochs=2)
    assert load.call_args.kwargs["map_location"] == "meta"  # reads no weight
    _, content = written.values()  # each run's temporary file has a name of its own
    assert list(files().values()) == [content]
    assert torch.load("run.pt")["epoch"] == 2


@parametrize("fault", [np.float64(0.1), lambda: 0.1, torch.nan, torch.inf, 100, 5000])
def test_what_cannot_be_saved_is_reported_and_changes_no_file(fault):
    """A whole number limits the size of files, in bytes; torch or Python reports it."""
    model = nn.Linear(9999, 1)
    model.weight.data.fill_(3e38)  # finite, but the sum would overflow
    save(model)
    before = files()
    said = "run.pt: epoch 2 is not saved: a state_dict"
    with contextlib.ExitStack() as stack:
        if fault in (torch.nan, torch.inf):
            model.weight.data[0, 8] = fault
            said = "epoch 2: a weight is not finite"
        elif isinstance(fault, int):
            said = "run.pt: epoch 2 is not saved: .*File too large"
            resource = pytest.importorskip("resource")
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault, limits[1]))
        with pytest.raises(SystemExit, match=said):
            save(model, epochs=2, log=common.State(fault=fault))
    assert files() == before


# ---- devices and processes
DEVICES = [  # accelerators, processes, --device, what the second process gets
    (0, 1, "auto", "cpu"),
    (1, 1, "auto", "cuda:0"),
    (1, 1, "cpu", "cpu"),
    (1, 2, "auto", "cpu"),
    (2, 2, "auto", "cuda:1"),
    (2, 2, "cuda", "cuda:1"),
    (2, 1, "cuda:1", "cuda:1"),
    (1, 2, "cuda", "cuda:1 is not here, only cpu, cuda:0"),  # rather than the CPU
]


def believe_in(count):
    """Let torch see a number of GPUs, until the end of a with block."""
    device = torch.device("cuda") if count > 0 else None
    return mock.patch.multiple(
        "torch.accelerator",
        device_count=lambda: count,
        current_accelerator=lambda **_: device,
    )


@parametrize("count, processes, name, device", DEVICES)
def test_a_process_picks_its_device(monkeypatch, count, processes, name, device):
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over, if there is one process
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if processes > 1:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with believe_in(count):
        try:
            found = str(common.pick_device(name))
        except argparse.ArgumentTypeError as error:
            found = str(error)
    assert found == device


@mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="1", GROUP_WORLD_SIZE="2")
def test_a_process_joins_with_its_own_device_and_prints_nothing(monkeypatch):
    calls = []
    dist = common.dist
    monkeypatch.setattr("sys.stdout", sys.stdout)
    monkeypatch.setattr("torch.accelerator.set_device_index", calls.append)
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(None, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda **x: calls.append(set(x)))
    monkeypatch.setattr("atexit.register", calls.append)
    common.join_processes(types.SimpleNamespace(device=torch.device("cuda:1")))
    options = {"store", "rank", "world_size", "timeout"}  # each device's own backend
    assert calls == [1, options, dist.destroy_process_group]
    print("\udcff is no error")
    sys.stdout.close()


def run_on_a_device(script, flags):
    """Train where a tensor left on the CPU is an error."""

    def check(args, settings, parts, *_, **more):
        assert "meta" not in settings
        assert all(weight.is_meta for weight in parts["model"].parameters())

    with mock.patch.multiple(
        common,
        pick_device=lambda name: torch.device("meta"),
        mean_loss=mock.patch("torch.Tensor.item", lambda _: 1.0)(common.mean_loss),
        peak_memory=str,  # any text will do
        save_checkpoint=check,
    ):
        run(script, f"{flags} --log-every=0")


def worker(folder, processes, edits):
    """Run train_accum.py as one process of several; return what it did and printed."""
    facts = types.SimpleNamespace(wrapped=0, seeds=set())
    facts.rows = [0, 0]  # of a linear model, in eval() and in train()
    reduce = mock.create_autospec(allreduce_hook, side_effect=allreduce_hook)
    store = common.dist.PrefixStore = mock.Mock(wraps=common.dist.PrefixStore)

    def count_rows(layer, inputs):
        facts.rows[layer.training] += len(inputs[0]) * isinstance(layer, nn.Linear)
        facts.seeds.add(torch.initial_seed())

    def watched(model):
        facts.wrapped += 1
        model = nn.parallel.DistributedDataParallel(model)
        model.register_comm_hook(None, reduce)
        return model

    script = edited(train_accum, *edits)
    script.DistributedDataParallel = watched
    os.chdir(folder)
    register_module_forward_pre_hook(count_rows)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            facts.model = str(main(script, processes[int(os.environ["RANK"])]))
        except SystemExit as end:
            facts.error = end.code
    facts.printed = out.getvalue()
    facts.reductions = reduce.call_count
    facts.prefix = store.call_args and store.call_args.args[0]
    torch.distributed.destroy_process_group()
    # a thread that outlives its process group can abort the process
    facts.threads = len(list(pathlib.Path("/proc/self").glob("task/*")))
    return vars(facts)


def run_processes(*processes, machines=1, restarts=0, edits=()):
    """Start a process for each text of flags, as torchrun does.

    Return lists of what worker() returns. A fork server saves importing torch again.
    """
    port = get_free_port()
    multiprocessing.set_forkserver_preload(["test_scripts", "torch._dynamo"])

    def launch(machine):
        command = (
            f"--nnodes={machines} --node-rank={machine} --master-port={port} "
            f"--nproc-per-node={len(processes) // machines} --max-restarts={restarts} "
            f"--log-dir={os.devnull} --start-method=forkserver worker"
        )
        config, _, _ = config_from_args(parse_args(command.split()))
        return elastic_launch(config, worker)(os.getcwd(), processes, edits)

    facts = {}
    with ThreadPoolExecutor() as pool:
        for results in pool.map(launch, range(machines)):
            facts |= results
    return types.SimpleNamespace(
        **{name: [facts[rank][name] for rank in sorted(facts)] for name in facts[0]}
    )


KILL = """
            import os, signal
            if (rank, epoch, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (1, 1, "0"):
                os.kill(os.getpid(), signal.SIGKILL)
"""
SAVE = "(args, settings, parts, epoch + 1, **scaling)\n"
STOP = f"""
        flag = (rank, epoch) == (1, 2)
        {re.search("(.*)  # after it", ONE_LINERS)[1]}
"""


@posix
def test_processes_share_each_batch_and_a_kill_costs_an_epoch_at_most(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", os.getcwd())  # torch leaves a file there
    flags = "--rows=100 --epochs=9 --batch-size=7 --accumulation-steps=3"
    edits = [(STEP, STEP + KILL), (SAVE, SAVE + STOP)]
    facts = run_processes(flags, flags, flags, edits=edits, restarts=1)
    assert facts.prefix == ["1"] * 3  # without a prefix, it can hang
    judge(facts.printed[0], f"{flags} --epochs=3", done=1)
    assert facts.printed[1:] == ["", ""]
    assert facts.rows == [[43, 2 * 43], [29, 2 * 29], [28, 2 * 28]]
    assert facts.reductions == [2 * 5] * 3  # one a step
    assert facts.wrapped == [2] * 3  # anew, as after resuming
    for rank, seeds in enumerate(facts.seeds):
        assert seeds == {seed_of(0, 1, rank), seed_of(0, 2, rank)}
    assert facts.model == [str(nn.Linear(10, 1))] * 3
    assert max(facts.threads) <= 1


@posix
def test_two_machines_resume_from_the_file_of_the_first():
    """A micro-batch has a single row, so one of the shares is empty."""
    np.save("data.npy", make_table(33))
    first = "--batch-size=1 --accumulation-steps=4 --data=data.npy"
    second = first.replace("data.npy", "./data.npy") + " --checkpoint=second.pt"
    run(train_accum, f"{first} --epochs=1")
    facts = run_processes(first, second, machines=2)
    judge(facts.printed[0], f"{first} --rows=33", done=1)
    assert np.sum(facts.rows, axis=0).tolist() == [33, 33]
    assert facts.prefix == [None, None]  # machines count on their own
    assert sorted(os.listdir()) == ["data.npy", "run.pt"]


ON_META = "if rank: args.device = torch.device('meta')"
BATCH_AND_LOG = "+'batch_size': 9,\n-'log_every': 1,\n+'log_every': 2,"
UNLIKE = [  # flags of two processes, a line of their error, and an edit
    ("", "--batch-size=9 --log-every=2", BATCH_AND_LOG, []),
    ("--data=0.npy", "--data=1.npy", "+'torch.float32 (9, 1), crc32 ", []),
    ("--checkpoint=0.npy", "--lr=0.05", "0.npy: damaged, or not from here", []),
    ("--lr=1e30", "--lr=1e30", "epoch 1: a weight is not finite", []),
    ("", "", "+'device': 'meta',", [("loss_fn = F.mse_loss", ON_META)]),
]


@posix
@parametrize("first, second, line, edits", UNLIKE)
def test_processes_that_must_not_train_end_alike(first, second, line, edits):
    np.save("0.npy", make_table(9))
    np.save("1.npy", make_table(9)[np.r_[0:7, 8, 7]])
    before = files()
    zero, one = run_processes(first, second, edits=edits).error
    assert zero == one
    assert line in one
    assert files() == before


@parametrize("script", [train_basic, train_manual])
def test_a_script_for_one_process_refuses_several(monkeypatch, script):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")  # left over, without torchrun
    judge(run(train_accum))
    monkeypatch.setattr("sys.argv", ["", "--epochs=0"])  # not those of main([])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit, match="error: this script is for one process"):
        script.main([])
    monkeypatch.setenv("WORLD_SIZE", "1")
    run(script, "--epochs=3")


# ---- README
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
LOADER = "DataLoader(TensorDataset(X, y), batch_size=8, shuffle=True)"
LOOPS = {  # edits, and the loss function
    "as it is": ([], F.mse_loss),
    "another loader": ([(LOADER, "list(zip(X.split(8), y.split(8)))")], F.mse_loss),
    "classes": (CLASSES, F.cross_entropy),
    "padding": ([*CLASSES, *PADDING], F.cross_entropy),
    "only padding": (
        [*CLASSES, *PADDING, ("[::3] =", "[:] =")],
        lambda *batch: F.cross_entropy(*batch, reduction="sum"),
    ),
    "a frozen layer": ([(LINEAR, FROZEN)], F.mse_loss),
}


@parametrize("edits, loss_fn", LOOPS.values(), ids=LOOPS)
def test_the_loop_to_copy_takes_the_steps_of_whole_batches(capsys, edits, loss_fn):
    split, whole = {}, {}
    block = replaced(LOOP, *edits)
    exec(block, split)
    exec(block.partition("for epoch")[0].replace("8", "32"), whole)
    model, optimizer = whole["model"], whole["optimizer"]
    for _ in range(10):
        for inputs, targets in whole["loader"]:
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
    assert_close(weights_of(split["model"]), weights_of(model))
    assert_close(float(capsys.readouterr().out.split()[-1]), loss.item())


def recipe(*titles):
    """Return the edits of recipes: each change without its + and its - lines."""
    blocks = [block for title in titles for block in SECTIONS[title]]
    diffs = [block for kind, block in blocks if kind == "diff"]
    return [
        [re.sub(rf"^[{sign}].*\n|^.", "", change, flags=re.M) for sign in "+-"]
        for change in "@@\n".join(diffs).split("@@\n")
    ]


ADDED = f"""\
-                loss.backward()
+                penalty = sum(weight.abs().sum() for weight in model.parameters())
+                {re.search("(.*)  # a second term", ONE_LINERS)[1]}
+                loss.backward()
"""
SECTIONS[TERM] = [("diff", ADDED)]
ITEMS = torch.arange(1000)
RAMP = torch.linspace(-1, 1, 192_000).view(1000, 3, 8, 8)
PADDED = "(torch.arange(1000) // 100).where(torch.arange(1000) % 3 > 0, -100)"
KEPT = "count = lambda targets: (targets != -100).sum()"
IN_TENSORS = recipe(MODEL_AND_LOSS, TENSORS)
IN_TENSORS += [("torch.arange(1000) // 100", PADDED), ("count = torch.numel", KEPT)]
SEVERAL = torch.arange(10) * ITEMS.view(-1, 1) / 9000  # targets of a row
IN_A_DATASET = recipe(MODEL_AND_LOSS, DATASET)
IN_A_DATASET += [("row % 10", "torch.arange(10) * row / 9000")]
IN_A_DATASET += [("cross_entropy", "mse_loss"), (", num_workers=2", "")]
STRICT = "lambda o, y, **sum: F.mse_loss(o.lerp(y, 0.0), y, **sum)"  # refuses bf16
FLAT = "torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(192, 10))"
X, Y, *_ = standardise(make_table(1000))


def images(saves, rows):
    """Return inputs of the recipe's Dataset, with their random augmentation."""
    noise = []
    for row in rows.tolist():
        torch.manual_seed(seed_of(0, saves, row))
        noise.append(torch.rand(3, 8, 8))
    return rows.view(-1, 1, 1, 1) / 1000 + 0.1 * torch.stack(noise)


def dice(outputs, targets):
    """Return the recipe's loss over a whole step."""
    return 1 - 2 * (outputs * targets).sum() / (outputs**2 + targets**2).sum()


DATA = {  # edits, the model, inputs, targets and loss function
    "table": ([("F.mse_loss", STRICT)], LINEAR, lambda _, i: X[i], Y, F.mse_loss),
    TENSORS: (IN_TENSORS, FLAT, lambda _, i: RAMP[i], eval(PADDED), F.cross_entropy),
    DATASET: (IN_A_DATASET, FLAT, images, SEVERAL, F.mse_loss),
}
TOGETHER = [SCHEDULE, VALIDATION, SAVES]
RECIPES = [
    ("table", [VALIDATION], "--epochs=12 --lr=0.46"),  # a rate at which it gets worse
    ("table", ["bf16"], ""),
    ("table", [WHOLE], ""),
    ("table", TOGETHER, "--epochs=8"),  # long enough to stop early
    (TENSORS, [*TOGETHER, TERM], "--epochs=8"),
    (DATASET, TOGETHER, "--epochs=1"),  # whose random numbers take time
    ("table", [*TOGETHER, WHOLE], ""),
    (TENSORS, [*TOGETHER, "bf16"], ""),
]


@parametrize("data, recipes, flags", RECIPES)
@mock.patch("torch.manual_seed", torch.default_generator.manual_seed)  # faster
@pytest.mark.filterwarnings("error:.*Disabling")
def test_recipes_train_as_a_plain_loop(data, recipes, flags):
    """Also with whole batches, after kills, and over two processes.

    Validation leaves 900 rows: the last step has 29 + 1 of them, not 29 + 29 + 29.
    """
    edits, layers, fetch, y, loss_fn = DATA[data]
    edits = edits + recipe(*recipes)
    script = edited(train_accum, *edits)
    flags = f"--epochs=3 --lr=0.1 --batch-size=29 --accumulation-steps=3 {flags}"

    torch.manual_seed(0)
    training = ITEMS
    if VALIDATION in recipes:
        validation, training = torch.randperm(1000).split([100, 900])
    model = eval(layers)
    _, saved = train_plainly(
        model,
        lambda saves, rows: fetch(saves, training[rows]),
        y[training],
        sizes_in(flags),
        dice if WHOLE in recipes else loss_fn,
        recipes,
    )
    last = len(saved) - 1
    if VALIDATION in recipes:
        losses = []
        for last, one in enumerate(saved):
            loss = loss_fn(one(fetch(last, validation)), y[validation])
            losses.append(loss.item())
            best = np.argmin(losses)
            if last == best + 5:  # five without a better one
                break

    def judge_file(tolerance):
        state = torch.load("run.pt")
        assert state["epoch"] == last + 1
        assert_close(weights_in(state), weights_of(saved[last]), tolerance)
        assert ("rows between saves: 870" in state["settings"]) == (SAVES in recipes)
        assert ("photos, version 3" in state["settings"]) == (data == DATASET)
        if VALIDATION in recipes:
            assert "validation: torch.int64 (100,), crc32" in state["settings"]
            assert_close(state["best"]["loss"], losses[best], tolerance)
            [code] = re.findall(r"`(model\.load_state_dict\([^`]*\))`", README)
            exec(code)
            assert_close(weights_of(model), weights_of(saved[best]), tolerance)
        os.remove("run.pt")

    run(script, f"{flags} --batch-size=87 --accumulation-steps=1")
    judge_file(1e-5)
    tolerance = 1e-3 if "bf16" in recipes else 1e-5
    torch.save(resume(script, flags), "run.pt")
    judge_file(tolerance)
    if os.name == "posix":
        run_processes(flags, flags, edits=edits)
        judge_file(tolerance)
    if "bf16" not in recipes:
        run_on_a_device(script, flags)


def test_masks_are_new_after_each_save_and_the_same_in_both_passes():
    seeds = set()
    with register_module_forward_pre_hook(lambda *_: seeds.add(torch.initial_seed())):
        run(edited(train_accum, *recipe(SAVES)), "--epochs=1")
    assert len(seeds) == 4
    os.remove("run.pt")
    torch.manual_seed(0)
    model = eval(DROPOUT[1])
    train_plainly(model, lambda _, i: X[i], Y, sizes_in(""), dice, [WHOLE])
    script = edited(train_accum, *recipe(WHOLE), DROPOUT)
    run(script, "--batch-size=32 --accumulation-steps=1")
    assert_close(weights_in(torch.load("run.pt")), weights_of(model))


@posix
def test_the_command_for_out_of_memory_ends_with_what_fits():
    script = "import sys; print(*sys.argv[2:5:2]); exit(int(sys.argv[2]) > 4)"
    pathlib.Path("train_accum.py").write_text(script)
    command = ["bash", "-c", SHELL.replace("python", sys.executable)]
    assert subprocess.check_output(command, text=True) == "32 1\n16 2\n8 4\n4 8\n"


def test_the_flags_of_each_command_are_right():
    commands = re.findall(r"(train_\w+)\.py (--[^$]*?)$", README, re.MULTILINE)
    assert len(commands) >= 6
    for script, flags in commands:
        assert script in sys.modules
        common.parse_args(shlex.split(flags), "", batch_size=8, accumulation_steps=4)


@posix
@parametrize("title", ["Proof", TENSORS])
@on_a_gpu
def test_the_commands_and_blocks_of_a_section_run(title):
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
                text = start("-m", "torch.distributed.run", "--log-dir=.", *words)
                assert "processes: 2" in text
