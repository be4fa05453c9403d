"""Model, data, device, processes, checkpoint and command line of the three scripts.

How a batch becomes an optimizer step is not in here: it is in main() of each script.
"""

import argparse
import atexit
import csv
import difflib
import itertools
import json
import math
import os
import pickle
import pprint
import random
import re
import sys
import tempfile
import time
import zipfile
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

# The first optimizer imports this. Imported after the process group is opened, its
# default arguments would keep the group's threads alive, and some processes abort.
import torch.distributed.nn.functional
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, default_collate


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
    The scaling is a dict of "mean" and "std", float64, one entry per column.
    """
    table = make_table(args.rows) if args.data is None else read_table(args.data)
    table = torch.from_numpy(table)
    std, mean = torch.std_mean(table, dim=0, correction=0)
    std[std == 0] = 1  # a constant column becomes zeros
    table = table.sub_(mean).div_(std).float()
    return table[:, :-1], table[:, -1:], {"mean": mean, "std": std}


def read_table(path):
    """Return the numbers in a .csv or .npy file, float64 (rows, columns).

    Ends the program if it is no table, or if the target, its last column, is constant.
    """
    try:
        table = np.load(path) if path.lower().endswith(".npy") else read_csv(path)
        # "same_kind" refuses complex numbers, dates and text
        table = table.astype(float, casting="same_kind", copy=False)
        if table.ndim != 2 or len(table) == 0 or table.shape[1] < 2:
            raise ValueError(f"rows of 2 or more numbers are needed, not {table.shape}")
        std = torch.from_numpy(table).std(dim=0, correction=0)
        if not std.isfinite().all():
            column = std.isfinite().int().argmin() + 1
            raise ValueError(f"column {column}: a number is nan, infinite or too large")
        if std[-1] == 0:
            raise ValueError("the last column, the target, is the same in all rows")
    except Exception as error:  # a foreign file: numpy raises a dozen kinds
        sys.exit(f"error: --data {path}: {error}")
    return table


def read_csv(path):
    """Return the numbers in a .csv file; a first line without a number is a header."""
    # Opened as np.loadtxt does it (.gz, .bz2, .xz), but only once: it may be a pipe.
    os.stat(path)  # else DataSource downloads an address, or adds .gz to the name
    with np.lib.npyio.DataSource().open(path, "rt", encoding="utf-8-sig") as file:
        line = next(filter(str.strip, file), "")
        first = next(csv.reader([line]))
        header = not any(map(is_number, first))
        print(f"{path}: line 1 is {'a header' if header else 'a row of numbers'}")
        lines = file if header else itertools.chain([line], file)
        table = np.loadtxt(lines, delimiter=",", quotechar='"', comments=None, ndmin=2)
    if len(table) > 0 and (first[0] == "" or len(first) != table.shape[1]):
        raise ValueError("a column has no name; leave out the row names")
    return table


def is_number(text):
    """Return whether `text` is a finite number: "inf" and "nan" may name a column."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class Batches(Dataset):
    """Batches of a dataset of single items: batches[rows] of a tensor of row numbers.

    `collate_fn` turns a list of items into a batch, here of inputs and targets.
    """

    def __init__(self, dataset, collate_fn=default_collate):
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, rows):
        items = [self.dataset[row] for row in rows.tolist() or [0]]  # none: cut below
        batch = self.collate_fn(items)
        return batch if len(rows) > 0 else tree_map(lambda part: part[:0], batch)


def seed_epoch(seed, epoch, index=0):
    """Seed all random numbers of an epoch: order of rows, dropout, loader's workers.

    `index` is the rank of a process, or the row of an item with random augmentation.
    SeedSequence mixes the three, so that (0, 1, 0) and (1, 0, 0) share nothing.
    """
    mixed = int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)  # this and the next for your own transforms
    random.seed(mixed)


# ---- device and processes
def pick_device(name):
    """Return the torch.device `name`, for this process.

    "auto" is the accelerator if there is one for each process, else the CPU. Raises
    argparse.ArgumentTypeError if there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator and accelerator.type
    count = torch.accelerator.device_count()
    local_rank, local_world_size = 0, 1
    if dist.is_torchelastic_launched():  # else old variables may still be set
        local_rank = int(os.environ["LOCAL_RANK"])
        local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "auto" and count < local_world_size:
        name = "cpu"
    if name in ("auto", kind):
        name = f"{kind}:{local_rank}"
    present = ["cpu", *(f"{kind}:{index}" for index in range(count))]
    if name not in present:
        seen = ", ".join(present)
        raise argparse.ArgumentTypeError(f"{name} is not here, only {seen}")
    return torch.device(name)


def join_processes(args):
    """Return this process's rank and the number of processes.

    Opens the process group if torchrun started the script. From then on, only rank 0
    prints, reads and writes --checkpoint.
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
    timeout = timedelta(minutes=5)  # raise it if loading the data takes longer
    dist.init_process_group(
        store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    atexit.register(dist.destroy_process_group)
    if rank > 0:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
        args.checkpoint = None
    return rank, world_size


def mean_over_processes(value):
    """Return the mean of a number over the processes, all of which must call this."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@torch.no_grad()
def mean_loss(args, model, dataset, loss_fn, count=torch.numel, num_workers=0):
    """Return the mean loss of a dataset, computed in eval() and shared by processes.

    dataset[rows] are inputs and targets; `loss_fn(outputs, targets)` is a mean, and
    `count(targets)` what it divides by. All processes must call this. Leaves each layer
    in train() or eval(), as it was.
    """
    batches = torch.arange(len(dataset)).split(args.batch_size)
    if dist.is_initialized():  # this process's share
        batches = [rows[dist.get_rank() :: dist.get_world_size()] for rows in batches]
    own = torch.Generator()  # else the loader draws from the training's random numbers
    loader = DataLoader(
        dataset, None, sampler=batches, num_workers=num_workers, generator=own
    )
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    loss = n_targets = 0.0
    for inputs, targets in loader:
        n = float(count(targets))
        if n > 0:  # padding only, or no rows: the mean would be nan
            inputs, targets = inputs.to(args.device), targets.to(args.device)
            loss += loss_fn(model(inputs), targets).item() * n
            n_targets += n
    for layer, training in modes:
        layer.training = training
    return mean_over_processes(loss) / mean_over_processes(n_targets)


def peak_memory(device):
    """Return, as text, the peak memory of the device or of the process."""
    if device.type not in ("cpu", "mps"):  # mps shares the memory of the process
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        return f"{peak:.0f} MiB of the device"
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            if peak := re.search(r"VmHWM:\s*(\d+) kB", file.read()):
                return f"{int(peak[1]) / 1024:.0f} MiB of the process"
    return "unknown"


# ---- checkpoint
class State(dict):
    """A part of a checkpoint: entries of your own, which are saved and resumed."""

    state_dict = dict.copy
    load_state_dict = dict.update


def get_settings(args, parts, dataset, *data):
    """Return, as text, what determines the training. Call it before the first step.

    `parts` is a dict of "model", "optimizer" and whatever else has a state_dict().
    Of the dataset, only the length is compared; `data` are tensors compared in full.
    """
    states = {
        name: {"class": type(part).__name__, **part.state_dict()}
        for name, part in parts.items()
        if name != "model"
    }
    settings = {
        "seed": args.seed,
        "rows": len(dataset),
        "rows per step": args.batch_size * args.accumulation_steps,
        "data": [describe(tensor) for tensor in data],
        "model": str(parts["model"]).splitlines(),
        "parts": json.loads(json.dumps(states, default=to_number)),
    }
    return pprint.pformat(settings)


def describe(tensor):
    """Return a text that identifies a tensor: its type, shape and a checksum."""
    checksum = zlib.crc32(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{tensor.dtype} {tuple(tensor.shape)}, crc32 {checksum:08x}"


def to_number(value):
    """Return the number in a tensor of no dimensions (a learning rate), else None."""
    return value.item() if torch.is_tensor(value) and value.ndim == 0 else None


def check_processes(args, settings):
    """End all processes if one was started with other flags, data or settings.

    Ends a script for one process, too, if torchrun started several.
    """
    if dist.is_initialized():
        may_differ = {"device": args.device.type, "data": None, "checkpoint": None}
        text = pprint.pformat(vars(args) | may_differ) + "\n" + settings
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
        for rank, text in enumerate(texts):
            refuse_changes(f"process 0 (-) and process {rank} (+)", texts[0], text)
    elif dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        sys.exit("error: this script is for one process; train_accum.py for several")


def load_checkpoint(args, settings, parts):
    """Load `parts` from the file --checkpoint, if there is one; return the epochs done.

    With several processes, all get what rank 0 reads. Ends the program, before anything
    is loaded, if the settings of the file or of a process differ.
    """
    check_processes(args, settings)
    states = [read_checkpoint(args.checkpoint)]
    if dist.is_initialized():
        dist.broadcast_object_list(states)
    state = states[0]
    if state is None:
        return 0
    if isinstance(state, str):
        sys.exit(f"error: --checkpoint {state}")
    refuse_changes("--checkpoint (-) and this run (+)", state["settings"], settings)
    if state["epoch"] > args.epochs:
        sys.exit(f"error: {state['epoch']} epochs are done, more than --epochs")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["epoch"]


def refuse_changes(whose, old, new):
    """End the program with the lines in which two texts differ, if they do."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    changes = [line[0] + line[1:].strip() for line in lines if line[0] in "-+"]
    if changes:
        changes[:2] = [f"error: settings of {whose} differ:"]  # replaces a header
        sys.exit("\n".join(changes))


def read_checkpoint(path):
    """Return the dict in a file, None without a file, or a text that says its fault."""
    if path is None:
        return None
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(path)).close()
    except OSError as error:
        return f"{path}: cannot write to its folder: {error.strerror}"
    if not os.path.exists(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # torch compares no checksums, and skips what is marked as a folder
            marks = [entry.external_attr for entry in archive.filelist]
            damaged = archive.testzip() or any(marks)
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        if damaged or (type(state["settings"]), type(state["epoch"])) != (str, int):
            raise ValueError
    except Exception as error:  # a foreign file: torch raises a dozen kinds
        # torch's own message recommends unsafe loading
        return f"{path}: damaged, or not from here ({type(error).__name__})"
    return state


def save_checkpoint(args, settings, parts, epochs, **more):
    """Replace the file --checkpoint, whole or not at all, after a number of epochs.

    `more` is saved beside the parts. Ends the program if a weight of parts["model"] is
    not finite, or if the file cannot be written, or be loaded again. Raises TypeError
    if a name is used twice. Without --checkpoint, writes nothing.
    """
    for weight in parts["model"].parameters():
        if not weight.isfinite().all():
            sys.exit(f"error: epoch {epochs}: a weight is not finite; try a lower --lr")
    if args.checkpoint is None:
        return
    states = {name: part.state_dict() for name, part in parts.items()}
    state = dict(epoch=epochs, settings=settings, **states, **more)
    fault = f"error: --checkpoint {args.checkpoint}: epoch {epochs} is not saved"
    # A name of its own, since two runs may have the same --checkpoint.
    temporary = f"{args.checkpoint}.{os.urandom(4).hex()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        torch.load(temporary, map_location="meta", weights_only=True)  # reads no weight
        os.replace(temporary, args.checkpoint)
    except (pickle.PickleError, AttributeError, TypeError):
        sys.exit(
            f"{fault}: a state_dict() may hold tensors, strings, lists, dicts and "
            "Python's numbers (float(), not NumPy's)"
        )
    except OSError as error:
        sys.exit(f"{fault}: {error}")
    except RuntimeError as error:  # torch's; the system's is its context
        sys.exit(f"{fault}: {error.__context__ or error}")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---- command line
def parse_args(argv, description, *, batch_size, accumulation_steps=None):
    """Return a script's arguments; wrong ones end the program.

    `argv` is a list of flags, or None for those of the command line. Only a script with
    a default for it has the flag --accumulation-steps. From here on, lines are printed
    at once, also into a file or pipe.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(accumulation_steps=1)
    source = parser.add_mutually_exclusive_group()

    def add(flag, default, text, to=parser):
        text += f" (default: {default})"
        to.add_argument(flag, type=type(default), default=default, help=text)

    text = "a .csv or .npy file of numbers, with the target in the last column"
    source.add_argument("--data", help=text)
    add("--rows", 1000, "rows of synthetic data", to=source)
    add("--hidden", 0, "ReLU units in a hidden layer; 0: a linear model")
    add("--batch-size", batch_size, "rows computed at once; lower it to save memory")
    if accumulation_steps is not None:
        add("--accumulation-steps", accumulation_steps, "micro-batches in a step")
    add("--epochs", 10, "passes over the rows, finished ones included")
    add("--lr", 0.01, "learning rate; lower it if the loss grows")
    add("--seed", 0, "seeds the first weights, order of rows, dropout and workers")
    add("--log-every", 10, "print the loss every N steps; 0: never")
    parser.add_argument(
        "--device",
        type=pick_device,
        default="auto",
        help="cpu, cuda, cuda:1, mps, ...; auto: a GPU if there is one (default: auto)",
    )
    parser.add_argument(
        "--checkpoint",
        type=os.path.realpath,  # follows a link, so that its file is replaced
        help="file written after each epoch; if it exists, training resumes from it",
    )
    args = parser.parse_args(argv)
    lowest = {"rows": 1, "hidden": 0, "batch_size": 1, "accumulation_steps": 1}
    lowest |= {"epochs": 1, "seed": 0, "log_every": 0}
    for name, bound in lowest.items():
        if getattr(args, name) < bound:
            flag = name.replace("_", "-")
            parser.error(f"argument --{flag}: {getattr(args, name)} is below {bound}")
    if not args.lr > 0:
        parser.error(f"argument --lr: {args.lr} is not above 0")
    return args


def print_start(args, dataset, first_epoch):
    """Print a run's first line: rows, sizes, epochs, device, torch and seed."""
    rows_per_step = args.batch_size * args.accumulation_steps
    processes = dist.get_world_size() if dist.is_initialized() else 1
    print(
        f"{len(dataset)} rows, {args.batch_size} x {args.accumulation_steps} per step, "
        f"{math.ceil(len(dataset) / rows_per_step)} steps per epoch, "
        f"{first_epoch} of {args.epochs} epochs done; {args.device}, "
        f"processes: {processes}, torch {torch.__version__}, seed {args.seed}"
    )


def print_end(args, model, dataset, loss_fn, start, **options):
    """Print a run's last line: loss of all rows, time since `start`, peak memory.

    `start` is in seconds, of time.perf_counter(); `options` are those of mean_loss().
    Leaves the model in eval().
    """
    seconds = time.perf_counter() - start
    model.eval()
    loss = mean_loss(args, model, dataset, loss_fn, **options)
    memory = peak_memory(args.device)
    print(f"Loss of all rows: {loss:.6f}, {seconds:.3f} s, peak memory {memory}")
