"""The data sets of a grid by name."""

from pathlib import Path


def locate(word: str) -> tuple[str, str, dict]:
    """Name, path and training arguments of a data set; the digits' path is empty, as each machine builds them.

    The path is that of a data YAML, or of a folder in COCO layout that has none.

    Raises:
        ValueError: if there is none.
    """
    name, _, scenario = word.partition(":")
    if name == "digits":
        from detloss_plugins.testing.digits import DIGITS_ARGS

        digits_folder(word)
        args = {key: value for key, value in DIGITS_ARGS.items() if key not in ("epochs", "plots")}
        return "digits" if scenario in ("", "plain") else word, "", args
    path = Path(word).absolute()
    if path.is_dir():
        if not yamls_in(path) and (path / "annotations").is_dir():
            return path.name, str(path), {}
        path = yaml_in(path)
    elif not path.is_file():
        raise ValueError(f"There is no data set {word}: give digits, digits:SCENARIO, a data YAML or its folder.")
    return path.parent.name if path.stem in ("data", "dataset") else path.stem, str(path), {}


def yamls_in(folder: Path) -> list[Path]:
    """The YAML files in a folder."""
    return sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])


def yaml_in(folder: Path) -> Path:
    """The data YAML in a folder; ``ValueError`` unless there is exactly one."""
    found = yamls_in(folder)
    if len(found) != 1:
        raise ValueError(f"{folder} must hold exactly one data YAML, but holds {len(found)}; give its path.")
    return found[0]


def digits_folder(name: str) -> Path:
    """The folder of "digits" or "digits:SCENARIO", built if it is not there; ``ValueError`` for another scenario."""
    from detloss_plugins.testing.digits import SCENARIOS, build_digits

    scenario = name.partition(":")[2] or "plain"
    if scenario not in SCENARIOS:
        raise ValueError(f"digits has the scenarios {', '.join(SCENARIOS)}, and no {scenario}.")
    return build_digits(scenario=scenario)
