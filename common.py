"""Model, data, device, processes, checkpoint and command line of the three scripts.

How a batch becomes an optimizer step is not in here: it is in main() of each script.
"""

import argparse
import atexit
import datetime
import difflib
import json
import math
import os
import pickle
import pprint
import random
import re
import signal
import sys
import time
import warnings
import zlib

import numpy as np
import torch
import torch.distributed as dist

# If the optimizer imported this module after the process group was opened, the group's
# threads would outlive it, and some processes would abort when they end.
import torch.distributed.nn.functional
from torch import nn


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
    table = np.random.default_rng(0).normal(size=(rows, 11))
    table[:, -1] = table[:, :-1].sum(axis=1) + 0.1 * table[:, -1]
    return table


def get_data(args):
    """Return inputs X (rows, n) and targets y (rows, 1), float32, and their scaling.

    They are the columns of --data or of make_table(), standardised: (x - mean) / std.
    The scaling is a dict of "mean" and "std", float64 (n + 1,), the target's come last.
    """
    table = make_table(args.rows) if args.data is None else read_table(args.data)
    table = torch.from_numpy(table)
    std, mean = torch.std_mean(table, dim=0, correction=0)
    std[std == 0] = 1  # a constant column becomes zeros
    table = table.sub_(mean).div_(std).float()
    return table[:, :-1], table[:, -1:], {"mean": mean, "std": std}


def read_table(path):
    """Return the numbers in a .csv or .npy file, float64 (rows, columns).

    Ends the program if they are no table, or if its last column is no target to learn.
    """
    try:
        table = np.load(path) if path.lower().endswith(".npy") else read_csv(path)
        # Complex numbers, dates and texts are of another kind.
        table = table.astype(float, casting="same_kind", copy=False)
        if table.ndim != 2 or len(table) == 0 or table.shape[1] < 2:
            raise ValueError(f"rows of 2 or more numbers are needed, not {table.shape}")
        std = torch.from_numpy(table).std(dim=0, correction=0)
        finite = std.isfinite()
        if not finite.all():
            column = finite.int().argmin() + 1
            raise ValueError(f"column {column}: a number is nan, infinite or too large")
        if std[-1] == 0:
            raise ValueError("the last column, the target, is the same in all rows")
    except Exception as error:  # a foreign file: numpy raises a dozen kinds
        sys.exit(f"error: --data {path}: {error}")
    return table


def read_csv(path):
    """Return the numbers in a .csv file; a first line without a number is a header."""
    style = {"delimiter": ",", "quotechar": '"', "comments": None, "ndmin": 2}
    style["encoding"] = "utf-8-sig"
    with warnings.catch_warnings(action="ignore"):  # of a file without numbers
        first = np.loadtxt(path, dtype=str, max_rows=1, **style).ravel()
        header = not any(map(is_number, first))
        table = np.loadtxt(path, skiprows=int(header), **style)
    if len(table) > 0 and (first[0] == "" or len(first) != table.shape[1]):
        raise ValueError("a column has no name; leave out the names of the rows")
    print(f"{path}: line 1 is {'a header' if header else 'a row of numbers'}")
    return table


def is_number(text):
    """Say whether `text` is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


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
        seen = ", ".join(present)
        raise argparse.ArgumentTypeError(f"{name} is not here, only {seen}")
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
def get_settings(args, parts, *data):
    """Return what decides the training, as a text. Call it before the first step.

    `parts` is a dict of "model", "optimizer" and whatever else has a state_dict().
    `data` are the tensors that are trained on.
    """
    settings = {
        "seed": args.seed,
        "rows per step": args.batch_size * args.accumulation_steps,
        "model": str(parts["model"]).splitlines(),
        "data": [describe(tensor) for tensor in data],
    }
    for name, part in parts.items():
        if name != "model":
            # Tensors are left out: as texts, they are cut short and name their device.
            state = json.dumps(part.state_dict(), default=lambda tensor: None)
            settings[name] = {"class": type(part).__name__, **json.loads(state)}
    return pprint.pformat(settings)


def describe(tensor):
    """Return a text that tells a tensor from others."""
    checksum = zlib.crc32(tensor.cpu().numpy().tobytes())
    return f"{tensor.dtype} {tuple(tensor.shape)}, crc32 {checksum:08x}"


def check_processes(args, settings):
    """End all processes if one was started with other flags, data or settings.

    Ends a script for one process, too, if torchrun started several.
    """
    if dist.is_initialized():
        may_differ = {"device": None, "data": None, "checkpoint": None}
        text = pprint.pformat(vars(args) | may_differ) + "\n" + settings
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
        for rank, text in enumerate(texts):
            refuse_changes(f"process 0 (-) and process {rank} (+)", texts[0], text)
    elif dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        sys.exit("error: this script is for one process; train_accum.py for several")


def load_checkpoint(args, settings, parts):
    """Load `parts` from the file --checkpoint, if there is one; return the epochs done.

    With several processes, all get what the first one reads. Ends the program, before
    anything is loaded, if the settings of the file or of a process are not the same.
    """
    check_processes(args, settings)
    states = [read_checkpoint(args)]
    if dist.is_initialized():
        dist.broadcast_object_list(states)
    state = states[0]
    if "fault" in state:
        sys.exit(f"error: --checkpoint {state['fault']}")
    if state["epoch"] == 0:
        return 0
    refuse_changes("--checkpoint (-) and this run (+)", state["settings"], settings)
    if state["epoch"] > args.epochs:
        sys.exit(f"error: {state['epoch']} epochs are done, more than --epochs")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["epoch"]


def refuse_changes(whose, old, new):
    """End the program with the lines in which two texts differ, if they do."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    changes = [
        line[0] + line[1:].strip() for line in list(lines)[2:] if line[0] in "-+"
    ]
    if changes:
        sys.exit("\n".join([f"error: settings of {whose} differ:", *changes]))


def read_checkpoint(args):
    """Return the dict in the file --checkpoint, or {"fault": why it cannot be used}."""
    path = args.checkpoint
    if path is None:
        return {"epoch": 0}
    if not os.path.isdir(os.path.dirname(path)):
        return {"fault": f"{path}: there is no such folder"}
    if not os.path.exists(path):
        return {"epoch": 0}
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        if not isinstance(state["settings"], str):
            raise TypeError
    except Exception as error:  # a foreign file: torch raises a dozen kinds
        # torch's text advises to load it unsafely
        return {"fault": f"{path}: damaged, or not from here ({type(error).__name__})"}
    return state


def save_checkpoint(args, settings, parts, epochs, **more):
    """Replace the file --checkpoint, whole or not at all, after so many epochs.

    `more` goes into the file beside the parts. Ends the program if a weight of
    parts["model"] is not finite, or if the file cannot be written, or be loaded again.
    Without --checkpoint, writes nothing.
    """
    for weight in parts["model"].parameters():
        if not weight.isfinite().all():
            sys.exit(f"error: epoch {epochs}: a weight is not finite; try a lower --lr")
    if args.checkpoint is None:
        return
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= more | {"epoch": epochs, "settings": settings}
    temporary = f"{args.checkpoint}.tmp"
    fault = f"error: --checkpoint {args.checkpoint}: epoch {epochs} is not saved"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        torch.load(temporary, map_location="meta", weights_only=True)  # reads no weight
        os.replace(temporary, args.checkpoint)
    except (pickle.PickleError, AttributeError, TypeError):
        sys.exit(
            f"{fault}: a state_dict() may hold tensors, texts, lists, dicts "
            "and Python's numbers (float(), not NumPy's)"
        )
    except (OSError, RuntimeError) as error:
        sys.exit(f"{fault}; is the disk full? {error}")


# ---- command line
def init_program():
    """Print lines at once. Let Ctrl-C and `| head` end a single process in silence."""
    if not hasattr(sys.stdout, "reconfigure"):
        return  # a notebook has its own output and signals
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.name == "posix":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def at_least(lowest):
    """Return a function that reads a flag's text as a whole number from `lowest`."""

    def integer(text):
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is below {lowest}")
        return int(text)

    return integer


def number(text):
    """Read a flag's text as a number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


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
    text = "rows computed at once, by all processes together; lower it to save memory"
    add("--batch-size", at_least(1), batch_size, text)
    if accumulation_steps is not None:
        text = "micro-batches in a step"
        add("--accumulation-steps", at_least(1), accumulation_steps, text)
    add("--epochs", at_least(1), 10, "passes over the rows, finished ones included")
    add("--lr", number, 0.01, "learning rate; lower it if the loss grows")
    text = "decides first weights, order of the rows, dropout and loader's workers"
    add("--seed", at_least(0), 0, text)
    add("--log-every", at_least(0), 10, "print one of so many steps; 0: none")
    add("--device", pick_device, "auto", "cpu, cuda, cuda:1, mps, ...; auto: a GPU")
    parser.add_argument(
        "--checkpoint",
        type=os.path.realpath,  # replaces the file, not a link to it
        help="file written after each epoch; if it exists, training goes on from it",
    )
    return parser.parse_args(argv)


def print_start(args, rows, first_epoch):
    """Print a run's first line: rows, sizes, epochs, device, torch and seed."""
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
    seconds, of time.perf_counter(). Leaves parts["model"] in eval().
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
