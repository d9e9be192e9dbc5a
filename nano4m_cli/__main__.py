"""`nano4m`, also as `python -m nano4m_cli`."""

from nano4m_cli.cli._app import app


def main() -> None:
    app(prog_name="nano4m")


def _leave(code: object) -> None:
    """End a process of a group at once, its buffers written: while Python goes down threads of gloo still call into it, and now
    and then one brings the process to an abort after its work was done."""
    import atexit
    import os
    import sys
    import time

    if code and os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # what concerns all is said by the first, which torchrun ends as soon as another has failed
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    import os

    try:
        main()
    except SystemExit as err:
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            _leave(err.code)
        raise
