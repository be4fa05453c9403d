"""What the three scripts share: model, data, device, processes, checkpoint and command line.

How a step is computed stands in the scripts alone; read one of them first.
"""

import argparse
import contextlib
import datetime
import glob
import io
import itertools
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.rendezvous import rendezvous
except KeyboardInterrupt:  # most of a short run is this import
    sys.exit(130)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class InputError(ValueError):
    """A user's mistake, told in one line: what is wrong, where, and what is allowed."""


# ---- model and data


def make_model(n_inputs, n_targets, hidden=0, seed=0):
    """Return a linear model, or one with a layer of `hidden` ReLU units; `seed` sets its weights."""
    torch.manual_seed(seed)
    if hidden == 0:
        return nn.Linear(n_inputs, n_targets)
    return nn.Sequential(nn.Linear(n_inputs, hidden), nn.ReLU(), nn.Linear(hidden, n_targets))


def make_data(rows):
    """Return float32 inputs (rows, 10) and targets (rows, 1): a linear rule, and noise of variance 0.01."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, 10, generator=generator)
    y = 0.1 * torch.randn(rows, generator=generator)
    for weight, column in zip(torch.randn(10, generator=generator), X.unbind(1)):
        y += weight * column  # not X @ weights: its last bit can depend on the number of threads
    return X, y.unsqueeze(1)


def load_data(path):
    """Return float32 inputs (rows, n), targets (rows, t) and their scale; raises InputError.

    `path` is a .csv or 2-D .npy table, its last column the target, or an .npz with arrays X and y. Every
    column is brought to mean 0 and deviation 1, a constant one to zeros: the mean squared error is then
    the part of the targets' variance left unexplained. The scale has `mean` and `std`, float64 (n + t,).
    """
    readers = {".csv": read_csv, ".npy": read_arrays, ".npz": read_arrays}
    kind = path[-4:].lower()
    try:
        if kind not in readers:
            raise InputError(f"the name must end in {', '.join(readers)}")
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            arrays = readers[kind](file)
            for name, array in arrays.items():
                if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
                    found = f"{array.dtype} of shape {array.shape}" if array.size else "nothing"
                    raise InputError(f"{name} holds {found}; real numbers in rows and columns are needed")
                arrays[name] = array = array.astype(np.float64, copy=False)
                if not np.isfinite(array).all():
                    row, column = np.argwhere(~np.isfinite(array))[0]
                    cell = f"{name} row {row + 1} (without header), column {column + 1}"
                    raise InputError(f"{cell}: {array[row, column]} is not a finite number")
            if len({len(array) for array in arrays.values()}) > 1:
                raise InputError("X and y have different numbers of rows")
            table = np.hstack(list(arrays.values())) if "y" in arrays else array
            inputs = table.shape[1] - (array.shape[1] if "y" in arrays else 1)
            if inputs < 1:
                raise InputError("there is only one column; at least one input and the target are needed")
            mean, std = table.mean(axis=0), table.std(axis=0)
            constant = table.min(axis=0) == table.max(axis=0)
            mean[constant], std[constant] = table[0, constant], 1
            fits = np.isfinite(mean + std) & (std > 0)
            if not fits.all():
                raise InputError(f"column {fits.argmin() + 1}: values too large or too small to standardise")
            table -= mean
            table /= std
    except (InputError, OSError) as error:
        raise InputError(f"--data {path}: {getattr(error, 'strerror', error)}") from None
    X, y = (torch.from_numpy(part.astype(np.float32, order="C")) for part in (table[:, :inputs], table[:, inputs:]))
    return X, y, {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}


def read_csv(file):
    """Return the numbers of an open CSV file; its first line is a header if no cell of it is a number."""
    count = itertools.count(1)
    lines = (line for _, line in zip(count, io.TextIOWrapper(file, encoding="utf-8-sig")))
    try:
        first = next(lines, "")
        header = first.strip(', "\r\n') != ""
        for cell in first.split(","):
            with contextlib.suppress(ValueError):
                header = float(cell.strip(' "\r\n')) is None  # False, unless float() raises
        lines = lines if header else itertools.chain([first], lines)
        return {"table": np.loadtxt(lines, delimiter=",", comments=None, quotechar='"', ndmin=2)}
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text") from None
    except ValueError as error:
        fault = re.sub(" at row [0-9]+|; use .*|[.]$", "", str(error))  # numpy's rows leave out blank lines
        raise InputError(f"line {next(count) - 1}: {fault}; numbers between commas are needed") from None


def read_arrays(file):
    """Return the array of an open .npy file, or X and y of an .npz."""
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"array": loaded}
        X, y = np.asarray(loaded["X"]), np.asarray(loaded["y"])
        return {"X": X, "y": y[:, None] if y.ndim == 1 else y}
    except MemoryError:
        raise
    except Exception:  # a damaged file can fail anywhere in numpy, zipfile or zlib
        wanted = "a whole .npy array, or .npz with arrays X and y; objects are never read"
        raise InputError(f"is not {wanted}") from None


def row_order(rows, seed, epoch):
    """Return the order of the rows in an epoch, int64 (rows,).

    It depends on nothing else: scripts, processes and resumed runs see the same rows in the same windows.
    """
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))


def windows(order, size):
    """Yield `order` in pieces of `size` rows, the last one maybe shorter.

    As a DataLoader's sampler, with batch_size=None, each piece is fetched by one indexing operation and
    not row by row.
    """
    for start in range(0, len(order), size):
        yield order[start : start + size]


# ---- device and processes


def pick_device(name):
    """Return the torch.device called `name`; "auto" is the accelerator, if there is one. Raises InputError."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    present = ["cpu"] + [f"{accelerator.type}:{index}" for index in range(count)]
    if accelerator and name in ("auto", accelerator.type):
        name = f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"  # one device per process
    if name == "auto":
        name = "cpu"
    if name not in present:
        raise InputError(f"--device {name}: not here; present: {', '.join(present)}")
    return torch.device(name)


def processes():
    """Return this process's rank and the number of processes, as torchrun sets them; without it (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Open the process group of a torchrun launch; the first optimizer must have been built before.

    Building it imports torch.distributed.nn.functional, whose default arguments would hold an open group
    for ever, and with it gloo's threads: some runs would abort while the interpreter ends.
    """
    if processes()[1] == 1 or dist.is_initialized():
        return
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    options = {"timeout": datetime.timedelta(minutes=5)}  # until a lost process is noticed; the default is 30
    store, options["rank"], options["world_size"] = next(rendezvous("env://", **options))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all restarts: without a prefix, addresses of the last attempt are read
        # (pytorch/pytorch#135712). Several machines count their restarts apart, so they cannot use it.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(dist.get_default_backend_for_device(device), store=store, **options)


def mean_over_processes(value):
    """Return the mean of a tensor over the processes; all of them must call it."""
    if not dist.is_initialized():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def in_first_process(function, *args):
    """Call `function` in the first process; all of them return its result or raise its InputError."""
    result = [None]
    if processes()[0] == 0:
        try:
            result = [function(*args)]
        except InputError as error:
            result = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], InputError):
        raise result[0]
    return result[0]


# ---- checkpoint


def lock(file):
    """Lock an open file until it is closed or its process dies. Raises OSError if another one holds it."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_checkpoint(file, state):
    """Replace `file` by the dict `state`, whole or not at all. Raises InputError."""
    content = io.BytesIO()
    torch.save(state, content)  # not into the file: there a full disk is no OSError
    temporary = f"{file}.{os.getpid()}.tmp"
    try:
        while True:
            with open(temporary, "wb") as out:
                with contextlib.suppress(OSError):  # not every file system has locks
                    lock(out)
                out.write(content.getbuffer())
                out.flush()
                os.fsync(out.fileno())
            with contextlib.suppress(FileNotFoundError):  # taken for a stale one by a run that just started
                return os.replace(temporary, file)
    except OSError as error:
        raise InputError(f"--checkpoint {file}: {error.strerror}; what it held before is safe") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def read_checkpoint(file, settings, model, optimizer):
    """Load what `file` holds into `model` and `optimizer` and return it; None if there is no file yet.

    Clears the temporary files of runs that were killed: nobody holds their lock. Raises InputError.
    """
    try:
        if os.path.isdir(file):
            raise InputError("is a folder; a file name is needed")
        probe = f"{file}.{os.getpid()}.tmp"  # better now than after an epoch
        open(probe, "wb").close()
        os.remove(probe)
        for temporary in glob.glob(glob.escape(file) + ".[0-9]*.tmp"):
            with contextlib.suppress(OSError):
                with open(temporary, "rb") as stale:
                    lock(stale)
                os.remove(temporary)
        if not os.path.exists(file):
            return None
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():  # torch.load takes altered bytes for weights
                raise zipfile.BadZipFile
        state = torch.load(file, map_location="cpu")
        found = state["settings"]
        changed = [key for key in settings if settings[key] != found[key]]
        if changed:
            raise InputError("; ".join(f"{key} is {settings[key]}, the checkpoint has {found[key]}" for key in changed))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return {**state, "epoch": int(state["epoch"])}
    except InputError as error:
        raise InputError(f"--checkpoint {file}: {error}") from None
    except OSError as error:
        needed = "a file that can be read, in a folder that can be written to, is needed"
        raise InputError(f"--checkpoint {file}: {error.strerror}; {needed}") from None
    except Exception:  # a damaged or alien file can fail anywhere in the unpickler, or have anything in it
        raise InputError(f"--checkpoint {file}: is not a whole checkpoint of these scripts; left as it is") from None


# ---- a run from the command line


def start(run, model, optimizer):
    """Join the processes, take up the checkpoint, print the plan; return the number of epochs already done.

    `run` is what main() knows of the run; it is None in a notebook or a test: no checkpoint, nothing printed.
    """
    optimizer.zero_grad()  # a model from elsewhere may carry gradients
    join_processes(next(model.parameters()).device)
    if run is None:
        return 0
    state = run.checkpoint and in_first_process(read_checkpoint, run.checkpoint, run.settings, model, optimizer)
    if state:
        model.load_state_dict(state["model"])  # in the other processes
        optimizer.load_state_dict(state["optimizer"])
        run.plan += f"; {run.checkpoint} has {state['epoch']} of the epochs"
    run.first_epoch = run.epoch = state["epoch"] if state else 0
    print(run.plan)
    run.started = time.perf_counter()
    return run.epoch


def end_epoch(run, model, optimizer, epoch, loss):
    """Write the checkpoint after `epoch` epochs; `loss` is the last one's mean over all rows, a tensor.

    Raises FloatingPointError, and writes nothing, if the loss or a weight is not finite.
    """
    loss = mean_over_processes(loss).item()
    if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
        lr = optimizer.param_groups[0]["lr"]
        raise FloatingPointError(f"epoch {epoch}: the loss is not finite at --lr {lr:g}; try --lr {lr / 10:g}")
    if run is None:
        return
    if run.checkpoint:
        state = {
            "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "settings": run.settings,
            "torch": str(torch.__version__),
            **run.scale,
        }
        in_first_process(write_checkpoint, run.checkpoint, state)
    run.epoch, run.loss, run.seconds = epoch, loss, time.perf_counter() - run.started


def peak_memory(device):
    """Return the most memory used so far, in words: the accelerator's, else this process's."""
    if device.type != "cpu":
        return f"{torch.accelerator.max_memory_allocated(device) / 2**20:.0f} MiB of the device"
    try:
        with open("/proc/self/status") as status:  # ru_maxrss would start from the launching process's peak
            kib = int(re.search(r"VmHWM:\s*(\d+)", status.read())[1])
    except (OSError, TypeError):
        import resource  # not on Windows

        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return f"{kib / 1024:.0f} MiB of the process"


def between(kind, low, high):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {low} to {high}")

    return parse


def parse_args(train):
    """Return the command line's arguments; `train`'s keyword defaults are theirs. Raises InputError."""

    def refuse(message):
        raise InputError(message)

    defaults = {"data": None, "rows": None, "hidden": 0, "device": "auto", "checkpoint": None}
    defaults.update(train.__kwdefaults__)
    size, size_or_0 = between(int, 1, 2**31 - 1), between(int, 0, 2**31 - 1)
    flags = {
        "data": (str, "table to learn: .csv or .npy (last column the target), or .npz (X and y)"),
        "rows": (size, "rows of synthetic data, 1000 by default; time and data memory grow with them"),
        "hidden": (
            size_or_0,
            "ReLU units, which cost memory for every row of a micro-batch; 0: linear model",
        ),
        "batch_size": (size, "rows computed at once; lower it if memory runs out"),
        "accumulation_steps": (size, "micro-batches in a step; more: larger steps in the same memory"),
        "epochs": (size, "passes over the rows; time grows with them"),
        "lr": (
            between(float, 1e-30, 1e30),
            "learning rate, the length of a step; lower it if the loss grows",
        ),
        "seed": (between(int, 0, 2**32 - 1), "of the first weights and of the order of the rows"),
        "device": (str, "auto, cpu, cuda, cuda:1, mps, ...: whose time and memory are used"),
        "log_every": (size_or_0, "print every Nth step, waiting for the device; 0: none, the fastest"),
        "checkpoint": (str, "file written after each epoch; if it exists, training goes on from it"),
    }
    parser = argparse.ArgumentParser(
        description=train.__globals__["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse  # one line, without the usage
    for name, (kind, text) in flags.items():
        if name in defaults:
            default = "" if defaults[name] is None else " (default: %(default)s)"
            flag = "--" + name.replace("_", "-")
            parser.add_argument(flag, type=kind, default=defaults[name], help=text + default)
    args = parser.parse_args()
    if args.data is not None and args.rows is not None:
        refuse("--rows: for synthetic data only, not with --data")
    return args


def interrupt(number, frame):
    """Turn Ctrl-C and SIGTERM into the same exception, with the exit status they call for."""
    raise KeyboardInterrupt(128 + number)


def leave(status, message):
    """End the process with one line on standard error, said once however many processes there are."""
    rank, _ = processes()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if rank else signal.SIG_IGN)
    if rank and status < 128:
        time.sleep(10)  # the first process most likely says the same, and torchrun then ends this one
    if not rank or status < 128:
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)  # a process group in mid-step cannot be left in good order
    sys.exit(status)


def launch(run, train):
    """Train as the arguments in `run` say, and print the closing line. Raises InputError."""
    _, world_size = processes()
    batch_size, window = run.batch_size, run.batch_size * vars(run).get("accumulation_steps", 1)
    if world_size > 1 and "accumulation_steps" not in run:
        same = f"torchrun ... train_accum.py --batch-size {batch_size} --accumulation-steps 1"
        raise InputError(f"runs in one process; the same steps in {world_size} processes: {same}")
    device = pick_device(run.device)
    X, y, run.scale = load_data(run.data) if run.data is not None else (*make_data(run.rows or 1000), {})
    model = make_model(X.shape[1], y.shape[1], run.hidden, run.seed).to(device)
    if run.checkpoint is not None:
        run.checkpoint = os.path.realpath(run.checkpoint)
    run.settings = {
        "rows per step": window,
        "--lr": run.lr,
        "--seed": run.seed,
        "--hidden": run.hidden,
        "data": f"{len(X)} x {X.shape[1]} + {y.shape[1]}",
        "data checksum": zlib.crc32(y.numpy(), zlib.crc32(X.numpy())),
    }
    steps = math.ceil(len(X) / window)
    micro_batches = len(X) // window * (window // batch_size) + math.ceil(len(X) % window / batch_size)
    run.plan = (
        f"{len(X)} rows, {window} per step ({window // batch_size} x {batch_size}): {steps} steps and "
        f"{micro_batches} micro-batches per epoch, {run.epochs} epochs; {world_size} process"
        f"{'es' * (world_size > 1)} on {device}, torch {torch.__version__}, seed {run.seed}"
    )
    train(model, X, y, run, **{name: getattr(run, name) for name in train.__kwdefaults__})
    if run.epoch == run.first_epoch:
        print(f"nothing to train: {run.checkpoint} has {run.epoch} epochs; a larger --epochs goes on")
        return
    epochs = run.epoch - run.first_epoch
    print(
        f"{steps * epochs} optimizer steps, {micro_batches * epochs} micro-batches, "
        f"last epoch's mean loss {run.loss:.6f}, {run.seconds:.3f} s, "
        f"{len(X) * epochs / run.seconds:,.0f} rows/s, peak memory {peak_memory(device)}"
    )


def main(train):
    """Run a script's `train` as the command line says; a user's mistake ends in one line, not a traceback."""
    if processes()[0]:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    sys.stdout.reconfigure(line_buffering=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    run = None
    try:
        run = parse_args(train)
        launch(run, train)
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        leave(2, f"error: {error}")
    except FloatingPointError as error:
        leave(1, f"error: {error}")
    except KeyboardInterrupt as stop:
        kept = "no epoch is kept; --checkpoint FILE keeps each"
        if run and run.checkpoint:
            kept = f"{run.checkpoint} is as it was"
            if "started" in run and os.path.exists(run.checkpoint):
                epoch = torch.load(run.checkpoint)["epoch"]
                kept = f"epoch {epoch} of {run.epochs} is safe in {run.checkpoint}; the same command goes on"
        leave(stop.args[0], f"interrupted; {kept}")
    except OSError as error:  # standard output: closed by `| head`, or on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + 13)
        leave(1, f"error: standard output: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        leave(1, "error: out of memory; lower --batch-size (and raise --accumulation-steps), --hidden or --rows")
