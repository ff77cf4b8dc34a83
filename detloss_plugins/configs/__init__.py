"""The configs that come with the package, found by name.

>>> find("retinanet_r18_fpn_digits").name
'retinanet_r18_fpn_digits.py'

They are the files of the repository's folder ``configs``, which a wheel has in this one.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["FRAMEWORKS", "find", "names", "path_of", "read_yaml"]

FRAMEWORKS = ("mmdetection", "mmrotate", "ultralytics")
_HERE = Path(__file__).parent
_FOLDER = _HERE if (_HERE / FRAMEWORKS[0]).is_dir() else _HERE.parents[1] / "configs"


def names(framework: str | None = None) -> list[str]:
    """Names of the configs, sorted: files without their suffix.

    Args:
        framework: one of ``FRAMEWORKS``, or None for all.

    Raises:
        ValueError: for another framework.

    >>> names("ultralytics")[:3]
    ['alrp', 'ap', 'atfl']
    """
    if framework not in (None, *FRAMEWORKS):
        raise ValueError(f"There are configs for {', '.join(FRAMEWORKS)}, and none for {framework!r}.")
    return sorted(_paths(FRAMEWORKS if framework is None else (framework,)))


def find(name: str) -> Path:
    """Path of a config: a ``.py`` for mmengine, or a ``.yaml`` of losses for Ultralytics.

    Args:
        name: its file's name without the suffix.

    Raises:
        ValueError: for an unknown name; the message gives the nearest ones.
    """
    paths = _paths(FRAMEWORKS)
    if name not in paths:
        nearest = difflib.get_close_matches(name, paths, n=3)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "`detloss list --configs` lists them."
        raise ValueError(f"There is no config named {name!r}; {hint}")
    return paths[name]


def path_of(word: str | Path) -> Path:
    """The file that a word means: a path itself, as is what has a suffix or a folder; else a config of the package.

    Raises:
        ValueError: for an unknown name, as :func:`find`.

    >>> path_of("mine.yaml").name, path_of("qfl").name
    ('mine.yaml', 'qfl.yaml')
    """
    path = Path(word)
    given = isinstance(word, Path) or path.suffix or len(path.parts) > 1
    return path if given or (is_file(path) and word not in _paths(FRAMEWORKS)) else find(str(word))


def is_file(word: str | Path) -> bool:
    """Whether a word is the path of a file that is there."""
    try:
        return Path(word).is_file()
    except OSError:  # it is too long for the name of one
        return False


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it cannot be read, is no YAML, or has a key twice, of which YAML readers take the last.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _EachKeyOnce)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except _KeyTwiceError as error:
        raise ValueError(f"{path} {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error


class _KeyTwiceError(ValueError):
    """Which key is there twice in a YAML file, and in which lines."""


class _EachKeyOnce(yaml.SafeLoader):
    """The safe loader, which refuses a key that a dict has twice."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise _KeyTwiceError(f"has the key {key.value} twice, in line {lines[name]} and in line {line}.")
            lines[name] = line
        return node


def _paths(frameworks: Iterable[str]) -> dict[str, Path]:
    """``{name: path}``; what is in ``_base_`` is a part of others, and no config."""
    files = (path for framework in frameworks for path in (_FOLDER / framework).iterdir())
    return {path.stem: path for path in files if path.suffix in {".py", ".yaml"}}
