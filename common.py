"""Model, data, device, processes, checkpoint and command line of the three scripts.

How a batch becomes an optimizer step is not in here: it is in train_epoch() of each.
"""

import argparse
import atexit
import csv
import datetime
import fileinput
import itertools
import math
import os
import re
import signal
import sys
import time
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist

# If the optimizer imported this module after the process group was opened, the group's
# threads would outlive it, and some processes would abort when they end.
import torch.distributed.nn.functional
from torch import nn


# ---- model and data
def make_model(n_inputs, n_targets, hidden=0):
    """Return a linear model, or one with a hidden layer of `hidden` ReLU units."""
    if hidden == 0:
        return nn.Linear(n_inputs, n_targets)
    return nn.Sequential(
        nn.Linear(n_inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, n_targets),
    )


def make_data(rows):
    """Return float32 inputs (rows, 10) and targets (rows, 1), the same in every run.

    A target is the sum of its row's inputs, plus noise of variance 0.01.
    """
    rng = np.random.default_rng(0)
    # ten inputs of standard deviation 1, and the noise
    table = torch.from_numpy(rng.normal(0, [1] * 10 + [0.1], (rows, 11))).float()
    return table[:, :10], table.sum(dim=1, keepdim=True)


def get_data(args):
    """Return inputs (rows, n), targets (rows, t), what they are called, their scaling.

    The columns of a file are standardised: (x - mean) / std, in float32. The scaling is
    a dict of "mean" and "std", float64 (n + t,), or None for synthetic data. Ends the
    program if the file cannot be used.
    """
    if not args.data:
        return *make_data(args.rows), f"{args.rows} rows", {"mean": None, "std": None}
    try:
        table, n_targets, remarks = read_table(args.data)
    except Exception as error:  # a foreign file: numpy raises a dozen kinds
        sys.exit(f"error: --data {args.data}: {error}")
    name = f"{len(table)} rows{remarks}, checksum {zlib.crc32(table):08x}"
    # Large and almost equal numbers (time stamps) differ in their last digits only,
    # which a sum over them would lose.
    table = torch.from_numpy(table)
    first = table[0].clone()
    table -= first
    std, mean = torch.std_mean(table, dim=0, correction=0)
    if not std[-n_targets:].all():
        sys.exit(f"error: --data {args.data}: a target is the same in all rows")
    std[std == 0] = 1  # a constant input becomes zeros
    table.sub_(mean).div_(std)
    X, y = table.float().tensor_split([-n_targets], dim=1)
    return X, y, name, {"mean": mean + first, "std": std}


def read_table(path):
    """Return a file's table, float64, its number of targets, and remarks on it, a text.

    The last column of a .csv or .npy is the target; an .npz has arrays X (rows, n) and
    y, (rows,) or (rows, t). Raises ValueError, and what numpy raises.
    """
    name = path.lower()
    n_targets = 1
    remarks = ""
    if name.endswith(".npz"):
        with np.load(path) as archive:
            X, y = archive["X"], archive["y"]
        n_targets = math.prod(y.shape[1:])
        table = np.column_stack([X, y])
    elif name.endswith(".npy"):
        table = np.load(path)
    else:
        table, remarks = read_csv(path)

    if table.ndim != 2 or not len(table) or not 0 < n_targets < table.shape[1]:
        raise ValueError(f"an array of shape {table.shape} has no inputs and targets")
    # Complex numbers, dates and texts are of another kind.
    table = table.astype(float, order="C", casting="same_kind", copy=False)
    size = np.abs(table)
    for row, column in np.argwhere(~(size < 1e150)):  # sums of squares would overflow
        raise ValueError(
            f"row {row + 1}, column {column + 1}: "
            f"{table[row, column]} is not a number below 1e150"
        )
    if size.max() >= 2**53:
        remarks += " with numbers beyond 2**53 (16 digits of them are used)"
    return table, n_targets, remarks


def read_csv(path):
    """Return the table in a .csv file, and " under a header" or "".

    A header is a first line without any number. Raises OSError and ValueError.
    """
    with fileinput.input(path, encoding="utf-8-sig") as file:
        cells = next(csv.reader(file), [])
        if not any(cells[:1]) or cells == [str(i) for i in range(max(3, len(cells)))]:
            raise ValueError(
                "line 1 has no name for a column; "
                "leave out what pandas adds (index=False, header=False)"
            )
        header = "" if any(map(is_number, cells)) else " under a header"
        if header:
            cells = ["0"] * len(cells)  # numpy compares the lines' numbers of columns
        try:
            table = np.loadtxt(
                itertools.chain([",".join(cells)], file),
                delimiter=",",
                quotechar='"',
                comments=None,
                ndmin=2,
            )
        except ValueError as error:
            # numpy's number of the row leaves out blank lines
            fault = re.sub(r" at row \d+(;.*)?", "", str(error))
            raise ValueError(f"line {file.lineno()}: {fault}") from None
    return table[1:] if header else table, header


def is_number(text):
    """Say whether numpy reads `text` as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # 1_000 is a number in Python only


def shuffled_indices(rows, seed, epoch):
    """Return the row numbers 0 to rows - 1, int64 (rows,), in the order of an epoch.

    It depends on nothing else, and neighbouring seeds share nothing: numpy mixes both.
    """
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(rows))


# ---- device and processes
def pick_device(name):
    """Return the torch.device `name`, for this process of those on this machine.

    "auto" is the accelerator if there is one for each process, else the CPU. Raises
    argparse.ArgumentTypeError if there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    local_rank, local_world_size = 0, 1
    if dist.is_torchelastic_launched():  # else these may be left over
        local_rank = int(os.environ["LOCAL_RANK"])
        local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "auto" and count < local_world_size:
        name = "cpu"
    if name in ("auto", str(accelerator)):
        name = f"{accelerator}:{local_rank}"
    present = ["cpu", *(f"{accelerator}:{index}" for index in range(count))]
    if name not in present:
        raise argparse.ArgumentTypeError(f"{name} is not one of {present}")
    return torch.device(name)


def init_process_group(args):
    """Return this process's rank and the number of processes.

    Joins the others if torchrun started it. From then on, the first one prints and
    writes for all.
    """
    if not dist.is_torchelastic_launched():
        return 0, 1
    device = args.device
    backend = "gloo"
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        backend = (
            f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        )
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # several machines count on their own
        # torchrun keeps one store. Without a prefix of its own, a restarted process
        # reads addresses from before the restart (pytorch/pytorch#135712).
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
        backend,
        timeout=datetime.timedelta(minutes=5),
        store=store,
        rank=rank,
        world_size=world_size,
    )
    atexit.register(dist.destroy_process_group)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        args.checkpoint = None
    return rank, world_size


def all_reduce_mean(value):
    """Return the mean of a number over the processes, all of which must call this."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def peak_memory(device):
    """Return the most memory used so far, and whose it is, in words."""
    if device.type not in ("cpu", "mps"):  # mps shares the memory of the process
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        return f"{peak:.0f} MiB of the device"
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            if peak := re.search(r"VmHWM:\s*(\d+) kB", file.read()):
                return f"{int(peak[1]) / 1024:.0f} MiB of the process"
    return "unknown"


# ---- checkpoint
def get_settings(args, model, optimizer, data):
    """Return what a checkpoint belongs to, {name: value}.

    With several processes, ends each of them if one has other settings, or other flags
    than --device, --data and --checkpoint.
    """
    groups = optimizer.state_dict()["param_groups"]
    settings = {
        "model": " ".join(str(model).split()),
        "optimizer": type(optimizer).__name__,
        **groups[0],
        "other groups": groups[1:],
        "rows per step": args.batch_size * args.accumulation_steps,
        "seed": args.seed,
        "data": data,
    }
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        paths = {"device": "", "checkpoint": ""}
        dist.all_gather_object(everyone, vars(args) | settings | paths)
        for rank, found in enumerate(everyone):
            if differences := compare(found, everyone[0], "in process 0"):
                sys.exit(f"error: in process {rank}, {differences}")
    return settings


def compare(settings, others, place):
    """Return in words what differs in two dicts of settings, "" if nothing does."""
    return "; ".join(
        f"{name} is {value}, {place} {others.get(name)}"
        for name, value in settings.items()
        if value != others.get(name)
    )


def load_checkpoint(path, settings, parts):
    """Load `parts` from the file `path`, if there is one; return the epochs done.

    `parts` are a dict of model, optimizer and whatever else has a state_dict. With
    several processes, all get the first one's. Ends the program if the file does not
    belong to the run.
    """
    states = [read_checkpoint(path, settings)]
    if dist.is_initialized():
        dist.broadcast_object_list(states)
    state = states[0]
    if "fault" in state:
        sys.exit(f"error: --checkpoint {state['fault']}")
    if state["epoch"]:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    return state["epoch"]


def read_checkpoint(path, settings):
    """Return the dict in the file `path`; or {"fault": why it cannot be used}."""
    if not path:
        return {"epoch": 0}
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        return {"fault": f"{path}: a folder that can be written to is needed"}
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()  # torch.load takes altered bytes for weights
        state = {} if altered else dict(torch.load(path, map_location="cpu"))
        found = dict(state["settings"])
    except FileNotFoundError:
        return {"epoch": 0}
    except Exception as error:  # a foreign file: zipfile and torch raise a dozen kinds
        return {
            "fault": f"{path}: not a whole checkpoint of these scripts ({error!r:.60})"
        }
    if changed := compare(settings, found, "was"):
        return {"fault": f"{path}: {changed}; take the old values, or another file"}
    return state


def save_checkpoint(path, parts, epoch, settings, scaling):
    """Replace the file `path`, whole or not at all; with None as path, do nothing.

    Ends the program if the file cannot be written, or if a
    weight of parts["model"] is not finite.
    """
    for weight in parts["model"].parameters():
        if not weight.isfinite().all():
            sys.exit(f"error: epoch {epoch}: a weight is not finite; try a lower --lr")
    if not path:
        return
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"epoch": epoch, "settings": settings} | scaling
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:  # torch's, on a full disk
        sys.exit(f"error: --checkpoint {path}: {error}; what it held before is safe")


# ---- command line
def parse_args(description, *, batch_size, accumulation_steps=None):
    """Return a script's arguments; wrong ones end the program.

    Only a script with a default for it has the flag --accumulation-steps.
    """
    # Ctrl-C and `| head` end the program at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.name == "posix":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(accumulation_steps=1)
    source = parser.add_mutually_exclusive_group()

    def add(flag, default, text, lowest=1, to=parser):
        def number(text):
            value = type(default)(text)
            if not lowest <= value < 2**31:
                raise argparse.ArgumentTypeError(f"{text} is not in {lowest} to 2**31")
            return value

        text += f" (default: {default})"
        to.add_argument(flag, type=number, default=default, help=text)

    source.add_argument(
        "--data",
        help=".csv or .npy with the target in its last column, or .npz with X and y",
    )
    add("--rows", 1000, "rows of synthetic data", to=source)
    add("--hidden", 0, "ReLU units in a hidden layer; 0: linear model", lowest=0)
    add("--batch-size", batch_size, "rows computed at once; lower it to save memory")
    if accumulation_steps:
        add("--accumulation-steps", accumulation_steps, "micro-batches in a step")
    add("--epochs", 10, "passes over the rows, finished ones included")
    add("--lr", 0.01, "learning rate; lower it if the loss grows", lowest=1e-30)
    add("--seed", 0, "decides the first weights and the order of the rows", lowest=0)
    add("--log-every", 1, "print one of every X steps; 0: none, the fastest", lowest=0)
    parser.add_argument(
        "--device",
        type=pick_device,
        default="auto",
        help="cpu, cuda, cuda:1, mps, ... (default: the accelerator, if there is one)",
    )
    parser.add_argument(
        "--checkpoint",
        type=os.path.realpath,
        help="file written after each epoch; if it exists, training goes on from it",
    )
    args = parser.parse_args()
    if (
        not accumulation_steps
        and dist.is_torchelastic_launched()
        and os.environ["WORLD_SIZE"] != "1"
    ):
        parser.error(
            "one process only; several: train_accum.py "
            f"--batch-size {args.batch_size} --accumulation-steps 1"
        )
    return args


def print_start(args, data, n_rows, first_epoch, world_size=1):
    """Print a run's first line, and return the time, of time.perf_counter().

    The line tells data, sizes, device, and what decides the result.
    """
    steps = math.ceil(n_rows / (args.batch_size * args.accumulation_steps))
    print(
        f"{data}, {args.batch_size} x {args.accumulation_steps} per step, "
        f"{steps} steps per epoch, {first_epoch} of {args.epochs} epochs done; "
        f"{args.device}, processes: {world_size}, "
        f"torch {torch.__version__}, seed {args.seed}"
    )
    return time.perf_counter()


@torch.no_grad()
def print_end(args, model, X, y, first_epoch, steps, started):
    """Print a run's last line: loss over all rows, time since `started`, memory."""
    seconds = time.perf_counter() - started
    model.eval()
    loss = 0.0
    for inputs, targets in zip(X.split(args.batch_size), y.split(args.batch_size)):
        outputs = model(inputs.to(args.device)).cpu()
        loss += nn.functional.mse_loss(outputs, targets, reduction="sum").item()
    meaning = "share of the targets' variance left unexplained"
    if not args.data:
        meaning = "mean squared error"
    print(
        f"{steps} optimizer steps, {meaning} {loss / y.numel():.6f}, {seconds:.3f} s, "
        f"{len(X) * (args.epochs - first_epoch) / seconds:,.0f} rows/s, "
        f"peak memory {peak_memory(args.device)}"
    )
