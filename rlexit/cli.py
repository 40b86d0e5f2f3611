"""The command line: one command, one verb per step. Imports no torch until a verb does its work."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlexit import __version__
from rlexit.registry import unknown

if TYPE_CHECKING:
    from rlexit.settings import Parser

VERBS = {
    "run": "train, distill, refine, calibrate, evaluate and report, skipping what is done",
    "train": "make a teacher (PPO for Atari, SGD for images)",
    "import": "adopt a teacher: --sb3 FILE.zip or --weights FILE, --as NAME, without unpickling anything",
    "distill": "train exits on the frozen teacher",
    "refine": "reinforcement learning on exit and gate decisions: reward minus a price on compute",
    "calibrate": "choose thresholds: --target_macs 0.5 or --max_return_drop 0.05",
    "evaluate": "play test episodes at a grid of thresholds and at the calibrated ones",
    "report": "tables, plots and one HTML page from any run folders",
    "video": "one episode with exit, confidence and action drawn beside the frame",
    "export": "ONNX graphs that rlexit.serve runs without torch (--format onnx, onnx-if), or a zip for SB3 (sb3)",
    "bench": "latency, alone, in batches and in the loop: torch, SB3's predict, onnxruntime, openvino; every exit, the mix",
    "list": "configs, games, methods, rules, runs",
    "doctor": "versions, ROMs, threads, extras and what is missing",
}
SHORTHANDS = {
    "--target_macs": "calibrate.target_macs",
    "--max_return_drop": "calibrate.max_return_drop",
    "--data": "data.path",
}
PRINT_CONFIG = "--print_config"
USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0, or 2 after one line on what is wrong and the way out, or 128 + signal after a safe stop.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except SystemExit as end:  # how argparse ends after --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, LookupError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("RLEXIT_TRACEBACK"):
            raise
        sys.stderr.write(f"rlexit: {one_line(error)}\n")
        return USAGE_ERROR


def one_line(error: BaseException) -> str:
    """An error as one line that names the thing and the way out."""
    import errno

    text = error.args[0] if isinstance(error, LookupError) and error.args else error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" while writing `{error.filename}`" if error.filename else ""
        text = f"the disk is full{where}. What was saved before is intact; free some space and run the same command."
    return re.sub(r"\s+", " ", str(text)).strip()


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    epilog = textwrap.dedent("""
        NAME is a config (`rlexit list configs`) or a run folder. Every setting can be given: --train.total_steps 3e6.
        `rlexit VERB NAME --print_config` shows them all; the order is NAME < --config FILE|NAME < command line.
        """)
    return argparse.ArgumentParser(
        prog="rlexit",
        description="Early exits for policies and classifiers: train once, run at any compute budget.\n\nverbs:\n"
        + verbs,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _dispatch(words: list[str]) -> int:
    parser = _parser()
    parser.add_argument("--version", action="version", version=f"rlexit {__version__}")
    parser.add_argument("verb", metavar="VERB", nargs="?")
    if not words or words[0] in ("-h", "--help", "--version"):
        parser.parse_args(words or ["--help"])
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise unknown("VERB", verb, VERBS)
    if verb in ("report", "list", "doctor"):
        from rlexit import desk

        return int(getattr(desk, f"{verb}_verb")(rest))
    return _run_verb(verb, rest)


def _common(verb: str) -> Parser:
    from rlexit.settings import Parser

    parser = Parser(
        prog=f"rlexit {verb}",
        description=VERBS[verb],
        allow_abbrev=False,
        epilog=f"All settings: rlexit {verb} NAME --print_config",
    )
    if verb != "import":
        parser.add_argument("name", metavar="NAME", help="config or run folder")
    else:
        parser.add_argument(
            *("--sb3", "--weights"),
            dest="file",
            metavar="FILE",
            type=Path,
            required=True,
            help="zip saved by stable-baselines3, or a classifier's weights",
        )
        parser.add_argument("--as", dest="name", metavar="NAME", required=True, help="config of its game or data set")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, metavar="SEED", help="default: 0")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: all cores)")
    parser.add_argument("--force", action="store_true", help="start stages of another config over")
    parser.add_argument("--dry_run", action="store_true", help="resolve, build and count; write nothing")
    if verb in ("train", "distill", "evaluate", "bench"):
        what = "that torch is timed on" if verb == "bench" else "that networks learn and play on"
        parser.add_argument("--device", default="cpu", help=f"{what}: cpu, cuda or cuda:N")
    if verb == "video":
        parser.add_argument("--episode", type=int, default=0, help="index of the test episode")
        parser.add_argument("--policy", default=None, help="label of a calibrated exit policy (default: the first)")
        parser.add_argument("--steps", type=int, default=450, help="at most so many env steps")
    if verb in ("export", "bench"):
        parser.add_argument("--method", default=None, help="with exits; for export also static or teacher")
        parser.add_argument("--policy", default=None, help="calibrated exit policy, 'exit 0', ... (default: the first)")
    if verb == "export":
        parser.add_argument("--format", default="onnx", help="onnx (a graph per stage), onnx-if (one graph) or sb3")
        parser.add_argument(
            "--to", type=Path, default=None, metavar="PATH", help="default: export/ in the method's folder"
        )
        parser.add_argument("--rows", type=int, default=10_000, help="held-out observations that it is checked on")
    if verb == "bench":
        parser.add_argument("--rows", type=int, default=300, help="decisions timed per contender and repeat")
        parser.add_argument("--repeats", type=int, default=7, help="contenders take turns so often")
        parser.add_argument("--batches", type=int, nargs="*", default=[64, 256], metavar="N", help="rows per call")
        runtimes = ("eager", "compiled", "predict", "onnxruntime", "openvino")
        parser.add_argument("--runtimes", nargs="+", default=runtimes, metavar="NAME", help=", ".join(runtimes))
    return parser


def _run_verb(verb: str, words: list[str]) -> int:
    parser = _common(verb)
    words, settings = _parted(words, parser)
    options, left = parser.parse_known_args(words)
    settings += left
    from rlexit.settings import locate, resolve, to_yaml

    place = locate(options.name, options.out)
    if any(word.split("=")[0] == "--methods" for word in settings):
        place = replace(place, methods=())
    config = resolve(place, [_shorthand(word) for word in settings if word != PRINT_CONFIG])
    if PRINT_CONFIG in settings:
        sys.stdout.write(to_yaml(config))
        return 0
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"`--threads` must be at least 1, got {options.threads}.")
    seeds = options.seeds if options.seeds is not None else [place.seed]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"`--seeds` must be different numbers of at least 0, got {seeds}.")
    from rlexit import desk

    return desk.work(verb, options, config, place, seeds)


def _parted(words: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Words for the verb's own parser, and settings; a setting takes one value, so it may also stand before NAME."""
    own: list[str] = []
    settings: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name == "--" or name in parser.flags:
            own.append(word)
        elif equals or word == PRINT_CONFIG:
            settings.append(word)
        else:
            settings += [word, *(value for value in (next(left, None),) if value is not None)]
    return own, settings


def _shorthand(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--{SHORTHANDS[name]}{equals}{value}" if name in SHORTHANDS else word
