"""What the three scripts share: model, data, device, processes, checkpoint and command line.

How a step is computed stands in the scripts alone; read one of them first.
"""

import argparse
import contextlib
import csv
import datetime
import errno
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
    import resource
except ImportError:  # Windows
    fcntl = resource = None


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
    """Return standardised float32 inputs (rows, n), targets (rows, t) and their scale; raises InputError.

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
            arrays = {name: real_numbers(name, array) for name, array in readers[kind](file).items()}
            if len({len(array) for array in arrays.values()}) > 1:
                raise InputError("X and y have different numbers of rows")
            table = np.hstack(list(arrays.values())) if "y" in arrays else arrays["table"]
            inputs = table.shape[1] - (arrays["y"].shape[1] if "y" in arrays else 1)
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
    except MemoryError:
        raise InputError(f"--data {path}: does not fit in memory, or is damaged") from None
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
        cells = next(csv.reader([first]), [])
        if any(cells) and not any(map(is_number, cells)):
            first = ""
        table = np.loadtxt(itertools.chain([first], lines), delimiter=",", comments=None, quotechar='"', ndmin=2)
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text") from None
    except (ValueError, csv.Error) as error:
        fault = re.sub(" at row [0-9]+|; use .*|[.]$", "", str(error))  # numpy's rows leave out blank lines
        needed = "numbers between commas are needed, under at most one line without any"
        raise InputError(f"line {next(count) - 1}: {fault}; {needed}") from None
    if table.size and len(cells) not in (0, table.shape[1]):
        raise InputError(f"line 1 has {len(cells)} cells, the others have {table.shape[1]}; the same are needed")
    return {"table": table}


def is_number(cell):
    """Say whether a CSV cell is a number, nan and inf included."""
    with contextlib.suppress(ValueError):
        float(cell)
        return True
    return False


def read_arrays(file):
    """Return the array of an open .npy file, or X and y of an .npz."""
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"table": loaded}
        X, y = np.asarray(loaded["X"]), np.asarray(loaded["y"])
        return {"X": X, "y": y[:, None] if y.ndim == 1 else y}
    except MemoryError:
        raise
    except Exception:  # a damaged file can fail anywhere in numpy, zipfile or zlib
        wanted = "a whole .npy array, or .npz with arrays X and y; objects are never read"
        raise InputError(f"is not {wanted}") from None


def real_numbers(name, array):
    """Return a 2-D array of finite real numbers as float64; raises InputError for any other."""
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
        found = f"{array.dtype} of shape {array.shape}" if array.size else "nothing"
        raise InputError(f"{name} holds {found}; real numbers in rows and columns are needed")
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        cell = f"{name} row {row + 1} (without header), column {column + 1}"
        raise InputError(f"{cell}: {array[row, column]} is not a finite number")
    return array


def row_order(rows, seed, epoch):
    """Return the order of the rows in an epoch, int64 (rows,).

    It depends on nothing else: scripts, processes and resumed runs see the same rows in the same windows.
    """
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))


# ---- device and processes


def pick_device(name):
    """Return the torch.device called `name`; "auto" is the accelerator, if there is one. Raises InputError."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind, count = (accelerator.type, torch.accelerator.device_count()) if accelerator else ("cpu", 0)
    present = ["cpu"] + [f"{kind}:{index}" for index in range(count)]
    if name in ("auto", kind):
        name = f"{kind}:{os.environ.get('LOCAL_RANK', 0)}" if accelerator else "cpu"  # one device per process
    if name not in present:
        raise InputError(f"--device {name}: not here; present: {', '.join(present)}")
    return torch.device(name)


def processes():
    """Return this process's rank and the number of processes, as torchrun sets them; without it (0, 1)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Open the process group of a torchrun launch, if it is one and this was not done before."""
    rank, world_size = processes()
    if world_size == 1 or dist.is_initialized():
        return
    # Its default arguments hold the group that is open when it is first imported, by an optimizer or DDP, for
    # ever, and gloo's threads with it: some runs would abort at the interpreter's end. So: before any is open.
    import torch.distributed.nn.functional

    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    timeout = datetime.timedelta(minutes=5)  # until a lost process is noticed; the default is 30
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store for all restarts: without a prefix, addresses of the last attempt are read
        # (pytorch/pytorch#135712). Several machines count their restarts apart, so they cannot use it.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def mean_over_processes(value):
    """Return the mean of a tensor over the processes; all of them must call it."""
    if dist.is_initialized():
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


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
    damaged = InputError(f"--checkpoint {file}: is not a whole checkpoint of these scripts; left as it is")
    try:
        probe = f"{file}.{os.getpid()}.tmp"  # what keeps it from being written is told now, not after an epoch
        open(probe, "wb").close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(probe)
        for temporary in glob.glob(glob.escape(file) + ".*.tmp"):
            if temporary[len(file) + 1 : -4].isdecimal():
                with contextlib.suppress(OSError):
                    with open(temporary, "rb") as stale:
                        lock(stale)
                    os.remove(temporary)
        if not os.path.exists(file):
            return None
        open(file, "r+b").close()
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():  # torch.load takes altered bytes for weights
                raise damaged
        state = torch.load(file, map_location="cpu")
    except OSError as error:
        needed = "a file to read and write, in a folder that exists and can be written to, is needed"
        raise InputError(f"--checkpoint {file}: {error.strerror}; {needed}") from None
    except Exception:  # a damaged or alien file can fail anywhere in zipfile or the unpickler
        raise damaged from None
    try:
        found = state["settings"]
        changed = [f"{k} is {settings[k]}, the checkpoint has {found[k]}" for k in settings if settings[k] != found[k]]
        if not changed:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return {**state, "epoch": int(state["epoch"])}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):  # as whole, but with other contents
        raise damaged from None
    raise InputError(f"--checkpoint {file}: {'; '.join(changed)}")


# ---- a run from the command line


def start(run, model, optimizer, X, y):
    """Join the processes, take up the checkpoint, print the plan; return the number of epochs already done.

    `run` is main()'s; it is None in a notebook or a test: no checkpoint, no plan. Clears the gradients, as a
    model from elsewhere may carry some. Raises ValueError if X and y do not fit, InputError for `run`.
    """
    if y.ndim != 2 or len(X) != len(y):
        raise ValueError(f"y must be of shape ({len(X)}, targets), not {tuple(y.shape)}")
    optimizer.zero_grad()
    join_processes(next(model.parameters()).device)
    if run is None:
        return 0
    if dist.is_initialized():
        mine = {**run.settings, "--epochs": run.epochs, "--batch-size": run.batch_size, "--log-every": run.log_every}
        mine["--checkpoint"] = run.checkpoint is not None
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        differ = [key for key in mine if any(other[key] != found[0][key] for other in found)]
        if differ:
            raise InputError(f"the processes differ in {', '.join(differ)}; they must be started alike")
    state = run.checkpoint and in_first_process(read_checkpoint, run.checkpoint, run.settings, model, optimizer)
    if state:
        if processes()[0]:  # the first process has loaded it while it checked it
            model.load_state_dict(state["model"])
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

    def save():
        state = {"model": {name: tensor.cpu() for name, tensor in model.state_dict().items()}, "epoch": epoch}
        state |= {"optimizer": optimizer.state_dict(), "settings": run.settings, "torch": str(torch.__version__)}
        write_checkpoint(run.checkpoint, state | run.scale)

    if run.checkpoint:
        in_first_process(save)
    run.epoch, run.loss, run.seconds = epoch, loss, time.perf_counter() - run.started


def peak_memory(device):
    """Return the most memory used so far, in words: the accelerator's, else this process's."""
    if device.type not in ("cpu", "mps"):  # MPS shares the process's, and may not count (pytorch/pytorch#186430)
        return f"{torch.accelerator.max_memory_allocated(device) / 2**20:.0f} MiB of the device"
    try:
        with open("/proc/self/status") as status:  # Linux; ru_maxrss starts from the launching process's peak
            kib = int(re.search(r"VmHWM:\s*(\d+)", status.read())[1])
    except (OSError, TypeError):
        if resource is None:
            return "unknown"
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

    defaults = {"data": None, "rows": None, "hidden": 0, "device": "auto", "checkpoint": None, **train.__kwdefaults__}
    size, size_or_0 = between(int, 1, 2**31 - 1), between(int, 0, 2**31 - 1)
    flags = {
        "data": (str, "FILE", "table to learn: .csv or .npy (last column the target), or .npz (X and y)"),
        "rows": (size, "N", "rows of synthetic data, 1000 by default; time and data memory grow with them"),
        "hidden": (size_or_0, "N", "ReLU units, each a number to keep per row computed; 0: linear model"),
        "batch_size": (size, "N", "rows computed at once; lower it if memory runs out"),
        "accumulation_steps": (size, "N", "micro-batches in a step; more: larger steps in the same memory"),
        "epochs": (size, "N", "passes over the rows; time grows with them"),
        "lr": (between(float, 1e-30, 1e30), "X", "learning rate, the length of a step; lower it if the loss grows"),
        "seed": (between(int, 0, 2**32 - 1), "N", "of the first weights and of the order of the rows"),
        "device": (str, "NAME", "auto, cpu, cuda, cuda:1, mps, ...: whose time and memory are used"),
        "log_every": (size_or_0, "N", "print every Nth step, waiting for the device; 0: none, the fastest"),
        "checkpoint": (str, "FILE", "written after each epoch; if it exists, training goes on from it"),
    }
    layout = argparse.RawDescriptionHelpFormatter
    description = train.__globals__["__doc__"]
    parser = argparse.ArgumentParser(description=description, formatter_class=layout, allow_abbrev=False)
    parser.error = refuse  # one line, without the usage
    for name, (kind, metavar, text) in flags.items():
        if name in defaults:
            text += "" if defaults[name] is None else " (default: %(default)s)"
            flag = "--" + name.replace("_", "-")
            parser.add_argument(flag, type=kind, metavar=metavar, default=defaults[name], help=text)
    args = parser.parse_args()
    if args.data is not None and args.rows is not None:
        refuse("--rows: for synthetic data only, not with --data")
    return args


def interrupt(number, frame):
    """Turn Ctrl-C and SIGTERM into the same exception, with the exit status they call for, and only once."""
    on_signals(lambda *_: None)
    raise KeyboardInterrupt(128 + number)


def on_signals(action):
    """Let Ctrl-C and SIGTERM have this action."""
    signal.signal(signal.SIGINT, action)
    signal.signal(signal.SIGTERM, action)


def leave(status, message):
    """End the process with one line on standard error, said once however many processes there are."""
    rank, _ = processes()
    if rank and status < 128:
        on_signals(signal.SIG_DFL)
        time.sleep(10)  # the first process most likely says the same, and torchrun then ends this one
    if message and (not rank or status < 128):
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)  # a process group in mid-step cannot be left in good order
    sys.exit(status)


def launch(run, train):
    """Train as the arguments in `run` say, and print the closing line. Raises InputError.

    Adds to `run` the scale, settings and plan that start() and end_epoch() use; they add what they learn.
    """
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
    run.settings = {"rows per step": window, "--lr": run.lr, "--seed": run.seed, "--hidden": run.hidden}
    run.settings["data"] = f"{len(X)} x {X.shape[1]} + {y.shape[1]}"
    run.settings["data checksum"] = zlib.crc32(y.numpy(), zlib.crc32(X.numpy()))
    steps = math.ceil(len(X) / window)
    micro_batches = len(X) // window * (window // batch_size) + math.ceil(len(X) % window / batch_size)
    run.plan = (
        f"{len(X)} rows, {window} per step ({window // batch_size} x {batch_size}): {steps} steps and "
        f"{micro_batches} micro-batches per epoch, {run.epochs} epochs; {world_size} process"
        f"{'es' * (world_size > 1)} on {device}, torch {torch.__version__}, seed {run.seed}"
    )
    train(model, X, y, run, **{name: getattr(run, name) for name in train.__kwdefaults__})
    epochs = run.epoch - run.first_epoch
    if epochs == 0:
        print(f"nothing to train: {run.checkpoint} has {run.epoch} epochs; a larger --epochs goes on")
        return
    print(
        f"{steps * epochs} optimizer steps, {micro_batches * epochs} micro-batches, "
        f"last epoch's mean loss {run.loss:.6f}, {run.seconds:.3f} s, "
        f"{len(X) * epochs / run.seconds:,.0f} rows/s, peak memory {peak_memory(device)}"
    )


def interrupted(run):
    """Return what to say after Ctrl-C or SIGTERM: which epoch is safe in which file."""
    if run is None or run.checkpoint is None:
        return "interrupted; no epoch is kept; --checkpoint FILE keeps each"
    if "started" not in run or not os.path.exists(run.checkpoint):
        return f"interrupted; {run.checkpoint} is as it was"
    state = torch.load(run.checkpoint)
    if state["settings"] != run.settings:
        return f"interrupted; another run has written to {run.checkpoint}"
    return f"interrupted; epoch {state['epoch']} of {run.epochs} is safe in {run.checkpoint}; the same command goes on"


def main(train):
    """Run a script's `train` as the command line says; a user's mistake ends in one line, not a traceback."""
    if processes()[0] or sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    on_signals(interrupt)
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
        leave(stop.args[0], interrupted(run))
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            leave(141, None)  # what the shell gives a process that SIGPIPE ended
        leave(1, f"error: standard output: {error.strerror}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        leave(1, "error: out of memory; lower --batch-size, --hidden or --rows")
