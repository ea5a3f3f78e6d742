"""``python -m normlab`` and the command ``normlab``: the door to the workbench."""

import sys


def main() -> None:
    """Run the command line, or say which extra is missing."""
    try:
        from normlab.lab.cli import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("normlab"):
            raise
        sys.stderr.write(
            f"normlab: expected the workbench to be installed, got no {error.name}; "
            "run: pip install 'normlab[lab]'\n"
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
