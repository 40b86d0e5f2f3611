"""Files that come with rlexit: where the configs are, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

# What makes a folder a run: the resolved config, as its first stage was begun with.
CONFIG = "config.yaml"


def config_folder() -> Path:
    """The folder that holds `<domain>/<name>.yaml`.

    Returns:
        `rlexit/configs` of an installed wheel, else `configs` at the top of the checkout.
    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"`configs` must lie in or beside the package, got neither at {package}. Reinstall rlexit.")


def config_files(folder: Path | None = None) -> dict[str, Path]:
    """Every config that comes with rlexit, by name.

    A name is the path below `configs/<domain>/` without `.yaml`: `pong`, `cifar10/resnet56_ztw`. What a name means must
    not depend on the domain, since the command line takes it alone.

    Args:
        folder: where to look; `config_folder()` if not given.
    Returns:
        Names in alphabetical order, each with its file.
    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: two domains have a config of the same name.
    """
    root = config_folder() if folder is None else folder
    if not root.is_dir():
        raise FileNotFoundError(f"`folder` must be a folder of configs, got {root}. Give an existing one.")
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/**/*.yaml")):
        domain, *parts = path.relative_to(root).with_suffix("").parts
        name = "/".join(parts)
        if name in found:
            other = found[name].relative_to(root).parts[0]
            raise ValueError(f"`configs` must name a config once, got {name!r} in {other} and {domain}. Rename one.")
        found[name] = path
    return dict(sorted(found.items()))
