"""The compiled passes (folder `kernels`) for plain tensors on a CPU: built by the system's C++ compiler on first use.

The shared library goes to the user's cache folder (`QGRAPH_CACHE`, `XDG_CACHE_HOME` or ``~/.cache``), so a machine
compiles once, in a few seconds. Without a compiler, with `QGRAPH_NATIVE=0`, under compilation and tracing, on other
devices and for other types the same formulas run as torch operations, more slowly and, sums being added up in
another order, with other last bits. Nothing happens at import.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from qgraph.config import QuantSpec
from qgraph.ops import eager
from qgraph.ops.codes import absmean_factor, clips, is_binary, middle, scale_is_mean, window

FOLDER = Path(__file__).with_name("kernels")
SOURCE = FOLDER / "kernels.cpp"
TYPES = (torch.float32, torch.bfloat16)
COMPILERS = ("c++", "g++", "clang++")
# No contraction and nothing of -ffast-math: results are the same on every processor.
FLAGS = (
    *("-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"),
    *("-fno-rtti", "-fPIC", "-shared", "-pthread", "-Wno-psabi"),
)
PROCESSOR_FLAGS = {
    "AVX2": ("-mavx2", "-mf16c", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
COMPILE_SECONDS = 300
FINGERPRINT_VALUES = 1 << 16  # as in kernels/fingerprint.h
REGRESS, RESTORE = 1, 2  # of `Plan`; 0: neither
VALUES_A_THREAD = 1 << 16  # below that a thread costs more to start than it saves

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []  # empty until asked for; then the library, or None where there is none


class Plan(ctypes.Structure):
    """`Plan` of kernels/quantize.h: how groups are quantized."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("affine", "mean", "binary", "clip", "windowed", "regress")),
        *((name, ctypes.c_float) for name in ("factor", "low", "high", "lam", "middle", "reach")),
    )


def library() -> ctypes.CDLL | None:
    """The compiled passes, built or loaded at the first call; None where they cannot be had."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def applies(*tensors: Tensor | None) -> bool:
    """Whether the functions here take these tensors."""
    given = [t for t in tensors if t is not None]
    return (
        given[0].dtype in TYPES
        and all(t.dtype == given[0].dtype for t in given)
        and eager.plain_on_cpu(*given)
        # What a mode watches, or torch.func wraps, goes through torch's own operations.
        and not torch._C._len_torch_dispatch_stack()
        and not any(t.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given)
        and library() is not None
    )


def quantizes(spec: QuantSpec, *tensors: Tensor | None) -> bool:
    """Whether `forward` and `gradient` take these tensors with this spec."""
    return (spec.method == "ddt" or spec.scale == "minmax") and applies(*tensors)


def forward(dense: Tensor, sparse: Tensor | None, spec: QuantSpec, *, regress: bool = True) -> tuple[Tensor, Tensor]:
    """Denoised values, and the statistics of `ddt.centred_codes`.

    Parameters
    ----------
    dense : Tensor, shape (rows, groups, values), float32 or bfloat16; copied where it is not contiguous
    sparse : Tensor of the same shape and type, or None
        `dense` with pruned values set to 0.
    spec : QuantSpec
    regress : bool
        Else plain dequantization, `step q + offset`; of the statistics only these two are then set.

    Returns
    -------
    tuple of Tensor
        Of the shape and type of `dense`, and (rows, groups, 6), float32.
    """
    values, stats = _empty(dense), torch.empty(*dense.shape[:2], 6, dtype=torch.float32, device=dense.device)
    _quantize(_plan(spec, int(regress)), None, dense, sparse, values, stats)
    return _laid_out(values, dense), stats


def restored(dense: Tensor, sparse: Tensor | None, stats: Tensor, spec: QuantSpec) -> Tensor:
    """The values of `forward`, bit for bit and in the same layout, again from the statistics that it gave."""
    values = _empty(dense)
    _quantize(_plan(spec, RESTORE), None, dense, sparse, values, stats)
    return _laid_out(values, dense)


def gradient(h: Tensor, dense: Tensor, sparse: Tensor | None, stats: Tensor, spec: QuantSpec) -> Tensor:
    """`ddt.gradient`: dL/d dense from the upstream gradient `h`, of the shape and type of `dense`."""
    grad = _empty(dense)
    _quantize(_plan(spec, REGRESS), h, dense, sparse, grad, stats)
    return _laid_out(grad, dense)


def prune_runs(rows: Tensor, n: int, m: int) -> Tensor:
    """`rows`, shape (rows, values), contiguous, all but the `n` largest magnitudes of every `m` along it set to 0."""
    pruned = torch.empty_like(rows)
    count, length = rows.shape
    _library().qgraph_prune_runs(rows.data_ptr(), pruned.data_ptr(), count, length, n, m, _narrow(rows), _threads(rows))
    return pruned


def prune_largest(values: Tensor, kept: int) -> Tensor:
    """`values`, contiguous, with all but the `kept` largest magnitudes set to 0; of equal ones the first stay."""
    pruned = torch.empty_like(values)
    if _library().qgraph_prune_largest(values.data_ptr(), pruned.data_ptr(), values.numel(), kept, _narrow(values)):
        raise MemoryError("pruning: no memory for the counts of a selection")
    return pruned


def fingerprint(values: Tensor) -> tuple[int, ...]:
    """Numbers that stand for the bits of `values`, contiguous, and their order: other bits, other numbers.

    A change of one value always shows, any other one but for one in 2**32 a lane that it touches.
    """
    found = torch.empty(-(-values.numel() // FINGERPRINT_VALUES), dtype=torch.int64, device=values.device)
    _library().qgraph_fingerprint(
        values.data_ptr(), found.data_ptr(), values.numel(), _narrow(values), _threads(values)
    )
    return tuple(found.tolist())


def _quantize(plan: Plan, h: Tensor | None, dense: Tensor, sparse: Tensor | None, out: Tensor, stats: Tensor) -> None:
    rows, groups, length = dense.shape
    # Held by name: what is a copy has to live until the call is over.
    given = [None if x is None else x.detach().contiguous() for x in (h, dense, sparse, stats)]
    upstream, full, pruned, kept = (None if x is None else x.data_ptr() for x in given)
    _library().qgraph_ddt(
        ctypes.addressof(plan), upstream, full, pruned, out.data_ptr(), kept,
        rows * groups, length, _narrow(dense), _threads(dense),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _plan(spec: QuantSpec, regress: int) -> Plan:
    low, high = spec.levels
    mean, reach = spec.scale != "minmax" or scale_is_mean(spec), window(spec)
    factor = absmean_factor(spec) if spec.scale != "minmax" else 1.0 if mean else high
    return Plan(
        affine=spec.scheme == "affine", mean=mean, binary=is_binary(spec), clip=clips(spec), windowed=reach is not None,
        regress=regress, factor=factor, low=low, high=high, lam=spec.lam, middle=middle(spec), reach=reach or 0.0,
    )  # fmt: skip


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)  # whatever the default device is


def _laid_out(result: Tensor, x: Tensor) -> Tensor:
    """`result` with the strides of `x`, so that channels-last weights stay so."""
    return result if x.is_contiguous() else torch.empty_like(x).copy_(result)


def _narrow(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _threads(tensor: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), tensor.numel() // VALUES_A_THREAD))


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None, "applies() is asked first"
    return found


# -- building ----------------------------------------------------------------------------------------------------------


def _load() -> ctypes.CDLL | None:
    command = _command()
    if command is None:
        return None
    try:
        path = _folder() / f"kernels-{_digest(command)}.so"
        if path.exists():
            try:
                return _opened(path)
            except OSError:
                pass  # written by another system, or cut short: built anew
        return _opened(_built(command, path))
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        detail = next((line for line in lines if "error" in line), lines[0])
        warnings.warn(
            f"qgraph: its compiled CPU passes could not be built ({detail}); slower torch "
            f"operations run instead. Set CXX to a working C++ compiler, or QGRAPH_NATIVE=0 to ask for none.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _command() -> tuple[str, ...] | None:
    """The compiler with its options, or None where none is wanted or found."""
    if os.environ.get("QGRAPH_NATIVE") == "0" or os.name != "posix":
        return None
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if compiler is None:
        return None
    return compiler, *FLAGS, *PROCESSOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())


def _digest(command: tuple[str, ...]) -> str:
    texts = [path.read_text() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cpp", ".h")]
    return hashlib.sha256("\0".join((*command, *texts)).encode()).hexdigest()[:16]


def _folder() -> Path:
    """Where libraries are kept, a folder of this user's; a temporary one where that cannot be written."""
    base = os.environ.get("QGRAPH_CACHE") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "qgraph"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    temporary = tempfile.mkdtemp(prefix="qgraph-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def _built(command: tuple[str, ...], path: Path) -> Path:
    """Compile beside `path` and rename: of processes that start together each builds a whole file."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        subprocess.run(
            [*command, "-o", name, str(SOURCE)], check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _opened(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    pointer, count, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    found.qgraph_ddt.argtypes = [*[pointer] * 6, count, count, flag, count]
    found.qgraph_prune_runs.argtypes = [pointer, pointer, count, count, flag, flag, flag, count]
    found.qgraph_prune_largest.argtypes = [pointer, pointer, count, count, flag]
    found.qgraph_fingerprint.argtypes = [pointer, pointer, count, flag, count]
    for function in (found.qgraph_ddt, found.qgraph_prune_runs, found.qgraph_fingerprint):
        function.restype = None
    return found
