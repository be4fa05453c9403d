"""Model, data, device, processes, checkpoint and command line; how a batch becomes a step stands in the scripts."""

import argparse
import atexit
import datetime
import glob
import io
import itertools
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # if first imported with a process group open, some runs abort at their end
from torch import nn


# ---- model and data
def make_model(n_inputs, n_targets, hidden=0, seed=0):
    """Return a linear model, or one with a layer of `hidden` ReLU units; `seed` decides the first weights."""
    torch.manual_seed(seed)
    if hidden == 0:
        return nn.Linear(n_inputs, n_targets)
    return nn.Sequential(nn.Linear(n_inputs, hidden), nn.ReLU(), nn.Linear(hidden, n_targets))


def make_data(rows):
    """Return float32 inputs (rows, 10) and targets (rows, 1): a linear rule plus noise of variance 0.01."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, 10, generator=generator)
    noise, weights = torch.randn(rows, 1, generator=generator), torch.randn(10, generator=generator)
    return X, (X * weights).sum(dim=1, keepdim=True) + 0.1 * noise


def load_data(path):
    """Return float32 inputs (rows, n) and targets (rows, t), the column names, and float64 mean and std (n + t,).

    `path` is a .csv or 2-D .npy table whose last column is the target, or an .npz with arrays X and y. Each column is
    standardised, (x - mean) / std; a constant one becomes zeros. Raises OSError, ValueError, and what np.load raises.
    """
    is_array = path.lower().endswith((".npy", ".npz"))
    names, table = ([], np.load(path, allow_pickle=False)) if is_array else read_csv(path)
    n_targets = 1
    if not isinstance(table, np.ndarray):  # .npz
        X, y = table["X"], table["y"]
        table, n_targets = np.column_stack([X, y]), math.prod(y.shape[1:])
    if table.ndim != 2 or len(table) == 0 or table.shape[1] <= n_targets or table.dtype.kind not in "biuf":
        raise ValueError(f"{table.dtype} of shape {table.shape} is not a table of real inputs and targets")
    table = table.astype(np.float64, order="C", copy=False)
    if not -1e150 < table.min() <= table.max() < 1e150:  # nan, inf, and numbers whose squares overflow
        row, column = np.argwhere(~(np.abs(table) < 1e150))[0]
        name = f" ({names[column]})" if names else ""
        raise ValueError(f"row {row + 1}, column {column + 1}{name}: {table[row, column]} is not a finite number")
    table = torch.from_numpy(table)
    first = table[0].clone()
    table -= first  # or large, almost equal numbers (time stamps) would lose the digits in which they differ
    std, mean = torch.std_mean(table, dim=0, correction=0)
    std[std == 0] = 1
    table.sub_(mean).div_(std)
    return table[:, :-n_targets].float(), table[:, -n_targets:].float(), names, mean + first, std


def read_csv(path):
    """Return a .csv file's column names (none if its first line has a number) and its table; raises ValueError."""
    options = {"delimiter": ",", "quotechar": '"', "comments": None}
    number = re.compile(r"\s*[-+]?(nan|inf|(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)\s*", re.IGNORECASE)
    with open(path, encoding="utf-8-sig") as file, warnings.catch_warnings(action="ignore"):
        count = itertools.count(1)
        lines = itertools.compress(file, count)  # all of them, counted
        first = next(lines, "")
        cells = np.loadtxt([first], dtype=str, ndmin=1, **options).tolist()
        names = [] if any(map(number.fullmatch, cells)) else cells
        if cells and not cells[0]:
            raise ValueError("line 1: the first cell is empty; leave out the index (pandas: index=False)")
        if cells == [str(i) for i in range(max(3, len(cells)))]:
            raise ValueError("line 1 numbers the columns; leave it out (pandas: header=False)")
        try:
            table = np.loadtxt(lines if names else itertools.chain([first], lines), ndmin=2, **options)
        except ValueError as error:
            fault, _, place = str(error).partition(" at row ")  # numpy's row numbers leave out blank lines
            for column in re.findall(r"column (\d+)", place):
                fault += f" in column {column}" + (f" ({names[int(column) - 1]})" if int(column) <= len(names) else "")
            raise ValueError(f"line {next(count) - 1}: {fault} (needed: numbers, commas between them)") from None
    if len(table) and len(cells) != table.shape[1]:
        raise ValueError(f"line 1 has {len(cells)} columns, the others have {table.shape[1]}")
    return names, table


def shuffled_indices(rows, seed, epoch):
    """Return 0 to rows - 1, int64 (rows,), in an order that numpy's SeedSequence draws from seed and epoch together."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(rows))


# ---- device and processes
def pick_device(name):
    """Return the torch.device `name`; "auto" is the accelerator, if each process has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    local_rank, local_world_size = 0, 1
    if dist.is_torchelastic_launched():  # by torchrun; else these may be left over from something else
        local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "auto":
        name = accelerator.type if count >= local_world_size else "cpu"
    if accelerator and name == accelerator.type:
        name = f"{name}:{local_rank}"
    present = ["cpu", *(f"{accelerator}:{index}" for index in range(count))]
    if name not in present:
        raise argparse.ArgumentTypeError(f"{name} is not here; there are: {', '.join(present)}")
    return torch.device(name)


def init_process_group(device):
    """Return this process's rank and the number of processes, after joining them if torchrun started it."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return rank_and_world_size()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # several machines count their restarts apart
        # torchrun keeps one store: without a prefix, addresses from before a restart are read (pytorch/pytorch#135712)
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend, timeout = dist.get_default_backend_for_device(device), datetime.timedelta(minutes=5)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    atexit.register(dist.destroy_process_group)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # the first process prints for all
    return rank, world_size


def rank_and_world_size():
    """Return this process's rank and the number of processes, (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce_mean(value):
    """Return the mean of a tensor over the processes, all of which must call this."""
    if dist.is_initialized():
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


def peak_memory(device):
    """Return the most memory used so far, and whose it is, as text."""
    if device.type not in ("cpu", "mps"):  # mps shares the memory of the process
        return f"{torch.accelerator.max_memory_allocated(device) / 2**20:.0f} MiB of the device"
    peak = re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read()) if sys.platform == "linux" else None
    return f"{int(peak[1]) / 1024:.0f} MiB of the process" if peak else "unknown"


# ---- checkpoint
def save_checkpoint(path, state):
    """Replace the file `path` by the dict `state`, whole or not at all; ends the program if it cannot be written."""
    content = io.BytesIO()
    torch.save(state, content)  # not into the file: there a full disk would be a RuntimeError
    try:
        with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        sys.exit(f"error: --checkpoint {path}: {error.strerror}; what it held before is safe")
    finally:
        for leftover in glob.glob(f"{glob.escape(path)}.*.tmp"):  # killed runs leave some, too
            os.remove(leftover)


def load_checkpoint(path, settings):
    """Return the dict in the file `path`, None if there is no file; ends the program if it cannot be used."""
    if not os.access(os.path.dirname(path), os.W_OK):
        sys.exit(f"error: --checkpoint {path}: a folder that exists and can be written to is needed")
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()  # torch.load would take altered bytes for weights
        state = {} if altered else torch.load(path, map_location="cpu")
        found = state["settings"]
    except FileNotFoundError:
        return None
    except OSError as error:
        sys.exit(f"error: --checkpoint {path}: {error.strerror}")
    except (EOFError, KeyError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        sys.exit(f"error: --checkpoint {path}: is not a whole checkpoint of these scripts; left as it is")
    if changed := [f"{k} is {settings[k]}, was {found.get(k)}" for k in settings if settings[k] != found.get(k)]:
        sys.exit(f"error: --checkpoint {path}: {'; '.join(changed)}; take the old values, or another file")
    return state


# ---- command line
def parse_args(description, *, batch_size, accumulation_steps=None):
    """Return a script's arguments (wrong ones end the program); accumulation_steps is a flag only with a default."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C and `| head` end the program at once, without a traceback
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True)
    sys.excepthook = explain_out_of_memory
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(accumulation_steps=1)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="FILE", help=".csv or .npy, its last column the target, or .npz with X and y")
    source.add_argument("--rows", type=int, default=1000, metavar="X", help="rows of synthetic data (default: 1000)")

    def add(flag, default, text, kind=int):
        parser.add_argument(flag, type=kind, default=default, metavar="X", help=f"{text} (default: {default})")

    add("--hidden", 0, "ReLU units in a hidden layer; 0: linear model")
    add("--batch-size", batch_size, "rows computed at once; lower it if memory runs out")
    if accumulation_steps:
        add("--accumulation-steps", accumulation_steps, "micro-batches in a step")
    add("--epochs", 10, "passes over the rows, those in the checkpoint included")
    add("--lr", 0.01, "learning rate; lower it if the loss grows", float)
    add("--seed", 0, "decides the first weights and the order of the rows")
    add("--log-every", 1, "print the first of every X steps; 0: none, the fastest")
    add("--device", "auto", "cpu, cuda, cuda:1, mps, ...; auto: the accelerator, if there is one", pick_device)
    add("--checkpoint", None, "file written after each epoch; if it exists, training goes on from it", os.path.realpath)
    args = parser.parse_args()
    lowest = {"rows": 1, "batch_size": 1, "accumulation_steps": 1, "epochs": 1, "hidden": 0, "seed": 0, "log_every": 0}
    for name, low in {**lowest, "lr": 1e-30}.items():
        if not low <= vars(args)[name] < 2**31:
            parser.error(f"argument --{name.replace('_', '-')}: a number from {low} to 2**31 is needed")
    if accumulation_steps is None and dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        parser.error(f"one process only; several: train_accum.py --batch-size {args.batch_size} --accumulation-steps 1")
    if args.data is not None:
        try:
            args.data = load_data(args.data)
        except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            parser.error(f"argument --data: {args.data}: {error}")
    return args


def explain_out_of_memory(kind, error, traceback):
    """Say how to go on when memory has run out; show any other error as usual. For sys.excepthook."""
    if not issubclass(kind, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return sys.__excepthook__(kind, error, traceback)
    smaller = "half the --batch-size, twice the --accumulation-steps and the same --checkpoint"
    print(f"error: out of memory; the same steps need less in train_accum.py, with {smaller}", file=sys.stderr)


def epochs_to_train(args, model, optimizer, X, y):
    """Yield the epochs still to train, from 0 on; print a run's opening and closing line.

    Goes on from the checkpoint and writes it after each epoch; runs inside train(), where the processes are joined.
    """
    rank, world_size = rank_and_world_size()
    names, mean, std = args.data[2:] if args.data else ([], torch.zeros(0), torch.zeros(0))
    checksum = 0
    for part in (X, y, mean, std):
        checksum = zlib.crc32(np.ascontiguousarray(part), checksum)
    rows_per_step = args.batch_size * args.accumulation_steps
    settings = {"rows per step": rows_per_step, "--lr": args.lr, "--seed": args.seed, "--hidden": args.hidden}
    settings["data"] = f"{len(X)} rows with checksum {checksum:08x}"
    states = [load_checkpoint(args.checkpoint, settings) if args.checkpoint and rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(states)  # the other processes may not have the file
    first = states[0]["epoch"] if states[0] else 0
    if first:
        model.load_state_dict(states[0]["model"])
        optimizer.load_state_dict(states[0]["optimizer"])
    epochs, steps = range(first, args.epochs), math.ceil(len(X) / rows_per_step)
    print(
        f"{len(X)} rows{' under a header' if names else ''}, {args.batch_size} x {args.accumulation_steps} per step, "
        f"{steps} steps per epoch, {first} of {args.epochs} epochs done; {args.device}, processes: {world_size}, "
        f"torch {torch.__version__}, seed {args.seed}"
    )
    started = time.perf_counter()
    for epoch in epochs:
        yield epoch
        if not nn.utils.get_total_norm(model.parameters()).isfinite():
            sys.exit(f"error: epoch {epoch + 1}: the weights are not finite; try --lr {args.lr / 10:g}")
        if args.checkpoint and rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            state |= {"settings": settings, "mean": mean, "std": std, "torch": str(torch.__version__)}
            save_checkpoint(args.checkpoint, state)
    seconds = time.perf_counter() - started
    meaning = "share of the targets' variance left unexplained" if args.data else "mean squared error"
    print(
        f"{steps * len(epochs)} optimizer steps, {meaning} {mean_loss(model, X, y, args.batch_size, args.device):.6f}, "
        f"{seconds:.3f} s, {len(X) * len(epochs) / seconds:,.0f} rows/s, peak memory {peak_memory(args.device)}"
    )


@torch.no_grad()
def mean_loss(model, X, y, batch_size, device):
    """Return the mean squared error over all rows, a float, computed on `batch_size` rows at a time."""
    rank, world_size = rank_and_world_size()
    model.eval()
    total = 0.0
    for inputs, targets in zip(X.split(batch_size), y.split(batch_size)):
        inputs, targets = inputs[rank::world_size].to(device), targets[rank::world_size].to(device)
        total += nn.functional.mse_loss(model(inputs), targets, reduction="sum").item()
    return all_reduce_mean(torch.tensor(total, device=device)).item() * world_size / y.numel()
