"""Model, data, device, processes, checkpoint and command line of the three scripts.

How a batch becomes an optimizer step is not in here: it is in main() of each script.
"""

import argparse
import array
import atexit
import bz2
import csv
import datetime
import difflib
import gzip
import itertools
import lzma
import math
import os
import pathlib
import pickle
import pprint
import random
import re
import secrets
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
from torch.utils._pytree import tree_map_only


# ---- model and data
def make_model(n_inputs, hidden=0):
    """Return a linear model, or one with a hidden layer of `hidden` ReLU units.

    It maps inputs (rows, n_inputs) to outputs (rows, 1).
    """
    if hidden == 0:
        return nn.Linear(n_inputs, 1)
    return nn.Sequential(nn.Linear(n_inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def make_table(rows):
    """Return a table (rows, 11), float64, the same in every run: the target comes last.

    The target is the sum of its row's ten inputs, plus noise of variance 0.01.
    """
    noise = [0.1]
    table = np.random.default_rng(0).normal(0, [1] * 10 + noise, (rows, 11))
    table[:, -1] = table.sum(axis=1)
    return table


def get_data(args):
    """Return inputs X (rows, n) and targets y (rows, 1), float32, and their source.

    They are the columns of --data or of make_table(), standardised: (x - mean) / std.
    The source is a dict with "mean" and "std", float64 (n + 1,), and "checksum": what
    tells these data from others. Ends the program if the file cannot be used.
    """
    table = make_table(args.rows) if args.data is None else read_table(args.data)
    checksum = f"{len(table)} rows, crc32 {zlib.crc32(table):08x}"
    # Large and almost equal numbers (time stamps) differ in their last digits only,
    # which a sum over them would lose.
    table = torch.from_numpy(table)
    first = table[0].clone()
    table -= first
    std, mean = torch.std_mean(table, dim=0, correction=0)
    if args.data is not None and std[-1] == 0:
        sys.exit(f"error: --data {args.data}: the target is the same in all rows")
    std[std == 0] = 1  # a constant column becomes zeros
    table = table.sub_(mean).div_(std).float()
    X, y = table[:, :-1], table[:, -1:]
    return X, y, {"mean": mean + first, "std": std, "checksum": checksum}


def read_table(path):
    """Return the table in a .npy or .csv file, float64 (rows, columns).

    Ends the program if there is none.
    """
    try:
        if path.lower().endswith(".npy"):
            with open(path, "rb") as file:
                table = np.lib.format.read_array(file)
        else:
            table = read_csv(path)
        # Complex numbers, dates and texts are of another kind.
        table = table.astype(float, order="C", casting="same_kind", copy=False)
        if table.ndim != 2 or len(table) == 0 or table.shape[1] < 2:
            raise ValueError(f"an array of shape {table.shape} is no table")
        # The sums of the squares of larger numbers could overflow.
        faults = np.argwhere(~(np.abs(table) < 1e150))
        if len(faults) > 0:
            row, column = faults[0]
            place = f"row {row + 1}, column {column + 1}"
            raise ValueError(f"{place}: {table[row, column]} is not below 1e150")
    except OSError as error:
        sys.exit(f"error: --data {path}: {error}")
    except Exception as error:  # a foreign file: numpy raises a dozen kinds
        sys.exit(
            f"error: --data {path}: {error}; needed: a .npy of numbers, or a .csv "
            "in UTF-8, with commas between its columns and points in its numbers; "
            "the target in the last column"
        )
    return table


def read_csv(path):
    """Return the numbers in a .csv file, float64 (rows, columns).

    A first line without any number is a header. Raises ValueError and OSError.
    """
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = openers.get(pathlib.Path(path).suffix.lower(), open)
    numbers = array.array("d")
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        first = next(reader, [])
        if not any(first):
            raise ValueError("line 1 is empty")
        header = not any(map(is_number, first))
        if header and not first[0]:
            raise ValueError(
                "line 1: column 1 has no name; leave out the names of the rows "
                "(index=False in pandas, row.names=FALSE in R)"
            )
        try:
            for cells in reader if header else itertools.chain([first], reader):
                if len(cells) not in (0, len(first)):  # 0: a blank line
                    raise ValueError(f"{len(cells)} columns, not {len(first)}")
                if "_" in "".join(cells):  # 1_000 is a number in Python only
                    raise ValueError(f"could not convert to numbers: {cells}")
                numbers.extend(map(float, cells))
        except UnicodeDecodeError:
            raise  # in a block of lines, not in this one
        except ValueError as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
    print(f"{path}: line 1 is {'a header' if header else 'a row of numbers'}")
    return np.array(numbers).reshape(-1, len(first))


def is_number(text):
    """Say whether `text` is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def seed_epoch(seed, epoch):
    """Seed all random numbers of an epoch: order of rows, dropout, loader's workers.

    SeedSequence mixes the pair, so (0, 1) and (1, 0) share nothing.
    """
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)  # these two for transforms of one's own
    random.seed(mixed)


# ---- device and processes
def pick_device(name):
    """Return the torch.device `name`, for this process.

    "auto" is the accelerator if there is one for each process, else the CPU. Raises
    argparse.ArgumentTypeError if there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    local_rank, local_world_size = 0, 1
    if dist.is_torchelastic_launched():  # else old variables may still be set
        local_rank = int(os.environ["LOCAL_RANK"])
        local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "auto" and count < local_world_size:
        name = "cpu"
    if name in ("auto", str(accelerator)):
        name = f"{accelerator}:{local_rank}"
    present = ["cpu", *(f"{accelerator}:{index}" for index in range(count))]
    if name not in present:
        seen = ", ".join(present) if count > 0 else "no GPU, only cpu"
        raise argparse.ArgumentTypeError(
            f"{name} is not here; torch {torch.__version__} sees {seen}"
        )
    return torch.device(name)


def init_process_group(args):
    """Return this process's rank and the number of processes.

    Joins the others if torchrun started it. From then on, the first one prints and
    writes for all.
    """
    if not dist.is_torchelastic_launched():
        return 0, 1
    if args.device.type != "cpu":
        torch.accelerator.set_device_index(args.device.index)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # each machine counts its restarts
        # torchrun keeps one store. Without a prefix of its own, a restarted process
        # reads addresses from before the restart (pytorch/pytorch#135712).
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
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
def get_settings(args, source, parts):
    """Return what decides the training, as a text.

    Call it before the first step, while the optimizer's state is still the initial one.
    `parts` is a dict of "model", "optimizer" and whatever else has a state_dict().
    """
    model = parts["model"]
    names = {weight: name for name, weight in model.named_parameters()}
    modules = model.named_modules()
    settings = {
        "data": source["checksum"],
        "seed": args.seed,
        "rows per step": args.batch_size * args.accumulation_steps,
        "model": str(model).splitlines(),
        "trained": [
            f"{name} {weight.dtype} {tuple(weight.shape)}"
            for weight, name in names.items()
            if weight.requires_grad
        ],
        "in eval()": [name for name, module in modules if not module.training],
    }
    for name, part in parts.items():
        if name != "model":
            state = tree_map_only(torch.Tensor, describe, part.state_dict())
            settings[name] = {"class": type(part).__name__, **state}
        if isinstance(part, torch.optim.Optimizer):
            settings[name]["weights"] = [
                [names.get(weight) for weight in group["params"]]
                for group in part.param_groups
            ]
    return pprint.pformat(settings)


def describe(tensor):
    """Return the number in a tensor, or in words what tells several from others."""
    if tensor.numel() == 1:
        return tensor.item()
    checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return f"{tensor.dtype} {tuple(tensor.shape)} crc32 {checksum:08x}"


def compare(old, new):
    """Return the lines that differ in two texts, "-" old and "+" new; "" if none do."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    lines = list(lines)[2:]  # the first two name the files; "@@" lines have numbers
    return "\n".join(line for line in lines if line[0] in "-+")


def check_processes(args, settings):
    """End each process if their flags or settings differ, or if they are not joined."""
    if dist.is_initialized():
        flags = vars(args) | {"device": None, "data": None, "checkpoint": None}
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, f"{pprint.pformat(flags)}\n{settings}")
        for rank, text in enumerate(texts):
            if changes := compare(texts[0], text):
                sys.exit(
                    f"error: process 0 (-) and process {rank} (+) differ:\n{changes}"
                )
    elif dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        sys.exit("error: this script is for one process; train_accum.py for several")


def load_checkpoint(args, settings, parts):
    """Load `parts` from the file --checkpoint, if there is one; return the epochs done.

    With several processes, all get what the first one reads. Ends the program, before
    anything is loaded, if the file or a process does not belong to the run.
    """
    check_processes(args, settings)
    states = [read_checkpoint(args, settings)]
    if dist.is_initialized():
        dist.broadcast_object_list(states)
    state = states[0]
    if "fault" in state:
        sys.exit(f"error: --checkpoint {state['fault']}")
    if state["epoch"] > 0:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    return state["epoch"]


def read_checkpoint(args, settings):
    """Return the dict in the file --checkpoint, or {"fault": why it cannot be used}."""
    path = args.checkpoint
    if path is None:
        return {"epoch": 0}
    if not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK):
        return {"fault": f"{path}: a folder that can be written to is needed"}
    try:
        with zipfile.ZipFile(path) as archive:
            damage = archive.testzip()  # torch.load takes altered bytes for weights
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        changes = compare(state["settings"], settings)
        too_many = state["epoch"] > args.epochs
    except FileNotFoundError:
        return {"epoch": 0}
    except OSError as error:
        return {"fault": f"{path}: {error.strerror}"}
    except Exception as error:  # a foreign file: zipfile and torch raise a dozen kinds
        damage = type(error).__name__  # torch's text advises to load it unsafely
    if damage:
        return {"fault": f"{path}: damaged, or of another program ({damage})"}
    if changes:
        return {
            "fault": f"{path}: its settings (-) are not those of this run (+); take "
            f"its settings, or another file:\n{changes}"
        }
    if too_many:
        return {"fault": f"{path}: {state['epoch']} epochs are done; raise --epochs"}
    return state


def save_checkpoint(args, settings, source, epochs, parts):
    """Replace the file --checkpoint, whole or not at all, after so many epochs.

    Without --checkpoint, writes nothing. Ends the program if a weight of
    parts["model"] is not finite, or if the file cannot be written or read again.
    """
    for weight in parts["model"].parameters():
        if not weight.isfinite().all():
            sys.exit(f"error: epoch {epochs}: a weight is not finite; try a lower --lr")
    if args.checkpoint is None:
        return
    path = os.path.realpath(args.checkpoint)  # a link stays a link
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= source | {"epoch": epochs, "settings": settings}
    # a name of its own, so that two runs on one checkpoint do not share it
    temporary = pathlib.Path(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)  # and flush
            os.fsync(file.fileno())
        torch.load(temporary, map_location="meta", weights_only=True)  # reads no weight
        temporary.replace(path)
    except (pickle.PickleError, AttributeError, TypeError):
        sys.exit(
            f"error: --checkpoint {path}: epoch {epochs} is not saved: torch.load "
            "would refuse it. A state_dict() needs tensors, texts, lists, dicts and "
            "Python's numbers: put float() around NumPy's in optimizer and schedule"
        )
    except (OSError, RuntimeError) as error:  # torch's stands around the system's
        if isinstance(error.__context__, OSError):
            error = error.__context__
        sys.exit(f"error: --checkpoint {path}: epoch {epochs} is not saved: {error}")
    finally:
        temporary.unlink(missing_ok=True)


# ---- command line
def init_program():
    """Print lines at once, and let Ctrl-C and `| head` end the program in silence."""
    if not hasattr(sys.stdout, "reconfigure"):
        return  # a notebook has its own output and signals
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.name == "posix":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def at_least(lowest):
    """Return a function that reads a flag's text as a whole number from `lowest`."""

    def whole_number(text):
        if lowest <= int(text) < 2**31:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {lowest} to {2**31 - 1}")

    return whole_number


def learning_rate(text):
    """Read a flag's text as a number above 0."""
    if 0 < float(text) < math.inf:
        return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not above 0")


def parse_args(argv, description, *, batch_size, accumulation_steps=None):
    """Return a script's arguments; wrong ones end the program.

    `argv` is a list of flags, or None for those of the command line. Only a script with
    a default for it has the flag --accumulation-steps.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(accumulation_steps=1)
    source = parser.add_mutually_exclusive_group()

    def add(flag, type, default, text, to=parser):
        text += f" (default: {default})"
        to.add_argument(flag, type=type, default=default, help=text)

    source.add_argument(
        "--data",
        help="a .csv or .npy file of numbers, with the target in the last column",
    )
    add("--rows", at_least(1), 1000, "rows of synthetic data", to=source)
    add("--hidden", at_least(0), 0, "ReLU units in a hidden layer; 0: a linear model")
    text = "rows computed at once; lower it to save memory"
    add("--batch-size", at_least(1), batch_size, text)
    if accumulation_steps is not None:
        text = "micro-batches in a step"
        add("--accumulation-steps", at_least(1), accumulation_steps, text)
    add("--epochs", at_least(1), 10, "passes over the rows, finished ones included")
    add("--lr", learning_rate, 0.01, "learning rate; lower it if the loss grows")
    add("--seed", at_least(0), 0, "decides first weights and order of the rows")
    add("--log-every", at_least(0), 1, "print one of so many steps; 0: none")
    add("--device", pick_device, "auto", "cpu, cuda, cuda:1, mps, ...; auto: a GPU")
    parser.add_argument(
        "--checkpoint",
        help="file written after each epoch; if it exists, training goes on from it",
    )
    args = parser.parse_args(argv)
    if "" in (args.data, args.checkpoint):
        parser.error("a file needs a name; is a variable not set?")
    return args


def print_start(args, rows, first_epoch):
    """Print a run's first line: sizes, epochs, device, and what decides the result."""
    rows_per_step = args.batch_size * args.accumulation_steps
    processes = dist.get_world_size() if dist.is_initialized() else 1
    print(
        f"{rows} rows, {args.batch_size} x {args.accumulation_steps} per step, "
        f"{math.ceil(rows / rows_per_step)} steps per epoch, "
        f"{first_epoch} of {args.epochs} epochs done; {args.device}, "
        f"processes: {processes}, torch {torch.__version__}, seed {args.seed}"
    )


@torch.no_grad()
def print_end(args, parts, X, y, loss_fn, start):
    """Print a run's last line: loss of all rows, time since `start`, peak memory.

    `loss_fn(outputs, targets)` is a mean over targets.numel() targets. `start` is in
    seconds, of time.perf_counter().
    """
    seconds = time.perf_counter() - start
    model = parts["model"].eval()
    loss = 0.0
    for inputs, targets in zip(X.split(args.batch_size), y.split(args.batch_size)):
        inputs, targets = inputs.to(args.device), targets.to(args.device)
        loss += loss_fn(model(inputs), targets).item() * targets.numel() / y.numel()
    print(
        f"Loss of all rows: {loss:.6f}, {seconds:.3f} s, "
        f"peak memory {peak_memory(args.device)}"
    )
