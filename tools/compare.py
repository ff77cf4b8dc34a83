"""``detloss compare`` from a checkout of the repository."""

from detloss_plugins.cli import main

if __name__ == "__main__":
    import sys

    main(["compare", *sys.argv[1:]], prog_name="detloss")
