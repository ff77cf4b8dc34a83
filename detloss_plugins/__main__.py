"""``python -m detloss_plugins`` is the command ``detloss``."""

from detloss_plugins.cli import main

if __name__ == "__main__":
    main(prog_name="detloss")
