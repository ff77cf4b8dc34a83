"""Build the embedded digits set, or one of its scenarios, and print its folder."""

import argparse

from detloss_plugins.testing import digits

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=digits.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--task", choices=digits.PREFIXES, default="detect", help="the task of Ultralytics that it is for"
    )
    parser.add_argument(
        "--scenario", choices=digits.SCENARIOS, default="plain", help="for detection, one of those above"
    )
    args = parser.parse_args()
    try:
        print(digits.build_digits(args.task, args.scenario))
    except ValueError as error:
        parser.error(str(error))
