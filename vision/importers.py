"""Given weights of classifiers: safetensors, state dicts that are read without unpickling code, and names of timm's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rlexit.statedicts import ImportRefused, Reader, printable

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, ".pt", ".pth", ".th", ".bin")
MAX_BYTES = 512 << 20
MAX_PROGRAM_BYTES = 1 << 20
TIMM = "timm:"
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)

_READER = Reader(
    MAX_BYTES,
    again="Get the file again, or save a plain state dict again with `torch.save`.",
    others="Only weights of the backbones here can be read.",
    old="Load it with torch where you trust its maker, and save its state dict again, best as safetensors.",
    max_program=MAX_PROGRAM_BYTES,
    extra_opcodes=frozenset({"BINFLOAT", "NONE"}),
    wrappers=("state_dict", "model"),
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from a file.

    A state dict may lie under the key `state_dict` or `model`, and its names may start with `module.`, as a wrapper
    for several GPUs leaves them.

    Raises:
        ImportRefused: the file is missing, of another kind, too large, cut, or holds more than finite tensors. Nothing in
            it was run.
    """
    where = f"`{printable(str(path))}`"
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ImportRefused(f"{where} must end in {', '.join(SUFFIXES)}. Save a plain state dict.")
    data = _READER.file_bytes(path, where)
    if path.suffix == SAFETENSORS:
        try:
            found = load(data)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ImportRefused(f"{where} is cut, or no safetensors. {_READER.again}") from error
    else:
        found = _READER.state_dict(data, where)
    checked = {_checked(name, value, where): value for name, value in found.items()}
    if len(checked) < len(found):
        raise ImportRefused(f"{where} must name each tensor once, got some with and without `module.`. {_READER.again}")
    return checked


def _checked(name: str, tensor: Tensor, where: str) -> str:
    """The plain name of a tensor that holds numbers."""
    key = printable(name)
    # A view with stride 0 claims terabytes that the file does not hold.
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ImportRefused(f"`{key}` in {where} must be contiguous. {_READER.again}")
    if tensor.dtype not in DTYPES:
        raise ImportRefused(f"`{key}` in {where} must be of ordinary numbers, got {tensor.dtype}. {_READER.again}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ImportRefused(f"`{key}` in {where} must be finite, got NaN or infinity. Take an earlier save of it.")
    return name.removeprefix("module.")


def timm_weights(name: str) -> dict[str, Tensor]:
    """Tensors by name of a pretrained model of timm's, from its cache or the hub.

    Args:
        name: such as `resnet50.a1_in1k`.
    Raises:
        ImportError: timm is not installed.
        LookupError: timm has no pretrained weights of that name, or they cannot be reached.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"`teacher` {TIMM}{name} needs timm: pip install 'rlexit[timm]'.") from error
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's, the network's and timm's own errors have no common ancestor
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise LookupError(f"`teacher` must be a pretrained model of timm's, got {name!r}: {reason}") from error
    return dict(model.state_dict())


def given_weights(source: str) -> tuple[dict[str, Tensor], str]:
    """Tensors by name of a file, or of a model of timm's where the source starts with `timm:`; and what to call them."""
    if source.startswith(TIMM):
        return timm_weights(source.removeprefix(TIMM)), f"`{source}`"
    path = Path(source).expanduser()
    return read_weights(path), f"`{path}`"
