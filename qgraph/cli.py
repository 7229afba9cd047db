"""The command line: `qgraph demo | inspect | diff | compare | export | verify | bench`, every one with `--json`.

Parsing and printing live here, and nothing else: each command calls one public function. Imports stand inside
the functions, so that `qgraph --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraph.errors import InspectError, QGraphError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["main"]

FAILED, WRONG = 2, 1
CLOSED = 128 + 13  # what a shell says of a program that SIGPIPE ended
FACTORY = "module:factory, a callable without arguments that returns a model, or (model, example_inputs)"
INPUT = "an example input as SHAPE[:DTYPE], such as 1x3x32x32 or 2x16:int64; once for each argument of forward"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a file that is wrong or differs, 2 for an error, 141 unread."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `qgraph inspect ... | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except (QGraphError, OSError) as error:
        if os.environ.get("QGRAPH_DEBUG"):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"qgraph {options.command}: {' '.join(lines)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"qgraph {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qgraph",
        description="Low-bit and sparse training for any torch model, and its packed ONNX files.",
        epilog="Set QGRAPH_DEBUG=1 for the traceback of an error.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = _command(commands, "demo", _demo, "train, export and run two small models at six configs")
    demo.add_argument("--out", type=Path, default=Path("qgraph-demo"), help="folder of the files (%(default)s)")
    demo.add_argument("--epochs", type=int, help="epochs of each training")
    demo.add_argument("--configs", nargs="+", metavar="CONFIG", help="notations, such as A4W1@32")
    demo.add_argument("--models", nargs="+", choices=("cnn", "transformer"), help="which models")

    jobs = min(2, os.cpu_count() or 1)
    demo.add_argument("--jobs", type=int, default=jobs, help="processes, one thread each (%(default)s)")

    inspect = _command(commands, "inspect", _inspect, "what is in a model or a file, layer by layer")
    inspect.add_argument("target", help=f"an .onnx file, or {FACTORY}")
    inspect.add_argument("--config", help="prepare the model with this config first")
    inspect.add_argument("--graphs", action="store_true", help="print the captured graphs too")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows it in a browser")
    _takes_inputs(inspect)

    diff = _command(
        commands,
        "diff",
        _diff,
        "which weights differ in two models or files: spec, shape, bytes, of two files values; 1 if any",
    )
    diff.add_argument("a", help=f"an .onnx file, or {FACTORY}")
    diff.add_argument("b", help="the same")

    compare = _command(commands, "compare", _compare, "run two models or files and compare them layer by layer")
    compare.add_argument("a", help=f"an .onnx file, or {FACTORY}; the reference")
    compare.add_argument("b", help="the same")
    compare.add_argument("--config", help="prepare b with this config first")
    compare.add_argument(
        "--threshold",
        type=float,
        metavar="DB",
        help="exit with 1 if a layer's signal-to-noise ratio is below; NaN does so in any case",
    )
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios too, as .png, .svg or .pdf")
    _takes_inputs(compare)

    export = _command(commands, "export", _export, "a saved checkpoint as an ONNX file")
    export.add_argument("checkpoint", type=Path, help="what qgraph.save wrote")
    export.add_argument("factory", help=FACTORY)
    export.add_argument("out", type=Path, help="the .onnx file to write")
    export.add_argument("--target", choices=("ort", "standard", "qdq"), default="ort", help="(%(default)s)")
    export.add_argument("--opset", type=int)
    export.add_argument("--scale-dtype", choices=("float32", "float16"), default="float32", help="(%(default)s)")
    export.add_argument("--preunpacked", action="store_true", help="store weights as a runtime holds them")
    export.add_argument("--optimize-for", choices=("latency", "throughput", "size"), help="by which a form is chosen")
    export.add_argument("--no-verify", action="store_true", help="do not run the file against the model")
    _takes_inputs(export)

    verify = _command(commands, "verify", _verify, "run a file against the model that it was made from")
    verify.add_argument("file", type=Path, help="an .onnx file")
    verify.add_argument("factory", help=f"{FACTORY}; a prepared model, or a float one with --checkpoint")
    verify.add_argument("--checkpoint", type=Path, help="what qgraph.save wrote, loaded into the model")
    verify.add_argument(
        "--allow",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the values that may be beyond rounding: quantized activations on a tie (%(default)s)",
    )
    _takes_inputs(verify)

    bench = _command(commands, "bench", _bench, "size, load time and latency of files, in turns in one process")
    bench.add_argument("files", type=Path, nargs="+", metavar="FILE", help=".onnx files; the first is 1.00x")
    bench.add_argument("--runs", type=int, default=100, help="timed runs of each (%(default)s)")
    bench.add_argument("--threads", type=int, default=1, help="threads of onnxruntime (%(default)s)")
    bench.add_argument(
        "--size", action="append", default=[], metavar="NAME=N", help="a dynamic dimension's size; else 1"
    )
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON on stdout")
    parser.set_defaults(run=run)
    return parser


def _takes_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", action="append", default=[], metavar="SHAPE[:DTYPE]", help=INPUT)


def _demo(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from qgraph import demo

    recipe = demo.Recipe()
    if options.epochs is not None:
        recipe = replace(recipe, epochs=options.epochs)
    columns = (TextColumn("{task.description:32}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading the digits", total=1.0)
        result = demo.run(
            options.out,
            recipe,
            options.configs or demo.CONFIGS,
            options.models or tuple(demo.MODELS),
            lambda what, share: progress.update(task, description=what, advance=share),
            options.jobs,
        )
    if options.json:
        _print_json(result.to_dict())
    else:
        console = Console()
        console.print(result.table())
        console.print("\n".join(result.notes()), style="dim", highlight=False)
        console.print(f"{result.seconds:.0f} s; files in {options.out.resolve()}", highlight=False, soft_wrap=True)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from qgraph.inspection import inspect

    if _is_file(options.target):
        if options.config or options.input:
            raise InspectError(f"{options.target}: --config and --input belong to a model, not to a file.")
        found = inspect(options.target)
    else:
        model, example = _model(options.target, options.input)
        if options.config:
            from qgraph.prepare import prepare

            model = prepare(model, options.config, example)
        found = inspect(model)
    page = found.to_html(options.html) if options.html else None
    if options.json:
        _print_json({**found.to_dict(), **({"html": str(page)} if page else {})})
        return 0
    print(found)
    if page:
        print(f"\n{page}: open it in a browser")
    if options.graphs:
        for path, code in found.graphs.items():
            print(f"\n# {path or 'the model itself'}\n{code}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from qgraph.inspection import inspect
    from qgraph.inspection.difference import difference

    a, b = (inspect(target if _is_file(target) else _model(target, [])[0]) for target in (options.a, options.b))
    found = difference(a, b)
    if options.json:
        _print_json(found.to_dict())
    else:
        print(found)
    return WRONG if found.changes else 0


def _compare(options: argparse.Namespace) -> int:
    from qgraph.analysis.compare import compare

    sides: list[Any] = []
    example: Any = tuple(map(_example, options.input)) or None
    for target in (options.a, options.b):
        model, own = (Path(target), None) if _is_file(target) else _model(target, [])
        sides.append(model)
        example = own if example is None else example
    if example is None:
        raise InspectError("found no example inputs; expected --input, or a factory that returns (model, inputs).")
    if options.config:
        if isinstance(sides[1], Path):
            raise InspectError(f"{options.b}: --config belongs to a model, not to a file.")
        from qgraph.prepare import prepare

        sides[1] = prepare(sides[1], options.config, example)
    found = compare(sides[0], sides[1], example)
    plot = None if options.plot is None else str(found.plot(options.plot, threshold=options.threshold))
    drop = found.first_drop(float("-inf") if options.threshold is None else options.threshold)
    if options.json:
        data = {**found.to_dict(), "threshold": options.threshold, "first_drop": drop.to_dict() if drop else None}
        data |= {} if plot is None else {"plot": plot}
        _print_json(data)
    else:
        print(found)
        if drop:
            print(f"first drop: {drop.name}")
        if plot:
            print(f"plot: {plot}")
    return WRONG if drop else 0


def _export(options: argparse.Namespace) -> int:
    from qgraph.checkpoint import load
    from qgraph.exporters.onnx import export

    model, example = _model(options.factory, options.input, needs_example=True)
    prepared = load(options.checkpoint, model, example)
    report = export(
        prepared,
        options.out,
        example,
        target=options.target,
        opset=options.opset,
        scale_dtype=options.scale_dtype,
        preunpacked=options.preunpacked,
        optimize_for=options.optimize_for,
        verify=not options.no_verify,
        progress=not options.json,
    )
    if options.json:
        _print_json(report.to_dict())
    else:
        print(report)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from qgraph.graph import is_prepared
    from qgraph.runtime import verify

    model, example = _model(options.factory, options.input, needs_example=True)
    if options.checkpoint:
        from qgraph.checkpoint import load

        model = load(options.checkpoint, model, example)
    elif not is_prepared(model):
        raise InspectError(
            f"{options.factory}: gives a float model; expected a prepared one, or --checkpoint with weights."
        )
    found = verify(options.file, model, example)
    good = found.beyond <= options.allow * found.values
    if options.json:
        _print_json({"file": str(options.file), "good": good, **found.to_dict()})
    else:
        print(
            f"{options.file}: {'the same' if good else 'NOT the same'} as {options.factory}: "
            f"largest difference {found.max_difference:.1e} of the largest output, "
            f"{found.beyond} of {found.values} values beyond rounding, "
            f"{found.same_decisions:.1%} of the decisions the same"
        )
    return 0 if good else WRONG


def _bench(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from qgraph.runtime import time_files

    timings = time_files(options.files, options.runs, dict(map(_size, options.size)), options.threads)
    if options.json:
        _print_json({"runs": options.runs, "threads": options.threads, "files": [asdict(t) for t in timings]})
        return 0
    table = Table()
    for name in ("file", "KB", "load s", "median ms", "speed"):
        table.add_column(name, justify="left" if name == "file" else "right", overflow="fold")
    for timing in timings:
        table.add_row(
            timing.file,
            f"{timing.file_bytes / 1024:,.1f}",
            f"{timing.load_seconds:.3f}",
            f"{timing.median_ms:.3f}",
            f"{timing.speedup:.2f}x",
        )
    Console().print(table)
    return 0


def _is_file(target: str) -> bool:
    return target.endswith(".onnx") or Path(target).exists() or ":" not in target


def _model(target: str, inputs: list[str], needs_example: bool = False) -> tuple[nn.Module, Any]:
    """Call an importable factory; the example is from `--input`, else the factory's own, else None."""
    from torch import nn

    module_name, _, name = target.partition(":")
    with _importable_from_here():
        try:
            factory: Any = importlib.import_module(module_name)
            for part in name.split("."):
                factory = getattr(factory, part)
        except (ImportError, AttributeError) as error:
            raise InspectError(f"{target}: cannot be imported: {error}; expected {FACTORY}.") from error
        made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InspectError(f"{target}: gives a {type(model).__name__}; expected {FACTORY}.")
    if inputs:
        example = tuple(map(_example, inputs))
    if example is None and needs_example:
        raise InspectError(f"{target}: gives no example inputs; return (model, example_inputs), or pass --input.")
    return model, example


@contextlib.contextmanager
def _importable_from_here() -> Iterator[None]:
    """A console script does not look for modules in the working folder; `python -m` does."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")


def _example(text: str) -> Any:
    import torch

    shape_text, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    sizes = shape_text.split("x")
    if not isinstance(dtype, torch.dtype) or not all(size.isdecimal() for size in sizes):
        raise InspectError(f"--input {text}: expected SHAPE[:DTYPE], such as 1x3x32x32 or 2x16:int64.")
    shape = [int(size) for size in sizes]
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)  # indices into tables of unknown length


def _size(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdecimal():
        raise InspectError(f"--size {text}: expected NAME=N, such as batch=8.")
    return name, int(size)


def _print_json(data: Any) -> None:
    json.dump(data, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    sys.exit(main())
